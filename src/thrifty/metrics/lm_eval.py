"""lm_eval: a task of EleutherAI's lm-evaluation-harness, its prompts, its filters and its score.

The task's own questions, few-shot examples included, stand in place of the target's dev and test
rows: half of them each, by hash. Answers are generated as for every metric, greedily and charged;
what follows one of the task's ``until`` texts is left out, then the task's first filter and first
score say what the answer is worth. Tasks that ask for likelihoods instead of answers (multiple
choice) are refused. Takes the extra ``lm-eval``, and the task's data: from the hub, or of a task
file of yours that names local ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import inf
from typing import Any, ClassVar, Literal

from thrifty.core.contracts import AnswerMetric, Question
from thrifty.core.ranges import check_ranges
from thrifty.data.splits import part_of


@dataclass(frozen=True, kw_only=True)
class LmEval(AnswerMetric):
    """A task of lm-evaluation-harness, on its own questions."""

    task: str = ""
    """Its name there: ``gsm8k``."""
    include_path: str = ""
    """A folder of task files, which is then the only place that is looked in."""
    num_fewshot: int | None = None
    """None: as the task has it."""
    limit: int = 0
    """Questions of each half at most; 0: all."""

    source: ClassVar[str] = "github.com/EleutherAI/lm-evaluation-harness"
    asks_own: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, num_fewshot=(0, inf), limit=(0, inf))

    @property
    def unit(self) -> str:
        return self.task or "lm_eval"

    def check(self) -> None:
        if not self.task:
            raise ValueError(
                "metric lm_eval needs a task\nhint: objective.metric: {lm_eval: {task: gsm8k}}"
            )
        self._asked()

    def questions(self, part: Literal["dev", "test"]) -> Sequence[Question]:
        halves = {"dev": 0.5, "test": 0.5}
        found = []
        for prompt, (task, request) in self._asked().items():
            mark = blake2b(prompt.encode(), digest_size=16).digest()
            if part_of(mark, halves, seed=0) == part:
                found.append(Question(prompt=prompt, gold=_gold(task, request.doc)))
        if not found:
            raise ValueError(
                f"task {self.task} has too few questions to be split into dev and test: "
                f"{len(self._asked())}\nhint: another task"
            )
        return found[: self.limit or None]

    def score(self, prompt: str, answer: str, gold: str) -> float:
        task, request = self._asked()[prompt]
        for end in request.args[1].get("until", ()):
            answer = answer.partition(end)[0]
        asked = copy(request)
        asked.resps, asked.filtered_resps = [answer], {}
        name = task._filters[0].name
        task._filters[0].apply([asked])
        scores = task.process_results(asked.doc, [asked.filtered_resps[name]])
        return float(next(iter(scores.values())))

    def _asked(self) -> dict[str, Any]:
        return _requests(self.task, self.include_path, self.num_fewshot)


@lru_cache(maxsize=2)
def _requests(name: str, include_path: str, num_fewshot: int | None) -> dict[str, Any]:
    """Prompt -> the task and its request, in the task's order."""
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError:
        raise ValueError(
            "metric lm_eval takes lm-evaluation-harness, which is not installed\n"
            "hint: pip install 'thrifty[lm-eval]'"
        ) from None
    try:
        tasks = TaskManager(include_path=include_path or None, include_defaults=not include_path)
        (task,) = get_task_dict([name], tasks).values()
        if task.OUTPUT_TYPE == "generate_until":
            if num_fewshot is not None:
                task.set_config(key="num_fewshot", value=num_fewshot)
            task.set_fewshot_seed(seed=0)
            task.build_all_requests(rank=0, world_size=1)
    except Exception as error:  # a missing data set, a broken file: theirs to say
        raise ValueError(
            f"task {name} of lm-evaluation-harness cannot be loaded: "
            f"{type(error).__name__}: {str(error)[:300]}\n"
            "hint: is its name right (a single task, no group), and are its data on this machine?"
        ) from error
    if task.OUTPUT_TYPE != "generate_until":
        raise ValueError(
            f"task {name} asks for {task.OUTPUT_TYPE}, not for answers that are generated\n"
            "hint: a task of output_type generate_until, as gsm8k; or steer by dev_loss"
        )
    first = next(iter(task.higher_is_better().values()))
    if not first:
        raise ValueError(f"of task {name} less is better\nhint: another task")
    return {request.args[0]: (task, request) for request in task.instances}


def _gold(task: Any, doc: Any) -> str:
    target = task.doc_to_target(doc)
    first = target[0] if isinstance(target, list) else target
    return f"{task.config.target_delimiter}{first}"
