"""`thrifty device`: measure the machine at hand, in some seconds, so that plans hold on it.

Matrix products and attention by pass, size and dtype, memory bandwidth, the first touch of new
memory, the launch of an operation; then real training steps and forward passes of small Llamas, to
which the factors of the roofline (``costs/time.py``) are fitted by non-negative least squares of
the relative errors. Of kernels the fastest round counts, of steps, interleaved, the median; if
these differ by more than 10% the machine is busy.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from thrifty.costs.hardware import DEVICES, Device, keep, load_device
from thrifty.costs.memory import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import PASSES, step_terms

ROUNDS = 3
KERNEL_ROUNDS = 12
BUSY = 0.10
_SIZES = (16, 64, 128, 256, 512, 1024)
_ROWS = 1024
_MAX_FLOPS = 3e8
_SHORT_SECONDS = 0.01
_SLOW_SECONDS = 0.08
_FEW_ROWS = 128
_EMULATED = 0.5
"""Of float32's rate: a dtype slower than this is emulated."""

# hidden, layers, intermediate, vocabulary, batch, sequence: small, so that it stays a few seconds
_STEPS = (
    (64, 3, 192, 512, 4, 128),
    (128, 3, 512, 2048, 4, 256),
    (128, 3, 512, 2048, 1, 256),
    (256, 2, 704, 4096, 2, 256),
    (384, 2, 1024, 2048, 2, 128),
)
_SHORT_STEPS = ((64, 2, 192, 512, 2, 128), (128, 2, 344, 1024, 1, 256))
"""Of a dtype that is emulated, and so many times as slow."""
_CUDA_STEPS = (
    (512, 4, 1408, 32000, 8, 512),
    (1024, 4, 2816, 32000, 8, 1024),
    (2048, 2, 5632, 32000, 4, 2048),
    (2048, 2, 5632, 32000, 1, 512),
)


def measure_once(say: Callable[[str], None]) -> None:
    """Measure this machine unless it was, at the number of threads in force."""
    import torch

    known = load_device(None)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not known.calibrated or known.kind != kind or known.num_threads != torch.get_num_threads():
        say("measuring this machine, once, a few seconds ...")
        measure_device()


def measure_device() -> Device:
    """Measure this machine and keep the result for plans to come."""
    import torch

    cuda = torch.cuda.is_available()
    where = "cuda" if cuda else "cpu"
    device = _bare(torch, where)
    rates = {name: _linear_rates(torch, where, name) for name in PASSES}
    peaks = {dtype: max(curve.values()) for dtype, curve in rates["forward"].items()}
    gradients = {name: rates[name] for name in PASSES[1:]}
    device = replace(
        device,
        matmul_rates=rates["forward"],
        attention_rates=_attention_rates(torch, where, tuple(peaks)),
        gradient_rates={
            **gradients,
            "attention": _attention_rates(torch, where, tuple(peaks), backward=True),
        },
        emulated=tuple(
            dtype
            for dtype, peak in peaks.items()
            if where == "cpu" and peak < _EMULATED * peaks["float32"]
        ),
        fault_seconds=_first_touch(torch) if where == "cpu" else 0.0,
        flops_per_second=peaks,
        bytes_per_second=_bandwidth(torch, where),
        operation_seconds=_launch(torch, where),
    )
    device = replace(device, calibrated=True)
    for dtype in device.flops_per_second:
        factors, busy = _fit(torch, where, dtype, device)
        device = replace(
            device,
            factors={**device.factors, dtype: factors},
            machine_busy=device.machine_busy or busy,
        )
    keep(device)
    return device


def _bare(torch: Any, where: str) -> Device:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    threads = torch.get_num_threads()
    if where == "cpu":
        return replace(
            load_device(None),
            name="local",
            kind="cpu",
            num_threads=threads,
            measured_at=now,
            source=f"measured: {platform.machine()}, torch {torch.__version__}, {threads} threads",
        )
    properties = torch.cuda.get_device_properties(0)
    known = [d for d in DEVICES.values() if d.name.split("-")[0] in properties.name.lower()]
    return Device(
        name=known[0].name if known else "local",
        kind="cuda",
        memory_bytes=float(properties.total_memory),
        flops_per_second={"float32": 1.0},
        bytes_per_second=1.0,
        operation_seconds=1.0,
        tdp_watts=known[0].tdp_watts if known else None,
        num_threads=threads,
        measured_at=now,
        source=f"measured: {properties.name}, torch {torch.__version__}",
    )


def _seconds(run: Callable[[], object], torch: Any, where: str) -> float:
    if where == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if where == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _fastest(
    runs: Sequence[Callable[[], object]], torch: Any, where: str, least: float = 0.002
) -> list[float]:
    """Seconds of each run: the fastest of interleaved rounds.

    Whatever else runs can only slow them, and misses some of many short rounds; how busy the
    machine is shows in the steps.
    """
    times, every = [], []
    for run in runs:
        run()
        once = max(_seconds(run, torch, where), 1e-7)
        times.append(max(1, int(least / once)))
        every.append(1 if once < _SHORT_SECONDS else 4)  # a slow one in every fourth round
    fastest = [float("inf")] * len(runs)
    for turn in range(KERNEL_ROUNDS):
        for i, (run, n) in enumerate(zip(runs, times, strict=True)):
            if turn % every[i] == 0:
                spent = _seconds(partial(_repeat, run, n), torch, where) / n
                fastest[i] = min(fastest[i], spent)
    return fastest


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()  # its result is freed at once, so that the next one finds its memory


def _linear_rates(torch: Any, where: str, of: str) -> dict[str, dict[int, float]]:
    """FLOP/s of square linears by dtype and width, in one of ``PASSES``."""
    sizes = _SIZES if where == "cpu" else (16, 128, 512, 2048, 8192)
    most = _MAX_FLOPS if where == "cpu" else 1e13
    chosen: list[tuple[str, int, float]] = []
    runs: list[Callable[[], object]] = []
    for dtype in ("float32", "bfloat16"):
        at_most = _ROWS if where == "cpu" else 8192
        for size in sizes:
            rows = int(min(at_most, most / (2 * size * size)))
            run, spent = _linear(torch, where, of, dtype, rows, size)
            if spent > _SLOW_SECONDS and rows > _FEW_ROWS:
                rows = at_most = _FEW_ROWS
                run, spent = _linear(torch, where, of, dtype, rows, size)
            if size > sizes[0] and spent > _SLOW_SECONDS:
                break  # emulated on this processor: larger ones only take longer to say so
            chosen.append((dtype, size, 2.0 * rows * size * size))
            runs.append(run)
    rates: dict[str, dict[int, float]] = {}
    for (dtype, size, flops), spent in zip(chosen, _fastest(runs, torch, where), strict=True):
        rates.setdefault(dtype, {})[size] = flops / spent
    return rates


def _linear(
    torch: Any, where: str, of: str, dtype: str, rows: int, size: int
) -> tuple[Callable[[], object], float]:
    """A pass of a linear, and its seconds once."""
    kind = getattr(torch, dtype)
    x, gradient = (torch.randn(rows, size, device=where, dtype=kind) for _ in range(2))
    weight = torch.randn(size, size, device=where, dtype=kind)
    passes: dict[str, Callable[[], object]] = {
        "forward": lambda: torch.nn.functional.linear(x, weight),
        "input": lambda: gradient @ weight,
        "weight": lambda: gradient.T @ x,
    }
    run = passes[of]
    run()
    return run, _seconds(run, torch, where)


def _attention_rates(
    torch: Any, where: str, dtypes: Sequence[str], *, backward: bool = False
) -> dict[str, dict[int, float]]:
    """FLOP/s of masked attention by dtype and size of a head: of its forward, or of its backward,
    which has five products to the forward's two."""
    length, heads = (256, 4) if where == "cpu" else (1024, 64)
    sizes = (8, 16, 32, 64, 128) if where == "cpu" else (64, 128)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=where).tril()
    chosen: list[tuple[str, int]] = []
    runs: list[Callable[[], object]] = []
    for dtype in dtypes:
        for size in sizes:
            shape, kind = (1, heads, length, size), getattr(torch, dtype)
            q, k, v = (
                torch.randn(shape, device=where, dtype=kind, requires_grad=backward)
                for _ in range(3)
            )
            attention = torch.nn.functional.scaled_dot_product_attention
            run: Callable[[], object] = partial(attention, q, k, v, attn_mask=mask)
            if backward:
                out = attention(q, k, v, attn_mask=mask)
                run = partial(_gradients, torch, out, (q, k, v), torch.ones_like(out))
            run()
            if size > sizes[0] and _seconds(run, torch, where) > _SLOW_SECONDS:
                break
            chosen.append((dtype, size))
            runs.append(run)
    rates: dict[str, dict[int, float]] = {}
    flops = (10.0 if backward else 4.0) * heads * length**2
    for (dtype, size), spent in zip(chosen, _fastest(runs, torch, where), strict=True):
        rates.setdefault(dtype, {})[size] = flops * size / spent
    return rates


def _gradients(torch: Any, out: Any, inputs: tuple[Any, ...], given: Any) -> object:
    return torch.autograd.grad(out, inputs, given, retain_graph=True)


def _first_touch(torch: Any) -> float:
    """Seconds a byte of memory that was never touched takes above memory that was."""
    count = 2**24
    known = torch.empty(count)

    def fresh() -> None:
        torch.empty(count).fill_(1.0)

    warm, cold = _fastest([lambda: known.fill_(1.0), fresh], torch, "cpu")
    return max(0.0, cold - warm) / (4.0 * count)


def _bandwidth(torch: Any, where: str) -> float:
    """Bytes read and written by an addition too large for any cache."""
    count = 2**23 if where == "cpu" else 2**28
    left, right = (torch.ones(count, device=where) for _ in range(2))
    out = torch.empty_like(left)
    (spent,) = _fastest([lambda: torch.add(left, right, out=out)], torch, where)
    return 3 * 4.0 * count / spent


def _launch(torch: Any, where: str) -> float:
    x = torch.ones(8, device=where)
    (spent,) = _fastest([lambda: [x.add_(1.0) for _ in range(100)]], torch, where)
    return spent / 100


def _steps(device: Device, dtype: str) -> Sequence[tuple[int, int, int, int, int, int]]:
    if device.kind == "cuda":
        return _CUDA_STEPS
    return _SHORT_STEPS if dtype in device.emulated else _STEPS


def _fit(
    torch: Any, where: str, dtype: str, device: Device
) -> tuple[tuple[float, float, float, float], bool]:
    """Factors of the roofline's terms, and whether repeats of a step differed by over 10%."""
    from scipy.optimize import nnls

    runs: list[tuple[tuple[float, ...], Callable[[], object]]] = []
    for sizes in _steps(device, dtype):
        model, optimizer, batch = _llama(torch, where, dtype, *sizes)
        shape = ModelShape.from_config(model.config.to_dict())
        setting = MemorySetting(
            micro_batch=sizes[4], sequence=sizes[5], dtype=dtype, device_kind=device.kind
        )
        plain = replace(setting, masked=False)
        runs.append(
            (
                step_terms(shape, setting, device, "train"),
                lambda m=model, o=optimizer, b=batch: _train_step(m, o, b),  # type: ignore[misc]
            )
        )
        runs.append(
            (
                step_terms(shape, plain, device, "forward"),
                lambda m=model, b=batch: _forward_step(torch, m, b),  # type: ignore[misc]
            )
        )
    spent = np.zeros((ROUNDS, len(runs)))
    for _, run in runs:
        run()
    for turn in range(ROUNDS):
        for i, (_, run) in enumerate(runs):
            spent[turn, i] = _seconds(run, torch, where)
    measured = np.median(spent, axis=0)
    busy = bool(np.median(np.ptp(spent, axis=0) / measured) > BUSY)
    terms = np.array([t for t, _ in runs])
    # Products and memory traffic grow together in these steps: a pull to one keeps either from
    # taking the other's share, and a weaker one what they hardly show from vanishing.
    pull = np.array([0.3, 0.3, 0.05, 0.1])
    fitted, _ = nnls(
        np.vstack([terms / measured[:, None], np.diag(pull)]),
        np.concatenate([np.ones(len(runs)), pull]),
    )
    a, b, c, d = (float(f) for f in fitted)
    return (a, b, c, d), busy


def _llama(
    torch: Any,
    where: str,
    dtype: str,
    hidden: int,
    layers: int,
    inner: int,
    vocabulary: int,
    batch: int,
    sequence: int,
) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32) if where == "cpu" else hidden // 64,
        max_position_embeddings=sequence,
        tie_word_embeddings=True,
        use_cache=False,
    )
    generator = torch.random.get_rng_state()
    model: Any = LlamaForCausalLM(config)
    model = model.to(where, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, vocabulary, (batch, sequence), device=where)
    # Two documents a sequence, as in a pack: attention gets its mask.
    half = torch.arange(sequence, device=where) % (sequence // 2)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": half.expand(batch, -1)}
    torch.random.set_rng_state(generator)
    return model, optimizer, inputs


def _train_step(model: Any, optimizer: Any, inputs: dict[str, Any]) -> None:
    import torch

    model.train()
    model(**inputs, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _forward_step(torch: Any, model: Any, inputs: dict[str, Any]) -> None:
    model.eval()
    ids = inputs["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
