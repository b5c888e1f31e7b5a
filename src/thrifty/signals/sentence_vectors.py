"""Rows as vectors of a sentence-transformers model, whatever its modules (arXiv:1908.10084).

Its folder has a modules.json. What is not of the package itself would be code of the folder's and
is refused, as are pickled weights. FLOPs are those of its encoder (``encoder_shape.py``); pooling
and dense layers behind it are a row's, and not counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Work
from thrifty.signals.encoder_shape import EncoderShape
from thrifty.signals.text_model import TextModel

MODULES = "modules.json"
_OWN = "sentence_transformers."
_BATCH_ROWS = 32


def is_sentence_model(folder: Path) -> bool:
    return (folder / MODULES).is_file()


@dataclass(frozen=True)
class SentenceModel(TextModel):
    """One whose folder sentence-transformers wrote."""

    kind: ClassVar[str] = "a sentence-transformers model"
    scorer: ClassVar[str] = "embedding"

    def _load(self) -> Any:
        import torch

        _check_modules(self.folder)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ValueError(
                f"{self.folder} is a sentence-transformers model, and the package is not "
                "installed\nhint: pip install 'thrifty[embeddings]'"
            ) from None
        try:
            return SentenceTransformer(
                str(self.folder),
                device=self.device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": getattr(torch, self.dtype)},
            ).eval()
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the sentence-transformers model in {self.folder} cannot be loaded: {error}\n"
                "hint: are the files complete, and its weights safetensors?"
            ) from None

    @cached_property
    def encoder(self) -> EncoderShape:
        return encoder_of(self.folder)

    def longest(self, texts: Sequence[str]) -> int:
        """Tokens of the longest text, as far as the model reads."""
        ids = self.base().tokenize(list(texts)).get("input_ids")
        return 0 if ids is None or ids.dim() != 2 else int(ids.shape[1])

    def vectors(self, texts: Sequence[str], meter: Meter) -> NDArray[np.float32]:
        """[n, width], each of unit length. Ticks ``meter`` with the FLOPs of every batch as
        padded."""
        model = self.base()

        def count(module: Any, inputs: tuple[Any, ...]) -> None:
            ids = inputs[0].get("input_ids")
            if ids is not None and ids.dim() == 2:
                meter.tick(Cost(flops=self.encoder.flops(*ids.shape)))

        handle = model[0].register_forward_pre_hook(count)
        try:
            found = model.encode(
                list(texts),
                batch_size=_BATCH_ROWS,
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=True,
            )
        finally:
            handle.remove()
        return np.asarray(found, dtype=np.float32)


def _check_modules(folder: Path) -> list[dict[str, Any]]:
    """Its modules. Raises ValueError for what would run or unpickle something."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        types = [str(module["type"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder / MODULES} is damaged\nhint: fetch or save the model again"
        ) from None
    for name in types:
        if not name.startswith(_OWN):
            raise ValueError(
                f"{folder} has a module {name} of its own, which would be run\n"
                "hint: use a model of sentence-transformers' own modules"
            )
    for module in modules:
        place = folder / str(module.get("path", ""))
        if folder.resolve() not in (place.resolve(), *place.resolve().parents):
            raise ValueError(f"{folder / MODULES} points outside its folder\nhint: do not use it")
        if list(place.glob("*.bin")) and not list(place.glob("*.safetensors")):
            raise ValueError(
                f"{place} has no safetensors weights\n"
                "hint: pickled weights (.bin) are not loaded; save the model again"
            )
    return list(modules)


def encoder_of(folder: Path) -> EncoderShape:
    """Of its first module; nothing is multiplied where that only looks words up."""
    place = folder / str(_check_modules(folder)[0].get("path", ""))
    if (place / "config.json").is_file():
        return EncoderShape.of(place)
    return EncoderShape(per_token=0.0, per_row=0.0, num_layers=0, width=0, num_bytes=0.0)


def sentence_vectors_cost(work: Work, stats: PoolStats, model: str) -> Cost:
    """Predicted, of rows like ``stats``."""
    from thrifty.signals.models import locate

    folder = locate(model, weights=True)[0]  # their headers say its sizes
    stats = stats.in_tokens(work.token_ratio(model))
    return encoder_of(folder).cost(work, stats, _max_length(folder))


def _max_length(folder: Path) -> int | None:
    """Tokens that it reads of a text, where its folder says so."""
    place = folder / str(_check_modules(folder)[0].get("path", ""))
    for name in ("sentence_bert_config.json", "tokenizer_config.json", "config.json"):
        file = place / name
        if not file.is_file():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        for key in ("max_seq_length", "model_max_length", "max_position_embeddings"):
            if isinstance(values.get(key), (int, float)) and 0 < values[key] < 1e9:
                return int(values[key])
    return None
