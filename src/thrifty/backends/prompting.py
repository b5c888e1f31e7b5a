"""From what is asked to the tokens that a model in this process reads, and from its tokens to text.

Messages are written as the tokenizer's chat template has it, or where it has none as training wrote
them (``data/chat.py``). A text is one message of the user's where there is a template; where there
is none it is read as it stands. What an answer begins with follows, and is continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from thrifty.data import chat
from thrifty.data.faults import Fault

if TYPE_CHECKING:
    from thrifty.backends.backend import Asking, Message

_BEFORE = 8
"""Tokens of the prompt that an answer is decoded with: some tokenizers drop the space that a text
begins with."""
_BEYOND = 8
"""Tokens beyond its own bytes in which a stop string is looked for."""


class Prompting:
    """``templated``: whether a text is a message; None: where there is a template."""

    def __init__(self, tokenizer: Any, templated: bool | None = None) -> None:
        self._tokenizer = tokenizer
        has_template = tokenizer.chat_template is not None
        self._templated = has_template if templated is None else templated
        self._ids_of = lru_cache(maxsize=1024)(self._tokenise)

    def ids(self, asking: Asking, most: int) -> tuple[int, ...]:
        """Raises ValueError where it cannot be read, or has more than ``most`` tokens."""
        text, special = self._text(asking)
        # No token is longer than the longest: what is surely too much is not even looked at.
        found = self._ids_of(text, special) if len(text) <= most * self._longest_token else None
        if found is None or len(found) > most:
            number = f"{len(found):,} tokens" if found else f"{len(text):,} characters"
            raise ValueError(
                f"the prompt has {number} and the context leaves room for {most:,} tokens\n"
                "hint: shorten it, or ask a model with a longer context"
            )
        if not found:
            raise ValueError("the prompt is empty\nhint: a model needs a token to go on from")
        return found

    def answer(self, prompt: Sequence[int], said: Sequence[int]) -> str:
        """What was said after a prompt, as it continues its text."""
        before = self._decode(prompt[-_BEFORE:])
        whole = self._decode([*prompt[-_BEFORE:], *said])
        return whole[len(before) :] if whole.startswith(before) else self._decode(said)

    def stopped(self, prompt: Sequence[int], said: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether a stop string is there. Looks at the end alone: it was not there a token ago."""
        tail = max(len(each.encode()) for each in stop) + _BEYOND
        short = len(said) <= tail
        text = self.answer(prompt, said) if short else self._decode(said[-tail:])
        return any(each in text for each in stop)

    def _text(self, asking: Asking) -> tuple[str, bool]:
        """And whether the tokenizer adds its special tokens: a template writes its own."""
        if isinstance(asking.prompt, str):
            if not self._templated:
                return asking.prompt + asking.prefix, True
            messages: Sequence[Message] = [{"role": "user", "content": asking.prompt}]
        else:
            messages = asking.prompt
        try:
            turns = [dict(message) for message in messages]
            if self._tokenizer.chat_template is not None:
                return chat.prompt(turns, self._tokenizer) + asking.prefix, False
            said = {"role": "assistant", "content": asking.prefix}
            text, spans, special = chat.render([*turns, said], len(turns), self._tokenizer)
        except Exception as error:  # a template is a foreign program: it may raise anything
            told = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"the messages cannot be written as a prompt: {told}\n"
                "hint: each is an object of role and content"
            ) from error
        return text[: spans[-1][0]] + f" {asking.prefix}" * bool(asking.prefix), special

    def _tokenise(self, text: str, special: bool) -> tuple[int, ...]:
        found = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        if special and len(found) > 1 and found[-1] == end and not text.endswith(self._end):
            found = found[:-1]  # some tokenizers end every text
        return tuple(found)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(  # type: ignore[no-any-return]
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @property
    def _end(self) -> str:
        return self._tokenizer.eos_token or "\0"

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._tokenizer.get_vocab()))
