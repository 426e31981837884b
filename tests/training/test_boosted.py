"""The boosted scheme against its formulas, written out in double precision."""

import factory
import pytest
import torch
import torch.nn.functional as F
from factory import NO_DROPOUT, tiny_model
from transformers import AutoModelForSequenceClassification

from een_hf.models import ExitConfigurationError
from een_hf.training.boosted import BoostedArguments


NUM_LAYERS, NUM_ROWS = 6, 5
EXIT_LAYERS = {2: [3, 6], 3: [1, 3, 6], 4: [1, 2, 5, 6], 5: [1, 2, 3, 5, 6], 6: [1, 2, 3, 4, 5, 6]}


def make_model(model_type="bert", num_labels=3, exit_layers=None):
    changes = {"num_labels": num_labels, "exit_layers": exit_layers, "exit_pooling": "cls"}  # as `head_by_hand` reads
    changes |= {"initializer_range": 0.3}  # far from the symmetric start, where many gradients vanish
    return tiny_model(model_type, seed=1, num_hidden_layers=NUM_LAYERS, **NO_DROPOUT, **changes).double()


def make_inputs(model_type, num_labels):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (NUM_ROWS,), generator=generator)
    if num_labels == 1:
        labels = torch.randn(NUM_ROWS, generator=generator, dtype=torch.float64)
    if model_type == "bert":
        return {"input_ids": torch.randint(1, 40, (NUM_ROWS, 7), generator=generator), "labels": labels}
    pixels = torch.randn(NUM_ROWS, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": labels}


def make_trainer(model, folder, **settings):
    return factory.make_trainer(folder, model, "boosted", scheme_args=BoostedArguments(**settings))


def head_by_hand(model, k, hidden):
    """f_k on the class token, from the parameters alone."""
    named = dict(model.named_parameters())
    last = k == len(model.config.exit_layers)
    own = "" if last else f"exit_heads.{model.config.exit_layers[k - 1]}."
    token = hidden[:, 0]
    if model.config.model_type == "een_bert":
        dense = "bert.pooler.dense" if last else own + "dense"
        features = torch.tanh(token @ named[dense + ".weight"].T + named[dense + ".bias"])
    else:
        norm = "vit.layernorm" if last else own + "layernorm"
        scale = (token.var(-1, unbiased=False, keepdim=True) + model.config.layer_norm_eps).sqrt()
        features = (token - token.mean(-1, keepdim=True)) / scale * named[norm + ".weight"] + named[norm + ".bias"]
    return features @ named[own + "classifier.weight"].T + named[own + "classifier.bias"]


def boosting_by_hand(model, inputs, temperature):
    """F_k and the mean loss of every exit: F_k = f_k + t * F_{k-1}, with F_{k-1} a number to the gradient."""
    features = {name: value for name, value in inputs.items() if name != "labels"}
    backbone = model.bert if "input_ids" in inputs else model.vit
    hidden_states = backbone(**features, output_hidden_states=True).hidden_states
    answers, losses = [], []
    for k, layer in enumerate(model.config.exit_layers, 1):
        answer = head_by_hand(model, k, hidden_states[layer])
        if answers:
            answer = answer + temperature * answers[-1].detach()
        answers.append(answer)
        loss = F.cross_entropy if answer.size(1) > 1 else lambda a, b: ((a.squeeze(1) - b) ** 2).mean()
        losses.append(loss(answer, inputs["labels"]))
    return answers, losses


def block_of(name, exit_layers):
    """The exit (from 1) up to which a parameter lies in the backbone, or None for those of the heads."""
    if "embeddings" in name:
        return 1
    place = name.split("layer.")[1] if "encoder.layer." in name else name.split("layers.")[-1]
    if name.startswith(("exit_heads", "classifier", "bert.pooler", "vit.layernorm")):
        return None
    layer = int(place.split(".")[0]) + 1
    return next(k for k, end in enumerate(exit_layers, 1) if layer <= end)


@pytest.mark.parametrize("num_labels", [3, 1], ids=["classes", "regression"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("num_exits", EXIT_LAYERS)
@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_answers_losses_and_gradients(model_type, num_exits, rescale, temperature, num_labels, tmp_path):
    """Every F_k, every loss and every parameter's gradient.

    Rescaled, block k receives the running average (g_head + (K-k) g_next) / (K-k+1): unrolled, the plain mean of the
    gradients of the exits k to K; without it, their sum. A head receives its own exit's gradient, in both cases.
    """
    exit_layers = EXIT_LAYERS[num_exits]
    model, inputs = make_model(model_type, num_labels, exit_layers), make_inputs(model_type, num_labels)
    answers, losses = boosting_by_hand(model, inputs, temperature)
    parameters = dict(model.named_parameters())
    per_exit = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True) for loss in losses
    ]
    trainer = make_trainer(model, tmp_path, boost_temperature=temperature, gradient_rescale=rescale)
    model.train()
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
    loss.backward()

    torch.testing.assert_close(outputs.exit_logits, torch.stack(answers, 1), rtol=0, atol=1e-12)
    found = trainer.losses_of(outputs.exit_logits, inputs["labels"]).mean(0)
    torch.testing.assert_close(found, torch.stack(losses), rtol=0, atol=1e-12)
    for place, (name, parameter) in enumerate(parameters.items()):
        received = [gradients[place] for gradients in per_exit if gradients[place] is not None]
        wanted, block = sum(received), block_of(name, exit_layers)
        if block is None:
            assert len(received) == 1, f"{name} learns from other exits than its own"
        elif rescale:
            wanted = wanted / (num_exits - block + 1)
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_settings_are_saved_with_the_model(tmp_path):
    """A reloaded model that forgot to add up would answer with f_k, which nothing trained to be right."""
    trainer = make_trainer(make_model(), tmp_path, boost_temperature=0.7, gradient_rescale=False)
    trainer.save_model()
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    found = config.exit_aggregation, config.boost_temperature, config.gradient_rescale
    assert found == ("boosted", 0.7, False)


def test_another_scheme_takes_boosting_back(tmp_path):
    """Trained on with joint, every exit predicts by itself again."""
    model = make_model()
    make_trainer(model, tmp_path)
    factory.make_trainer(tmp_path, model, "joint")
    assert (model.config.exit_aggregation, model.config.gradient_rescale) == ("none", False)


@pytest.mark.parametrize("temperature", [-0.1, float("inf"), float("nan")])
def test_a_bad_temperature_names_its_flag(temperature):
    with pytest.raises(ExitConfigurationError, match="--boost_temperature"):
        BoostedArguments(boost_temperature=temperature)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_rescaling_acts_under_sgd_alone_and_a_warning_says_so(optimizer, tmp_path, caplog):
    """A constant factor of a block's gradient cancels in AdamW's step (here with a tiny eps, and without clipping)."""
    trained = {}
    rows = [{name: value[row] for name, value in make_inputs("bert", 3).items()} for row in range(NUM_ROWS)]
    for rescale in (True, False):
        caplog.clear()
        settings = {"scheme_args": BoostedArguments(gradient_rescale=rescale), "train_dataset": rows}
        settings |= {"adam_epsilon": 1e-13, "max_grad_norm": 0.0, "learning_rate": 1e-3, "max_steps": 4}
        trainer = factory.make_trainer(tmp_path, make_model(), "boosted", optim=optimizer, **settings)
        trainer.train()
        assert ("--gradient_rescale has hardly any effect with AdamW" in caplog.text) == (
            rescale and optimizer != "sgd"
        )
        trained[rescale] = dict(trainer.model.named_parameters())
    # The bias of a key cancels in the softmax: its gradient is rounding.
    names = [name for name in trained[True] if "key.bias" not in name]
    difference = max((trained[True][name] - trained[False][name]).abs().max().item() for name in names)
    assert difference > 1e-4 if optimizer == "sgd" else difference < 1e-7
