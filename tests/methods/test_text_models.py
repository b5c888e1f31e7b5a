"""Classifiers and sentence-transformers models: against the model asked a row at a time, their
FLOPs against torch's counter, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.methods.conftest import Tally
from tests.runs import ledger, planned, silent
from thrifty import stages
from thrifty.asked_rows import stats_together
from thrifty.core.contracts import Work
from thrifty.core.resolve import resolve
from thrifty.costs.hardware import load_device
from thrifty.data.tokens import load_tokenizer
from thrifty.run_folder import RunFolder
from thrifty.signals.classifier import Classifier
from thrifty.signals.encoder_shape import EncoderShape

SMALL = {
    "vocab_size": 321,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "pad_token_id": 320,
}


def save_tokenizer(tiny_model, folder):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.model_max_length = 96
    tokenizer.save_pretrained(folder)


def make_classifier(tiny_model, folder, family="Bert", **config):
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **config})
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    with torch.no_grad():  # logits that differ
        for parameter in model.parameters():
            parameter.mul_(12.0 if parameter.dim() == 2 else 1.0)
    model.save_pretrained(folder)
    save_tokenizer(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return make_classifier(tiny_model, folder, id2label={0: "bad", 1: "fair", 2: "good"})


def logits_of(folder, text):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        text, truncation=True, max_length=96, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits[0].double()


def work_of(pool, target, models):
    return Work(
        pool=stats_together([pool.manifest]),
        targets={"sums": stats_together([target.manifest])},
        shape=models.shape,
        device=load_device("h100"),
        max_length=128,
    )


def test_quality_is_the_log_odds_of_a_label(classifier, pool, target, models):
    shard, rows = pool.take(pool.shard(0).ids[:12]), {"sums": target.shard(0), "b": target.shard(0)}
    for label, place in (("good", 2), ("0", 0)):
        scorer = resolve("scorer", {"quality": {"model": str(classifier), "label": label}})
        state = scorer.prepare(pool, rows, models, Tally())
        got = scorer.score(shard, state, Tally())
        assert got.shape == (12, 2)
        assert (got[:, 0] == got[:, 1]).all()
        for value, text in zip(got[:, 0], shard.texts, strict=True):
            p = torch.softmax(logits_of(classifier, text), -1)[place]
            assert value == pytest.approx(float(torch.log(p / (1 - p))), abs=1e-4)
    assert np.ptp(got) > 0.01


def test_of_one_output_quality_is_that(tiny_model, tmp_path, pool, target, models):
    """Of an encoder, and of a decoder without a padding token, which reads rows one at a time."""
    rater = make_classifier(tiny_model, tmp_path / "rater", num_labels=1)
    reward = make_classifier(
        tiny_model, tmp_path / "reward", "Llama", num_labels=1, pad_token_id=None
    )
    shard = pool.take(pool.shard(0).ids[:6])
    for folder in (rater, reward):
        scorer = resolve("scorer", {"quality": {"model": str(folder)}})
        state = scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())
        got = scorer.score(shard, state, Tally())[:, 0]
        expected = [float(logits_of(folder, text)[0]) for text in shard.texts]
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert np.ptp(got) > 0.01


def test_scores_do_not_depend_on_shards_and_travel(classifier, pool, whole_pool, models):
    judge = models.other(str(classifier))
    judge.base()
    once = judge.scores(whole_pool.shard(0).texts, 2, Tally())
    copy = pickle.loads(pickle.dumps(judge))
    assert "_base" not in copy.__dict__
    some = np.concatenate([copy.scores(s.texts, 2, Tally()) for s in pool.shards()])
    np.testing.assert_allclose(some, once, atol=1e-4)
    assert len(judge.scores([], 2, Tally())) == 0


FAMILIES = {
    "Bert": {},
    "Roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "Albert": {"embedding_size": 16},
    "Electra": {"embedding_size": 16},
    "ModernBert": {"global_attn_every_n_layers": 1, "bos_token_id": 0, "eos_token_id": 1},
    "Llama": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_torchs_with_eager_attention(family, tiny_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = make_classifier(tiny_model, tmp_path / family, family, **FAMILIES[family])
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    for batch, sequence in ((1, 80), (5, 16)):
        ids = torch.randint(2, 300, (batch, sequence))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        counted = counter.get_total_flops()
        assert EncoderShape.of(folder).flops(batch, sequence) == pytest.approx(counted, rel=0.1)


def test_the_price_of_quality_is_what_it_charges(classifier, pool, target, models):
    scorer = resolve("scorer", {"quality": {"model": str(classifier), "label": "good"}})
    tally = Tally()
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, tally)
    for shard in pool.shards():
        scorer.score(shard, state, tally)
    predicted = scorer.cost(work_of(pool, target, models))
    assert predicted.flops == pytest.approx(tally.cost.flops, rel=0.1)
    assert predicted.seconds > 0
    assert predicted.peak_memory_bytes > EncoderShape.of(classifier).num_bytes > 30_000


def test_what_is_no_classifier_is_refused(classifier, tiny_model, pool, target, models, tmp_path):
    rows = {"sums": target.shard(0)}

    def refused(says, **options):
        with pytest.raises(ValueError, match=says):
            resolve("scorer", {"quality": options}).prepare(pool, rows, models, Tally())

    refused("has 3 labels, none is named\nhint: .*bad, fair, good", model=str(classifier))
    refused("has no label 'best'", model=str(classifier), label="best")
    refused("is no classifier", model=str(tiny_model))
    refused("there is no model folder", model=str(tmp_path / "none"))
    refused("has a label but no model", label="good")
    refused("both a model and good or bad rows", model=str(classifier), good=["x.jsonl"])
    with pytest.raises(ValueError, match="is no classifier"):
        resolve("scorer", {"quality": {"model": str(tiny_model)}}).cost(
            work_of(pool, target, models)
        )
    scorer = resolve("scorer", {"loss": {"model": str(classifier)}})
    state = scorer.prepare(pool, {}, models, Tally())
    with pytest.raises(ValueError, match="is a classifier, not a language model"):
        scorer.score(pool.shard(0), state, Tally())
    pickled = shutil.copytree(classifier, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors weights"):
        Classifier(pickled, "float32").base()


def test_a_run_scores_with_a_classifier(classifier, tiny_model, tiny_data, tmp_path):
    run = RunFolder(tmp_path / "run")
    scorer = {"quality": {"model": str(classifier), "label": "good"}}
    plan = planned(
        run.path,
        tiny_model,
        tiny_data,
        fixed={
            "selection.scorer": scorer,
            "selection.max_tokens": 1e9,
            "training.max_length": 128,
        },
    )
    with stages.at_work(run, silent) as work:
        stages.select(work, work.main)
    spent = ledger(run.path).spent(stage="select").flops
    assert spent == pytest.approx(plan.predicted["select"]["flops"], rel=0.1)
    assert spent > 0


# -- sentence-transformers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentence_model(tiny_model, tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    inner = tmp_path_factory.mktemp("bert")
    torch.manual_seed(2)
    BertModel(BertConfig(**SMALL)).save_pretrained(inner)
    save_tokenizer(tiny_model, inner)
    body = Transformer(str(inner), max_seq_length=64)
    folder = tmp_path_factory.mktemp("sentences")
    SentenceTransformer(modules=[body, Pooling(32, pooling_mode="mean")]).save(str(folder))
    return folder


def naive_vector(folder, text):
    """Mean of the last hidden states over the text's tokens."""
    from transformers import AutoModel

    inputs = load_tokenizer(str(folder))(text, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]
    mean = hidden.double().mean(0)
    return (mean / mean.norm()).numpy()


def test_embedding_is_the_cosine_under_a_sentence_model(sentence_model, pool, target, models):
    options = {"model": str(sentence_model), "max_target_rows": 3}
    scorer = resolve("scorer", {"embedding": options})
    tally = Tally()
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, tally)
    shard = pool.take(pool.shard(0).ids[:5])
    got = scorer.score(shard, state, tally)[:, 0]
    asked = [naive_vector(sentence_model, text) for text in target.shard(0).texts[:3]]
    for value, text in zip(got, shard.texts, strict=True):
        near = [naive_vector(sentence_model, text) @ other for other in asked]
        assert value == pytest.approx(max(near), abs=1e-5)
    assert tally.cost.flops > 0


def test_the_price_of_sentence_vectors_is_what_it_charges(sentence_model, pool, target, models):
    scorer = resolve("scorer", {"embedding": {"model": str(sentence_model)}})
    tally = Tally()
    state = scorer.prepare(pool, {"sums": target.shard(0)}, models, tally)
    once = [scorer.score(shard, state, tally) for shard in pool.shards()]
    assert np.isfinite(np.concatenate(once)).all()
    predicted = scorer.cost(work_of(pool, target, models))
    assert predicted.flops == pytest.approx(tally.cost.flops, rel=0.15)
    assert predicted.peak_memory_bytes > 0


def test_a_run_embeds_with_a_sentence_model(sentence_model, tiny_model, tiny_data, tmp_path):
    run = RunFolder(tmp_path / "run")
    scorer = {"embedding": {"model": str(sentence_model)}}
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    planned(run.path, tiny_model, data, fixed={"selection.scorer": scorer})
    with stages.at_work(run, silent) as work:
        stages.select(work, work.main)
    assert ledger(run.path).spent(stage="select").flops > 0


def test_a_sentence_model_runs_no_code_and_unpickles_nothing(sentence_model, models, tmp_path):
    owns = shutil.copytree(sentence_model, tmp_path / "owns")
    file = owns / "modules.json"
    modules = json.loads(file.read_text())
    (owns / "evil.py").write_text("raise SystemExit('was run')")
    file.write_text(json.dumps([{**modules[0], "type": "evil.Module"}, *modules[1:]]))
    with pytest.raises(ValueError, match=r"a module evil\.Module of its own"):
        models.other(str(owns)).base()
    outside = shutil.copytree(sentence_model, tmp_path / "outside")
    file = outside / "modules.json"
    file.write_text(json.dumps([modules[0], {**modules[1], "path": "../owns/1_Pooling"}]))
    with pytest.raises(ValueError, match="points outside its folder"):
        models.other(str(outside)).base()
    pickled = shutil.copytree(sentence_model, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors weights"):
        models.other(str(pickled)).base()
    with pytest.raises(ValueError, match="is a sentence-transformers model, not a language model"):
        _ = models.other(str(sentence_model)).shape


def test_without_the_package_it_is_said(sentence_model, models, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="pip install 'thrifty\\[embeddings\\]'"):
        replace(models.other(str(sentence_model))).base()
