"""Answer a pool of questions under a budget: whom to ask, how often, when to stop, on one ledger.

    decoded = thrifty.decode(
        ["What is 6 x 7?", ...], backends=[Endpoint(url, name)], answer="number",
        budget=Budget(dollars=2.0), folder="runs/answers")

Draws of many questions are under way together; each holds the most that it can take and settles for
what it took, so that no limit is passed. What came is written down as it comes: the same call goes
on where a kill left it, and what was under way counts as spent.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from thrifty.answering import Answering, Settings
from thrifty.asked_questions import Answer, Questions
from thrifty.backends.backend import Backend
from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.contracts import AnswerForm, DecodingPolicy
from thrifty.core.ledger import Ledger
from thrifty.core.purse import Purse
from thrifty.core.resolve import Spec, name_of, resolve, spec_of
from thrifty.core.sampling import Outcome
from thrifty.decode_record import Record
from thrifty.policies import choose_policy
from thrifty.prompts import Prompt, prompts_of
from thrifty.rewards import Function, reward_named, scoring
from thrifty.run_folder import locked

if TYPE_CHECKING:
    from thrifty.signals.reward_model import RewardModel

LIMITS = ("concurrency", "max_samples", "mean_samples", "price")
"""Settings that may change when a decoding is gone on with."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    answers: tuple[Answer, ...]
    """In the order of the prompts."""
    spent: Cost
    resource: str
    """In which the answers' costs are told."""
    policy: Spec
    why: str
    """It was that policy."""

    @property
    def accuracy(self) -> float | None:
        """Of the questions whose gold answers are known; None: of none."""
        known = [answer.correct for answer in self.answers if answer.correct is not None]
        return sum(known) / len(known) if known else None


def decode(prompts: Sequence[str | Mapping[str, Any] | Prompt], **options: Any) -> Decoded:
    """As ``decode_async``, and lets go of the backends' connections; within a running event loop on
    a thread of its own."""

    async def work() -> Decoded:
        try:
            return await decode_async(prompts, **options)
        finally:
            for backend in options.get("backends", ()):
                await backend.close()

    return _run(work())


async def decode_async(
    prompts: Sequence[str | Mapping[str, Any] | Prompt],
    *,
    backends: Sequence[Backend],
    policy: Spec | DecodingPolicy = "auto",
    answer: Spec | AnswerForm | None = "exact",
    budget: Budget | None = None,
    settings: Settings | None = None,
    folder: str | Path | None = None,
    fit_on: Sequence[Outcome] = (),
    reward: Function | RewardModel | str | Path | None = None,
    ledger: Ledger | None = None,
    on_answer: Callable[[Answer, int], None] | None = None,
    on_samples: Callable[[int], None] | None = None,
) -> Decoded:
    """Answer ``prompts`` (texts, or mappings with ``prompt`` or ``messages``, ``id`` and ``gold``).

    ``backends``: the models at hand, the cheapest first. ``answer``: how an answer is read in a
    text; None: texts are answers as they stand. ``fit_on``: outcomes with gold answers, for
    policies that learn. ``reward(prompt, text)``: higher is better; or a reward model's folder,
    whose passes are charged. ``folder`` keeps what came; without it a kill loses it. ``ledger``:
    where it is charged; left out, one of its own in the folder, with ``budget`` as its limits.
    ``on_answer(answer, finished)`` hears of each answer, ``on_samples(count)`` of each draw that
    brought some.

    Raises ValueError where something cannot be as asked, and ``NobodyAnswers`` where the models
    keep failing.
    """
    form: AnswerForm | None = _resolved("answer", answer)
    if form is not None:
        form.check()
    given = prompts_of(prompts)
    settings = settings or Settings()
    if isinstance(reward, str | Path):
        reward = reward_named(str(reward))
    why = "as asked"
    if policy == "auto":
        names = [backend.model for backend in backends]
        most = min(settings.max_samples, settings.mean_samples or settings.max_samples)
        policy, why = choose_policy(
            names, form is not None, reward is not None, fit_on, most, settings.price
        )
    chosen: DecodingPolicy = _resolved("policy", policy)
    judged = scoring(backends, reward, chosen)
    why += f"; {judged.unused}" if judged.unused else ""
    asked = Questions(given, form, judged.function)
    with ExitStack() as stack:
        place = Path(folder) if folder else Path(stack.enter_context(TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(place))
        identity = {
            "prompts": asked.digest,
            "models": [backend.model for backend in backends],
            "policy": spec_of(chosen),
            "answer": None if form is None else spec_of(form),
            "settings": {k: v for k, v in asdict(settings).items() if k not in LIMITS},
            "reward": judged.digest,
        }
        record = Record(place, identity)
        stack.callback(record.close)
        if ledger is None:
            ledger = stack.enter_context(_own_ledger(place, budget or Budget(), backends))
        stage = stack.enter_context(ledger.stage("decode", name_of(chosen), reopen=True))
        purse = stack.enter_context(Purse(stage, "decode"))
        work = Answering(asked, judged.backends, chosen, settings, record, purse)
        work.begin(fit_on)
        stage.decide("decode", name_of(chosen), why)
        answers = await work.run(on_answer, on_samples)
        record.finish(asdict(each) for each in answers)
        record.finish_recording(asked.recording())
        purse.close()
        return Decoded(
            answers=answers,
            spent=ledger.spent(stage="decode", account=stage.account),
            resource=work.resource,
            policy=spec_of(chosen),
            why=why,
        )


def _resolved(kind: str, given: Any) -> Any:
    """A method, from its name or as it is."""
    return resolve(kind, given) if isinstance(given, str | Mapping) else given


@contextmanager
def _own_ledger(folder: Path, budget: Budget, backends: Sequence[Backend]) -> Iterator[Ledger]:
    """Of the folder. What was under way when a process died counts as the most that it can have
    taken."""
    path = folder / "ledger.sqlite"
    # Who asks by the token pays for no time; with no price at all dollars stay unknown.
    rates = Rates(dollars_per_second=0.0, watts=None)
    ledger = Ledger(path) if path.is_file() else Ledger.create(path, budget, rates)
    with ledger:
        ledger.recover()
        ledger.set_budget(budget)
        yield ledger


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(asyncio.run(work))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="thrifty-decode")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
