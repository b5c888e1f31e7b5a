"""How high a mean loss can be that was measured on few questions, whatever its distribution.

    p(a) = min( exp(-n h(min(R, a), a)), e P[ B(n, a) <= ceil(n R) ] )

R is the mean of n independent losses from 0 to 1, B a binomial count, h(r, a) = r ln(r/a) +
(1-r) ln((1-r)/(1-a)): p(a) is a valid p-value of "the true mean is above a" (Hoeffding and Bentkus,
in Learn then Test, arXiv:2110.01052). Of losses that are 0 or 1 the binomial's own tail is exact,
without the factor e. In expectation alone the bound is (n R + 1) / (n + 1) (conformal risk control,
arXiv:2208.02814), of losses that only fall along the settings tried.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_HALVINGS = 40


def is_binary(losses: Any) -> bool:
    return bool(np.isin(losses, (0.0, 1.0)).all())


def bound_name(binary: bool) -> str:
    return "binomial" if binary else "Hoeffding-Bentkus"


def p_value(mean: Any, count: int, at_most: Any, *, binary: bool) -> Floats:
    """Of "the true mean loss is above ``at_most``", where ``count`` losses had this mean. Arrays
    broadcast."""
    from scipy.special import bdtr, xlogy

    mean, level = np.broadcast_arrays(np.asarray(mean, float), np.asarray(at_most, float))
    inside = np.clip(level, 1e-12, 1 - 1e-12)
    total = count * mean
    if binary:
        found = bdtr(np.round(total), count, inside)
    else:
        low = np.minimum(mean, inside)
        apart = xlogy(low, low / inside) + xlogy(1 - low, (1 - low) / (1 - inside))
        whole = np.ceil(total - 1e-9)  # less a rest of rounding
        found = np.minimum(np.exp(-count * apart), np.e * bdtr(whole, count, inside))
    found = np.where(level >= 1, 0.0, np.where(level <= 0, 1.0, found))
    return np.asarray(np.minimum(found, 1.0))


def upper_bound(mean: Any, count: int, delta: float, *, binary: bool) -> Floats:
    """The least level above which the true mean is with a probability of no more than ``delta``."""
    low = np.array(mean, float)
    high = np.ones_like(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        holds = p_value(mean, count, middle, binary=binary) <= delta
        high = np.where(holds, middle, high)
        low = np.where(holds, low, middle)
    return high


def in_expectation(mean: Any, count: int) -> Floats:
    """What the mean loss of one question more is at most, the setting being chosen by this."""
    return (count * np.asarray(mean, float) + 1) / (count + 1)
