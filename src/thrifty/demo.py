"""The main job on text that every Python has: its own standard library (``data/corpus.py``).

A tokenizer and a Llama of about a million parameters are made first, from other packages' rows and
outside the budget, so that the job starts from a model that knows something; then `plan` and `run`
as for any model and pool, with a control on a uniform choice at the same total FLOPs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from thrifty import pipeline, plan_display, preparation
from thrifty.core.budget import Budget
from thrifty.core.plan import Target
from thrifty.costs.hardware import cache_folder
from thrifty.data.corpus import CorpusFiles, write_corpus
from thrifty.preparation import Asked, Say
from thrifty.pretrain import pretrain
from thrifty.report.summary import summarize, text_summary
from thrifty.run_folder import RunFolder

BUDGET = Budget(flops=1.4e12, seconds=120.0, memory_bytes=3 * 2**30)
"""About 40 seconds on one quiet core; the time limit ends the run well on a busy one."""
SETTINGS = {
    "training.max_length": 256,
    "training.per_device_train_batch_size": 4,
    "training.gradient_accumulation_steps": 1,
    "training.learning_rate": 3e-3,
    "training.eval_steps": 20,
    "pilot.share": 0,
}
"""What the planner is not asked: sequences and rate as the base model was made with, and small
steps, for a model this small learns most from many of them; and no pilot, which would take longer
than what it could tell in so short a run is worth."""


def run(folder: Path, say: Say) -> Path:
    """Make, plan and run the demo in ``folder``, going on with one that was interrupted."""
    if not (folder / "plan.yaml").is_file():
        home = cache_folder() / "demo"
        say("the corpus: functions of Python's standard library, target: asyncio")
        corpus = write_corpus(home / "corpus")
        base = _base_model(home, corpus, say)
        asked = Asked(
            model=str(base),
            pool=(str(corpus.pool),),
            targets={
                corpus.target: Target(
                    signal=(str(corpus.signal),),
                    dev=(str(corpus.dev),),
                    test=(str(corpus.test),),
                )
            },
            budget=BUDGET,
            control=True,
            fixed=SETTINGS,
        )
        planned, request, _ = preparation.plan_run(asked, folder, say)
        print(plan_display.plan_text(planned, request), end="\n\n", flush=True)
    pipeline.run(folder, say)
    print("\n" + text_summary(summarize(RunFolder(folder))))
    return folder


def _base_model(home: Path, corpus: CorpusFiles, say: Say) -> Path:
    """Cached by what it was made from."""
    mark = corpus.sha256["pretrain"][:12]
    base = home / f"base-{mark}"
    if (base / "config.json").is_file():
        return base
    say("pretraining the base model on other packages: once, outside the budget")
    draft = home / f".{base.name}.new"
    shutil.rmtree(draft, ignore_errors=True)
    made = pretrain(corpus.texts("pretrain"), draft)
    draft.rename(base)
    say(f"{made.num_parameters:,} parameters, loss {made.losses[0]:.2f} -> {made.losses[-1]:.2f}")
    return base
