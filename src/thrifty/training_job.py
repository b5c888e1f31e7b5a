"""What a training run is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core.budget import Cost
from thrifty.core.contracts import Rows, StoppingRule
from thrifty.core.plan import Objective, Training
from thrifty.costs.setting import MemorySetting
from thrifty.rounds import Rounds


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
    mark: str
    """A hash of all that decides the weights: the settings, the rows, the base model."""
    reserved: Cost
    """What must be left when training ends, for the test."""
    checkpoints: Path
    model: Path
    """Where the best evaluated model is left."""
    device: str
    say: Any
    """Takes a line for the user."""
