"""A model folder that answers: batches, prices, seeds, prompts, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from thrifty.backends.backend import Answered, Asking, AskingFailed
from thrifty.backends.local import Local
from thrifty.costs.flops import decode_flops
from thrifty.signals.models import load_model
from thrifty.signals.reader import Reader


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Local:
    backend = Local(tiny_model, device="cpu", name="tiny")
    # The flop counter sees nothing of fused attention on a CPU.
    backend.models.weights("").set_attn_implementation("eager")
    return backend


def ask(backend: Local, *askings: Asking) -> list[Answered]:
    async def all_of_them() -> list[Answered]:
        return await asyncio.gather(*(backend.ask(asking) for asking in askings))

    return asyncio.run(all_of_them())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FLOPs of every batch, by torch: its counter sees the thread alone that it is opened in."""
    found: list[int] = []
    real = Local._generated

    def generated(self, *args):
        with FlopCounterMode(display=False) as counter:
            answers = real(self, *args)
        found.append(counter.get_total_flops())
        return answers

    monkeypatch.setattr(Local, "_generated", generated)
    return found


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of every answer, in the order in which they were given; without end tokens."""
    found: list[list[int]] = []
    real = Local._brought

    def brought(self, request, answers, *args):
        found.extend(answer.ids.tolist() for answer in answers)
        return real(self, request, answers, *args)

    monkeypatch.setattr(Local, "_brought", brought)
    return found


def said(answered: Answered) -> list[str]:
    return [completion.text for completion in answered.completions]


def test_flops_are_those_of_torchs_counter_and_within_the_upper_bound(local: Local, counted):
    askings = [
        Asking(prompt="say apple pear:", count=5, max_tokens=20, seed=1, temperature=1.0),
        Asking(prompt="say rain and wind:", count=1, max_tokens=12, temperature=0.0),
        Asking(prompt="say two and three to get five", count=3, max_tokens=9, seed=2),
    ]
    found = ask(local, *askings)
    assert counted == [sum(each.cost.flops for each in found)], "all share a batch"
    for asking, answered in zip(askings, found, strict=True):
        upper = local.upper(asking)
        assert len(answered.completions) == asking.count
        assert 0 < answered.cost.flops <= upper.flops
        assert answered.cost.tokens <= upper.tokens
        assert upper.seconds > 0
        assert upper.peak_memory_bytes > 0
        assert answered.cost.seconds > 0
        assert answered.trusted


def test_the_upper_bound_is_reached_where_nothing_ends_early(local: Local):
    asking = Asking(prompt="say apple", count=4, max_tokens=6, temperature=0.0)
    (answered,) = ask(local, asking)
    assert {completion.tokens for completion in answered.completions} == {6}
    ids = local._prompting.ids(asking, 100)
    shape = local.shape
    once, length = decode_flops(shape, 1, len(ids), 1), len(ids)
    rest = 4 * (decode_flops(shape, 1, length, 6) - once)
    assert answered.cost.flops == once + rest, "the prompt is read once"
    assert answered.cost.flops < 4 * decode_flops(shape, 1, length, 6)
    assert answered.cost.tokens == length + 24 == local.upper(asking).tokens
    # All that it may be too much is an eighth of the request's tokens, as padding.
    assert answered.cost.flops <= local.upper(asking).flops < 1.2 * answered.cost.flops


def test_samples_follow_seed_and_place_whatever_else_is_asked(local: Local):
    asking = Asking(prompt="say apple:", count=4, max_tokens=12, temperature=1.0, seed=7)
    others = [
        Asking(prompt=f"say {word}:", count=2, max_tokens=12, temperature=1.3, seed=7)
        for word in ("rain", "pear", "wind and snow")
    ]
    (alone,) = ask(local, asking)
    first, *rest = ask(local, asking, *others)
    *_, last = ask(local, *reversed(others), asking)
    assert said(alone) == said(first) == said(last)
    assert len(set(said(alone))) > 1, "samples of a request differ"
    assert said(alone)[:2] not in [said(each) for each in rest], "and so do requests"
    (fewer,) = ask(local, Asking(**{**vars(asking), "count": 2}))
    assert said(fewer) == said(alone)[:2]
    (unlike,) = ask(local, Asking(**{**vars(asking), "seed": 8}))
    assert said(unlike) != said(alone)
    free = Asking(**{**vars(asking), "seed": None})
    assert said(ask(local, free)[0]) != said(ask(local, free)[0])


def test_the_sequence_of_batches_never_overlaps_and_waiters_share_them(
    local: Local, monkeypatch: pytest.MonkeyPatch
):
    under_way, most, sizes = 0, 0, []
    real = Local._generated

    def counted(self, batch, spent):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        sizes.append(len(batch))
        try:
            return real(self, batch, spent)
        finally:
            under_way -= 1

    monkeypatch.setattr(Local, "_generated", counted)
    askings = [Asking(prompt="say it:", max_tokens=3, seed=seed) for seed in range(12)]

    async def in_two_waves() -> None:
        first = [asyncio.create_task(local.ask(asking)) for asking in askings[:4]]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*first, *(local.ask(asking) for asking in askings[4:]))

    asyncio.run(in_two_waves())
    assert (most, sizes) == (1, [4, 8])


def test_a_question_that_was_given_up_is_not_computed(local: Local):
    async def cancelled() -> int:
        before = local.num_batches
        task = asyncio.create_task(local.ask(Asking(prompt="say", max_tokens=3)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await local._worker
        return local.num_batches - before

    assert asyncio.run(cancelled()) == 0


def test_prompts_of_unlike_lengths_wait_for_one_another(local: Local):
    short, long = "say apple", "say apple pear plum cherry sweet ripe red green tree basket" * 2
    before = local.num_batches
    ask(local, *(Asking(prompt=text, max_tokens=2) for text in (short, long, short)))
    assert local.num_batches == before + 2


def test_more_answers_than_a_batch_holds_still_read_the_prompt_once(tiny_model: Path):
    small = Local(tiny_model, device="cpu", max_batch_tokens=64)
    large = Local(tiny_model, device="cpu")
    asking = Asking(prompt="say apple pear plum:", count=11, max_tokens=8, seed=3, temperature=1.0)
    (few,), (many,) = ask(small, asking), ask(large, asking)
    assert said(few) == said(many)
    assert few.cost.flops == many.cost.flops


def test_confidence_is_that_of_the_model_itself(local: Local, tokens):
    asking = Asking(prompt="say apple:", max_tokens=5, temperature=1.7, top_p=0.9, seed=1)
    (answered,) = ask(local, asking)
    (completion,) = answered.completions
    ids = list(local._prompting.ids(asking, 100))
    (new,) = tokens
    assert len(new) == completion.tokens == 5
    with torch.inference_mode():
        logits = local.models.weights("")(torch.tensor([ids + new])).logits[0].double()
    own = logits.log_softmax(-1)[torch.arange(len(ids) - 1, len(ids) + 4), new]
    assert completion.confidence == pytest.approx(float(own.mean().exp()), rel=1e-5)


def test_top_p_says_only_what_is_likely(local: Local):
    asking = Asking(prompt="say", count=64, max_tokens=1, temperature=1.0, top_p=0.02, seed=1)
    found = set(said(ask(local, asking)[0]))
    with torch.inference_mode():
        ids = local._prompting.ids(asking, 100)
        shares = local.models.weights("")(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    sizes, order = shares.sort(descending=True)
    number = int((sizes.cumsum(0) - sizes < 0.02).sum())
    likely = {local._prompting.answer(ids, [int(token)]) for token in order[:number]}
    assert found <= likely
    assert len(found) > 1


def test_a_prefix_is_continued_as_if_it_had_been_said(local: Local, tokens):
    whole = Asking(prompt="say rain", max_tokens=9, temperature=1.0, seed=5)
    (answered,) = ask(local, whole)
    (text,), (new,), beginning = said(answered), tokens, local._prompting.ids(whole, 99)
    alike = 0
    for length in range(1, len(text)):
        rest = Asking(**{**vars(whole), "prefix": text[:length], "temperature": 0.0})
        ids = local._prompting.ids(rest, 99)
        number = len(ids) - len(beginning)
        if ids == (*beginning, *new[:number]):  # split as the model had said it
            alike += 1
            ask(local, rest)
            logits = local.models.weights("")(torch.tensor([ids])).logits[0, -1]
            assert tokens[-1][0] == int(logits.argmax())
    assert alike


def test_stop_strings_end_an_answer_and_are_cut(local: Local):
    plain = Asking(prompt="say apple:", max_tokens=16, temperature=0.0)
    (answered,) = ask(local, plain)
    (text,) = said(answered)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (found,) = ask(local, Asking(**{**vars(plain), "stop": ("never there", stop)}))
    (completion,) = found.completions
    assert completion.text == text[: text.index(stop)]
    assert completion.ended
    assert completion.tokens < answered.completions[0].tokens
    assert found.cost.flops < answered.cost.flops


class TestPrompts:
    def test_messages_are_written_by_the_template(self, tiny_model: Path, tmp_path: Path):
        folder = tmp_path / "chat"
        shutil.copytree(tiny_model, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        template = (
            "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant:{% endif %}"
        )
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**config, "chat_template": template})
        )
        backend = Local(folder, device="cpu")
        one = [{"role": "user", "content": "say apple"}]
        wanted = "<s>user: say apple\n<s>assistant: well,"
        for prompt in ("say apple", one):
            ids = backend._prompting.ids(Asking(prompt=prompt, prefix=" well,"), 100)
            assert backend.models.tokenizer.decode(ids) == wanted
        raw = Local(folder, device="cpu", templated=False)
        ids = raw._prompting.ids(Asking(prompt="say apple", prefix=" well,"), 100)
        assert raw.models.tokenizer.decode(ids) == "say apple well,"
        with pytest.raises(AskingFailed, match="cannot be written as a prompt"):
            ask(backend, Asking(prompt=["say apple"]))

    def test_without_a_template_as_training_writes_them(self, local: Local):
        turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say it"}]
        ids = local._prompting.ids(Asking(prompt=turns, prefix="so"), 100)
        text = "system: be brief\nuser: say it\nassistant: so"
        assert local.models.tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_one_that_fills_the_context_is_refused_and_costs_nothing(self, local: Local):
        before = local.num_batches
        for text in ("apple " * 200, "apple " * 10**6):
            asking = Asking(prompt=text)
            assert local.upper(asking).flops == 0
            with pytest.raises(AskingFailed, match="context leaves room for 127 tokens") as caught:
                ask(local, asking)
            assert caught.value.cost.flops == 0
            assert not caught.value.fatal
        assert local.num_batches == before
        (answered,) = ask(local, Asking(prompt="apple " * 20, max_tokens=10**9, temperature=0.0))
        assert answered.completions[0].tokens <= 128 - 20

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            ({"count": 0}, "count must be from 1"),
            ({"max_tokens": 0}, "max_tokens must be from 1"),
            ({"temperature": -1.0}, "temperature must be"),
            ({"temperature": float("nan")}, "temperature must be"),
            ({"top_p": 0.0}, "top_p must be"),
            ({"prompt": ""}, "prompt is empty"),
            ({"settings": {"early_exits": 0.5}}, "did you mean early_exit"),
            ({"settings": {"kv_cache": {"bits": 3}}}, "kv_cache.bits must be one of 0, 4, 8"),
            ({"settings": {"kv_cache": {"bits": 8, "window": 9}}}, "either bits or a window"),
            ({"settings": {"early_exit": 1.5}}, "threshold must be from 0 to 1"),
            ({"settings": {"early_exit": 0.5, "kv_cache": {"bits": 8}}}, "cannot be combined"),
            ({"settings": {"draft_model": "./not/there"}}, "no model folder"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_is_computed(self, local, wrong, told):
        before = local.num_batches
        asking = Asking(**{"prompt": "say apple:", **wrong})
        with pytest.raises(AskingFailed, match=told):
            ask(local, asking)
        assert local.num_batches == before
        assert local.upper(asking).flops == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"early_exit": {"threshold": 0.0033, "first_layer": 1}},
        {"kv_cache": {"bits": 8}},
        {"kv_cache": {"bits": 4}},
        {"kv_cache": {"window": 8, "sinks": 2}},
        "draft",
    ],
)
@pytest.mark.long
def test_every_way_of_making_tokens_is_charged_exactly(local, tiny_model, settings, counted):
    if settings == "draft":
        settings = {"draft_model": str(tiny_model), "draft_tokens": 3}
        local.models.weights(str(tiny_model)).set_attn_implementation("eager")
    askings = [
        Asking(prompt=f"say {text}:", count=2, max_tokens=14, seed=1, settings=settings)
        for text in ("apple", "rain and wind", "two")
    ]
    found = ask(local, *askings)
    assert sum(each.cost.flops for each in found) == sum(counted)
    for asking, answered in zip(askings, found, strict=True):
        assert answered.cost.flops <= local.upper(asking).flops


def test_the_notes_tell_what_a_draft_model_brings(tiny_model: Path):
    backend = Local(tiny_model, device="cpu", settings={"draft_model": str(tiny_model)})
    assert backend.notes == ()
    ask(backend, Asking(prompt="say apple:", max_tokens=21, temperature=0.0))
    (note,) = backend.notes
    assert "5.00 tokens a round measured" in note, "its own draft: all four are accepted"
    assert "leave the draft model out" in note


def test_what_the_model_raises_is_told_and_charged(local, monkeypatch):
    reads = 0
    real = Reader.read

    def failing(self, *args, **kwargs):
        nonlocal reads
        reads += 1
        if reads == 3:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Reader, "read", failing)
    with pytest.raises(AskingFailed, match=r"ran out of memory\nhint: lower max_batch") as caught:
        ask(local, Asking(prompt="say apple:", max_tokens=9, temperature=0.0))
    length = len(local._prompting.ids(Asking(prompt="say apple:"), 99))
    assert caught.value.cost.flops == decode_flops(local.shape, 1, length, 3)
    monkeypatch.undo()
    assert ask(local, Asking(prompt="say apple:", max_tokens=2)), "and it goes on"


def test_missing_weights_are_fatal(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "empty"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(AskingFailed, match="no safetensors weights") as caught:
        ask(Local(folder, device="cpu"), Asking(prompt="say"))
    assert caught.value.fatal


def test_settings_that_the_model_cannot_have_are_refused_at_the_start(tiny_model, tmp_path):
    folder = tmp_path / "capped"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "mistral", "sliding_window": 16})
    )
    for settings in ({"early_exit": 0.9}, {"kv_cache": {"bits": 8}}, {"draft_model": str(folder)}):
        with pytest.raises(ValueError, match="not built for models with layers with a sliding"):
            Local(folder, device="cpu", settings=settings)


def test_a_draft_of_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "tokenizer.json").read_text())
    config["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another tokenizer"):
        Local(tiny_model, device="cpu", settings={"draft_model": str(folder)})


def test_an_adapter_answers_on_its_base(tiny_model: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load_model(tiny_model, "float32", "cpu")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_model)
    adapted.save_pretrained(tmp_path / "adapter")
    backend = Local(tmp_path / "adapter", device="cpu")
    asking = Asking(prompt="say apple:", max_tokens=8, temperature=0.0)
    (answered,) = ask(backend, asking)
    ids = backend._prompting.ids(asking, 99)
    with torch.inference_mode():
        wanted = adapted.eval().generate(
            input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=1
        )
    new = [token for token in wanted[0, len(ids) :].tolist() if token != 1]
    assert said(answered) == [backend.models.tokenizer.decode(new)]
    assert np.isclose(answered.cost.flops, decode_flops(backend.shape, 1, len(ids), 8))


@pytest.fixture(scope="module")
def stories() -> Local:
    """A real model of 260,000 parameters, with a SentencePiece tokenizer, where there is one."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("THRIFTY_SHARED_DATA", beside)) / "stories260K-hf"
    if not (folder / "config.json").exists():
        pytest.skip("no pretrained model on this machine")
    return Local(folder, device="cpu")


def test_a_real_model_says_what_transformers_has_it_say_and_goes_on_where_it_was(stories: Local):
    prompt = "Once upon a"
    asking = Asking(prompt=prompt, max_tokens=40, temperature=0.0)
    (answered,) = ask(stories, asking)
    tokenizer = stories.models.tokenizer
    with torch.inference_mode():
        wanted = stories.models.weights("").generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False
        )
    (text,) = said(answered)
    assert prompt + text == tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert text.startswith(" time")
    half = text[: text.index(" ", 60)]
    rest = Asking(prompt=prompt, prefix=half, max_tokens=30, temperature=0.0)
    (more,) = ask(stories, rest)
    assert (half + said(more)[0])[: len(text)] == text
    assert 0.3 < answered.completions[0].confidence < 1


def test_a_real_model_stops_before_a_string_that_begins_with_a_space(stories: Local):
    asking = Asking(prompt="Once upon a", max_tokens=40, temperature=0.0, stop=(" there",))
    (answered,) = ask(stories, asking)
    assert said(answered) == [" time,"]
    assert answered.completions[0].tokens < 10
