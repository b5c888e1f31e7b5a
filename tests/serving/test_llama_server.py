"""llama.cpp's ``llama-server`` as an endpoint, and behind the proxy.

Where it is installed: THRIFTY_GGUF names a small model in its format.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.backends.real_server import ask, llama_server
from tests.serving.test_serve_command import KEY, ended, served
from thrifty.backends.backend import Asking, AskingFailed
from thrifty.core.ledger import Ledger

PROGRAM = shutil.which(os.environ.get("LLAMA_SERVER", "llama-server"))
GGUF = os.environ.get("THRIFTY_GGUF")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PROGRAM and GGUF), reason="no llama-server, or no THRIFTY_GGUF"),
]
ONCE = "Once upon a time"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert PROGRAM
    assert GGUF
    with llama_server(PROGRAM, Path(GGUF), "small", tmp_path_factory.mktemp("log") / "log") as url:
        yield url


def test_text_comes_back_and_its_cost_is_measured(url):
    prices = dict(prompt_price=1.0, completion_price=2.0)
    [answer], _ = ask(url, "small", Asking(prompt=ONCE, max_tokens=12), **prices)
    assert answer.trusted
    [completion] = answer.completions
    assert completion.text
    assert 1 <= completion.tokens <= 12
    prompt = answer.cost.tokens - completion.tokens
    assert prompt >= 4
    assert answer.cost.dollars == pytest.approx((prompt + 2 * completion.tokens) / 1e6)


def test_several_completions_are_counted_as_one_so_each_is_asked_for_alone(url):
    asking = Asking(prompt=ONCE, count=3, max_tokens=16, seed=7)
    (first, second, third), notes = ask(url, "small", asking, asking, asking)
    assert not first.trusted
    assert first.cost.tokens > 3 * 16
    assert any("does not count all completions" in note for note in notes)
    assert second.trusted
    assert len({completion.text for completion in second.completions}) == 3
    assert sum(completion.tokens for completion in second.completions) > 16
    assert [c.text for c in third.completions] == [c.text for c in second.completions]


def test_an_answer_is_continued_as_text(url):
    asking = Asking(prompt=ONCE, prefix=", there was", max_tokens=8, temperature=0.0)
    whole = Asking(prompt=f"{ONCE}, there was", max_tokens=8, temperature=0.0)
    (begun, put), _ = ask(url, "small", asking, whole, kind="completions")
    assert begun.completions == put.completions


def test_what_is_too_long_fails_and_costs_nothing(url):
    with pytest.raises(AskingFailed) as raised:
        ask(url, "small", Asking(prompt="once upon a time " * 2000, max_tokens=4))
    assert raised.value.cost.tokens == 0


def asked(**more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": ONCE}]
    return {"model": "small", "messages": messages, "max_tokens": 12, "seed": 1, **more}


def test_behind_the_proxy(url, tmp_path):
    options = ["--upstream", url, "--model", "small", "--price", "1,2"]
    options += ["--dollars", "0.01", "--ledger", str(tmp_path)]
    with (
        served(*options, THRIFTY_KEY=KEY) as (proxy, process),
        openai.OpenAI(base_url=f"{proxy}/v1", api_key=KEY, timeout=120) as client,
    ):
        whole = client.chat.completions.create(**asked())
        told = whole.model_extra["thrifty"]
        assert whole.choices[0].message.content
        assert told["measured"]
        assert told["tokens"] == whole.usage.total_tokens
        chunks = list(client.chat.completions.create(**asked(), stream=True))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == whole.choices[0].message.content
        streamed = chunks[-1].model_extra["thrifty"]
        assert streamed["measured"]
        assert streamed["tokens"] == told["tokens"]
        assert ended(process, signal.SIGTERM)[0] == 0
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as journal:
        assert journal.spent(account="key one").tokens == 2 * told["tokens"]


def test_a_policy_behind_the_proxy(url, tmp_path):
    options = ["--upstream", url, "--model", "small", "--ledger", str(tmp_path)]
    options += ["--policy", "{fixed: {samples: 3}}", "--answer", "none", "--tokens", "20k"]
    with (
        served(*options, THRIFTY_KEY=KEY) as (proxy, _),
        openai.OpenAI(base_url=f"{proxy}/v1", api_key=KEY, timeout=120) as client,
    ):
        told = client.chat.completions.create(**asked()).model_extra["thrifty"]
        assert told["samples"] == 3
        assert told["left"]["tokens"] == 20_000 - told["tokens"]
