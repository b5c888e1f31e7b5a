"""A model's config.json, checked as it is read: sizes, switches, dtypes, windows, rotary shares.

What transformers' own config classes refuse is refused here too: a null where they want a number, a
word where they want true or false, an activation that they lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from thrifty.core.typed import nearest
from thrifty.costs.shape import ITEMSIZE, LinearShape

NULLABLE = {
    "alibi",
    "attention_chunk_size",
    "bias",
    "ffn_hidden_size",
    "head_dim",
    "multi_query",
    "n_group",
    "n_inner",
    "new_decoder_architecture",
    "norm_topk_prob",
    "num_experts_per_tok",
    "num_key_value_heads",
    "num_kv_heads",
    "parallel_attn",
    "v_head_dim",
    "word_embed_proj_dim",
}
"""Counts and switches that may be null in some family: a default, or false."""

ACTIVATIONS = {
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new"),
    *("gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh"),
    *("hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu"),
    *("relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh"),
}
"""Those of transformers' that have no weights of their own."""

ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "attention")
"""What ``layer_types`` may say of a layer; the last is an old name of the first."""


class Config:
    """A config dict that checks what it hands out."""

    def __init__(self, model_type: str, values: Mapping[str, Any]) -> None:
        self.model_type = model_type
        self.values = values
        self.defaults: dict[str, int] = {}
        """Sizes that the config does not name, as they were taken instead, by key."""

    def fail(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.model_type} config: {what}\nhint: compare with the published config.json"
        )

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where the key is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int, alias: str = "", *, derived: bool = False) -> int:
        """A whole number above 0. ``derived``: the default follows from other sizes of this config,
        so that nothing is missing where the key is."""
        key = alias if name not in self.values and alias in self.values else name
        value = self.values.get(key, default)
        if value is None and key in NULLABLE:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(f"{key} must be a whole number above 0, not {value!r}")
        if key not in self.values and not derived:
            self.defaults[key] = value
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name, default)
        if value is None and name in NULLABLE:
            return False
        if not isinstance(value, bool):
            self.fail(f"{name} must be true or false, not {value!r}")
        return value

    def activation(self, name: str, default: str) -> str:
        value = self.values.get(name, default)
        if value not in ACTIVATIONS:
            raise ValueError(
                f"{self.model_type} config: {name} {value!r} is not supported\n"
                f"hint: {nearest(str(value), ACTIVATIONS)}"
            )
        return str(value)

    def rate(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self.fail(f"{name} must be from 0 up to 1, not {value!r}")
        return float(value)

    def window(self, default: int) -> int:
        """The sliding window, 0 for none. Here a null means none; only a missing key means the
        default."""
        value = self.values.get("sliding_window", default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            self.fail(f"sliding_window must be a whole number or null, not {value!r}")
        return value or 0

    def dtype(self) -> str:
        # transformers 5 writes "dtype"; before it was "torch_dtype".
        name = str(self.get("dtype", self.get("torch_dtype", "float32"))).removeprefix("torch.")
        if name not in ITEMSIZE:
            self.fail(f"dtype {name!r} is none of {', '.join(ITEMSIZE)}")
        return name

    def rotary_dim(self, head_dim: int, legacy: str, share: float) -> int:
        """Rotated channels; 5.x keeps the share in rope_parameters, before it was on its own."""
        rope = self.get("rope_parameters", {})
        if not isinstance(rope, Mapping):
            self.fail(f"rope_parameters must be an object, not {rope!r}")
        share = self.get(legacy, share)
        return int(head_dim * rope.get("partial_rotary_factor", share))

    def num_sliding(self, sliding: Sequence[bool], named: str = "sliding_attention") -> int:
        """Layers with a sliding window: as ``layer_types`` says, otherwise by the family's rule."""
        types = self.layer_types(len(sliding))
        return sum(sliding) if types is None else types.count(named)

    def layer_types(self, num_layers: int) -> list[str] | None:
        """The kind of attention of each layer, where the config says."""
        types = self.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or len(types) != num_layers:
            found = f"{len(types)} are named" if isinstance(types, list) else f"not {types!r}"
            self.fail(f"layer_types must name each of the {num_layers} layers: {found}")
        for kind in types:
            if kind not in ATTENTION_KINDS:
                self.fail(f"layer_types holds {kind!r}, which no layer of this family can be")
        return types


def linear_shapes(
    *sizes: tuple[str, int, int, str], biased: Sequence[str]
) -> tuple[LinearShape, ...]:
    return tuple(
        LinearShape(name=name, in_features=i, out_features=o, part=part, bias=name in biased)
        for name, i, o, part in sizes
    )
