"""Gradient scorers against their papers in twenty lines: one backward an example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.conftest import Tally
from tests.methods.test_scorer_contract import work_of
from thrifty.core.resolve import resolve
from thrifty.signals.adapters import adapter_weights

FEW = {"max_warmup_rows": 20, "epochs": 2, "rank": 2, "dimensions": 512, "max_target_rows": 5}


def gradient(model, wanted, example):
    """[elements], float64, of the mean loss; zero where no token carries loss."""
    ids = torch.as_tensor(np.asarray(example.input_ids, dtype=np.int64))
    keep = torch.as_tensor(np.asarray(example.loss_mask))[1:]
    if not keep.any():
        return torch.zeros(sum(w.numel() for w in wanted), dtype=torch.float64)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits[keep], ids[1:][keep])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]).double()


@pytest.fixture(scope="module")
def warm(pool, target, models):
    """What ``less`` prepared, and its model with the wanted flags set."""
    scorer = resolve("scorer", {"less": FEW})
    return scorer, scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())


def at_checkpoint(state, number):
    """The adapter's weights, and Adam's moments and step, at a checkpoint."""
    weights = adapter_weights(state.model)
    saved = state.checkpoints[number]
    with torch.no_grad():
        for weight, value in zip(weights, saved.weights, strict=True):
            weight.copy_(value)
            weight.requires_grad_(True)
    return weights, torch.cat(saved.first).double(), torch.cat(saved.second).double(), saved.step


def dense(sketch):
    places, signs = sketch._hashes
    matrix = torch.zeros(sketch.num_dimensions, sketch.num_elements, dtype=torch.float64)
    matrix[places, torch.arange(sketch.num_elements)] = signs.double()
    return matrix


def unit(vector):
    return vector / vector.norm()


def test_less_is_what_the_paper_defines(warm, pool, target):
    scorer, (state, own, directions) = warm
    shard = pool.shard(0)
    found = scorer.score(shard, (state, own, directions), Tally())[:6, 0]
    projection, expected = dense(state.sketch), np.zeros(6)
    for number in range(2):
        weights, m, v, t = at_checkpoint(state, number)
        shown = [
            unit(projection @ gradient(state.model, weights, example))
            for example in target.shard(0).tokens[:5]
        ]
        for i, example in enumerate(shard.tokens[:6]):
            g = gradient(state.model, weights, example)
            mean = (0.9 * m + 0.1 * g) / (1 - 0.9 ** (t + 1))
            spread = (0.999 * v + 0.001 * g**2) / (1 - 0.999 ** (t + 1))
            step = unit(projection @ (mean / (spread.sqrt() + 1e-8)))
            expected[i] += float(torch.stack([step @ towards for towards in shown]).mean()) / 2
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "less",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tracin", "ekfac", "datainf", "trak")),
    ],
)
def test_layers_are_those_of_the_adapter_and_of_the_price(name, pool, target, models):
    options = {option: value for option, value in FEW.items() if option != "dimensions"}
    every, last = (resolve("scorer", {name: {**options, "layers": n}}) for n in (0, 1))
    tally, shape = Tally(), models.shape
    state = last.prepare(pool, {"sums": target.shard(0)}, models, tally)
    for shard in pool.shards():
        assert np.isfinite(last.score(shard, state, tally)).all()
    names = [n for n, _ in state[0].model.named_parameters() if ".lora_" in n]
    assert len(names) == 2 * len(shape.linears_of(shape.num_layers - 1))
    assert all(f".{shape.num_layers - 1}." in name for name in names)
    work = work_of(pool, target, models)
    assert last.cost(work).flops == pytest.approx(tally.cost.flops, rel=0.03)
    assert last.cost(work).flops < every.cost(work).flops
    too_many = resolve("scorer", {name: {"layers": shape.num_layers + 1}})
    with pytest.raises(ValueError, match=rf"has {shape.num_layers} layers, not .*\nhint: ask"):
        too_many.cost(work)


def test_a_checkpoint_is_adams_state_after_an_epoch(warm, pool):
    _, (state, _, _) = warm
    one, two = state.checkpoints
    assert two.step == 2 * one.step
    assert any(not a.equal(b) for a, b in zip(one.weights, two.weights, strict=True))
    assert all((v >= 0).all() for v in two.second)


def test_tracin_is_an_inner_product(pool, target, models):
    scorer = resolve("scorer", {"tracin": FEW})
    state, own, directions = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    shard = pool.shard(1)
    found = scorer.score(shard, (state, own, directions), Tally())[:6, 0]
    projection, expected = dense(state.sketch), np.zeros(6)
    for number in range(2):
        weights, *_ = at_checkpoint(state, number)
        towards = torch.stack(
            [gradient(state.model, weights, each) for each in target.shard(0).tokens[:5]]
        ).mean(0)
        for i, example in enumerate(shard.tokens[:6]):
            g = gradient(state.model, weights, example)
            expected[i] += float((projection @ g) @ (projection @ towards)) / 2
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 1])
def test_grand_is_the_norm_of_the_gradient(layers, pool, models):
    scorer = resolve("scorer", {"grand": {"layers": layers}})
    shard, model = pool.shard(0), models.base()
    found = scorer.score(shard, scorer.prepare(pool, {}, models, Tally()), Tally())[:6, 0]
    wanted = list(model.parameters() if not layers else model.model.layers[-1].parameters())
    expected = [float(gradient(model, wanted, each).norm()) for each in shard.tokens[:6]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_grad_cosine_is_a_cosine_with_the_mean_of_unit_gradients(pool, target, models):
    scorer = resolve("scorer", {"grad_cosine": {"max_target_rows": 5}})
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    shard, model = pool.shard(0), models.base()
    found = scorer.score(shard, state, Tally())[:6, 0]
    wanted = list(model.model.layers[-1].parameters())
    towards = unit(sum(unit(gradient(model, wanted, each)) for each in target.shard(0).tokens[:5]))
    expected = [float(unit(gradient(model, wanted, each)) @ towards) for each in shard.tokens[:6]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_row_without_loss_scores_zero_and_not_nan(warm, pool):
    from types import SimpleNamespace

    scorer, state = warm
    shard = pool.shard(0)
    first = shard.tokens[0]
    silent = SimpleNamespace(
        input_ids=first.input_ids, loss_mask=np.zeros(len(first.input_ids), dtype=bool)
    )

    class Shard:
        tokens = (silent, *shard.tokens[1:3])
        num_tokens = shard.num_tokens[:3]

        def __len__(self) -> int:
            return 3

    found = scorer.score(Shard(), state, Tally())
    assert found[0, 0] == 0
    assert np.isfinite(found).all()
    assert (found[1:] != 0).all()


# -- gradients that are zero or no number, one target row, recomputation ---------------------------

GRADIENT_SCORERS = {"grand": {}, "grad_cosine": {}, "less": FEW, "tracin": FEW}
POISON = 2
"""A token that the pool does not have."""


class Some:
    """A shard of these examples."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.ids = np.arange(len(tokens))
        self.num_tokens = np.array([len(each.input_ids) for each in tokens])

    def __len__(self):
        return len(self.tokens)


def changed(example, **columns):
    from types import SimpleNamespace

    return SimpleNamespace(input_ids=example.input_ids, loss_mask=example.loss_mask, **columns)


@pytest.fixture(scope="module", params=["forward", "backward"])
def poisoned(request, tiny_model):
    """The model, in which one token's state, or the gradient at it alone, is infinite."""
    from thrifty.signals.models import LoadedModels, layers_of

    models, given = LoadedModels(tiny_model, "float32"), {}
    model = models.base()

    def infinite(values):
        return values * torch.where(given["ids"] == POISON, torch.inf, 1.0)[..., None]

    def poison(_module, _args, output):
        if request.param == "forward":
            return infinite(output)
        if output.requires_grad:
            output.register_hook(infinite)
        return None

    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.update(ids=kwargs["input_ids"]), with_kwargs=True
    )
    layers_of(model)[-1].register_forward_hook(poison)
    return models


@pytest.mark.parametrize("name", GRADIENT_SCORERS)
@pytest.mark.long
def test_a_gradient_that_is_no_number_is_no_score_and_zero_is_zero(name, pool, target, poisoned):
    scorer = resolve("scorer", {name: GRADIENT_SCORERS[name]})
    targets = {"sums": target.shard(0)} if scorer.needs_target else {}
    state = scorer.prepare(pool, targets, poisoned, Tally())
    plain = pool.shard(0).tokens[:6]
    assert not any(
        (each.input_ids == POISON).any() for shard in pool.shards() for each in shard.tokens
    )
    broken, silent = changed(plain[1]), changed(plain[3])
    broken.input_ids = np.where(np.arange(len(plain[1].input_ids)) == 2, POISON, plain[1].input_ids)
    silent.loss_mask = np.zeros_like(plain[3].loss_mask)
    before = scorer.score(Some(plain), state, Tally())[:, 0]
    found = scorer.score(Some([plain[0], broken, plain[2], silent, *plain[4:]]), state, Tally())
    assert np.isfinite(before).all()
    assert np.flatnonzero(np.isnan(found[:, 0])).tolist() == [1]
    assert found[3, 0] == 0
    np.testing.assert_allclose(found[[0, 2, 4, 5], 0], before[[0, 2, 4, 5]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["grad_cosine", "less", "tracin"])
@pytest.mark.long
def test_a_target_of_one_row_is_its_own_mean(name, pool, target, models):
    """Its score of a row is the mean's where all rows of the target are that one."""
    one = target.shard(0).tokens[:1]
    scorer = resolve("scorer", {name: GRADIENT_SCORERS[name]})
    found = []
    for rows in (one, one * 3):
        state = scorer.prepare(pool, {"sums": Some(rows)}, models, Tally())
        found.append(scorer.score(pool.shard(0), state, Tally()))
    assert np.isfinite(found[0]).all()
    assert (found[0] != 0).all()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["less", "tracin"])
@pytest.mark.long
def test_a_target_row_that_is_no_number_is_left_out_of_the_mean(name, pool, target, poisoned):
    scorer = resolve("scorer", {name: GRADIENT_SCORERS[name]})
    plain = target.shard(0).tokens[:2]
    broken = changed(plain[0])
    broken.input_ids = np.where(np.arange(len(plain[0].input_ids)) == 2, POISON, plain[0].input_ids)
    without, with_it = (
        scorer.prepare(pool, {"sums": Some(rows)}, poisoned, Tally())[2]
        for rows in (plain, [*plain, broken])
    )
    np.testing.assert_allclose(with_it, without, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="no row of the target has a gradient that is finite"):
        scorer.prepare(pool, {"sums": Some([broken])}, poisoned, Tally())


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_switched_on_changes_nothing(reentrant, pool, tiny_model):
    """Evaluation mode, in which gradients are formed, recomputes nothing."""
    from thrifty.signals.example_gradients import each_batch
    from thrifty.signals.models import load_model

    example = pool.shard(0).tokens[:1]
    model = load_model(tiny_model, "float32", "cpu").train()
    found = []
    for _ in range(2):
        ((_, gradients),) = each_batch(
            model, list(model.parameters()), example, Tally(), lambda *_: 0.0
        )
        found.append(gradients.flat())
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.training
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert found[0].equal(found[1])
    assert (found[0].norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", GRADIENT_SCORERS)
@pytest.mark.long
def test_what_is_prepared_travels_small_and_scores_the_same(name, pool, target, models):
    """A worker is given what was prepared, pickled, without the base model's weights."""
    import pickle

    from thrifty.scoring_engines import ShardScoring

    scorer = resolve("scorer", {name: GRADIENT_SCORERS[name]})
    targets = {"sums": target.shard(0)} if scorer.needs_target else {}
    state = scorer.prepare(pool, targets, models, Tally())
    here = scorer.score(pool.shard(0), state, Tally())
    work = ShardScoring(
        scorer=scorer, state=state, pool=pool.directory, allowed_flops=np.inf, num_threads=1
    )
    pickled = pickle.dumps(work)
    assert models.base().get_input_embeddings().weight.detach().numpy()[7].tobytes() not in pickled
    there = pickle.loads(pickled)
    np.testing.assert_array_equal(there.of(0).scores, here)
    np.testing.assert_array_equal(scorer.score(pool.shard(0), state, Tally()), here)
    if name in ("less", "tracin"):
        warm = there.state[0]
        numbers = sum(
            each.numel()
            for checkpoint in warm.checkpoints
            for part in (checkpoint.weights, checkpoint.first, checkpoint.second)
            for each in part
        )
        directions = 2 * 512
        num_tensors = 3 * sum(len(checkpoint.weights) for checkpoint in warm.checkpoints)
        assert len(pickled) < 4 * (numbers + directions) + 700 * num_tensors + 10_000
