"""A retrofit from the model and the rows to the cheaper model in its folder."""

import os
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from transformers import set_seed

from ..data.task import DataError
from ..evaluation import ExitCosts, measure_seconds, relative_costs, relative_latencies
from ..models import EarlyExitMixin
from ..training.arguments import CostUnit
from ..training.frozen_heads import logits_of_features, train_heads
from ..training.history import history_of, only_run_in, trained_on
from .arguments import RetrofitArguments
from .certify import certify, certifying_rows
from .features import compute_features
from .model import load_model
from .report import RetrofitReport, save_model, save_report
from .rows import RetrofitRows, TextRows, UnlabelledImages


def retrofit(
    model: str | os.PathLike,
    train_dataset: Sequence[str] | Sequence[tuple[str, str]] | datasets.Dataset | None = None,
    *,
    output_dir: str | os.PathLike,
    processing_class: Any | None = None,
    **arguments: Any,
) -> RetrofitReport:
    """Make a fine-tuned classifier of text or images cheaper, without labels: `een-hf retrofit` in Python.

    Exits before the last layer learn what the model itself answers; a policy is certified on rows that they did not
    learn from: with the given confidence, the answers differ from the model's on at most `max_risk` of new rows like
    these. The rows should be new to the model, which is more confident on rows that it was fine-tuned on. Its own
    weights do not change. The model reads every row once; what the exits read is kept below `output_dir`, so that a
    call that was interrupted, or one with another risk, continues from there.

    Args:
        model: folder or Hub name of a fine-tuned classifier.
        train_dataset: texts, pairs of texts, or a data set with a column of text or of images; no labels are read. In
            its place `train_file` or `train_dir` may name the rows.
        output_dir: folder of the cheaper model.
        processing_class: tokenizer or image processor; by default the model's own.
        **arguments: the other fields of `RetrofitArguments`, which are the flags of `een-hf retrofit`:
            `max_risk=0.02`, `risk_confidence=0.9`, `exit_layers`, `num_train_epochs=20` and the like.

    Returns:
        the model with its policy, what was certified, and what it costs. The same is in `output_dir`.

    Raises:
        ExitConfigurationError: a model that cannot be retrofitted, a value out of range, or another folder's model in
            `output_dir`.
        DataError: rows that are missing, too few, or that the model was trained on.

    Example:
        >>> report = een_hf.retrofit("my-finetuned-bert", texts, output_dir="cheaper", max_risk=0.02)
        >>> print(report.summary)
        >>> answers = een_hf.predict(report.model, new_texts, processing_class=tokenizer)

    References:
        Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control (Angelopoulos et al., 2021): the
        fixed sequence of section 3 certifies the policy.
    """
    args = RetrofitArguments(model=model, output_dir=output_dir, **arguments)
    given = [value for value in (train_dataset, args.train_file, args.train_dir) if value is not None]
    if len(given) != 1:
        raise DataError("Give the rows: either --train_file (text) or --train_dir (images), or a `train_dataset`.")
    with only_run_in(args.folder):
        return _retrofit(args, None if train_dataset is None else _as_dataset(train_dataset, args), processing_class)


def _as_dataset(given: Any, args: RetrofitArguments) -> datasets.Dataset:
    """Texts or pairs of texts as a data set, whose columns `args` then names; a data set as it is."""
    if isinstance(given, datasets.Dataset):
        return given
    if len(given) and isinstance(given[0], str):
        args.text_column_names = ["text"]
        return datasets.Dataset.from_dict({"text": list(given)})
    if len(given) and len(given[0]) == 2:
        args.text_column_names = ["text", "text_pair"]
        first, second = zip(*given, strict=True)
        return datasets.Dataset.from_dict({"text": list(first), "text_pair": list(second)})
    raise DataError("`train_dataset` must hold texts, pairs of texts, or be a `datasets.Dataset`.")


def _retrofit(args: RetrofitArguments, dataset: datasets.Dataset | None, processor: Any | None) -> RetrofitReport:
    set_seed(args.seed)
    images = dataset is not None and any(isinstance(kind, datasets.Image) for kind in dataset.features.values())
    text = args.train_dir is None and not images
    fields = {name: getattr(args, name) for name in ("exit_layers", "exit_pooling", "exit_head")}
    model, history = load_model(args.model, text=text, **fields), history_of(args.model, has_head=True)
    model.cuda_graphs = not args.no_cuda_graphs
    path = args.train_file or args.train_dir
    if path is not None and trained_on(path, history):
        raise DataError(
            f"--train_file or --train_dir {path}: MODEL was trained on these rows and is more confident on them than "
            "on new ones, so they certify nothing: give others."
        )
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
    model.set_exit_policy(certified.policy)
    model.config.training_scheme = "retrofit"
    save_model(args, model, rows)
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
    """What the exits cost on the certifying rows, and what was measured for that."""
    inputs = rows.cost_inputs(certifying)
    if args.cost == CostUnit.OPERATIONS.value:
        return relative_costs(model, **inputs), None
    return relative_latencies(model, batch_size=args.latency_batch_size, criterion=args.exit_criterion, **inputs)
