"""Gradients on disk: as exact as their bits, whole or not at all, and of one model and pool."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests.methods.conftest import Tally
from tests.methods.test_scorer_contract import work_of
from thrifty.core.resolve import resolve
from thrifty.costs.flops import train_flops
from thrifty.signals import example_gradients
from thrifty.signals.gradient_records import BITS
from thrifty.signals.gradient_store import GradientStore, faults, pool_identity, store_bytes
from thrifty.signals.models import LoadedModels

D = 300
"""No multiple of eight, so that the last byte of a row of signs is not full."""
MADE_OF = {"model": "a" * 64, "pool": "b" * 64, "seed": 0, "method": "less"}


class Some:
    """Rows with ids from ``first`` on."""

    def __init__(self, first, count):
        self.ids = np.arange(first, first + count)
        self.fingerprints = [int(i).to_bytes(16, "big") for i in self.ids]

    def __len__(self):
        return len(self.ids)


PARTS = [Some(0, 40), Some(40, 40), Some(80, 7)]


def gradients(num=87, dimensions=D):
    """Rows of a few directions and noise, of sizes that differ by a million."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(num, 5)) @ random.normal(size=(5, dimensions))
    rows += random.normal(size=rows.shape)
    return (rows * 10.0 ** random.uniform(-12, -6, (num, 1))).astype(np.float32)


def opened(folder, bits=16, num_rows=87, dimensions=D, **changed):
    return GradientStore.open(folder, dimensions, bits, {**MADE_OF, **changed}, num_rows)


def filled(folder, bits=16, features=None, order=(0, 1, 2)):
    store, features = opened(folder, bits), gradients() if features is None else features
    for part in order:
        add(store, PARTS[part], features[PARTS[part].ids])
    return store


def add(store, rows, features, each=15):
    """All that are not there, some at a time, the last first."""
    if store.holds(rows):
        return
    writing = store.writing(rows)
    for start in reversed(range(0, len(rows), each)):
        some = range(start, min(start + each, len(rows)))
        if not writing.there[list(some)].all():
            writing.add(some, features[list(some)])
    writing.finish()


def kept(store):
    return np.concatenate([x for part in PARTS for _, x in store.features(part)])


def products(store, directions, **options):
    return np.concatenate([store.products(part, directions, **options) for part in PARTS])


def cosines(rows, directions):
    rows, directions = rows.astype(np.float64), directions.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) @ directions.T


@pytest.mark.parametrize("bits", BITS)
def test_a_row_comes_back_as_exactly_as_its_bits_tell(bits, tmp_path):
    before, after = gradients(), kept(filled(tmp_path / "store", bits))
    largest = np.abs(before).max(axis=1, keepdims=True)
    norms = np.linalg.norm(before.astype(np.float64), axis=1)
    if bits == 1:
        np.testing.assert_array_equal(after > 0, before > 0)
        np.testing.assert_allclose(np.linalg.norm(after.astype(np.float64), axis=1), norms, 1e-5)
        return
    step = {16: 2.0**-11, 8: 0.5 / 127}[bits]
    assert (np.abs(after - before) <= largest * step * 1.001).all()
    error = np.linalg.norm((after - before).astype(np.float64), axis=1) / norms
    rounding = 2 * step / 12**0.5 * largest[:, 0] * D**0.5 / norms  # uniform within a step
    assert (error <= 1.2 * rounding).all()
    assert error.max() < {16: 1e-3, 8: 1e-2}[bits]


@pytest.mark.parametrize(("bits", "least", "error"), [(16, 0.99999, 2e-3), (8, 0.999, 0.02)])
def test_cosines_agree_with_those_of_exact_rows(bits, least, error, tmp_path):
    towards = gradients(3)
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    found = products(filled(tmp_path / "store", bits), towards, cosine=True)
    exact = cosines(gradients(), towards)
    assert np.abs(found - exact).max() < error
    assert min(spearmanr(found[:, k], exact[:, k])[0] for k in range(3)) > least
    plain = products(filled(tmp_path / "store", bits), towards)
    lengths = np.linalg.norm(gradients().astype(np.float64), axis=1)[:, None]
    assert np.abs(plain / lengths - exact).max() < error


def test_signs_keep_the_order_of_cosines(tmp_path):
    """The error of one bit falls with the square root of the dimensions."""
    agreement = {}
    for dimensions in (300, 4096):
        features = gradients(87, dimensions)
        store = opened(tmp_path / str(dimensions), 1, dimensions=dimensions)
        for part in PARTS:
            add(store, part, features[part.ids])
        towards = features[:1] / np.linalg.norm(features[:1].astype(np.float64))
        found = products(store, towards.astype(np.float32), cosine=True)
        agreement[dimensions] = spearmanr(found[1:, 0], cosines(features, towards)[1:, 0])[0]
    assert agreement[300] > 0.9
    assert agreement[4096] > 0.98


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_predicted_are_those_written(bits, tmp_path):
    store = filled(tmp_path / "store", bits)
    assert store.num_bytes == store_bytes(87, D, bits) == 87 * (36 + {16: 600, 8: 300, 1: 38}[bits])
    files = [each for each in (tmp_path / "store").iterdir() if each.suffix == ".bin"]
    assert sum(each.stat().st_size for each in files) == store_bytes(87, D, bits)
    assert store.num_rows == 87


@pytest.mark.parametrize("bits", BITS)
def test_neither_the_order_of_shards_nor_the_rows_read_together_matter(bits, tmp_path, monkeypatch):
    towards = gradients(2)
    once = products(filled(tmp_path / "one", bits), towards)
    monkeypatch.setattr("thrifty.signals.gradient_store.CHUNK", 3 * D)
    again = products(filled(tmp_path / "two", bits, order=(2, 0, 1)), towards)
    np.testing.assert_array_equal(once, again)
    for one, two in zip(*(sorted((tmp_path / n).glob("*")) for n in ("one", "two")), strict=True):
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("bits", BITS)
def test_rows_without_a_gradient_and_such_as_are_not_finite(bits, tmp_path):
    features = gradients()
    features[3] = 0
    features[50, 7], features[51, 2], features[52] = np.nan, np.inf, -np.inf
    store = filled(tmp_path / "store", bits, features)
    for cosine in (False, True):
        found = products(store, gradients(2), cosine=cosine)
        assert (found[3] == 0).all()
        assert np.flatnonzero(np.isnan(found).all(axis=1)).tolist() == [50, 51, 52]
        others = np.delete(np.arange(87), [3, 50, 51, 52])
        clean = products(filled(tmp_path / f"clean-{cosine}", bits), gradients(2), cosine=cosine)
        np.testing.assert_array_equal(found[others], clean[others])
    assert store.num_not_finite == 3


@pytest.mark.parametrize(
    ("name", "value"), [("model", "c" * 64), ("pool", "d" * 64), ("seed", 1), ("method", "tracin")]
)
def test_a_store_of_something_else_is_refused(name, value, tmp_path):
    filled(tmp_path / "store")
    with pytest.raises(ValueError, match=rf"of another {name}: .* and not .*\nhint: "):
        opened(tmp_path / "store", **{name: value})
    with pytest.raises(ValueError, match="of another bits: bits 16 and not 8"):
        opened(tmp_path / "store", 8)
    with pytest.raises(ValueError, match="of another dimensions: dimensions 300 and not 301"):
        opened(tmp_path / "store", dimensions=301)
    assert opened(tmp_path / "store").num_rows == 87


def test_bits_that_there_are_not(tmp_path):
    with pytest.raises(ValueError, match="not kept in 4 bits\nhint: 16, 8 or 1"):
        opened(tmp_path / "store", 4)


def test_rows_other_than_those_in_the_file_are_refused(tmp_path):
    store, other = filled(tmp_path / "store"), Some(0, 40)
    other.fingerprints = other.fingerprints[::-1]
    with pytest.raises(ValueError, match="holds other rows than the pool's\nhint: "):
        store.holds(other)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="holds other files and is no store"):
        opened(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "{", "[]", '"store"'])
def test_a_damaged_manifest_is_told(text, tmp_path):
    filled(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text(text)
    with pytest.raises(ValueError, match=r"store.json is damaged(.|\n)*\nhint: delete"):
        opened(tmp_path / "store")


def test_a_cut_file_is_told(tmp_path):
    store = filled(tmp_path / "store")
    file = sorted((tmp_path / "store").glob("*.bin"))[0]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is damaged: it is cut off\nhint: delete it"):
        store.holds(PARTS[0])


@pytest.mark.parametrize("bits", BITS)
def test_a_byte_flipped_anywhere_is_named_before_a_row_is_used(bits, tmp_path):
    """In every field of a record: id, fingerprint, scale, codes and the seal itself."""
    store = filled(tmp_path / "store", bits)
    file = sorted((tmp_path / "store").glob("*.bin"))[1]
    whole, width = file.read_bytes(), store_bytes(1, D, bits)
    assert list(faults(tmp_path / "store")) == []
    for number, at in enumerate((0, 8, 25, 28, width - 9, width - 8, width - 1)):
        data = bytearray(whole)
        data[3 * width + at] ^= 1 << number
        file.write_bytes(data)
        says = f"{str(file)!r} is damaged: row 3 of it is not as it was written"
        with pytest.raises(ValueError, match=re.escape(says) + "\nhint: delete it"):
            products(store, gradients(2))
        assert list(faults(tmp_path / "store")) == [says]
    file.write_bytes(whole)
    assert store.holds(PARTS[1])


def test_a_flipped_byte_of_the_manifest_is_not_another_model(tmp_path):
    filled(tmp_path / "store")
    file = tmp_path / "store" / "store.json"
    file.write_text(file.read_text().replace("aaaa", "aaba", 1))
    with pytest.raises(ValueError, match=r"store\.json is damaged"):
        opened(tmp_path / "store")
    assert [fault.split(" is damaged")[0] for fault in faults(tmp_path / "store")] == [str(file)]


def test_a_store_that_the_disk_has_no_room_for_is_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=store_bytes(86, D, 16)))
    with pytest.raises(ValueError, match="the gradients of 87 rows take"):
        opened(tmp_path / "store")
    assert opened(tmp_path / "store", num_rows=86).num_rows == 0


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.methods import test_gradient_store as t
from thrifty.signals import gradient_store

whole = gradient_store.rename_durably

def killed(aside, path):
    if path.name == "rows-000000000040-40.bin":
        with aside.open("r+b") as file:
            file.truncate(1000)  # as far as it got
        os.kill(os.getpid(), signal.SIGKILL)
    whole(aside, path)

gradient_store.rename_durably = killed
t.filled(Path({folder!r}))
"""


@pytest.mark.skipif(os.name == "nt", reason="has no SIGKILL")
@pytest.mark.long
def test_a_killed_writing_goes_on_at_the_shard(tmp_path, pytestconfig):
    code = KILLED.format(root=str(pytestconfig.rootpath), folder=str(tmp_path / "store"))
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert ended.returncode == -signal.SIGKILL
    store = opened(tmp_path / "store")
    assert [store.holds(part) for part in PARTS] == [True, False, False]
    assert store.num_rows == 40
    first = (tmp_path / "store" / "rows-000000000000-40.bin").stat().st_mtime_ns
    store = filled(tmp_path / "store")
    whole = filled(tmp_path / "whole")
    assert (tmp_path / "store" / "rows-000000000000-40.bin").stat().st_mtime_ns == first
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    np.testing.assert_array_equal(kept(store), kept(whole))


def test_what_a_killed_writing_left_of_a_shard_is_taken_over_where_it_is_whole(tmp_path):
    store, features, (rows, *_) = opened(tmp_path / "store"), gradients(), PARTS
    writing = store.writing(rows)
    writing.add(range(20, 40), features[20:40])
    writing.add([3], features[[3]])
    (left,) = (tmp_path / "store").glob(".rows-*")
    data = bytearray(left.read_bytes())
    width = store_bytes(1, D, 16)
    data[5 * width + 40] ^= 1  # of row 25
    left.write_bytes(data + data[:100])  # and one that was cut off
    again = store.writing(rows)
    assert np.flatnonzero(~again.there).tolist() == [i for i in range(20) if i != 3] + [25]
    assert store.num_rows == 0
    missing = np.flatnonzero(~again.there)
    third = store.writing(rows)  # killed at once
    assert third.there.tolist() == again.there.tolist()
    third.add(missing, features[missing])
    third.finish()
    again.add(missing, features[missing])  # another run, which ends later
    again.finish()
    assert sorted(each.name for each in (tmp_path / "store").iterdir()) == [
        "SHA256SUMS",
        "rows-000000000000-40.bin",
        "store.json",
    ]
    whole = filled(tmp_path / "whole")
    assert store._file(rows).read_bytes() == whole._file(rows).read_bytes()


def test_what_a_pool_is_does_not_depend_on_its_shards(pool, whole_pool, target):
    assert pool_identity(pool) == pool_identity(whole_pool)
    assert pool_identity(pool)[0] != pool_identity(target)[0]
    assert pool_identity(pool)[1] == sum(len(shard) for shard in pool.shards())


# -- scorers that keep what they computed ----------------------------------------------------------

FEW = {"max_warmup_rows": 20, "epochs": 2, "rank": 2, "dimensions": 512, "max_target_rows": 5}


def scored(scorer, pool, targets, models, shards=None):
    """Scores [rows, targets], and what preparing and scoring took."""
    preparing, scoring = Tally(), Tally()
    state = scorer.prepare(pool, targets, models, preparing)
    order = range(pool.num_shards) if shards is None else shards
    found = {i: scorer.score(pool.shard(i), state, scoring) for i in order}
    return np.concatenate([found[i] for i in sorted(found)]), preparing.cost, scoring.cost


def keeping(name, folder, **options):
    return resolve("scorer", {name: {**FEW, "store": str(folder), **options}})


@pytest.fixture(scope="module")
def plain(pool, target, models):
    """name -> scores and costs without a store."""
    from functools import cache

    @cache
    def once(name):
        return scored(resolve("scorer", {name: FEW}), pool, {"sums": target.shard(0)}, models)

    return once


@pytest.mark.parametrize(
    ("name", "bits", "least"),  # a bit of each of 512 numbers: measured .83 and .87
    [
        ("less", 16, 0.9999),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("less", 8, 0.999),
                ("less", 1, 0.8),
                ("tracin", 16, 0.9999),
                ("tracin", 8, 0.999),
                ("tracin", 1, 0.8),
            )
        ),
    ],
)
@pytest.mark.long
def test_scores_from_a_store_agree_with_those_without(
    name, bits, least, plain, pool, target, models, tmp_path
):
    targets = {"sums": target.shard(0)}
    found, *costs = scored(keeping(name, tmp_path, bits=bits), pool, targets, models)
    exact, *costs_without = plain(name)
    assert costs == costs_without
    assert spearmanr(found[:, 0], exact[:, 0])[0] > least
    if bits == 16:
        np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    folders = [tmp_path / f"checkpoint-{number}" for number in range(2)]
    written = sum(each.stat().st_size for f in folders for each in f.glob("*.bin"))
    assert written == 2 * store_bytes(len(exact), 512, bits)


@pytest.mark.parametrize("name", ["less", pytest.param("tracin", marks=pytest.mark.slow)])
@pytest.mark.long
def test_another_target_takes_no_gradient_of_the_pool(
    name, plain, pool, whole_pool, target, models, tmp_path
):
    """Nor the warm-up: only the new target's own gradients."""
    one, two = target.shard(0), {"sums": target.shard(0), "pool": pool.shard(1)}
    first, *_ = scored(keeping(name, tmp_path), pool, {"sums": one}, models)
    found, preparing, scoring = scored(keeping(name, tmp_path), pool, two, models, (3, 1, 0, 2))
    np.testing.assert_array_equal(found[:, 0], first[:, 0])
    assert scoring.flops == 0
    from thrifty.signals.gradient_store import GradientStore

    own = keeping(name, tmp_path / "own")
    _, all_of_it, _ = scored(own, pool, two, models)
    _, for_one, _ = scored(keeping(name, tmp_path / "own2"), pool, {"sums": one}, models)
    warm_up_and_one = for_one.flops
    assert 0 < preparing.flops < all_of_it.flops
    work = work_of(pool, target, models)
    predicted = keeping(name, tmp_path).cost(work).flops
    _, again, _ = scored(keeping(name, tmp_path), pool, {"sums": one}, models)
    assert predicted == pytest.approx(again.flops, rel=0.1)
    assert warm_up_and_one > 2 * again.flops
    assert resolve("scorer", {name: FEW}).cost(work).flops > 5 * predicted
    assert GradientStore(tmp_path / "checkpoint-0", 512, 16).num_rows == len(found)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, "another seed: seed 0 and not 1"),
        ({"rank": 4}, "another rank: rank 2 and not 4"),
        ({"layers": 1}, "another layers: layers 0 and not 1"),
        ({"bits": 8}, "another bits: bits 16 and not 8"),
        ({"dimensions": 500}, "another dimensions: dimensions 512 and not 500"),
    ],
)
def test_other_settings_than_a_stores_are_refused_before_any_flop(
    changed, says, pool, target, models, tmp_path
):
    targets, tally = {"sums": target.shard(0)}, Tally()
    keeping("less", tmp_path).prepare(pool, targets, models, Tally())
    with pytest.raises(ValueError, match=rf"{says}\nhint: "):
        keeping("less", tmp_path, **changed).prepare(pool, targets, models, tally)
    with pytest.raises(ValueError, match="another direction: direction Adam's and not gradient"):
        keeping("tracin", tmp_path).prepare(pool, targets, models, tally)
    assert tally.cost.flops == 0


def test_another_model_or_pool_than_a_stores_is_refused(pool, target, models, tiny_model, tmp_path):
    targets = {"sums": target.shard(0)}
    keeping("less", tmp_path).prepare(pool, targets, models, Tally())
    with pytest.raises(ValueError, match=r"another pool: pool [0-9a-f]{12}... and not "):
        keeping("less", tmp_path).prepare(target, targets, models, Tally())
    other = LoadedModels(tiny_model, "float32")
    with torch.no_grad():
        next(other.base().parameters())[0, 0] += 1
    with pytest.raises(ValueError, match=r"another model: model [0-9a-f]{12}... and not "):
        keeping("less", tmp_path).prepare(pool, targets, other, Tally())


@pytest.mark.long
def test_a_scoring_that_was_stopped_goes_on_at_the_shard(plain, pool, target, models, tmp_path):
    targets = {"sums": target.shard(0)}
    scored(keeping("less", tmp_path), pool, targets, models, (2, 0))
    found, _, scoring = scored(keeping("less", tmp_path), pool, targets, models)
    whole, *_ = scored(keeping("less", tmp_path / "whole"), pool, targets, models)
    np.testing.assert_array_equal(found, whole)
    _, _, all_of_it = plain("less")
    assert 0 < scoring.flops < 0.7 * all_of_it.flops


@pytest.fixture(scope="module")
def warmed(pool, target, models, tmp_path_factory):
    """A store that holds the warm-up alone."""
    folder = tmp_path_factory.mktemp("warmed") / "store"
    keeping("less", folder).prepare(pool, {"sums": target.shard(0)}, models, Tally())
    return folder


class Stopped(Exception):
    """A meter's, in the midst of a shard."""


class Until:
    """A meter that stops at so many ticks."""

    def __init__(self, ticks):
        self.left, self.cost = ticks, Tally()

    def tick(self, cost, *, steps=1):
        if not self.left:
            raise Stopped
        self.left -= 1
        self.cost.tick(cost)


def test_a_scoring_that_was_stopped_within_a_shard_goes_on_at_the_batch(
    warmed, pool, target, models, tmp_path, monkeypatch
):
    for name in ("store", "whole"):
        shutil.copytree(warmed, tmp_path / name)
    monkeypatch.setattr(example_gradients, "BATCH_TOKENS", 800)  # several batches a shard
    targets, scorer = {"sums": target.shard(0)}, keeping("less", tmp_path / "store")
    other = keeping("less", tmp_path / "whole")
    whole, _, all_of_it = scored(other, pool, targets, models, (0,))
    state, stopped = scorer.prepare(pool, targets, models, Tally()), Until(2)
    with pytest.raises(Stopped):
        scorer.score(pool.shard(0), state, stopped)
    found, _, rest = scored(scorer, pool, targets, models, (0,))
    np.testing.assert_array_equal(found, whole)
    assert stopped.cost.cost.flops > 0
    assert rest.flops + stopped.cost.cost.flops == pytest.approx(all_of_it.flops, rel=1e-12)
    assert not list(tmp_path.glob("*/checkpoint-*/.rows-*"))


def test_a_flipped_byte_of_a_store_stops_a_scoring_before_a_row_is_scored(
    warmed, pool, target, models, tmp_path
):
    folder = shutil.copytree(warmed, tmp_path / "store")
    targets, scorer = {"sums": target.shard(0)}, keeping("less", folder)
    scored(scorer, pool, targets, models, (0,))
    files = [each for each in sorted(folder.rglob("*")) if each.is_file()]
    assert [each.name for each in files[:3]] == [
        "SHA256SUMS",
        "adapter.safetensors",
        "rows-000000000000-40.bin",
    ]
    target_alone = 2 * FEW["max_target_rows"] * train_flops(models.shape, 1, 128)

    def use(tally):
        state = scorer.prepare(pool, targets, models, tally)
        scorer.score(pool.shard(0), state, tally)

    for file in files:
        if file.name == "SHA256SUMS":
            continue
        data, tally = bytearray(file.read_bytes()), Tally()
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{file.name}'? is damaged"):
            use(tally)
        assert tally.cost.flops < target_alone  # which is not kept
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


def test_gradients_whose_warm_up_is_gone_are_refused(warmed, pool, target, models, tmp_path):
    folder = shutil.copytree(warmed, tmp_path / "store")
    targets, scorer = {"sums": target.shard(0)}, keeping("less", folder)
    (folder / "checkpoint-1" / ".rows-000000000000-40.bin.0123").touch()
    (folder / "checkpoint-1" / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match="a warm-up that is no longer there\nhint: delete it"):
        scorer.prepare(pool, targets, models, Tally())


def test_bits_that_a_scorer_cannot_keep():
    with pytest.raises(ValueError, match="not kept in 4 bits"):
        resolve("scorer", {"less": {"bits": 4}})
