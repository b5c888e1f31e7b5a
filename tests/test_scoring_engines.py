"""Scores are the same bit for bit wherever they are computed, and charged alike."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.runs import ledger, planned, silent
from thrifty import stages
from thrifty.core.budget import Budget, Cost
from thrifty.run_folder import RunFolder
from thrifty.scoring_engines import Allowance, AllowanceSpent, engine_named


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Six shards of the small pool, as of one of many gigabytes."""
    from thrifty.data import store

    whole = store.build_store

    def small(*args, **kwargs):
        return whole(*args, **{**kwargs, "shard_rows": 25})

    monkeypatch.setattr(store, "build_store", small)


def scored(folder, model, data, scorer, engine):
    data = {**data, "pool": data["small_pool"]}
    fixed = {"selection.scorer": scorer}
    plan = planned(folder, model, data, fixed=fixed, budget=Budget(flops=2e10))
    with stages.at_work(RunFolder(folder), silent) as work:
        assert work.pool.num_shards == 6
        stages.select(work, work.main, engine)
    (scores,) = RunFolder(folder).scores("budget").iterdir()
    found = [pq.read_table(file) for file in sorted(scores.glob("*.parquet"))]
    return plan, {name: np.concatenate([t[name].to_numpy() for t in found]) for name in
                  found[0].column_names}  # fmt: skip


FEW = {"max_warmup_rows": 20, "rank": 2, "dimensions": 512, "max_target_rows": 5}
WITH_A_MODEL = ["embedding", "grand", "grad_cosine", {"less": FEW}, {"tracin": FEW}]


@pytest.mark.parametrize(
    "scorer", ["bm25", *(pytest.param(s, marks=pytest.mark.slow) for s in WITH_A_MODEL)], ids=str
)
@pytest.mark.long
def test_worker_processes_give_the_same_scores(scorer, tiny_model, tiny_data, tmp_path):
    plan, here = scored(tmp_path / "here", tiny_model, tiny_data, scorer, None)
    engine = engine_named("processes", 2)
    _, there = scored(tmp_path / "there", tiny_model, tiny_data, scorer, engine)
    assert here.keys() == there.keys()
    for name, column in here.items():
        np.testing.assert_array_equal(column, there[name])
    one, other = (ledger(tmp_path / n).spent(stage="select") for n in ("here", "there"))
    assert one.flops == other.flops
    assert other.flops <= plan.predicted["select"]["flops"] * 1.25


@pytest.mark.slow
def test_workers_fill_a_store_of_gradients_as_one_process_does(tiny_model, tiny_data, tmp_path):
    engine, files = engine_named("processes", 2), {}
    for name, how in (("here", None), ("there", engine)):
        store = tmp_path / f"store-{name}"
        scorer = {"less": {**FEW, "store": str(store)}}
        _, found = scored(tmp_path / name, tiny_model, tiny_data, scorer, how)
        files[name] = (
            found["score_0"],
            {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*.*")},
        )
    np.testing.assert_array_equal(files["here"][0], files["there"][0])
    assert len(files["here"][1]) == 2 * (6 + 2)
    assert files["here"][1] == files["there"][1]


@pytest.mark.long
def test_a_shard_that_is_given_back_is_scored_here(tiny_model, tiny_data, tmp_path, monkeypatch):
    from thrifty import selection
    from thrifty.scoring_engines import Scored

    _, here = scored(tmp_path / "here", tiny_model, tiny_data, "embedding", None)

    def gives_back(work, shards):
        for shard in reversed(shards):
            yield work.of(shard) if shard % 2 else Scored(shard, None, Cost(flops=1.0))

    _, there = scored(tmp_path / "there", tiny_model, tiny_data, "embedding", gives_back)
    np.testing.assert_array_equal(here["score_0"], there["score_0"])
    assert selection.MARGIN > 1


def test_an_allowance_refuses_before_it_is_passed():
    meter = Allowance(10.0)
    meter.tick(Cost(flops=6.0))
    with pytest.raises(AllowanceSpent):
        meter.tick(Cost(flops=5.0))
    assert meter.used.flops == 6.0


def test_an_engine_that_there_is_not():
    with pytest.raises(ValueError, match="no engine 'spark'\nhint: local, processes or ray"):
        engine_named("spark")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scorer", ["bm25", "loss"])
def test_a_ray_cluster_of_two_nodes_one_of_them_killed(scorer, tiny_model, tiny_data, tmp_path):
    """Half-way, with a third of the shards done."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        engine, done = engine_named("ray"), []

        def killing(work, shards):
            for found in engine(work, shards):
                done.append(found.shard)
                if len(done) == 2:
                    cluster.remove_node(second, allow_graceful=False)
                yield found

        _, there = scored(tmp_path / "there", tiny_model, tiny_data, scorer, killing)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(done) == list(range(6))
    _, here = scored(tmp_path / "here", tiny_model, tiny_data, scorer, None)
    one, other = (ledger(tmp_path / n).spent(stage="select").flops for n in ("here", "there"))
    assert one == other
    np.testing.assert_array_equal(here["id"], there["id"])
    np.testing.assert_array_equal(here["score_0"], there["score_0"])
