"""The output of a run: files, model card, tables and warnings."""

from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from ..calibration import CalibrationReport
from ..evaluation import (
    format_exit_table,
    measure_seconds,
    plot_exit_curves,
    save_exit_logits,
    text_functions,
    write_exit_results,
)
from ..hub import choose_examples, hub_name, write_examples, write_model_card
from ..hub.markdown import numbered
from ..sharding import is_sharded
from ..training.trainer import EarlyExitTrainer
from .arguments import RunArguments
from .model import LoadedModel
from .results import ExitOutputs
from .rows import RunRows


logger = logging.get_logger(__name__)


def write_report(
    args: RunArguments, trainer: EarlyExitTrainer, rows: RunRows, outputs: ExitOutputs, results: dict
) -> None:
    """Write logits, results, plot and model card into the output folder."""
    save_exit_logits(args.folder, *outputs.to_save(rows.data.row_ids("validation")))
    write_exit_results(args.folder, results)
    plot_exit_curves(results, args.folder / "exit_curves.png")
    _write_card(args, trainer, rows, outputs, results)


def print_report(
    args: RunArguments, loaded: LoadedModel, rows: RunRows, results: dict, report: CalibrationReport | None
) -> None:
    """Print the table of exits, the result of calibration or the possible budgets, and times if requested."""
    print(format_exit_table(results))
    print(f"Calibration: {report.message}" if report else _budget_hint(results, args.folder))
    if args.calibration.measure_speed and loaded.model.config.exit_policy is not None:
        if is_sharded(loaded.model):
            print("--measure_speed: not measured, as this process holds only a part of each parameter.")
        else:
            _print_speed(args, loaded, rows)
    print(f"Results, logits, plot (exit_curves.png), card (README.md) and model: {args.folder}")


def warn_of_idle_exits(outputs: ExitOutputs) -> None:
    """Warn about exits of a classifier that are no better than the majority class."""
    majority = np.bincount(outputs.labels).max() / len(outputs.labels)
    accuracies = (outputs.logits.argmax(-1) == outputs.labels[:, None]).mean(0)
    idle = (np.flatnonzero(accuracies <= majority) + 1).tolist()
    if idle:
        logger.warning(
            f"Always answering the majority class ({majority:.3f}) is as accurate as {numbered('exit', idle)}, or "
            "more: train longer, raise --head_learning_rate or --exit_loss_weights."
        )


def _write_card(
    args: RunArguments, trainer: EarlyExitTrainer, rows: RunRows, outputs: ExitOutputs, results: dict
) -> None:
    """Write the model card, and the examples that it may show."""
    data, config, logits = rows.data, trainer.model.config, outputs.logits
    if data.problem_type == "single_label_classification":
        names = [config.id2label[index] for index in range(config.num_labels)]
        policy = trainer.model.get_exit_policy()
        if policy is not None:  # otherwise there are no temperatures
            logits = policy.temper(torch.from_numpy(logits), torch.arange(logits.shape[1])).numpy()
        examples = choose_examples(logits, outputs.labels, names)
        shown = data.splits["validation"]
        write_examples(args.folder, examples, shown, data.input_columns, shared=args.training.card_examples)
    source = args.data.dataset_name or ("/" in data.dataset and data.dataset) or None
    write_model_card(
        args.folder,
        results,
        config,
        settings=args.settings() if args.training.do_train else None,
        repo_id=(args.training.push_to_hub and trainer.hub_model_id) or args.training.hub_model_id,
        base_model=hub_name(args.model.model_name_or_path, installed=("minilm",)),
        dataset_id=hub_name(source, installed=("bbc_news", "digits")),
    )


def _budget_hint(results: dict, folder: Path) -> str:
    """The table of budgets, for a run without a policy."""
    if not results["budgeted"]:
        return "No criterion fits this problem: every input runs through the whole network."
    if len(results["exit_layers"]) == 1:
        return "The network's own exit is the only one: every input runs through the whole network."
    rows = results["num_report_samples"]
    lines = [f"No policy was requested. These budgets were measured on the {rows} rows not used for calibration:"]
    for row in results["budgeted"]:
        lines.append(f"  cost {row['relative_cost']:.3f}  {results['metric']} {row['metrics'][results['metric']]:.4f}")
    lines = list(dict.fromkeys(lines))  # a larger budget may find nothing better
    if (folder / "config.json").is_file():
        lines.append(
            f"To save a policy for one of these, or for another: een-hf calibrate {folder} --target_cost 0.5 --save"
        )
    else:
        lines.append("The model is in another folder: to save a policy, give --target_cost to this run.")
    return "\n".join(lines)


def _print_speed(args: RunArguments, loaded: LoadedModel, rows: RunRows) -> None:
    """Measure the time of the validation rows, with tokenization: exits off, exits on, and the stock pipeline."""
    timed = rows.data.splits["validation"]
    texts = [timed[column] for column in rows.data.input_columns]
    settings = {"max_length": args.data.max_seq_length, "batch_size": args.training.per_device_eval_batch_size}
    functions = text_functions(loaded.model, loaded.processor, texts, **settings)
    for name, seconds in measure_seconds(functions, repeats=3).items():
        print(f"{name}: {np.median(seconds):.2f} s for {len(timed)} rows")
