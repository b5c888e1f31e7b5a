"""A reward model: a ``transformers`` classifier with one label, as a judge of answers.

    reward = z    the logit of [user: prompt, assistant: answer], as its chat template writes them;
                  of prompt + answer where it has none

    FLOPs of a batch [B, T] = layers(B, T) + 2 B T d        d its width: one product a position

in closed form where ``costs/`` knows the family, else off the sizes of its weights
(``encoder_shape.py``). No text is cut: the score stands at its end. So that the most that an answer
takes is known before there is one, it may have twice the tokens that it was generated with (another
vocabulary splits it otherwise), and no more than the model reads; a longer one has no reward.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from thrifty.costs.flops import score_flops
from thrifty.costs.shape import ModelShape, read_config, read_shape
from thrifty.data import chat
from thrifty.signals.classifier import Classifier, is_classifier, labels_of, max_length
from thrifty.signals.models import local_device, locate

TOKENS_A_TOKEN = 2
"""Of an answer, for each that it was generated with."""
_BESIDE = 16
"""Tokens that an answer may change about what stands around it."""
_NO_ANSWER = "."
"""In the place of an answer that is not there yet: templates may write no empty turn."""

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What was said of some answers."""

    rewards: tuple[float | None, ...]
    """Higher is better; None: that answer cannot be scored."""
    flops: float
    seconds: float


class RewardModel:
    """Of a folder. ``device``: "cpu" or "cuda", by default where there is one; ``dtype``: by
    default the checkpoint's on a GPU and float32 on a CPU. Weights are loaded when the first answer
    comes; one batch is computed at a time.

    Raises ValueError where the folder holds no classifier, or one with several labels.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "",
        dtype: str = "",
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, _ = locate(str(folder), weights=True)
        if not is_classifier(self.folder):
            raise ValueError(
                f"{folder} is no reward model\n"
                "hint: its config.json must name a ...ForSequenceClassification"
            )
        config = read_config(self.folder)
        if len(labels := labels_of(config)) != 1:
            raise ValueError(
                f"the classifier in {folder} has {len(labels)} labels, and a reward model has one\n"
                "hint: rewards are one number a text; for a label of a classifier write a function "
                "(module:function)"
            )
        self.device = device or local_device()
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        self.dtype = dtype or ("float32" if self.device == "cpu" else stored)
        self._classifier = Classifier(self.folder, self.dtype, self.device, say)
        self._tokenizer = self._classifier.tokenizer
        self._reads = max_length(self.folder, self._tokenizer)
        self._tokens_around = lru_cache(maxsize=1024)(self._count_around)
        self._not_scored: dict[str, int] = {}
        self._one_at_a_time = threading.Lock()

    def __repr__(self) -> str:
        return f"RewardModel({str(self.folder)!r})"

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be known of how it scored: answers that have no reward, and why."""
        return tuple(f"{number} not scored: {why}" for why, number in self._not_scored.items())

    def load(self) -> None:
        """Its weights. Raises ValueError where they cannot be loaded."""
        with self._one_at_a_time:
            self._classifier.base()

    def flops(self, batch: int, sequence: int) -> float:
        """Of a pass over ``[batch, sequence]``."""
        if self._shape is None:
            return self._classifier.encoder.flops(batch, sequence)
        head = 2.0 * batch * sequence * self._shape.hidden_size
        return score_flops(self._shape, batch, sequence, logits=False) + head

    def most_tokens(self, prompt: str | Messages, begun: str, max_tokens: int) -> int:
        """That a text with an answer of ``max_tokens`` can have: an answer that goes on from
        ``begun``; 0 where none can be scored."""
        given = prompt if isinstance(prompt, str) else [*map(dict, prompt)]
        around = self._tokens_around(json.dumps(given), begun)
        most = around + TOKENS_A_TOKEN * max_tokens + _BESIDE
        if around == 0 or (self._reads is not None and around > self._reads):
            return 0
        return most if self._reads is None else min(most, self._reads)

    def judge(self, prompt: str | Messages, answers: Sequence[str], most_tokens: int) -> Judged:
        """Of answers to one prompt, in batches of texts of ``most_tokens`` at the most."""
        with self._one_at_a_time:
            start, flops = time.monotonic(), 0.0
            rewards: list[float | None] = [None] * len(answers)
            texts = self._scorable(prompt, answers, most_tokens)

            def tick(batch: int, sequence: int) -> None:
                nonlocal flops
                flops += self.flops(batch, sequence)

            if texts:
                names = next(iter(texts.values())).keys()
                found = {name: [each[name] for each in texts.values()] for name in names}
                logits = self._classifier.logits(found, tick)
                for place, logit in zip(texts, logits[:, 0].tolist(), strict=True):
                    rewards[place] = logit
            return Judged(rewards=tuple(rewards), flops=flops, seconds=time.monotonic() - start)

    # -- its own ----------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """Of its weights."""
        from thrifty.signals.models import weights_sha256

        return weights_sha256(self.folder)

    @cached_property
    def _shape(self) -> ModelShape | None:
        """None: of a family that has no closed form."""
        try:
            return read_shape(self.folder)
        except ValueError:
            return None

    def _scorable(
        self, prompt: str | Messages, answers: Sequence[str], most_tokens: int
    ) -> dict[int, Mapping[str, Any]]:
        """Place of an answer -> its text, split; of those that can be scored."""
        found = {}
        for place, answer in enumerate(answers):
            try:
                split = self._split(prompt, answer)
                if len(split["input_ids"]) > most_tokens:
                    raise ValueError(
                        "longer than the reward model reads, or than twice the tokens that it can "
                        "have been generated with"
                    )
                found[place] = split
            except ValueError as error:
                self._not_scored[str(error)] = self._not_scored.get(str(error), 0) + 1
        return found

    def _count_around(self, prompt: str, begun: str) -> int:
        """Tokens of a text, but for its answer, to a prompt in JSON; 0 where it cannot be
        written."""
        try:
            return len(self._split(json.loads(prompt), begun or _NO_ANSWER)["input_ids"])
        except ValueError:
            return 0

    def _split(self, prompt: str | Messages, answer: str) -> Mapping[str, Any]:
        """As the tokenizer splits a text. Raises ValueError where it cannot be written."""
        try:
            text, special = self._text(prompt, answer)
            found: Mapping[str, Any] = self._tokenizer(
                text, add_special_tokens=special, verbose=False
            )
        except Exception as error:  # a template is a foreign program, and a text may be anything
            raise ValueError(str(error).partition("\n")[0]) from None
        if not found["input_ids"]:
            raise ValueError("nothing is said")
        return found

    def _text(self, prompt: str | Messages, answer: str) -> tuple[str, bool]:
        """And whether the tokenizer adds its special tokens: a template writes its own."""
        if self._tokenizer.chat_template is None:
            said = [prompt] if isinstance(prompt, str) else [each["content"] for each in prompt]
            return "\n\n".join(said) + answer, True
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        turns = [*map(dict, prompt), {"role": "assistant", "content": answer}]
        text, _, special = chat.render(turns, len(turns), self._tokenizer)
        return text, special
