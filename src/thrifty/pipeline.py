"""The whole job on one screen: plan -> pilot -> select -> train -> test -> control -> report.

A run is a folder. Every stage is resumable, charges what it spends to the run's ledger, and does
nothing when it is done; so these functions may be called again after anything. Under ``torchrun``
every rank calls them; they return None to all but rank 0.
"""

from __future__ import annotations

from pathlib import Path

from thrifty import ranks, stages
from thrifty.core.plan import Plan
from thrifty.pilot import pilot
from thrifty.preparation import Asked, Say, plan_run
from thrifty.report.page import write_report
from thrifty.run_folder import RunFolder
from thrifty.scoring_engines import Engine


def make_plan(asked: Asked, folder: str | Path, say: Say = print) -> Plan:
    """Read the data, plan, and write a run folder."""
    return plan_run(asked, Path(folder), say)[2]


@ranks.led
def run(folder: str | Path, say: Say = print, overrides: tuple[str, ...] = ()) -> Path:
    """What is not done yet, to the end. Returns the report's path."""
    with stages.at_work(RunFolder(Path(folder)), say, overrides) as work:
        pilot(work)
        stages.select(work, work.main)
        stages.train(work, work.main)
        stages.test(work, work.main)
        if work.plan.control:
            control = stages.control(work)
            stages.select(work, control)
            stages.train(work, control)
            stages.test(work, control)
    return write_report(RunFolder(Path(folder)))


@ranks.led
def select(
    folder: str | Path,
    say: Say = print,
    overrides: tuple[str, ...] = (),
    engine: Engine | None = None,
) -> None:
    """Score the pool, here or on an engine's workers, and leave the chosen rows in RUN/selected."""
    with stages.at_work(RunFolder(Path(folder)), say, overrides, trains=False) as work:
        pilot(work)
        stages.select(work, work.main, engine)


@ranks.led
def train(folder: str | Path, say: Say = print, overrides: tuple[str, ...] = ()) -> None:
    """Train on what was selected, selecting first where that is not done."""
    with stages.at_work(RunFolder(Path(folder)), say, overrides) as work:
        pilot(work)
        stages.select(work, work.main)
        stages.train(work, work.main)
