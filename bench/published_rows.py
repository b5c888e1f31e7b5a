"""Rows of published tables: what their words mean, which are used, and how thrifty says them.

A row is used if it is a training step on one GPU and states all that decides its memory: model,
length, micro-batch, method, weights, optimizer, checkpointing, the unit and the quantity of its
number (``RULES``). Optimizers and storage are taken from the technique files as they are.

litgpt's rows ran another model than Hugging Face's. What of it a setting or a known term can say
is said: its GELU is one kernel, its adapters drop out 5% of their input (the mask is kept), and
bitsandbytes before 0.43.2 kept the input of every 4-bit linear. What it keeps otherwise is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import peers
from thrifty.core.resolve import method_class
from thrifty.costs.memory import MemorySetting
from thrifty.costs.operations import Adapter
from thrifty.costs.shape import ModelShape

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
    "8bit_adam": "adamw_8bit",
    "adam8bit": "adamw_8bit",
    "adamw_4bit": "adamw_4bit",
    "adamw4bit": "adamw_4bit",
    "adam-mini": "adam_mini",
    "adafactor": "adafactor",
    "adalomo": "adalomo",
    "galore": "galore",
    "galore_adamw": "galore",
    "apollo": "apollo",
    "lion": "lion",
    "lion8bit": "lion_8bit",
    "lomo": "lomo",
    "sgd": "sgd",
}
"""As tables name them, and the technique under ``thrifty/memory/states``."""

CHUNKED = "chunked?[ _]?(ce|cross|loss|nll)"

LENGTHS = (256, 1304)
"""Of a row that only leaves it open: a batch of Alpaca, and its longest row in Llama's tokens."""

QUANTITIES = ("reserved", "allocated", "active", "device")

CAPS = ("modelscope/ms-swift",)
"""Sources that give ``max_length`` for rows neither packed nor padded to it: an upper end. (PEFT's
comparison gives a cap too, but sorts 20,000 rows into batches and cuts them at it.)"""


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
        if self.implementation == "litgpt" and family["hidden_act"] == "gelu_new":
            family = family | {"hidden_act": "gelu"}  # one kernel there
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
        said = re.sub(r"fused|torchao|bnb|torch|paged|per-layer", "", self["optimizer"].lower())
        said = re.sub(r"[ _]+", "_", said).strip("_")
        return "" if said in ("unstated", "recipe_default", "-") else OPTIMIZERS.get(said, said)

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


UNSTATED_LENGTH = "the length is not stated"

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
    (UNSTATED_LENGTH, lambda row: row.number("seq_len") is None),
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
        # An eighth of the batch, as torchtune has it.
        loss_chunk=sequence * micro_batch // 8 if row.tells(CHUNKED) else 0,
        # Its training loop keeps the model's output while the loss goes backward.
        holds_logits=row["source"].startswith("huggingface/peft"),
        # AdamW as torch makes it, unless said: on CUDA over all tensors at once.
        fused="fused" in row["optimizer"],
        masked="padded" in row["notes"],
        device_kind="cuda",
    )
    if row.weights == "int8":
        setting = method_class("weights", "int8")().rewrite(setting)
    elif quantised:
        nf4 = method_class("weights", "nf4")(double=row.weights == "nf4-dq")
        setting = nf4.rewrite(setting)
    return setting if zeroth_order else _with_states(row, setting)


def _with_states(row: Row, setting: MemorySetting) -> MemorySetting:
    """With an optimizer's states, as its technique has them."""
    if row.optimizer not in OPTIMIZERS.values():
        raise NotYet(f"optimizer {row['optimizer']}")
    rank = re.search(r"\br(\d+)\b", row["method"])
    options = {"rank": int(rank[1])} if row.optimizer in ("galore", "apollo") and rank else {}
    technique = method_class("states", row.optimizer)(**options)
    if reason := technique.refuses(setting):
        raise NotYet(reason)
    setting = technique.rewrite(setting)
    states = setting.states
    if row.implementation != "hf" and states.wide_embedding:
        # Only Hugging Face's Trainer keeps an embedding's states wide.
        states = replace(states, wide_embedding=0.0)
    at_once = "per-layer" in row["optimizer"] or row.tells("opt(imizer)?[- ]in[- ](backward|bwd)")
    return replace(
        setting,
        states=states,
        # Paged states lie in managed memory, which torch does not count.
        states_offloaded="paged" in row["optimizer"].lower(),
        in_backward=setting.in_backward or at_once,
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
