"""The ``thrifty`` command. Results go to standard output, talk to standard error.

Exit codes: 0 done (stopping at the budget is done), 2 usage, 3 no plan fits, 4 bad input, 5 a fault
or signal after which the same command goes on.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import thrifty
from thrifty import (
    deadline,
    decode_command,
    law_command,
    plan_options,
    replay_command,
    serve_command,
    stop_signals,
    verify_command,
)
from thrifty.stop_signals import RESUMABLE

DONE, USAGE, NO_PLAN, BAD_INPUT = 0, 2, 3, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    # Small models run several times slower with more threads than free cores; the user may say.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_unrecognised(unknown))
    if options.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        with stop_signals.heeded(_interrupt), deadline.kept():
            return options.do(options) or DONE
    except BrokenPipeError:
        return DONE  # the reader had enough
    except KeyboardInterrupt as wish:
        why = str(wish) or "interrupted"
        return _stopped(f"{why}\nhint: the same command goes on where it stopped")
    except Exception as error:
        if type(error).__name__ == "Interrupted":  # by name: a mistake loads no torch
            return _stopped(str(error))
        return _fail(*_explain(error, Path(getattr(options, "run", None) or ".")))


def _interrupt(reason: str) -> None:
    """Any signal ends a command as Ctrl-C does: leases settled, files whole. Training handles them
    otherwise."""
    raise KeyboardInterrupt(reason)


def _explain(error: Exception, folder: Path) -> tuple[str, int]:
    """What went wrong with a command on ``folder``, in words, and the exit code."""
    from thrifty import disk_fault
    from thrifty.core.ledger import BudgetExceeded

    kinds = {cls.__name__ for cls in type(error).__mro__}
    if "NoPlanFits" in kinds or isinstance(error, BudgetExceeded):
        return str(error), NO_PLAN
    if kinds & {"NonFiniteGradient", "Diverged", "OutOfMemory", "NobodyAnswers", "RankLost"}:
        return str(error), RESUMABLE
    if isinstance(error, disk_fault.DiskFault):
        return str(error), RESUMABLE
    if (number := disk_fault.fault_of(error, folder)) is not None:
        return disk_fault.described(number, disk_fault.where_of(error, folder)), RESUMABLE
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        where = f": {error.filename}" if error.filename else ""
        if error.errno == errno.ENAMETOOLONG:
            return f"{what}{where}\nhint: a shorter name", BAD_INPUT
        return f"{what}{where}\nhint: mend that; the same command then goes on", RESUMABLE
    if isinstance(error, ValueError):
        return str(error), BAD_INPUT
    if "OperationalError" in kinds:  # of SQLite: the disk is full, or the file cannot be written
        return f"the ledger: {error}\nhint: mend that; the same command then goes on", RESUMABLE
    if "UnpicklingError" in kinds:
        return (
            "a file holds a pickle of more than tensors, which would run code of its own; it was "
            "not loaded\nhint: delete the checkpoint that was resumed from; one before it goes on",
            BAD_INPUT,
        )
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds:
        return f"out of memory: {error}\nhint: plan with a smaller --memory", RESUMABLE
    from thrifty import display

    display.say("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {error}\nhint: this looks like a bug in thrifty", RESUMABLE


def _fail(message: str, code: int) -> int:
    from thrifty import display

    display.say(f"error: {message}")
    return code


def _stopped(message: str) -> int:
    """The user's own wish, done: no error, though there is more to do."""
    from thrifty import display

    display.say(message)
    return RESUMABLE


# -- commands -----------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> None:
    from thrifty import display, notes, plan_display, preparation

    asked = plan_options.asked(options)
    if options.measure:
        _measure(asked, as_json=options.json)
        return
    if asked.pool:
        folder = Path(options.output or _free_name("runs"))
        planned, request, _ = preparation.plan_run(asked, folder, display.say)
    else:
        planned, request = preparation.quick_plan(asked, display.say)
        for note in notes.of_device(request.device, request.budget):
            display.say(note)
    if options.json:
        facts = plan_display.plan_json(planned, request, preparation.model_facts(asked))
        if options.verify:
            facts["verification"] = _verified(asked, planned.chosen.setting).facts()
        _print_json(facts)
        return
    display.show(plan_display.plan_text(planned, request))
    if options.verify:
        print(f"\n{_verified(asked, planned.chosen.setting)}")
    if asked.pool:
        display.say(f"\nwritten to {folder}/plan.yaml; next: thrifty run {folder}")


def _verified(asked: Any, setting: Any) -> Any:
    """The memory of the chosen step beside that of the real one, or why that cannot be traced."""
    from thrifty.costs.shape import read_config
    from thrifty.signals.models import locate
    from thrifty.verification import Refused, verify

    folder, _ = locate(asked.model, asked.revision, weights=False)
    try:
        return verify(read_config(folder), setting, any_optimizer=True)
    except ValueError as error:
        return Refused(str(error))


def _measure(asked: Any, *, as_json: bool) -> None:
    from thrifty import display, measured_display, measured_plan

    display.quiet_transformers()
    plan = measured_plan.measured_plan(asked, display.say)
    if as_json:
        _print_json(measured_display.measured_json(plan))
    else:
        print(measured_display.measured_text(plan))
    measured_plan.check(plan)  # what was counted is told even where nothing fits


def _free_name(parent: str) -> str:
    number = 1
    while (Path(parent) / f"run-{number}").exists():
        number += 1
    return f"{parent}/run-{number}"


def _as_ranks(options: argparse.Namespace) -> int | None:
    """The exit code of the processes that do a command on several devices; None where this process
    does it, or is one of them."""
    from thrifty import launch
    from thrifty.run_folder import RunFolder

    overrides = tuple(options.set or ())
    plan = RunFolder(Path(options.run)).plan(overrides)
    if not launch.needed(plan):
        return None
    again = [f"--set={override}" for override in overrides]
    return launch.run_ranks(plan.training.devices, [options.command, options.run, *again])


def _run(options: argparse.Namespace) -> int | None:
    from thrifty import display, pipeline
    from thrifty.report.summary import summarize, text_summary
    from thrifty.run_folder import RunFolder

    if (code := _as_ranks(options)) is not None:
        return code
    display.quiet_libraries()
    report = pipeline.run(options.run, display.say, tuple(options.set or ()))
    if report is None:  # of a rank that followed
        return DONE
    display.show(text_summary(summarize(RunFolder(Path(options.run)))))
    display.say(f"\nreport: {report}")
    return DONE


def _select(options: argparse.Namespace) -> None:
    from thrifty import display, pipeline
    from thrifty.run_folder import RunFolder
    from thrifty.scoring_engines import engine_named

    display.quiet_libraries()
    if options.explain is not None:
        from thrifty.row_explanation import explain_row

        display.show(explain_row(RunFolder(Path(options.run)), options.explain))
        return
    engine = engine_named(options.engine, options.workers)
    pipeline.select(options.run, display.say, tuple(options.set or ()), engine)
    selected = RunFolder(Path(options.run)).selected("budget")
    if options.copy_to is not None:
        from thrifty.data.remote import shown
        from thrifty.selected import copy_selected

        new = copy_selected(selected, options.copy_to)
        display.say(f"{'copied to' if new else 'lies already at'} {shown(options.copy_to)}")
    print(selected)


def _train(options: argparse.Namespace) -> int | None:
    from thrifty import display, pipeline, ranks
    from thrifty.run_folder import RunFolder

    if (code := _as_ranks(options)) is not None:
        return code
    display.quiet_libraries()
    pipeline.train(options.run, display.say, tuple(options.set or ()))
    if ranks.rank() == 0:
        print(RunFolder(Path(options.run)).model("budget"))
    return DONE


def _report(options: argparse.Namespace) -> None:
    from thrifty.report.page import write_report
    from thrifty.report.summary import summarize
    from thrifty.run_folder import RunFolder

    run = RunFolder(Path(options.run))
    if options.json:
        _print_json(summarize(run))
    else:
        print(write_report(run))


def _export(options: argparse.Namespace) -> None:
    from thrifty.export import export
    from thrifty.run_folder import RunFolder

    folder = None if options.output is None else Path(options.output)
    print(
        export(
            RunFolder(Path(options.run)),
            options.to,
            folder,
            overwrite=options.overwrite,
            take_nearest=options.nearest,
        )
    )


def _law(options: argparse.Namespace) -> None:
    facts, text = law_command.answer(options)
    if options.json:
        _print_json(facts)
    else:
        print(text)


def _decode(options: argparse.Namespace) -> None:
    from thrifty import display

    display.quiet_libraries()
    facts, text = decode_command.answer(options)
    if options.json:
        _print_json(facts)
    else:
        display.show(text)


def _verify(options: argparse.Namespace) -> int:
    facts, text, well = verify_command.answer(options)
    if options.json:
        _print_json(facts)
    else:
        print(text)
    return DONE if well else BAD_INPUT


def _replay(options: argparse.Namespace) -> None:
    facts, text = replay_command.answer(options)
    if options.json:
        _print_json(facts)
    else:
        print(text)


def _methods(options: argparse.Namespace) -> None:
    from thrifty import display
    from thrifty.core.contracts import KINDS
    from thrifty.core.resolve import all_names, method_class, summary

    methods = []
    for kind in KINDS:
        for name in all_names(kind):
            cls: Any = method_class(kind, name)
            methods.append(
                {
                    "name": name,
                    "kind": kind,
                    "summary": summary(cls),
                    "cost_class": getattr(cls, "cost_class", "free"),
                    "source": cls.source,
                }
            )
    if options.json:
        _print_json(methods)
    else:
        print(display.methods_text(methods))


def _device(options: argparse.Namespace) -> None:
    from thrifty import display
    from thrifty.calibration import measure_device
    from thrifty.costs.hardware import device_facts, load_device

    if options.name is None:
        display.say("measuring this machine, a few seconds ...")
        measured = measure_device()
        facts = device_facts(measured)
    else:
        facts = device_facts(load_device(options.name))
    if options.json:
        _print_json(facts)
    else:
        print(display.device_text(facts))


def _demo(options: argparse.Namespace) -> None:
    from thrifty import demo, display

    display.quiet_libraries()
    folder = demo.run(Path(options.output), display.say)
    display.say(f"\nreport: {folder / 'report.html'}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


# -- options ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Options are written out, a misspelt one is told with the nearest that there is, and a value
    may begin with a minus (``--hours -1h``), to be refused for what it is."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # a command's own: all options are known here
            arguments = self._mended(arguments)
        return super().parse_known_args(arguments, namespace)

    def _mended(self, arguments: list[str]) -> list[str]:
        known = self._option_string_actions
        mended: list[str] = []
        for argument in arguments:
            before = mended[-1] if mended else ""
            takes_value = before in known and known[before].nargs is None
            if takes_value and re.match(r"-[\d.$]", argument):
                mended[-1] = f"{before}={argument}"
                continue
            name = argument.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
                meant = f"did you mean {close[0]}?" if close else f"`{self.prog} --help` lists all"
                self.error(f"there is no option {name}: {meant}")
            mended.append(argument)
        return mended


def _unrecognised(arguments: Sequence[str]) -> str:
    message = f"unrecognised: {' '.join(arguments)}"
    if any("=" in argument for argument in arguments):
        message += "\nhint: --set once per key: "
        message += "--set training.seed=1 --set training.memory.trained=lora"
    return message


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="thrifty", description=(thrifty.__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"thrifty {thrifty.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    plan = commands.add_parser(
        "plan", help="price every way to spend the budget and write the best into a run folder"
    )
    plan_options.add_to(plan)
    plan.set_defaults(do=_plan)

    for name, do, what in (
        ("run", _run, "what is not done yet, to the end"),
        ("select", _select, "score the pool and leave the chosen rows in RUN/selected"),
        ("train", _train, "train on the chosen rows and leave RUN/model"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("run", metavar="RUN", help="a folder made by `thrifty plan`")
        command.add_argument(
            "--set",
            action="append",
            metavar="KEY=VALUE",
            help=f"for this time: {plan_options.SET_HELP}",
        )
        if name == "select":
            command.add_argument(
                "--explain",
                metavar="ROW",
                help="why a row (its id, or FILE:NUMBER) is in or out",
            )
            command.add_argument(
                "--engine", default="local", help="where to score: local, processes or ray"
            )
            command.add_argument("--workers", type=int, help="of the engine (default: all cores)")
            command.add_argument(
                "--copy-to", metavar="URL", help="then copy what was chosen there, as s3://..."
            )
        command.set_defaults(do=do)

    report = commands.add_parser("report", help="write RUN/report.html, or print it as JSON")
    report.add_argument("run", metavar="RUN")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(do=_report)

    verify = commands.add_parser(
        "verify", help="whether everything in a run, and what it was planned from, is as it was"
    )
    verify_command.add_to(verify)
    verify.set_defaults(do=_verify)

    export = commands.add_parser(
        "export", help="write the chosen rows and the plan for another program"
    )
    export.add_argument("run", metavar="RUN")
    export.add_argument("--to", required=True, help="trl, axolotl or llamafactory")
    export.add_argument("-o", "--output", metavar="FOLDER", help="default: RUN/export/TO")
    export.add_argument("--overwrite", action="store_true", help="write over what is there")
    export.add_argument(
        "--nearest", action="store_true", help="also where it takes another amount of memory"
    )
    export.set_defaults(do=_export)

    law = commands.add_parser("law", help="scaling laws: fit, predict, allocate; when scoring pays")
    law_command.add_to(law)
    law.set_defaults(do=_law)

    decode = commands.add_parser("decode", help="answer questions: whom to ask, how often")
    decode_command.add_to(decode)
    decode.set_defaults(do=_decode)

    replay = commands.add_parser("replay", help="a decoding policy on recorded samples, no model")
    replay_command.add_to(replay)
    replay.set_defaults(do=_replay)

    serve = commands.add_parser("serve", help="an OpenAI-compatible proxy, with a budget per key")
    serve_command.add_to(serve)
    serve.set_defaults(do=serve_command.serve)

    methods = commands.add_parser("methods", help="every method, with its cost and source")
    methods.add_argument("--json", action="store_true", help="print JSON")
    methods.set_defaults(do=_methods)

    device = commands.add_parser("device", help="measure this machine, or show a known device")
    device.add_argument("name", nargs="?", help="show this device instead")
    device.add_argument("--json", action="store_true", help="print JSON")
    device.set_defaults(do=_device)

    demo = commands.add_parser("demo", help="the main job on text that every Python has")
    demo.add_argument("-o", "--output", default="runs/demo", metavar="RUN")
    demo.set_defaults(do=_demo)
    return parser


if __name__ == "__main__":
    sys.exit(main())
