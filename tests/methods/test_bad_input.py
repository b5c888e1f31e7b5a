"""Input that is empty, alone, all alike, too long or in no known script: every picker, filter and
scorer has one defined outcome for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_jsonl
from tests.methods.conftest import Tally, briefly, build, usual
from tests.runs import planned, silent
from thrifty import stages
from thrifty.core import sums
from thrifty.core.contracts import Candidates, Held
from thrifty.core.resolve import all_names, method_class, resolve
from thrifty.run_folder import RunFolder
from thrifty.signals.models import LoadedModels

PICKERS = [*all_names("picker"), {"facility_location": {"over": "delift"}}]
FILTERS = all_names("filter")
SCORERS = all_names("scorer")
WITH_ANOTHER_MODEL = [
    name
    for name in SCORERS
    if "model" in {option.name for option in fields(method_class("scorer", name))}
    and name != "quality"  # whose classifier has a tokenizer of its own
]


class Look:
    """Of rows that are all the same."""

    def __init__(self, count):
        self.count = count

    def texts(self):
        yield np.arange(self.count), ["the same words again and again"] * self.count

    def vectors(self, ids):
        return np.full((len(ids), 4), 0.5, dtype=np.float32)

    def pairwise_utility(self, ids):
        return np.zeros((len(ids), len(ids)), dtype=np.float32)


def candidates(scores, tokens=10):
    scores = np.asarray(scores, dtype=np.float32)
    scores = scores[:, None] if scores.ndim == 1 else scores
    count, targets = scores.shape
    return Candidates(
        ids=np.arange(count),
        scores=scores,
        num_tokens=np.full(count, tokens),
        fingerprints=np.full(count, np.void(b"x" * 16), dtype="V16"),
        targets=tuple(f"t{k}" for k in range(targets)),
        weights=(1.0,) * targets,
        look=Look(count),
    )


def pick(spec, rows, budget, seed=0):
    picked = resolve("picker", spec).pick(rows, budget, seed)
    assert len(picked.weights) == len(picked.ids)
    return picked.ids.tolist()


# -- pickers and filters ------------------------------------------------------------------------


@pytest.mark.parametrize("spec", PICKERS, ids=str)
@pytest.mark.parametrize("targets", [1, 2])
def test_of_no_candidates_none_is_picked(spec, targets):
    assert pick(spec, candidates(np.zeros((0, targets))), 100) == []


@pytest.mark.parametrize("spec", PICKERS, ids=str)
@pytest.mark.parametrize("targets", [1, 2])
def test_a_budget_beyond_the_pool_takes_it_whole(spec, targets):
    rows = candidates(np.random.default_rng(0).normal(size=(7, targets)))
    assert sorted(pick(spec, rows, 71)) == list(range(7))


@pytest.mark.parametrize("spec", PICKERS, ids=str)
@pytest.mark.parametrize("value", [0.0, -3.5, np.inf, -np.inf])
def test_equal_scores_fill_the_budget_and_repeat(spec, value):
    rows = candidates(np.full(40, value))
    chosen = pick(spec, rows, 105)
    assert len(chosen) == 10
    assert chosen == pick(spec, rows, 105)


@pytest.mark.parametrize("spec", [s for s in PICKERS if not isinstance(s, dict)])
def test_equal_scores_are_drawn_by_the_seed(spec):
    rows = candidates(np.zeros(40))
    assert len({tuple(pick(spec, rows, 105, seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("spec", PICKERS, ids=str)
def test_rows_without_any_score_are_not_picked(spec):
    assert pick(spec, candidates(np.full((9, 2), np.nan)), 1000) == []
    one = np.full((9, 2), np.nan)
    one[4, 1] = 0.5
    assert pick(spec, candidates(one), 1000) == [4]


@pytest.mark.parametrize("spec", PICKERS, ids=str)
def test_no_row_that_fits_is_no_error(spec):
    assert pick(spec, candidates(np.arange(5.0), tokens=50), 49) == []
    assert pick(spec, candidates(np.arange(5.0)), 0) == []


def test_an_id_that_is_there_twice_is_refused():
    rows = candidates(np.zeros(3))
    with pytest.raises(ValueError, match="row 1 is among the candidates twice\nhint: "):
        rows.where(np.array([0, 1, 2, 1]))


@pytest.mark.parametrize("name", FILTERS)
def test_of_no_candidates_none_is_dropped(name):
    held = Held({"dev rows of t": frozenset({b"x" * 16})})
    assert resolve("filter", name).drop(candidates(np.zeros((0, 1))), held) == {}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_of_rows_all_the_same_one_is_left(name, value):
    rows = candidates(np.full(12, value))
    dropped = resolve("filter", name).drop(rows, Held({}))
    assert sorted(dropped) == ([] if name == "overlap" else list(range(1, 12)))
    held = Held({"dev rows of t": frozenset({b"x" * 16})})
    gone = resolve("filter", name).drop(rows, held)
    assert len(gone) == (12 if name == "overlap" else 11)


# -- scorers ------------------------------------------------------------------------------------


def scores(name, pool, models, target):
    """[rows, targets] of all shards."""
    scorer = briefly(name)
    targets = {"sums": target.shard(0)} if scorer.needs_target else {}
    state = scorer.prepare(pool, targets, models, Tally())
    found = [scorer.score(shard, state, Tally()) for shard in pool.shards()]
    for each, shard in zip(found, pool.shards(), strict=True):
        assert each.dtype == np.float32
        assert each.shape == (len(shard), max(len(targets), 1))
    return np.concatenate(found)


def store(rows, folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    return build(write_jsonl(folder / "rows.jsonl", rows), folder / "store", model, 40)


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory):
    """A target of one row."""
    rows = [{"prompt": "say two:", "completion": " plus three equals five."}]
    return store(rows, tmp_path_factory.mktemp("alone"), tiny_model)


@pytest.mark.parametrize("name", usual(SCORERS))
@pytest.mark.long
def test_a_target_of_one_row_scores_the_pool(name, pool, models, alone):
    assert np.isfinite(scores(name, pool, models, alone)).all()


@pytest.mark.parametrize("name", usual(SCORERS))
def test_a_pool_of_one_row_has_a_score(name, models, alone):
    assert np.isfinite(scores(name, alone, models, alone)).all()


@pytest.mark.parametrize("name", usual(SCORERS))
def test_rows_that_are_there_twice_all_have_scores(name, tiny_model, tmp_path, models, target):
    rows = [{"prompt": "say apple:", "completion": " sweet pear."}] * 90
    found = scores(name, store(rows, tmp_path, tiny_model), models, target)
    assert np.isfinite(found).all()
    drawn = ("uniform", "s2l")  # at random, and by place in a cluster
    trained = ("aum", "cartography", "el2n", "forgetting")  # steps lie between the copies
    if name not in (*drawn, *trained):
        np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), atol=1e-5)


@pytest.mark.parametrize("name", usual(SCORERS))
def test_rows_beyond_the_context_are_cut_and_scored(name, tiny_model, tmp_path, models, target):
    long = [{"prompt": f"say {n}:", "completion": " apple pear" * (400 + n)} for n in range(6)]
    pool = store([*long, {"prompt": "say " * 900, "completion": " plum"}], tmp_path, tiny_model)
    assert pool.manifest.max_tokens == models.shape.max_position_embeddings
    assert pool.manifest.num_bad == {"prompt_too_long": 1}
    assert np.isfinite(scores(name, pool, models, target)).all()


SCRIPTS = (
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",  # Thai
    "\u4f60\u597d\u4e16\u754c\uff0c\u8fd9\u662f\u4e00\u4e2a\u6d4b\u8bd5",  # Chinese
    "\u1d2d\U00012000\U00013000\U0001f600",  # modifiers, cuneiform, hieroglyphs, an emoji
    "\u2014 \u2026 \u2022",  # no word at all
)


@pytest.fixture(scope="module")
def unknown_words(tiny_model, tmp_path_factory):
    """The tiny model with a tokenizer that knows four words; all else is one unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("unknown") / "model")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "say": 3, "apple": 4, "two": 5, "plus": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("known", ["bytes", "unknown"])
@pytest.mark.parametrize("name", usual(SCORERS))
def test_scripts_that_the_tokenizer_does_not_know(
    name, known, tiny_model, unknown_words, tmp_path, target
):
    """Bytes or unknown tokens are tokens: scores are numbers, and equal where all tokens are."""
    model = tiny_model if known == "bytes" else unknown_words
    rows = [{"prompt": text, "completion": " " + other} for text in SCRIPTS for other in SCRIPTS]
    pool = store(rows, tmp_path, model)
    asked = store(rows[:2], tmp_path / "target", model)
    found = scores(name, pool, LoadedModels(model, "float32"), asked)
    assert len(found) == len(rows)
    assert np.isfinite(found).all()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # LoRA says so of GPT-2's linears
@pytest.mark.parametrize("name", WITH_ANOTHER_MODEL)
@pytest.mark.long
def test_another_model_of_a_shorter_context_reads_as_much_as_it_can(
    name, tiny_model, tmp_path, pool, models, target
):
    """Learnt positions end: what is beyond them is cut, and a row without an answer left has no
    score."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "short"
    shutil.copytree(tiny_model, folder)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
    config = GPT2Config(vocab_size=320, n_positions=24, **small)
    GPT2LMHeadModel(config).save_pretrained(folder)
    scorer = resolve("scorer", {name: {"model": str(folder)}})
    targets = {"sums": target.shard(0)} if scorer.needs_target else {}
    state = scorer.prepare(pool, targets, models, Tally())
    shard = pool.shard(0)
    assert shard.num_tokens.max() > 24
    found = scorer.score(shard, state, Tally())[:, 0]
    answered = np.array([bool(t.loss_mask[1:24].any()) for t in shard.tokens])
    assert np.isfinite(found[answered]).all()


# -- a whole selection --------------------------------------------------------------------------


@pytest.fixture
def selected(tiny_model, tiny_data, tmp_path):
    """Selects anew under scores that are made up; the manifest."""
    run = RunFolder(tmp_path / "run")
    data = {**tiny_data, "pool": tiny_data["small_pool"]}

    def again(value, max_tokens=500):
        if not run.path.exists():
            planned(run.path, tiny_model, data, fixed={"selection.max_tokens": max_tokens})
        with stages.at_work(run, silent) as work:
            if value is not None:
                stages.select(work, work.main)
                for file in run.scores("budget").glob("bm25-*/shard-*.parquet"):
                    table = pq.read_table(file)
                    made_up = pa.array(np.full(len(table), value, dtype=np.float32))
                    pq.write_table(pa.table({"id": table["id"], "score_0": made_up}), file)
                    sums.note_all(file.parent)
                shutil.rmtree(run.selected("budget"))
            stages.select(work, work.main)
        return json.loads((run.selected("budget") / "manifest.json").read_text())

    return again


def test_a_pool_without_a_score_is_refused(selected):
    with pytest.raises(ValueError, match=r"nothing is left to train on: .*\nhint: "):
        selected(np.nan)


def test_a_pool_of_equal_scores_is_drawn_from(selected):
    manifest = selected(1.0)
    assert 450 < manifest["num_tokens"] <= 500


def test_a_budget_beyond_the_pool_keeps_every_row(selected):
    manifest = selected(None, max_tokens=1e9)
    assert manifest["num_selected"] == manifest["num_candidates"] - sum(
        manifest["dropped"].values()
    )


def test_a_pool_that_is_the_dev_set_is_refused(tiny_model, tiny_data, tmp_path):
    run = RunFolder(tmp_path / "run")
    planned(run.path, tiny_model, {**tiny_data, "pool": tiny_data["dev"]})
    refused = pytest.raises(ValueError, match="left to train on: 16 rows filtered, 0 candidates")
    with stages.at_work(run, silent) as work, refused:
        stages.select(work, work.main)
