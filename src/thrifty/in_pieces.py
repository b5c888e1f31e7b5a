"""Out of memory in training: the same work again in smaller pieces, so that a plan that was a
little too large ends as it was meant to, and one that is far too large ends soon.

A pass over ``rows`` rows is made in ``count`` pieces. Running out of memory doubles ``count``, at
most ``MOST_TRIES`` times a process. It is kept beside the checkpoints, as the next process would
run out in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thrifty.core.durable import write_atomically

MOST_TRIES = 6
_FILE = "pieces.json"


class OutOfMemory(RuntimeError):
    """What is to be held does not fit, in the smallest pieces either; what was saved is good."""


def ran_out(error: BaseException) -> bool:
    """Whether this is a device, or this machine, saying that it has no more memory to give."""
    from accelerate.utils.memory import should_reduce_batch_size
    from torch import OutOfMemoryError

    if isinstance(error, OutOfMemory):
        return False
    if isinstance(error, OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


class Pieces:
    """Of the training passes of a run whose checkpoints lie in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self.count = _known(self._file)
        self.tries = 0

    def again(self, where: str, what: str, rows: int, *, even_so: bool = False) -> None:
        """Have it tried once more, where the largest pass has ``rows``: in pieces half as large.
        Raises OutOfMemory where there are none, unless it is worth a try ``even_so``; and where it
        was tried often enough."""
        said = what.strip().partition("\n")[0]
        if self.tries >= MOST_TRIES or (self.count >= rows and not even_so):
            least = -(-rows // self.count)
            raise OutOfMemory(
                f"{where} ran out of memory, {least} rows at a time, and no smaller pass is left "
                f"to try: {said}\n"
                "hint: what was saved is good; plan anew with a smaller --memory or a shorter "
                "max_length, or give the device more room, and run the same command again"
            )
        self.tries += 1
        self.count = min(2 * self.count, rows)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, json.dumps({"count": self.count}))

    def of(self, inputs: Mapping[str, Any], rows: int) -> Iterator[tuple[dict[str, Any], float]]:
        """A batch of ``rows`` in pieces, each with its share of the rows. What has a multiple of
        ``rows`` along its first dimension is several batches one behind the other."""
        if self.count == 1:
            yield dict(inputs), 1.0
            return
        each = -(-rows // self.count)
        for start in range(0, rows, each):
            stop = min(start + each, rows)
            piece = {name: _part(value, rows, start, stop) for name, value in inputs.items()}
            yield piece, (stop - start) / rows


def _part(value: Any, rows: int, start: int, stop: int) -> Any:
    """Rows ``start`` to ``stop`` of each batch that ``value`` holds; what holds none, as it is."""
    size = getattr(value, "shape", ())
    if not size or size[0] % rows:
        return value
    if size[0] == rows:
        return value[start:stop]
    batches = value.reshape(size[0] // rows, rows, *size[1:])[:, start:stop]
    return batches.reshape(-1, *size[1:])


def _known(file: Path) -> int:
    if not file.exists():
        return 1
    try:
        return max(int(json.loads(file.read_text(encoding="utf-8"))["count"]), 1)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {error}\nhint: delete it") from None


def random_state() -> list[Any]:
    """Of torch's generators that training draws from."""
    import torch

    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def restore(state: list[Any]) -> None:
    """What is drawn from now on is what was drawn from ``random_state()`` on."""
    import torch

    torch.set_rng_state(state[0])
    for of_device in state[1:]:
        torch.cuda.set_rng_state(of_device)
