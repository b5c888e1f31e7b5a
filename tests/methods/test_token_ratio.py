"""A model with a tokenizer of its own is priced by the tokens that it makes of the rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace

import pytest

from tests.methods.conftest import briefly, build
from tests.methods.test_scorer_contract import scores_of, work_of
from thrifty.core.budget import PoolStats
from thrifty.data.tokens import load_tokenizer
from thrifty.signals.models import LoadedModels
from thrifty.signals.token_ratio import token_ratios


def test_is_that_of_all_rows(pool, models, letters):
    rows = pool.take([i for shard in pool.shards() for i in shard.ids])
    own = sum(len(each.input_ids) for each in models.other(str(letters)).tokens(rows))
    ratio = token_ratios(pool)(str(letters))
    assert ratio > 1.1
    assert ratio == pytest.approx(own / rows.num_tokens.sum(), rel=0.03)


def test_is_one_where_nothing_else_is_known(pool, models, tmp_path):
    ratio = token_ratios(pool)
    assert ratio("") == ratio(str(models.folder)) == ratio(str(tmp_path)) == 1.0


TEMPLATE = """{% for m in messages %}<|begin|>{{ m.role }}<|middle|>

{{ m.content }}<|END|>{% endfor %}"""


def test_of_messages_under_another_template(tiny_model, tmp_path):
    """A template is most of what short turns are split into."""
    folders = []
    for name, end in (("one", "over"), ("other", "this turn is over and done")):
        folders.append(shutil.copytree(tiny_model, tmp_path / name))
        tokenizer = load_tokenizer(str(folders[-1]))
        tokenizer.chat_template = TEMPLATE.replace("END", end)
        tokenizer.save_pretrained(str(folders[-1]))
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(300):
            turns = [("user", f"say {i}"), ("assistant", f"{i} " * (1 + i % 9))]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    pool = build(rows, tmp_path / "store", folders[0], 64)
    models = LoadedModels(folders[0], "float32", max_length=128)
    own = sum(len(each.input_ids) for each in models.other(str(folders[1])).tokens(pool.whole()))
    ratio = token_ratios(pool)(str(folders[1]))
    assert ratio > 1.02
    assert ratio == pytest.approx(own / pool.manifest.num_tokens, rel=0.05)


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
