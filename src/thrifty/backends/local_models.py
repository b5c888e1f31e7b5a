"""The weights behind a model folder, a draft model's beside them, and the ways of using both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.costs.hardware import load_device
from thrifty.costs.shape import read_shape
from thrifty.costs.speculation import Speculation
from thrifty.costs.token_settings import TokenSettings, refusal
from thrifty.data.tokens import load_tokenizer, tokenizer_fingerprint
from thrifty.signals.early_exit import EarlyExits
from thrifty.signals.generation_batch import Way, WholePasses
from thrifty.signals.model_folder import ADAPTER, base_of_adapter
from thrifty.signals.models import load_model, local_device, locate
from thrifty.signals.speculative import Speculative

if TYPE_CHECKING:
    from thrifty.costs.hardware import Device
    from thrifty.costs.shape import ModelShape


class LocalModels:
    """Of a folder, or one with an adapter, whose base is then loaded too and merged with it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        device: str,
        dtype: str,
        priced_on: str | None,
        say: Callable[[str], None] | None,
    ) -> None:
        self.folder = folder
        self.name = name or folder.resolve().name
        self._base = _base_folder(folder)
        self.shape = read_shape(self._base)
        self.device = device or local_device()
        self.dtype = dtype or ("float32" if self.device == "cpu" else self.shape.dtype)
        self.tokenizer = load_tokenizer(str(_with_tokenizer(folder, self._base)))
        self._priced_on, self._say = priced_on, say
        self._drafts: dict[str, ModelShape] = {}
        self._loaded: dict[str, Any] = {}
        self._ways: dict[TokenSettings, Way] = {}

    @cached_property
    def priced(self) -> Device:
        """What seconds are predicted on."""
        return load_device(self._priced_on)

    def check(self, settings: TokenSettings) -> None:
        """Raise ValueError where the model cannot make its tokens that way."""
        draft = self.draft(settings)
        for shape in (self.shape, draft):
            if shape is not None and (reason := refusal(shape, settings)) is not None:
                raise ValueError(f"{reason}\nhint: leave that setting out for this model")

    def draft(self, settings: TokenSettings) -> ModelShape | None:
        """The draft model's shape, if there is one. Raises ValueError where it cannot draft."""
        folder = settings.draft_model
        if folder and folder not in self._drafts:
            found, _ = locate(folder, weights=True)
            theirs = tokenizer_fingerprint(load_tokenizer(str(found)))
            if theirs != tokenizer_fingerprint(self.tokenizer):
                raise ValueError(
                    f"the draft model {folder} has another tokenizer than {self.name}\n"
                    "hint: drafts are token by token: take a smaller model of the same family"
                )
            self._drafts[folder] = read_shape(found)
        return self._drafts.get(folder)

    def weights(self, folder: str) -> Any:
        """Of a draft model, or with "" its own."""
        if folder not in self._loaded:
            if self._say is not None:
                self._say(f"  loading {folder or self.name} ...")
            where = locate(folder, weights=True)[0] if folder else self._base
            model = load_model(where, self.dtype, self.device)
            if not folder and _is_adapter(self.folder):
                from peft import PeftModel

                adapted = PeftModel.from_pretrained(model, str(self.folder), use_safetensors=True)
                model = adapted.merge_and_unload()
            self._loaded[folder] = model.eval()
        return self._loaded[folder]

    def way(self, settings: TokenSettings) -> Way:
        if settings not in self._ways:
            draft = self.draft(settings)
            if draft is not None:
                weights = self.weights(settings.draft_model)
                self._ways[settings] = Speculative(weights, draft, settings.draft_tokens)
            elif settings.exits is not None:
                self._ways[settings] = EarlyExits(settings.exits)
            else:
                self._ways[settings] = WholePasses(settings.kv_cache)
        return self._ways[settings]

    def end_ids(self) -> frozenset[int]:
        """That end an answer."""
        own = getattr(self.weights("").generation_config, "eos_token_id", None)
        found = own if isinstance(own, (list, tuple)) else [own]
        return frozenset(each for each in (*found, self.tokenizer.eos_token_id) if each is not None)

    def notes(self) -> list[str]:
        """What the settings brought until now, measured, and whether they pay, predicted."""
        found = []
        for settings, way in list(self._ways.items()):
            if isinstance(way, EarlyExits) and way.num_tokens:
                mean = way.num_layers / way.num_tokens
                found.append(
                    f"early exit at {way.early.threshold:g}: tokens left after {mean:.2f} of "
                    f"{self.shape.num_layers} layers on average"
                )
            draft = self.draft(settings)
            if isinstance(way, Speculative) and way.num_tried and draft is not None:
                predicted = Speculation.predicted(
                    self.shape,
                    draft,
                    acceptance=way.acceptance,
                    drafted=settings.draft_tokens,
                    rows=1,
                    context=256,
                    dtype=self.dtype,
                    device=self.priced,
                )
                found.append(
                    f"draft model {settings.draft_model}: {way.tokens_a_round:.2f} tokens a round "
                    f"measured; one row at a time, predicted: {predicted}"
                )
        return found

    def release(self) -> None:
        """Let go of the weights, which are loaded again where they are asked for again."""
        self._loaded.clear()
        self._ways.clear()


def _base_folder(folder: Path) -> Path:
    """Of an adapter the folder of the model that it is on; else the folder itself."""
    if not _is_adapter(folder):
        return locate(str(folder), weights=True)[0]
    return locate(base_of_adapter(folder), weights=True)[0]


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def _with_tokenizer(folder: Path, base: Path) -> Path:
    return folder if (folder / "tokenizer_config.json").is_file() else base
