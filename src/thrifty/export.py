"""``thrifty export``: a run's rows and plan, in the files of another program that trains.

data/train.jsonl  data/validation.jsonl   the chosen rows in their order, and the dev rows
sft.yaml, axolotl.yaml, train.yaml        the program's configuration
README.txt                                how to train, and what does not translate
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from thrifty import exporters
from thrifty.asked_rows import POOL_AS_TARGET
from thrifty.core.durable import write_atomically
from thrifty.core.plan import Plan
from thrifty.core.typed import nearest
from thrifty.costs.hardware import load_device
from thrifty.costs.shape import read_shape
from thrifty.data.pool import Row
from thrifty.data.store import Store, open_store
from thrifty.exported import DATA, TRAIN, VALIDATION, Exportable, Exporter, Form, Translation
from thrifty.memory_plan import Techniques
from thrifty.predictions import setting_of
from thrifty.run_folder import RunFolder
from thrifty.selected import MANIFEST, check_selected
from thrifty.signals.models import locate

README = "README.txt"
_BLOCK_ROWS = 4096
_WIDTH = 88


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, where, and what does not translate."""

    folder: Path
    command: str
    untranslated: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.folder}: train with `{self.command}` there", "does not translate:"]
        return "\n".join([*lines, *(f"  {line}" for line in self.untranslated)])


def export(
    run: RunFolder,
    to: str,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
    take_nearest: bool = False,
) -> Export:
    """Write ``run`` for the program ``to`` into ``folder``, RUN/export/TO unless given.

    ``take_nearest``: also where the program lacks a technique that decides what fits in memory.
    Raises ValueError where there is nothing to write yet, or what there is cannot be written.
    """
    exporter = exporter_named(to)
    folder = run.path / "export" / to if folder is None else folder
    plan = run.plan()
    if plan.task == "preference":
        raise ValueError(
            "a plan of task preference is not written for other programs yet: what they are given "
            "is one answer a row\n"
            "hint: the chosen pairs lie in RUN/selected, a jsonl that TRL's DPOTrainer reads"
        )
    selected = run.selected("budget")
    if not (selected / MANIFEST).is_file():
        raise ValueError(
            f"{run.path} has no selection yet\nhint: `thrifty select {run.path}` makes it"
        )
    pool = open_store(run.pool)
    check_selected(selected)
    ids = np.load(selected / "ids.npy", allow_pickle=False)
    form = _one_form(_rows(pool, ids), selected)
    dev, left_out = _dev_stores(run, plan, form)
    asked = _exportable(plan, form, has_dev=bool(dev))
    into = Translation(exporter.program)
    exporter.translate(asked, into)
    if left_out:
        into.lacks("dev rows", f"those of {', '.join(left_out)} are of another form, and left out")
    if (count := plan.training.devices) > 1:
        how = "a share of the weights each, FSDP" if plan.training.is_cut else "all weights each"
        into.lacks("devices", f"start it as {count} processes ({how}), or its batch is smaller")
    if _has_weights(selected):
        into.lacks("weights of rows", "the picker's; every row counts alike")
    if into.refused and not take_nearest:
        raise ValueError(
            f"{exporter.program} cannot hold the step as planned:\n"
            + "\n".join(into.refused)
            + "\nhint: --nearest takes that, and another amount of memory; or plan again with "
            "another technique, or export to another program"
        )
    for line in into.refused:
        into.untranslated.append(f"{line}, which takes another amount of memory")
    _check_free(folder, exporter, overwrite)
    _write_rows(folder / DATA / f"{TRAIN}.jsonl", exporter, asked, _rows(pool, ids))
    validation = folder / DATA / f"{VALIDATION}.jsonl"
    validation.unlink(missing_ok=True)
    if dev:
        _write_rows(validation, exporter, asked, (row for store in dev for row in _all_rows(store)))
    for name, content in exporter.files(asked).items():
        write_atomically(folder / DATA / name, json.dumps(content, indent=2) + "\n")
    write_atomically(folder / exporter.file, yaml.safe_dump(into.settings, sort_keys=False))
    write_atomically(folder / README, _readme(run, exporter, into, len(ids)))
    return Export(folder=folder, command=exporter.command, untranslated=tuple(into.untranslated))


# -- the programs -------------------------------------------------------------------------------


def exporter_names() -> list[str]:
    """One for each file of ``exporters/``."""
    return sorted(module.name for module in pkgutil.iter_modules(exporters.__path__))


def exporter_named(name: str) -> Exporter:
    """Raises ValueError, with the nearest name, where there is none."""
    import importlib

    if name not in exporter_names():
        raise ValueError(f"cannot export to {name!r}\nhint: {nearest(name, exporter_names())}")
    module = importlib.import_module(f"{exporters.__name__}.{name}")
    (found,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type)
        and issubclass(each, Exporter)
        and each.__module__ == module.__name__
    )
    return found()


# -- the run ------------------------------------------------------------------------------------


def _exportable(plan: Plan, form: Form, *, has_dev: bool) -> Exportable:
    from thrifty.data.tokens import load_tokenizer

    base, _ = locate(plan.model.path, plan.model.revision, weights=False)
    tokenizer = load_tokenizer(str(base))
    if form in ("messages", "turns") and tokenizer.chat_template is None:
        raise ValueError(
            f"the rows are conversations, and the tokenizer of {plan.model.path} has no chat "
            "template, which other programs need\nhint: give its folder a chat_template.jinja"
        )
    shape = read_shape(base)
    begin = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    local = Path(plan.model.path).expanduser()
    return Exportable(
        plan=plan,
        techniques=Techniques.of(plan.training.memory),
        setting=setting_of(
            plan.training, shape, load_device(None if plan.device == "local" else plan.device)
        ),
        shape=shape,
        base=str(local.resolve()) if local.is_dir() else plan.model.path,
        form=form,
        has_dev=has_dev,
        begin=tokenizer.bos_token if begin else "",
        end=tokenizer.eos_token or "",
    )


def _dev_stores(run: RunFolder, plan: Plan, form: Form) -> tuple[list[Store], list[str]]:
    """Of the targets whose dev rows have the chosen rows' form, and names of the others."""
    kept, left_out = [], []
    for name in plan.targets or [POOL_AS_TARGET]:
        store = open_store(run.target(name, "dev"))
        if {_form(row) for row in _all_rows(store)} == {form}:
            kept.append(store)
        else:
            left_out.append(name)
    return kept, left_out


def _form(row: Row) -> Form:
    if row.kind == "messages":
        return "messages"
    if row.kind == "text":
        return "text"
    return "strings" if isinstance(row.content["completion"], str) else "turns"


def _one_form(rows: Iterable[Row], selected: Path) -> Form:
    """Raises ValueError where the chosen rows have several."""
    forms = {_form(row) for row in rows}
    if len(forms) > 1:
        raise ValueError(
            f"the rows in {selected} are of several forms: {', '.join(sorted(forms))}; a trainer "
            "reads one\nhint: plan with a pool of one form"
        )
    return forms.pop()


def _rows(pool: Store, ids: Any) -> Iterator[Row]:
    """In the order in which they were picked."""
    for start in range(0, len(ids), _BLOCK_ROWS):
        yield from pool.take(ids[start : start + _BLOCK_ROWS]).rows


def _all_rows(store: Store) -> Iterator[Row]:
    return (row for shard in store.shards() for row in shard.rows)


def _has_weights(selected: Path) -> bool:
    with (selected / "selected.jsonl").open(encoding="utf-8") as lines:
        return any(json.loads(line)["weight"] != 1.0 for line in lines)


# -- the files ----------------------------------------------------------------------------------


def _check_free(folder: Path, exporter: Exporter, overwrite: bool) -> None:
    """Nothing is written over unasked."""
    if overwrite or not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file\nhint: -o takes a folder")
    found = sorted(path.name for path in folder.iterdir())
    if found:
        raise ValueError(
            f"{folder} holds {', '.join(found[:5])} already\n"
            f"hint: --overwrite writes {DATA}, {exporter.file} and {README} anew; or -o FOLDER"
        )


def _write_rows(path: Path, exporter: Exporter, asked: Exportable, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(exporter.row(asked, row.content), ensure_ascii=False) + "\n")
    draft.replace(path)


def _readme(run: RunFolder, exporter: Exporter, into: Translation, num_rows: int) -> str:
    import textwrap

    needs = "".join(f", {package}" for package in dict.fromkeys(into.packages))
    lines = [
        f"{run.path.name}, as thrifty planned it, for {exporter.program}: {num_rows:,} rows",
        "",
        f"    {exporter.install}",
        f"    {exporter.command}",
        "",
        f"in this folder leaves the model in model/. It takes {exporter.program}{needs}.",
        "",
        "What does not translate:",
        "",
    ]
    for line in into.untranslated:
        lines += textwrap.wrap(line, _WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join([*lines, ""])
