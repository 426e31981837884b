"""`ExitBatchPredictor`: from columns to columns, for engines that distribute batches to many processes."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..extras import named_extras
from ..models import ExitConfigurationError, ExitPolicy
from .loading import load_early_exit_model, load_processor
from .predict import predict


class ExitBatchPredictor:
    """Answers batches of columns with early exits, for Ray Data's `map_batches` and Spark's `predict_batch_udf`.

    It is sent to other processes as a path and settings; each process loads the model at its first batch. The columns
    are returned unchanged, with three more: `label`, `score` (the confidence of the answer, as
    `ExitPredictions.confidence`; NaN in regression, where `label` contains the predicted numbers) and `exit_layer`.

    Args:
        path: folder or Hub name of an early-exit model with its processor.
        column: name of the column of texts or images (PIL, bytes of a file, or arrays of height, width and channels).
        pair_column: name of the column of second texts, if the model takes pairs.
        batch_size: examples per step.
        policy: the exit policy; `None`: the model's own; `False`: no early exit.
        device: for example `cuda:1`; default: cuda if there is one.
        max_length: tokens to which longer texts are truncated, at most what the model takes.

    Raises:
        ExitConfigurationError: at the first batch: no early-exit model, a policy or column that does not fit, or a
            column that has the name of an answer.

    Example:
        >>> classify = een_hf.inference.ExitBatchPredictor("runs/mine")
        >>> columns = classify({"id": np.array([7]), "text": np.array(["A fine film."])})
        >>> sorted(columns)
        ['exit_layer', 'id', 'label', 'score', 'text']
    """

    def __init__(
        self,
        path: str,
        column: str = "text",
        *,
        pair_column: str | None = None,
        batch_size: int = 32,
        policy: ExitPolicy | dict | bool | None = None,
        device: str | None = None,
        max_length: int | None = None,
    ):
        self.path, self.column, self.pair_column = path, column, pair_column
        self.batch_size, self.device, self.max_length = batch_size, device, max_length
        self.policy = policy.to_dict() if isinstance(policy, ExitPolicy) else policy
        self._model = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_processor": None}

    def __call__(self, batch: Mapping[str, Any] | Any) -> dict[str, np.ndarray]:
        """Answer one batch.

        Args:
            batch: columns of equal length by name; or a single column, as Spark passes it.

        Returns:
            the columns and the answers; for a single column only the answers.
        """
        if not isinstance(batch, Mapping):
            batch, kept = {self.column: batch}, {}
        else:
            kept = {name: np.asarray(values) for name, values in batch.items()}
        self._load()
        for name in filter(None, (self.column, self.pair_column)):
            if name not in batch:
                raise ExitConfigurationError(f"The batch has no column {name!r}; it has: {', '.join(batch)}.")
        if taken := [name for name in ("label", "score", "exit_layer") if name in kept]:
            raise ExitConfigurationError(
                f"The batch has a column {taken[0]!r}, where the answers go: give that column another name."
            )
        return {**kept, **self._answers(batch)}

    def _load(self) -> None:
        if self._model is not None:
            return
        model = load_early_exit_model(self.path, device=self.device, what="path")
        if self.policy is not None:
            model.set_exit_policy(self.policy or None)
        self._text = model.main_input_name == "input_ids"
        self._processor = load_processor(self.path, model, what="path")
        if not self._text:
            with named_extras():
                from ..data.transforms import EvaluationTransform

            self._processor = EvaluationTransform(self._processor, model.config.num_channels)
        self._longest = model.config.input_limit(self.max_length)
        self._model = model

    def _answers(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        config = self._model.config
        if self._text:
            columns = [_texts(name, batch[name]) for name in filter(None, (self.column, self.pair_column))]
            rows, settings = list(zip(*columns, strict=True)), {"tokenizer": self._tokenize}
        else:
            rows, settings = [self._image(image) for image in batch[self.column]], {}
        found = predict(self._model, rows, self.batch_size, progress=False, **settings)
        scores = np.full(len(rows), np.nan, np.float32) if found.confidence is None else found.confidence.numpy()
        if found.confidence is None:
            labels = found.logits[:, 0].numpy()
        elif config.problem_type == "multi_label_classification":
            chosen = [[config.id2label[place] for place in row.nonzero()[:, 0].tolist()] for row in found.logits > 0]
            labels = np.fromiter(chosen, dtype=object, count=len(chosen))
        else:
            labels = np.array([config.id2label[place] for place in found.logits.argmax(-1).tolist()], dtype=str)
        layers = np.array(config.exit_layers)[found.exit_index.numpy()]
        return {"label": labels, "score": scores, "exit_layer": layers}

    def _tokenize(self, *columns: list[str]) -> Mapping[str, list]:
        return self._processor(*columns, truncation=self._longest is not None, max_length=self._longest)

    def _image(self, given) -> dict[str, torch.Tensor]:
        from PIL import Image

        if isinstance(given, bytes):
            given = Image.open(io.BytesIO(given))
        elif not isinstance(given, Image.Image):
            given = Image.fromarray(np.asarray(given))
        return {"pixel_values": self._processor(given)}


def _texts(column: str, values) -> list[str]:
    """The texts of a column. Anything else, such as `None`, would be classified by its name."""
    for row, text in enumerate(values):
        if not isinstance(text, str):
            raise ExitConfigurationError(
                f"Row {row} (counted from 0) of column {column!r} is no text but {type(text).__name__}."
            )
    return list(map(str, values))
