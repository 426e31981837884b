"""Sharing on the Hub, through a real server on the loopback interface: what is pushed, and what its card says."""

import json
import os

import numpy as np
import pytest
from hub.programs import CARD, LOAD, LOAD_ALL, OURS, PUSH, PUSH_ALL, ROOT, TEXT_RUN, hub_server, run_python
from hub.server import header_errors
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import pipeline


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server's folder, after the models and a run were pushed and loaded again without the package."""
    folder, store = tmp_path_factory.mktemp("planted"), tmp_path_factory.mktemp("hub")
    wandb = {"WANDB_MODE": "offline", "WANDB_DIR": str(store)}
    with hub_server(store) as endpoint:
        run_python(PUSH, folder, endpoint, HF_HOME=str(folder / "pusher"), PYTHONPATH=OURS, **wandb)
        run_python(LOAD, folder, endpoint, HF_HOME=str(folder / "loader"))
        run_python(CARD, folder, endpoint, HF_HOME=str(folder / "reader"), PYTHONPATH=str(ROOT))
    return {"folder": folder, "store": store / "someone", "commits": store / "commits.jsonl", "all": store}


@pytest.mark.slow
def test_without_the_package_every_architecture_answers_the_same(tmp_path):
    """An adapter that imports more than its siblings runs on its author's machine only."""
    (tmp_path / "hub").mkdir()
    with hub_server(tmp_path / "hub") as endpoint:
        run_python(PUSH_ALL, tmp_path, endpoint, HF_HOME=str(tmp_path / "pusher"), PYTHONPATH=OURS)
        run_python(LOAD_ALL, tmp_path, endpoint, HF_HOME=str(tmp_path / "loader"))


@pytest.fixture(scope="module")
def found(hub):
    import torch

    return torch.load(hub["folder"] / "found.pt", weights_only=False)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_without_the_package_a_pushed_model_answers_the_same(found, name):
    """Custom code that lacks a file, or falls back to all exits, makes a shared model fail or slow."""
    ours = found[name]
    assert ours["found_logits"].equal(ours["logits"])
    assert ours["found_exit_index"].equal(ours["exit_index"])
    assert ours["again_logits"].equal(ours["logits"])


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_without_the_package_examples_that_exit_stop_computing(found, name):
    """Each layer must see just the rows whose exit lies at or behind it."""
    exits = np.array([1, 2, 4])[found[name]["exit_index"].numpy()]
    assert len(set(exits)) > 1
    expected = {depth: int((exits > depth).sum()) for depth in range(4) if (exits > depth).any()}
    assert found[name]["rows"] == expected


def test_the_tokenizer_travels_along(found):
    assert found["token_ids"].equal(found["bert"]["inputs"]["input_ids"])


def test_a_trainers_push_brings_all_that_the_card_speaks_of(hub, found):
    files = {path.name for path in (hub["store"] / "digits-run").iterdir()}
    assert files >= {
        "README.md",
        "config.json",
        "exit_curves.png",
        "exit_results.json",
        "model.safetensors",
        "modeling_een.py",
        "modeling_een_vit.py",
        "preprocessor_config.json",
    }
    results = json.loads((hub["store"] / "digits-run" / "exit_results.json").read_text())
    assert found["run_policy"]["thresholds"] == results["policy"]["thresholds"]
    assert found["processor"] == 8


def test_the_handler_of_inference_endpoints_answers_without_the_package(hub, found):
    """What breaks: an endpoint that was made of a pushed model does not start, or answers otherwise."""
    assert (hub["store"] / "digits-run" / "handler.py").is_file()
    folder = str(hub["folder"] / "run")
    classify = pipeline("early-exit-image-classification", model=folder, image_processor=folder, device="cpu")
    (wanted,), (answer,) = classify([found["handler"]["image"]], top_k=3), found["handler"]["answer"]
    for label, other in zip(answer, wanted, strict=True):
        assert set(label) == {"label", "score", "exit_layer"}
        assert label["label"] == other["label"] and label["exit_layer"] == other["exit_layer"]
        assert label["score"] == pytest.approx(other["score"], abs=1e-5)


def test_examples_are_not_published_unasked(hub):
    """They are users' data: found in the run's folder, not on the Hub."""
    assert (hub["folder"] / "run" / "_examples" / "examples.json").is_file()
    assert list((hub["folder"] / "run" / "_examples").glob("*.png"))
    assert not [path for path in (hub["store"] / "digits-run").rglob("*") if "examples" in str(path)]
    assert "## Examples" not in (hub["store"] / "digits-run" / "README.md").read_text()


def assert_nothing_private(store):
    """No file that was pushed, and none that wandb would send, holds a token or names the run's folder."""
    wandb = list(store.glob("wandb/offline-run-*"))
    files = [path for path in store.rglob("*") if path.is_file() and "logs" not in path.relative_to(store).parts]
    names = {path.name for path in files}
    assert wandb and {"training_args.bin", "trainer_state.json"} <= names and any("tfevents" in name for name in names)
    assert any(name.endswith(".wandb") for name in names) and list(store.rglob("checkpoint-*/training_args.bin"))
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                content = b"".join(array.tobytes() for array in arrays.values())
        assert b"planted" not in content and b"hf_test" not in content, path


def test_no_token_and_no_folder_leaves_the_machine(hub):
    """What a Trainer pickles, TensorBoard's events, wandb's record of the command line: all of it goes out."""
    assert_nothing_private(hub["all"])


@pytest.mark.slow
def test_no_token_and_no_folder_of_a_text_run_leaves_the_machine(tmp_path):
    """As above, with a tokenizer and weights from a local folder."""
    folder, store = tmp_path / "planted", tmp_path / "hub"
    folder.mkdir()
    store.mkdir()
    wandb = {"WANDB_MODE": "offline", "WANDB_DIR": str(store)}
    with hub_server(store) as endpoint:
        run_python(TEXT_RUN, folder, endpoint, HF_HOME=str(folder / "home"), PYTHONPATH=OURS, **wandb)
    assert_nothing_private(store)


def test_every_push_of_a_run_can_be_loaded(hub):
    """A push in the middle of training brings a config that names the code: the code must be there too."""
    commits = [json.loads(line) for line in hub["commits"].read_text().splitlines()]
    pushed = [set(commit["files"]) for commit in commits if commit["repo"] == "someone/digits-run"]
    there = set()
    for files in pushed:
        there |= files
        if "config.json" in there:
            assert there >= {"modeling_een_vit.py", "configuration_een.py", "exits.py", "policies.py"}
    assert "README.md" not in pushed[0]


@pytest.fixture(scope="module")
def card_of_run(hub):
    folder = hub["store"] / "digits-run"
    return ModelCard.load(folder / "README.md"), json.loads((folder / "exit_results.json").read_text())


def table_rows(text, first_column):
    """The cells of the table whose header begins so."""
    lines = text[text.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_the_header_is_what_the_hub_reads(card_of_run):
    card, results = card_of_run
    header = card.data.to_dict()
    assert ModelCardData(**header).to_dict() == header
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "image-classification")
    assert {"early-exit", "joint", "vit"} <= set(header["tags"])
    assert "datasets" not in header and "base_model" not in header  # digits is no data set of the Hub
    name, measured = model_index_to_eval_results(header["model-index"])
    assert name == "someone/digits-run"
    wanted = [row["metrics"]["accuracy"] for row in results["anytime"]] + [results["policy"]["metrics"]["accuracy"]]
    assert [result.metric_value for result in measured] == [round(value, 4) for value in wanted]
    assert {result.metric_type for result in measured} == {"accuracy"}


def test_the_server_refuses_a_header_that_the_hub_would_refuse(card_of_run):
    """Otherwise that the pushes went through would say nothing about the card."""
    card, _ = card_of_run
    assert header_errors(card.content) == []
    assert header_errors("no header") and header_errors("---\n: [\n---\n")
    for before, after in (
        ("pipeline_tag: image-classification", "pipeline_tag: classification"),
        ("type: image-classification", "kind: image-classification"),
        ("- early-exit", "- 3"),
    ):
        assert before in card.content and header_errors(card.content.replace(before, after))


def test_figures_are_those_of_the_results(card_of_run):
    card, results = card_of_run
    header, *rows = table_rows(card.text, "exit")
    assert header == ["exit", "layer", "relative cost", "accuracy", "loss", "share exiting"]
    assert len(rows) == len(results["anytime"])
    for cells, row, share in zip(rows, results["anytime"], results["policy"]["exit_fractions"], strict=True):
        wanted = [row["exit"], row["layer"], row["relative_cost"], row["metrics"]["accuracy"], row["loss"], share]
        assert [float(cell) for cell in cells] == [round(value, 4) for value in wanted]
    budgets = table_rows(card.text, "budget")[1:]
    wanted = [[row["target_cost"], row["relative_cost"], row["metrics"]["accuracy"]] for row in results["budgeted"]]
    assert [[float(cell) for cell in cells] for cells in budgets] == [[round(v, 4) for v in row] for row in wanted]
    assert f"relative cost {results['policy']['relative_cost']:.4f}" in card.text


def test_the_card_says_nothing_of_the_machine(hub, card_of_run):
    text = card_of_run[0].content
    for private in (str(hub["folder"]), str(ROOT), os.uname().nodename, "+cpu", "/home", "/tmp"):
        assert private not in text
    assert 'from_pretrained("someone/digits-run", trust_remote_code=True)' in text
    assert "(exit_curves.png)" in text


def test_the_code_of_the_card_runs(hub, card_of_run):
    """Load, another budget from the results file, the same by hand: the reader's first three steps."""
    loaded, budget, by_hand = json.loads((hub["folder"] / "policies.json").read_text())
    results = card_of_run[1]
    assert loaded["thresholds"] == results["policy"]["thresholds"]
    wanted = max((row for row in results["budgeted"] if row["target_cost"] <= 0.5), key=lambda row: row["target_cost"])
    for policy in (budget, by_hand):
        assert (policy["criterion"], policy["thresholds"]) == (wanted["criterion"], wanted["thresholds"])
        assert policy["temperatures"] == wanted["temperatures"]
