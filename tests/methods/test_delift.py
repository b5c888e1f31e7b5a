"""Pairwise utility against the model asked by hand, its price, and facility location over it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.methods.conftest import Tally
from tests.runs import ledger, planned, silent
from thrifty import stages
from thrifty.asked_rows import stats_together
from thrifty.core.budget import Budget
from thrifty.core.contracts import Work
from thrifty.core.resolve import resolve
from thrifty.core.spending import BudgetExceeded
from thrifty.costs.hardware import load_device
from thrifty.data.tokens import Tokens
from thrifty.run_folder import RunFolder
from thrifty.signals.delift import behind, pairwise_utility, pairwise_utility_flops

DELIFT = {"facility_location": {"over": "delift", "max_rows": 12}}


def naive_distance(model, ids, answer):
    """``answer``: the places whose tokens are the answer's."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    probabilities = torch.softmax(logits, -1)
    off = [1.0 - float(probabilities[at - 1, ids[at]]) for at in answer]
    return float(np.linalg.norm(off) / np.sqrt(len(off)))


def test_utility_is_that_of_the_model_asked_by_hand(pool, models):
    rows = pool.shard(0).tokens[:3]
    got = pairwise_utility(models.base(), models.shape, rows, Tally())
    for i, row in enumerate(rows):
        ids = row.input_ids.tolist()
        answer = [at for at in range(1, len(ids)) if row.loss_mask[at]]
        alone = naive_distance(models.base(), ids, answer)
        for j, example in enumerate(rows):
            both = [*example.input_ids.tolist(), *ids]
            moved = [at + len(example.input_ids) for at in answer]
            expected = alone - naive_distance(models.base(), both, moved)
            assert got[i, j] == pytest.approx(expected, abs=1e-5)
    assert len(np.unique(got)) == 9


def test_what_does_not_fit_loses_the_beginning_of_the_example(models):
    most = models.shape.max_position_embeddings
    example = Tokens(np.arange(100, dtype=np.int32), np.ones(100, dtype=bool))
    row = Tokens(np.arange(200, 250, dtype=np.int32), np.ones(50, dtype=bool))
    (pair,) = behind(example, [row], models.shape)
    assert len(pair.input_ids) == most == 128
    assert pair.input_ids.tolist() == [*range(100 - (most - 50), 100), *range(200, 250)]
    assert np.flatnonzero(pair.loss_mask).tolist() == list(range(most - 49, most))


@pytest.mark.slow
def test_flops_are_exact_and_the_price_is_near(pool, models):
    rows, tally = pool.shard(0).tokens, Tally()
    pairwise_utility(models.base(), models.shape, rows, tally)
    lengths = [len(row.input_ids) for row in rows]
    assert pairwise_utility_flops(models.shape, lengths) == pytest.approx(tally.cost.flops)
    work = Work(
        pool=stats_together([pool.manifest]),
        targets={},
        shape=models.shape,
        device=load_device("h100"),
        max_length=128,
    )
    picker = resolve("picker", {"facility_location": {"over": "delift", "max_rows": len(rows)}})
    predicted = picker.cost(work)
    assert predicted.flops == pytest.approx(tally.cost.flops, rel=0.1)
    assert predicted.seconds > 0
    assert predicted.peak_memory_bytes > models.shape.num_parameters * 4
    assert resolve("picker", "facility_location").cost(work).flops == 0
    assert not picker.needs_vectors


def test_an_empty_choice_and_a_row_without_an_answer(pool, models):
    assert pairwise_utility(models.base(), models.shape, [], Tally()).shape == (0, 0)
    mute = Tokens(np.arange(5, dtype=np.int32), np.zeros(5, dtype=bool))
    got = pairwise_utility(models.base(), models.shape, [pool.shard(0).tokens[0], mute], Tally())
    assert got[1].tolist() == [0, 0]
    assert np.isfinite(got).all()


def test_a_run_is_priced_charged_and_not_paid_twice(tiny_model, tiny_data, tmp_path):
    run = RunFolder(tmp_path / "run")
    fixed = {"selection.picker": DELIFT, "selection.max_tokens": 200}
    plan = planned(run.path, tiny_model, tiny_data, fixed=fixed)
    with stages.at_work(run, silent) as work:
        stages.select(work, work.main)
    spent = ledger(run.path).spent(stage="select").flops
    assert spent > 0, "bm25 takes none"
    # The twelve best rows are longer or shorter than the pool's mean, which the price goes by.
    assert spent == pytest.approx(plan.predicted["select"]["flops"], rel=0.5)
    manifest = json.loads((run.selected("budget") / "manifest.json").read_text())
    assert 0 < manifest["num_tokens"] <= 200
    (kept,) = run.scores("budget").glob("vectors-*/utility-*.npy")
    assert np.load(kept).shape == (12, 12)


def test_more_pairs_than_the_budget_allows_are_refused_before_the_first(
    tiny_model, tiny_data, tmp_path
):
    run = RunFolder(tmp_path / "run")
    planned(run.path, tiny_model, tiny_data, fixed={"selection.max_tokens": 200})
    plan = run.plan_file.read_text()
    picker = "{facility_location: {over: delift, max_rows: 300}}"
    run.plan_file.write_text(plan.replace("picker: top_k", f"picker: {picker}"))
    with stages.at_work(run, silent) as work:
        work.ledger.set_budget(Budget(flops=1e8))
        with pytest.raises(BudgetExceeded, match="comparing rows in pairs"):
            stages.select(work, work.main)
    assert ledger(run.path).spent(stage="select").flops == 0
