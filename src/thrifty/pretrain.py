"""A small base model from text alone: a tokenizer and a Llama-architecture model, made together.

The embedded default and the benchmarks need base models whose scores mean something and that need
no download: 1-10M parameters, byte-level BPE, tied embeddings, heads of 32, a feed-forward width of
four times the hidden size. Texts are joined end to end, ``<s> text </s>``, and cut into sequences
of one length; each step trains on the next ``batch_size`` of them in a shuffled order.

The result is an ordinary ``transformers`` folder. The same texts and settings give the same weights
on the same machine and version of torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

RECORD = "pretraining.json"
"""What the model was made of and how; written last, so that its presence means a whole folder."""
_SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_LEAST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)
_HEAD_SIZE = 32
_WARMUP_SHARE = 0.05
_COOLDOWN_SHARE = 0.2
_BATCH_OF_TEXTS = 1024


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A base model as ``pretrain`` left it."""

    directory: Path
    num_parameters: int
    num_tokens: int
    """Trained on, repeats counted."""
    epochs: float
    losses: tuple[float, ...]
    """Training loss in nats a token: the mean of each twentieth of the run."""


def pretrain(
    texts: Iterable[str],
    directory: Path | str,
    *,
    vocab_size: int = 2048,
    hidden_size: int = 128,
    num_layers: int = 3,
    sequence_length: int = 256,
    batch_size: int = 2,
    steps: int = 320,
    learning_rate: float = 2e-3,
    seed: int = 0,
    show_progress: bool = True,
) -> Pretrained:
    """Train a tokenizer and a model on ``texts`` and leave both in ``directory``.

    A directory that holds this very model already, by its record, is returned as it is. The
    vocabulary is smaller than ``vocab_size`` where the texts have too few different pairs.
    """
    texts = [text for text in ([texts] if isinstance(texts, str) else texts) if text]
    _check(texts, vocab_size, hidden_size, num_layers, sequence_length, batch_size, steps)
    directory = Path(directory).absolute()
    request = {
        "texts_sha256": _sha256(texts),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    if (done := _read_record(directory, request)) is not None:
        return done
    if directory.exists() and not (directory / RECORD).is_file() and any(directory.iterdir()):
        raise ValueError(
            f"{directory} holds something else than a pretrained model\nhint: give a new directory"
        )

    tokenizer = train_tokenizer(texts, vocab_size, sequence_length)
    sequences = _sequences(texts, tokenizer, sequence_length)
    draft = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    trainer = _trainer(
        _new_model(tokenizer, hidden_size, num_layers, sequence_length, seed),
        sequences,
        draft / "trainer",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        show_progress=show_progress,
    )
    trainer.train()
    trainer.model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    shutil.rmtree(draft / "trainer", ignore_errors=True)

    drawn = steps * min(batch_size, len(sequences))
    made = Pretrained(
        directory=directory,
        num_parameters=trainer.model.num_parameters(),
        num_tokens=drawn * sequence_length,
        epochs=drawn / len(sequences),
        losses=tuple(row["loss"] for row in trainer.state.log_history if "loss" in row),
    )
    record = {"request": request, "made": {**asdict(made), "directory": None}}
    (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    draft.rename(directory)
    return made


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, sequence_length: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``texts``; every text starts with ``<s>``, so that its first token is
    predicted too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    rules.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIAL_TOKENS.values()),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bos = _SPECIAL_TOKENS["bos_token"]
    rules.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, rules.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rules,
        model_max_length=sequence_length,
        clean_up_tokenization_spaces=False,
        **_SPECIAL_TOKENS,
    )


def _sequences(texts: Sequence[str], tokenizer: Any, sequence_length: int) -> torch.Tensor:
    """int64 [num_sequences, sequence_length]: all texts end to end, the last odd part left out."""
    import torch

    ids: list[int] = []
    for start in range(0, len(texts), _BATCH_OF_TEXTS):
        encoded = tokenizer(texts[start : start + _BATCH_OF_TEXTS], verbose=False)["input_ids"]
        for of_text in encoded:
            ids += [*of_text, tokenizer.eos_token_id]
    num_sequences = len(ids) // sequence_length
    if num_sequences == 0:
        raise ValueError(
            f"the texts have {len(ids)} tokens, fewer than one sequence of {sequence_length}\n"
            "hint: give more text, or a shorter sequence_length"
        )
    return torch.tensor(ids[: num_sequences * sequence_length]).view(num_sequences, -1)


def _new_model(
    tokenizer: Any, hidden_size: int, num_layers: int, sequence_length: int, seed: int
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // _HEAD_SIZE,
        num_key_value_heads=hidden_size // _HEAD_SIZE,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(seed)
    return LlamaForCausalLM(config)


def _trainer(
    model: Any,
    sequences: torch.Tensor,
    output_dir: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    show_progress: bool,
) -> Any:
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        dataloader_drop_last=len(sequences) >= batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": max(1, round(_COOLDOWN_SHARE * steps)),
            "decay_type": "1-sqrt",
        },
        warmup_steps=max(1, round(_WARMUP_SHARE * steps)),
        weight_decay=0.1,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # it prints the loss on standard output, which is for results
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    data = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    if show_progress:
        trainer.add_callback(_progress_bar())
    return trainer


def _progress_bar() -> Any:
    """A bar on standard error with the latest loss."""
    from tqdm import tqdm  # type: ignore[import-untyped]
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, desc="pretraining", unit="step", disable=None)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" not in kwargs["logs"]:
                return
            loss = kwargs["logs"]["loss"]
            self.bar.set_postfix(loss=f"{loss:.2f}")
            if self.bar.disable and state.global_step % (state.max_steps // 4 or 1) == 0:
                print(  # not a terminal: plain lines, few of them
                    f"pretraining: step {state.global_step} of {state.max_steps}, loss {loss:.2f}",
                    file=sys.stderr,
                    flush=True,
                )

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return ProgressBar()


def _check(texts: Sequence[str], vocab_size: int, hidden_size: int, *positive: int) -> None:
    if not texts:
        raise ValueError("there is no text to pretrain on\nhint: give at least one text")
    if vocab_size < _LEAST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {_LEAST_VOCABULARY}, not {vocab_size}\n"
            "hint: every byte and the special tokens have an id of their own"
        )
    if hidden_size < 1 or hidden_size % _HEAD_SIZE:
        raise ValueError(
            f"hidden_size must be a multiple of {_HEAD_SIZE}, not {hidden_size}\n"
            f"hint: attention heads have {_HEAD_SIZE} dimensions each"
        )
    if min(positive) < 1:
        raise ValueError(
            "num_layers, sequence_length, batch_size and steps must be at least 1\n"
            "hint: leave out what should keep its default"
        )


def _sha256(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _read_record(directory: Path, request: dict[str, Any]) -> Pretrained | None:
    """The model of ``directory`` if it was made by this request."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        if record["request"] != request:
            return None
        made = record["made"] | {"directory": directory, "losses": tuple(record["made"]["losses"])}
        return Pretrained(**made)
    except (OSError, ValueError, KeyError, TypeError):
        return None
