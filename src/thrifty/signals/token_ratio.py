"""How many tokens another model makes of the pool's rows, beside the tokenizer that counted them.

A method that looks at a model with a tokenizer of its own reads other lengths than the pool's
manifest says; its price is scaled by what some of the rows show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from thrifty.data.store import Store
from thrifty.data.tokens import load_tokenizer, tokenizer_fingerprint
from thrifty.signals.models import locate

ROWS = 256
SHARDS = 4
"""From which they are read, evenly over the pool."""


def token_ratios(pool: Store) -> Callable[[str], float]:
    """Path of a model -> its tokens over the pool's; 1 for the model to be trained, and where its
    tokenizer cannot be loaded, which is told where it is used."""

    @cache
    def ratio(model: str) -> float:
        try:
            tokenizer = load_tokenizer(str(locate(model, weights=False)[0])) if model else None
        except ValueError:
            return 1.0
        manifest = pool.manifest
        if tokenizer is None or tokenizer_fingerprint(tokenizer) == manifest.tokenizer_fingerprint:
            return 1.0
        own = theirs = 0
        for index in sorted({*np.linspace(0, pool.num_shards - 1, SHARDS, dtype=int).tolist()}):
            shard = pool.shard(index)
            texts = list(shard.texts[: ROWS // SHARDS])
            for ids in tokenizer(texts, verbose=False)["input_ids"]:
                own += min(len(ids), manifest.max_length)  # where the pool's rows are cut too
            theirs += int(shard.num_tokens[: len(texts)].sum())
        return own / max(theirs, 1)

    return ratio
