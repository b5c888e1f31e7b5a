"""A model that reads whole texts in its own way, and is no language model: what a classifier and a
sentence-transformers model share (``contracts.Models``, as far as it goes)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from thrifty.signals.encoder_shape import EncoderShape

if TYPE_CHECKING:
    from thrifty.core.contracts import Models, Rows, Tokens
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True)
class TextModel(ABC):
    """Loaded once, when it is first asked for."""

    folder: Path
    dtype: str
    device: str = "cpu"
    say: Callable[[str], None] | None = None
    """Takes a line when the model is loaded."""

    kind: ClassVar[str]
    """What it is, in words."""
    scorer: ClassVar[str]
    """The scorer that can look at it."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what was loaded: another process loads for itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"say": None}

    @abstractmethod
    def _load(self) -> Any: ...

    @cached_property
    def _base(self) -> Any:
        if self.say is not None:
            self.say(f"  loading {self.kind} ...")
        return self._load()

    def base(self) -> Any:
        return self._base

    @cached_property
    def encoder(self) -> EncoderShape:
        return EncoderShape.of(self.folder)

    @property
    def shape(self) -> ModelShape:
        self._refuse()

    def other(self, path: str) -> Models:
        self._refuse()

    @property
    def splits_anew(self) -> bool:
        self._refuse()

    def tokens(self, rows: Rows) -> Sequence[Tokens]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{self.folder} is {self.kind}, not a language model\n"
            f"hint: only the scorer {self.scorer} can look at it"
        )
