"""Killed, or the power cut, before every numbered step of a commit: either the old or the new is
there, whole, and the same work done again ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from tests.reliability.injected import ALL, each_step, forked
from tests.reliability.small_checkpoints import check, commit, save
from tests.runs import planned, silent
from thrifty import checkpoints, pipeline, publication, selection
from thrifty.core.arrays import save_arrays
from thrifty.core.budget import Budget, Cost
from thrifty.core.durable import rename_durably, write_atomically
from thrifty.core.ledger import Ledger, Stage
from thrifty.core.sampling import Asked, Sample
from thrifty.decode_record import Record
from thrifty.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")


@pytest.fixture
def home() -> Iterator[Path]:
    """In memory where there is such a place: to sync there takes no time."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.long
def test_a_checkpoint_is_the_old_or_the_new_one(home):
    run = home / "run"
    for step in (1, 2):
        commit(run / "checkpoints", step)
    died = 0
    for _, killed, cut, done in each_step(
        run, lambda folder: commit(folder / "checkpoints", 3), home / "steps"
    ):
        died += not done
        for folder in (killed, cut):
            check(folder / "checkpoints", (3,) if done else (2, 3))
    assert died > 20


CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace injects the signal")
@pytest.mark.parametrize("call", CALLS)
def test_a_checkpoint_is_the_old_or_the_new_one_at_every_system_call(call, home):
    """As the kernel sees it: dead at the n-th write, fsync, rename, ..."""
    for number in range(1, 1000):
        folder = home / f"{call}-{number}"
        for step in (1, 2):
            commit(folder, step)
        inject = f"inject={call}:signal=KILL:when={number}"
        traced = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
        program = [sys.executable, "-m", "tests.reliability.small_checkpoints", str(folder), "3"]
        done = subprocess.run([*traced, *program], check=False, capture_output=True)
        assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
        check(folder, (3,) if done.returncode == 0 else (2, 3))
        shutil.rmtree(folder)
        if done.returncode == 0:
            break
    assert number > (1 if call in ("rename", "rmdir") else 0)


@pytest.mark.long
def test_a_model_is_there_or_not(home):
    run = home / "run"
    commit(run / "checkpoints", 1)
    checkpoint, model = Path("checkpoints", "checkpoint-1"), "model"
    (run / checkpoint / checkpoints.FOR_OTHERS / "config.json").write_text("{}")

    def publish(folder: Path) -> None:
        publication.publish(folder / checkpoint, folder / model, mark="ours", step=1)

    publish(run)
    new = content(run / model)
    assert {"model.safetensors", "config.json", "thrifty.json"} <= set(new)
    for there in (True, False):  # one that lies there is replaced
        if not there:
            shutil.rmtree(run / model)
        for steps, killed, cut, done in each_step(run, publish, home / "steps"):
            for folder in (killed, cut):
                published = publication.is_done(folder / model, "ours")
                assert published or not done, f"step {steps}: {folder.name} has no model"
                assert not published or content(folder / model) == new
                publish(folder)
                assert content(folder / model) == new
                assert [path.name for path in folder.glob(".model.*")] == []
        assert steps > 8


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.long
def test_a_file_is_the_old_or_the_new_one(home, known):
    run = home / "run"
    run.mkdir()

    def write(folder: Path, value: int = 2) -> None:
        write_atomically(folder / "text.json", json.dumps({"value": value}))
        save_arrays(folder / "deep" / "down" / "arrays.npz", {"value": np.full(1000, value)})
        draft = folder / "draft.bin"
        draft.write_bytes(bytes([value]) * 1000)
        rename_durably(draft, folder / "file.bin")

    def values(folder: Path) -> list[int | None]:
        text, file = folder / "text.json", folder / "file.bin"
        arrays = folder / "deep" / "down" / "arrays.npz"
        found = [json.loads(text.read_text())["value"] if text.exists() else None]
        if arrays.exists():
            with np.load(arrays) as saved:
                assert (saved["value"] == saved["value"][0]).all()
                found.append(int(saved["value"][0]))
        else:
            found.append(None)
        return [*found, int.from_bytes({*file.read_bytes()}) if file.exists() else None]

    if known:
        write(run, 1)
    old = 1 if known else None
    for steps, killed, cut, done in each_step(run, write, home / "steps"):
        for folder in (killed, cut):
            found = values(folder)
            assert set(found) <= {old, 2}, f"step {steps}: {folder.name} has {found}"
            # In the order in which they were written: none is there before another.
            assert found == sorted(found, key=lambda value: value != 2)
            assert not done or found == [2, 2, 2]
            write(folder)
            assert values(folder) == [2, 2, 2]
    assert steps > 10


@pytest.mark.slow
def test_a_plan_is_there_or_not(tiny_model, tiny_data, home):
    """``thrifty plan``, killed while its folder is made and named; again, it plans the same."""
    start = home / "start"
    start.mkdir()
    data = {**tiny_data, "pool": tiny_data["small_pool"]}

    def plan(folder: Path) -> None:
        planned(folder / "run", tiny_model, data)

    whole = home / "whole"
    planned(whole / "run", tiny_model, data)
    # Each of them would take minutes.
    for steps, killed, cut, done in each_step(
        start, plan, home / "steps", numbers=range(9, ALL, 9)
    ):
        for folder in (killed, cut):
            run = folder / "run"
            assert run.exists() or not done, f"step {steps}: {folder.name} has no plan"
            if not run.exists():
                plan(folder)
            assert content(run).keys() - {"ledger.sqlite"} == content(whole / "run").keys() - {
                "ledger.sqlite"
            }
            assert (run / "plan.yaml").read_text() == (whole / "run" / "plan.yaml").read_text()
            RunFolder(run).reading().close()
    print(f"plan: {steps} steps")


def test_what_is_damaged_pushes_no_checkpoint_out(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.commit(save(tmp_path, step), {"step": step, "dev_loss": 1.0 / step})
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"short")
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    checkpoints.retain(tmp_path, newest=2)
    assert [c.step for c in checkpoints.committed(tmp_path)] == [1, 2]
    newest, _ = checkpoints.newest_whole(tmp_path)
    assert newest is not None
    assert newest.step == 2


def test_what_is_flipped_unseen_leaves_another_one(tmp_path):
    """Retention reads no content: of the few that it keeps the next is gone on with."""
    for step in (1, 2, 3):
        commit(tmp_path, step)
    weights = tmp_path / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(b"?" + weights.read_bytes()[1:])
    checkpoints.retain(tmp_path, newest=2)
    newest, notes = checkpoints.newest_whole(tmp_path)
    assert newest is not None
    assert newest.step == 2
    assert notes == ["checkpoint-3: model.safetensors has changed"]


def test_a_shard_whose_charge_was_lost_is_scored_anew(tmp_path):
    """Killed between leaving its scores and settling: the file is there, its cost is not useful."""
    book = tmp_path / "ledger.sqlite"
    files = [tmp_path / f"shard-{number}" for number in range(3)]
    with Ledger.create(book, Budget()) as ledger:
        stage_id = ledger._journal.insert(
            "stages",
            name="select",
            method="loss",
            account="budget",
            predicted="{}",
            state="open",
            started_at="",
        )
        stage = Stage(ledger, stage_id, "budget", None)
        for number in (0, 1):
            lease = stage.lease("score", Cost(), step=number)
            lease.tick(Cost(flops=10.0))
            files[number].touch()
            if number == 0:
                lease.settle()
    with Ledger(book) as ledger:  # of the next process
        ledger.recover()
        assert ledger.spent(lost=False).flops == ledger.spent(lost=True).flops == 10.0
        stage = Stage(ledger, stage_id, "budget", None)
        assert selection._to_be_scored(files, stage) == [1, 2]
        with stage.spending("score", Cost(), step=1):
            pass
        assert selection._to_be_scored(files, stage) == [2]


@pytest.mark.slow
def test_a_selection_is_there_or_not_and_charged_once(tiny_model, tiny_data, home):
    """``thrifty select``, killed at some of its steps: chosen and charged as if it had not been."""
    data, whole = {**tiny_data, "pool": tiny_data["small_pool"]}, home / "whole"
    settings = {"selection.scorer": "loss", "selection.max_tokens": 900}
    planned(home / "run", tiny_model, data, fixed=settings, budget=Budget(flops=1e13))
    shutil.copytree(home / "run", whole)

    def select(folder: Path) -> None:
        pipeline.select(folder, silent)

    def useful(folder: Path) -> float:
        with RunFolder(folder).reading() as ledger:
            return ledger.spent(lost=False).flops

    assert not forked(lambda: select(whole))
    for steps, killed, cut, _ in each_step(
        home / "run", select, home / "steps", numbers=range(5, ALL, 5)
    ):
        for folder in (killed, cut):
            assert not forked(lambda folder=folder: select(folder))
            for name in ("selected.jsonl", "ids.npy", "outcomes.parquet"):
                left = folder / "selected" / name
                assert left.read_bytes() == (whole / "selected" / name).read_bytes(), steps
            assert useful(folder) == useful(whole), f"step {steps}: {folder.name}"


@pytest.mark.long
def test_answers_are_there_with_the_samples_that_they_rest_on(home):
    folder = home / "decode"
    folder.mkdir()
    samples = [Sample(model="m", text=f"text {number}", answer="4") for number in range(3)]

    def answer(folder: Path) -> None:
        record, asked = Record(folder, {"prompts": "p"}), Asked(id="q")
        record.restore({"q": asked})
        for sample in samples[len(asked.samples) :]:
            record.add(asked, [sample], Cost(flops=1.0))
            asked.add(sample)
        record.finish([{"id": "q", "answer": "4"}])
        record.close()

    for steps, killed, cut, done in each_step(folder, answer, home / "steps"):
        for place in (killed, cut):
            answers, drawn = place / "answers.jsonl", place / "samples.jsonl"
            assert answers.is_file() or not done, f"step {steps}: {place.name} has no answers"
            if answers.is_file():
                assert drawn.read_bytes().count(b"\n") == 3, f"step {steps}: {place.name}"
            answer(place)
            assert drawn.read_bytes().count(b"\n") == 3
            assert json.loads(answers.read_text()) == {"id": "q", "answer": "4"}


def test_what_a_draw_took_is_read_back_to_the_bit(tmp_path):
    samples = [Sample(model="m", answer="4")] * 3
    took = Cost(flops=16586240.0 / 7, tokens=38.0, dollars=None)
    record = Record(tmp_path, {})
    for _ in range(5):
        record.add(Asked(id="q"), samples, took)
    record.close()
    again = Record(tmp_path, {})
    assert again.restore({"q": Asked(id="q")}) == 15
    assert again.took("q") == record.took("q")
