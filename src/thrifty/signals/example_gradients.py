"""Gradients of single examples, exact, from one backward of a whole batch.

    y_t = W x_t,    dL_b / dW = sum over the tokens t of b of  (dL_b / dy_t) x_t^T

The loss of the batch is the sum of its examples' losses, each the mean over the tokens that carry
loss, so that the gradient at y_t is that of the example that t is of. Weights themselves get no
gradient: the backward makes those of activations alone, and stops below the lowest layer that is
wanted. Linears and embeddings follow the formula; what else has weights (norms) is run again, an
example at a time, which costs little.

Limits: a module must act on each example alone, which fused experts do not (refused); its weights
must be reached through modules, not functions of the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Tokens, Work
from thrifty.costs.flops import step_flops
from thrifty.costs.memory import account
from thrifty.costs.setting import MemorySetting
from thrifty.costs.time import step_seconds
from thrifty.data.packing import padded_batches
from thrifty.signals.forward import mean_flops, next_token_losses, padded, padding, shape_of
from thrifty.signals.models import layers_of

BATCH_TOKENS = 2048
"""Padded tokens of a batch, one example at least."""
LARGEST_PRODUCT = 2**26
"""Elements of examples' gradients of one matrix that exist at a time."""


@dataclass(frozen=True)
class Seen:
    """What a module was given, and the gradients at what it put out, in one call."""

    module: Any
    inputs: Any
    """[batch, sequence, width], or ids [batch, sequence]."""
    grads: Any
    """[batch, sequence, width]"""


class ExampleGradients:
    """Hooks on the modules that hold the wanted weights; one batch after the other.

    ``with ExampleGradients(model, wanted) as each: each.of(ids, keep)``. The model is left as it
    was found: modes, requires_grad, no gradients, no hooks.
    """

    def __init__(self, model: Any, wanted: Sequence[Any]) -> None:
        """``wanted``: the model's parameters whose gradients are asked for.

        Raises ValueError that names the weights which no hook can see.
        """
        self.model = model
        self.wanted = list(wanted)
        self._homes = _homes(model, self.wanted)
        self._exits = ExitStack()
        self._calls: list[tuple[Any, Any, Any]] = []

    @property
    def num_elements(self) -> int:
        return sum(weight.numel() for weight in self.wanted)

    def __enter__(self) -> ExampleGradients:
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        training = self.model.training

        def restore() -> None:
            for p, required in before:
                p.requires_grad_(required)
            self.model.train(training)

        self._exits.callback(restore)
        self.model.eval()
        for p, _ in before:
            p.requires_grad_(False)
        for module in self._homes:
            self._exits.callback(module.register_forward_hook(self._note).remove)
        for module in _roots(self.model, self._homes):
            self._exits.callback(_cut(module).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._exits.close()
        self._calls.clear()

    def _note(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        slot: list[Any] = []
        if output.requires_grad:
            output.register_hook(slot.append)
        self._calls.append((module, args[0].detach(), slot))

    def of(self, ids: Any, keep: Any) -> BatchGradients:
        """Of a padded batch: ids ``[batch, sequence]``, and which of the tokens after the first
        carry loss ``[batch, sequence - 1]``. An example without any has a gradient of zero."""
        import torch

        self._calls.clear()
        with torch.enable_grad():
            # Positions of each row, or learned ones would be looked up for all rows at once.
            places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            logits = self.model(input_ids=ids, position_ids=places, use_cache=False).logits[:, :-1]
            nll = next_token_losses(_wide(logits), ids)
            losses = (nll * keep).sum(1) / keep.sum(1).clamp_min(1)
            if losses.requires_grad:
                losses.sum().backward()
        seen = [self._told_apart(ids, *call) for call in self._calls if call[2]]
        self._calls.clear()
        return BatchGradients(self.wanted, self._homes, seen, len(ids), losses.detach())

    def _told_apart(self, ids: Any, module: Any, given: Any, slot: Sequence[Any]) -> Seen:
        """Example by example, also where the model had put all tokens in a row."""
        grads = slot[0]
        if grads.dim() == 2 and len(grads) == ids.numel():
            shaped = (each.unflatten(0, tuple(ids.shape)) for each in (given, grads))
            return Seen(module, *shaped)
        if len(grads) == len(ids):
            return Seen(module, given, grads)
        name = next(name for name, each in self.model.named_modules() if each is module)
        raise ValueError(
            f"{name} ({type(module).__name__}) is not given the tokens of each example: "
            f"{list(grads.shape)} for a batch of {list(ids.shape)}\n"
            "hint: leave it out: LoRA on the attention's linears, or fewer layers"
        )


class BatchGradients:
    """The gradients of a batch's examples, formed a weight at a time as they are asked for."""

    def __init__(
        self,
        wanted: Sequence[Any],
        homes: Mapping[Any, list[tuple[str, int]]],
        seen: Sequence[Seen],
        size: int,
        losses: Any,
    ) -> None:
        self._wanted, self._homes, self._size = wanted, homes, size
        self.losses = losses
        """[batch], nats a token."""
        self._seen: dict[int, list[tuple[Seen, str]]] = {i: [] for i in range(len(wanted))}
        for each in seen:
            for name, place in homes[each.module]:
                self._seen[place].append((each, name))

    def __len__(self) -> int:
        return self._size

    def weights(self, places: Sequence[int] | None = None) -> Iterator[tuple[int, slice, Any]]:
        """Of each wanted weight, or of those at ``places``, some examples at a time: its place,
        which examples, and their gradients ``[examples, elements]``, in float32 (float64 where the
        model is)."""
        for place in range(len(self._wanted)) if places is None else places:
            weight = self._wanted[place]
            most = max(1, LARGEST_PRODUCT // weight.numel())
            for start in range(0, self._size, most):
                rows = slice(start, min(start + most, self._size))
                yield place, rows, self._of(place, weight, rows)

    def _of(self, place: int, weight: Any, rows: slice) -> Any:
        import torch

        total = None
        for seen, name in self._seen[place]:
            found = _wide(_gradient(seen, name, rows))
            total = found if total is None else total + found
        if total is None:  # the loss does not depend on it
            total = torch.zeros(rows.stop - rows.start, *weight.shape, device=weight.device)
        return total.flatten(1)

    def flat(self) -> Any:
        """[batch, elements of all wanted weights]."""
        sizes = [weight.numel() for weight in self._wanted]
        found = self._zeros(sum(sizes))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for place, rows, gradients in self.weights():
            found[rows, starts[place] : starts[place] + sizes[place]] = gradients
        return found

    def squared_norms(self) -> Any:
        """[batch]. Of a matrix without forming it, where its examples are short:
        |sum_t g_t x_t^T|^2 = sum_s,t (x_s . x_t) (g_s . g_t)."""
        found = self._zeros()
        rest = []
        for place, weight in enumerate(self._wanted):
            ((one, name),) = self._seen[place] if len(self._seen[place]) == 1 else ((None, ""),)
            if one is None or not _is_cheaper_by_tokens(one, name, weight):
                rest.append(place)
                continue
            x, g = (_wide(each).flatten(1, -2) for each in (one.inputs, one.grads))
            found += (x @ x.mT * (g @ g.mT)).sum((1, 2))
        for _, rows, gradients in self.weights(rest):
            found[rows] += gradients.square().sum(1)
        return found

    def products(self, directions: Sequence[Any]) -> Any:
        """[batch, m]: inner products with m gradients, of which ``directions`` has the part of each
        wanted weight, ``[m, elements]``. Nothing of an example is stored."""
        found = self._zeros(len(directions[0]))
        for place, rows, gradients in self.weights():
            found[rows] += gradients @ directions[place].to(gradients.dtype).T
        return found

    def _zeros(self, *width: int) -> Any:
        import torch

        one = self._wanted[0]
        wide = torch.promote_types(one.dtype, torch.float32)
        return torch.zeros(self._size, *width, device=one.device, dtype=wide)


def each_batch(
    model: Any,
    wanted: Sequence[Any],
    examples: Sequence[Tokens],
    meter: Meter,
    flops: Callable[[int, int], float],
) -> Iterator[tuple[list[int], BatchGradients]]:
    """Places in ``examples`` and their gradients, a padded batch of like lengths at a time.

    ``flops``: of rows and their padded length, what a batch takes; ticked before it.
    """
    lengths = [len(example.input_ids) for example in examples]
    device = next(model.parameters()).device
    with ExampleGradients(model, wanted) as gradients:
        for batch in padded_batches(lengths, max(BATCH_TOKENS, max(lengths, default=1))):
            ids, keep = padded([examples[i] for i in batch], device)
            meter.tick(Cost(flops=flops(*ids.shape)))
            yield batch, gradients.of(ids, keep)


def gradients_cost(
    work: Work, stats: PoolStats, setting: MemorySetting, elements: int, model: str = ""
) -> Cost:
    """Predicted cost of ``each_batch`` over rows like ``stats`` where ``setting`` says what is
    wanted, with as many gradients of ``elements`` as a batch has rows beside it."""
    if not stats.num_examples:
        return Cost()
    shape = shape_of(work, model)
    length = max(2, min(round(stats.mean_tokens), work.max_length))
    longest = min(max(stats.max_tokens, 2), work.max_length)
    rows = max(1, min(BATCH_TOKENS // length, stats.num_examples))
    setting = replace(
        setting,
        dtype=work.dtype,
        masked=False,
        device_kind=work.device.kind,
        micro_batch=rows,
        sequence=length,
    )
    flops = mean_flops(
        lambda tokens: step_flops(shape, replace(setting, micro_batch=1, sequence=tokens)),
        stats,
        length,
    )
    widest = replace(setting, micro_batch=max(1, BATCH_TOKENS // longest), sequence=longest)
    return Cost(
        flops=flops * stats.num_examples * padding(stats, longest, rows),
        seconds=step_seconds(shape, setting, work.device) * stats.num_examples / rows,
        peak_memory_bytes=account(shape, widest).peak_memory_bytes
        + 4.0 * rows * min(elements, LARGEST_PRODUCT),
    )


# -- what the hooks see --------------------------------------------------------------------------


def _homes(model: Any, wanted: Sequence[Any]) -> dict[Any, list[tuple[str, int]]]:
    """Module -> the names of the wanted weights that it holds, and their places."""
    places = {id(weight): place for place, weight in enumerate(wanted)}
    homes: dict[Any, list[tuple[str, int]]] = {}
    for name, module in model.named_modules():
        own = [(n, places[id(p)]) for n, p in module.named_parameters(recurse=False)
               if id(p) in places]  # fmt: skip
        if not own:
            continue
        if any(p.dim() > 2 for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{name} ({type(module).__name__}) holds experts or other weights in three "
                "dimensions, whose gradients cannot be told apart by example\n"
                "hint: use LoRA on the attention's linears, or fewer layers"
            )
        homes[module] = own
    found = {place for own in homes.values() for _, place in own}
    if len(found) < len(wanted):
        missing = [n for n, p in model.named_parameters() if places.get(id(p), -1) not in found]
        raise ValueError(
            f"no module of {type(model).__name__} holds {', '.join(missing[:3])}\n"
            "hint: ask for weights of the model's own modules"
        )
    return homes


def _roots(model: Any, homes: Mapping[Any, Any]) -> list[Any]:
    """The modules before which the backward ends: the lowest decoder layer with a wanted weight,
    or where there is none, the wanted modules themselves; an embedding is its own."""
    import torch

    tables = [module for module in homes if isinstance(module, torch.nn.Embedding)]
    for layer in layers_of(model):
        if any(module in homes for module in layer.modules()):
            return [*tables, layer]
    return [*tables, *(module for module in homes if module not in tables)]


def _cut(module: Any) -> Any:
    """Let gradients begin here: what an embedding puts out, or what another module is given."""
    import torch

    if isinstance(module, torch.nn.Embedding):
        return module.register_forward_hook(
            lambda _module, _args, output: output.detach().requires_grad_(), prepend=True
        )

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            first, *rest = args
            return (_leaf(first), *rest), kwargs
        return args, kwargs | {"hidden_states": _leaf(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _leaf(hidden: Any) -> Any:
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_()


def _wide(values: Any) -> Any:
    """In float32 at least."""
    import torch

    return values.to(torch.promote_types(values.dtype, torch.float32))


def _is_cheaper_by_tokens(seen: Seen, name: str, weight: Any) -> bool:
    """Whether products of tokens with tokens take fewer FLOPs than the matrix itself."""
    import torch

    if name != "weight" or not isinstance(seen.module, torch.nn.Linear):
        return False
    tokens, (rows, columns) = seen.inputs.shape[1], weight.shape
    return bool(tokens * (rows + columns) < rows * columns)


def _gradient(seen: Seen, name: str, rows: slice) -> Any:
    """Of the examples ``rows``, in the shape of the weight."""
    import torch
    from transformers.pytorch_utils import Conv1D

    module, x, g = seen.module, seen.inputs[rows], seen.grads[rows]
    if type(module) is torch.nn.Embedding:  # those that scale are run again
        wide = _wide(g)
        found = wide.new_zeros(len(x), *module.weight.shape)
        return found.scatter_add_(1, x[..., None].expand(g.shape), wide)
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        transposed = isinstance(module, Conv1D)
        if name == "bias":
            return g.flatten(1, -2).sum(1)
        one, other = (each.flatten(1, -2) for each in ((x, g) if transposed else (g, x)))
        return torch.bmm(one.mT, other.to(one.dtype))
    return _again(module, name, x, g)


def _again(module: Any, name: str, inputs: Any, grads: Any) -> Any:
    """By running the module on each example again."""
    import torch

    weight = getattr(module, name)
    found = []
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        for x, g in zip(inputs, grads, strict=True):
            put_out = torch.func.functional_call(module, {name: leaf}, (x[None],))
            found.append(torch.autograd.grad(put_out, leaf, g[None])[0])
    return torch.stack(found)
