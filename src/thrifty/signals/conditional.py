"""An answer's loss with its prompt and without it: what the prompt explains.

    IFD(x, y) = exp( L(y | x) - L(y) ),    L = mean nats a token of y           (arXiv:2308.12032)

L(y) is of the answer alone behind the model's first token, so that the same tokens are predicted in
both passes. Of several turns the answers stand one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work
from thrifty.data.tokens import Tokens
from thrifty.signals.forward import example_losses, scoring_cost

if TYPE_CHECKING:
    from thrifty.core import contracts


def answers_alone(examples: Sequence[contracts.Tokens], start: int | None) -> list[Tokens]:
    """Each example's loss tokens behind ``start``; without a start the first is not predicted."""
    alone = []
    for example in examples:
        keep = np.array(example.loss_mask)
        keep[:1] = False  # the first token of an example is predicted in neither pass
        first = [] if start is None else [start]
        ids = np.asarray([*first, *np.asarray(example.input_ids)[keep]], dtype=np.int32)
        mask = np.ones(len(ids), dtype=bool)
        mask[: len(first)] = False
        alone.append(Tokens(ids, mask) if len(ids) else Tokens(np.zeros(1, np.int32), mask[:1]))
    return alone


def instruction_following_difficulty(
    models: Models, rows: Rows, meter: Meter
) -> NDArray[np.float64]:
    """[n]; NaN where an answer has no token that both passes predict."""
    examples, model, shape = models.tokens(rows), models.base(), models.shape
    alone = answers_alone(examples, _start(model))
    with_prompt = example_losses(model, shape, examples, meter).mean
    without = example_losses(model, shape, alone, meter).mean
    return np.exp(with_prompt - without)


def _start(model: Any) -> int | None:
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(model.config, name, None)
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            return int(token)
    return None


def difficulty_cost(work: Work, stats: PoolStats, model: str) -> Cost:
    """Of both passes over rows like ``stats``."""
    answers = min(1.0, (stats.num_loss_tokens + stats.num_examples) / max(stats.num_tokens, 1))
    alone = replace(
        stats,
        num_tokens=round(stats.num_tokens * answers),
        num_squared_tokens=round(stats.num_squared_tokens * answers**2),
        max_tokens=stats.max_tokens,
    )
    return scoring_cost(work, stats, model) + scoring_cost(work, alone, model)


@dataclass(frozen=True, kw_only=True)
class DifficultyScorer(Scorer):
    """A scorer by instruction-following difficulty."""

    model: str = ""
    """Folder or hub name of the model to score with; empty: the one to be trained."""

    needs_target: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("sft",)
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "forward"

    def cost(self, work: Work) -> Cost:
        return difficulty_cost(work, work.pool, self.model)

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Models:
        return models.other(self.model)

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        found = instruction_following_difficulty(state, shard, meter)
        # From 1 on the prompt does not help: such a pair is no answer to it, and comes last.
        return np.where(found < 1, found, -found).astype(np.float32)[:, None]
