"""The options of ``thrifty plan``, and the request that they make."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thrifty.core.plan import Target
    from thrifty.preparation import Asked

SET_HELP = (
    "fix a plan.yaml value, once per key: training.memory.trained=lora, "
    "training.memory.trained.lora.rank=8, training.learning_rate=1e-4, selection.scorer=bm25, ..."
)


def add_to(plan: argparse.ArgumentParser) -> None:
    """To the parser of ``thrifty plan``."""
    plan.add_argument("--model", required=True, help="a transformers model folder or hub name")
    plan.add_argument("--revision", help="commit or tag of a hub model")
    plan.add_argument("--pool", nargs="+", metavar="ROWS", help="files, folders, globs or URLs")
    for part, what in (
        ("target", "rows like those the model should become good at"),
        ("dev", "rows that steer training (default: half of the target's)"),
        ("pilot-rows", "rows by which a pilot chooses (default: the dev rows)"),
        ("test", "rows looked at once, at the end"),
    ):
        plan.add_argument(f"--{part}", action="append", metavar="[NAME=]ROWS", help=what)
    plan.add_argument("--task", choices=("sft", "continued", "preference"), default="sft")
    plan.add_argument("--memory", metavar="24GiB", help="limit on the device's memory")
    plan.add_argument("--flops", metavar="3e17", help="limit on all FLOPs, scoring included")
    plan.add_argument("--hours", metavar="2", help="limit on wall-clock time")
    plan.add_argument("--dollars", metavar="20", help="limit on money")
    plan.add_argument("--tokens", metavar="20M", help="limit on tokens trained on")
    plan.add_argument("--device", metavar="h100", help="plan for this device (default: here)")
    plan.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="8",
        help="train on so many, each with all of the model (without --pool: priced, sharded over "
        "up to so many)",
    )
    plan.add_argument(
        "--using", action="append", metavar="TECHNIQUE", help="a memory technique that it must have"
    )
    plan.add_argument("--price", type=float, metavar="2.50", help="dollars an hour of the device")
    plan.add_argument(
        "--metric",
        metavar="NAME",
        help="steer by this score of generated answers instead of the dev loss: exact_match, "
        "number, or a function of yours, package.module:name",
    )
    plan.add_argument("--max-new-tokens", type=int, metavar="128", help="of a generated answer")
    plan.add_argument(
        "--serve-questions",
        type=int,
        metavar="1000",
        help="that the budget is to answer after training, by votes: it stops where samples of the "
        "answers are the better buy",
    )
    plan.add_argument(
        "--floor",
        action="append",
        metavar="[NAME=]0.05",
        help="keep no model that is worse than the base on this target by more",
    )
    plan.add_argument(
        "--guard", nargs="+", metavar="ROWS", help="rows on which the model must not get worse"
    )
    plan.add_argument(
        "--value",
        metavar="'$5 per point'",
        help="what a gain is worth: a point of a score (a hundredth), or a nat of a loss",
    )
    plan.add_argument("--scorer", help="score the pool by this method (default: the planner's)")
    plan.add_argument(
        "--pilot",
        type=float,
        metavar="0.1",
        help="find the best choice of data by short trainings in that share of the budget (0: "
        "none; default: 0.1 where the planner cannot tell and the budget carries it)",
    )
    plan.add_argument("--control", action="store_true", help="also train on a uniform choice")
    plan.add_argument(
        "--strict", action="store_true", help="refuse rows that cannot be used, not set them aside"
    )
    plan.add_argument("-o", "--output", metavar="RUN", help="the run folder to make")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--measure",
        action="store_true",
        help="build the model without weights and count, also one without a closed form",
    )
    plan.add_argument(
        "--verify", action="store_true", help="trace the chosen step, without weights or device"
    )
    plan.add_argument("--set", action="append", metavar="KEY=VALUE", help=SET_HELP)


def asked(options: argparse.Namespace) -> Asked:
    """Raises ValueError for amounts that are none, and for parts of targets that do not exist."""
    from thrifty.core import quantities
    from thrifty.core.budget import Budget
    from thrifty.core.plan import parse_override
    from thrifty.preparation import Asked

    budget = Budget(
        memory_bytes=_read(options.memory, quantities.parse_bytes),
        flops=_read(options.flops, quantities.parse_flops),
        seconds=_read(options.hours, quantities.parse_hours),
        dollars=_read(options.dollars, quantities.parse_dollars),
        tokens=_read(options.tokens, quantities.parse_tokens),
    )
    fixed = dict(parse_override(pair) for pair in options.set or ())
    if options.scorer:
        fixed["selection.scorer"] = options.scorer
    if options.pilot is not None:
        fixed["pilot.share"] = options.pilot
    fixed |= _objective(options)
    return Asked(
        model=options.model,
        revision=options.revision,
        pool=tuple(options.pool or ()),
        targets=_targets(options),
        budget=budget,
        task=options.task,
        device=options.device,
        dollars_per_hour=options.price,
        control=options.control,
        strict=options.strict,
        techniques=tuple(options.using or ()),
        num_devices=options.devices,
        fixed=fixed,
    )


def _read(text: str | None, parse: Any) -> float | None:
    return None if text is None else parse(text)


def _targets(options: argparse.Namespace) -> dict[str, Target]:
    """``--target [NAME=]ROWS``, with ``--dev`` and the others of the same name beside it."""
    from thrifty.core.plan import Target

    parts: dict[str, dict[str, list[str]]] = {}
    for part, given in (
        ("signal", options.target),
        ("dev", options.dev),
        ("pilot", options.pilot_rows),
        ("test", options.test),
    ):
        for text in given or ():
            name, sign, path = text.partition("=")
            if not sign:
                name, path = "target", text
            parts.setdefault(name, {}).setdefault(part, []).append(path)
    for name, found in parts.items():
        if "signal" not in found:
            raise ValueError(
                f"--dev, --pilot-rows or --test name {name!r}, but no --target does\n"
                f"hint: --target {name}=ROWS gives the rows that show what is wanted"
            )
    floors = _floors(options, parts)
    return {
        name: Target(
            signal=tuple(found["signal"]),
            dev=tuple(found.get("dev", ())),
            pilot=tuple(found.get("pilot", ())),
            test=tuple(found.get("test", ())),
            floor=floors.get(name),
        )
        for name, found in parts.items()
    }


def _floors(options: argparse.Namespace, targets: Collection[str]) -> dict[str, float]:
    """``--floor [NAME=]0.05``."""
    from thrifty.core.typed import nearest

    floors = {}
    for text in options.floor or ():
        name, sign, amount = text.rpartition("=")
        name = name if sign else "target"
        if name not in targets:
            raise ValueError(
                f"--floor names {name!r}, and there is no such target\n"
                f"hint: {nearest(name, targets)}"
            )
        try:
            floors[name] = float(amount)
        except ValueError:
            raise ValueError(
                f"cannot read --floor {text!r}\nhint: --floor {name}=0.05, in the objective's unit"
            ) from None
    return floors


def _objective(options: argparse.Namespace) -> dict[str, Any]:
    """The keys of plan.yaml that say what the run is for."""
    fixed: dict[str, Any] = {}
    if metric := options.metric:
        own = ":" in metric  # a function of the user's
        fixed["objective.metric"] = {"callable": {"function": metric}} if own else metric
    if options.max_new_tokens is not None:
        fixed["objective.max_new_tokens"] = options.max_new_tokens
    if options.serve_questions is not None:
        fixed["objective.serving.questions"] = options.serve_questions
    if options.guard:
        fixed["guard.sources"] = list(options.guard)
    if options.value:
        fixed["objective.dollars_per_unit"] = _value(options.value, bool(options.metric))
    return fixed


def _value(text: str, scored: bool) -> float:
    """``$5 per point`` of a score, ``$5 per nat`` of a loss -> dollars a unit of the objective."""
    from thrifty.core.quantities import parse_dollars

    amount, _, per = text.partition(" per ")
    wanted, size = ("point", 0.01) if scored else ("nat", 1.0)
    if per.strip() != wanted or not amount:
        raise ValueError(
            f"cannot read --value {text!r}: a gain here is counted in {wanted}s\n"
            f"hint: --value '$5 per {wanted}'"
        )
    return parse_dollars(amount) / size
