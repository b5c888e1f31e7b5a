"""``training.switch`` in plan.yaml: what may be said there, and what stands against it."""

import pytest
import yaml

from thrifty.core import plan as plans
from thrifty.core.plan_switch import Switch, asks_others, others_trained, trained_as

LORA = {"lora": {"rank": 4}}


def read(switch, **changes):
    values = {
        "model": {"path": "m"},
        "pool": {"sources": ["rows.jsonl"]},
        "budget": {"flops": 1e9},
        "training": {"switch": switch, "memory": {"trained": LORA}},
    }
    for key, value in changes.items():
        plans.put(values, key.replace("__", "."), value)
    return plans.from_dict(values)


def test_a_word_alone_says_when():
    assert read("governed").training.switch == Switch(when="governed")
    assert read("never").training.switch == Switch()
    assert read({"when": "governed", "trained": ["badam"]}).training.switch.trained == ("badam",)


def test_it_survives_its_file():
    plan = read({"when": "governed", "trained": [{"badam": {"switch_steps": 7}}, LORA]})
    assert plans.from_dict(yaml.safe_load(plans.dump(plan))) == plan


def test_what_is_trained_already_is_no_other():
    plan = read({"when": "governed", "trained": ["badam", "lora"]})
    assert others_trained(plan.training) == ["badam"]


def test_what_is_trained_brings_its_learning_rate():
    training = read({"when": "governed", "trained": ["badam"]}).training
    other = trained_as(training, "badam")
    assert other.memory.trained == "badam"
    assert other.learning_rate == pytest.approx(training.learning_rate / 10)
    assert trained_as(training, LORA) is training


@pytest.mark.parametrize(
    ("fixed", "asked"),
    [
        ({}, False),
        ({"training.switch": "governed"}, False),
        ({"training.switch": {"when": "governed", "trained": ["badam"]}}, True),
        ({"training.switch.trained": ["badam"]}, True),
    ],
)
def test_whether_a_user_asks_for_it(fixed, asked):
    assert asks_others(fixed) is asked


BADAM = {"when": "governed", "trained": ["badam"]}


@pytest.mark.parametrize(
    ("switch", "changes", "message"),
    [
        ("sometimes", {}, r"training\.switch: when must be one of never, governed"),
        (3, {}, r"training\.switch: it must be a mapping, not 3"),
        ({"wen": "governed"}, {}, "unknown key wen: did you mean when"),
        ({"when": "governed", "trained": "badam"}, {}, r"trained must be a list.*write \[badam\]"),
        ({"when": "governed", "trained": ["badan"]}, {}, "did you mean badam"),
        ({"when": "governed", "trained": [{"badam": {"turn": 3}}]}, {}, "unknown key .*turn"),
        ({"trained": ["badam"]}, {}, r"what else may be trained: when: governed"),
        ({"when": "governed", "trained": ["badam", "badam"]}, {}, "one is named twice"),
        ({"when": "governed", "trained": ["lora"]}, {}, "nothing but lora, which is trained"),
        (
            {"when": "governed", "trained": ["badam", {"lora": {"rank": 8}}]},
            {},
            "lora is what the run begins with",
        ),
        *(
            ({"when": "governed", "trained": [name]}, {}, f"cannot go over to {name}, or from it")
            for name in ("dora", "adalora", "pissa", "loftq", "lora_fa", "ia3", "mezo")
        ),
        (BADAM, {"training__memory__trained": "dora"}, "cannot go over to dora, or from it"),
        *(
            (BADAM, {"training__memory__weights": name}, f"merged into weights held as {name}")
            for name in ("nf4", "int8", "fp8", "layer_offload")
        ),
        (BADAM, {"training__devices": 2}, "a run on several devices, or on pairs"),
        (BADAM, {"task": "preference"}, "a run on several devices, or on pairs"),
        (BADAM, {"training__grad_freeze": {}}, "grad_freeze follows the matrices of one way"),
        (
            BADAM,
            {"selection__refresh__when": "fixed", "selection__refresh__scorer": "grand"},
            "selection.refresh compares looks of grand, which are at the gradients",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(switch, changes, message):
    with pytest.raises(ValueError, match=message):
        read(switch, **changes)
