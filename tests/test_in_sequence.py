"""What one decision after the other would have planned, beside the joint plan."""

from __future__ import annotations

import pytest

from tests.test_planner import SMALL
from thrifty import planner
from thrifty.core.budget import Budget, PoolStats, Rates
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.costs.hardware import load_device
from thrifty.costs.shape import ModelShape
from thrifty.effective_tokens import tokens_behind
from thrifty.in_sequence import in_sequence
from thrifty.plan_display import plan_json, plan_text
from thrifty.request import Request

ROWS = PoolStats(num_examples=200, num_tokens=40_000, max_tokens=900, num_loss_tokens=20_000)


def request_for(budget: Budget, scorer: str = "", **fixed: object) -> Request:
    pool = PoolStats(num_examples=200_000, num_tokens=40_000_000, max_tokens=900)
    if scorer:
        fixed["selection.scorer"] = scorer
    return Request(
        shape=ModelShape.from_config(SMALL),
        budget=budget,
        device=load_device("h100"),
        rates=Rates(),
        pool=pool,
        targets={"target": ROWS},
        dev=ROWS,
        fixed=fixed,
    )


def test_where_memory_and_flops_bind_together_is_better_than_in_turn(monkeypatch):
    """3 EFLOP and 12 GiB: LESS is liked best, takes most of the FLOPs, and leaves the fastest step
    for a third of the tokens."""
    scorers = ("uniform", "bm25", "less")
    monkeypatch.setattr("thrifty.choices.all_names", lambda kind: scorers)
    request = request_for(Budget(flops=3e18, memory_bytes=12 * 2**30))
    planned = planner.search(request)
    found = in_sequence(planned, request)
    assert found.scorer == "less"
    assert found.candidate is not None
    assert planned.chosen.scorer != "less"
    assert set(found.differs) >= {"scorer", "steps"}
    assert set(found.differs) & set(MEMORY_KINDS)
    assert found.candidate.peak_memory_bytes <= request.memory_limit
    assert found.candidate.total.flops <= 3e18
    surely = [c.gain.mean - c.gain.stderr for c in (planned.chosen, found.candidate)]
    assert found.more_tokens == pytest.approx(
        tokens_behind(surely[0]) / tokens_behind(surely[1]), rel=1e-9
    )
    assert found.more_tokens > 1.5
    assert found.text in plan_text(planned, request)
    told = plan_json(planned, request, {})["in_sequence"]
    assert told["differs"]["scorer"] == ["less", planned.chosen.scorer]
    assert told["effective_tokens_ratio"] == found.more_tokens


def test_the_sequence_may_end_at_its_first_decision(monkeypatch):
    monkeypatch.setattr("thrifty.choices.all_names", lambda kind: ("uniform", "less"))
    request = request_for(Budget(flops=3e16, memory_bytes=24 * 2**30))
    found = in_sequence(planner.search(request), request)
    assert found.candidate is None
    assert "less" in found.text
    assert found.more_tokens is None


def test_nothing_differs_where_nothing_is_open():
    fixed = {
        **{f"training.memory.{kind}": name for kind, name in planner.REFERENCE.items()},
        "training.per_device_train_batch_size": 1,
    }
    request = request_for(Budget(flops=1e17), "uniform", **fixed)
    found = in_sequence(planner.search(request), request)
    assert found.differs == {}
    assert found.more_tokens == found.more_seconds == 1.0
