"""What a file system says of a file at a URL, by which a change of it is seen.

A hash would take reading all of it. Servers tell more or less: checksums (the ETag of S3 and of
HTTP, Google's md5Hash, the hub's blob_id), else a time of change, and a size. A folder that was
listed a moment ago is not asked again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

Mark = Mapping[str, str]
"""The name that the file system has for it -> what it says."""

PATIENCE_SECONDS = 20.0
"""For the first answers, and a tenth of a second more for each file."""
_CHECKSUMS = ("etag", "md5hash", "contentmd5", "crc32c", "digest", "sha256", "blobid", "generation")
_TIMES = ("lastmodified", "updated", "mtime", "modified", "created")
_SIZE = "size"


def marks_of(urls: Sequence[str]) -> dict[str, Mark | None]:
    """Of each file what is told of it now; None where nothing is, or not in time."""
    found: dict[str, Mark | None] = dict.fromkeys(urls)
    # A daemon: what it waits for may never come.
    asking = threading.Thread(target=_ask, args=(found,), daemon=True, name="remote marks")
    asking.start()
    asking.join(PATIENCE_SECONDS + 0.1 * len(urls))
    return dict(found)


def is_sure(mark: Mark | None) -> bool:
    """Whether any change would show, not one of the size alone."""
    return mark is not None and set(mark) != {_SIZE}


def in_words(mark: Mark) -> str:
    return ", ".join(f"{name} {said}" for name, said in mark.items())


def _ask(found: dict[str, Mark | None]) -> None:
    listed: set[str] = set()
    for url in found:
        with suppress(Exception):  # each file system has its own
            found[url] = _mark(url, listed)


def _mark(url: str, listed: set[str]) -> Mark | None:
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    folder = url.rpartition("/")[0]
    if folder not in listed:  # one request for many files, where the file system remembers it
        listed.add(folder)
        with suppress(Exception):
            fs.ls(fs._parent(path))
    return _chosen(fs.info(path)) or None


def _chosen(info: Mapping[str, Any]) -> dict[str, str]:
    def of(names: Sequence[str]) -> dict[str, str]:
        plain = {name: name.lower().replace("-", "").replace("_", "") for name in info}
        return {n: str(info[n]) for n in sorted(info) if plain[n] in names and info[n] is not None}

    return {**(of(_CHECKSUMS) or of(_TIMES)), **of((_SIZE,))}
