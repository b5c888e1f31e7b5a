"""bench/closed_loop.py: splits, analysis and verdicts, on rows and losses that are made up here."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import closed_loop
import closed_loop_analysis as analysis
import closed_loop_arms
import closed_loop_cells as cells
from closed_loop_analysis import CONTROLS, LOOP, SEQUENCE, UNIFORM, Result, Results
from closed_loop_cells import Row, Seen
from thrifty.core.plan import from_dict, put

# -- cells --------------------------------------------------------------------------------------


def _family(data: Path, random: np.random.Generator) -> list[Row]:
    """500 rows of words of their own, of which each tenth is there twice."""
    found = []
    for number in range(500):
        words = [f"w{number // (1 if number % 10 else 2)}x{place}" for place in range(20)]
        domain = ("sums", "law")[number % 2]
        found.append(Row(" ".join(words[:12]), " ".join(words[12:]), domain, number % 3 > 0))
    return found


CELL = cells.Cell(
    name="made up",
    about="",
    family=_family,
    targets=("sums",),
    pool_rows=200,
    held_rows=20,
)


def test_parts_are_disjoint_and_the_pool_shares_no_words_with_them():
    rows = cells.draw(CELL, Path())
    parts = rows.held["sums"]
    assert {name: len(some) for name, some in parts.items()} == dict.fromkeys(cells.PARTS, 20)
    assert all(row.sound and row.domain == "sums" for some in parts.values() for row in some)
    assert len(rows.pool) == 200
    held = {word for some in parts.values() for row in some for word in row.prompt.split()}
    assert not held & {word for row in rows.pool for word in row.prompt.split()}


def test_the_same_rows_every_time_and_others_for_another_cell():
    once, again = cells.draw(CELL, Path()), cells.draw(CELL, Path())
    assert once == again
    assert cells.draw(dataclasses.replace(CELL, name="other"), Path()).pool != once.pool


def test_scarce_rows_are_scarce():
    rows = cells.draw(dataclasses.replace(CELL, scarce=5), Path())
    assert rows.on_target.sum() == 5
    assert sum(row.domain == "sums" for row in rows.pool) == 10


LONG = " ".join(f"word{i}" for i in range(30))


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (LONG, "before " + " ".join(LONG.split()[4:17]) + " after", True),  # 13 words
        (LONG, "before it " + " ".join(LONG.split()[4:16]) + " after that", False),  # 12 of 16
        (LONG, " ".join(LONG.split()[:8]), True),  # 8 words, of a short row
        (LONG, " ".join(LONG.split()[:7]) + " other", False),
        ("What is 2 + 2?", "what is 2   2", True),  # all of a very short one
        ("What is 2 + 2?", "What is 2 + 3?", False),
    ],
)
def test_what_two_rows_must_not_share(one, other, shared):
    for first, second in ((one, other), (other, one)):
        seen = Seen()
        seen.add(Row(first, "", "", True))
        assert (Row(second, "", "", True) in seen) == shared


def test_a_leak_is_refused():
    rows = cells.draw(CELL, Path())
    leaking = dataclasses.replace(rows, pool=[*rows.pool, rows.held["sums"]["test"][0]])
    with pytest.raises(ValueError, match="the pool and a held part share words: 1 rows"):
        cells.check(leaking)
    parts = dict(rows.held["sums"])
    parts["dev"] = [*parts["dev"], parts["signal"][0]]
    with pytest.raises(ValueError, match="the dev rows of sums and another part share words"):
        cells.check(dataclasses.replace(rows, held={"sums": parts}))


def test_files_hold_prompts_and_responses_alone(tmp_path):
    rows = cells.draw(CELL, Path())
    cells.write(rows, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert {f.stem for f in files} == {"pool", "clean", *(f"sums-{p}" for p in cells.PARTS)}
    assert all(pq.read_schema(f).names == ["prompt", "response"] for f in files)
    assert pq.read_metadata(tmp_path / "clean.parquet").num_rows == rows.on_target.sum()


# -- arms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", closed_loop_arms.ARMS)
def test_every_arm_is_a_plan_that_can_be(arm, tmp_path):
    run = closed_loop_arms.Run("math", arm, 1, 3)
    for binds in (False, True):
        fixed = closed_loop_arms.settings(run, tmp_path, 1e6, binds=binds)
        fixed.setdefault("training.save_steps", fixed.get("training.eval_steps", 1))  # as planned
        values = {"model": {"path": "m"}, "pool": {"sources": ["p"]}, "budget": {"flops": 1e9}}
        values["targets"] = {"t": {"signal": ["s"]}}
        for key, value in fixed.items():
            put(values, key, value)
        plan = from_dict(values)
        assert plan.training.seed == plan.selection.seed == plan.selection.refresh.seed == 3


def test_finalists_run_five_times_at_every_budget_and_others_twice():
    options = argparse.Namespace(seeds=None, smoke=False, budgets=None, arms=None, only=None)
    runs = list(closed_loop.runs_of(options, cells.CELLS))
    assert len(cells.CELLS) >= 8
    assert sum(c.drifts for c in cells.CELLS) >= 2
    of_loop = [r for r in runs if (r.cell, r.arm) == ("math", LOOP)]
    assert sorted((r.budget, r.seed) for r in of_loop) == [
        (b, s) for b in (1, 3, 10) for s in range(5)
    ]
    dear = [r for r in runs if (r.cell, r.arm) == ("math", "grad_cosine")]
    assert {(r.budget, r.seed) for r in dear} == {(b, s) for b in (1, 3, 10) for s in range(2)}
    less = [r for r in runs if (r.cell, r.arm) == ("math", "loop less refresh")]
    assert {(r.budget, r.seed) for r in less} == {(b, s) for b in (3, 10) for s in range(2)}
    assert not any(r.arm == SEQUENCE and r.cell == "math" for r in runs)
    assert len({r.folder for r in runs}) == len(runs)


# -- analysis -----------------------------------------------------------------------------------

HARD = np.random.default_rng(0).normal(3.0, 1.0, 200)
"""What a row costs whatever the arm: many times what arms differ by."""


def _run(cell: str, arm: str, budget: int, seed: int, better: float, **more: object) -> Result:
    random = np.random.default_rng([seed, len(arm)])
    nll = (HARD - better + random.normal(0, 0.05, 200) + random.normal(0, 0.004)) * 10
    return Result(
        cell=cell,
        arm=arm,
        budget=budget,
        seed=seed,
        nll={"t": nll.tolist()},
        tokens={"t": [10.0] * 200},
        **{"dev": 3.0 - better, "flops": 1.0, "limit": 1.0, **more},
    )


def _results(
    better: dict[str, float],
    *,
    cell_names=("a", "b"),
    seeds=5,
    drifts=(0.6,),
    budgets=(1,),
    pilot=0.1,
) -> Results:
    return Results(
        [
            _run(
                cell,
                arm,
                budget,
                seed,
                gain,
                drifts=drifts if arm in (LOOP, *CONTROLS) else (),
                pilot_flops=pilot if arm == LOOP else 0.0,
            )
            for cell in cell_names
            for arm, gain in better.items()
            for budget in budgets
            for seed in range(seeds)
        ]
    )


def test_a_paired_difference_is_far_surer_than_either_loss():
    results = _results({UNIFORM: 0.0, "dsir": 0.1})
    dsir, uniform = (results.of("a", 1, arm) for arm in ("dsir", UNIFORM))
    found = analysis.difference(dsir, uniform)
    assert found.lower < -0.1 < found.upper
    assert found.upper - found.lower < 0.05 < 2 * analysis.interval(uniform)
    assert found.p < 0.01
    assert found.num_seeds == 5
    back = analysis.difference(uniform, dsir)
    assert back.mean == pytest.approx(-found.mean)
    assert back.p > 0.99


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """What arms differ by is of rows, whatever the seed, and of seeds, whatever the row. Few seeds
    make a bootstrap somewhat too sure."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        hard, own = random.normal(3, 1, 60), random.normal(-0.05, 0.1, 60)
        runs = {
            arm: {
                seed: dataclasses.replace(
                    _run("a", arm, 1, seed, 0.0),
                    nll={"t": (hard + more + random.normal(0, 0.03)).tolist()},
                    tokens={"t": [1.0] * 60},
                )
                for seed in range(8)
            }
            for arm, more in ((UNIFORM, 0.0), (LOOP, own))
        }
        found = analysis.difference(runs[LOOP], runs[UNIFORM], draws=400)
        covered += found.lower <= -0.05 <= found.upper
    assert 0.85 <= covered / 200 <= 0.98


def test_seeds_that_only_one_arm_has_do_not_count():
    results = _results({UNIFORM: 0.0, LOOP: 0.1})
    uniform = results.of("a", 1, UNIFORM)
    few = {s: r for s, r in results.of("a", 1, LOOP).items() if s < 2}
    assert analysis.difference(few, uniform).num_seeds == 2
    assert analysis.difference({}, uniform) is None


def test_holm():
    adjusted = analysis.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert analysis.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_the_hindsight_best_is_chosen_on_dev_and_regret_is_of_test():
    results = _results({UNIFORM: 0.0, "dsir": 0.2, "cascade": 0.1, LOOP: 0.15})
    assert results.best_static("a", 1) == "dsir"
    assert analysis.regret(results, "a", 1) == pytest.approx(0.25, abs=0.1)
    assert analysis.regret(results, "a", 1, "dsir") == 0.0
    flattered = [dataclasses.replace(r, dev=0.0) if r.arm == "cascade" else r for r in results.runs]
    assert Results(flattered).best_static("a", 1) == "cascade"
    worse = _results({UNIFORM: 0.0, "dsir": -0.2, LOOP: 0.1})
    assert analysis.regret(worse, "a", 1) is None  # uniform is the best: there is no gap


GOOD = {UNIFORM: 0.0, "dsir": 0.1, LOOP: 0.2, **dict.fromkeys(CONTROLS, 0.1), SEQUENCE: 0.1}


def test_dynamic_holds_where_the_loop_beats_both_controls():
    assert analysis.dynamic(_results(GOOD), ["a", "b"]) == "holds"


@pytest.mark.parametrize("control", CONTROLS)
def test_dynamic_is_withdrawn_where_one_control_is_as_good(control):
    assert analysis.dynamic(_results({**GOOD, control: 0.2}), ["a", "b"]) == "withdrawn"


def test_dynamic_is_withdrawn_where_nothing_drifted():
    assert analysis.dynamic(_results(GOOD, drifts=(0.2,)), ["a", "b"]) == "withdrawn"
    assert analysis.dynamic(_results(GOOD, drifts=()), ["a", "b"]) == "withdrawn"


def test_coupled_holds_and_falls():
    assert analysis.coupled(_results(GOOD), ["b"]) == "holds"
    assert analysis.coupled(_results({**GOOD, SEQUENCE: 0.2}), ["b"]) == "withdrawn"


def test_safe_falls_where_one_cell_is_worse_than_its_pilot_explains():
    both = (1, 3)
    assert analysis.safe(_results(GOOD, budgets=both)) == "holds"
    bad = _results({**GOOD, LOOP: -0.1}, cell_names=("c",), budgets=both)
    mixed = Results([*_results(GOOD, budgets=both).runs, *bad.runs])
    assert analysis.safe(mixed) == "withdrawn"


def test_a_pilot_may_cost_what_its_flops_would_have_brought():
    runs = [
        _run("a", arm, budget, seed, better, pilot_flops=0.3 if arm == LOOP else 0.0)
        for arm, budget, better in ((UNIFORM, 1, 0.0), (UNIFORM, 3, 0.3), (LOOP, 1, 0.0))
        for seed in range(5)
    ]
    allowed = analysis.pilot_allowance(Results(runs), "a", 1)
    assert allowed == pytest.approx(0.3 / np.log(3) * -np.log(0.7), rel=0.1)
    alone = [r for r in runs if r.budget == 1]
    assert analysis.pilot_allowance(Results(alone), "a", 1) == 0.0


def test_near_the_best_holds_by_the_median():
    assert analysis.near_best(_results(GOOD)) == "holds"
    assert analysis.near_best(_results({**GOOD, LOOP: 0.05})) == "withdrawn"


def test_nothing_is_said_of_too_few_seeds():
    few = _results(GOOD, seeds=4)
    assert analysis.dynamic(few, ["a", "b"]) == "too few seeds"
    assert analysis.coupled(few, ["b"]) == "too few seeds"
    assert analysis.safe(few) == analysis.near_best(few) == "too few seeds"
    assert analysis.safe(Results([])) == analysis.dynamic(Results([]), []) == "too few seeds"


def test_the_table_has_every_cell_and_what_was_refused():
    refused = {("a", 1, "less"): "not to be paid for", ("c", 1, "less"): "not to be paid for"}
    rows = analysis.table(_results(GOOD), refused)
    assert all(len(row) == len(analysis.HEADERS) == len(analysis.RIGHT) for row in rows)
    assert {row[0] for row in rows} == {"a", "b", "c"}
    assert sum(row[2].startswith("less") for row in rows) == 2
    assert sum("hindsight-best" in row[2] for row in rows) == 2
