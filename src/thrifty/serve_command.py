"""The options of ``thrifty serve``."""

from __future__ import annotations

import argparse

_NONE = "-"


def add_to(serve: argparse.ArgumentParser) -> None:
    """To the parser of ``thrifty serve``."""
    serve.add_argument(
        "--upstream",
        action="append",
        required=True,
        metavar="URL",
        help="an OpenAI-compatible server; once for each, the options of upstreams in that order",
    )
    serve.add_argument(
        "--model", action="append", metavar="NAME", help="of an upstream: the only one asked there"
    )
    serve.add_argument(
        "--upstream-key",
        action="append",
        metavar="VARIABLE",
        help="of an upstream: the environment variable with its key; - for none",
    )
    serve.add_argument(
        "--price",
        action="append",
        metavar="0.15,0.60",
        help="of an upstream: dollars per million tokens, prompts and completions; - for unknown",
    )
    serve.add_argument(
        "--config",
        action="append",
        metavar="FOLDER",
        help="of an upstream: the folder with its model's config.json, for FLOPs; - for unknown",
    )
    serve.add_argument(
        "--policy",
        default="first",
        metavar="NAME",
        help="a name, or {name: {option: value}} (default: first, handed on as it is)",
    )
    serve.add_argument(
        "--answer",
        default="exact",
        metavar="FORM",
        help="how an answer is read in a text: number, choice, exact, math, {callable: ...}, none",
    )
    serve.add_argument(
        "--worth", type=float, default=0.0, metavar="X", help="right answers that a unit must bring"
    )
    serve.add_argument(
        "--samples",
        type=float,
        metavar="3",
        help="a request, on average; more go where they help (a pooled policy, marginal for one)",
    )
    serve.add_argument(
        "--fit", action="append", metavar="SAMPLES", help="recorded samples to learn from"
    )
    serve.add_argument(
        "--reward",
        metavar="FOLDER",
        help="of a reward model; or MODULE:FUNCTION(prompt, text), higher is better",
    )
    serve.add_argument(
        "--max-samples", type=int, default=8, metavar="8", help="of a request, of any policy"
    )
    serve.add_argument(
        "--keys", metavar="FILE", help="who may ask, each with a budget (YAML, JSON)"
    )
    serve.add_argument(
        "--key-variable",
        default="THRIFTY_KEY",
        metavar="NAME",
        help="without --keys: the environment variable with the one key",
    )
    serve.add_argument("--dollars", metavar="20", help="without --keys: limit on money")
    serve.add_argument("--tokens", metavar="20M", help="without --keys: limit on tokens")
    serve.add_argument("--flops", metavar="3e17", help="without --keys: limit on FLOPs")
    serve.add_argument(
        "--ledger",
        default="runs/serve",
        metavar="FOLDER",
        help="what was spent, a folder or a .sqlite file (default: runs/serve)",
    )
    serve.add_argument("--host", default="127.0.0.1", help="others than loopback need keys")
    serve.add_argument("--port", type=int, default=8100, metavar="8100", help="0: any free one")
    serve.add_argument(
        "--allow-host", action="append", metavar="NAME", help="another name that may be asked for"
    )
    serve.add_argument(
        "--max-tokens", type=int, default=4096, metavar="4096", help="of a completion"
    )
    serve.add_argument("--max-body", default="4MiB", metavar="4MiB", help="of a request")
    serve.add_argument(
        "--context", type=int, metavar="32768", help="tokens that a prompt can have at the most"
    )
    serve.add_argument(
        "--max-connections", type=int, default=1024, metavar="1024", help="at a time"
    )
    serve.add_argument(
        "--timeout", default="10m", metavar="10m", help="of a request, from its first byte on"
    )


def serve(options: argparse.Namespace) -> None:
    """Until a signal ends it. Raises ValueError where something cannot be served so."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"serving needs {error.name}, which is not installed\n"
            "hint: pip install 'thrifty[serve]'"
        ) from None
    from thrifty.serving import server

    try:
        server.run(options)
    except KeyboardInterrupt:  # how a server ends; what it held is settled by now
        return
