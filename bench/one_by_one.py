"""Recorded questions one by one, as the proxy has them, beside one budget for all and fixed votes.

    OMP_NUM_THREADS=1 python bench/one_by_one.py TRACES [--samples 3] [--orders 3] [FILE ...]

FILE: of TRACES/samples, without .jsonl.gz. Eight samples of a question at the most, as `serve` has
it; the questions come in an order of chance, each knows of those before it alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from decoding import recordings
from material import heading
from thrifty.core.sampling import Asked, Means
from thrifty.decoding.marginal import Marginal
from thrifty.drawing import Drawing
from thrifty.replay import Recording, _decks, _rightness, interval, means_of, replay, votes
from thrifty.serving.one_by_one import OneByOne

FILES = ("codex001_addsub", "mot_gpt35_date_cot2_t=0.8", "mot_gpt35_date_cot1_40")
MOST = 8


def streamed(
    recording: Recording, means: Means, mean: float, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """[questions]: whether each is right, and its samples."""
    ids, flow = list(recording.questions), OneByOne(mean)
    decks = _decks(recording, order, means)
    right, drawn = np.zeros(len(ids)), np.zeros(len(ids))
    for place in np.random.default_rng(order).permutation(len(ids)):
        asked = Asked(ids[place])
        now = replace(means, left=1e9, more_to_come=True, price=flow.price("a"), past=flow.past)
        drawing = Drawing(Marginal(), [asked], now)
        while batch := drawing.next(1):
            for _, draw in batch:
                deck = decks[asked.id][draw.model]
                came, deck[: draw.count] = deck[: draw.count], []
                drawing.came_back(asked, came, float(len(came)))
        flow.note("a", asked)
        right[place] = _rightness(recording.questions[asked.id], drawing.finished[asked.id])
        drawn[place] = asked.num_drawn
    return right, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("files", nargs="*", default=list(FILES))
    parser.add_argument("--samples", type=float, default=3.0)
    parser.add_argument("--orders", type=int, default=3)
    given = parser.parse_args()
    print(heading("Questions one by one"))
    fixed = round(given.samples)
    for name, recording in recordings(given.traces, given.files):
        means = replace(means_of(recording), max_samples=MOST)
        left = given.samples * len(recording.questions)
        orders = range(given.orders)
        one = [streamed(recording, means, given.samples, order) for order in orders]
        right = np.mean([each for each, _ in one], axis=0)
        pooled = replay(Marginal(), recording, replace(means, left=left), orders=list(orders))
        model = means.offers[0].model
        voted, five = (
            votes(recording, model, n, list(orders)).mean(axis=0) for n in (fixed, fixed + 2)
        )
        low, high = interval(right - voted)
        print(
            f"{name:<28} one by one {right.mean():.4f} @ {np.mean([n for _, n in one]):.2f}, "
            f"pooled {pooled.correct.mean():.4f}, a vote of {fixed} {voted.mean():.4f} (ahead by "
            f"{(right - voted).mean():+.4f} [{low:+.3f}, {high:+.3f}]), "
            f"of {fixed + 2} {five.mean():.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
