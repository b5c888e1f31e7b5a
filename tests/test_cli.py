"""The command: what it prints, where, its exit codes, and what it leaves after a mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from tests.runs import ledger, planned
from thrifty.cli import main
from thrifty.core.budget import Budget
from thrifty.core.contracts import KINDS
from thrifty.data.store import open_store


@pytest.fixture
def arguments(tiny_model, tiny_data):
    """A good `plan` command without its output folder."""
    return [
        "plan",
        "--model",
        str(tiny_model),
        "--pool",
        str(tiny_data["pool"]),
        "--target",
        f"sums={tiny_data['signal']}",
        "--dev",
        f"sums={tiny_data['dev']}",
        "--flops",
        "6e9",
        "--set",
        "training.max_length=64",
        "--scorer",
        "bm25",
    ]


def replaced(arguments: list[str], option: str, value: str | None) -> list[str]:
    """The command with one option's value changed, or the option left out."""
    place = arguments.index(option)
    instead = [] if value is None else [option, value]
    return [*arguments[:place], *instead, *arguments[place + 2 :]]


def test_plan_run_report(arguments, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main([*arguments, "--json", "-o", run]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert set(plan) >= {"model", "chosen", "predicted", "binding", "num_combinations"}
    assert set(plan["predicted"]) >= {
        "peak_memory_bytes",
        "peak_memory_bytes_by_term",
        "flops",
        "seconds",
        "dollars",
    }
    total = sum(plan["predicted"]["peak_memory_bytes_by_term"].values())
    assert total == pytest.approx(plan["predicted"]["peak_memory_bytes"])
    assert plan["model"]["num_parameters"] == 26_784 or plan["model"]["num_parameters"] > 0
    assert "900 rows" in err
    assert main(["run", run]) == 0
    out, err = capsys.readouterr()
    assert "dev loss" in out
    assert "report:" in err
    assert "train: full, up to " in err
    assert "loading the model ..." in err
    assert "evaluating the base model on 16 dev rows ..." in err
    assert main(["report", run, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["spent"]["flops"] <= report["budget"]["flops"]
    assert report["dev_loss"]["after"] < report["dev_loss"]["before"]
    assert main(["report", run]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_plan_prints_candidates_and_reasons(arguments, tmp_path, capsys):
    assert main([*arguments, "-o", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "combinations fit" in out
    assert "peak memory, predicted" in out
    assert "training.cooldown_steps" in out


def test_methods_lists_every_kind(capsys):
    assert main(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)
    kinds = {m["kind"] for m in methods}
    assert kinds == set(KINDS)
    assert all(set(m) == {"name", "kind", "summary", "cost_class", "source"} for m in methods)
    assert main(["methods"]) == 0
    assert "bm25" in capsys.readouterr().out


def test_a_known_device(capsys):
    assert main(["device", "h100", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["memory_bytes"] > 70 * 2**30
    assert facts["dollars_per_hour"] > 0


@pytest.mark.parametrize(
    ("option", "value", "code", "says"),
    [
        ("--flops", "3e17x", 4, "unknown unit 'x'"),
        ("--flops", "0", 4, "more than zero"),
        ("--flops", "-3000", 4, "more than zero"),
        ("--flops", "3x", 4, "units are FLOP with k, M, G, T, P, E or Z"),
        ("--flops", "1e31", 4, "more FLOPs than any run can use"),
        ("--flops", "1e6", 3, "the smallest plan"),
        ("--model", "./nowhere", 4, "there is no model folder ./nowhere"),
        ("--model", "no-such/model", 4, "not in the local cache"),
        ("--pool", "missing.jsonl", 4, "missing.jsonl"),
        ("--pool", "", 4, "the pool: a source of rows is empty"),
        ("--target", "sums=missing.jsonl", 4, "missing.jsonl"),
        ("--target", "sums=", 4, "the signal rows of target sums: a source of rows is empty"),
        ("--dev", "sums=", 4, "the dev rows of target sums: a source of rows is empty"),
        ("--scorer", "bm26", 4, "did you mean bm25?"),
        ("--set", "training.max_lenght=64", 4, "did you mean max_length?"),
        ("--set", "memory.trained=lora", 4, "key memory: did you mean training.memory.trained?"),
        ("--set", "training.memory.weights=bf16", 4, "no weights 'bf16'"),
        (
            "--set",
            "training.memory.trained.lora.targets=q_proj,v_proj",
            4,
            "; write [q_proj,v_proj]",
        ),
        ("--set", "training.max_length=4096", 4, "longer than the model's context of 128"),
        ("--set", "training.seed", 4, "cannot read --set"),
        ("--set", "training.report_to=[tensorbord]", 4, "'tensorbord', which is no reporter"),
        ("--set", "stopping={plateau: {patience: -3}}", 4, "patience must be at least 1, not -3"),
        ("--set", "dollars_per_hour=-1", 4, "dollars must be more than zero"),
    ],
)
def test_bad_input_is_one_clear_error(option, value, code, says, arguments, tmp_path, capsys):
    folder = tmp_path / "runs" / "run"
    assert main([*replaced(arguments, option, value), "-o", str(folder)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    last = err[err.index("error: ") :]
    assert says in last
    assert "hint: " in last or "did you mean" in last
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


@pytest.mark.parametrize("limit", ["--tokens", "--hours", "--memory", "--dollars", "--flops"])
@pytest.mark.parametrize("amount", ["0", "-1"])
def test_a_budget_of_nothing_or_less_is_refused(limit, amount, arguments, tmp_path, capsys):
    command = replaced(arguments, "--flops", None)
    assert main([*command, f"{limit}={amount}", "-o", str(tmp_path / "run")]) == 4
    error = capsys.readouterr().err
    assert "must be more than zero" in error
    assert "\nhint: " in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--modle", "m"], "there is no option --modle: did you mean --model?"),
        (["--mod=m"], "there is no option --mod: did you mean --model?"),
        (
            ["--model", "m", "--frobnicate"],
            "there is no option --frobnicate: `thrifty plan --help`",
        ),
        (["--model", "m", "--set", "a.b=1", "c.d=2"], "unrecognised: c.d=2\nhint: --set once per"),
    ],
)
def test_misspelt_options(wrong, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *wrong])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("amount", ["-1h", "-1", "-.5d"])
def test_a_negative_amount_is_refused_for_what_it_is(amount, tiny_model, capsys):
    assert main(["plan", "--model", str(tiny_model), "--hours", amount]) == 4
    assert f"hours must be more than zero and finite, not '{amount}'" in capsys.readouterr().err


def test_memory_without_a_unit_and_beyond_the_device(tiny_model, capsys):
    command = ["plan", "--model", str(tiny_model), "--tokens", "1M"]
    assert main([*command, "--memory", "24"]) == 4
    assert "without a unit\nhint: did you mean 24GiB?" in capsys.readouterr().err
    assert main([*command, "--memory", "40GiB", "--device", "rtx4090", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("rtx4090 has 23.6 GiB, less than the memory limit of 40 GiB: ")
    assert json.loads(out)["predicted"]["device_bytes"] <= 23.6 * 2**30


@pytest.mark.long
def test_what_gains_are_measured_on_is_said(arguments, tiny_data, tmp_path, capsys):
    assert main([*arguments, "-o", str(tmp_path / "one")]) == 0
    err = capsys.readouterr().err
    assert "no --test for sums: gains will be measured on dev rows" in err
    assert "noise" not in err, "16 dev rows"
    no_dev = replaced(arguments, "--dev", None)
    assert main([*no_dev, "--test", f"sums={tiny_data['test']}", "-o", str(tmp_path / "two")]) == 0
    err = capsys.readouterr().err
    assert "no --test" not in err
    assert "no --dev for sums: " in err
    assert "a loss over so few is mostly noise" in err
    no_target = replaced(replaced(no_dev, "--target", None), "--scorer", "uniform")
    assert main([*no_target, "-o", str(tmp_path / "three")]) == 0
    assert "rows of the pool itself are held out as dev rows" in capsys.readouterr().err


def test_a_pool_is_tokenised_once(arguments, tmp_path, capsys, monkeypatch):
    """A budget that was guessed too small costs no second reading."""
    from thrifty.data import store, store_cache

    monkeypatch.setenv("THRIFTY_CACHE", str(shutil.copytree(os.environ["THRIFTY_CACHE"],
                                                            tmp_path / "cache")))  # fmt: skip
    monkeypatch.delenv(store_cache.VARIABLE)
    rows: list[int] = []
    real = store.tokenize_rows
    monkeypatch.setattr(
        store, "tokenize_rows", lambda some, *rest: rows.append(len(some)) or real(some, *rest)
    )
    assert main([*replaced(arguments, "--flops", "1e6"), "-o", str(tmp_path / "run")]) == 3
    assert max(rows) == 256
    whole, rows[:] = sum(rows), []
    capsys.readouterr()
    assert main([*arguments, "-o", str(tmp_path / "run")]) == 0
    assert sum(rows) == whole - 900, "the small target's rows alone"
    assert "as read and tokenised before" in capsys.readouterr().err
    monkeypatch.setenv(store_cache.VARIABLE, "0")
    rows.clear()
    assert main([*arguments, "-o", str(tmp_path / "anew")]) == 0
    assert sum(rows) == whole
    one, other = (
        (tmp_path / name / "pool" / "manifest.json").read_text() for name in ("run", "anew")
    )
    assert one == other


def test_a_damaged_file_and_a_folder_that_is_there(arguments, tmp_path, capsys):
    noise = tmp_path / "noise.parquet"
    noise.write_bytes(os.urandom(3000))
    run = tmp_path / "run"
    assert main([*replaced(arguments, "--pool", str(noise)), "-o", str(run)]) == 4
    error = capsys.readouterr().err
    assert "the pool: nothing can be read: " in error
    assert "hint: is the file whole" in error
    assert main([*arguments, "-o", str(run)]) == 0
    shown = capsys.readouterr().out
    assert main([*arguments, "-o", str(run)]) == 0
    again = capsys.readouterr()
    assert f"{run} holds this very plan already" in again.err
    assert again.out == shown
    assert main([*replaced(arguments, "--flops", "5e9"), "-o", str(run)]) == 4
    error = capsys.readouterr().err
    assert f"error: {run} exists already\nhint: `thrifty run {run}` goes on with it" in error


@pytest.mark.slow
def test_a_device_measured_while_busy_is_said_once(arguments, tmp_path, capsys, monkeypatch):
    from dataclasses import replace

    from thrifty.costs.hardware import keep, load_device

    monkeypatch.setenv("THRIFTY_CACHE", str(shutil.copytree(os.environ["THRIFTY_CACHE"],
                                                            tmp_path / "cache")))  # fmt: skip
    keep(replace(load_device(None), machine_busy=True))
    said = "local was measured while the machine was busy"
    assert main([*arguments, "-o", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count(said) == 1
    assert main(["run", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count(said) == 1


def test_a_target_without_a_name_and_without_rows(arguments, tmp_path, capsys):
    command = [*replaced(replaced(arguments, "--target", None), "--dev", None), "--target", ""]
    assert main([*command, "-o", str(tmp_path / "run")]) == 4
    assert "the signal rows of target target: a source of rows is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_scorer_that_needs_a_target_refuses_without_one(arguments, tmp_path, capsys):
    command = replaced(replaced(arguments, "--target", None), "--dev", None)
    assert main([*command, "-o", str(tmp_path / "run")]) == 4
    assert "scorer bm25 needs a target" in capsys.readouterr().err


def test_an_unknown_model_type(arguments, tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    command = replaced(arguments, "--model", str(model))
    assert main([*command, "-o", str(tmp_path / "runs" / "run")]) == 4
    error = capsys.readouterr().err
    assert "mystery" in error
    assert "\nhint: " in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing half-written"


def test_a_missing_tokenizer(arguments, tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    command = replaced(arguments, "--model", str(model))
    assert main([*command, "-o", str(tmp_path / "runs" / "run")]) == 4
    error = capsys.readouterr().err
    message, hint = error[error.index("error: ") :].splitlines()
    assert message.startswith(f"error: there is no tokenizer in {str(model)!r} that transformers")
    assert message.endswith("Error)")
    assert hint.startswith("hint: give a folder with tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing half-written"


def test_a_pool_with_no_valid_row_and_an_empty_target(arguments, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{not json}\n[1]\n")
    assert main([*replaced(arguments, "--pool", str(bad)), "-o", str(tmp_path / "run")]) == 4
    assert "none of the 2 rows can be used" in capsys.readouterr().err
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for option, what in (
        ("--target", "the signal rows of target sums"),
        ("--dev", "the dev rows of target sums"),
        ("--pool", "the pool"),
    ):
        value = str(empty) if option == "--pool" else f"sums={empty}"
        command = replaced(arguments, option, value)
        assert main([*command, "-o", str(tmp_path / "run")]) == 4
        assert f"error: {what}: the data holds no rows at all\nhint: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "code", "says"),
    [
        (1, 4, "one row cannot be trained on and measured on"),
        (6, 0, ""),
        pytest.param(15, 0, "", marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_tiny_pools(rows, code, says, tiny_model, tmp_path, capsys):
    few = [{"prompt": f"say {n}", "completion": f" {n} plums"} for n in range(rows)]
    pool = write_jsonl(tmp_path / "few.jsonl", few)
    run = str(tmp_path / "run")
    command = ["plan", "--model", str(tiny_model), "--pool", str(pool), "--tokens", "500"]
    assert main([*command, "--set", "training.max_length=32", "-o", run]) == code
    assert says in capsys.readouterr().err
    if code == 0:
        assert main(["run", run]) == 0


def test_a_pool_that_fills_no_step(tiny_model, tmp_path, capsys):
    pool = write_jsonl(tmp_path / "few.jsonl", [{"text": "a b"}, {"text": "b c"}])
    command = ["plan", "--model", str(tiny_model), "--pool", str(pool), "--flops", "1e9"]
    assert main([*command, "-o", str(tmp_path / "run")]) == 4
    assert "do not fill one training step" in capsys.readouterr().err


def test_odd_options(arguments, tmp_path, capsys):
    assert main([*arguments, "--price", "-5", "-o", str(tmp_path / "run")]) == 4
    assert "--price must be more than zero" in capsys.readouterr().err
    assert main([*arguments[:3], *arguments[5:], "-o", str(tmp_path / "run")]) == 4
    assert "without a pool" in capsys.readouterr().err
    assert main([*replaced(arguments, "--flops", "1e6"), "-o", str(tmp_path / "a/b/c")]) == 3
    assert list(tmp_path.iterdir()) == []


def test_one_target_row_steers_selection_and_training(arguments, tmp_path, capsys):
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "add two", "completion": " three plus"}])
    command = replaced(replaced(arguments, "--target", f"sums={one}"), "--dev", None)
    assert main([*command, "-o", str(tmp_path / "run")]) == 0
    assert "too few rows to split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "code", "says"),
    [
        (lambda text: text.replace("max_steps:", "max_step:"), 4, "did you mean max_steps?"),
        (lambda text: "- just\n- a list\n", 4, "holds no plan"),
        (lambda text: text.replace("version: 1", "version: 9"), 4, "has version 9"),
        (lambda text: text.replace("scorer: bm25", "scorer: bm99"), 4, "no scorer 'bm99'"),
        (lambda text: text.replace("{", "{{") + "\n: : :", 4, "not valid YAML"),
    ],
)
def test_a_plan_edited_into_nonsense(edit, code, says, tiny_model, tiny_data, tmp_path, capsys):
    planned(tmp_path / "run", tiny_model, tiny_data)
    file = tmp_path / "run" / "plan.yaml"
    file.write_text(edit(file.read_text()))
    assert main(["run", str(tmp_path / "run")]) == code
    assert says in capsys.readouterr().err


def test_usage_errors(capsys):
    assert main([]) == 2
    with pytest.raises(SystemExit) as exit_:
        main(["plan"])
    assert exit_.value.code == 2
    assert main(["run", "nowhere"]) == 4
    assert "there is no run folder" in capsys.readouterr().err


def test_a_row_is_explained(tiny_model, tiny_data, tmp_path, capsys):
    folder = tmp_path / "run"
    pool = tmp_path / "pool.jsonl"
    lines = tiny_data["small_pool"].read_text().splitlines()
    pool.write_text("\n".join([*lines, lines[0]]) + "\n")
    data = {**tiny_data, "pool": pool}
    planned(folder, tiny_model, data, fixed={"selection.max_tokens": 800})
    command = ["select", str(folder), "--explain"]
    assert main([*command, "3"]) == 4
    assert "has no selection yet" in capsys.readouterr().err
    assert main(["select", str(folder)]) == 0
    capsys.readouterr()
    best = json.loads((folder / "selected/selected.jsonl").read_text().splitlines()[0])
    assert main([*command, str(best["id"])]) == 0
    said = capsys.readouterr().out
    assert "in: number 1 of " in said
    assert "picked by top_k" in said
    assert "bm25, sums: " in said
    assert " 0.0% of the rows score higher" in said
    assert main([*command, f"pool.jsonl:{best['number']}"]) == 0
    assert capsys.readouterr().out == said
    assert main([*command, "150"]) == 0
    assert "out: duplicate of row 0, dropped by a filter" in capsys.readouterr().out
    outside = next(i for i in range(1, 150) if f'"id": {i},' not in selected_text(folder))
    assert main([*command, str(outside)]) == 0
    out = capsys.readouterr().out
    assert "out: top_k (the best-scored rows within the token budget) filled " in out
    assert " of 800 tokens with other rows" in out
    for wrong in ("9999", "nowhere.jsonl:1", "one"):
        assert main([*command, wrong]) == 4
        assert "hint: " in capsys.readouterr().err


def selected_text(folder):
    return (folder / "selected/selected.jsonl").read_text()


# -- as a process -------------------------------------------------------------------------------


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "thrifty", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Whoever runs these tests in the background may have handed down an ignored SIGINT.
        preexec_fn=None if os.name == "nt" else _heed_ctrl_c,
    )


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(check, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX here")
def test_ctrl_c_then_kill_then_the_same_command_goes_on(tiny_model, tiny_data, tmp_path):
    """SIGINT finishes the step, saves and says how to go on; SIGKILL loses no spending; the weights
    at the end are those of a run that nobody touched."""
    fixed = {"training.max_steps": 90, "training.save_steps": 30, "training.eval_steps": 30}
    for name in ("straight", "broken"):
        planned(tmp_path / name, tiny_model, tiny_data, budget=Budget(flops=1e11), fixed=fixed)
    broken = tmp_path / "broken"
    process = start("run", str(broken))
    wait_for(lambda: len(ledger(broken).evaluations()) >= 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 5, err
    assert "which is saved" in err
    assert "error:" not in err
    assert "the same command goes on from there" in err
    process = start("run", str(broken))
    wait_for(lambda: any("checkpoint-30" in p.name for p in broken.glob("checkpoints/*")))
    process.kill()
    process.communicate()
    for folder in (broken, tmp_path / "straight"):
        assert main(["run", str(folder)]) == 0
    models = [tmp_path / n / "model" / "model.safetensors" for n in ("straight", "broken")]
    assert models[0].read_bytes() == models[1].read_bytes()
    one, other = ledger(tmp_path / "straight"), ledger(broken)
    assert other.spent(lost=False).flops == pytest.approx(one.spent().flops, rel=1e-9)
    assert other.spent().flops <= other.budget.flops


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX here")
@pytest.mark.long
def test_ctrl_c_while_planning_leaves_nothing(tiny_model, tmp_path):
    rows = [{"prompt": f"say {n}", "completion": " plum" * 40} for n in range(60_000)]
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    run = tmp_path / "runs" / "run"
    process = start("plan", "--model", str(tiny_model), "--pool", str(pool), "--tokens", "1M",
                    "-o", str(run))  # fmt: skip
    wait_for((run.with_name(".run.draft") / "pool").is_dir)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX here")
@pytest.mark.long
def test_a_plan_that_was_killed_is_gone_on_with(tiny_model, tmp_path, monkeypatch):
    """By SIGKILL, as memory that ran out does: the next one tokenises what is left, says so, and
    leaves nothing else."""
    monkeypatch.setenv("THRIFTY_ROWS_CACHE_GIB", "1")
    rows = [{"prompt": f"say {n}", "completion": " plum" * 40} for n in range(60_000)]
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    run = tmp_path / "runs" / "run"
    asked = ("plan", "--model", str(tiny_model), "--pool", str(pool), "--tokens", "1M")
    process = start(*asked, "-o", str(run))
    wait_for((run.with_name(".run.draft") / "pool" / "shard-00003.parquet").is_file)
    process.kill()
    process.communicate()
    again = start(*asked, "-o", str(run))
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "rows were tokenised by a plan that was killed" in err
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert open_store(run / "pool").manifest.num_examples == 60_000


_WITHOUT_POSIX = """
import os, shutil, sys
usage, tell = os.statvfs, shutil._ntuple_diskusage
shutil.disk_usage = lambda path: tell(1, 1, usage(path).f_bavail << 12)  # is there on Windows too
for module in ("fcntl", "resource", "pwd", "grp", "termios", "syslog"):
    sys.modules[module] = None
for name in ("fork", "kill", "getuid", "geteuid", "setsid", "statvfs", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
from thrifty.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_plan_and_report_make_no_posix_call(tiny_model, tiny_data, tmp_path):
    """They promise to run on macOS and Windows, where these are not."""
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    for command in (
        ["plan", "--model", str(tiny_model), "--flops", "1e12", "--json"],
        ["report", str(folder), "--json"],
        ["report", str(folder)],
        ["methods"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT_POSIX, *command], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX here")
def test_sigterm_while_scoring_is_told_and_gone_on_from(tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, fixed={"selection.scorer": "grad_cosine"},
            budget=Budget(flops=1e11))  # fmt: skip
    process = start("select", str(folder))
    wait_for(lambda: ledger(folder).reserved().flops > 0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert "the same command goes on" in err
    assert ledger(folder).reserved().flops == 0
    assert main(["select", str(folder)]) == 0
