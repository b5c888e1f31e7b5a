"""What is handed on: as it came, charged for what it took, whatever the upstream does."""

from __future__ import annotations

import json
import time

import httpx2
import pytest

from tests.backends.stub_server import Reply
from tests.serving.conftest import KEY, PRICES, proxied
from thrifty.backends.secret import Secret
from thrifty.backends.usage import Tariff
from thrifty.core.ledger import Ledger
from thrifty.costs.shape import ModelShape
from thrifty.serving.key_budgets import KeyLimits
from thrifty.serving.upstream import Upstream

ROOM = KeyLimits(tokens=100_000, dollars=1.0)
UPPER = 600
"""A request of these tests takes at most some more tokens: its bytes, the template, 64."""


def events(response: httpx2.Response) -> list[dict]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def spent(proxy) -> float:
    return proxy.budgets.accounts[0].spent().tokens


def settled(proxy) -> None:
    """Until nothing is held any more."""
    account = proxy.budgets.accounts[0]
    for _ in range(400):
        if account.left()["tokens"] == pytest.approx(100_000 - account.spent().tokens):
            return
        time.sleep(0.005)
    raise AssertionError("a hold was never settled")


def test_an_answer_says_what_it_cost(ledger):
    with proxied(ledger, budget=ROOM) as proxy:
        response = proxy.ask()
        answer = response.json()
        assert answer["choices"][0]["message"]["content"] == "the answer is 42"
        told = answer["thrifty"]
        assert told["tokens"] == answer["usage"]["total_tokens"] == 7
        assert told["dollars"] == pytest.approx(3 * 1e-6 + 4 * 2e-6)
        assert told["measured"]
        assert told["samples"] == 1
        assert told["flops"] is None
        assert told["left"] == {"tokens": 99_993, "dollars": pytest.approx(1 - 11e-6)}
        assert response.headers["x-thrifty-tokens"] == "7"
        assert float(response.headers["x-thrifty-dollars"]) == pytest.approx(11e-6)
        assert spent(proxy) == 7
    with Ledger(ledger, read_only=True) as journal:
        whole = journal.spent(account="key alice")
        assert whole.tokens == 7
        assert whole.dollars == pytest.approx(11e-6)


def test_flops_are_told_where_the_model_is_known(ledger):
    shape = ModelShape.from_config(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 320,
        }
    )
    tariff = Tariff(shape=shape)
    with proxied(ledger, upstream=lambda url: Upstream(url=url, tariff=tariff)) as proxy:
        told = proxy.ask().json()["thrifty"]
        assert told["flops"] == tariff.cost(_usage(3, 4), 1).flops > 0
        assert told["dollars"] is None


def _usage(prompt: int, generated: int):
    from thrifty.backends.usage import Usage

    return Usage(prompt=prompt, generated=generated)


def test_what_a_client_sends_goes_on_and_nothing_else_of_it(ledger):
    secret = Secret("sk-upstream-0123456789")
    with proxied(ledger, upstream=lambda url: Upstream(url=url, key=secret)) as proxy:
        proxy.ask(temperature=0.5, top_k=7, seed=3, chat_template_kwargs={"thinking": False})
        (request,) = proxy.stub.requests
        assert request.path == "/v1/chat/completions"
        assert request.headers["authorization"] == f"Bearer {secret.reveal()}"
        assert KEY not in str(request.headers)
        assert KEY.encode() not in request.body
        assert request.json == {
            "model": "m",
            "messages": [{"role": "user", "content": "6 x 7?"}],
            "temperature": 0.5,
            "top_k": 7,
            "seed": 3,
            "chat_template_kwargs": {"thinking": False},
            "max_tokens": 64,
        }


@pytest.mark.parametrize("asked", [False, True])
def test_a_stream_passes_as_it_comes(ledger, asked):
    options = {"stream_options": {"include_usage": True}} if asked else {}
    with proxied(ledger, budget=ROOM) as proxy:
        response = proxy.ask(stream=True, **options)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.endswith("data: [DONE]\n\n")
        got = events(response)
        said = "".join(e["choices"][0]["delta"].get("content", "") for e in got if e["choices"])
        assert said == "the answer is 42"
        # Only who asked for it gets an event without choices, which some clients trip over.
        assert [bool(event["choices"]) for event in got] == [True] * 5 + [False] * asked
        assert got[-1]["thrifty"]["tokens"] == 7
        assert got[-1]["thrifty"]["measured"]
        assert all("thrifty" not in event for event in got[:-1])
        assert [e["choices"][0]["finish_reason"] for e in got if e["choices"]][-1] == "stop"
        assert spent(proxy) == 7


def test_the_first_words_do_not_wait_for_the_last(ledger):
    script = [Reply(texts=("one two three four",), pace=0.2)]
    with proxied(ledger, script) as proxy:
        body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": True}
        url, headers = f"{proxy.url}/v1/chat/completions", {"authorization": f"Bearer {KEY}"}
        times = []
        with httpx2.stream("POST", url, json=body, headers=headers) as response:
            for _ in response.iter_raw():
                times.append(time.monotonic())
        assert times[-1] - times[0] > 0.5


@pytest.mark.parametrize("stream", [False, True])
def test_of_several_choices_an_upstream_that_counts_one_is_charged_its_most(ledger, stream):
    """As llama.cpp's server does: of two choices it tells the tokens of one, or of each alone."""
    of_one = {"prompt_tokens": 46, "completion_tokens": 4}
    piece = {"object": "chat.completion.chunk", "model": "m"}
    choice = {"delta": {"content": "so it is"}, "finish_reason": "stop"}
    said = [{"choices": [{"index": i, **choice}]} for i in (0, 1)]
    said += [{"choices": [], "usage": of_one}] * 2
    streamed = "".join(f"data: {json.dumps({**piece, **each})}\n\n" for each in said)
    reply = Reply(texts=("so it is", "and is not"), usage=of_one)
    if stream:
        headers = {"content-type": "text/event-stream"}
        reply = Reply(body=f"{streamed}data: [DONE]\n\n", headers=headers)
    with proxied(ledger, [reply], budget=ROOM) as proxy:
        response = proxy.ask(n=2, max_tokens=16, stream=stream)
        told = (events(response)[-1] if stream else response.json())["thrifty"]
        assert not told["measured"]
        assert told["tokens"] >= 46 + 2 * 16


def test_text_completions_and_several_choices(ledger):
    with proxied(ledger, [Reply(texts=("a b", "c"))], budget=ROOM) as proxy:
        body = {"model": "m", "prompt": "say it", "n": 2}
        answer = proxy.post("/v1/completions", json=body).json()
        assert [choice["text"] for choice in answer["choices"]] == ["a b", "c"]
        assert answer["thrifty"]["samples"] == 2
        assert answer["thrifty"]["tokens"] == 2 + 3
        response = proxy.post("/v1/completions", json={**body, "stream": True})
        got = events(response)
        assert (
            "".join(e["choices"][0]["text"] for e in got if e["choices"][0]["index"] == 0) == "a b"
        )
        assert got[-1]["thrifty"]["tokens"] == 5
        assert spent(proxy) == 10


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "many",
        {"prompt_tokens": 3},
        {"prompt_tokens": -3, "completion_tokens": 4},
        {"prompt_tokens": 3, "completion_tokens": 10**12},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": True, "completion_tokens": 4},
        {"prompt_tokens": 3, "completion_tokens": 0},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_usage_that_cannot_be_is_charged_at_its_most(ledger, usage, stream):
    with proxied(ledger, [Reply(usage=usage)], budget=ROOM) as proxy:
        response = proxy.ask(stream=stream)
        told = (events(response)[-1] if stream else response.json())["thrifty"]
        assert told["measured"] is False
        assert told["tokens"] == spent(proxy) > UPPER
        assert proxy.serving.metrics.untrusted == 1


@pytest.mark.parametrize(
    ("status", "seen", "charged"),
    [
        (400, 400, False),
        (404, 404, False),
        (429, 429, False),
        (500, 502, False),  # whoever answers 500 bills nobody
        (503, 502, False),
        (504, 502, True),  # someone in between gave up; the model may not have
        (401, 502, False),
        (403, 502, False),
        (302, 502, False),
        (204, 502, False),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_an_upstream_refuses(ledger, status, seen, charged, stream):
    secret = Secret("sk-upstream-0123456789")
    body = {"error": {"message": f"no: Incorrect API key {secret.reveal()}"}}
    headers = {"location": "http://127.0.0.1:9/v1", "retry-after": "3"}
    script = [Reply(status=status, body=body, headers=headers)]

    def upstream(url: str) -> Upstream:
        return Upstream(url=url, key=secret, tariff=PRICES)

    with proxied(ledger, script, budget=ROOM, upstream=upstream) as proxy:
        response = proxy.ask(stream=stream)
        assert response.status_code == seen
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert secret.reveal() not in response.text
        assert len(proxy.stub.requests) == 1
        assert (spent(proxy) > 0) == charged
        if status == 429:
            assert response.headers["retry-after"] == "3"


def test_an_upstream_that_is_not_there(ledger):
    def upstream(url: str) -> Upstream:
        return Upstream(url="http://127.0.0.1:9/v1", tariff=PRICES)

    with proxied(ledger, budget=ROOM, upstream=upstream) as proxy:
        response = proxy.ask()
        assert response.status_code == 502
        assert "cannot be reached" in response.text
        assert spent(proxy) == 0


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body="no JSON"),
        Reply(body=[1, 2]),
        Reply(cut=-1),
        Reply(cut=20),
        Reply(declared_bytes=10**6, cut=100),
    ],
)
def test_an_upstream_that_breaks_off(ledger, reply):
    with proxied(ledger, [reply], budget=ROOM) as proxy:
        response = proxy.ask()
        assert response.status_code == 502
        assert response.json()["error"]["type"] == "api_error"
        assert spent(proxy) > UPPER


@pytest.mark.parametrize("cut", [10, 200, 500])
def test_a_stream_that_breaks_off_ends_in_an_error(ledger, cut):
    with proxied(ledger, [Reply(cut=cut, pace=0.01)], budget=ROOM) as proxy:
        response = proxy.ask(stream=True)
        last = events(response)[-1]
        assert "broke off" in last["error"]["message"]
        assert spent(proxy) > UPPER


@pytest.mark.parametrize(
    "sent",
    [
        b'data: {"error": {"message": "out of memory"}}\n\n',
        b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n',
        b"data: no JSON\n\ndata: [DONE]\n\n",
        b"",
        b": nothing but a comment\r\n\r\n",
    ],
)
def test_a_stream_without_an_end(ledger, sent):
    with proxied(ledger, [Reply(body=sent)], budget=ROOM) as proxy:
        response = proxy.ask(stream=True)
        assert response.status_code == 200
        assert '"error"' in response.text
        assert spent(proxy) > UPPER


def test_an_event_without_end_is_cut_off(ledger, monkeypatch):
    monkeypatch.setattr("thrifty.serving.event_stream.MAX_EVENT_BYTES", 1 << 20)
    with proxied(ledger, [Reply(body="x" * 65536, repeat=640)], budget=ROOM) as proxy:
        response = proxy.ask(stream=True)
        assert "an event of more than" in response.text
        assert len(response.content) < 10_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_spending(ledger, stream):
    script = [Reply(texts=(" ".join(["word"] * 60),), pace=0.05 if stream else 0, delay=0.2)]
    if not stream:
        script = [Reply(delay=5.0)]
    with proxied(ledger, script, budget=ROOM) as proxy:
        body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": stream}
        url, headers = f"{proxy.url}/v1/chat/completions", {"authorization": f"Bearer {KEY}"}
        began = time.monotonic()
        if stream:
            with httpx2.stream("POST", url, json=body, headers=headers) as response:
                next(response.iter_raw())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(url, json=body, headers=headers, timeout=0.3)
        while not (proxy.stub.requests and proxy.stub.requests[0].dropped):
            assert time.monotonic() - began < 15, "the upstream was not told to stop"
            time.sleep(0.01)
        settled(proxy)
        assert spent(proxy) > UPPER - 64
        metrics = proxy.serving.metrics
        while metrics.left == 0 or metrics.in_flight:  # told after what was held is settled
            assert time.monotonic() - began < 15, "nobody is counted as gone"
            time.sleep(0.01)
        assert metrics.left == 1


def test_a_request_that_takes_too_long(ledger):
    slow = Reply(texts=("word " * 50,), pace=0.05)
    with proxied(ledger, [Reply(delay=5), slow], budget=ROOM, timeout=0.3) as proxy:
        response = proxy.ask()
        assert response.status_code == 504
        response = proxy.ask(stream=True)
        assert response.status_code == 200
        assert "no answer within 0.3 s" in events(response)[-1]["error"]["message"]
        settled(proxy)


def test_models_are_those_of_the_upstream_or_the_named_one(ledger):
    with proxied(ledger, upstream=lambda url: Upstream(url=url)) as proxy:
        assert proxy.get("/v1/models").json()["data"][0]["id"] == "m"
        assert proxy.ask(model="any").status_code == 200


def test_another_model_than_the_priced_one_is_not_asked(ledger):
    with proxied(ledger, budget=ROOM) as proxy:
        response = proxy.ask(model="a-dearer-one")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert not proxy.stub.requests
