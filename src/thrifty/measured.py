"""A model whose architecture has no closed form, counted as transformers and PEFT really build it.

    parameters   on the meta device, by part                                         exact
    bytes        of a training step there (``meta_step.py``), by phase and term, for any number of
                 rows a batch
    FLOPs        of the products of the same step

Two depths n < m that end on the same kind of layer tell of all L: v(n) + (L - n) (v(m) - v(n)) /
(m - n), for each instant of the step apart. FLOPs of a row of S tokens are S (a + b S), solved from
the length that is asked, where they are exact, and half of it.

Limits: bfloat16, AdamW, one device, a step without accumulation; no code but transformers' own.
Where a model runs a loop over tokens in place of a kernel that is not installed, its bytes would be
the loop's, and none are given.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from thrifty.costs.memory import MemoryAccount
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import PARTS

if TYPE_CHECKING:
    from thrifty.meta_step import Step

OTHER = "other"
"""The part of parameters that are of none of ``PARTS``."""


class NotTraced(ValueError):
    """A step that cannot be measured; the parameters can."""


@dataclass(frozen=True)
class Flops:
    """Of forward and backward of a row of S tokens: S (token + pair S)."""

    token: float
    pair: float

    def per_token(self, sequence: int) -> float:
        return self.token + self.pair * sequence


@dataclass(frozen=True)
class MeasuredStep:
    """One way to train a model: what a step takes, with any number of rows in a batch."""

    steps: tuple[Step, ...]
    """At each of ``depths``."""
    depths: tuple[int, ...]
    num_layers: int
    flops: Flops

    def account(self, rows: int) -> MemoryAccount:
        """Bytes by phase and term."""
        from thrifty.verification import carried_on

        near, far = self.steps[0], self.steps[-1]
        beyond = _beyond(self.depths, self.num_layers)
        weights = near.weights + beyond * (far.weights - near.weights)
        states = near.states + beyond * (far.states - near.states)
        highest = near.highest(rows), far.highest(rows)
        phases: dict[str, dict[str, float]] = {}
        most: dict[str, float] = {}
        for instant, sizes in carried_on(*highest, self.depths, self.num_layers):
            total, gradients = map(float, sizes)
            if total > most.get(instant.phase, 0.0):
                most[instant.phase] = total
                phases[instant.phase] = {
                    "weights": weights,
                    "gradients": gradients,
                    "optimizer_states": states,
                    "activations": total - weights - gradients - states,
                }
        return MemoryAccount(phases=phases)

    def largest(self, limit: float, most: int) -> int:
        """How many rows fit into ``limit`` bytes, at most ``most``; 0 where not one does."""
        sizes = range(1, most + 1)
        return bisect_right(sizes, limit, key=lambda rows: self.account(rows).peak_memory_bytes)


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
        if kind is None:
            raise ValueError(
                "no model_type in the model's config\nhint: compare with the published config.json"
            )
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
        from thrifty.signals.models import layers_of

        return len(layers_of(self.model))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many layers tell of all. Raises NotTraced for a model with none to cut."""
        from thrifty.verification import depths_that_tell

        with _traced():
            depths = depths_that_tell(self.model, MemorySetting())
            self._refuse_loops(depths[0])
        return depths

    def _refuse_loops(self, depth: int) -> None:
        """Raises NotTraced where twice the rows, twice as long, are many more kernels."""
        from thrifty.fake_step import skeleton
        from thrifty.meta_step import num_kernels

        setting = MemorySetting()
        model = skeleton(self.config, setting, depth)
        few, many = (num_kernels(model, setting, size, size) for size in (16, 32))
        if many - few >= 16:
            raise NotTraced(
                "it runs a loop over tokens, kernel by kernel, in place of a fused kernel that is "
                "not installed"
            )

    def step(self, setting: MemorySetting) -> MeasuredStep:
        """Of rows of ``setting.sequence`` tokens; its micro-batch says nothing. Raises
        NotTraced."""
        from thrifty.fake_step import skeleton
        from thrifty.meta_step import run_step
        from thrifty.signals.models import layers_of

        lengths = (setting.sequence, setting.sequence // 2 or 2)
        found = []
        with _traced():
            model = skeleton(self.config, setting, self.depths[-1])
            for depth in reversed(self.depths):
                del layers_of(model)[depth:]
                found.append([run_step(model, replace(setting, sequence=s)) for s in lengths])
        (near, near_half), (far, far_half) = found[-1], found[0]
        beyond = _beyond(self.depths, self.num_layers)
        whole = near.flops + beyond * (far.flops - near.flops)
        half = near_half.flops + beyond * (far_half.flops - near_half.flops)
        pair = (whole / lengths[0] - half / lengths[1]) / (lengths[0] - lengths[1])
        return MeasuredStep(
            steps=tuple(step for step, _ in reversed(found)),
            depths=self.depths,
            num_layers=self.num_layers,
            flops=Flops(whole / lengths[0] - pair * lengths[0], pair),
        )


def _beyond(depths: tuple[int, ...], depth: int) -> float:
    """How many times what the second depth adds to the first lies above it."""
    period = depths[-1] - depths[0]
    return (depth - depths[0]) / period if period else 0.0


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
