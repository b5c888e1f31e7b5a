"""A plan's training in Hugging Face's words."""

from __future__ import annotations

from typing import Any

from thrifty.training_job import TrainingJob


def arguments_of(job: TrainingJob, *, resumed: bool) -> dict[str, Any]:
    """Of ``TrainingArguments``."""
    training = job.training
    return dict(
        output_dir=str(job.checkpoints),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_train_batch_size * job.rounds.method.larger,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        eval_on_start=not resumed,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_only_model=training.is_cut,  # or else it refuses to; all is saved
        save_total_limit=None,  # retention is ours, by step: theirs goes by file times
        logging_steps=max(1, training.eval_steps // 4),
        logging_nan_inf_filter=False,  # a loss that is not finite is not to be averaged away
        remove_unused_columns=False,  # which row a token is of is no input of the model
        train_sampling_strategy="sequential",  # the data's own order, the same after a resume
        report_to=list(training.report_to) or "none",
        restore_callback_states_from_checkpoint=False,  # the ledger has them
        disable_tqdm=True,
        dataloader_pin_memory=job.device != "cpu",
        ddp_find_unused_parameters=False,
        use_cpu=job.device == "cpu",
        seed=training.seed,
        data_seed=training.seed,
    )
