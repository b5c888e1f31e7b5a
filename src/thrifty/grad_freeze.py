"""Matrices that learn no more are trained no more (GradES, arXiv:2509.01842).

    n_t = s n_{t-1} + (1 - s) |G_t|_1 / elements,     frozen from the step where  n_t < below max n

once ``after`` of the run's steps are done; s = ``smoothing``, G_t the gradient before clipping. The
paper's threshold is a number of its own for each model; here it is a share of the largest norm
that the matrix had itself. Only matrices in the decoder's layers are looked at, and an adapter's.

A frozen matrix keeps its value. Its gradient's product is not made any more (2 FLOPs a token and
element, which are not charged either), the gradient's memory and the optimizer's states of it are
given back. The backward goes on to what lies below; where that is frozen too, as the lowest
adapters may be, it ends earlier and spares more than is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thrifty.budget_callback import BudgetCallback
from thrifty.checkpoints import Checkpoint
from thrifty.core.durable import write_atomically
from thrifty.core.ledger import Stage
from thrifty.core.plan_freeze import GradFreeze
from thrifty.signals.gradients import trained_matrices

FILE = "grad_freeze.json"
Decide = Callable[[str, str, Mapping[str, Any], int], None]
"""Takes what was chosen, why, its numbers, and the step."""


class FreezeCallback(TrainerCallback):
    """Watches gradients and freezes; ``spare(flops)`` is told what a token takes less."""

    def __init__(
        self, settings: GradFreeze, spare: Callable[[float], None], decide: Decide
    ) -> None:
        self._settings, self._spare, self._decide = settings, spare, decide
        self._norms: dict[str, list[float]] = {}
        """Name -> the norm as it is now, and the largest so far."""
        self.frozen: dict[str, int] = {}
        """Name -> the step after which it was frozen."""
        self._watched: dict[str, Any] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        found = {id(matrix) for matrix in trained_matrices(model, 0)}
        self._watched = {name: p for name, p in model.named_parameters() if id(p) in found}
        for name in self.frozen:  # of the run that goes on
            self._freeze(name, optimizer)
        self._tell()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if not args.max_grad_norm:  # or else asked before they are clipped
            self.watch(state.global_step + 1, state.max_steps, optimizer)

    def watch(self, step: int, max_steps: int, optimizer: Any) -> None:
        """The gradients of ``step``, before they are clipped and used."""
        for name, matrix in self._watched.items():
            if matrix.grad is None or name in self.frozen:
                continue
            size = float(matrix.grad.detach().abs().mean())
            before = self._norms.get(name, [size, size])
            smooth = self._settings.smoothing * before[0] + (1 - self._settings.smoothing) * size
            self._norms[name] = [smooth, max(before[1], smooth)]
        if step < self._settings.after * max_steps:
            return
        quiet = [
            name
            for name, (now, most) in self._norms.items()
            if name not in self.frozen and now < self._settings.below * most
        ]
        if quiet:
            self._stop(quiet, step, optimizer)

    def _stop(self, quiet: list[str], step: int, optimizer: Any) -> None:
        before = sum(map(_bytes, (self._watched[name] for name in quiet)))
        states = sum(self._freeze(name, optimizer) for name in quiet)
        self.frozen |= dict.fromkeys(quiet, step)
        self._tell()
        detail = {
            "matrices": quiet,
            "frozen": len(self.frozen),
            "watched": len(self._watched),
            "spared_flops_a_token": self._spared,
            "freed_bytes": before + states,
        }
        reason = (
            f"their gradients are below {self._settings.below:g} of their largest; "
            f"{len(self.frozen)} of {len(self._watched)} are frozen, {self._spared:.3g} FLOPs a "
            f"token and {before + states:,} bytes of gradients and states spared"
        )
        self._decide(f"freeze {len(quiet)} matrices", reason, detail, step)

    def _freeze(self, name: str, optimizer: Any) -> int:
        """Bytes of states that were given back."""
        matrix = self._watched[name]
        matrix.requires_grad_(False)
        matrix.grad = None
        states = getattr(optimizer, "optimizer", optimizer).state.pop(matrix, {})
        return sum(map(_bytes, states.values()))

    @property
    def _spared(self) -> float:
        return 2.0 * sum(self._watched[name].numel() for name in self.frozen)

    def _tell(self) -> None:
        self._spare(self._spared)

    # -- with a checkpoint -------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        values = {"norms": self._norms, "frozen": self.frozen}
        write_atomically(folder / FILE, json.dumps(values))

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` left."""
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        self._norms, self.frozen = values["norms"], values["frozen"]


def freezing(
    settings: GradFreeze | None,
    stage: Stage,
    budget: BudgetCallback,
    newest: Checkpoint | None,
) -> list[FreezeCallback]:
    """The one that a plan asks for, as ``newest`` left it; or none."""
    if settings is None:
        return []

    def decide(chosen: str, reason: str, detail: Mapping[str, Any], step: int) -> None:
        stage.decide("train a matrix on or freeze it", chosen, reason, detail=detail, step=step)

    found = FreezeCallback(settings, budget.spare, decide)
    if newest is not None:
        found.load(newest.path)
    return [found]


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if hasattr(value, "numel") else 0
