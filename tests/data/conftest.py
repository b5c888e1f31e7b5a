"""What the tests of the data floor share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from data_templates import make_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data, where the machine has some; tests that ask for it are skipped elsewhere."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("THRIFTY_SHARED_DATA", beside))
    if not (folder / "mix" / "pool.parquet").exists():
        pytest.skip("no shared data on this machine")
    return folder
