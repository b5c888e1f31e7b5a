"""What the proxy tells Prometheus, in its text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator

from thrifty.serving.key_budgets import Account

_BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_RESOURCES = ("tokens", "dollars", "flops")


class ServeMetrics:
    """Of this process; what keys have spent is the ledger's."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.samples = 0
        self.untrusted = 0
        """Answers whose usage was missing or absurd."""
        self.failures = 0
        """Of upstreams."""
        self.left = 0
        """Requests whose client left before the end."""
        self._requests: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._seconds = 0.0

    def ended(self, route: str, status: int, seconds: float) -> None:
        self._requests[route, status] += 1
        self._buckets[bisect_left(_BOUNDS, seconds)] += 1
        self._seconds += seconds

    def text(self, accounts: Iterable[Account]) -> str:
        return "\n".join([*self._process(), *_accounts(list(accounts)), ""])

    def _process(self) -> Iterator[str]:
        yield from _head("thrifty_requests_total", "counter", "Requests, by route and status.")
        for (route, status), number in sorted(self._requests.items()):
            yield f'thrifty_requests_total{{route="{route}",status="{status}"}} {number}'
        yield from _head(
            "thrifty_request_seconds", "histogram", "From the request to the last byte."
        )
        total = 0
        for bound, number in zip((*_BOUNDS, "+Inf"), self._buckets, strict=True):
            total += number
            yield f'thrifty_request_seconds_bucket{{le="{bound}"}} {total}'
        yield f"thrifty_request_seconds_sum {self._seconds:.6f}"
        yield f"thrifty_request_seconds_count {total}"
        for name, kind, what, value in (
            ("in_flight", "gauge", "Requests under way.", self.in_flight),
            ("samples_total", "counter", "Completions drawn from upstreams.", self.samples),
            ("untrusted_total", "counter", "Answers charged at their bound.", self.untrusted),
            ("upstream_failures_total", "counter", "Upstreams that failed.", self.failures),
            ("clients_left_total", "counter", "Clients that left early.", self.left),
        ):
            yield from _head(f"thrifty_{name}", kind, what)
            yield f"thrifty_{name} {value}"


def _accounts(accounts: list[Account]) -> Iterator[str]:
    for resource in _RESOURCES:
        name = f"thrifty_spent_{resource}"
        yield from _head(name, "counter", f"All {resource} that a key ever spent.")
        for account in accounts:
            spent = account.spent().of(resource)
            if spent is not None:
                yield f"{name}{_key(account)} {spent:.12g}"
    for resource in _RESOURCES:
        name = f"thrifty_left_{resource}"
        yield from _head(name, "gauge", f"What is left of a key's {resource}, holds taken off.")
        for account in accounts:
            left = account.left().get(resource)
            if left is not None:
                yield f"{name}{_key(account)} {left:.12g}"


def _key(account: Account) -> str:
    return f'{{key="{account.client.name}"}}'  # names hold nothing that needs escaping


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"
