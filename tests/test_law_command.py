"""``thrifty law``: what it prints and leaves, and what it says of what it cannot answer."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from thrifty import breakeven
from thrifty.cli import main
from thrifty.costs.shape import ModelShape
from thrifty.scaling.published import PUBLISHED

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A CSV of 60 runs, one of them wrong."""
    random = np.random.default_rng(0)
    law = PUBLISHED["besiroglu"].law
    lines = ["params,tokens,loss"]
    for i in range(60):
        N, D = 10 ** random.uniform(7.5, 10), 10 ** random.uniform(9, 11.5)
        loss = law.loss(N, D) * np.exp(random.laplace(0, 0.004)) * (1.4 if i == 7 else 1.0)
        lines.append(f"{N:.6g},{D:.6g},{loss:.6f}")
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fitted(runs):
    path = runs.with_name("law.json")
    assert main(["law", "fit", str(runs), "--draws", "40", "-o", str(path), "--json"]) == 0
    return path


@pytest.fixture
def asked(capsys):
    def ask(*arguments):
        capsys.readouterr()
        code = main(["law", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return ask


def test_fit_prints_what_programs_rely_on(runs, asked):
    code, out, _ = asked("fit", str(runs), "--draws", "40", "--at", "1e21", "1e22", "--json")
    facts = json.loads(out)
    assert code == 0
    keys = {"form", "E", "A", "B", "alpha", "beta", "objective", "num_points", "outliers"}
    assert set(facts) >= keys | {"intervals", "decisions"}
    assert facts["num_points"] == 60
    assert [o["line"] for o in facts["outliers"]] == [9]
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = facts["intervals"][name]
        assert low <= facts[name] <= high
    assert [d["flops"] for d in facts["decisions"]] == [1e21, 1e22]
    assert asked("fit", str(runs), "--draws", "40", "--at", "1e21", "1e22", "--json")[1] == out


def test_fit_for_people(runs, asked):
    code, out, _ = asked("fit", str(runs), "--draws", "20")
    assert code == 0
    assert "60 runs, 1 outliers" in out
    assert "90% of the bootstrap" in out


def test_allocate_reads_what_fit_left(fitted, asked):
    code, out, _ = asked("allocate", "--flops", "3e21", "--law", str(fitted), "--json")
    facts = json.loads(out)
    assert code == 0
    assert set(facts) >= {"law", "N", "D", "loss", "price", "intervals"}
    assert 6 * facts["N"] * facts["D"] == pytest.approx(3e21)
    for name in ("N", "D", "loss", "price"):
        low, high = facts["intervals"][name]
        assert low <= facts[name] <= high
    again = json.loads(
        asked("allocate", "--loss", str(facts["loss"]), "--law", str(fitted), "--json")[1]
    )
    assert again["flops"] == pytest.approx(3e21, rel=1e-5)
    assert again["intervals"]["flops"][0] < 3e21 < again["intervals"]["flops"][1]


def test_predict(fitted, asked):
    arguments = ("predict", "--params", "7B", "--tokens", "140B", "--law", str(fitted))
    code, out, _ = asked(*arguments, "--json")
    facts = json.loads(out)
    assert code == 0
    assert set(facts) >= {"law", "N", "D", "loss", "price", "intervals"}
    assert (facts["N"], facts["D"]) == (7e9, 1.4e11)
    assert facts["best"]["loss"] <= facts["loss"]
    assert "7 B parameters on 140 B tokens" in asked(*arguments)[1]


def test_without_a_law_the_published_one_answers(asked):
    _, out, _ = asked("allocate", "--flops", "5.88e23", "--json")
    facts = json.loads(out)
    assert "2404.10102" in facts["law"]["source"]
    assert facts["intervals"] == {}
    assert 60e9 < facts["N"] < 80e9  # Chinchilla is of 70B
    assert asked("allocate", "--flops", "1e21", "--law", "hoffmann")[0] == 0


def test_unique_tokens_and_serving(fitted, asked):
    arguments = ["allocate", "--flops", "1e22", "--law", str(fitted), "--unique", "20B"]
    _, out, _ = asked(*arguments, "--json")
    facts = json.loads(out)
    assert facts["epochs"] > 1
    assert "2305.16264" in facts["notes"][0]
    assert "epochs of 20 B tokens" in asked(*arguments)[1]
    served = json.loads(asked("allocate", "--flops", "1e22", "--serve", "2T", "--json")[1])
    assert sum(served["flops_of"].values()) == pytest.approx(1e22)
    assert served["N"] < json.loads(asked("allocate", "--flops", "1e22", "--json")[1])["N"]


def test_fine_tuning_through_a_file(tmp_path, asked):
    D = [0, 200, 400, 800, 1600, 3200, 6400, 12800, 25600]
    rows = "".join(f"{d},{1.5 + 400 / (150 + d**0.7):.6f}\n" for d in D)
    runs = tmp_path / "run.csv"
    runs.write_text(f"tokens,loss\n{rows}", encoding="utf-8")
    law, plot = tmp_path / "law.json", tmp_path / "law.svg"
    arguments = ["fit", str(runs), "--form", "fine_tuning", "--draws", "20", "-o", str(law)]
    code, out, _ = asked(*arguments, "--plot", str(plot))
    assert code == 0
    assert "D_l" in out
    code, out, _ = asked("predict", "--tokens", "1M", "--law", str(law), "--json")
    facts = json.loads(out)
    assert facts["N"] is None
    assert facts["loss"] == pytest.approx(1.5 + 400 / (150 + 1e6**0.7), rel=0.01)
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    code, _, err = asked("allocate", "--flops", "1e20", "--law", str(law))
    assert code == 4
    assert "knows tokens alone" in err


@pytest.mark.parametrize("name", ["law.svg", "law.html"])
def test_plots(fitted, asked, tmp_path, name):
    plot = tmp_path / name
    for _ in range(2):
        code, _, err = asked(
            "allocate", "--flops", "1e21", "--law", str(fitted), "--plot", str(plot)
        )
        assert code == 0, err
        text = plot.read_text(encoding="utf-8")
        assert "best for a budget" in text
        assert "outliers" in text
        assert "--series-1: #" in text
        assert "mathdefault" not in text
    if name.endswith("svg"):
        assert ElementTree.fromstring(text).tag.endswith("svg")


def test_what_cannot_be_answered(fitted, runs, asked, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"form": "chinchilla", "law": {"E": true}}', encoding="utf-8")
    for arguments, told in (
        (["allocate"], "one of --flops and --loss"),
        (["allocate", "--flops", "1e20", "--loss", "2"], "one of --flops and --loss"),
        (["allocate", "--loss", "1.0"], "no budget reaches"),
        (["allocate", "--flops", "3E"], "cannot read|unknown unit|hint"),
        (["allocate", "--flops", "1e21", "--law", "hofmann"], "did you mean hoffmann"),
        (["allocate", "--flops", "1e21", "--law", str(broken)], "is no law"),
        (["allocate", "--flops", "1e21", "--law", str(runs)], "is no law"),
        (["allocate", "--flops", "1e21", "--train-flops", "0"], "--train-flops"),
        (["allocate", "--flops", "1e21", "--plot", "law.png"], "neither .svg nor .html"),
        (["predict", "--tokens", "1B"], "asks for parameters too"),
        (["predict", "--tokens", "1B", "--params", "1X"], "parameters"),
        (["fit", str(runs), "--form", "chinchila"], "did you mean chinchilla"),
        (["fit", str(runs), "--column", "loss"], "names no column"),
        (["fit", str(runs), "--draws", "-1"], "0 or more"),
        (["fit", str(tmp_path / "none.csv")], "is no file"),
        (["fit", str(runs), "-o", str(tmp_path / "no" / "law.json")], "there is no folder"),
    ):
        code, out, err = asked(*arguments)
        assert code == 4, (arguments, err)
        assert not out
        assert told.split("|")[0] in err or any(t in err for t in told.split("|")), err
        assert "hint:" in err


def test_breakeven(tmp_path, asked):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    arguments = ["breakeven", "--model", str(tmp_path), "--flops", "1e17", "--pool-tokens", "50M"]
    plot = tmp_path / "pays.svg"
    code, out, err = asked(*arguments, "--json", "--plot", str(plot))
    assert code == 0, err
    facts = json.loads(out)
    ratios = facts["ratios"]
    assert ratios == sorted(ratios)
    by_name = {scorer["name"]: scorer for scorer in facts["scorers"]}
    forward, gradient = by_name["perplexity"], by_name["less"]
    for scorer in facts["scorers"]:
        assert scorer["flops"] == sorted(scorer["flops"], reverse=True)
        gains = [gain for gain in scorer["gain"] if gain is not None]
        assert gains == sorted(gains)  # what a smaller scorer costs less is never lost
    assert all(a < b for a, b in zip(forward["flops"], gradient["flops"], strict=True))
    assert 1 < by_name["grad_cosine"]["breakeven"] < gradient["breakeven"] < ratios[-1]
    assert "5x" in plot.read_text(encoding="utf-8")
    code, out, _ = asked(*arguments, "--scorer", "bm25", "less")
    assert "bm25 asks no model" in out
    assert "pays from" in out
    _, out, _ = asked(*arguments[:4], "1e19", *arguments[5:])
    assert "there is nothing to choose" in out


def test_a_smaller_model_has_about_the_parameters_asked_for():
    whole = ModelShape.from_config(LLAMA)
    for ratio in (2, 5, 10):
        shape = breakeven.smaller_shape(LLAMA, ratio)
        assert whole.num_parameters / shape.num_parameters == pytest.approx(ratio, rel=0.2)
        assert shape.head_dim == whole.head_dim
        assert shape.vocab_size == whole.vocab_size


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([1.0, 2.0, 3.0], 1.0),
        ([-1.0, 1.0, 2.0], np.sqrt(10)),
        ([None, 1.0, 2.0], 10.0),
        ([1.0, -1.0, 1.0], 10 * np.sqrt(10)),
        ([-2.0, -1.0, 0.0], None),
        ([None, None, None], None),
    ],
)
def test_breakeven_is_where_gains_stay_above_zero(gains, expected):
    found = breakeven.breakeven([1.0, 10.0, 100.0], gains)
    assert found == (None if expected is None else pytest.approx(expected))
