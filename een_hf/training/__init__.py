"""Training schemes."""

from ..extras import named_extras


with named_extras():
    from .arguments import EarlyExitTrainingArguments, ModelArguments
    from .boosted import BoostedExitTrainer
    from .joint import JointExitTrainer
    from .l2w import MetaWeightedExitTrainer
    from .trainer import EarlyExitTrainer, get_scheme, register_scheme, scheme_names

__all__ = [
    "BoostedExitTrainer",
    "EarlyExitTrainer",
    "EarlyExitTrainingArguments",
    "JointExitTrainer",
    "MetaWeightedExitTrainer",
    "ModelArguments",
    "get_scheme",
    "register_scheme",
    "scheme_names",
]
