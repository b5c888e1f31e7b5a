"""How long until thrifty answers: `import thrifty`, and `thrifty plan` of a config alone.

python bench/startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from material import AS_INSTALLED, heading
from thrifty import display

LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
REPEATS = 7


def seconds(*command: str) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=AS_INSTALLED)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    probe = "import sys, time; t = time.perf_counter(); import thrifty; "
    probe += "print(time.perf_counter() - t, 'torch' in sys.modules)"
    runs = [
        subprocess.run(
            [sys.executable, "-c", probe],
            check=True,
            capture_output=True,
            text=True,
            env=AS_INSTALLED,
        ).stdout.split()
        for _ in range(REPEATS)
    ]
    imported = statistics.median(float(r[0]) for r in runs)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_3_8B))
        plan = [sys.executable, "-m", "thrifty", "plan", "--model", folder, "--json"]
        plan += ["--flops", "3e18", "--memory", "80GiB", "--device", "h100"]
        printed = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
        combinations = json.loads(printed)["num_combinations"]
        planned = seconds(*plan)
        bare = seconds(sys.executable, "-c", "pass")
    print(heading(f"Start-up, medians of {REPEATS} fresh processes"))
    rows = [
        ("import thrifty", f"{imported:.3f} s", "0.15 s"),
        ("  torch loaded by it", str(any(r[1] == "True" for r in runs)), "False"),
        (
            f"thrifty plan, Llama-3-8B config, {combinations} combinations",
            f"{planned:.2f} s",
            "1 s",
        ),
        ("  of which Python's own start", f"{bare:.2f} s", ""),
    ]
    print(display.table(("what", "measured", "asked"), rows, right="lr"))


if __name__ == "__main__":
    main()
