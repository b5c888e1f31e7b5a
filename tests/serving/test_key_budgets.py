"""A budget per key: never overspent, whoever asks at the same time, over restarts and kills."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random

import httpx2
import pytest

from tests.backends.stub_server import Received, Reply
from tests.serving.conftest import KEY, PRICES, proxied
from thrifty.core.ledger import Ledger
from thrifty.serving.key_budgets import Client, KeyLimits, key_budgets, read_keys
from thrifty.serving.upstream import Upstream

SECRET = "secret-0123456789abcdef"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


def computed(request: Received) -> int:
    """What the stub took for it, as it counts."""
    return len(request.prompt.split()) + _words(request)


def _words(request: Received) -> int:
    return 1 + int(request.json["seed"]) % 40


def script(request: Received) -> Reply:
    text = " ".join(["word"] * _words(request))
    return Reply(texts=(text,), delay=0.002 * (request.json["seed"] % 5))


async def many(url: str, key: str, clients: int, each: int) -> list[httpx2.Response]:
    """Every client asks one after the other, all of them at once; some want a stream."""
    limits = httpx2.Limits(max_connections=clients)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60) as http:

        async def client(number: int) -> list[httpx2.Response]:
            drawn, answers = random.Random(number), []
            for _ in range(each):
                body = {
                    "model": "m",
                    "messages": [{"role": "user", "content": "word " * drawn.randint(1, 50)}],
                    "seed": drawn.randint(0, 1000),
                    "stream": drawn.random() < 0.5,
                }
                answers.append(await http.post("/v1/chat/completions", json=body))
            return answers

        found = await asyncio.gather(*map(client, range(clients)))
    return [answer for answers in found for answer in answers]


@pytest.mark.parametrize("budget", [KeyLimits(tokens=12_000), KeyLimits(dollars=0.015)])
@pytest.mark.long
def test_64_clients_on_one_key_never_overspend(ledger, budget):
    with proxied(ledger, script, budget=budget) as proxy:
        answers = asyncio.run(many(proxy.url, KEY, 64, 8))
        took = sum(computed(request) for request in proxy.stub.requests)
        words = sum(_words(request) for request in proxy.stub.requests)
        account = proxy.budgets.accounts[0]
        assert account.spent().tokens == took
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 402, 429}
    assert 200 in statuses
    assert statuses != {200}
    assert sum(answer.status_code == 200 for answer in answers) == len(proxy.stub.requests)
    dollars = ((took - words) * PRICES.prompt_price + words * PRICES.completion_price) / 1e6
    assert took <= (budget.tokens or 1e9)
    assert dollars <= (budget.dollars or 1e9)
    with Ledger(ledger, read_only=True) as journal:
        spent = journal.spent(account="key alice")
        assert spent.tokens == took
        assert spent.dollars == pytest.approx(dollars, abs=1e-6)
        assert journal.reserved("key alice").tokens == 0


def test_what_is_left_is_told_when_it_is_too_little(ledger):
    with proxied(ledger, budget=KeyLimits(tokens=1000)) as proxy:
        response = proxy.ask()
        assert response.status_code == 200
        assert response.headers["x-thrifty-left-tokens"] == "993"
        response = proxy.ask(messages=[{"role": "user", "content": "word " * 200}])
        assert response.status_code == 402
        error = response.json()["error"]
        assert error["code"] == error["type"] == "insufficient_quota"
        assert error["left"] == {"tokens": 993}
        assert "993 tokens" in error["message"]
        assert "alice" in error["message"]
        assert len(proxy.stub.requests) == 1
        assert proxy.ask().status_code == 200  # a smaller one still fits


def test_what_others_hold_is_worth_another_try(ledger):
    async def two(url: str) -> list[httpx2.Response]:
        body = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
            asked = [http.post("/v1/chat/completions", json=body) for _ in range(2)]
            return await asyncio.gather(*asked)

    with proxied(ledger, [Reply(delay=0.5)], budget=KeyLimits(tokens=1000)) as proxy:
        ok, held = sorted(asyncio.run(two(proxy.url)), key=lambda answer: answer.status_code)
        assert (ok.status_code, held.status_code) == (200, 429)
        assert held.headers["retry-after"] == "1"
        assert held.json()["error"]["code"] == "budget_held"
        assert proxy.ask().status_code == 200


def test_a_restart_forgets_nothing(ledger):
    for round in range(3):
        with proxied(ledger, budget=KeyLimits(tokens=750)) as proxy:
            left = proxy.ask().json()["thrifty"]["left"]["tokens"]
            assert left == 750 - 7 * (round + 1)


def test_a_lowered_budget_is_spent(ledger):
    with proxied(ledger, budget=KeyLimits(tokens=100_000)) as proxy:
        for _ in range(10):
            proxy.ask()
    with proxied(ledger, budget=KeyLimits(tokens=50)) as proxy:
        response = proxy.ask()
        assert response.status_code == 402
        assert response.json()["error"]["left"] == {"tokens": 0}
        assert "thrifty_left_tokens" in proxy.get("/metrics").text
    with proxied(ledger, budget=KeyLimits(tokens=100_000)) as proxy:
        assert proxy.ask().status_code == 200


def test_two_servers_do_not_spend_from_one_ledger(ledger):
    with proxied(ledger), pytest.raises(ValueError, match="is being worked on"):
        key_budgets((Client(name="a", key=KEY),), ledger, "first").__enter__()


def test_the_ledger_is_brought_up_to_date_while_requests_are_under_way(ledger):
    """A charge for what was settled; what is held stays held, and is settled once."""

    def slow(request: Received) -> Reply:
        return Reply(delay=0.6 if request.json.get("seed") == 1 else 0)

    async def asked(url: str, seed: int) -> httpx2.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "seed": seed}
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
            return await http.post("/v1/chat/completions", json=body)

    async def meanwhile(proxy) -> None:
        waiting = asyncio.ensure_future(asked(proxy.url, 1))
        await asyncio.sleep(0.2)
        await asked(proxy.url, 0)
        before = proxy.budgets.accounts[0].left()["tokens"]
        await asyncio.to_thread(proxy.on_loop, lambda: list(proxy.budgets.renew()))
        with Ledger(ledger, read_only=True) as journal:
            assert journal.spent(account="key alice").tokens == 5
        assert proxy.budgets.accounts[0].left()["tokens"] == before
        await waiting

    with proxied(ledger, slow, budget=KeyLimits(tokens=100_000)) as proxy:
        asyncio.run(meanwhile(proxy))
        account = proxy.budgets.accounts[0]
        assert account.spent().tokens == 10
        assert account.left() == {"tokens": 100_000 - 10}
    with Ledger(ledger, read_only=True) as journal:
        assert journal.spent(account="key alice").tokens == 10
        assert len(journal.charges()) == 2


def test_keys_are_kept_apart(ledger):
    clients = (
        Client(name="alice", key=f"sha256:{DIGEST}", budget=KeyLimits(tokens=750), metrics=True),
        Client(name="bob", key="another key of bob's", budget=KeyLimits(tokens=2000)),
    )
    with proxied(ledger, clients=clients) as proxy:
        for _ in range(5):
            proxy.ask()
        assert proxy.ask(messages=[{"role": "user", "content": "a" * 100}]).status_code == 402
        assert proxy.ask(key="another key of bob's").status_code == 200
        own = proxy.get("/metrics", key="another key of bob's").text
        assert 'key="bob"' in own
        assert "alice" not in own
        assert 'key="bob"' in proxy.get("/metrics").text
        for wrong in ("another key of bob", DIGEST, f"sha256:{DIGEST}", "\xe9" * 20):
            response = (
                proxy.ask(key=wrong)
                if wrong.isascii()
                else proxy.post(
                    "/v1/chat/completions", headers={"authorization": b"Bearer \xe9\xe9"}, json={}
                )
            )
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for header in ("", "Bearer", "Basic abc", f"Token {KEY}"):
            response = proxy.post(
                "/v1/chat/completions", headers={"authorization": header}, json={}
            )
            assert response.status_code == 401


def test_no_key_stands_in_the_ledger_or_a_repr(ledger):
    with proxied(ledger) as proxy:
        proxy.ask()
        assert KEY not in repr(proxy.budgets.accounts[0].client)
    for file in ledger.parent.iterdir():
        assert KEY.encode() not in file.read_bytes()


def test_a_keys_file(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text(
        "keys:\n"
        f"  - {{name: alice, key: 'sha256:{DIGEST}', budget: {{dollars: $5, tokens: 2M}}}}\n"
        "  - {name: bob, key: 'a long key of bob', budget: {flops: 1e18}, metrics: true}\n"
    )
    alice, bob = read_keys(file)
    assert alice.budget == KeyLimits(dollars=5.0, tokens=2e6)
    assert alice.digest.hex() == DIGEST
    assert bob.digest == hashlib.sha256(b"a long key of bob").digest()
    assert bob.budget.budget().limited == ("flops",)
    assert bob.metrics
    file.write_text(json.dumps({"keys": [{"name": "c", "key": KEY}]}))
    assert read_keys(file)[0].budget.budget().limited == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must be a mapping"),
        ("keys: []", "no keys in it"),
        ("keys: [{name: a}]", "key is missing"),
        ("keys: [{name: a, key: secret-short}]", "fewer than 16"),
        ("keys: [{name: a, key: 'sha256:12'}]", "no sha256"),
        ("keys: [{name: a, key: 12345678901234567890}]", "put it in quotes"),
        ('keys: [{name: "a\\"b", key: secret-0123456789abcdef}]', "a name is"),
        ("keys: [{name: a, key: secret-0123456789abcdef, budget: {dollar: 3}}]", "dollars"),
        ("keys: [{name: a, key: secret-0123456789abcdef, budget: {tokens: -3}}]", "tokens"),
        ("keys: [{name: a, key: ''}]", "has no key"),
        (f"keys: [{{name: a, key: {SECRET}}}, {{name: a, key: other-{SECRET}}}]", "twice"),
        (f"keys: [{{name: a, key: {SECRET}}}, {{name: b, key: {SECRET}}}]", "another"),
        ("keys: [secret-0123456789abcdef", "no YAML"),
        ("key: secret-0123456789abcdef", "unknown key"),
    ],
)
def test_a_keys_file_that_is_wrong(tmp_path, text, told):
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=told) as raised:
        read_keys(file)
    for secret in ("secret-short", "secret-0123456789abcdef", "12345678901234567890"):
        assert secret not in str(raised.value)
    assert "hint: " in str(raised.value)


def test_a_budget_in_dollars_forgets_no_unknown_price(ledger):
    """Spent before without a price: unknown is not zero."""
    with proxied(ledger, upstream=lambda url: Upstream(url=url)) as proxy:
        proxy.ask()
    with proxied(ledger, budget=KeyLimits(dollars=1.0)) as proxy:
        assert proxy.ask().status_code == 402


def test_an_account_that_spent_nothing_keeps_its_dollars(ledger):
    for _ in range(2):
        with proxied(ledger, budget=KeyLimits(dollars=1.0)) as proxy:
            assert proxy.budgets.accounts[0].left() == {"dollars": 1.0}
