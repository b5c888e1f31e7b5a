"""Gradients of single examples, exact, from one backward of a whole batch.

    y_t = W x_t,    dL_b / dW = sum over the tokens t of b of  (dL_b / dy_t) x_t^T

The loss of the batch is the sum of its examples' losses, each the mean over the tokens that carry
loss, so that the gradient at y_t is that of the example that t is of. Weights themselves get no
gradient: the backward makes those of activations alone, and stops below the lowest layer that is
wanted. Linears and embeddings follow the formula; what else has weights (norms) is run again, an
example at a time, which costs little.

Examples come padded, one a row, or packed in one sequence; what the hooks saw of a pack is laid out
as of padded rows, and all after that is the same. ``each_batch`` pads: its batches hold examples of
like lengths, 0 to 5% of them padding, where packs of 2048 tokens took twice the time (on a CPU),
for attention over the whole pack.

Limits: a module must act on each example alone, which fused experts do not (refused); its weights
must be reached through modules, not functions of the model's own. In a pack, an example whose
forward pass is not finite spoils the others': attention multiplies what it masks by 0, not-a-number
stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Tokens
from thrifty.data.packed_attention import attention_of, check_isolation
from thrifty.data.packing import padded_batches
from thrifty.signals.forward import next_token_losses, padded
from thrifty.signals.pack_layout import PackLayout
from thrifty.signals.seen import Seen, gradient_of, is_cheaper_by_tokens, sides, wide

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCH_TOKENS = 2048
"""Padded tokens of a batch, one example at least."""
LARGEST_PRODUCT = 2**26
"""Elements of examples' gradients of one matrix that exist at a time."""


class ExampleGradients:
    """Hooks on the modules that hold the wanted weights; one batch after the other.

    ``with ExampleGradients(model, wanted) as each: each.of(ids, keep)``. The model is left as it
    was found: modes, requires_grad, no gradients, no hooks.
    """

    def __init__(self, model: Any, wanted: Sequence[Any], *, keeps_apart: bool = False) -> None:
        """``wanted``: the model's parameters whose gradients are asked for; ``keeps_apart``: the
        model is known to keep the examples of a pack apart.

        Raises ValueError that names the weights which no hook can see.
        """
        self.model = model
        self.wanted = list(wanted)
        self._homes = _homes(model, self.wanted)
        self._exits = ExitStack()
        self._calls: list[tuple[Any, Any, Any, str]] = []
        self._keeps_apart = keeps_apart

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
            for hook in (
                module.register_forward_hook(_begin),
                module.register_forward_hook(self._note, with_kwargs=True),
            ):
                self._exits.callback(hook.remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._exits.close()
        self._calls.clear()

    def _note(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        import torch

        slot: list[Any] = []
        if output.requires_grad:
            output.register_hook(slot.append)
        # A table of positions may be given a mask first, from which it would work them out.
        places = kwargs.get("position_ids") if isinstance(module, torch.nn.Embedding) else None
        given, named = (args[0], "") if places is None else (places, "position_ids")
        self._calls.append((module, given.detach(), slot, named))

    def of(self, ids: Any, keep: Any) -> BatchGradients:
        """Of a padded batch: ids ``[batch, sequence]``, and which of the tokens after the first
        carry loss ``[batch, sequence - 1]``. An example without any has a gradient of zero."""
        import torch

        # Positions of each row, or learned ones would be looked up for all rows at once.
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        given = {"input_ids": ids, "position_ids": places, "use_cache": False}

        def losses(nll: Any) -> Any:
            return (nll * keep).sum(1) / keep.sum(1).clamp_min(1)

        rows = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
        return self._from(given, losses, partial(_rows_apart, ids), rows)

    def of_pack(self, ids: Any, keep: Any, positions: Any) -> BatchGradients:
        """Of the examples in one packed sequence: ids and positions ``[1, sequence]``, 0 where an
        example begins, and which of the tokens after the first carry loss ``[1, sequence - 1]``;
        the first of an example never does.

        Raises ValueError for a model that lets packed examples see each other.
        """
        layout = PackLayout.of(positions)
        if not self._keeps_apart:
            check_isolation(self.model)
            self._keeps_apart = True
        given = {"input_ids": ids, "position_ids": positions, **attention_of(self.model, positions)}
        kept = keep[0] & (positions[0, 1:] != 0)  # only the example before could predict a first

        def losses(nll: Any) -> Any:
            return layout.means(nll[0], kept)

        return self._from(given, losses, layout.apart, layout.rows[None])

    def _from(
        self,
        given: Mapping[str, Any],
        losses_of: Callable[[Any], Any],
        apart: Callable[[Any], Any],
        owners: Any,
    ) -> BatchGradients:
        """One pass and its backward. ``losses_of``: each example's, from each token's; ``apart``
        lays out what a module was given, or the gradients at it, by example, or gives None;
        ``owners``: of which example each token is."""
        import torch

        ids = given["input_ids"]
        self._calls.clear()
        with torch.enable_grad():
            # Of every place, the last too, rather than a copy of the logits without it.
            logits = wide(self.model(**given).logits)
            shown = torch.nn.functional.pad(ids, (0, 1))
            losses = losses_of(next_token_losses(logits, shown)[:, :-1])
            if losses.requires_grad:
                losses.sum().backward()

        def lay_out(module: Any, values: Any) -> Any:
            found = apart(values)
            if found is None:
                raise ValueError(self._cannot_tell(module, values, ids))
            return found

        seen = [
            Seen(module, inputs, slot[0], named, partial(lay_out, module))
            for module, inputs, slot, named in self._calls
            if slot
        ]
        self._calls.clear()
        return BatchGradients(self.wanted, self._homes, seen, losses.detach(), owners)

    def _cannot_tell(self, module: Any, grads: Any, ids: Any) -> str:
        name = next(name for name, each in self.model.named_modules() if each is module)
        return (
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
        losses: Any,
        owners: Any,
    ) -> None:
        self.wanted, self._size = wanted, len(losses)
        self.losses = losses
        """[examples], nats a token."""
        self.owners = owners
        """[batch, sequence], as the model was given the tokens: the example that each is of."""
        self._seen: dict[int, list[tuple[Seen, str]]] = {i: [] for i in range(len(wanted))}
        for each in seen:
            for name, place in homes[each.module]:
                self._seen[place].append((each, name))

    def __len__(self) -> int:
        return self._size

    def calls(self, place: int) -> list[tuple[Seen, str]]:
        """The calls in which the wanted weight at ``place`` took part, and its name there."""
        return self._seen[place]

    def weights(self, places: Sequence[int] | None = None) -> Iterator[tuple[int, slice, Any]]:
        """Of each wanted weight, or of those at ``places``, some examples at a time: its place,
        which examples, and their gradients ``[examples, elements]``, in float32 (float64 where the
        model is)."""
        for place in range(len(self.wanted)) if places is None else places:
            weight = self.wanted[place]
            most = max(1, LARGEST_PRODUCT // weight.numel())
            for start in range(0, self._size, most):
                rows = slice(start, min(start + most, self._size))
                yield place, rows, self._of(place, weight, rows)

    def _of(self, place: int, weight: Any, rows: slice) -> Any:
        import torch

        total = None
        for seen, name in self._seen[place]:
            found = wide(gradient_of(seen, name, rows))
            total = found if total is None else total + found
        if total is None:  # the loss does not depend on it
            total = torch.zeros(rows.stop - rows.start, *weight.shape, device=weight.device)
        return total.flatten(1)

    def flat(self) -> Any:
        """[batch, elements of all wanted weights]."""
        sizes = [weight.numel() for weight in self.wanted]
        found = self._zeros(sum(sizes))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for place, rows, gradients in self.weights():
            found[rows, starts[place] : starts[place] + sizes[place]] = gradients
        return found

    def squared_norms(self) -> Any:
        """[batch], NaN of a gradient that is not finite. Of a matrix without forming it, where its
        examples are short: |sum_t g_t x_t^T|^2 = sum_s,t (x_s . x_t) (g_s . g_t)."""
        found = self._zeros()
        rest = []
        for place, weight in enumerate(self.wanted):
            ((one, name),) = self._seen[place] if len(self._seen[place]) == 1 else ((None, ""),)
            if one is None or not is_cheaper_by_tokens(one, name, weight):
                rest.append(place)
                continue
            x, g = (wide(each).flatten(1, -2) for each in (one.inputs, one.grads))
            found += (x @ x.mT * (g @ g.mT)).sum((1, 2))
        for _, rows, gradients in self.weights(rest):
            found[rows] += gradients.square().sum(1)
        return _no_infinity(found)

    def products(self, directions: Sequence[Any]) -> Any:
        """[batch, m], NaN of a gradient that is not finite: inner products with m gradients, of
        which ``directions`` has the part of each wanted weight, ``[m, elements]``. Nothing of an
        example is stored."""
        found = self._zeros(len(directions[0]))
        for place, rows, gradients in self.weights():
            found[rows] += gradients @ directions[place].to(gradients.dtype).T
        return _no_infinity(found)

    def outer(self, place: int) -> list[tuple[Any, Any]] | None:
        """What the gradients of the matrix at ``place`` are outer products of, a pair for each call
        of its linear: left ``[batch, tokens, rows]`` and right ``[batch, tokens, columns]``, in
        float32 at least; their products summed over the tokens are the gradients. None for a weight
        that is not a linear's matrix alone."""
        found = []
        for seen, name in self._seen[place]:
            if (pair := sides(seen, name, slice(None))) is None:
                return None
            found.append((wide(pair[0]), wide(pair[1])))
        return found

    def _zeros(self, *width: int) -> Any:
        import torch

        one = self.wanted[0]
        wide = torch.promote_types(one.dtype, torch.float32)
        return torch.zeros(self._size, *width, device=one.device, dtype=wide)


def each_batch(
    model: Any,
    wanted: Sequence[Any],
    examples: Sequence[Tokens],
    meter: Meter,
    flops: Callable[[int, int], float],
    known: NDArray[np.bool_] | None = None,
) -> Iterator[tuple[list[int], BatchGradients]]:
    """Places in ``examples`` and their gradients, a padded batch of like lengths at a time.

    ``flops``: of rows and their padded length, what a batch takes; ticked before it. ``known``: of
    which examples nothing is asked; batches of them alone are left out, and the others are the same
    as ever, so that what goes on ends in the same bits.
    """
    lengths = [len(example.input_ids) for example in examples]
    device = next(model.parameters()).device
    with ExampleGradients(model, wanted) as gradients:
        for batch in padded_batches(lengths, max(BATCH_TOKENS, max(lengths, default=1))):
            if known is not None and known[batch].all():
                continue
            ids, keep = padded([examples[i] for i in batch], device)
            meter.tick(Cost(flops=flops(*ids.shape)))
            yield batch, gradients.of(ids, keep)


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


def _rows_apart(ids: Any, values: Any) -> Any | None:
    """Example by example, also where the model had put all tokens in a row."""
    if values.dim() <= 2 and len(values) == ids.numel() and values.shape[:2] != ids.shape:
        return values.unflatten(0, tuple(ids.shape))
    return values if len(values) == len(ids) else None


def _begin(_module: Any, _args: Any, output: Any) -> Any:
    """Gradients begin at what a wanted module puts out, where none came from below."""
    import torch

    if output.requires_grad or not torch.is_grad_enabled():
        return output
    # No leaf, to which an adapter could not add in place.
    return output.detach().requires_grad_().clone()


def _no_infinity(found: Any) -> Any:
    """An example whose gradient overflowed has no number, or it would rank first."""
    return found.masked_fill(~found.isfinite(), float("nan"))
