"""The ways to hold the steps of a run, priced, and who goes over from one to another."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from thrifty.core.budget import Cost
from thrifty.core.plan import Plan, Training
from thrifty.core.plan_switch import others_trained, trained_as
from thrifty.core.resolve import name_of
from thrifty.costs.flops import dearest_step_flops, step_flops
from thrifty.costs.setting import MemorySetting
from thrifty.held import worths_of
from thrifty.memory_plan import Techniques
from thrifty.memory_switch import Holding, MemorySwitch
from thrifty.open_run import Work
from thrifty.predictions import setting_of
from thrifty.priors import load_priors
from thrifty.training_phase import turning_cost


def memory_switch_of(work: Work, plan: Plan) -> MemorySwitch | None:
    """None: the steps are held as planned."""
    if plan.training.switch.when == "never":
        return None
    limit = plan.budget.memory_bytes or work.device.memory_bytes
    return MemorySwitch(partial(_holding, work, plan), plan.training, limit)


def _holding(work: Work, plan: Plan, settings: Training) -> Holding:
    """A way to hold the plan's steps. Raises ValueError where techniques refuse one another."""
    plan = replace(plan, training=settings)
    costs, techniques = work.predicted(plan), Techniques.of(settings.memory)
    parts = techniques.in_order
    return Holding(
        training=settings,
        setting=setting_of(settings, work.shape, work.device),
        step=costs.step,
        dearest=dearest_step(work, plan, costs.step),
        choosing_flops=choosing_flops(work, plan),
        evaluation=costs.evaluation,
        checkpoint=costs.checkpoint,
        shape=work.yardstick(plan).shape,
        worths=tuple(zip(map(name_of, parts), worths_of(parts, load_priors()), strict=True)),
        cycle_steps=techniques.trained.cycle_steps(work.shape),
    )


def choosing_flops(work: Work, plan: Plan) -> float:
    """Of a micro-batch, those that the online method adds to it."""
    plain = replace(plan, training=replace(plan.training, online=Training().online))
    more = work.predicted(plan).step.flops - work.predicted(plain).step.flops
    return more / plan.training.gradient_accumulation_steps


def settings_of_others(work: Work, training: Training) -> list[MemorySetting]:
    """How the steps are held where something else is trained on the way."""
    others = (trained_as(training, each) for each in others_trained(training))
    return [setting_of(each, work.shape, work.device) for each in others]


def last_merge(work: Work, plan: Plan) -> Cost:
    """Of merging the adapter that a run may end with: on weights of its own, which nobody has."""
    others = settings_of_others(work, plan.training)
    if not others:
        return Cost()
    ends = [setting_of(plan.training, work.shape, work.device), *others]
    load = work.predicted(plan).load
    return max((turning_cost(work.shape, each, load) for each in ends), key=lambda cost: cost.flops)


def dearest_step(work: Work, plan: Plan, step: Cost) -> Cost:
    """No step may take more: where what is trained changes, or how long its rows are, ``step`` is
    their mean."""
    setting = setting_of(plan.training, work.shape, work.device)
    if plan.training.preference is not None:
        times = plan.training.gradient_accumulation_steps
        flops = dearest_step_flops(work.shape, setting) * times
        return replace(step, flops=flops, tokens=float(setting.tokens * times))
    dearer = dearest_step_flops(work.shape, setting) / step_flops(work.shape, setting)
    return replace(step, flops=step.flops * dearer)
