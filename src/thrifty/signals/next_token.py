"""The next token of rows: which tokens their logits leave to chance, and which one is drawn.

    p_T = softmax(logits / T)                      T = 0: all of it on the likeliest
    p_T,P = p_T on the fewest tokens that together have P of it, the likeliest first; then to 1

A row's token is where its own random number u falls on the cumulated shares, so that it does not
depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any


def shares(logits: Any, temperature: Any, top_p: Any) -> Any:
    """Probabilities in float64, shaped like ``logits`` [rows, ..., vocab]; the other two [rows]."""
    import torch

    each = (len(logits), *([1] * (logits.dim() - 1)))
    cold = (temperature == 0).view(each)
    warm = temperature.masked_fill(temperature == 0, 1.0).view(each)
    found = (logits.double() / warm).softmax(-1)
    if bool((top_p < 1).any()):
        sizes, order = found.sort(dim=-1, descending=True, stable=True)
        before = sizes.cumsum(-1) - sizes
        sizes = sizes.masked_fill(before >= top_p.view(each).double(), 0.0)
        found = torch.zeros_like(found).scatter(-1, order, sizes)
        found = found / found.sum(-1, keepdim=True)
    if bool(cold.any()):
        likeliest = torch.zeros_like(found).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        found = torch.where(cold, likeliest, found)
    return found


def pick(found: Any, uniform: Any) -> Any:
    """Tokens [rows], of shares [rows, vocab] that need not add up to 1, by numbers [rows] in
    [0, 1)."""
    import torch

    cumulated = found.cumsum(-1)
    places = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    return places[:, 0].clamp(max=found.shape[-1] - 1)


def log_probability(logits: Any, tokens: Any) -> Any:
    """[...] in float64: what the model itself gives to ``tokens`` [...], at temperature 1."""
    own = logits.gather(-1, tokens[..., None])[..., 0]
    return (own - logits.logsumexp(-1)).double()
