"""A disk that is full, fails or cannot be written: nothing that was saved is lost, the ledger has
its last words, what is needed is named, and the same command then goes on to the same end."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.reliability.small_disks import (
    break_ext4,
    empty,
    ext4_disk,
    fill,
    mend_ext4,
    read_only,
    small_disk,
    writable,
)
from tests.runs import ledger, planned, weights
from thrifty import checkpoints, cli, display, pipeline, training
from thrifty.core import headroom
from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import Ledger
from thrifty.run_folder import RunFolder

SHORT = {
    "training.max_steps": 12,
    "training.warmup_steps": 0,
    "training.cooldown_steps": 2,
    "training.eval_steps": 4,
    "training.save_steps": 4,
}


@pytest.fixture(scope="module")
def made(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """A planned run that nobody has begun, and the same one brought to its end."""
    home = tmp_path_factory.mktemp("disk")
    # With headroom, so that no limit binds whatever is lost.
    planned(home / "planned", tiny_model, tiny_data, fixed=SHORT, budget=Budget(flops=1e12))
    shutil.copytree(home / "planned", home / "done")
    assert cli.main(["run", str(home / "done")]) == 0
    return home


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "12m") as folder:
        yield folder


@pytest.fixture
def run(made, disk) -> Path:
    """A run that nobody has begun, on the small disk."""
    return shutil.copytree(made / "planned", disk / "run")


def when_said(patch: pytest.MonkeyPatch, start: str, do) -> None:
    """``do``, once, when a line that begins so is said."""
    plain, left = display.say, [do]

    def say(line: str) -> None:
        plain(line)
        if line.startswith(start) and left:
            left.pop()()

    patch.setattr(display, "say", say)


def ended_the_same(folder: Path, made: Path) -> None:
    same, found = weights(made / "done" / "model"), weights(folder / "model")
    assert same.keys() == found.keys()
    assert all((same[name] == found[name]).all() for name in same)
    with closing(ledger(made / "done")) as one, closing(ledger(folder)) as other:
        assert other.spent(lost=False).flops == pytest.approx(one.spent().flops, rel=1e-9)
        assert [s["state"] for s in other.stages()] == ["done"] * 3
    assert (folder / "report.html").is_file()


def stage(folder: Path, name: str) -> dict:
    with closing(ledger(folder)) as book:
        (found,) = [s for s in book.stages() if s["name"] == name]
        return found


# -- full ---------------------------------------------------------------------------------------

FULL_AT = {
    "scores": ("select: scoring", ""),
    "first checkpoint": ("step     0", "training takes"),
    "second checkpoint": ("step     4", "training takes"),
    "last checkpoint": ("step     8", "training takes"),
    "test": ("test: measuring", ""),
}
QUICK = ("second checkpoint",)


@pytest.mark.parametrize(
    "moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in FULL_AT]
)
@pytest.mark.long
def test_full_on_the_way(moment, made, disk, run, monkeypatch, capsys):
    line, told = FULL_AT[moment]
    with monkeypatch.context() as patch:
        when_said(patch, line, lambda: fill(disk))
        assert cli.main(["run", str(run)]) == 5
    said = capsys.readouterr().err.partition("error: ")[2]
    assert said.startswith("No space left on device")
    assert str(disk) in said
    assert told in said
    assert "\nhint: make at least" in said
    # What was saved is whole, and nothing half written takes up room.
    saved = RunFolder(run).checkpoints("budget")
    names = sorted(path.name for path in saved.glob("*")) if saved.exists() else []
    assert names == sorted(c.path.name for c in checkpoints.committed(saved))
    assert all(checkpoints.damage(c) is None for c in checkpoints.committed(saved))
    with closing(ledger(run)) as book:
        assert book.reserved() == Cost()
        for each in book.stages():
            assert each["state"] == "done" or "No space left" in each["detail"]["reason"]
    empty(disk)
    assert cli.main(["run", str(run)]) == 0
    ended_the_same(run, made)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "report"])
def test_full_when_what_is_left_is_written(what, made, disk, run, monkeypatch, capsys):
    module, name = {"model": (training, "publish"), "report": (pipeline, "write_report")}[what]
    plain = getattr(module, name)

    def on_a_full_disk(*arguments, **more):
        fill(disk)
        return plain(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, on_a_full_disk)
        assert cli.main(["run", str(run)]) == 5
    assert "No space left on device" in capsys.readouterr().err
    assert (run / "model").is_dir() == (what == "report")
    empty(disk)  # or even a reader of the ledger has no room
    with closing(ledger(run)) as book:
        spent = book.spent(lost=False)
        # Two of the newest, whole: nothing is trained again.
        assert len(checkpoints.committed(run / "checkpoints")) >= 2
    assert cli.main(["run", str(run)]) == 0
    with closing(ledger(run)) as book:
        assert book.spent(stage="train", lost=True).flops == 0
        assert book.spent(lost=False).flops >= spent.flops
    ended_the_same(run, made)


@pytest.mark.slow
def test_full_from_the_start_costs_nothing_and_is_named(made, disk, run, capsys):
    fill(disk)
    for _ in range(2):
        assert cli.main(["run", str(run)]) == 5
        said = capsys.readouterr().err.partition("error: ")[2]
        assert said.startswith(f"No space left on device: {run}")
    empty(disk)
    with closing(ledger(run)) as book:
        assert book.spent() == Cost()
    assert cli.main(["run", str(run)]) == 0
    ended_the_same(run, made)


@pytest.mark.slow
def test_the_command_line_on_a_disk_that_others_fill(made, disk, run):
    """As a user sees it: a process of its own, its log on the same disk."""
    command = [sys.executable, "-m", "thrifty", "run", str(run)]
    log = disk / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        saved = run / "checkpoints" / "checkpoint-4" / checkpoints.MANIFEST
        while process.poll() is None and not saved.is_file():
            pass
        process.send_signal(signal.SIGSTOP)  # it might be done before the disk is full
        fill(disk)
        process.send_signal(signal.SIGCONT)
        assert process.wait(200) == 5
    empty(disk)
    assert "No space left" in stage(run, "train")["detail"]["reason"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "resuming from step" in ended.stderr
    ended_the_same(run, made)


# -- failing, and not to be written -------------------------------------------------------------


class Failing:
    """Has the disk fail at files whose path holds ``part``: at a sync, from the ``nth`` on."""

    def __init__(self, patch: pytest.MonkeyPatch, part: str, nth: int = 1) -> None:
        self.part, self.left, self.hits = part, nth, 0
        self._sync = os.fsync
        patch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if self.part in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            self.left -= 1
            if self.left <= 0:
                self.hits += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._sync(descriptor)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells a file by its descriptor")
@pytest.mark.parametrize(
    ("part", "nth"),
    [
        ("shard-00000.new", 1),
        ("checkpoint-8/optimizer.pt", 1),
        pytest.param("checkpoint-4/.manifest", 1, marks=pytest.mark.slow),
        pytest.param("checkpoints", 30, marks=pytest.mark.slow),
        pytest.param(".model.new", 1, marks=pytest.mark.slow),
        pytest.param(".report.html", 1, marks=pytest.mark.slow),
        pytest.param("counter", 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_a_disk_that_fails(part, nth, made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made / "planned", tmp_path / "run")
    with monkeypatch.context() as patch:
        failing = Failing(patch, part, nth)
        assert cli.main(["run", str(folder)]) == 5
    assert failing.hits
    said = capsys.readouterr().err.partition("error: ")[2]
    assert said.startswith("Input/output error")
    assert "\nhint: look at the disk; what was saved before is whole" in said
    if part == ".report.html":
        assert weights(folder / "model")
    assert all(checkpoints.damage(c) is None for c in checkpoints.committed(folder / "checkpoints"))
    assert cli.main(["run", str(folder)]) == 0
    ended_the_same(folder, made)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="fails SQLite's own calls")
@pytest.mark.parametrize("call", ["pwrite64", "fsync,fdatasync"])
def test_a_ledger_on_a_disk_that_fails(call, made, tmp_path):
    """SQLite's writes from the 20th on: training ends, what was saved is whole, the error names the
    ledger."""
    folder = shutil.copytree(made / "planned", tmp_path / "run")
    command = [sys.executable, "-m", "thrifty", "run", str(folder)]
    inject = [
        "strace", "--seccomp-bpf", "-f", "-qq", "-o", str(tmp_path / "calls"),
        "-P", str(folder / "ledger.sqlite-wal"), "-e", f"inject={call}:error=EIO:when=20+",
    ]  # fmt: skip
    ended = subprocess.run([*inject, *command], capture_output=True, text=True, check=False)
    assert "INJECTED" in (tmp_path / "calls").read_text()
    assert ended.returncode == 5, ended.stderr
    assert "error: Input/output error" in ended.stderr
    assert "hint: look at the disk" in ended.stderr
    assert "Traceback" not in ended.stderr
    saved = checkpoints.committed(folder / "checkpoints")
    assert all(checkpoints.damage(c) is None for c in saved)
    assert cli.main(["run", str(folder)]) == 0
    ended_the_same(folder, made)


@pytest.mark.slow
def test_a_run_folder_that_cannot_be_written(made, disk, run, capsys):
    read_only(disk)
    code = cli.main(["run", str(run)])
    writable(disk)
    said = capsys.readouterr().err.partition("error: ")[2]
    assert code == 5
    assert said.startswith("Read-only file system")
    assert "\nhint: mount it for writing" in said
    assert cli.main(["run", str(run)]) == 0
    ended_the_same(run, made)


MOMENTS = {"scoring": "ledger-1.counter", "training": "checkpoints/checkpoint-4/manifest.json"}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_turns_read_only_on_the_way(moment, made, tmp_path):
    """The kernel finds an error in it, though files are open for writing. After a check and another
    mount the same command goes on."""
    with (
        small_disk(tmp_path / "memory", "32m") as memory,
        ext4_disk(tmp_path / "disk", image := memory / "image", 24) as disk,
    ):
        run = shutil.copytree(made / "planned", disk / "run")
        os.sync()
        command = [sys.executable, "-m", "thrifty", "run", str(run)]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while process.poll() is None and not (run / MOMENTS[moment]).is_file():
                pass
            process.send_signal(signal.SIGSTOP)
            saved = [c.path.name for c in checkpoints.committed(run / "checkpoints")]
            break_ext4(disk)
            process.send_signal(signal.SIGCONT)
            code = process.wait(200)
        said = (tmp_path / "log").read_text()
        assert code == 5, said
        assert "error: Read-only file system" in said
        assert "\nhint: mount it for writing; what was saved before is whole" in said
        assert "Traceback" not in said
        mend_ext4(disk, image)
        there = checkpoints.committed(run / "checkpoints")
        assert [c.path.name for c in there] == saved
        assert bool(saved) == (moment == "training")
        assert all(checkpoints.damage(c) is None for c in there)
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ("resuming from step" in ended.stderr) == (moment == "training")
        ended_the_same(run, made)


# -- caches and names ---------------------------------------------------------------------------


@pytest.mark.slow
def test_caches_that_cannot_be_written_are_said_once_and_nothing_else(
    tiny_model, tiny_data, made, disk, tmp_path
):
    """Read-only thrifty's, Hugging Face's and the home; the run beside them is as ever."""
    read_only(disk)
    folder = tmp_path / "run"
    environment = {**os.environ, "HOME": str(disk), "HF_HOME": str(disk / "hf")}
    environment |= {"THRIFTY_CACHE": str(disk / "thrifty"), "THRIFTY_ROWS_CACHE_GIB": "1"}
    plan = [
        "plan", "--model", str(tiny_model), "--pool", str(tiny_data["pool"]),
        "--target", f"sums={tiny_data['signal']}", "--dev", f"sums={tiny_data['dev']}",
        "--flops", "4e9", "--set", "training.max_length=64", "--set", "selection.scorer=bm25",
        "-o", str(folder),
    ]  # fmt: skip
    for arguments in (plan, ["run", str(folder)]):
        ended = subprocess.run(
            [sys.executable, "-m", "thrifty", *arguments],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        # Of each of its places once.
        lines = [line for line in ended.stderr.splitlines() if "nothing is kept" in line]
        assert len(lines) == len(set(lines))
        assert 1 <= len(lines) <= 2
        assert "Read-only file system" in lines[0]
    assert weights(folder / "model")


def test_nowhere_to_keep_anything_for_a_user_without_a_home(monkeypatch, caplog):
    from thrifty.core import best_effort
    from thrifty.costs import hardware

    for name in ("THRIFTY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    best_effort._say_once.cache_clear()
    for _ in range(2):
        hardware.keep(hardware.load_device("h100"))
    assert len(caplog.messages) == 1
    assert "Not a directory" in caplog.text
    assert not hardware.load_device(None).calibrated


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["n" * 255, "ü" * 127, "a run: with %41 #?&é"],
    ids=["255 bytes", "254 bytes", "marks"],
)
def test_a_run_folder_of_any_name_and_one_that_is_a_link(name, made, tmp_path):
    folder = tmp_path / name
    shutil.copytree(made / "planned", folder)
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert cli.main(["run", str(link)]) == 0
    assert cli.main(["run", str(folder)]) == 0
    ended_the_same(folder, made)


@pytest.mark.parametrize(("length", "code"), [(248, 0), (255, 4)])
@pytest.mark.long
def test_plan_into_a_link_under_a_long_name(length, code, tiny_model, tiny_data, tmp_path, capsys):
    """A draft lies beside it, whose name is 7 bytes longer."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    folder = tmp_path / "link" / ("n" * length)
    target = [f"sums={tiny_data['signal']}", "--dev", f"sums={tiny_data['dev']}"]
    asked = ["--model", tiny_model, "--pool", tiny_data["small_pool"], "--target", *target]
    limits = ["--flops", "4e9", "--set", "training.max_length=64", "-o", folder]
    assert cli.main(["plan", *map(str, [*asked, *limits])]) == code
    said = capsys.readouterr().err
    if code:
        assert "error: File name too long" in said
        assert "\nhint: a shorter name" in said
    assert sorted((tmp_path / "elsewhere").iterdir()) == (
        [] if code else [tmp_path / "elsewhere" / folder.name]
    )


# -- the ledger's last words --------------------------------------------------------------------


def until_full(book: Ledger, disk: Path) -> None:
    """Spend 7 FLOPs, and go on until the disk takes no more."""
    with book.stage("a", "b") as one, one.spending("work", Cost(flops=10.0)) as lease:
        lease.tick(Cost(flops=7.0))
        fill(disk)
        for _ in range(1000):  # until the present pages of the log are used up
            book.decide("this", "that", "x" * 4000)


def test_last_words_fit_a_full_disk(tmp_path):
    """Dozens of settlements, and the reasons, after the last free byte is gone."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        path = disk / "ledger.sqlite"
        Ledger.create(path, Budget(flops=1e9)).close()
        assert [p.name for p in disk.iterdir()] == ["ledger.sqlite"]
        with Ledger(path) as book:
            assert (disk / "ledger.headroom").stat().st_size == headroom.BYTES
            with pytest.raises(OSError, match="No space"):
                until_full(book, disk)
            assert not (disk / "ledger.headroom").exists()
        empty(disk)
        with Ledger(path) as book:
            assert book.spent().flops == 7.0
            assert book.reserved() == Cost()
            assert "No space left" in book.stages()[0]["detail"]["reason"]
        fill(disk)
        with pytest.raises(OSError, match="No space") as caught:
            Ledger(path)
        assert caught.value.filename == str(disk / "ledger.headroom")


def test_who_reads_a_ledger_leaves_its_headroom(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, Budget(flops=1e9)):
        Ledger(path, read_only=True).close()
        assert (tmp_path / "ledger.headroom").is_file()
    assert not (tmp_path / "ledger.headroom").exists()
    with pytest.raises(ValueError, match="there is no ledger"):
        Ledger(tmp_path / "none" / "ledger.sqlite")
