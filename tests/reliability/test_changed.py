"""What a run was planned from and has changed since: refused with the file and its hash, before
anything is spent."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import asked, finish, ledger, planned, silent
from thrifty import origins, preparation
from thrifty.cli import main
from thrifty.preparation import plan_run
from thrifty.run_folder import RunFolder
from thrifty.signals.models import weights_sha256


@pytest.fixture(scope="module")
def fresh(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """A planned run, with its model and its files of rows beside it."""
    home = tmp_path_factory.mktemp("changed")
    model = shutil.copytree(tiny_model, home / "model")
    data = {name: Path(shutil.copy2(file, home / file.name)) for name, file in tiny_data.items()}
    planned(home / "run", model, {**data, "pool": data["small_pool"]})
    return home


@pytest.fixture
def home(fresh) -> Path:
    """Put back as it was afterwards, for a run knows its files by their whole path."""
    kept = {p: (p.read_bytes(), p.stat()) for p in fresh.rglob("*") if p.is_file()}
    yield fresh
    for file in [p for p in fresh.rglob("*") if p.is_file() and p not in kept]:
        file.unlink()
    for file, (data, seen) in kept.items():
        file.write_bytes(data)
        os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def append(file: Path) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "one more", "completion": " row"}\n')


def flip_last(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def set_key(key: str, value: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return change


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a weight": ("model/model.safetensors", flip_last),
    "the config": ("model/config.json", set_key("rope_theta", 5e5)),
    "the tokenizer": ("model/tokenizer_config.json", set_key("eos_token", "<s>")),
    "a token's number": (
        "model/tokenizer.json",
        lambda file: file.write_text(file.read_text().replace('"ed"', '"xq"', 1) + " "),
    ),
    "a chat template": ("model/chat_template.jinja", lambda file: file.write_text("{{ 1 }}")),
    "the pool": ("small_pool.jsonl", append),
    "a target's signal": ("signal.jsonl", flip_last),
    "a target's dev rows": ("dev.jsonl", append),
    "a target's test rows": ("test.jsonl", append),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changed_since_the_plan_is_refused_with_its_hash(case, home, capsys):
    name, change = CHANGES[case]
    change(home / name)
    spent = ledger(home / "run").spent()
    for command in ("run", "select", "train"):
        assert main([command, str(home / "run")]) == 4
        error = capsys.readouterr().err
        assert str(home / name) in error
        assert "has changed since the plan: " in error
        assert "... now" in error
        assert "\nhint: " in error
        assert "plan" in error.partition("\nhint: ")[2]
        assert "Traceback" not in error
    assert ledger(home / "run").spent() == spent
    assert not (home / "run" / "selected").exists()
    assert main(["verify", str(home / "run")]) == 4
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if str(home / name) in line]
    assert line.startswith("changed")


def test_large_weights_are_looked_at_in_pieces_and_hashed_whole_by_the_first_stage(tmp_path):
    file = tmp_path / "model.safetensors"
    whole = random.Random(0).randbytes(4 << 20)
    file.write_bytes(whole)
    then = origins.model_marks(tmp_path)
    assert list(origins.changed_in_model(tmp_path, then)) == []
    trained = random.Random(1).randbytes(4 << 20)
    for other in (whole[:-1], whole[:-1] + b"x", b"x" + whole[1:], trained):
        file.write_bytes(other)
        (change,) = origins.changed_in_model(tmp_path, then)
        assert str(file) in change
    between = bytearray(whole)
    between[100_000] ^= 1
    file.write_bytes(between)
    assert list(origins.changed_in_model(tmp_path, then)) == [], "not where nobody looks"
    run = RunFolder(tmp_path)
    origins.note_weights(run, tmp_path)
    known = run.base_file.read_text().strip()
    file.write_bytes(whole)
    assert weights_sha256(tmp_path) != known


def test_rows_that_were_read_are_enough(home, capsys):
    """Gone, or touched and the same: the run has what it read."""
    (home / "small_pool.jsonl").unlink()
    (home / "dev.jsonl").touch()
    assert main(["verify", str(home / "run")]) == 0
    assert main(["select", str(home / "run")]) == 0
    shutil.rmtree(home / "run" / "selected")
    shutil.rmtree(home / "run" / "scores")


def test_a_changed_pool_may_be_gone_on_with(home, capsys):
    append(home / "small_pool.jsonl")
    assert main(["select", str(home / "run")]) == 4
    assert f"delete {home / 'run' / 'sources.json'}" in capsys.readouterr().err
    (home / "run" / "sources.json").unlink()
    assert main(["select", str(home / "run")]) == 0
    capsys.readouterr()
    main(["verify", str(home / "run")])
    assert "not known  the files of rows" in capsys.readouterr().out
    shutil.rmtree(home / "run" / "selected")
    shutil.rmtree(home / "run" / "scores")


def test_rows_that_are_written_to_while_they_are_read_are_no_plan(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    pool = Path(shutil.copy(tiny_data["small_pool"], tmp_path / "pool.jsonl"))
    plain = preparation.read_asked

    def meanwhile(*arguments):
        found = plain(*arguments)
        append(pool)
        return found

    monkeypatch.setattr(preparation, "read_asked", meanwhile)
    with pytest.raises(ValueError, match=r"pool.jsonl changed while it was read\nhint: "):
        plan_run(asked(tiny_model, {**tiny_data, "pool": pool}), tmp_path / "run", silent)
    assert [file.name for file in tmp_path.iterdir()] == [pool.name]


def test_a_run_that_an_older_thrifty_planned_goes_on(home):
    """It noted neither its files of rows nor its model's, and listed no hashes."""
    run = home / "run"
    (run / "sources.json").unlink()
    (run / "SHA256SUMS").unlink()
    prepared = json.loads((run / "prepared.json").read_text())
    del prepared["model"]
    (run / "prepared.json").write_text(json.dumps(prepared))
    append(home / "small_pool.jsonl")
    assert main(["select", str(run)]) == 0
    shutil.rmtree(run / "selected")
    shutil.rmtree(run / "scores")


@pytest.mark.slow
def test_changed_between_a_run_and_its_resumption(tiny_model, tiny_data, tmp_path, monkeypatch):
    from tests.runs import interrupt_at
    from thrifty.interruption import Interrupted

    model = shutil.copytree(tiny_model, tmp_path / "model")
    folder = tmp_path / "run"
    planned(folder, model, tiny_data)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            finish(folder)
    spent = ledger(folder).spent().flops
    flip_last(model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors has changed since the plan"):
        finish(folder)
    flip_last(model / "model.safetensors")
    assert ledger(folder).spent().flops == spent
    finish(folder)
