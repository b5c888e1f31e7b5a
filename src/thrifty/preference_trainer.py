"""Training on pairs: TRL's ``DPOTrainer`` under the project's plan, budget, schedule and saves.

    L = -log sigmoid(beta [log p(chosen) - log p(rejected) - the same under the reference])

the mean over the pairs of a batch (arXiv:2305.18290). Of TRL: the loss, its head that never holds
all logits, and what it logs. Of ``BudgetedTrainer``: all else. Between the two lies the reference,
which is the model before the first step:

| | asked | holds | takes |
| --- | --- | --- | --- |
| precomputed | before the first step, once for every pair | two numbers a pair | a forward a pair |
| adapter off | at every step, of the model without its adapter | nothing | a forward a step |
| resident | at every step, of a frozen copy | the weights again | a forward a step |

What it said is kept beside the checkpoints, so that a run that resumes is told the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl import DPOConfig, DPOTrainer

from thrifty.checkpoints import Checkpoint
from thrifty.core.arrays import load_arrays, save_arrays
from thrifty.core.contracts import Meter
from thrifty.core.ledger import Stage
from thrifty.core.plan import Preference
from thrifty.data.pairs import collate
from thrifty.evaluation import Measured
from thrifty.pair_evaluation import PairLosses, answer_log_probs, log_probs_of
from thrifty.trainer import BudgetedTrainer
from thrifty.training_job import TrainingJob
from thrifty.training_rows import BEFORE_TRAINING

_MOST_OF_MARK = 12


class PreferenceTrainer(BudgetedTrainer, DPOTrainer):  # type: ignore[misc]
    """``DPOTrainer`` on pairs that are tokenised already, held to a budget."""

    def __init__(self, job: TrainingJob, stage: Stage, newest: Checkpoint | None) -> None:
        assert job.training.preference is not None
        self._preference: Preference = job.training.preference
        self._losses: PairLosses | None = None
        """Against the reference; None until it was asked for the dev pairs."""
        super().__init__(job, stage, newest)
        self.train_dataset = job.data
        self.precompute_ref_logps = True  # whenever it is asked, TRL is told what it said
        self.ref_model = self._resident()
        if newest is not None:
            self._losses = PairLosses(self._preference.beta, self._known(self._dev_file))
        if self._asks_once and (newest is not None or self._rows_file.is_file()):
            job.data.reference = self._known(self._rows_file)["rows"]

    # -- what TRL is given -------------------------------------------------------------------------

    def _settings(self, arguments: dict[str, Any]) -> DPOConfig:
        return DPOConfig(
            **arguments,
            beta=self._preference.beta,
            max_length=self.job.training.max_length,
            precompute_ref_log_probs=True,
            bf16=False,  # the memory plan says what the weights are held in
            activation_checkpointing=False,  # and what is kept of the activations
        )

    def _batches(self) -> dict[str, Any]:
        """TRL wants a ``datasets.Dataset`` to begin with; it is given the pairs afterwards."""
        from datasets import Dataset

        none = Dataset.from_list([{"row": 0}])
        return {"train_dataset": none, "eval_dataset": none, "data_collator": collate}

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Which would tokenise it."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Which would ask the reference where nothing is charged."""
        return dataset

    def _send_telemetry(self) -> None:
        """Nobody is told what is trained here."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Which would go into every checkpoint."""

    def _check(self) -> None:
        """Each answer is a row of its own. TRL's copy of the adapter is not needed as a reference:
        the model without one is."""
        if "ref" not in getattr(self.model, "peft_config", {}):
            return
        with _requiring_as_before(self.model):
            self.model.delete_adapter("ref")

    # -- the reference -----------------------------------------------------------------------------

    @property
    def _asks_once(self) -> bool:
        return self._preference.precompute_ref_log_probs

    @property
    def _rows_file(self) -> Path:
        return self._file("rows")

    @property
    def _dev_file(self) -> Path:
        return self._file("dev")

    def _file(self, what: str) -> Path:
        return self.job.checkpoints / f"reference-{what}-{self.job.mark[:_MOST_OF_MARK]}.npz"

    def _known(self, file: Path) -> Mapping[str, Any]:
        try:
            return load_arrays(file)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"what the reference model said is not in {file}: {error}\n"
                f"hint: put it back, or delete {self.job.checkpoints} to train anew"
            ) from None

    def _resident(self) -> Any:
        """A frozen copy of the model, where all its weights are trained and it is asked at every
        step."""
        if self._asks_once or self.job.setting.adapter is not None:
            return None
        from trl.trainer.utils import add_fused_lm_head

        model = self._techniques.weights.load(self.job.base, self.job.device)
        model.requires_grad_(False).eval()
        add_fused_lm_head(model)
        return model

    def _ask_for_rows(self) -> None:
        """The log-probabilities of every pair that may be trained on, under the model as it is."""
        pairs, upper = (
            self.job.data.examples,
            self._cost_of("reference", self.job.predicted_reference),
        )
        self.job.say(f"  asking the reference for {len(pairs):,} pairs ...")
        most = self.job.training.micro_batch_tokens
        with self.budget.activity("reference", upper, step=BEFORE_TRAINING) as lease:
            found = answer_log_probs(self.model, self._shape, pairs, lease, most)
            self.job.data.reference = found.astype(np.float32)
            save_arrays(self._rows_file, {"rows": self.job.data.reference})

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ever; before the first step the reference is asked."""
        if self._asks_once and self.job.data.reference is None:
            self._ask_for_rows()
        return super().evaluate(*args, **kwargs)

    def _measure(self, meter: Meter) -> Measured:
        job = self.job
        shape = job.yardstick.shape
        found = log_probs_of(self.model, shape, job.dev, meter, self._most_tokens)
        if self._losses is None:  # before the first step the model is the reference
            self._losses = PairLosses(self._preference.beta, found)
            save_arrays(self._dev_file, found)
        return self._losses.measured(found, job.weights)

    def num_rows(self, batch: Any) -> int:
        """Pairs: chosen answers and rejected ones lie in two halves."""
        return len(batch["input_ids"]) // 2

    # -- the loss ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's, told what the reference says."""
        if not self._asks_once:
            inputs = {**inputs, **self._reference_of(inputs)}
        return DPOTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _reference_of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Its log-probabilities of the answers of a batch, a forward that the setting of the step
        counts."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        seen = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self._reference() as reference:
            said = reference(**seen, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        chosen, rejected = said.sum(1).chunk(2)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        if self.ref_model is not None:
            yield self.ref_model
            return
        inner, model = self._inner(), self.model
        with _requiring_as_before(model), model.disable_adapter():
            training = model.training
            inner.eval()  # no layer of it runs again, since there is no backward
            try:
                yield inner
            finally:
                model.train(training)


@contextmanager
def _requiring_as_before(model: Any) -> Iterator[None]:
    """PEFT has whole adapters require a gradient whenever it turns them on."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, was in required:
            parameter.requires_grad_(was)
