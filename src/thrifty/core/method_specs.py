"""Methods as plan.yaml names them: a field that is read looks whether there is such a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from thrifty.core.resolve import Spec, resolve


def _method(kind: str) -> Callable[[Any], Spec]:
    """Reads a method's name and options, and looks whether there is such a method."""

    def read(value: Any) -> Spec:
        resolve(kind, value)
        return value

    return read


ScorerSpec = Annotated[Spec, _method("scorer")]
FilterSpec = Annotated[Spec, _method("filter")]
PickerSpec = Annotated[Spec, _method("picker")]
OnlineSpec = Annotated[Spec, _method("online")]
StoppingSpec = Annotated[Spec, _method("stopping")]
TrainedSpec = Annotated[Spec, _method("trained")]
WeightsSpec = Annotated[Spec, _method("weights")]
ActivationsSpec = Annotated[Spec, _method("activations")]
LossSpec = Annotated[Spec, _method("loss")]
StatesSpec = Annotated[Spec, _method("states")]
