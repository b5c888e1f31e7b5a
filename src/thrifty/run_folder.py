"""A run is a folder: where its parts lie, and who may work on it.

    plan.yaml  prepared.json  sources.json  base.sha256  ledger.sqlite  pool/
    targets/NAME/{signal,dev,test}/  guard/  pilot/  scores/  selected/  online/  checkpoints/
    model/  control/  report.html  SHA256SUMS

One process at a time works on a run; another is refused with the holder's name. Reading (a report)
needs no lock.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.core import plan as plans
from thrifty.core import sums
from thrifty.core.ledger import Ledger
from thrifty.core.plan import Plan
from thrifty.core.target_names import check_target_name


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.yaml"

    @property
    def prepared(self) -> Path:
        return self.path / "prepared.json"

    @property
    def sources(self) -> Path:
        """Hashes of the files that rows were read from."""
        return self.path / "sources.json"

    @property
    def base_file(self) -> Path:
        """The hash of the base model's weights."""
        return self.path / "base.sha256"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def pool(self) -> Path:
        return self.path / "pool"

    @property
    def pilot(self) -> Path:
        return self.path / "pilot"

    @property
    def pilot_file(self) -> Path:
        """What a pilot chose."""
        return self.pilot / "choice.yaml"

    @property
    def replay(self) -> Path:
        return self.path / "replay"

    @property
    def guard(self) -> Path:
        return self.path / "guard"

    def target(self, name: str, part: str) -> Path:
        """``part`` is signal, dev or test. Raises ValueError for a name that leads elsewhere."""
        check_target_name(name)
        return self.path / "targets" / name / part

    def scores(self, branch: str) -> Path:
        return self._branch(branch) / "scores"

    def selected(self, branch: str) -> Path:
        return self._branch(branch) / "selected"

    def checkpoints(self, branch: str) -> Path:
        return self._branch(branch) / "checkpoints"

    def online(self, branch: str) -> Path:
        return self._branch(branch) / "online"

    def refreshes(self, branch: str) -> Path:
        return self._branch(branch) / "refreshes"

    def model(self, branch: str) -> Path:
        return self._branch(branch) / "model"

    def _branch(self, branch: str) -> Path:
        """The run's own parts lie in the folder itself, a control run's under its name."""
        return self.path if branch == "budget" else self.path / branch

    @property
    def decoded(self) -> Path:
        """What its model answered."""
        return self.path / "decode"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def plan(self, overrides: tuple[str, ...] = ()) -> Plan:
        """Raises ValueError where the folder holds no plan or one that cannot be used."""
        if not self.path.is_dir():
            raise ValueError(
                f"there is no run folder {self.path}\nhint: `thrifty plan ... -o {self.path}`"
            )
        return plans.load(self.plan_file, overrides, self.pilot_choice())

    def pilot_choice(self) -> dict[str, Any]:
        """The keys of plan.yaml that a finished pilot set otherwise."""
        if not self.pilot_file.is_file():
            return {}
        sums.check(self.pilot_file, "put it back as it was, or plan anew")
        return plans.read_values(self.pilot_file)["settings"]

    @contextmanager
    def working(self) -> Iterator[Ledger]:
        """Hold the run's lock and its ledger; what a process that died had leased is booked as
        lost. Raises ValueError where another process holds the run."""
        with locked(self.path), Ledger(self.ledger_file) as ledger:
            ledger.recover()
            yield ledger

    def reading(self) -> Ledger:
        """The ledger, to look at."""
        return Ledger(self.ledger_file, read_only=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock. Raises ValueError where another process does."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    holder = folder / ".holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise ValueError(
            f"{folder} is being worked on by {who}\n"
            "hint: wait for it, or stop it; then run the same command again"
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
