"""The page that shows where an input exits; its functions need no Gradio, the page itself does."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from factory import TOKENS, tiny_model, tiny_processor


APP = Path(__file__).parents[1] / "recipes" / "space" / "app.py"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = sys.modules["space_app"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["space_app"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    names = {"id2label": {0: "no", 1: "<b>yes"}, "label2id": {"no": 0, "<b>yes": 1}, "num_labels": 2}
    model = tiny_model(vocab_size=len(TOKENS), num_hidden_layers=4, exit_layers=[1, 3, 4], **names)
    model.set_exit_policy({"criterion": "confidence", "thresholds": [-1.0, 0.9, 0.0]})
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def with_budgets(folder, app, monkeypatch):
    """Two budgets: everybody exits at exit 2, or nobody before the last."""
    rows = [{"target_cost": 0.5, "thresholds": [1e30, -1.0, 0.0]}, {"target_cost": 1.0, "thresholds": [1e30, 1e30, 0]}]
    path = folder / "exit_results.json"
    path.write_text(json.dumps({"criterion": "confidence", "budgeted": rows}))
    monkeypatch.setattr(app, "read_exit_results", lambda folder: json.loads(path.read_text()))
    return app.Explainer(str(folder))


def layer(shown):
    return int(re.search(r"exits after layer (\d+)", shown)[1])


def test_it_shows_the_exit_that_the_policy_takes(app, folder, monkeypatch):
    explainer = app.Explainer(str(folder))
    labels, shown = explainer.explain("a b c")
    assert layer(shown) == 1 and shown.count("exits here") == 1 and shown.count("not computed") == 2
    with torch.no_grad():
        logits = explainer.model(**explainer.processor("a b c", return_tensors="pt")).logits[0]
    assert list(labels.values()) == pytest.approx(logits.softmax(-1).tolist())
    assert "<b>" not in shown and explainer.explain("  ") == ({}, "")
    assert layer(explainer.explain("a " * 99)[1]) == 1  # more than the model takes
    explainer = with_budgets(folder, app, monkeypatch)
    assert explainer.budgets == [0.5, 1.0]
    layers = [layer(explainer.explain("a b c", budget)[1]) for budget in (0.1, 0.5, 0.9, 1.0)]
    assert layers == [3, 3, 3, 4]


@pytest.mark.parametrize(
    ("num_labels", "problem_type"),
    [(1, "regression"), (1, "multi_label_classification"), (3, "multi_label_classification"), (3, None)],
)
def test_the_answer_fits_the_problem(app, tmp_path, num_labels, problem_type):
    """What breaks: several labels share one probability, or a regression is "100 %" of its only label."""
    model = tiny_model(vocab_size=len(TOKENS), num_labels=num_labels, problem_type=problem_type, noise=0.5).eval()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    explainer = app.Explainer(str(tmp_path))
    found, shown = explainer.explain("a b c")
    with torch.no_grad():
        logits = model(**explainer.processor("a b c", return_tensors="pt")).exit_logits[0]
    answers = [re.findall("<td>(.*?)</td>", row)[1] for row in shown.split("<tr")[2:]]
    if problem_type == "regression":
        assert float(found) == pytest.approx(float(logits[-1, 0]), abs=1e-3)
        assert [*map(float, answers)] == pytest.approx(logits[:, 0].tolist(), abs=1e-3)
        return
    names = [model.config.id2label[index] for index in range(num_labels)]
    if problem_type is None:
        wanted, named = logits[-1].softmax(-1), [names[int(row.argmax())] for row in logits]
    else:
        wanted = 1 / (1 + (-logits[-1]).exp())
        named = [", ".join(name for name, z in zip(names, row, strict=True) if z > 0) or "no label" for row in logits]
    assert [found[name] for name in names] == pytest.approx(wanted.tolist()) and answers == named


@pytest.mark.slow
def test_the_page_answers(app, folder, monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra demo-app")
    client = pytest.importorskip("gradio_client")
    explainer = with_budgets(folder, app, monkeypatch)
    page = app.build(explainer)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        labels, shown = client.Client(address, verbose=False).predict("a b c", 1.0, api_name="/explain")
        assert layer(shown) == 4 and labels["label"] in ("no", "<b>yes")
    finally:
        page.close()
