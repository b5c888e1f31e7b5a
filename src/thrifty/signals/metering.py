"""What a model's passes cost, counted as they run: FLOPs by closed form on the shapes that really
went through it, tokens without padding.

A forward pre-hook on the outermost module sees every batch, in anybody's training loop, gradient
accumulation and padding included, and costs microseconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from thrifty.core.budget import Cost
from thrifty.costs.flops import Adapter, forward_flops, step_flops, train_flops
from thrifty.costs.setting import MemorySetting, parts_of
from thrifty.costs.shape import ModelShape


class PassMeter:
    """Counts the passes of ``model`` until ``take``. Use ``attach`` and ``detach``.

    ``setting``: how it is trained; without it that is read off the model.
    """

    def __init__(self, model: Any, setting: MemorySetting | None = None) -> None:
        self._model = model
        self.setting = setting
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._shape: ModelShape | None
        try:
            self._shape = ModelShape.from_config(inner.config.to_dict())
        except ValueError:
            # An architecture without a closed form: 6 N D, the usual rule, and said so.
            self._shape = None
        self.exact = self._shape is not None
        self._adapter = None if setting else adapter_of(model)
        self._recompute = _recomputes(inner)
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self._used = Cost()
        self._handle: Any = None
        self.spared = 0.0
        """FLOPs that a position of a training pass takes less than ``setting`` says."""

    def attach(self) -> None:
        self._handle = self._model.register_forward_pre_hook(self._count, with_kwargs=True)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from torch import is_grad_enabled

        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.dim() != 2:
            return
        mask = kwargs.get("attention_mask")
        # Padding carries FLOPs but is no token; a sync-free count needs the mask on the CPU.
        tokens = ids.numel()
        if mask is not None and mask.dim() == 2 and mask.device.type == "cpu":
            tokens = int(mask.sum())
        batch, sequence = ids.shape
        if module.training and is_grad_enabled():
            self._used += Cost(flops=self.step_flops(batch, sequence), tokens=tokens)
        else:
            self._used += Cost(flops=self._forward_flops(batch, sequence))

    def step_flops(self, batch: int, sequence: int) -> float:
        """FLOPs of one forward and backward over ``[batch, sequence]``."""
        if self._shape is None:
            return 6.0 * self._num_parameters * batch * sequence
        if self.setting is not None:
            # Of two lengths, the short rows alone come by in training.
            held = replace(parts_of(self.setting)[0], micro_batch=batch, sequence=sequence)
            return step_flops(self._shape, held) - self.spared * batch * sequence
        return train_flops(
            self._shape, batch, sequence, adapter=self._adapter, recompute=self._recompute
        )

    def _forward_flops(self, batch: int, sequence: int) -> float:
        if self._shape is None:
            return 2.0 * self._num_parameters * batch * sequence
        adapter = self.setting.adapter if self.setting else self._adapter
        return forward_flops(self._shape.under(adapter), batch, sequence)

    def add(self, used: Cost) -> None:
        """What a pass took beside what its shapes tell."""
        self._used += used

    def take(self) -> Cost:
        """What was counted since the last call."""
        used, self._used = self._used, Cost()
        return used


def _recomputes(model: Any) -> bool:
    """Whether the model was told to recompute activations; the name changed in transformers 5."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        told = getattr(model, name, None)
        if told is not None:
            return bool(told)
    return False


def adapter_of(model: Any) -> Adapter | None:
    """The adapter of a PEFT model in the cost model's terms, or None for full training."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    config = configs[getattr(model, "active_adapter", "default")]
    # Where PEFT put adapters in fact: the config may say "all-linear", a pattern or whole paths.
    places = [name.split(".") for name in model.targeted_module_names]
    names = {place[-1] for place in places}
    # A layer's number is the first in the path; an expert's comes after it.
    layers = {next((int(part) for part in place if part.isdecimal()), None) for place in places}
    numbers = tuple(sorted(layer for layer in layers if layer is not None))
    vectors = str(getattr(config.peft_type, "value", config.peft_type)) == "IA3"
    return Adapter(
        form="ia3" if vectors else "dora" if getattr(config, "use_dora", False) else "lora",
        rank=1 if vectors else config.r,
        targets=tuple(sorted(names)),
        layers=numbers if None not in layers else None,
    )
