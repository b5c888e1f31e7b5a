"""Weights: where they are, what they hash to, and loading them once.

A model is a folder with a config.json, or a hub name whose revision is recorded. Only safetensors
are read and no remote code is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.costs.shape import read_shape
from thrifty.signals.classifier import Classifier, is_classifier
from thrifty.signals.model_folder import check_folder, check_index, check_no_adapter
from thrifty.signals.sentence_vectors import SentenceModel, is_sentence_model
from thrifty.signals.weight_files import stored_tensors

if TYPE_CHECKING:
    from thrifty.core.contracts import Models, Tokens
    from thrifty.costs.shape import ModelShape

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]


_READ_BY = {".json", ".txt", ".model", ".jinja"}
"""Suffixes of the files beside a model's weights that decide what it makes of a text."""


def locate(path: str, revision: str | None = None, *, weights: bool) -> tuple[Path, str | None]:
    """The folder of a model and, for a hub name, the commit it is at.

    ``weights=False`` fetches configuration and tokenizer only. Raises ValueError, each case with
    its own message: no such folder, no such repository, gated, offline and not cached.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file() or is_sentence_model(folder):
        check_folder(folder)
        return folder, None
    if folder.exists():
        raise ValueError(
            f"{path} has no config.json\n"
            "hint: --model takes a transformers model folder or a hub name"
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise ValueError(f"there is no model folder {path}\nhint: check the path")
    return _download(path, revision, weights=weights)


def _download(name: str, revision: str | None, *, weights: bool) -> tuple[Path, str | None]:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise ValueError(
            f"{name} is gated\nhint: accept its terms on its hub page, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision}\nhint: check the name") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"there is no model {name} on the hub, or it is private\n"
            "hint: check the name; for a folder write ./NAME; for a private one `hf auth login`"
        ) from None
    except HFValidationError:
        raise ValueError(
            f"{name!r} is neither a folder nor a hub name\nhint: --model FOLDER or ORG/NAME"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub did not answer"
        raise ValueError(
            f"{name} is not in the local cache and {offline} ({type(error).__name__})\n"
            "hint: download it where there is a network (`hf download`), or give a folder"
        ) from None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} has no config.json\nhint: is it a transformers model?")
    check_folder(folder)
    return folder, folder.name


def weights_sha256(folder: Path) -> str:
    """Of the names and bytes of all weight files. Raises ValueError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if is_sentence_model(folder):
        files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no safetensors weights\n"
            "hint: pickled weights (.bin, .pt) are not loaded; convert them to safetensors"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def read_by_sha256(folder: Path) -> str:
    """Of the small files that say how a model is read: configuration, tokenizer, template."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in _READ_BY and p.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def model_sha256(path: str) -> str:
    """Of a model's weights and what it is read by, in a folder or under a name on the hub. Raises
    ValueError where the weights are not here."""
    folder = locate(path, weights=False)[0]
    return weights_sha256(folder) + read_by_sha256(folder)


@dataclass(frozen=True)
class LoadedModels:
    """The weights that scorers look at (``contracts.Models``)."""

    folder: Path
    dtype: str
    device: str = "cpu"
    say: Callable[[str], None] | None = None
    """Takes a line when a model is loaded, which may take minutes."""
    max_length: int = 1024
    """Tokens of the longest row, where another model's tokenizer has to split the rows anew."""
    tokenizer: Any = None
    """Of a model whose tokenizer is not the pool's."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what was loaded: another process loads for itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"say": None}

    @cached_property
    def shape(self) -> ModelShape:
        return read_shape(self.folder)

    @cached_property
    def _base(self) -> Any:
        if self.say is not None:
            self.say("  loading the base model ...")
        return load_model(self.folder, self.dtype, self.device).eval()

    def base(self) -> Any:
        return self._base

    def release(self) -> None:
        """Let go of the weights, which are loaded again if they are asked for again."""
        for name in ("_base", "_others"):
            self.__dict__.pop(name, None)

    @cached_property
    def _others(self) -> dict[str, Models]:
        return {"": self}

    def other(self, path: str) -> Models:
        """Also a classifier or a sentence-transformers model, which the scorers that can look at
        one tell by its class."""
        if path not in self._others:
            folder, _ = locate(path, weights=True)
            if is_sentence_model(folder):
                found: Models = SentenceModel(folder, self.dtype, self.device, self.say)
            elif is_classifier(folder):
                found = Classifier(folder, self.dtype, self.device, self.say)
            else:
                found = self._language_model(folder)
            self._others[path] = found
        return self._others[path]

    def _language_model(self, folder: Path) -> LoadedModels:
        from thrifty.data.tokens import load_tokenizer, tokenizer_fingerprint

        tokenizer = load_tokenizer(str(folder))
        pools = tokenizer_fingerprint(load_tokenizer(str(self.folder)))
        same = tokenizer_fingerprint(tokenizer) == pools
        return replace(self, folder=folder, tokenizer=None if same else tokenizer)

    @property
    def splits_anew(self) -> bool:
        return self.tokenizer is not None

    def tokens(self, rows: Any) -> Sequence[Tokens]:
        """No more of a row than this model's context holds."""
        from thrifty.data import tokens

        most = self.shape.max_position_embeddings
        if self.tokenizer is None:
            if len(rows) == 0 or rows.num_tokens.max() <= most:
                return rows.tokens
            return [
                tokens.Tokens(np.asarray(t.input_ids)[:most], np.asarray(t.loss_mask)[:most])
                for t in rows.tokens
            ]
        nothing = tokens.Tokens(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=bool))
        split = tokens.tokenize_rows(rows.rows, self.tokenizer, min(self.max_length, most))
        return [found if isinstance(found, tokens.Tokens) else nothing for found in split]


@dataclass(frozen=True)
class ModelInTraining:
    """A model as it is by now (``contracts.Models``)."""

    model: Any
    shape: ModelShape
    splits_anew: bool = False

    def base(self) -> Any:
        return self.model

    def other(self, path: str) -> Models:
        if not path:
            return self
        raise ValueError(f"{path} is not looked at while training\nhint: do it in ``prepare``")

    def tokens(self, rows: Any) -> Sequence[Tokens]:
        return rows.tokens  # type: ignore[no-any-return]


def load_model(
    folder: Path, dtype: str, device: str, quantization: Any = None, shards: int = 1
) -> Any:
    """A ``transformers`` causal LM from safetensors, on ``device``; ``quantization``: the library's
    configuration of how its linears are stored in few bits as they are read; ``shards``: ranks that
    call this together and have a part of each weight."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from thrifty.signals.sharded import cut_over, save_tied_once

    check_index(folder)
    check_no_adapter(folder)
    stored_tensors(folder)  # says what is damaged
    # Families that transformers gives no SDPA: capped scores (gemma2), attention sinks (gpt-oss).
    attention = "eager" if read_shape(folder).attention == "eager" else "sdpa"
    if not list(folder.glob("*.safetensors")):
        weights_sha256(folder)  # says what is missing
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            quantization_config=quantization,
            device_map=None if quantization is None else {"": device},
            distributed_config=cut_over(folder, shards) if shards > 1 else None,
        )
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights in {folder} cannot be loaded: {error}\n"
            "hint: are the files complete, and of the architecture that config.json names?"
        ) from None
    if shards > 1:
        save_tied_once(model)
    return model.to(device) if quantization is None and shards == 1 else model


def layers_of(model: Any) -> Any:
    """The decoder's layers: the outermost list of modules. Raises ValueError without one."""
    import torch

    found = next((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no list of layers\n"
            "hint: what looks into layers needs a decoder with a list of them"
        )
    return found


def num_threads() -> int:
    """That torch computes with in this process."""
    import torch

    return int(torch.get_num_threads())


def local_device() -> str:
    """Where this process computes: "cuda" if there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
