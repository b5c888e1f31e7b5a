"""The client that everybody has."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.backends.stub_server import Reply
from tests.serving.conftest import KEY, proxied
from thrifty.serving.key_budgets import KeyLimits

ASKED = {"model": "m", "messages": [{"role": "user", "content": "6 x 7?"}]}


@pytest.fixture
def client(ledger):
    with (
        proxied(ledger, budget=KeyLimits(tokens=2000)) as proxy,
        openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_an_answer(client):
    answer = client.chat.completions.create(**ASKED)
    assert answer.choices[0].message.content == "the answer is 42"
    assert answer.usage.total_tokens == 7
    assert answer.model_extra["thrifty"]["tokens"] == 7
    raw = client.chat.completions.with_raw_response.create(**ASKED)
    assert raw.headers["x-thrifty-tokens"] == "7"


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_a_stream(client, options):
    chunks = list(client.chat.completions.create(**ASKED, stream=True, **options))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == "the answer is 42"
    assert chunks[-1].model_extra["thrifty"]["tokens"] == 7
    assert (chunks[-1].usage is not None) == bool(options)


def test_text_and_models(client):
    assert client.completions.create(model="m", prompt="?").choices[0].text == "the answer is 42"
    assert [model.id for model in client.models.list()] == ["m"]


def test_errors_are_the_clients_own(client, ledger):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(**ASKED, max_tokens=10**9)
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(**{**ASKED, "model": "n"})
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(**ASKED)
    with pytest.raises(openai.APIStatusError, match="2 k tokens") as spent:
        client.chat.completions.create(model="m", messages=ASKED["messages"] * 100)
    assert spent.value.status_code == 402
    assert spent.value.body["left"] == {"tokens": 2000}


def test_a_stream_that_breaks_raises(ledger):
    with proxied(ledger, [Reply(cut=300)]) as proxy:
        client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=KEY, max_retries=0)
        with client, pytest.raises(openai.APIError, match="broke off"):
            list(client.chat.completions.create(**ASKED, stream=True))


def test_the_async_client(ledger):
    async def asked(url: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            stream = await client.chat.completions.create(**ASKED, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    with proxied(ledger) as proxy:
        assert asyncio.run(asked(proxy.url)) == "the answer is 42"
