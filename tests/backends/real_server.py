"""Real servers, as processes of their own on loopback, with tiny models: ``transformers serve`` and
llama.cpp's ``llama-server``."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from thrifty.backends.backend import Answered, Asking
from thrifty.backends.endpoint import Endpoint

_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}say:{% endif %}"
)


def with_template(model: Path, folder: Path, *, samples: bool = True) -> Path:
    """A copy of ``model`` that takes messages, and samples unless told otherwise: its own
    generation_config.json decides, whatever temperature a request asks for."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    config = {"do_sample": samples, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """Its URL, once it answers. What it says goes to ``log``."""
    # Its list of models is that of the cache, and it answers 500 where there is none.
    cache = log.with_name("hub")
    cache.mkdir(exist_ok=True)
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    with _serving(
        [*command, "--device", "cpu"], log, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(cache)
    ) as url:
        yield url


@contextmanager
def llama_server(program: str, model: Path, name: str, log: Path) -> Iterator[str]:
    """The same of llama.cpp's, over a GGUF file that it calls ``name``."""
    template = log.with_name("template.jinja")
    template.write_text(_TEMPLATE, encoding="utf-8")
    options = ["--alias", name, "--jinja", "--chat-template-file", str(template)]
    options += ["--ctx-size", "2048", "--parallel", "4", "--threads", "1", "--offline"]
    with _serving([program, "--model", str(model), *options], log) as url:
        yield url


def ask(
    url: str, model: Path | str, *askings: Asking, **options: object
) -> tuple[list[Answered], tuple[str, ...]]:
    """What an endpoint there answers, one after the other, and what it noted."""

    async def each() -> list[Answered]:
        endpoint = Endpoint(url, str(model), **options)
        try:
            answers = [await endpoint.ask(asking) for asking in askings]
            notes.extend(endpoint.notes)
            return answers
        finally:
            await endpoint.close()

    notes: list[str] = []
    return asyncio.run(each()), tuple(notes)


@contextmanager
def _serving(
    command: list[str], log: Path, *, seconds: float = 120, **environment: str
) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        log.open("wb") as said,
        subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process, log, time.monotonic() + seconds)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, ends: float) -> None:
    while time.monotonic() < ends and process.poll() is None:
        try:
            httpx2.get(f"{url}/health", timeout=5, trust_env=False).raise_for_status()
        except httpx2.HTTPError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")
