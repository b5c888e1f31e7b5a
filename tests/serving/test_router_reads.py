"""A router with a model of its own, behind the proxy: who pays for what it reads."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.backends.stub_server import Reply
from tests.decoding.routed import of_two_kinds, question, save_sentence_model
from tests.serving.conftest import PRICES, proxied
from thrifty.backends.endpoint import Endpoint
from thrifty.backends.retries import Retries
from thrifty.core.ledger import Ledger
from thrifty.decoding.router import Router
from thrifty.serving.key_budgets import KeyLimits
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.policy_answer import Improver
from thrifty.signals import accuracy_predictors, question_vectors
from thrifty.signals.sentence_vectors import encoder_of


@pytest.fixture(scope="module")
def sentence_model(tiny_model, tmp_path_factory):
    return save_sentence_model(tiny_model, tmp_path_factory.mktemp("sentences") / "model")


@contextmanager
def routed(ledger, sentence_model, monkeypatch, budget):
    monkeypatch.setattr(accuracy_predictors, "NUM_TREES", 10)
    outcomes = of_two_kinds(np.random.default_rng(0).integers(1, 999, 300).tolist())

    def improver(url):
        backends = {
            model: Endpoint(
                url,
                model,
                prompt_price=PRICES.prompt_price * times,
                completion_price=PRICES.completion_price * times,
                retries=Retries(attempts=1),
            )
            for model, times in (("cheap", 1.0), ("dear", 10.0))
        }
        return Improver(
            policy=Router(embedding=sentence_model),
            form=None,
            fit_on=outcomes,
            backends=backends,
            max_samples=1,
            knows_flops=False,
            resource="dollars",
            metrics=ServeMetrics(),
        )

    with proxied(ledger, [Reply(texts=("so be it",))], budget=budget, improver=improver) as proxy:
        question_vectors._kept.clear()
        yield proxy


def asked(proxy, kind, number):
    messages = [{"role": "user", "content": question(kind, number)}]
    return proxy.ask(messages=messages, max_tokens=20)


def test_each_goes_to_who_knows_and_its_key_pays_for_the_reading(
    ledger, sentence_model, monkeypatch
):
    limits = KeyLimits(flops=1e12)
    with routed(ledger, sentence_model, monkeypatch, limits) as proxy:
        answers = [asked(proxy, kind, 4321).json() for kind in (1, 0)]
        assert [answer["model"] for answer in answers] == ["cheap", "dear"]
        assert [request.json["model"] for request in proxy.stub.requests] == ["cheap", "dear"]
        of_one = encoder_of(Path(sentence_model)).flops(1, 5)
        account = proxy.budgets.accounts[0]
        read = account.spent().flops
        assert read > 2 * of_one
        asked(proxy, 1, 4321)
        assert account.spent().flops == read, "its vector is kept: nothing to read"
    with Ledger(ledger, read_only=True) as journal:
        assert journal.spent(account="key alice").flops == read


def test_what_a_key_cannot_pay_is_not_read(ledger, sentence_model, monkeypatch):
    with routed(ledger, sentence_model, monkeypatch, KeyLimits(flops=10.0)) as proxy:
        response = asked(proxy, 1, 8765)
        assert response.status_code == 402
        assert "10 FLOP of the budget of alice is left" in response.json()["error"]["message"]
        assert not question_vectors._kept
        assert not proxy.stub.requests, "nobody was asked"
        assert proxy.budgets.accounts[0].spent().flops == 0
