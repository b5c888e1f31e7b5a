"""What a plan's values say against one another, each with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.plan_freeze import wrong_freeze
from thrifty.core.plan_pilot import wrong_pilot
from thrifty.core.plan_refresh import wrong_refresh
from thrifty.core.plan_serving import wrong_serving
from thrifty.core.plan_switch import wrong_switch
from thrifty.core.resolve import name_of, resolve

if TYPE_CHECKING:
    from thrifty.core.plan import Plan, Preference


def contradictions(plan: Plan) -> Iterator[str]:
    """What types cannot say."""
    training = plan.training
    positive = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "devices",
        "max_length",
        "max_steps",
        "epochs",
        "learning_rate",
        "eval_steps",
        "save_steps",
    )
    for name in positive:
        if not getattr(training, name) > 0:
            yield f"training.{name} must be more than zero, not {getattr(training, name)}"
    for name in ("warmup_steps", "cooldown_steps", "weight_decay", "max_grad_norm", "rewinds"):
        if getattr(training, name) < 0:
            yield f"training.{name} cannot be negative"
    if not 0 <= plan.pool.most_masked <= 1:
        yield f"pool.most_masked is a share, between 0 and 1, not {plan.pool.most_masked}"
    if training.warmup_steps + training.cooldown_steps > training.max_steps:
        yield (
            f"training.warmup_steps {training.warmup_steps} + cooldown_steps "
            f"{training.cooldown_steps} do not fit in max_steps {training.max_steps}"
        )
    if training.eval_steps > 0 and training.save_steps % training.eval_steps:
        yield (
            f"training.save_steps {training.save_steps} is not a multiple of eval_steps "
            f"{training.eval_steps}: a checkpoint carries its evaluation"
        )
    if not 0 <= training.replay_share < 1:
        yield f"training.replay_share must be in [0, 1), not {training.replay_share}"
    if training.replay_share and (plan.task != "continued" or not training.replay):
        yield "training.replay_share needs task: continued and training.replay with its sources"
    if training.devices > 1:
        yield from _not_on_several(plan)
    yield from wrong_refresh(plan)
    yield from wrong_freeze(plan)
    yield from wrong_switch(plan)
    if training.preference is not None:
        yield from _wrong_on_pairs(plan, training.preference)
    for kind in MEMORY_KINDS:
        if not resolve(kind, spec := getattr(training.memory, kind)).runs:
            yield f"training.memory.{kind}: {spec} is priced, but a run cannot train with it yet"
    for section, seed in (("training", training.seed), ("selection", plan.selection.seed)):
        if not 0 <= seed < 2**32:
            yield f"{section}.seed must be in [0, 2^32), not {seed}"
    quotas = plan.selection.quotas
    if quotas and not plan.selection.groups:
        yield "selection.quotas needs selection.groups, the column that they are about"
    if quotas and plan.selection.max_tokens is None:
        yield "selection.quotas are shares of selection.max_tokens, which is not set"
    if any(not 0 <= share <= 1 for share in quotas.values()) or sum(quotas.values()) > 1 + 1e-9:
        yield f"selection.quotas must be shares in [0, 1] of together at most 1, not {dict(quotas)}"
    yield from wrong_pilot(plan.pilot)
    if not plan.model.path:
        yield "model.path is empty"
    if not plan.pool.sources:
        yield "pool.sources is empty"
    yield from _wrong_with_objective(plan)
    yield from wrong_serving(plan)
    if len({bool(target.pilot) for target in plan.targets.values()}) > 1:
        yield "targets: either all have pilot rows or none"
    for name, target in plan.targets.items():
        if not target.weight > 0:
            yield f"targets.{name}.weight must be more than zero, not {target.weight}"
        if not target.signal:
            yield f"targets.{name}.signal is empty"
    scorer = resolve("scorer", plan.selection.scorer)
    if scorer.needs_target and not plan.targets:
        yield f"selection.scorer {name_of(scorer)} needs a target: add one, or use uniform"
    if plan.task not in scorer.tasks:
        fits = "try uniform or length"
        yield f"selection.scorer {name_of(scorer)} makes no sense for task {plan.task}: {fits}"


def _wrong_with_objective(plan: Plan) -> Iterator[str]:
    if plan.objective.answers and plan.task != "sft":
        yield (
            f"objective.metric {plan.objective.unit} asks for answers to prompts, which rows of "
            f"task {plan.task} do not have: use task sft, or dev_loss"
        )
    if plan.objective.answers and not plan.targets:
        yield (
            f"objective.metric {plan.objective.unit} needs a target, whose dev rows are answered"
        )
    if plan.objective.answers and plan.objective.answers.asks_own and len(plan.targets) > 1:
        yield f"objective.metric {plan.objective.unit} has questions of its own, for one target"
    own = plan.objective.answers is not None and plan.objective.answers.asks_own
    if own and any(target.pilot for target in plan.targets.values()):
        yield "targets: a pilot goes by the metric's own questions, not by pilot rows"
    for name, floor in plan.floors.items():
        if not floor >= 0:
            yield f"targets.{name}.floor must be at least 0, not {floor}"
    if plan.guard is None:
        return
    if plan.task == "preference":
        yield "guard: rows of task preference are pairs; floors of targets guard those"
    if not plan.guard.sources:
        yield "guard.sources is empty"
    if not plan.guard.max_worse >= 0:
        yield f"guard.max_worse must be at least 0, not {plan.guard.max_worse}"


def _not_on_several(plan: Plan) -> Iterator[str]:
    """What a run on several devices cannot do."""
    training = plan.training
    online = resolve("online", training.online)
    if training.is_cut:
        yield from _wrong_where_cut(plan)
    if plan.task == "preference":
        yield "training.devices: training on preferences uses one device"
    if online.watches or online.weighs_tokens or online.renewals or online.chooses:
        yield (
            f"training.devices: training.online {name_of(online)} looks at the losses or gradients "
            "of all that is trained on, and each device sees its own alone"
        )


def _wrong_where_cut(plan: Plan) -> Iterator[str]:
    """What a run cannot do whose weights are cut over its devices."""
    for kind in MEMORY_KINDS:
        if not resolve(kind, spec := getattr(plan.training.memory, kind)).shards:
            yield (
                f"training.memory.{kind}: {spec} cannot be cut over devices in a run "
                "(training.parallel: fsdp); ddp holds everything on each"
            )
    if plan.objective.answers:
        yield "training.parallel: fsdp generates no answers, which objective.metric asks for"
    if plan.training.grad_freeze is not None:
        yield "training.parallel: fsdp cuts the gradients that training.grad_freeze looks at"


def _wrong_on_pairs(plan: Plan, preference: Preference) -> Iterator[str]:
    if plan.task != "preference":
        yield f"training.preference needs task: preference, not {plan.task}"
        return
    if not preference.beta > 0:
        yield f"training.preference.beta must be more than zero, not {preference.beta}"
    online = resolve("online", spec := plan.training.online)
    if online.chooses or online.watches or online.weighs_tokens or online.cost_class != "free":
        yield f"training.online: {spec} looks at the losses of rows, which pairs have two of"
    looking = [("filters", "filter", each) for each in plan.selection.filters]
    looking.append(("picker", "picker", plan.selection.picker))
    for field_name, kind, method in looking:
        if resolve(kind, method).needs_vectors:
            yield f"selection.{field_name}: {method} takes a vector of each row, and a pair has two"
