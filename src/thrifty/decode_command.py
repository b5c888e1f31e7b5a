"""The options of ``thrifty decode``, and what it does."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any


def add_to(command: argparse.ArgumentParser) -> None:
    """To the parser of ``thrifty decode``."""
    command.add_argument(
        "run", nargs="?", metavar="RUN", help="a run: its model answers, its budget pays"
    )
    command.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="a local folder, or with --endpoint the name there; several, the cheapest first",
    )
    command.add_argument(
        "--endpoint",
        action="append",
        metavar="URL",
        help="an OpenAI-compatible server; one for all models, or one for each in their order",
    )
    command.add_argument(
        "--prompts", required=True, metavar="FILE", help="JSON lines with a prompt"
    )
    command.add_argument(
        "--policy", default="auto", metavar="NAME", help="a name, or {name: {option: value}}"
    )
    command.add_argument(
        "--answer",
        metavar="FORM",
        default="exact",
        help="how an answer is read in a text: number, choice, exact, math, {callable: ...}, none",
    )
    command.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="of a run's plan, for this time"
    )
    budget = command.add_argument_group("budget, for all questions together")
    budget.add_argument("--samples", type=float, metavar="3", help="a question, on average")
    budget.add_argument("--tokens", metavar="1M")
    budget.add_argument("--flops", metavar="1e15")
    budget.add_argument("--dollars", metavar="5")
    budget.add_argument("--hours", metavar="2h")
    budget.add_argument(
        "--worth", type=float, default=0.0, metavar="X", help="right answers that a unit must bring"
    )
    command.add_argument("--max-samples", type=int, default=40, help="of a question")
    command.add_argument("--max-tokens", type=int, default=1024, help="of a sample")
    command.add_argument("--temperature", type=float, default=0.7)
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--stop", action="append", metavar="TEXT")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--generation",
        metavar="SETTINGS",
        help="of a local model, as '{early_exit: 0.9}'; of an endpoint, further fields of its body",
    )
    command.add_argument("--concurrency", type=int, default=16, help="questions at a time")
    command.add_argument(
        "--price",
        action="append",
        metavar="[MODEL=]IN,OUT",
        help="dollars per million tokens, of prompts and of completions",
    )
    command.add_argument(
        "--config",
        action="append",
        metavar="[MODEL=]FOLDER",
        help="of the model behind an endpoint, for its FLOPs",
    )
    command.add_argument("--key", metavar="VARIABLE", help="environment variable with the API key")
    command.add_argument(
        "--completions", action="store_true", help="of an endpoint, rather than chat completions"
    )
    command.add_argument(
        "--fit", action="append", metavar="SAMPLES", help="recorded samples to learn from"
    )
    command.add_argument(
        "--reward",
        metavar="FOLDER",
        help="of a reward model; or MODULE:FUNCTION(prompt, text), higher is better",
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        help="kept as it comes (default: answers, or RUN/decode)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def answer(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Decode, or go on with it; the facts and the text. Raises ValueError where what was asked
    cannot be."""
    from contextlib import ExitStack

    from thrifty.answering import Settings
    from thrifty.decode_pool import decode
    from thrifty.display import say
    from thrifty.policies import answer_form_named, policy_named
    from thrifty.prompts import read_prompts
    from thrifty.recordings import read_outcomes
    from thrifty.rewards import reward_named

    settings = Settings(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop=tuple(options.stop or ()),
        seed=options.seed,
        max_samples=options.max_samples,
        mean_samples=options.samples,
        price=options.worth,
        concurrency=options.concurrency,
    )
    form = None if options.answer == "none" else answer_form_named(options.answer)
    policy = "auto" if options.policy == "auto" else policy_named(options.policy)
    prompts = read_prompts(Path(options.prompts))
    fit_on = read_outcomes(options.fit) if options.fit else []
    reward = reward_named(options.reward) if options.reward else None
    with ExitStack() as stack:
        ledger, folder, models = _place(options, stack)
        backends, bar = _backends(options, models), _Bar(len(prompts))
        decoded = decode(
            prompts,
            backends=backends,
            policy=policy,
            answer=form,
            budget=_budget(options),
            settings=settings,
            folder=folder,
            fit_on=fit_on,
            reward=reward,
            ledger=ledger,
            on_answer=bar.answered,
            on_samples=bar.drawn,
        )
    for backend in backends:
        for note in backend.notes:
            say(f"note: {backend.model}: {note}")
    if reward is not None and not callable(reward):
        for note in reward.notes:
            say(f"note: {options.reward}: {note}")
    say(f"\nanswers: {folder / 'answers.jsonl'}")
    facts = _facts(decoded)
    return facts, _text(facts)


def _place(options: argparse.Namespace, stack: Any) -> tuple[Any, Path, list[str]]:
    """The ledger (None: one of the folder's own), the folder, and the models to ask."""
    models = list(options.model or ())
    if options.run is None:
        if not models:
            raise ValueError("nobody to ask\nhint: --model FOLDER, or --endpoint URL --model NAME")
        return None, Path(options.output or "answers"), models
    from thrifty import publication
    from thrifty.run_folder import RunFolder

    if models or options.endpoint:
        raise ValueError("a run's own model answers\nhint: leave --model out, or RUN")
    limits = ("tokens", "flops", "dollars", "hours")
    if given := [name for name in limits if getattr(options, name) is not None]:
        raise ValueError(
            f"--{given[0]}: a run has its budget\nhint: --set budget.flops=3e12 raises it"
        )
    run = RunFolder(Path(options.run))
    plan = run.plan(tuple(options.set or ()))
    model = run.model("budget")
    if not model.is_dir():
        raise ValueError(f"{run.path} has no model yet\nhint: thrifty run {run.path}")
    publication.check(model)
    ledger = stack.enter_context(run.working())
    ledger.set_budget(plan.budget)
    return ledger, Path(options.output or run.decoded), [str(model)]


def _backends(options: argparse.Namespace, models: list[str]) -> list[Any]:
    prices = _by_model("--price", options.price, models)
    settings = _mapping("--generation", options.generation) if options.generation else {}
    if not options.endpoint:
        from thrifty.backends.local import Local

        if prices or options.config or options.key or options.completions:
            raise ValueError(
                "--price, --config, --key and --completions are of an endpoint\n"
                "hint: --endpoint URL"
            )
        return [Local(model, settings=settings) for model in models]
    from thrifty.backends.endpoint import Endpoint
    from thrifty.costs.shape import read_shape

    urls = options.endpoint * len(models) if len(options.endpoint) == 1 else options.endpoint
    if len(urls) != len(models):
        raise ValueError(
            f"{len(urls)} endpoints for {len(models)} models\nhint: one for all, or one for each"
        )
    configs = _by_model("--config", options.config, models)
    found = []
    for url, model in zip(urls, models, strict=True):
        prompt_price, completion_price = _prices(prices[model]) if model in prices else (None, None)
        found.append(
            Endpoint(
                url,
                model,
                kind="completions" if options.completions else "chat",
                key_variable=options.key or "",
                prompt_price=prompt_price,
                completion_price=completion_price,
                shape=read_shape(Path(configs[model])) if model in configs else None,
                concurrency=options.concurrency,
                fields=settings,
            )
        )
    return found


def _by_model(option: str, texts: list[str] | None, models: list[str]) -> dict[str, str]:
    from thrifty.core.typed import nearest

    found: dict[str, str] = {}
    for text in texts or ():
        model, sign, value = text.rpartition("=")
        if not sign:
            found.update(dict.fromkeys(models, value))
        elif model in models:
            found[model] = value
        else:
            raise ValueError(f"{option} {text!r} names no model\nhint: {nearest(model, models)}")
    return found


def _prices(text: str) -> tuple[float, float]:
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError:
        given = []
    if len(given) != 2 or not all(0 <= price < float("inf") for price in given):
        raise ValueError(f"--price {text!r} is no two prices\nhint: --price 0.15,0.60")
    return given[0], given[1]


def _mapping(option: str, text: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{option} {text!r} is no mapping\nhint: '{{kv_cache: {{bits: 8}}}}'")
    return found


def _budget(options: argparse.Namespace) -> Any:
    from thrifty.core import quantities
    from thrifty.core.budget import Budget

    def read(text: str | None, parse: Any) -> float | None:
        return None if text is None else parse(text)

    return Budget(
        tokens=read(options.tokens, quantities.parse_tokens),
        flops=read(options.flops, quantities.parse_flops),
        dollars=read(options.dollars, quantities.parse_dollars),
        seconds=read(options.hours, quantities.parse_hours),
    )


class _Bar:
    """How many samples came and how many questions are answered: a bar on a terminal, else a line
    now and then."""

    def __init__(self, total: int) -> None:
        from thrifty.progress import Pace

        self._total = total
        self._finished = self._samples = self._right = self._known = 0
        self._pace = Pace()
        self._next = 0.0

    def answered(self, answer: Any, finished: int) -> None:
        self._finished = finished
        if answer.correct is not None:
            self._known += 1
            self._right += answer.correct
        self._show()

    def drawn(self, count: int) -> None:
        self._samples += count
        self._show()

    def _show(self) -> None:
        from thrifty.display import say

        over = self._finished == self._total
        samples = f"{self._samples:,} sample{'s' * (self._samples != 1)}"
        line = f"{self._finished:,} of {self._total:,} answered, {samples}"
        if self._known:
            line += f", {self._right / self._known:.1%} right"
        if sys.stderr.isatty():
            if not over and time.monotonic() < self._next:
                return
            self._next = time.monotonic() + 0.1
            width = 24 * self._finished // self._total
            end = "\n" if over else ""
            print(f"\r[{'#' * width:<24}] {line} ", end=end, file=sys.stderr, flush=True)
        elif over or self._pace.due():
            say(f"  {line}")


def _facts(decoded: Any) -> dict[str, Any]:
    from thrifty.answer_totals import totals

    return {
        "policy": decoded.policy,
        "why": decoded.why,
        **totals(decoded.answers),
        "resource": decoded.resource,
        "spent": decoded.spent.to_dict(),
    }


def _text(facts: dict[str, Any]) -> str:
    from thrifty.core.budget import Cost

    count, samples = facts["num_questions"], facts["samples"]
    lines = [
        f"{count} questions, {samples} samples ({samples / count:.2f} each): "
        f"{facts['answered']} answered, {facts['given_up']} given up, "
        f"{facts['without_an_answer']} without an answer",
        f"policy: {facts['policy']} ({facts['why']})",
        f"spent: {Cost.from_dict(facts['spent'])}",
    ]
    if facts["accuracy"] is not None:
        lines.insert(1, f"right, where it is known: {facts['accuracy']:.1%}")
    if facts["unreadable"] or facts["failed"]:
        lines.insert(
            1, f"{facts['unreadable']} samples without a readable answer, {facts['failed']} failed"
        )
    return "\n".join(lines)
