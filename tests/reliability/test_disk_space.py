"""The disk is asked before anything is spent: what does not fit is refused, what fits is not, and
the sizes are those of real checkpoints."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from tests.reliability.small_disks import empty, fill, small_disk
from tests.runs import finish, ledger, planned
from thrifty import checkpoints, cli, disk_space, training
from thrifty.core import headroom
from thrifty.core.budget import Budget
from thrifty.core.quantities import format_bytes
from thrifty.costs.hardware import load_device
from thrifty.costs.shape import read_shape
from thrifty.disk_fault import DiskFault, fault_of, free_bytes, prune, size_of
from thrifty.predictions import setting_of
from thrifty.run_folder import RunFolder

SHORT = {
    "training.max_steps": 6,
    "training.warmup_steps": 0,
    "training.cooldown_steps": 1,
    "training.eval_steps": 1,
    "training.save_steps": 1,
}


@pytest.fixture(scope="module")
def wide_model(tiny_model, tmp_path_factory) -> Path:
    """Wider than the tiny one, so that what is written around tensors does not count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def predicted(folder: Path) -> tuple[float, float, float]:
    """Bytes of a checkpoint, of the model, of all that training writes."""
    run = RunFolder(folder)
    plan, base = run.plan(), Path(run.plan().model.path)
    shape = read_shape(base)
    setting = setting_of(plan.training, shape, load_device(None))
    needs, _ = disk_space.training_needs(
        plan.training, shape, setting, base, folder / "checkpoints-that-are-not-there"
    )
    each = disk_space.checkpoint_size(shape, setting, base)
    return each, disk_space.model_size(shape, setting, base), needs


WAYS = {
    "full": {"trained": "full", "weights": "float32", "states": "adamw"},
    "bf16": {"trained": "full", "weights": "bfloat16", "states": "adamw"},
    "8 bits": {"trained": "full", "weights": "float32", "states": "adamw_8bit"},
    "adafactor": {"trained": "full", "weights": "float32", "states": "adafactor"},
    "lion": {"trained": "full", "weights": "float32", "states": "lion"},
    "lora": {"trained": {"lora": {"rank": 32}}, "weights": "float32", "states": "adamw"},
    "qlora": {"trained": {"lora": {"rank": 32}}, "weights": "nf4", "states": "adamw"},
    "lora 8 bits": {
        "trained": {"lora": {"rank": 64}},
        "weights": "float32",
        "states": "adamw_8bit",
    },
    "lora_fa": {"trained": {"lora_fa": {"rank": 32}}, "weights": "float32", "states": "adamw"},
    "dora": {"trained": {"dora": {"rank": 32}}, "weights": "float32", "states": "adamw"},
    "adapters": {"trained": {"adapters": {"rank": 32}}, "weights": "float32", "states": "adamw"},
    "adapters nf4": {"trained": {"adapters": {"rank": 32}}, "weights": "nf4", "states": "adamw"},
}
QUICK = ("full",)
LEDGER = headroom.BYTES + 160 * 1024
"""Bytes that a small run's ledger takes, its headroom and its log among them."""


@pytest.mark.parametrize(
    "way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
@pytest.mark.long
def test_sizes_are_those_of_real_checkpoints(way, wide_model, tiny_data, tmp_path, monkeypatch):
    if "8bit" in str(WAYS[way]) or "nf4" in str(WAYS[way]):
        pytest.importorskip("bitsandbytes")
    folder = tmp_path / "run"
    memory = {f"training.memory.{kind}": name for kind, name in WAYS[way].items()}
    planned(folder, wide_model, tiny_data, fixed=SHORT | memory, budget=Budget(flops=1e13))
    most, publish, commit = [0], training.publish, checkpoints.commit

    def noted(plain):
        def noting(*arguments, **more):
            plain(*arguments, **more)
            there = size_of(folder / "checkpoints") + size_of(folder / "model")
            most[0] = max(most[0], there)

        return noting

    monkeypatch.setattr(checkpoints, "commit", noted(commit))
    monkeypatch.setattr(training, "publish", noted(publish))
    finish(folder)
    checkpoint, model, needs = predicted(folder)
    real = [size_of(c.path) for c in checkpoints.committed(folder / "checkpoints")]
    print(way, [round(checkpoint / r, 3) for r in real], model / size_of(folder / "model"))
    assert all(checkpoint == pytest.approx(size, rel=0.1) for size in real)
    assert model == pytest.approx(size_of(folder / "model"), rel=0.1)
    # No more than is there at a time in the worst case: the best one may be among the newest.
    assert 0.74 * needs < most[0] < 1.1 * needs


@pytest.mark.slow
def test_what_fits_is_trained_and_what_does_not_is_refused_before_a_step(
    wide_model, tiny_data, tmp_path, capsys
):
    with small_disk(tmp_path / "disk", "90m") as disk:
        folder = disk / "run"
        planned(tmp_path / "run", wide_model, tiny_data, fixed=SHORT, budget=Budget(flops=1e13))
        shutil.copytree(tmp_path / "run", folder)
        assert cli.main(["select", str(folder)]) == 0
        *_, needs = predicted(folder)
        torn = folder / "checkpoints" / "torn-checkpoint-2"
        torn.mkdir(parents=True)
        (torn / "model.safetensors").write_bytes(bytes(2**22))
        fill(disk, leave=int(1.01 * needs) - 2**22 + LEDGER)  # what is torn goes
        capsys.readouterr()
        assert cli.main(["run", str(folder)]) == 0
    with small_disk(tmp_path / "disk", "90m") as disk:
        shutil.copytree(tmp_path / "run", folder)
        assert cli.main(["select", str(folder)]) == 0
        fill(disk, leave=int(0.97 * needs) + LEDGER)
        capsys.readouterr()
        assert cli.main(["run", str(folder)]) == 5
        said = capsys.readouterr().err.partition("error: ")[2]
        assert said.startswith(f"training takes {format_bytes(needs)} more on the disk: 4 checkpoi")
        assert f"and the disk of {folder} has" in said
        assert "of room there; the same command then goes on" in said
        with closing(ledger(folder)) as book:
            assert book.spent(stage="train").flops == 0
        empty(disk)
        assert cli.main(["run", str(folder)]) == 0
        # What is finished asks for nothing more.
        fill(disk, leave=LEDGER)
        assert cli.main(["run", str(folder)]) == 0


@pytest.mark.long
def test_scoring_is_refused_before_a_row_is_scored(wide_model, tiny_data, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "12m") as disk:
        folder = disk / "run"
        filters = {"selection.filters": ["semantic_duplicates"], "selection.scorer": "uniform"}
        plan = planned(
            tmp_path / "run",
            wide_model,
            tiny_data,
            fixed=SHORT | filters,
            budget=Budget(flops=1e13),
        )
        shutil.copytree(tmp_path / "run", folder)
        run = RunFolder(folder)
        from thrifty.data.store import open_store

        pool, shape = open_store(run.pool), read_shape(wide_model)
        needs, _ = disk_space.selection_needs(plan, pool, shape, folder / "none")
        vectors = len(pool) * 2 * shape.hidden_size
        assert vectors < needs < 3 * vectors
        fill(disk, leave=vectors // 2 + LEDGER)
        assert cli.main(["select", str(folder)]) == 5
        said = capsys.readouterr().err
        assert "selecting takes" in said
        assert "scores of 900 rows and a vector of each" in said
        with closing(ledger(folder)) as book:
            assert book.spent().flops == 0
        empty(disk)
        assert cli.main(["select", str(folder)]) == 0
        assert needs == pytest.approx(
            size_of(folder / "scores") + size_of(folder / "selected"), rel=0.5
        )


@pytest.mark.slow
def test_a_pilot_is_refused_before_it_chooses_and_takes_what_was_said(
    wide_model, tiny_data, tmp_path, capsys
):
    fixed = {
        "selection.scorer": "auto",
        "training.eval_steps": "auto",
        "training.save_steps": "auto",
        "training.max_steps": 60,
        "pilot.share": 0.3,
    }
    plan = planned(
        tmp_path / "run", wide_model, tiny_data, fixed=fixed, budget=Budget(flops=1.2e12)
    )
    assert plan.pilot.share
    assert len(plan.pilot.candidates) > 1
    with small_disk(tmp_path / "disk", "400m") as disk:
        folder = shutil.copytree(tmp_path / "run", disk / "run")
        needs, plain = [], disk_space.pilot_needs

        def noted(*arguments):
            needs.append(plain(*arguments))
            return needs[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk_space, "pilot_needs", noted)
            fill(disk, leave=2**21)
            assert cli.main(["select", str(folder)]) == 5
            said = capsys.readouterr().err.partition("error: ")[2]
            assert said.startswith(f"a pilot takes {format_bytes(needs[0][0])} more on the disk: ")
            with closing(ledger(folder)) as book:
                assert book.spent().flops == 0
            empty(disk)
            assert cli.main(["run", str(folder)]) == 0
        took = size_of(folder / "pilot") + size_of(folder / "scores")
        print(needs[0], took)
        assert 0.74 * needs[0][0] < took < 1.1 * needs[0][0]
        rows = len((Path(tiny_data["test"])).read_text().splitlines())
        losses = size_of(folder / "test_losses.npz")
        assert losses < disk_space.testing_needs(rows)[0] < losses + 8192


def test_what_the_test_leaves_is_asked_for(tmp_path):
    with (
        small_disk(tmp_path / "disk", "1m") as disk,
        pytest.raises(DiskFault, match=r"testing takes 15.3 MiB on the disk, and the disk of"),
    ):
        disk_space.require(disk, *disk_space.testing_needs(10**6))


# -- what the disk did --------------------------------------------------------------------------


def test_what_libraries_say_of_a_full_disk_is_understood(tmp_path):
    import sqlite3

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import save_file

    weights = {"weight": torch.zeros(2**20)}

    def journal(path: Path) -> None:
        with closing(sqlite3.connect(path)) as book:
            book.execute("CREATE TABLE t(x)")
            book.executemany("INSERT INTO t VALUES (?)", [("x" * 10_000,)] * 400)
            book.commit()

    writers = {
        "torch": lambda path: torch.save(weights, path),
        "safetensors": lambda path: save_file(weights, path),
        "numpy": lambda path: np.zeros(2**20).tofile(path),
        "npz": lambda path: np.savez(path, x=np.zeros(2**20)),
        "parquet": lambda path: pq.write_table(
            pa.table({"x": np.random.default_rng(0).random(2**20)}), path
        ),
        "text": lambda path: path.write_text("x" * 2**22),
        "sqlite": journal,
    }
    with small_disk(tmp_path / "disk", "1m") as disk:
        for name, write in writers.items():
            with pytest.raises(Exception) as caught:
                write(disk / name)
            assert fault_of(caught.value, disk) == 28, (name, caught.value)
            assert caught.value.__class__ is not DiskFault
            for path in disk.iterdir():
                path.unlink()


def test_other_errors_are_no_fault_of_the_disk(tmp_path):
    for error in (RuntimeError("nothing"), ValueError("no"), FileNotFoundError(2, "no"), OSError()):
        assert fault_of(error, tmp_path) is None
    told = ValueError("the file cannot be read\nhint: look at it")
    told.__cause__ = OSError(5, "Input/output error")
    assert fault_of(told, tmp_path) is None
    lost = RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing")
    assert fault_of(lost, tmp_path) == 5


def test_only_what_was_never_finished_is_pruned(tmp_path):
    kept = ["checkpoints/checkpoint-2/manifest.json", "scores/a/shard-00000.parquet", "plan.yaml"]
    kept += ["pool/manifest.json", "model/model.safetensors", ".lock", "selected/ids.npy"]
    gone = ["checkpoints/checkpoint-4/optimizer.pt", "checkpoints/torn-checkpoint-1/model.bin"]
    gone += ["scores/a/shard-00001.new", ".model.new/model.safetensors", ".plan.yaml.4711"]
    gone += ["online/x.new.npz", "scores/.a.draft/shard-00000.parquet"]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert prune(tmp_path) == len(gone)
    assert [name for name in (*kept, *gone) if (tmp_path / name).exists()] == kept
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.05
    )
