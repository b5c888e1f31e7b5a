"""Whole documents packed into sequences of one length, so that every step costs the same FLOPs.

``pack`` is best-fit decreasing: the longest document first, each into the open sequence that it
fills best. Its waste is at most 11/9 OPT + 1 sequences in the worst case (Johnson 1973) and under
one per cent on usual text. Ding et al. 2024 (arXiv:2404.10830) show that not cutting documents
helps the model too.

``PackedDataset`` packs window by window of the epoch's order, so that a given order (a curriculum,
best rows first) survives up to one window, and everything is a function of the orders: a run that
resumes at item k sees the item k it would have seen.

Documents in a pack must not see each other: ``position_ids`` restart at 0 with every document and
the model must be called as ``packed_attention.py`` says. No document's first token is predicted,
since only the document before could predict it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label that cross entropy passes over, in torch and transformers."""

Order = Callable[[int], Sequence[int] | NDArray[np.integer]]
"""epoch -> the indices of the examples to train on, in the order wanted."""


class Example(Protocol):
    """What ``tokens.Tokens`` has."""

    @property
    def input_ids(self) -> NDArray[np.int32]: ...  # [num_tokens]
    @property
    def loss_mask(self) -> NDArray[np.bool_]: ...  # [num_tokens]


def pack(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Indices into ``lengths``, pack by pack: each index once, no pack over ``capacity``.

    O(n log n) for the sorting and O(capacity / 64) a document: bit r of one big integer says
    whether a pack with r free tokens is open, so the best fit is its lowest bit from the length on.
    """
    sizes = _checked(lengths, capacity)
    packs: list[list[int]] = []
    open_packs: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free tokens
    open_bits = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = open_bits >> sizes[i]
        if fitting:
            free = sizes[i] + (fitting & -fitting).bit_length() - 1
            chosen = open_packs[free].pop()
            if not open_packs[free]:
                open_bits ^= 1 << free
            packs[chosen].append(i)
        else:
            free, chosen = capacity, len(packs)
            packs.append([i])
        left = free - sizes[i]
        if left:
            open_packs[left].append(chosen)
            open_bits |= 1 << left
    return packs


def padded_batches(
    lengths: Sequence[int] | NDArray[np.integer], max_tokens: int, *, least_share: float = 0.85
) -> list[list[int]]:
    """Batches of similar length for scoring and evaluation: rows x longest row <= ``max_tokens``,
    and no row shorter than ``least_share`` of its batch's longest, so that little is padding.

    Longest first: where memory does not suffice, the first batch shows it.
    """
    sizes = _checked(lengths, max_tokens)
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        longest = sizes[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= max_tokens
        if fits and sizes[i] >= least_share * longest:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _checked(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[int]:
    sizes = [int(length) for length in lengths]
    longest, shortest = max(sizes, default=1), min(sizes, default=1)
    if shortest < 1:
        raise ValueError("an example has no tokens\nhint: leave empty examples out")
    if longest > capacity:
        raise ValueError(
            f"an example of {longest} tokens does not fit {capacity}\n"
            "hint: tokenise with a max_length that is not above the sequence length"
        )
    return sizes


class PackedDataset:
    """Packs of exactly ``sequence`` tokens: a map-style dataset for ``torch.utils.data``.

    Item: int64 ``input_ids``, ``labels`` and ``position_ids``, each ``[sequence]``; labels are
    ``IGNORED`` outside the loss mask, on padding and on the first token of every document; padding
    is a document of its own. There is no ``attention_mask``: see ``packed_attention.py``.

    The items of ``num_epochs`` epochs follow one another, each epoch packed from its own order:
    ``order(epoch)``, or a permutation of (seed, epoch). Read them in their order
    (``train_sampling_strategy="sequential"`` and one epoch in the Trainer's words). With
    ``num_items`` there are as many epochs as so many items take, and an epoch's order is asked for
    when its first item is, so that it may depend on what happened until then.

    ``exact``: documents follow one another exactly in the order, at the price of more padding.
    ``tells_rows``: an item also has ``rows`` [sequence], which example each token is of (-1 for
    padding), and ``epoch`` [sequence].
    """

    def __init__(
        self,
        examples: Sequence[Example],
        sequence: int,
        *,
        seed: int = 0,
        num_epochs: int = 1,
        num_items: int | None = None,
        order: Order | None = None,
        window: int = 1024,
        exact: bool = False,
        tells_rows: bool = False,
        pad_token_id: int = 0,
    ) -> None:
        if window < 1 or num_epochs < 1:
            raise ValueError(
                f"window and num_epochs must be at least 1, not {window} and {num_epochs}\n"
                "hint: window is the number of examples that are packed together"
            )
        self._take(examples)
        self.sequence = sequence
        self.pad_token_id = pad_token_id
        self._packs: list[list[int]] = []
        self._seed, self._order = seed, order
        self._window, self._exact, self._tells_rows = window, exact, tells_rows
        self._num_items = num_items
        self._cuts: list[int] = []
        self.num_read = 0
        """Items up to the last that was asked for."""
        self.epoch_starts: list[int] = []
        """The first item of each epoch."""
        if num_items is None:
            for _ in range(num_epochs):
                self._pack_an_epoch()

    def _take(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._lengths = np.asarray([len(example.input_ids) for example in examples], dtype=np.int64)

    def _pack_an_epoch(self) -> None:
        epoch = len(self.epoch_starts)
        if self._order is None:
            indices: Any = shuffled(len(self._examples), self._seed, epoch)
        else:
            indices = self._order(epoch)
        if self._exact:
            packs = pack_exactly(self._lengths, indices, self.sequence)
        else:
            packs = pack_in_order(self._lengths, indices, self.sequence, self._window)
        first = len(self._packs)
        self.epoch_starts.append(first)
        cut = next((cut for cut in self._cuts if first < cut), first + len(packs))
        self._packs += packs[: cut - first]

    def begin_anew(self, examples: Sequence[Example], item: int) -> list[int]:
        """End the epoch before ``item``, which nobody has read yet, and draw what follows from
        ``examples``, which begin with those there were. Returns the examples that were to come in
        the epoch."""
        unread = [i for members in self._packs[item:] for i in members]
        del self._packs[item:]
        self.restore(examples, [*self._cuts, item])
        return unread

    def restore(self, examples: Sequence[Example], cuts: Sequence[int]) -> None:
        """To what it was after ``begin_anew`` at each of ``cuts``."""
        self._cuts = list(cuts)
        self._take(examples)

    def __len__(self) -> int:
        return len(self._packs) if self._num_items is None else self._num_items

    def members(self, item: int) -> list[int]:
        """The examples in a pack, in their order in it."""
        if item >= len(self):
            raise IndexError(item)
        while item >= len(self._packs):
            self._pack_an_epoch()
        return self._packs[item]

    @property
    def num_tokens(self) -> int:
        """Tokens of documents in all items packed so far; the rest of each is padding."""
        return int(sum(self._lengths[members].sum() for members in self._packs))

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        import torch

        columns = packed_item(self._examples, self.members(item), self.sequence, self.pad_token_id)
        self.num_read = max(self.num_read, item + 1)
        if not self._tells_rows:
            del columns["rows"]
        else:
            epoch = bisect_right(self.epoch_starts, item) - 1
            columns["epoch"] = np.full(self.sequence, epoch)
        return {name: torch.from_numpy(column) for name, column in columns.items()}


def packed_item(
    examples: Sequence[Example], members: Sequence[int], sequence: int, pad_token_id: int = 0
) -> dict[str, NDArray[np.int64]]:
    """One pack of ``members``: what ``PackedDataset`` says of an item, with ``rows``."""
    input_ids = np.full(sequence, pad_token_id, dtype=np.int64)
    labels = np.full(sequence, IGNORED, dtype=np.int64)
    position_ids = np.zeros(sequence, dtype=np.int64)
    rows = np.full(sequence, -1, dtype=np.int64)
    at = 0
    for row in members:
        example = examples[row]
        size = len(example.input_ids)
        place = slice(at, at + size)
        input_ids[place] = example.input_ids
        labels[place] = np.where(example.loss_mask, example.input_ids, IGNORED)
        labels[at] = IGNORED
        position_ids[place] = np.arange(size)
        rows[place] = row
        at += size
    position_ids[at:] = np.arange(sequence - at)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "rows": rows}


def shuffled(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of (seed, epoch): the same on every machine."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def pack_in_order(
    lengths: NDArray[np.int64],
    order: Sequence[int] | NDArray[np.integer],
    sequence: int,
    window: int,
) -> list[list[int]]:
    """Packs of ``window`` examples of ``order`` after the other, by the first example of each."""
    packs: list[list[int]] = []
    for start in range(0, len(order), window):
        part = np.asarray(order[start : start + window], dtype=np.int64)
        # Places in the window, so that sorting them restores the order wanted.
        places = sorted(sorted(members) for members in pack(lengths[part], sequence))
        packs += [part[members].tolist() for members in places]
    return packs


def pack_exactly(
    lengths: NDArray[np.int64], order: Sequence[int] | NDArray[np.integer], sequence: int
) -> list[list[int]]:
    """Packs in exactly the order given: a document that does not fit begins the next."""
    sizes = _checked(lengths, sequence)
    packs: list[list[int]] = []
    free = 0
    for i in map(int, order):
        if sizes[i] > free:
            packs.append([])
            free = sequence
        packs[-1].append(i)
        free -= sizes[i]
    return packs
