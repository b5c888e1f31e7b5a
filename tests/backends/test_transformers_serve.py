"""The endpoint against the real ``transformers serve``, as a process, with a tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.real_server import ask, transformers_serve, with_template
from thrifty.backends.backend import Asking, AskingFailed
from thrifty.costs.flops import decode_flops
from thrifty.costs.shape import read_shape

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_model, tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(model, tmp_path_factory.mktemp("log") / "log") as url:
        yield url


def test_text_comes_back_and_its_cost_is_measured(url, model):
    shape = read_shape(model)
    prices = dict(prompt_price=1.0, completion_price=2.0)
    [answer], _ = ask(url, model, Asking(prompt="add two", max_tokens=12), shape=shape, **prices)
    assert answer.trusted
    [completion] = answer.completions
    assert completion.text
    assert 1 <= completion.tokens <= 12
    prompt = answer.cost.tokens - completion.tokens
    assert 1 <= prompt <= len("add two\nsay:")
    assert answer.cost.flops == decode_flops(shape, 1, int(prompt), int(completion.tokens))
    assert answer.cost.dollars == pytest.approx((prompt + 2 * completion.tokens) / 1e6)


def test_seeds_work_and_temperature_0_is_greedy(url, model):
    def asking(seed: int, temperature: float = 1.0) -> Asking:
        return Asking(prompt="add two", max_tokens=12, seed=seed, temperature=temperature)

    answers, _ = ask(url, model, asking(1), asking(1), asking(2), asking(1, 0.0), asking(2, 0.0))
    texts = [answer.completions[0].text for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4]


def test_it_gives_one_completion_a_request_and_all_come_differently(url, model):
    [answer], notes = ask(url, model, Asking(prompt="add", count=3, max_tokens=12, seed=7))
    assert len({completion.text for completion in answer.completions}) == 3
    assert answer.trusted
    assert any("one completion a request" in note for note in notes)


def test_an_answer_is_continued_as_text_and_not_in_a_chat(url, model):
    asking = Asking(prompt="add two", prefix=" three", max_tokens=8, temperature=0.0)
    whole = Asking(prompt="add two three", max_tokens=8, temperature=0.0)
    (begun, put), _ = ask(url, model, asking, whole, kind="completions")
    assert begun.completions == put.completions
    with pytest.raises(AskingFailed, match=r"continue_final_message(?s:.*)kind: completions"):
        ask(url, model, asking)


def test_another_model_is_refused_and_costs_nothing(url):
    with pytest.raises(AskingFailed, match="requested 'other'") as raised:
        ask(url, Path("other"), Asking(prompt="add two"))
    assert raised.value.cost.tokens == 0
