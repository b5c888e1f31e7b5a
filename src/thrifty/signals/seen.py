"""What a module saw in one call, and the gradients of its weights that this makes, by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any


def _as_it_is(values: Any) -> Any:
    return values


@dataclass(frozen=True)
class Seen:
    """What a module was given, and the gradients at what it put out, in one call."""

    module: Any
    given: Any
    got: Any
    named: str = ""
    """The name under which it is given the inputs, where it wants one."""
    lay_out: Callable[[Any], Any] = _as_it_is
    """Example by example."""

    @cached_property
    def inputs(self) -> Any:
        """[examples, sequence, width], or ids [examples, sequence]."""
        return self.lay_out(self.given)

    @cached_property
    def grads(self) -> Any:
        """[examples, sequence, width]"""
        return self.lay_out(self.got)


def wide(values: Any) -> Any:
    """In float32 at least."""
    import torch

    return values.to(torch.promote_types(values.dtype, torch.float32))


def is_cheaper_by_tokens(seen: Seen, name: str, weight: Any) -> bool:
    """Whether products of tokens with tokens take fewer FLOPs than the matrix itself."""
    import torch

    if name != "weight" or not isinstance(seen.module, torch.nn.Linear):
        return False
    tokens, (rows, columns) = seen.inputs.shape[1], weight.shape
    return bool(tokens * (rows + columns) < rows * columns)


def gradient_of(seen: Seen, name: str, rows: slice) -> Any:
    """Of the examples ``rows``, in the shape of the weight."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if (found := sides(seen, name, rows)) is not None:
        left, right = found
        right = right.to(left.dtype)
        if left.shape[-1] > right.shape[-1]:  # several times faster with the narrow side first
            return torch.bmm(right.mT, left).mT
        return torch.bmm(left.mT, right)
    module, x, g = seen.module, seen.inputs[rows], seen.grads[rows]
    if type(module) is torch.nn.Embedding:  # those that scale are run again
        g = wide(g)
        table = g.new_zeros(len(x), *module.weight.shape)
        return table.scatter_add_(1, x[..., None].expand(g.shape), g)
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        return g.flatten(1, -2).sum(1)  # of its bias
    return _again(seen, name, x, g)


def sides(seen: Seen, name: str, rows: slice) -> tuple[Any, Any] | None:
    """Of a linear's matrix what its gradients are outer products of, [examples, tokens, rows] and
    [examples, tokens, columns]."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if name != "weight" or not isinstance(seen.module, (torch.nn.Linear, Conv1D)):
        return None
    x, g = (each[rows].flatten(1, -2) for each in (seen.inputs, seen.grads))
    return (x, g) if isinstance(seen.module, Conv1D) else (g, x)


def _again(seen: Seen, name: str, inputs: Any, grads: Any) -> Any:
    """By running the module on each example again."""
    import torch

    weight = getattr(seen.module, name)
    found = []
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        for x, g in zip(inputs, grads, strict=True):
            kwargs = {seen.named: x[None]} if seen.named else {}
            put_out = torch.func.functional_call(seen.module, {name: leaf}, (x[None],), kwargs)
            found.append(torch.autograd.grad(put_out, leaf, g[None])[0])
    return torch.stack(found)
