"""Adam whose moments are those of a gradient projected to a few dimensions: GaLore and APOLLO.

Of a gradient G, m x n with m <= n (or its transpose), P has r rows or columns:

    GaLore  R = P' G,  P the first r left singular vectors of G, renewed every ``refresh`` steps;
            the update is scale P adam(R)                                          arXiv:2403.03507
    APOLLO  R = P G,   P of normal numbers of variance 1/r, drawn anew every ``refresh`` steps;
            the update is scale G diag(s),  s_j = |adam(R)_j| / |R_j| of a column j, or one s of
            the norms of all of it; its norm may grow by a hundredth a step        arXiv:2412.05270

Only matrices of the layers that are wider than r on both sides are projected. Embedding, head,
norms and biases are AdamW's, as both papers have it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from thrifty.holding.noise import generator_of
from thrifty.holding.tensor_by_tensor import (
    TensorByTensor,
    adam_direction,
    in_a_layer,
    move,
    named,
    wide,
)

GROWTH = 1.01
"""Of the norm of APOLLO's update from one step to the next, at most."""


class ProjectedAdam(TensorByTensor):
    """What the two have in common; several matrices in one tensor, as experts are, each have a
    projection of their own. Raises ValueError where nothing can be projected."""

    def __init__(
        self, groups: list[dict[str, Any]], *, rank: int, refresh: int, scale: float, **more: Any
    ) -> None:
        super().__init__(groups, **more)
        self.rank, self.refresh, self.scale = rank, refresh, scale
        given = [pair for group in self.param_groups for pair in named(group)]
        if given and not any(self.is_projected(name, tensor) for name, tensor in given):
            raise ValueError(
                f"no matrix of a layer is wider than rank {rank} on both sides\n"
                "hint: give a lower rank, or use adamw, which is what this would be"
            )

    def is_projected(self, name: str, tensor: torch.Tensor) -> bool:
        return in_a_layer(name) and tensor.dim() > 1 and self.rank < min(tensor.shape[-2:])

    @abstractmethod
    def direction(
        self,
        name: str,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Of a gradient [..., m, n], m <= n; states are kept in ``dtype``."""

    def update(
        self,
        name: str,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:
        dtype = parameter.dtype
        if not self.is_projected(name, parameter):
            move(parameter, adam_direction(gradient, state, dtype), group)
        elif gradient.shape[-2] <= gradient.shape[-1]:
            move(parameter, self.direction(name, gradient, state, group, dtype), group)
        else:
            move(parameter, self.direction(name, gradient.mT, state, group, dtype).mT, group)


class GaLore(ProjectedAdam):
    """In the space of the gradient's first singular vectors."""

    def direction(
        self,
        name: str,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if (state["step"] - 1) % self.refresh == 0:
            vectors = first_singular_vectors(gradient, self.rank)
            if "projector" in state:
                # Their signs are arbitrary; the moments go on with those of the vectors before.
                turned = (vectors * wide(state["projector"])).sum(-2, keepdim=True) < 0
                vectors = torch.where(turned, -vectors, vectors)
            state["projector"] = vectors.to(dtype)
        projector = wide(state["projector"])
        low = adam_direction(projector.mT @ gradient, state, dtype)
        return (projector @ low).mul_(self.scale)


def first_singular_vectors(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """Left ones, [..., m, rank], the first one first: eigenvectors of G G', which are had in a
    fifth of an SVD's time."""
    largest = gradient.abs().amax(dim=(-2, -1), keepdim=True)
    # Scaled, since squares of small gradients would be zero.
    scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return torch.linalg.eigh(scaled @ scaled.mT).eigenvectors[..., -rank:].flip(-1)


class Apollo(ProjectedAdam):
    """Step sizes of a random space, a channel each or one a tensor. The projection comes from
    torch's seed when this was made, and is not stored."""

    def __init__(
        self, groups: list[dict[str, Any]], *, tensor_wise: bool, **projection: Any
    ) -> None:
        super().__init__(groups, seed=torch.initial_seed(), **projection)
        self.over = (-2, -1) if tensor_wise else (-2,)

    def direction(
        self,
        name: str,
        gradient: torch.Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        drawn = (state["step"] - 1) // self.refresh
        low = self.projection(name, gradient, group["seed"], drawn) @ gradient
        before = low.norm(dim=self.over, keepdim=True)
        after = adam_direction(low, state, dtype).norm(dim=self.over, keepdim=True)
        update = gradient * (after / (before + torch.finfo(before.dtype).tiny))
        norm = update.norm(dim=(-2, -1), keepdim=True)
        if "norm" in state:
            most = GROWTH * state["norm"]
            # After a gradient of zero, whose norm nothing could grow from, there is no limit.
            share = torch.where((most > 0) & (norm > most), most / norm, 1.0)
            update, norm = update.mul_(share), norm * share
        state["norm"] = norm
        return update.mul_(self.scale)

    def projection(self, name: str, gradient: torch.Tensor, seed: int, drawn: int) -> torch.Tensor:
        """[..., r, m], the same until it is drawn for another time."""
        return torch.randn(
            *gradient.shape[:-2],
            self.rank,
            gradient.shape[-2],
            generator=generator_of(seed, name, drawn, gradient.device),
            device=gradient.device,
            dtype=gradient.dtype,
        ).div_(self.rank**0.5)
