"""An evaluation in words: a line for people, and the numbers that reporters are given."""

from __future__ import annotations

from collections.abc import Sequence

from thrifty.core.budget import Budget, Cost
from thrifty.core.plan import Objective
from thrifty.evaluation import Measured
from thrifty.yardstick import in_nats


def line(
    step: int,
    objective: Objective,
    found: Measured,
    stderr: float,
    broken: Sequence[str],
    budget: Budget,
    spent: Cost,
) -> str:
    """For people; ``broken``: the floors that the model breaks, in words."""
    said = (
        f"step {step:>5}  dev {objective.name} {objective.shown(found.objective):.4f} "
        f"± {stderr:.4f}"
    )
    if (losses := in_nats(found)) is not found:
        said += f"  loss {losses.objective:.4f}"
    if broken:
        said += f"  NOT TO BE KEPT: {'; '.join(broken)}"
    shares = [
        f"{100 * (spent.of(name) or 0.0) / limit:.0f}% of {name}"
        for name in budget.limited
        if (limit := budget.limit(name))
    ]
    return f"{said}  spent {', '.join(shares)}" if shares else said


def reported(objective: Objective, found: Measured, stderr: float) -> dict[str, float]:
    """By the names that reporters know: losses in nats, and the objective in its own unit."""
    losses = in_nats(found)
    metrics = {"eval_loss": losses.objective, "eval_loss_stderr": losses.stderr()}
    if losses is found:
        metrics["eval_loss_stderr"] = stderr
    else:
        metrics[f"eval_{objective.name}"] = objective.shown(found.objective)
        metrics[f"eval_{objective.name}_stderr"] = stderr
        for name, loss in found.losses().items():
            metrics[f"eval_{name}_{objective.name}"] = objective.shown(loss)
    return metrics | {f"eval_{name}_loss": loss for name, loss in losses.losses().items()}
