"""Joint training of all exits."""

from .registry import register_scheme
from .trainer import EarlyExitTrainer


@register_scheme("joint", "base")
class JointExitTrainer(EarlyExitTrainer):
    """All exits are trained at once on the weighted sum of their losses: w[i,k] = w_k (`--exit_loss_weights`).

    References:
        BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks (Teerapittayanon et al., ICPR 2016),
        section III-B, the joint optimisation.
    """

    paper = "BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks (ICPR 2016)"
    citation = "https://arxiv.org/abs/1709.01686"
