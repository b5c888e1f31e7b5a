"""Predicted against measured peaks on a GPU, up to a randomly initialised model of 8B parameters.

    python bench/gpu_memory.py [--part steps|plans] [--out bench/results]

One command; each of its parts takes under ten minutes. In ``steps`` every setting runs in a process
of its own: the model is made on the device from its config, two training steps are taken, and
``torch.cuda.max_memory_allocated`` and ``max_memory_reserved`` of the second are set beside
``costs.memory.account`` and ``costs.allocator``. Prints a table and writes it, with the device and
versions, to RESULTS/gpu_memory-DATE.json. Settings that do not fit the device are left out, and
said. ``plans`` is ``gpu_plans.py``: memory plans of an 8B model, and other libraries' defaults.

``--device cpu`` runs the smallest settings on a CPU, whose resident set takes the place of the
allocator's peak; ``--tiny`` the plans of a model of two layers: checks of the scripts, no
measurement of a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_plans
from material import heading
from thrifty import display
from thrifty.core import quantities
from thrifty.costs.allocator import allocatable, device_memory
from thrifty.costs.memory import Adapter, MemorySetting, account
from thrifty.costs.shape import ModelShape

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


def llama(hidden: int, inner: int, layers: int, heads: int, groups: int, **more: Any) -> dict:
    return LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "tiny": llama(256, 704, 4, 8, 4, vocab_size=8192),
    "llama 1B": llama(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "llama 3B": llama(3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "llama 8B": llama(4096, 14336, 32, 32, 8),
    "qwen3 0.6B": llama(
        1024, 3072, 28, 16, 8, model_type="qwen3", head_dim=128, vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "gemma3 1B": llama(
        1152, 6912, 26, 4, 1, model_type="gemma3_text", head_dim=256, vocab_size=262_144,
        sliding_window=512,
    ),
    "qwen3 moe": llama(
        2048, 6144, 8, 32, 4, model_type="qwen3_moe", head_dim=128, vocab_size=151_936,
        num_experts=64, num_experts_per_tok=8, moe_intermediate_size=768,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: str
    micro_batch: int
    sequence: int
    fields: dict[str, Any] = field(default_factory=dict)

    def setting(self, kind: str) -> MemorySetting:
        fields = {"dtype": "bfloat16", **self.fields}
        return MemorySetting(
            micro_batch=self.micro_batch, sequence=self.sequence, device_kind=kind, **fields
        )

    @property
    def technique(self) -> str:
        adapter = self.fields.get("adapter")
        words = ["full" if adapter is None else f"lora r{adapter.rank}"]
        words += [self.fields["adapter_dtype"]] if "adapter_dtype" in self.fields else []
        words += ["float32"] if self.fields.get("dtype") == "float32" else []
        words += ["recompute"] if self.fields.get("recompute") else []
        words += ["one document"] if self.fields.get("masked") is False else []
        words += ["unfused"] if self.fields.get("fused") is False else []
        return " ".join(words)


LORA = {"adapter": Adapter(rank=16)}
NARROW = {"adapter": Adapter(rank=16), "adapter_dtype": "bfloat16"}
AGAIN = {"recompute": 1}
ALONE = {"masked": False}
CASES = (
    Case("tiny", 4, 256),
    Case("tiny", 4, 256, LORA | AGAIN),
    Case("qwen3 0.6B", 4, 1024),
    Case("qwen3 0.6B", 4, 1024, AGAIN),
    Case("qwen3 0.6B", 4, 1024, LORA),
    Case("qwen3 0.6B", 2, 2048, {"dtype": "float32"}),
    Case("llama 1B", 2, 1024),
    Case("llama 1B", 2, 1024, ALONE),
    Case("llama 1B", 8, 1024, AGAIN),
    Case("llama 1B", 2, 1024, {"fused": False}),
    Case("llama 1B", 4, 1024, LORA),
    Case("llama 1B", 4, 1024, NARROW),
    Case("llama 1B", 2, 1024, {"dtype": "float32"}),
    Case("gemma3 1B", 2, 1024),
    Case("gemma3 1B", 2, 1024, LORA | AGAIN),
    Case("llama 3B", 1, 1024),
    Case("llama 3B", 4, 1024, LORA | AGAIN),
    Case("llama 3B", 2, 1024, LORA),
    Case("qwen3 moe", 1, 1024),
    Case("qwen3 moe", 2, 1024, LORA | AGAIN),
    Case("llama 8B", 1, 1024, LORA),
    Case("llama 8B", 4, 2048, LORA | AGAIN),
    Case("llama 8B", 1, 2048, NARROW | ALONE),
    Case("llama 8B", 1, 1024, AGAIN),
)


def measure(case: Case, kind: str) -> dict[str, float]:
    """Two real steps; bytes allocated and reserved at the peak of the second."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from thrifty.signals.peak_memory import memory_bytes, peak_memory_bytes, reset_peak

    setting, config = case.setting(kind), dict(MODELS[case.model])
    shape = ModelShape.from_config(config)
    dtype = getattr(torch, setting.dtype)
    with torch.device(kind):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config), dtype=dtype
        )
    model.config.use_cache = False
    if setting.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.adapter is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(r=setting.adapter.rank, target_modules=list(shape.lora_targets)),
            autocast_adapter_dtype=setting.adapter_dtype == "float32",
        )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=setting.fused)
    rows, length = setting.micro_batch, setting.sequence
    ids = torch.randint(0, shape.vocab_size, (rows, length), device=kind)
    positions = torch.arange(length, device=kind).repeat(rows, 1)
    if setting.masked:
        positions %= length // 2 + 1
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    level = memory_bytes("cpu") if kind == "cpu" else 0.0
    for _ in range(2):
        reset_peak(kind)
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if kind == "cpu":
        held = account(shape, setting).by_term
        rise = peak_memory_bytes("cpu") - level + held["weights"] + held["adapter"]
        return {"allocated": rise, "reserved": rise}
    return {
        "allocated": float(torch.cuda.max_memory_allocated()),
        "reserved": float(torch.cuda.max_memory_reserved()),
    }


def steps(out: Path, kind: str, seconds: float) -> None:
    """Prints and writes all cases."""
    import torch

    name = torch.cuda.get_device_name() if kind == "cuda" else platform.machine()
    memory = torch.cuda.get_device_properties(0).total_memory if kind == "cuda" else 2 * 2**30
    rows, results, start = [], [], time.monotonic()
    for number, case in enumerate(CASES):
        shape, setting = ModelShape.from_config(MODELS[case.model]), case.setting(kind)
        seen = account(shape, setting)
        found: dict[str, Any] = {
            "model": case.model,
            "parameters": shape.num_parameters,
            "setting": f"{case.micro_batch} x {case.sequence} {case.technique}",
            "predicted": seen.peak_memory_bytes,
            "phase": seen.peak_phase,
        }
        if seen.peak_memory_bytes > allocatable(memory, kind) * 0.97:
            found["left_out"] = "does not fit"
        elif time.monotonic() - start > seconds:
            found["left_out"] = "out of time"
        else:
            arguments = [sys.executable, __file__, "--case", str(number), "--device", kind]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            if done.returncode:
                found["left_out"] = done.stderr.strip().splitlines()[-1]
            else:
                found |= json.loads(done.stdout.splitlines()[-1])
                found["error"] = found["predicted"] / found["allocated"] - 1
                reserved = device_memory(found["predicted"], kind).reserved
                found["reserved_error"] = reserved / found["reserved"] - 1
        results.append(found)
        shown = quantities.format_bytes
        rows.append(
            (
                case.model,
                found["setting"],
                shown(found["predicted"]),
                shown(found["allocated"]) if "allocated" in found else found["left_out"],
                f"{found['error']:+.1%}" if "error" in found else "",
                shown(found["reserved"]) if "reserved" in found else "",
                f"{found['reserved_error']:+.1%}" if "error" in found else "",
            )
        )
        print(f"{number + 1} of {len(CASES)}: {rows[-1]}", file=sys.stderr, flush=True)
    print(heading("Peaks on a device"))
    print(name)
    headers = ("model", "setting", "predicted", "allocated", "off", "reserved", "off")
    print(display.table(headers, rows, right="llrrrrr"))
    errors = [abs(found["error"]) for found in results if "error" in found]
    if errors:
        within = sum(error <= 0.05 for error in errors)
        print(
            f"{len(errors)} measured: median {statistics.median(errors):.1%}, worst "
            f"{max(errors):.1%}, {within} within 5%"
        )
    if kind == "cuda":
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"gpu_memory-{time.strftime('%Y-%m-%d')}.json"
        about = {"device": name, "memory_bytes": memory, "torch": torch.__version__}
        file.write_text(json.dumps({**about, "results": results}, indent=1))
        print(f"written to {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--part", choices=("steps", "plans"), help="default: both")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="plans of a tiny model, on the CPU")
    parser.add_argument("--seconds", type=float, default=540.0, help="start none after these")
    parser.add_argument("--case", type=int, help="measure one, for this script itself")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(CASES[options.case], options.device)))
        return
    import torch

    if options.tiny:
        gpu_plans.show(options.out, "cpu", options.seconds, tiny=True)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "no GPU here: nothing was measured\n"
            "hint: --device cpu and --tiny check the script itself"
        )
    if options.part != "plans":
        steps(options.out, options.device, options.seconds)
    if options.part != "steps" and options.device == "cuda":
        gpu_plans.show(options.out, options.device, options.seconds)


if __name__ == "__main__":
    main()
