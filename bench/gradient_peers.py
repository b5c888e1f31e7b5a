"""What another library makes of the same model and rows; runs under the Python that has it.

    PYTHON bench/gradient_peers.py NAME FOLDER

FOLDER is what ``gradients.py`` leaves: the base model, an adapter if there is one, and
rows.safetensors. Printed as JSON: how many rows were worked through, and the processor's seconds,
without loading and without a first batch that compiles and draws projections where the library
allows it. found.npz then has the rows' features and the target's, or the rows' inner products with
the target. Every library is called as its own documentation has it, with about 8,192 numbers a row.

    traker          ``TRAKer.featurize``: vmap, a projection drawn anew for each batch
    kronfluence     ``Analyzer.compute_pairwise_scores`` with the strategy 'identity': no features
    dattri          ``LoGraAttributor.cache``: two-sided, 12 x 12 a module
    bergson         ``collect_gradients`` to memory: two-sided, 16 x 16 a module
    bergson-exact   the same without a projection
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

DIMENSIONS, BATCH = 8192, 32
ONE_IN = {"traker": 8}
"""Which share of the rows is worked through, where not all are: a library that is slow."""


class Job:
    def __init__(self, folder: Path, attention: str, one_in: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder / "base", attn_implementation=attention, dtype=torch.float32
        )
        if (folder / "adapter").exists():
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(
                self.model, folder / "adapter", is_trainable=True
            )
        self.model.eval()
        tensors = load_file(folder / "rows.safetensors")
        rows, self.target = tensors["rows"], tensors["target"]
        self.rows = rows[: max(16, len(rows) // one_in)]
        self.both = torch.cat([self.rows, self.target])
        names = (folder / "modules.json").read_text(encoding="utf-8")
        self.modules: list[str] = json.loads(names)
        """Of the linears whose weights are asked for."""
        wanted = {f"{name}.weight" for name in self.modules}
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(name in wanted)
        self.wanted = [n for n, w in self.model.named_parameters() if w.requires_grad]
        self.elements = sum(w.numel() for w in self.model.parameters() if w.requires_grad)

    def loss(self, model: Any, ids: Any) -> Any:
        """The sum of the rows' mean losses."""
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        return nll / (ids.shape[1] - 1)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def traker(job: Job, scratch: str) -> tuple[dict[str, Any], float]:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class NextTokens(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        def get_output(self, model: Any, weights: Any, buffers: Any, ids: Any) -> Any:
            put_out = torch.func.functional_call(
                model, (weights, buffers), (ids[None],), {"use_cache": False}
            )
            return torch.nn.functional.cross_entropy(put_out.logits[0, :-1], ids[1:])

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Any:
            return torch.ones(len(batch[0]), 1)

    tracker = TRAKer(
        model=job.model,
        task=NextTokens(),
        train_set_size=len(job.both),
        save_dir=scratch,
        device="cpu",
        proj_dim=DIMENSIONS,
        projector=BasicProjector(
            grad_dim=job.elements,
            proj_dim=DIMENSIONS,
            seed=0,
            proj_type=ProjectionType.rademacher,
            device="cpu",
        ),
        use_half_precision=False,
        grad_wrt=job.wanted,
        logging_level=logging.ERROR,
    )
    tracker.load_checkpoint(job.model.state_dict(), model_id=0)

    def work() -> None:
        for batch in job.both.split(16):
            tracker.featurize(batch=(batch,), num_samples=len(batch))

    _, seconds = timed(work)
    return split(np.array(tracker.saver.current_store["grads"]), job), seconds


def kronfluence(job: Job, scratch: str) -> tuple[dict[str, Any], float]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class NextTokens(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            return job.loss(model, batch[0])

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return job.loss(model, batch[0])

        def get_influence_tracked_modules(self) -> list[str]:
            return job.modules

    task = NextTokens()
    analyzer = Analyzer(
        "job",
        prepare_model(job.model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        log_level=logging.ERROR,
        output_dir=scratch,
    )
    rows, target = TensorDataset(job.rows), TensorDataset(job.target)
    analyzer.fit_all_factors("none", rows, factor_args=FactorArguments(strategy="identity"))

    def work() -> None:
        analyzer.compute_pairwise_scores(
            "products",
            "none",
            target,
            rows,
            per_device_query_batch_size=len(job.target),
            per_device_train_batch_size=BATCH,
        )

    _, seconds = timed(work)
    scores = analyzer.load_pairwise_scores("products")
    return {"products": scores["all_modules"].T.numpy()}, seconds


def dattri(job: Job, scratch: str) -> tuple[dict[str, Any], float]:
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    def loss(model: Any, batch: Any, device: Any = None) -> Any:
        return job.loss(model, batch["input_ids"])

    side = math.isqrt(DIMENSIONS // len(job.modules))
    task = AttributionTask(loss, job.model, job.model.state_dict())
    attributor = LoGraAttributor(
        task, layer_names=job.modules, hessian="Identity", proj_dim=side * side, offload="cpu"
    )
    batches = [{"input_ids": batch} for batch in job.both.split(BATCH)]
    attributor.cache(Batches([batches[0], batches[-1]]))  # compiles, for both sizes
    attributor.offload_manager.cached_gradients.clear()
    _, seconds = timed(lambda: attributor.cache(Batches(batches)))
    found = attributor.offload_manager.cached_gradients
    return split(torch.cat([found[i] for i in range(len(batches))]).numpy(), job), seconds


class Batches(list[Any]):
    """What it reads of a DataLoader."""

    @property
    def dataset(self) -> range:
        return range(sum(len(batch["input_ids"]) for batch in self))

    @property
    def batch_size(self) -> int:
        return len(self[0]["input_ids"])

    @property
    def sampler(self) -> range:
        return self.dataset


def bergson(job: Job, scratch: str, side: int = 0) -> tuple[dict[str, Any], float]:
    from bergson import collect_gradients
    from bergson.config.config import IndexConfig
    from bergson.data import load_gradients
    from bergson.gradients import GradientProcessor
    from datasets import Dataset

    side = side or math.isqrt(2 * DIMENSIONS // len(job.modules))
    data = Dataset.from_dict({"input_ids": job.both.tolist()})
    length = job.both.shape[1]
    config = IndexConfig(run_path=f"{scratch}/index", token_batch_size=BATCH * length)
    config.projection_dim = max(side, 0)
    config.loss_reduction = "mean"
    config.drop_columns = False  # of a data set of ids alone it would leave no rows
    config.partial_run_path.mkdir(parents=True)
    processor = GradientProcessor(projection_dim=side if side > 0 else None)
    places = list(range(len(data)))
    prefix = "base_model." if hasattr(job.model, "peft_config") else "model."
    wanted = {name.removeprefix(prefix) for name in job.modules}

    def work() -> None:
        collect_gradients(
            job.model,
            data,
            processor,
            config,
            batches=[places[i : i + BATCH] for i in range(0, len(places), BATCH)],
            target_modules=wanted,
        )

    _, seconds = timed(work)
    return split(
        np.asarray(load_gradients(config.partial_run_path), dtype=np.float32), job
    ), seconds


def bergson_exact(job: Job, scratch: str) -> tuple[dict[str, Any], float]:
    return bergson(job, scratch, side=-1)


def split(features: Any, job: Job) -> dict[str, Any]:
    return {"rows": features[: len(job.rows)], "target": features[len(job.rows) :]}


PEERS: dict[str, Callable[[Job, str], tuple[dict[str, Any], float]]] = {
    "traker": traker,
    "kronfluence": kronfluence,
    "dattri": dattri,
    "bergson": bergson,
    "bergson-exact": bergson_exact,
}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    attention = "eager" if name == "traker" else "sdpa"  # vmap knows no fused attention
    job = Job(folder, attention, ONE_IN.get(name, 1))
    with tempfile.TemporaryDirectory() as scratch:
        found, seconds = PEERS[name](job, scratch)
    np.savez(folder / "found.npz", **found)
    done = len(job.rows) if "products" in found else len(job.both)
    print(json.dumps({"rows": done, "seconds": seconds}))


if __name__ == "__main__":
    main()
