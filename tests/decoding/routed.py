"""Questions of two kinds, and two models that know one each: what a router can learn."""

from pathlib import Path

import numpy as np

from thrifty.core.sampling import Outcome


def question(kind, number):
    if kind:
        return f"Compute the sum of {number} and {number * 7 % 1000}."
    return f"Who wrote the book about {number} rivers?"


def outcomes_of(prompts, chances, seed=0):
    """``chances``: model -> P(right) of each prompt."""
    rng = np.random.default_rng(seed)
    return [
        Outcome(
            id=str(i),
            model=model,
            answers=(f"what {model} said",),
            correct=(float(rng.random() < of[i]),),
            prompt=prompt,
        )
        for i, prompt in enumerate(prompts)
        for model, of in chances.items()
    ]


def of_two_kinds(numbers):
    """The cheap one can compute, the dear one knows books."""
    kinds = [i % 2 for i in range(len(numbers))]
    prompts = [question(kind, number) for kind, number in zip(kinds, numbers, strict=True)]
    chances = {
        "cheap": [0.9 if kind else 0.2 for kind in kinds],
        "dear": [0.4 if kind else 0.9 for kind in kinds],
    }
    return outcomes_of(prompts, chances)


def save_sentence_model(model: Path, folder: Path) -> str:
    """A folder that sentence-transformers wrote: that model, its mean over tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    body = Transformer(str(model))
    body.tokenizer.pad_token = body.tokenizer.eos_token
    SentenceTransformer(modules=[body, Pooling(32, pooling_mode="mean")]).save(str(folder))
    return str(folder)
