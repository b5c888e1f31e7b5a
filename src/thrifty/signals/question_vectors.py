"""Questions as vectors, from their text alone: what they are about, and what they look like.

    x(q) = [ V' tfidf(q), f(q) ]    each coordinate of mean 0 and variance 1

tfidf: counts c of hashed words and pairs of words (``ngrams.py``), weighed (1 + ln c)
(1 + ln((1 + n) / (1 + n_b))), to unit length; V: its leading singular vectors (latent semantic
analysis). f: lengths and shares of kinds of characters, by which the form of a question is told. A
sentence-transformers model, in a folder, gives vectors in place of the first part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.given import AddingUp, Meter
from thrifty.signals.ngrams import hashed_ngrams

Arrays = dict[str, NDArray[Any]]

READ = 20_000
"""Characters of a question; its form is told by then."""
NUM_BUCKETS = 2**13
WIDTH = 32

_KINDS = [
    re.compile(kind) for kind in (r"\d", r"[A-Z]", r"[^\w\s]", r"[^\x00-\x7f]", r"\n", r"[\\$^{}]")
]
_MARKS = "?.,:;(_="
_WORD = re.compile(r"\w+")


def learn_vectors(texts: Sequence[str], embedding: str = "", seed: int = 0) -> Arrays:
    """What turns questions into vectors. ``embedding``: a folder; empty: words."""
    learnt: Arrays = {}
    if not embedding:
        from sklearn.decomposition import TruncatedSVD

        counts = _counted([_readable(text) for text in texts])
        known = np.bincount(counts.indices, minlength=NUM_BUCKETS)
        learnt["idf"] = (np.log((1 + len(texts)) / (1 + known)) + 1).astype(np.float32)
        weighed = _weighed(counts, learnt["idf"])
        width = min(WIDTH, len(texts) - 1)
        factors = TruncatedSVD(width, random_state=seed).fit(weighed)
        learnt["directions"] = factors.components_.T.astype(np.float16)
    raw = _raw(texts, learnt, embedding)
    spread = raw.std(axis=0)
    learnt["center"] = raw.mean(axis=0)
    learnt["spread"] = np.where(spread > 1e-9, spread, 1.0)
    return learnt


def vectors(texts: Sequence[str], learnt: Mapping[str, NDArray[Any]], embedding: str = "") -> Any:
    """[len(texts), width], float64."""
    return (_raw(texts, learnt, embedding) - learnt["center"]) / learnt["spread"]


def _raw(texts: Sequence[str], learnt: Mapping[str, NDArray[Any]], embedding: str) -> Any:
    texts = [_readable(text) for text in texts]
    form = np.array([_form(text) for text in texts])
    if embedding:
        by_text = read_by_model(texts, embedding, AddingUp())  # kept, where they were read before
        about = np.array([by_text[text] for text in texts])
    else:
        about = _weighed(_counted(texts), learnt["idf"]) @ learnt["directions"]
    return np.hstack([about, form])


def _readable(text: str) -> str:
    """Its beginning; halves of surrogate pairs, which no encoding has, are question marks."""
    return text[:READ].encode("utf-8", "replace").decode("utf-8")


def _counted(texts: Sequence[str]) -> Any:
    counts = hashed_ngrams(texts, NUM_BUCKETS)
    counts.sum_duplicates()
    return counts


def _weighed(counts: Any, idf: Any) -> Any:
    """A question at a time comes through here: no product of sparse matrices, of which each takes
    longer to set up than this takes."""
    from scipy.sparse import csr_array

    weights = (1 + np.log(counts.data)) * idf[counts.indices]
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    length = np.sqrt(np.bincount(rows, weights**2, minlength=counts.shape[0]))
    return csr_array((weights / length[rows], counts.indices, counts.indptr), shape=counts.shape)


def _form(text: str) -> list[float]:
    words = _WORD.findall(text)
    count = max(len(text), 1)
    return [
        float(np.log1p(len(text))),
        float(np.log1p(len(words))),
        sum(map(len, words)) / max(len(words), 1),
        len(set(words)) / max(len(words), 1),
        *(len(kind.findall(text)) / count for kind in _KINDS),
        *(float(np.log1p(text.count(mark))) for mark in _MARKS),
        float(text.rstrip().endswith("?")),
        float(text.rstrip().endswith(".")),
        float(text[:1].isupper()),
    ]


# -- what a sentence-transformers model makes of them ---------------------------------------------


KEPT = 50_000
"""Questions whose vectors are kept: they are read once, and decided on twice or more."""
_kept: dict[tuple[str, str], NDArray[np.float32]] = {}
_one_at_a_time = Lock()


def most_to_read(texts: Sequence[str], embedding: str) -> Cost:
    """What ``read_by_model`` can take: each as long as the longest of them."""
    unread = [text for text in _distinct(texts) if (embedding, text) not in _kept]
    if not unread:
        return Cost()
    model = _sentence_model(embedding)
    return Cost(flops=model.encoder.flops(len(unread), model.longest(unread)))


def read_by_model(texts: Sequence[str], embedding: str, meter: Meter) -> Arrays:
    """Text -> its vector, by the model in the folder ``embedding``, which reads those that are not
    kept."""
    with _one_at_a_time:
        wanted = _distinct(texts)
        found = {t: _kept[embedding, t] for t in wanted if (embedding, t) in _kept}
        unread = [text for text in wanted if text not in found]
        if unread:
            made = _sentence_model(embedding).vectors(unread, meter)
            found |= dict(zip(unread, made, strict=True))
            _kept.update({(embedding, text): found[text] for text in unread})
            for oldest in list(_kept)[: max(len(_kept) - KEPT, 0)]:
                del _kept[oldest]
    return found


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(_readable(text) for text in texts))


@lru_cache(maxsize=1)
def _sentence_model(folder: str) -> Any:
    """Raises ValueError where the folder holds none."""
    from thrifty.signals.sentence_vectors import SentenceModel, is_sentence_model

    if not is_sentence_model(Path(folder)):
        raise ValueError(
            f"{folder} is no folder of a sentence-transformers model\n"
            "hint: one with modules.json in it, or no embedding"
        )
    return SentenceModel(Path(folder), "float32")
