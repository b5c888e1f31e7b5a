"""What a run was planned from, and whether that is still so: the model's small files, a look at its
weights, the files that rows were read from.

The rows themselves lie in the run folder. So a file of rows that is gone is no matter, and one that
has changed is refused until somebody says which is meant: the rows that were read, or those that
are there now. Where size and times are as they were a file is not read again; of one at a URL its
server is asked (``data/remote_marks.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.core import sums
from thrifty.core.plan import Plan
from thrifty.core.redaction import MASK, redact
from thrifty.run_folder import RunFolder

# Imported where rows are read: a plan of a config alone answers before pyarrow would have loaded.
if TYPE_CHECKING:
    from thrifty.data.remote_marks import Mark
    from thrifty.preparation import Say

Seen = Any
"""Of a file size and times; of one at a URL its ``Mark``, None where its server tells nothing."""

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


def files_of_rows(plan: Plan) -> dict[str, Seen]:
    """The files that a plan's rows are read from: path or URL -> what is seen of them now."""
    from thrifty.data.remote_marks import marks_of
    from thrifty.data.sources import expand, is_url

    found: dict[str, Seen] = {}
    urls: list[str] = []
    for sources in _sources(plan):
        with suppress(ValueError, OSError):  # reading will say what is wrong
            for file in expand(sources):
                if is_url(file.location):
                    urls.append(file.location)
                else:
                    path = Path(file.location).resolve()
                    found[str(path)] = _seen(path)
    return {**found, **marks_of(urls)} if urls else found


def note_sources(run: RunFolder, before: Mapping[str, Seen], say: Say) -> None:
    """Write down what the files are that rows were just read from. ``before``: what was seen of
    them then. Raises ValueError where one was written to meanwhile."""
    from thrifty.data.remote_marks import is_sure, marks_of
    from thrifty.data.sources import is_url

    urls = [name for name in before if is_url(name)]
    noted: dict[str, dict[str, Any]] = {
        name: {"seen": seen, "sha256": sums.sha256_of(Path(name))}
        for name, seen in before.items()
        if name not in urls
    }
    now: dict[str, Seen] = {name: _seen(Path(name)) for name in noted}
    now |= marks_of(urls) if urls else {}
    for name, seen in before.items():
        if None not in (seen, now[name]) and seen != now[name]:
            raise ValueError(
                f"{redact(name)} changed while it was read\nhint: plan once it is finished"
            )
    noted |= {redact(url): {"mark": before[url]} for url in urls}
    _tell(
        [url for url in urls if not is_sure(before[url])],
        "the server tells no checksum and no time: a change that keeps the size will not be seen",
        say,
    )
    sums.write(run.sources, json.dumps(noted, indent=1))


def changed_sources(run: RunFolder, say: Say) -> Iterator[str]:
    """Files of rows that are otherwise than they were read, in words. ``say`` hears of those that
    nobody can tell of."""
    from thrifty.data.sources import is_url

    if not run.sources.is_file():
        return
    sums.check(run.sources, "put it back as it was, or delete it: rows are then not compared")
    noted = json.loads(run.sources.read_text(encoding="utf-8"))
    for name, known in noted.items():
        path = Path(name)
        if is_url(name) or not path.is_file() or list(_seen(path)) == known["seen"]:
            continue
        if (now := sums.sha256_of(path)) != known["sha256"]:
            yield _changed(name, _short(known["sha256"]), _short(now))
    marks = {name: known["mark"] for name, known in noted.items() if is_url(name)}
    yield from _changed_at_urls({url: mark for url, mark in marks.items() if mark}, say)


def _changed_at_urls(then: Mapping[str, Mark], say: Say) -> Iterator[str]:
    from thrifty.data.remote_marks import in_words, marks_of

    if not then:
        return
    # Where a key was part of the URL nobody has it any more.
    now = marks_of([url for url in then if MASK not in url])
    for url, mark in now.items():
        if mark is not None and mark != then[url]:
            yield _changed(url, in_words(then[url]), in_words(mark))
    unknown = [url for url in then if now.get(url) is None]
    _tell(unknown, "cannot be asked: whether it has changed since the plan is not known", say)


def _changed(name: str, then: str, now: str) -> str:
    return f"{name}, which rows were read from, has changed since the plan: {then} then, {now} now"


def _tell(urls: Sequence[str], what: str, say: Say) -> None:
    """One line, however many there are."""
    from thrifty.data.sources import shown

    if urls:
        more = f" and {len(urls) - 1:,} more" if len(urls) > 1 else ""
        say(f"{shown(urls[0])}{more}: {what}")


def check_origins(run: RunFolder, model: Path, marks: Mapping[str, str] | None, say: Say) -> None:
    """Raise ValueError where the model or a file of rows is not what the run was planned from.
    ``marks``: of the model then; None: an older thrifty planned it."""
    for change in () if marks is None else changed_in_model(model, marks):
        raise ValueError(f"{change}\nhint: put the old one back, or plan a new run")
    for change in changed_sources(run, say):
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
        yield from (target.signal, target.dev, target.pilot, target.test)


def _seen(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _short(digest: Any) -> str:
    return "not there" if digest is None else f"{digest[:12]}..."
