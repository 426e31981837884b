"""`--do_predict`: the files of predictions, of the exit taken and of what every exit answers."""

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
    """Write `predict_results_<task>.txt` and, with what every exit answers, `predict_exits_<task>.jsonl`.

    Args:
        modality: text or images.
        args: of the run.
        trainer: with the model.
        rows: of the run; its test splits are predicted.
        run_costs: of the exits.
    """
    data = rows.data
    task = data.task_name or Path(data.dataset).stem
    for split, encoded in rows.splits.items():
        if not split.startswith("test"):
            continue
        taken = trainer.predict_dynamic(encoded)
        logits, exits = trainer.predict_exits(encoded).predictions, taken.exit_index.numpy()
        # Batches of other rows round differently: at the exit taken these are the logits that were answered.
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
    """A prediction as people read it: the name of its label, the names of several, or a number."""
    if problem_type == "regression":
        return round(float(prediction), 3)
    if problem_type == "multi_label_classification":
        return [names[index] for index in np.flatnonzero(prediction).tolist()]
    return names[int(prediction)]
