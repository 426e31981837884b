"""Exit criteria and policies against plain loops over rows and exits."""

import json
import math

import numpy as np
import pytest
import torch
from damage import wrong_contents
from factory import tiny_config, tiny_model

from een_hf.models import (
    EarlyExitBertConfig,
    EarlyExitBertForSequenceClassification,
    ExitConfigurationError,
    ExitPolicy,
)
from een_hf.models.criteria import get_criterion
from een_hf.models.policies import NEVER


CRITERIA = ("confidence", "entropy", "margin", "patience", "vote")
NUM_EXITS = 5


def _logits(num_rows=40, num_labels=4, seed=0):
    """(num_rows, NUM_EXITS, num_labels) whose later exits agree more often."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num_rows, 1, num_labels, generator=generator)
    noise = torch.randn(num_rows, NUM_EXITS, num_labels, generator=generator)
    return 2 * common + noise * torch.linspace(3, 0.5, NUM_EXITS)[:, None]


def _softmax(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def _expected_scores(criterion, exits, temperatures, tolerance=0.5):
    """One row's scores by the definitions, in double precision, an exit at a time."""
    scores, predictions = [], []
    for logits, temperature in zip(exits, temperatures, strict=True):
        regression = len(logits) == 1
        predictions.append(logits[0] if regression else logits.index(max(logits)))
        probabilities = sorted(_softmax([value / temperature for value in logits]), reverse=True)
        if criterion == "confidence":
            scores.append(probabilities[0])
        elif criterion == "entropy":
            entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
            scores.append(-entropy / math.log(len(probabilities)))
        elif criterion == "margin":
            scores.append(probabilities[0] - probabilities[1])
        elif criterion == "vote":
            scores.append(max(predictions.count(label) for label in predictions))
        else:
            streak = 0
            for index in range(len(predictions) - 1, 0, -1):
                now, before = predictions[index], predictions[index - 1]
                if not (abs(now - before) < tolerance if regression else now == before):
                    break
                streak += 1
            scores.append(streak)
    return scores


@pytest.mark.parametrize("temperatures", [None, [0.5, 1.0, 2.0, 3.0, 0.25]])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_follow_their_definition(criterion, temperatures):
    """Every threshold, saved or calibrated, means something else if a score is off."""
    logits = _logits()
    expected = [_expected_scores(criterion, row, temperatures or [1.0] * NUM_EXITS) for row in logits.tolist()]
    scores = ExitPolicy(criterion, [NEVER] * NUM_EXITS, temperatures).scores(logits)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperatures", [None, [0.5, 1.0, 2.0, 3.0, 0.25]])
def test_patience_in_regression_counts_small_moves(temperatures):
    """A temperature must not shrink the moves that the tolerance is held against: rows would exit unsettled."""
    logits = _logits(num_labels=1)
    expected = [_expected_scores("patience", row, [1.0] * NUM_EXITS, tolerance=1.2) for row in logits.tolist()]
    policy = ExitPolicy("patience", [NEVER] * NUM_EXITS, temperatures, {"tolerance": 1.2})
    scores = policy.scores(logits)
    assert scores.tolist() == expected
    assert scores.unique().numel() > 2


@pytest.mark.parametrize("temperatures", [None, [0.5, 1.0, 2.0, 3.0, 0.25]])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_running_loop_equals_all_exits_at_once(criterion, temperatures):
    """The model decides exit by exit on a shrinking batch, calibration on whole arrays: they must exit alike."""
    logits = _logits(seed=1)
    scores = ExitPolicy(criterion, [NEVER] * NUM_EXITS, temperatures).scores(logits)
    counts = {"patience": [1, 1, 2, 2, 0], "vote": [2, 2, 3, 3, 0]}
    policy = ExitPolicy(criterion, counts.get(criterion, scores.quantile(0.7, 0).tolist()), temperatures)
    rows, state, exits = torch.arange(len(logits)), (), torch.full((len(logits),), NUM_EXITS - 1)
    for index in range(NUM_EXITS - 1):
        exiting, state = policy.decide(index, logits[rows, index], state)
        exits[rows[exiting]] = index
        # Compaction need not keep the order.
        keep = (~exiting).nonzero().squeeze(1).flip(0)
        rows, state = rows[keep], tuple(tensor[keep] for tensor in state)
    assert policy.exits_of(logits).equal(exits)
    assert exits.unique().numel() > 2


def test_exits_of_is_the_first_exit_confident_enough():
    """Exiting after the first exit that is confident enough wastes compute, before it accuracy."""
    logits = _logits()
    policy = ExitPolicy("confidence", [0.95, 0.9, 0.8, 0.85, 2.0])
    scores = policy.scores(logits).tolist()
    expected = []
    for row in scores:
        index = 0
        while index < NUM_EXITS - 1 and not row[index] >= policy.thresholds[index]:
            index += 1
        expected.append(index)
    exits = policy.exits_of(logits)
    assert exits.dtype == torch.int64
    assert exits.tolist() == expected
    assert len(set(expected)) > 2


def test_a_score_equal_to_the_threshold_exits():
    """A threshold of n equal exits must not ask for n + 1."""
    logits = torch.zeros(1, NUM_EXITS, 3)
    assert ExitPolicy("patience", [2, 2, 2, 2, 2]).exits_of(logits).tolist() == [2]
    assert ExitPolicy("vote", [2, 2, 2, 2, 2]).exits_of(logits).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_half_precision_logits_are_scored_in_float32(criterion, dtype):
    """A softmax in half precision moves rows across thresholds that were calibrated in float32."""
    logits = _logits().to(dtype)
    temperatures = [0.5, 1.3, 2.0, 3.0, 0.25]
    half = ExitPolicy(criterion, [0.5] * NUM_EXITS, temperatures)
    scores = half.scores(logits)
    assert scores.dtype == torch.float32
    assert scores.equal(half.scores(logits.float()))
    assert half.decide(1, logits[:, 1], ())[0].equal(half.decide(1, logits[:, 1].float(), ())[0])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_never_exits_early(criterion, broken):
    """A row with NaN that exits looks like a confident one; the rows beside it must not be held up by it."""
    logits = _logits(num_rows=6)
    logits[2] = float("nan")
    logits[4, :, 1] = broken
    exits = ExitPolicy(criterion, [-NEVER] * NUM_EXITS).exits_of(logits).tolist()
    last = NUM_EXITS - 1
    assert exits == [0, 0, last, 0, last, 0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_class_that_is_ruled_out_counts_as_probability_zero(criterion):
    """What breaks: a logit of minus infinity is 0 to some criteria, and NaN to others, which then disable exits."""
    logits = _logits(num_rows=8)
    logits[..., 2] = -math.inf
    logits[0, :, 1] = -math.inf
    expected = [_expected_scores(criterion, row, [1.0] * NUM_EXITS) for row in logits.tolist()]
    scores = ExitPolicy(criterion, [0.0] * NUM_EXITS).scores(logits)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-6)
    logits[1] = -math.inf
    assert ExitPolicy(criterion, [0.0] * NUM_EXITS).scores(logits)[1].isnan().all()


def test_a_number_that_is_infinite_is_no_prediction():
    logits = torch.tensor([[[1.0], [math.inf], [math.inf], [1.0]]])
    scores = ExitPolicy("patience", [0.0] * 4).scores(logits)[0]
    assert scores.isnan().tolist() == [False, True, True, False] and scores[3] == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", ["patience", "vote"])
def test_a_broken_exit_neither_agrees_nor_votes(criterion, broken):
    """One broken exit must not count as support for what a later exit predicts."""
    logits = torch.zeros(1, 4, 3)
    logits[:, 1:, 0] = 1
    logits[0, 0] = broken
    scores = ExitPolicy(criterion, [NEVER] * 4).scores(logits)[0]
    assert scores[0].isnan()
    assert scores[1:].tolist() == ([0, 1, 2] if criterion == "patience" else [1, 2, 3])
    # A break in the middle ends a streak; votes from before it stay.
    scores = ExitPolicy(criterion, [NEVER] * 4).scores(logits[:, [1, 0, 2, 3]])[0]
    assert scores[1].isnan()
    assert [scores[0].item(), *scores[2:].tolist()] == ([0, 0, 1] if criterion == "patience" else [1, 2, 3])


def test_never_and_always():
    """An exit that is never used must not be taken by the most confident row, and one that is always used by all."""
    sure = torch.tensor([[[1e4, 0.0], [1e4, 0.0], [0.0, 1.0]]])
    unsure = torch.zeros(1, 3, 2)
    for criterion in CRITERIA:
        assert ExitPolicy(criterion, [NEVER, math.inf, 0.0]).exits_of(sure).tolist() == [2]
        assert ExitPolicy(criterion, [-NEVER, 0.0, 0.0]).exits_of(unsure).tolist() == [0]


def test_json_round_trip_is_strict():
    """`config.json` and `exit_results.json` with Infinity in them cannot be read by anything but Python."""
    policy = ExitPolicy(
        "patience",
        [math.inf, -math.inf, np.float32(0.5), 3],
        temperatures=[np.float32(1.5), 1, 1.0, 2.0],
        params={"tolerance": 0.2},
        calibrated_for={"target_cost": 0.5},
        guarantee={"limit": 0.02},
    )
    text = json.dumps(policy.to_dict(), allow_nan=False)
    again = ExitPolicy.from_dict(json.loads(text))
    assert json.dumps(again.to_dict(), allow_nan=False) == text
    again.validate(4, None, 3)
    logits = _logits(num_labels=3)[:, :4]
    assert again.exits_of(logits).equal(policy.exits_of(logits))
    assert (again.params, again.calibrated_for, again.guarantee) == (
        policy.params,
        policy.calibrated_for,
        policy.guarantee,
    )


def test_optional_keys_may_be_missing_or_null():
    """Configs written by hand, or by a version without a key, must load."""
    short = ExitPolicy.from_dict({"criterion": "vote", "thresholds": [1, 2]})
    full = ExitPolicy.from_dict(
        {**short.to_dict(), "temperatures": None, "params": None, "calibrated_for": None, "guarantee": None}
    )
    assert short == full == ExitPolicy("vote", [1.0, 2.0])


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"criterion": "vote", "thresholds": [1], "threshold": 1}, "'threshold'"),
        ({"criterion": "vote"}, "thresholds"),
        ({"thresholds": [1]}, "criterion"),
    ],
)
def test_wrong_keys_are_named(values, word):
    """A misspelt key that is dropped silently leaves a policy that nobody asked for."""
    with pytest.raises(ExitConfigurationError, match=word):
        ExitPolicy.from_dict(values)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (ExitPolicy("confidence", [0.5, 0.5]), ["exit_policy", "2 thresholds", "3 exits"]),
        (ExitPolicy("confidence", [0.5] * 4), ["exit_policy", "4 thresholds", "3 exits"]),
        (ExitPolicy("confidence", [0.5] * 3, [1.0]), ["exit_policy", "1 temperatures", "3 exits"]),
        (ExitPolicy("confidence", [0.5] * 3, [1.0, 0.0, 1.0]), ["exit_policy", "temperatures above 0"]),
        (ExitPolicy("confidence", [0.5] * 3, [1.0, -2.0, 1.0]), ["exit_policy", "temperatures above 0"]),
        (ExitPolicy("confidence", [0.5, math.nan, 0.0]), ["exit_policy", "thresholds"]),
        (ExitPolicy("confidence", [0.5, None, 0.0]), ["exit_policy", "thresholds"]),
        (ExitPolicy("confidence", [0.5, "0.5", 0.0]), ["exit_policy", "thresholds"]),
        (ExitPolicy("confidence", [0.5] * 3, [1.0, 1e-300, 1.0]), ["exit_policy", "temperatures above 0", "0.0001"]),
        (ExitPolicy("confidence", [0.5] * 3, [1.0, math.inf, 1.0]), ["exit_policy", "temperatures above 0"]),
        (ExitPolicy("confidence", [0.5] * 3, [1.0, True, 1.0]), ["exit_policy", "temperatures"]),
        (ExitPolicy("confidence", [10**400, 0.5, 0.5]), ["exit_policy", "thresholds"]),
        (ExitPolicy("confidence", 0.5), ["exit_policy", "thresholds", "list"]),
        (ExitPolicy("confidence", "0.5"), ["exit_policy", "thresholds", "list"]),
        (ExitPolicy("confidence", [0.5] * 3, calibrated_for=[1]), ["calibrated_for", "dict"]),
        (ExitPolicy("confidence", [0.5] * 3, guarantee="yes"), ["guarantee", "dict"]),
    ],
)
def test_a_policy_that_does_not_fit_names_what_would(policy, words):
    """Too few thresholds, or one that is no number, would silently switch exits off."""
    for check in (lambda: policy.validate(3, None, 4), lambda: tiny_model().set_exit_policy(policy)):
        with pytest.raises(ExitConfigurationError) as error:
            check()
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("criterion", "params", "words"),
    [
        ("certainty", {}, ["--exit_criterion", *CRITERIA]),
        (["confidence"], {}, ["--exit_criterion", *CRITERIA]),
        ("patience", [1], ["params", "dict"]),
        ("patience", {"tolerence": 1}, ["tolerence", "tolerance"]),
        *(
            ("patience", {"tolerance": tolerance}, ["tolerance", "above 0"])
            for tolerance in ("0.5", None, math.nan, 0.0, -1, math.inf, True, 10**400)
        ),
    ],
)
def test_an_unknown_criterion_is_refused_where_it_is_written(criterion, params, words):
    """A misspelt name that is first looked at in use is answered far from where it was written."""
    with pytest.raises(ExitConfigurationError) as error:
        ExitPolicy(criterion, [0.5] * 3, params=params)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("problem_type", "num_labels"), [("regression", 1), (None, 1)])
@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "vote"])
def test_criteria_of_classes_refuse_regression(criterion, problem_type, num_labels):
    """The softmax of one label is always 1: every row would exit at exit 1."""
    with pytest.raises(ExitConfigurationError, match=f"--exit_criterion {criterion}.*patience"):
        ExitPolicy(criterion, [0.5] * 3).validate(3, problem_type, num_labels)
    ExitPolicy("patience", [0.5] * 3).validate(3, problem_type, num_labels)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_multi_label_problems_are_refused(criterion):
    """A softmax over labels that do not exclude each other says nothing about being right."""
    with pytest.raises(ExitConfigurationError, match=f"--exit_criterion {criterion}.*multi_label"):
        ExitPolicy(criterion, [0.5] * 3).validate(3, "multi_label_classification", 4)


@pytest.mark.parametrize("temperatures", [None, [0.5, 1.0, 2.0, 3.0, 0.25]])
def test_several_labels_exit_by_the_least_certain(temperatures):
    """A row that exits because one label is clear would answer the others by chance."""
    logits = _logits()
    logits[3, 1, 2] = float("nan")
    expected = [
        [
            min(max(p, 1 - p) for p in (1 / (1 + math.exp(-value / temperature)) for value in exit_logits))
            if not any(map(math.isnan, exit_logits))
            else math.nan
            for exit_logits, temperature in zip(row, temperatures or [1.0] * NUM_EXITS, strict=True)
        ]
        for row in logits.tolist()
    ]
    thresholds = [0.7, 0.75, 0.6, 0.65, 1.0]
    policy = ExitPolicy("label_confidence", thresholds, temperatures)
    torch.testing.assert_close(policy.scores(logits), torch.tensor(expected), rtol=0, atol=2e-6, equal_nan=True)
    exits = [next((k for k in range(4) if row[k] >= thresholds[k]), 4) for row in expected]
    assert policy.exits_of(logits).tolist() == exits
    assert len(set(exits)) > 2
    policy.validate(NUM_EXITS, "multi_label_classification", 4)
    for problem_type, num_labels in (("single_label_classification", 4), (None, 4), ("regression", 1)):
        with pytest.raises(ExitConfigurationError, match="label_confidence does not fit.*Use: "):
            policy.validate(NUM_EXITS, problem_type, num_labels)


def test_temperatures_for_people_decide_nothing():
    """Plain scores may decide better while people still read calibrated numbers."""
    logits, temperatures = _logits(), [0.5, 1.0, 2.0, 3.0, 0.25]
    plain = ExitPolicy("confidence", [0.6] * NUM_EXITS)
    policy = ExitPolicy("confidence", [0.6] * NUM_EXITS, confidence_temperatures=temperatures)
    exits = policy.exits_of(logits)
    assert exits.equal(plain.exits_of(logits)) and exits.unique().numel() > 2
    answers = logits[torch.arange(len(exits)), exits]
    expected = torch.stack([row / temperatures[k] for row, k in zip(answers, exits.tolist(), strict=True)])
    assert policy.temper(answers, exits).equal(expected)
    assert plain.temper(answers, exits).equal(answers)
    again = ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict(), allow_nan=False)))
    assert again == policy
    for bad in ([1.0], [0.0] * NUM_EXITS):
        with pytest.raises(ExitConfigurationError, match="temperatures"):
            ExitPolicy("confidence", [0.6] * NUM_EXITS, confidence_temperatures=bad).validate(NUM_EXITS, None, 4)


def test_regression_of_several_labels_is_refused():
    """Patience would compare the index of the largest of several numbers."""
    with pytest.raises(ExitConfigurationError, match="--exit_criterion patience.*1 label, not 3"):
        ExitPolicy("patience", [0.5] * 3).validate(3, "regression", 3)


@pytest.mark.parametrize(("given", "words"), [("foo", ["foo", *CRITERIA]), ("margin", ["thresholds", "one per exit"])])
def test_a_policy_of_a_name_alone_is_answered_with_a_sentence(given, words):
    with pytest.raises(ExitConfigurationError) as error:
        ExitPolicy(given)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "content", ["[1]", "7", '"x"', "null", '{"policy": 3}', '{"policy": []}', '{"policy": {"a', ""]
)
def test_from_results_refuses_files_of_other_kinds(tmp_path, content):
    path = tmp_path / "exit_results.json"
    path.write_text(content)
    with pytest.raises(ExitConfigurationError, match="exit_results.json|exit_policy"):
        ExitPolicy.from_results(path)
    with pytest.raises(ExitConfigurationError, match="exit_results.json"):
        ExitPolicy.from_results(path, target_cost=0.5)
    with pytest.raises(ExitConfigurationError, match="not_there"):
        ExitPolicy.from_results(tmp_path / "not_there")


def test_patience_of_predictions_that_never_move_has_a_tolerance():
    """A tolerance of 0 keeps every row to the last exit: deciles of zeros are no choice."""
    still = torch.ones(20, 3, 1)
    assert get_criterion("patience").choices(still) == [{}]


def test_unknown_criterion_is_answered_with_the_known():
    """A typo in a flag must say what to write instead."""
    with pytest.raises(ExitConfigurationError) as error:
        get_criterion("confidense")
    assert all(name in str(error.value) for name in CRITERIA)


@pytest.fixture
def results(tmp_path):
    def write(**more):
        entry = {"relative_cost": 0.1, "metrics": {}, "exit_fractions": [], "temperatures": [1.0, 2.0]}
        content = {
            "schema_version": 1,
            "budgeted": [
                {"target_cost": 0.6, "criterion": "margin", "thresholds": [0.6, 0], **entry},
                {"target_cost": 0.2, "criterion": "margin", "thresholds": [0.2, 0], **entry},
                {"target_cost": 0.4, "criterion": "margin", "thresholds": [0.4, 0], **entry},
            ],
            "policy": {
                "criterion": "entropy",
                "thresholds": [0.5, 0],
                "calibrated_for": {"max_risk": 0.1},
                "guarantee": {"limit": 0.1},
                **entry,
            },
            **more,
        }
        path = tmp_path / "exit_results.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.mark.parametrize(("target", "threshold"), [(0.2, 0.2), (0.39, 0.2), (0.4, 0.4), (0.5, 0.4), (2.0, 0.6)])
def test_from_results_takes_the_largest_budget_below(results, target, threshold):
    """A policy over the budget that was asked for costs more than promised; one far below wastes accuracy."""
    policy = ExitPolicy.from_results(results(), target_cost=target)
    assert policy == ExitPolicy(
        "margin", [threshold, 0], [1.0, 2.0], calibrated_for={"target_cost": threshold}, guarantee=None
    )


def test_from_results_takes_the_calibrated_policy(results):
    """Without a budget, the guarantee that the run calibrated for must come along."""
    policy = ExitPolicy.from_results(str(results()))
    assert policy == ExitPolicy(
        "entropy", [0.5, 0], [1.0, 2.0], calibrated_for={"max_risk": 0.1}, guarantee={"limit": 0.1}
    )


def test_from_results_reads_the_criterion_of_the_file(results):
    """Entries without a criterion of their own share the file's."""
    path = results(criterion="vote", budgeted=[{"target_cost": 0.5, "thresholds": [2, 0]}])
    assert ExitPolicy.from_results(path, target_cost=0.5).criterion == "vote"


def test_from_results_says_what_is_missing(results):
    """A file without the policy that was asked for must not give another one."""
    with pytest.raises(ExitConfigurationError, match="no budget up to 0.1; its budgets are: 0.2, 0.4, 0.6"):
        ExitPolicy.from_results(results(), target_cost=0.1)
    with pytest.raises(ExitConfigurationError, match="no calibrated policy.*target_cost"):
        ExitPolicy.from_results(results(policy=None))
    with pytest.raises(ExitConfigurationError, match="budgets are: none"):
        ExitPolicy.from_results(results(budgeted=[]), target_cost=0.5)
    with pytest.raises(ExitConfigurationError, match="criterion"):
        ExitPolicy.from_results(results(budgeted=[{"target_cost": 0.5, "thresholds": [2, 0]}]), target_cost=0.5)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_exit_fields_of_another_kind_are_refused(tmp_path, count):
    """What breaks: an edited config ends in a traceback when the model is loaded, or when it reads its first batch."""
    model = tiny_model().eval()
    about = {"calibrated_for": {"target_cost": 0.5}, "guarantee": {"risk": "consistency", "limit": 0.1}}
    policy = {"criterion": "patience", "thresholds": [0.6, 0.6, 0.0], "temperatures": [1.0, 2.0, 1.0]}
    model.set_exit_policy({**policy, "params": {"tolerance": 0.3}, **about})
    model.save_pretrained(tmp_path)
    path, refused = tmp_path / "config.json", 0
    whole, inputs = json.loads(path.read_text()), torch.arange(1, 9).view(2, 4)
    starts = ("boost", "exit", "gradient_rescale", "last_exit", "training_scheme")
    ours = {name: whole.pop(name) for name in list(whole) if name.startswith(starts)}
    for changed in wrong_contents(ours, np.random.default_rng(count), count):
        path.write_text(json.dumps({**whole, **changed}))
        try:
            loaded = type(model)(EarlyExitBertConfig.from_pretrained(tmp_path)).eval()
            loaded(input_ids=inputs)
        except ExitConfigurationError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
    assert refused > count / 2


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_config_names_no_code_of_the_hub(tmp_path, name):
    """transformers takes an attention kernel `owner/name` from the Hub and runs it: no file may ask."""
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: "someone/kernel"}))
    with pytest.raises(ExitConfigurationError, match="code of the Hub.*someone/kernel"):
        EarlyExitBertForSequenceClassification.from_pretrained(tmp_path)
