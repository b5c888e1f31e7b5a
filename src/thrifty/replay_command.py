"""The options of ``thrifty replay``, and what it answers."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any


def add_to(command: argparse.ArgumentParser) -> None:
    """To the parser of ``thrifty replay``."""
    command.add_argument(
        "samples", nargs="+", metavar="SAMPLES", help="recorded samples, JSON lines (.gz too)"
    )
    command.add_argument(
        "--policy",
        default="marginal",
        metavar="NAME",
        help="how to draw, a name or {name: {option: value}}; `thrifty methods` lists them",
    )
    command.add_argument(
        "--samples", dest="mean_samples", type=float, metavar="3", help="a question, on average"
    )
    command.add_argument("--tokens", metavar="1M", help="for all questions together")
    command.add_argument(
        "--price", type=float, default=0.0, help="right answers that a sample must bring"
    )
    command.add_argument(
        "--cost", action="append", metavar="MODEL=COST", help="of a sample of each of the models"
    )
    command.add_argument(
        "--fit", type=float, default=0.0, metavar="0.5", help="share to fit on; told of the rest"
    )
    command.add_argument(
        "--orders", type=int, default=1, help="drawn anew so often (1: as they were recorded)"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="print JSON")


def answer(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The facts and the text. Raises ValueError where the samples or the options are wrong."""
    from thrifty.core.quantities import parse_tokens
    from thrifty.core.resolve import name_of
    from thrifty.policies import policy_named
    from thrifty.recordings import read_outcomes
    from thrifty.replay import Recording, facts_of, means_of, replay

    policy = policy_named(options.policy)
    recording = Recording.of(read_outcomes(options.samples))
    fitted_on, recording = _split(recording, options.fit, options.seed)
    prices = dict(_cost(text, recording.models) for text in options.cost or ())
    resource, left = "samples", float("inf")
    if options.mean_samples is not None and options.tokens is not None:
        raise ValueError("one of --samples and --tokens, not both\nhint: --samples 3")
    if options.mean_samples is not None:
        if not 0 < options.mean_samples < float("inf"):
            raise ValueError("--samples is a mean of more than 0\nhint: --samples 3")
        left = options.mean_samples * len(recording.questions)
    if options.tokens is not None:
        if not all(outcome.costs for outcome in recording.outcomes):
            raise ValueError("no tokens were recorded to be limited\nhint: --samples 3")
        resource, left = "tokens", parse_tokens(options.tokens)
    if not 0 <= options.price < float("inf"):
        raise ValueError("--price is at least 0\nhint: 0.01 right answers a sample")
    _check_told(policy, recording)
    means = means_of(recording, prices=prices, resource=resource, left=left, price=options.price)
    if fitted_on is not None:
        means = replace(means, learnt=policy.fit(fitted_on.outcomes, means))
    orders = [None] if options.orders == 1 else [options.seed + i for i in range(options.orders)]
    if not orders:
        raise ValueError("--orders is at least 1\nhint: --orders 10")
    replayed = replay(policy, recording, means, orders=orders)
    facts = {
        "policy": name_of(policy),
        "num_fitted_on": len(fitted_on.questions) if fitted_on else 0,
        **facts_of(recording, means, replayed, orders),
    }
    return facts, _text(facts)


def _split(recording: Any, share: float, seed: int) -> tuple[Any, Any]:
    if not 0 <= share < 1:
        raise ValueError("--fit is a share of the questions, less than 1\nhint: --fit 0.5")
    if not share:
        return None, recording
    fitted_on, rest = recording.split(share, seed)
    if not fitted_on.questions or not rest.questions:
        raise ValueError("too few questions to fit on a part of them\nhint: leave --fit out")
    return fitted_on, rest


def _check_told(policy: Any, recording: Any) -> None:
    """Whether what was recorded tells what the policy goes by."""
    from thrifty.core.resolve import name_of

    if policy.needs == "thoughts":
        raise ValueError(
            f"{name_of(policy)} continues texts, and a recording has nobody to do it\n"
            "hint: thrifty decode --policy, on a model"
        )
    if policy.needs == "rewards" and not any(outcome.rewards for outcome in recording.outcomes):
        raise ValueError(
            f"{name_of(policy)} goes by rewards, and none were recorded\n"
            'hint: "rewards": [0.3, 0.8, ...], one of each answer, on the lines'
        )


def _cost(text: str, models: tuple[str, ...]) -> tuple[str, float]:
    from thrifty.core.typed import nearest

    model, sign, cost = text.rpartition("=")
    if not sign or model not in models:
        raise ValueError(f"--cost {text!r} names no model\nhint: {nearest(model or text, models)}")
    try:
        value = float(cost)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"--cost {text!r} is no cost\nhint: --cost {model}=1.5")
    return model, value


def _text(facts: dict[str, Any]) -> str:
    from thrifty.display import table

    low, high = facts["interval"]
    lines = [
        f"{facts['policy']}: accuracy {facts['accuracy']:.4f} (95%: {low:.4f} to {high:.4f}) with "
        f"{facts['mean_samples']:.2f} samples and {facts['mean_tokens']:.0f} tokens a question, "
        f"of {facts['num_questions']} questions"
    ]
    if facts["num_orders"] > 1:
        lines[0] += f", {facts['num_orders']} orders"
    ends = ", ".join(f"{share:.1%} {kind}" for kind, share in facts["ended"].items())
    lines.append(f"{ends}; {facts['unreadable_share']:.1%} of the samples could not be read")
    rows = [
        [
            number,
            f"{beside['accuracy']:.4f}",
            f"{beside['ahead_by']:+.4f}",
            "{:+.4f} to {:+.4f}".format(*beside["ahead_by_interval"]),
        ]
        for number, beside in facts["fixed"].items()
    ]
    headers = ["samples", "vote", f"{facts['policy']} ahead by", "95%"]
    lines += ["", f"a vote over a fixed number of samples of {facts['fixed_model']}:"]
    return "\n".join([*lines, table(headers, rows, right="0123")])
