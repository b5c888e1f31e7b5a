"""Who says how good a text is: a function of the user's own, or a reward model that is paid for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thrifty.backends.backend import Backend
from thrifty.core.contracts import DecodingPolicy
from thrifty.core.named_function import named_function
from thrifty.core.resolve import name_of

if TYPE_CHECKING:
    from thrifty.signals.reward_model import RewardModel

Function = Callable[[str, str], float]
"""Of a prompt and a text; higher is better."""


def reward_named(text: str) -> Function | RewardModel:
    """A reward model's folder, or ``module:function``. Raises ValueError where it is neither."""
    if Path(text).expanduser().is_dir():
        from thrifty.display import say
        from thrifty.signals.reward_model import RewardModel

        return RewardModel(text, say=say)
    hint = "--reward package.module:function, or the folder of a reward model"
    return named_function("--reward", text, hint)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the texts of a policy are scored."""

    backends: tuple[Backend, ...]
    """Whom to ask, of whose answers a reward model says how good they are."""
    function: Function | None = None
    """That is called of each text, else."""
    digest: str | None = None
    """Of the reward model's weights; None: there is none."""
    unused: str = ""
    """Why the reward model is not asked; empty: it is, or there is none."""


def scoring(
    backends: Sequence[Backend], reward: Function | RewardModel | None, policy: DecodingPolicy
) -> Scoring:
    """A reward model is paid for: it is asked where the policy goes by what it says."""
    given = tuple(backends)
    if reward is None or callable(reward):
        return Scoring(backends=given, function=reward)
    if policy.needs != "rewards":
        unused = f"{name_of(policy)} does not go by rewards, so no text is scored"
        return Scoring(backends=given, unused=unused)
    from thrifty.backends.scored import Scored

    judged = tuple(Scored(backend, reward) for backend in given)
    return Scoring(backends=judged, digest=reward.digest)
