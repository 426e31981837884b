"""The scheme `boosted`: exits as an additive model."""

import logging
from dataclasses import dataclass, field

from ..models import ExitConfigurationError
from .registry import register_scheme
from .trainer import EarlyExitTrainer


logger = logging.getLogger(__name__)


@dataclass
class BoostedArguments:
    """Settings of `--method boosted`; they are saved in the model's config."""

    boost_temperature: float = field(default=0.5, metadata={"help": "t in F_k = f_k + t * stop_gradient(F_{k-1})."})
    gradient_rescale: bool = field(
        default=True,
        metadata={
            "help": "Each block receives the mean of the gradients of the exits after it. It has an effect "
            "with SGD; the steps of AdamW do not depend on a constant factor of a block's gradient."
        },
    )

    def __post_init__(self):
        if not 0 <= self.boost_temperature < float("inf"):
            raise ExitConfigurationError(f"--boost_temperature must not be negative, not {self.boost_temperature}.")


@register_scheme("boosted")
class BoostedExitTrainer(EarlyExitTrainer):
    """Exits are weak learners of an additive model: F_k = f_k + t * stop_gradient(F_{k-1}), F_0 = 0.

    The loss is applied to every F_k, and F_k is the prediction of exit k: in training, in evaluation and after
    loading, because the model computes the sum (config `exit_aggregation`, `boost_temperature`).

    With `gradient_rescale` gradients of hidden states are scaled so that block k receives
    (1 / (K-k+1)) * (g_head + (K-k) * g_next): the sum over the exits after it, times a constant of the block. This has
    an effect with SGD, as in the paper. The steps of AdamW do not depend on such a factor: only the norm that
    `--max_grad_norm` clips changes, and a warning says so. For regression the same recursion boosts residuals.

    References:
        Boosted Dynamic Neural Networks (Yu et al., AAAI 2023): equations 5 and 6 for the additive model, section
        "Gradient rescaling" for the backward pass.
    """

    arguments_class = BoostedArguments
    paper = "Boosted Dynamic Neural Networks (AAAI 2023)"
    citation = "https://arxiv.org/abs/2211.16726"

    def check_model(self, model) -> None:
        if model.backbone_frozen:
            raise ExitConfigurationError(
                "--method boosted changes the predictions of the last exit, but --freeze_backbone keeps them: use "
                "--method joint."
            )
        model.config.exit_aggregation = "boosted"
        model.config.boost_temperature = self.scheme_args.boost_temperature
        model.config.gradient_rescale = self.scheme_args.gradient_rescale

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.scheme_args.gradient_rescale and "adam" in type(optimizer).__name__.lower():
            logger.warning(
                "--gradient_rescale has hardly any effect with %s: its steps do not depend on the scale of a block's "
                "gradient, so that only the norm which --max_grad_norm clips changes. It has an effect with --optim "
                "sgd.",
                type(optimizer).__name__,
            )
        return optimizer
