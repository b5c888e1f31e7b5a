"""Published peaks of memory against what is predicted for them, by thrifty and by its peers.

    python bench/published_memory.py [--tables FILE.csv ...] [--ftuneai PYTHON] [--deepspeed PYTHON]

The tables are not part of the project. A row is used if it is a training step on one GPU, run on
Hugging Face's models, and states all that decides its memory: model, length, micro-batch, method,
weights, optimizer, checkpointing, the unit and the quantity of its number. Every other row is
listed first with the first rule that it breaks; rows of other implementations that state as much
stand in a table of their own, since they keep other tensors than Hugging Face's do. A row whose
setting thrifty has no word for yet is shown with what is missing, and counts for its peers.

Each number is compared with its own quantity: `allocated`, what tensors hold, and `active`, which
adds the padding of blocks, with thrifty's account; `reserved` with what `costs/allocator.py` makes
of it, its share calibrated on the other reserved rows of the same kind of implementation, never on
the row itself; `device` with the CUDA context as well.

litgpt's rows ran another model than Hugging Face's. What of it a setting or a known term can say
is said: its GELU is one kernel, its adapters drop out 5% of their input (the mask is kept), and
bitsandbytes before 0.43.2 kept the input of every 4-bit linear. What it keeps otherwise is not.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import peers
from material import heading
from thrifty import display
from thrifty.core.resolve import method_class
from thrifty.costs.allocator import RESERVED_SHARE
from thrifty.costs.memory import RUNTIME_BYTES, MemorySetting, account
from thrifty.costs.operations import Adapter
from thrifty.costs.shape import ModelShape

TABLES = Path(__file__).parents[2] / "shared" / "research" / "memory_tables.csv"

IMPLEMENTATIONS = {
    "huggingface/peft": "hf",
    "modelscope/ms-swift": "hf",
    "Ledzy/BAdam": "hf",
    "princeton-nlp/MeZO": "hf",
    "huggingface/trl": "hf",
    "huggingface/transformers": "hf",
    "litgpt": "litgpt",
    "torchtune": "torchtune",
    "torchao/optim": "torchtune",
    "torchtitan": "torchtitan",
    # Their training script has a copy of modeling_llama.py of its own, and uses it by default.
    "jiaweizzhao/GaLore": "own copy",
    "VITA-Group/Q-GaLore": "own copy",
    "zhuhanqing/APOLLO": "own copy",
}
"""Whose model code a source ran. Where a table has both, the method says so: see ``Row``."""

FAMILIES: dict[str, dict[str, Any]] = {
    r"(Llama|LLaMA|CodeLlama|TinyLlama|SmolLM2?)-": dict(model_type="llama", hidden_act="silu"),
    r"Mistral-7B": dict(model_type="mistral", hidden_act="silu", sliding_window=None),
    r"Qwen(2|2\.5)-": dict(model_type="qwen2", hidden_act="silu"),
    r"Qwen3-": dict(model_type="qwen3", hidden_act="silu", head_dim=128),
    r"phi-(1\.5|2)": dict(model_type="phi", hidden_act="gelu_new", partial_rotary_factor=0.5),
    r"(StableLM-base-alpha|Pythia)": dict(model_type="gpt_neox", hidden_act="gelu"),
}
"""What a config.json says beyond the columns of a table, by the start of the model's name."""

TIED = re.compile(r"Llama-3\.2-|SmolLM|Qwen(2|2\.5|3)-(0\.5|0\.6|1\.5|1\.7|3|4)B")
"""Models whose head is their embedding."""

OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit",
    "adam8bit": "adamw_8bit",
    "adamw_4bit": "adamw_4bit",
    "adamw4bit": "adamw_4bit",
    "adam-mini": "adam_mini",
    "adafactor": "adafactor",
    "adalomo": "adalomo",
    "galore": "galore",
    "galore adamw": "galore",
    "apollo": "apollo",
    "lion": "lion",
    "lion8bit": "lion_8bit",
    "lomo": "lomo",
    "sgd": "sgd",
}
"""As tables name them, and the technique under ``thrifty/memory/states``."""

LENGTHS = (256, 1304)
"""Of a row that only leaves it open: a batch of Alpaca, and its longest row in Llama's tokens."""

QUANTITIES = ("reserved", "allocated", "active", "device")

CAPS = ("modelscope/ms-swift",)
"""Sources that give ``max_length`` for rows neither packed nor padded to it: an upper end. (PEFT's
comparison gives a cap too, but sorts 20,000 rows into batches and cuts them at it.)"""


Estimator = Callable[[peers.Job], float | None]


class NotYet(Exception):
    """thrifty has no word for it."""


@dataclass(frozen=True)
class Row:
    """A line of a table, and what its words mean."""

    line: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column].strip()

    @cached_property
    def implementation(self) -> str:
        method = self["method"].lower()
        if "unsloth" in method or "liger" in method:
            return "own kernels"
        if re.search(r"\bhf\b", method):
            return "hf"
        found = (
            name for start, name in IMPLEMENTATIONS.items() if self["source"].startswith(start)
        )
        return next(found, "")

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The model's config.json, None if the row does not say enough."""
        family = next((f for start, f in FAMILIES.items() if re.match(start, self["model"])), None)
        columns = ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab")
        sizes = [self.number(column) for column in columns]
        if family is None or None in sizes:
            return None
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "vocab_size",
        )
        return {
            **family,
            **dict(zip(names, sizes, strict=True)),
            "max_position_embeddings": max(8192, self.number("seq_len") or 0),
            "tie_word_embeddings": bool(TIED.match(self["model"])),
            "torch_dtype": "bfloat16",
        }

    @cached_property
    def shape(self) -> ModelShape:
        assert self.config is not None
        return ModelShape.from_config(self.config)

    @property
    def adds_up(self) -> bool:
        return abs(self.shape.num_parameters / 1e9 / float(self["params_b"]) - 1) <= 0.01

    def number(self, column: str) -> int | None:
        text = self[column]
        return int(float(text)) if re.fullmatch(r"\d+(\.0)?", text) else None

    @cached_property
    def bytes(self) -> float | None:
        unit = self["what_it_counts"].split(";")[0]
        factor = 2**30 if unit.startswith("GiB") else 1e9 if unit == "GB(1e9)" else None
        return float(self["peak_gb"]) * factor if factor else None

    @cached_property
    def quantity(self) -> str:
        said = self["what_it_counts"].lower()
        return next((name for name in QUANTITIES if name in said), "")

    @cached_property
    def weights(self) -> str:
        """As ``peers.Job`` names them; empty if unknown."""
        said = self["weights_dtype"]
        known = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        return known.get(said, said if said in ("int8", "nf4", "nf4-dq") else "")

    @cached_property
    def optimizer(self) -> str:
        """adamw, adamw_8bit, ...; empty if unstated."""
        said = re.sub(r"\b(fused|bnb|torchao|paged|per-layer)\b", "", self["optimizer"].lower())
        said = re.sub(r"^paged_?", "", said.strip()).strip()
        return "" if said in ("unstated", "recipe default", "-") else OPTIMIZERS.get(said, said)

    @cached_property
    def recompute(self) -> int | None:
        """Every how many layers; None if unstated or of another kind."""
        said = self["activation_ckpt"].lower()
        if every := re.search(r"every (\d+)", said):
            return int(every[1])
        return {"no": 0, "full": 1}.get(said, 1 if said.startswith("yes") else None)

    def tells(self, pattern: str) -> bool:
        """Whether its method or its notes say so."""
        return bool(re.search(pattern, f"{self['method']}; {self['notes']}", re.IGNORECASE))

    @cached_property
    def adapter(self) -> tuple[int, tuple[str, ...]] | None:
        """Rank and targets of plain LoRA; rank 0: full fine-tuning; None: another method."""
        method, notes = self["method"].lower(), self["notes"]
        if re.match(r"full[ -]?(ft|finetuning|fine-tuning)", method):
            return 0, ()
        # Any other ending names a variant that keeps other tensors: rank32-dora, -bdlora, ...
        in_peft = re.fullmatch(r"lora/[^/]*-rank(\d+)(-target-mlp|-rslora|-lorafa)?", method)
        in_words = re.match(r"q?lora r(\d+)( (on )?(q,v|all[ -]linear))?( hf| bnb|$)", method)
        rank = in_peft or in_words
        targets = re.search(r"targets=\[([^]]*)\]", notes)
        if targets:
            named = tuple(sorted(re.findall(r"\w+", targets[1])))
        elif in_words and in_words[4] == "q,v":
            named = ("q_proj", "v_proj")
        else:
            named = peers.LINEARS
        return (int(rank[1]), named) if rank else None

    @cached_property
    def title(self) -> str:
        method = self["method"].removeprefix("lora/").replace("llama-3.2-3B-", "")
        length = f"{self['micro_batch'].removesuffix('.0')} x {self['seq_len']}"
        return f"{self['model']} {method} {self['weights_dtype']} {length}"


RULES: tuple[tuple[str, Callable[[Row], Any]], ...] = (
    ("an estimate of its authors", lambda row: "ESTIMATE" in row["what_it_counts"]),
    ("the largest that fits, not a peak", lambda row: "capacity" in row["what_it_counts"]),
    ("read off a chart", lambda row: "chart" in row["what_it_counts"]),
    ("one operation, not a model", lambda row: row["layers"] == "0.0"),
    ("no training", lambda row: "inference" in row["method"]),
    ("several GPUs, or not said", lambda row: not re.match(r"1( GPU|x )", row["gpus"])),
    ("whose model code ran is not known", lambda row: not row.implementation),
    ("the model is not stated fully, or not known here", lambda row: row.config is None),
    ("its sizes do not make its parameters", lambda row: not row.adds_up),
    ("the length is not stated", lambda row: row.number("seq_len") is None),
    ("the length is a cap on unpadded rows", lambda row: row["source"].startswith(CAPS)),
    ("the micro-batch is not stated", lambda row: row.number("micro_batch") is None),
    ("the weights' dtype is not stated", lambda row: not row.weights),
    ("the optimizer is not stated", lambda row: not row.optimizer),
    ("checkpointing is not stated", lambda row: row.recompute is None),
    ("GB of 1e9 or 2^30 bytes: not said", lambda row: row.bytes is None),
    ("which quantity is not stated", lambda row: not row.quantity),
)
"""Why a row is left out: the first that holds."""


def setting_of(row: Row) -> MemorySetting:
    """How thrifty says what a row ran."""
    zeroth_order = row["method"].lower().startswith("mezo")
    if row.adapter is None and not zeroth_order:
        raise NotYet(f"method {row['method']}")
    rank, targets = row.adapter or (0, ())
    if rank and not set(targets) <= set(row.shape.lora_targets):
        # litgpt adapts q and v inside its one matrix of all three, which GPT-NeoX has as well.
        targets = ("query_key_value",)
    sequence, micro_batch = row.number("seq_len"), row.number("micro_batch")
    assert sequence is not None
    assert micro_batch is not None
    assert row.recompute is not None
    quantised = row.weights in ("int8", "nf4", "nf4-dq")
    dtype = "bfloat16" if quantised else row.weights
    setting = MemorySetting(
        micro_batch=micro_batch,
        sequence=sequence,
        dtype=dtype,
        adapter=Adapter(rank=rank, targets=targets) if rank else None,
        # PEFT keeps adapters in float32; the others' follow the weights.
        adapter_dtype="float32" if row.implementation == "hf" else dtype,
        zeroth_order=zeroth_order,
        recompute=row.recompute,
        offload=row.tells("activation offload"),
        loss_chunk=1024 if row.tells("chunked? ?(ce|cross|loss|nll)") else 0,
        # Its training loop keeps the model's output while the loss goes backward.
        holds_logits=row["source"].startswith("huggingface/peft"),
        # AdamW as torch makes it, unless said: on CUDA over all tensors at once.
        fused="fused" in row["optimizer"],
        masked="padded" in row["notes"],
        device_kind="cuda",
    )
    if quantised:
        kind, options = ("int8", {}) if row.weights == "int8" else ("nf4", {"double": "dq" in row.weights})
        setting = method_class("weights", kind)(**options).rewrite(setting)
    if zeroth_order or row.optimizer == "adamw":
        return replace(setting, states_offloaded="paged" in row["optimizer"].lower())
    return _with_states(row, setting)


def _with_states(row: Row, setting: MemorySetting) -> MemorySetting:
    """With an optimizer's states, as its technique has them."""
    if row.optimizer not in OPTIMIZERS.values():
        raise NotYet(f"optimizer {row.optimizer}")
    rank = re.search(r"\br(\d+)\b", row["method"])
    options = {"rank": int(rank[1])} if row.optimizer in ("galore", "apollo") and rank else {}
    technique = method_class("states", row.optimizer)(**options)
    if reason := technique.refuses(setting):
        raise NotYet(reason)
    setting = technique.rewrite(setting)
    states = setting.states
    if row.implementation != "hf":  # only its Trainer keeps an embedding's states wide
        states = replace(states, wide_embedding=0.0)
    return replace(
        setting,
        states=states,
        states_offloaded="paged" in row["optimizer"].lower(),
        in_backward=setting.in_backward
        or "per-layer" in row["optimizer"]
        or row.tells("opt(imizer)?[- ]in[- ](backward|bwd)"),
    )


def beside(row: Row) -> float:
    """Bytes that a row's version kept for the backward and no setting speaks of."""
    if row.implementation != "litgpt" or not row.adapter:
        return 0.0
    hidden, inner = row.config["hidden_size"], row.config["intermediate_size"]
    a_token = float(hidden)  # the mask of the adapters' dropout
    if row["weights_dtype"].startswith("nf4") and "bnb 0.41" in row["notes"]:
        inputs = 2 if row.shape.model_type == "phi" else 3  # of attention and MLP the same
        a_token += 2.0 * (inputs * hidden + inner)
    return a_token * row.shape.num_layers * setting_of(row).tokens


def allocated_bytes(row: Row) -> float:
    return account(row.shape, setting_of(row)).peak_memory_bytes + beside(row)


def reserved_shares(rows: Iterable[Row]) -> dict[int, float]:
    """By line, of rows that give what was reserved: how much that is over what tensors take."""
    found = {}
    for row in rows:
        if row.quantity == "reserved":
            with contextlib.suppress(NotYet):
                assert row.bytes
                found[row.line] = row.bytes / allocated_bytes(row) - 1.0
    return found


def thrifty_bytes(row: Row, shares: dict[int, float]) -> float:
    """Of the row's own quantity; of reserved bytes the share is the other rows'."""
    allocated = allocated_bytes(row)
    if row.quantity not in ("reserved", "device"):
        return allocated
    others = [share for line, share in shares.items() if line != row.line]
    share = statistics.mean(others) if others else RESERVED_SHARE["cuda"][0]
    return allocated * (1.0 + share) + RUNTIME_BYTES["cuda"] * (row.quantity == "device")


def calibration(rows: Sequence[Row], shares: dict[int, float]) -> str:
    """What the reserved rows say about the allocator."""
    mean, stderr = RESERVED_SHARE["cuda"]
    told = f"costs/allocator.py takes {mean:.1%} with a standard error of {stderr:.1%}"
    if not shares:
        return f"no row gives reserved bytes; {told}"
    listed = ", ".join(f"{row.title} {shares[row.line]:+.2%}" for row in rows if row.line in shares)
    spread = ""
    if len(shares) > 1:
        error = statistics.stdev(shares.values()) * (1 + 1 / len(shares)) ** 0.5
        spread = f", of one more such row ±{error:.1%}"
    return (
        f"Reserved over allocated, {len(shares)} rows: {listed};\n"
        f"mean {statistics.mean(shares.values()):+.2%}{spread}; {told}"
    )


def job_of(row: Row) -> peers.Job | None:
    """How a user of another estimator says it; None for a method that none of them knows."""
    if row.adapter is None:
        return None
    rank, targets = row.adapter
    sequence, micro_batch = row.number("seq_len"), row.number("micro_batch")
    assert sequence is not None
    assert micro_batch is not None
    assert row.config is not None
    return peers.Job(
        name=row["model"],
        config=row.config,
        num_parameters=row.shape.num_parameters,
        sequence=sequence,
        micro_batch=micro_batch,
        weights=row.weights,
        optimizer=row.optimizer,
        recompute=bool(row.recompute),
        rank=rank,
        targets=targets or peers.LINEARS,
    )


def reason_out(row: Row) -> str:
    return next((reason for reason, holds in RULES if holds(row)), "")


def exclusions(rows: Sequence[Row]) -> str:
    """Every row left out, by reason and source."""
    found = Counter((reason_out(row), row["source"]) for row in rows if reason_out(row))
    order = {reason: number for number, (reason, _) in enumerate(RULES)}
    lines = [
        (reason, str(count), source)
        for (reason, source), count in sorted(found.items(), key=lambda item: order[item[0][0]])
    ]
    head = f"{sum(found.values())} of {len(rows)} rows are left out"
    return f"{head}\n{display.table(('reason', 'rows', 'source'), lines, right='lr')}"


Errors = dict[str, dict[int, float]]
"""By estimator and line of the table."""


def compared(rows: Iterable[Row], estimators: dict[str, Estimator]) -> Errors:
    """Prints a line a row; returns each estimator's errors."""
    errors: Errors = {name: {} for name in ("thrifty", *estimators)}
    lines = []
    for row in rows:
        assert row.bytes
        found, remark = {}, ""
        try:
            found["thrifty"] = thrifty_bytes(row)
        except NotYet as missing:
            remark = f"not yet expressible: {missing}"
        if (job := job_of(row)) is not None:
            answers = {name: estimator(job) for name, estimator in estimators.items()}
            found |= {name: answer for name, answer in answers.items() if answer is not None}
        for name, answer in found.items():
            errors[name][row.line] = answer / row.bytes - 1
        sizes = (row.bytes, found.get("thrifty"))
        lines.append(
            (
                row.title,
                row.quantity,
                *(f"{size / 2**30:.2f}" if size else "-" for size in sizes),
                *(
                    f"{mine[row.line]:+.1%}" if row.line in mine else "-"
                    for mine in errors.values()
                ),
                remark,
            )
        )
    headers = ("row", "quantity", "measured", "predicted", *errors, "")
    print(display.table(headers, lines, right="ll" + "r" * (2 + len(errors))))
    return errors


def summary(errors: Errors, absent: set[str]) -> str:
    """Each over the rows that it answers, beside thrifty over those of them that it answers too."""
    lines = []
    for name, found in errors.items():
        if not found:
            lines.append((name, "0", "not installed" if name in absent else "-", "-", "-", "-"))
            continue
        sizes = [abs(error) for error in found.values()]
        shared = [abs(error) for line, error in errors["thrifty"].items() if line in found]
        lines.append(
            (
                name,
                str(len(found)),
                f"{statistics.median(sizes):.1%}",
                f"{sum(size <= 0.1 for size in sizes) / len(sizes):.0%}",
                f"{max(found.values(), key=abs):+.0%}",
                f"{statistics.median(shared):.1%} of {len(shared)}" if shared else "-",
            )
        )
    headers = ("estimator", "rows", "median |error|", "within 10%", "worst", "thrifty there")
    return display.table(headers, lines, right="lrrrrr")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", type=Path, nargs="+", default=[TABLES])
    parser.add_argument("--ftuneai", default="", help="a Python that has the package ftuneai")
    parser.add_argument("--deepspeed", default="", help="a Python that has deepspeed")
    options = parser.parse_args()
    missing = [str(path) for path in options.tables if not path.exists()]
    if missing:
        print(f"error: no table of published rows at {', '.join(missing)}", file=sys.stderr)
        print("hint: name the files with --tables; the project holds no copy", file=sys.stderr)
        return 4
    cells: list[dict[str, str]] = []
    for path in options.tables:
        with path.open(encoding="utf-8", newline="") as lines:
            cells += csv.DictReader(lines)
    rows = [Row(line, each) for line, each in enumerate(cells)]
    estimators: dict[str, Estimator] = {
        "accelerate": peers.accelerate,
        "unsloth": peers.unsloth,
        "llamafactory": peers.llamafactory,
        "deepspeed": lambda job: peers.deepspeed(job, options.deepspeed),
        "eleutherai": peers.eleutherai,
        "ftuneai": lambda job: peers.ftuneai(job, options.ftuneai) if options.ftuneai else None,
    }
    uninstalled = set() if options.ftuneai else {"ftuneai"}
    print(heading("Published peaks of training on one GPU, GiB"))
    print(f"\n{exclusions(rows)}")
    kept = [row for row in rows if not reason_out(row)]
    both: Errors = {}
    for title, here in (
        ("Hugging Face implementations", [row for row in kept if row.implementation == "hf"]),
        ("Other implementations", [row for row in kept if row.implementation != "hf"]),
    ):
        print(f"\n{title}: {len(here)} rows")
        errors = compared(here, estimators)
        print(f"\n{summary(errors, uninstalled)}")
        both = {name: both.get(name, {}) | found for name, found in errors.items()}
    print(f"\nBoth tables\n{summary(both, uninstalled)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
