"""A model with a tokenizer of its own is priced by the tokens that it makes of the rows."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace

import pytest

from tests.methods.conftest import briefly
from tests.methods.test_scorer_contract import scores_of, work_of
from thrifty.core.budget import PoolStats
from thrifty.signals.token_ratio import token_ratios


@pytest.fixture(scope="module")
def letters(tiny_model, tmp_path_factory):
    """The model with a tokenizer that joins no letters."""
    from tokenizers import Tokenizer

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("letters") / "model")
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.model = type(tokenizer.model)(vocab=tokenizer.get_vocab(), merges=[])
    tokenizer.save(str(file))
    return folder


def test_is_that_of_all_rows(pool, models, letters):
    rows = pool.take([i for shard in pool.shards() for i in shard.ids])
    own = sum(len(each.input_ids) for each in models.other(str(letters)).tokens(rows))
    ratio = token_ratios(pool)(str(letters))
    assert ratio > 1.1
    assert ratio == pytest.approx(own / rows.num_tokens.sum(), rel=0.03)


def test_is_one_where_nothing_else_is_known(pool, models, tmp_path):
    ratio = token_ratios(pool)
    assert ratio("") == ratio(str(models.folder)) == ratio(str(tmp_path)) == 1.0


@pytest.mark.parametrize("name", ["loss", "embedding", "grand", "s2l"])
def test_predicted_flops_are_what_it_charges(name, pool, target, models, letters):
    scorer = replace(briefly(name), model=str(letters))
    _, charged = scores_of(scorer, pool, target, models)
    work = work_of(pool, target, models)
    informed = scorer.cost(replace(work, token_ratio=token_ratios(pool))).flops
    assert informed == pytest.approx(charged.flops, rel=0.1)
    assert scorer.cost(work).flops < 0.9 * charged.flops


def test_all_counts_of_tokens_are_scaled():
    def of(*counts: int) -> PoolStats:
        names = [field.name for field in fields(PoolStats)]
        return PoolStats(**dict(zip(names, counts, strict=True)))

    stats = of(10, 100, 20, 50, 1200, 110)
    assert stats.in_tokens(2.0) == of(10, 200, 40, 100, 4800, 220)
    assert stats.in_tokens(1.0) is stats
