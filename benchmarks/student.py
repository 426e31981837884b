"""A scheme for the baseline `student-K` of quality.py: `--method student:StudentTrainer`."""

from dataclasses import dataclass, field

import torch

from een_hf import AutoEarlyExitModel, EarlyExitTrainer, ExitConfigurationError
from een_hf.models.criteria import resolve_problem_type


@dataclass
class StudentArguments:
    """The flags of `StudentTrainer`."""

    teacher: str | None = field(default=None, metadata={"help": "Folder of the run that the exits learn from."})


class StudentTrainer(EarlyExitTrainer):
    """Exits learn the probabilities of a finished run instead of labels (Hinton et al., 2015, temperature 1).

    Raises:
        ExitConfigurationError: the problem is not single-label classification.
    """

    arguments_class = StudentArguments

    def check_model(self, model):
        super().check_model(model)
        problem_type = resolve_problem_type(model.config.problem_type, model.config.num_labels)
        if problem_type != "single_label_classification":
            raise ExitConfigurationError(f"A student learns the probabilities of classes: not for {problem_type}.")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = AutoEarlyExitModel.from_pretrained(self.scheme_args.teacher).to(self.args.device).eval()

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            with torch.no_grad():
                answers = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"})
            self.probabilities = answers.logits.softmax(-1)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def losses_of(self, exit_logits, labels):
        if not self.network.training:
            return super().losses_of(exit_logits, labels)
        return -(self.probabilities.unsqueeze(1) * exit_logits.log_softmax(-1)).sum(-1)
