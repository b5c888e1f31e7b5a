"""The options of ``thrifty law``, and what each of its commands answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(law: argparse.ArgumentParser) -> None:
    """To the parser of ``thrifty law``."""
    commands = law.add_subparsers(dest="question", metavar="QUESTION", required=True)

    fit = commands.add_parser("fit", help="a law from runs: a CSV with a line a run")
    fit.add_argument("file", metavar="FILE", help="CSV with columns N, D and loss")
    fit.add_argument(
        "--form",
        default="chinchilla",
        help="chinchilla, tokens, fine_tuning; with unique_tokens data_constrained, filtered",
    )
    fit.add_argument(
        "--column",
        action="append",
        metavar="FIELD=NAME",
        help="the column of N, D, C (FLOPs), loss or unique that goes by another name",
    )
    fit.add_argument("--draws", type=int, default=200, help="of the bootstrap; 0: no intervals")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--at", nargs="+", metavar="1e21", help="budgets to tell the best N and D of")
    fit.add_argument("-o", "--output", metavar="LAW.json", help="what the other commands read")

    predict = commands.add_parser("predict", help="the loss of a model of N parameters on D tokens")
    predict.add_argument("--params", metavar="7B")
    predict.add_argument("--tokens", metavar="140B", required=True)

    allocate = commands.add_parser(
        "allocate", help="the best parameters and tokens for a budget, the least budget for a loss"
    )
    allocate.add_argument("--flops", metavar="3e21", help="the budget, serving included")
    allocate.add_argument("--loss", type=float, metavar="2.2", help="or the loss to be reached")
    allocate.add_argument("--serve", metavar="2T", help="tokens that the model will serve")
    allocate.add_argument(
        "--serve-flops",
        type=float,
        default=2.0,
        metavar="2",
        help="of serving, a parameter and token",
    )
    for command in (predict, allocate):
        command.add_argument(
            "--law",
            metavar="LAW.json",
            help="a fit, or besiroglu (default), hoffmann, sardana, muennighoff",
        )
        command.add_argument("--unique", metavar="25B", help="different tokens that there are")
        command.add_argument(
            "--train-flops",
            type=float,
            default=6.0,
            metavar="6",
            help="of training, a parameter and token",
        )

    breakeven = commands.add_parser(
        "breakeven", help="how much smaller a scorer's model must be for scoring to pay"
    )
    breakeven.add_argument("--model", required=True, help="the model to train, folder or hub name")
    breakeven.add_argument("--flops", required=True, metavar="3e19", help="scoring included")
    breakeven.add_argument("--pool-tokens", required=True, metavar="100M")
    breakeven.add_argument(
        "--row-tokens", default="512", metavar="512", help="of a row, on average"
    )
    breakeven.add_argument(
        "--scorer", nargs="+", metavar="SCORER", help="perplexity, embedding, grad_cosine, less"
    )
    for command, do in (
        (fit, _fit),
        (predict, _predict),
        (allocate, _allocate),
        (breakeven, _breakeven),
    ):
        command.add_argument("--plot", metavar="FILE", help="a figure, .svg or .html")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(answer=do)


def answer(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The facts and the text of what was asked; files that were asked for are written."""
    found: tuple[dict[str, Any], str] = options.answer(options)
    return found


def _fit(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from thrifty import law_display
    from thrifty.core.quantities import parse_flops
    from thrifty.scaling import answers, fits, law_file
    from thrifty.scaling.points import read_points

    form = fits.form_named(options.form)
    if options.draws < 0 or options.seed < 0:
        raise ValueError("--draws and --seed are 0 or more\nhint: --draws 200 --seed 0")
    columns = dict(_pair(text) for text in options.column or ())
    read = read_points(options.file, columns, needs=form.needs)
    fit = fits.fit_law(
        read.points,
        options.form,
        num_draws=options.draws,
        seed=options.seed,
        source=f"{form.title} fitted to {Path(options.file).name}",
    )
    known = law_file.Known.of(fit)
    facts = {**law_file.facts_of(fit), "notes": [*read.notes, *fits.notes_of(fit)]}
    if known.largest is not None and facts["form"] != "tokens":
        budgets = [parse_flops(text) for text in options.at or ()]
        budgets = budgets or [6 * known.largest * times for times in (1, 10, 100)]
        facts["decisions"] = answers.decisions(known, budgets)
    if options.output:
        law_file.write_law(Path(options.output), fit, facts)
    if options.plot:
        _plot(options.plot, known, None)
    return facts, law_display.fit_text(facts, options.output)


def _predict(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from thrifty import law_display
    from thrifty.core.quantities import parse_parameters, parse_tokens
    from thrifty.scaling import answers
    from thrifty.scaling.law_file import read_law

    known = read_law(options.law)
    N = None if options.params is None else parse_parameters(options.params)
    facts = answers.predicted(known, N, parse_tokens(options.tokens), _conditions(options))
    if options.plot:
        _plot(options.plot, known, facts)
    return facts, law_display.predict_text(facts)


def _allocate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from thrifty import law_display
    from thrifty.core.quantities import parse_flops
    from thrifty.scaling import answers
    from thrifty.scaling.law_file import read_law

    if (options.flops is None) == (options.loss is None):
        raise ValueError("one of --flops and --loss is to be given\nhint: --flops 3e21")
    known = read_law(options.law)
    flops = None if options.flops is None else parse_flops(options.flops)
    facts = answers.allocated(known, flops, options.loss, _conditions(options))
    if options.plot:
        _plot(options.plot, known, facts)
    return facts, law_display.allocate_text(facts)


def _breakeven(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from thrifty import law_display
    from thrifty.breakeven import facts_of
    from thrifty.core.quantities import parse_flops, parse_tokens

    facts = facts_of(
        options.model,
        parse_flops(options.flops),
        parse_tokens(options.pool_tokens),
        parse_tokens(options.row_tokens),
        options.scorer,
    )
    if options.plot:
        from thrifty.report.law_figures import breakeven_figure, write_figure

        write_figure(Path(options.plot), breakeven_figure(facts), "When scoring pays")
    return facts, law_display.breakeven_text(facts)


def _conditions(options: argparse.Namespace) -> Any:
    from thrifty.core.quantities import parse_tokens
    from thrifty.scaling.allocation import Conditions

    served = getattr(options, "serve", None)
    return Conditions(
        unique=float("inf") if options.unique is None else parse_tokens(options.unique),
        served=0.0 if served is None else parse_tokens(served),
        training=_positive("--train-flops", options.train_flops),
        serving=_positive("--serve-flops", getattr(options, "serve_flops", 2.0)),
    )


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is FLOPs a parameter and token, not {value:g}\nhint: 6 and 2")
    return value


def _pair(text: str) -> tuple[str, str]:
    field, sign, name = text.partition("=")
    if not sign:
        raise ValueError(f"--column {text!r} names no column\nhint: --column loss=val_loss")
    return field, name


def _plot(path: str, known: Any, facts: dict[str, Any] | None) -> None:
    from thrifty.report.law_figures import law_figure, write_figure

    write_figure(Path(path), law_figure(known, facts), "Loss by parameters and tokens")
