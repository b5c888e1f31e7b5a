"""A run's evaluations beside the base model's: which floors each breaks, and what follows.

The base is the model before the first step; what was measured of it is kept beside the checkpoints,
so that a run that resumes compares with the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thrifty import ranks
from thrifty.core.ledger import Stage
from thrifty.evaluation import Measured
from thrifty.floors import Standing, hopeless
from thrifty.training_job import TrainingJob
from thrifty.yardstick import GUARD, NATS, in_nats

_BASE = "base_losses.npz"


class Guarding:
    """Of one training run. ``compare`` is told of every evaluation, before it is written down."""

    def __init__(self, job: TrainingJob, stage: Stage, *, resumed: bool) -> None:
        self._job, self._stage = job, stage
        self._file = job.checkpoints / f"{job.mark[:12]}-{_BASE}"
        self._base: Measured | None = None
        if resumed and job.floors:
            self._base = self._known()
        self.standings: list[Standing] = []
        """At the last evaluation."""

    def _known(self) -> Measured:
        try:
            return Measured.load(self._file, self._job.weights)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"what was measured of the base model is not in {self._file}: {error}\n"
                f"hint: put it back, or delete {self._job.checkpoints} to train anew"
            ) from None

    @property
    def broken(self) -> list[str]:
        """What the last evaluation says of each floor that it breaks."""
        return [str(standing) for standing in self.standings if standing.broken]

    def compare(self, step: int, found: Measured) -> Mapping[str, Any]:
        """What the ledger keeps of an evaluation beside its losses."""
        self.standings = []
        if self._job.floors and step == 0:
            self._base = found
            if ranks.rank() == 0:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                found.save(self._file)
        elif self._job.floors:
            assert self._base is not None, "the base is measured before the first step"
            self.standings = self._job.floors.standings(found, self._base)
        return {
            name: values
            for name, values in (
                ("nats", _named(found, NATS)),
                ("loss", in_nats(found).objective if in_nats(found) is not found else None),
                (GUARD, _named(found, GUARD).get("")),
                ("floors", [standing.to_dict() for standing in self.standings]),
            )
            if values not in (None, {}, [])
        }

    def is_best(self, loss: float) -> bool:
        """Whether the last evaluation's model is the one to keep, so far."""
        if self.broken:
            return False
        earlier = [row for row in self._evaluations()[:-1] if row["step"] > 0]
        allowed = [
            row["objective"]
            for row in earlier
            if not any(standing["broken"] for standing in row["beside"].get("floors", ()))
        ]
        return not allowed or loss < min(allowed)

    def hopeless(self, to_come: float) -> str | None:
        """Why there is no use in training on for so many evaluations, where a floor says so."""
        rows = [row["beside"].get("floors", ()) for row in self._evaluations() if row["step"] > 0]
        floors = [[Standing.from_dict(each) for each in standings] for standings in rows]
        return hopeless(floors, to_come)

    def _evaluations(self) -> list[dict[str, Any]]:
        rows = self._stage.ledger.evaluations(account=self._stage.account)
        return [row for row in rows if row["stage_id"] == self._stage.id]


def _named(found: Measured, prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): losses.objective
        for name, losses in found.beside.items()
        if name.startswith(prefix)
    }
