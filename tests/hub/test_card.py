"""The model card: what it says of a run, and what nobody can make it say."""

import ast
import re
import sys

import pytest
import yaml
from factory import RESULTS as WHOLE_RESULTS
from factory import tiny_config
from huggingface_hub import ModelCard

from een_hf.evaluation import write_exit_results
from een_hf.hub import (
    guarantee_in_words,
    is_run_card,
    refresh_model_card,
    write_model_card,
)
from een_hf.hub.sections import NETWORKS
from een_hf.models import MODEL_CLASSES, ExitPolicy


RESULTS = {
    **WHOLE_RESULTS,
    "method": "l2w",
    "dataset": "stanfordnlp/sst2",
    "anytime": [
        {"exit": 1, "layer": 1, "relative_cost": 0.51234, "loss": 0.7, "metrics": {"accuracy": 0.56784}, "ece": 0.1},
        {"exit": 2, "layer": 2, "relative_cost": 1.0, "loss": 0.3, "metrics": {"accuracy": None}, "ece": 0.2},
    ],
    "budgeted": [],
    "policy": None,
}
GUARANTEE = {"risk": "consistency", "limit": 0.02, "confidence": 0.9, "errors": 3, "num_rows": 500}


def test_a_card_names_hub_sources_and_hides_local_paths(tmp_path):
    settings = {"method": "l2w", "model_name_or_path": "/data/secret/my-bert", "dataset_name": "/data/secret/reviews"}
    settings |= {"learning_rate": 0.001, "output_dir": "/data/secret/out", "train_file": "/data/secret/rows.csv"}
    results = {**RESULTS, "dataset": "/data/secret/reviews"}
    text = write_model_card(tmp_path, results, tiny_config(), settings=settings).read_text()
    assert "secret" not in text and str(tmp_path) not in text
    assert "my-bert" in text and "reviews" in text and "learning_rate: 0.001" in text
    assert "Learning to Weight Samples" in text
    sources = {"base_model": "google/bert", "dataset_id": "stanfordnlp/sst2", "repo_id": "someone/mine"}
    path = write_model_card(tmp_path, RESULTS, tiny_config(), metadata={"license": "mit"}, **sources)
    header = ModelCard.load(path).data
    assert (header.base_model, header.datasets, header.license) == ("google/bert", ["stanfordnlp/sst2"], "mit")
    assert [result.metric_value for result in header.eval_results] == [0.5678]  # a metric without a value is left out


def test_a_new_policy_keeps_the_rest_of_the_card(tmp_path):
    """`een-hf calibrate --save` knows neither where the run was pushed nor what it started from."""
    sources = {"base_model": "google/bert", "dataset_id": "stanfordnlp/sst2", "repo_id": "someone/mine"}
    path = write_model_card(tmp_path, RESULTS, tiny_config(), metadata={"license": "mit", "language": "en"}, **sources)
    before = ModelCard.load(path)
    policy = {"criterion": "margin", "thresholds": [0.25, 0.0], "calibrated_for": {"max_risk": 0.02}}
    policy |= {
        "guarantee": GUARANTEE,
        "relative_cost": 0.7,
        "metrics": {"accuracy": 0.8},
        "exit_fractions": [0.6, 0.4],
    }
    refresh_model_card(tmp_path, {**RESULTS, "policy": policy}, tiny_config(), {})
    after = ModelCard.load(path)
    for name in ("model_name", "base_model", "datasets", "license", "language", "tags"):
        assert getattr(after.data, name) == getattr(before.data, name)
    assert "`margin`" in after.text and "0.2500" in after.text
    assert guarantee_in_words(GUARANTEE) in after.text and "No exit policy" in before.text


def test_a_card_without_a_policy_says_only_what_works(tmp_path):
    """No budget below one half, or none at all (several labels per row): code that raises helps nobody."""
    text = write_model_card(tmp_path, RESULTS, tiny_config()).read_text()
    assert "no other policy" in text and "set_exit_policy" not in text
    budget = {"target_cost": 0.7123, "relative_cost": 0.7, "metrics": {"accuracy": 0.8}, "exit_fractions": [0.6, 0.4]}
    budget |= {"criterion": "margin", "thresholds": [0.25, 0.0]}
    results = {**RESULTS, "budgeted": [budget, {**budget, "target_cost": 1.0, "thresholds": [1e30, 0.0]}]}
    text = write_model_card(tmp_path, results, tiny_config()).read_text()
    path = write_exit_results(tmp_path, results)
    target = float(re.search(r"target_cost=([\d.]+)", text)[1])
    assert ExitPolicy.from_results(path, target_cost=target).thresholds == budget["thresholds"]


HOSTILE = 'x`y|<b>z</b>\n# owned\n```\n[l](http://e) "+exit()+" '


def test_no_name_changes_the_card_or_its_code(tmp_path):
    """Names of metrics, criteria, risks, repositories and flags are data: who picks them must not write the card."""
    policy = {"criterion": HOSTILE, "thresholds": [0.25, 0.0], "calibrated_for": {"max_risk": 0.02}}
    policy |= {"guarantee": {**GUARANTEE, "risk": HOSTILE}, "relative_cost": 0.7, "exit_fractions": [0.6, 0.4]}
    policy["metrics"] = {HOSTILE: 0.5}
    budget = {**WHOLE_RESULTS["budgeted"][0], "metrics": {HOSTILE: 0.5}, "criterion": HOSTILE}
    rows = [{**row, "metrics": {HOSTILE: 0.5}} for row in WHOLE_RESULTS["anytime"]]
    results = {**RESULTS, "anytime": rows, "policy": policy, "budgeted": [budget], "method": HOSTILE}
    results |= {"dataset": HOSTILE, "task_name": HOSTILE, "metric": HOSTILE}
    settings = {"model_name_or_path": HOSTILE, "dataset_name": HOSTILE, "max_seq_length": HOSTILE}
    path = write_model_card(tmp_path, results, tiny_config(), settings=settings, repo_id=HOSTILE)
    text = ModelCard.load(path).text
    outside, blocks = [], []
    for number, part in enumerate(re.split(r"^(```+)(\w*)$", text, flags=re.MULTILINE)):
        (outside if number % 6 == 0 else blocks if number % 6 == 3 else []).append(part)
    outside = re.sub(r"(?<!\\)`[^`]*`", "", "".join(outside))
    assert not re.search(r"^ *# owned|<b>|(?<!\\)\]\(http", outside, re.MULTILINE)
    for line in outside.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 7), line  # the columns of budgets, and of exits
    code = [block for block in blocks if "import" in block or "set_exit_policy" in block]
    assert len(code) == 3
    for block in code:
        calls = [node.func for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        assert calls and not [call for call in calls if getattr(call, "id", None) == "exit"]


def test_a_scheme_that_a_file_names_is_not_imported(tmp_path, monkeypatch):
    """exit_results.json and config.json come with a model: their strings must not run code."""
    (tmp_path / "payload.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    results = {**RESULTS, "method": "payload:X"}
    for settings in (None, {"method": "payload:X"}):
        text = write_model_card(tmp_path, results, tiny_config(), settings=settings).read_text()
        assert "`payload:X`" in text
    refresh_model_card(tmp_path, results, tiny_config(training_scheme="payload:X"), {})
    assert "payload" not in sys.modules


def test_a_card_without_a_header_is_nobodys(tmp_path):
    path = tmp_path / "README.md"
    for content in ("", "---\n: [\n---\n", "---\ntags: 3\n---\n", "text"):
        path.write_text(content)
        assert not is_run_card(path)
        refresh_model_card(tmp_path, RESULTS, tiny_config(), {})
        assert is_run_card(path)


def test_the_card_of_an_evaluation_claims_no_training(tmp_path):
    text = write_model_card(tmp_path, {**RESULTS, "method": "unknown"}, tiny_config()).read_text()
    assert "trained on" not in text and "scheme" not in text and "- unknown" not in text


@pytest.mark.parametrize(("part", "words"), [("3", "part 3 of digits9"), ("all", "all parts of digits9")])
def test_the_card_names_the_part_that_was_trained_on(tmp_path, part, words):
    """What breaks: a model of 50 images claims to be one of the whole data set."""
    settings = {"dataset_name": "cifar100", "partition_dir": "/home/me/digits9", "partition_id": part}
    text = write_model_card(tmp_path, RESULTS, tiny_config(), settings=settings).read_text()
    assert f"trained on {words}, evaluated on {RESULTS['dataset']}" in text.replace("\\", "")
    assert "partition_dir: digits9" in text and f"partition_id: {yaml.safe_dump(part).split()[0]}" in text
    assert "/home/me" not in text
    own = write_model_card(tmp_path, {**RESULTS, "dataset": "digits9"}, tiny_config(), settings=settings)
    assert f"trained on {words}" in own.read_text() and "evaluated on" not in own.read_text()


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("mpnet", "An MPNet classifier"), ("electra", "An ELECTRA classifier"), ("roberta", "A RoBERTa classifier")],
)
def test_a_card_calls_networks_by_their_names(tmp_path, model_type, words):
    card = write_model_card(tmp_path, {**RESULTS, "model_type": model_type}, tiny_config()).read_text()
    assert words in card


def test_every_architecture_has_a_name():
    assert {name for name in MODEL_CLASSES if "mobile" not in name} == set(NETWORKS)
