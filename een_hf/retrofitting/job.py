"""`retrofit`: from a fine-tuned model and unlabelled rows to a cheaper model in its folder."""

import os
import reprlib
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedModel, set_seed

from ..data.task import DataError
from ..evaluation import ExitCosts, measure_seconds, relative_costs, relative_latencies
from ..models import EarlyExitMixin, ExitConfigurationError
from ..training.arguments import CostUnit
from ..training.frozen_heads import logits_of_features, train_heads
from ..training.history import history_of, only_run_in
from .arguments import RetrofitArguments
from .certify import certify, certifying_rows
from .features import compute_features
from .model import load_model, name_of
from .report import RetrofitReport, save_model, save_report
from .rows import RetrofitRows, TextRows, UnlabelledImages, refuse_training_rows


def retrofit(
    model: str | os.PathLike | PreTrainedModel,
    train_dataset: Sequence[str] | Sequence[tuple[str, str]] | datasets.Dataset | None = None,
    *,
    output_dir: str | os.PathLike,
    processing_class: Any | None = None,
    **arguments: Any,
) -> RetrofitReport:
    """Make a fine-tuned classifier of texts or images cheaper without labels, as the command `een-hf retrofit` does.

    Exits before the last layer learn to predict what the model itself predicts. Then a policy is certified on other
    rows: with the given confidence, the answers differ from the model's on at most `max_risk` of new rows of the same
    kind. The rows must be new to the model, since it is more confident on rows that it was fine-tuned on. The weights
    of the model do not change. The model runs once on every row, and the inputs of the exits are kept below
    `output_dir`, so that a call that was interrupted, or one with another risk, continues from there.

    Args:
        model: folder or Hub name of a fine-tuned classifier, or the loaded model, which is not changed.
        train_dataset: texts, pairs of texts, or a data set with a column of texts or of images; labels are not read.
            `train_file` or `train_dir` may name the rows instead.
        output_dir: folder of the cheaper model.
        processing_class: tokenizer or image processor; default: the one that is saved with the model.
        **arguments: the other fields of `RetrofitArguments`, which are the flags of `een-hf retrofit`, for example
            `max_risk=0.02`, `risk_confidence=0.9`, `exit_layers` and `num_train_epochs=20`.

    Returns:
        the model with its policy, its certificate and its cost. The same is in `output_dir`.

    Raises:
        ExitConfigurationError: a model that cannot be retrofitted, a value out of range, or an `output_dir` that
            contains something else.
        DataError: rows that are missing, too few, or that the model was trained on.

    Example:
        >>> report = een_hf.retrofit("my-finetuned-bert", texts, output_dir="cheaper", max_risk=0.2)
        >>> report
        RetrofitReport(...)
        >>> answers = een_hf.predict(report.model, ["A fine film."], tokenizer=tokenizer)

    References:
        Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control (Angelopoulos et al., 2021): the
        fixed sequence of section 3 certifies the policy.
    """
    name = model if isinstance(model, str | os.PathLike) else name_of(model)
    args = RetrofitArguments(model=name, output_dir=output_dir, **arguments)
    if isinstance(model, PreTrainedModel) and not model.config.name_or_path and processing_class is None:
        raise ExitConfigurationError("The loaded model has no folder with its processor: give processing_class.")
    given = [value for value in (train_dataset, args.train_file, args.train_dir) if value is not None]
    if len(given) != 1:
        raise DataError("Give the rows: either --train_file (text) or --train_dir (images), or a `train_dataset`.")
    dataset = None if train_dataset is None else _as_dataset(train_dataset, args)
    with only_run_in(args.folder):
        return _retrofit(args, model, dataset, processing_class)


def _as_dataset(given: Any, args: RetrofitArguments) -> datasets.Dataset:
    """Texts or pairs of texts as a data set, whose columns are then set in `args`; a data set unchanged."""
    if isinstance(given, datasets.Dataset):
        return given
    refused = "`train_dataset` must hold texts, pairs of texts, or be a `datasets.Dataset`"
    rows = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise DataError(f"{refused}: it is a {type(given).__name__}. Of several splits, give one.")
    pairs = any(isinstance(row, tuple | list) for row in rows)
    columns = ["text", "text_pair"] if pairs else ["text"]
    for number, row in enumerate(rows):
        texts = row if pairs else [row]
        is_row = isinstance(texts, tuple | list) and len(texts) == len(columns)
        if not (is_row and all(text is None or isinstance(text, str) for text in texts)):
            raise DataError(f"{refused}: row {number} (counted from 0) is {reprlib.repr(row)}.")
    args.text_column_names = columns
    values = list(zip(*rows, strict=True)) if pairs else [rows]
    try:
        return datasets.Dataset.from_dict({name: list(texts) for name, texts in zip(columns, values, strict=False)})
    except UnicodeEncodeError as error:
        raise DataError(f"{refused}: {reprlib.repr(error.object)} is not valid Unicode.") from error


def _retrofit(
    args: RetrofitArguments,
    model: str | os.PathLike | PreTrainedModel,
    dataset: datasets.Dataset | None,
    processor: Any | None,
) -> RetrofitReport:
    set_seed(args.seed)
    images = dataset is not None and any(isinstance(kind, datasets.Image) for kind in dataset.features.values())
    text = args.train_dir is None and not images
    fields = {name: getattr(args, name) for name in ("exit_layers", "exit_pooling", "exit_head")}
    model, history = load_model(model, text=text, **fields), history_of(args.model, has_head=True)
    model.cuda_graphs = not args.no_cuda_graphs
    refuse_training_rows(args, history)
    rows = (TextRows if text else UnlabelledImages)(args, model.config, dataset, processor)
    certifying = certifying_rows(len(rows), args)
    training = np.setdiff1d(np.arange(len(rows)), certifying)

    settings = {name: getattr(args, name) for name in ("batch_size", "chunk_size", "feature_dtype")}
    features, teacher_logits = compute_features(model, rows, args.folder, **settings)
    settings = ("num_train_epochs", "train_batch_size", "head_learning_rate", "seed")
    settings = {name: getattr(args, name) for name in settings}
    train_heads(model, features[training], teacher_logits[training], **settings)
    exit_logits = logits_of_features(model, features[certifying], teacher_logits[certifying])
    costs, latency = _costs(model, rows, certifying, args)
    certified = certify(exit_logits, costs, args)
    model.config.training_scheme = "retrofit"
    save_model(args, model, rows, certified.policy)
    seconds = {}
    if certified.policy is not None and args.speed_samples:
        functions = rows.speed_functions(model, certifying[: args.speed_samples], args.batch_size)
        seconds = {name: float(np.median(times)) for name, times in measure_seconds(functions, repeats=3).items()}
    report = RetrofitReport(
        args, model, certified, costs, latency, len(training), certifying, list(rows.columns), seconds
    )
    save_report(report, exit_logits, history)
    return report


def _costs(
    model: EarlyExitMixin, rows: RetrofitRows, certifying: np.ndarray, args: RetrofitArguments
) -> tuple[ExitCosts, dict | None]:
    """The costs of the exits on the certifying rows; for latency, device, batch size and time."""
    inputs = rows.cost_inputs(certifying)
    if args.cost == CostUnit.OPERATIONS.value:
        return relative_costs(model, **inputs), None
    return relative_latencies(model, batch_size=args.latency_batch_size, criterion=args.exit_criterion, **inputs)
