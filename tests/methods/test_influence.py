"""Influence through curvature against its papers in twenty lines: one backward an example, a dense
inverse a weight, all in float64; and against retraining without a row, where that is convex."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode

from tests.methods.conftest import Tally
from thrifty.core.resolve import resolve
from thrifty.costs.operations import Adapter
from thrifty.signals import curvature, example_gradients
from thrifty.signals.adapters import adapter_weights, sharing_copy, with_adapter
from thrifty.signals.example_gradients import BatchGradients, ExampleGradients, each_batch
from thrifty.signals.forward import padded
from thrifty.signals.models import LoadedModels
from thrifty.signals.seen import Seen
from thrifty.signals.trajectories import drawn_examples
from thrifty.signals.two_sided import TwoSided, linear_sizes, linears_of_last_layers

WARM = ("ekfac", "datainf", "trak")
NAMES = (*WARM, "logra")
SAMPLE, SHOWN, SCORED = 12, 4, 6
FEW = {"max_target_rows": SHOWN, "max_curvature_rows": SAMPLE, "rank": 2}
OPTIONS = {
    **{name: {**FEW, "max_warmup_rows": 20, "epochs": 2, "learning_rate": 0.01} for name in WARM},
    "logra": {**FEW, "rank": 5},
}
OPTIONS["trak"] = {**OPTIONS["trak"], "dimensions": 64}


@pytest.fixture(scope="module")
def wide(tiny_model: Path) -> LoadedModels:
    """The tiny model in float64, and so all that is made of it."""
    return LoadedModels(tiny_model, "float64")


@pytest.fixture(scope="module")
def prepared(pool, target, wide):
    """name -> scorer, what it prepared, and its scores of the first rows."""

    def once(name, **more):
        scorer = resolve("scorer", {name: OPTIONS[name] | more})
        state = scorer.prepare(pool, {"sums": target.shard(0)}, wide, Tally())
        return scorer, state, scorer.score(pool.shard(0), state, Tally())[:SCORED, 0]

    return cache(once)


def at_checkpoint(warm, number):
    """The adapter's weights, at a checkpoint, that autograd follows."""
    weights = adapter_weights(warm.model)
    with torch.no_grad():
        for weight, saved in zip(weights, warm.checkpoints[number].weights, strict=True):
            weight.copy_(saved)
            weight.requires_grad_(True)
    return weights


def loss_of(model, example):
    ids = torch.as_tensor(np.asarray(example.input_ids, dtype=np.int64))
    keep = torch.as_tensor(np.asarray(example.loss_mask))[1:]
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits[keep], ids[1:][keep])


def gradient(model, weights, example, of=lambda loss: loss):
    """Of each weight, flat."""
    found = torch.autograd.grad(of(loss_of(model, example)), weights)
    return [each.flatten() for each in found]


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def mean(vectors):
    return [sum(each) / len(each) for each in zip(*vectors, strict=True)]


def dot(one, other):
    return float(sum(a @ b for a, b in zip(one, other, strict=True)))


def rows_of(pool, target, models):
    """The curvature's sample, the target's rows, and those that are scored."""
    _, sample = drawn_examples(pool, models, SAMPLE, 0)
    return sample, target.shard(0).tokens[:SHOWN], pool.shard(0).tokens[:SCORED]


# -- each paper in twenty lines --------------------------------------------------------------------


def sides(model, weights, example):
    """Of each weight's linear: what it was given and the gradient at what it put out, [tokens]."""
    seen = {}

    def note(module, args, output):
        output.retain_grad()
        seen[module] = (args[0].detach(), output)

    homes = [m for w in weights for m in model.modules() if getattr(m, "weight", None) is w]
    handles = [home.register_forward_hook(note) for home in homes]
    loss_of(model, example).backward()
    for handle in handles:
        handle.remove()
    return [(seen[home][0][0], seen[home][1].grad[0]) for home in homes]


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.long
def test_ekfac_is_its_formula(corrected, prepared, pool, target, wide):
    _, (warm, _, _), found = prepared("ekfac", corrected=corrected)
    weights = at_checkpoint(warm, 1)
    sample, shown, scored = rows_of(pool, target, wide)
    gradients = [gradient(warm.model, weights, each) for each in sample]
    given = [sides(warm.model, weights, each) for each in sample]
    towards = mean([gradient(warm.model, weights, each) for each in shown])
    inverses, dampings = [], []
    for place, weight in enumerate(weights):
        inputs = torch.cat([each[place][0] for each in given])
        puts_out = torch.cat([each[place][1] for each in given])
        counts = puts_out.abs().sum(1) > 0
        inputs, puts_out = inputs[counts], puts_out[counts]
        of_outputs, left = torch.linalg.eigh(puts_out.T @ puts_out / len(inputs))
        of_inputs, right = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
        basis = torch.kron(left, right)
        if corrected:
            matrices = [each[place].view(weight.shape) for each in gradients]
            values = sum((left.T @ g @ right).square() for g in matrices) / SAMPLE
        else:
            values = of_outputs.outer(of_inputs) * len(inputs) / SAMPLE
        dampings.append(0.1 * values.mean())
        dense = basis @ values.flatten().diag() @ basis.T
        inverses.append(torch.linalg.inv(dense + dampings[-1] * eye(len(dense))))
    one = sum(dampings) / len(dampings)
    moved = [one * inverse @ each for inverse, each in zip(inverses, towards, strict=True)]
    expected = [dot(gradient(warm.model, weights, each), moved) for each in scored]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_datainf_is_its_formula(prepared, pool, target, wide):
    _, (warm, _, _), found = prepared("datainf")
    weights = at_checkpoint(warm, 1)
    sample, shown, scored = rows_of(pool, target, wide)
    gradients = [gradient(warm.model, weights, each) for each in sample]
    towards = mean([gradient(warm.model, weights, each) for each in shown])
    moved, dampings = [], []
    for place, v in enumerate(towards):
        own = [each[place] for each in gradients]
        damping = 0.1 * sum(float(g @ g) for g in own) / (SAMPLE * len(v))
        dampings.append(damping)
        total = torch.zeros_like(v)
        for g in own:
            total += v - (g @ v) / (damping + g @ g) * g
        moved.append(total / (SAMPLE * damping))
    one = sum(dampings) / len(dampings)
    expected = [one * dot(gradient(warm.model, weights, each), moved) for each in scored]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def dense(sketch):
    places, signs = sketch._hashes
    matrix = torch.zeros(sketch.num_dimensions, sketch.num_elements, dtype=torch.float64)
    matrix[places, torch.arange(sketch.num_elements)] = signs.double()
    return matrix


@pytest.mark.parametrize(
    "dimensions",
    [pytest.param(64, marks=pytest.mark.slow), 7],
    ids=["fewer rows", "fewer dimensions"],
)
@pytest.mark.long
def test_trak_is_its_formula(dimensions, prepared, pool, target, wide):
    _, (warm, _, _), found = prepared("trak", dimensions=dimensions)
    sample, shown, scored = rows_of(pool, target, wide)
    projection = dense(warm.sketch)
    trust, product = np.zeros((2, SCORED)), np.zeros((2, SCORED))

    def output(loss):
        p = torch.exp(-loss)
        return torch.log(p / (1 - p))

    for number in range(2):
        weights = at_checkpoint(warm, number)

        def phi(example, weights=weights):
            return projection @ torch.cat(gradient(warm.model, weights, example, output))

        metric = torch.stack([phi(each) for each in sample])
        metric = metric.T @ metric
        damping = 0.1 * metric.trace() / dimensions
        inverse = torch.linalg.inv(metric + damping * eye(dimensions))
        for i, example in enumerate(scored):
            trust[number, i] = 1 - np.exp(-loss_of(warm.model, example).item())
            each = [float(phi(v) @ inverse @ phi(example)) for v in shown]
            product[number, i] = np.mean(each)
    np.testing.assert_allclose(found, trust.mean(0) * product.mean(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("layers", [0, 1])
def test_logra_is_the_projection_of_whole_gradients(layers, prepared, pool, target, wide):
    _, state, found = prepared("logra", layers=layers)
    model = wide.base()
    weights = linears_of_last_layers(model, layers)
    assert len(weights) == 7 * (layers or 2)
    sample, shown, scored = rows_of(pool, target, wide)

    def phi(example):
        whole = gradient(model, weights, example)
        return [
            (left.T @ g.view(w.shape) @ right).flatten()
            for g, w, (left, right) in zip(whole, weights, state.sides._sides, strict=True)
        ]

    features = [phi(each) for each in sample]
    moved = []
    for place, v in enumerate(mean([phi(each) for each in shown])):
        own = torch.stack([each[place] for each in features])
        fisher = own.T @ own
        damping = 0.1 * fisher.trace() / len(fisher)
        moved.append(torch.linalg.inv(fisher + damping * eye(len(fisher))) @ v)
    expected = [dot(phi(each), moved) for each in scored]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_projected_from_both_sides_gradients_agree_as_the_projection_widens(pool, wide):
    model = wide.base()
    weights = linears_of_last_layers(model, 0)
    examples = pool.shard(0).tokens[:40]
    agrees = []
    for rank in (64, 16, 8, 2):
        project = TwoSided(weights, rank, seed=0)
        rows = torch.zeros(40, sum(min(rank, n) * min(rank, m) for n, m in linear_sizes(
            wide.shape, 0)), dtype=torch.float64)  # fmt: skip
        whole = torch.zeros(40, sum(w.numel() for w in weights), dtype=torch.float64)
        for places, found in each_batch(model, weights, examples, Tally(), lambda *_: 0.0):
            rows[places] = torch.cat(project(found), dim=1)
            whole[places] = found.flat()
        exact = whole @ whole.T
        if rank == 64:  # no side is wider
            torch.testing.assert_close(rows @ rows.T, exact, rtol=1e-9, atol=1e-12)
        pairs = torch.triu_indices(40, 40, 1)
        units = [torch.nn.functional.normalize(each) for each in (rows, whole)]
        cosines = [(each @ each.T)[pairs[0], pairs[1]] for each in units]
        agrees.append(float(torch.corrcoef(torch.stack(cosines))[0, 1]))
    assert agrees == sorted(agrees, reverse=True)
    assert agrees[1] > 0.9


# -- curvature -------------------------------------------------------------------------------------


def one_token_each(left, right, outputs=3, inputs=4):
    """Gradients of a linear for examples of one token, as if a pass had seen them; the linear."""
    linear = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    seen = Seen(linear, right[:, None], left[:, None])
    homes = {linear: [("weight", 0)]}
    wanted, owners = [linear.weight], torch.arange(len(left))[:, None]
    return wanted, BatchGradients(wanted, homes, [seen], left.new_zeros(len(left)), owners)


def fisher_of(gradients):
    flat = gradients.flat()
    return flat.T @ flat / len(flat)


@pytest.mark.parametrize("corrected", [True, False])
def test_where_the_fisher_is_a_kronecker_product_the_inverse_is_exact(corrected):
    torch.manual_seed(0)
    outputs, inputs = torch.randn(5, 3).double(), torch.randn(6, 4).double()
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(6))  # independent sides
    wanted, gradients = one_token_each(outputs[pairs[:, 0]], inputs[pairs[:, 1]])
    bases = curvature.kfac(wanted, [gradients])
    if corrected:
        bases = curvature.ekfac(bases, [gradients])
    fisher, v = fisher_of(gradients), torch.randn(2, 12, dtype=torch.float64)
    damping = 0.3 * fisher.trace() / 12
    expected = damping * torch.linalg.solve(fisher + damping * eye(12), v.T).T
    (found,) = curvature.solved(bases, [v], 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_corrected_eigenvalues_are_nearer_to_the_fisher():
    torch.manual_seed(0)
    inputs = torch.randn(200, 4).double()
    outputs = torch.randn(200, 3).double() * inputs[:, :3].abs()  # sides that depend on each other
    wanted, gradients = one_token_each(outputs, inputs)
    (plain,) = curvature.kfac(wanted, [gradients])
    (better,) = curvature.ekfac([plain], [gradients])
    fisher = fisher_of(gradients)

    def error(basis):
        vectors = torch.kron(basis.left, basis.right)
        return float((vectors @ basis.values.flatten().diag() @ vectors.T - fisher).norm())

    assert error(better) < 0.9 * error(plain)


def test_weights_that_are_no_matrix_have_a_diagonal_and_ties_too(wide, pool):
    """Embeddings (tied to the head here) and norms; a row of zeros leaves no not-a-number."""
    model = wide.base()
    wanted = [model.model.embed_tokens.weight, model.model.norm.weight]
    ids, keep = padded(pool.shard(0).tokens[:3], "cpu")
    with ExampleGradients(model, wanted) as each:
        gradients = each.of(ids, keep)
    bases = curvature.ekfac(curvature.kfac(wanted, [gradients]), [gradients])
    squares = gradients.flat().square().mean(0)
    torch.testing.assert_close(torch.cat([b.values.flatten() for b in bases]), squares)
    v = [torch.ones(1, w.numel(), dtype=torch.float64) for w in wanted]
    dampings = [0.1 * float(b.values.mean()) for b in bases]
    for found, basis, own in zip(curvature.solved(bases, v, 0.1), bases, dampings, strict=True):
        expected = sum(dampings) / 2 / (basis.values + own)
        torch.testing.assert_close(found, expected.flatten()[None])


def test_a_ridge_is_the_same_in_rows_and_in_dimensions():
    torch.manual_seed(0)
    for n, k in ((5, 9), (9, 5)):
        phi, u = torch.randn(n, k).double(), torch.randn(2, k).double()
        own = 0.2 * phi.square().sum() / k
        expected = torch.linalg.solve(phi.T @ phi + own * eye(k), u.T).T
        torch.testing.assert_close(curvature.ridge(phi, u, 0.2), expected)
    assert not curvature.ridge(torch.zeros(3, 4), torch.ones(1, 4), 0.1).any()


# -- leaving one out -------------------------------------------------------------------------------


class Softmax(torch.nn.Module):
    """Softmax regression of the next token on the one before: convex in its one matrix."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, vocabulary, bias=False)])

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.layers[0](self.table(input_ids)))


RIDGE = 0.01


@pytest.fixture(scope="module", params=[2, 7], ids=["one token", "sequences"])
def left_out(request):
    """A convex model at its optimum and its Hessian, rows, a target, and what each row does to it
    by retraining."""
    torch.manual_seed(0)
    vocabulary, width, count = 8, 4, 120
    model = Softmax(vocabulary, width).double()
    table = model.table.weight.detach()
    table *= torch.tensor([0.3, 0.6, 1.2, 2.4])  # inputs that vary more in some directions
    truth = 0.3 * torch.randn(vocabulary, width).double()
    rows = []
    for _ in range(count + 20):
        ids = [int(torch.randint(vocabulary, ()))]
        for _ in range(int(torch.randint(1, request.param, ()))):
            ids.append(int(torch.multinomial(torch.softmax(truth @ table[ids[-1]], 0), 1)))
        loss_mask = np.ones(len(ids), dtype=bool)
        rows.append(SimpleNamespace(input_ids=np.array(ids, dtype=np.int32), loss_mask=loss_mask))
    rows, target = rows[:count], rows[count:]

    def tokens_of(examples):
        """Inputs [tokens, width], what follows, and of which example each token is."""
        ids = [torch.as_tensor(each.input_ids.astype(np.int64)) for each in examples]
        owners = torch.cat([torch.full((len(each) - 1,), i) for i, each in enumerate(ids)])
        follows = torch.cat([each[1:] for each in ids])
        return table[torch.cat([each[:-1] for each in ids])], follows, owners

    def losses(w, examples):
        x, y, owners = tokens_of(examples)
        nll = torch.nn.functional.cross_entropy(x @ w.T, y, reduction="none")
        sums = torch.zeros(len(examples), dtype=torch.float64).index_add_(0, owners, nll)
        return sums / owners.bincount()

    x, y, owners = tokens_of(rows)

    def optimum(weights, w):
        """By Newton's steps on the mean of the weighed losses and RIDGE / 2 |w|^2."""
        each = (weights / owners.bincount() / count)[owners]
        for _ in range(12):
            p = torch.softmax(x @ w.T, dim=1)
            off = p - torch.nn.functional.one_hot(y, vocabulary)
            slope = (each[:, None] * off).T @ x + RIDGE * w
            spread = p.diag_embed() - p[:, :, None] * p[:, None]
            curved = torch.einsum("t,tij,tk,tl->ikjl", each, spread, x, x)
            hessian = curved.flatten(2).flatten(0, 1) + RIDGE * eye(w.numel())
            w = w - torch.linalg.solve(hessian, slope.flatten()).view(w.shape)
        assert slope.norm() < 1e-10
        return w, hessian

    every = torch.ones(count, dtype=torch.float64)
    best, hessian = optimum(every, torch.zeros(vocabulary, width, dtype=torch.float64))
    with torch.no_grad():
        model.layers[0].weight.copy_(best)
    before = losses(best, target).mean()

    def changes(share):
        """[rows]: of the target's loss after retraining with that share of a row less."""
        found = []
        for i in range(count):
            weights = every.clone()
            weights[i] -= share
            found.append(float(losses(optimum(weights, best)[0], target).mean() - before))
        return np.array(found)

    return model, hessian, rows, target, changes


def batches_of(model, rows):
    found = each_batch(model, [model.layers[0].weight], rows, Tally(), lambda *_: 0.0)
    return [gradients for _, gradients in found]


def in_order(model, rows, directions):
    """[rows]: their products with one direction."""
    found = np.zeros(len(rows))
    wanted = [model.layers[0].weight]
    for places, gradients in each_batch(model, wanted, rows, Tally(), lambda *_: 0.0):
        found[places] = gradients.products(directions)[:, 0].numpy()
    return found


@pytest.mark.long
def test_leaving_a_row_out_does_what_its_influence_says(left_out):
    """Exact to first order with the exact Hessian; near with the others, and nearer than without
    any curvature."""
    model, hessian, rows, target, changes = left_out
    towards = sum(each.flat().sum(0) for each in batches_of(model, target))[None] / len(target)
    exact = in_order(model, rows, [torch.linalg.solve(hessian, towards.T).T]) / len(rows)
    a_little = changes(1e-4) / 1e-4
    np.testing.assert_allclose(exact, a_little, rtol=1e-3, atol=1e-3 * np.abs(exact).max())
    whole = changes(1.0)
    assert np.corrcoef(exact, whole)[0, 1] > 0.98

    wanted = [model.layers[0].weight]
    bases = curvature.kfac(wanted, batches_of(model, rows))
    bases = curvature.ekfac(bases, batches_of(model, rows))
    # A mean over tokens makes the Fisher so much smaller than the Hessian, not the ridge beside it.
    relative = RIDGE / (float(hessian.diag().mean()) - RIDGE)
    found = {
        "ekfac": in_order(model, rows, curvature.solved(bases, [towards], relative)),
        "gradients": in_order(model, rows, [towards]),
    }
    passes = (iter(batches_of(model, rows)) for _ in range(2))
    datainf = resolve("scorer", {"datainf": {"damping": relative}})
    found["datainf"] = in_order(model, rows, datainf.through_curvature(None, [towards], passes))
    rank = {name: float(spearmanr(each, whole)[0]) for name, each in found.items()}
    assert rank["ekfac"] > 0.8
    assert rank["ekfac"] > rank["datainf"] > rank["gradients"]
    assert rank["ekfac"] > rank["gradients"] + 0.2


# -- what must hold of all -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [n if n == "ekfac" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
@pytest.mark.long
def test_a_score_does_not_depend_on_the_batch(name, prepared, monkeypatch):
    _, _, together = prepared(name)
    monkeypatch.setattr(example_gradients, "BATCH_TOKENS", 40)  # a row or two
    _, _, apart = prepared.__wrapped__(name)
    np.testing.assert_allclose(apart, together, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.long
def test_a_row_or_a_target_without_loss_scores_zero_and_not_nan(name, prepared, pool, wide):
    shard = pool.shard(0)
    first = shard.tokens[0]
    nothing = np.zeros(len(first.input_ids), dtype=bool)
    silent = SimpleNamespace(input_ids=first.input_ids, loss_mask=nothing)

    class Some:
        def __init__(self, *tokens):
            self.tokens, self.num_tokens = tokens, shard.num_tokens[: len(tokens)]

        def __len__(self):
            return len(self.tokens)

    scorer, state, _ = prepared(name)
    found = scorer.score(Some(silent, *shard.tokens[1:3]), state, Tally())
    assert found[0, 0] == 0
    assert np.isfinite(found).all()
    assert (found[1:] != 0).all()
    targets = {"sums": Some(*shard.tokens[:3]), "silence": Some(silent)}
    state = scorer.prepare(pool, targets, wide, Tally())
    found = scorer.score(Some(*shard.tokens[1:3]), state, Tally())
    assert (found[:, 1] == 0).all()
    assert (found[:, 0] != 0).all()


@pytest.mark.long
def test_a_target_scores_the_same_beside_another(prepared, pool, target, wide):
    for name in NAMES:
        scorer, _, alone = prepared(name)
        targets = {"others": pool.shard(1), "sums": target.shard(0)}
        state = scorer.prepare(pool, targets, wide, Tally())
        found = scorer.score(pool.shard(0), state, Tally())[:SCORED]
        np.testing.assert_allclose(found[:, 1], alone, rtol=1e-5, atol=1e-9)
        assert not np.allclose(found[:, 0], alone)


# -- what it takes ---------------------------------------------------------------------------------


def counted(run):
    with FlopCounterMode(display=False) as counter:
        found = run()
    return found, counter.get_total_flops()


def test_what_is_made_of_gradients_takes_the_flops_that_are_said(wide, pool):
    model = with_adapter(sharing_copy(wide.base()), wide.shape.lora_targets, 2, 4.0, 0)
    weights = adapter_weights(model)
    sizes = curvature.adapter_sizes(wide.shape, Adapter(rank=2))
    assert sorted(sizes) == sorted(tuple(weight.shape) for weight in weights)
    ids, keep = padded([max(pool.shard(0).tokens, key=lambda each: len(each.input_ids))] * 4, "cpu")
    keep[:] = True
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.1)
    with ExampleGradients(model, weights) as each:
        gradients = each.of(ids, keep)
    bases, moments = counted(lambda: curvature.kfac(weights, [gradients]))
    _, turned = counted(lambda: curvature.ekfac(bases, [gradients]))
    _, formed = counted(gradients.flat)
    tokens = ids.numel()
    assert formed == 2 * tokens * curvature.num_elements(sizes)
    # The last token has no gradient, nor has any but the last layer's keys and values a part there.
    assert 0.9 < moments / (2 * tokens * curvature.sides_elements(sizes)) <= 1
    assert turned - formed == 4 * curvature.turning_flops(sizes)
    v = [torch.randn(3, weight.numel(), dtype=torch.float64) for weight in weights]
    _, solving = counted(lambda: curvature.solved(bases, v, 0.1))
    assert solving == 2 * 3 * curvature.turning_flops(sizes)


def test_what_projecting_takes_is_what_is_said(wide, pool):
    from thrifty.signals.two_sided import projection_flops

    model = wide.base()
    weights = linears_of_last_layers(model, 1)
    sizes = linear_sizes(wide.shape, 1)
    assert sorted(sizes) == sorted(tuple(weight.shape) for weight in weights)
    ids, keep = padded(pool.shard(0).tokens[:4], "cpu")
    with ExampleGradients(model, weights) as each:
        gradients = each.of(ids, keep)
    sides = TwoSided(weights, 5, 0)
    _, flops = counted(lambda: sides(gradients))
    assert flops == ids.numel() * projection_flops(sizes, 5)


@pytest.mark.parametrize(("n", "k"), [(40, 30), (30, 40)])
def test_a_ridge_takes_the_products_that_are_said(n, k):
    phi, u = torch.randn(n, k), torch.randn(2, k)
    _, flops = counted(lambda: curvature.ridge(phi, u, 0.1))
    small = min(n, k)
    elimination = 2 / 3 * small**3 + 2 * 2 * small**2
    assert flops == pytest.approx(curvature.ridge_flops(n, k, 2) - elimination)
