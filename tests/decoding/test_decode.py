"""Decoding as a whole: what is asked, what is kept, what is spent, what a kill leaves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.decoding.scripted import PER_SAMPLE, Scripted, failing
from thrifty.answering import MAX_FAILED, MAX_FAILED_IN_A_ROW, NobodyAnswers, Settings
from thrifty.backends.backend import AskingFailed
from thrifty.core.budget import Budget
from thrifty.core.ledger import Ledger
from thrifty.decode_pool import decode, decode_async
from thrifty.recordings import read_outcomes

PROMPTS = [{"id": str(i), "prompt": f"what is {i} + {i}?", "gold": str(2 * i)} for i in range(20)]


def always_right(prompt: str, number: int) -> str:
    return f"it is {2 * int(prompt.split()[2])}"


def torn_at_odd(prompt: str, number: int) -> str:
    """Questions with odd numbers are answered right three times of five, the others always."""
    value = int(prompt.split()[2])
    return f"{2 * value + (value % 2) * (number % 5 in (1, 4))}"


def right_at_odd(prompt: str, number: int) -> str:
    """Questions with odd numbers are always answered right, the others never alike."""
    value = int(prompt.split()[2])
    return f"{2 * value}" if value % 2 else f"{1000 + 7 * number}"


def test_answers_every_question_in_order_and_says_why() -> None:
    decoded = decode(PROMPTS, backends=[Scripted(always_right)], answer="number")
    assert [answer.id for answer in decoded.answers] == [row["id"] for row in PROMPTS]
    assert decoded.accuracy == 1.0
    assert all(answer.reason and answer.text.startswith("it is") for answer in decoded.answers)
    assert decoded.policy == "marginal"
    assert "compared" in decoded.why
    assert sum(answer.samples for answer in decoded.answers) * PER_SAMPLE == decoded.spent.tokens


def test_questions_that_can_turn_get_the_samples() -> None:
    backend = Scripted(torn_at_odd)
    settings = Settings(max_samples=20, mean_samples=4)
    decoded = decode(PROMPTS, backends=[backend], answer="number", settings=settings)
    torn, sure = ([a.samples for a in decoded.answers if int(a.id) % 2 == odd] for odd in (1, 0))
    assert sum(torn) + sum(sure) <= 4 * len(PROMPTS)
    assert sum(torn) > 1.5 * sum(sure)
    assert decoded.accuracy == 1.0


def test_a_limit_of_tokens_is_never_passed_however_many_draw_at_once(tmp_path: Path) -> None:
    backend = Scripted(right_at_odd, seconds=0.001)
    budget = Budget(tokens=45 * PER_SAMPLE)
    decoded = decode(
        PROMPTS,
        backends=[backend],
        answer="number",
        policy={"fixed": {"samples": 9}},
        budget=budget,
        settings=Settings(concurrency=64),
        folder=tmp_path,
    )
    assert backend.tokens == decoded.spent.tokens <= 45 * PER_SAMPLE
    assert decoded.spent.tokens >= 43 * PER_SAMPLE
    assert len(decoded.answers) == len(PROMPTS)
    assert min(a.samples for a in decoded.answers) >= 1  # what runs out runs out for all alike
    assert any("spent" in answer.reason for answer in decoded.answers)
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().tokens == decoded.spent.tokens


def test_the_number_under_way_is_limited() -> None:
    backend = Scripted(right_at_odd, seconds=0.002)
    decode(
        PROMPTS,
        backends=[backend],
        answer="number",
        policy={"fixed": {"samples": 2}},
        settings=Settings(concurrency=3),
    )
    assert backend.most_at_once == 3


def test_a_question_that_fails_is_told_and_the_others_go_on() -> None:
    def says(prompt: str, number: int) -> str | Exception:
        return failing(prompt, number) if " 7 +" in prompt else always_right(prompt, number)

    decoded = decode(PROMPTS, backends=[Scripted(says)], answer="number")
    failed = decoded.answers[7]
    assert failed.answer is None
    assert failed.failed == MAX_FAILED
    assert "failed" in failed.reason
    assert sum(answer.correct is True for answer in decoded.answers) == len(PROMPTS) - 1
    answered = sum(answer.samples for answer in decoded.answers)
    assert decoded.spent.tokens == (answered + MAX_FAILED) * PER_SAMPLE


def test_where_nobody_answers_the_run_ends_and_can_be_gone_on_with(tmp_path: Path) -> None:
    many = [{"id": str(i), "prompt": f"what is {i} + {i}?"} for i in range(100)]
    down = Scripted(failing)
    with pytest.raises(NobodyAnswers, match=f"{MAX_FAILED_IN_A_ROW} requests failed in a row"):
        decode(many, backends=[down], answer="number", folder=tmp_path)
    assert len(down.asked) <= MAX_FAILED_IN_A_ROW + 16
    decoded = decode(many, backends=[Scripted(always_right)], answer="number", folder=tmp_path)
    assert all(answer.answer is not None for answer in decoded.answers)


def test_a_wrong_key_ends_it_at_once() -> None:
    def says(prompt: str, number: int) -> Exception:
        return AskingFailed("401: no such key", fatal=True)

    backend = Scripted(says)
    with pytest.raises(NobodyAnswers, match="401"):
        decode(PROMPTS, backends=[backend], answer="number", settings=Settings(concurrency=1))
    assert len(backend.asked) == 1


def test_unreadable_answers_are_counted() -> None:
    decoded = decode(
        PROMPTS[:2],
        backends=[Scripted(lambda prompt, number: "no idea")],
        answer="number",
        settings=Settings(max_samples=6),
    )
    for answer in decoded.answers:
        assert answer.answer is None
        assert answer.unreadable == answer.samples > 0
        assert answer.given_up
        assert answer.text == "no idea"


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stops(prompt: str, number: int) -> str:
        if " 12 +" in prompt:
            raise Stop
        return right_at_odd(prompt, number)

    options = {"answer": "number", "folder": tmp_path, "policy": {"fixed": {"samples": 3}}}
    with pytest.raises(Stop):
        decode(PROMPTS, backends=[Scripted(stops)], **options)
    kept = (tmp_path / "samples.jsonl").read_text().splitlines()
    with (tmp_path / "samples.jsonl").open("a") as stream:
        stream.write('{"id": "3", "model"')  # torn by the kill
    backend = Scripted(right_at_odd)
    decoded = decode(PROMPTS, backends=[backend], **options)
    assert sum(answer.samples for answer in decoded.answers) == 60
    assert sum(backend.drawn.values()) == 60 - len(kept)
    again = Scripted(right_at_odd)
    assert decode(PROMPTS, backends=[again], **options).answers == decoded.answers
    assert not again.asked
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent(lost=False).tokens == 60 * PER_SAMPLE
        assert ledger.spent(lost=True).tokens > 0  # of what was under way when it stopped


def test_a_folder_answers_one_thing(tmp_path: Path) -> None:
    decode(PROMPTS[:2], backends=[Scripted(always_right)], answer="number", folder=tmp_path)
    with pytest.raises(ValueError, match="prompts differ"):
        decode(PROMPTS[:3], backends=[Scripted(always_right)], answer="number", folder=tmp_path)


def test_a_larger_budget_goes_on_with_what_there_is(tmp_path: Path) -> None:
    few, more = (Settings(mean_samples=mean) for mean in (1, 2))
    options = {"answer": "number", "folder": tmp_path, "policy": {"fixed": {"samples": 3}}}
    decode(PROMPTS, backends=[Scripted(torn_at_odd)], settings=few, **options)
    backend = Scripted(torn_at_odd)
    decoded = decode(PROMPTS, backends=[backend], settings=more, **options)
    assert sum(backend.drawn.values()) == len(PROMPTS)
    assert sum(answer.samples for answer in decoded.answers) == 2 * len(PROMPTS)
    with pytest.raises(ValueError, match="temperature differ"):
        decode(PROMPTS, backends=[backend], settings=Settings(temperature=1.0), **options)


def test_what_was_drawn_can_be_replayed(tmp_path: Path) -> None:
    decoded = decode(PROMPTS, backends=[Scripted(right_at_odd)], answer="number", folder=tmp_path)
    outcomes = read_outcomes([tmp_path / "recording.jsonl"])
    assert len(outcomes) == len(PROMPTS)
    assert {o.id: len(o.answers) for o in outcomes} == {a.id: a.samples for a in decoded.answers}
    right = {outcome.id for outcome in outcomes if any(outcome.correct)}
    assert right == {row["id"] for row in PROMPTS if int(row["id"]) % 2}


def test_a_limit_that_cannot_be_held_is_refused_before_anything_is_asked() -> None:
    backend = Scripted(always_right)
    with pytest.raises(ValueError, match="dollars"):
        decode(PROMPTS, backends=[backend], answer="number", budget=Budget(dollars=1.0))
    with pytest.raises(ValueError, match="flops"):
        decode(PROMPTS, backends=[backend], answer="number", budget=Budget(flops=1e12))
    assert not backend.asked


def test_dollars_are_counted_where_their_price_is_known() -> None:
    backend = Scripted(always_right, dollars=0.001)
    decoded = decode(PROMPTS, backends=[backend], answer="number", budget=Budget(dollars=0.5))
    assert decoded.resource == "dollars"
    assert decoded.spent.dollars == pytest.approx(0.001 * backend.tokens)
    told = sum(answer.dollars or 0.0 for answer in decoded.answers)
    assert told == pytest.approx(decoded.spent.dollars)


def test_time_ends_it_and_what_was_under_way_counts_at_its_most(tmp_path: Path) -> None:
    backend = Scripted(always_right, seconds=30.0)
    decoded = decode(
        PROMPTS[:4],
        backends=[backend],
        answer="number",
        budget=Budget(seconds=0.4),
        folder=tmp_path,
    )
    assert all(answer.answer is None for answer in decoded.answers)
    assert all("time" in answer.reason for answer in decoded.answers)
    assert decoded.spent.tokens == 4 * 2 * PER_SAMPLE
    assert decoded.spent.seconds < 5


def test_within_a_running_loop() -> None:
    async def inside() -> float | None:
        options = {"answer": "number", "policy": "fixed"}
        decoded = decode(PROMPTS[:3], backends=[Scripted(always_right)], **options)
        other = await decode_async(PROMPTS[:3], backends=[Scripted(always_right)], **options)
        assert decoded.answers == other.answers
        return decoded.accuracy

    assert asyncio.run(inside()) == 1.0


def test_what_came_is_kept_though_it_ends_while_it_is_read(tmp_path: Path) -> None:
    """Both questions are being scored, one after the other, as the time runs out."""

    def slowly(prompt: str, text: str) -> float:
        time.sleep(0.5)
        return 1.0

    options = {"answer": None, "policy": {"best_of": {"samples": 1}}, "folder": tmp_path}
    backend = Scripted(always_right)
    budget = Budget(seconds=0.2)
    first = decode(PROMPTS[:2], backends=[backend], reward=slowly, budget=budget, **options)
    assert backend.tokens == first.spent.tokens == 2 * PER_SAMPLE
    again = Scripted(always_right)
    second = decode(PROMPTS[:2], backends=[again], reward=slowly, budget=Budget(), **options)
    assert not again.asked
    assert [answer.samples for answer in second.answers] == [1, 1]


def test_rewards_choose_among_open_texts() -> None:
    decoded = decode(
        PROMPTS[:3],
        backends=[Scripted(lambda prompt, number: f"text {number}")],
        answer=None,
        policy={"best_of": {"samples": 4}},
        reward=lambda prompt, text: -abs(int(text.split()[1]) - 2),
    )
    assert [answer.text for answer in decoded.answers] == ["text 2"] * 3


def test_answers_that_say_the_same_are_one_class() -> None:
    texts = ["\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "\\boxed{3}"]
    decoded = decode(
        ["what is a half?"],
        backends=[Scripted(lambda prompt, number: texts[number % 3])],
        answer="math",
        policy={"fixed": {"samples": 3}},
    )
    assert decoded.answers[0].confidence == pytest.approx(2 / 3)


def test_the_same_however_draws_overtake_each_other() -> None:
    """Of a policy that settles every question by itself."""
    options = {"answer": "number", "policy": {"adaptive_consistency": {"threshold": 0.9}}}
    one = decode(
        PROMPTS, backends=[Scripted(right_at_odd)], settings=Settings(concurrency=1), **options
    )
    many = decode(
        PROMPTS,
        backends=[Scripted(right_at_odd, seconds=0.001)],
        settings=Settings(concurrency=32),
        **options,
    )
    assert one.answers == many.answers


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_kill_loses_no_sample_and_passes_no_limit(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from tests.decoding.scripted import Scripted
        from tests.decoding.test_decode import PROMPTS, right_at_odd
        from thrifty.core.budget import Budget
        from thrifty.decode_pool import decode
        decode(PROMPTS, backends=[Scripted(right_at_odd, seconds=0.05)], answer="number",
               policy={{"fixed": {{"samples": 8}}}}, budget=Budget(tokens=3000),
               folder={str(tmp_path)!r})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    samples = tmp_path / "samples.jsonl"
    for _ in range(600):
        if samples.is_file() and samples.read_bytes().count(b"\n") >= 24:
            break
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [json.loads(line) for line in samples.read_bytes().splitlines(keepends=False)]
    backend = Scripted(right_at_odd)
    decoded = decode(
        PROMPTS,
        backends=[backend],
        answer="number",
        policy={"fixed": {"samples": 8}},
        budget=Budget(tokens=3000),
        folder=tmp_path,
    )
    assert sum(answer.samples for answer in decoded.answers) == len(kept) + sum(
        backend.drawn.values()
    )
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        spent = ledger.spent()
        lost = ledger.spent(lost=True)
    assert spent.tokens <= 3000
    used = sum(answer.samples for answer in decoded.answers) * PER_SAMPLE
    # The samples that came before the kill among it; but for a draw, where the kill fell between
    # its being written down and its being counted.
    assert used - 8 * PER_SAMPLE <= spent.tokens - lost.tokens <= used
    assert spent.tokens - lost.tokens > sum(backend.drawn.values()) * PER_SAMPLE
    assert 0 < lost.tokens <= 16 * 8 * 2 * PER_SAMPLE  # what was under way, at its most
