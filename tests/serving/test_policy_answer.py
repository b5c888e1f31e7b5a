"""What a policy answers: drawn again, charged draw by draw, told in the usual shape."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest

from tests.backends.stub_server import Received, Reply
from tests.serving.conftest import KEY, PRICES, Proxy, proxied
from thrifty.backends.endpoint import Endpoint
from thrifty.backends.retries import Retries
from thrifty.core.contracts import AnswerForm
from thrifty.core.ledger import Ledger
from thrifty.decoding.adaptive_consistency import AdaptiveConsistency
from thrifty.decoding.fixed import Fixed
from thrifty.decoding.marginal import Marginal
from thrifty.serving.key_budgets import KeyLimits
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.one_by_one import FIRST_PRICE
from thrifty.serving.policy_answer import Improver


@dataclass(frozen=True, kw_only=True)
class LastWord(AnswerForm):
    """The last word of a text."""

    source: ClassVar[str] = "this test"

    def read(self, text: str, prompt: str = "") -> str | None:
        return text.split()[-1] if text.split() else None


@contextmanager
def improved(
    ledger: Path,
    script: Any,
    policy: Any = None,
    tokens: float = 100_000,
    mean_samples: float | None = None,
    **settings: Any,
) -> Iterator[Proxy]:
    def improver(url: str) -> Improver:
        backend = Endpoint(
            url,
            "m",
            prompt_price=PRICES.prompt_price,
            completion_price=PRICES.completion_price,
            retries=Retries(attempts=1),
        )
        return Improver(
            policy=policy or Fixed(samples=5),
            form=LastWord(),
            backends={"m": backend},
            max_samples=8,
            mean_samples=mean_samples,
            knows_flops=False,
            resource="dollars",
            metrics=ServeMetrics(),
        )

    budget = KeyLimits(tokens=tokens, dollars=1.0)
    with proxied(ledger, script, budget=budget, improver=improver, **settings) as proxy:
        yield proxy


SAYS = Reply(texts=("it is 41", "surely 42", "so 42", "hence 42", "or 40"))


def test_the_vote_of_five(ledger):
    with improved(ledger, [SAYS]) as proxy:
        response = proxy.ask(temperature=0.9)
        answer = response.json()
        assert answer["choices"][0]["message"]["content"] == "surely 42"
        assert answer["object"] == "chat.completion"
        assert answer["model"] == "m"
        told = answer["thrifty"]
        assert (told["policy"], told["samples"], told["confidence"]) == ("fixed", 5, 0.6)
        assert told["reason"] == "5 samples, as asked"
        assert response.headers["x-thrifty-samples"] == "5"
        assert response.headers["x-thrifty-confidence"] == "0.6"
        (request,) = proxy.stub.requests
        assert request.json["n"] == 5
        assert request.json["temperature"] == 0.9
        words = sum(len(text.split()) for text in SAYS.texts)
        assert answer["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": words,
            "total_tokens": 3 + words,
        }
        assert told["tokens"] == 3 + words
        assert told["dollars"] == pytest.approx((3 + 2 * words) / 1e6)
    with Ledger(ledger, read_only=True) as journal:
        assert journal.spent(account="key alice").tokens == 3 + words


def test_a_policy_that_stops_early_spends_less(ledger):
    with improved(ledger, [Reply(texts=("42",))], AdaptiveConsistency()) as proxy:
        told = proxy.ask().json()["thrifty"]
        assert 1 < told["samples"] < 8
        assert told["confidence"] > 0.9
        generated = sum(request.json.get("n", 1) for request in proxy.stub.requests)
        assert generated == told["samples"]
        assert proxy.budgets.accounts[0].spent().tokens == told["tokens"]


@pytest.mark.parametrize("asked", [False, True])
def test_a_stream_is_kept_alive_until_there_is_an_answer(ledger, asked):
    text = "a long way to say that it is 42 " * 10
    script = [Reply(texts=(text,), delay=0.5)]
    more = {"stream_options": {"include_usage": True}} if asked else {}
    with improved(ledger, script, keep_alive=0.1) as proxy:
        response = proxy.ask(stream=True, **more)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.count(": thrifty is sampling") >= 4
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == text
        assert len(deltas) > 4
        assert deltas[0]["role"] == "assistant"
        assert events[-1]["thrifty"]["samples"] == 5
        assert [bool(event["choices"]) for event in events][-1] is not asked
        assert ("usage" in events[-1]) is asked


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"n": 2}, "2 completions"),
        ({"logprobs": True}, "log-probabilities"),
        ({"temperature": 0}, "temperature 0"),
        ({"made_up": 1}, "made_up"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]}, "text"),
        ({"messages": [{"role": "user", "content": "?", "name": "a"}]}, "text"),
    ],
)
def test_what_no_policy_improves_is_handed_on(ledger, body, why):
    with improved(ledger, lambda request: Reply()) as proxy:
        if "list" in str(type(body.get("messages", [{}])[0].get("content"))):
            proxy.stub._script = lambda request: Reply(body={"choices": []})
        told = proxy.ask(**body).json()["thrifty"]
        assert told["policy"] == "first"
        assert why in told["reason"]
        assert len(proxy.stub.requests) == 1


def test_text_completions_are_handed_on(ledger):
    with improved(ledger, [Reply()]) as proxy:
        for prompt in ("say", [1, 2, 3]):
            proxy.stub._script = lambda request: Reply(body={"choices": []})
            body = {"model": "m", "prompt": prompt}
            told = proxy.post("/v1/completions", json=body).json()["thrifty"]
            assert told["policy"] == "first"


def test_settings_that_the_backend_knows_reach_it(ledger):
    with improved(ledger, [Reply()]) as proxy:
        form = {"type": "json_object"}
        told = proxy.ask(response_format=form, top_k=3, seed=5, stop=["\n"], user="u").json()
        assert told["thrifty"]["policy"] == "fixed"
        request = proxy.stub.requests[0].json
        assert request["response_format"] == form
        assert (request["top_k"], request["seed"], request["stop"]) == (3, 5, ["\n"])


def test_the_budget_ends_the_sampling(ledger):
    """One sample at a time; what is left pays for some of them, and the answer says so."""

    def one(request: Received) -> Reply:
        return Reply(texts=("word " * 60 + "42",), choices=1)

    with improved(ledger, one, Fixed(samples=8), tokens=8 * 64 * 2 + 1500) as proxy:
        told = proxy.ask().json()["thrifty"]
        spent = proxy.budgets.accounts[0].spent().tokens
        assert told["samples"] >= 1
        assert told["tokens"] == spent <= 8 * 64 * 2 + 1500
        last = proxy.ask()
        while last.status_code == 200:
            last = proxy.ask()
        assert last.status_code == 402
        assert last.json()["error"]["code"] == "insufficient_quota"
        took = sum(len(request.prompt.split()) + 61 for request in proxy.stub.requests)
        assert proxy.budgets.accounts[0].spent().tokens == took <= 8 * 64 * 2 + 1500


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_down(ledger, stream):
    with improved(ledger, [Reply(status=500)]) as proxy:
        response = proxy.ask(stream=stream)
        assert response.status_code == (200 if stream else 502)
        assert "500" in response.text
        assert proxy.budgets.accounts[0].spent().tokens == 0


def test_an_upstream_that_refuses_the_key_is_not_quoted(ledger):
    body = {"error": {"message": "Incorrect API key sk-abc***xyz"}}
    with improved(ledger, [Reply(status=401, body=body)]) as proxy:
        response = proxy.ask()
        assert response.status_code == 502
        assert "sk-abc" not in response.text


def test_what_came_before_a_failure_is_answered(ledger):
    script = [Reply(choices=1), Reply(choices=1), Reply(status=500)]
    with improved(ledger, script, AdaptiveConsistency()) as proxy:
        told = proxy.ask().json()["thrifty"]
        assert told["samples"] == 2
        assert "failed" in told["reason"]


def test_unreadable_answers_are_returned_and_told(ledger):
    with improved(ledger, [Reply(texts=("",))]) as proxy:
        answer = proxy.ask().json()
        assert answer["choices"][0]["message"]["content"] == ""
        assert answer["thrifty"]["confidence"] == 0
        assert "without a readable answer" in answer["thrifty"]["reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_sampling(ledger, stream):
    with improved(ledger, [Reply(delay=5)], keep_alive=0.1) as proxy:
        body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": stream}
        url, headers = f"{proxy.url}/v1/chat/completions", {"authorization": f"Bearer {KEY}"}
        if stream:
            with httpx2.stream("POST", url, json=body, headers=headers) as response:
                pieces = response.iter_raw()
                for _ in range(3):
                    next(pieces)
        else:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(url, json=body, headers=headers, timeout=0.3)
        began = time.monotonic()
        while not proxy.stub.requests[0].dropped:
            assert time.monotonic() - began < 15
            time.sleep(0.01)
        account = proxy.budgets.accounts[0]
        while account.left()["tokens"] != pytest.approx(100_000 - account.spent().tokens):
            assert time.monotonic() - began < 15
            time.sleep(0.01)
        assert account.spent().tokens > 5 * 64  # the most that was held for it
        assert len(proxy.stub.requests) == 1


def test_questions_at_the_same_time_share_one_budget(ledger):
    def says(request: Received) -> Reply:
        return Reply(texts=("41", "42", "42", "40", "42"), delay=0.01)

    with improved(ledger, says, tokens=20_000) as proxy:
        statuses = []

        def client() -> None:
            for _ in range(8):
                statuses.append(proxy.ask().status_code)

        threads = [threading.Thread(target=client) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = sum(len(r.prompt.split()) + r.json["n"] for r in proxy.stub.requests)
        assert proxy.budgets.accounts[0].spent().tokens == took <= 20_000
        assert set(statuses) <= {200, 402, 429}
        assert 200 in statuses


@pytest.mark.parametrize(("says", "rises"), [("41 42 43 44", True), ("42", False)])
def test_what_a_sample_is_worth_is_learnt_from_the_requests_before(ledger, says, rises):
    """A mean of two: what is never settled takes more and makes the next ones dearer, what is
    settled at once leaves them more."""
    words = says.split()

    def one(request: Received) -> Reply:
        return Reply(texts=(words[len(proxy.stub.requests) % len(words)],), choices=1)

    with improved(ledger, one, Marginal(), mean_samples=2.0) as proxy:
        for _ in range(6):
            assert proxy.ask(temperature=0.8).status_code == 200
        flow = proxy.serving.improver._flow
        assert (flow.price("alice") > FIRST_PRICE) is rises
        assert len(flow.past) >= 3
        assert not any(asked.prompt for asked in flow.past)


def test_the_model_may_be_left_to_the_policy(ledger):
    with improved(ledger, [Reply()]) as proxy:
        names = [model["id"] for model in proxy.get("/v1/models").json()["data"]]
        assert names == ["thrifty", "m"]
        assert proxy.ask(model="thrifty").json()["model"] == "m"
        assert proxy.ask(model="thrifty", n=2).status_code == 200
        assert proxy.ask(model="another").status_code == 404
