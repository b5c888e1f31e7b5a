"""What cheaper ways to score by gradients keep of exact LESS's gain, and what they take.

    OMP_NUM_THREADS=1 python bench/gradient_gains.py SHARED/data [--rows 2000] [--share 0.1]
        [--seeds 3] [--home FOLDER] [--only "less,cascade of a smaller model"]

Trainee: stories260K. Pool: --rows of the mixed pool, drawn at random; targets: the dev rows of
mathematics and general questions. Smaller selector: about 49,000 parameters, a fifth, with a
tokenizer of its own, pretrained on the text folders by ``thrifty.pretrain``. Each way scores the
pool once, with a warm-up on a twentieth of it, and the picker ``balanced`` keeps --share of its
tokens. The trainee is trained on what was kept, all weights, three epochs at 1e-3, once a seed; so
is a uniform choice.

    gain = uniform's loss on the targets' test rows less the way's, nats a token, by seed

What scoring takes is in FLOPs of one epoch of full training of the trainee on the pool, its warm-up
and the targets' rows included: predicted by ``cost`` and measured by the meter. Gains are of the
choice alone: nothing is taken off for what the scoring took.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from closed_loop_cells import passages
from lds import Tally
from material import heading
from mix import TARGETS, write_targets
from thrifty import display
from thrifty.core.contracts import Candidates, Work
from thrifty.core.resolve import method_class, resolve
from thrifty.costs.flops import train_flops
from thrifty.costs.hardware import load_device
from thrifty.data.pool import read_rows
from thrifty.data.store import Store, build_store, open_store
from thrifty.data.tokens import load_tokenizer, tokenizer_fingerprint
from thrifty.pretrain import pretrain
from thrifty.signals.forward import example_losses
from thrifty.signals.models import LoadedModels
from thrifty.signals.proxy_run import proxy_run

MAX_LENGTH, EPOCHS, LEARNING_RATE, TEST_ROWS = 256, 3, 1e-3, 150
UNIFORM, EXACT, SMALLER = "uniform", "less", "SMALLER"
ONE = {"epochs": 1}
WAYS: dict[str, Any] = {
    UNIFORM: "uniform",
    EXACT: "less",
    "less, 1 checkpoint": {"less": ONE},
    "less, upper half, 1 checkpoint": {"less": ONE | {"layers": 2}},
    "less of a smaller model": {"less": {"model": SMALLER}},
    "less of a smaller model, upper half": {"less": {"model": SMALLER, "layers": 1}},
    "less of a smaller model, upper half, 1 checkpoint": {
        "less": ONE | {"model": SMALLER, "layers": 1}
    },
    "cascade": "cascade",
    "cascade of a smaller model": {"cascade": {"model": SMALLER}},
    "cascade of a smaller model, upper half, 1 checkpoint": {
        "cascade": ONE | {"model": SMALLER, "layers": 1}
    },
    "embedding of a smaller model": {"embedding": {"model": SMALLER}},
    "embedding": "embedding",
    "dsir by word": {"dsir": {"by": "word"}},
    "bm25": "bm25",
}


class Job:
    """The trainee, the pool, the targets and what the pool takes to train on."""

    def __init__(self, data: Path, home: Path, num_rows: int) -> None:
        self.home = home
        folder = data / "stories260K-hf"
        self.models = LoadedModels(folder, "float32")
        self.smaller = home / "smaller"
        pretrain(
            passages(data, 8000),
            self.smaller,
            vocab_size=512,
            hidden_size=32,
            num_layers=2,
            sequence_length=MAX_LENGTH,
            batch_size=16,
            steps=400,
            show_progress=False,
        )
        table = pq.read_table(data / "mix" / "pool.parquet", columns=["prompt", "response"])
        drawn = np.random.default_rng(0).permutation(table.num_rows)[:num_rows]
        pq.write_table(table.take(np.sort(drawn)), home / "pool.parquet")
        write_targets(data, home)
        self.pool = self._store("pool")
        self.targets = {t: self._store(f"{t}-dev") for t in TARGETS}
        self.tests = {t: self._store(f"{t}-test") for t in TARGETS}
        self.rows = [each for shard in self.pool.shards() for each in shard.tokens]
        shards = list(self.pool.shards())
        self.ids = np.concatenate([shard.ids for shard in shards])
        self.num_tokens = np.concatenate([shard.num_tokens for shard in shards]).astype(np.int64)
        self.prints = np.array(
            [np.void(each) for shard in shards for each in shard.fingerprints], dtype="V16"
        )
        self.epoch = sum(train_flops(self.models.shape, 1, int(n)) for n in self.num_tokens)

    def _store(self, name: str) -> Store:
        model = str(self.models.folder)
        tokenizer = load_tokenizer(model)
        build_store(
            read_rows([str(self.home / f"{name}.parquet")]),
            self.home / name,
            tokenizer,
            MAX_LENGTH,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )
        return open_store(self.home / name)

    def scored(self, name: str) -> tuple[NDArray[np.float32], float, float]:
        """[rows, targets], and FLOPs in epochs: predicted and measured."""
        scorer = resolve("scorer", self._spec(name))
        tally = Tally()
        shown = {t: each.shard(0) for t, each in self.targets.items()}
        stats = {t: each.manifest.stats for t, each in self.targets.items()}
        given = shown if scorer.needs_target else {}
        state = scorer.prepare(self.pool, given, self.models, tally)
        found = [scorer.score(shard, state, tally) for shard in self.pool.shards()]
        work = Work(
            pool=self.pool.manifest.stats,
            targets=stats if scorer.needs_target else {},
            shape=self.models.shape,
            device=load_device("h100"),
            max_length=MAX_LENGTH,
        )
        predicted = scorer.cost(work).flops
        return np.concatenate(found), predicted / self.epoch, tally.cost.flops / self.epoch

    def _spec(self, name: str) -> Any:
        """With a warm-up on a twentieth of the pool, where there is one."""
        spec = WAYS[name] if isinstance(WAYS[name], dict) else {WAYS[name]: {}}
        ((method, options),) = spec.items()
        options = {
            option: str(self.smaller) if value == SMALLER else value
            for option, value in options.items()
        }
        known = {field.name for field in dataclasses.fields(method_class("scorer", method))}
        if "max_warmup_rows" in known:
            options["max_warmup_rows"] = max(1, len(self.ids) // 20)
        return {method: options}

    def chosen(self, scores: NDArray[np.float32], share: float, seed: int) -> NDArray[np.int64]:
        """Ids, of which --share of the tokens are."""
        names = TARGETS if scores.shape[1] > 1 else ("all",)
        candidates = Candidates(
            ids=self.ids,
            scores=scores,
            num_tokens=self.num_tokens,
            fingerprints=self.prints,
            targets=names,
            weights=(1.0,) * len(names),
        )
        picker = resolve("picker", "balanced" if scores.shape[1] > 1 else "top_k")
        ids: NDArray[np.int64] = picker.pick(candidates, share * self.num_tokens.sum(), seed).ids
        return ids

    def trained_on(self, ids: NDArray[np.int64], seed: int) -> float:
        """The targets' mean loss afterwards."""
        places = np.searchsorted(self.ids, ids)
        model = proxy_run(
            self.models.base(),
            self.models.shape,
            [self.rows[place] for place in places],
            Tally(),
            epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            seed=seed,
        )
        losses = []
        for test in self.tests.values():
            tokens = test.shard(0).tokens[:TEST_ROWS]
            losses.append(example_losses(model, self.models.shape, tokens, Tally()).objective)
        return statistics.fmean(losses)


def with_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if values[1:] else float("nan")
    return f"{statistics.fmean(values):+.3f} ± {error:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--only", default=";".join(WAYS), metavar="NAME;...")
    options = parser.parse_args()
    display.quiet_libraries()
    home = options.home or Path(tempfile.mkdtemp(prefix="thrifty-gains-"))
    home.mkdir(parents=True, exist_ok=True)
    job = Job(options.data, home, options.rows)
    names = dict.fromkeys([UNIFORM, EXACT, *options.only.split(";")])
    lines, losses = [], {}
    for name in names:
        scores, predicted, measured = job.scored(name)
        kept = [
            job.chosen(_any(scores, seed) if name == UNIFORM else scores, options.share, seed)
            for seed in range(options.seeds)
        ]
        losses[name] = [job.trained_on(ids, seed) for seed, ids in enumerate(kept)]
        gains = [u - own for u, own in zip(losses[UNIFORM], losses[name], strict=True)]
        exact = [u - own for u, own in zip(losses[UNIFORM], losses.get(EXACT, []), strict=False)]
        share = f"{statistics.fmean(gains) / statistics.fmean(exact):.0%}" if exact else ""
        off = f"{predicted / measured - 1:+.1%}" if measured else ""
        loss = f"{statistics.fmean(losses[name]):.3f}"
        lines.append(
            (name, f"{predicted:.3f}", f"{measured:.3f}", off, loss, with_error(gains), share)
        )
        print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    title = f"Gains of {options.share:.0%} of {options.rows:,} rows, {options.seeds} seeds; before "
    print(heading(title + f"{job.trained_on(job.ids[:0], 0):.3f} nats a token"))
    headers = ("way", "predicted", "measured", "off", "test loss", "gain", "of less's")
    print(display.table(headers, lines, right="lrrrrrr"))
    return 0


def _any(scores: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random(scores.shape).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
