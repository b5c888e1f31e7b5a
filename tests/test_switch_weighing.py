"""Whether to train something else from here on, weighed without a model."""

import json
import math

import pytest

from thrifty.core.budget import Budget, Cost
from thrifty.core.contracts import Worth
from thrifty.core.ledger import Ledger
from thrifty.core.marginal import replay
from thrifty.core.plan import MemoryPlan, Training
from thrifty.core.plan_switch import Switch
from thrifty.costs.setting import MemorySetting
from thrifty.memory_switch import DECISION, STAY, Holding, MemorySwitch, Standing
from thrifty.prospect import Prospect

FLOPS = {"lora": 4e9, "badam": 3e9, "full": 6e9}
PAID = Cost(flops=1e9)
SURE = {name: Worth(0.6, 0.03, "a test") for name in FLOPS}


@pytest.fixture
def stage(tmp_path):
    with (
        Ledger.create(tmp_path / "ledger.sqlite", Budget(flops=1e15)) as ledger,
        ledger.stage("train", "lora") as stage,
    ):
        yield stage


def training(trained="lora", others=("badam",), **changes):
    return Training(
        memory=MemoryPlan(trained=trained),
        max_steps=1000,
        switch=Switch(when="governed", trained=others),
        **changes,
    )


def switch_of(plan, worths=SURE, peaks=(), cycles=(), limit=8e9):
    def holding_of(settings):
        name = settings.memory.trained
        step = Cost(
            flops=FLOPS[name],
            seconds=FLOPS[name] / 1e9,
            peak_memory_bytes=dict(peaks).get(name, 4e9),
        )
        return Holding(
            training=settings,
            setting=MemorySetting(),
            step=step,
            dearest=step,
            choosing_flops=0.0,
            evaluation=Cost(),
            checkpoint=Cost(),
            shape=None,
            worths=((name, worths[name]),),
            cycle_steps=dict(cycles).get(name, 1),
        )

    return MemorySwitch(holding_of, plan, limit)


def consider(
    stage, switch, now="lora", *, step=100, schedule=1000.0, budget=300.0, paid=PAID,
    resource="flops",
):  # fmt: skip
    way = next(each for each in switch.ways() if each.memory.trained == now)
    holding = switch.holding_of(way)
    left = holding.step * min(schedule, budget)
    prospect = Prospect(
        now_flops=1e12,
        left=left,
        resource=resource,
        loss_at=lambda flops: 3.0 - 0.1 * math.log(flops),
        relative_error=0.0,
        unit="nats/token",
    )
    standing = Standing(
        step=step,
        now=holding,
        measured=holding.step,
        schedule_steps=schedule,
        budget_steps=budget,
        transition=lambda other: paid,
        prospect=prospect,
    )
    found = switch.consider(standing, stage)
    decisions = [row for row in stage.ledger.decisions() if row["name"] == DECISION]
    if decisions and decisions[-1]["choice"]:
        assert replay(decisions[-1]["choice"]).chosen == decisions[-1]["choice"]["chosen"]
    return (found.training.memory.trained if found else STAY), decisions


def test_blocks_take_over_where_their_steps_are_cheaper_and_tokens_worth_as_much(stage):
    chosen, decisions = consider(stage, switch_of(training()))
    assert chosen == "badam"
    (option,) = [o for o in decisions[0]["choice"]["options"] if o["name"] == "badam 1x1 keep"]
    v = 4 / 3
    left = 300 * 4e9
    assert option["gain"]["mean"] == pytest.approx(
        0.1 * math.log((1e12 + v * left) / (1e12 + left))
    )
    assert "400 steps where there are 300, a token worth 1.00 ± 0.07" in option["note"]
    assert "states begin anew" in decisions[0]["reason"]
    assert "from 0.0002 to 2e-05" in decisions[0]["reason"]


def test_they_do_not_where_nobody_knows_what_their_tokens_are_worth(stage):
    """The priors of the methods' own files: 0.6 ± 0.15 and 0.6 ± 0.2."""
    worths = {"lora": Worth(0.6, 0.15, ""), "badam": Worth(0.6, 0.2, "")}
    assert consider(stage, switch_of(training(), worths))[0] == STAY


def test_nor_where_the_schedule_has_no_steps_for_what_they_save(stage):
    assert consider(stage, switch_of(training()), schedule=300.0)[0] == STAY
    assert consider(stage, switch_of(training()), schedule=500.0)[0] == "badam"


def test_nor_where_a_token_is_worth_less(stage):
    worths = SURE | {"badam": Worth(0.4, 0.01, "")}
    assert consider(stage, switch_of(training(), worths))[0] == STAY


def test_nor_where_warming_up_anew_takes_what_they_save(stage):
    chosen, decisions = consider(stage, switch_of(training(warmup_steps=201)))
    assert chosen == STAY  # of 400 steps a hundred go
    assert decisions[0]["choice"]["price"] > 0


@pytest.mark.parametrize(
    ("changes", "paid"),
    [
        ({"peaks": {"badam": 9e9}}, Cost(flops=1e9)),
        ({"cycles": {"badam": 401}}, Cost(flops=1e9)),
        ({}, None),
        ({}, Cost(flops=1e12)),
    ],
    ids=["does not fit", "would not come round", "cannot be paid", "is too dear"],
)
def test_nor_where_it(changes, paid, stage):
    assert consider(stage, switch_of(training(), **changes), paid=paid)[0] == STAY


def test_what_fits_is_told_by_what_was_measured(stage):
    """The way at work takes twice what was predicted of it, and so would the other."""
    switch = switch_of(training(), peaks={"lora": 2e9, "badam": 4e9})
    assert consider(stage, switch)[0] == "badam"
    switch = switch_of(training(), peaks={"lora": 2e9, "badam": 4e9})
    way = switch.holding_of(training())
    assert switch._expected(
        switch.holding_of(training("badam")), way, Cost(seconds=4.0, peak_memory_bytes=4e9)
    ).peak_memory_bytes == pytest.approx(8e9 * 1.03)


def test_the_way_back_is_weighed_alike(stage):
    """A run of blocks finds that an adapter's tokens are worth more than its steps cost more."""
    switch = switch_of(training(), SURE | {"lora": Worth(0.9, 0.03, "")})
    assert consider(stage, switch, now="badam", budget=400.0)[0] == "lora"
    switch = switch_of(training(), SURE | {"lora": Worth(0.7, 0.03, "")})
    assert consider(stage, switch, now="badam", budget=400.0)[0] == STAY


def test_a_run_goes_over_twice_at_most(stage):
    """By its ledger, which a run that resumes reads as well."""
    switch = switch_of(training())
    assert consider(stage, switch, step=100)[0] == "badam"
    better = SURE | {"lora": Worth(0.9, 0.03, "")}
    assert consider(stage, switch_of(training(), better), "badam", step=200)[0] == "lora"
    assert consider(stage, switch_of(training()), step=300) == (STAY, stage.ledger.decisions())
    # Before the second, as after a rollback, it may.
    assert consider(stage, switch_of(training()), step=150)[0] == "badam"


def test_what_was_measured_is_kept_in_a_checkpoint(stage):
    """A way that was at work counts as it was then, also after a resume."""
    switch, again = switch_of(training()), switch_of(training())
    consider(stage, switch)
    again.recall(json.loads(json.dumps(switch.remembered)))
    assert again.measured == switch.measured == {"lora 1x1 keep": switch.measured["lora 1x1 keep"]}


def test_seconds_bring_an_error_that_flops_do_not(stage):
    worths = {name: Worth(0.6, 0.0, "") for name in FLOPS}
    errors = []
    for resource in ("flops", "seconds"):
        _, decisions = consider(stage, switch_of(training(), worths), resource=resource)
        option = next(o for o in decisions[-1]["choice"]["options"] if "badam" in o["name"])
        errors.append(option["gain"]["stderr"])
    assert errors[0] == 0 < errors[1]


def test_of_equal_ways_that_which_differs_least_is_taken(stage):
    plan = training(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    _, decisions = consider(stage, switch_of(plan))
    assert decisions[0]["chosen"] == "badam 4x2 keep"
