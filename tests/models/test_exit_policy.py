"""The policy of a model: how it is set, kept, changed and refused."""

import copy
import importlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from models.criteria_by_hand import (
    EXIT_LAYERS,
    NUM_EXITS,
    TEMPERATURES,
    anytime_logits,
    expected_exits,
    policy_of,
    run_dynamic,
    scores_by_hand,
    threshold_grid,
)

import een_hf.models
from een_hf.inference import ExitRunner
from een_hf.models import ExitConfigurationError, ExitPolicy


@pytest.mark.parametrize("training", [False, True])
def test_a_policy_for_one_call(architecture, load_exits, training):
    """What breaks: one service with several budgets; in training, a row's gradient at the exit where it exits."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS, **no_dropout), architecture.inputs(32)
    model.set_exit_policy(policy_of("confidence", [0.0, 0.0, 0.0]))
    exit_logits = anytime_logits(model, inputs)
    scores = [scores_by_hand("confidence", row) for row in exit_logits.double().tolist()]
    thresholds = threshold_grid("confidence", scores)[1]
    exits, clear = expected_exits(scores, thresholds)
    assert all(clear) and len(set(exits)) == NUM_EXITS
    policy = ExitPolicy.from_dict(policy_of("confidence", thresholds))
    labels = torch.arange(32) % 3
    model.train(training)
    assert model(**inputs, early_exit=policy.to_dict()).exit_index.tolist() == exits
    output = model(**inputs, early_exit=policy, labels=labels)
    assert output.exit_index.tolist() == exits
    assert model.config.exit_policy["thresholds"] == [0.0, 0.0, 0.0]
    with pytest.raises(ExitConfigurationError, match="2 thresholds.*3 exits"):
        model(**inputs, early_exit=ExitPolicy("confidence", [0.5, 0.5]))

    own = model.train()(**inputs).exit_logits[torch.arange(32), exits]
    torch.testing.assert_close(output.logits, own, rtol=0, atol=1e-5)
    wanted = F.cross_entropy(own, labels)
    torch.testing.assert_close(output.loss, wanted)
    parameters = list(model.parameters())
    found, plain = (torch.autograd.grad(of, parameters, materialize_grads=True) for of in (output.loss, wanted))
    norm = torch.cat([part.flatten() for part in plain]).norm()
    for ours, expected in zip(found, plain, strict=True):
        assert (ours - expected).norm() <= 1e-4 * norm


def test_policy_survives_saving(architecture, load_exits, tmp_path):
    """A calibrated model must exit early after reload, without any further call."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS), architecture.inputs(32)
    scores = [
        scores_by_hand("margin", row, TEMPERATURES[:NUM_EXITS])
        for row in anytime_logits(model, inputs).double().tolist()
    ]
    policy = policy_of("margin", threshold_grid("margin", scores)[1], temperatures=TEMPERATURES[:NUM_EXITS])
    expected = run_dynamic(model, policy, inputs)
    model.save_pretrained(tmp_path)
    reloaded = architecture.auto_class.from_pretrained(tmp_path)
    assert reloaded.config.exit_policy == model.config.exit_policy
    with torch.no_grad():
        output = reloaded(**inputs)
    assert output.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=0)


def test_policy_object_or_dictionary(architecture, load_exits):
    """Both forms of the contract set the same plain dictionary."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    given = policy_of("confidence", [0.9, 0.8, 0.0])
    model.set_exit_policy(given)
    stored = copy.deepcopy(model.config.exit_policy)
    assert type(stored) is dict
    assert given == policy_of("confidence", [0.9, 0.8, 0.0])
    model.set_exit_policy(None)
    assert model.config.exit_policy is None
    model.set_exit_policy(ExitPolicy.from_dict(given))
    assert model.config.exit_policy == stored


def test_a_policy_changed_in_place_is_obeyed_at_once(architecture, load_exits):
    """The parsed policy is kept between calls: thresholds edited in the config must not be passed over."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS).eval(), architecture.inputs(3)
    model.set_exit_policy(policy_of("confidence", [2.0, 2.0, 0.0]))
    assert model(**inputs).exit_index.tolist() == [2, 2, 2]
    model.config.exit_policy["thresholds"][1] = 0.0
    assert model(**inputs).exit_index.tolist() == [1, 1, 1]
    model.config.exit_policy["thresholds"].pop()
    with pytest.raises(ExitConfigurationError, match="3"):
        model(**inputs)
    model.config.exit_policy = None
    assert model(**inputs).exit_index is None


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (policy_of("confidence", [0.9, 0.8]), "3"),
        (policy_of("confidence", [0.9, 0.8, 0.7, 0.6]), "3"),
        (policy_of("certainty", [0.9, 0.8, 0.7]), "confidence"),
        (policy_of("confidence", [0.9, 0.8, 0.7], temperatures=[1.0]), "temperatures"),
    ],
)
def test_policy_that_does_not_fit_is_refused(architecture, load_exits, policy, word):
    """Too few thresholds would silently keep late exits from being used; and a refused policy must not stay."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    model.set_exit_policy(policy_of("confidence", [0.5, 0.5, 0.0]))
    before = copy.deepcopy(model.config.exit_policy)
    with pytest.raises(ExitConfigurationError, match=word):
        model.set_exit_policy(policy)
    assert model.config.exit_policy == before
    # Written into the config by hand, it must not pass either.
    model.config.exit_policy = policy
    with pytest.raises(ExitConfigurationError, match=word):
        model(**architecture.inputs())


@pytest.mark.parametrize("given", [0.5, "confidence", [0.5, 0.5, 0.0], True])
def test_what_is_no_policy_is_answered_with_a_sentence(bert, load_exits, given):
    """A cost in place of a policy is an easy mistake; an AttributeError says nothing of it."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS)
    with pytest.raises(ExitConfigurationError, match="set_exit_policy takes an ExitPolicy.*not .*from_results"):
        model.set_exit_policy(given)


@pytest.mark.parametrize("given", [0.5, "confidence", [0.5, 0.5, 0.0], True])
def test_a_runner_answers_what_is_no_policy_with_a_sentence(bert, load_exits, given):
    """What breaks: an AttributeError of a float says nothing of policies."""
    with pytest.raises(ExitConfigurationError, match="exit_policy must be a dict"):
        ExitRunner(load_exits(bert, exit_layers=EXIT_LAYERS), given)


@pytest.mark.parametrize("given", ["no", 0.5, 1, [True]])
def test_early_exit_is_no_string(bert, load_exits, given):
    """`early_exit="no"` used to mean yes."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS).eval()
    with pytest.raises(ExitConfigurationError, match="early_exit is True, False"):
        model(**bert.inputs(), early_exit=given)


def test_a_policy_for_one_call_of_another_copy_of_the_class(bert, load_exits, monkeypatch):
    """What breaks: a model loaded with trust_remote_code has its own `ExitPolicy`, which was used without a check."""
    package = ModuleType("copied")
    package.__path__ = een_hf.models.__path__
    monkeypatch.setitem(sys.modules, "copied", package)
    other = importlib.import_module("copied.policies").ExitPolicy
    assert other is not ExitPolicy
    model, inputs = load_exits(bert, exit_layers=EXIT_LAYERS).eval(), bert.inputs(3)
    assert model(**inputs, early_exit=other("confidence", [2.0, 0.0, 0.0])).exit_index.tolist() == [1, 1, 1]
    with pytest.raises(ExitConfigurationError, match="2 thresholds.*3 exits"):
        model(**inputs, early_exit=other("confidence", [2.0, 0.0]))
