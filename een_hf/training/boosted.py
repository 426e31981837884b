"""Exits as an additive model."""

import logging
from dataclasses import dataclass, field

from ..models import ExitConfigurationError
from .registry import register_scheme
from .trainer import EarlyExitTrainer


logger = logging.getLogger(__name__)


@dataclass
class BoostedArguments:
    """Settings of `--method boosted`; they are saved in the model's config."""

    boost_temperature: float = field(
        default=0.5, metadata={"help": "boosted: t in F_k = f_k + t * stop_gradient(F_{k-1})."}
    )
    gradient_rescale: bool = field(
        default=True,
        metadata={
            "help": "boosted: each block receives the mean of the gradients of the exits behind it. It acts under "
            "SGD; the steps of AdamW do not depend on a constant factor of a block's gradient."
        },
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
    (1 / (K-k+1)) * (g_head + (K-k) * g_next): the sum over the exits behind it times a constant of the block. So it
    acts under SGD, as in the paper; under AdamW, whose steps do not depend on such a factor, it changes nothing but
    the norm that `--max_grad_norm` clips, and a warning says so. Regression boosts residuals by the same recursion.

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
                "--method boosted changes what the last exit predicts, which --freeze_backbone keeps: use --method "
                "joint."
            )
        model.config.exit_aggregation = "boosted"
        model.config.boost_temperature = self.scheme_args.boost_temperature
        model.config.gradient_rescale = self.scheme_args.gradient_rescale

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.scheme_args.gradient_rescale and "adam" in type(optimizer).__name__.lower():
            logger.warning(
                "--gradient_rescale does nothing under %s but to the norm that --max_grad_norm clips: its steps do "
                "not depend on the scale of a block's gradient, as those of --optim sgd do.",
                type(optimizer).__name__,
            )
        return optimizer
