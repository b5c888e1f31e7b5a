"""Parameters and FLOPs against the models themselves: the first two tables of ``costs.py``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from material import heading
from thrifty import display
from thrifty.costs.flops import decode_flops, gradient_score_flops, score_flops, step_flops
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape

sys.path.append(str(Path(__file__).parents[1] / "tests" / "costs"))

import six_n
from published import PUBLISHED, TINY, VARIANTS
from releases import PARAMETERS, RELEASES
from tracing import batch, build

Config = dict[str, Any]

# -- parameters -----------------------------------------------------------------------------------


def parameters() -> None:
    """By architecture: how many models equal the one that transformers builds, to the element."""
    lines = []
    models = PUBLISHED | RELEASES
    for architecture in sorted({config["model_type"] for config in TINY.values()}):
        released = [n for n, config in models.items() if config["model_type"] == architecture]
        made = [c for c in (TINY | VARIANTS).values() if c["model_type"] == architecture]
        configs = [models[name] for name in released] + made
        exact = sum(_predicted_parameters(c) == _built_parameters(c) for c in configs)
        stored = [name for name in released if name in PARAMETERS]
        agreeing = sum(_predicted_parameters(models[name]) == PARAMETERS[name] for name in stored)
        sizes = sorted(map(_predicted_parameters, (models[name] for name in released)))
        ends = f"{_millions(sizes[0])} to {_millions(sizes[-1])}" if sizes else "-"
        lines.append(
            (
                architecture,
                str(len(released)),
                ends,
                str(len(made)),
                f"{exact} of {len(configs)}",
                f"{agreeing} of {len(stored)}",
            )
        )
    print(heading("Parameters, equal to the model on the meta device and to the stored weights"))
    headers = ("architecture", "released", "sizes", "variants", "as built", "as stored")
    print(display.table(headers, lines, right="lrrrrr"))


def _predicted_parameters(config: Config) -> int:
    return ModelShape.from_config(config).num_parameters


def _built_parameters(config: Config) -> int:
    fields = dict(config)
    with torch.device("meta"):
        made = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return AutoModelForCausalLM.from_config(made).num_parameters()


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


# -- FLOPs ----------------------------------------------------------------------------------------

ROWS, SEQUENCE, PROMPT, GENERATED = 2, 16, 10, 8
FEW = ("llama", "qwen2", "gpt2", "qwen3_moe")
"""Families on which the ways to train are tried that act on no single operation."""


@dataclass(frozen=True)
class Flops:
    """One comparison; ``simple``: 6 N a token, 2 N for each forward without a backward; ``body``:
    the same of N without the embedding."""

    technique: str
    predicted: float
    counted: float
    simple: float
    body: float
    kept: float = 0.0
    """The counter's number of the same step that recomputes nothing, where this one does."""


def flops() -> None:
    _compared_flops()
    print()
    _six_n()


def _six_n() -> None:
    """The rule of 6 N on one stated model."""
    shape, lines = ModelShape.from_config(six_n.SMALL), []
    found = {way: six_n.counted(setting) for way, setting in six_n.WAYS.items()}
    forward = score_flops(shape, six_n.RUN.micro_batch, six_n.RUN.sequence)
    for way, each in found.items():
        kept = found.get(way.removesuffix(", recompute"))
        lines.append(
            (
                way,
                f"{each.flops / 1e9:.2f}",
                f"{step_flops(shape, six_n.WAYS[way]) / each.flops - 1:+.3%}",
                f"{each.flops / forward:.2f}",
                f"{each.six_n:.2f}",
                f"{each.flops / kept.flops:.3f}" if kept and kept is not each else "-",
            )
        )
    lines.append(
        (
            "full, fused attention",
            f"{six_n.counted(six_n.RUN, 'sdpa').flops / 1e9:.2f}",
            *("-" for _ in range(4)),
        )
    )
    print(heading("6 N on one small Llama: 4 layers of 256, 2 x 512 tokens, eager attention"))
    headers = ("technique", "GFLOP", "closed form", "forwards", "6 N / counter", "over keep")
    print(display.table(headers, lines, right="lrrrrr"))


def _compared_flops() -> None:
    found = [*_tiny_flops(), *_published_flops()]
    lines = []
    for technique in dict.fromkeys(each.technique for each in found):
        here = [each for each in found if each.technique == technique]
        worst = max(abs(each.predicted / each.counted - 1) for each in here)
        simple = sorted(each.simple / each.counted for each in here)
        body = sorted(each.body / each.counted for each in here)
        over = sorted(each.counted / each.kept for each in here if each.kept)
        lines.append(
            (
                technique,
                str(len(here)),
                str(sum(each.predicted == each.counted for each in here)),
                f"{worst:.3%}",
                f"{simple[0]:.2f} to {simple[-1]:.2f}",
                f"{body[0]:.2f} to {body[-1]:.2f}",
                f"{over[0]:.2f} to {over[-1]:.2f}" if over else "-",
            )
        )
    print(heading("FLOPs against torch's flop counter, eager attention and experts"))
    headers = (
        *("technique", "cases", "equal", "worst error", "6 N (or 2 N) over the counter"),
        *("N without the embedding", "recompute over keep"),
    )
    print(display.table(headers, lines, right="lrrrrrr"))


def _counted(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _tiny_flops() -> Iterator[Flops]:
    for name, config in TINY.items():
        depth = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
        config = config | {depth: 4 if name in ("llama4_text", "smollm3", "olmo3") else 3}
        shape = ModelShape.from_config(config)
        yield from _training_flops(config, shape, _ways(shape, few=name not in FEW))
        yield from _other_flops(config, shape)


def _ways(shape: ModelShape, *, few: bool) -> dict[str, MemorySetting]:
    """Technique -> setting."""
    run = MemorySetting(micro_batch=ROWS, sequence=SEQUENCE)
    some = Adapter(rank=2, targets=shape.lora_targets[:1], layers=(1,))
    ways = {
        "full": run,
        "full, recompute": replace(run, recompute=1),
        "LoRA on all linears": replace(run, adapter=Adapter(rank=4)),
        "LoRA on all linears, recompute": replace(run, adapter=Adapter(rank=4), recompute=1),
        "LoRA on one linear of one layer": replace(run, adapter=some),
    }
    if few:
        return ways
    return ways | {
        "head alone": replace(run, only_head=True),
        "one block of layers": replace(run, only_layers=frozenset({1})),
        "full, every second layer recomputed": replace(run, recompute=2),
        "full, selective recompute": replace(run, recompute=1, selective=True),
        "zeroth order": replace(run, zeroth_order=True),
    }


def _training_flops(
    config: Config, shape: ModelShape, ways: dict[str, MemorySetting]
) -> Iterator[Flops]:
    mixture = "" if shape.experts is None else ", mixture of experts"
    keeping: dict[MemorySetting, float] = {}
    for technique, setting in ways.items():
        model = build(
            config,
            adapter=setting.adapter,
            recompute=bool(setting.recompute) and not setting.selective,
            attention="eager",
        )
        _prepare(model, setting)
        inputs = batch(setting.micro_batch, setting.sequence)
        if setting.zeroth_order:
            counted = _counted(partial(_twice_forward, model, inputs))
        else:
            counted = _counted(lambda model=model, inputs=inputs: model(**inputs).loss.backward())
        passes = 4.0 if setting.zeroth_order else 6.0
        keeping[setting] = counted
        kept = keeping.get(replace(setting, recompute=0, selective=False), 0.0)
        yield Flops(
            technique + mixture,
            step_flops(shape, setting),
            counted,
            passes * shape.num_parameters * setting.tokens,
            passes * _body(shape) * setting.tokens,
            kept if setting.recompute else 0.0,
        )


def _body(shape: ModelShape) -> int:
    """Parameters without the embedding: of a tied head without the head as well."""
    return shape.num_parameters - shape.parameters_by_part["embedding"]


def _twice_forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        model(**inputs)
        model(**inputs)


def _prepare(model: torch.nn.Module, setting: MemorySetting) -> None:
    """What is trained, and which layers run again."""
    if setting.only_head:
        model.requires_grad_(False)
        model.get_output_embeddings().weight.requires_grad_(True)
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    if setting.only_layers is not None:
        model.requires_grad_(False)
        for index in setting.only_layers:
            layers[index].requires_grad_(True)
    if setting.recompute > 1:
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index % setting.recompute == 0
    if setting.selective:
        contexts = partial(create_selective_checkpoint_contexts, _keeps_products)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def _keeps_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    aten = torch.ops.aten
    kept = operation in (aten.mm.default, aten.bmm.default, aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _other_flops(config: Config, shape: ModelShape) -> Iterator[Flops]:
    """Scoring by a forward and by a gradient, and decoding."""
    model, inputs = build(config, attention="eager"), batch(ROWS, SEQUENCE)
    forward, body = (2.0 * n * ROWS for n in (shape.num_parameters, _body(shape)))
    with torch.no_grad():
        counted = _counted(lambda: model(**inputs))
    predicted = score_flops(shape, ROWS, SEQUENCE)
    yield Flops("scoring by a forward", predicted, counted, forward * SEQUENCE, body * SEQUENCE)
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    if layers is not None and not shape.tie_word_embeddings:
        model.requires_grad_(False)
        layers[-1].requires_grad_(True)
        counted = _counted(lambda: model(**inputs).loss.backward())
        predicted = gradient_score_flops(shape, ROWS, SEQUENCE, last_layers=1)
        rules = (3 * n * SEQUENCE for n in (forward, body))
        yield Flops("scoring by the last layer's gradient", predicted, counted, *rules)
    model.eval()
    model.config.use_cache = True
    ids = torch.ones(ROWS, PROMPT, dtype=torch.long)
    options = dict(max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False)
    counted = _counted(lambda: model.generate(ids, **options))
    predicted = decode_flops(shape, ROWS, PROMPT, GENERATED)
    rules = (n * (PROMPT + GENERATED - 1) for n in (forward, body))
    yield Flops("decoding with a cache", predicted, counted, *rules)


META = ("Llama-3-8B", "Llama-3.2-1B", "Qwen2.5-7B", "Gemma-2-2B", "Phi-3-mini", "GPT-2")


def _published_flops() -> Iterator[Flops]:
    """Whole models at 1 x 512, on the meta device: the counter needs shapes alone."""
    for name in META:
        shape = ModelShape.from_config(PUBLISHED[name])
        run = MemorySetting(micro_batch=1, sequence=512)
        ways = {
            "full, published models": run,
            "LoRA on all linears, published models": replace(run, adapter=Adapter()),
        }
        # Whether rows are packed cannot be looked up there.
        packed = mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)
        with torch.device("meta"), packed:
            yield from _training_flops(PUBLISHED[name], shape, ways)
