"""What answers take: predictions against what the ways of making tokens were charged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.costs.published import PUBLISHED, TINY
from tests.costs.tracing import build
from tests.methods.conftest import Tally

from thrifty.costs.decoding import decode_seconds, request_cost, token_flops, tokens_a_round
from thrifty.costs.flops import decode_flops
from thrifty.costs.hardware import load_device
from thrifty.costs.memory import kv_cache_bytes
from thrifty.costs.shape import ModelShape
from thrifty.costs.speculation import Speculation
from thrifty.costs.token_settings import EarlyExit, KVCache, TokenSettings
from thrifty.signals.early_exit import EarlyExits
from thrifty.signals.generation_batch import Way, WholePasses, answered
from thrifty.signals.generation_rows import Wanted
from thrifty.signals.speculative import Speculative

CONFIG = TINY["llama"] | dict(num_hidden_layers=4)
SHAPE = ModelShape.from_config(CONFIG)
H100 = load_device("h100")
PROMPT, NEW, COUNT = 20, 24, 3


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(CONFIG).eval()


def measured(model, way: Way, temperature: float = 0.0) -> float:
    """FLOPs of a request."""
    meter = Tally()
    asked = Wanted(
        ids=np.random.default_rng(0).integers(3, 160, PROMPT),
        max_new_tokens=NEW,
        temperature=temperature,
        random=[np.random.default_rng(i) for i in range(COUNT)],
    )
    with torch.inference_mode():
        answered(model, SHAPE, [asked], meter, way)
    return meter.cost.flops


def predicted(settings: TokenSettings | None = None, **others) -> float:
    return request_cost(
        SHAPE, PROMPT, NEW, "float32", H100, count=COUNT, settings=settings, **others
    ).flops


def test_whole_passes_and_windows_are_predicted_exactly(model):
    assert predicted() == measured(model, WholePasses())
    once, all_of_it = (decode_flops(SHAPE, 1, PROMPT, n) for n in (1, NEW))
    assert predicted() == once + COUNT * (all_of_it - once)
    for kept in (KVCache(bits=4), KVCache(window=5), KVCache(window=25, sinks=2)):
        assert predicted(TokenSettings(kv_cache=kept)) == measured(model, WholePasses(kept))


def test_early_exits_are_predicted_by_the_mean_layer_and_bounded_without_it(model):
    early = EarlyExit(threshold=0.0091)
    way = EarlyExits(early)
    spent = measured(model, way)
    mean = way.num_layers / way.num_tokens
    assert 1 < mean < 4
    settings = TokenSettings(early_exit=early)
    assert predicted(settings, layer=mean) == pytest.approx(spent, rel=0.02)
    assert spent < predicted(settings)


def test_speculation_is_predicted_by_its_acceptance_and_bounded_without_it(model):
    torch.manual_seed(0)
    draft = build(CONFIG).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    way = Speculative(draft, SHAPE, 3)
    spent = measured(model, way, temperature=1.0)
    settings = TokenSettings(draft_model="draft", draft_tokens=3)
    assert 0.3 < way.acceptance < 1
    told = predicted(settings, draft=SHAPE, acceptance=way.acceptance)
    # Rounds are whole ones, and the prediction takes the longest row's width for all of them.
    assert told == pytest.approx(spent, rel=0.15)
    assert spent < predicted(settings, draft=SHAPE)


def test_seconds_and_bytes_of_a_request_follow_its_passes():
    small, large = (
        request_cost(SHAPE, PROMPT, NEW, "bfloat16", H100, count=count) for count in (1, 64)
    )
    assert small.seconds < large.seconds < 64 * small.seconds
    cache = kv_cache_bytes(SHAPE, 64, PROMPT + NEW, "bfloat16")
    assert large.peak_memory_bytes == 2 * SHAPE.num_parameters + cache
    assert large.tokens == PROMPT + 64 * NEW
    assert request_cost(SHAPE, PROMPT, NEW, "bfloat16", H100).seconds == pytest.approx(
        decode_seconds(SHAPE, 1, PROMPT, NEW, "bfloat16", H100)
    )
    half = TokenSettings(early_exit=EarlyExit(threshold=0.9, first_layer=2, every=4))
    early = request_cost(SHAPE, PROMPT, NEW, "bfloat16", H100, settings=half, layer=2.0)
    assert early.seconds < small.seconds


def test_a_token_after_a_prompt_costs_the_same_as_in_the_sum():
    windowed = dataclasses.replace(SHAPE, sliding_window=24, num_sliding_layers=2)
    for shape in (SHAPE, windowed):
        whole = decode_flops(shape, 1, PROMPT, NEW) - decode_flops(shape, 1, PROMPT, 1)
        assert whole == sum(token_flops(shape, PROMPT + i) for i in range(NEW - 1))


class TestSpeculation:
    def test_tokens_a_round_are_those_of_drawing_them(self):
        random = np.random.default_rng(0)
        for acceptance, drafted in ((0.3, 1), (0.6, 4), (0.9, 7)):
            kept = (random.random((200_000, drafted)) < acceptance).cumprod(1).sum(1)
            assert tokens_a_round(acceptance, drafted) == pytest.approx(kept.mean() + 1, rel=0.01)
        assert tokens_a_round(1.0, 4) == 5
        assert tokens_a_round(0.0, 4) == 1

    @pytest.mark.parametrize(
        ("acceptance", "drafted", "flops", "speed"),
        [
            (0.6, 2, 1.53, 1.96),
            (0.7, 3, 1.58, 2.53),
            (0.8, 2, 1.23, 2.44),
            (0.8, 5, 1.63, 3.69),
            (0.9, 2, 1.11, 2.71),
            (0.9, 10, 1.60, 6.86),
        ],
    )
    def test_the_paper_s_table(self, acceptance, drafted, flops, speed):
        """Table 1 of arXiv:2211.17192: operations and speed where the draft takes nothing."""
        free = Speculation(acceptance=acceptance, drafted=drafted, draft_pass=0.0)
        assert free.speedup == pytest.approx(speed, abs=0.006)
        assert (drafted + 1) / free.tokens_a_round == pytest.approx(flops, abs=0.006)

    def test_it_pays_by_some_number_exactly_where_more_are_accepted_than_a_draft_takes(self):
        for acceptance in (0.2, 0.5, 0.8):
            for draft_pass in (0.1, 0.3, 0.49, 0.51, 0.9):
                found = Speculation(acceptance=acceptance, drafted=1, draft_pass=draft_pass)
                assert (found.best() > 0) == (acceptance > draft_pass), "corollary 3.9"

    def test_it_says_when_it_is_slower(self):
        slow = Speculation(acceptance=0.6, drafted=4, draft_pass=0.4, check_pass=2.5)
        assert not slow.pays
        assert "0.56 times as fast as without a draft; leave the draft model out" in str(slow)
        fast = Speculation(acceptance=0.8, drafted=2, draft_pass=0.05)
        assert fast.pays
        assert f"draft {fast.best()} tokens" in str(fast)
        best = Speculation(acceptance=0.8, drafted=fast.best(), draft_pass=0.05)
        assert best.best() == fast.best()
        assert best.speedup >= fast.speedup

    def test_large_batches_take_the_gain_away(self):
        """Llama 3 8B with a 1B draft on an H100: waiting for launches, for weights, computing."""
        shape, draft = (
            ModelShape.from_config(PUBLISHED[name]) for name in ("Llama-3-8B", "Llama-3.2-1B")
        )
        graphs = dataclasses.replace(H100, operation_seconds=0.0)
        eager, one, many = (
            Speculation.predicted(
                shape,
                draft,
                acceptance=0.7,
                drafted=4,
                rows=rows,
                context=1024,
                dtype="bfloat16",
                device=device,
            )
            for rows, device in ((1, H100), (1, graphs), (1024, graphs))
        )
        assert eager.speedup < 1.2, "a draft of half as many layers takes half as many launches"
        assert one.speedup > 1.5
        assert one.check_pass < 1.1
        assert many.check_pass > 2
        assert not many.pays

    def test_no_ratio_is_negative(self):
        with pytest.raises(ValueError, match="acceptance must be at least 0, at most 1"):
            Speculation(acceptance=1.1, drafted=2, draft_pass=0.1)


class TestSettings:
    def test_they_are_read_from_plain_values(self):
        assert TokenSettings.read({}) == TokenSettings()
        short = TokenSettings.read({"early_exit": 0.9})
        long = TokenSettings.read({"early_exit": {"threshold": 0.9}})
        assert short == long
        assert hash(short) == hash(long)
        assert TokenSettings.read({"kv_cache": {"window": 64}}).kv_cache == KVCache(window=64)

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"draft_tokens": 0}, "draft_tokens must be from 1 to 64"),
            ({"kv_cache": {}}, "either bits or a window"),
            ({"kv_cache": 8}, "kv_cache must be a mapping"),
            ({"early_exit": "soon"}, "early_exit must be"),
            ({"draft_model": "x", "kv_cache": {"bits": 8}}, "draft_model and kv_cache cannot be"),
            ({"cache": 1}, "unknown key cache: did you mean kv_cache"),
        ],
    )
    def test_mistakes_are_told(self, values, told):
        with pytest.raises(ValueError, match=told) as caught:
            TokenSettings.read(values)
        assert "\nhint: " in str(caught.value)
