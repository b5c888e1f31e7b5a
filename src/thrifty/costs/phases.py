"""The phases of a training step under one setting, and the highest instant of each.

What holds always (weights, states, the batch) is told apart from what an instant adds to it: what
the layers keep, the gradients made so far, and the buffers beside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thrifty.costs.held import largest_tensor, state_bytes, step_bytes, update_bytes, weight_bytes
from thrifty.costs.liveness import NO_GRADIENTS, Instants, Point
from thrifty.costs.passes import highest_of, passes_of, shared_bytes
from thrifty.costs.setting import MemorySetting, setup_of
from thrifty.costs.shape import ModelShape
from thrifty.costs.stored import stored_of
from thrifty.costs.trained import trained

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.float64]

TERMS = (
    "weights",
    "adapter",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "temporaries",
)

BATCH_BYTES = 24
"""Of a token of the batch: input_ids, labels and position_ids, 8 each."""


class Instant(NamedTuple):
    """The highest instant of a phase: what it holds beside what holds always, and of what."""

    bytes: Bytes
    """[num_batches]"""
    of: Callable[[int], dict[str, float]]
    """Number of a batch -> the bytes by term."""


class Step:
    """The phases of a training step under one setting; arrays have an entry a micro-batch."""

    def __init__(
        self, shape: ModelShape, setting: MemorySetting, micro_batches: tuple[int, ...]
    ) -> None:
        self.shape, self.setting = shape, setting
        self.setup = setup_of(shape, setting, one_row=max(micro_batches) == 1)
        self.passes = passes_of(shape, self.setup, micro_batches, setting.sequence)
        self.tokens, self.keys = self.passes.tokens, self.passes.keys
        self.itemsize = setting.trained_itemsize
        self.shards, shards = setting.num_devices, setting.trained_shards
        self.trained = trained(shape, setting)
        self.gradients = self.trained.num_elements * self.itemsize / shards
        # While gradients accumulate all exist, and a new one lives until it is added to the old.
        # Replicas have theirs in the buckets that are added up, which stay.
        self.accumulating = setting.gradient_accumulation_steps > 1 or setting.replicas > 1
        # A tied head's new gradient waits for the embedding's before it is added or used up.
        tied = shape.tie_word_embeddings and self.setup.trains_embedding(shape)
        self.tied = shape.head_parameters * self.itemsize if tied else 0.0
        # Bytes of an element of the gradients that stay as the backward goes on, and of one made.
        self.left = 0.0 if self.accumulating or setting.in_backward else self.itemsize / shards
        self.fresh = float(self.itemsize) if not self.left or shards > 1 else 0.0
        # And of one that an update uses up in the backward, beside what the update makes.
        self.update = step_bytes(setting) if setting.in_backward else 0.0
        self.per_element = (self.left, self.fresh, self.update)
        self.stored = stored_of(
            self.passes, int(setting.recompute), setting.selective, setting.offload
        )
        self.kept = self.stored.kept

    # -- what holds whatever the phase ------------------------------------------------------------

    @cached_property
    def states(self) -> dict[str, float]:
        setting, shape = self.setting, self.shape
        adapter = 0.0
        if setting.adapter is not None:
            adapter = float(setting.adapter.num_parameters(shape) * setting.trained_itemsize)
        optimizer = 0.0 if setting.states_offloaded else state_bytes(shape, setting)
        held = {
            "weights": weight_bytes(shape, setting),
            "adapter": adapter,
            "optimizer_states": optimizer,
        }
        return {
            term: size / (self.shards if term == "weights" else setting.trained_shards)
            for term, size in held.items()
        }

    @cached_property
    def held(self) -> Bytes:
        """States and the batch: of every phase."""
        return sum(self.states.values()) + BATCH_BYTES * self.tokens

    @cached_property
    def gathered(self) -> float:
        """Sharded: the layer at work and the next one, whole, and as much of their gradients; or
        the head, as it came and put together."""
        if self.shards == 1:
            return 0.0
        layer = max(self.shape.layer_parameters(i) for i in range(self.shape.num_layers))
        layers = 4 * layer if self.setting.trained_shards > 1 else 2 * layer
        return float(max(layers, 2 * self.shape.head_parameters) * self.setting.itemsize)

    @cached_property
    def logits(self) -> Bytes:
        """Of a model's output that stays alive."""
        element = self.shape.vocab_size * self.setting.itemsize if self.setting.holds_logits else 0
        return self.tokens * float(element)

    def terms(self) -> dict[str, dict[str, float]]:
        """Phase -> term -> bytes, of the first batch."""
        found = {}
        for phase, instant in self.instants().items():
            terms = dict.fromkeys(TERMS, 0.0) | self.states
            terms["temporaries"] += BATCH_BYTES * float(self.tokens[0])
            for term, size in instant.of(0).items():
                terms[term] += size
            found[phase] = terms
        return found

    def instants(self) -> dict[str, Instant]:
        """The highest of each phase, the update of the weights last."""
        if self.setting.zeroth_order:
            return {"estimate": self._forwards(), "perturbation": self.last()}
        head = self._fused() if self.setting.loss_fused else self._head()
        return {
            "loss": _highest_of(_highest_of(head, self._last_forward()), self._chunks()),
            "backward": _highest_of(self._layers(), self._embedding()),
            "optimizer": self.last(),
        }

    def last(self) -> Instant:
        """The update of the weights: the only phase that the optimizer's own buffers enter."""
        return self._perturbation() if self.setting.zeroth_order else self._optimizer()

    def _parts(
        self,
        point: Point,
        batch: int,
        tokens: Bytes,
        per_element: tuple[float, float, float] = NO_GRADIENTS,
    ) -> tuple[float, float, float]:
        """At an instant: what autograd keeps, what lives beside it, and the gradients made."""
        kept, beside = (float(size.at(tokens[batch], self.keys)) for size in point[:2])
        left, fresh, update = per_element
        return kept, beside, point.done * left + point.fresh * fresh + point.updated * update

    def _gradients(self, fresh: float, done: float = 0.0) -> float:
        whole = self.gradients if self.accumulating else 0.0
        return whole + done * self.left + fresh

    # -- the phases -------------------------------------------------------------------------------

    def _head(self) -> Instant:
        """The end of the forward and the start of the backward: logits of all tokens, or of a chunk
        at a time. Then a chunk's logits are made again in the backward, and the head's gradient is
        summed up over the chunks."""
        chunk, last = self.setting.loss_chunk, self.passes.last
        tokens = self._at_once
        # A tied head is updated with the embedding.
        per_element = (self.left, self.fresh, 0.0 if self.tied else self.update)
        each = tuple(tokens.tolist())
        most, at = highest_of(last, "through", each, self.keys, per_element)
        points = last.through.points
        several = (self.tokens > chunk) if chunk else np.zeros_like(self.tokens)
        waiting = self._waiting(tokens) if chunk else np.zeros_like(self.tokens)
        summed = last.weight_elements * self.itemsize * several

        def terms(batch: int) -> dict[str, float]:
            kept, beside, made = self._parts(points[at[batch]], batch, tokens, per_element)
            return {
                "activations": float(self.kept[batch] + waiting[batch]),
                "logits": kept + beside,
                "gradients": self._gradients(made + float(summed[batch])),
                "temporaries": self.gathered,
            }

        held = self._gradients(0.0) + self.gathered
        return Instant(self.kept + waiting + most + summed + held, terms)

    def _fused(self) -> Instant:
        """A chunk's logits, in float32 too where they are narrower, become their own gradient; the
        hidden states' and the head's wait for the backward. There the head may be updated at once,
        a tied one with the embedding."""
        itemsize, elements = self.setting.itemsize, self.passes.last.weight_elements
        tokens = np.minimum(self.tokens, float(self.setting.loss_chunk))
        logits = tokens * (self.shape.vocab_size * (4.0 if itemsize == 4 else 4.0 + itemsize))
        chunk = np.maximum(logits, 0.0 if self.tied else self.update * elements)
        waiting = 2.0 * self.passes.input + self.passes.normed
        gradients = self._gradients(float(elements * self.itemsize))

        def terms(batch: int) -> dict[str, float]:
            return {
                "activations": float(self.kept[batch] + waiting[batch]),
                "logits": float(chunk[batch]),
                "gradients": gradients,
                "temporaries": self.gathered,
            }

        return Instant(self.kept + waiting + chunk + gradients + self.gathered, terms)

    def _waiting(self, tokens: Bytes) -> Bytes:
        """While ``tokens`` have logits: the hidden states and their gradient, and what their norm
        kept of all others."""
        return 2.0 * self.passes.input + self.passes.normed * (1.0 - tokens / self.tokens)

    def _chunks(self) -> Instant | None:
        """The head's gradient of a chunk is added to that of the others, out of place."""
        elements, chunk = self.passes.last.weight_elements, self.setting.loss_chunk
        if not (elements and chunk) or self.setting.loss_fused:
            return None
        gradients = self._gradients(3.0 * elements * self.itemsize)
        waiting = self._waiting(np.zeros_like(self.tokens))
        held = np.where(self.tokens > chunk, self.kept + waiting, 0.0)

        def terms(batch: int) -> dict[str, float]:
            return {
                "activations": float(held[batch]),
                "gradients": gradients,
                "temporaries": self.gathered,
            }

        return Instant(held + gradients * (held > 0) + self.gathered, terms)

    def _last_forward(self) -> Instant:
        """The last layer's forward, which may hold more than the head."""
        top = self.stored.last_forward

        def terms(batch: int) -> dict[str, float]:
            kept, beside, _ = self._parts(top.at[batch], batch, self.tokens)
            return {
                "activations": float(top.below[batch]) + kept,
                "gradients": self._gradients(0.0),
                "temporaries": beside + self.gathered,
            }

        return Instant(top.bytes + self._gradients(0.0) + self.gathered, terms)

    def _layers(self) -> Instant:
        """From the last layer down, each leaving its weights' gradients."""
        layer = self.stored.backward(self.per_element)
        pending = 0.0 if self.left else self.tied

        def terms(batch: int) -> dict[str, float]:
            kept, beside, made = self._parts(layer.at[batch], batch, self.tokens, self.per_element)
            return {
                "activations": float(layer.below[batch]) + kept,
                "logits": float(self.logits[batch]),
                "gradients": self._gradients(made + pending, float(layer.done[batch])),
                "temporaries": beside + self.gathered,
            }

        return Instant(layer.bytes + self.logits + self._gradients(pending) + self.gathered, terms)

    def _embedding(self) -> Instant | None:
        """The embedding's gradient is dense. Tied to the head it is added to the head's, whose sum
        is a third buffer; while gradients accumulate there is the old one too."""
        if not self.setup.trains_embedding(self.shape):
            return None
        table = float(self.shape.head_parameters * self.itemsize)
        copies = (2.0 if self.shape.tie_word_embeddings else 0.0) + self.accumulating
        gradients = table if self.setting.in_backward else self.gradients
        beside = copies * table + self.passes.input
        beside = np.maximum(beside, self.update * self.shape.head_parameters)

        def terms(batch: int) -> dict[str, float]:
            return {
                "gradients": gradients,
                "logits": float(self.logits[batch]),
                "temporaries": float(beside[batch]) + self.gathered,
            }

        return Instant(beside + self.logits + gradients + self.gathered, terms)

    def _optimizer(self) -> Instant:
        gradients, allocated = update_bytes(self.shape, self.setting)

        def terms(batch: int) -> dict[str, float]:
            return {"gradients": gradients, "temporaries": allocated}

        return Instant(np.zeros_like(self.tokens) + gradients + allocated, terms)

    @property
    def _at_once(self) -> Bytes:
        """Tokens that have logits at a time."""
        chunk = self.setting.loss_chunk
        return np.minimum(self.tokens, float(chunk)) if chunk else self.tokens

    def _forwards(self) -> Instant:
        """Zeroth order: two forwards, in which each weight is moved for its use."""

        def forward(points: Instants, term: str, held: Bytes, tokens: Bytes) -> Instant:
            most, at = points.highest(tokens, self.keys)

            def terms(batch: int) -> dict[str, float]:
                kept, beside, _ = self._parts(points.points[at[batch]], batch, tokens)
                return {term: kept + beside, "temporaries": self.gathered + float(held[batch])}

            return Instant(most + self.gathered + held, terms)

        top = self.passes.kinds[self.passes.kind_of[-1]]
        moved = float(largest_tensor(self.shape) * self.setting.itemsize)
        masks = self.passes.bytes(shared_bytes(self.shape, self.setup, held=True))
        # The model itself holds the embedding's output, and a layer's input while the layer runs.
        around = masks + (2.0 if self.shape.num_layers > 1 else 1.0) * self.passes.input
        # The model's own forward holds what the logits are made of.
        last, made_of = self.passes.last.forward, self.passes.input
        return _highest_of(
            forward(top.forward, "activations", around + moved, self.tokens),
            forward(last, "logits", made_of, self._at_once),
        )

    def _perturbation(self) -> Instant:
        """Of the largest weight, which is the head's: beside what it is given and the logits."""
        noise = float(self.shape.head_parameters * self.setting.itemsize)
        logits = self._at_once * float(self.shape.vocab_size * self.setting.itemsize)
        held = self.passes.input + logits

        def terms(batch: int) -> dict[str, float]:
            return {"logits": float(held[batch]), "temporaries": noise + self.gathered}

        return Instant(held + noise + self.gathered, terms)


def _highest_of(one: Instant, other: Instant | None) -> Instant:
    """Of two instants the one that holds more, batch by batch."""
    if other is None:
        return one

    def terms(batch: int) -> dict[str, float]:
        return (one if one.bytes[batch] >= other.bytes[batch] else other).of(batch)

    return Instant(np.maximum(one.bytes, other.bytes), terms)
