"""A run in plain words: the sentences that head the page and end the terminal output.

A loss is called a loss: where the control ended better, or the difference is within noise, the
sentence says so. An outcome counts as told from noise past two standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thrifty.core import quantities
from thrifty.core.budget import RESOURCES
from thrifty.core.quantities import NAMES, PER, short
from thrifty.data.inert import visible
from thrifty.report.answers import answers_told

BOUND = 0.9
"""Share of a limit from which it counts as what bound the run."""
NOISE = 2.0
"""Standard errors within which a difference is no difference."""

UNKNOWN = "\N{EN DASH}"

TASKS = {
    "sft": "supervised fine-tuning",
    "continued": "continued pretraining",
    "preference": "preference tuning",
}


def amount(value: Any, resource: str) -> str:
    """``2.9e15, "flops"`` -> ``2.9 PFLOP``; what is not known is a dash."""
    if not isinstance(value, (int, float)):
        return UNKNOWN
    return quantities.FORMATS[resource](value)


def off(measured: Any, predicted: Any) -> str:
    """By how much measured differs from predicted: ``+3.1%``."""
    if not isinstance(measured, (int, float)) or not isinstance(predicted, (int, float)):
        return UNKNOWN
    if not predicted:
        return UNKNOWN if measured else "±0%"
    return percent((measured - predicted) / predicted)


def percent(change: float) -> str:
    digits = 0 if abs(change) >= 0.1 else 1
    text = f"{100 * change:+,.{digits}f}%"
    return text if any(digit in text for digit in "123456789") else "±0%"


def with_error(value: Any, stderr: Any = None, *, signed: bool = False) -> str:
    """``0.2100 ± 0.0080``."""
    if not isinstance(value, (int, float)):
        return UNKNOWN
    text = f"{value:{'+' if signed else ''}.4f}"
    return f"{text} ± {stderr:.4f}" if isinstance(stderr, (int, float)) else text


def rate(value: Any, resource: str) -> str:
    """A gain per unit of ``resource``, in units that people use: per PFLOP, per M tokens."""
    if not isinstance(value, (int, float)):
        return UNKNOWN
    return short(value * PER.get(resource, (1.0, ""))[0])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def name_of(resource: Any) -> str:
    return NAMES.get(resource, visible(resource, 40))


# -- sentences ------------------------------------------------------------------------------------


def headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked, decided, how it ended, what it cost, what it brought, and against what."""
    sentences = [
        ("Asked", asked(summary)),
        ("Decided", decided(summary)),
        ("Pilot", pilot(summary)),
        ("Ended", ending(summary)),
        ("Cost", cost(summary)),
        ("Brought", outcome(summary)),
        ("Floors", floors(summary)),
        ("Units", unit_map(summary)),
        ("Answers", answers_told(summary)),
        ("Prior", prior(summary)),
        ("Control", against_control(summary)[0]),
    ]
    return [(label, sentence) for label, sentence in sentences if sentence]


def asked(summary: Mapping[str, Any]) -> str:
    targets = ", ".join(visible(name, 40) for name in list(summary["targets"])[:5])
    more = ", …" if len(summary["targets"]) > 5 else ""
    towards = f" towards {targets}{more}" if targets else ""
    limits = [amount(v, k) for k, v in summary["budget"].items() if v is not None]
    within = f" within {', '.join(limits)}" if limits else ", without a limit"
    path = summary["model"]["path"]  # a folder's own name says it; the footer has the rest
    model = visible(Path(path).name if Path(path).is_absolute() else path, 80)
    task = TASKS.get(summary["task"], visible(summary["task"], 40))
    return f"{_capital(task)} of {model}{towards}{within}."


def decided(summary: Mapping[str, Any]) -> str:
    method, chosen = summary["method"], summary["selection"]
    training = (
        f"train {_trained(method['method'])} in {method['memory']['weights']} "
        f"for at most {method['max_steps']:,} steps of "
        f"{method['sequences_per_step']:,} x {method['max_length']:,} tokens"
    )
    scorer = visible(method["scorer"], 40)
    if chosen is None:
        return f"Choose rows by {scorer}, then {training}."
    return f"Keep {_kept(chosen)} by {visible(chosen['scorer'], 40)}, then {training}."


def _trained(technique: str) -> str:
    named = {"full": "all weights", "lora": "LoRA adapters"}
    return named.get(technique, f"by {visible(technique, 40)}")


def _kept(chosen: Mapping[str, Any]) -> str:
    selected, candidates = chosen["num_selected"], chosen["num_candidates"]
    if not isinstance(selected, int) or not isinstance(candidates, int):
        return "some rows"
    tokens = chosen["tokens_selected"]
    size = f" ({amount(tokens, 'tokens')})" if isinstance(tokens, (int, float)) else ""
    return f"{selected:,} of {candidates:,} rows{size}"


def in_targets(counts: Mapping[str, int]) -> str:
    """That chosen rows are a target's too, how many of which; empty where none is."""
    if not counts:
        return ""
    each = ", ".join(f"{count:,} in {visible(name, 40)}" for name, count in counts.items())
    return (
        f"Chosen rows that also stand among a target's own rows: {each}. They may be trained on, "
        "but what they gain on that target is partly memory."
    )


def ending(summary: Mapping[str, Any]) -> str:
    """How training ended, or how far the run has come."""
    if summary["state"] == "planned":
        return "Nothing has been run yet."
    for stage in reversed(summary["stages"]):
        name = visible(stage["name"], 40)
        if stage["state"] == "stopped" and summary["state"] == "stopped":
            why = visible(stage["reason"] or "no reason was left", 200)
            return f"Not finished: {name} stopped ({why}); `thrifty run` goes on from there."
        if stage["state"] == "open":
            return f"Not finished: {name} is at work, or was killed and can be resumed."
    if summary["state"] != "done":
        return "Not finished: `thrifty run` does the rest."
    ended = summary["ended"]
    if ended is None:
        return "Training went its planned length."
    verb = "was cut off" if ended["chosen"] == "stop now" else "began to cool down"
    most = summary["method"]["max_steps"]
    return f"Training {verb} at step {ended['step']} of {most:,}: {visible(ended['reason'], 240)}."


def cost(summary: Mapping[str, Any]) -> str:
    """Spent against predicted, in the limited resources (FLOPs and time where none is)."""
    if summary["state"] == "planned":
        return ""
    shown = [k for k, v in summary["budget"].items() if v is not None] or ["flops", "seconds"]
    parts = [_spent(summary, resource) for resource in shown]
    finished = summary["state"] == "done"
    sentence = f"Spent {'' if finished else 'so far '}{'; '.join(parts)}."
    binding = summary["binding"]
    if finished and binding is not None:
        share = f"{name_of(binding['resource'])}, {100 * binding['share']:.0f}% spent"
        bound = binding["share"] >= BOUND
        sentence += (
            f" {'The limit that bound was' if bound else 'No limit bound; the tightest was'}"
        )
        sentence += f" {share}."
    return sentence


def _spent(summary: Mapping[str, Any], resource: str) -> str:
    spent, predicted = summary["spent"][resource], summary["predicted"][resource]
    limit = summary["budget"][resource]
    if spent is None:
        return f"{name_of(resource)} not known"
    text = amount(spent, resource)
    if limit is not None:
        text += f" of {amount(limit, resource)}"
    if resource == "peak_memory_bytes":
        text += " at the peak"
    if predicted is not None:
        by = f", {off(spent, predicted)}" if summary["state"] == "done" else ""
        text += f" (predicted {amount(predicted, resource)}{by})"
    return text


def _predicted(summary: Mapping[str, Any], resource: str) -> str:
    limit = summary["budget"][resource]
    within = "" if limit is None else f" of {amount(limit, resource)}"
    return f"{amount(summary['predicted'][resource], resource)}{within}"


def outcome(summary: Mapping[str, Any]) -> str:
    """The objective before and after, on the test rows where there are any."""
    test, dev = summary["test_loss"], summary["dev_loss"]
    if test["gain"] is not None:
        return _change("Test", test, test["gain"], test["stderr"], summary)
    if dev["before"] is not None and dev["after"] is not None:
        change = _change("Dev", dev, dev["before"] - dev["after"], None, summary)
        done = summary["state"] == "done"
        return f"{change} {'It was not measured on test rows.' if done else 'That is so far.'}"
    return "" if summary["state"] == "planned" else "What training brought is not measured."


def pilot(summary: Mapping[str, Any]) -> str:
    """What short trainings forecast of each choice of data, and which the run went by."""
    found = summary["pilot"]
    if found is None:
        return ""
    each = [
        f"{visible(c['name'], 60)} {with_error(c['gain'], c['stderr'])} until step {c['steps']}"
        if c["gain"] is not None
        else f"{visible(c['name'], 60)} not measured"
        for c in found["candidates"]
    ]
    share = found["share_of_flops"]
    of = "" if share is None else f", {100 * share:.1f}% of the budget"
    return (
        f"Short trainings took {amount(found['spent']['flops'], 'flops')}{of}, and forecast gains "
        f"of {'; '.join(each)}. The rest went to {visible(found['chosen'], 60)}."
    )


def prior(summary: Mapping[str, Any]) -> str:
    """What the planner had ranked the chosen plan by, beside what was measured."""
    guess = summary["prior_gain"]
    if guess is None:
        return ""
    return (
        f"The planner had guessed a gain of {_guess(guess)} {visible(guess['unit'], 40)}: a rule "
        "of thumb that ranks plans, no forecast of this run."
    )


def _guess(guess: Mapping[str, Any]) -> str:
    """Two digits, for it has no more; an error bar where the prior has one."""
    error = f" ± {guess['stderr']:.2f}" if guess["stderr"] else ""
    return f"{guess['mean']:.2f}{error}"


def _change(
    rows: str, loss: Mapping[str, Any], gain: float, stderr: Any, summary: Mapping[str, Any]
) -> str:
    score = summary["objective"]["more_is_better"]
    if stderr is not None and abs(gain) <= NOISE * stderr:
        verb = "did not change beyond noise"
    elif score:
        verb = "rose" if gain > 0 else "FELL"
    else:
        verb = "fell" if gain > 0 else "ROSE"
    before, after = (own_number(loss[when], summary) for when in ("before", "after"))
    unit = "" if score else f" {visible(summary['objective']['unit'], 40)}"
    return (
        f"{rows} {own_name(summary)} {verb}, from {before:.4f} to {after:.4f}{unit}: "
        f"a gain of {with_error(gain, stderr)}."
    )


def own_name(summary: Mapping[str, Any]) -> str:
    """What the user calls the objective: loss, or the score's name."""
    return visible(summary["objective"]["name"], 40)


def own_number(loss: float, summary: Mapping[str, Any]) -> float:
    """A loss as the user's own number: the score, where more of it is better."""
    return 1.0 - loss if summary["objective"]["more_is_better"] else loss


def floors(summary: Mapping[str, Any]) -> str:
    """How the model that is kept stands where it must not be worse than the base."""
    told = [floor(each) for each in summary["floors"]]
    if summary["dev_loss"]["step"] == 0:
        kept = [d for d in summary["decisions"] if d["name"] == "which model to keep"]
        if kept and "floor" in kept[-1]["chosen"]:
            chosen, reason = visible(kept[-1]["chosen"], 100), visible(kept[-1]["reason"], 240)
            told.append(f"kept is {chosen}: {reason}")
    return f"{'; '.join(told)}." if told else ""


def floor(standing: Mapping[str, Any]) -> str:
    worse = standing["worse"]
    by = with_error(abs(worse), standing["stderr"])
    verdict = "BROKEN" if standing["broken"] else "kept"
    return (
        f"{visible(standing['name'], 40)} {by} {visible(standing['unit'], 40)} "
        f"{'worse' if worse > 0 else 'better'} than the base on {standing['on']} rows, at most "
        f"{standing['limit']:g} worse allowed: {verdict}"
    )


def unit_map(summary: Mapping[str, Any]) -> str:
    """What the loss is worth in the score, by the run's own evaluations."""
    found = summary["unit_map"]
    if found is None:
        return ""
    if "refused" in found:
        return f"{_capital(visible(found['refused'], 240))}."
    gain = found["gain_of_a_tenth"]
    return (
        f"A tenth of a nat less would bring {with_error(gain['mean'], gain['stderr'])} "
        f"{visible(found['unit'], 40)}, by the {found['num_points']} evaluations of this run."
    )


def against_control(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The sentence and its verdict: won, lost, even, unmeasured, none."""
    control = summary["control"]
    if control is None and summary["control_wanted"]:
        return "The control has not been run yet.", "unmeasured"
    if control is None:
        return "None was run, so what the selection itself gained was not measured.", "none"
    gain, stderr = control["gain_over_control"], control["gain_over_control_stderr"]
    if gain is None:
        return "It was begun, and has not been measured yet.", "unmeasured"
    unit, rows = visible(summary["objective"]["unit"], 40), control["measured_on"]
    if (summary["selection"] or summary["method"])["scorer"] == control["method"]:
        return (
            "The run chose its rows uniformly too, so no selection is put to the test: two draws "
            f"of rows differ by {with_error(abs(gain), stderr)} {unit} on {rows} rows.",
            "even",
        )
    by = f"{with_error(abs(gain), stderr)} {unit}"
    taken_over = any(each["name"] == "score or take over" for each in summary["decisions"])
    scoring = "scoring taken over from an earlier run" if taken_over else "scoring included"
    rival = f"a uniform choice at the same total FLOPs, {scoring}"
    if stderr is None:
        word = "better" if gain > 0 else "worse"
        return (
            f"Against {rival}, the selected rows ended {by} {word} on {rows} rows; without an "
            "error bar that may be noise.",
            "even",
        )
    if abs(gain) <= NOISE * stderr:
        return (
            f"Against {rival}, no difference beyond noise: {with_error(gain, stderr, signed=True)} "
            f"{unit} on {rows} rows. Selection did not pay for itself here.",
            "even",
        )
    if gain > 0:
        return f"The selected rows beat {rival}, by {by} on {rows} rows.", "won"
    return (
        f"The selected rows LOST to {rival}, by {by} on {rows} rows: here selection cost more "
        "than it brought.",
        "lost",
    )


# -- the end of the terminal output ---------------------------------------------------------------


def text_summary(summary: Mapping[str, Any]) -> str:
    """Six to fourteen lines: decided, why, spent against predicted, losses, against control."""
    lines = [("decided", decided(summary).rstrip("."))]
    why = _why(summary)
    if why:
        lines.append(("why", why))
    if overlap := in_targets((summary["selection"] or {}).get("in_targets", {})):
        lines.append(("overlap", overlap.rstrip(".")))
    if tried := pilot(summary):
        lines.append(("pilot", tried.rstrip(".")))
    lines.append(("ended", ending(summary).rstrip(".")))
    planned = summary["state"] == "planned"
    label = "predicted" if planned else "spent"
    for resource in RESOURCES:
        if _worth_a_line(summary, resource):
            lines.append((label, (_predicted if planned else _spent)(summary, resource)))
            label = ""
    if (summary["lost"]["flops"] or 0) > 0:
        lost = [amount(summary["lost"][k], k) for k in ("flops", "seconds")]
        lines.append(("", f"of which lost to interruptions: {', '.join(lost)}"))
    unit = visible(summary["objective"]["unit"], 40)
    for rows, key in (("dev", "dev_loss"), ("test", "test_loss")):
        lines.append((f"{rows} {own_name(summary)}", _loss_line(summary, summary[key], unit)))
    if floors(summary):
        lines.append(("floors", floors(summary).rstrip(".")))
    if answers := answers_told(summary):
        lines.append(("answers", answers.rstrip(".")))
    if prior(summary):
        lines.append(("prior", prior(summary)))
    lines.append(("control", against_control(summary)[0]))
    width = max(10, *(len(name) for name, _ in lines))
    return "\n".join(f"{name:<{width}} {text}" for name, text in lines)


def _worth_a_line(summary: Mapping[str, Any], resource: str) -> bool:
    if summary["budget"][resource] is not None:
        return True
    known = (summary["spent"][resource] or 0) > 0
    return known and resource in ("flops", "seconds", "dollars", "peak_memory_bytes")


def _loss_line(summary: Mapping[str, Any], loss: Mapping[str, Any], unit: str) -> str:
    if loss["before"] is None or loss["after"] is None:
        return "not measured"
    before, after = (own_number(loss[when], summary) for when in ("before", "after"))
    gain = with_error(loss["before"] - loss["after"], loss.get("stderr"), signed=True)
    unit = "" if summary["objective"]["more_is_better"] else f" {unit}"
    return f"{before:.4f} before, {after:.4f} after: a gain of {gain}{unit}"


def _why(summary: Mapping[str, Any]) -> str:
    """The planner's own choice in numbers, else the plan's reason for its scorer."""
    for decision in summary["decisions"]:
        if decision["choice"] and decision["stage"] is None:
            return weighed(decision["choice"])
    return visible(summary["why"].get("selection.scorer", ""), 240)


def weighed(choice: Mapping[str, Any]) -> str:
    """Why an option won: its gain per unit of the scarce resource against price and runner-up."""
    resource = choice["resource"]
    pairs = list(zip(choice["options"], choice["rates"], strict=False))
    ranked = sorted(pairs, key=lambda pair: -comparable(pair[1]))
    won = [(option, value) for option, value in ranked if option["name"] == choice["chosen"]]
    (option, value) = won[0] if won else ranked[0]
    per = PER.get(resource, (1.0, visible(resource, 40)))[1]
    unit, gain = visible(option["gain"]["unit"], 40), option["gain"]
    bound = "at best" if option["name"] == choice["incumbent"] else "at least"
    what = "guessed (prior)" if gain["source"] == "prior" else gain["source"]
    bound = f"{bound} {rate(value, resource)} a {per}"
    if option["cost"].get(resource) == 0:
        bound = "for nothing"
    text = (
        f"{visible(option['name'], 80)}: {what} gain "
        f"{with_error(gain['mean'], gain['stderr'])} {unit}, {bound}, "
        f"{'above' if won else 'not above'} the price of {rate(choice['price'], resource)}"
    )
    rest = next(((o, v) for o, v in ranked if o["name"] != option["name"]), None)
    if rest is not None:
        text += f"; next best {visible(rest[0]['name'], 80)} at {rate(rest[1], resource)}"
    return text


def comparable(value: Any) -> float:
    return value if isinstance(value, (int, float)) else float("-inf")
