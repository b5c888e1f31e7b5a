"""The shape of a decoder: what its ``config.json`` says, enough to price it without its weights.

``ModelShape`` holds the sizes of one Hugging Face causal language model (transformers 5.x): every
linear of a layer under its real module name, the norms, the embeddings, and the few switches that
change what is executed. With hidden size h, vocabulary V and L layers,

    parameters = V h [+ positions] + L (attention + mlp + norms) + final norm [+ V h, head not tied]

where some layers may have a mixture of experts for their mlp. Parameter counts are exact for the
families in ``families/``. Limits: no vision tower, no quantised storage, no cross attention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thrifty.costs.operations import Adapter

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element."""


PARTS = ("embedding", "attention", "mlp", "experts", "norms", "head")


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One matrix product of a layer, ``[tokens, in_features] @ [in_features, out_features]``."""

    name: str
    """The module's attribute name in transformers, which LoRA targets match."""
    in_features: int
    out_features: int
    bias: bool
    part: str
    """``attention`` or ``mlp``."""

    @property
    def num_parameters(self) -> int:
        return (self.in_features + self.bias) * self.out_features


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts that stands in the mlp's place in some layers."""

    layers: frozenset[int]
    """Which layers have it."""
    num_experts: int
    num_active: int
    """Experts that a token goes through, the shared ones not among them."""
    intermediate_size: int
    """Of one expert. All are gated; their weights are two tensors, no linears."""
    bias: bool = False
    router: str
    """``softmax`` of all logits and the best of it; ``raw``: the best, then their softmax;
    ``wide``: softmax in float32, weights included; ``sigmoid``: a sigmoid in its place;
    ``every``: a sigmoid of the best, all others closed, and every expert runs on every token."""
    router_bias: bool = False
    groups: int = 0
    """The best of the experts come from the best of so many groups; 0: there are none."""
    normalised: bool = False
    """The chosen experts' weights are divided by their sum."""
    scaled: bool = False
    """Their weights are multiplied by a constant."""
    wide_weights: bool = False
    """They stay float32, whatever the model is."""
    take_names: bool = False
    """PEFT takes ``gate_proj`` and the like for weights of the experts, wherever else they are."""
    shared: tuple[LinearShape, ...] = ()
    """Linears of the expert that every token goes through; with a gate of its own first, if any."""

    def parameters(self, hidden_size: int) -> int:
        """Of the routed experts and the router of one layer."""
        inner = self.intermediate_size
        expert = 3 * hidden_size * inner + self.bias * (2 * inner + hidden_size)
        return self.num_experts * (expert + hidden_size + self.router_bias)


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: all keys and values of a token come from one narrow vector."""

    query_rank: int = 0
    """Width of the queries' own latent; 0: they come straight from the hidden state."""
    rank: int
    """Width of the latent that keys and values are expanded from."""
    value_dim: int
    """Of a head; queries and keys have ``head_dim``, of which ``rotary_dim`` is rotated and, in the
    keys, shared by all heads."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder with ``num_layers`` layers, equal but for experts, windows, rotation."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    """What the checkpoint is stored in."""
    linears: tuple[LinearShape, ...]
    """The linears of a dense layer, in the order in which they run."""
    experts: Experts | None = None
    latent: Latent | None = None

    norm: str = "rms"
    """``rms``; ``wide``: RMS with its weight applied in float32; ``layer``: LayerNorm; ``bare``:
    LayerNorm in float32 without weights."""
    norm_parameters: int
    """Of one norm over the hidden size: h, 2h with a bias, or 0."""
    block: str = "pre"
    """Where a layer has its norms: ``pre``, ``post`` (after the sum), ``branch`` (before it),
    ``sandwich`` (before and after a branch), ``parallel`` (attention and mlp read the same input,
    each through its own), or ``shared`` (through one)."""
    final_norm: bool = True
    qk_norm: str = ""
    """RMS norms on the queries and the keys: over each ``head``, or over ``all`` of them; ``unit``:
    over each head, without weights, and after their rotation only."""
    clips: bool = False
    """Queries, keys and values are clamped."""
    scaled_embedding: bool = False
    gated: bool = True
    activation: str = "silu"
    rotary_dim: int = 0
    """Rotated channels of a head; 0: positions are learned."""
    wide_rotary: bool = False
    """Its cosines and sines are float32, whatever the model is."""
    paired_rotary: bool = False
    """They have one entry for two channels; if wide too, those are rotated as a complex number."""
    no_rope_layers: frozenset[int] = frozenset()
    """Layers that rotate nothing."""
    tempered: bool = False
    """There, queries are scaled by their position."""
    rotary_per_kind: bool = False
    """Layers that slide have cosines and sines of their own."""
    num_positions: int = 0
    """Rows of a learned position embedding."""
    head_bias: bool = False
    embedding_size: int
    """Width of the token embedding; other than ``hidden_size`` only in opt-350m."""
    attention: str = "sdpa"
    """What transformers runs by default: ``sdpa``; ``math``, its reference kernel, where it has no
    fused one; or ``eager`` where it cannot be used (gemma2, gpt-oss)."""
    mask: str = "positions"
    """Who makes the mask that keeps the documents of a row apart: transformers from
    ``positions``, or the caller: it is ``given``, whatever the row holds, and shared by all
    layers. ``alibi``: biases of every head, made once; documents cannot be kept apart."""
    splits: str = ""
    """What a product for queries, keys and values at once is cut into: views; copies of the
    ``keys`` and values; or ``copies`` of all three, for all heads."""
    bias_apart: bool = False
    """A linear's bias is added by a kernel of its own."""
    attention_softcap: bool = False
    sinks: bool = False
    """Every head has a logit that no key gives, beside its scores."""
    logit_softcap: bool = False
    sliding_window: int = 0
    num_sliding_layers: int = 0
    dropout: float = 0.0
    """In training, after attention and after the mlp."""
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    adapter: Adapter | None = None
    """That the model runs under as it is: its products are in the FLOPs of every pass, scored or
    evaluated. None: it has none, or a setting says how it is trained."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # A shape is the key of many caches, and its fields are many.
        return hash(tuple(getattr(self, each.name) for each in fields(self)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """``config.json`` as a dict -> shape. Missing keys take transformers' defaults."""
        from thrifty.costs import families

        return families.read(config)

    def under(self, adapter: Adapter | None) -> ModelShape:
        """The same model with ``adapter`` on it."""
        return self if adapter is None else replace(self, adapter=adapter)

    @property
    def query_size(self) -> int:
        """Width of a token's queries: heads x head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's values, and of what it attends to."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def cached_size(self) -> int:
        """What a KV cache holds of a token in a layer: keys and values, or what they come from."""
        if self.latent is None:
            return 2 * self.key_value_size
        return self.latent.rank + self.rotary_dim

    @property
    def expansion_parameters(self) -> int:
        """Elements of the matrix that every token of a cache goes through at each step, or 0."""
        if self.latent is None:
            return 0
        width = self.head_dim - self.rotary_dim + self.latent.value_dim
        return self.latent.rank * self.num_attention_heads * width

    @property
    def head_parameters(self) -> int:
        """Elements of the output matrix, tied or not."""
        return self.vocab_size * self.embedding_size

    @property
    def projection_parameters(self) -> int:
        """Elements of the matrix between hidden and embedding size (opt-350m has two), or 0."""
        projected = self.embedding_size != self.hidden_size
        return self.hidden_size * self.embedding_size if projected else 0

    @property
    def layer_norm_parameters(self) -> int:
        """Parameters of all the norms of one layer."""
        norms = {"sandwich": 4, "shared": 1}.get(self.block, 2)
        over = {
            "": 0,
            "unit": 0,
            "head": 2 * self.head_dim,
            "all": self.query_size + self.key_value_size,
        }
        latents = self.latent.query_rank + self.latent.rank if self.latent else 0
        return norms * self.norm_parameters + over[self.qk_norm] + latents

    def is_mixture(self, index: int) -> bool:
        """Whether a layer has experts in its mlp's place."""
        return self.experts is not None and index in self.experts.layers

    @cached_property
    def mixture_linears(self) -> tuple[LinearShape, ...]:
        """The linears of a layer with experts: attention, and what all tokens go through."""
        attention = tuple(linear for linear in self.linears if linear.part == "attention")
        return attention + (self.experts.shared if self.experts else ())

    def linears_of(self, index: int) -> tuple[LinearShape, ...]:
        """The linears of one layer; the weights of experts are not among them."""
        return self.mixture_linears if self.is_mixture(index) else self.linears

    def layer_parameters(self, index: int) -> int:
        """All parameters of one layer."""
        own = sum(linear.num_parameters for linear in self.linears_of(index))
        if self.is_mixture(index) and self.experts is not None:
            own += self.experts.parameters(self.hidden_size)
        own += self.num_attention_heads if self.sinks else 0
        return own + self.layer_norm_parameters

    @cached_property
    def lora_targets(self) -> tuple[str, ...]:
        """The default LoRA targets: every linear of the layers, not the head, no router or gate,
        and none whose name PEFT takes for weights of the experts."""
        layers = range(self.num_layers)
        found = [linear for index in layers for linear in self.linears_of(index)]
        if self.experts and self.experts.take_names:
            found = [linear for linear in found if linear.part == "attention"]
        return tuple(dict.fromkeys(linear.name for linear in found if linear.out_features > 1))

    @cached_property
    def last_of_the_mlp(self) -> tuple[str, ...]:
        """The name of the linear that leads out of it; none where all layers have experts."""
        return tuple(linear.name for linear in self.linears if linear.part == "mlp")[-1:]

    @cached_property
    def ia3_targets(self) -> tuple[str, ...]:
        """What (IA)3 scales: keys, values and what the mlp's last linear reads. Where one linear
        makes more than keys or values, all that it makes."""
        attention = [linear.name for linear in self.linears if linear.part == "attention"]
        apart = tuple(name for name in ("k_proj", "v_proj") if name in attention)
        found = (*(apart or attention[-2:-1]), *self.last_of_the_mlp)
        return tuple(name for name in found if name in self.lora_targets)

    @cached_property
    def parameters_by_part(self) -> dict[str, int]:
        """Parameters of each of ``PARTS``: a router counts to the experts, a shared expert to the
        mlp, a tied head to neither."""
        parts: dict[str, int] = dict.fromkeys(PARTS, 0)
        positions = self.num_positions * self.hidden_size
        parts["embedding"] = self.head_parameters + positions + self.projection_parameters
        for index in range(self.num_layers):
            for linear in self.linears_of(index):
                parts[linear.part] += linear.num_parameters
        parts["attention"] += self.num_layers * self.num_attention_heads if self.sinks else 0
        if self.experts is not None:
            mixtures = len(self.experts.layers)
            parts["experts"] = mixtures * self.experts.parameters(self.hidden_size)
        parts["norms"] = self.num_layers * self.layer_norm_parameters
        parts["norms"] += self.norm_parameters if self.final_norm else 0
        parts["head"] = self.projection_parameters
        parts["head"] += 0 if self.tie_word_embeddings else self.head_parameters
        parts["head"] += self.vocab_size if self.head_bias else 0
        return parts

    @cached_property
    def num_parameters(self) -> int:
        return sum(self.parameters_by_part.values())


def read_shape(path: str | Path) -> ModelShape:
    """Shape of a model folder, or of its ``config.json``."""
    return ModelShape.from_config(read_config(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder. Raises ValueError where it is none."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"no config.json at {file}\nhint: give the folder of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{file} is not JSON: {error}\nhint: save the model again with save_pretrained"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no object\nhint: it must be a Hugging Face config.json")
    return config
