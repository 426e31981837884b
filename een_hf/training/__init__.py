"""Training schemes: one trainer for each, by name in a registry, and their arguments."""

from ..extras import named_extras


with named_extras():
    from .arguments import EarlyExitTrainingArguments, ModelArguments
    from .boosted import BoostedExitTrainer
    from .joint import JointExitTrainer
    from .l2w import MetaWeightedExitTrainer
    from .registry import get_scheme, register_scheme, scheme_names
    from .trainer import EarlyExitTrainer
    from .two_stage import TwoStageExitTrainer

__all__ = [
    "BoostedExitTrainer",
    "EarlyExitTrainer",
    "EarlyExitTrainingArguments",
    "JointExitTrainer",
    "MetaWeightedExitTrainer",
    "ModelArguments",
    "TwoStageExitTrainer",
    "get_scheme",
    "register_scheme",
    "scheme_names",
]
