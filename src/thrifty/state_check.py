"""That an optimizer keeps its states in as many bytes as the plan priced.

Wrappers have changed them without a word: FSDP once made 8-bit Adam's states float32. So they are
looked at after the first step, weight by weight, on every rank.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thrifty.core.quantities import format_bytes
from thrifty.costs.adapted import FORMS
from thrifty.costs.setting import MemorySetting

SMALL = 4096
"""Elements of a weight up to which libraries may keep states in float32; also bytes that one may
have for tables of codes."""
LEEWAY = 1.25


class StatesCallback(TrainerCallback):
    """Raises ValueError after the first step where the states of a weight are larger than the
    setting's."""

    def __init__(self, setting: MemorySetting) -> None:
        self._setting = setting
        self._looked = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if not self._looked:
            self._looked = True
            check_states(optimizer, self._setting)


def check_states(optimizer: Any, setting: MemorySetting) -> None:
    """Raises ValueError naming the first weight whose states are larger than ``setting``'s."""
    for weight, state in optimizer.state.items():
        part = _here(weight)
        held = sum(_bytes(value) for value in state.values())
        planned = _planned(part, setting)
        if part.numel() > SMALL and held > LEEWAY * planned + SMALL:
            name = setting.states.name
            raise ValueError(
                f"{name} keeps {format_bytes(held)} of states for a weight of {tuple(part.shape)}, "
                f"planned were {format_bytes(planned)}: something made them wider\n"
                "hint: plan with --set training.memory.states=adamw, or with other versions of "
                f"the libraries that {name} comes from"
            )


def _planned(weight: Any, setting: MemorySetting) -> float:
    """Bytes for a weight; as a table's, which are not projected, where that is more."""
    states, itemsize, size = setting.states, weight.element_size(), weight.numel()
    averages = 0.0 if setting.adapter is None else FORMS[setting.adapter.form].averages
    beside = averages * size * itemsize
    if weight.dim() < 2:
        return states.vector_bytes(size, itemsize) + beside
    rows, columns = weight.shape[-2:]
    one = max(
        states.matrix_bytes(rows, columns, itemsize),
        states.table_bytes(rows, columns, itemsize),
        states.wide_embedding * rows * columns,
    )
    return one * (size // (rows * columns)) + beside


def _bytes(value: Any) -> int:
    """Of a state on this rank; a count of steps is none."""
    if not hasattr(value, "dim") or not value.dim():
        return 0
    value = _here(value)
    if hasattr(value, "__tensor_flatten__"):  # torchao's, of codes and scales
        return sum(getattr(value, name).nbytes for name in value.__tensor_flatten__()[0])
    return int(value.nbytes)


def _here(tensor: Any) -> Any:
    """The rank's own part of what is cut."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
