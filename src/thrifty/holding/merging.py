"""An adapter merged into the weights that it is on: W + s B A, after which there is no adapter.

The product is made in float32 and added in the precision that the weights are held in: under
float32 the model's outputs stay the same to within rounding, under bfloat16 each weight is rounded
once, and what moved it by less than 1/256 of itself is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_merged(load: Callable[[Path, str], Any], base: Path, adapter: Path, folder: Path) -> None:
    """Leave in ``folder`` the weights in ``base``, as ``load(base, device)`` holds them, with the
    LoRA adapter in ``adapter`` merged: a model that stock transformers loads."""
    from peft import PeftModel

    # PEFT reads adapters in half precision as float32.
    model: Any = PeftModel.from_pretrained(load(base, "cpu"), str(adapter), use_safetensors=True)
    model.merge_and_unload().save_pretrained(folder)
