"""LoRA as singular values and directions, of which the least important values are dropped.

y = W x + B diag(E) A x alpha / rank, with a pull of A A' and B' B towards 1. After ``first_cut``
steps ever more of E are set to zero, over all matrices together, until ``kept`` of the ranks are
left at ``last_cut``; a run must be as long. It is priced at the rank that it begins with, which its
matrices keep while it trains, so that what is saved has zeros where ranks were dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from thrifty.core.contracts import Trainable, Worth
from thrifty.core.quantities import show
from thrifty.core.ranges import check_ranges
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Trainable):
    """LoRA as singular values and directions, of which the least important values are dropped."""

    makes = "fit"
    searched = False
    runs = True
    source = "arXiv:2303.10512"
    worth = Worth(0.6, 0.15, "arXiv:2303.10512: 0 to 1 points above LoRA of equal size")
    learning_rate = 10.0  # arXiv:2303.10512 searches where LoRA does

    rank: int = 16
    """That it begins with."""
    kept: float = 0.5
    """Share of the ranks that is left at the end, in the mean over the matrices."""
    alpha: float = 32.0
    first_cut: int = 20
    """Steps that train all ranks."""
    last_cut: int = 100
    """The step from which on the ranks stay as they are."""
    cut_steps: int = 10
    """Every how many steps between them ranks are dropped."""
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self, rank=(2, inf), kept=(0.0, 1.0), alpha=(1e-3, inf))
        check_ranges(self, first_cut=(0, inf), last_cut=(1, inf), cut_steps=(1, inf))
        if not 1 <= self._ranks_left < self.rank:
            raise ValueError(
                f"kept must be a share of {self.rank} ranks that leaves one and drops one, not "
                f"{show(self.kept)}\nhint: the default is 0.5"
            )
        if self.first_cut >= self.last_cut:
            raise ValueError(
                f"last_cut must be after first_cut, which is {self.first_cut}, not {self.last_cut}"
                "\nhint: a few dozen steps before the first, most of the run before the last"
            )

    @property
    def _ranks_left(self) -> int:
        return round(self.rank * self.kept)

    def refuses(self, setting: MemorySetting) -> str | None:
        return "a zeroth-order step needs no adapter" if setting.zeroth_order else None

    @property
    def _adapter(self) -> Adapter:
        return Adapter(rank=self.rank, targets=self.targets or None, form="adalora")

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(adapter=self._adapter, adapter_dtype="float32")

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        from thrifty.holding.adalora import Ranks
        from thrifty.holding.adapters import with_adapter

        found = with_adapter(
            model,
            shape,
            self._adapter,
            dtype="float32",
            seed=seed,
            lora_alpha=self.alpha,
            target_r=self._ranks_left,
            tinit=self.first_cut,
            total_step=self.last_cut,
            deltaT=self.cut_steps,
        )
        found.ranks = Ranks(found)
        return found

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        from thrifty.holding.adapters import refusal

        return refusal(self._adapter, shape)

    def at_step(self, model: Any, optimizer: Any, step: int, seed: int) -> None:
        model.ranks.follow(optimizer, step)

    def cycle_steps(self, shape: ModelShape) -> int:
        return self.last_cut
