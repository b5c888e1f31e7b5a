"""Running out of memory in a real training: the same batch again in smaller pieces, charged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.reliability.starving import SAID, is_first_layer, run_out
from tests.runs import finish, ledger, planned, silent, weights
from thrifty import in_pieces, stages
from thrifty.core.budget import Budget
from thrifty.costs.hardware import load_device
from thrifty.in_pieces import OutOfMemory, Pieces, ran_out
from thrifty.run_folder import RunFolder

SHORT = {
    "training.max_steps": 12,
    "training.warmup_steps": 0,
    "training.cooldown_steps": 2,
    "training.gradient_accumulation_steps": 2,
    "training.eval_steps": 4,
    "training.save_steps": 4,
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, tiny_model, tiny_data):
    """A planned run, and the same after it ran to its end."""
    home = tmp_path_factory.mktemp("starved")
    budget = Budget(flops=1e11)
    planned(home / "planned", tiny_model, tiny_data, budget=budget, fixed=SHORT)
    shutil.copytree(home / "planned", home / "whole")
    finish(home / "whole")
    return home


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What is learnt of this machine's memory is no other test's."""
    cache = shutil.copytree(os.environ["THRIFTY_CACHE"], tmp_path / "cache")
    monkeypatch.setenv("THRIFTY_CACHE", str(cache))


def starved(folder, where: str, most: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.reliability.starving", where, str(most), "--"]
    return subprocess.run([*command, "train", str(folder)], capture_output=True, text=True)


def in_a_copy(untouched, tmp_path):
    return shutil.copytree(untouched / "planned", tmp_path / "run")


def path_of(folder):
    return [(row["step"], row["objective"]) for row in ledger(folder).evaluations()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "most", "pieces"),
    [
        ("forward", 1, 4),
        ("backward", 2, 2),
        ("evaluate", 1, 4),
        ("optimizer", 2, 4),
        ("save", 1, 2),
    ],
)
def test_a_run_that_runs_out_ends_as_one_that_does_not(untouched, tmp_path, where, most, pieces):
    folder = in_a_copy(untouched, tmp_path)
    done = starved(folder, where, most)
    assert done.returncode == 0, done.stderr
    assert "ran out of memory: again" in done.stderr
    assert Pieces(folder / "checkpoints").count == pieces
    with ledger(folder) as book, ledger(untouched / "whole") as other:
        train = {"stage": "train", "lost": False}
        assert book.spent(stage="train", lost=True).flops > 0 or where == "save"
        assert book.spent(**train, activity="train").flops == pytest.approx(
            other.spent(**train, activity="train").flops, rel=1e-9
        )
        assert book.spent().flops <= book.budget.flops
        named = [row for row in book.decisions() if "in how many pieces" in row["name"]]
        assert named[-1]["chosen"] == str(pieces)
        assert SAID in named[-1]["reason"]
        detail = named[-1]["detail"]
        more = detail["held_bytes"] / detail["predicted_bytes"]
        assert load_device("local").memory_factor == pytest.approx(
            max(row["detail"]["memory_factor"] for row in named)
        )
        assert detail["memory_factor"] >= min(max(more, 1.0), 2.0)
    steps, losses = zip(*path_of(folder), strict=True)
    as_steps, as_losses = zip(*path_of(untouched / "whole"), strict=True)
    assert steps == as_steps
    assert losses == pytest.approx(as_losses, abs=2e-4)  # sums are rounded in another order
    ours, theirs = weights(folder / "model"), weights(untouched / "whole" / "model")
    assert ours.keys() == theirs.keys()
    far = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert far < 5e-3  # Adam makes steps of the sign of gradients that are nearly zero


@pytest.mark.slow
def test_what_never_fits_stops_in_the_end_and_says_so(untouched, tmp_path):
    folder = in_a_copy(untouched, tmp_path)
    done = starved(folder, "forward", 0)
    assert done.returncode == 5
    assert "1 rows at a time, and no smaller pass is left to try" in done.stderr
    assert "--memory" in done.stderr
    with ledger(folder) as book:
        assert book.spent(stage="train", activity="train", lost=False).flops == 0
        assert book.spent(stage="train", activity="train", lost=True).flops > 0
    done = subprocess.run(
        [sys.executable, "-m", "thrifty", "train", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr  # with room, the same command goes on


def gradients_of_steps(monkeypatch, folder, most: int | None):
    """name -> gradient of each step as the optimizer would be shown it; ``most``: of rows a pass
    before it runs out half-way down its backward."""
    from thrifty.divergence import FiniteGuard

    found = []

    def check(self, step):
        found.append({n: p.grad.clone() for n, p in self._model.named_parameters()})

    def after(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if is_first_layer(module) and module.training and len(hidden) > most:
            hidden.register_hook(lambda gradient: run_out())

    with monkeypatch.context() as patch:
        patch.setattr(FiniteGuard, "check", check)
        hook = None
        if most is not None:
            hook = torch.nn.modules.module.register_module_forward_hook(after)
        try:
            with stages.at_work(RunFolder(folder), silent) as work:
                stages.select(work, work.main)
                stages.train(work, work.main)
        finally:
            if hook is not None:
                hook.remove()
    return found


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.long
def test_gradients_of_pieces_are_those_of_the_whole(untouched, tmp_path, monkeypatch, most):
    whole = gradients_of_steps(monkeypatch, in_a_copy(untouched, tmp_path), None)
    shutil.rmtree(tmp_path / "run")
    pieces = gradients_of_steps(monkeypatch, in_a_copy(untouched, tmp_path), most)
    assert len(whole) == len(pieces) == 12
    for name, gradient in whole[0].items():  # before their roundings drift apart
        far = (pieces[0][name] - gradient).abs().max()
        assert float(far) <= 1e-6 * max(1.0, float(gradient.abs().max())), name


def test_pieces_cover_a_batch_and_count_by_their_share(tmp_path):
    pieces = Pieces(tmp_path)
    batch = {
        "input_ids": torch.arange(10).view(10, 1),
        "said": torch.arange(5),
        "scale": torch.tensor(3.0),
    }
    assert [share for _, share in pieces.of(batch, 5)] == [1.0]
    pieces.again("here", SAID, 5)
    parts, shares = zip(*pieces.of(batch, 5), strict=True)
    assert [part["input_ids"].flatten().tolist() for part in parts] == [
        [0, 1, 2, 5, 6, 7],
        [3, 4, 8, 9],
    ]
    assert [part["said"].tolist() for part in parts] == [[0, 1, 2], [3, 4]]
    assert all(part["scale"] == 3.0 for part in parts)
    assert shares == (0.6, 0.4)


def test_pieces_halve_until_there_are_no_smaller_ones_and_are_remembered(tmp_path):
    pieces = Pieces(tmp_path)
    for count in (2, 4, 5):
        pieces.again("here", SAID, 5)
        assert pieces.count == count
        assert Pieces(tmp_path).count == count
    with pytest.raises(OutOfMemory, match="no smaller pass"):
        pieces.again("here", SAID, 5)
    pieces.again("saving", SAID, 5, even_so=True)
    for _ in range(in_pieces.MOST_TRIES - 4):
        pieces.again("saving", SAID, 5, even_so=True)
    with pytest.raises(OutOfMemory):
        pieces.again("saving", SAID, 5, even_so=True)


def test_a_file_of_pieces_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "pieces.json").write_text(json.dumps({"count": "many"}))
    with pytest.raises(ValueError, match=r"pieces\.json cannot be read"):
        Pieces(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(SAID),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_what_counts_as_running_out(error):
    assert ran_out(error)


@pytest.mark.parametrize(
    "error", [ValueError("out of memory."), OutOfMemory(SAID), RuntimeError("shapes differ")]
)
def test_what_does_not(error):
    assert not ran_out(error)


@pytest.mark.slow
def test_a_rank_that_runs_out_ends_all_and_the_same_command_goes_on(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    fixed = SHORT | {"training.devices": 2, "training.gradient_accumulation_steps": 1}
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, budget=Budget(flops=1e11), fixed=fixed)
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from tests.reliability.starving import starve\n"
        "    starve('forward', 2)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    command = [sys.executable, "-m", "thrifty", "train", str(folder)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert first.returncode == 5, first.stderr
    assert "rank 1 ran out of memory" in first.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr  # in pieces of two rows
    assert (folder / "model" / "model.safetensors").is_file()
