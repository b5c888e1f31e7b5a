"""What a request may ask for, and the most that it can take."""

from __future__ import annotations

import json

import httpx2
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.backends.stub_server import Reply
from tests.serving.conftest import KEY, proxied
from thrifty.serving.errors import Refused
from thrifty.serving.request_limits import RequestLimits, read_request

LIMITS = RequestLimits(max_tokens=100)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "m", "prompt": "hello"}
PICTURE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]


def chat(limits: RequestLimits = LIMITS, **more):
    return read_request(json.dumps({**CHAT, **more}).encode(), "chat", limits)


def text(**more):
    return read_request(json.dumps({**TEXT, **more}).encode(), "completions", LIMITS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**6),
        ("n", 0),
        ("n", True),
        ("n", 1.5),
        ("n", "2"),
        ("best_of", 10**9),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 10**9),
        ("max_tokens", 10**400),
        ("max_tokens", "many"),
        ("max_tokens", 1e2),
        ("max_completion_tokens", 101),
        ("min_tokens", 101),
        ("top_logprobs", 128_000),
        ("prompt_logprobs", 128_000),
        ("logprobs", 5),
        ("n_predict", 10**6),
        ("max_new_tokens", 10**6),
        ("generation_config", "{}"),
        ("chat_template", "{% for i in range(9999999) %}x{% endfor %}"),
        ("use_beam_search", True),
        ("service_tier", "priority"),
        ("web_search_options", {}),
        ("modalities", ["audio"]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("model", ["m"]),
        ("model", "m" * 300),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"content": "no role"}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"role": "user", "content": [3]}]),
        ("messages", [{"role": "user", "content": PICTURE}]),
        ("messages", [{"role": "user", "content": "a"}] * 5000),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 2),
        ("seed", 2**70),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("tools", {}),
        ("response_format", "json"),
        ("logit_bias", [1]),
    ],
)
def test_a_chat_that_is_refused(field, value):
    with pytest.raises(Refused) as refused:
        chat(**{field: value})
    assert refused.value.status == 400
    about = {"best_of": "n"}.get(field, field)
    assert (refused.value.param or "").startswith(about) or "the body" in str(refused.value)
    assert "\nhint: " in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "prompt",
    [None, [], 3, {"a": 1}, [[]], ["a", 1], [[1], "a"], [True], [["a"]], ["a"] * 17],
)
def test_a_prompt_that_is_refused(prompt):
    with pytest.raises(Refused):
        text(prompt=prompt)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"{",
        b'{"a": "\\ud800"}',
        b'{"model": "m", "model": "n"}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        b'{"metadata": ' + b"[" * 300 + b"]" * 300 + b"}",
    ],
)
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_a_body_that_is_no_request(raw, kind):
    with pytest.raises(Refused) as refused:
        read_request(raw, kind, LIMITS)
    assert refused.value.status == 400


def test_a_limit_is_set_where_a_request_says_none():
    assert chat().body["max_tokens"] == 100
    assert chat(max_tokens=None).body["max_tokens"] == 100
    asked = chat(max_completion_tokens=7)
    assert "max_tokens" not in asked.body  # hosted reasoning models refuse that name
    assert asked.most.generated == 7
    assert chat(max_completion_tokens=7, max_tokens=9).most.generated == 9


def test_the_most_that_a_request_can_take():
    said = "ab\N{SNOWMAN}" * 50
    asked = chat(messages=[{"role": "system", "content": said}, {"role": "user", "content": "?"}])
    assert asked.most.prompt >= len(said.encode()) + 512
    assert asked.prompt_bytes == len(said.encode()) + 1
    asked = chat(n=3, max_tokens=10)
    assert (asked.choices, asked.most.generated) == (3, 30)
    asked = text(prompt=["a", "b"], n=3, max_tokens=10)
    assert (asked.choices, asked.most.generated) == (6, 60)
    assert text(prompt=[5] * 1000).most.prompt >= 1000
    assert text(prompt="a", best_of=4).most.generated == 400


def test_a_picture_is_bounded_by_the_context_alone():
    limits = RequestLimits(max_tokens=100, context=8192)
    asked = chat(limits, messages=[{"role": "user", "content": PICTURE}])
    assert asked.most.prompt == 8192
    assert chat(limits, messages=[{"role": "user", "content": "a" * 20_000}]).most.prompt == 8192
    assert chat(limits).most.prompt < 1000


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = (
    *("model", "messages", "prompt", "n", "best_of", "max_tokens", "max_completion_tokens"),
    *("min_tokens", "stream", "stream_options", "temperature", "top_p", "stop", "seed"),
    *("logprobs", "top_logprobs", "tools", "response_format", "logit_bias", "modalities"),
    *("service_tier", "echo", "suffix", "user", "metadata", "made_up", "thrifty"),
)
bodies = values | st.builds(
    lambda valid, more: {**valid, **more},
    st.sampled_from((CHAT, TEXT, {})),
    st.dictionaries(
        st.sampled_from(FIELDS),
        values
        | st.lists(st.fixed_dictionaries({"role": values, "content": values}), max_size=3)
        | st.just(True),
        max_size=4,
    ),
)


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    headers = {"authorization": f"Bearer {KEY}"}
    with (
        proxied(path, said_anything, limits=RequestLimits(max_tokens=64)) as proxy,
        httpx2.Client(base_url=proxy.url, headers=headers, timeout=20) as http,
    ):
        yield http


def said_anything(request):
    """A stub that reads of a request only what was checked before."""
    event = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}
    if request.json.get("stream"):
        return Reply(body=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")
    return Reply(body={"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies, path=st.sampled_from(("/v1/chat/completions", "/v1/completions")))
@example(
    body={**CHAT, "messages": [{"role": "user", "content": None}]}, path="/v1/chat/completions"
)
@example(body={**TEXT, "messages": True}, path="/v1/completions")
@example(body={**CHAT, "n": 16, "max_tokens": 64}, path="/v1/chat/completions")
@example(body={**TEXT, "metadata": 10**30}, path="/v1/completions")
def test_any_json_is_answered_or_refused(http, body, path):
    answer = http.post(path, content=json.dumps(body))
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
