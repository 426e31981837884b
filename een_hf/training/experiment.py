"""One run of a script: arguments, data, model, training, evaluation at every exit, calibration, predictions."""

import difflib
import json
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.utils import broadcast_object_list
from sklearn.model_selection import train_test_split
from transformers import HfArgumentParser, PreTrainedConfig, set_seed
from transformers.utils import logging

from ..data.labels import REGRESSION, model_label_ids
from ..data.samples import model_source
from ..data.streaming import EndlessStream
from ..data.task import DataError, Modality, TaskData
from ..errors import in_one_line, one_line_errors, refuse_nan
from ..evaluation import (
    ExitCosts,
    anytime_table,
    budgeted_curve,
    calibrate,
    check_risk,
    check_target_cost,
    cost_inputs,
    count_operations,
    format_exit_table,
    make_compute_metrics,
    measure_seconds,
    plot_exit_curves,
    policy_row,
    predict_labels,
    relative_costs,
    relative_latencies,
    save_exit_logits,
    text_functions,
    write_exit_results,
)
from ..evaluation.calibration import CalibrationReport, rows_in_words, rows_needed
from ..hub import choose_examples, hub_name, write_examples, write_model_card
from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.auto import model_class_of
from ..models.configuration_een import is_classifier
from ..models.policies import find_criterion, fitting_criteria, get_criterion, resolve_problem_type
from .arguments import CalibrationArguments, CostUnit, EarlyExitTrainingArguments, ModelArguments
from .history import RUN_FILE, history_of, only_run_in, read_run, rows_chose, write_run
from .trainer import EarlyExitTrainer, get_scheme, last_whole_checkpoint, scheme_arguments


logger = logging.get_logger(__name__)

# Flags that say where a run lies, how it is watched and how fast it loads, but not what it computes.
_WATCHING = ("log", "hub_", "card_", "save_", "resume_")
_WHERE = (
    "output_dir report_to run_name project push_to_hub disable_tqdm token do_eval do_predict local_rank cache_dir "
    "overwrite_cache preprocessing_num_workers measure_speed dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor"
).split()
# `part` of exit_logits.npz: rows that calibrate, out of the evaluation split or beside it; all others are "report".
CALIBRATION_PARTS = ("calibration", "held_out")


@dataclass
class RunArguments:
    """The parsed flags of one run."""

    model: ModelArguments
    data: Any
    training: EarlyExitTrainingArguments
    calibration: CalibrationArguments
    scheme: Any | None

    def __post_init__(self):
        self._settings = self._read_settings()  # as given: a run fills in what was left open

    def settings(self) -> dict:
        """What makes two runs the same experiment: all flags but those that say where and how it is watched."""
        return self._settings

    def _read_settings(self) -> dict:
        parts = filter(None, (self.model, self.data, self.training, self.calibration, self.scheme))
        merged = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
        where = {*_WHERE} - ({"dataloader_num_workers"} if self.data.streaming else set())  # workers share a stream
        kept = {name: value for name, value in merged.items() if name not in where and not name.startswith(_WATCHING)}
        return json.loads(json.dumps(kept, default=str))


# Arguments


def parse_arguments(modality: Modality, argv: list[str]) -> RunArguments:
    """Parse flags, or a recipe (first argument, YAML or JSON) and flags that override it.

    Raises:
        ExitConfigurationError: a recipe that is not there, or a flag or recipe key that is not known.
    """
    recipe = None
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        recipe, argv = argv[0], argv[1:]
    words = [*_recipe_words(recipe), *argv] if recipe else list(argv)
    # `--method=boosted` is the same as `--method boosted`.
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--method=") else [word])]
    method = next(
        (words[i + 1] for i in reversed(range(len(words) - 1)) if words[i] == "--method"),
        EarlyExitTrainingArguments.method,
    )
    get_scheme(method)
    common = [ModelArguments, modality.data_arguments, EarlyExitTrainingArguments, CalibrationArguments]
    schemes = scheme_arguments()
    parser = HfArgumentParser([*common, *schemes])
    flags = sorted(parser._option_string_actions)
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name not in flags and name.replace("-", "_").replace("__", "--", 1) not in flags:
            near = difflib.get_close_matches(name, flags, n=3)
            where = f"recipe {recipe}: key {name[2:]!r}" if recipe and word not in argv else f"flag {name}"
            hint = f"; did you mean {' or '.join(near)}?" if near else "; see --help."
            raise ExitConfigurationError(f"Unknown {where}{hint}")
    try:
        parsed = parser.parse_args_into_dataclasses(words)
    except ExitConfigurationError:
        raise
    except ValueError as error:  # of transformers
        raise ExitConfigurationError(str(error)) from error
    for part in parsed:
        refuse_nan(vars(part))
    parsed[3].exit_criterion = find_criterion(parsed[3].exit_criterion)
    own = [part for kind, part in zip(schemes, parsed[4:], strict=True) if kind is get_scheme(method).arguments_class]
    return RunArguments(*parsed[:4], scheme=own[0] if own else None)


def _recipe_words(path: str) -> list[str]:
    """A recipe as command-line words."""
    if not os.path.exists(path):
        raise ExitConfigurationError(f"Recipe {path} is not there; recipes of this project are in recipes/.")
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ExitConfigurationError(f"Recipe {path} cannot be read: {in_one_line(error)}") from error
    if not isinstance(recipe, dict):
        raise ExitConfigurationError(f"Recipe {path} must be a mapping of flags to values.")
    words = []
    for name, value in recipe.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, values)]
    return words


def check_output_dir(args: RunArguments) -> str | None:
    """Return the checkpoint to resume from, or `None` for a fresh start.

    A run that ended before its first checkpoint leaves nothing to go on from, and its folder free.

    Raises:
        ExitConfigurationError: the folder belongs to a finished run, to a run with other settings, or to neither.
    """
    folder = Path(args.training.output_dir)
    if not args.training.do_train:
        return None
    checkpoint = args.training.resume_from_checkpoint
    last = last_whole_checkpoint(folder)
    before = read_run(folder) if (folder / RUN_FILE).exists() else None
    if last is None and not (folder / "config.json").exists() and not (before and before["finished"]):
        return checkpoint
    if before is None:
        raise ExitConfigurationError(
            f"--output_dir {folder} holds a model or checkpoints of something else: give another --output_dir."
        )
    now = args.settings()
    names = [name for name in now if before["settings"].get(name, now[name]) != now[name]]
    if names:
        changes = ", ".join(f"--{n} was {before['settings'][n]!r}, is {now[n]!r}" for n in names)
        raise ExitConfigurationError(
            f"--output_dir {folder} holds a run with other arguments ({changes}): give another --output_dir, "
            "or remove that folder."
        )
    if before["finished"]:
        raise ExitConfigurationError(
            f"--output_dir {folder} holds a finished run: give another --output_dir, or remove that folder to "
            "train again."
        )
    return checkpoint or last


# Model


def load_model(modality: Modality, args: ModelArguments, data: TaskData, trains: bool = True) -> EarlyExitMixin:
    """The early-exit model for `data`, from a checkpoint or from scratch.

    Its weights are in `--dtype`; by default in float32 where it `trains`, else as stored.

    Raises:
        ExitConfigurationError: an architecture that this script does not train, a config field that is not there, or
            a fine-tuned head with other labels than the data.
    """
    model_classes = modality.model_classes
    given = {
        name: getattr(args, name)
        for name in ("exit_layers", "exit_pooling", "exit_head")
        if getattr(args, name) is not None
    }
    given["problem_type"] = data.problem_type
    dtype = args.dtype or ("float32" if trains or args.model_type else "auto")
    if args.model_type is not None:
        if args.model_type not in model_classes:
            raise ExitConfigurationError(
                f"--model_type {args.model_type} does not fit this script, which trains {', '.join(model_classes)}."
            )
        model_class = model_classes[args.model_type]
        config_class = model_class.config_class
        overrides = dict(pair.split("=") for pair in (args.config_overrides or "").split(",") if pair)
        unknown = sorted(overrides.keys() - config_class.field_names().keys())
        if unknown:
            raise ExitConfigurationError(
                f"--config_overrides names {unknown[0]!r}, which {config_class.__name__} lacks."
            )
        try:
            names = config_class.field_names()
            overrides = {names[name]: yaml.safe_load(value) for name, value in overrides.items()}
        except yaml.YAMLError as error:
            raise ExitConfigurationError(
                f"--config_overrides {args.config_overrides} cannot be read: {in_one_line(error)}"
            ) from error
        config = config_class(**overrides, **given)
        _set_labels(config, _label_names(data))
        return model_class(config).to(getattr(torch, dtype))

    model_class, config, fine_tuned = _read_config(modality, args, **given)
    if not fine_tuned or args.ignore_mismatched_sizes:
        _set_labels(config, _label_names(data))
    elif data.num_labels > config.num_labels or data.label_names is None and config.num_labels > 1:
        raise ExitConfigurationError(
            f"--model_name_or_path {args.model_name_or_path} has a head for {config.num_labels} labels, the data have "
            f"{data.num_labels}: give --ignore_mismatched_sizes to make the head anew, or another checkpoint."
        )
    elif data.num_labels == config.num_labels and data.label_names and _unnamed(config):
        ids = model_label_ids(data, config.label2id)
        _set_labels(config, dict(sorted(zip(ids, data.label_names, strict=True))))
    return model_class.from_pretrained(
        model_source(args.model_name_or_path),
        config=config,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes or not fine_tuned,
        attn_implementation=args.attn_implementation,
        dtype=dtype,
        **_hub(args),
    )


def labels_of_checkpoint(modality: Modality, args: ModelArguments) -> TaskData | None:
    """The problem and the labels of a fine-tuned checkpoint, which data must fit; `None` where the head is new."""
    if args.model_type is not None or args.ignore_mismatched_sizes:
        return None
    _, config, fine_tuned = _read_config(modality, args)
    if not fine_tuned:
        return None
    problem_type = resolve_problem_type(config.problem_type, config.num_labels)
    names = [config.id2label[index] for index in range(config.num_labels)]
    return TaskData({}, problem_type, None if problem_type == REGRESSION else names, [], "", "", None, [])


def _read_config(modality: Modality, args: ModelArguments, **given) -> tuple[type, PreTrainedConfig, bool]:
    """The class for a checkpoint, its config with what is `given`, and whether it is a fine-tuned classifier."""
    name = args.model_name_or_path
    try:
        found, _ = PreTrainedConfig.get_config_dict(model_source(name), **_hub(args))
    except (OSError, ValueError) as error:
        raise ExitConfigurationError(f"--model_name_or_path {name} cannot be loaded: {error}") from error
    model_class = model_class_of(found, f"--model_name_or_path {name}", modality.main_input_name)
    config_class = model_class.config_class
    if found.get("model_type") != config_class.model_type:  # a stock checkpoint, for which the defaults hold
        found = {name: value for name, value in found.items() if name != "model_type"}
    config = config_class.from_dict(found, **given)
    return model_class, config, is_classifier(found.get("architectures"), model_class.__name__)


def _hub(args: ModelArguments) -> dict[str, Any]:
    return {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}


def _unnamed(config: PreTrainedConfig) -> bool:
    return set(config.label2id) == {f"LABEL_{index}" for index in range(config.num_labels)}


def _label_names(data: TaskData) -> dict[int, str]:
    return dict(enumerate(data.label_names or [f"LABEL_{i}" for i in range(data.num_labels)]))


def _set_labels(config: PreTrainedConfig, names: dict[int, str]) -> None:
    config.id2label, config.label2id = names, {name: index for index, name in names.items()}


# Evaluation


def split_for_calibration(labels: np.ndarray, problem_type: str, seed: int) -> np.ndarray:
    """A seeded half of the rows, stratified by class where there are classes: (num_rows,) bool, True calibrates."""
    rows = np.arange(len(labels))
    stratify = None
    if problem_type == "single_label_classification":
        counts = np.unique(labels, return_counts=True)[1]
        stratify = labels if counts.min() >= 2 and len(counts) <= len(rows) // 2 else None
    chosen, _ = train_test_split(rows, train_size=0.5, random_state=seed, stratify=stratify)
    return np.isin(rows, chosen)


class Evaluator(EarlyExitTrainer):
    """Evaluates a model as it is: no scheme is asked, and none changes how its exits answer."""

    method = None

    def check_model(self, model):
        pass


class Experiment:
    """One run: everything between the parsed flags and the files in the output folder."""

    def __init__(self, modality: Modality, args: RunArguments):
        self.modality, self.args = modality, args
        self.training = args.training
        self.folder = Path(args.training.output_dir)
        self._latencies: tuple[ExitCosts, dict] | None = None

    def run(self) -> dict:
        """Train, evaluate, calibrate and predict as the flags say; return the metrics."""
        args, training = self.args, self.training
        if not (training.do_train or training.do_eval or training.do_predict):
            raise ExitConfigurationError("Nothing to do: give --do_train, --do_eval or --do_predict.")
        if args.calibration.measure_speed and self.modality.main_input_name != "input_ids":
            raise ExitConfigurationError("--measure_speed is for text; benchmarks/inference.py times images.")
        if args.calibration.measure_speed and not training.do_eval:
            raise ExitConfigurationError("--measure_speed times the evaluation rows: add --do_eval.")
        if args.data.streaming:
            self._check_streaming()
        # One process holds the folder for all of a run.
        with only_run_in(self.folder) if training.process_index == 0 else nullcontext():
            return self._run(check_output_dir(args))

    def _run(self, checkpoint: str | None) -> dict:
        training = self.training
        set_seed(training.seed)
        self._prepare()
        metrics = {}
        if training.do_train:
            self._record_run(finished=False)
            if checkpoint is not None:
                logger.warning("Resuming from %s.", checkpoint)
            outcome = self.trainer.train(resume_from_checkpoint=checkpoint)
            metrics |= outcome.metrics
            self.trainer.save_model()
            self.trainer.save_state()
            self._save_metrics("train", outcome.metrics)
        if training.do_eval:
            metrics |= self._evaluate()
        if training.do_predict:
            self._predict()
        if training.do_train:
            self._record_run(finished=True)
        if training.push_to_hub:
            self.trainer.push_to_hub()
        return metrics

    def _record_run(self, finished: bool) -> None:
        source, trained = self.args.model.model_name_or_path, self.training.do_train
        in_place = source is not None and Path(source).resolve() == self.folder.resolve()
        if self.training.should_save and (trained or not in_place):  # else the model's own record stands
            settings = {"trained": trained, "finished": finished, "history": self.history}
            write_run(self.folder, self.args.settings(), **settings)

    def _check_streaming(self) -> None:
        """A stream has no length and cannot be cut."""
        if self.training.do_train and self.training.max_steps <= 0:
            raise ExitConfigurationError("--streaming needs --max_steps: a stream has no length.")
        for flag, value in (
            ("train_val_split", self.args.data.train_val_split),
            ("calibration_samples", self.args.calibration.calibration_samples),
        ):
            if value is not None:
                raise ExitConfigurationError(f"--{flag} cuts the training rows, which --streaming does not hold.")

    def _prepare(self) -> None:
        """Load data, model and processor and build the trainer, so that whatever is wrong shows before training."""
        args, training = self.args, self.training
        needed = [
            split
            for split, wanted in (
                ("train", training.do_train or args.calibration.calibration_samples),
                ("validation", training.do_eval or training.eval_strategy != "no"),
                ("test", training.do_predict),
            )
            if wanted
        ]
        hub = {"cache_dir": args.model.cache_dir, "token": args.model.token}
        like = labels_of_checkpoint(self.modality, args.model)
        self.data = self.modality.load_data(args.data, splits_needed=needed, seed=training.seed, like=like, **hub)
        self.model = load_model(self.modality, args.model, self.data, trains=training.do_train)
        self.new_head = self.model.is_new_head(self.model.num_exits - 1)
        self.history = history_of(args.model.model_name_or_path, has_head=not self.new_head)
        self.modality.fit_model(self.model, args.data)
        source = args.model.model_name_or_path and model_source(args.model.model_name_or_path)
        self.processor = self.modality.load_processor(source, args.data, self.model.config, **hub)
        self.splits = self.modality.encode_data(self.data, self.processor, args.data, self.model.config)
        self._take_calibration_rows()
        self._check_calibration()
        if training.project == type(training).project:
            training.project = "-".join(re.findall(r"[\w.]+", " ".join(self._names_of_data())))
        if training.do_train:
            made_of = self.processor, args.data, self.model.config, training.seed
            rows = self.modality.augment(self.splits["train"], *made_of)
            self.splits["train"] = EndlessStream(rows) if args.data.streaming else rows
        if args.data.streaming and training.accelerator_config.dispatch_batches is None:
            # By default the first process reads for all, and cannot stack texts that were padded batch by batch. Every
            # process reads the same order of this stream and takes its own rows.
            training.accelerator_config.dispatch_batches = False
        if self.modality.main_input_name != "input_ids":
            training.remove_unused_columns = False  # rows carry what seeds their mixing
        self.trainer: EarlyExitTrainer = (get_scheme(training.method) if training.do_train else Evaluator)(
            model=self.model,
            args=training,
            scheme_args=args.scheme if training.do_train else None,
            compute_metrics=make_compute_metrics(self.data.metrics, self.data.problem_type),
            train_dataset=self.splits.get("train") if training.do_train else None,
            eval_dataset=self.splits.get("validation"),
            processing_class=self.processor,
            data_collator=self.modality.make_collator(self.processor, args.data, self.model.config),
        )
        if args.calibration.cost == CostUnit.LATENCY:
            self._check_budget()  # measured where the trainer has put the model
        if training.do_train and self.model.config.exit_policy is not None:
            logger.warning("The checkpoint's exit policy is reset: training changes what its thresholds mean.")
            self.model.set_exit_policy(None)

    def _names_of_data(self) -> list[str]:
        """Data set, task and part, as far as there are: runs of the same rows share a tracker's project."""
        part = [getattr(self.args.data, name, None) for name in ("partition_dir", "partition_id")]
        names = [self.data.dataset, self.data.task_name, *part]
        return list(dict.fromkeys(Path(str(name)).name for name in names if name is not None))

    def _take_calibration_rows(self) -> None:
        """Rows of `--calibration_file`, or `--calibration_samples` rows held out of the training split, or none."""
        wanted, self.calibration_rows = self.args.calibration.calibration_samples, None
        if self.args.calibration.calibration_file is not None:
            self.calibration_rows = self._calibration_file_rows(self.args.calibration.calibration_file)
            return
        if wanted is None:
            return
        train = self.splits["train"]
        if wanted >= len(train):
            raise ExitConfigurationError(
                f"--calibration_samples {wanted} leaves no training row: the training split has {len(train)}."
            )
        order = np.random.default_rng(self.training.seed).permutation(len(train))
        self.calibration_rows = train.select(order[:wanted])
        self.splits["train"] = train.select(np.sort(order[wanted:]))

    def _calibration_file_rows(self, path: str):
        """Encoded rows of a file (text) or a folder (images); labels are optional."""
        if not os.path.exists(path):
            raise ExitConfigurationError(f"--calibration_file {path} is not there.")
        sources = ("dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
        sources += (
            "partition_dir",
            "partition_id",
            "train_dir",
            "validation_dir",
            "test_dir",
            "train_val_split",
            "max_predict_samples",
        )
        names = {field.name for field in fields(self.args.data)}
        flag = "test_file" if "test_file" in names else "test_dir"
        given = dict.fromkeys(names.intersection(sources)) | {flag: path}
        data_args = replace(self.args.data, **given)
        seed = self.training.seed
        try:
            data = self.modality.load_data(data_args, splits_needed=["test"], seed=seed, like=self.data)
            return self.modality.encode_data(data, self.processor, data_args, self.model.config)["test"]
        except DataError as error:
            raise DataError(
                str(error).replace(f"--{flag} ", "--calibration_file ").replace(", split 'test'", "")
            ) from error

    def _check_calibration(self) -> None:
        """Refuse, before training, what calibration could not do after it."""
        wanted = self.args.calibration
        asked = wanted.target_cost is not None or wanted.max_risk is not None
        if asked and not self.training.do_eval:
            raise ExitConfigurationError("--target_cost and --max_risk calibrate on evaluated rows: add --do_eval.")
        if not self.training.do_eval:
            return
        if self.calibration_rows is None and len(self.splits["validation"]) < 2:
            raise ExitConfigurationError(
                "Half of the evaluation rows calibrates, but there is only one: give more, or --calibration_file."
            )
        kept = self.model.config.exit_policy is not None and not self.training.do_train
        if wanted.measure_speed and not (asked or kept):
            raise ExitConfigurationError("--measure_speed times a policy: add --target_cost or --max_risk.")
        fitting_criterion(wanted.exit_criterion, self.data.problem_type, required=asked)
        if wanted.max_risk is not None:
            labelled = self.calibration_rows is None or _has_labels(self.calibration_rows)
            check_risk(wanted.risk and wanted.risk.value, self.data.problem_type, labelled)
            self._warn_of_few_rows()
            if (reason := self._calibration_rows_chose()) is not None:
                logger.warning(
                    f"No guarantee will go with --max_risk: the calibration rows also chose {reason}. Give others: "
                    "--calibration_file."
                )
        if wanted.cost == CostUnit.OPERATIONS:
            self._check_budget()

    def _warn_of_few_rows(self) -> None:
        risk, confidence = self.args.calibration.max_risk, self.args.calibration.risk_confidence
        _, needed = rows_needed(risk, confidence)
        rows = self.calibration_rows
        found = len(self.splits["validation"]) // 2 if rows is None else len(rows)
        if found < needed:
            logger.warning(
                f"No early exit will be certified: --max_risk {risk:g} with --risk_confidence {confidence:g} takes at "
                f"least {needed} calibration rows; {rows_in_words(found)}. Give more, or a larger --max_risk."
            )

    def _check_budget(self) -> None:
        target = self.args.calibration.target_cost
        if target is not None and self.training.do_eval:
            check_target_cost(target, self._costs(self.calibration_rows or self.splits["validation"]))

    def _save_metrics(self, split: str, metrics: dict) -> None:
        self.trainer.log_metrics(split, metrics)
        self.trainer.save_metrics(split, metrics)

    # Evaluation

    def _evaluate(self) -> dict:
        """Evaluate every exit and write results, logits and plot."""
        trainer = self.trainer
        for split, rows in self.splits.items():
            if split.startswith("validation_"):
                prefix = f"eval_{split.removeprefix('validation_')}"
                self._save_metrics(prefix, trainer.predict_exits(rows, prefix).metrics)
        prediction = trainer.predict_exits(self.splits["validation"], "eval")
        self._save_metrics("eval", prediction.metrics)
        logits, labels = prediction.predictions, prediction.label_ids
        results, report = self._results(logits, labels)
        if report is not None:
            self.model.set_exit_policy(report.policy)
            trainer.save_model()
            if not self.training.do_train:
                self._record_run(finished=True)  # the model is no stranger to whoever goes on from it
        if self.training.should_save:
            write_exit_results(self.folder, results)
            plot_exit_curves(results, self.folder / "exit_curves.png")
            self._write_card(results, logits, labels)
            trainer.report_results(results)
            print(format_exit_table(results))
            print(f"Calibration: {report.message}" if report else _budget_hint(results, self.folder))
            if self.args.calibration.measure_speed and self.model.config.exit_policy is not None:
                self._print_speed(results)
            print(f"Results, logits, plot (exit_curves.png), card (README.md) and model: {self.folder}")
        self._warn_of_idle_exits(logits, labels)
        return prediction.metrics

    def _write_card(self, results: dict, logits: np.ndarray, labels: np.ndarray) -> None:
        """The model card, and the examples that it may show."""
        data, args, config = self.data, self.args, self.model.config
        if data.problem_type == "single_label_classification":
            names = [config.id2label[index] for index in range(config.num_labels)]
            policy = self.model.get_exit_policy()
            if policy is not None:  # else no temperatures are known
                logits = policy.temper(torch.from_numpy(logits), torch.arange(logits.shape[1])).numpy()
            examples = choose_examples(logits, labels, names)
            rows = data.splits["validation"]
            write_examples(self.folder, examples, rows, data.input_columns, shared=self.training.card_examples)
        source = args.data.dataset_name or ("/" in data.dataset and data.dataset) or None
        write_model_card(
            self.folder,
            results,
            config,
            settings=args.settings() if self.training.do_train else None,
            repo_id=(self.training.push_to_hub and self.trainer.hub_model_id) or self.training.hub_model_id,
            base_model=hub_name(args.model.model_name_or_path, installed=("minilm",)),
            dataset_id=hub_name(source, installed=("bbc_news", "digits")),
        )

    def _results(self, logits: np.ndarray, labels: np.ndarray) -> tuple[dict, CalibrationReport | None]:
        """The content of `exit_results.json`, and what calibration found, where it was asked for."""
        data, config, wanted = self.data, self.model.config, self.args.calibration
        costs = self._costs(self.calibration_rows or self.splits["validation"])
        chooses = np.zeros(len(labels), dtype=bool)
        if self.calibration_rows is not None:
            held_out = self.trainer.predict_exits(self.calibration_rows, "calibration")
            calibration = held_out.predictions, held_out.label_ids
        else:
            chooses = split_for_calibration(labels, data.problem_type, self.training.seed)
            calibration = logits[chooses], labels[chooses]
        reported = logits[~chooses], labels[~chooses]
        compute_metrics, problem_type = self.trainer.task_metrics, data.problem_type
        asked = wanted.target_cost is not None or wanted.max_risk is not None
        criterion = fitting_criterion(wanted.exit_criterion, problem_type, required=asked)
        settings = {"criterion": criterion, "problem_type": problem_type}
        budgeted, report, policy = [], None, None
        chosen_by = self._calibration_rows_chose()
        if criterion is not None:
            budgeted = budgeted_curve(calibration, reported, costs, compute_metrics, **settings)
        if asked:
            report = calibrate(
                *calibration,
                costs,
                target_cost=wanted.target_cost,
                max_risk=wanted.max_risk,
                risk=wanted.risk and wanted.risk.value,
                risk_confidence=wanted.risk_confidence,
                seed=self.training.seed,
                chosen_by=chosen_by,
                **settings,
            )
            if report.policy is not None:
                policy = policy_row(report.policy, *reported, costs, compute_metrics)
        if self.training.should_save:
            part = np.where(chooses, "calibration", "report")
            rows = [logits, labels, data.row_ids("validation"), part]
            if self.calibration_rows is not None and calibration[1] is not None:
                # Beyond the evaluation split, numbered from 0, so that `een-hf calibrate` finds them.
                count = len(calibration[1])
                extra = [*calibration, np.arange(count), np.full(count, "held_out")]
                rows = [np.concatenate(pair) for pair in zip(rows, extra, strict=True)]
            save_exit_logits(self.folder, *rows)
        table = {
            "relative_costs": costs,
            "exit_layers": config.exit_layers,
            "compute_metrics": compute_metrics,
            "problem_type": problem_type,
        }
        results = {
            "method": config.training_scheme or "unknown",
            "model_type": config.stock_model_type,
            "dataset": data.dataset,
            "task_name": data.task_name,
            "metric": data.metrics[0],
            "exit_layers": config.exit_layers,
            "num_eval_samples": len(labels),
            "num_calibration_samples": len(calibration[0]),
            "num_report_samples": len(reported[1]),  # of the evaluation rows, those that calibrated nothing
            "calibration_rows_chose": chosen_by,
            "cost_unit": wanted.cost.value,
            "exit_costs": costs.to_dict(),
            "latency": self._latencies and self._latencies[1],
            "plain_operations": count_operations(self.model, **cost_inputs(self.splits["validation"]))[1],
            "anytime": anytime_table(logits, labels, **table),
            "anytime_report": anytime_table(*reported, **table),
            "budgeted": budgeted,
            "policy": policy,
        }
        return results, report

    def _costs(self, rows) -> ExitCosts:
        """Relative cost of every exit: operations, or time on this machine (`--cost latency`)."""
        wanted, inputs = self.args.calibration, cost_inputs(rows)
        if wanted.cost == CostUnit.OPERATIONS:
            return relative_costs(self.model, **inputs)
        if self._latencies is None:
            criterion = fitting_criterion(wanted.exit_criterion, self.data.problem_type, required=False)
            settings = {"batch_size": wanted.latency_batch_size, **({"criterion": criterion} if criterion else {})}
            with self.trainer.accelerator.autocast():
                measured = [relative_latencies(self.model, **settings, **inputs)]
            self._latencies = broadcast_object_list(measured)[0]  # all processes set the first one's policy
        return self._latencies[0]

    def _calibration_rows_chose(self) -> str | None:
        """What the calibration rows chose already, here or in the run that made the checkpoint: no guarantee then."""
        settings = {"trains": self.training.do_train, "new_head": self.new_head}
        return rows_chose(self.args.settings(), self.history, **settings)

    def _warn_of_idle_exits(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Name the exits that learned no more than the majority class."""
        if not self.training.do_train or self.data.problem_type != "single_label_classification":
            return
        majority = np.bincount(labels).max() / len(labels)
        accuracies = (logits.argmax(-1) == labels[:, None]).mean(0)
        idle = np.flatnonzero(accuracies <= majority) + 1
        if len(idle):
            logger.warning(
                f"Exits {', '.join(map(str, idle))} are no better than always answering the majority class "
                f"({majority:.3f}): train longer, raise --head_learning_rate or their --exit_loss_weights."
            )

    def _print_speed(self, results: dict) -> None:
        """Time the validation rows, tokenizing included, with exits off, on, and in the stock pipeline."""
        rows = self.data.splits["validation"]
        texts = [rows[column] for column in self.data.input_columns]
        settings = {
            "max_length": self.args.data.max_seq_length,
            "batch_size": self.training.per_device_eval_batch_size,
        }
        functions = text_functions(self.model, self.processor, texts, **settings)
        for name, seconds in measure_seconds(functions, repeats=3).items():
            print(f"{name}: {np.median(seconds):.2f} s for {len(rows)} rows")

    # Prediction

    def _predict(self) -> None:
        """Write `predict_results_<task>.txt` and, with what every exit says, `predict_exits_<task>.jsonl`."""
        data = self.data
        task = data.task_name or Path(data.dataset).stem
        for split, rows in self.splits.items():
            if not split.startswith("test"):
                continue
            name = task + split.removeprefix("test").replace("_mismatched", "-mm")
            taken = self.trainer.predict_dynamic(rows)
            logits, exits = self.trainer.predict_exits(rows).predictions, taken.exit_index.numpy()
            # Batches of other rows round differently: what an exit answered is what a row left with.
            logits[np.arange(len(logits)), exits] = taken.logits.numpy()
            costs = self._costs(rows).of_policy(self.model.get_exit_policy()).tolist()
            predictions = predict_labels(logits, data.problem_type)
            confidences = [None] * len(rows) if taken.confidence is None else taken.confidence.tolist()
            if not self.training.should_save:
                continue
            answers = [self._label(row[exit_index]) for row, exit_index in zip(predictions, exits, strict=True)]
            with open(self.folder / f"predict_results_{name}.txt", "w") as file:
                file.write("index\tprediction\n")
                for index, answer in enumerate(answers):
                    file.write(f"{index}\t{answer}\n")
            self.modality.write_submission(self.folder, data, split, answers)
            with open(self.folder / f"predict_exits_{name}.jsonl", "w") as file:
                columns = data.row_ids(split), predictions, exits, confidences
                for row_id, row, exit_index, confidence in zip(*columns, strict=True):
                    line = {
                        "row_id": row_id.item(),
                        "predictions": [self._label(prediction) for prediction in row],
                        "exit": int(exit_index) + 1,
                        "relative_cost": costs[exit_index],
                        "confidence": confidence and round(confidence, 4),
                    }
                    file.write(json.dumps(line) + "\n")

    def _label(self, prediction) -> str | float | list[str]:
        """A prediction as people read it: label name, names, or number."""
        names = self.model.config.id2label
        if self.data.problem_type == "regression":
            return round(float(prediction), 3)
        if self.data.problem_type == "multi_label_classification":
            return [names[index] for index in np.flatnonzero(prediction).tolist()]
        return names[int(prediction)]


def fitting_criterion(name: str, problem_type: str, required: bool) -> str | None:
    """The criterion, if it fits the problem; else an error where it is required, or one that fits, or `None`."""
    criterion, fitting = get_criterion(name), fitting_criteria(problem_type)
    if required or name in fitting:
        criterion.check(problem_type)
        return name
    return fitting[0] if fitting else None


def _has_labels(rows) -> bool:
    """Whether encoded rows, text or images, carry labels."""
    return "labels" in getattr(rows, "column_names", rows[0])


def _budget_hint(results: dict, folder: Path) -> str:
    """The table of budgets, for a run that set no policy."""
    if not results["budgeted"]:
        return "No criterion fits this problem: every input runs through the whole network."
    if len(results["exit_layers"]) == 1:
        return "One exit, the network's own: every input runs through the whole network."
    rows = results["num_report_samples"]
    lines = [f"No policy was asked for. These budgets were measured on the {rows} rows that calibrated nothing:"]
    for row in results["budgeted"]:
        lines.append(f"  cost {row['relative_cost']:.3f}  {results['metric']} {row['metrics'][results['metric']]:.4f}")
    lines = list(dict.fromkeys(lines))  # a larger budget may find nothing better
    if (folder / "config.json").is_file():
        lines.append(f"Save one of these, or one between: een-hf calibrate {folder} --target_cost 0.5 --save")
    else:
        lines.append("The model lies elsewhere: to save a policy, give --target_cost to this run.")
    return "\n".join(lines)


def main(modality: Modality, argv: list[str] | None = None) -> None:
    """Entry point of a script."""
    with one_line_errors():
        Experiment(modality, parse_arguments(modality, sys.argv[1:] if argv is None else argv)).run()
