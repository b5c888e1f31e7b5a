"""What a training run is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thrifty.core.budget import Cost
from thrifty.core.contracts import Rows, StoppingRule
from thrifty.core.plan import Objective, Training
from thrifty.costs.setting import MemorySetting
from thrifty.floors import Floors
from thrifty.memory_switch import Holding, MemorySwitch
from thrifty.refresh import Refresher
from thrifty.rounds import Rounds
from thrifty.training_phase import Phase
from thrifty.yardstick import Yardstick


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that one training run needs, resolved."""

    training: Training
    base: Path
    base_sha256: str
    tokenizer: Any
    data: Any
    """Map-style dataset of packed sequences, in the order they are trained on."""
    dev: Mapping[str, Rows]
    weights: Mapping[str, float]
    rounds: Rounds
    """What is trained on next, and how much it counts; ``data`` asks it."""
    rule: StoppingRule
    objective: Objective
    yardstick: Yardstick
    """What the model is measured by on the dev rows."""
    floors: Floors
    """What must not get worse than the base."""
    setting: MemorySetting
    """How a step is held in memory, in the cost model's terms."""
    predicted_step: Cost
    choosing_flops: float
    """Of a micro-batch, those that choosing rows in it takes."""
    predicted_evaluation: Cost
    predicted_checkpoint: Cost
    predicted_load: Cost
    predicted_reference: Cost
    """Of asking the reference for the pairs that are trained on; none where they are no pairs, or
    where it is asked at every step."""
    predicted_renewal: Cost
    """Of the online method's look at the model on the way."""
    signals: Mapping[str, Rows]
    """The targets' rows that it may look at."""
    holding: Holding | None
    """How its steps are held, where that may change on the way."""
    switch: MemorySwitch | None
    """Has them held otherwise; None: nobody does."""
    refresher: Refresher | None
    """Chooses the rows anew on the way; None: nobody does."""
    mark: str
    """A hash of all that decides the weights: the settings, the rows, the base model."""
    reserved: Cost
    """What must be left when training ends: for the test, and for an answer to each question that
    the budget is to answer."""
    answering: Cost
    """What of it is for the answers."""
    checkpoints: Path
    model: Path
    """Where the best evaluated model is left."""
    device: str
    device_name: str
    """As the plan has it."""
    say: Any
    """Takes a line for the user."""
    pause_at: int | None = None
    """The step after which it pauses, saved, to be gone on with: a pilot's. No model is left then,
    and what is evaluated on the way is not saved."""

    phase: Phase = field(default_factory=Phase)
    """What is trained from when on, and on which weights, where that may change."""

    skipped: frozenset[int] = frozenset()
    """Steps that are passed over without an update."""

    def held_as(self, holding: Holding) -> TrainingJob:
        """The same, its steps held otherwise."""
        return replace(
            self,
            training=holding.training,
            setting=holding.setting,
            predicted_step=holding.dearest,
            choosing_flops=holding.choosing_flops,
            predicted_evaluation=holding.evaluation,
            predicted_checkpoint=holding.checkpoint,
            yardstick=replace(self.yardstick, shape=holding.shape),
            holding=holding,
        )

    @property
    def starts_from(self) -> Path:
        """The weights that it is built on."""
        return self.checkpoints / self.phase.base if self.phase.base else self.base
