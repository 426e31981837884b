"""Exits as an additive model."""

from dataclasses import dataclass, field

from ..models import ExitConfigurationError
from .trainer import EarlyExitTrainer, register_scheme


@dataclass
class BoostedArguments:
    """Settings of `--method boosted`; they are saved in the model's config."""

    boost_temperature: float = field(
        default=0.5, metadata={"help": "boosted: t in F_k = f_k + t * stop_gradient(F_{k-1})."}
    )
    gradient_rescale: bool = field(
        default=True,
        metadata={"help": "boosted: each block receives the mean of the gradients of the exits behind it."},
    )

    def __post_init__(self):
        if not 0 <= self.boost_temperature < float("inf"):
            raise ExitConfigurationError(f"--boost_temperature must not be negative, not {self.boost_temperature}.")


@register_scheme("boosted")
class BoostedExitTrainer(EarlyExitTrainer):
    """Exits are weak learners of an additive model: F_k = f_k + t * stop_gradient(F_{k-1}), F_0 = 0.

    Every F_k gets the loss, and F_k is what exit k predicts: in training, in evaluation and after reload, because the
    model does the aggregation (config `exit_aggregation`, `boost_temperature`). With `gradient_rescale` the hidden
    state after block k is scaled in the backward pass so that block k receives
    (1 / (K-k+1)) * (g_head + (K-k) * g_next). Regression boosts residuals by the same recursion.

    References:
        Boosted Dynamic Neural Networks (Yu et al., AAAI 2023): equations 5 and 6 for the additive model, section
        "Gradient rescaling" for the backward pass.
    """

    arguments_class = BoostedArguments
    citation = "https://arxiv.org/abs/2211.16726"

    def check_model(self, model) -> None:
        if model.backbone_frozen:
            raise ExitConfigurationError(
                "--method boosted changes what the last exit predicts, which --freeze_backbone keeps: use --method "
                "joint."
            )
        model.config.exit_aggregation = "boosted"
        model.config.boost_temperature = self.scheme_args.boost_temperature
        model.config.gradient_rescale = self.scheme_args.gradient_rescale
