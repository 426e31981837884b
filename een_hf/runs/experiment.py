"""One run: everything between the parsed flags and the files in the output folder."""

import re
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import set_seed
from transformers.utils import logging

from ..calibration import check_target_cost
from ..data.task import Modality
from ..errors import refused
from ..evaluation import make_compute_metrics
from ..hub import write_handler
from ..training.history import only_run_in, rows_chose, write_run
from ..training.registry import get_scheme
from ..training.trainer import EarlyExitTrainer
from .arguments import RunArguments
from .checks import check_calibration, check_flags, find_start
from .costs import RunCosts
from .model import LoadedModel, labels_of_checkpoint, load_for_run
from .predictions import write_predictions
from .report import print_report, warn_of_idle_exits, write_report
from .results import make_results, set_apart
from .rows import RunRows, encode_rows, load_data, training_rows


logger = logging.get_logger(__name__)


class Evaluator(EarlyExitTrainer):
    """Evaluates a model as it is: no scheme changes the aggregation of its exits."""

    scheme = None

    def check_model(self, model):
        pass


@dataclass
class Run:
    """The parts of a run, after all of them have been loaded and checked.

    Args:
        args: its flags.
        rows: the rows for training, evaluation and calibration.
        loaded: the model that it starts from.
        trainer: the trainer of this model.
        costs: relative costs of the model's exits.
        chosen_by: what else was chosen on the calibration rows, in this run or in the run of the checkpoint; `None`: a
            guarantee may be based on them.
        metrics: metrics of training and evaluation, after these.
    """

    args: RunArguments
    rows: RunRows
    loaded: LoadedModel
    trainer: EarlyExitTrainer
    costs: RunCosts
    chosen_by: str | None
    metrics: dict[str, float] = field(default_factory=dict)


def run_experiment(modality: Modality, args: RunArguments) -> Run:
    """Train, evaluate, calibrate and predict as the flags say.

    Args:
        modality: texts or images.
        args: the flags.

    Returns:
        the run, with its metrics.

    Raises:
        ExitConfigurationError: flags, data or a model that do not fit, before any training.
    """
    training = args.training
    if not training.should_log:
        logging.set_verbosity(training.get_process_log_level())
        logging.get_logger("een_hf").setLevel(training.get_process_log_level())
    check_flags(modality, args)
    # One process holds the folder for all of a run.
    with only_run_in(args.folder) if training.process_index == 0 else nullcontext():
        checkpoint = find_start(args)
        set_seed(training.seed)
        run = prepare(modality, args)
        metrics = _train(run, checkpoint) if training.do_train else {}
        metrics |= _evaluate(run) if training.do_eval else {}
        if training.do_predict:
            write_predictions(modality, args, run.trainer, run.rows, run.costs)
        if training.do_train:
            _record(run, finished=True)
        if training.push_handler and training.process_index == 0:
            write_handler(args.folder)
        if training.push_to_hub:
            run.trainer.push_to_hub()
    return replace(run, metrics=metrics)


def prepare(modality: Modality, args: RunArguments) -> Run:
    """Load data, model and processor and create the trainer, so that all errors in them occur before training."""
    data = load_data(modality, args, like=labels_of_checkpoint(modality, args.model))
    loaded = load_for_run(modality, args, data)
    rows = encode_rows(modality, args, data, loaded)
    settings = {"trains": args.training.do_train, "new_head": loaded.new_head}
    chosen_by = rows_chose(args.settings(), loaded.history, **settings)
    check_calibration(args, loaded, rows, chosen_by)
    trainer = _make_trainer(modality, args, rows, loaded)
    costs = RunCosts(trainer, args.calibration, data.problem_type)
    if args.calibration.target_cost is not None and args.training.do_eval:
        check_target_cost(args.calibration.target_cost, costs.of(rows.counted))
    if args.training.do_train and loaded.model.config.exit_policy is not None:
        logger.warning("The checkpoint's exit policy is reset: training changes what its thresholds mean.")
        loaded.model.set_exit_policy(None)
    return Run(args, rows, loaded, trainer, costs, chosen_by)


def _make_trainer(modality: Modality, args: RunArguments, rows: RunRows, loaded: LoadedModel) -> EarlyExitTrainer:
    """The trainer of the scheme, or one that only evaluates, with the settings for the kind of data."""
    training, trains = args.training, args.training.do_train
    if training.project == type(training).project:
        training.project = "-".join(re.findall(r"[\w.]+", " ".join(_names_of_data(args, rows))))
    if args.data.streaming and training.accelerator_config.dispatch_batches is None:
        # By default the first process reads for all, but it cannot stack texts that were padded batch by batch. Here
        # every process reads the stream in the same order and takes its own rows.
        training.accelerator_config.dispatch_batches = False
    if modality.main_input_name != "input_ids":
        training.remove_unused_columns = False  # rows have a column with the seed of Mixup and CutMix
    trainer_class = get_scheme(training.method) if trains else Evaluator
    settings = {
        "scheme_args": args.scheme if trains else None,
        "compute_metrics": make_compute_metrics(rows.data.metrics, rows.data.problem_type),
        "train_dataset": training_rows(modality, args, rows, loaded),
        "eval_dataset": rows.splits.get("validation"),
        "processing_class": loaded.processor,
        "data_collator": modality.make_collator(loaded.processor, args.data, loaded.model.config),
    }
    with refused("The trainer does not take these arguments"):
        return trainer_class(model=loaded.model, args=training, **settings)


def _names_of_data(args: RunArguments, rows: RunRows) -> list[str]:
    """The names of data set, task and part, if any: runs on the same rows share a tracker's project."""
    names = [rows.data.dataset, rows.data.task_name, args.data.partition_dir, args.data.partition_id]
    return list(dict.fromkeys(Path(str(name)).name for name in names if name is not None))


def _train(run: Run, checkpoint: str | None) -> dict[str, float]:
    """Train and save the model; returns the metrics."""
    _record(run, finished=False)
    if checkpoint is not None:
        logger.warning("Resuming from %s.", checkpoint)
    outcome = run.trainer.train(resume_from_checkpoint=checkpoint)
    run.trainer.save_model()
    run.trainer.save_state()
    _save_metrics(run, "train", outcome.metrics)
    return dict(outcome.metrics)


def _evaluate(run: Run) -> dict[str, float]:
    """Evaluate every exit, choose a policy if one is requested, and write and print the results."""
    trainer, training = run.trainer, run.args.training
    for split, rows in run.rows.splits.items():
        if split.startswith("validation_"):
            prefix = f"eval_{split.removeprefix('validation_')}"
            _save_metrics(run, prefix, trainer.predict_exits(rows, prefix).metrics)
    found = trainer.predict_exits(run.rows.splits["validation"], "eval")
    _save_metrics(run, "eval", found.metrics)
    outputs = set_apart(trainer, run.rows, found.predictions, found.label_ids, training.seed)
    results, report = make_results(run.args, trainer, run.rows, outputs, run.costs, run.chosen_by)
    if report is not None:
        run.loaded.model.set_exit_policy(report.policy)
        trainer.save_model()
        if not training.do_train:
            _record(run, finished=True)  # a later run that starts from this model finds where it comes from
    if training.should_save:
        write_report(run.args, trainer, run.rows, outputs, results)
        trainer.report_results(results)
        print_report(run.args, run.loaded, run.rows, results, report)
    if training.do_train and run.rows.data.problem_type == "single_label_classification":
        warn_of_idle_exits(outputs)
    return found.metrics


def _record(run: Run, finished: bool) -> None:
    """Record the run in its folder, unless it only evaluates the model there, which already has a record."""
    source, trained = run.args.model.model_name_or_path, run.args.training.do_train
    in_place = source is not None and Path(source).resolve() == run.args.folder.resolve()
    if run.args.training.should_save and (trained or not in_place):
        settings = {"trained": trained, "finished": finished, "history": run.loaded.history}
        write_run(run.args.folder, run.args.settings(), **settings)


def _save_metrics(run: Run, split: str, metrics: dict) -> None:
    run.trainer.log_metrics(split, metrics)
    run.trainer.save_metrics(split, metrics)
