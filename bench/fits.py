"""What fits where: the best plan for a model on a GPU, and beside the best published figures a plan
that cuts every term together. All of it predicted; nothing here is run.

    OMP_NUM_THREADS=1 python bench/fits.py [--grid] [--published] [--only MODEL] [--json FILE]

    --grid       models of 1B to 70B on GPUs of 8 to 141 GB: the plan that `thrifty plan` chooses
                 for a day of packed sequences, among those that train all weights and among all;
                 its peak, what that is made of, and tokens a second
    --published  peaks that papers and projects give for one GPU, the same plan as priced here, and
                 the plan that takes least memory of those that train the same with tokens worth no
                 less (or a tenth less), as many of them a step, at the same length, in no more
                 time a token

Tokens are those that are no padding. GiB are 2^30 bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from material import heading
from thrifty import display, planner
from thrifty.combinations import price_all
from thrifty.core.budget import Budget, PoolStats
from thrifty.core.contracts import MemoryTechnique
from thrifty.core.ledger import Rates
from thrifty.core.plan import MemoryPlan
from thrifty.core.resolve import resolve
from thrifty.costs.allocator import device_memory
from thrifty.costs.hardware import DEVICES, GIB, Device, load_device
from thrifty.costs.memory import account
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.held import PACKING_FILL, quality_of
from thrifty.memory_plan import Techniques
from thrifty.pricing import Candidate
from thrifty.priors import load_priors
from thrifty.request import Request

sys.path.append(str(Path(__file__).parents[1] / "tests" / "costs"))

from published import PUBLISHED
from releases import RELEASES

CONFIGS = PUBLISHED | RELEASES
CONFIGS["OPT-13B"] = PUBLISHED["OPT-125m"] | dict(
    hidden_size=5120,
    ffn_dim=20480,
    num_hidden_layers=40,
    num_attention_heads=40,
    word_embed_proj_dim=5120,
)

# -- what fits where ------------------------------------------------------------------------------

MODELS = {
    "1B": "Llama-3.2-1B",
    "3B": "Llama-3.2-3B",
    "8B": "Llama-3-8B",
    "14B": "Qwen2.5-14B",
    "32B": "Qwen2.5-32B",
    "70B": "Llama-3.1-70B",
}
SEQUENCE = 2048
DAY = 86_400.0


def _ada(name: str, memory: float, tflops: float, bandwidth: float, watts: float, link: float):
    """A smaller card of the RTX 4090's family: GiB, dense bf16 TFLOP/s (twice those in fp32), GB/s,
    watts, GB/s of its PCIe link one way."""
    largest = DEVICES["rtx4090"]
    share = link / 32
    return replace(
        largest,
        name=name,
        memory_bytes=memory * GIB,
        flops_per_second={
            "bfloat16": tflops * 1e12,
            "float16": tflops * 1e12,
            "float32": tflops / 2 * 1e12,
        },
        bytes_per_second=bandwidth * 1e9,
        host_bytes_per_second=largest.host_bytes_per_second * share,
        tdp_watts=watts,
        source="NVIDIA's product page; memory as CUDA reports it on Linux",
    )


GPUS: dict[str, Device] = {
    "8 GB": _ada("rtx4060", 7.6, 30.2, 272, 115, 16),
    "12 GB": _ada("rtx4070", 11.7, 58.3, 504, 200, 32),
    "16 GB": _ada("rtx4080", 15.7, 97.5, 717, 320, 32),
    **{
        size: load_device(name)
        for size, name in {
            "24 GB": "rtx4090",
            "48 GB": "a6000",
            "80 GB": "h100-sxm",
            "141 GB": "h200",
        }.items()
    },
}
"""By the size that they are sold with."""

ALL_WEIGHTS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "hift": {},
    "lisa": {},
    "badam": {"training.gradient_accumulation_steps": 1},
}
"""What trains all weights, at once or in turns. A cycle of BAdam's turns has thousands of steps,
which a day has where a step is one micro-batch."""


def request(shape: ModelShape, device: Device, fixed: Mapping[str, Any], **more: Any) -> Request:
    """A day on a pool that is never used up: what a run can train with is searched."""
    pool = PoolStats(num_examples=10**7, num_tokens=10**10, max_tokens=SEQUENCE)
    return Request(
        shape=shape,
        device=device,
        rates=Rates.hourly(None, device.tdp_watts),
        pool=pool,
        fixed={"selection.scorer": "uniform", "training.max_length": SEQUENCE, **fixed},
        **{"budget": Budget(seconds=DAY), **more},
    )


FEWER_LOGITS = {"training.memory.loss": {"chunked": {"tokens": 256}}}
"""Tried where nothing fits with what a search tries, chunks of 1,024."""


def best(shape: ModelShape, device: Device, fixed: Mapping[str, Any]) -> Candidate | None:
    """What the planner chooses; None where nothing fits."""
    for more in ({}, FEWER_LOGITS):
        try:
            return planner.search(request(shape, device, {**fixed, **more})).chosen
        except ValueError:  # nothing fits, or in a day not one cycle of turns
            continue
    return None


def best_of_all_weights(shape: ModelShape, device: Device) -> Candidate | None:
    """Of those that train them at once or in turns."""
    each = (
        best(shape, device, {"training.memory.trained": name, **fixed})
        for name, fixed in ALL_WEIGHTS.items()
    )
    return surest(each)


def surest(candidates: Iterable[Candidate | None]) -> Candidate | None:
    """Of those that there are the one whose day is surely worth most."""
    return max(filter(None, candidates), key=lambda c: c.gain.mean - c.gain.stderr, default=None)


def facts(candidate: Candidate | None) -> dict[str, Any] | None:
    """A plan in plain values."""
    if candidate is None:
        return None
    batch = candidate.per_device_train_batch_size, candidate.gradient_accumulation_steps
    plan = candidate.held.describe("x".join(map(str, batch)))
    if candidate.setting.loss_chunk:
        plan = plan.replace("chunked", f"chunked {candidate.setting.loss_chunk}")
    return {
        "techniques": dict(candidate.techniques),
        "plan": plan.replace("chunked 1024", "chunked"),
        "micro_batch": batch[0],
        "gradient_accumulation_steps": batch[1],
        "peak_bytes": candidate.peak_memory_bytes,
        "phase": candidate.account.peak_phase,
        "bytes_by_term": {name: size for name, size in candidate.memory.items() if size},
        "tokens_per_second": candidate.useful_tokens / candidate.step.seconds,
        "worth": candidate.quality.mean,
    }


PARTS = {
    "weights": ("weights", "adapter"),
    "gradients": ("gradients",),
    "states": ("optimizer_states",),
    "activations": ("activations", "logits", "temporaries"),
    "beside": ("allocator", "runtime"),
}


def parts(plan: Mapping[str, Any]) -> str:
    """The terms at the peak in five sums, GiB."""
    sizes = plan["bytes_by_term"]
    sums = (sum(sizes.get(term, 0.0) for term in terms) for terms in PARTS.values())
    return " + ".join(f"{size / GIB:.1f}" for size in sums)


def grid(only: Sequence[str] = ()) -> list[dict[str, Any]]:
    found = []
    for size, name in MODELS.items():
        if only and size not in only:
            continue
        shape = ModelShape.from_config(CONFIGS[name])
        for memory, device in GPUS.items():
            all_weights = best_of_all_weights(shape, device)
            most = surest((best(shape, device, {}), all_weights))
            found.append(
                {
                    "size": size,
                    "model": name,
                    "memory": memory,
                    "device": device.name,
                    "sequence": SEQUENCE,
                    "all weights": facts(all_weights),
                    "best": facts(most),
                }
            )
            print(f"{size} on {memory}", file=sys.stderr, flush=True)
    return found


def grid_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in found:
        for what in ("all weights", "best"):
            plan = row[what]
            where = row["size"], f"{row['device']} {row['memory']}", what
            if plan is None:
                yield (*where, "nothing fits", "", "", "")
            else:
                yield (
                    *where,
                    plan["plan"],
                    f"{plan['peak_bytes'] / GIB:.1f}",
                    parts(plan),
                    f"{plan['tokens_per_second']:,.0f}",
                )


GRID_HEADERS = ("model", "GPU", "trained", "plan", "GiB", " + ".join(PARTS), "tokens/s")

# -- beside published figures ---------------------------------------------------------------------

IN_FULL = ("full",)
IN_TURNS = ("full", "badam", "hift", "lisa")
NO_GRADIENT = ("mezo",)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A peak that somebody gives for one GPU, and the plan of that run in thrifty's words."""

    name: str
    model: str
    gigabytes: float
    unit: float
    """Bytes of the gigabyte that is meant."""
    quantity: str
    """allocated | reserved | device; with a question mark where it is not said."""
    source: str
    device: str
    sequence: int
    micro_batch: int
    memory: Mapping[str, Any]
    """A ``MemoryPlan``'s fields."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the setting for which there is no technique."""
    instead: Sequence[Any] = IN_FULL
    """What trains the same."""
    assumed: str = ""

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_config(CONFIGS[self.model])

    @property
    def start(self) -> MemorySetting:
        return MemorySetting(
            micro_batch=self.micro_batch, sequence=self.sequence, masked=False, device_kind="cuda"
        )

    def of(self, allocated: float) -> float:
        """Bytes of the published quantity, where tensors take so many."""
        return float(getattr(device_memory(allocated, "cuda"), self.quantity.rstrip("?")))


def full(**others: Any) -> dict[str, Any]:
    plan = {"trained": "full", "weights": "bfloat16", "activations": "recompute"}
    return {**plan, "loss": "whole", "states": "adamw", **others}


def lora(rank: int, targets: Sequence[str] = (), **others: Any) -> dict[str, Any]:
    adapter = {"rank": rank, "targets": list(targets), "adapter_dtype": "bfloat16"}
    return full(trained={"lora": adapter}, activations="keep", **others)


def alike(adapter: Mapping[str, Any]) -> tuple[Any, ...]:
    """An adapter of the same rank on the same linears, in either dtype."""
    (options,) = adapter["trained"].values()
    return tuple({"lora": {**options, "adapter_dtype": dtype}} for dtype in ("float32", "bfloat16"))


QUERIES = ("q_proj", "v_proj")
LITGPT = lora(8, QUERIES)
QLORA = lora(8, QUERIES) | {"weights": {"nf4": {"double": False}}}
TUNE = lora(64) | {"activations": "recompute_offload", "loss": "chunked"}
TUNED = {"loss": "chunked", "states": "adamw"}
TORCHTUNE = dict(
    model="Llama-3.2-3B",
    unit=GIB,
    quantity="allocated",
    source="torchtune README",
    device="a100",
    sequence=4096,
    micro_batch=2,
)
GALORE = dict(
    model="Llama-2-7B", unit=1e9, quantity="device?", device="rtx4090", sequence=256
)  # LLaMA 1 has the same shape
APOLLO = GALORE | dict(device="a100", source="APOLLO's chart, +-0.5 GB", micro_batch=1)
EIGHT_BIT = "G taken as 1e9; moments of 16 bits for GaLore's of 8"

FIGURES = (
    Published(
        name="AdamW",
        model="Llama-2-7B",
        gigabytes=51.6,
        unit=GIB,
        quantity="allocated",
        source="torchao optim README",
        device="a100",
        sequence=256,
        micro_batch=2,
        memory=full(),
        assumed="256 tokens, of Alpaca unpacked",
    ),
    Published(
        name="AdamW in 4 bits",
        model="Llama-2-7B",
        gigabytes=33.2,
        unit=GIB,
        quantity="allocated",
        source="torchao optim README",
        device="a100",
        sequence=256,
        micro_batch=2,
        memory=full(states="adamw_4bit"),
        assumed="256 tokens, of Alpaca unpacked",
    ),
    Published(
        name="AdamW, chunked loss",
        gigabytes=42.9,
        memory=full(activations="keep", **TUNED),
        **TORCHTUNE,
    ),
    Published(
        name="AdamW, chunked loss, recomputation", gigabytes=24.9, memory=full(**TUNED), **TORCHTUNE
    ),
    Published(
        name="the same, in the backward",
        gigabytes=23.1,
        memory=full(**TUNED),
        also={"in_backward": True},
        **TORCHTUNE,
    ),
    Published(
        name="the same, activations offloaded",
        gigabytes=21.8,
        memory=full(activations="recompute_offload", **TUNED),
        also={"in_backward": True},
        **TORCHTUNE,
    ),
    Published(
        name="LoRA",
        gigabytes=8.5,
        memory=TUNE,
        instead=alike(TUNE),
        assumed="rank 64 on all linears, in bf16",
        **TORCHTUNE,
    ),
    Published(
        name="QLoRA",
        gigabytes=4.6,
        memory=TUNE | {"weights": "nf4"},
        instead=alike(TUNE),
        assumed="rank 64 on all linears, in bf16",
        **TORCHTUNE,
    ),
    Published(
        name="LoRA r8 q,v",
        model="Llama-2-7B",
        gigabytes=21.3,
        unit=1e9,
        quantity="allocated",
        source="litgpt tables, 2023",
        device="a100-40gb",
        sequence=1304,
        micro_batch=1,
        memory=LITGPT,
        instead=alike(LITGPT),
    ),
    Published(
        name="QLoRA r8 q,v",
        model="Llama-2-7B",
        gigabytes=14.14,
        unit=1e9,
        quantity="allocated",
        source="litgpt tables, 2023",
        device="a100-40gb",
        sequence=1304,
        micro_batch=1,
        memory=QLORA,
        instead=alike(QLORA),
        assumed="its bitsandbytes kept every input, which is gone since 0.43.2",
    ),
    Published(
        name="GaLore r1024, in the backward",
        gigabytes=22.72,
        source="GaLore's scripts",
        micro_batch=1,
        memory=full(activations="keep", states={"galore": {"rank": 1024}}),
        also={"in_backward": True},
        assumed=EIGHT_BIT,
        **GALORE,
    ),
    Published(
        name="GaLore r1024, in the backward, recomputation",
        gigabytes=22.8,
        source="GaLore's README",
        micro_batch=16,
        memory=full(states={"galore": {"rank": 1024}}),
        also={"in_backward": True},
        assumed=EIGHT_BIT,
        **GALORE,
    ),
    Published(
        name="APOLLO, in the backward",
        gigabytes=20.0,
        memory=full(activations="keep", states={"apollo": {"rank": 256}}),
        also={"in_backward": True},
        assumed="rank 256",
        **APOLLO,
    ),
    Published(
        name="APOLLO-Mini, in the backward",
        gigabytes=17.4,
        memory=full(
            activations="keep", states={"apollo": {"rank": 1, "tensor_wise": True, "scale": 11.3}}
        ),
        also={"in_backward": True},
        **APOLLO,
    ),
    *(
        Published(
            name="BAdam",
            model=model,
            gigabytes=gigabytes,
            unit=1e9,
            quantity="device?",
            source="BAdam's README",
            device="rtx3090",
            sequence=1024,
            micro_batch=2,
            memory=full(trained="badam"),
            instead=IN_TURNS,
            assumed="1024 tokens; its block in bf16, theirs in float32",
        )
        for model, gigabytes in (("Llama-3-8B", 23.5), ("Llama-2-7B", 21.8))
    ),
    Published(
        name="LOMO",
        model="Llama-2-7B",
        gigabytes=14.58,
        unit=1e9,
        quantity="allocated?",
        source="LOMO's paper: a mean over time",
        device="rtx3090",
        sequence=512,
        micro_batch=1,
        memory=full(states="lomo"),
        assumed="1 x 512, recomputation",
    ),
    Published(
        name="MeZO",
        model="OPT-13B",
        gigabytes=26.0,
        unit=1e9,
        quantity="device?",
        source="MeZO's chart, +-10%",
        device="a100",
        sequence=400,
        micro_batch=1,
        memory=full(trained="mezo", activations="keep", loss="whole", states="sgd"),
        instead=(*NO_GRADIENT, *IN_TURNS),
        assumed="1 x 400",
    ),
)

LEFT_OUT = {
    "Q-GaLore, Q-APOLLO-Mini": "trained weights in 8 bits",
    "CPUOffloadOptimizer, 4.01 GB": "the model is not named",
    "Adam-mini, 26.96 GB": "states alone, no step's peak",
    "Liger, cut cross-entropy": "the head alone, no step's peak",
    "LISA, SinkGD": "no figure of their own",
    "paged AdamW": "a share, no figure",
    "FSDP2, ZeRO": "several GPUs",
}
"""Of the same list, and why."""


CLEARLY = 0.99
"""Less than this much of the published plan's bytes."""
WORTH = (1.0, 0.9)
"""Of a token, beside the published plan's: no less; else a tenth less, which the priors of what
trains all weights cannot tell apart."""


def joint(figure: Published, allocated: float, seconds: float) -> dict[str, Any] | None:
    """The plan that takes least of those that train the same, whose tokens are worth no less (or
    hardly), of which a step has as many, none of which takes longer; None where none takes less."""
    shape, device = figure.shape, load_device(figure.device)
    own = quality_of(Techniques.of(MemoryPlan(**figure.memory)).in_order, load_priors()).mean
    sizes = [2**n for n in range(figure.micro_batch.bit_length())]
    wanted: list[MemoryTechnique] = [resolve("trained", spec) for spec in figure.instead]
    priced = price_all(
        shape,
        device,
        sequence=figure.sequence,
        layouts=({"masked": False},),
        wanted={"trained": wanted},
        micro_batches=sizes,
        runs_only=True,
    )
    for least in WORTH:
        best: dict[str, Any] = {"allocated": allocated}
        for held in priced.held:
            if held.quality.mean < own * least - 1e-9:
                continue
            for index, size in enumerate(sizes):
                peak = held.peak(index, size < figure.micro_batch)
                time = float(held.seconds_a_row[index]) * figure.micro_batch
                if time <= seconds * (1 + 1e-9) and peak < best["allocated"]:
                    batch = f"{size}x{figure.micro_batch // size}"
                    best = {
                        "plan": held.describe(batch).replace(" flash", ""),
                        "techniques": dict(held.technique_names),
                        "allocated": peak,
                        "seconds": time,
                        "worth_ratio": held.quality.mean / own,
                    }
        if best["allocated"] < allocated * CLEARLY:
            return best
    return None


def compared(figure: Published) -> dict[str, Any]:
    shape, device = figure.shape, load_device(figure.device)
    techniques = Techniques.of(MemoryPlan(**figure.memory))
    setting = replace(techniques.setting(figure.start), **figure.also)
    allocated = account(shape, setting).peak_memory_bytes
    seconds = step_seconds(shape, setting, device)
    other = joint(figure, allocated, seconds)
    if other is not None:
        other |= {
            "bytes": figure.of(other["allocated"]),
            "memory_ratio": other["allocated"] / allocated,
            "seconds_ratio": other["seconds"] / seconds,
        }
    return {
        "figure": figure.name,
        "model": figure.model,
        "source": figure.source,
        "device": device.name,
        "batch": f"{figure.micro_batch} x {figure.sequence}",
        "quantity": figure.quantity,
        "assumed": figure.assumed,
        "published": figure.gigabytes * figure.unit,
        "predicted": figure.of(allocated),
        "tokens_per_second": setting.tokens * PACKING_FILL / seconds,
        "joint": other,
    }


def compared_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in found:
        other = row["joint"]
        yield (
            f"{row['model']} {row['figure']}",
            row["batch"],
            row["quantity"],
            f"{row['published'] / GIB:.1f}",
            f"{row['predicted'] / GIB:.1f}",
            f"{row['predicted'] / row['published'] - 1:+.0%}",
            other["plan"] if other else "none",
            f"{other['bytes'] / GIB:.1f}" if other else "",
            f"{other['memory_ratio']:.2f}" if other else "",
            f"{other['seconds_ratio']:.2f}" if other else "",
            f"{other['worth_ratio']:.2f}" if other else "",
            f"{row['source']}{'; ' if row['assumed'] else ''}{row['assumed']}",
        )


COMPARED_HEADERS = (
    "figure",
    "batch",
    "quantity",
    "published GiB",
    "predicted",
    "off",
    "joint plan",
    "GiB",
    "memory",
    "time",
    "worth",
    "source; what is assumed",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--only", action="append", choices=MODELS, help="of --grid")
    parser.add_argument("--json", type=Path, help="write it all there, too")
    options = parser.parse_args()
    both = not options.grid and not options.published
    written: dict[str, Any] = {}
    if options.grid or both:
        written["grid"] = grid(options.only or ())
        print(heading(f"The best plan that fits, packed sequences of {SEQUENCE} tokens, predicted"))
        print(display.table(GRID_HEADERS, grid_lines(written["grid"]), right="llllrrr"))
    if options.published or both:
        written["published"] = [compared(figure) for figure in FIGURES]
        print(heading("\nPublished peaks on one GPU, and a joint plan; ratios of predictions"))
        lines = compared_lines(written["published"])
        print(display.table(COMPARED_HEADERS, lines, right="lllrrrlrrrrl"))
        print("\nleft out: " + "; ".join(f"{name} ({why})" for name, why in LEFT_OUT.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(written, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
