"""What ``thrifty serve`` is asked for, as the things that it is made of."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from thrifty.backends.connections import base_url, is_here
from thrifty.backends.endpoint import Endpoint
from thrifty.backends.retries import Retries
from thrifty.backends.secret import secret_of
from thrifty.backends.usage import Tariff
from thrifty.core import quantities
from thrifty.core.quantities import format_tokens, show
from thrifty.core.resolve import name_of, resolve
from thrifty.costs.shape import read_shape
from thrifty.display import say
from thrifty.policies import answer_form_named, choose_policy, policy_named
from thrifty.recordings import read_outcomes
from thrifty.rewards import reward_named, scoring
from thrifty.serving.front_door import LOOPBACK
from thrifty.serving.key_budgets import Client, KeyBudgets, KeyLimits, read_keys
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.policy_answer import Improver
from thrifty.serving.request_limits import RequestLimits
from thrifty.serving.upstream import Upstream

_NONE = "-"


def upstreams(options: argparse.Namespace) -> list[Upstream]:
    count = len(options.upstream)
    models = _each("--model", options.model, count)
    keys = _each("--upstream-key", options.upstream_key, count)
    prices = _each("--price", options.price, count)
    shapes = _each("--config", options.config, count)
    return [
        Upstream(
            url=base_url(url),
            model=model or "",
            key=secret_of(variable) if variable else None,
            tariff=_tariff(price, folder),
        )
        for url, model, variable, price, folder in zip(
            options.upstream, models, keys, prices, shapes, strict=True
        )
    ]


def _each(option: str, given: Sequence[str] | None, count: int) -> list[str | None]:
    """One for each upstream; a key, above all, must not go to the wrong one."""
    if not given:
        return [None] * count
    if len(given) != count:
        raise ValueError(
            f"{option} is given {len(given)} times for {count} upstreams\n"
            f"hint: once for each, in their order; {option} {_NONE} for none"
        )
    return [None if value == _NONE else value for value in given]


def _tariff(price: str | None, folder: str | None) -> Tariff:
    prompt = completion = None
    if price is not None:
        try:
            prompt, completion = map(float, price.split(","))
        except ValueError:
            raise ValueError(
                f"--price {show(price)} is no two prices\n"
                "hint: dollars per million tokens, of prompts and of completions: --price 0.15,0.60"
            ) from None
    shape = None if folder is None else read_shape(folder)
    return Tariff(prompt_price=prompt, completion_price=completion, shape=shape)


def clients(options: argparse.Namespace) -> tuple[Client, ...]:
    """Who may ask. Raises ValueError where anybody could, from other machines."""
    read = {
        "dollars": quantities.parse_dollars,
        "tokens": quantities.parse_tokens,
        "flops": quantities.parse_flops,
    }
    given = {name: getattr(options, name) for name in read}
    budget = {name: read[name](text) for name, text in given.items() if text is not None}
    if options.keys:
        if budget:
            raise ValueError(
                f"--{next(iter(budget))} beside --keys\n"
                "hint: each key of the file has a budget of its own there"
            )
        return read_keys(Path(options.keys))
    key = os.environ.get(options.key_variable, "")
    if not key and not is_loopback(options.host):
        raise ValueError(
            f"without keys anybody who reaches {options.host} could spend\n"
            f"hint: --keys FILE, or one key in the environment variable {options.key_variable}"
        )
    name = "one" if key else "anybody"
    return (Client(name=name, key=key, budget=KeyLimits(**budget), metrics=True),)


def is_loopback(host: str) -> bool:
    return is_here(f"http://[{host}]" if ":" in host else f"http://{host}")


def check_known(upstreams: Sequence[Upstream], clients: Sequence[Client]) -> None:
    """What a budget limits must be known of every upstream."""
    for client in clients:
        for upstream in upstreams:
            tariff, budget = upstream.tariff, client.budget
            if budget.dollars and None in (tariff.prompt_price, tariff.completion_price):
                raise ValueError(
                    f"the budget of {client.name} limits dollars and {upstream.url} has no price\n"
                    "hint: --price PROMPTS,COMPLETIONS, dollars per million tokens"
                )
            if budget.dollars and not upstream.model:
                raise ValueError(
                    f"the budget of {client.name} limits dollars, and models of {upstream.url} may "
                    "differ in price\nhint: --model NAME, the only one that is asked there"
                )
            if budget.flops and tariff.shape is None:
                raise ValueError(
                    f"the budget of {client.name} limits FLOPs, which of {upstream.url} are not "
                    "known\nhint: --config FOLDER, with the config.json of its model"
                )


def improver(
    options: argparse.Namespace,
    upstreams: Sequence[Upstream],
    timeout: float,
    metrics: ServeMetrics,
) -> Improver | None:
    """What answers by the policy; None where the policy is to hand on."""
    most = at_least("--max-samples", options.max_samples, 1)
    form = None if options.answer == "none" else answer_form_named(options.answer)
    reward = None if options.reward is None else reward_named(options.reward)
    fit_on = read_outcomes(options.fit) if options.fit else []
    policy = policy_named(options.policy) if options.policy != "auto" else None
    if policy is None:
        names = [upstream.model for upstream in upstreams]
        spec, why = choose_policy(names, form is not None, reward is not None, fit_on)
        policy = resolve("policy", spec)
        say(f"policy: {spec} ({why})")
    if name_of(policy) == "first":
        if options.samples is not None:
            raise ValueError("handed on, a request is one sample\nhint: --policy marginal")
        return None
    if policy.needs == "rewards" and reward is None:
        raise ValueError(
            f"the policy {options.policy} needs rewards\n"
            "hint: --reward FOLDER, or a policy that goes by answers, marginal for one"
        )
    if form is not None:
        form.check()
    tariffs = [upstream.tariff for upstream in upstreams]
    priced = all(tariff.completion_price is not None for tariff in tariffs)
    backends = _backends(options, upstreams, timeout)
    judged = scoring(list(backends.values()), reward, policy)
    if judged.unused:
        say(f"  {judged.unused}")
    elif reward is not None and not callable(reward):
        reward.load()
    return Improver(
        policy=policy,
        form=form,
        reward=judged.function,
        worth=options.worth,
        fit_on=fit_on,
        mean_samples=options.samples,
        backends={backend.model: backend for backend in judged.backends},
        max_samples=most,
        knows_flops=all(tariff.shape is not None for tariff in tariffs),
        resource="dollars" if priced else "tokens",
        metrics=metrics,
    )


def _backends(
    options: argparse.Namespace, upstreams: Sequence[Upstream], timeout: float
) -> dict[str, Endpoint]:
    """By model, the cheapest first where all have a price, else as they were given."""
    for upstream in upstreams:
        if not upstream.model:
            raise ValueError(
                f"a policy must know whom it asks at {upstream.url}\nhint: --model NAME"
            )
    variables = _each("--upstream-key", options.upstream_key, len(upstreams))
    asked = list(zip(upstreams, variables, strict=True))
    if all(upstream.tariff.completion_price is not None for upstream in upstreams):
        asked.sort(key=lambda one: one[0].tariff.completion_price or 0.0)
    backends = {
        upstream.model: Endpoint(
            upstream.url,
            upstream.model,
            key_variable=variable,
            prompt_price=upstream.tariff.prompt_price,
            completion_price=upstream.tariff.completion_price,
            shape=upstream.tariff.shape,
            concurrency=options.max_connections,
            timeout_seconds=timeout,
            # Somebody waits for it.
            retries=Retries(attempts=2, first_wait_seconds=0.5, total_seconds=timeout),
        )
        for upstream, variable in asked
    }
    if len(backends) < len(upstreams):
        raise ValueError("two upstreams have the same model\nhint: a name for each")
    return backends


def limits(options: argparse.Namespace) -> RequestLimits:
    context = options.context
    return RequestLimits(
        max_body_bytes=int(quantities.parse_bytes(options.max_body)),
        max_tokens=at_least("--max-tokens", options.max_tokens, 1),
        context=None if context is None else at_least("--context", context, 1),
    )


def hosts(options: argparse.Namespace) -> list[str] | None:
    more = [name.lower() for name in options.allow_host or ()]
    if is_loopback(options.host):
        return [*LOOPBACK, options.host, *more]
    return more or None


def ledger_file(given: str) -> Path:
    path = Path(given)
    return path if path.suffix == ".sqlite" else path / "ledger.sqlite"


def at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"{option} {value} is too little\nhint: at least {least}")
    return value


def listening_socket(host: str, port: int) -> socket.socket:
    """Raises ValueError where it cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    why: object = "ports are numbers from 0 to 65535"
    if 0 <= port <= 65535:
        # The protocol is named, or asyncio leaves Nagle's algorithm on: 40 ms an answer.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(1024)
            return listening
        except OSError as error:
            listening.close()
            why = error
    raise ValueError(
        f"cannot listen on {host} port {port}: {why}\nhint: another --port, or --port 0"
    )


def greeting(
    options: argparse.Namespace,
    upstreams: Sequence[Upstream],
    budgets: KeyBudgets,
    listening: socket.socket,
) -> list[str]:
    host = f"[{options.host}]" if ":" in options.host else options.host
    lines = [f"serving http://{host}:{listening.getsockname()[1]}/v1"]
    for upstream in upstreams:
        lines.append(f"  asks {upstream.url}" + (f", {upstream.model}" if upstream.model else ""))
    if options.policy not in ("first", "auto"):  # the choice of auto was told before
        mean = "" if options.samples is None else f", {options.samples:g} on average"
        lines.append(f"  answers by {options.policy}, up to {options.max_samples} samples{mean}")
    for account in budgets.accounts[:10]:
        left = account.left()
        shown = ", ".join(quantities.FORMATS[name](amount) for name, amount in left.items())
        lines.append(f"  {account.client.name}: {shown + ' left' if left else 'no limit'}")
    if len(budgets.accounts) > 10:
        lines.append(f"  and {len(budgets.accounts) - 10} other keys")
    if not is_loopback(options.host):
        lines.append("  keys go over the wire in the clear: put TLS in front of this")
    lines.append(f"  at most {format_tokens(options.max_tokens)} tokens a completion")
    return lines
