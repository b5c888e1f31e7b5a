"""Blockwise training: what is trained changes from step to step, and gradients and optimizer states
exist of that alone.

Which block has its turn is a function of the step, the seed and the model, so that a resumed run
goes on as if it had not stopped. States of a block that is left are dropped, or wait on the host.
Works with every optimizer that keeps them in its ``state`` and leaves alone what has no gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from thrifty.core.contracts import Trainable
from thrifty.costs.blocks import Block, Blocks
from thrifty.costs.setting import MemorySetting, at_turn

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


class Blockwise(Trainable):
    """Parts of the model take turns in being trained."""

    switches = True

    @property
    @abstractmethod
    def blocks(self) -> Blocks: ...

    @abstractmethod
    def block_at(self, step: int, num_layers: int, tied: bool, seed: int) -> Block:
        """What is trained at ``step``; ``tied``: the head is the embedding."""

    def refuses(self, setting: MemorySetting) -> str | None:
        if setting.replicas > 1:
            return "what devices add up is settled before the first step, and here it changes"
        return None

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        if self.blocks.layers > shape.num_layers:
            return (
                f"a block of {self.blocks.layers} layers is more than the model's "
                f"{shape.num_layers}"
            )
        return None

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(blocks=self.blocks)

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        """What is ever trained requires a gradient. Raises ValueError where a block is larger than
        the model."""
        if reason := self.refuses_model(shape, ""):
            raise ValueError(f"{reason}\nhint: smaller blocks, or train all weights")
        parts = parts_of(model)
        for weight in (*parts.before, *parts.after):
            weight.requires_grad_(self.blocks.ends != "frozen")
        return model

    def setting_at(
        self, setting: MemorySetting, shape: ModelShape, step: int, seed: int
    ) -> MemorySetting:
        tied = shape.tie_word_embeddings
        return at_turn(setting, self.block_at(step, shape.num_layers, tied, seed))

    def at_step(self, model: Any, optimizer: Any, step: int, seed: int) -> None:
        parts = parts_of(model)
        block = self.block_at(step, len(parts.layers), parts.tied, seed)
        turn_to(model, optimizer, block, parked=self.blocks.parked)


class Parts(NamedTuple):
    """The weights of a model, each once."""

    before: list[Any]
    """The embedding, and all else that comes before the layers."""
    layers: list[list[Any]]
    after: list[Any]
    """The final norm and the head."""
    tied: bool
    """The head is the embedding, among ``before``."""


def parts_of(model: Any) -> Parts:
    from thrifty.signals.models import layers_of

    layers = [list(layer.parameters()) for layer in layers_of(model)]
    inside = {id(weight) for layer in layers for weight in layer}
    tables = {id(weight) for weight in model.get_input_embeddings().parameters()}
    heads = {id(weight) for weight in model.get_output_embeddings().parameters()}
    before, after, passed = list[Any](), list[Any](), False
    for weight in model.parameters():
        if id(weight) in inside:
            passed = True
        elif id(weight) not in tables and (passed or id(weight) in heads):
            after.append(weight)
        else:
            before.append(weight)
    return Parts(before, layers, after, bool(tables & heads))


def weights_of(model: Any, block: Block) -> list[Any]:
    parts = parts_of(model)
    found = [weight for index in block.layers for weight in parts.layers[index]]
    found += parts.before if block.embedding else []
    return found + (parts.after if block.head else [])


def turn_to(model: Any, optimizer: Any, block: Block, *, parked: bool = False) -> None:
    """Before a step that trains ``block``: have it require gradients and nothing else. Optimizer
    states of all else are dropped or, ``parked``, moved to the host, from which those of the block
    come back."""
    chosen = set(map(id, weights_of(model, block)))
    for weight in model.parameters():
        trained = id(weight) in chosen
        weight.requires_grad_(trained)
        if not trained:
            weight.grad = None
        if weight not in optimizer.state:
            continue
        if parked:
            _move(optimizer.state[weight], weight.device if trained else "cpu")
        elif not trained:
            del optimizer.state[weight]


def load_on_host(optimizer: Any) -> None:
    """Have ``load_state_dict`` leave states on the host, where parked ones wait for their block's
    turn; as ever it takes all of them to where the weights are."""
    load = optimizer.load_state_dict

    def load_state_dict(saved: dict[str, Any]) -> None:
        states = saved["state"]
        numbers = {
            place: {key: value for key, value in state.items() if not _is_large(value)}
            for place, state in states.items()
        }
        load({**saved, "state": numbers})
        places = (place for group in saved["param_groups"] for place in group["params"])
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        for place, weight in zip(places, weights, strict=True):
            for key, value in states.get(place, {}).items():
                if _is_large(value):
                    optimizer.state[weight][key] = value.to("cpu", copy=True)

    optimizer.load_state_dict = load_state_dict


def _move(state: dict[str, Any], device: Any) -> None:
    """What an optimizer keeps on the host itself, which is pinned, stays there."""
    for key, value in state.items():
        if _is_large(value) and not value.is_pinned():
            state[key] = value.to(device)


def _is_large(value: Any) -> bool:
    """Numbers, as the count of steps, stay where the optimizer wants them."""
    return hasattr(value, "numel") and value.numel() > 1
