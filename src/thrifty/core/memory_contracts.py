"""The extension points of memory: one way to hold a part of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from thrifty.core.worth import Worth

if TYPE_CHECKING:
    from thrifty.costs.setting import MemorySetting
    from thrifty.costs.shape import ModelShape


class MemoryTechnique(ABC):
    """One way to hold a part of a training step: the weights, what is trained of them, the
    optimizer's states, the activations, or the loss.

    A combination takes one of each. Each rewrites the setting that ``costs/memory.py`` evaluates,
    in the order of ``MEMORY_KINDS``, since what they save does not add up.
    """

    makes: ClassVar[Literal["fit", "faster"]]
    """What it is for: to make a model fit, or to get more from a FLOP."""
    runs: ClassVar[bool]
    """Whether a run of thrifty can train with it; otherwise it is priced alone."""
    shards: ClassVar[bool] = False
    """Whether a run can train with it where the weights are cut over its devices."""
    searched: ClassVar[bool] = True
    """Whether a search tries it unasked: not where another of its kind holds the step alike."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Packages that it takes."""
    source: ClassVar[str]
    worth: ClassVar[Worth]
    """Of a token trained on under it, in tokens under the reference."""
    worth_trained: ClassVar[Worth | None] = None
    """The same where the weights that it holds are trained themselves."""

    def refuses(self, setting: MemorySetting) -> str | None:
        """Why it cannot be combined with what ``setting`` has so far; None where it can."""
        return None

    def refuses_model(self, shape: ModelShape, device_kind: str) -> str | None:
        """Why it does not go with a model of this shape there; None where it does."""
        return None

    @abstractmethod
    def rewrite(self, setting: MemorySetting) -> MemorySetting: ...

    @classmethod
    def variants(cls) -> tuple[MemoryTechnique, ...]:
        """The forms in which a search tries it."""
        return (cls(),)


class Trainable(MemoryTechnique):
    """What of the model is trained. Where it is not all of it, ``prepare`` says how."""

    learning_rate: ClassVar[float] = 1.0
    """The usual one, in that of training all weights."""
    short: int = 0
    """An option of those whose rows have two packs: the tokens of the first, which alone gets a
    backward."""
    switches: ClassVar[bool] = False
    """Whether a run may go over to it, or from it, on the way: it begins as the model is, whatever
    that was trained by, and what it leaves merges into the model's weights."""

    def prepare(self, model: Any, shape: ModelShape, seed: int) -> Any:
        """The model to train: ``model`` itself or what is wrapped around it, what is to be trained
        requiring a gradient and nothing else."""
        return model

    def save(self, model: Any, folder: Path) -> bool:
        """Leave in ``folder`` what stock libraries load on the base model, where that is not what
        ``save_pretrained`` leaves; whether there was need to."""
        return False

    def restore(self, model: Any, folder: Path) -> bool:
        """Give ``model``, as it was prepared, what was trained of it, out of a checkpoint or of the
        model that a run left, where neither the Trainer nor PEFT can; whether there was need to."""
        return False

    def publish(self, checkpoint: Path, folder: Path, base: Path) -> bool:
        """Leave in ``folder`` what stock libraries load, made of a checkpoint and of the base
        model's files, where the checkpoint holds no such; whether there was need to."""
        return False

    def at_step(self, model: Any, optimizer: Any, step: int, seed: int) -> None:
        """Called before each step, the first 0: where what is trained changes on the way, have
        that require a gradient and nothing else. A function of the step and the seed."""

    def setting_at(
        self, setting: MemorySetting, shape: ModelShape, step: int, seed: int
    ) -> MemorySetting:
        """How ``step`` is held, of a run that is held as ``setting`` says."""
        return setting

    def cycle_steps(self, shape: ModelShape) -> int:
        """Steps after which all that it trains was trained; a run must have as many."""
        return 1

    def schedule_step(self, step: int, shape: ModelShape) -> int:
        """The step of the schedule whose learning rate ``step`` has."""
        return step

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape, seed: int) -> Any:
        """One of its own, where its update is not by a gradient's backward; else None. ``groups``
        as for ``OptimizerStates``. It has ``estimate(loss) -> loss``, called for each micro-batch
        of a step instead of a forward and a backward, or before those of its ``short`` packs;
        ``loss()`` is the micro-batch's, or of its other packs."""
        return None


class WeightStorage(MemoryTechnique):
    """How the weights lie in memory."""

    merges: ClassVar[bool] = False
    """Whether an adapter can be merged into them, to within their own rounding."""

    @abstractmethod
    def load(self, folder: Path, device: str) -> Any:
        """The base model in ``folder``, as it is to be held."""

    def load_sharded(self, folder: Path, device: str, count: int) -> Any:
        """The same, cut over ``count`` ranks, which ask for it together; where ``shards`` says that
        it can be."""
        raise NotImplementedError


class ActivationMemory(MemoryTechnique):
    """What is kept from the forward to the backward."""

    def hold(self, model: Any) -> None:
        """Have ``model``, as it is trained, keep no more than that."""


class LossMemory(MemoryTechnique):
    """How many logits exist at a time."""

    def hold(self, model: Any) -> None:
        """Have ``model``, as it is trained, make its loss this way where it is given labels."""


class OptimizerStates(MemoryTechnique):
    """What the optimizer keeps, and how it updates."""

    learning_rate: ClassVar[float] = 1.0
    """The usual one, in that of AdamW."""

    @abstractmethod
    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        """A ``torch.optim.Optimizer`` whose ``state_dict`` is all that it knows. ``groups``: each
        with its ``params`` as (name, parameter) pairs, its ``lr`` and its ``weight_decay``."""


MEMORY_KINDS = ("trained", "weights", "activations", "loss", "states")
"""In the order in which they rewrite a setting."""
