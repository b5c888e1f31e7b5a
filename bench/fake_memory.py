"""The closed form of a step's memory against the real step on fake tensors, no GPU needed.

    OMP_NUM_THREADS=1 python bench/fake_memory.py [--only WORD] [--minutes 20] [--inventory]
    OMP_NUM_THREADS=1 python bench/fake_memory.py --full | --largest

21 models as published under six of the techniques each, and forty compositions that fit a step into
less (8- and 4-bit weights, other adapters, blocks in turns, other optimizers, selective
recomputation, chunked losses, the host) on two models each: 206 combinations, traced at the few
layers that ``verify`` needs (2 and 3 where all are alike; a block in turn may take all) and carried
on to the whole depth, at about 4 s. Then the largest micro-batch that fits,
by the closed form and by trace, of ten settings (``--largest``: these alone). ``--full`` traces
five models at every layer, half a minute each, and beside them shows what is carried on.
``--inventory`` prints, where a peak is off by more than 3%, what is alive there.

A phase's error counts only as the peak's where the phase is the peak; the others are shown because
a wrong one can become the peak of another setting.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from material import heading
from thrifty import display, fake_step, verification
from thrifty.core import quantities
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.resolve import all_names, method_class
from thrifty.costs.memory import account
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.verification import PHASES

LLAMA = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8)
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": LLAMA
    | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    | dict(tie_word_embeddings=True),
    "Llama-3-8B": LLAMA
    | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "Mistral-7B": dict(model_type="mistral", hidden_size=4096, intermediate_size=14336)
    | dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)
    | dict(sliding_window=4096),
    "Qwen2.5-7B": dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944)
    | dict(num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
    "Qwen3-0.6B": dict(model_type="qwen3", hidden_size=1024, intermediate_size=3072, head_dim=128)
    | dict(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, vocab_size=151936)
    | dict(tie_word_embeddings=True),
    "Qwen3-8B": dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, head_dim=128)
    | dict(num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936),
    "Gemma-2-2B": dict(model_type="gemma2", hidden_size=2304, intermediate_size=9216, head_dim=256)
    | dict(num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, vocab_size=256000)
    | dict(sliding_window=4096),
    "Gemma-3-1B": dict(model_type="gemma3_text", hidden_size=1152, intermediate_size=6912)
    | dict(num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256)
    | dict(vocab_size=262144, sliding_window=512, sliding_window_pattern=6),
    "Phi-3-mini": dict(model_type="phi3", hidden_size=3072, intermediate_size=8192)
    | dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32064)
    | dict(sliding_window=2047),
    "Phi-2": dict(model_type="phi", hidden_size=2560, intermediate_size=10240, vocab_size=51200)
    | dict(num_hidden_layers=32, num_attention_heads=32, resid_pdrop=0.1),
    "GPT-2": dict(model_type="gpt2", n_embd=768, n_layer=12, n_head=12, n_positions=1024),
    "Pythia-1.4B": dict(model_type="gpt_neox", hidden_size=2048, intermediate_size=8192)
    | dict(num_hidden_layers=24, num_attention_heads=16, vocab_size=50304, rotary_pct=0.25),
    "OLMo-2-7B": dict(model_type="olmo2", hidden_size=4096, intermediate_size=11008)
    | dict(num_hidden_layers=32, num_attention_heads=32, vocab_size=100352),
    "SmolLM3-3B": dict(model_type="smollm3", hidden_size=2048, intermediate_size=11008)
    | dict(num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4, vocab_size=128256)
    | dict(tie_word_embeddings=True),
    "OPT-1.3B": dict(model_type="opt", hidden_size=2048, ffn_dim=8192, vocab_size=50272)
    | dict(num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048),
    "StarCoder2-3B": dict(model_type="starcoder2", hidden_size=3072, intermediate_size=12288)
    | dict(num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2, vocab_size=49152)
    | dict(sliding_window=4096, residual_dropout=0.1, embedding_dropout=0.1),
    "Mixtral-8x7B": dict(model_type="mixtral", hidden_size=4096, intermediate_size=14336)
    | dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000),
    "Qwen3-30B-A3B": dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144)
    | dict(num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    | dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=151936),
    "DeepSeek-V2-Lite": dict(model_type="deepseek_v2", hidden_size=2048, intermediate_size=10944)
    | dict(num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None)
    | dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    | dict(n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1)
    | dict(moe_intermediate_size=1408, first_k_dense_replace=1, vocab_size=102400),
    "gpt-oss-20b": dict(model_type="gpt_oss", hidden_size=2880, intermediate_size=2880)
    | dict(num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8, head_dim=64)
    | dict(num_local_experts=32, num_experts_per_tok=4, vocab_size=201088, sliding_window=128),
    "Falcon-7B": dict(model_type="falcon", hidden_size=4544, num_hidden_layers=32)
    | dict(num_attention_heads=71, vocab_size=65024, multi_query=True, parallel_attn=True)
    | dict(bias=False, new_decoder_architecture=False, alibi=False),
}

ALL, FEW = Adapter(rank=16), Adapter(rank=8, targets=("first", "third"))
"""FEW: the names stand for the model's own first and third linear; mostly q and v."""
TECHNIQUES: dict[str, dict[str, Any]] = {
    "full": {},
    "full foreach": dict(fused=False),
    "full accumulating": dict(gradient_accumulation_steps=4),
    "full recompute": dict(recompute=1),
    "full recompute every 2": dict(recompute=2),
    "full fp32": dict(dtype="float32"),
    "full fp32 recompute": dict(dtype="float32", recompute=1),
    "lora": dict(adapter=ALL),
    "lora bf16": dict(adapter=ALL, adapter_dtype="bfloat16"),
    "lora first, third": dict(adapter=FEW),
    "lora last layer": dict(adapter=Adapter(rank=16, layers=(-1,))),
    "lora recompute": dict(adapter=ALL, recompute=1),
    "lora fp32 recompute": dict(adapter=ALL, dtype="float32", recompute=1),
    "lora accumulating": dict(adapter=FEW, gradient_accumulation_steps=4),
    "last layer": dict(only_layers=frozenset([-1])),
    "head": dict(only_head=True),
}
CHOSEN: dict[str, dict[str, Any]] = {
    "last layer recompute": dict(only_layers=frozenset([-1]), recompute=1),
    "head chunked": dict(only_head=True, loss_chunk=512),
}
"""As TECHNIQUES, tighter."""
TIGHT = (
    "lora nf4",
    "lora nf4 recompute",
    "lora int8",
    "full adafactor",
    "full float32 adafactor",
    "full sgd",
    "full recompute lion",
    "full lomo",
    "full recompute adalomo",
    "full selective",
    "lora selective",
    "full chunked",
    "lora recompute chunked",
    "full chunked lomo",
    "lora offload",
    "full recompute_offload",
    "mezo",
    "addax lomo",
    "addax recompute chunked lomo",
    "adapters",
    "adapters nf4 selective chunked",
    "lora nf4 selective chunked",
    "badam",
    "badam recompute chunked adam_mini",
    "lisa recompute",
    "hift selective",
    "dora",
    "dora recompute chunked",
    "lora_fa",
    "lora_fa nf4 selective",
    "ia3",
    "ia3 int8 recompute_half",
    "full adamw_bf16",
    "full recompute adamw_bf16",
    "full adam_mini",
    "full float32 adam_mini",
    "full selective chunked galore",
    "full recompute galore",
    "full apollo",
    "full float32 recompute chunked apollo",
    "lora fp8 recompute",
    "rslora nf4 offload lion",
)
"""What fits a step into less, by the names of techniques in the order of their kinds; two models
each."""
OPTIONS: dict[str, dict[str, Any]] = {"ia3 int8 recompute_half": {"adapter_dtype": "bfloat16"}}
"""Of what is trained, where the usual ones do not go with the rest."""
BATCHES = ((1, 2048), (4, 512), (2, 1024), (1, 4096), (8, 256))
PER_MODEL, PER_TIGHT = 6, 2
LARGEST = (
    ("Llama-3.2-1B", "full", 24),
    ("Llama-3.2-1B", "lora", 16),
    ("Llama-3-8B", "lora recompute", 40),
    ("Qwen3-0.6B", "full recompute", 16),
    ("Qwen3-8B", "lora nf4 recompute", 24),
    ("Gemma-2-2B", "lora selective", 40),
    ("Mistral-7B", "full lomo", 40),
    ("GPT-2", "full", 8),
    ("Phi-3-mini", "lora recompute chunked", 24),
    ("Qwen2.5-7B", "full recompute adalomo", 80),
)
"""Model, technique, GiB that tensors may take."""
WHOLE = (
    ("Llama-3-8B", "full"),
    ("Qwen3-0.6B", "lora recompute"),
    ("Gemma-2-2B", "full recompute"),
    ("Phi-3-mini", "lora"),
    ("Pythia-1.4B", "full fp32"),
)


def setting_of(config: dict[str, Any], technique: str, **batch: Any) -> MemorySetting:
    """Fills in what a technique says of the model: names of linears, the last layer."""
    known = TECHNIQUES | CHOSEN
    if technique not in known:
        return _composed(MemorySetting(**batch), technique.split())
    shape, fields = ModelShape.from_config(config), dict(known[technique])
    adapter, last = fields.get("adapter"), shape.num_layers - 1
    if adapter is FEW:
        names = shape.lora_targets
        fields["adapter"] = Adapter(rank=adapter.rank, targets=(names[0], names[2]))
    elif adapter is not None and adapter.layers:
        fields["adapter"] = Adapter(rank=adapter.rank, layers=(last,))
    if "only_layers" in fields:
        fields["only_layers"] = frozenset([last])
    return MemorySetting(**batch | fields)


def _composed(setting: MemorySetting, names: list[str]) -> MemorySetting:
    """Techniques by name, each rewriting what those before left."""
    for kind in MEMORY_KINDS:
        for cls in (method_class(kind, each) for each in names if each in all_names(kind)):
            form = cls(**(OPTIONS.get(" ".join(names), {}) if kind == "trained" else {}))
            reason = form.refuses(setting)
            if reason is not None:
                raise ValueError(f"{' '.join(names)}: {reason}")
            setting = form.rewrite(setting)
    return setting


def pairs() -> Iterator[tuple[str, str]]:
    """Each model under the next few techniques; each that fits a step into less on the next few
    models."""
    techniques, models = itertools.cycle(TECHNIQUES), itertools.cycle(MODELS)
    for name in MODELS:
        yield from ((name, each) for each in itertools.islice(techniques, PER_MODEL))
    for technique in (*TIGHT, *CHOSEN):
        yield from ((each, technique) for each in itertools.islice(models, PER_TIGHT))


def combinations() -> Iterator[tuple[str, str, dict[str, Any], MemorySetting]]:
    """With the next batch, mask and device: the same every time."""
    batches = itertools.cycle(BATCHES)
    for number, (name, technique) in enumerate(pairs()):
        config, (rows, sequence) = MODELS[name], next(batches)
        positions = config.get("n_positions", 2048 if name.startswith(("OPT", "Py")) else 8192)
        batch = dict(
            micro_batch=rows * -(-sequence // positions),
            sequence=min(sequence, positions),
            masked=number % 2 == 1,
            # A CPU is its own host: what waits there, which no trace of one step has, is on it.
            device_kind="cuda" if number % 5 < 4 or _waits(technique) else "cpu",
        )
        yield name, technique, config, setting_of(config, technique, **batch)


def _waits(technique: str) -> bool:
    return "offload" in technique or "hift" in technique


def largest(config: dict[str, Any], technique: str, limit: float) -> tuple[int, int]:
    """The largest of 1, 2, 4, ... rows of 512 tokens that fit, by the closed form and by trace; 0
    where not even one does."""

    def setting(rows: int) -> MemorySetting:
        kind = dict(device_kind="cuda", sequence=512)
        return setting_of(config, technique, micro_batch=rows, **kind)

    def most(peak: Callable[[MemorySetting], float], start: int = 1) -> int:
        """Peaks grow with the rows, so that the search may start anywhere."""
        rows = start
        while peak(setting(rows)) <= limit:
            rows *= 2
        while rows and peak(setting(rows)) > limit:
            rows //= 2
        return rows

    shape = ModelShape.from_config(config)
    predicted = most(lambda each: account(shape, each).peak_memory_bytes)
    traced = most(
        lambda each: max(verification.verify(config, each).traced.values()), max(1, predicted)
    )
    return predicted, traced


def show_largest() -> bool:
    rows, sound = [], True
    for name, technique, gib in LARGEST:
        predicted, traced = largest(MODELS[name], technique, gib * 2**30)
        sound &= predicted in (traced, traced // 2)
        rows.append([name, technique, f"{gib} GiB", str(predicted), str(traced)])
        print("  ".join(rows[-1]), flush=True)
    print(heading("\nThe largest micro-batch of 512 tokens a row"))
    print(
        display.table(("model", "technique", "memory", "predicted", "traced"), rows, right="llrrr")
    )
    print("each is the traced one or a step below" if sound else "NOT each is sound")
    return sound


def describe(setting: MemorySetting) -> str:
    mask = "masked" if setting.masked else "causal"
    return f"{setting.micro_batch} x {setting.sequence} {mask} {setting.device_kind}"


def inventory(config: dict[str, Any], setting: MemorySetting, found: Any) -> str:
    """What is alive at the peak, the model cut to the larger of the traced depths."""
    phase = max(found.traced, key=found.traced.get)
    alive = fake_step.record(config, setting, found.depths[-1]).inventory(phase)
    rows = [
        [f"{size / setting.tokens:,.1f}", *map(str, (b.operation, b.shape, b.dtype, b.instant))]
        for b, size in alive.most_common(25)
    ]
    headers = ("bytes a token", "operation", "shape", "dtype", "made in")
    return f"alive at the peak, in {phase}:\n{display.table(headers, rows, right='r')}\n"


def row_of(name: str, technique: str, setting: MemorySetting, found: Any) -> list[str]:
    errors = [
        f"{found.predicted[phase] / found.traced[phase] - 1.0:+.1%}" if found.traced[phase] else "-"
        for phase in PHASES
    ]
    peaks = (max(found.predicted.values()), max(found.traced.values()))
    sizes = [quantities.format_bytes(size) for size in peaks]
    end = [*errors, *sizes, f"{found.error:+.1%}", f"{found.seconds:.1f}"]
    return [name, technique, " and ".join(map(str, found.depths)), describe(setting), *end]


HEADERS = (
    "model", "technique", "traced at", "batch", *PHASES, "predicted", "traced", "at the peak", "s",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="a word of the model's name or the technique")
    parser.add_argument("--minutes", type=float, default=20.0, help="start nothing after so many")
    parser.add_argument("--inventory", action="store_true")
    parser.add_argument("--full", action="store_true", help="five whole models")
    parser.add_argument("--largest", action="store_true", help="the largest micro-batches alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.largest:
        return 0 if show_largest() else 1
    if options.full:
        jobs = [
            (name, what, MODELS[name], setting_of(MODELS[name], what, micro_batch=1, sequence=2048))
            for name, what in WHOLE
        ]
    else:
        jobs = [job for job in combinations() if options.only in f"{job[0]} {job[1]}"]
    end, rows, errors, skipped = time.monotonic() + 60 * options.minutes, [], [], 0
    for name, technique, config, setting in jobs:
        if time.monotonic() > end:
            skipped += 1
            continue
        try:
            found = verification.verify(config, setting)
            rows.append(row_of(name, technique, setting, found))
            if options.full:
                found = verification.verify(config, setting, full_depth=True)
                rows.append(row_of(name, technique, setting, found))
        except ValueError as refusal:
            print(f"{name} {technique}: {refusal}")
            continue
        print("  ".join(rows[-1]), flush=True)
        errors.append(abs(found.error))
        if options.inventory and abs(found.error) > 0.03:
            print(inventory(config, setting, found))
    print(heading(f"\nPredicted memory against a trace, {len(errors)} combinations"))
    print(display.table(HEADERS, rows, right="lllrrrrrrrr"))
    within = sum(error <= 0.03 for error in errors) / len(errors)
    print(f"\nat the peak: median {statistics.median(errors):.2%}, worst {max(errors):.2%},")
    print(f"{within:.0%} within 3%" + (f"; {skipped} left out, out of time" if skipped else ""))
    if not (options.full or options.only):
        return 0 if show_largest() else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
