"""Command-line arguments that every scheme and both scripts share."""

import re
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.training_args import trainer_log_levels
from transformers.utils import ExplicitEnum, is_torch_bf16_gpu_available, is_torch_xla_available

from .._deprecated import moved_names
from ..errors import check_seed, refuse_nan
from ..hub.settings import public_settings
from ..inference.loading import DTYPES
from ..models import MODEL_CLASSES, ExitConfigurationError
from ..models.auto import find_architecture
from ..models.criteria import CRITERIA
from ..models.exits import find_exit_head, find_pooling
from .publishing import is_publishing


# The smallest values of numbers that transformers does not check, or checks only after a run has begun.
_AT_LEAST = {
    -1: "max_steps",  # none given
    0: "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs warmup_steps "
    "label_smoothing_factor logging_steps eval_steps save_steps eval_delay dataloader_num_workers "
    "neftune_noise_alpha",
    1: "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps "
    "save_total_limit dataloader_prefetch_factor torch_empty_cache_steps",
}
_BELOW_ONE = ("adam_beta1", "adam_beta2", "label_smoothing_factor")

__getattr__ = moved_names(__name__)


@dataclass
class ModelArguments:
    """The flags of the model and its exits."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or folder of a stock or early-exit checkpoint, or `minilm`, the installed sample."
        },
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": f"Start from scratch with this architecture: {', '.join(MODEL_CLASSES)}, or package.module:Class."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Config fields of a model from scratch: `hidden_size=128,num_hidden_layers=4`."},
    )
    exit_layers: list[int] | None = field(
        default=None, metadata={"help": "1-based layers that have an exit, in increasing order. Default: every layer."}
    )
    exit_pooling: str | None = field(
        default=None,
        metadata={
            "help": "Pooling of the exits before the last: `cls`, the first token; `mean`, over the tokens or over an "
            "image's patches; `cls_mean`, both; or package.module:function. Default: `mean` for texts, `cls_mean` for "
            "images."
        },
    )
    exit_head: str | None = field(
        default=None,
        metadata={
            "help": "Head of the exits before the last: `pooler`, `norm`, `norm_pooler`, for images also `attention`, "
            "which reads all patches; or package.module:Class. Default: that of the architecture."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Token for private Hub repositories."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Create a new head if that of the checkpoint has another number of labels."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel as transformers names it: `sdpa`, `eager`, ..."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": f"Precision of the weights: {', '.join(DTYPES)}. Default: float32 if the run trains, else that of "
            "the checkpoint. --bf16 and --fp16 do not change the weights."
        },
    )

    def __post_init__(self):
        if self.dtype not in (None, *DTYPES):
            raise ExitConfigurationError(f"--dtype {self.dtype!r} is not one of: {', '.join(DTYPES)}.")
        if (self.model_name_or_path is None) == (self.model_type is None):
            raise ExitConfigurationError(
                "Give either --model_name_or_path, a checkpoint to start from, or --model_type, to start from scratch."
            )
        for name, find in (
            ("model_type", find_architecture),
            ("exit_pooling", find_pooling),
            ("exit_head", find_exit_head),
        ):
            if getattr(self, name) is not None:
                setattr(self, name, find(getattr(self, name)))
        if self.config_overrides is not None and self.model_type is None:
            raise ExitConfigurationError("--config_overrides needs --model_type: a checkpoint has its own config.")
        if self.config_overrides is not None and not re.fullmatch(r"\w+=[^,=]+(,\w+=[^,=]+)*", self.config_overrides):
            raise ExitConfigurationError(
                f"--config_overrides {self.config_overrides!r} is not of the form name=value,name=value."
            )


@dataclass
class EarlyExitTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the flags that all schemes share."""

    method: str = field(
        default="joint",
        metadata={"help": "Scheme: a registered name, or package.module:TrainerClass."},
    )
    exit_loss_weights: list[str] = field(
        default_factory=lambda: ["uniform"],
        metadata={"help": "Weight of each exit's loss: `uniform` (1), `linear` (k/K) or one number per exit."},
    )
    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weight of each class in the training loss: one number per label, or `balanced`, which gives all "
            "classes the same influence (single-label classification)."
        },
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of heads with a new classifier, including their pooler or norm. Default: "
            "20 x --learning_rate with AdamW on a pretrained backbone; equal to it with SGD or from scratch."
        },
    )
    standardize_heads: bool = field(
        default=True,
        metadata={
            "help": "Before the first step, scale and shift the first layer of new heads on a pretrained backbone, so "
            "that its outputs have mean 0 and variance 1 on the examples of this step: heads learn in fewer steps."
        },
    )
    freeze_backbone: bool = field(
        default=False,
        metadata={"help": "Train only exits 1..K-1 of a fine-tuned model; backbone and last head do not change."},
    )

    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the steps after which the learning rate drops to a tenth, as `0.5 0.75`, instead "
            "of --lr_scheduler_type."
        },
    )
    no_cuda_graphs: bool = field(
        default=False, metadata={"help": "On CUDA, predict without captured programs (`ExitRunner`)."}
    )
    warm_start_epochs: float = field(
        default=0.0,
        metadata={"help": "Epochs at the start in which only the last exit is trained, as in plain fine-tuning."},
    )
    card_examples: bool = field(
        default=False,
        metadata={
            "help": "Show example inputs of the evaluation split in the model card; a push then publishes them."
        },
    )
    push_handler: bool = field(
        default=False,
        metadata={"help": "Save handler.py with the model, for Inference Endpoints; a push includes it."},
    )

    log_level_replica: str = field(
        default="error",
        metadata={
            "help": "Log level of all processes but the first, whose messages would appear again.",
            "choices": trainer_log_levels.keys(),
        },
    )

    def to_dict(self):
        """As in `TrainingArguments`, for trackers: without tokens, and with only the last part of local paths."""
        return public_settings(super().to_dict())

    def __getstate__(self):
        return public_settings(self.__dict__) if is_publishing() else self.__dict__

    def __post_init__(self):
        self._check_numbers()
        if self.bf16 and not (self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
            raise ExitConfigurationError(
                "--bf16 needs an accelerator with bfloat16, and none was found. Give --bf16 false, or --use_cpu to "
                "compute in bfloat16 on the CPU."
            )
        super().__post_init__()
        if isinstance(self.exit_loss_weights, str):
            self.exit_loss_weights = self.exit_loss_weights.split(",")
        self.exit_loss_weights = [str(weight) for weight in self.exit_loss_weights]
        if self.class_weights is not None:
            given = self.class_weights.split(",") if isinstance(self.class_weights, str) else self.class_weights
            self.class_weights = [str(weight) for weight in given]
        self.check()

    def check(self) -> None:
        """Check the values.

        Raises:
            ExitConfigurationError: a value out of range; the message names the flag.
        """
        self._check_numbers()
        if self.lr_milestones is not None and not all(0 < share < 1 for share in self.lr_milestones):
            raise ExitConfigurationError(
                f"--lr_milestones are shares of the steps, between 0 and 1, not {self.lr_milestones}."
            )
        if self.lr_milestones is not None and self.warmup_steps:
            raise ExitConfigurationError("--lr_milestones cannot be combined with --warmup_steps: give one of them.")
        if not 0 <= self.warm_start_epochs < float("inf"):
            raise ExitConfigurationError(f"--warm_start_epochs must not be negative, not {self.warm_start_epochs}.")
        if self.warm_start_epochs and self.freeze_backbone:
            raise ExitConfigurationError("--warm_start_epochs trains the backbone, but --freeze_backbone keeps it.")
        if self.head_learning_rate is not None and self.head_learning_rate <= 0:
            raise ExitConfigurationError(f"--head_learning_rate must be above 0, not {self.head_learning_rate}.")

    def _check_numbers(self) -> None:
        refuse_nan(vars(self))
        for least, names in _AT_LEAST.items():
            for name in names.split():
                value = getattr(self, name, None)
                if value is not None and not least <= value < float("inf"):
                    raise ExitConfigurationError(f"--{name} must be at least {least}, not {value}.")
        check_seed(self.seed)
        check_seed(self.data_seed, "data_seed", bits=64)
        for name in _BELOW_ONE:
            if getattr(self, name) >= 1:
                raise ExitConfigurationError(f"--{name} must be below 1, not {getattr(self, name)}.")


class Risk(ExplicitEnum):
    """The risk that `--max_risk` limits."""

    ACCURACY_GAP = "accuracy_gap"
    CONSISTENCY = "consistency"
    HAMMING = "hamming"


class CostUnit(ExplicitEnum):
    """The unit of costs and budgets."""

    OPERATIONS = "operations"
    LATENCY = "latency"


@dataclass
class CalibrationArguments:
    """How the exit policy is chosen after training."""

    exit_criterion: str = field(
        default="confidence",
        metadata={
            "help": f"Score that decides whether an example exits: {', '.join(sorted(CRITERIA))} or "
            "package.module:Class. The problem determines which of them can be used: `label_confidence` is for "
            "multi-label problems."
        },
    )
    target_cost: float | None = field(
        default=None, metadata={"help": "Set the best policy whose average relative cost is at most this."}
    )
    max_risk: float | None = field(
        default=None, metadata={"help": "Set the cheapest policy whose risk is certified to be at most this."}
    )
    risk: Risk | None = field(
        default=None,
        metadata={
            "help": "`accuracy_gap`: last exit right and policy wrong (default with labels); `consistency`: policy "
            "differs from the last exit, in any label (needs no labels); `hamming`, multi-label: share of labels in "
            "which it differs (needs no labels)."
        },
    )
    risk_confidence: float = field(default=0.9, metadata={"help": "Confidence that the risk is at most --max_risk."})
    calibration_file: str | None = field(
        default=None, metadata={"help": "File (texts) or folder (images) of calibration rows."}
    )
    calibration_samples: int | None = field(
        default=None,
        metadata={
            "help": "Number of training rows that are held out for calibration. Default: half of the evaluation split "
            "is used."
        },
    )
    cost: CostUnit = field(
        default=CostUnit.OPERATIONS,
        metadata={
            "help": "Unit of costs: `operations` (multiply-accumulates) or `latency`, measured on this machine."
        },
    )
    latency_batch_size: int = field(default=1, metadata={"help": "Batch size of the measurements of --cost latency."})

    measure_speed: bool = field(
        default=False,
        metadata={
            "help": "Measure the time of the evaluation split (texts) with exits off, with exits on, and in the stock "
            "pipeline."
        },
    )

    def __post_init__(self):
        refuse_nan(vars(self))
        self.cost = CostUnit(self.cost)
        self.risk = None if self.risk is None else Risk(self.risk)
        if self.latency_batch_size < 1:
            raise ExitConfigurationError(f"--latency_batch_size must be at least 1, not {self.latency_batch_size}.")
        if self.target_cost is not None and self.max_risk is not None:
            raise ExitConfigurationError("--target_cost and --max_risk both choose the policy: give one of them.")
        if self.target_cost is not None and not 0 < self.target_cost < float("inf"):
            raise ExitConfigurationError(
                f"--target_cost is a share of the full cost, above 0, not {self.target_cost}."
            )
        for name in ("max_risk", "risk_confidence"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ExitConfigurationError(f"--{name} must be between 0 and 1, not {value}.")
        if self.risk is not None and self.max_risk is None:
            raise ExitConfigurationError("--risk names what --max_risk limits: give --max_risk too.")
        if self.calibration_file is not None and self.calibration_samples is not None:
            raise ExitConfigurationError("--calibration_file and --calibration_samples both name rows: give one.")
        if self.calibration_samples is not None and self.calibration_samples < 1:
            raise ExitConfigurationError(f"--calibration_samples must be at least 1, not {self.calibration_samples}.")

    def of_policy(self) -> dict:
        """The flags that choose the policy, as keywords of `een_hf.calibrate`."""
        return {
            "criterion": self.exit_criterion,
            "target_cost": self.target_cost,
            "max_risk": self.max_risk,
            "risk": self.risk and self.risk.value,
            "risk_confidence": self.risk_confidence,
        }
