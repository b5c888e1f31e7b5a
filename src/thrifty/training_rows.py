"""From the chosen rows to what training reads: the rows with their replay, what the online method
has to know of them, and packed sequences in the order that it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core import contracts
from thrifty.core.arrays import load_arrays, save_arrays
from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Chosen, OnlineMethod, Tokens
from thrifty.core.ledger import Stage
from thrifty.core.ordering import best_first, fill
from thrifty.core.plan import Training
from thrifty.core.resolve import name_of, resolve
from thrifty.data.packing import PackedDataset
from thrifty.data.pairs import PairedDataset
from thrifty.data.store import Store, open_store
from thrifty.data.two_lengths import TwoLengths
from thrifty.group_quotas import labels_of
from thrifty.held import PACKING_FILL
from thrifty.memory_plan import dtype_of
from thrifty.open_run import Branch, Work
from thrifty.pair_costs import reference_cost
from thrifty.pair_evaluation import answers_flops
from thrifty.predictions import setting_of
from thrifty.rounds import Rounds
from thrifty.signals.models import local_device
from thrifty.signals.peak_memory import peak_noted

BEFORE_TRAINING = -1
"""The step of what is charged before the first: it is not lost where training starts over."""


def chosen_rows(work: Work, branch: Branch) -> Chosen:
    """In the order in which they were picked, then those that are replayed."""
    settings, folder = branch.plan.training, work.run.selected(branch.folder)
    ids = np.load(folder / "ids.npy", allow_pickle=False)
    examples: list[Tokens] = list(work.pool.take(ids).tokens)
    examples += _replay(work.run.replay, settings, examples)
    scores = np.full(len(examples), np.nan, dtype=np.float32)
    scores[: len(ids)] = _scores(folder)
    lengths = np.array([len(e.input_ids) for e in examples], dtype=np.int64)
    return Chosen(
        tokens=examples,
        num_tokens=lengths,
        scores=scores,
        groups=_groups(work, branch.plan.selection.groups, ids, len(examples)),
    )


def leg_of(
    pool: Store, replay: Path, settings: Training, ids: NDArray[np.int64], number: int
) -> Chosen:
    """Rows of the pool that are chosen on the way, then others of those that are replayed."""
    examples: list[Tokens] = list(pool.take(ids).tokens)
    examples += _replay(replay, settings, examples, number)
    return Chosen(
        tokens=examples,
        num_tokens=np.array([len(e.input_ids) for e in examples], dtype=np.int64),
        scores=np.full(len(examples), np.nan, dtype=np.float32),
    )


def _groups(work: Work, column: str, ids: NDArray[np.int64], size: int) -> NDArray[np.int64] | None:
    """What is replayed is a group of its own."""
    if not column:
        return None
    known = np.concatenate([shard.ids for shard in work.pool.shards()])
    labels = labels_of(work.pool, column)[np.searchsorted(known, ids)]
    found = np.full(size, -1, dtype=np.int64)
    found[: len(ids)] = np.unique(labels, return_inverse=True)[1]
    return found


def _scores(folder: Path) -> NDArray[np.float32]:
    from datasets import load_from_disk

    rows: Any = load_from_disk(str(folder / "data"))
    names = [name for name in rows.column_names if name.startswith("score_")]
    return np.mean([np.asarray(rows[name], dtype=np.float32) for name in names], axis=0)


def _replay(
    folder: Path, settings: Training, examples: Sequence[Tokens], number: int = 0
) -> list[Tokens]:
    """Rows of the replay sources, drawn uniformly for the leg ``number``, that make up their share
    of a pass of which the rest are ``examples``."""
    if not settings.replay_share:
        return []
    store, tokens = open_store(folder), sum(len(example.input_ids) for example in examples)
    ids = np.concatenate([shard.ids for shard in store.shards()])
    lengths = np.concatenate([shard.num_tokens for shard in store.shards()])
    order = best_first(np.zeros(len(ids)), ids, settings.seed + number)
    share = settings.replay_share
    chosen = order[fill(lengths[order], tokens * share / (1 - share))]
    return list(store.take(ids[chosen]).tokens)


def rounds_of(
    work: Work, branch: Branch, chosen: Chosen, stage: Stage, mark: str, planned: Cost
) -> Rounds:
    """``planned``: what training was predicted to take, nothing where that is not known. Charges
    what the online method prepares, once."""
    settings = branch.plan.training
    row_tokens = settings.max_length + _short(settings)
    steps = settings.max_steps * row_tokens * settings.step_sequences
    method: OnlineMethod = resolve("online", settings.online)
    return Rounds(
        method,
        chosen,
        _prepared(work, branch, chosen, stage, mark),
        num_tokens=min(planned.tokens or steps, steps) * PACKING_FILL * method.larger,
        seed=settings.seed,
    )


def _prepared(
    work: Work, branch: Branch, chosen: Chosen, stage: Stage, mark: str
) -> Mapping[str, NDArray[Any]]:
    method: OnlineMethod = resolve("online", branch.plan.training.online)
    predicted = predicted_preparation(work, branch, chosen, method)
    if not predicted.flops:
        return method.prepare(chosen, work.rows("signal"), work.models, _Free())
    file = work.run.online(branch.folder) / f"{name_of(method)}-{mark[:12]}.npz"
    if not file.is_file():
        work.say(f"  {name_of(method)} looks at {len(chosen):,} rows before training ...")
        with (
            stage.spending("online", predicted, step=BEFORE_TRAINING) as lease,
            peak_noted(lease, local_device()),
        ):
            found = method.prepare(chosen, work.rows("signal"), work.models, lease)
        save_arrays(file, found)
    return load_arrays(file)


def predicted_preparation(work: Work, branch: Branch, chosen: Chosen, method: OnlineMethod) -> Cost:
    """Of what an online method does before the first step."""
    cost = method.cost(_asked(work, branch, chosen))
    return work.ledger.rates.of(cost + work.predicted(branch.plan).load) if cost.flops else cost


def predicted_renewal(work: Work, branch: Branch, chosen: Chosen, method: OnlineMethod) -> Cost:
    """Of an online method's look at the model in the midst of training."""
    asked = _asked(work, branch, chosen)
    asked = replace(asked, shape=asked.shape.under(asked.adapter))
    return work.ledger.rates.of(method.renewal_cost(asked))


def _asked(work: Work, branch: Branch, chosen: Chosen) -> contracts.Work:
    return asked_of(work, branch, _stats_of(chosen))


def asked_of(work: Work, branch: Branch, pool: PoolStats) -> contracts.Work:
    """Rows like ``pool``, beside the targets, on the model as the branch trains it."""
    stores = work.stores("signal").items()
    setting = setting_of(branch.plan.training, work.shape, work.device)
    return contracts.Work(
        pool=pool,
        targets={name: store.manifest.stats for name, store in stores},
        shape=work.shape,
        device=work.device,
        dtype=dtype_of(branch.plan.training.memory),
        max_length=branch.plan.training.max_length,
        adapter=setting.adapter,
        token_ratio=work.token_ratio,
    )


def _stats_of(chosen: Chosen) -> PoolStats:
    lengths = chosen.num_tokens
    return PoolStats(
        num_examples=len(chosen),
        num_tokens=int(lengths.sum()),
        max_tokens=int(lengths.max()),
        num_squared_tokens=int((lengths**2).sum()),
    )


class _Free:
    """The meter of what computes nothing."""

    def tick(self, cost: Cost, *, steps: int = 0) -> None:
        assert not cost.flops, "this method declares no cost"


def predicted_reference(work: Work, branch: Branch, chosen: Chosen) -> Cost:
    """Of asking the reference once for all pairs chosen, its FLOPs exact; none where it is asked at
    every step, and where rows are no pairs."""
    settings = branch.plan.training
    if settings.preference is None or not settings.preference.precompute_ref_log_probs:
        return Cost()
    setting = setting_of(settings, work.shape, work.device)
    cost = reference_cost(work.shape, _stats_of(chosen), setting, work.device)
    flops = answers_flops(work.shape, chosen.tokens, settings.micro_batch_tokens)
    return work.ledger.rates.of(replace(cost, flops=flops))


def _short(settings: Training) -> int:
    """Tokens of the pack that a row has beside its own; 0: it has none."""
    short: int = resolve("trained", settings.memory.trained).short
    return short


def read_by_training(
    settings: Training, rounds: Rounds
) -> PackedDataset | PairedDataset | TwoLengths:
    """Sequences, or pairs of them, for every step that the plan allows, and for a step more, so
    that the trainer does not come to an end of them."""
    num_items = (settings.max_steps + 1) * settings.step_sequences * rounds.method.larger
    if settings.preference is not None:
        pairs: Any = rounds.chosen.tokens
        return PairedDataset(
            pairs,
            settings.per_device_train_batch_size,
            num_items=num_items,
            order=rounds.order,
            exact=rounds.method.keeps_order,
        )
    if short := _short(settings):
        return TwoLengths(
            rounds.chosen.tokens,
            short,
            settings.max_length,
            num_items=num_items,
            order=rounds.order,
            exact=rounds.method.keeps_order,
        )
    return PackedDataset(
        rounds.chosen.tokens,
        settings.max_length,
        num_items=num_items,
        order=rounds.order,
        exact=rounds.method.keeps_order,
        tells_rows=rounds.tells_rows,
    )


def note_savings(stage: Stage, rounds: Rounds, step: Cost, choosing_flops: float) -> None:
    """What the online method cost and saved, in the ledger. ``step``: of the optimizer, which takes
    ``choosing_flops`` more than a plain one."""
    spent = stage.ledger.spent(account=stage.account, activity="online")
    trained = stage.ledger.spent(account=stage.account, activity="train")
    chosen = choosing_flops * trained.tokens / step.tokens
    saved = rounds.left_out * step.flops / step.tokens
    detail = {
        "extra_flops": spent.flops,
        "extra_seconds": spent.seconds,
        "choosing_flops": chosen,
        "saved_flops": saved,
        "saved_tokens": rounds.left_out,
        "rounds": rounds.num_rounds,
    }
    stage.detail["online"] = detail
    reason = (
        f"{rounds.num_rounds:,} rounds; {spent.flops:.3g} FLOPs beside the steps, {chosen:.3g} in "
        f"them; {rounds.left_out:,} tokens of rows passed over, {saved:.3g} FLOPs saved"
    )
    stage.decide("what to train on next", name_of(rounds.method), reason, detail=detail)
