"""The formats of the field, brought to TRL's; and what a row says about itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from thrifty.data.faults import REASONS, Fault, excerpt
from thrifty.data.formats import KINDS, convert
from thrifty.data.pool import BadRow, Row, fingerprint
from thrifty.data.splits import part_of, split_rows

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ASK, TELL = TURNS[:1], TURNS[1:]


def pair(prompt: Any, completion: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def preferred(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("record", "kind", "content"),
    [
        ({"text": "t"}, "text", {"text": "t"}),
        (pair("a", "b"), "prompt_completion", pair("a", "b")),
        (pair(ASK, TELL), "prompt_completion", pair(ASK, TELL)),
        ({"messages": TURNS}, "messages", {"messages": TURNS}),
        ({"messages": TURNS, "prompt": "a"}, "messages", {"messages": TURNS}),
        # Alpaca
        ({"instruction": "a", "output": "b"}, "prompt_completion", pair("a\n\n", "b")),
        ({"instruction": "a", "input": "", "output": "b"}, "prompt_completion", pair("a\n\n", "b")),
        ({"instruction": "a", "input": None, "output": "b", "history": []}, "prompt_completion",
         pair("a\n\n", "b")),
        ({"instruction": "a", "input": "i", "output": "b"}, "prompt_completion",
         pair("a\n\ni\n\n", "b")),
        ({"system": "s", "instruction": "a", "response": "b"}, "prompt_completion",
         pair("s\n\na\n\n", "b")),
        # pairs
        ({"prompt": "a", "response": "b"}, "prompt_completion", pair("a\n\n", "b")),
        ({"prompt": "a\n", "response": "b"}, "prompt_completion", pair("a\n", "b")),
        ({"prompt": "a", "response": " b"}, "prompt_completion", pair("a", " b")),
        ({"prompt": "", "response": "b"}, "prompt_completion", pair("", "b")),
        ({"question": "a", "answer": "b"}, "prompt_completion", pair("a\n\n", "b")),
        ({"input": "a", "output": "b"}, "prompt_completion", pair("a\n\n", "b")),
        ({"problem": "a", "solution": "b", "answer": "c"}, "prompt_completion", pair("a\n\n", "b")),
        ({"text": "b", "question": "a", "answer": "b"}, "prompt_completion", pair("a\n\n", "b")),
        # ShareGPT
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         "messages", {"messages": TURNS}),
        ({"system": "s", "conversations": [{"from": "human", "value": "a"},
          {"from": "function_call", "value": "f"}, {"from": "observation", "value": "o"},
          {"from": "gpt", "value": "b"}]}, "messages",
         {"messages": [{"role": "system", "content": "s"}, ASK[0],
                       {"role": "assistant", "content": "f"}, {"role": "tool", "content": "o"},
                       TELL[0]]}),
        ({"conversations": TURNS}, "messages", {"messages": TURNS}),
        ({"conversations": json.dumps(TURNS)}, "messages", {"messages": TURNS}),
    ],
)  # fmt: skip
def test_conversion_for_sft(record: dict[str, Any], kind: str, content: dict[str, Any]) -> None:
    found_kind, found, extra = convert({**record, "source": "x"}, "sft", 1000)
    assert (found_kind, found) == (kind, content)
    assert extra["source"] == "x"
    assert not set(extra) & set(content)


GPT = {"from": "gpt", "value": "b"}


@pytest.mark.parametrize(
    ("record", "content"),
    [
        (preferred("a", "b", "c"), preferred("a", "b", "c")),
        ({"question": "a", "chosen": "b", "rejected": "c"}, preferred("a", "b", "c")),
        (preferred(ASK, TELL, TELL), preferred(ASK, TELL, TELL)),
        ({"chosen": TURNS, "rejected": TURNS}, preferred(ASK, TELL, TELL)),
        (preferred("a", TURNS, TURNS), preferred(ASK, TELL, TELL)),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": GPT, "rejected": GPT},
         preferred(ASK, TELL, TELL)),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": json.dumps(GPT),
          "rejected": json.dumps([GPT])}, preferred(ASK, TELL, TELL)),
    ],
)  # fmt: skip
def test_conversion_for_preference(record: dict[str, Any], content: dict[str, Any]) -> None:
    kind, found, _ = convert(record, "preference", 1000)
    assert (kind, found) == ("preference", content)


def test_continued_takes_text_and_pairs() -> None:
    assert convert({"text": "t", "question": "a", "answer": "b"}, "continued", 99)[1] == {
        "text": "t"
    }
    assert convert({"content": "t"}, "continued", 99)[1] == {"text": "t"}
    assert convert(pair("a", "b"), "continued", 99)[1] == {"text": "ab"}
    for record in ({"messages": TURNS}, pair(ASK, TELL), preferred("a", "b", "c")):
        with pytest.raises(Fault, match="wrong_kind"):
            convert(record, "continued", 99)


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (pair("a", "b"), "wrong_kind"),
        ({"chosen": "b", "rejected": "c"}, "missing_fields"),
        (preferred("a", "", "c"), "empty"),
        (preferred("a", "b", " "), "empty"),
        (preferred("a", "b", TELL), "wrong_type"),
        (preferred(ASK, ASK, TELL), "no_assistant"),
        ({"chosen": [], "rejected": TURNS}, "empty"),
    ],
)
def test_bad_preference_rows(record: dict[str, Any], code: str) -> None:
    with pytest.raises(Fault) as fault:
        convert(record, "preference", 99)
    assert fault.value.code == code


def test_extra_keeps_scalars_that_json_can_hold() -> None:
    import datetime
    import decimal

    record = {
        "text": "t", "i": 1, "f": 0.5, "b": True, "n": None, "nan": float("nan"), "big": 2**70,
        "day": datetime.date(2024, 1, 2), "d": decimal.Decimal("1.5"), "list": [1], "raw": b"x",
        "__index_level_0__": 3,
    }  # fmt: skip
    extra = convert(record, "sft", 99)[2]
    assert extra == {
        "i": 1, "f": 0.5, "b": True, "n": None, "nan": None, "big": str(2**70),
        "day": "2024-01-02", "d": "1.5",
    }  # fmt: skip


def row(kind: Any, content: dict[str, Any]) -> Row:
    return Row(0, "f", 1, kind, content, {})


def test_what_a_row_says() -> None:
    text = row("text", {"text": "t"})
    assert (text.prompt, text.completion, text.text) == ("", "t", "t")
    plain = row("prompt_completion", pair("a ", "b"))
    assert (plain.prompt, plain.completion, plain.text) == ("a ", "b", "a b")
    turns = row("prompt_completion", pair(ASK, TELL))
    assert (turns.prompt, turns.completion, turns.text) == ("a", "b", "a\nb")
    chat = row("messages", {"messages": [{"role": "system", "content": "s"}, *TURNS, *TURNS]})
    assert (chat.prompt, chat.completion, chat.text) == ("s\na\na", "b\nb", "s\na\nb\na\nb")
    choice = row("preference", preferred("a", "b", "c"))
    assert (choice.prompt, choice.completion, choice.text) == ("a", "b", "a\nb\nc")


def test_fingerprints() -> None:
    assert len(fingerprint("x")) == 16
    assert fingerprint("Caf\u00e9  au\nlait ") == fingerprint("cafe\u0301 AU LAIT")
    assert fingerprint("a b") != fingerprint("ab")
    assert row("text", {"text": "A  b"}).fingerprint == fingerprint("a b")


@pytest.mark.parametrize(
    "raw",
    ["\x1b[31mred\x07", "\u202egnp.exe", "a\nb\tc\0", b"\xff\xfe bytes", "x" * 10_000, "😀" * 500],
)
def test_excerpts_are_inert(raw: str | bytes) -> None:
    shown = excerpt(raw)
    assert len(shown) <= 120
    assert shown.isprintable()


def test_every_code_has_words() -> None:
    assert all(Fault(code).reason == f"{code}: {words}" for code, words in REASONS.items())
    assert set(KINDS) == {"sft", "continued", "preference"}


def test_splits_keep_copies_together() -> None:
    rows = [row("text", {"text": f"document {i % 500}" + " " * (i // 500)}) for i in range(1000)]
    bad = BadRow(0, "f", 1, "empty: x", "")
    parts = {"train": 0.8, "dev": 0.1, "test": 0.1}
    found = list(split_rows([*rows, bad], parts, seed=1))
    assert [r for _, r in found] == rows
    names = [name for name, _ in found]
    assert names[:500] == names[500:]  # copies with other white space
    assert 370 < names[:500].count("train") < 430
    assert names != [name for name, _ in split_rows(rows, parts, seed=2)]
    # a row's part depends on nothing but itself
    assert [name for name, _ in split_rows(rows[::-1], parts, seed=1)] == names[::-1]
    assert part_of(b"x", {"all": 1.0}, 0) == "all"
    for wrong in ({}, {"a": 0.5}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(ValueError, match=r"must sum to 1.*\nhint"):
            part_of(b"x", wrong, 0)
