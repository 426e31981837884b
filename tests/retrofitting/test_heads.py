"""What the exits learn from the model's own answers."""

import numpy as np
import pytest
import torch
from factory import NUM_LABELS
from operations import Operations
from retrofitting.running import EXIT_CLASSES, words_of

from een_hf.commands import main
from een_hf.evaluation import load_exit_logits
from een_hf.training.frozen_heads import train_heads


@pytest.mark.parametrize("stack", [False, True], ids=["one by one", "stacked"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_step_of_the_exits_by_hand(sources, kind, stack):
    """Fails if an exit learns anything but cross-entropy with the model's probabilities, or reads other features."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0} if kind == "bert" else {}
    model = EXIT_CLASSES[kind].from_pretrained(sources[kind][0], **dropout).eval()
    generator = np.random.default_rng(0)
    width = {"bert": 16, "vit": 32}[kind]  # mean of the tokens; class token and mean of the patches
    features = generator.normal(size=(8, 2, width)).astype(np.float32)
    teacher = generator.normal(size=(8, NUM_LABELS)).astype(np.float32)
    before = {name: tensor.clone() for name, tensor in model.exit_heads.state_dict().items()}

    losses = []
    for index, head in enumerate(model.exit_heads.values()):
        for row in range(8):
            log_probabilities = head.classify(torch.from_numpy(features[row : row + 1, index])).log_softmax(-1)[0]
            probabilities = np.exp(teacher[row].astype(np.float64)) / np.exp(teacher[row].astype(np.float64)).sum()
            losses.append(
                -sum(float(p) * value for p, value in zip(probabilities, log_probabilities, strict=True)) / 8
            )
    gradients = torch.autograd.grad(sum(losses), list(model.exit_heads.parameters()))
    wanted = {
        name: before[name] * (1 - 0.01 * 0.1) - 0.1 * gradient / (gradient.abs() + 1e-8)
        for (name, _), gradient in zip(model.exit_heads.named_parameters(), gradients, strict=True)
    }
    model.stack_heads = stack
    settings = {"seed": 0, "head_learning_rate": 0.1, "train_batch_size": 8, "num_train_epochs": 1}
    with Operations() as operations:
        train_heads(model, features, teacher, **settings)
    assert (torch.ops.aten.baddbmm.default in operations.ran) == stack
    for name, tensor in model.exit_heads.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4, msg=name)
    assert not any(module.training for module in model.modules())


def test_exits_learn_what_the_model_answers(sources, tmp_path):
    """Fails if training leaves the exits no better on unseen rows than the model's most frequent answer."""
    main(words_of(sources["vit"], tmp_path, num_train_epochs=40, head_learning_rate=0.01))
    answers = load_exit_logits(tmp_path)["logits"].argmax(-1)
    agreement = (answers[:, :-1] == answers[:, -1:]).mean(0)
    assert agreement.min() > np.bincount(answers[:, -1]).max() / len(answers) + 0.05
