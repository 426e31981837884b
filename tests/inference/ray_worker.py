"""Answer the same texts twice on a Ray of its own: by the recipe, and with an actor that is killed once."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import ray

from een_hf.inference import ExitBatchPredictor


RECIPE = Path(__file__).parents[2] / "recipes" / "ray_data.py"
KILLED_AT = 123


class Killed(ExitBatchPredictor):
    """Dies of SIGKILL at one row, the first time that any process comes to it; says which process answered a row."""

    def __init__(self, path: str, column: str, folder: str):
        super().__init__(path, column)
        self.marker, self.started = Path(folder, "marker"), Path(folder, "started")

    def __call__(self, batch):
        self.started.mkdir(exist_ok=True)
        (self.started / str(os.getpid())).touch()
        until = time.monotonic() + 30  # for the other actor, or one of them answers all
        while len(list(self.started.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        if KILLED_AT in batch["id"] and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return {**super().__call__(batch), "pid": np.full(len(batch["id"]), os.getpid())}


def main(folder: Path, temporary: str) -> None:
    ray.init("local", num_cpus=3, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=temporary)
    model = str(folder / "model")
    sys.argv[1:] = [model, str(folder / "csv"), str(folder / "plain"), "--format", "csv"]
    recipe = runpy.run_path(str(RECIPE), run_name="__main__")
    rows = ray.data.read_parquet(str(folder / "parquet")).repartition(8)
    answers = recipe["answer"](rows, model, "text", str(folder), actors=2, gpus=0, batch_size=10, predictor=Killed)
    answers.write_parquet(str(folder / "killed"))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
