"""The command line on a device with too little memory: ``python -m tests.reliability.starving
WHERE MOST -- run RUN``.

    forward MOST    a training pass over more than MOST rows runs out in its first layer
    backward MOST   one runs out half-way down its backward, some gradients added already
    optimizer MOST  the first MOST updates but one run out after a weight was changed
    evaluate MOST   a pass of an evaluation over more than MOST rows runs out
    save MOST       the first MOST checkpoints run out before they are whole
"""

from __future__ import annotations

import sys
from typing import Any

import torch

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB."


def run_out() -> Any:
    raise torch.OutOfMemoryError(SAID)


def is_first_layer(module: Any) -> bool:
    return type(module).__name__.endswith("DecoderLayer") and module.self_attn.layer_idx == 0


def starve(where: str, most: int) -> None:
    """From now on."""
    if where in ("forward", "evaluate"):

        def before(module: Any, args: Any) -> None:
            wanted = is_first_layer(module) and module.training == (where == "forward")
            if wanted and len(args[0]) > most:
                run_out()

        torch.nn.modules.module.register_module_forward_pre_hook(before)
    elif where == "backward":

        def after(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if is_first_layer(module) and module.training and len(hidden) > most:
                hidden.register_hook(lambda gradient: run_out())

        torch.nn.modules.module.register_module_forward_hook(after)
    elif where == "optimizer":
        plain_step, left = torch.optim.AdamW.step, [most + 1]

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if 0 < left[0] <= most:
                self.param_groups[0]["params"][0].data.mul_(2.0)
                run_out()
            return plain_step(self, *args, **kwargs)

        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    else:
        from thrifty import checkpoints

        plain_commit, times = checkpoints.commit, [most]

        def commit(folder: Any, details: Any) -> None:
            times[0] -= 1
            if times[0] >= 0:
                run_out()
            plain_commit(folder, details)

        checkpoints.commit = commit


if __name__ == "__main__":
    starve(sys.argv[1], int(sys.argv[2]))
    from thrifty.cli import main

    sys.exit(main(sys.argv[sys.argv.index("--") + 1 :]))
