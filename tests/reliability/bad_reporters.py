"""Reporters that do what no reporter should, as a user would bring them: registered with the
Trainer's own, then the command. ``python bad_reporters.py KIND run RUN``."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils


class Raises(TrainerCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")


class Exits(TrainerCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        sys.exit(7)


class Interrupts(TrainerCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


class Hangs(TrainerCallback):
    """For ever, deaf to signals, from its first event on."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        threading.Event().wait()


class Floods(TrainerCallback):
    """MBs of talk on standard error, and no end of it."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        line = "x" * 1000 + "\n"
        for _ in range(3000):
            sys.stderr.write(line)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        while True:
            sys.stderr.write("y" * 1000 + "\n")
            time.sleep(0.0005)


class Meddles(TrainerCallback):
    """With all that it is given."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = control.should_save = True
        state.global_step, state.max_steps, args.learning_rate = 10**6, 1, 1.0
        state.log_history.clear()
        time.sleep(0.001)
        return control


KINDS = {each.__name__: each for each in (Raises, Exits, Interrupts, Hangs, Floods, Meddles)}

if __name__ == "__main__":
    from thrifty import cli

    integration_utils.INTEGRATION_TO_CALLBACK["bad"] = KINDS[sys.argv[1]]
    code = cli.main([*sys.argv[2:], "--set", "training.report_to=[bad]"])
    sys.exit(code)
