"""How tokens are made: early exits, drafts, caches in few bits and windows, each against its
definition, at exactly the FLOPs and bytes that ``costs/`` says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from tests.costs.published import TINY, VARIANTS
from tests.costs.tracing import build
from tests.methods.conftest import Tally
from thrifty.costs.decoding import cache_bytes, exit_flops, pass_flops, token_flops
from thrifty.costs.shape import ModelShape
from thrifty.costs.token_settings import EarlyExit, KVCache, TokenSettings, refusal
from thrifty.signals.early_exit import EarlyExits, _Layered
from thrifty.signals.generation_batch import Way, WholePasses, answered
from thrifty.signals.generation_rows import Wanted
from thrifty.signals.models import layers_of
from thrifty.signals.next_token import pick, shares
from thrifty.signals.reader import Reader
from thrifty.signals.speculative import Speculative

USUAL = ("llama", "gpt2", "qwen3")
FAMILIES = [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in TINY]
LENGTHS = (7, 12, 9)


def model_of(
    name: str, layers: int = 0, seed: int = 0, **changed: object
) -> tuple[ModelShape, torch.nn.Module]:
    """In evaluation mode, on the attention that the counter sees; with as many ``layers``."""
    config = dict((TINY | VARIANTS)[name]) | changed
    if layers:
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = layers
    torch.manual_seed(seed)
    return ModelShape.from_config(config), build(config, attention="eager").eval()


def like(model: torch.nn.Module, noise: float, name: str = "llama") -> torch.nn.Module:
    """A draft model that says nearly the same."""
    _, draft = model_of(name)
    draft.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return draft


def wanted(
    shape: ModelShape, new: int = 10, count: int = 2, temperature: float = 0.0, seed: int = 0
) -> list[Wanted]:
    random = np.random.default_rng(0)
    return [
        Wanted(
            ids=random.integers(3, shape.vocab_size, length),
            max_new_tokens=new,
            temperature=temperature,
            random=[np.random.default_rng([seed, place, i]) for i in range(count)],
        )
        for place, length in enumerate(LENGTHS)
    ]


def run(model, shape, prompts: list[Wanted], way: Way | None = None) -> tuple[list, Tally]:
    meter = Tally()
    with torch.inference_mode():
        found, _ = answered(model, shape, prompts, meter, way)
    return [answer for answers in found for answer in answers], meter


def counted(model, shape, prompts: list[Wanted], way: Way) -> list:
    """Answers, whose FLOPs are checked against torch's."""
    with FlopCounterMode(display=False) as counter:
        found, meter = run(model, shape, prompts, way)
    assert meter.cost.flops == counter.get_total_flops()
    return found


def ids(answers: list) -> list[list[int]]:
    return [answer.ids.tolist() for answer in answers]


# -- early exit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_early_exits_at_threshold_1_change_nothing_and_cost_nothing(name: str):
    shape, model = model_of(name, layers=4)
    if refusal(shape, TokenSettings(early_exit=1.0)):
        pytest.skip("refused")
    plain, meter = run(model, shape, wanted(shape))
    way = EarlyExits(EarlyExit(threshold=1.0))
    found, exits = run(model, shape, wanted(shape), way)
    assert ids(found) == ids(plain)
    assert exits.cost.flops == meter.cost.flops
    assert way.num_layers == 4 * way.num_tokens


def between(model, shape) -> float:
    """A threshold that half of the tokens reach after the first layer."""
    way = EarlyExits(EarlyExit(threshold=0.999))
    seen: list[float] = []
    real = _Layered._ask

    def noted(self, number, states):
        rows = self._active.nonzero()[:, 0]
        logits = self._head(self._norm(states[rows, -1])).float()
        if number == 1:
            seen.extend(logits.softmax(-1).amax(-1).tolist())
        real(self, number, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Layered, "_ask", noted)
        run(model, shape, wanted(shape), way)
    return float(np.median(seen))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.long
def test_early_exits_are_counted_exactly_whichever_layers_rows_leave_after(name: str):
    shape, model = model_of(name, layers=4)
    if refusal(shape, TokenSettings(early_exit=0.5)):
        pytest.skip("refused")
    early = EarlyExit(threshold=between(model, shape))
    way = EarlyExits(early)
    counted(model, shape, wanted(shape), way)
    assert way.num_tokens < way.num_layers < 4 * way.num_tokens
    sparse = EarlyExits(EarlyExit(threshold=early.threshold, first_layer=2, every=2))
    counted(model, shape, wanted(shape), sparse)


def test_an_early_exit_is_what_calm_says_token_by_token():
    """Against one row at a time, with the states of a row that left copied upwards by hand."""
    shape, model = model_of("llama", layers=4)
    threshold = between(model, shape)
    early = EarlyExit(threshold=threshold)
    found, _ = run(model, shape, wanted(shape, count=1), EarlyExits(early))
    for asked, answer in zip(wanted(shape, count=1), found, strict=True):
        assert answer.ids.tolist() == by_hand(model, asked.ids.tolist(), 10, threshold)


def by_hand(model, prompt: list[int], new: int, threshold: float) -> list[int]:
    """Twenty lines of CALM: every position's state at every layer, with no cache at all."""
    inner, layers = model.model, list(layers_of(model))
    tokens, left = list(prompt), [len(layers)] * len(prompt)
    with torch.inference_mode():
        said = [int(model(torch.tensor([prompt])).logits[0, -1].argmax())]
        while len(said) < new:
            tokens.append(said[-1])
            left.append(len(layers))
            states = inner.embed_tokens(torch.tensor([tokens]))
            places = torch.arange(len(tokens))[None]
            angles = inner.rotary_emb(states, position_ids=places)
            causal = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)[None, None]
            for number, layer in enumerate(layers, 1):
                out = layer(states, attention_mask=causal, position_embeddings=angles)
                keeps = torch.tensor(left)[None, :, None] < number
                states = torch.where(keeps, states, out)
                logits = model.lm_head(inner.norm(states[0, -1]))
                if logits.softmax(-1).max() >= threshold and left[-1] == len(layers) > number:
                    left[-1], guess = number, logits
            said.append(int((logits if left[-1] == len(layers) else guess).argmax()))
    return said


def test_the_model_is_its_own_again_after_an_early_exit():
    shape, model = model_of("llama", layers=3)
    before, _ = run(model, shape, wanted(shape))
    run(model, shape, wanted(shape), EarlyExits(EarlyExit(threshold=0.0)))
    assert not any("forward" in vars(module) for module in model.modules())
    assert ids(run(model, shape, wanted(shape))[0]) == ids(before)


def test_a_token_that_leaves_early_pays_for_every_time_that_it_was_asked():
    shape, _ = model_of("llama", layers=4)
    head = 2.0 * shape.vocab_size * shape.hidden_size
    every, third = EarlyExit(threshold=0.5), EarlyExit(threshold=0.5, first_layer=3)
    whole = token_flops(shape, 20)
    assert exit_flops(shape, EarlyExit(threshold=1.0), 20, 4) == whole
    assert exit_flops(shape, every, 20, 4) == whole + 3 * head
    assert exit_flops(shape, third, 20, 4) == whole + head
    assert exit_flops(shape, third, 20, 3) < exit_flops(shape, third, 20, 4)


# -- drafts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.long
def test_greedy_tokens_are_the_same_with_a_draft_and_flops_exact(name: str):
    shape, model = model_of(name)
    if refusal(shape, TokenSettings(draft_model="draft")):
        pytest.skip("refused")
    plain, _ = run(model, shape, wanted(shape, 12))
    draft = like(model, 0.003, name)
    way = Speculative(draft, shape, 3)
    assert ids(counted(model, shape, wanted(shape, 12), way)) == ids(plain)
    assert 0 < way.acceptance <= 1
    assert 1 <= way.tokens_a_round <= 4


def test_a_row_is_the_same_whatever_it_drafts_beside():
    shape, model = model_of("llama")
    way = Speculative(like(model, 0.05), shape, 4)
    together, _ = run(model, shape, wanted(shape, 12, temperature=0.8), way)
    alone = [
        answer
        for each in wanted(shape, 12, temperature=0.8)
        for answer in run(model, shape, [each], way)[0]
    ]
    assert ids(together) == ids(alone)


@pytest.mark.long
def test_drafts_end_where_answers_do():
    shape, model = model_of("llama")
    plain, _ = run(model, shape, wanted(shape, 12))
    end = frozenset({int(plain[0].ids[5])})
    asked = [Wanted(**{**vars(each), "end_ids": end}) for each in wanted(shape, 12)]
    short, _ = run(model, shape, asked)
    way = Speculative(like(model, 0.01), shape, 4)
    found = counted(model, shape, asked, way)
    assert ids(found) == ids(short)
    assert [each.num_tokens for each in found] == [each.num_tokens for each in short]
    assert min(each.num_tokens for each in found) < 12
    for one, other in zip(found, short, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_drafts_keep_within_the_context():
    shape, model = model_of("gpt2", n_positions=16)
    _, draft = model_of("gpt2", n_positions=16)
    prompt = Wanted(ids=[5] * 12, max_new_tokens=4, random=[np.random.default_rng(0)])
    plain, _ = run(model, shape, [prompt])
    found, _ = run(model, shape, [prompt], Speculative(draft, shape, 8))
    assert ids(found) == ids(plain)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.8)])
def test_sampled_tokens_are_distributed_as_the_model_s_own(temperature: float, top_p: float):
    """All three tokens of 8 that follow one prompt, by chi-square against their probabilities."""
    shape, model = model_of("llama", vocab_size=8)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    draft = model_of("llama", seed=9, vocab_size=8)[1]
    number, prompt = 4000, [1, 5, 2, 6]
    likely: dict[tuple[int, ...], float] = {(): 1.0}
    each_t, each_p = torch.tensor([temperature]), torch.tensor([top_p])
    for _ in range(3):
        grown = {}
        for said, share in likely.items():
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *said]])).logits[:, -1].float()
            for token, own in enumerate(shares(logits, each_t, each_p)[0].tolist()):
                if own:
                    grown[*said, token] = share * own
        likely = grown
    asked = Wanted(
        ids=prompt,
        max_new_tokens=3,
        temperature=temperature,
        top_p=top_p,
        random=[np.random.default_rng(i) for i in range(number)],
    )
    way = Speculative(draft, shape, 2)
    seen = Counter(tuple(each) for each in ids(run(model, shape, [asked], way)[0]))
    assert 0.1 < way.acceptance < 0.95, "some are refused"
    assert seen.keys() <= likely.keys()
    often = [said for said, share in likely.items() if share * number >= 5]
    rest = 1 - sum(likely[said] for said in often)
    counts = [seen[said] for said in often]
    expected = [likely[said] * number for said in often]
    if rest > 1e-9:
        counts, expected = [*counts, number - sum(counts)], [*expected, rest * number]
    assert stats.chisquare(counts, expected).pvalue > 0.001


def test_pass_flops_of_several_tokens_are_counted_exactly():
    shape, model = model_of("llama")
    with torch.inference_mode():
        reader = Reader(model, shape)
        reader.read(torch.full((2, 9), 5))
        with FlopCounterMode(display=False) as counter:
            reader.read(torch.full((2, 4), 7), keep=4)
    assert counter.get_total_flops() == 2 * pass_flops(shape, 4, 9, 4)


# -- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.long
def test_a_cache_in_few_bits_has_the_bytes_that_are_counted_and_nearly_the_same_logits(bits: int):
    shape, model = model_of("llama")
    kept = KVCache(bits=bits)
    random = np.random.default_rng(0)
    tokens = torch.from_numpy(random.integers(3, shape.vocab_size, (2, 110)))
    errors = {}
    with torch.inference_mode():
        for cut in (31, 32, 75):
            reader = Reader(model, shape, kept)
            reader.read(tokens[:, :cut])
            for place in range(cut, 110):
                logits = reader.read(tokens[:, place : place + 1])[:, -1]
            assert reader.cache_bytes == cache_bytes(shape, 2, 110, "float32", kept)
            own = model(tokens).logits[:, -1]
            errors[cut] = float((logits - own).norm() / own.norm())
    plain = cache_bytes(shape, 2, 110, "float32")
    assert cache_bytes(shape, 2, 110, "float32", kept) < plain * (0.55 if bits == 8 else 0.45)
    assert max(errors.values()) < {8: 0.005, 4: 0.08}[bits]
    assert min(errors.values()) > 0


def test_packing_loses_at_most_half_a_step():
    from thrifty.holding.few_bit_cache import FewBitLayer

    torch.manual_seed(0)
    keys = torch.randn(2, 3, 64, 16) * torch.logspace(-3, 2, 16)  # channels of unlike size
    values = torch.randn(2, 3, 64, 16) + 7
    for bits in (8, 4):
        layer = FewBitLayer(bits)
        layer.update(keys, values)
        again, others = layer.update(keys[:, :, :1], values[:, :, :1])
        groups = keys.unflatten(2, (2, 32))
        steps = (groups.amax(3, keepdim=True) - groups.amin(3, keepdim=True)) / (2**bits - 1)
        lost = (again[:, :, :64].unflatten(2, (2, 32)) - groups).abs()
        slack = 2e-3 * groups.abs().amax(3, keepdim=True)  # scale and offset in float16
        assert (lost <= 0.5 * steps + slack).all()
        steps = (values.amax(3, keepdim=True) - values.amin(3, keepdim=True)) / (2**bits - 1)
        assert ((others[:, :, :64] - values).abs() <= 0.5 * steps + 0.02).all()
        constant = FewBitLayer(bits)
        constant.update(torch.full((1, 1, 32, 4), 3.0), torch.zeros(1, 1, 32, 4))
        same, zeros = constant.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
        assert (same[:, :, :32] == 3).all()
        assert (zeros[:, :, :32] == 0).all()


def test_rows_of_a_cache_in_few_bits_leave_and_multiply():
    shape, model = model_of("llama")
    many = [Wanted(**{**vars(each), "ids": [*each.ids, *([5] * 40)]}) for each in wanted(shape, 12)]
    way = WholePasses(KVCache(bits=8))
    plain = counted(model, shape, many, WholePasses())
    found = counted(model, shape, many, way)
    assert [each.flops for each in found] == [each.flops for each in plain]
    assert ids(found)[0] == ids(found)[1], "two answers to one prompt"
    agree = np.mean(
        [
            a == b
            for one, two in zip(ids(found), ids(plain), strict=True)
            for a, b in zip(one, two, strict=True)
        ]
    )
    assert agree > 0.8


def test_a_window_sees_its_sinks_and_its_last_tokens():
    """Against one pass over the whole with a mask that says what each token may see."""
    shape, model = model_of("llama", layers=1)
    kept = KVCache(window=6, sinks=2)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, shape.vocab_size, (1, 30)))
    cut, length = 12, tokens.shape[1]
    seen = torch.ones(length, length).tril().bool()
    for place in range(cut, length):  # the prompt is read whole; then what was kept, and itself
        seen[place, 2 : place - 6] = False
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, float("-inf"))
    with torch.inference_mode():
        own = model(tokens, attention_mask=mask).logits[0]
        reader = Reader(model, shape, kept)
        found = [reader.read(tokens[:, :cut])[0, -1]]
        for place in range(cut, length):
            found.append(reader.read(tokens[:, place : place + 1])[0, -1])
            assert reader.width == 8
    torch.testing.assert_close(torch.stack(found), own[cut - 1 :], rtol=1e-4, atol=1e-5)
    assert reader.cache_bytes == cache_bytes(shape, 1, length, "float32", kept)


def test_windows_of_rows_of_unlike_lengths_are_each_their_own():
    shape, model = model_of("llama")
    way = WholePasses(KVCache(window=5, sinks=2))
    together = counted(model, shape, wanted(shape, 12), way)
    alone = [a for each in wanted(shape, 12) for a in run(model, shape, [each], way)[0]]
    assert ids(together) == ids(alone)
    wide = WholePasses(KVCache(window=64))
    assert ids(run(model, shape, wanted(shape), wide)[0]) == ids(
        run(model, shape, wanted(shape))[0]
    )


# -- drawing --------------------------------------------------------------------------------------


def test_top_p_keeps_the_fewest_tokens_that_have_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.5, 0.3, 0.15, 0.05]]).log()
    one = torch.ones(2)
    found = shares(logits, one, torch.tensor([0.75, 1.0]))
    torch.testing.assert_close(found[0], torch.tensor([0.625, 0.375, 0, 0]).double())
    torch.testing.assert_close(found[1], logits[1].exp().double())
    cold = shares(logits, torch.tensor([0.0, 0.5]), one)
    assert cold[0].tolist() == [1, 0, 0, 0]
    squares = logits[1].exp().double() ** 2
    torch.testing.assert_close(cold[1], squares / squares.sum())


def test_a_token_is_picked_where_its_number_falls():
    found = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).double().expand(5, -1)
    numbers = torch.tensor([0.0, 0.19, 0.2, 0.69, 0.999999999]).double()
    assert pick(found, numbers).tolist() == [0, 0, 2, 2, 3]
    assert pick(found * 4, numbers).tolist() == [0, 0, 2, 2, 3], "shares need no sum of 1"


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("mistral-window", {"early_exit": 0.9}, "sliding window"),
        ("mistral-window", {"draft_model": "x"}, "sliding window"),
        ("deepseek_v3", {"kv_cache": {"bits": 8}}, "latents"),
        ("falcon-alibi", {"kv_cache": {"window": 9}}, "ALiBi"),
        ("gemma2-uncapped", {"early_exit": 0.9}, "sliding window"),
        ("opt-post-projected", {"early_exit": 0.9}, "projection"),
        ("llama", {"early_exit": {"threshold": 0.9, "first_layer": 9}}, "9 of 2 layers"),
    ],
)
def test_a_family_that_a_way_is_not_built_for_is_refused_with_its_reason(name, settings, told):
    shape = ModelShape.from_config((TINY | VARIANTS)[name])
    assert told in (refusal(shape, TokenSettings.read(settings)) or "")
    assert refusal(shape, TokenSettings()) is None
