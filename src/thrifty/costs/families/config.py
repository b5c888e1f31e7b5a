"""A model's config.json, checked as it is read: sizes, dtypes, windows, rotary shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from thrifty.costs.shape import ITEMSIZE, LinearShape


class Config:
    """A config dict that checks what it hands out."""

    def __init__(self, model_type: str, values: Mapping[str, Any]) -> None:
        self.model_type = model_type
        self.values = values

    def fail(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.model_type} config: {what}\nhint: compare with the published config.json"
        )

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where the key is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int, alias: str = "") -> int:
        key = alias if name not in self.values and alias in self.values else name
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(f"{key} must be a whole number above 0, not {value!r}")
        return value

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
        share = self.get(legacy, share)
        return int(head_dim * rope.get("partial_rotary_factor", share))

    def num_sliding(self, sliding: Sequence[bool], named: str = "sliding_attention") -> int:
        """Layers with a sliding window: as ``layer_types`` says, otherwise by the family's rule."""
        types = self.get("layer_types")
        if types is None:
            return sum(sliding)
        if not isinstance(types, list) or len(types) < len(sliding):
            self.fail(f"layer_types must name each of the {len(sliding)} layers")
        return sum(kind == named for kind in types[: len(sliding)])


def linear_shapes(
    *sizes: tuple[str, int, int, str], biased: Sequence[str]
) -> tuple[LinearShape, ...]:
    return tuple(
        LinearShape(name=name, in_features=i, out_features=o, part=part, bias=name in biased)
        for name, i, o, part in sizes
    )
