"""Figures of laws: loss over parameters and tokens, and when scoring pays. SVG, or a page of one.

Drawn as the report's figures are. Outside of a report a figure carries the report's colours itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.core.durable import write_atomically
from thrifty.core.quantities import format_tokens
from thrifty.report.figures import INK, MUTED, PAPER, RULE, SERIES, svg
from thrifty.scaling import allocation
from thrifty.scaling.asking import knows_parameters, loss_of

LEVELS = 14
MARGIN = 2.0
"""Times what is shown of runs and answers, to each side."""


def law_figure(known: Any, facts: Mapping[str, Any] | None) -> str:
    """Contours of loss over N and D, the frontier, the runs, and an answer with its interval; the
    loss over D where the law knows nothing else."""
    if not knows_parameters(known.law):
        return _curve_figure(known, facts)
    N_range, D_range = _ranges(known, facts)
    unique = np.inf if facts is None or facts["unique"] is None else facts["unique"]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        N, D = (np.geomspace(low, high, 120) for low, high in (N_range, D_range))
        loss = known.law.loss(N[None, :], D[:, None], unique)
        levels = np.quantile(loss, np.linspace(0.02, 0.9, LEVELS))
        lines = axes.contour(N, D, loss, levels=levels, colors=MUTED, linewidths=0.8)
        axes.clabel(lines, levels[::2], fmt="%.2f", fontsize=9, colors=MUTED)
        budgets = np.geomspace(6 * N_range[0] * D_range[0], 6 * N_range[1] * D_range[1], 160)
        conditions = allocation.Conditions(unique=unique)
        best = allocation.best_for_flops(known.law, budgets, conditions)
        axes.plot(best.N, best.D, color=SERIES[1], linewidth=2, label="best for a budget")
        if known.points is not None:
            for kept, face, label in ((True, SERIES[0], "runs"), (False, PAPER, "outliers")):
                chosen = known.points.take(known.kept == kept)
                if len(chosen):
                    axes.plot(
                        chosen.N,
                        chosen.D,
                        linestyle="",
                        marker="o",
                        markersize=3.5,
                        markerfacecolor=face,
                        markeredgecolor=SERIES[0],
                        label=label,
                    )
        if facts is not None:
            _answer(axes, facts)
        axes.set_xlim(*N_range)
        axes.set_ylim(*D_range)
        _amounts(axes.set_xscale, axes.xaxis)
        _amounts(axes.set_yscale, axes.yaxis)
        axes.set_xlabel("parameters")
        axes.set_ylabel("tokens")
        figure.legend(loc="outside upper left", ncols=4, handlelength=1.2)

    return svg("law", 360, "Loss by parameters and tokens", draw)


def _amounts(set_scale: Any, axis: Any) -> None:
    """A logarithmic axis with a tick a decade, told as people write amounts."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
    axis.set_minor_formatter(NullFormatter())


def _answer(axes: Any, facts: Mapping[str, Any]) -> None:
    errors = []
    for name in ("N", "D"):
        low, high = facts["intervals"].get(name) or (None, None)
        low, high = low or facts[name], high or facts[name]
        errors.append([[max(facts[name] - low, 0.0)], [max(high - facts[name], 0.0)]])
    axes.errorbar(
        [facts["N"]],
        [facts["D"]],
        xerr=errors[0],
        yerr=errors[1],
        color=SERIES[4],
        marker="o",
        markersize=6,
        capsize=3,
        linestyle="",
        label=f"the answer: {facts['loss']:.3f}",
    )


def _ranges(known: Any, facts: Mapping[str, Any] | None) -> tuple[Any, Any]:
    found = []
    for name in ("N", "D"):
        values = [] if known.points is None else list(getattr(known.points, name))
        if facts is not None:
            values += [facts[name], *(end for end in facts["intervals"].get(name, ()) if end)]
        low, high = min(values), max(values)
        if known.points is None:  # a decade or so around the answer
            low, high = low / 30, high * 30
        found.append((low / MARGIN, high * MARGIN))
    return found[0], found[1]


def _curve_figure(known: Any, facts: Mapping[str, Any] | None) -> str:
    values = [] if known.points is None else [D for D in known.points.D if D > 0]
    values += [] if facts is None else [facts["D"]]
    D = np.geomspace(min(values) / MARGIN, max(values) * MARGIN, 200)

    unique = np.inf if facts is None or facts["unique"] is None else facts["unique"]
    if known.form == "filtered" and not np.isfinite(unique):
        unique = float(np.median(known.points.unique))

    def loss(law: Any, D: Any) -> Any:
        return loss_of(law, None, D, unique)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        if known.draws is not None:
            drawn = np.array([loss(known.draws, each) for each in D])
            low, high = np.quantile(drawn, [0.05, 0.95], axis=1)
            axes.fill_between(D, low, high, color=SERIES[1], alpha=0.22, linewidth=0)
        axes.plot(
            D, [loss(known.law, each) for each in D], color=SERIES[1], linewidth=2, label="law, 90%"
        )
        if known.points is not None:
            axes.plot(
                known.points.D,
                known.points.loss,
                "o",
                color=SERIES[0],
                markersize=3.5,
                label="runs",
            )
        if facts is not None:
            axes.plot([facts["D"]], [facts["loss"]], "o", color=SERIES[4], label="the answer")
        _amounts(axes.set_xscale, axes.xaxis)
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss")
        axes.grid(axis="y")
        axes.legend(loc="upper right")

    return svg("law", 300, "Loss by tokens", draw)


def breakeven_figure(facts: Mapping[str, Any]) -> str:
    """Gain less cost of each scorer against how much smaller its model is; 5x and 10x marked."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, scorer in enumerate(facts["scorers"]):
            gain = [np.nan if g is None else g for g in scorer["gain"]]
            colour = SERIES[i % len(SERIES)]
            style = ("-", "--", ":")[i // len(SERIES) % 3]
            axes.plot(
                facts["ratios"], gain, color=colour, linestyle=style, linewidth=1.8,
                label=scorer["name"],
            )  # fmt: skip
        axes.axhline(0.0, color=INK, linewidth=0.8)
        for mark in facts["marks"]:
            axes.axvline(mark, color=MUTED, linewidth=1, linestyle=":")
            axes.annotate(
                f" {mark:g}x", (mark, 0.02), xycoords=axes.get_xaxis_transform(), color=MUTED,
                fontsize=11,
            )  # fmt: skip
        axes.set_xscale("log")
        ticks = (1, 2, 5, 10, 20, 50, 100)
        axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("trained model's parameters over the scorer's")
        axes.set_ylabel("gain less cost, nats a token")
        axes.grid(axis="y", color=RULE)
        figure.legend(loc="outside upper left", ncols=4, handlelength=1.2)

    return svg("breakeven", 320, "Gain less cost of scoring by the scorer's size", draw)


def write_figure(path: Path, drawing: str, title: str) -> None:
    """``drawing`` as a file of its own. Raises ValueError for other endings than svg and html."""
    if path.suffix not in (".svg", ".html"):
        raise ValueError(f"{path} is neither .svg nor .html\nhint: --plot law.svg")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}\nhint: make it, or another --plot")
    if path.suffix == ".svg":
        end = drawing.index(">") + 1
        text = f"{drawing[:end]}<style>{_colours()}</style>{drawing[end:]}\n"
    else:
        text = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
            f"<style>{_colours()} body {{ background: var(--paper); margin: 2rem; }} "
            "svg { max-width: 60rem; }</style>"
            f"<h1 style='color: var(--ink); font: 20px system-ui'>{escape(title)}</h1>{drawing}\n"
        )
    write_atomically(path, text)


def _colours() -> str:
    """The page's own, light and dark: what comes before its first rule for an element."""
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    text = "text { font-family: system-ui, sans-serif; }"
    return f"{css[: css.index('* {')]} {text}"
