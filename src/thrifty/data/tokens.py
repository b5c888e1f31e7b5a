"""Rows -> token ids and the mask of the tokens that carry loss: answers only.

| kind | loss falls on |
| --- | --- |
| text | all of the text and the end-of-sequence token |
| prompt_completion | the completion and the end-of-sequence token |
| messages (also as prompt and completion) | content and end of each assistant turn (``chat.py``) |
| preference | both answers; ids are prompt + chosen, then from ``border`` on prompt + rejected |

Strings are not put through a chat template, as in TRL. The tokenizer adds what it adds
(beginning-of-sequence, say); the end-of-sequence id is appended where it is not there already.

Prompt and completion are tokenised as one string, as the model will see them at inference, and a
token that straddles the border belongs to the answer. A slow tokenizer has no offsets: there the
two are tokenised apart.

Too long a row keeps its beginning; of a very long text only as much is tokenised as can be kept.
Where nothing of the answer is left the row is set aside (``prompt_too_long``). The very first token
of a row has nothing before it to be predicted from, so it never counts as a loss token, whatever
its mask says.

Special tokens written out in the text (``</s>``) become those tokens, as everywhere in
transformers. No code of a tokenizer's repository is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.data import chat
from thrifty.data.faults import Fault
from thrifty.data.pool import BadRow, Row

MAX_CHARACTERS_PER_TOKEN = 32
"""Characters tokenised per token of ``max_length``; a text that needs more is tokenised whole."""
MARGIN = 64
"""Tokens beyond ``max_length`` that a shortened text must give."""

Encoded = tuple[list[int], NDArray[np.bool_]]  # ids, loss mask


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One tokenised row."""

    input_ids: NDArray[np.int32]  # [num_tokens]
    loss_mask: NDArray[np.bool_]  # [num_tokens], true where loss falls
    truncated: bool = False
    border: int = 0
    """Of a pair, where its second sequence begins; 0: it is no pair."""

    @property
    def sides(self) -> tuple[Tokens, ...]:
        """The sequences that a model reads: of a pair the chosen one, then the rejected one."""
        if not self.border:
            return (self,)
        parts = (slice(None, self.border), slice(self.border, None))
        return tuple(Tokens(self.input_ids[part], self.loss_mask[part]) for part in parts)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are predicted: those of the mask, without the first of a sequence."""
        return sum(int(np.count_nonzero(side.loss_mask[1:])) for side in self.sides)


@dataclass(frozen=True, slots=True)
class _Text:
    """What is to be tokenised, and where in it the answers are."""

    text: str
    spans: list[chat.Span]
    special_tokens: bool  # added by the tokenizer?
    append_eos: bool

    def begin(self, num_characters: int) -> _Text:
        if len(self.text) <= num_characters:
            return self
        spans = [(min(a, num_characters), min(b, num_characters)) for a, b in self.spans]
        return replace(self, text=self.text[:num_characters], spans=spans)


def load_tokenizer(model_path: str) -> Any:
    """The tokenizer of a model: a local folder or a name on the hub."""
    from transformers import AutoTokenizer

    hint = "hint: give a folder with tokenizer.json, or one that save_pretrained() wrote"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, ImportError... for the same mistake,
        # with words on the hub, where nobody meant to look
        raise ValueError(
            f"there is no tokenizer in {model_path!r} that transformers can load "
            f"({type(error).__name__})\n{hint}"
        ) from error
    if not len(tokenizer) or not tokenizer("a b", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"the tokenizer in {model_path!r} has no vocabulary\n{hint}")
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides about ids: vocabulary, rules, special tokens, chat template."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("truncation", None)  # set anew by every call
        rules.pop("padding", None)
    else:
        rules = tokenizer.get_vocab()
    parts = [type(tokenizer).__name__ if not tokenizer.is_fast else "", rules]
    parts += [tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenize(row: Row, tokenizer: Any, max_length: int) -> Tokens | BadRow:
    """One row; see ``tokenize_rows``."""
    return tokenize_rows([row], tokenizer, max_length)[0]


def tokenize_rows(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Tokens | BadRow]:
    """Tokens, or the reason why there are none, for each row in its order.

    The result for a row does not depend on the rows beside it. A call tokenises all its rows at
    once: a few hundred are enough to be fast.
    """
    if max_length < 2:
        raise ValueError(
            f"max_length must be at least 2, not {max_length}\n"
            "hint: it counts the tokens of the longest example, for instance 1024"
        )
    texts: list[_Text] = []
    owners: list[int] = []
    faults: dict[int, Fault] = {}
    for i, pieces in enumerate(_texts(rows, tokenizer)):
        if isinstance(pieces, Fault):
            faults[i] = pieces
            continue
        texts += pieces
        owners += [i] * len(pieces)
    sides: list[list[Tokens]] = [[] for _ in rows]
    for owner, text, (ids, mask) in zip(
        owners, texts, _encode_beginnings(texts, tokenizer, max_length), strict=True
    ):
        sides[owner].append(_finish(ids, mask, text.append_eos, tokenizer, max_length))
    return [_checked(row, sides[i], faults.get(i), max_length) for i, row in enumerate(rows)]


def _checked(
    row: Row, sides: list[Tokens], fault: Fault | None, max_length: int
) -> Tokens | BadRow:
    if fault is None and any(side.num_loss_tokens == 0 for side in sides):
        if any(side.truncated for side in sides):
            detail = f"the prompt fills max_length {max_length}"
            fault = Fault("prompt_too_long", detail, row.prompt)
        else:
            fault = Fault("empty", "no token is left to predict", row.text)
    if fault is not None:
        return BadRow.of(row.id, row.file, row.number, fault)
    if len(sides) == 1:
        return sides[0]
    if np.array_equal(sides[0].input_ids, sides[1].input_ids):
        cut = f" as far as max_length {max_length} keeps them" * sides[0].truncated
        fault = Fault("same_answers", f"chosen and rejected are the same{cut}", row.text)
        return BadRow.of(row.id, row.file, row.number, fault)
    return Tokens(
        np.concatenate([side.input_ids for side in sides]),
        np.concatenate([side.loss_mask for side in sides]),
        any(side.truncated for side in sides),
        len(sides[0].input_ids),
    )


def _texts(rows: Sequence[Row], tokenizer: Any) -> Iterator[list[_Text] | Fault]:
    """Of each row one text; of a preference row, two."""
    parts = [_parts(row) for row in rows]
    talks = [part for of_row in parts for part in of_row if not isinstance(part, _Text)]
    rendered = iter(chat.render_all(talks, tokenizer) if talks else ())
    for of_row in parts:
        texts: list[_Text] = []
        faults: list[Fault] = []
        for part in of_row:
            found = part if isinstance(part, _Text) else next(rendered)
            if isinstance(found, Fault):
                faults.append(found)
            elif isinstance(found, _Text):
                texts.append(found)
            else:
                texts.append(_Text(*found, append_eos=False))
        yield faults[0] if faults else texts


def _parts(row: Row) -> list[_Text | tuple[list[dict[str, str]], int]]:
    """Texts, and conversations with their first answer's place, which a template renders."""
    content = row.content
    if row.kind == "text":
        return [_Text(content["text"], [(0, len(content["text"]))], True, True)]
    if row.kind == "messages":
        return [(content["messages"], 0)]
    prompt = content["prompt"]
    answers = ("chosen", "rejected") if row.kind == "preference" else ("completion",)
    parts: list[_Text | tuple[list[dict[str, str]], int]] = []
    for answer in (content[name] for name in answers):
        if isinstance(answer, str):
            text = prompt + answer
            parts.append(_Text(text, [(len(prompt), len(text))], True, True))
        else:
            parts.append(([*prompt, *answer], len(prompt)))
    return parts


def _encode_beginnings(texts: list[_Text], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Ids and mask of each text, as far as ``max_length`` can reach: a book costs a page."""
    limit = MAX_CHARACTERS_PER_TOKEN * max_length
    encoded = _encode([text.begin(limit) for text in texts], tokenizer)
    for i, text in enumerate(texts):
        # The margin keeps what the cut did to the last tokens out of the result.
        if len(text.text) > limit and len(encoded[i][0]) < max_length + MARGIN:
            encoded[i : i + 1] = _encode([text], tokenizer)
    return encoded


def _encode(texts: list[_Text], tokenizer: Any) -> list[Encoded]:
    if not tokenizer.is_fast:
        return [_encode_slowly(text, tokenizer) for text in texts]
    results: list[Encoded] = [([], np.zeros(0, dtype=np.bool_))] * len(texts)
    for special_tokens in (True, False):
        chosen = [i for i, text in enumerate(texts) if text.special_tokens == special_tokens]
        if not chosen:
            continue
        with _patterns_told(tokenizer):
            encoded = tokenizer(
                [texts[i].text for i in chosen],
                add_special_tokens=special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        for j, (i, ids) in enumerate(zip(chosen, encoded["input_ids"], strict=True)):
            results[i] = ids, _mask(encoded, j, texts[i], len(ids))
    return results


@contextmanager
def _patterns_told(tokenizer: Any) -> Iterator[None]:
    """Raises ValueError where a pattern of the tokenizer's goes back and forth in a row until its
    engine gives up, after some ten million tries. In Rust that is a panic, and no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"the tokenizer in {tokenizer.name_or_path!r} gives up on a row: {error}\n"
            "hint: a pattern in its tokenizer.json backtracks without end; look where it is from"
        ) from None


def _mask(encoded: Any, j: int, text: _Text, num_tokens: int) -> NDArray[np.bool_]:
    """Character spans -> tokens: every token with a character of an answer in it."""
    mask = np.zeros(num_tokens, dtype=np.bool_)
    for start, end in text.spans:
        # Characters without a token (white space that a tokenizer drops) are passed over.
        places = (encoded.char_to_token(j, at) for at in range(start, end))
        first = next((place for place in places if place is not None), None)
        if first is None:
            continue
        if end >= len(text.text):
            mask[first:] = True
            continue
        places = (encoded.char_to_token(j, at) for at in range(end - 1, start - 1, -1))
        last = next(place for place in places if place is not None)
        # A character may take several tokens, of which char_to_token names the first.
        while last + 1 < num_tokens:
            characters = encoded.token_to_chars(j, last + 1)
            if characters is None or characters.start >= end:
                break
            last += 1
        mask[first : last + 1] = True
    return mask


def _encode_slowly(text: _Text, tokenizer: Any) -> Encoded:
    """Piece by piece, for tokenizers without offsets."""
    ids: list[int] = []
    if text.special_tokens:
        ids += tokenizer("", add_special_tokens=True)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            ids.pop()
    mask = [False] * len(ids)
    at = 0
    for start, end in [*text.spans, (len(text.text), len(text.text))]:
        for piece, is_answer in ((text.text[at:start], False), (text.text[start:end], True)):
            if piece:
                more = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                ids += more
                mask += [is_answer] * len(more)
        at = end
    return ids, np.asarray(mask, dtype=np.bool_)


def _finish(
    ids: list[int], mask: NDArray[np.bool_], append_eos: bool, tokenizer: Any, max_length: int
) -> Tokens:
    eos = tokenizer.eos_token_id
    if append_eos and eos is not None and (not ids or ids[-1] != eos):
        ids = [*ids, eos]
        mask = np.append(mask, True)
    return Tokens(
        np.asarray(ids[:max_length], dtype=np.int32),
        mask[:max_length],
        len(ids) > max_length,
    )
