"""A run that is steered by a score of generated answers, with floors and a guard, end to end."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import sentences, write_jsonl
from tests.methods.conftest import Tally
from tests.methods.test_metrics import task_in
from tests.runs import asked, finish, interrupt_at, ledger, planned, silent, weights
from thrifty import checkpoints, pipeline, plan_options, stages
from thrifty.core.budget import Budget
from thrifty.core.marginal import Estimate
from thrifty.core.plan import Target
from thrifty.costs.memory import kv_cache_bytes
from thrifty.evaluation import measure_flops
from thrifty.floors import Standing, hopeless
from thrifty.interruption import Interrupted
from thrifty.own_units import in_unit, own_unit_map
from thrifty.predictions import predictions
from thrifty.preparation import plan_run
from thrifty.report.summary import summarize, text_summary
from thrifty.run_folder import RunFolder
from thrifty.signals.generation import answers_flops, generate
from thrifty.signals.models import load_model

NEW_TOKENS = 6
ECHO = [
    # Short answers that a tiny model learns within some steps.
    {"prompt": f"say {word} please:", "completion": " five five."}
    for word in ("one", "two", "red", "sun", "sky", "sum", "get", "add", "wet", "pear", "rain")
]


@pytest.fixture(scope="module")
def echo(tmp_path_factory) -> dict[str, Path]:
    """Rows that all have one answer, and rows about fruit to guard."""
    folder = tmp_path_factory.mktemp("echo")
    pool = [{**row, "prompt": f"{i} {row['prompt']}"} for i in range(30) for row in ECHO]
    return {
        "pool": write_jsonl(folder / "pool.jsonl", pool),
        "signal": write_jsonl(folder / "signal.jsonl", ECHO[:6]),
        "dev": write_jsonl(folder / "dev.jsonl", ECHO),
        "test": write_jsonl(
            folder / "test.jsonl", [{**r, "prompt": "x " + r["prompt"]} for r in ECHO]
        ),
        "guard": write_jsonl(folder / "guard.jsonl", sentences("fruit", 12, 9)),
    }


def target(echo: dict[str, Path], **more: Any) -> Target:
    names = ("signal", "dev", "test")
    return Target(**{name: (str(echo[name]),) for name in names}, **more)


SCORED = {
    "objective.metric": "exact_match",
    "objective.max_new_tokens": NEW_TOKENS,
    "training.max_steps": 40,
    "training.eval_steps": 10,
    "training.save_steps": 10,
    "training.learning_rate": 1e-2,
}


def scored(folder: Path, model: Path, echo: dict[str, Path], **changes: Any) -> Any:
    fixed = {**SCORED, **changes.pop("fixed", {})}
    settings = {"targets": {"echo": target(echo)}, "budget": Budget(flops=6e9), **changes}
    return planned(folder, model, echo, fixed=fixed, **settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model, echo) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "run"
    scored(folder, tiny_model, echo)
    pipeline.run(folder, silent)
    return folder


@pytest.mark.long
def test_the_score_rises_and_the_best_model_by_it_is_kept(done):
    found = ledger(done).evaluations()
    losses = [row["objective"] for row in found]
    assert losses[0] == 1.0
    assert min(losses) < 0.5, losses
    assert all(set(row["beside"]["nats"]) == {"echo"} for row in found)
    assert all(row["stderr"] >= 1 / len(ECHO) for row in found[1:]), "never a certain change"
    best = checkpoints.best(done / "checkpoints")
    assert best.dev_loss == min(losses[1:])
    assert summarize(RunFolder(done))["dev_score"]["after"] == 1 - best.dev_loss


@pytest.mark.long
def test_the_user_reads_the_score_in_its_own_unit(done, tiny_model, echo, tmp_path):
    s = summarize(RunFolder(done))
    assert s["objective"]["unit"] == s["dev_score"]["unit"] == "exact_match"
    assert s["test_score"]["after"] == 1 - s["test_loss"]["after"]
    assert s["test_score"]["gain"] == pytest.approx(
        s["test_score"]["after"] - s["test_score"]["before"]
    )
    told = text_summary(s)
    assert (
        f"dev exact_match  0.0000 before, {s['dev_score']['after']:.4f} after: a gain of +" in told
    )
    assert "loss" not in told.replace("no loss", "").split("dev exact_match")[0]
    page = (done / "report.html").read_text()
    assert "Test exact_match rose, from 0.0000 to" in page
    assert "exact_match</dt><dd>The mean score, from 0 to 1" in page
    lines: list[str] = []
    scored(tmp_path / "run", tiny_model, echo, fixed={"training.max_steps": 10})
    finish(tmp_path / "run", lines.append)
    (line,) = [line for line in lines if line.startswith("step    10")]
    assert "dev exact_match 0." in line
    assert "  loss " in line


def test_what_is_charged_is_what_was_generated(done, tiny_model):
    """The FLOPs of every evaluation by the formula, on the tokens that were really generated: of a
    test that generates again what the kept model says."""
    with stages.at_work(RunFolder(done), silent) as work:
        plan, shape, most = work.plan, work.shape, work.plan.training.micro_batch_tokens
        asking = work.yardstick(plan)._answers
        model = load_model(RunFolder(done).model("budget"), "float32", "cpu")
        rows = work.rows("test")["echo"]
        asked, decoding = asking._questions(rows, model)
        ids = [each.ids for each in asked]
        lengths = [len(each) for each in ids]
        exact = 0.0
        for each in (model, work.models.base()):
            meter = Tally()
            answers = generate(each, shape, ids, decoding, meter, most)
            counts = [answer.num_tokens for answer in answers]
            by_formula = answers_flops(shape, lengths, decoding, most, counts)
            assert meter.cost.flops == pytest.approx(by_formula, rel=1e-12)
            exact += by_formula + measure_flops(shape, {"echo": rows}, most)
        assert min(counts) < NEW_TOKENS or max(counts) == NEW_TOKENS
        upper = work.predicted(plan)
    charged = {c["activity"]: c["flops"] for c in ledger(done).charges()}
    assert charged["test"] == pytest.approx(exact, rel=1e-9)
    assert charged["test"] <= upper.test.flops
    evaluated = [c["flops"] for c in ledger(done).charges() if c["activity"] == "evaluate"]
    assert max(evaluated) <= upper.evaluation.flops
    assert evaluated[-1] < upper.evaluation.flops, "answers that end early take less"


def test_gains_in_nats_become_gains_of_the_score_by_the_run_s_own_evaluations(done):
    rows = ledger(done).evaluations()
    own = Estimate(0.1, 0.02, "exact_match", "history")
    assert in_unit(own, rows, "exact_match") is own
    in_nats = Estimate(0.3, 0.05, "nats/token", "pilot")
    told = summarize(RunFolder(done))["unit_map"]
    assert (told["num_points"], told["unit"]) == (5, "exact_match")
    assert "A tenth of a nat less would bring" in (done / "report.html").read_text()
    before, after = (
        own_unit_map(rows, "exact_match").score(rows[-1]["beside"]["loss"] - less)[0]
        for less in (0.0, 0.3)
    )
    gain = in_unit(in_nats, rows, "exact_match")
    assert gain.mean == pytest.approx(after - before, abs=1e-12)
    assert (gain.unit, gain.source) == ("exact_match", "pilot")
    with pytest.raises(ValueError, match="by 3 evaluations that differ in their loss: it takes 4"):
        in_unit(in_nats, rows[:3], "exact_match")
    with pytest.raises(ValueError, match="a gain in points is no gain in nats/token"):
        in_unit(replace(in_nats, unit="points"), rows, "exact_match")


def test_planning_predicts_answers_and_their_memory(tiny_model, echo, tmp_path):
    said: list[str] = []
    settings = {"targets": {"echo": target(echo)}, "budget": Budget(flops=6e9), "fixed": SCORED}
    found, request, plan = plan_run(
        asked(tiny_model, echo, **settings), tmp_path / "run", said.append
    )
    assert any("an answer of up to 6 tokens to each of 11 dev rows" in line for line in said)
    context = plan.training.max_length + NEW_TOKENS
    assert request.generated_context == found.chosen.generated_context == context
    silent_one = replace(found.chosen, generated_context=0)
    cache = kv_cache_bytes(request.shape, found.chosen.setting.micro_batch, context, "float32")
    more = found.chosen.account.phase_bytes("evaluate") - silent_one.account.phase_bytes("evaluate")
    assert more == cache > 0
    with stages.at_work(RunFolder(tmp_path / "run"), silent) as work:
        exact = work.predicted(plan)
        by_statistics = predictions(
            plan.training,
            work.shape,
            work.device,
            request.dev,
            request.test,
            max_new_tokens=NEW_TOKENS,
        )
    assert by_statistics.evaluation.flops == pytest.approx(exact.evaluation.flops, rel=0.1)
    assert by_statistics.test.flops == pytest.approx(exact.test.flops, rel=0.1)


@pytest.mark.long
def test_a_run_interrupted_midway_ends_bit_for_bit_alike(
    done, tiny_model, echo, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    scored(folder, tiny_model, echo)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 25)
        with pytest.raises(Interrupted):
            finish(folder)
    finish(folder)
    first, second = weights(done / "model"), weights(folder / "model")
    assert all((first[name] == second[name]).all() for name in first)
    keys = ("step", "objective", "stderr", "by_target", "beside")
    measured = [[{k: e[k] for k in keys} for e in ledger(f).evaluations()] for f in (done, folder)]
    assert measured[0] == measured[1]


# -- floors and the guard -------------------------------------------------------------------------


def guarded(echo: dict[str, Path], most: float) -> dict[str, Any]:
    return {"guard.sources": [str(echo["guard"])], "guard.max_worse": most}


@pytest.mark.long
def test_a_guard_that_binds_keeps_the_base(tiny_model, echo, tmp_path):
    """Training on one answer spoils all other text from the first evaluation on."""
    folder, said = tmp_path / "run", []
    scored(folder, tiny_model, echo, fixed=guarded(echo, 0.0))
    with stages.at_work(RunFolder(folder), said.append) as work:
        stages.select(work, work.main)
        stages.train(work, work.main)
        stages.test(work, work.main)
    base = weights(tiny_model)
    assert all((base[name] == kept).all() for name, kept in weights(folder / "model").items())
    assert any(
        "kept the base model, for every checkpoint breaks a floor: guard is" in s for s in said
    )
    assert any("NOT TO BE KEPT: guard is worse than the base by" in s for s in said)
    rows = ledger(folder).evaluations()
    assert all(row["beside"]["floors"][0]["broken"] for row in rows[1:])
    decision = [d for d in ledger(folder).decisions() if d["name"] == "which model to keep"][-1]
    assert decision["chosen"] == "the base model, for every checkpoint breaks a floor"
    s = summarize(RunFolder(folder))
    assert (s["dev_loss"]["step"], s["gain"], s["test_loss"]["gain"]) == (0, 0.0, 0.0)
    assert "every checkpoint breaks a floor" in text_summary(s)
    ends = [d for d in ledger(folder).decisions() if d["chosen"] == "cool down and stop"]
    assert "guard is worse than the base by" in ends[0]["reason"], "going on is hopeless"
    assert "so it was at 3 evaluations in a row" in ends[0]["reason"]


@pytest.mark.parametrize(
    ("worse", "to_come", "ends"),
    [
        ((0.5, 0.6, 0.7), 5, True),
        ((0.7, 0.6, 0.5), 9, False),
        ((0.7, 0.6, 0.5), 2, True),
        ((0.05, 0.6, 0.7), 5, False),
        ((0.6, 0.7), 5, False),
        ((0.02, 0.02, 0.02), 5, False),
    ],
)
def test_there_is_no_use_in_going_on_where_a_floor_stays_broken(worse, to_come, ends):
    """At most 0.1 worse, measured to 0.01: at the pace of the last three evaluations."""
    history = [
        [Standing(name="echo", kind="target", limit=0.1, worse=w, stderr=0.01, unit="number")]
        for w in worse
    ]
    assert (hopeless(history, to_come) is not None) == ends
    assert hopeless([[], [], []], to_come) is None


@pytest.mark.long
def test_a_guard_that_does_not_bind_changes_nothing_but_the_bill(done, tiny_model, echo, tmp_path):
    folder = tmp_path / "run"
    scored(folder, tiny_model, echo, fixed=guarded(echo, 100.0))
    pipeline.run(folder, silent)
    first, second = weights(done / "model"), weights(folder / "model")
    assert all((first[name] == second[name]).all() for name in first)
    (standing,) = summarize(RunFolder(folder))["floors"]
    assert (standing["kind"], standing["broken"], standing["on"]) == ("guard", False, "dev")
    dearer, plain = (
        ledger(f).spent(stage="train", activity="evaluate").flops for f in (folder, done)
    )
    with stages.at_work(RunFolder(folder), silent) as work:
        assert "guard rows" in work.held.fingerprints
        most, times = work.plan.training.micro_batch_tokens, len(ledger(folder).evaluations())
        extra = measure_flops(work.shape, {**work.dev, "guard": work.guard}, most)
        extra -= measure_flops(work.shape, work.dev, most)
    assert dearer - plain == pytest.approx(extra * times, rel=1e-9)
    assert "What must not get worse than the base" in (folder / "report.html").read_text()


@pytest.mark.long
def test_of_two_targets_the_one_with_a_floor_decides_what_is_kept(tiny_model, echo, tmp_path):
    """The model gets better on one target and worse on the other: what is kept is within the floor,
    though the weighted objective prefers others."""
    folder, rows = tmp_path / "run", (str(echo["guard"]),)
    fruit = Target(signal=rows, dev=rows, test=rows, weight=0.1, floor=0.02)
    targets = {"echo": target(echo), "fruit": fruit}
    loss = {
        "objective.metric": "dev_loss",
        "training.learning_rate": 1e-3,
        "training.eval_steps": 5,
    }
    scored(folder, tiny_model, echo, targets=targets, fixed={**loss, "training.save_steps": 5})
    finish(folder)
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.test(work, work.main)
    later = ledger(folder).evaluations()[1:]
    broken = [r["objective"] for r in later if r["beside"]["floors"][0]["broken"]]
    allowed = [r["objective"] for r in later if not r["beside"]["floors"][0]["broken"]]
    s = summarize(RunFolder(folder))
    assert broken
    assert min(broken) < s["dev_loss"]["after"] == min([s["dev_loss"]["before"], *allowed])
    detail = s["test_loss"]
    worse = detail["by_target"]["fruit"] - detail["by_target_before"]["fruit"]
    assert worse <= 0.02 + 1e-9, "its dev and test rows are the same here"
    for standing in s["floors"]:
        assert (standing["name"], standing["on"], standing["broken"]) == ("fruit", "test", False)
        assert standing["worse"] == worse
    assert bool(s["floors"]) == bool(allowed)
    print(s["floors"], [r["objective"] for r in later], len(allowed), s["dev_loss"])


# -- bad input ------------------------------------------------------------------------------------


def test_dev_rows_without_a_prompt_are_refused_before_anything_is_spent(tiny_model, echo, tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "no question here"}] * 3)
    bad = {"echo": replace(target(echo), dev=(str(texts),))}
    with pytest.raises(
        ValueError, match=r"the dev rows of target echo: .*texts.jsonl:1 has no prompt"
    ):
        scored(tmp_path / "run", tiny_model, echo, targets=bad)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fixed", "says"),
    [
        (
            {"objective.metric": "exact_mach"},
            "there is no metric 'exact_mach'; did you mean exact_match",
        ),
        ({"objective.metric": "callable"}, "metric callable has no function to call"),
        (
            {"objective.metric": {"callable": {"function": "no.such:f"}}},
            "no.such:f cannot be imported",
        ),
        ({"objective.metric": {"callable": {"function": "math:pi"}}}, "math:pi is no function"),
        ({"objective.max_new_tokens": 0}, "max_new_tokens must be more than zero"),
        ({"guard.sources": []}, "guard.sources is empty"),
        ({"guard.sources": ["none.jsonl"]}, "the guard's rows: "),
        ({"guard.max_worse": -1, "guard.sources": ["x"]}, "guard.max_worse must be at least 0"),
        ({"targets.eko.floor": 0.1}, "targets.eko.signal is missing"),
        ({"targets.echo.floor": -0.1}, "targets.echo.floor must be at least 0"),
    ],
)
def test_a_bad_objective_is_refused_before_anything_is_spent(
    fixed, says, tiny_model, echo, tmp_path
):
    with pytest.raises(ValueError, match=says):
        scored(tmp_path / "run", tiny_model, echo, fixed=fixed)
    assert not (tmp_path / "run").exists()


def raises(prompt: str, answer: str, gold: str) -> float:
    raise KeyError(gold)


def two(prompt: str, answer: str, gold: str) -> float:
    return 2


def share_of_words(prompt: str, answer: str, gold: str) -> float:
    wanted = gold.split()
    return sum(word in answer for word in wanted) / len(wanted)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("raises", r"raised KeyError: ' five five.'\nhint: it was called with prompt 'say"),
        ("two", "gave a score of 2"),
    ],
)
@pytest.mark.long
def test_a_function_that_does_not_score_says_so_and_nothing_is_lost(
    function, says, tiny_model, echo, tmp_path
):
    folder = tmp_path / "run"
    own = {"callable": {"function": f"{__name__}:{function}"}}
    scored(folder, tiny_model, echo, fixed={"objective.metric": own})
    with pytest.raises(ValueError, match=says):
        finish(folder)
    assert ledger(folder).evaluations() == []


@pytest.mark.long
def test_a_function_of_the_user_s_steers_a_run_and_names_its_unit(tiny_model, echo, tmp_path):
    own = {"callable": {"function": f"{__name__}:share_of_words"}}
    scored(tmp_path / "run", tiny_model, echo, fixed={"objective.metric": own})
    finish(tmp_path / "run")
    s = summarize(RunFolder(tmp_path / "run"))
    assert s["objective"] == {
        "metric": "callable",
        "name": "share_of_words",
        "unit": "share_of_words",
        "more_is_better": True,
    }
    assert s["dev_score"]["after"] > s["dev_score"]["before"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_a_task_of_lm_eval_steers_a_run_by_its_own_questions(
    tiny_model, echo, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, alone = tmp_path / "run", Target(signal=(str(echo["signal"]),))
    fixed = {"objective.metric": task_in(tmp_path), "training.max_steps": 10}
    plan = scored(folder, tiny_model, echo, targets={"echo": alone}, fixed=fixed)
    assert plan.targets["echo"].test == ("sums",)
    pipeline.run(folder, silent)
    s = summarize(RunFolder(folder))
    assert (s["objective"]["metric"], s["test_score"]["unit"]) == ("lm_eval", "sums")
    assert s["test_score"]["after"] is not None
    with pytest.raises(ValueError, match=r"plan.yaml's objective.metric is not what .* prepared"):
        pipeline.run(folder, silent, ("objective.metric={lm_eval: {task: other}}",))


@pytest.mark.long
def test_a_dev_set_of_one_row_runs_and_knows_that_it_knows_nothing(tiny_model, echo, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", ECHO[:1])
    alone = {"echo": replace(target(echo, floor=0.1), dev=(str(one),), test=())}
    scored(tmp_path / "run", tiny_model, echo, targets=alone, fixed={"training.max_steps": 20})
    finish(tmp_path / "run")
    rows = ledger(tmp_path / "run").evaluations()
    assert all(row["stderr"] == float("inf") for row in rows)
    assert summarize(RunFolder(tmp_path / "run"))["state"] == "done"


@pytest.mark.long
def test_the_objective_cannot_be_changed_on_the_way(tiny_model, echo, tmp_path):
    folder = tmp_path / "run"
    scored(folder, tiny_model, echo, fixed={"training.max_steps": 10})
    finish(folder)
    with pytest.raises(ValueError, match="under other settings"):
        pipeline.run(folder, silent, ("objective.metric=number",))


# -- the command line -----------------------------------------------------------------------------


def options(*arguments: str) -> Any:
    parser = argparse.ArgumentParser()
    plan_options.add_to(parser)
    return plan_options.asked(parser.parse_args(["--model", "m", "--pool", "p", *arguments]))


def test_options_of_the_command_line():
    found = options(
        "--target",
        "math=m.jsonl",
        "--metric",
        "number",
        "--max-new-tokens",
        "32",
        "--floor",
        "math=0.05",
        "--guard",
        "g.jsonl",
        "--value",
        "$5 per point",
    )
    assert found.targets["math"].floor == 0.05
    assert found.fixed == {
        "objective.metric": "number",
        "objective.max_new_tokens": 32,
        "guard.sources": ["g.jsonl"],
        "objective.dollars_per_unit": pytest.approx(500.0),
    }
    own = options("--target", "m.jsonl", "--metric", "mine.scores:bleu", "--floor", "0.1")
    assert own.fixed["objective.metric"] == {"callable": {"function": "mine.scores:bleu"}}
    assert own.targets["target"].floor == 0.1
    assert options("--value", "$5 per nat").fixed == {"objective.dollars_per_unit": 5.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--target", "math=m", "--floor", "maths=0.1"),
            "names 'maths'.*\nhint: did you mean math",
        ),
        (("--floor", "0.1"), "--floor names 'target', and there is no such target"),
        (("--target", "m", "--floor", "little"), "cannot read --floor 'little'"),
        (
            ("--metric", "number", "--value", "$5"),
            "counted in points\nhint: --value '.5 per point'",
        ),
        (("--metric", "number", "--value", "$5 per nat"), "counted in points"),
        (("--value", "$5 per point"), "counted in nats"),
    ],
)
def test_bad_options(arguments, says):
    with pytest.raises(ValueError, match=says):
        options(*arguments)
