"""A model whose architecture has no closed form, counted as transformers and PEFT really build it.

    parameters   on the meta device, by part                                         exact
    bytes        of a training step on fake tensors (``fake_step.py``), by phase and term
    FLOPs        of a forward and a backward on the meta device, as ``FlopCounterMode`` counts the
                 products of eager attention

Two depths n < m that end on the same kind of layer tell of all L: v(n) + (L - n) (v(m) - v(n)) /
(m - n), for each instant of the step apart. FLOPs of a row of S tokens are S (a + b S), solved from
two lengths; a third says whether it is so.

Limits: bfloat16, AdamW, one device, a step without accumulation; no code but transformers' own.
Where a model runs a loop over tokens in place of a kernel that is not installed, its bytes would be
the loop's, and none are given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from thrifty.costs.memory import MemoryAccount
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import PARTS

if TYPE_CHECKING:
    from thrifty.fake_step import Instant, Tape

LENGTHS = (128, 256, 512)
"""Of the rows that FLOPs are counted on: multiples of what chunked attention pads to."""
OTHER = "other"
"""The part of parameters that are of none of ``PARTS``."""


class NotTraced(ValueError):
    """A step that cannot be measured; the parameters can."""


@dataclass(frozen=True)
class Flops:
    """Of forward and backward of a row of S tokens: S (token + pair S)."""

    token: float
    pair: float
    error: float
    """Of that form, at a third length."""

    def per_token(self, sequence: int) -> float:
        return self.token + self.pair * sequence


@dataclass(frozen=True)
class Measured:
    """One model, to be measured under several settings."""

    config: Mapping[str, Any]
    """Its config.json."""

    @cached_property
    def model(self) -> Any:
        """The whole model without storage. Raises ValueError where transformers has none."""
        import transformers

        from thrifty.fake_step import base_model

        version = f"transformers {transformers.__version__}"
        kind = self.config.get("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            raise ValueError(
                f"{version} knows no model_type {kind!r}\n"
                "hint: a newer one may; code that comes with a model is not run"
            )
        try:
            return base_model(self.config, "bfloat16")
        except Exception as error:  # whatever a model's own code makes of its config
            raise ValueError(
                f"{version} builds no causal language model of this {kind} config: "
                f"{_first_line(error)}\nhint: is config.json whole, and of a decoder?"
            ) from error

    @cached_property
    def parameters_by_part(self) -> dict[str, int]:
        """As ``ModelShape`` has it: a router counts to the experts, a shared expert to the mlp, a
        tied head to neither."""
        parts = dict.fromkeys((*PARTS, OTHER), 0)
        head = self.model.get_output_embeddings()
        of_head = {id(parameter) for parameter in head.parameters()} if head else set()
        for name, parameter in self.model.named_parameters():
            *path, _ = name.split(".")
            part = _part(self.model, path)
            if id(parameter) in of_head and part != "embedding":
                part = "head"
            parts[part] += parameter.numel()
        return parts

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters_by_part.values())

    @property
    def hidden_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[-1])

    @property
    def context(self) -> int | None:
        """The longest row that it takes, where the config says so."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @cached_property
    def num_layers(self) -> int:
        from thrifty.fake_step import layers_of

        return len(layers_of(self.model))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many layers tell of all. Raises NotTraced for a model with none to cut."""
        from thrifty.verification import verify

        self._refuse_loops()
        with _traced():
            return verify(self.config, MemorySetting(micro_batch=1, sequence=LENGTHS[0])).depths

    def _refuse_loops(self) -> None:
        few, many = (_num_kernels(self.config, length) for length in (16, 32))
        if many - few >= 16:
            raise NotTraced(
                "it runs a loop over tokens, kernel by kernel, in place of a fused kernel that is "
                "not installed"
            )

    def account(self, setting: MemorySetting) -> MemoryAccount:
        """Bytes of a training step, by phase and term. Raises NotTraced."""
        from thrifty.fake_step import record, skeleton

        with _traced():
            highest = [_highest(record(self.config, setting, depth)) for depth in self.depths]
            tensors = _tensors(skeleton(self.config, setting, None), setting)
        weights = sum(size for size, _ in tensors)
        states = 2.0 * sum(size for size, trained in tensors if trained)
        phases: dict[str, dict[str, float]] = {}
        most: dict[str, float] = {}
        for instant, total, gradients in self._at_full_depth(highest):
            if instant.phase != "setup" and total > most.get(instant.phase, 0.0):
                most[instant.phase] = total
                phases[instant.phase] = {
                    "weights": weights,
                    "gradients": gradients,
                    "optimizer_states": states,
                    "activations": total - weights - gradients - states,
                }
        return MemoryAccount(phases=phases)

    def _at_full_depth(
        self, highest: list[dict[Instant, tuple[int, int]]]
    ) -> Iterator[tuple[Instant, float, float]]:
        """Each instant's bytes and, of them, gradients. Layers count from below and from above."""
        near, far = highest[0], highest[-1]
        period = self.depths[-1] - self.depths[0]
        beyond = self.num_layers - self.depths[0]
        for instant, values in near.items():
            partners = [instant]
            if instant.phase == "backward" and instant.layer >= self.depths[0] - period:
                partners.append(instant._replace(layer=instant.layer + period))
            for partner in partners if period else [instant]:
                if partner in far:
                    total, gradients = (
                        low + (beyond / period * (high - low) if period else 0.0)
                        for low, high in zip(values, far[partner], strict=True)
                    )
                    yield instant, total, gradients

    def flops(self, setting: MemorySetting) -> Flops:
        """Of a step under a setting's adapter and recomputation. Raises NotTraced."""
        counts = [_count(self.config, setting, depth) for depth in self.depths]
        near, far = counts[0], counts[-1]
        period = self.depths[-1] - self.depths[0]
        beyond = (self.num_layers - self.depths[0]) / period if period else 0.0
        short, long, longest = (
            low + beyond * (high - low) for low, high in zip(near, far, strict=True)
        )
        s, t, u = LENGTHS
        pair = (long / t - short / s) / (t - s)
        token = short / s - pair * s
        return Flops(token, pair, u * (token + pair * u) / longest - 1.0)


@contextmanager
def _traced() -> Iterator[None]:
    """Whatever a model's own code raises on tensors without data is a reason, not a fault."""
    try:
        yield
    except NotTraced:
        raise
    except Exception as error:
        raise NotTraced(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    line = next(iter(str(error).splitlines()), "")
    return name + (line if len(line) <= 300 else f"{line[:300]} ...")


# -- parameters ---------------------------------------------------------------------------------

_OF_EXPERTS = re.compile(r"expert|router", re.IGNORECASE)
_OF_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_OF_MLP = re.compile(r"mlp|ffn|feed_?forward|^fc\d", re.IGNORECASE)


def _part(model: Any, path: list[str]) -> str:
    """Of a parameter by the names and classes of the modules that it lies in."""
    import torch

    modules = [model.get_submodule(".".join(path[: i + 1])) for i in range(len(path))]
    owner, name = modules[-1] if modules else model, path[-1] if path else ""
    labels = [f"{n} {type(m).__name__}" for n, m in zip(path, modules, strict=True)]

    def within(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(label) for label in labels)

    if isinstance(owner, torch.nn.Embedding) or name == "project_in":
        return "embedding"
    if name == "project_out":
        return "head"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    if within(_OF_ATTENTION):
        return "attention"
    if any("shared" in each for each in path):
        return "mlp"
    if within(_OF_EXPERTS) or name == "gate":
        return "experts"
    return "mlp" if within(_OF_MLP) else OTHER


# -- bytes --------------------------------------------------------------------------------------


def _highest(tape: Tape) -> dict[Instant, tuple[int, int]]:
    """The most bytes alive in each instant and, of them, gradients: what the passes leave to the
    optimizer."""
    left = {}
    for instant, size, buffer in tape.events:
        if instant.phase == "optimizer":
            break
        left[id(buffer)] = buffer if size > 0 else None
    gradients = {key for key, born in left.items() if born and born.instant.phase != "setup"}
    level = (0, 0)
    highest: dict[Instant, tuple[int, int]] = {}
    for instant, size, buffer in tape.events:
        before = highest.get(instant, level)
        level = (level[0] + size, level[1] + size * (id(buffer) in gradients))
        highest[instant] = max(before, level)
    return highest


def _tensors(model: Any, setting: MemorySetting) -> list[tuple[int, bool]]:
    """Bytes of each, and whether it is trained. Adapters get their dtype as the step begins."""
    import torch

    itemsize = getattr(torch, setting.adapter_dtype).itemsize
    found = []
    for tensor in (*model.parameters(), *model.buffers()):
        of_adapter = setting.adapter is not None and tensor.requires_grad
        size = tensor.numel() * (itemsize if of_adapter else tensor.itemsize)
        found.append((size, tensor.requires_grad))
    return found


# -- FLOPs --------------------------------------------------------------------------------------


def _count(config: Mapping[str, Any], setting: MemorySetting, depth: int) -> list[float]:
    """FLOPs of forward and backward of a row of each of ``LENGTHS``."""
    from torch.utils.flop_counter import FlopCounterMode

    from thrifty.fake_step import skeleton

    counts = []
    with _traced():
        model = skeleton(config, setting, depth)
        for length in LENGTHS:
            with FlopCounterMode(display=False) as counter:
                _run(model, length).loss.backward()
            counts.append(float(counter.get_total_flops()))
    return counts


def _num_kernels(config: Mapping[str, Any], length: int) -> int:
    """Of a forward."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from thrifty.fake_step import skeleton

    class Counter(TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.kernels += 1
            return func(*args, **(kwargs or {}))

    with _traced():
        model = skeleton(config, MemorySetting(), None)
        with torch.no_grad(), Counter() as counter:
            _run(model, length)
    return counter.kernels


def _run(model: Any, length: int) -> Any:
    """A forward on the meta device, in operations whose products the counter knows."""
    import torch

    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    ids = torch.ones(1, length, dtype=torch.long, device="meta")
    # With a mask given, none is made from positions, which would be looked at.
    return model(input_ids=ids, attention_mask=ids, labels=ids, use_cache=False)
