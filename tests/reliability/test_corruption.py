"""A byte flipped in any file of a run: `verify` names the file, and no command uses it unseen."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.runs import finish, planned, silent
from thrifty import checkpoints, pipeline, publication, score_cache
from thrifty.cli import main
from thrifty.core import sums
from thrifty.core.sealed import read_sealed, sealed
from thrifty.data.store import open_store
from thrifty.run_folder import RunFolder

PARTS = (
    "plan.yaml",
    "prepared.json",
    "sources.json",
    "base.sha256",
    "ledger.sqlite",
    "test_losses.npz",
    "report.html",
    "SHA256SUMS",
    "pool/",
    "targets/",
    "scores/",
    "selected/",
    "checkpoints/",
    "model/",
)
"""Of a finished run: files, and folders, in which every file is tried."""


@pytest.fixture(scope="module")
def done(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """A finished run with its report, of a model that may vanish."""
    home = tmp_path_factory.mktemp("corruption")
    model = shutil.copytree(tiny_model, home / "model")
    pool = {**tiny_data, "pool": shutil.copy(tiny_data["small_pool"], home / "pool.jsonl")}
    bad = '{"prompt": "without an answer"}\n'
    pool["pool"].write_text(bad + pool["pool"].read_text(), encoding="utf-8")
    planned(home / "run", model, pool, fixed={"training.max_steps": 20})
    pipeline.run(home / "run", silent)
    return home / "run"


@pytest.fixture
def run(done, tmp_path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(done, tmp_path / "run", copy_function=shutil.copy2)


def flip(file: Path, seed: int = 0) -> None:
    """Change one byte, anywhere in the file, to any other; of a ledger one in a row, since most of
    its pages is room that says nothing."""
    rng, data = random.Random(f"{file.name} {seed}"), bytearray(file.read_bytes())
    at = data.index(b"bm25") if file.suffix == ".sqlite" else rng.randrange(len(data))
    data[at] ^= rng.randrange(1, 256)
    file.write_bytes(data)


def files_of(run: Path) -> list[Path]:
    """Those that say something: locks do not, nor what readers of a ledger share."""
    found = [p for p in sorted(run.rglob("*")) if p.is_file() and p.stat().st_size]
    return [p for p in found if not p.name.endswith("-shm")]


def verified(run: Path, capsys) -> tuple[int, str]:
    code = main(["verify", str(run)])
    return code, capsys.readouterr().out


def refused(run: Path, command: str, capsys) -> str:
    assert main([command, str(run)]) == 4
    error = capsys.readouterr().err
    assert "\nhint: " in error
    assert "Traceback" not in error
    return error


# -- verify -------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_whole_run_is_well(run, capsys):
    before = {file: file.read_bytes() for file in files_of(run)}
    code, said = verified(run, capsys)
    assert code == 0, said
    assert {line.split()[0] for line in said.splitlines()} == {"ok"}
    assert {file: file.read_bytes() for file in files_of(run)} == before
    assert main(["verify", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True
    names = [part["name"] for part in facts["parts"]]
    assert {"plan.yaml", "ledger.sqlite", "pool", "targets/sums/dev", "selected", "model"} <= {
        *names
    }
    assert any(name.startswith("checkpoints/checkpoint-") for name in names)
    assert {part["state"] for part in facts["parts"]} == {"ok"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.long
def test_verify_names_the_file_of_any_flipped_byte(part, run, capsys):
    files = [f for f in files_of(run) if f.relative_to(run).as_posix().startswith(part)]
    assert files
    for seed, file in enumerate(files):
        whole = file.read_bytes()
        flip(file, seed)
        code, said = verified(run, capsys)
        told = [line for line in said.splitlines() if not line.startswith("ok")]
        assert any(str(file) in line or file.name in line for line in told), (file, said)
        edited = part == "plan.yaml" and told[0].startswith("edited")
        assert code == (0 if edited else 4)
        file.write_bytes(whole)


def test_every_file_of_a_run_is_one_of_those_parts(run):
    left = [
        name
        for file in files_of(run)
        if not (name := file.relative_to(run).as_posix()).startswith(PARTS)
    ]
    assert left == []


def test_no_run_is_no_traceback(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none")]) == 4
    assert "there is no run folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 4
    assert "damaged" in capsys.readouterr().out


# -- what is used -------------------------------------------------------------------------------

USED = {
    "prepared.json": ("run", "prepared.json is damaged"),
    "base.sha256": ("run", "base.sha256 is damaged"),
    "pool/manifest.json": ("run", "manifest.json' is damaged"),
    "targets/sums/dev/manifest.json": ("run", "manifest.json' is damaged"),
    "selected/ids.npy": ("train", "ids.npy is damaged"),
    "selected/manifest.json": ("train", "manifest.json is damaged"),
    "selected/data/state.json": ("train", "state.json is damaged"),
    "model/thrifty.json": ("run", "thrifty.json is damaged"),
    "ledger.sqlite": ("run", "ledger.sqlite"),
}


@pytest.mark.parametrize("file", USED)
def test_what_a_command_would_use_is_refused(file, run, capsys):
    command, says = USED[file]
    flip(run / file)
    assert says in refused(run, command, capsys)


def test_a_flipped_shard_is_named_before_a_row_of_it_is_used(run, capsys):
    shutil.rmtree(run / "selected")
    shutil.rmtree(run / "scores")
    flip(run / "pool" / "shard-00000.parquet")
    assert "shard-00000.parquet' is damaged" in refused(run, "select", capsys)


def test_a_flipped_score_is_named_and_scored_again_once_it_is_deleted(run, capsys):
    shutil.rmtree(run / "selected")
    (file,) = (run / "scores").glob("*/shard-00000.parquet")
    whole = file.read_bytes()
    flip(file)
    error = refused(run, "select", capsys)
    assert f"{file} is damaged" in error
    assert "delete it" in error
    file.unlink()
    assert main(["select", str(run)]) == 0
    assert file.read_bytes() == whole
    assert verified(run, capsys)[0] == 0


def test_a_model_that_was_flipped_is_not_tested(run, capsys):
    flip(run / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged(.|\n)*\nhint: delete"):
        publication.check(run / "model")
    shutil.rmtree(run / "model")
    assert main(["train", str(run)]) == 0
    assert verified(run, capsys)[0] == 0


# -- checkpoints --------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = {"flipped": flip, "truncated": _truncate, "zeroed": _zero, "taken away": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_any_file_damaged_is_set_aside(damage, run, tmp_path):
    saved = run / "checkpoints"
    before, last = checkpoints.committed(saved)[-2:]
    names = [file.relative_to(last.path) for file in files_of(last.path)]
    for name in names:
        folder = shutil.copytree(saved, tmp_path / "copy" / "checkpoints")
        DAMAGES[damage](folder / last.path.name / name)
        newest, notes = checkpoints.newest_whole(folder)
        assert newest is not None
        assert newest.step == before.step, name
        (note,) = notes
        assert last.path.name in note
        assert name.name in note or damage == "taken away"
        assert [path.name for path in folder.glob("torn-*")] == [f"torn-{last.path.name}"]
        shutil.rmtree(tmp_path / "copy")


def test_files_swapped_between_two_checkpoints_are_found(run):
    one, other = checkpoints.committed(run / "checkpoints")[-2:]
    for name in ("model.safetensors", "optimizer.pt"):
        first, second = one.path / name, other.path / name
        swapped = first.read_bytes(), second.read_bytes()
        assert len(swapped[0]) == len(swapped[1])
        second.write_bytes(swapped[0])
        assert checkpoints.damage(other) == f"{name} has changed"
        second.write_bytes(swapped[1])
    shutil.copy(one.path / checkpoints.MANIFEST, other.path / checkpoints.MANIFEST)
    newest, notes = checkpoints.newest_whole(run / "checkpoints")
    assert newest.step == one.step
    assert notes == [f"{other.path.name}: manifest.json is of step {one.step}"]


def test_any_byte_of_a_manifest_matters_or_says_nothing(run):
    checkpoint = checkpoints.committed(run / "checkpoints")[-1]
    file, rng = checkpoint.path / checkpoints.MANIFEST, random.Random(0)
    whole = file.read_bytes()
    for at in range(0, len(whole), 3):
        data = bytearray(whole)
        data[at] ^= rng.randrange(1, 256)
        file.write_bytes(data)
        found = {c.step: c.manifest for c in checkpoints.committed(run / "checkpoints")}
        said = found.get(checkpoint.step, checkpoint.manifest)
        assert {k: said.get(k) for k in checkpoint.manifest} == checkpoint.manifest, at


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    from tests.runs import interrupt_at
    from thrifty.interruption import Interrupted

    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 23)
        with pytest.raises(Interrupted):
            finish(folder)
    flip(folder / "checkpoints" / "checkpoint-23" / "optimizer.pt")
    said: list[str] = []
    finish(folder, said.append)
    assert any("set aside" in line and "optimizer.pt has changed" in line for line in said)
    assert "resuming from step 20" in said


# -- lists of hashes ----------------------------------------------------------------------------


def test_hashes_are_those_that_sha256sum_would_tell(run):
    lines = (run / "model" / sums.NAME).read_text().splitlines()
    assert all(re.fullmatch(r"[0-9a-f]{64}  \S+", line) for line in lines)
    assert {line[66:] for line in lines} == {
        path.name for path in (run / "model").iterdir() if path.name != sums.NAME
    }


def test_a_kill_between_noting_a_file_and_naming_it_leaves_either(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    sums.write(file, "one")
    sums.write(tmp_path / "b.txt", "b")

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sums, "rename_durably", killed)
        with pytest.raises(Killed):
            sums.write(file, "two")
    assert list(sums.faults(tmp_path)) == []
    assert file.read_text() == "one"
    sums.write(file, "three")
    assert list(sums.faults(tmp_path)) == []
    assert len((tmp_path / sums.NAME).read_text().splitlines()) == 2
    file.write_text("two?")
    with pytest.raises(ValueError, match=r"a.txt is damaged(.|\n)*\nhint: mend it"):
        sums.check(file, "mend it")


def test_half_a_line_of_hashes_is_as_none(tmp_path):
    sums.write(tmp_path / "a.txt", "a")
    with (tmp_path / sums.NAME).open("a") as notes:
        notes.write("0123")
    assert list(sums.faults(tmp_path)) == []
    sums.write(tmp_path / "b.txt", "b")
    assert list(sums.faults(tmp_path)) == []
    assert len((tmp_path / sums.NAME).read_text().splitlines()) == 2


def test_sealed_values(tmp_path):
    file = tmp_path / "values.json"
    values = {"step": 3, "loss": 0.1, "names": ["a", "ü"]}
    file.write_text(json.dumps(sealed(sealed(values))))
    assert read_sealed(file) == values
    file.write_text(json.dumps({**sealed(values), "step": 4}))
    with pytest.raises(ValueError, match=r"values\.json' is damaged: it is not as"):
        read_sealed(file)
    file.write_text(json.dumps(values))  # an older thrifty's
    assert read_sealed(file) == values


def test_rows_that_were_set_aside_are_vouched_for(run):
    store = open_store(RunFolder(run).pool)
    assert sum(store.manifest.num_bad.values()) == 1
    assert list(store.faults()) == []
    flip(store.directory / "quarantine.jsonl")
    assert list(store.faults()) == [
        f"{str(store.directory / 'quarantine.jsonl')!r} changed since it was written"
    ]
    assert np.concatenate([shard.ids for shard in store.shards()]).size == len(store)


def test_scores_that_were_damaged_in_the_cache_are_made_again(run, tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("THRIFTY_ROWS_CACHE_GIB", "1")
    (folder,) = (run / "scores").iterdir()
    cost = json.loads((folder / score_cache.COST).read_text())
    score_cache.keep(folder, cost)
    shutil.rmtree(folder)
    assert score_cache.fetch(folder) == cost
    assert list(sums.faults(folder)) == []
    (kept,) = (tmp_path / "cache" / "scores").iterdir()
    flip(kept / "shard-00000.parquet")
    shutil.rmtree(folder)
    assert score_cache.fetch(folder) is None
    assert not kept.exists()
    assert not folder.exists()
