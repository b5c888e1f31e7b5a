"""How many tokens another model makes of the pool's rows, beside the tokenizer that counted them.

A method that looks at a model with a tokenizer of its own reads other lengths than the pool's
manifest says; its price is scaled by what some of the rows show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.data.store import Store
from thrifty.data.tokens import Tokens, load_tokenizer, tokenize_rows, tokenizer_fingerprint
from thrifty.signals.classifier import is_classifier
from thrifty.signals.models import locate
from thrifty.signals.sentence_vectors import is_sentence_model
from thrifty.signals.some_rows import SomeRows

ROWS = 256
SHARDS = 4
"""From which they are read, evenly over the pool."""


def token_ratios(pool: Store) -> Callable[[str], float]:
    """Path of a model -> its tokens over the pool's; 1 for the model to be trained, and where its
    tokenizer cannot be loaded, which is told where it is used."""

    @cache
    def ratio(model: str) -> float:
        if not model:
            return 1.0
        try:
            folder = locate(model, weights=False)[0]
            tokenizer = load_tokenizer(str(folder))
        except ValueError:
            return 1.0
        manifest = pool.manifest
        if tokenizer_fingerprint(tokenizer) == manifest.tokenizer_fingerprint:
            return 1.0
        own = theirs = 0
        for index in sorted({*np.linspace(0, pool.num_shards - 1, SHARDS, dtype=int).tolist()}):
            shard = pool.shard(index)
            some = SomeRows(shard, np.arange(min(ROWS // SHARDS, len(shard))))
            own += sum(_split(folder, tokenizer, some, manifest.max_length))
            theirs += int(some.num_tokens.sum())
        return own / max(theirs, 1)

    return ratio


def _split(folder: Path, tokenizer: Any, rows: SomeRows, max_length: int) -> Iterator[int]:
    """Tokens of each row, cut where the pool's are, as the model in ``folder`` is given them."""
    if is_sentence_model(folder) or is_classifier(folder):
        encoded = tokenizer(list(rows.texts), verbose=False)["input_ids"]
        yield from (min(len(ids), max_length) for ids in encoded)
        return
    for found in tokenize_rows(rows.rows, tokenizer, max_length):
        yield len(found.input_ids) if isinstance(found, Tokens) else 1
