"""Reporters, which the Trainer brings (TensorBoard, W&B, ...): looked at before anything is spent,
and fenced, since a run is worth more than its log.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


def check_reporters(names: tuple[str, ...]) -> None:
    """Raise ValueError for a reporter that is unknown or not installed.

    ``all`` and ``none`` are the Trainer's own words.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(
                f"training.report_to names {name!r}, which is no reporter\nhint: one of {known}"
            )
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"training.report_to names {name}, which is not installed\n"
                f"hint: pip install {name}, or take it out of training.report_to"
            )


def is_reporter(callback: TrainerCallback) -> bool:
    return type(callback).__module__.startswith("transformers.integrations.")


class Fenced(TrainerCallback):
    """A reporter inside a fence: what it raises is said once, and training goes on."""

    def __init__(self, inner: TrainerCallback, say: Any) -> None:
        self._inner = inner
        self._say = say
        self._failed = False

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        inner, say = super().__getattribute__("_inner"), super().__getattribute__("_say")

        def event(*args: Any, **kwargs: Any) -> Any:
            try:
                return getattr(inner, name)(*args, **kwargs)
            except Exception as error:  # whatever a reporter raises, the run is worth more
                if not self._failed:
                    self._failed = True
                    say(f"reporting degraded: {type(inner).__name__} raised {error!r}")
                return None

        return event
