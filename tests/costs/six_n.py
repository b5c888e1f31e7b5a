"""The rule of 6 N FLOPs a token, on one small model that is stated whole, beside torch's counter.

A Llama of 4 layers, 256 wide, 2 rows of 512 tokens. N is every weight but the embedding, adapters
included, as ``PreTrainedModel.num_parameters(exclude_embeddings=True)`` and so the Trainer's
``total_flos`` count it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.utils.flop_counter import FlopCounterMode
from tracing import batch, build

from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting

SMALL = dict(
    model_type="llama",
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=4096,
    tie_word_embeddings=False,
)
RUN = MemorySetting(micro_batch=2, sequence=512, dtype="float32")
WAYS = {
    "full": RUN,
    "full, recompute": replace(RUN, recompute=1),
    "LoRA rank 16 on all linears": replace(RUN, adapter=Adapter(rank=16)),
    "LoRA rank 16 on q and v of the last 2 layers": replace(
        RUN, adapter=Adapter(rank=16, targets=("q_proj", "v_proj"), layers=(2, 3))
    ),
    "head alone": replace(RUN, only_head=True),
}


@dataclass(frozen=True)
class Counted:
    flops: int
    """Of forward and backward, as torch's counter has them."""
    num_parameters: int
    """N."""

    @property
    def six_n(self) -> float:
        """What the rule says, over the truth."""
        return 6.0 * self.num_parameters * RUN.tokens / self.flops


def counted(setting: MemorySetting, attention: str = "eager") -> Counted:
    model = build(
        SMALL, adapter=setting.adapter, recompute=bool(setting.recompute), attention=attention
    )
    if setting.only_head:
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
    inputs = batch(setting.micro_batch, setting.sequence)
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    plain = model if setting.adapter is None else model.get_base_model()
    return Counted(counter.get_total_flops(), plain.num_parameters(exclude_embeddings=True))
