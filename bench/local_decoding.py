"""What docs/local_decoding.md shows: each way of making tokens beside whole passes, in one run.

    OMP_NUM_THREADS=1 python bench/local_decoding.py MODEL [--text FILE] [--new 128] [--rows 1 16]
        [--draft FOLDER]

MODEL is a folder of a small pretrained Llama; prompts are the beginnings of the text's lines that
are long enough, or where no text is given, what the model itself says after its first token.
Decoding is greedy, so that every token can be compared. Without ``--draft``, drafts are copies of
the model with some of its layers left out.

    flops      a token's, prompt included, as shares of whole passes'
    speed      tokens a second, likewise: means of repeats that take turns
    same       share of the tokens that whole passes say at the same place: one that differs leads
               all that follow elsewhere
    first      share of the answers' tokens before the first that differs
    nats       mean log-likelihood of the tokens under the model with whole passes
    bytes      of an answer's keys and values at its end, counted and measured, as shares

Seconds are those of the processor, so that what else runs on the machine counts less; each way is
timed in turns with whole passes, and the ratio is that of the same turn.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from material import heading
from thrifty.core.budget import Cost
from thrifty.costs.decoding import cache_bytes
from thrifty.costs.shape import ModelShape, read_shape
from thrifty.costs.speculation import Speculation
from thrifty.costs.token_settings import EarlyExit, KVCache
from thrifty.data.tokens import load_tokenizer
from thrifty.signals.early_exit import EarlyExits
from thrifty.signals.generation_batch import Way, WholePasses, answered
from thrifty.signals.generation_rows import Answer, Wanted
from thrifty.signals.models import load_model
from thrifty.signals.reader import Reader
from thrifty.signals.speculative import Speculative

PROMPT_TOKENS = 24
REPEATS = 2
ALONE = 2
"""Prompts that are answered where rows are one at a time."""


@dataclass
class Spent:
    """A meter that adds up."""

    cost: Cost = field(default_factory=Cost)

    def tick(self, cost: Cost, *, steps: int = 0) -> None:
        self.cost += cost


@dataclass
class Measured:
    """One way on one set of prompts."""

    answers: list[Answer]
    flops: float
    speeds: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)


@dataclass(frozen=True)
class Tried:
    name: str
    make: Callable[[], Way]
    kept: KVCache | None = None
    draft: tuple[Any, ModelShape, int] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--draft", type=Path)
    asked = parser.parse_args()
    model, shape = load_model(asked.model, "float32", "cpu").eval(), read_shape(asked.model)
    tokenizer = load_tokenizer(str(asked.model))
    prompts = prompts_of(asked, model, shape, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tried = [*plain_ways(shape), *draft_ways(asked, model, shape, Path(folder))]
        print(heading(f"Ways of making tokens: {asked.model.name}"))
        print(
            f"{shape.num_parameters:,} parameters, {shape.num_layers} layers, "
            f"{len(prompts)} prompts of {PROMPT_TOKENS} tokens, {asked.new} new, greedy"
        )
        for rows in asked.rows:
            table(model, shape, prompts, tried, asked.new, rows)


def plain_ways(shape: ModelShape) -> list[Tried]:
    found = [Tried("whole passes", WholePasses)]
    last = shape.num_layers - 1
    exits = [(0.5, 1), (0.9, 1), (0.9, shape.num_layers // 2)]
    exits += [(threshold, last) for threshold in (0.5, 0.7, 0.9, 0.99)]
    for threshold, first in exits:
        early = EarlyExit(threshold=threshold, first_layer=first)
        name = f"early exit {threshold:g}, from layer {first}"
        found.append(Tried(name, lambda early=early: EarlyExits(early)))
    caches = [KVCache(bits=8), KVCache(bits=4), KVCache(window=64), KVCache(window=16)]
    caches.append(KVCache(window=20, sinks=0))
    for kept in caches:
        name = f"cache of {kept.bits} bits" if kept.bits else f"window {kept.window}"
        name += f", {kept.sinks} sinks" if kept.window else ""
        found.append(Tried(name, lambda kept=kept: WholePasses(kept), kept))
    return found


def draft_ways(
    asked: argparse.Namespace, model: Any, shape: ModelShape, folder: Path
) -> list[Tried]:
    drafts: dict[str, tuple[Any, ModelShape]] = {}
    if asked.draft:
        own = load_model(asked.draft, "float32", "cpu").eval()
        drafts[asked.draft.name] = own, read_shape(asked.draft)
    else:
        last = shape.num_layers - 1
        for kept in ([0, last], [*range(last - 1), last]):
            name = "layers " + " ".join(str(each + 1) for each in kept)
            drafts[name] = without_layers(model, kept, folder / name.replace(" ", "-"))
    found = []
    for name, (draft, its_shape) in drafts.items():
        for number in (1, 2, 4):
            found.append(
                Tried(
                    f"draft of {number}: {name}",
                    lambda d=draft, s=its_shape, n=number: Speculative(d, s, n),
                    draft=(draft, its_shape, number),
                )
            )
    return found


def without_layers(model: Any, kept: Sequence[int], folder: Path) -> tuple[Any, ModelShape]:
    """A copy of a Llama with these layers alone."""
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList(smaller.model.layers[place] for place in kept)
    smaller.config.num_hidden_layers = len(kept)
    smaller.save_pretrained(folder)
    return load_model(folder, "float32", "cpu").eval(), read_shape(folder)


def prompts_of(
    asked: argparse.Namespace, model: Any, shape: ModelShape, tokenizer: Any
) -> list[list[int]]:
    if asked.text is None:
        start = [[tokenizer.bos_token_id]] * max(ALONE, *asked.rows)
        wanted = [
            Wanted(
                ids=ids,
                max_new_tokens=PROMPT_TOKENS - 1,
                temperature=0.8,
                random=[np.random.default_rng(place)],
            )
            for place, ids in enumerate(start)
        ]
        with torch.inference_mode():
            found, _ = answered(model, shape, wanted, Spent())
        return [[*ids, *answer.ids.tolist()] for ids, (answer,) in zip(start, found, strict=True)]
    opened = gzip.open if asked.text.suffix == ".gz" else open
    with opened(asked.text, "rt", encoding="utf-8") as lines:
        texts = re.split(r"<\|endoftext\|>|\n", lines.read())
    ids = [tokenizer(text.strip())["input_ids"] for text in texts if text.strip()]
    return [each[:PROMPT_TOKENS] for each in ids if len(each) > PROMPT_TOKENS][
        : max(ALONE, *asked.rows)
    ]


def table(
    model: Any,
    shape: ModelShape,
    prompts: list[list[int]],
    tried: list[Tried],
    new: int,
    rows: int,
) -> None:
    some = prompts if rows > 1 else prompts[:ALONE]
    batches = [some[start : start + rows] for start in range(0, len(some), rows)]
    ways = {each.name: each.make() for each in tried}
    found = {each.name: run(model, shape, batches, new, ways[each.name]) for each in tried}
    # Each is timed beside whole passes of its own, before and after by turns.
    for turn in range(REPEATS):
        for each in tried:
            pair = [tried[0], each][:: 1 if turn % 2 else -1]
            speeds = {}
            for one in pair:
                speeds[one.name] = speed(model, shape, batches, new, one.make())
            found[each.name].speeds.append(speeds[each.name] / speeds[tried[0].name])
    plain = found[tried[0].name]
    print(f"\n{rows} row(s) at a time; whole passes: {plain.flops / plain.num_tokens:.3e} FLOPs")
    print(f"{'':34} flops  speed   same  first    nats  bytes (measured)")
    for each in tried:
        own = found[each.name]
        line = f"{each.name:34} "
        line += f"{own.flops / own.num_tokens / (plain.flops / plain.num_tokens):5.2f}  "
        line += f"{statistics.mean(own.speeds):5.2f}  "
        line += f"{same(own, plain):5.3f}  {before_the_first(own, plain):5.3f}  "
        line += f"{nats(model, some, own):6.3f}  "
        line += of_cache(model, shape, some, own, each)
        print(line + told(ways[each.name], each, model, shape, rows), flush=True)


def wanted(batch: list[list[int]], new: int) -> list[Wanted]:
    return [Wanted(ids=ids, max_new_tokens=new, random=[np.random.default_rng(0)]) for ids in batch]


def run(
    model: Any, shape: ModelShape, batches: list[list[list[int]]], new: int, way: Way
) -> Measured:
    meter, answers = Spent(), []
    with torch.inference_mode():
        for batch in batches:
            found, _ = answered(model, shape, wanted(batch, new), meter, way)
            answers += [answer for (answer,) in found]
    return Measured(answers, meter.cost.flops)


def speed(
    model: Any, shape: ModelShape, batches: list[list[list[int]]], new: int, way: Way
) -> float:
    start = time.process_time()
    found = run(model, shape, batches, new, way)
    return found.num_tokens / (time.process_time() - start)


def same(own: Measured, plain: Measured) -> float:
    equal = [
        np.mean(one.ids == other.ids) for one, other in zip(own.answers, plain.answers, strict=True)
    ]
    return float(np.mean(equal))


def before_the_first(own: Measured, plain: Measured) -> float:
    shares = []
    for one, other in zip(own.answers, plain.answers, strict=True):
        unlike = np.flatnonzero(one.ids != other.ids)
        shares.append((unlike[0] if len(unlike) else len(one.ids)) / len(one.ids))
    return float(np.mean(shares))


def nats(model: Any, prompts: list[list[int]], own: Measured) -> float:
    """A token's, of the answers, under the model as it is."""
    total = 0.0
    for prompt, answer in zip(prompts, own.answers, strict=True):
        ids = torch.tensor([[*prompt, *answer.ids.tolist()]])
        with torch.inference_mode():
            logs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total += float(logs.gather(1, ids[0, len(prompt) :, None]).mean())
    return total / len(prompts)


def of_cache(
    model: Any, shape: ModelShape, prompts: list[list[int]], own: Measured, each: Tried
) -> str:
    """At an answer's end, counted and measured, as shares of whole keys and values."""
    length = len(prompts[0]) + own.answers[0].num_tokens - 1  # its last token is not read
    whole = cache_bytes(shape, 1, length, "float32")
    counted = cache_bytes(shape, 1, length, "float32", each.kept)
    reader = Reader(model, shape, each.kept)
    with torch.inference_mode():
        reader.read(torch.tensor([prompts[0]]))
        for token in own.answers[0].ids[:-1].tolist():
            reader.read(torch.tensor([[token]]))
    held = float(reader.cache_bytes)
    if each.draft is not None:
        beside = cache_bytes(each.draft[1], 1, length, "float32")
        counted, held = counted + beside, held + beside
    return f"{counted / whole:5.3f} ({held / whole:5.3f})"


def told(way: Way, each: Tried, model: Any, shape: ModelShape, rows: int) -> str:
    """What else there is to say of a way."""
    if isinstance(way, EarlyExits):
        return f"  {way.num_layers / way.num_tokens:.2f} layers a token"
    if not isinstance(way, Speculative) or each.draft is None:
        return ""
    draft, its_shape, number = each.draft
    one = pass_seconds(model, shape, rows, 1)
    pays = Speculation(
        acceptance=way.acceptance,
        drafted=number,
        draft_pass=pass_seconds(draft, its_shape, rows, 1) / one,
        check_pass=pass_seconds(model, shape, rows, number + 1) / one,
    )
    return (
        f"  accepted {way.acceptance:.2f}; tokens a round {way.tokens_a_round:.2f}, predicted "
        f"{pays.tokens_a_round:.2f}; speed predicted {pays.speedup:.2f} "
        f"(c {pays.draft_pass:.2f}, v {pays.check_pass:.2f})"
    )


def pass_seconds(model: Any, shape: ModelShape, rows: int, new: int) -> float:
    """The median of some passes, on a cache of 96 tokens."""
    reader, seconds = Reader(model, shape), []
    with torch.inference_mode():
        reader.read(torch.full((rows, 96), 5))
        for _ in range(15):
            start = time.process_time()
            reader.read(torch.full((rows, new), 7), keep=new)
            seconds.append(time.process_time() - start)
            reader.forget(torch.full((rows,), new))
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
