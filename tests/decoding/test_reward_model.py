"""A reward model's folder as the judge of answers: its rewards against the model asked a text at a
time, its FLOPs against torch's counter, what it is charged, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.backends.stub_server import Reply
from tests.decoding.scripted import Scripted
from tests.serving.conftest import proxied
from thrifty import serve_command
from thrifty.answering import NobodyAnswers, Settings
from thrifty.backends.backend import Asking
from thrifty.backends.local import Local
from thrifty.backends.scored import Scored
from thrifty.cli import main
from thrifty.core.budget import Budget
from thrifty.core.ledger import Ledger
from thrifty.decode_pool import Decoded, decode
from thrifty.serving import setup
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.policy_answer import Improver
from thrifty.signals.reward_model import RewardModel

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}"
WORDS = ("two and three", "rain", "apple pear plum cherry sweet ripe", "sum of five and two equals")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def made(
    folder: Path, tiny_model: Path, template: str | None = TEMPLATE, family="Llama", **config
) -> Path:
    """With the tokenizer of the tiny model, and a padding token."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    own = {"vocab_size": 321, "pad_token_id": 320, "num_labels": 1, **SIZES, **config}
    torch.manual_seed(3)
    named = getattr(transformers, f"{family}ForSequenceClassification")
    model = named(getattr(transformers, f"{family}Config")(**own))
    with torch.no_grad():  # rewards that differ
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() == 2 else 1.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("reward"), tiny_model)


@pytest.fixture
def eager(folder: Path) -> RewardModel:
    """The flop counter sees nothing of fused attention on a CPU."""
    judge = RewardModel(folder, device="cpu")
    judge._classifier.base().set_attn_implementation("eager")
    return judge


def naive(folder: Path, prompt, answer: str) -> float:
    """As a reward model's card has it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    turns.append({"role": "assistant", "content": answer})
    if tokenizer.chat_template is None:
        assert isinstance(prompt, str)
        inputs = tokenizer(prompt + answer, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return float(model(**inputs).logits[0][0])


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("padding", [320, None])
def test_rewards_are_the_models_own(template, padding, tiny_model, tmp_path):
    made(tmp_path, tiny_model, template, pad_token_id=padding)
    judge = RewardModel(tmp_path, device="cpu")
    judged = judge.judge("say it:", WORDS, judge.most_tokens("say it:", "", 40))
    expected = [naive(tmp_path, "say it:", answer) for answer in WORDS]
    assert judged.rewards == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1


def test_a_conversation_is_written_as_the_template_has_it(folder):
    turns = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "how much is it"},
    )
    judge = RewardModel(folder, device="cpu")
    (reward,) = judge.judge(turns, ["five"], judge.most_tokens(turns, "", 8)).rewards
    assert reward == pytest.approx(naive(folder, turns, "five"), abs=1e-4)


FAMILIES = {
    "Llama": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16},
    "GPT2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_torchs_counter(family, tiny_model, tmp_path):
    made(tmp_path, tiny_model, family=family, **FAMILIES[family])
    judge = RewardModel(tmp_path, device="cpu")
    judge._classifier.base().set_attn_implementation("eager")
    for answers in (WORDS, WORDS[:1], ("rain",) * 5):
        with FlopCounterMode(display=False) as counter:
            judged = judge.judge("say it:", answers, 128)
        assert None not in judged.rewards
        assert judged.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_of_an_encoder_flops_come_from_its_weights(tiny_model, tmp_path):
    made(tmp_path, tiny_model, family="Bert")
    judge = RewardModel(tmp_path, device="cpu")
    judge._classifier.base().set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        judged = judge.judge("say it:", WORDS, 128)
    assert judged.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


# -- what is charged ------------------------------------------------------------------------------

PROMPTS = [f"say {word} and how much is it:" for word in ("apple", "rain", "five", "tree")]
SHORT = Settings(max_tokens=12, temperature=1.0, concurrency=8)
BEST_OF_4 = {"policy": {"best_of": {"samples": 4}}, "answer": None, "settings": SHORT}


def answered(
    tiny_model: Path,
    reward,
    prompts: Sequence[str] = PROMPTS,
    budget: Budget | None = None,
    **options,
) -> Decoded:
    backend = Local(tiny_model, device="cpu", name="tiny")
    return decode(
        prompts, backends=[backend], reward=reward, budget=budget, **{**BEST_OF_4, **options}
    )


def kept(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]


def test_scoring_is_charged_with_the_samples(tiny_model, folder, tmp_path, monkeypatch):
    counted = []
    real = RewardModel.judge

    def judged(self, *args):
        found = real(self, *args)
        counted.append(found.flops)
        return found

    monkeypatch.setattr(RewardModel, "judge", judged)
    # One at a time: else who shares a batch, and so its padding, depends on who came first.
    alone = {"settings": Settings(max_tokens=12, temperature=1.0, concurrency=1)}
    plain = answered(tiny_model, lambda prompt, text: 0.0, **alone)
    limit = Budget(flops=1e12)
    decoded = answered(tiny_model, folder, budget=limit, folder=tmp_path, **alone)
    assert decoded.resource == "flops"
    assert len(counted) == len(PROMPTS), "a draw is scored at once"
    assert min(counted) > 0
    assert decoded.spent.flops == pytest.approx(plain.spent.flops + sum(counted), rel=1e-12)
    assert sum(a.flops for a in decoded.answers) == pytest.approx(decoded.spent.flops, rel=1e-12)
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().flops == decoded.spent.flops
    rows = kept(tmp_path)
    assert len(rows) == 4 * len(PROMPTS)
    for answer, prompt in zip(decoded.answers, PROMPTS, strict=True):
        own = {row["text"]: row["reward"] for row in rows if row["id"] == answer.id}
        for text, reward in own.items():
            assert reward == pytest.approx(naive(folder, prompt, text), abs=1e-4)
        assert own[answer.text] == answer.reward == max(own.values())
    told = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in told] == [answer.reward for answer in decoded.answers]
    assert all(line["flops"] > 0 for line in told)


def test_what_a_sample_is_held_for_covers_scoring_it(tiny_model, folder, eager):
    local = Local(tiny_model, device="cpu", name="tiny")
    backend = Scored(local, eager)
    asking = Asking(prompt=PROMPTS[0], count=3, max_tokens=12)
    longest = eager.most_tokens(PROMPTS[0], "", 12)
    room = 3 * eager.flops(1, longest)
    assert backend.upper(asking).flops == pytest.approx(local.upper(asking).flops + room)
    with FlopCounterMode(display=False) as counter:
        judged = eager.judge(PROMPTS[0], [f"{word} {word}" for word in WORDS[:3]], longest)
    assert 0 < counter.get_total_flops() <= room
    assert judged.flops == counter.get_total_flops()


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_a_limit_on_flops_holds_with_scoring_in_it(share, tiny_model, folder, tmp_path):
    whole = answered(tiny_model, folder).spent.flops
    budget = Budget(flops=share * whole)
    decoded = answered(tiny_model, folder, budget=budget, folder=tmp_path)
    assert 0 < decoded.spent.flops <= share * whole
    assert 0 < len(kept(tmp_path)) < 4 * len(PROMPTS)
    assert any("spent" in answer.reason for answer in decoded.answers)


def test_what_was_scored_is_not_scored_again(tiny_model, folder, tmp_path, monkeypatch):
    first = answered(tiny_model, folder, folder=tmp_path)

    def never(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr(RewardModel, "judge", never)
    monkeypatch.setattr(RewardModel, "load", never)
    again = answered(tiny_model, folder, folder=tmp_path)
    assert again.answers == first.answers
    assert again.spent.flops == first.spent.flops


def test_a_run_that_ended_early_scores_the_rest_alone(tiny_model, folder, tmp_path, monkeypatch):
    whole = answered(tiny_model, folder).spent.flops
    answered(tiny_model, folder, budget=Budget(flops=0.5 * whole), folder=tmp_path)
    before = len(kept(tmp_path))
    scored = []
    real = RewardModel.judge

    def judged(self, prompt, answers, most):
        scored.extend(answers)
        return real(self, prompt, answers, most)

    monkeypatch.setattr(RewardModel, "judge", judged)
    answered(tiny_model, folder, folder=tmp_path)
    rows = kept(tmp_path)
    assert 0 < before < len(rows) == 4 * len(PROMPTS)
    assert len(scored) == len(rows) - before
    assert all(row["reward"] is not None for row in rows)


def test_another_reward_model_is_another_asking(tiny_model, folder, tmp_path):
    answered(tiny_model, folder, PROMPTS[:1], folder=tmp_path / "out")
    other = made(tmp_path / "other", tiny_model, intermediate_size=48)
    with pytest.raises(ValueError, match="reward differ"):
        answered(tiny_model, other, PROMPTS[:1], folder=tmp_path / "out")
    moved = shutil.copytree(folder, tmp_path / "moved")
    answered(tiny_model, moved, PROMPTS[:1], folder=tmp_path / "out")


def test_pandora_goes_by_it(tiny_model, folder):
    options = {"policy": "pandora", "settings": Settings(max_tokens=12, temperature=1.0, price=0.1)}
    budget = Budget(tokens=2000)
    decoded = answered(tiny_model, folder, PROMPTS[:2], budget, **options)
    assert all(answer.reward is not None for answer in decoded.answers)
    assert "reward" in decoded.answers[0].reason


# -- what has no reward ---------------------------------------------------------------------------


def test_a_reward_that_is_no_number_is_none(tiny_model, folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    broken = shutil.copytree(folder, tmp_path / "broken")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    model.save_pretrained(broken)
    backend = Scripted(lambda prompt, number: f"text {number}")
    decoded = decode(PROMPTS[:1], backends=[backend], reward=broken, **BEST_OF_4)
    (answer,) = decoded.answers
    assert answer.reward is None
    assert "4 of 4 have no reward" in answer.reason
    assert decoded.spent.flops > 0, "it was computed all the same"


def test_what_is_too_long_is_neither_cut_nor_charged(folder):
    judge = RewardModel(folder, device="cpu")
    texts = ["rain", "sun " * 60]
    most = judge.most_tokens("say it:", "", 4)
    judged = judge.judge("say it:", texts, most)
    assert judged.rewards[0] is not None
    assert judged.rewards[1] is None
    assert judged.flops == judge.judge("say it:", texts[:1], most).flops
    assert judge.notes == (
        "1 not scored: longer than the reward model reads, or than twice the tokens that it can "
        "have been generated with",
    )
    assert judge.most_tokens("say it:", "", 10_000) == 128, "what the model reads"
    assert judge.most_tokens("word " * 400, "", 4) == 0
    assert judge.judge("word " * 400, ["rain"], 0).flops == 0


def test_what_the_template_refuses_has_no_reward(tiny_model, tmp_path):
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE
    )
    judge = RewardModel(made(tmp_path, tiny_model, refuses), device="cpu")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert judge.most_tokens(turns, "", 8) == 0
    judged = judge.judge(turns, ["yes"], 0)
    assert (judged.rewards, judged.flops) == ((None,), 0.0)
    assert "no system" in judge.notes[0]
    assert judge.judge("hello", ["yes"], 64).rewards[0] is not None


def test_a_policy_that_goes_by_answers_asks_no_reward_model(tiny_model, folder, monkeypatch):
    def never(*args):
        raise AssertionError("it was asked")

    monkeypatch.setattr(RewardModel, "judge", never)
    monkeypatch.setattr(RewardModel, "load", never)
    decoded = answered(tiny_model, folder, policy={"fixed": {"samples": 2}}, answer="exact")
    assert "fixed does not go by rewards, so no text is scored" in decoded.why
    assert all(answer.reward is None for answer in decoded.answers)


def test_auto_takes_the_best_of_open_texts(tiny_model, folder):
    decoded = answered(tiny_model, str(folder), PROMPTS[:1], policy="auto")
    assert decoded.policy == "best_of"
    assert decoded.answers[0].reward is not None


# -- what is refused ------------------------------------------------------------------------------


def test_flops_that_nobody_knows_are_not_limited_though_scoring_is_known(folder):
    backend = Scripted(lambda prompt, number: "text")
    with pytest.raises(ValueError, match="limits flops, and what model takes"):
        decode(PROMPTS, backends=[backend], reward=folder, budget=Budget(flops=1e12), **BEST_OF_4)
    assert not backend.asked


def test_weights_that_cannot_be_loaded_end_it_before_anything_is_asked(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    headless = shutil.copytree(folder, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    backend = Scripted(lambda prompt, number: "text")
    with pytest.raises(NobodyAnswers, match=r"has no weights for score\.weight"):
        decode(PROMPTS, backends=[backend], reward=headless, **BEST_OF_4)
    assert not backend.asked


def test_a_judge_that_breaks_down_is_a_failed_draw_at_its_most(folder, monkeypatch):
    def breaks(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(RewardModel, "judge", breaks)
    backend = Scripted(lambda prompt, number: "text")
    decoded = decode(PROMPTS[:1], backends=[backend], reward=folder, **BEST_OF_4)
    (answer,) = decoded.answers
    assert (answer.failed, answer.answer) == (3, None)
    judge = RewardModel(folder, device="cpu")
    draws = sum(asking.count for asking in backend.asked)
    most = judge.flops(1, judge.most_tokens(PROMPTS[0], "", 12))
    assert decoded.spent.flops == pytest.approx(draws * most)


def wrong_folders(tmp_path: Path, tiny_model: Path) -> Iterator[tuple[Path, str]]:
    yield tiny_model, "is no reward model\nhint: its config.json must name"
    yield made(tmp_path / "three", tiny_model, num_labels=3), "has 3 labels, and a reward model has"
    silent = made(tmp_path / "silent", tiny_model)
    config = json.loads((silent / "config.json").read_text())
    del config["id2label"], config["label2id"]  # two, as transformers has it
    (silent / "config.json").write_text(json.dumps(config))
    yield silent, "has 2 labels"
    linked = made(tmp_path / "linked", tiny_model)
    (linked / "config.json").rename(tmp_path / "config.json")
    (linked / "config.json").symlink_to(tmp_path / "config.json")
    yield linked, "is a link out of its folder"
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty", "has no config.json"


def test_a_folder_that_is_no_reward_model(tiny_model, tmp_path, capsys):
    prompts = tmp_path / "q.jsonl"
    prompts.write_text('{"prompt": "say it:"}\n')
    command = ["decode", "--model", str(tiny_model), "--prompts", str(prompts), "--reward"]
    for folder, says in wrong_folders(tmp_path, tiny_model):
        with pytest.raises(ValueError, match=says):
            RewardModel(folder)
        assert main([*command, str(folder), "-o", str(tmp_path / "out")]) == 4
        assert says.partition("\n")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pickled_weights_and_adapters_are_not_loaded(folder, tmp_path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors weights"):
        RewardModel(pickled).load()
    adapted = shutil.copytree(folder, tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model and an adapter"):
        RewardModel(adapted).load()


# -- the commands ---------------------------------------------------------------------------------


def test_the_command_line(tiny_model, folder, tmp_path, capsys):
    prompts = tmp_path / "q.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    command = ["decode", "--model", str(tiny_model), "--prompts", str(prompts), "--answer", "none"]
    command += ["--reward", str(folder), "--max-tokens", "8", "--flops", "1e12", "--json"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["policy"] == "best_of"
    rows = kept(tmp_path / "out")
    assert facts["samples"] == len(rows) == 5 * len(PROMPTS)
    assert all(row["reward"] is not None for row in rows)
    took = sum(row["took"]["flops"] for row in rows)
    assert took > 0
    assert facts["spent"]["flops"] == pytest.approx(took)
    assert "loading a classifier" in said.err


def test_no_torch_without_a_folder():
    program = (
        "import sys, thrifty.decode_command, thrifty.decode_pool, thrifty.serving.setup\n"
        "from thrifty.rewards import reward_named\n"
        "assert reward_named('operator:eq')('a', 'a')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def served(url: str, folder: Path, policy: str) -> Improver:
    """What ``thrifty serve`` answers with."""
    parser = argparse.ArgumentParser()
    serve_command.add_to(parser)
    given = ["--upstream", url, "--model", "m", "--price", "1,1", "--config", str(folder)]
    given += ["--policy", policy, "--answer", "none", "--reward", str(folder)]
    options = parser.parse_args(given)
    found = setup.improver(options, setup.upstreams(options), 20.0, ServeMetrics())
    assert found is not None
    return found


def test_a_proxy_answers_with_the_best(folder, tmp_path):
    texts = ("rain", "apple pear plum", "two and three")
    ledger = tmp_path / "ledger.sqlite"
    policy = "{best_of: {samples: 3}}"
    with proxied(
        ledger, [Reply(texts=texts)], improver=lambda url: served(url, folder, policy)
    ) as proxy:
        answer = proxy.ask(temperature=0.9).json()
        spent = proxy.budgets.accounts[0].spent()
    best = max(texts, key=lambda text: naive(folder, "6 x 7?", text))
    assert answer["choices"][0]["message"]["content"] == best
    judge = RewardModel(folder, device="cpu")
    scoring = judge.judge("6 x 7?", texts, 128).flops
    assert answer["thrifty"]["flops"] == pytest.approx(spent.flops)
    assert spent.flops > scoring > 0


def test_a_proxy_scores_nothing_for_a_policy_that_goes_by_answers(folder, capsys):
    improver = served("http://localhost:1/v1", folder, "marginal")
    assert not isinstance(improver.backends["m"], Scored)
    assert "marginal does not go by rewards" in capsys.readouterr().err
