"""`--do_predict`: the files of predictions, of each row's exit and of the predictions of every exit."""

import json
from pathlib import Path

import numpy as np

from ..data.task import Modality
from ..evaluation import predict_labels
from ..training.trainer import EarlyExitTrainer
from .arguments import RunArguments
from .costs import RunCosts
from .rows import RunRows


def write_predictions(
    modality: Modality, args: RunArguments, trainer: EarlyExitTrainer, rows: RunRows, run_costs: RunCosts
) -> None:
    """Write `predict_results_<task>.txt`, and with the predictions of every exit `predict_exits_<task>.jsonl`.

    Args:
        modality: texts or images.
        args: flags of the run.
        trainer: the trainer, with the model.
        rows: rows of the run; its test splits are predicted.
        run_costs: relative costs of the exits.
    """
    data = rows.data
    task = data.task_name or Path(data.dataset).stem
    for split, encoded in rows.splits.items():
        if not split.startswith("test"):
            continue
        taken = trainer.predict_dynamic(encoded)
        logits, exits = trainer.predict_exits(encoded).predictions, taken.exit_index.numpy()
        # Other batches round differently: at each row's exit, store the logits of the dynamic prediction.
        logits[np.arange(len(logits)), exits] = taken.logits.numpy()
        costs = run_costs.of(encoded).of_policy(trainer.model.get_exit_policy()).tolist()
        if not args.training.should_save:
            continue
        predictions = [
            [_readable(one, data.problem_type, trainer.model.config.id2label) for one in row]
            for row in predict_labels(logits, data.problem_type)
        ]
        answers = [row[exit_index] for row, exit_index in zip(predictions, exits, strict=True)]
        name = task + split.removeprefix("test").replace("_mismatched", "-mm")
        lines = [f"{index}\t{answer}\n" for index, answer in enumerate(answers)]
        (args.folder / f"predict_results_{name}.txt").write_text("index\tprediction\n" + "".join(lines))
        modality.write_submission(args.folder, data, split, answers)
        confidences = [None] * len(exits) if taken.confidence is None else taken.confidence.tolist()
        columns = data.row_ids(split), predictions, exits, confidences
        with open(args.folder / f"predict_exits_{name}.jsonl", "w") as file:
            for row_id, row, exit_index, confidence in zip(*columns, strict=True):
                line = {
                    "row_id": row_id.item(),
                    "predictions": row,
                    "exit": int(exit_index) + 1,
                    "relative_cost": costs[exit_index],
                    "confidence": confidence and round(confidence, 4),
                }
                file.write(json.dumps(line) + "\n")


def _readable(prediction, problem_type: str, names: dict[int, str]) -> str | float | list[str]:
    """A prediction for users: the name of its label, the names of several labels, or a number."""
    if problem_type == "regression":
        return round(float(prediction), 3)
    if problem_type == "multi_label_classification":
        return [names[index] for index in np.flatnonzero(prediction).tolist()]
    return names[int(prediction)]
