"""The report's figures: inline SVG that follows the page's colours; same run, same bytes.

Drawn with matplotlib in placeholder colours that become CSS variables, so that one drawing serves
light, dark and paper. Text stays text in the page's font. Names from a run are drawn as plain
ASCII: a font may lack the rest, and the tables have it all.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from thrifty.core.budget import CONSUMED
from thrifty.data.inert import visible
from thrifty.report.words import NAMES, own_name, own_number

WIDTH = 470
"""Of a figure, in its own units; text is 12 of them high."""
BAND = 1.96
"""Standard errors of the forecast band: 95%."""

INK, MUTED, RULE, PAPER = "#111111", "#777777", "#dddddd", "#fefefe"
SERIES = ("#aa0001", "#aa0002", "#aa0003", "#aa0004", "#aa0005")
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    **{colour: f"series-{i + 1}" for i, colour in enumerate(SERIES)},
}
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.framealpha": 1.0,
    "legend.facecolor": PAPER,
    "legend.edgecolor": PAPER,
    "legend.fancybox": False,
    "legend.fontsize": 11,
}
_BARS: dict[str, Any] = {"marker": "o", "markersize": 3.5, "capsize": 2.5}
_SCALES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))


def loss_figure(summary: Mapping[str, Any]) -> str:
    """Dev loss against FLOPs with error bars, the forecast band and the start of the cool-down."""
    history = _known(summary["evaluations"])
    if not history:
        return ""
    control = _known((summary["control"] or {}).get("evaluations") or [])
    forecasts = _forecasts(summary["decisions"])
    unit = visible(summary["objective"]["unit"], 20)
    scale, prefix = _scale(max(e["flops"] for e in [*history, *control]))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        if forecasts:
            x = [f["flops"] / scale for f in forecasts]
            y = [own_number(f["loss"], summary) for f in forecasts]
            margin = [BAND * f["loss_stderr"] for f in forecasts]
            low, high = ([b + s * m for b, m in zip(y, margin, strict=True)] for s in (-1, 1))
            axes.fill_between(x, low, high, color=SERIES[1], alpha=0.22, linewidth=0)
            axes.errorbar(
                x, y, yerr=margin, color=SERIES[1], elinewidth=1, label="forecast, 95%", **_BARS
            )
        end = _end_of(forecasts[-1]) if forecasts else None
        if end is not None:
            axes.errorbar(
                [end[0] / scale],
                [own_number(end[1], summary)],
                yerr=[BAND * end[2]],
                color=SERIES[2],
                linewidth=1,
                label="its end as last forecast, 95%",
                **{**_BARS, "marker": "D"},
            )
        if control:
            axes.plot(
                [e["flops"] / scale for e in control],
                [own_number(e["loss"], summary) for e in control],
                color=MUTED,
                linestyle="--",
                linewidth=1.4,
                label="control (uniform)",
            )
        axes.errorbar(
            [e["flops"] / scale for e in history],
            [own_number(e["loss"], summary) for e in history],
            # The first error is of the loss itself, the others of the change: not one kind of bar.
            yerr=[0.0, *((e["stderr"] or 0.0) for e in history[1:])],
            color=SERIES[0],
            linewidth=1.6,
            label="this run, measured",
            **_BARS,
        )
        losses = [own_number(e["loss"], summary) for e in [*history, *control]]
        room = 0.12 * (max(losses) - min(losses)) or 0.05
        axes.set_ylim(min(losses) - room, max(losses) + 1.6 * room)
        if summary["cooldown"]:
            at = summary["cooldown"]["flops"] / scale
            axes.axvline(at, color=MUTED, linewidth=1, linestyle=":")
            axes.annotate(
                "cool-down ",
                (at, 0.02),
                xycoords=axes.get_xaxis_transform(),
                ha="right",
                color=MUTED,
                fontsize=11,
            )
        axes.set_xlabel(f"{prefix}FLOP spent, scoring included")
        scored = summary["objective"]["more_is_better"]
        named = f"dev {_ascii(own_name(summary))}"
        axes.set_ylabel(named if scored else f"{named}, {_ascii(unit)}")
        axes.grid(axis="y")
        handles, labels = axes.get_legend_handles_labels()
        where = "lower right" if scored else "upper right"
        axes.legend(handles[::-1], labels[::-1], loc=where)

    return svg("loss", 300, f"Dev {_ascii(own_name(summary))} against FLOPs spent", draw)


def budget_figure(summary: Mapping[str, Any]) -> str:
    """Of each limit, the share that each stage took, lost work apart; a tick where it was
    predicted to end."""
    limited = [
        k
        for k in (*CONSUMED, "peak_memory_bytes")
        if summary["budget"][k] is not None and summary["spent"][k] is not None
    ]
    stages = [s for s in summary["stages"] if s["account"] == "budget" and s["state"] != "planned"]
    if not limited or not stages:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for row, resource in enumerate(reversed(limited)):
            limit = summary["budget"][resource]
            axes.barh(row, 100, color=RULE, height=0.52, alpha=0.6, linewidth=0)
            if resource in CONSUMED:
                _stack(axes, row, stages, resource, limit)
            else:
                axes.barh(row, 100 * summary["spent"][resource] / limit, color=MUTED, height=0.52)
            share = 100 * summary["spent"][resource] / limit
            axes.text(101.5, row, f"{share:.0f}%", va="center", color=INK)
            predicted = summary["predicted"][resource]
            if predicted:
                at = min(100 * predicted / limit, 103)
                axes.plot([at, at], [row - 0.38, row + 0.38], color=INK, linewidth=1.6)
        axes.set_yticks(range(len(limited)), [NAMES[k] for k in reversed(limited)])
        axes.set_xlim(0, 110)
        axes.set_ylim(-0.6, len(limited) - 0.4)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100% of the limit"])
        axes.tick_params(length=0, colors=MUTED)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        _legend(figure, stages, any((s["lost"]["seconds"] or 0) > 0 for s in stages))

    return svg("budget", 80 + 40 * len(limited), "Budget used by stage", draw)


def _stack(axes: Any, row: int, stages: Sequence[Any], resource: str, limit: float) -> None:
    left = 0.0
    for i, stage in enumerate(stages):
        measured, lost = stage["measured"][resource] or 0.0, stage["lost"][resource] or 0.0
        colour = SERIES[i % (len(SERIES) - 1)]
        for part, shade in ((measured - lost, colour), (lost, SERIES[-1])):
            width = 100 * part / limit
            if width > 0:
                axes.barh(row, width, left=left, color=shade, height=0.52, linewidth=0)
                left += width


def _legend(figure: Any, stages: Sequence[Any], lost: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = stages[: len(SERIES) - 1]
    keys: list[Any] = [Patch(color=SERIES[i], label=_ascii(s["name"])) for i, s in enumerate(shown)]
    if lost:
        keys.append(Patch(color=SERIES[-1], label="lost work"))
    keys.append(Line2D([], [], color=INK, linewidth=1.6, label="predicted"))
    figure.legend(handles=keys, loc="outside upper left", ncols=5, handlelength=1.0)


def predicted_figure(summary: Mapping[str, Any]) -> str:
    """Each stage measured (bar) against predicted (tick), one panel a resource."""
    stages = [
        s
        for s in summary["stages"]
        if s["account"] == "budget"
        and s["state"] != "planned"
        and s["predicted"]["flops"] is not None
    ]
    resources = [
        k
        for k in ("flops", "seconds", "peak_memory_bytes")
        if any((s["measured"][k] or 0) > 0 and (s["predicted"][k] or 0) > 0 for s in stages)
    ]
    if not resources:
        return ""

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(resources), sharey=True, squeeze=False)[0]
        for axes, resource in zip(panels, resources, strict=True):
            rows = range(len(stages))
            measured = [s["measured"][resource] or 0.0 for s in reversed(stages)]
            predicted = [s["predicted"][resource] or 0.0 for s in reversed(stages)]
            size, unit = _unit(resource, max(*measured, *predicted))
            measured = [value / size for value in measured]
            predicted = [value / size for value in predicted]
            most = max(*measured, *predicted)
            axes.barh(rows, measured, color=SERIES[0], height=0.46, linewidth=0)
            for row, value in zip(rows, predicted, strict=True):
                if value:
                    axes.plot([value, value], [row - 0.36, row + 0.36], color=INK, linewidth=1.6)
            axes.set_xlim(0, 1.05 * most)
            axes.locator_params(axis="x", nbins=4, min_n_ticks=3)
            axes.grid(axis="x")
            axes.set_axisbelow(True)
            axes.set_title(f"{NAMES[resource]}, {unit}", fontsize=12, loc="left", color=INK)
            axes.set_yticks(rows, [_ascii(s["name"]) for s in reversed(stages)])
            axes.set_ylim(-0.6, len(stages) - 0.4)
            axes.tick_params(length=0)
            axes.spines["bottom"].set_color(RULE)

    return svg("predicted", 62 + 34 * len(stages), "Measured against predicted by stage", draw)


def _unit(resource: str, most: float) -> tuple[float, str]:
    """The unit in which ``most`` is no long number, and its size."""
    if resource == "flops":
        size, prefix = _scale(most)
        return size, f"{prefix}FLOP"
    units = {
        "seconds": ((3600.0, "h"), (60.0, "min"), (1.0, "s")),
        "peak_memory_bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")),
    }[resource]
    return next((unit for unit in units if most >= 2 * unit[0]), units[-1])


def histogram_figure(histogram: Any, number: int = 0) -> str:
    """Scores of all candidates and of the selected rows; nothing where the counts make no sense."""
    edges, everyone, chosen = _histogram(histogram)
    if not edges:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.stairs(everyone, edges, fill=True, color=MUTED, alpha=0.35, label="all candidates")
        axes.stairs(chosen, edges, fill=True, color=SERIES[0], alpha=0.85, label="selected")
        axes.set_xlabel("score (higher: keep)")
        axes.set_ylabel("rows")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.0)

    return svg(f"histogram {number}", 220, "Scores of all and of the selected rows", draw)


def _histogram(value: Any) -> tuple[list[float], list[float], list[float]]:
    nothing: tuple[list[float], list[float], list[float]] = ([], [], [])
    if not isinstance(value, Mapping):
        return nothing
    found = []
    for key in ("edges", "all", "selected"):
        numbers = value.get(key)
        if not isinstance(numbers, list) or not all(_finite(n) for n in numbers):
            return nothing
        found.append([float(n) for n in numbers])
    edges, everyone, chosen = found
    increasing = all(a < b for a, b in pairwise(edges))
    fits = 2 <= len(edges) <= 1000 and len(everyone) == len(chosen) == len(edges) - 1
    return (edges, everyone, chosen) if increasing and fits else nothing


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < 1e300


def _known(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [e for e in evaluations if e["loss"] is not None and e["flops"] is not None]


def forecast_of(decision: Mapping[str, Any]) -> dict[str, float] | None:
    """The forecast that ``decision`` rested on, where it made a whole one."""
    detail = decision["detail"]
    found = detail.get("forecast") if isinstance(detail, Mapping) else None
    keys = ("flops", "loss", "loss_stderr", "gain", "gain_stderr")
    if not isinstance(found, Mapping) or not all(_finite(found.get(key)) for key in keys):
        return None
    also = ("final", "final_stderr", "final_flops", "wrong")
    return {key: found[key] for key in (*keys, *(k for k in also if _finite(found.get(k))))}


def _end_of(forecast: Mapping[str, float]) -> tuple[float, float, float] | None:
    """FLOPs, loss and its error where the run would end if it were let down then."""
    if not all(key in forecast for key in ("final", "final_stderr", "final_flops")):
        return None
    return forecast["final_flops"], forecast["final"], forecast["final_stderr"]


def _forecasts(decisions: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What the run's own decisions rested on, in order of FLOPs."""
    own = [d for d in decisions if d["account"] == "budget" and not d["undone"]]
    return sorted(filter(None, map(forecast_of, own)), key=lambda f: f["flops"])


def _scale(most: float) -> tuple[float, str]:
    return next(((size, p) for size, p in _SCALES if most >= size), _SCALES[-1])


def _ascii(name: Any) -> str:
    return visible(name, 24).encode("ascii", "replace").decode()


def svg(salt: str, height: float, label: str, draw: Any) -> str:
    """An ``<svg>`` element of ``draw``'s figure: no font, size, date or colour of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    none = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=none)
    body = out.getvalue()
    body = body[body.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<(?:g|text)\b[^>]*?) id="[^"]*"', r"\1", body)
    body = re.sub(r"\s*font-family: [^;\"]*;?", "", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    body = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})",
        lambda m: f"{m[1]}: var(--{_VARIABLES[m[2]]})" if m[2] in _VARIABLES else m[0],
        body,
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {WIDTH} {math.ceil(height)}" role="img" aria-label="{label}">{body}'
    )
