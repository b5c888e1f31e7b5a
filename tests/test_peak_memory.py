"""What earlier work leaves in allocators is not there when a run is measured."""

import subprocess
import sys

import pytest

LEFT = """
import numpy as np, pyarrow as pa
from thrifty.signals.peak_memory import memory_bytes, release_free_memory

pa.array(np.zeros(10))
before = memory_bytes("cpu")
held = [pa.array([float(i)] * 50_000) for i in range(200)]
full = memory_bytes("cpu")
del held
release_free_memory()
print((full - before) / 2**20, (memory_bytes("cpu") - before) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set")
def test_what_arrow_and_the_heap_keep_is_given_back():
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=True)
    held, left = map(float, done.stdout.split())
    assert held > 70
    assert left < held / 4
