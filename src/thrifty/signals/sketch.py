"""Count-sketch: a long vector in few numbers that keeps inner products (Charikar, Chen,
Farach-Colton 2002; feature hashing, Weinberger et al. 2009, arXiv:0902.2206).

    (S x)_j = sum over i with h(i) = j of  s(i) x_i,    h: i -> 0 .. d-1,  s: i -> +1 or -1

E <S x, S y> = <x, y>, with a standard error of about |x| |y| / sqrt(d), as that of a dense random
projection; but it takes one addition an element, and its state is a seed.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np


class CountSketch:
    """``[n, num_elements] -> [n, num_dimensions]``; the same for the same seed on every machine."""

    def __init__(self, num_elements: int, num_dimensions: int, seed: int) -> None:
        self.num_elements, self.num_dimensions, self.seed = num_elements, num_dimensions, seed

    @cached_property
    def _hashes(self) -> tuple[Any, Any]:
        """h and s."""
        import torch

        random = np.random.Generator(np.random.Philox(self.seed))
        places = random.integers(0, self.num_dimensions, self.num_elements, dtype=np.int64)
        signs = random.integers(0, 2, self.num_elements, dtype=np.int8) * 2 - 1
        return torch.from_numpy(places), torch.from_numpy(signs.astype(np.float32))

    def __call__(self, values: Any) -> Any:
        places, signs = (each.to(values.device) for each in self._hashes)
        found = values.new_zeros(len(values), self.num_dimensions)
        return found.index_add_(1, places, values * signs)

    def transposed(self, values: Any) -> Any:
        """``[n, num_dimensions] -> [n, num_elements]``: <S x, u> = <x, S^T u>."""
        places, signs = (each.to(values.device) for each in self._hashes)
        return values[:, places] * signs
