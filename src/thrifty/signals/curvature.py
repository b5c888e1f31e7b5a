"""Curvature of the loss from a sample's gradients, a weight at a time, and its inverse.

    F ~= (Q_l x Q_r) diag(values) (Q_l x Q_r)^T + damping mean(values) I

of a linear whose example's gradient is G = sum over its tokens of l_t r_t^T (one side what it was
given, the other the gradient at what it put out). Q_l and Q_r are the eigenvectors of the sides'
second moments over the tokens, sum of l l^T and of r r^T.

    K-FAC   values_ij = lambda_l,i lambda_r,j / (tokens * examples): the sides are independent, and
            tokens of each other                                    (Martens and Grosse 2015,
                                                                    arXiv:1503.05671)
    EK-FAC  values_ij = mean over examples of (Q_l^T G Q_r)_ij^2: the best diagonal in that basis
                                                                    (George et al. 2018,
                                                                    arXiv:1806.03884)

as in influence functions of language models (Grosse et al. 2023, arXiv:2308.03296), whose damping
is 0.1 times the mean of the values. The gradients are those of the rows' own tokens (the empirical
Fisher); the paper draws tokens from the model. Tokens without gradient, padding among them, do not
count. Weights that are no linear's matrix have no sides: Q = I, the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from thrifty.costs.operations import Adapter

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape
    from thrifty.signals.example_gradients import BatchGradients

Sizes = Sequence[tuple[int, int]]
"""Rows and columns of the wanted matrices."""


@dataclass(frozen=True)
class Eigenbasis:
    """Of one weight's gradients, in which their second moments are taken to be a diagonal."""

    values: Any
    """In the shape of the weight, float64."""
    left: Any = None
    """[rows, rows], its columns eigenvectors; None: the weight's own elements."""
    right: Any = None
    """[columns, columns]"""

    def into(self, gradients: Any) -> Any:
        """[n, elements] -> [n, rows, columns]."""
        found = gradients.unflatten(1, self.values.shape)
        return found if self.left is None else self.left.T @ found @ self.right

    def back(self, found: Any) -> Any:
        """[n, rows, columns] -> [n, elements]."""
        return (found if self.left is None else self.left @ found @ self.right.T).flatten(1)


def kfac(wanted: Sequence[Any], batches: Iterable[BatchGradients]) -> list[Eigenbasis]:
    """Of each wanted weight, from one pass over a sample."""
    import torch

    moments: list[list[Any]] = [[] for _ in wanted]
    squares: list[Any] = [torch.zeros_like(weight, dtype=torch.float64) for weight in wanted]
    tokens, examples = [0] * len(wanted), 0
    for gradients in batches:
        examples += len(gradients)
        for place, weight in enumerate(wanted):
            pairs = gradients.outer(place)
            if pairs is None:
                for _, _, each in gradients.weights([place]):
                    squares[place] += each.square().sum(0).view(weight.shape)
            for left, right in pairs or ():
                counts = left.any(-1) & right.any(-1)
                tokens[place] += int(counts.sum())
                left, right = left[counts], right[counts]
                found = [(left.T @ left).double(), (right.T @ right).double()]
                before = moments[place] or [torch.zeros_like(each) for each in found]
                moments[place] = [a.add_(b) for a, b in zip(before, found, strict=True)]
    bases = []
    for place, weight in enumerate(wanted):
        if not moments[place]:
            bases.append(Eigenbasis(squares[place] / max(examples, 1)))
            continue
        dtype = torch.promote_types(weight.dtype, torch.float32)
        (one, left), (other, right) = map(torch.linalg.eigh, moments[place])
        moments[place] = []  # they are as large as all else here
        values = one.clamp_min(0).outer(other.clamp_min(0)) / max(tokens[place] * examples, 1)
        bases.append(Eigenbasis(values, left.to(dtype), right.to(dtype)))
    return bases


def ekfac(bases: Sequence[Eigenbasis], batches: Iterable[BatchGradients]) -> list[Eigenbasis]:
    """The same bases with values from another pass over the sample."""
    import torch

    totals = [torch.zeros_like(basis.values) for basis in bases]
    examples = 0
    for gradients in batches:
        examples += len(gradients)
        for place, _, each in gradients.weights():
            totals[place] += bases[place].into(each).square().sum(0)
    return [
        replace(basis, values=total / max(examples, 1))
        for basis, total in zip(bases, totals, strict=True)
    ]


def solved(bases: Sequence[Eigenbasis], directions: Sequence[Any], damping: float) -> list[Any]:
    """F^-1 times the directions, ``[m, elements]`` of each weight, times ``unit`` of the dampings.

    A weight without gradient in the sample gets zeros: nothing is known of it.
    """
    import torch

    dampings = [damping * float(basis.values.mean()) for basis in bases]
    found = []
    for basis, direction, own in zip(bases, directions, dampings, strict=True):
        if own <= 0:
            found.append(torch.zeros_like(direction))
            continue
        shrunk = (unit(dampings) / (basis.values + own)).to(direction.dtype)
        found.append(basis.back(basis.into(direction) * shrunk))
    return found


def unit(dampings: Sequence[float]) -> float:
    """The mean of the weights' dampings, by which all inverses are multiplied: scores then have the
    size of an inner product of gradients, whatever the gradients' own."""
    positive = [each for each in dampings if each > 0]
    return sum(positive) / len(positive) if positive else 1.0


def ridge(features: Any, directions: Any, damping: float) -> Any:
    """(Phi^T Phi + lambda I)^-1 u of each direction u, ``[m, k]``, in float64; lambda is
    ``damping`` times the mean eigenvalue of Phi^T Phi, Phi ``[n, k]``. Solved in the smaller of n
    and k; zeros where Phi is zero:

        (Phi^T Phi + lambda)^-1 u = (u - Phi^T (Phi Phi^T + lambda)^-1 Phi u) / lambda
    """
    import torch

    phi, towards = features.double(), directions.double()
    n, k = phi.shape
    own = damping * float(phi.square().sum()) / k
    if own <= 0:
        return torch.zeros_like(towards)
    eye = torch.eye(min(n, k), dtype=phi.dtype, device=phi.device)
    if k <= n:
        return torch.linalg.solve(phi.T @ phi + own * eye, towards.T).T
    inner = torch.linalg.solve(phi @ phi.T + own * eye, phi @ towards.T)
    return (towards - inner.T @ phi) / own


# -- what it takes ---------------------------------------------------------------------------------


def adapter_sizes(shape: ModelShape, adapter: Adapter) -> list[tuple[int, int]]:
    """Of the matrices of a LoRA adapter."""
    linears = adapter.linears(shape)
    down = [(adapter.rank, linear.in_features) for linear in linears]
    return down + [(linear.out_features, adapter.rank) for linear in linears]


def num_elements(sizes: Sizes) -> int:
    return sum(rows * columns for rows, columns in sizes)


def sides_elements(sizes: Sizes) -> int:
    """Of the sides' second moments, and of their eigenvectors. A token's part in the moments takes
    2 FLOPs of each."""
    return sum(rows**2 + columns**2 for rows, columns in sizes)


def turning_flops(sizes: Sizes) -> float:
    """Of a gradient into the eigenbasis, or back."""
    return 2.0 * sum(rows * columns * (rows + columns) for rows, columns in sizes)


def eigenvectors_flops(sizes: Sizes) -> float:
    """9 n^3 of a symmetric matrix (Golub and Van Loan, Matrix Computations, section 8.3)."""
    return 9.0 * sum(rows**3 + columns**3 for rows, columns in sizes)


def ridge_flops(n: int, k: int, m: int) -> float:
    """Of ``ridge``: the products, and an elimination of 2/3 s^3."""
    small = min(n, k)
    return 2.0 * n * k * small + 2 / 3 * small**3 + 2.0 * m * small**2 + 4.0 * m * n * k * (n < k)
