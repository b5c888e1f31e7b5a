"""Training without a backward: the loss on both sides of a random direction (MeZO).

    g = (L(w + eps z) - L(w - eps z)) / (2 eps),   z standard normal,   w <- w - lr (g z + decay w)

z is made anew from the seed, the step and the weight's name wherever it is needed. The authors move
all weights in place, by +eps z, -2 eps z and +eps z, which rounds them each time. Here they stay as
they are: while the loss is made, each function of torch that is given a weight is given a moved
copy, which lives as long as that call. So nothing drifts, and one weight is held twice at a time. A
bfloat16 weight is rounded at random after its update, most of which are too small for it.

Limits: what reads weights behind torch's back, as some kernels do, is not seen and is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from thrifty.holding.noise import generator_of
from thrifty.holding.rounding import round_at_random
from thrifty.holding.tensor_by_tensor import wide

_CHUNK = 2**22
"""Elements of noise made at once."""
_ABOUT = {"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "data_ptr"}
"""What asks about a tensor and does not look into it."""


class ZerothOrder(torch.optim.Optimizer):
    """``groups``: each with its ``params`` as (name, parameter) pairs, a ``lr``, a
    ``weight_decay``."""

    def __init__(
        self, groups: list[dict[str, Any]], *, eps: float, seed: int, share: float = 1.0
    ) -> None:
        """``share``: of the rate, where another part of the step has the rest."""
        super().__init__(groups, {"steps": 0})
        self.eps, self.seed, self._share = eps, seed, share
        self._slope = 0.0
        self._seen: set[str] = set()

    @torch.no_grad()
    def estimate(self, loss: Callable[[], Any]) -> Any:
        """Of a micro-batch: its loss, the mean of both sides. ``loss()`` is its part of the step's;
        slopes add up until ``step``, as gradients do, along the same direction. Dropout is the same
        on both sides. Raises FloatingPointError where a loss is not finite."""
        with _same_draws():
            up = self._at(self.eps, loss)
        down = self._at(-self.eps, loss)
        slope = float(up - down) / (2 * self.eps)
        if not math.isfinite(slope):
            self._slope = 0.0
            raise FloatingPointError(
                "a loss beside the weights is not finite; nothing was updated\n"
                "hint: the last checkpoint is good; go on from it at a lower learning rate"
            )
        self._slope += slope
        return (up + down) / 2

    def zero_grad(self, set_to_none: bool = True) -> None:
        """What was estimated since the last step is forgotten."""
        self._slope, self._seen = 0.0, set()
        super().zero_grad(set_to_none)

    def _at(self, distance: float, loss: Callable[[], Any]) -> Any:
        named = {name: weight for name, weight, _ in self._weights()}
        with Moved(named, self.seed, self._steps, distance) as moved:
            found = loss().detach()
        self._seen |= moved.seen
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Along the direction of this step, where anything was estimated. Raises ValueError for a
        weight that no function was given."""
        loss = None if closure is None else self.estimate(closure)
        for name, weight, group in self._weights() if self._seen else ():
            if name not in self._seen:
                raise ValueError(
                    f"{name} was not used by functions of torch\n"
                    "hint: freeze it, or train with gradients"
                )
            self._update(name, weight, group)
        for group in self.param_groups:
            group["steps"] += 1
        self._slope, self._seen = 0.0, set()
        return loss

    def _update(self, name: str, weight: torch.Tensor, group: dict[str, Any]) -> None:
        rate, decay = group["lr"] * self._share, group["weight_decay"]
        generator = generator_of(self.seed, f"{name} rounded", self._steps, weight.device)
        parts = weight.view(-1).split(_CHUNK)
        for part, noise in zip(parts, _noise(name, weight, self.seed, self._steps), strict=True):
            there = wide(part).mul_(1 - rate * decay).sub_(noise, alpha=rate * self._slope)
            rounded = part.dtype == torch.bfloat16
            part.copy_(round_at_random(there, generator) if rounded else there)

    @property
    def _steps(self) -> int:
        return int(self.param_groups[0]["steps"])

    def _weights(self) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for name, weight in zip(group["param_names"], group["params"], strict=True):
                yield name, weight, group


class Moved(TorchFunctionMode):
    """Functions of torch are given ``weights`` moved by ``distance`` z."""

    def __init__(
        self, weights: dict[str, torch.Tensor], seed: int, step: int, distance: float
    ) -> None:
        super().__init__()
        self.seen: set[str] = set()
        """Names of weights that some function was given."""
        self._names = {id(weight): name for name, weight in weights.items()}
        self._seed, self._step, self._distance = seed, step, distance

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in _ABOUT:
            return func(*args, **kwargs)
        if name == "__get__":  # an attribute
            found = func(*args, **kwargs)
            if not isinstance(found, torch.Tensor):
                return found
        moved_args, moved_kwargs = tree_map_only(torch.Tensor, self._moved, (args, kwargs))
        return func(*moved_args, **moved_kwargs)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self._names.get(id(tensor))
        if name is None:
            return tensor
        self.seen.add(name)
        copy = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        noise = _noise(name, tensor, self._seed, self._step, copy)
        for part, moved in zip(tensor.view(-1).split(_CHUNK), noise, strict=True):
            moved.mul_(self._distance).add_(part)
        return copy


def _noise(
    name: str, weight: torch.Tensor, seed: int, step: int, into: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """z of a weight, a chunk after the other; ``into``: where it is put."""
    generator = generator_of(seed, name, step, weight.device)
    for part in (weight if into is None else into).view(-1).split(_CHUNK):
        there = torch.empty_like(part) if into is None else part
        yield there.normal_(generator=generator)


def _same_draws() -> AbstractContextManager[None]:
    """What is drawn inside is drawn again after it."""
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=cuda)
