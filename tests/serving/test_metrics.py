"""What Prometheus is told."""

from __future__ import annotations

import re

from tests.backends.stub_server import Reply
from tests.serving.conftest import proxied
from thrifty.serving.key_budgets import KeyLimits

_LINE = re.compile(r'([a-z_]+)(?:\{([a-z]+="[^"\\\n]*"(?:,[a-z]+="[^"\\\n]*")*)\})? (\S+)')


def parsed(text: str) -> dict[str, float]:
    """Sample -> value. Each metric has its help and its type before, once."""
    assert text.endswith("\n")
    found, kinds = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            name, labels, value = _LINE.fullmatch(line).groups()
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert kinds.get(name) in ("counter", "gauge") or kinds[base] == "histogram"
            found[name + (f"{{{labels}}}" if labels else "")] = float(value)
    return found


def test_what_was_asked_and_what_it_took(ledger):
    script = [Reply(), Reply(usage=None), Reply(status=500)]
    with proxied(ledger, script, budget=KeyLimits(tokens=5000, dollars=1.0)) as proxy:
        told = [proxy.ask().json()["thrifty"]["tokens"] for _ in range(2)]
        assert proxy.ask().status_code == 502
        proxy.ask(n=0)
        proxy.get("/made/up")
        proxy.get("/made/up/too")
        found = parsed(proxy.get("/metrics").text)
    route = 'route="/v1/chat/completions"'
    assert found[f'thrifty_requests_total{{{route},status="200"}}'] == 2
    assert found[f'thrifty_requests_total{{{route},status="502"}}'] == 1
    assert found[f'thrifty_requests_total{{{route},status="400"}}'] == 1
    assert found['thrifty_requests_total{route="other",status="404"}'] == 2
    assert found["thrifty_request_seconds_count"] == 6
    assert found['thrifty_request_seconds_bucket{le="+Inf"}'] == 6
    buckets = [value for name, value in found.items() if "_bucket" in name]
    assert buckets == sorted(buckets)
    assert found["thrifty_samples_total"] == 3
    assert found["thrifty_untrusted_total"] == 1
    assert found["thrifty_upstream_failures_total"] == 1
    assert found["thrifty_in_flight"] == 1  # this one
    assert found['thrifty_spent_tokens{key="alice"}'] == sum(told)
    assert found['thrifty_left_tokens{key="alice"}'] == 5000 - sum(told)
    assert 'thrifty_left_flops{key="alice"}' not in found


def test_what_was_spent_before_counts(ledger):
    for round in (1, 2):
        with proxied(ledger) as proxy:
            proxy.ask()
            found = parsed(proxy.get("/metrics").text)
            assert found['thrifty_spent_tokens{key="alice"}'] == 7 * round
