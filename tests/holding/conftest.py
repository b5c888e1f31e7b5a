"""Techniques on real models: the usual tests run one family in float32, the others are slow."""

from __future__ import annotations

import pytest

OTHERS = ("gpt2", "gemma2", "mixtral", "opt", "llama4", "bfloat16", "qwen", "deepseek", "phi")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/holding/" in item.path.as_posix() and any(o in item.name for o in OTHERS):
            item.add_marker(pytest.mark.slow)
