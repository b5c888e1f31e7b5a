"""The words: six to fourteen lines, and a loss is called a loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report import runs
from thrifty.core.plan import ModelSource
from thrifty.report.summary import summarize, text_summary
from thrifty.report.words import against_control, asked, headline, off, weighed, with_error


def say(path: Path, **more: object) -> str:
    text = text_summary(summarize(runs.finished(path / "run", **more)))
    assert 6 <= len(text.splitlines()) <= 14
    return text


def test_a_win(tmp_path: Path) -> None:
    text = say(tmp_path)
    assert "beat a uniform choice at the same total FLOPs, scoring included, by 0.0500" in text
    assert "640 of 5,120 rows" in text
    assert "stand among a target's own rows: 2 in asyncio" in text
    assert "9.04 TFLOP of 10 TFLOP (predicted 9.2 TFLOP, -1.7%)" in text
    assert "2.5100 before, 2.0500 after" in text
    assert "2.4900 before, 2.0600 after: a gain of +0.4300 ± 0.0110" in text
    assert "next best uniform" in text
    assert "guessed a gain of 0.42 ± 0.05 nats/token" in text, "beside what was measured"
    assert "no forecast" in text


def test_a_loss_is_stated(tmp_path: Path) -> None:
    text = say(tmp_path, difference=-0.05)
    assert "LOST to a uniform choice" in text
    assert "selection cost more than it brought" in text
    assert "beat" not in text


def test_noise_is_no_win(tmp_path: Path) -> None:
    text = say(tmp_path, difference=0.015, stderr=0.01)
    assert "no difference beyond noise: +0.0150 ± 0.0100" in text
    assert "did not pay" in text


@pytest.mark.parametrize("difference", [-0.05, 0.0, 0.05])
def test_two_uniform_choices_say_nothing_of_selection(tmp_path: Path, difference: float) -> None:
    s = summarize(runs.finished(tmp_path / "run", difference=difference))
    s["selection"]["scorer"] = "uniform"
    sentence, verdict = against_control(s)
    assert "two draws of rows differ by 0.0" in sentence
    assert verdict == "even"
    for claim in ("pay", "beat", "LOST", "selected"):
        assert claim not in sentence


def test_no_control_is_said(tmp_path: Path) -> None:
    text = say(tmp_path, with_control=False)
    assert "None was run" in text


def test_unknown_price_is_not_printed_as_zero(tmp_path: Path) -> None:
    assert "$" not in say(tmp_path, price=False)


def test_a_loss_that_rose_is_stated(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan())
    with ledger:
        runs.train(ledger, losses=(2.0, 2.1, 2.2, 2.3, 2.4, 2.5))
    sentences = dict(headline(summarize(run)))
    assert sentences["Brought"].startswith("Dev loss ROSE, from 2.0000 to 2.5000")


@pytest.mark.parametrize("began", [False, True])
def test_a_run_in_progress(tmp_path: Path, began: bool) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan(control=True))
    with ledger:
        if began:
            with pytest.raises(KeyboardInterrupt):
                runs.train(ledger, losses=(2.5, 2.4), end=False)
    s = summarize(run)
    text = text_summary(s)
    assert 6 <= len(text.splitlines()) <= 14
    assert "The control has not been run yet" in text
    if began:
        assert "Not finished: train stopped (KeyboardInterrupt: signal 2)" in text
        assert "so far" in dict(headline(s))["Cost"]
        assert "-8" not in text  # no share of a prediction that is not due yet
    else:
        assert "Nothing has been run yet" in text
        assert "Brought" not in dict(headline(s))


def test_without_error_bar_no_victory(tmp_path: Path) -> None:
    s = summarize(runs.finished(tmp_path / "run"))
    s["control"] |= {"gain_over_control": 0.05, "gain_over_control_stderr": None}
    sentence, verdict = against_control(s)
    assert verdict == "even"
    assert "may be noise" in sentence


def test_terminal_escapes_are_inert(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan())
    with ledger, pytest.raises(RuntimeError), ledger.stage("train", "full"):
        raise RuntimeError("\x1b[2J\x1b]0;owned\x07 \u202e" + "x" * 1_000_000)
    text = text_summary(summarize(run))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"\x1b[2J" in text
    assert len(text) < 3000


def test_small_numbers() -> None:
    assert off(103.0, 100.0) == "+3.0%"
    assert off(100.01, 100.0) == "±0%"
    assert off(500.0, 100.0) == "+400%"
    assert off(2000.0, 100.0) == "+1,900%"
    assert off(1.0, 0.0) == off(None, 1.0) == "\N{EN DASH}"
    assert with_error(-0.05, 0.01, signed=True) == "-0.0500 ± 0.0100"


def test_no_option_worth_its_price() -> None:
    option = {
        "name": "train on",
        "gain": {"mean": 0.0, "stderr": 0.1, "unit": "nats/token", "source": "history"},
        "cost": {"flops": 1e15},
        "note": "",
    }
    choice = {
        "chosen": None,
        "options": [option],
        "rates": [1e-16],
        "resource": "flops",
        "price": 2e-16,
        "incumbent": "train on",
        "z": 1.0,
    }
    assert weighed(choice) == (
        "train on: history gain 0.0000 ± 0.1000 nats/token, at best 0.1 a PFLOP, "
        "not above the price of 0.2"
    )


def test_a_folder_goes_by_its_own_name(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan(model=ModelSource(path="/a/cache/base-1")))
    ledger.close()
    assert "Supervised fine-tuning of base-1 towards" in asked(summarize(run))


def test_a_peak_that_was_not_predicted_is_not_zero(tmp_path: Path) -> None:
    predicted = {**runs.PREDICTED, "test": runs.cost(2e11, 8.0)}
    values = {name: cost.to_dict() for name, cost in predicted.items()}
    run, ledger = runs.start(tmp_path / "run", runs.plan(predicted=values))
    ledger.close()
    stages = {stage["name"]: stage for stage in summarize(run)["stages"]}
    assert stages["test"]["predicted"]["peak_memory_bytes"] is None
    assert stages["train"]["predicted"]["peak_memory_bytes"] == 9e8


def test_what_costs_nothing_has_no_rate():
    gain = {"mean": 0.05, "stderr": 0.01, "unit": "nats/token", "source": "prior"}
    option = {"name": "narrow the choice", "gain": gain, "cost": {"flops": 0.0}, "note": ""}
    choice = {"resource": "flops", "options": [option], "rates": [None], "price": 0.0}
    told = weighed({**choice, "chosen": "narrow the choice", "incumbent": None})
    assert "for nothing, above the price of 0" in told
