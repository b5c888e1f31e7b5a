"""Samples that were recorded, for tests that have them beside the project."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.sampling import Asked, Draw, Means, Offer, Sample

MEANS = Means(offers=(Offer(model="m"),))


def recorded(name: str) -> list[dict[str, Any]]:
    beside = Path(__file__).resolve().parents[3] / "shared" / "traces"
    folder = Path(os.environ.get("THRIFTY_SHARED_TRACES", beside)) / "samples"
    path = folder / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip("no recorded samples on this machine")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def replayed(
    policy: DecodingPolicy, rows: list[dict[str, Any]], orders: int = 10
) -> tuple[float, float]:
    """Accuracy and mean samples over as many orders of each question's samples."""
    right = drawn = 0.0
    for seed in range(orders):
        rng = random.Random(seed)
        for row in rows:
            pairs = list(zip(row["answers"], row["correct"], strict=True))
            rng.shuffle(pairs)
            correct = {str(answer): mark for answer, mark in pairs}
            asked = Asked(str(row["id"]))
            while isinstance(action := policy.decide(asked, MEANS), Draw):
                start = len(asked.samples)
                for answer, _ in pairs[start : start + action.count]:
                    asked.add(Sample(model="m", answer=None if answer is None else str(answer)))
            right += correct[action.answer] if action.answer is not None else 0.0
            drawn += len(asked.samples)
    return right / orders / len(rows), drawn / orders / len(rows)
