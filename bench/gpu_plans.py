"""Memory plans of a Llama-3-8B with random weights on a GPU, and other libraries' defaults.

    python bench/gpu_plans.py [--out bench/results]

Under ten minutes; every plan runs in a process of its own, four steps as a run would take them.
First ``training.memory`` in two dozen forms: predicted and measured peak, tokens a second. Then TRL
and PEFT as they come (``SFTTrainer``), Unsloth's defaults (their configuration, held by thrifty's
techniques and without their kernels), and for each of these what the planner picks in no more
memory, training the same: ratios. Written with the device and versions to
RESULTS/gpu_plans-DATE.json.

``--tiny`` runs some of it with a model of two layers on the CPU, in one process whose resident set
takes the place of the allocator's peak: a check of this script, no measurement.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fits import CONFIGS, request
from material import heading
from thrifty import display, planner
from thrifty.core.budget import Budget
from thrifty.core.plan import MemoryPlan
from thrifty.core.quantities import format_bytes
from thrifty.costs.allocator import allocatable, device_memory
from thrifty.costs.hardware import ALIASES, DEVICES, Device, load_device
from thrifty.costs.memory import account
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape, read_shape
from thrifty.memory_plan import Techniques, memory_plan_of
from thrifty.request import MEMORY_MARGIN

TINY = CONFIGS["Llama-3-8B"] | dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    max_position_embeddings=64,
)


@dataclass(frozen=True)
class Here:
    """The device at hand."""

    kind: str
    name: str
    memory_bytes: float
    like: Device
    """As the planner knows it."""

    @classmethod
    def found(cls, kind: str) -> Here:
        import torch

        if kind == "cpu":
            return cls(kind, platform.machine(), 2.0 * 2**30, load_device(None))
        name = torch.cuda.get_device_name()
        words = "".join(letter for letter in name.lower() if letter.isalnum())
        known = [each for each in (*DEVICES, *ALIASES) if each.replace("-", "") in words]
        if not known:
            sys.exit(f"{name} is no device that thrifty knows\nhint: add it to costs/hardware.py")
        memory = torch.cuda.get_device_properties(0).total_memory
        return cls(kind, name, float(memory), load_device(max(known, key=len)))


# -- what is measured -----------------------------------------------------------------------------

NUM_STEPS = 4
"""Of which the first, in which states are made and kernels chosen, is not timed."""
PLAIN = {"weights": "bfloat16", "activations": "recompute", "loss": "chunked", "states": "adamw"}


def held(trained: Any, **others: Any) -> dict[str, Any]:
    return {"trained": trained, **PLAIN, **others}


UNSLOTH = "Unsloth's defaults, held by thrifty"
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (1, held("lora")),
    "lora, all kept": (1, held("lora", activations="keep", loss="whole")),
    "lora, half recomputed": (1, held("lora", activations="recompute_half")),
    "lora, selective": (1, held("lora", activations="selective")),
    "lora, offloaded": (4, held("lora", activations="offload")),
    "lora on nf4": (4, held("lora", weights="nf4", states="adamw_8bit")),
    "lora on int8": (4, held("lora", weights="int8", states="adamw_8bit")),
    "lora on fp8": (4, held("lora", weights="fp8", states="adamw_8bit")),
    "lora_fa, all kept": (1, held("lora_fa", activations="keep")),
    "dora on nf4": (2, held("dora", weights="nf4")),
    "ia3": (2, held("ia3")),
    "adamw_8bit": (2, held("full", states="adamw_8bit")),
    "adamw_bf16": (1, held("full", states="adamw_bf16")),
    "adamw_offload": (2, held("full", states="adamw_offload")),
    "lion_8bit": (2, held("full", states="lion_8bit")),
    "adafactor": (2, held("full", states="adafactor")),
    "apollo": (2, held("full", states="apollo")),
    "lomo": (2, held("full", states="lomo")),
    "adalomo": (2, held("full", states="adalomo")),
    "badam": (4, held("badam")),
    "lisa": (4, held("lisa")),
    "hift": (4, held("hift")),
    "mezo": (4, held("mezo", activations="keep", loss="whole", states="sgd")),
    UNSLOTH: (
        2,
        held(
            {"lora": {"rank": 16, "alpha": 16.0}},
            weights="nf4",
            activations="recompute_offload",
            states="adamw_8bit",
        ),
    ),
}
"""Name -> micro-batch at 2048 tokens, and ``training.memory``."""

QUERIES = {"lora": {"rank": 8, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}}
"""``LoraConfig()``."""
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "TRL": ("full", {}),
    "TRL, PEFT's LoRA": (QUERIES, {"adapter": True}),
    "TRL, PEFT's LoRA, NF4": (QUERIES, {"adapter": True, "nf4": True}),
    "PEFT's LoRA, nothing recomputed": (
        QUERIES,
        {"adapter": True, "arguments": {"gradient_checkpointing": False}},
    ),
}
"""Name -> what it trains, and how it is asked for; all else as it comes."""


class Watch:
    """Peaks and seconds of some steps, in a process that does nothing else."""

    def __init__(self, kind: str) -> None:
        from thrifty.signals.peak_memory import memory_bytes, reset_peak

        self.kind, self.ends = kind, list[float]()
        self.level = memory_bytes("cpu") if kind == "cpu" else 0.0
        reset_peak(kind)

    def step_ended(self) -> None:
        import torch

        if self.kind == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seen(self, tokens: int) -> dict[str, float]:
        """With ``tokens`` of a step."""
        import torch

        from thrifty.signals.peak_memory import peak_memory_bytes

        # A tiny step may fit into what a CPU's process held before.
        peak = max(peak_memory_bytes(self.kind) - self.level, 1.0)
        reserved = float(torch.cuda.max_memory_reserved()) if self.kind == "cuda" else peak
        seconds = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        return {"allocated": peak, "reserved": reserved, "tokens_per_second": tokens / seconds}


def train(asked: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Steps under a memory plan."""
    watch = Watch(kind)
    step = stepper(asked, kind)
    for number in range(NUM_STEPS):
        step(number)
        watch.step_ended()
    return watch.seen(asked["micro_batch"] * asked["sequence"])


def stepper(asked: Mapping[str, Any], kind: str) -> Callable[[int], None]:
    """Takes a numbered step under a memory plan, driven as a run's trainer does."""
    import torch

    from thrifty.data.packed_attention import attention_of

    base, rows, length = Path(asked["base"]), asked["micro_batch"], asked["sequence"]
    techniques, shape = Techniques.of(MemoryPlan(**asked["memory"])), read_shape(base)
    model = techniques.build(base, shape, kind, seed=0).train()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": named, "lr": 1e-6, "weight_decay": 0.0}]
    optimizer = techniques.optimizer(groups, shape, seed=0)
    ids = torch.randint(0, shape.vocab_size, (rows, length), device=kind)
    positions = torch.arange(length, device=kind).repeat(rows, 1) % (length // 2 + 1)
    short = techniques.trained.short  # of two packs the one with a backward

    def loss(tokens: int = length) -> torch.Tensor:
        at, there = ids[:, :tokens], positions[:, :tokens]
        apart = attention_of(inner, there)
        return model(input_ids=at, labels=at, position_ids=there, **apart).loss

    def step(number: int) -> None:
        techniques.trained.at_step(model, optimizer, number, 0)
        if hasattr(optimizer, "estimate"):
            optimizer.estimate(lambda: loss().detach())
        if short or not hasattr(optimizer, "estimate"):
            loss(short or length).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def train_with_trl(asked: Mapping[str, Any], kind: str) -> dict[str, float]:
    """``SFTTrainer`` as it comes, on rows of its ``max_length``."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    watch = Watch(kind)

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.step_ended()

    how, loading = asked["how"], {}
    if how.get("nf4"):
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    arguments = {"max_length": asked["sequence"]} if "sequence" in asked else {}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=NUM_STEPS,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=kind == "cpu",
            model_init_kwargs=loading or None,
            **arguments,
            **how.get("arguments", {}),
        )
        length, rows = config.max_length, config.per_device_train_batch_size
        vocab = read_shape(Path(asked["base"])).vocab_size
        ids = torch.randint(2, vocab, (rows * NUM_STEPS, length)).tolist()
        words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
        SFTTrainer(
            model=asked["base"],
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
            ),
            peft_config=LoraConfig(task_type="CAUSAL_LM") if how.get("adapter") else None,
            callbacks=[Ends()],
        ).train()
    return {**watch.seen(rows * length), "micro_batch": rows, "sequence": length}


def make(asked: Mapping[str, Any], kind: str) -> dict[str, float]:
    """A base model with random weights, in bfloat16, left in a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(asked["make"])
    with torch.device(kind):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.bfloat16
        )
    model.save_pretrained(asked["base"])
    return {}


def predicted(memory: Mapping[str, Any], shape: ModelShape, start: MemorySetting) -> float:
    """Bytes at the peak of the steps that are run."""
    techniques = Techniques.of(MemoryPlan(**memory))
    setting = techniques.setting(start)
    if why := techniques.refuses_model(shape, start.device_kind):
        raise ValueError(why)
    of_step = techniques.trained.setting_at
    return max(
        account(shape, of_step(setting, shape, step, 0)).peak_memory_bytes
        for step in range(NUM_STEPS)
    )


def under(
    run: Apart,
    base: Path,
    name: str,
    memory: dict[str, Any],
    rows: int,
    length: int,
    device: Here,
) -> dict[str, Any]:
    """A plan, predicted and measured."""
    kind = device.kind
    found: dict[str, Any] = {"name": name, "memory": memory, "setting": f"{rows} x {length}"}
    start = MemorySetting(micro_batch=rows, sequence=length, masked=True, device_kind=kind)
    try:
        found["predicted"] = predicted(memory, read_shape(base), start)
    except ValueError as refusal:
        return {**found, "left_out": str(refusal).partition("\n")[0]}
    if found["predicted"] > allocatable(device.memory_bytes, kind) * 0.97:
        return {**found, "left_out": "does not fit"}
    asked = {"base": str(base), "memory": memory, "micro_batch": rows, "sequence": length}
    found |= run(asked, kind)
    if "allocated" in found:
        found["error"] = found["predicted"] / found["allocated"] - 1
    return found


def pick(run: Apart, base: Path, than: Mapping[str, Any], device: Here) -> dict[str, Any]:
    """What the planner chooses in the memory that another took, at its length, measured. The margin
    that it plans with is given to it beside, since the other had none."""
    allowed = device_memory(than["allocated"], device.kind).device * MEMORY_MARGIN
    asked = request(
        read_shape(base),
        replace(device.like, memory_bytes=device.memory_bytes),
        {"training.memory.trained": than["trained"], "training.max_length": than["sequence"]},
        budget=Budget(memory_bytes=allowed, seconds=3600.0),
    )
    try:
        chosen = planner.search(asked).chosen
    except ValueError as refusal:
        return {"left_out": str(refusal).partition("\n")[0]}
    memory = dict(vars(memory_plan_of(chosen.held.techniques)))
    rows = chosen.per_device_train_batch_size
    name = chosen.held.describe(str(rows))
    found = under(run, base, name, memory, rows, than["sequence"], device)
    if "allocated" in found:
        found["memory_ratio"] = found["allocated"] / than["allocated"]
        found["speed_ratio"] = found["tokens_per_second"] / than["tokens_per_second"]
    return found


Apart = Callable[[Mapping[str, Any], str], dict[str, Any]]
SOME = ("lora", "lora on nf4", "adamw_8bit", "lomo", "badam", "mezo", UNSLOTH)
"""Of the plans, for ``--tiny``."""


def show(out: Path, kind: str, seconds: float, *, tiny: bool = False) -> None:
    """Measures, prints, and on a GPU writes."""
    device, start = Here.found(kind), time.monotonic()
    config, length = (TINY, 32) if tiny else (CONFIGS["Llama-3-8B"], 2048)
    run = here if tiny else apart
    results: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        run({"make": config, "base": str(base)}, kind)
        for name, (trained, how) in PEERS.items():
            asked = {"peer": name, "how": how, "base": str(base)}
            if tiny:
                asked["sequence"] = length
            peers.append({"name": name, "trained": trained, **run(asked, kind)})
            print(peers[-1], file=sys.stderr, flush=True)
        for name, (rows, memory) in PLANS.items():
            if tiny and name not in SOME:
                continue
            if time.monotonic() - start > seconds:
                results.append({"name": name, "left_out": "out of time"})
                continue
            results.append(under(run, base, name, memory, rows, length, device))
            print(results[-1], file=sys.stderr, flush=True)
            if name == UNSLOTH and "allocated" in results[-1]:
                told = {"trained": memory["trained"], "micro_batch": rows, "sequence": length}
                peers.append({**results[-1], **told})
        for peer in peers:
            if "allocated" in peer:
                peer["pick"] = pick(run, base, peer, device)
                print(peer["pick"], file=sys.stderr, flush=True)
    show_plans(results, device)
    show_peers(peers)
    if kind == "cuda":
        import torch

        out.mkdir(parents=True, exist_ok=True)
        file = out / f"gpu_plans-{time.strftime('%Y-%m-%d')}.json"
        about = {"device": device.name, "memory_bytes": device.memory_bytes}
        about |= {"torch": torch.__version__, "plans": results, "peers": peers}
        file.write_text(json.dumps(about, indent=1))
        print(f"written to {file}")


def errors_of(results: list[dict[str, Any]]) -> str:
    errors = [abs(found["error"]) for found in results if "error" in found]
    if not errors:
        return "nothing was measured"
    within = sum(error <= 0.05 for error in errors)
    return (
        f"{len(errors)} measured: median {statistics.median(errors):.1%}, worst "
        f"{max(errors):.1%}, {within} within 5%"
    )


def show_plans(results: list[dict[str, Any]], device: Here) -> None:
    print(heading(f"Memory plans, random weights, {NUM_STEPS} steps"))
    print(device.name)
    headers = ("plan", "batch", "predicted", "allocated", "off", "tokens/s")
    rows = [
        (
            found["name"],
            found.get("setting", ""),
            format_bytes(found["predicted"]) if "predicted" in found else "",
            format_bytes(found["allocated"]) if "allocated" in found else found["left_out"],
            f"{found['error']:+.1%}" if "error" in found else "",
            f"{found['tokens_per_second']:,.0f}" if "allocated" in found else "",
        )
        for found in results
    ]
    print(display.table(headers, rows, right="llrrrr"))
    print(errors_of(results))


def show_peers(peers: list[dict[str, Any]]) -> None:
    headers: tuple[str, ...] = (
        "default",
        "batch",
        "allocated",
        "tokens/s",
        "the planner's pick in that memory",
    )
    headers += ("allocated", "tokens/s", "memory", "speed")
    lines = []
    for peer in peers:
        if "allocated" not in peer:
            lines.append((peer["name"], "", peer["left_out"], *[""] * 6))
            continue
        own = peer["pick"]
        lines.append(
            (
                peer["name"],
                f"{peer['micro_batch']} x {peer['sequence']}",
                format_bytes(peer["allocated"]),
                f"{peer['tokens_per_second']:,.0f}",
                own.get("name", ""),
                format_bytes(own["allocated"]) if "allocated" in own else own["left_out"],
                f"{own['tokens_per_second']:,.0f}" if "allocated" in own else "",
                f"{own['memory_ratio']:.2f}" if "allocated" in own else "",
                f"{own['speed_ratio']:.2f}" if "allocated" in own else "",
            )
        )
    print(display.table(headers, lines, right="llrrlrrrr"))


# -- processes ------------------------------------------------------------------------------------


def apart(asked: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """In a process of its own: what it measured, or why there is nothing."""
    arguments = [sys.executable, __file__, "--child", json.dumps(asked), "--device", kind]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        told = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"left_out": told[-1][:200] if told else f"exit status {done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def here(asked: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """In this process."""
    if "make" in asked:
        return make(asked, kind)
    return train_with_trl(asked, kind) if "peer" in asked else train(asked, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--seconds", type=float, default=540.0, help="start none after these")
    parser.add_argument("--child", type=json.loads, help="measure one, for this script itself")
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(here(options.child, options.device)))
        return
    import torch

    if not options.tiny and not torch.cuda.is_available():
        sys.exit("no GPU here: nothing was measured\nhint: --tiny checks the script itself")
    kind = "cpu" if options.tiny else "cuda"
    show(options.out, kind, options.seconds, tiny=options.tiny)


if __name__ == "__main__":
    main()
