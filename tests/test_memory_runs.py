"""Runs under memory techniques, through the same stages as any other: charged as priced, resumed
bit for bit, left as a folder that stock libraries load."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.runs import finish, interrupt_at, ledger, planned
from thrifty import stages
from thrifty.interruption import Interrupted
from thrifty.run_folder import RunFolder
from thrifty.signals.models import load_model

WAYS: dict[str, dict[str, Any]] = {
    "badam": {"trained": {"badam": {"switch_steps": 3}}},
    "hift": {"trained": "hift"},
    "lisa": {"trained": {"lisa": {"layers": 1, "switch_steps": 3}}},
    "mezo": {"trained": "mezo", "states": "sgd"},
    "addax": {"trained": {"addax": {"short": 64}}, "states": "lomo"},
    "lomo": {"states": "lomo"},
    "adalomo": {"states": "adalomo"},
    "galore": {"states": {"galore": {"rank": 4, "refresh": 3}}},
    "apollo": {"states": {"apollo": {"rank": 4, "refresh": 3}}},
    "adam_mini": {"states": "adam_mini"},
    "lion": {"states": "lion"},
    "adafactor": {"states": "adafactor"},
    "adamw_8bit": {"states": "adamw_8bit"},
    "adamw_bf16": {"weights": "bfloat16", "states": "adamw_bf16"},
    "dora": {"trained": {"dora": {"rank": 4}}},
    "pissa": {"trained": {"pissa": {"rank": 4}}},
    "lora_fa": {"trained": {"lora_fa": {"rank": 4}}},
    "ia3": {"trained": "ia3"},
    "adapters": {"trained": {"adapters": {"rank": 4}}},
    "adapters, fp8": {"trained": {"adapters": {"rank": 4}}, "weights": "fp8"},
    "selective, chunked": {"activations": "selective", "loss": {"chunked": {"tokens": 32}}},
    "fused": {"loss": {"fused": {"tokens": 32}}},
    "fp8": {"trained": {"lora": {"rank": 4}}, "weights": "fp8"},
}
QUICK = {"lomo", "fused"}
STEPS, CUT = 12, 7


def ways() -> list[Any]:
    return [
        pytest.param(WAYS[name], id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in WAYS
    ]


def made(folder: Any, model: Any, data: Any, memory: dict[str, Any]) -> Any:
    fixed = {f"training.memory.{kind}": technique for kind, technique in memory.items()}
    fixed |= {"training.max_steps": STEPS, "training.eval_steps": 4, "training.save_steps": 4}
    fixed |= {"selection.scorer": "uniform"}
    return planned(folder, model, data, fixed=fixed)


def logits(folder: Any, base: Any) -> torch.Tensor:
    from peft import PeftModel

    if (folder / "adapter_config.json").is_file():
        model: Any = PeftModel.from_pretrained(load_model(base, "float32", "cpu"), str(folder))
    else:
        model = load_model(folder, "float32", "cpu")
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None]).logits


@pytest.mark.parametrize("memory", ways())
@pytest.mark.long
def test_a_run_is_charged_as_priced_and_resumes_bit_for_bit(
    memory, tiny_model, tiny_data, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    plan = made(whole, tiny_model, tiny_data, memory)
    finish(whole)
    with stages.at_work(RunFolder(whole), str) as work:
        predicted = work.predicted(work.plan)
        step = predicted.step
        stages.test(work, work.main)
    spent = ledger(whole).spent(activity="train")
    turns = "trained" in memory and any(n in str(memory["trained"]) for n in ("badam", "hift"))
    # Of whole cycles the mean is what was priced; three turns of four are none.
    assert spent.flops == pytest.approx(STEPS * step.flops, rel=0.15 if turns else 1e-9)
    assert spent.tokens == STEPS * step.tokens
    tested = ledger(whole).spent(activity="test").flops
    assert tested == pytest.approx(predicted.test.flops, rel=0.01)
    assert ledger(whole).spent().flops <= plan.budget.flops
    made(cut, tiny_model, tiny_data, memory)
    with monkeypatch.context() as patched:
        interrupt_at(patched, CUT)
        with pytest.raises(Interrupted):
            finish(cut)
    finish(cut)
    found, expected = (logits(folder / "model", tiny_model) for folder in (cut, whole))
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(tiny_model, tiny_model))


def test_a_run_shorter_than_a_cycle_is_refused(tiny_model, tiny_data, tmp_path):
    with pytest.raises(ValueError, match="steps to come round once"):
        made(tmp_path, tiny_model, tiny_data, {"trained": {"badam": {"switch_steps": 100}}})


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"trained": {"lora": {"rank": 999}}}, "rank 999 is more than"),
        ({"trained": {"lora": {"targets": ["nowhere"]}}}, "no linear named nowhere"),
        ({"weights": "int8"}, "cannot be trained themselves"),
        ({"trained": "lora", "weights": "nf4"}, "nf4 holds rows in blocks of 64"),
        ({"trained": "lora", "states": "lomo"}, "an adapter's gradients are small"),
        ({"activations": "offload"}, "there is no other place"),
        ({"trained": "mezo", "activations": "recompute"}, "without a backward nothing is kept"),
        ({"trained": {"addax": {"short": 64}}, "states": "adamw"}, "is plain descent"),
        ({"trained": {"addax": {"short": 9999}}, "states": "lomo"}, "rows of 9999 tokens are sho"),
        ({"trained": {"addax": {"short": 1}}, "states": "lomo"}, "has at most 1 tokens"),
    ],
)
def test_what_cannot_be_says_so_when_planning(memory, message, tiny_model, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=message):
        made(tmp_path / "run", tiny_model, tiny_data, memory)
    assert not (tmp_path / "run").exists()


def test_methods_that_pace_the_rows_refuse_two_lengths(tiny_model, tiny_data, tmp_path):
    memory = {"trained": {"addax": {"short": 64}}, "states": "lomo"}
    fixed = {f"training.memory.{kind}": technique for kind, technique in memory.items()}
    fixed["training.online"] = "curriculum"
    with pytest.raises(ValueError, match="epochs of their own: use shuffled or ordered"):
        planned(tmp_path / "run", tiny_model, tiny_data, fixed=fixed)
