"""The settings of a retrofit: the flags of `een-hf retrofit` and keywords of `een_hf.retrofit`."""

import math
import numbers
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from ..data.label_values import SINGLE_LABEL
from ..data.task import DataError
from ..errors import check_seed, refuse_nan, refused
from ..models import ExitConfigurationError
from ..models.criteria import find_criterion, get_criterion
from ..models.exits import find_exit_head, find_pooling
from ..training.arguments import CalibrationArguments, CostUnit


RECORD_FILE, FEATURES_FOLDER = "retrofit.json", "features"


@dataclass
class RowArguments:
    """Which unlabelled rows a model reads.

    Args:
        model: folder or Hub name of a classifier.
        train_file: texts, as csv, json, jsonl or parquet.
        train_dir: folder of image files, including sub-folders.
        skip_corrupt: whether to skip images that cannot be decoded.
        text_column_names: one text column, or two for pairs; default: the only one.
        skip_empty: whether to skip rows without text.
        tokenizer_name: folder or Hub name; default: the model's own.
        max_seq_length: number of tokens to which texts are truncated.
        max_train_samples: use only the first N rows.

    Raises:
        ExitConfigurationError: a value out of range.
    """

    model: str
    train_file: str | None = None
    train_dir: str | None = None
    skip_corrupt: bool = False
    text_column_names: list[str] | None = None
    skip_empty: bool = False
    tokenizer_name: str | None = None
    max_seq_length: int = 128
    max_train_samples: int | None = None

    # The flags that name the rows, for messages.
    file_flag: ClassVar[str] = "--train_file"
    dir_flag: ClassVar[str] = "--train_dir"

    def __post_init__(self):
        refuse_nan(asdict(self))
        self.model = os.fspath(self.model)
        if self.skip_corrupt and self.train_file is not None:
            raise DataError(f"--skip_corrupt skips images: it belongs to {self.dir_flag}.")
        if self.skip_empty and self.train_dir is not None:
            raise DataError(f"--skip_empty skips texts: it belongs to {self.file_flag}.")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ExitConfigurationError(f"--max_train_samples must be at least 1, not {self.max_train_samples}.")


@dataclass
class RetrofitArguments(RowArguments):
    """The settings of a retrofit; every field has the flag of the same name.

    Args:
        model: folder or Hub name of a fine-tuned classifier.
        train_file: as in `RowArguments`.
        train_dir: as in `RowArguments`.
        skip_corrupt: as in `RowArguments`.
        text_column_names: as in `RowArguments`.
        skip_empty: as in `RowArguments`.
        tokenizer_name: as in `RowArguments`.
        max_seq_length: as in `RowArguments`.
        max_train_samples: as in `RowArguments`.
        max_risk: largest share of answers that may differ from the model's.
        risk: `consistency`, which needs no labels.
        risk_confidence: confidence of the certificate.
        exit_criterion: name of a criterion, or `package.module:Class`.
        calibration_share: share of the rows that certify the policy instead of training exits; default: a third, or
            as many as the risk needs.
        cost: unit of the costs: `operations`, or `latency`, measured on this machine.
        latency_batch_size: rows that run together when latency is measured.
        exit_layers: 1-based layers with an exit; default: every layer.
        exit_pooling: pooling of the exits; default: `mean` (texts) or `cls_mean` (images).
        exit_head: head of the exits; default: the architecture's.
        num_train_epochs: number of epochs in which exits are trained.
        head_learning_rate: learning rate of AdamW, which decreases to zero as a cosine.
        train_batch_size: rows per training step of the exits.
        output_dir: folder of the cheaper model.
        batch_size: rows per pass of the model.
        no_cuda_graphs: on CUDA, measure without captured programs.
        chunk_size: rows per file of features.
        feature_dtype: precision of the features on disk, `float32` or `float16`.
        speed_samples: number of rows for the measurement of time; 0: no measurement.
        seed: seed of the training of exits, and of the choice of the rows that certify.

    Raises:
        ExitConfigurationError: a value out of range, or a folder with another content.
    """

    max_risk: float = 0.02
    risk: str = "consistency"
    risk_confidence: float = 0.9
    exit_criterion: str = "confidence"
    calibration_share: float | None = None
    cost: str = CostUnit.OPERATIONS.value
    latency_batch_size: int = 1
    exit_layers: list[int] | None = None
    exit_pooling: str | None = None
    exit_head: str | None = None
    num_train_epochs: int = 20
    head_learning_rate: float = 1e-3
    train_batch_size: int = 32
    output_dir: str | None = None
    batch_size: int = 32
    no_cuda_graphs: bool = False
    chunk_size: int = 512
    feature_dtype: str = "float32"
    speed_samples: int = 256
    seed: int = 42

    def __post_init__(self):
        super().__post_init__()
        if not self.output_dir:
            raise ExitConfigurationError("Give the folder of the cheaper model: --output_dir.")
        self.output_dir = os.fspath(self.output_dir)
        CalibrationArguments(
            max_risk=self.max_risk,
            risk=self.risk,
            risk_confidence=self.risk_confidence,
            cost=self.cost,
            latency_batch_size=self.latency_batch_size,
        )
        self.exit_criterion = find_criterion(self.exit_criterion)
        get_criterion(self.exit_criterion).check(SINGLE_LABEL)
        self.exit_pooling = self.exit_pooling and find_pooling(self.exit_pooling)
        self.exit_head = self.exit_head and find_exit_head(self.exit_head)
        for name in ("batch_size", "chunk_size", "num_train_epochs", "train_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ExitConfigurationError(f"--{name} must be a whole number, at least 1, not {value!r}.")
        check_seed(self.seed)
        if self.speed_samples < 0:
            raise ExitConfigurationError(f"--speed_samples must be 0 or more, not {self.speed_samples}.")
        if not 0 < self.head_learning_rate < math.inf:
            raise ExitConfigurationError(f"--head_learning_rate must be above 0, not {self.head_learning_rate}.")
        if self.calibration_share is not None and not 0 < self.calibration_share < 1:
            raise ExitConfigurationError(f"--calibration_share must be between 0 and 1, not {self.calibration_share}.")
        if self.feature_dtype not in ("float32", "float16"):
            raise ExitConfigurationError(f"--feature_dtype must be float32 or float16, not {self.feature_dtype!r}.")
        with refused(f"--output_dir {self.output_dir}"):
            self._check_folder()

    def _check_folder(self) -> None:
        """Raise an error for an output folder that is the model's own, or that has another content."""
        folder = self.folder
        if folder.exists() and os.path.isdir(self.model) and folder.samefile(self.model):
            raise ExitConfigurationError(f"--output_dir {folder} is the model's own folder: give another.")
        ours = (folder / RECORD_FILE).exists() or (folder / FEATURES_FOLDER).is_dir()
        if (folder / "config.json").exists() and not ours:
            raise ExitConfigurationError(f"--output_dir {folder} contains a model of another origin: give another.")

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output_dir)
