"""The closed form of a step's memory against the real step, run on fake tensors.

Every layer costs time, so a deep model is traced at two depths n < m that end on the same kind of
layer, and each instant is carried on linearly to depth L: v(n) + (L - n) (v(m) - v(n)) / (m - n).
Peaks bend where one instant overtakes another, so that instants are kept apart (the loss, every
layer's backward counted from below and from above, the embedding's, the optimizer) and their
maximum is taken last. Where layers follow no pattern, all are traced.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from thrifty.core import quantities
from thrifty.costs.memory import account, worst_turn
from thrifty.costs.setting import ADAMW, MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.fake_step import Instant, base_model, has_closed_form, record
from thrifty.fake_techniques import STATES
from thrifty.signals.models import layers_of

PHASES = ("loss", "backward", "optimizer", "estimate")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Bytes by phase: of the closed form, and of the step that ran on fake tensors."""

    predicted: dict[str, float] | None
    """None where the architecture has no closed form."""
    traced: dict[str, float]
    depths: tuple[int, ...]
    """Traced at these depths; one: the model's own."""
    seconds: float
    instead_of: str = ""
    """The optimizer in whose place AdamW was taken, as it has no fake kernels."""

    @property
    def extrapolated(self) -> bool:
        return len(self.depths) > 1

    @property
    def error(self) -> float | None:
        """Of the predicted peak, relative to the traced one."""
        if self.predicted is None:
            return None
        return max(self.predicted.values()) / max(self.traced.values()) - 1.0

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "predicted_bytes_by_phase": self.predicted,
            "traced_bytes_by_phase": self.traced,
            "traced_peak_bytes": max(self.traced.values()),
            "error": self.error,
            "depths": list(self.depths),
            "seconds": self.seconds,
            "instead_of": self.instead_of or None,
        }

    def __str__(self) -> str:
        how = f"at its full {self.depths[0]} layers"
        if self.extrapolated:
            how = f"carried on from {' and '.join(map(str, self.depths))} layers"
        lines = [f"verified on fake tensors, {how}, in {self.seconds:.1f} s"]
        if self.instead_of:
            lines.append(
                f"  both with adamw, as {self.instead_of} cannot be traced: its states are counted "
                "in closed form alone"
            )
        for phase in (*PHASES, "peak"):
            traced = _phase_or_peak(self.traced, phase)
            if not traced:  # with the head alone trained, no backward comes to a layer
                continue
            line = f"  {phase:<9}  traced {quantities.format_bytes(traced)}"
            if self.predicted is not None:
                predicted = _phase_or_peak(self.predicted, phase)
                line += f", predicted {quantities.format_bytes(predicted)}"
                line += f" ({predicted / traced - 1.0:+.1%})"
            lines.append(line)
        if self.predicted is None:
            lines.append("  predicted: nothing, as this architecture has no closed form")
        return "\n".join(lines)


@dataclass(frozen=True)
class Refused:
    """Why a step could not be traced."""

    reason: str

    def facts(self) -> dict[str, Any]:
        return {"refused": self.reason}

    def __str__(self) -> str:
        return f"not verified: {self.reason}"


def _phase_or_peak(phases: Mapping[str, float], name: str) -> float:
    return max(phases.values()) if name == "peak" else phases[name]


def verify(
    config: Mapping[str, Any],
    setting: MemorySetting,
    *,
    full_depth: bool = False,
    any_optimizer: bool = False,
) -> Verification:
    """The closed form beside a trace of the real step; ``config``: a model's config.json.

    Layers are traced twice at most; ``full_depth`` traces all of them. ``any_optimizer``: both with
    AdamW in place of one that cannot be traced.
    """
    start, instead_of = time.perf_counter(), ""
    if any_optimizer and (setting.states_offloaded or setting.states.name not in STATES):
        instead_of = "adamw on the host" if setting.states_offloaded else setting.states.name
        setting = setting.changed(states=ADAMW, states_offloaded=False)
    predicted = None
    if has_closed_form(config):
        shape = ModelShape.from_config(config)
        setting = worst_turn(shape, setting)
        predicted = _predicted(shape, setting)
    model = base_model(config, setting.dtype)
    depth = len(layers_of(model))
    depths = (depth,) if full_depth else depths_that_tell(model, setting)
    peaks = [record(config, setting, each).peaks() for each in depths]
    traced = _by_phase(carried_on(peaks[0], peaks[-1], depths, depth))
    seconds = time.perf_counter() - start
    return Verification(
        predicted=predicted,
        traced=traced,
        depths=depths,
        seconds=seconds,
        instead_of=instead_of,
    )


def _predicted(shape: ModelShape, setting: MemorySetting) -> dict[str, float]:
    """The account, in the phases of a trace."""
    closed = account(shape, setting)
    phases = dict.fromkeys(PHASES, 0.0)
    for name in closed.phases:
        phase = "estimate" if name == "perturbation" else name
        phases[phase] = max(phases[phase], closed.phase_bytes(name))
    return phases


def trace(
    config: Mapping[str, Any], setting: MemorySetting, num_layers: int | None = None
) -> dict[str, float]:
    """The most bytes alive in each phase of the real step, cut to its first ``num_layers``."""
    return _by_phase(record(config, setting, num_layers).peaks().items())


def depths_that_tell(model: Any, setting: MemorySetting) -> tuple[int, ...]:
    """The two depths that tell of all layers of a model, or its own where two would be as deep."""
    return _depths(_kinds(model, setting))


def _kinds(model: Any, setting: MemorySetting) -> list[Any]:
    """For each layer all that may tell it from others: its parameters, the plain attributes of
    its modules, its kind of attention, whether it is trained and recomputed."""
    layers = layers_of(model)
    attention = getattr(model.config, "layer_types", None) or [""] * len(layers)
    chosen = setting.only_layers if setting.adapter is None else setting.adapter.layers
    kinds = []
    for index, layer in enumerate(layers):
        sizes = [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        switches = [
            (name, value)
            for module in layer.modules()
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and name != "layer_idx"
        ]
        trained = chosen is None or index in chosen
        recomputed = index % int(setting.recompute) if setting.recompute else 0
        kinds.append((attention[index], sizes, switches, trained, recomputed))
    return kinds


def _depths(kinds: list[Any]) -> tuple[int, ...]:
    """The two least depths that end like the whole: after ``prefix`` layers of their own, kinds
    return every ``period``. Or the whole depth, where that is less work."""
    depth = len(kinds)
    best: tuple[int, ...] = (depth,)
    for period in range(1, depth // 2):
        differing = [i for i in range(depth - period) if kinds[i] != kinds[i + period]]
        # The lowest layer is apart in any case: under an adapter its input needs no gradient.
        prefix = max([1, *(index + 1 for index in differing)])
        near = prefix + period + (depth - prefix) % period
        if 2 * near + period < sum(best):
            best = (near, near + period)
    return best


def carried_on(
    near: Mapping[Instant, Any], far: Mapping[Instant, Any], depths: tuple[int, ...], depth: int
) -> Iterator[tuple[Instant, Any]]:
    """The most bytes of each instant at ``depth`` from those at two lesser depths, its layers
    counted from below and from above: an instant may come twice. At one depth, as they are.
    Bytes: a number, or an array of several."""
    low, period = depths[0], depths[-1] - depths[0]
    if not period:
        yield from near.items()
        return
    for instant, value in near.items():
        partners = [instant]
        if instant.phase == "backward" and instant.layer >= low - period:
            # As far from the top as it is.
            partners.append(instant._replace(layer=instant.layer + period))
        for partner in partners:
            if partner in far:
                yield instant, value + (far[partner] - value) * ((depth - low) / period)


def _by_phase(peaks: Iterable[tuple[Instant, float]]) -> dict[str, float]:
    phases = dict.fromkeys(PHASES, 0.0)
    for (phase, _), size in peaks:
        if phase in phases:
            phases[phase] = max(phases[phase], float(size))
    return phases
