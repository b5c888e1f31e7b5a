"""What a run was planned from, and whether that is still so: the model's small files, a look at its
weights, the files that rows were read from.

The rows themselves lie in the run folder. So a file of rows that is gone is no matter, and one that
has changed is refused until somebody says which is meant: the rows that were read, or those that
are there now. Where size and times are as they were a file is not read again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from thrifty.core import sums
from thrifty.core.plan import Plan
from thrifty.run_folder import RunFolder

_MODEL_FILES = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
)
LARGE_BYTES = 1e9
"""Of weights: to hash more takes seconds."""
_PIECES, _PIECE_BYTES = 16, 1 << 16
"""Of each weight file, spread over it, that are looked at: all of a small one."""


# -- the model ----------------------------------------------------------------------------------


def model_marks(folder: Path) -> dict[str, str]:
    """Hashes of what decides shape and tokens, and of pieces of the weights that are there."""
    files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    marks = {file.name: sums.sha256_of(file) for file in sorted(files)}
    return marks | {file.name: _glance(file) for file in sorted(folder.glob("*.safetensors"))}


def changed_in_model(folder: Path, then: Mapping[str, str]) -> Iterator[str]:
    """What is otherwise than it was, in words. Weights that came later are no change."""
    now = model_marks(folder)
    for name in sorted({*then, *now}):
        before, after = then.get(name), now.get(name)
        if before == after or (before is None and name.endswith(".safetensors")):
            continue
        then_and_now = f"{_short(before)} then, {_short(after)} now"
        yield f"{folder / name} has changed since the plan: {then_and_now}"


def _glance(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for number in range(_PIECES):
            stream.seek(max(size - _PIECE_BYTES, 0) * number // (_PIECES - 1))
            digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()


def weights_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def note_weights(run: RunFolder, model: Path) -> None:
    """Write down the weights' hash, where that takes no seconds; else the first stage does."""
    from thrifty.signals.models import weights_sha256

    if 0 < weights_size(model) <= LARGE_BYTES:
        sums.write(run.base_file, weights_sha256(model) + "\n")


# -- the rows -----------------------------------------------------------------------------------


def files_of_rows(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The local files that a plan's rows are read from: path -> size and times."""
    from thrifty.data.sources import expand, is_url

    found = {}
    for sources in _sources(plan):
        local = [source for source in sources if not is_url(source)]
        with suppress(ValueError, OSError):  # reading will say what is wrong
            for file in expand(local):
                path = Path(file.location).resolve()
                found[str(path)] = _seen(path)
    return found


def note_sources(run: RunFolder, before: Mapping[str, tuple[int, ...]]) -> None:
    """Write down what the files are that rows were just read from. ``before``: what was seen of
    them then. Raises ValueError where one was written to meanwhile."""
    noted = {}
    for name, seen in before.items():
        noted[name] = {"seen": seen, "sha256": sums.sha256_of(Path(name))}
        if _seen(Path(name)) != seen:
            raise ValueError(f"{name} changed while it was read\nhint: plan once it is finished")
    sums.write(run.sources, json.dumps(noted, indent=1))


def changed_sources(run: RunFolder) -> Iterator[str]:
    """Files of rows that are otherwise than they were read, in words."""
    if not run.sources.is_file():
        return
    sums.check(run.sources, "put it back as it was, or delete it: rows are then not compared")
    noted = json.loads(run.sources.read_text(encoding="utf-8"))
    for name, known in noted.items():
        path = Path(name)
        if not path.is_file() or list(_seen(path)) == known["seen"]:
            continue
        if (now := sums.sha256_of(path)) != known["sha256"]:
            yield (
                f"{path}, which rows were read from, has changed since the plan: "
                f"{_short(known['sha256'])} then, {_short(now)} now"
            )


def check_origins(run: RunFolder, model: Path, marks: Mapping[str, str] | None) -> None:
    """Raise ValueError where the model or a file of rows is not what the run was planned from.
    ``marks``: of the model then; None: an older thrifty planned it."""
    for change in () if marks is None else changed_in_model(model, marks):
        raise ValueError(f"{change}\nhint: put the old one back, or plan a new run")
    for change in changed_sources(run):
        raise ValueError(
            f"{change}\nhint: `thrifty plan` again trains on what is there now; to go on with the "
            f"rows that were read then, which the run has kept, delete {run.sources}"
        )


def _sources(plan: Plan) -> Iterable[tuple[str, ...]]:
    yield plan.pool.sources
    yield plan.training.replay
    if plan.guard is not None:
        yield plan.guard.sources
    for target in plan.targets.values():
        yield from (target.signal, target.dev, target.test)


def _seen(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _short(digest: Any) -> str:
    return "not there" if digest is None else f"{digest[:12]}..."
