"""``RUN/report.html``: one self-contained page that says what a run did and why.

No network, no script, no file beside it: styles and figures are inside, and a content security
policy forbids the rest. The reader is an engineer who must defend a budget. Everything that comes
from a data set, a file name or an error message is escaped by the template, shortened, and has its
hidden characters written out (``inert``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import thrifty
from thrifty.core import quantities, sums
from thrifty.core.budget import RESOURCES
from thrifty.data.faults import REASONS
from thrifty.data.inert import marked, visible
from thrifty.report import figures, words
from thrifty.report.files import Files
from thrifty.report.summary import summarize
from thrifty.run_folder import RunFolder

_SHOWN_ROWS = 20
_SHOWN_CHARACTERS = 600
_SHOWN_OPTIONS = 30
_SHOWN_DECISIONS = 60
_SHOWN_COUNTS = 40


def write_report(run: RunFolder) -> Path:
    """Write the page of ``run`` and return its path.

    Raises ValueError where the folder holds no plan or no ledger that can be used.
    """
    sums.write(run.report, render(run))
    return run.report


def render(run: RunFolder) -> str:
    """The page's text."""
    summary = summarize(run)
    files = Files(run)
    examples, answers = files.examples(), files.answers()
    drawn = [
        (name, figures.histogram_figure(histogram, number))
        for number, (name, histogram) in enumerate(list(files.histograms().items())[:_SHOWN_COUNTS])
    ]
    return (
        _environment()
        .get_template("page.html")
        .render(
            s=summary,
            headline=words.headline(summary),
            verdict=words.against_control(summary)[1],
            in_targets=words.in_targets((summary["selection"] or {}).get("in_targets", {})),
            resources=_resources(summary),
            figures={
                "budget": Markup(figures.budget_figure(summary)),
                "predicted": Markup(figures.predicted_figure(summary)),
                "loss": Markup(figures.loss_figure(summary)),
            },
            histograms=[(name, Markup(svg)) for name, svg in drawn if svg],
            examples={part: rows[:_SHOWN_ROWS] for part, rows in examples.items()},
            answers=answers.shown() if answers else {},
            decisions=_decisions(summary["decisions"]),
            reasons=REASONS,
            unreadable=sorted({*summary["unreadable"], *files.unreadable}),
            version=thrifty.__version__,
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        finalize=_inert,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "amount": lambda value, resource: words.amount(value, resource).removesuffix(" tokens"),
        "off": words.off,
        "with_error": words.with_error,
        "rate": words.rate,
        "number": _number,
        "count": _count,
        "score": _score,
        "percent": lambda share: f"{share:.1%}",
        "resource": words.name_of,
        "per": lambda resource: quantities.PER.get(resource, (1.0, str(resource)))[1],
        "row_text": lambda text: marked(text or "", _SHOWN_CHARACTERS, lines=True),
        "preview": lambda text: marked(" ".join(str(text or "")[:400].split()), 90),
        "plain": visible,
        "first": lambda items: list(items)[:_SHOWN_COUNTS],
    }
    return environment


def _inert(value: Any) -> Any:
    """What every expression of the template goes through on its way to the page."""
    return marked(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: Any) -> str:
    """Three significant digits, or a dash."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return quantities.short(value) if known else words.UNKNOWN


def _score(value: Any) -> str:
    """With as many decimals as the one above and below it, where the size allows."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.3f}" if known and 1e-3 <= abs(value) < 1e4 else _number(value)


def _count(value: Any) -> str:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:,.0f}" if known else words.UNKNOWN


def _resources(summary: Mapping[str, Any]) -> list[str]:
    """Those with a limit, or of which something is known to have been spent or predicted."""
    return [
        name
        for name in RESOURCES
        if summary["budget"][name] is not None
        or summary["spent"][name]
        or summary["predicted"][name]
    ]


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of the planner and others that weighed options against each other, those taken while a
    stage ran, and the plan's values with their rules."""
    weighed, taken, rules = [], [], []
    own = [d for d in decisions if d["account"] == "budget" and d["stage"] != "pilot"]
    control = sum(d["account"] != "budget" for d in decisions)
    for decision in own:
        choice = decision["choice"]
        if choice and (decision["stage"] is None or len(choice["options"]) > 1):
            weighed.append({**decision, "why": words.weighed(choice), "options": _options(choice)})
        elif decision["chosen"] is None and choice is None:
            rules.append(decision)
        else:
            forecast = figures.forecast_of(decision)
            options = _options(choice) if choice else []
            taken.append({**decision, "options": options, "forecast": forecast})
    half = _SHOWN_DECISIONS // 2
    left_out = max(len(taken) - 2 * half, 0)
    return {
        "weighed": weighed[:_SHOWN_DECISIONS],
        "taken": [*taken[:half], *taken[half:][-half:]],
        "left_out": left_out,
        "control": control,
        "rules": rules[:_SHOWN_DECISIONS],
    }


def _options(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options as weighed: the one that won, then by their rates."""
    options = [
        {**option, "rate": rate, "won": option["name"] == choice["chosen"]}
        for option, rate in zip(choice["options"], choice["rates"], strict=False)
    ]
    options.sort(key=lambda option: (not option["won"], -words.comparable(option["rate"])))
    return options[:_SHOWN_OPTIONS]
