"""The loss that a law of any form gives, whatever it knows."""

from __future__ import annotations

from typing import Any

import numpy as np

from thrifty.scaling.filtered_data import Filtered
from thrifty.scaling.fine_tuning import Rectified
from thrifty.scaling.laws import Law, Number


def knows_parameters(law: Any) -> bool:
    """Whether the loss depends on them, so that something can be allocated."""
    return isinstance(law, Law) and not np.all(law.A == 0)


def loss_of(law: Any, N: Number, D: Number, unique: Number = np.inf) -> Number:
    """Of ``N`` parameters, where they count, after ``D`` tokens, ``unique`` of them different.

    Raises ValueError for an amount that this form must know.
    """
    if isinstance(law, Rectified):
        return law.loss(D)
    if isinstance(law, Filtered):
        if not np.all(np.isfinite(unique)):
            raise ValueError("this law asks for the pool's tokens too\nhint: --unique 1B")
        return law.loss(D, unique)
    return law.loss(N if knows_parameters(law) else 1.0, D, unique)
