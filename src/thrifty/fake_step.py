"""One training step as it really runs, on fake tensors: no weights, no GPU, every byte known.

The model as transformers and PEFT build it runs forward, backward and the optimizer's step on
tensors with a shape and a dtype but no data, while a tape notes every buffer's birth and death.
``torch.distributed._tools.mem_tracker`` finds the same peaks to the byte, where nothing is frozen;
the tape also knows the phase and the layer, and is seven times as fast.

The state is steady: the optimizer's states exist before the step begins, and with gradient
accumulation the gradients of an earlier micro-batch do.

Fake tensors live on the device "cpu", as a build of torch without CUDA has no other;
``fake_device`` has them take CUDA's choices where the setting says so.

Limits: what a kernel allocates inside is not seen (attention's backward over grouped keys; on a CPU
the wide copy of a mixed sum under a float32 adapter); eager PyTorch, one device; of the optimizers
those of ``fake_techniques``. Experts are traced as one grouped product, which has no fake form in
float32. What waits on the host is not on the tape.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thrifty import fake_techniques as techniques
from thrifty.costs.adapted import scales_input
from thrifty.costs.blocks import Block
from thrifty.costs.families import FAMILIES, TEXT_PARTS
from thrifty.costs.memory import worst_turn
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.data.packed_attention import pack_attention_kwargs
from thrifty.fake_device import as_on_the_device
from thrifty.holding.blockwise import weights_of
from thrifty.holding.bottleneck import with_bottlenecks
from thrifty.holding.chunked_loss import hold_few_logits
from thrifty.holding.fused_loss import hold_no_logits
from thrifty.holding.host_activations import Link, offload
from thrifty.holding.recompute import recompute
from thrifty.holding.zeroth_order import Moved
from thrifty.signals.adapters import adapted, adapter_weights, freeze_inputs, peft_config
from thrifty.signals.models import layers_of

_TRACED = (
    "micro_batch",
    "sequence",
    "dtype",
    "masked",
    "gradient_accumulation_steps",
    "device_kind",
    "adapter",
    "adapter_dtype",
    "blocks",
    "only_layers",
    "with_embedding",
    "with_head",
    "only_head",
    "zeroth_order",
    "short",
    "storage",
    "states",
    "fused",
    "in_backward",
    "recompute",
    "selective",
    "offload",
    "loss_chunk",
    "loss_fused",
    "holds_logits",
)
"""The fields of a setting that a trace follows; the others must be at their defaults."""


class Instant(NamedTuple):
    """A stretch of the step: a phase, and in the backward the layer it is in."""

    phase: str
    layer: int = 0
    """From the bottom; -1 is the embedding."""


class Buffer(NamedTuple):
    """What is known of an allocation."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    instant: Instant


class Tape(TorchDispatchMode):
    """Notes each buffer as it comes and goes, under the present ``instant``."""

    def __init__(self) -> None:
        super().__init__()
        self.instant = Instant("setup")
        self.paused = False
        self.numbers = False
        """A number that is asked of a tensor is 1, as in optimizers, whose norms are; the model
        itself must ask for none."""
        self.events: list[tuple[Instant, int, Buffer]] = []
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.numbers and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, func)
        return out

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size or self.paused:
            return
        buffer = Buffer(str(func), tuple(tensor.shape), tensor.dtype, self.instant)
        self._alive[key] = weakref.ref(storage, partial(self._lose, key, size, buffer))
        self.events.append((self.instant, size, buffer))

    def _lose(self, key: int, size: int, buffer: Buffer, _: object) -> None:
        del self._alive[key]
        self.events.append((self.instant, -size, buffer))

    def peaks(self) -> dict[Instant, int]:
        """The most bytes alive in each instant."""
        level, peaks = 0, dict[Instant, int]()
        for instant, size, _ in self.events:
            # What is alive as an instant begins counts in it, also where its first event is an end.
            before = peaks.get(instant, level)
            level += size
            peaks[instant] = max(before, level)
        return peaks

    def inventory(self, phase: str) -> Counter[Buffer]:
        """Bytes alive at the peak of a phase, by what allocated them; equal buffers are summed."""
        level = most = at = 0
        for index, (instant, size, _) in enumerate(self.events):
            level += size
            if instant.phase == phase and level > most:
                most, at = level, index
        alive: Counter[Buffer] = Counter()
        for _, size, buffer in self.events[: at + 1]:
            alive[buffer] += size
        return +alive


class TapedLink(Link):
    """A link to a host that is not on the tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def down(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tape.paused = True
        try:
            return super().down(tensor)
        finally:
            self.tape.paused = False


def record(
    config: Mapping[str, Any], setting: MemorySetting, num_layers: int | None = None
) -> Tape:
    """The tape of one training step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if setting.blocks is not None:
        setting = worst_turn(ModelShape.from_config(config), setting)
    model = skeleton(config, setting, num_layers)
    tape = Tape()
    with FakeTensorMode(), tape, as_on_the_device(setting):
        materialise(model, setting)
        try:
            _step(model, setting, tape)
        except RuntimeError as error:  # it looks at data, or a kernel has no fake form
            raise ValueError(
                f"a step of {model.config.model_type} cannot be traced: {error}\n"
                "hint: take its prediction as it is"
            ) from error
    return tape


def _step(model: Any, setting: MemorySetting, tape: Tape) -> None:
    """Forward, backward and optimizer as the Trainer runs them, in a steady state."""
    batch = batch_of(setting.micro_batch, setting.sequence)
    if setting.zeroth_order or setting.short:
        _zeroth_order_step(model, batch, tape)
        if setting.zeroth_order:
            return
        model.train()
        batch = batch_of(setting.micro_batch, setting.short)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    config = model.config.to_dict()
    shape = ModelShape.from_config(config) if has_closed_form(config) else None
    tape.numbers = True
    optimizer = techniques.optimizer_of(named, setting, shape)
    tape.numbers = False
    if setting.gradient_accumulation_steps == 1:
        optimizer.zero_grad()
    mark_layers(layers_of(model), tape)
    if setting.offload:
        offload(model, TapedLink(tape))

    tape.instant = Instant("loss")
    out = forward(model, batch)
    loss = out.loss
    if not setting.holds_logits:
        del out
    tape.numbers = True
    loss.backward()
    del loss  # and with it the graph, whose leaves may be activations with a gradient
    tape.instant = Instant("optimizer")
    if not setting.in_backward:
        torch.nn.utils.clip_grad_norm_([weight for _, weight in named], 1.0)
        optimizer.step()


def _zeroth_order_step(model: Any, batch: dict[str, torch.Tensor], tape: Tape) -> None:
    """The loss on both sides of a random direction."""
    model.eval()
    tape.instant = Instant("estimate")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for distance in (1e-3, -1e-3):
            with Moved(weights, 0, 0, distance):
                forward(model, batch)


def batch_of(rows: int, sequence: int) -> dict[str, torch.Tensor]:
    """[rows, sequence] each."""
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.ones(rows, sequence, dtype=torch.long) for name in names}


def forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """What the model puts out for a batch of packed rows, its ``loss`` in it."""
    apart = pack_attention_kwargs(
        model.config.model_type,
        batch["position_ids"],
        attn_implementation=model.config._attn_implementation or "eager",
        dtype=model.dtype,
    )
    return model(**batch, **apart)


def mark_layers(layers: torch.nn.ModuleList, tape: Tape) -> list[Any]:
    """Have the tape told when the backward enters a layer: when its output's gradient is whole.
    Gives the hooks' handles."""

    def mark(layer: int, tensor: torch.Tensor) -> None:
        def enter(_: torch.Tensor) -> None:
            tape.instant = Instant("backward", layer)

        if tensor.requires_grad:
            tensor.register_hook(enter)

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, below=index - 1: mark(
                below, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for index, layer in enumerate(layers)
    ]
    top = layers[-1].register_forward_hook(
        lambda _, args, out: mark(len(layers) - 1, out if isinstance(out, torch.Tensor) else out[0])
    )
    return [*handles, top]


# The model: its structure on the meta device, then its tensors one by one as fake ones.


def skeleton(config: Mapping[str, Any], setting: MemorySetting, num_layers: int | None) -> Any:
    """What trains, without storage: the first layers, PEFT's adapter, transformers' checkpointing.

    Not built on fake tensors, where PEFT cannot swap a linear's weight.
    """
    _check(setting)
    model = base_model(config, setting.dtype)
    if num_layers is not None:
        del layers_of(model)[num_layers:]
    if setting.adapter is not None:
        model = _adapted(model, setting.adapter, _targets(config, model, setting.adapter))
    elif setting.only_head:
        model.requires_grad_(False).get_output_embeddings().requires_grad_(True)
    elif setting.only_layers is not None:
        block = Block(setting.only_layers, setting.with_embedding, setting.with_head)
        model.requires_grad_(False)
        for weight in weights_of(model, block):
            weight.requires_grad_(True)
    if setting.storage is not None:
        shape = ModelShape.from_config(config)
        techniques.pack_linears(layers_of(model), shape, setting.storage)
    if setting.loss_chunk:
        hold = hold_no_logits if setting.loss_fused else hold_few_logits
        hold(model, setting.loss_chunk)
    if setting.recompute:
        recompute(model, every=int(setting.recompute), selective=setting.selective)
    return model.train()


def _check(setting: MemorySetting) -> None:
    for field in fields(setting):
        value = getattr(setting, field.name)
        if field.name not in _TRACED and value != field.default:
            raise ValueError(
                f"a step with {field.name} {value} cannot be traced\n"
                "hint: verify the plan without it, or take its prediction as it is"
            )
    if setting.states.name not in techniques.STATES:
        raise ValueError(
            f"a step of {setting.states.name} cannot be traced\n"
            f"hint: those that can are {', '.join(techniques.STATES)}"
        )


def base_model(config: Mapping[str, Any], dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    described = AutoConfig.for_model(values.pop("model_type"), **values).get_text_config()
    described.use_cache = False
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            described, dtype=getattr(torch, dtype), trust_remote_code=False
        )


def has_closed_form(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in (*FAMILIES, *TEXT_PARTS)


def _targets(config: Mapping[str, Any], model: Any, adapter: Adapter) -> Sequence[str]:
    """What is adapted where no names are given: as priced, or every linear of the layers. PEFT's
    own ``all-linear`` takes routers and experts with it."""
    from transformers.pytorch_utils import Conv1D

    if has_closed_form(config):
        return adapter.names(ModelShape.from_config(config))
    named = layers_of(model).named_modules()
    linears = (torch.nn.Linear, Conv1D)
    return sorted({name.split(".")[-1] for name, module in named if isinstance(module, linears)})


def _adapted(model: Any, adapter: Adapter, default_targets: Sequence[str]) -> Any:
    if adapter.form == "bottleneck":
        shape = ModelShape.from_config(model.config.to_dict())
        return with_bottlenecks(model, shape, adapter.rank, dtype="float32", seed=0)
    scaled: list[str] = []
    options: dict[str, Any] = {}
    if adapter.form == "ia3":
        shape = ModelShape.from_config(model.config.to_dict())
        scaled = [each.name for each in adapter.linears(shape) if scales_input(shape, each)]
    if adapter.form == "adalora":  # its schedule, which changes no size
        options["total_step"] = 100
    config = peft_config(adapter, adapter.targets or default_targets, scaled, **options)
    found = adapted(model, config, seed=0)
    if adapter.form == "lora_fa":
        freeze_inputs(found)
    return found


def materialise(model: torch.nn.Module, setting: MemorySetting) -> None:
    """Replace the tensors of a skeleton by new ones on the default device; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    beside = {id(weight) for weight in adapter_weights(model)}

    def new(old: torch.Tensor) -> torch.Tensor:
        if id(old) not in made:
            dtype = getattr(torch, setting.adapter_dtype) if id(old) in beside else old.dtype
            made[id(old)] = torch.empty(old.shape, dtype=dtype)
            if isinstance(old, torch.nn.Parameter):
                made[id(old)] = torch.nn.Parameter(made[id(old)], old.requires_grad)
        return made[id(old)]

    olds = []  # kept, so that no id is used twice
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    olds.append(old)
                    tensors[name] = new(old)  # type: ignore[assignment]
