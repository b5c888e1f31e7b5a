"""``thrifty verify RUN``: whether everything in a run is as it was written, and what it was planned
from is as it was then. Nothing is written, and no torch is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

OK, DAMAGED, CHANGED, EDITED, UNKNOWN = "ok", "damaged", "changed", "edited", "not known"


@dataclass(frozen=True)
class Part:
    """Of a run, and what was found."""

    name: str
    state: str
    faults: tuple[str, ...] = ()

    @property
    def is_well(self) -> bool:
        return self.state not in (DAMAGED, CHANGED)


def add_to(verify: argparse.ArgumentParser) -> None:
    """To the parser of ``thrifty verify``."""
    verify.add_argument("run", metavar="RUN", help="a folder made by `thrifty plan`")
    verify.add_argument("--json", action="store_true", help="print JSON")


def answer(options: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    """The facts, the same for people, and whether all is well. Raises ValueError where there is no
    run."""
    from thrifty.run_folder import RunFolder

    run = RunFolder(Path(options.run))
    if not run.path.is_dir():
        raise ValueError(f"there is no run folder {run.path}\nhint: check the path")
    parts = list(parts_of(run))
    well = all(part.is_well for part in parts)
    facts = {"run": str(run.path), "ok": well, "parts": [asdict(part) for part in parts]}
    return facts, _text(parts), well


def parts_of(run: Any) -> Iterator[Part]:
    """Everything in the folder of ``run`` that says what it was, one after the other."""
    yield _plan(run)
    yield _part(run.ledger_file.name, partial(_ledger, run))
    yield from _folders(run)
    yield from _gradients(run)
    for folder in _those(run.path, "manifest.json"):
        if folder.name.startswith("checkpoint-"):
            yield _part(_name(run, folder), partial(_checkpoint, run, folder))
        elif any(folder.glob("shard-*.parquet")):
            yield _part(_name(run, folder), partial(_store, folder))
    for folder in _those(run.path, "decode.json"):
        yield _part(_name(run, folder), partial(_samples, folder))
    yield from _origins(run)


def _part(name: str, find: Callable[[], Iterator[str]], state: str = DAMAGED) -> Part:
    try:
        faults = tuple(find())
    except (ValueError, OSError) as error:
        faults = (_first_line(error),)
    return Part(name, state if faults else OK, faults)


def _first_line(error: Exception) -> str:
    return str(error).partition("\nhint: ")[0]


def _name(run: Any, folder: Path) -> str:
    return "the run's own files" if folder == run.path else folder.relative_to(run.path).as_posix()


def _those(folder: Path, name: str) -> list[Path]:
    """Folders in ``folder`` that hold a file of that name, but for those that were set aside."""
    found = (path.parent for path in sorted(folder.rglob(name)))
    hidden = ("torn-", ".")
    return [p for p in found if not any(x.startswith(hidden) for x in p.relative_to(folder).parts)]


# -- in the folder ------------------------------------------------------------------------------


def _plan(run: Any) -> Part:
    from thrifty.core import sums

    file = run.plan_file
    try:
        run.plan()
    except (ValueError, OSError) as error:
        return Part(file.name, DAMAGED, (_first_line(error),))
    try:
        sums.check(file, "")
    except ValueError:
        return Part(file.name, EDITED, (f"{file} was edited since it was planned",))
    return Part(file.name, OK)


def _ledger(run: Any) -> Iterator[str]:
    with run.reading() as ledger:
        yield from ledger.faults()
        accounts: dict[str, list[float]] = {}
        for stage in ledger.stages():
            accounts.setdefault(stage["account"], []).append(stage["measured"]["flops"])
        for account, parts in accounts.items():
            total = ledger.spent(account=account).flops
            if not math.isclose(math.fsum(parts), total, rel_tol=1e-9):
                yield f"the stages of {account} took {math.fsum(parts):g} FLOPs, it {total:g}"


def _folders(run: Any) -> Iterator[Part]:
    """Those that have a list of their files' hashes."""
    from thrifty.core import sums
    from thrifty.signals import gradient_store

    kept = _those(run.path, gradient_store.MANIFEST)
    for folder in _those(run.path, sums.NAME):
        edited = [run.plan_file.name] if folder == run.path else []
        if folder not in kept:
            yield _part(_name(run, folder), partial(sums.faults, folder, edited))


def _gradients(run: Any) -> Iterator[Part]:
    """Stores of gradients: those in the folder, and the one that the plan's scorer keeps."""
    from thrifty.signals import gradient_store

    for folder in _those(run.path, gradient_store.MANIFEST):
        yield _part(_name(run, folder), partial(gradient_store.faults, folder))
    home = _kept_by_scorer(run)
    if home is None or home.is_relative_to(run.path.resolve()):
        return
    found = _those(home, gradient_store.MANIFEST)
    for folder in found:
        yield _part(str(folder), partial(gradient_store.faults, folder))
    if not found:
        yield Part(str(home), UNKNOWN, (f"there are no gradients in {home}",))


def _kept_by_scorer(run: Any) -> Path | None:
    from thrifty.core.resolve import parse_spec

    try:
        _, options = parse_spec("scorer", run.plan().selection.scorer)
    except (ValueError, OSError):
        return None  # the plan itself is told
    store = options.get("store")
    return Path(str(store)).expanduser().resolve() if store else None


def _store(folder: Path) -> Iterator[str]:
    from thrifty.data.store import open_store

    return open_store(folder).faults()


def _checkpoint(run: Any, folder: Path) -> Iterator[str]:
    from thrifty import checkpoints

    manifest = folder / checkpoints.MANIFEST
    found = [each for each in checkpoints.committed(folder.parent) if each.path == folder]
    if not found:
        yield f"{manifest} is damaged: it is not as it was written"
        return
    if (damage := checkpoints.damage(found[0])) is not None:
        yield f"{folder}: {damage}"
    if "last_charge" in found[0].manifest:
        with run.reading() as ledger:
            ledger.require_charge(found[0].manifest["last_charge"], str(folder))


def _samples(folder: Path) -> Iterator[str]:
    """Of a decoding: lines that are whole; what they say no hash tells, for they grow."""
    file = folder / "samples.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)
        except ValueError:
            yield f"{file} is damaged: line {number} is no JSON"


# -- what it was planned from -------------------------------------------------------------------


def _origins(run: Any) -> Iterator[Part]:
    from thrifty import display, origins

    if run.sources.is_file():
        changes = partial(origins.changed_sources, run, display.say)
        yield _part("the files of rows", changes, CHANGED)
    else:
        yield Part("the files of rows", UNKNOWN)
    yield _base(run)


def _base(run: Any) -> Part:
    from thrifty import origins
    from thrifty.signals.models import locate, weights_sha256

    name = "the base model"
    try:
        plan = run.plan()
        base = locate(plan.model.path, plan.model.revision, weights=True)[0]
        marks = json.loads(run.prepared.read_text(encoding="utf-8")).get("model")
    except (ValueError, OSError) as error:
        return Part(name, UNKNOWN, (_first_line(error),))

    def changes() -> Iterator[str]:
        if marks is not None:
            yield from origins.changed_in_model(base, marks)
        known = run.base_file.read_text(encoding="utf-8").strip() if run.base_file.is_file() else ""
        known = plan.model.sha256 or known
        if known and (now := weights_sha256(base)) != known:
            yield f"the weights in {base} have changed: {known[:12]}... then, {now[:12]}... now"

    return _part(name, changes, CHANGED)


def _text(parts: list[Part]) -> str:
    width = max(len(part.state) for part in parts)
    lines = []
    for part in parts:
        lines += [
            f"{part.state:<{width}}  {part.name}{': ' * bool(fault)}{fault}"
            for fault in part.faults or ("",)
        ]
    return "\n".join(lines)
