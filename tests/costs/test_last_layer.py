"""The last layer alone, again and again, gives what the whole model does, in every family."""

from __future__ import annotations

import pytest
import torch
from published import TINY
from tests.costs.test_example_gradients import model_of

from thrifty.signals.last_layer import last_layer_alone, last_value_weight

USUAL = ("llama", "opt", "gemma3_text")


def has_value(family: str) -> bool:
    try:
        last_value_weight(model_of(family))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "family", [f if f in USUAL else pytest.param(f, marks=pytest.mark.slow) for f in sorted(TINY)]
)
def test_the_last_layer_alone_gives_what_the_whole_model_does(family):
    if not has_value(family):
        pytest.skip("its value projection is fused with others")
    model = model_of(family)
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    given = {
        "input_ids": ids,
        "position_ids": torch.arange(12).expand(2, 12),
        "use_cache": False,
    }
    weight = last_value_weight(model)
    with torch.no_grad(), last_layer_alone(model, given) as logits:
        plain = logits()
        weight.mul_(1.5)
        changed = logits()
    with torch.no_grad():
        torch.testing.assert_close(changed, model(**given).logits)
        weight.div_(1.5)
        torch.testing.assert_close(plain, model(**given).logits)
    assert not torch.allclose(plain, changed)
    assert not any("forward" in vars(module) for module in model.modules())
