"""How the tokens of an answer are made, and kept: settings of generation, in plain values.

    early_exit: 0.9                      {threshold: 0.9, first_layer: 2, every: 2}
    draft_model: FOLDER                  draft_tokens: 4
    kv_cache: {bits: 8}                  {bits: 4}, {window: 256, sinks: 4}

One of them at a time. By default a token takes one whole pass, and all keys and values are kept as
the model makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thrifty.core import typed
from thrifty.core.ranges import check_ranges

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A token is taken from the first layer that gives it at least this probability."""

    threshold: float = 1.0
    """1: from the last layer, always."""
    first_layer: int = 1
    """Layers after which it is asked first."""
    every: int = 1
    """Layers from one time that it is asked to the next."""

    def __post_init__(self) -> None:
        check_ranges(self, threshold=(0, 1), first_layer=(1, math.inf), every=(1, math.inf))

    def asked_after(self, num_layers: int) -> range:
        """The numbers of layers after which it is asked: never after the last, which is where one
        leaves anyway, nor at a threshold of 1."""
        return range(self.first_layer, num_layers if self.threshold < 1 else 0, self.every)


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """What is kept of the keys and values of past tokens."""

    bits: Literal[0, 4, 8] = 0
    """Of an element; 0: as the model makes them."""
    window: int = 0
    """The last tokens alone; 0: all."""
    sinks: int = 4
    """Beside a window, the first tokens (arXiv:2309.17453)."""

    def __post_init__(self) -> None:
        check_ranges(self, window=(0, math.inf), sinks=(0, math.inf))
        if bool(self.bits) == bool(self.window):
            raise ValueError(
                "kv_cache takes either bits or a window\nhint: {bits: 8}, or {window: 256}"
            )

    def kept(self, context: int) -> int:
        """Tokens of so many."""
        return min(context, self.window + self.sinks) if self.window else context


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """How the tokens of an answer are made: by default by one whole pass each."""

    early_exit: float | EarlyExit | None = None
    draft_model: str = ""
    """Folder of a smaller model with the same tokenizer."""
    draft_tokens: int = 4
    """That it guesses at a time."""
    kv_cache: KVCache | None = None

    def __post_init__(self) -> None:
        check_ranges(self, draft_tokens=(1, 64))
        if isinstance(self.early_exit, float | int):
            object.__setattr__(self, "early_exit", EarlyExit(threshold=self.early_exit))
        chosen = [name for name in ("early_exit", "draft_model", "kv_cache") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} cannot be combined\nhint: choose one of them")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> TokenSettings:
        """Raises ValueError, naming everything that is wrong."""
        problems: list[str] = []
        found = typed.read_fields(cls, values, "", problems)
        if problems:
            raise ValueError("\n".join(problems) + "\nhint: docs/local_decoding.md has them all")
        return found  # type: ignore[no-any-return]

    @property
    def exits(self) -> EarlyExit | None:
        return self.early_exit if isinstance(self.early_exit, EarlyExit) else None


NAMES = frozenset(TokenSettings.__dataclass_fields__)


def refusal(shape: ModelShape, settings: TokenSettings) -> str | None:
    """Why a model cannot make its tokens that way; None where it can."""
    windows, latent = shape.num_sliding_layers > 0, shape.latent is not None
    if settings.exits is not None:
        reasons = {
            "layers with a sliding window": windows,
            "keys and values made of latents": latent,
            "capped logits": shape.logit_softcap,
            "a projection between layers and head": shape.embedding_size != shape.hidden_size,
            "no norm before its head": not shape.final_norm,
            "biases in place of positions (ALiBi)": shape.mask == "alibi",
            "norms that follow the branches": shape.block == "post",
        }
        what = "an early exit"
        if settings.exits.first_layer > shape.num_layers:
            return f"an early exit after {settings.exits.first_layer} of {shape.num_layers} layers"
    elif settings.draft_model or settings.kv_cache is not None:
        # Positions in a cache with holes, or without its middle, are told to the model; these
        # count them from the cache's length.
        reasons = {
            "layers with a sliding window": windows,
            "keys and values made of latents": latent,
            "biases in place of positions (ALiBi)": shape.mask == "alibi",
        }
        what = "a draft model" if settings.draft_model else "a kv_cache of few bits or a window"
        if settings.kv_cache and settings.kv_cache.bits == 4 and shape.head_dim % 2:
            return "a kv_cache of 4 bits needs heads of an even size"
    else:
        return None
    found = [reason for reason, there in reasons.items() if there]
    return f"{what} is not built for models with {found[0]} ({shape.model_type})" if found else None
