"""The regime map: which scorer the prior names, by target, budget and size of the scorer's model.

    python bench/regimes.py

A Llama of 8B parameters, a pool of 100M tokens in rows of 512; the budget in passes of training
over the pool, what scoring takes included; the scorers that look at a model look at one so many
times smaller. Worths are those of the methods' files, prices their own ``cost``. It is a map of
priors: what is measured of them is in docs/log.md and docs/pilot.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from thrifty import breakeven
from thrifty.core.contracts import Scorer
from thrifty.core.resolve import all_names, resolve
from thrifty.costs.flops import train_flops
from thrifty.costs.hardware import load_device
from thrifty.costs.shape import ModelShape
from thrifty.display import table
from thrifty.priors import load_priors
from thrifty.regime import Arm, price_of, winner, worth_of

BUDGETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
RATIOS = (1, 2, 5, 10, 30)
POOL_TOKENS, ROW_TOKENS = 1e8, 512
LLAMA_8B = dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip


def scorers(target: bool) -> Iterator[tuple[str, Scorer]]:
    for name in all_names("scorer"):
        scorer = resolve("scorer", name)
        if "sft" in scorer.tasks and (target or not scorer.needs_target):
            yield name, scorer


def arms(target: bool, ratio: float) -> dict[str, Arm]:
    """``uniform`` first, which wins ties."""
    shape = ModelShape.from_config(LLAMA_8B)
    pool, device = breakeven._pool(POOL_TOKENS, ROW_TOKENS), load_device("h100")
    length = breakeven.MAX_LENGTH
    once = POOL_TOKENS * train_flops(shape, 1, length) / length
    found = {"uniform": Arm(1.0)}
    for name, scorer in scorers(target):
        if name == "uniform" or (scorer.cost_class == "training" and ratio == RATIOS[0]):
            continue  # a training of the model itself on the pool is no scorer of it
        passes = breakeven._cost(scorer, shape, pool, device) / once
        found[name] = Arm(load_priors().of(scorer).mean, price_of(passes, ratio))
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    for target in (True, False):
        rows = []
        by_ratio = {ratio: arms(target, ratio) for ratio in RATIOS}
        for budget in BUDGETS:
            cells = []
            for those in by_ratio.values():
                best = winner(those, budget)
                over = worth_of(those[best], budget) / worth_of(those["uniform"], budget)
                cells.append(f"{best} {over:.2f}x")
            rows.append([f"{budget:g}", *cells])
        print(f"\n{'With a target' if target else 'Without a target'}: the first by prior, and the")
        print("uniform rows that would do as well, as a multiple of those that the budget buys\n")
        print(table(["passes", *(f"scorer {ratio}x smaller" for ratio in RATIOS)], rows))


if __name__ == "__main__":
    main()
