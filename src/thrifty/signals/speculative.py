"""Speculative sampling: a draft model guesses, the model checks (arXiv:2211.17192, 2302.01318).

    d_i ~ q(. | ..., d_<i),  i = 1..k           drafted, a pass of the draft each
    p(. | ..., d_<i),  i = 1..k+1               all of them in one pass of the model
    d_i is kept while u_i < p(d_i) / q(d_i); in the place of the first that is not
    x ~ (p - q)+ / sum (p - q)+;  after all k:  x ~ p(. | ..., d_<=k)

The tokens are distributed as the model's own, temperature and top_p included; greedy ones are the
same tokens (a pass over several tokens may round the last bits of a logit otherwise than a pass
over one). Rows that keep different numbers of drafted tokens stay in one batch: what a row refused
is forgotten, and its columns of the caches move together.

A row's random numbers are its own, as many a round whatever the rows beside it draft. transformers'
assisted generation takes one row at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter
from thrifty.costs.decoding import pass_flops
from thrifty.signals.generation_batch import keep_going, said
from thrifty.signals.generation_rows import Rows
from thrifty.signals.next_token import log_probability, pick
from thrifty.signals.reader import Reader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from thrifty.costs.shape import ModelShape
    from thrifty.costs.token_settings import KVCache


class Speculative:
    """A way of making tokens (``generation_batch.Way``), with a draft model."""

    kept: KVCache | None = None

    def __init__(self, draft: Any, shape: ModelShape, tokens: int) -> None:
        self._draft, self._shape, self._most = draft, shape, tokens
        self.num_rounds = 0
        """Of rows, each for itself."""
        self.num_tokens = 0
        """That came of them."""
        self.num_kept = 0
        """Drafted tokens that were accepted."""
        self.num_tried = 0
        """Those, and the first one refused of each round."""

    def readers(self, model: Any, shape: ModelShape) -> list[Reader]:
        return [Reader(model, shape), Reader(self._draft, self._shape)]

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were looked at."""
        return self.num_kept / self.num_tried if self.num_tried else float("nan")

    @property
    def tokens_a_round(self) -> float:
        return self.num_tokens / self.num_rounds if self.num_rounds else float("nan")

    def grow(self, readers: list[Reader], rows: Rows, logits: Any, meter: Meter) -> None:
        model, draft = readers
        ids = said(rows, logits, model, draft)
        behind = None  # [rows, 1]: what the draft has not read before ``ids``; -1: nothing
        while ids is not None:
            ids, behind = self._round(model, draft, rows, ids, behind, meter)

    def _round(
        self, model: Reader, draft: Reader, rows: Rows, ids: Any, behind: Any, meter: Meter
    ) -> tuple[Any, Any]:
        """From the last token of each row [rows, 1] to the next such, of those that go on."""
        import torch

        # A row drafts no more than it may say, whatever the others do.
        own_most = np.minimum(self._most, rows.left - 1)
        drafted = int(own_most.max())
        uniform = rows.random(2 * self._most + 1)
        flops = _flops(model, draft, drafted, behind is not None)
        rows.flops[rows.going] += flops
        meter.tick(Cost(flops=len(rows.going) * flops))

        vocabulary = model.shape.vocab_size
        guessed, guess = _guesses(draft, rows, ids, behind, uniform[:, :drafted], vocabulary)
        logits = model.read(torch.cat([ids, guessed], dim=1), keep=drafted + 1)
        found = rows.shares(logits)  # [rows, drafted + 1, vocab]
        most = torch.from_numpy(own_most).to(logits.device)
        kept = _num_kept(found, guess, guessed, uniform[:, self._most :], most)
        last = pick(_beyond(found, guess, kept, most), uniform[:, -1])[:, None]
        tokens = torch.cat([guessed, last], dim=1).scatter(1, kept[:, None], last)
        going = self._say(rows, tokens, log_probability(logits, tokens), kept, most)
        if not going.any():
            return None, None
        model.forget(drafted - kept)
        draft.forget((drafted - 1 - kept).clamp(min=0))
        # Where all were kept, the draft has not read the last of them.
        unread = torch.where(kept == drafted, guessed[:, -1], -1)[:, None]
        keep_going(rows, going, model, draft)
        alive = torch.from_numpy(going).to(logits.device)
        unread = unread[alive]
        return last[alive], unread if bool((unread >= 0).any()) else None

    def _say(self, rows: Rows, tokens: Any, own: Any, kept: Any, most: Any) -> NDArray[np.bool_]:
        """The kept tokens and one more, or as many as it takes to end; which rows go on."""
        going = []
        for row, words, logs, number in zip(
            rows.going.tolist(), tokens.tolist(), own.tolist(), kept.tolist(), strict=True
        ):
            goes = True
            for token, log in zip(words[: number + 1], logs[: number + 1], strict=True):
                goes = rows.say(row, token, log)
                self.num_tokens += 1
                if not goes:
                    break
            going.append(goes)
        self.num_rounds += len(going)
        self.num_kept += int(kept.sum())
        self.num_tried += int((kept + (kept < most)).sum())
        return np.array(going)


def _flops(model: Reader, draft: Reader, drafted: int, catches_up: bool) -> float:
    """Of a row's round."""
    found = pass_flops(model.shape, drafted + 1, model.width, drafted + 1)
    cached, new = draft.width, 1 + catches_up
    for _ in range(drafted):
        found += pass_flops(draft.shape, new, cached, 1)
        cached, new = cached + new, 1
    return found


def _guesses(
    draft: Reader, rows: Rows, ids: Any, behind: Any, uniform: Any, vocabulary: int
) -> tuple[Any, Any]:
    """Tokens [rows, drafted], and the shares [rows, drafted, vocab] that they were drawn of."""
    import torch

    new, own = ids, torch.ones_like(ids)
    if behind is not None:
        new = torch.cat([behind.clamp(min=0), ids], dim=1)
        own = torch.cat([(behind >= 0).long(), own], dim=1)
    tokens, found = [ids[:, :0]], [uniform.new_zeros(len(ids), 0, vocabulary)]
    for i in range(uniform.shape[1]):
        logits = draft.read(new, own)[..., :vocabulary]
        missing = vocabulary - logits.shape[-1]  # either may have rows that no token uses
        logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        found.append(rows.shares(logits))
        new = pick(found[-1][:, 0], uniform[:, i])[:, None]
        own = torch.ones_like(new)
        tokens.append(new)
    return torch.cat(tokens, dim=1), torch.cat(found, dim=1)


def _num_kept(found: Any, guess: Any, guessed: Any, uniform: Any, most: Any) -> Any:
    """How many of its drafted tokens each row keeps, [rows], of those that it may."""
    import torch

    drafted = guessed.shape[1]
    p, q = (each[:, :drafted].gather(2, guessed[..., None])[..., 0] for each in (found, guess))
    kept = uniform[:, :drafted] * q < p
    kept &= torch.arange(drafted, device=most.device) < most[:, None]
    return kept.long().cumprod(1).sum(1)


def _beyond(found: Any, guess: Any, kept: Any, most: Any) -> Any:
    """[rows, vocab] of the token after the kept ones: the model's shares, of a refused one without
    what the draft could have said."""
    import torch

    rows = torch.arange(len(kept), device=kept.device)
    p = found[rows, kept]
    none = torch.zeros_like(p[:, None])
    q = torch.cat([guess, none], dim=1)[rows, kept]
    rest = (p - q.masked_fill((kept == most)[:, None], 0.0)).clamp(min=0)
    return torch.where(rest.sum(1, keepdim=True) > 0, rest, p)
