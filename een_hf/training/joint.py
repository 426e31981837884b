"""The scheme `joint`: joint training of all exits."""

from .registry import register_scheme
from .trainer import EarlyExitTrainer


@register_scheme("joint", "base")
class JointExitTrainer(EarlyExitTrainer):
    """All exits are trained together on the weighted sum of their losses: w[i,k] = w_k (`--exit_loss_weights`).

    Example:
        >>> args = een_hf.EarlyExitTrainingArguments("out", max_steps=2, use_cpu=True, disable_tqdm=True)
        >>> trainer = een_hf.JointExitTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        >>> output = trainer.train()
        {...}
        >>> report = trainer.calibrate(rows, target_cost=0.8)
        >>> model.set_exit_policy(report.policy)

    References:
        BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks (Teerapittayanon et al., ICPR 2016),
        section III-B, the joint optimisation.
    """

    paper = "BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks (ICPR 2016)"
    citation = "https://arxiv.org/abs/1709.01686"
