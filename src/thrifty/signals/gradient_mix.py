"""Of the examples of a batch: how alike their gradients are, and the gradient of some of them
together, without a second pass.

    <g_a, g_b> = sum over the weights of <dL_a/dW, dL_b/dW>,      sum_b w_b dL_b/dW

A batch may come in parts, a pack each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from thrifty.signals.example_gradients import LARGEST_PRODUCT, BatchGradients
from thrifty.signals.seen import Seen


def inner_products(
    parts: Sequence[BatchGradients], places: Sequence[int], direction: Any
) -> tuple[Any, Any]:
    """[n] and [n, n] over all examples of ``parts``: with ``direction``, the elements of the wanted
    matrices at ``places`` one after the other, and with one another. No matrix of an example exists
    whole where it is large."""
    import torch

    size = sum(map(len, parts))
    wide = torch.promote_types(direction.dtype, torch.float32)
    towards = torch.zeros(size, dtype=wide, device=direction.device)
    between = torch.zeros(size, size, dtype=wide, device=direction.device)
    start = 0
    for place in places:
        rows, columns = parts[0].wanted[place].shape
        own = direction[start : start + rows * columns].view(rows, columns)
        start += rows * columns
        most = max(1, LARGEST_PRODUCT // (size * columns))
        for first in range(0, rows, most):
            some = slice(first, first + most)
            each = torch.cat([_matrix_rows(part, place, some) for part in parts]).to(wide)
            towards += each @ own[some].flatten().to(wide)
            between += each @ each.T
    return towards, between


def mixed(parts: Sequence[BatchGradients], weights: Any) -> Iterator[tuple[int, Any]]:
    """Place and gradient of every wanted weight: the examples' weighted by ``weights`` [n]."""
    import torch

    apart = torch.split(weights, [len(part) for part in parts])
    for place in range(len(parts[0].wanted)):
        total = None
        for part, own in zip(parts, apart, strict=True):
            for seen, name in part.calls(place):
                found = _together(seen, name, own, part.owners)
                total = found if total is None else total + found
        if total is not None:
            yield place, total


def _matrix_rows(part: BatchGradients, place: int, some: slice) -> Any:
    """[examples, elements of those rows of the matrix]."""
    import torch

    weight = part.wanted[place][some]
    total = weight.new_zeros(len(part), weight.numel())
    for left, right in part.outer(place) or ():
        total = total + torch.bmm(left[..., some].mT, right).flatten(1)
    return total


def _together(seen: Seen, name: str, weights: Any, owners: Any) -> Any:
    """The gradient of the examples together, in the shape of the weight."""
    import torch
    from transformers.pytorch_utils import Conv1D

    module, x, g = seen.module, seen.given, seen.got
    if g.shape[:-1].numel() == owners.numel():
        of_token = weights[owners].to(g.dtype).view(g.shape[:-1])
        g = g * of_token[..., None]
    else:  # heads come before the tokens
        x, g = seen.inputs, seen.grads
        g = g * weights.to(g.dtype).view(-1, *(1,) * (g.dim() - 1))
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        g, x = g.flatten(0, -2), x.flatten(0, -2).to(g.dtype)
        if name == "bias":
            return g.sum(0)
        return x.T @ g if isinstance(module, Conv1D) else g.T @ x
    weight = getattr(module, name)
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        kwargs = {seen.named: x} if seen.named else {}
        put_out = torch.func.functional_call(module, {name: leaf}, (x,), kwargs)
        return torch.autograd.grad(put_out, leaf, g)[0]
