"""The last decoder layer again and again on what the layers before it gave once.

The layers before it hand on what they are given meanwhile, and the last is given what it was given
the first time, so that a pass of the whole model takes that of its last layer and its head;
whatever the family does in between stays its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from thrifty.signals.models import layers_of

VALUE = "v_proj"
"""The value projection's name in the families that have one of its own."""


def last_value_weight(model: Any) -> Any:
    """Of the last layer. Raises ValueError where it has none of its own."""
    last = list(layers_of(model))[-1]
    for name, module in last.named_modules():
        if name.endswith(VALUE):
            return getattr(module, "base_layer", module).weight
    raise ValueError(
        f"the last layer of {type(model).__name__} has no {VALUE}\n"
        "hint: its value projection is fused with others; take another online method"
    )


@contextmanager
def last_layer_alone(model: Any, given: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
    """After one whole pass over ``given``: a function that runs the last layer and the head alone,
    with whatever weights they have by then, and gives the logits."""
    *before, last = layers_of(model)
    kept: list[Any] = []
    outputs: list[Any] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    hooks = [last.register_forward_pre_hook(keep, with_kwargs=True)]
    hooks += [
        layer.register_forward_hook(lambda *seen: outputs.append(seen[2])) for layer in before
    ]
    try:
        model.forward(**given)
    finally:
        for hook in hooks:
            hook.remove()
    (hidden,) = kept
    in_tuple = bool(outputs) and isinstance(outputs[0], tuple)

    def hand_on(hidden_states: Any, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if in_tuple else hidden_states

    def as_before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    hook = last.register_forward_pre_hook(as_before, with_kwargs=True)
    for layer in before:
        layer.forward = hand_on
    try:
        yield lambda: model.forward(**given).logits
    finally:
        hook.remove()
        for layer in before:
            del layer.forward
