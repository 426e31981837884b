#!/usr/bin/env python
"""Answer a folder of texts with early exits on Ray Data: parquet or csv in, parquet out, one model per actor.

python recipes/ray_data.py runs/demo texts/ answers/ --actors 2
"""

import argparse

import ray
from ray.data import ActorPoolStrategy, Dataset, SaveMode

from een_hf.inference import ExitBatchPredictor


def answer(
    rows: Dataset, *settings, actors: int, gpus: float, batch_size: int, predictor=ExitBatchPredictor
) -> Dataset:
    """The rows with `label`, `score` and `exit_layer`. The batches of an actor that dies run again on another.

    Args:
        rows: with a column of texts.
        *settings: of the predictor: folder or Hub name of the model, column of the texts.
        actors: processes; each loads the model once.
        gpus: of each actor; 0 runs on a CPU.
        batch_size: rows that an actor gets at a time.
        predictor: class of the actors.
    """
    return rows.map_batches(
        predictor,
        fn_constructor_args=settings,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=gpus,
        batch_size=batch_size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that all nodes can read, or Hub name")
    parser.add_argument("texts", help="folder of parquet or csv files")
    parser.add_argument("answers", help="folder that is made")
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet", help="of the texts")
    parser.add_argument("--column", default="text", help="that holds the texts")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor; 0.5 puts two on one GPU")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--address", help="`auto`: the cluster of this machine; default: a Ray of its own")
    args = parser.parse_args()
    if args.address:
        ray.init(args.address)
    elif not ray.is_initialized():
        ray.init("local", num_cpus=args.actors + 1, include_dashboard=False)  # one more reads and writes
    rows = (ray.data.read_csv if args.format == "csv" else ray.data.read_parquet)(args.texts)
    sizes = {"actors": args.actors, "gpus": args.gpus, "batch_size": args.batch_size}
    answer(rows, args.model, args.column, **sizes).write_parquet(args.answers, mode=SaveMode.ERROR)


if __name__ == "__main__":
    main()
