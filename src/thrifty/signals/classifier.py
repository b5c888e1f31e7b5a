"""Any ``transformers`` text classifier as a judge of rows.

    score = z                                      one output: a rating or a reward
    score = z_k - log sum over j != k of exp z_j   the log-odds of class k
    score = z_k                                    where a text may have several labels

z are the logits of the whole text under the classifier's own tokenizer. Only safetensors are read
and no remote code is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Work
from thrifty.costs.shape import read_config
from thrifty.data.packing import padded_batches
from thrifty.signals.encoder_shape import BATCH_TOKENS, EncoderShape
from thrifty.signals.text_model import TextModel

_OFFSET_POSITIONS = ("camembert", "roberta", "xlm-roberta")
"""Families whose positions begin behind the padding token's id."""


def is_classifier(folder: Path) -> bool:
    """Whether the config in ``folder`` names one."""
    if not (folder / "config.json").is_file():
        return False
    names = read_config(folder).get("architectures") or [""]
    return str(names[0]).endswith("ForSequenceClassification")


@dataclass(frozen=True)
class Classifier(TextModel):
    """One whose folder ``save_pretrained`` wrote."""

    kind: ClassVar[str] = "a classifier"
    scorer: ClassVar[str] = "quality"

    def _load(self) -> Any:
        import torch
        from transformers import AutoModelForSequenceClassification

        from thrifty.signals.model_folder import check_index, check_no_adapter
        from thrifty.signals.models import weights_sha256

        check_index(self.folder)
        check_no_adapter(self.folder)
        if not list(self.folder.glob("*.safetensors")):
            weights_sha256(self.folder)  # says what is missing
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.folder,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the classifier in {self.folder} cannot be loaded: {error}\n"
                "hint: are the files complete, and of the architecture that config.json names?"
            ) from None
        if missing := sorted(found["missing_keys"]):  # it would be drawn at random
            raise ValueError(
                f"the classifier in {self.folder} has no weights for {', '.join(missing[:5])}\n"
                "hint: it was not trained as one, or its files are not complete"
            )
        return model.to(self.device).eval()

    @cached_property
    def tokenizer(self) -> Any:
        from thrifty.data.tokens import load_tokenizer  # with pyarrow, which no plan waits for

        return load_tokenizer(str(self.folder))

    def place_of(self, label: str) -> int:
        """Of the logit that ``label`` names, by its name or number; of the only one, or the second
        of two, for "". Raises ValueError for a label that there is not."""
        labels = labels_of(read_config(self.folder))
        if not label and len(labels) <= 2:
            return len(labels) - 1
        if label in labels:
            return labels.index(label)
        if label.isdecimal() and int(label) < len(labels):
            return int(label)
        wrong = f"has no label {label!r}" if label else f"has {len(labels)} labels, none is named"
        raise ValueError(
            f"the classifier in {self.folder} {wrong}\n"
            f"hint: quality: {{model: ..., label: NAME}}, one of {', '.join(labels[:20])}"
        )

    def scores(self, texts: Sequence[str], place: int, meter: Meter) -> NDArray[np.float64]:
        """[n], higher = more of the label at ``place``. Ticks ``meter`` with the FLOPs of every
        batch as padded."""
        if not texts:
            return np.zeros(0)
        tokenizer = self.tokenizer
        found = tokenizer(
            list(texts), truncation=True, max_length=max_length(self.folder, tokenizer)
        )

        def tick(batch: int, sequence: int) -> None:
            meter.tick(Cost(flops=self.encoder.flops(batch, sequence)))

        several = self.base().config.problem_type == "multi_label_classification"
        return _score(self.logits(found, tick), place, several)

    def logits(
        self, found: Mapping[str, Sequence[Any]], on_batch: Callable[[int, int], None]
    ) -> NDArray[np.float64]:
        """[n, labels], of texts as ``tokenizer`` splits them, each key a list of them. ``on_batch``
        hears of the rows and tokens of every batch, padding included, before it is computed."""
        import torch

        model, tokenizer = self.base(), self.tokenizer
        lengths = [max(len(ids), 1) for ids in found["input_ids"]]
        # Decoders find a row's last token by its padding; without a padding token that both agree
        # on, one at a time.
        padding = tokenizer.pad_token_id
        padded = padding is not None and padding == model.config.pad_token_id
        most = max(BATCH_TOKENS, *lengths)
        batches = padded_batches(lengths, most) if padded else [[i] for i in range(len(lengths))]
        logits = np.empty((len(lengths), model.config.num_labels))
        for batch in batches:
            rows = {name: [values[i] for i in batch] for name, values in found.items()}
            if padded:
                inputs = tokenizer.pad(rows, return_tensors="pt").to(self.device)
            else:
                inputs = {k: torch.tensor(v, device=self.device) for k, v in rows.items()}
            on_batch(*inputs["input_ids"].shape)
            with torch.inference_mode():
                logits[batch] = model(**inputs).logits.double().cpu().numpy()
        return logits


def _score(logits: NDArray[np.float64], place: int, several: bool) -> NDArray[np.float64]:
    """[n] of ``logits`` [n, labels]."""
    own = logits[:, place]
    if several or logits.shape[1] == 1:
        return own
    return own - np.logaddexp.reduce(np.delete(logits, place, axis=1), axis=1)


def labels_of(config: Mapping[str, Any]) -> list[str]:
    """Names in the order of the logits; two without names where the config is silent, as in
    ``transformers``."""
    names = config.get("id2label")
    if isinstance(names, Mapping) and names:
        return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    return [f"LABEL_{number}" for number in range(int(config.get("num_labels", 2)))]


def max_length(folder: Path, tokenizer: Any = None) -> int | None:
    """Tokens that it reads of a text."""
    config = read_config(folder)
    most = config.get("max_position_embeddings") or config.get("n_positions")
    if most and config.get("model_type") in _OFFSET_POSITIONS:
        most -= int(config.get("pad_token_id") or 1) + 1
    told = getattr(tokenizer, "model_max_length", None)
    limits = [int(limit) for limit in (most, told) if limit and 0 < limit < 1e9]
    return min(limits, default=None)


def classifier_cost(work: Work, stats: PoolStats, model: str) -> Cost:
    """Predicted, of rows like ``stats``. Raises ValueError where ``model`` is no classifier."""
    from thrifty.signals.models import locate

    folder = locate(model, weights=True)[0]  # their headers say its sizes
    if not is_classifier(folder):
        raise no_classifier(model)
    stats = stats.in_tokens(work.token_ratio(model))
    return EncoderShape.of(folder).cost(work, stats, max_length(folder))


def no_classifier(model: str) -> ValueError:
    return ValueError(
        f"{model} is no classifier\n"
        "hint: quality: {model: ...} takes a model whose config.json names a "
        "...ForSequenceClassification"
    )
