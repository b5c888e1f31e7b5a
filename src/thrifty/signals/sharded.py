"""Models whose weights are cut over the ranks of a run and gathered a layer at a time (ZeRO 3,
arXiv:1910.02054; torch's ``fully_shard``), as transformers cuts them while it reads them.

The layers are gathered one after the other; what is no layer (norms, head, an embedding that is
tied to it) stays gathered from a forward to the end of its backward. A pass is made by all ranks
or by none: whoever has nothing to do makes one that is ``idle``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thrifty.costs.shape import read_shape


def cut_over(folder: Path, count: int) -> Any:
    """How the model in ``folder`` is cut over ``count`` ranks: for ``from_pretrained``."""
    from transformers.distributed import DistributedConfig

    return DistributedConfig(fsdp_size=count, fsdp_plan=_gathered_apart(folder))


def _gathered_apart(folder: Path) -> dict[str, str]:
    """Module -> how it is gathered, of all that is not gathered with the rest."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from thrifty.signals.models import layers_of

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {module: name for name, module in model.named_modules()}
    found = {f"{names[layers_of(model)]}.*": "free_full_weight"}
    if not read_shape(folder).tie_word_embeddings:
        found[names[model.get_input_embeddings()]] = "free_full_weight"
    return found


def save_tied_once(model: Any) -> None:
    """Have ``save_pretrained`` of a model that was cut leave a tied weight under one name, as of
    others: it finds those by their place in memory, which gathered ones do not share."""
    gather, tied = model.gather_sharded_state_dict_for_save, model.all_tied_weights_keys

    def gathered(*args: Any, **kwargs: Any) -> dict[str, Any]:
        whole = gather(*args, **kwargs)
        return {name: weight for name, weight in whole.items() if name not in tied}

    model.gather_sharded_state_dict_for_save = gathered


def is_sharded(model: Any) -> bool:
    """Whether ``model``, or the one inside PEFT's, is."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


@contextmanager
def without_gradients(model: Any) -> Iterator[None]:
    """For passes alone. What these gather is used by later ones too, which may need gradients."""
    import torch

    with torch.no_grad() if is_sharded(model) else torch.inference_mode():
        yield


def idle(model: Any, passes: int) -> None:
    """So many passes of one token, that others' may be made; then what is gathered is let go."""
    import torch

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with without_gradients(model):
            for _ in range(passes):
                model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device))
    finally:
        model.train(training)
    let_go(model)


def let_go(model: Any) -> None:
    """Of all that passes gathered and kept: ``parameters()`` are the rank's own shares again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
