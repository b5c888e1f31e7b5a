"""The real ``openai`` client, ``thrifty serve`` and the real ``transformers serve``, each a process
or a library as people have them, with a tiny model."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.backends.real_server import transformers_serve, with_template
from tests.serving.test_serve_command import KEY, ended, served
from thrifty.core.ledger import Ledger

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_model, tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def upstream(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(model, tmp_path_factory.mktemp("log") / "log") as url:
        yield url


def asked(model: Path, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "add two"}]
    return {"model": str(model), "messages": messages, "max_tokens": 12, "seed": 1, **more}


def test_handed_on(upstream, model, tmp_path):
    options = ["--upstream", upstream, "--model", str(model), "--price", "1,2"]
    options += ["--config", str(model), "--dollars", "0.01", "--ledger", str(tmp_path)]
    with (
        served(*options, THRIFTY_KEY=KEY) as (url, process),
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=120) as client,
    ):
        whole = client.chat.completions.create(**asked(model))
        told = whole.model_extra["thrifty"]
        assert whole.choices[0].message.content
        assert told["measured"]
        assert told["tokens"] == whole.usage.total_tokens
        assert told["flops"] > 0
        chunks = list(client.chat.completions.create(**asked(model), stream=True))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert said == whole.choices[0].message.content
        streamed = chunks[-1].model_extra["thrifty"]
        assert streamed["measured"]
        assert streamed["tokens"] == told["tokens"]
        assert [each.id for each in client.models.list()] == [str(model)]
        text = client.completions.create(model=str(model), prompt="add two", max_tokens=5)
        third = text.model_extra["thrifty"]["tokens"]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**asked(model), "model": "another"})
        assert ended(process, signal.SIGTERM)[0] == 0
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as journal:
        assert journal.spent(account="key one").tokens == 2 * told["tokens"] + third


@pytest.mark.parametrize("stream", [False, True])
def test_answered_by_a_policy(upstream, model, tmp_path, stream):
    options = ["--upstream", upstream, "--model", str(model), "--ledger", str(tmp_path)]
    options += ["--policy", "{fixed: {samples: 3}}", "--answer", "none", "--tokens", "20k"]
    with (
        served(*options, THRIFTY_KEY=KEY) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=120) as client,
    ):
        answer = client.chat.completions.create(**asked(model, stream=stream))
        if stream:
            chunks = list(answer)
            told = chunks[-1].model_extra["thrifty"]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            told = answer.model_extra["thrifty"]
            assert told["tokens"] == answer.usage.total_tokens
            assert answer.choices[0].message.content
        assert told["samples"] == 3
        assert told["policy"] == "fixed"
        assert told["left"]["tokens"] == 20_000 - told["tokens"]


def test_a_client_that_leaves_leaves_no_hold(upstream, model, tmp_path):
    options = ["--upstream", upstream, "--model", str(model), "--ledger", str(tmp_path)]
    with (
        served(*options, "--tokens", "20k", THRIFTY_KEY=KEY) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=120) as client,
    ):
        stream = client.chat.completions.create(**asked(model, stream=True, max_tokens=1000))
        next(iter(stream))
        stream.close()
        told = client.chat.completions.create(**asked(model)).model_extra["thrifty"]
        assert told["left"]["tokens"] <= 20_000 - 1000 - told["tokens"]
