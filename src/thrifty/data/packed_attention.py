"""Calling a model on packs so that no document attends to another.

transformers builds a block-diagonal causal mask from ``position_ids`` that restart, but only where
there is no ``attention_mask`` and **no cache**: called with its default ``use_cache=True`` every
family lets documents see each other, without a warning (transformers 5.23,
``masking_utils._preprocess_mask_arguments``). OPT, Falcon and gpt-oss do not hand their
``position_ids`` to the mask at all and need it spelt out, gpt-oss one for each kind of layer.
Falcon with ALiBi takes none that could keep documents apart and is refused. Llama 4 cuts its
chunks, and tunes its temperature, by the place in the row: exact in rows shorter than a chunk
(8192). Flash attention looks at ``position_ids`` in batches of one only and needs the documents'
borders otherwise.

Checked against each document alone, sdpa and eager: llama, smollm3, mistral, qwen2, qwen3, gemma,
gemma2 (eager only, it has no sdpa), gemma3_text, olmo, olmo2, olmo3, phi, phi3, gpt2, gpt_neox,
opt, starcoder2, falcon, gpt_oss (eager only), llama4_text, with and without sliding windows. Flash
attention follows its documentation and is not checked here. For any other model, or before trusting
one, ``check_isolation`` asks the model itself; recurrent models (Mamba, hybrids) carry their state
across documents and fail it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NEEDS_MASK = frozenset({"opt", "falcon", "gpt_oss"})
"""Model types whose attention mask must be given, as it ignores ``position_ids``."""


def pack_attention_kwargs(
    model_type: str,
    position_ids: torch.Tensor,
    *,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype | None = None,
    window: int | None = None,
) -> dict[str, Any]:
    """What a model's forward needs besides ``input_ids`` and ``position_ids`` [batch, sequence].

    ``dtype`` and ``window`` (of the layers that slide) are the model's, for the families that take
    a mask (float32 where None).
    """
    kwargs: dict[str, Any] = {"use_cache": False}
    if "flash" in attn_implementation:
        if model_type in NEEDS_MASK:
            raise ValueError(
                f"{model_type} cannot keep packed documents apart under {attn_implementation}\n"
                "hint: attn_implementation: sdpa"
            )
        return kwargs | _borders(position_ids)
    if model_type == "gpt_oss":
        full = block_causal_mask(position_ids, dtype)
        sliding = block_causal_mask(position_ids, dtype, window)
        masks = {"full_attention": full, "sliding_attention": sliding}
        return kwargs | {"attention_mask": masks}
    if model_type in NEEDS_MASK:
        return kwargs | {"attention_mask": block_causal_mask(position_ids, dtype)}
    return kwargs


def attention_of(model: Any, position_ids: torch.Tensor) -> dict[str, Any]:
    """``pack_attention_kwargs`` as ``model`` is set up."""
    config = model.config
    return pack_attention_kwargs(
        config.model_type,
        position_ids,
        attn_implementation=config._attn_implementation or "eager",
        dtype=model.dtype,
        window=getattr(config, "sliding_window", None),
    )


def documents(position_ids: torch.Tensor) -> torch.Tensor:
    """0, 0, 0, 1, 1, ... : which document of its pack each token belongs to; [batch, sequence]."""
    return (position_ids == 0).cumsum(-1) - 1


def block_causal_mask(
    position_ids: torch.Tensor, dtype: torch.dtype | None = None, window: int | None = None
) -> torch.Tensor:
    """What is added to attention scores: 0 within a document's past, or the last ``window`` tokens
    of it, else the least number; [batch, 1, sequence, sequence]."""
    import torch

    dtype = dtype or torch.float32
    document = documents(position_ids)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    if window:
        seen = seen.triu(1 - window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _borders(position_ids: torch.Tensor) -> dict[str, Any]:
    """The documents' borders in the batch laid out as one sequence, as variable-length kernels
    want them."""
    import torch

    flat = position_ids.reshape(-1)
    starts = (flat == 0).nonzero().reshape(-1)
    borders = torch.cat([starts, starts.new_tensor([flat.numel()])]).to(torch.int32)
    longest = int(borders.diff().max())
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def isolation_errors(model: Any, *, length: int = 6) -> tuple[float, float]:
    """How well a model keeps two documents of one pack apart: (leak, shift), both relative to the
    largest logit and 0 for a model that does.

    Leak: how much the second document's logits move when the first one's tokens change (exactly 0
    in any precision, since what is masked weighs nothing). Shift: how far they are from those of
    the document alone, which rounding moves too. Three forward passes over a few random tokens.
    """
    import torch

    config = model.config
    vocabulary = config.get_text_config().vocab_size
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 2 * length), generator=generator).to(device)
    ids[1, length:] = ids[0, length:]
    position_ids = torch.arange(length, device=device).repeat(2)[None]

    def logits(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        kwargs = pack_attention_kwargs(
            config.model_type,
            positions,
            attn_implementation=config._attn_implementation or "eager",
            dtype=model.dtype,
            window=getattr(config, "sliding_window", None),
        )
        return model(input_ids=tokens, position_ids=positions, **kwargs).logits[0].float()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed, changed = (logits(row[None], position_ids)[length:] for row in ids)
            alone = logits(ids[:1, length:], position_ids[:, :length])
    finally:
        model.train(was_training)
    largest = packed.abs().max().clamp_min(1e-9)
    leak, shift = ((packed - other).abs().max() / largest for other in (changed, alone))
    return float(leak), float(shift)


def check_isolation(model: Any) -> None:
    """A ``ValueError`` where this model, as it is loaded, lets packed documents see each other."""
    import torch

    if getattr(model.config, "alibi", False):
        raise ValueError(
            f"{model.config.model_type} with ALiBi lets packed documents see each other\n"
            "hint: train this model without packing"
        )
    leak, shift = isolation_errors(model)
    if math.isnan(leak + shift):
        raise ValueError(
            "the base model's logits are not finite\n"
            "hint: are its weights damaged, or too large for the dtype of training.memory.weights?"
        )
    # An adapter may be held in fewer bits than the model.
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    if not (leak <= 1e-4 and shift <= (1e-4 if exact else 5e-2)):
        raise ValueError(
            f"{model.config.model_type} lets packed documents see each other (logits move by "
            f"{max(leak, shift):.1%})\nhint: train this model without packing"
        )
