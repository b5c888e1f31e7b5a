"""What the answers of a decoding add up to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from thrifty.asked_questions import Answer


def totals(answers: Iterable[Answer]) -> dict[str, Any]:
    """How many questions ended how, and what their samples took: ``dollars`` and ``accuracy`` are
    None where they are not known."""
    found = dict.fromkeys(("num_questions", "answered", "given_up", "without_an_answer"), 0)
    found |= dict.fromkeys(("samples", "failed", "unreadable"), 0)
    generated = flops = 0.0
    dollars: float | None = 0.0
    known = right = 0
    for answer in answers:
        found["num_questions"] += 1
        found[_end(answer)] += 1
        found["samples"] += answer.samples
        found["failed"] += answer.failed
        found["unreadable"] += answer.unreadable
        generated += answer.tokens
        flops += answer.flops
        if dollars is not None:
            dollars = None if answer.dollars is None else dollars + answer.dollars
        known += answer.correct is not None
        right += bool(answer.correct)
    return {
        **found,
        "tokens_generated": generated,
        "flops_of_samples": flops,
        "dollars_of_samples": dollars,
        "with_gold": known,
        "accuracy": right / known if known else None,
    }


def _end(answer: Answer) -> str:
    if answer.answer is None:
        return "without_an_answer"
    return "given_up" if answer.given_up else "answered"
