"""What ``thrifty law`` prints for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thrifty.core.quantities import format_flops, format_tokens, short
from thrifty.display import table

Format = Callable[[float], str]


def number(value: float) -> str:
    return f"{value:,.4g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"


def loss(value: float) -> str:
    return f"{value:.4f}"


FORMATS: dict[str, Format] = {
    "flops": format_flops,
    "N": format_tokens,
    "D": format_tokens,
    "loss": loss,
    "price": lambda value: f"{value:.3g}",
    "slope": lambda value: f"{value:.3g}",
    "epochs": lambda value: f"{value:.3g}",
}


def between(ends: Sequence[float | None] | None, form: Format) -> str:
    """``(2.4 B to 3.2 B)``; empty where nothing is known."""
    if not ends:
        return ""
    low, high = ("no bound" if end is None else form(end) for end in ends)
    return f"({low} to {high})" if low != high else ""


def fit_text(facts: Mapping[str, Any], output: str | None) -> str:
    intervals = facts["intervals"]
    names = [
        name
        for name in ("E", "A", "B", "alpha", "beta", "R_D", "R_N", "D_l", "b", "tau")
        if name in facts
    ]
    rows = [(name, number(facts[name]), between(intervals.get(name), number)) for name in names]
    lines = [
        facts["source"],
        f"{facts['num_points']} runs, {len(facts['outliers'])} outliers, "
        f"objective {facts['objective']:.6g}",
        "",
        table(("number", "fit", "90% of the bootstrap" * bool(intervals)), rows, right="lr"),
    ]
    if facts["outliers"]:
        shown = [
            (
                str(o["line"]),
                *(_amount(o[k]) for k in ("N", "D")),
                loss(o["loss"]),
                loss(o["predicted"]),
            )
            for o in facts["outliers"]
        ]
        heads = ("line", "N", "D", "loss", "of the law")
        lines += ["", "outliers, left out:", table(heads, shown, right="rrrrr")]
    if facts.get("decisions"):
        ends = ", with 90% intervals" if intervals else ""
        lines += [
            "",
            f"what that says of budgets{ends}:",
            _decisions(facts["decisions"]),
        ]
    return "\n".join([*lines, *_notes(facts), *([f"\nwritten to {output}"] if output else [])])


def _decisions(found: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for each in found:
        cells = [format_flops(each["flops"])]
        for name in ("N", "D", "loss", "price"):
            ends = between(each["intervals"].get(name), FORMATS[name])
            cells.append(f"{FORMATS[name](each[name])} {ends}".rstrip())
        rows.append(cells)
    heads = ("budget", "parameters", "tokens", "loss", "price, nats a FLOP")
    return table(heads, rows, right="r")


def predict_text(facts: Mapping[str, Any]) -> str:
    intervals = facts["intervals"]
    what = f"{format_tokens(facts['D'])} tokens"
    if facts["N"] is not None:
        what = f"{format_tokens(facts['N'])} parameters on {what}"
    lines = [
        facts["law"]["source"],
        f"loss {loss(facts['loss'])} {between(intervals.get('loss'), loss)}".rstrip() + f": {what}",
    ]
    if facts["price"] is not None:
        best = facts["best"]
        ratio = facts["slope"] / facts["price"]
        lines += [
            f"its {format_flops(facts['flops'])} reach {loss(best['loss'])} with "
            f"{format_tokens(best['N'])} parameters on {format_tokens(best['D'])} tokens",
            f"a FLOP more brings this run {facts['slope']:.3g} nats, {short(ratio)} of what one is "
            f"worth where N and D are free ({facts['price']:.3g})",
        ]
    return "\n".join([*lines, *_notes(facts)])


def allocate_text(facts: Mapping[str, Any]) -> str:
    rows = []
    words = {
        "flops": "budget",
        "N": "parameters",
        "D": "tokens",
        "loss": "loss, nats a token",
        "price": "price, nats a FLOP",
    }
    if facts["unique"] is not None:
        words["epochs"] = f"epochs of {format_tokens(facts['unique'])} tokens"
    for name, word in words.items():
        ends = between(facts["intervals"].get(name), FORMATS[name])
        rows.append((word, FORMATS[name](facts[name]), ends))
    if facts["served"]:
        rows += [
            (f"of it {name}", format_flops(facts["flops_of"][name]), "")
            for name in ("training", "serving")
        ]
    if facts["epochs"] > 1:
        worth = f"{100 * facts['last_epoch_worth']:.0f}%"
        rows.append(("a token of the last epoch", worth, "of a fresh one"))
    heads = ("", "best", "90%" if facts["intervals"] else "")
    return "\n".join([facts["law"]["source"], table(heads, rows, right="lr"), *_notes(facts)])


def breakeven_text(facts: Mapping[str, Any]) -> str:
    model, scorers = facts["model"], facts["scorers"]
    rows = []
    for i, ratio in enumerate(facts["ratios"]):
        nearest = [min(facts["ratios"], key=lambda r: abs(r - mark)) for mark in facts["marks"]]
        cells = [
            f"{'> ' * (ratio in nearest)}{ratio:.3g}x",
            format_tokens(facts["scorer_parameters"][i]),
        ]
        for scorer in scorers:
            share, gain = scorer["share_of_budget"][i], scorer["gain"][i]
            cells.append("over budget" if gain is None else f"{gain:+.4f} ({share:.0%})")
        rows.append(cells)
    heads = ("smaller by", "scorer's model", *(scorer["name"] for scorer in scorers))
    pays = [
        f"{s['name']} ({s['cost_class']}) pays from {s['breakeven']:.3g}x on"
        if s["breakeven"] is not None
        else f"{s['name']} ({s['cost_class']}) does not pay"
        for s in scorers
    ]
    return "\n".join(
        [
            f"{model['name']}, {format_tokens(model['num_parameters'])} parameters, on "
            f"{format_flops(facts['flops'])}; "
            f"a pool of {format_tokens(facts['pool_tokens'])} tokens",
            "gain over a uniform choice at equal FLOPs, nats a token by the prior; in brackets "
            "what scoring takes of the budget:",
            table(heads, rows, right="rr" + "r" * len(scorers)),
            *pays,
            ">: forward scores are said to pay from 5x, gradients from 10x on (arXiv:2410.16208)",
            *_notes(facts),
        ]
    )


def _amount(value: float | None) -> str:
    return "-" if value is None else format_tokens(value)


def _notes(facts: Mapping[str, Any]) -> list[str]:
    return [f"note: {note}" for note in facts.get("notes", ())]
