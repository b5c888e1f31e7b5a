"""What other estimators say a training step needs, each called as its users would call it.

A ``Job`` is what such a user knows: the model's config.json and the way to train it. Each function
returns bytes at the peak on one GPU, or None where the tool has no answer (most know no adapters).
Options are set in the tool's favour where it has them. Installed packages are called; a published
formula is restated from its description, in the symbols it uses:

    accelerate      ``accelerate estimate-memory``, column "Training using Adam"; of its dtypes,
                    float16 stands for bfloat16. No adapters, optimizers, batch or length.
    unsloth         Unsloth Studio, studio/backend/utils/hardware/VRAM_ESTIMATION.md
                    (github.com/unslothai/unsloth, 04f95609), sections 1-7.
    llamafactory    The table "Hardware Requirement" of LLaMA-Factory's README (00409ff2), which it
                    marks as estimated; the column of the model's size, or its rule for x billions.
    deepspeed       ``estimate_zero3_model_states_mem_needs``, one GPU, no offload: 18 bytes a
                    parameter and 4 of the largest layer. Its users add activations themselves.
    ftuneai         The PyPI package, through its ``Estimator``. Of LoRA targets it knows q and v,
                    the attention's and all, by which it counts parameters.
    eleutherai      calc/calc_transformer_mem.py (github.com/EleutherAI/cookbook, 069ae2ef), with
                    its options for gated MLPs, grouped keys and 2-byte gradients. No adapters.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

GIB = 2**30
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


LLAMAFACTORY = {
    "mixed": (120, 240, 600, 1200, 18.0),
    "full": (60, 120, 300, 600, 8.0),
    "lora": (16, 32, 64, 160, 2.0),
    "int8": (10, 20, 40, 80, 1.0),
    "nf4": (6, 12, 24, 48, 0.5),
}
"""Gigabytes for 7, 14, 30 and 70 billion parameters, and for each billion of another size."""


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str
    config: dict[str, Any]
    num_parameters: int
    sequence: int
    micro_batch: int
    weights: str
    """bfloat16, float16, float32, int8, nf4, or nf4-dq (double quantisation)."""
    optimizer: str
    """adamw, adamw_8bit, adafactor or sgd."""
    recompute: bool
    rank: int = 0
    """Of LoRA; 0: full fine-tuning."""
    targets: tuple[str, ...] = LINEARS

    @property
    def quantised(self) -> bool:
        return self.weights in ("int8", "nf4", "nf4-dq")

    @property
    def key_value_heads(self) -> int:
        return self.config.get("num_key_value_heads") or self.config["num_attention_heads"]

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest module: an embedding or a linear of the MLP."""
        widest = max(self.config["vocab_size"], self.config["intermediate_size"])
        return widest * self.config["hidden_size"]


def accelerate(job: Job) -> float | None:
    """The command's own code on a folder with the config; only the Hub is not asked about it."""
    if job.rank:
        return None
    from accelerate.commands import estimate

    dtype = "float32" if job.weights == "float32" else "float16"
    known = SimpleNamespace(library_name="transformers", config={})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(job.config), encoding="utf-8")
        asked = SimpleNamespace(
            model_name=folder, library_name=None, trust_remote_code=False, dtypes=[dtype]
        )
        with (
            mock.patch.object(estimate, "verify_on_hub", return_value=known),
            contextlib.redirect_stdout(sys.stderr),
        ):
            ((_, _, _, training),) = estimate.gather_data(asked)
    return max(training.values())


def unsloth(job: Job) -> float | None:
    config, tokens = job.config, job.sequence * job.micro_batch
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * job.key_value_heads
    quantisable = layers * (2 * hidden * (hidden + keys) + 3 * hidden * inner)
    heads = 1 if config.get("tie_word_embeddings") else 2
    others = 2 * hidden * layers + heads * vocabulary * hidden
    shrunk = {"nf4": 3.2, "nf4-dq": 3.6, "int8": 2.0}.get(job.weights, 1.0)
    weights = 2 * (quantisable / shrunk + others)

    sizes = {
        "q_proj": 2 * hidden,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": 2 * hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": hidden + inner,
    }
    adapter = layers * job.rank * sum(sizes[name] for name in job.targets)
    trained = adapter or quantisable + others
    states = trained * {"adamw": 6, "adamw_8bit": 4, "sgd": 4}.get(job.optimizer, 6)

    layer = tokens * (hidden + 2 * keys + 2 + 2 * inner) * 2 * 1.25
    kept = (1.0 if job.rank else 2.0) if job.recompute else layers
    activations = kept * layer

    floor = 0.15 * weights
    if job.rank:
        floor = min(floor, max(activations, states))
    gradients = max(2 * trained, floor)
    return weights + 2 * adapter + states + gradients + activations + 1.4 * GIB


def llamafactory(job: Job) -> float | None:
    method = job.weights.removesuffix("-dq") if job.quantised else "lora" if job.rank else "full"
    if method == "full" and job.weights == "float32":
        method = "mixed"
    billions = job.num_parameters / 1e9
    *columns, rule = LLAMAFACTORY[method]
    for size, gigabytes in zip((7, 14, 30, 70), columns, strict=True):
        # "7B" is what people call 6.7 to 7.6 billion.
        if abs(billions / size - 1) <= 0.1:
            return gigabytes * 1e9
    return rule * billions * 1e9


def deepspeed(job: Job, python: str = "") -> float | None:
    """``python``: one that has the package; without it the formula of 0.19.8, which is the same."""
    if job.rank:
        return None
    if not python:
        return 18.0 * job.num_parameters + 4.0 * job.largest_layer
    return elsewhere(
        python,
        """
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as needs
        host, device, layer = needs(job["num_parameters"], job["largest_layer"],
                                    cpu_offload=False, cpu_offload_params=False)
        print(device)
        """,
        job,
    )


def eleutherai(job: Job) -> float | None:
    if job.rank:
        return None
    config, tokens = job.config, job.sequence * job.micro_batch
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    gated = config.get("hidden_act") == "silu"
    attention = 2 * (1 + job.key_value_heads / heads) * hidden**2
    mlp = (3 if gated else 2) * hidden * inner
    parameters = (
        2 * config["vocab_size"] * hidden
        + hidden * job.sequence
        + 2 * hidden
        + layers * (8 * hidden + attention + mlp)
    )
    # 16 values of 2 bytes and a mask of 1 twice; without checkpoints the attention maps too.
    a_value = 34.0 if job.recompute else 34.0 + 5.0 * heads * job.sequence / hidden
    return (2 + 2 + 12) * parameters + tokens * hidden * layers * a_value


def ftuneai(job: Job, python: str) -> float | None:
    """``python``: one that has the package."""
    if job.optimizer not in ("adamw", "adamw_8bit", "adafactor", "sgd"):
        return None
    return elsewhere(
        python,
        """
        import ftuneai.hub
        from ftuneai import Estimator
        from ftuneai.loader import list_model_names
        # A model that its own list lacks is looked up on the Hub: this is the Hub's answer.
        ftuneai.hub.fetch_model_config = lambda name: job["config"]
        ending = "/" + job["name"].lower()
        listed = [name for name in list_model_names() if name.lower().endswith(ending)]
        targets = set(job["targets"])
        if targets == {"q_proj", "v_proj"}:
            adapted = "attention"
        elif targets <= {"q_proj", "k_proj", "v_proj", "o_proj"}:
            adapted = "attention_all"
        else:
            adapted = "all_linear"
        bits = {"int8": "8bit", "nf4": "4bit", "nf4-dq": "4bit"}.get(job["weights"], "none")
        asked = Estimator(
            model=(listed or ["published" + ending])[0],
            method="full" if not job["rank"] else "qlora" if job["quantised"] else "lora",
            quantization=bits,
            batch_size=job["micro_batch"],
            seq_length=job["sequence"],
            gradient_checkpointing=job["recompute"],
            optimizer={"adamw_8bit": "adam_8bit"}.get(job["optimizer"], job["optimizer"]),
            lora_rank=job["rank"],
            lora_target=adapted,
            flash_attention=True,
        )
        print(asked.estimate_memory().total_gb * 2**30)
        """,
        job,
    )


def elsewhere(python: str, program: str, job: Job) -> float:
    """The number that ``program`` prints under another Python; it finds the job in ``job``."""
    asked = asdict(job) | {"quantised": job.quantised, "largest_layer": job.largest_layer}
    text = "import json, sys\njob = json.loads(sys.argv[1])\n" + textwrap.dedent(program)
    command = [python, "-c", text, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
