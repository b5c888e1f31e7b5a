"""Scorers that come by gradients, or by what they stand for, in a cheaper or a dearer way: against
slow versions, and by what they must mean."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from tests.conftest import sentences, write_jsonl
from tests.methods.conftest import Tally, build
from tests.methods.test_scorer_contract import scores_of, work_of
from thrifty.core.resolve import resolve
from thrifty.scorers.gradients.datamodel import subset_weights
from thrifty.signals.head_gradients import each_head
from thrifty.signals.kernel_ridge import gaussian_kernel, median_width, ridge_coefficients
from thrifty.signals.some_rows import SomePool, rows_among

LESS = {"epochs": 2, "rank": 2, "dimensions": 512, "max_target_rows": 5}


def all_scores(spec, pool, targets, models):
    """[rows, targets] in the order of the pool's ids, and what was charged."""
    scorer, tally = resolve("scorer", spec), Tally()
    state = scorer.prepare(pool, targets, models, tally)
    found = np.concatenate([scorer.score(shard, state, tally) for shard in pool.shards()])
    order = np.argsort(np.concatenate([shard.ids for shard in pool.shards()]))
    return found[order], tally.cost


def ranks(column):
    return rankdata(column, method="dense")


@pytest.fixture(scope="module")
def fruit(tiny_model, tmp_path_factory):
    """A second target."""
    folder = tmp_path_factory.mktemp("fruit")
    rows = write_jsonl(folder / "fruit.jsonl", sentences("fruit", 7, 5))
    return build(rows, folder / "store", tiny_model, 40)


@pytest.fixture(scope="module")
def two(target, fruit):
    return {"sums": target.shard(0), "fruit": fruit.shard(0)}


# -- the gradient at the head ---------------------------------------------------------------------


def head_gradient(model, example):
    """[vocab, width], float64, by automatic differentiation; zero where no token carries loss."""
    ids = torch.as_tensor(np.asarray(example.input_ids, dtype=np.int64))
    keep = torch.as_tensor(np.asarray(example.loss_mask))[1:]
    weight = model.lm_head.weight.detach().double().requires_grad_()
    if not keep.any():
        return torch.zeros_like(weight)
    with torch.no_grad():
        hidden = model.model(input_ids=ids[None]).last_hidden_state[0, :-1].double()
    loss = torch.nn.functional.cross_entropy((hidden @ weight.T)[keep], ids[1:][keep])
    return torch.autograd.grad(loss, weight)[0]


def unit(gradient):
    return gradient / gradient.norm()


def test_rds_grad_is_a_cosine_of_the_heads_gradients(pool, two, models):
    scorer = resolve("scorer", {"rds_grad": {"max_target_rows": 5}})
    shard, model = pool.shard(0), models.base()
    found = scorer.score(shard, scorer.prepare(pool, two, models, Tally()), Tally())[:8]
    for column, rows in enumerate(two.values()):
        towards = sum(unit(head_gradient(model, each)) for each in rows.tokens[:5]) / 5
        own = [unit(head_gradient(model, each)) for each in shard.tokens[:8]]
        expected = [float((each * towards).sum()) for each in own]
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_at_the_head_is_never_formed_and_exact(pool, models):
    examples, model = pool.shard(0).tokens[:9], models.base()
    exact = torch.stack([head_gradient(model, each) for each in examples])
    directions = exact[:3].float()
    seen = []

    def visit(places, gradients):
        seen.extend(places)
        own = exact[places]
        squares = own.square().sum((1, 2))
        torch.testing.assert_close(gradients.squared_norms(), squares, rtol=1e-5, atol=1e-9)
        products = torch.einsum("bvw,mvw->bm", own, exact[:3]).float()
        torch.testing.assert_close(gradients.products(directions), products, rtol=1e-4, atol=1e-7)
        weights = torch.arange(1.0, len(places) + 1)
        summed = (own * weights[:, None, None]).sum(0).float()
        torch.testing.assert_close(gradients.weighed_sum(weights), summed, rtol=1e-4, atol=1e-6)

    each_head(model, models.shape, examples, Tally(), visit, passes=1)
    assert sorted(seen) == list(range(9))


def test_a_row_without_loss_has_no_direction(pool, target, models):
    scorer = resolve("scorer", "rds_grad")
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
    first, second = pool.shard(0).tokens[:2]
    silent = SimpleNamespace(
        input_ids=first.input_ids, loss_mask=np.zeros(len(first.input_ids), dtype=bool)
    )
    rows = SomeTokens([silent, second])
    found = scorer.score(rows, state, Tally())
    assert found[0, 0] == 0
    assert found[1, 0] != 0


class SomeTokens:
    def __init__(self, tokens):
        self.tokens = tokens
        self.num_tokens = np.array([len(each.input_ids) for each in tokens])

    def __len__(self):
        return len(self.tokens)


def test_rds_grad_charges_for_every_target(pool, target, fruit, two, models):
    work = work_of(pool, target, models)
    more = {"fruit": work_of(pool, fruit, models).targets["sums"]}
    work = replace(work, targets=work.targets | more)
    _, charged = all_scores("rds_grad", pool, two, models)
    assert resolve("scorer", "rds_grad").cost(work).flops == pytest.approx(charged.flops, rel=0.1)


# -- landmarks ------------------------------------------------------------------------------------


@pytest.mark.long
def test_with_all_rows_as_landmarks_the_scores_are_exact(pool, two, models):
    spec = {"influence_distillation": LESS | {"landmarks": 150}}
    found, _ = all_scores(spec, pool, two, models)
    exact, _ = all_scores({"less": LESS | {"max_warmup_rows": 150}}, pool, two, models)
    np.testing.assert_array_equal(found, exact)


@pytest.fixture(scope="module")
def carried(pool, target, models):
    """Scores from 50 landmarks and what was charged, and the exact ones under the same warm-up."""
    targets = {"sums": target.shard(0)}
    spec = {"influence_distillation": LESS | {"landmarks": 50}}
    found, cost = all_scores(spec, pool, targets, models)
    exact, _ = all_scores({"less": LESS | {"max_warmup_rows": 50}}, pool, targets, models)
    return found[:, 0], exact[:, 0], cost


@pytest.mark.long
def test_landmarks_keep_their_scores_and_carry_them_to_the_others(carried):
    found, exact, _ = carried
    landmarks = np.isclose(found, exact, rtol=1e-3, atol=1e-5)
    assert 50 <= landmarks.sum() < 60
    others = ~landmarks
    assert spearmanr(found[others], exact[others]).statistic > 0.6


def test_landmarks_are_cheaper_than_gradients_and_cost_what_was_predicted(
    carried, pool, target, models
):
    work = work_of(pool, target, models)
    few = resolve("scorer", {"influence_distillation": LESS | {"landmarks": 50}})
    assert few.cost(work).flops == pytest.approx(carried[2].flops, rel=0.1)
    exact = resolve("scorer", {"less": LESS | {"max_warmup_rows": 50}})
    assert few.cost(work).flops < 0.75 * exact.cost(work).flops


@pytest.mark.long
def test_landmarks_do_not_depend_on_shards_or_their_order(pool, whole_pool, target, models):
    scorer = resolve("scorer", {"influence_distillation": LESS | {"landmarks": 30}})
    shards, _ = scores_of(scorer, pool, target, models)
    once, _ = scores_of(scorer, whole_pool, target, models)
    for row, scores in shards.items():
        np.testing.assert_allclose(scores, once[row], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_kernel_ridge_takes_the_damping_that_does_best_on_what_it_left_out(seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(12, 3)).astype(np.float32)
    values = np.stack([np.sin(rows[:, 0]), rng.normal(size=12)], axis=1)
    kernel = gaussian_kernel(rows, rows, median_width(rows))
    distances = [np.linalg.norm(a - b) for i, a in enumerate(rows) for b in rows[:i]]
    assert median_width(rows) == pytest.approx(np.median(distances), rel=1e-5)
    for column in range(2):
        best, least = None, np.inf
        for damping in 10.0 ** np.arange(-6, 5) * np.trace(kernel) / 12:
            damped = kernel + damping * np.eye(12)
            error = 0.0
            for i in range(12):
                rest = np.delete(np.arange(12), i)
                fitted = np.linalg.solve(damped[np.ix_(rest, rest)], values[rest, column])
                error += (values[i, column] - kernel[i, rest] @ fitted) ** 2
            if error < least:
                best, least = np.linalg.solve(damped, values[:, column]), error
        found = ridge_coefficients(kernel, values)[:, column]
        np.testing.assert_allclose(found, best, rtol=1e-6, atol=1e-9)


# -- retraining on parts --------------------------------------------------------------------------


def test_a_linear_effect_of_rows_is_found_again():
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(40, 2))
    chosen = np.stack([rng.permutation(40) < 20 for _ in range(300)]).astype(float)
    losses = 3.0 + chosen @ effects + rng.normal(scale=0.3, size=(300, 2))
    found = subset_weights(chosen, losses)
    for column in range(2):
        assert np.corrcoef(found[:, column], effects[:, column])[0, 1] > 0.99
    assert not subset_weights(chosen, np.full((300, 1), 2.0)).any()


@pytest.mark.slow
def test_a_datamodel_tells_rows_that_help_from_rows_that_are_wrong(tiny_model, tmp_path, models):
    """Of 12 rows half have an answer of syllables that say nothing."""
    right = sentences("sums", 6, 6)
    wrong = [row | {"completion": " zq xj" * 20} for row in sentences("sums", 6, 7)]
    few = build(write_jsonl(tmp_path / "few.jsonl", right + wrong), tmp_path / "s", tiny_model, 5)
    asked = write_jsonl(tmp_path / "asked.jsonl", sentences("sums", 8, 8))
    asked = build(asked, tmp_path / "asked", tiny_model, 40)
    options = {"num_subsets": 24, "epochs": 5, "learning_rate": 1e-2, "rank": 4}
    targets = {"sums": asked.shard(0)}
    found, _ = all_scores({"datamodel": options}, few, targets, models)
    helps, harms = found[:6, 0], found[6:, 0]
    assert helps.mean() > 0 > harms.mean()
    assert (helps[:, None] > harms).mean() > 0.9


def test_a_datamodel_of_a_large_pool_is_refused(pool, target, models):
    scorer = resolve("scorer", {"datamodel": {"max_rows": 100}})
    with pytest.raises(ValueError, match=r"150 rows are more than its max_rows of 100\nhint: "):
        scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())


# -- the cascade ----------------------------------------------------------------------------------


def cascade(by_vectors, by_gradients, **options):
    shares = {"share_by_vectors": by_vectors, "share_by_gradients": by_gradients}
    return {"cascade": shares | {"max_target_rows": 5} | options}


@pytest.mark.long
def test_a_cascade_of_all_rows_is_its_last_stage(pool, two, models):
    found, cost = all_scores(cascade(1.0, 1.0), pool, two, models)
    exact, alone = all_scores({"less": {"max_target_rows": 5}}, pool, two, models)
    assert cost.flops == alone.flops
    for column in range(2):
        assert spearmanr(found[:, column], exact[:, column]).statistic > 0.99999
    vectors, cost = all_scores(cascade(1.0, 0.0), pool, two, models)
    exact, alone = all_scores({"embedding": {"max_target_rows": 5}}, pool, two, models)
    assert cost.flops == alone.flops
    np.testing.assert_array_equal(ranks(vectors[:, 0]), ranks(exact[:, 0]))


@pytest.mark.parametrize("first", ["dsir", pytest.param("bm25", marks=pytest.mark.slow)])
def test_a_cascade_of_no_rows_is_its_first_stage(first, pool, two, models):
    found, cost = all_scores(cascade(0.0, 0.0, first=first), pool, two, models)
    exact, _ = all_scores({"dsir": {"by": "word"}} if first == "dsir" else first, pool, two, models)
    assert cost.flops == 0
    assert found.max() < 1
    for column in range(2):
        assert spearmanr(found[:, column], exact[:, column]).statistic > 0.99999


@pytest.mark.long
def test_a_cascade_passes_the_best_rows_on_within_their_share(pool, two, models):
    """Against the stages one by one, each on what the one before left."""
    found, _ = all_scores(cascade(0.4, 0.15), pool, two, models)
    stage = np.floor(found).astype(int)
    assert (stage[:, 0] == stage[:, 1]).all()
    ids = np.sort(np.concatenate([shard.ids for shard in pool.shards()]))
    tokens = np.concatenate([shard.num_tokens for shard in pool.shards()])
    share = tokens[stage[:, 0] > 0].sum() / tokens.sum()
    assert 0.35 < share <= 0.4
    assert 0.1 < tokens[stage[:, 0] > 1].sum() / tokens.sum() <= 0.15
    words, _ = all_scores({"dsir": {"by": "word"}}, pool, two, models)
    best = np.max([ranks(words[:, 0]), ranks(words[:, 1])], axis=0)
    least_passed = best[stage[:, 0] > 0].min()
    # Above it only rows that did not fit any more, or that share their place with one such.
    assert (best[stage[:, 0] == 0] >= least_passed).sum() <= 4
    listed = SomePool(pool, ids[stage[:, 0] > 1])
    gradients, _ = all_scores({"less": {"max_target_rows": 5}}, listed, two, models)
    np.testing.assert_array_equal(ranks(found[stage[:, 0] > 1, 0]), ranks(gradients[:, 0]))


@pytest.mark.parametrize(
    ("shares", "layers"),
    [
        ((0.5, 0.1), 1),
        pytest.param((0.3, 0.3), 0, marks=pytest.mark.slow),
        pytest.param((0.6, 0.0), 0, marks=pytest.mark.slow),
    ],
)
def test_a_cascade_costs_what_was_predicted(shares, layers, pool, target, models):
    by_vectors, by_gradients = shares
    options = {"share_by_vectors": by_vectors, "share_by_gradients": by_gradients}
    spec = {"cascade": {**options, "layers": layers}}
    _, charged = all_scores(spec, pool, {"sums": target.shard(0)}, models)
    predicted = resolve("scorer", spec).cost(work_of(pool, target, models))
    assert predicted.flops == pytest.approx(charged.flops, rel=0.1)


def test_a_short_list_beyond_the_rows_before_it_is_refused():
    with pytest.raises(ValueError, match="is more than share_by_vectors"):
        resolve("scorer", cascade(0.1, 0.2))


def test_some_rows_are_those_of_the_whole(pool):
    shard = pool.shard(1)
    ids = np.sort(np.r_[shard.ids[[2, 7, 30]], 10**6])
    rows = rows_among(shard, ids)
    assert rows.ids.tolist() == ids[:3].tolist()
    for name in ("texts", "prompts", "completions", "fingerprints", "rows", "num_tokens"):
        whole = getattr(shard, name)
        assert list(getattr(rows, name)) == [whole[place] for place in (2, 7, 30)]
    for each, place in zip(rows.tokens, (2, 7, 30), strict=True):
        assert each is shard.tokens[place]
    assert SomePool(pool, ids).num_shards == 1
    assert len(rows_among(shard, ids[3:])) == len(rows_among(shard, ids[:0])) == 0
