"""The test of models whose weights are cut over the ranks: all measure them together, for none
could hold one alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty import ranks
from thrifty.core.contracts import Meter, Rows
from thrifty.core.given import AddingUp
from thrifty.core.plan import MemoryPlan
from thrifty.evaluation import Measured
from thrifty.memory_plan import Techniques
from thrifty.signals.models import local_device
from thrifty.yardstick import Yardstick


@dataclass(frozen=True, kw_only=True)
class ShardedTest:
    """An order to all ranks."""

    memory: MemoryPlan
    base: Path
    trained: Path
    """As training left it: a whole model, or an adapter on the base."""
    of_trained: Yardstick
    of_base: Yardstick | None
    """None: the base is not measured."""
    rows: Mapping[str, Rows]
    weights: Mapping[str, float]

    def measured(self, meter: Meter) -> tuple[Measured, Measured]:
        """As rank 0: the trained model, and the base (itself again where that is not measured);
        ``meter`` is charged for all ranks."""
        ranks.tell(self)
        return self._together(meter)

    def follow(self) -> None:
        self._together(AddingUp())  # which nobody reads: rank 0 counts for all

    def _together(self, meter: Meter) -> tuple[Measured, Measured]:
        model = self._load()
        after = self._under(self.of_trained, model, meter)
        if self.of_base is None:
            return after, after
        adapted = hasattr(model, "disable_adapter")
        base = model if adapted else self._read(self.base)
        with model.disable_adapter() if adapted else nullcontext():
            return after, self._under(self.of_base, base, meter)

    def _under(self, yardstick: Yardstick, model: Any, meter: Meter) -> Measured:
        return yardstick.measure(model, self.rows, self.weights, meter, together=True)

    def _load(self) -> Any:
        if not (self.trained / "adapter_config.json").is_file():
            return self._read(self.trained)
        from peft import PeftModel

        base = self._read(self.base)
        return PeftModel.from_pretrained(base, str(self.trained), use_safetensors=True)

    def _read(self, folder: Path) -> Any:
        return Techniques.of(self.memory).weights_of(folder, local_device(), ranks.world())
