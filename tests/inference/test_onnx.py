"""ONNX export: ONNX Runtime answers as PyTorch does, exits when the policy says so, and runs no layer after that."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from factory import tiny_model, tiny_stock_model

from een_hf import ExitConfigurationError
from een_hf.commands import main
from een_hf.errors import ExportError
from een_hf.inference.onnx import load_session
from een_hf.models.policies import NEVER


pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
OFF = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

SHAPE = {"hidden_size": 32, "intermediate_size": 32}
TEMPERATURES = [1.5, 0.8, 2.0]


def make_model(kind, **settings):
    inputs = {"image_size": 12} if kind == "vit" else {"max_position_embeddings": 40, "exit_pooling": "mean"}
    model = tiny_model(kind, seed=1, **{**SHAPE, **inputs, "num_labels": 4, **settings})
    with torch.no_grad():  # so that scores differ between rows and exits
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12 if len(parameter) == model.config.num_labels else 6)
    return model.eval()


def make_inputs(kind, num_rows, length=11, seed=0):
    """Random pixels, or random tokens of which the second half of the rows is padded, one row on the left."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(num_rows, 3, 12, 12, generator=generator)}
    mask = torch.ones(num_rows, length, dtype=torch.int64)
    mask[num_rows // 2 :, length // 2 :] = 0
    if num_rows > 2:
        mask[-1] = mask[-1].flip(0)
    tokens = torch.randint(60, (num_rows, length), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": (tokens > 30).long()}


class Exported:
    """A model, the file that the command wrote of it, and the file in ONNX Runtime."""

    def __init__(self, folder, model, policy, *flags):
        self.model, self.policy, self.path = model, policy, folder / "model.onnx"
        model.set_exit_policy(policy)
        model.save_pretrained(folder / "run")
        main(["export", str(folder / "run"), "--output", str(self.path), *flags])
        self.session = self.start()

    def start(self, **settings):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for name, value in settings.items():
            setattr(options, name, value)
        return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs, thresholds=None, session=None):
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        if thresholds is not None:
            feed["thresholds"] = np.float32(thresholds)
        return (session or self.session).run(None, feed)

    @torch.no_grad()
    def exit_logits(self, inputs):
        return self.model(**inputs, early_exit=False).exit_logits.numpy()

    @torch.no_grad()
    def dynamic(self, inputs, thresholds):
        """PyTorch's own dynamic mode."""
        self.model.set_exit_policy({**self.policy, "thresholds": list(thresholds)})
        return self.model(**inputs)

    def scores(self, exit_logits):
        return np.array(
            [row_scores(self.policy["criterion"], row, self.policy.get("temperatures")) for row in exit_logits]
        )


def row_scores(criterion, exit_logits, temperatures):
    """Scores of one row (num_exits, num_labels), exit after exit in double precision, as the papers define them."""
    scores, predictions = [], []
    for index, logits in enumerate(exit_logits.astype(np.float64)):
        predictions.append(int(logits.argmax()))
        if criterion == "patience":
            streak = 0
            while streak < index and predictions[index - streak - 1] == predictions[index]:
                streak += 1
            scores.append(streak)
            continue
        if criterion == "vote":
            scores.append(max(predictions.count(label) for label in predictions))
            continue
        logits = logits / (temperatures[index] if temperatures else 1)
        if criterion == "label_confidence":
            probabilities = 1 / (1 + np.exp(-logits))
            scores.append(np.maximum(probabilities, 1 - probabilities).min())
            continue
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        first, second = np.sort(probabilities)[::-1][:2]
        entropy = -(probabilities * np.log(probabilities)).sum() / np.log(len(probabilities))
        scores.append({"confidence": first, "margin": first - second, "entropy": -entropy}[criterion])
    return scores


def exits_at(scores, thresholds):
    """The first exit, 0-based, at which a row's scores (num_exits,) reach the threshold."""
    for index in range(len(thresholds) - 1):
        if scores[index] >= thresholds[index]:
            return index
    return len(thresholds) - 1


def threshold_grid(criterion, scores):
    """Lists of thresholds (num_exits) at which rows exit at different exits, none within rounding of a score."""
    num_exits = scores.shape[1]
    if criterion in ("patience", "vote"):
        return [[count] * num_exits for count in (0, 1, 1.5, 2, 3)]
    ordered = np.sort(scores, 0)
    middles, gaps = (ordered[1:] + ordered[:-1]) / 2, np.diff(ordered, axis=0)
    # Of some rows next to each share of the scores, those that lie furthest apart.
    parts = np.array_split(np.arange(len(gaps)), 5)
    chosen = [[middles[part[gaps[part, k].argmax()], k] for k in range(num_exits)] for part in parts]
    return [[-NEVER] * num_exits, *chosen, [NEVER] * num_exits]


def check_against_pytorch(exported, kind):
    """Every threshold of a grid: rows one by one and in batches exit and answer as in PyTorch's dynamic mode."""
    criterion, taken = exported.policy["criterion"], set()
    rows = make_inputs(kind, 24, seed=3)
    all_logits = exported.exit_logits(rows)
    scores = exported.scores(all_logits)
    for thresholds in threshold_grid(criterion, scores):
        for row in range(24):
            one = {name: tensor[row : row + 1] for name, tensor in rows.items()}
            logits, exit_index = exported.run(one, thresholds)
            wanted = exported.dynamic(one, thresholds)
            assert exit_index.dtype == np.int64 and exit_index.tolist() == wanted.exit_index.tolist()
            np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-4)
            taken.add(int(exit_index[0]))
        for first, size in ((0, 2), (2, 3), (5, 7), (12, 12)):
            part = slice(first, first + size)
            logits, exit_index = exported.run({name: tensor[part] for name, tensor in rows.items()}, thresholds)
            wanted = [exits_at(row, thresholds) for row in scores[part]]
            assert exit_index.tolist() == wanted
            np.testing.assert_allclose(logits, all_logits[np.arange(24)[part], wanted], atol=1e-4)
    assert taken == set(range(exported.model.num_exits))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    model = make_model("bert")
    exit_logits = model(**make_inputs("bert", 24, seed=7), early_exit=False).exit_logits.detach().numpy()
    scores = np.array([row_scores("confidence", row, TEMPERATURES) for row in exit_logits])
    thresholds = threshold_grid("confidence", scores)[3]
    policy = {"criterion": "confidence", "thresholds": thresholds, "temperatures": TEMPERATURES}
    return Exported(tmp_path_factory.mktemp("bert"), model, policy)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    model = make_model("vit", num_hidden_layers=2, exit_aggregation="boosted")
    return Exported(tmp_path_factory.mktemp("vit"), model, {"criterion": "margin", "thresholds": [0.5, 0.0]})


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_answers_and_exits_are_pytorchs(request, kind):
    """Fails if a stage, the boosted sum, a temperature or the decision differs, alone or in a batch."""
    check_against_pytorch(request.getfixturevalue(kind), kind)


CASES = [(kind, criterion) for kind in ("bert", "vit") for criterion in ("entropy", "margin", "patience", "vote")]


@pytest.mark.slow
@pytest.mark.parametrize("kind, criterion", [*CASES, ("vit", "confidence")])
@pytest.mark.parametrize("aggregation", ["none", "boosted"])
def test_every_criterion(tmp_path, kind, criterion, aggregation):
    """Fails if a criterion, or what it remembers of earlier exits, is not what PyTorch computes."""
    policy = {"criterion": criterion, "thresholds": [0.5] * 3, "temperatures": TEMPERATURES}
    exported = Exported(tmp_path, make_model(kind, exit_aggregation=aggregation), policy)
    check_against_pytorch(exported, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_several_labels(tmp_path, kind, caplog):
    """Fails if the graph does not exit by its least confident label, or if exporting prints what nobody asked."""
    policy = {"criterion": "label_confidence", "thresholds": [0.5] * 3, "temperatures": TEMPERATURES}
    exported = Exported(tmp_path, make_model(kind, problem_type="multi_label_classification"), policy)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    check_against_pytorch(exported, kind)


@pytest.mark.slow
def test_regression_exits_by_patience(tmp_path):
    """Fails if the criterion's parameter is lost: exits that move by less than `tolerance` agree."""
    model = make_model("bert", num_labels=1)
    rows = make_inputs("bert", 16, seed=5)
    exits = model(**rows, early_exit=False).exit_logits.detach()[..., 0]
    tolerance = float(exits.diff(dim=1)[:, 0].abs().median()) * 1.01
    policy = {"criterion": "patience", "thresholds": [1, 1, 0], "params": {"tolerance": tolerance}}
    exported, found = Exported(tmp_path, model, policy), []
    for row in range(16):
        one = {name: tensor[row : row + 1] for name, tensor in rows.items()}
        found += exported.run(one)[1].tolist()
    assert found == [1 if abs(row[1] - row[0]) < tolerance else 2 for row in exits.tolist()]
    assert set(found) == {1, 2}


def test_the_policys_thresholds_are_the_default(bert):
    """Fails if a graph that is given no thresholds exits otherwise than the saved policy, or needs more inputs."""
    assert [value.name for value in bert.session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in bert.session.get_outputs()] == ["logits", "exit_index"]
    rows = make_inputs("bert", 24, seed=7)
    found = bert.run(rows)[1].tolist()
    assert found == [exits_at(row, bert.policy["thresholds"]) for row in bert.scores(bert.exit_logits(rows))]
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_any_length_and_batch(bert, length):
    """Fails if the graph keeps the length or batch that it was traced with, or padding changes an answer."""
    for num_rows in (1, 2, 9):
        rows = make_inputs("bert", num_rows, length, seed=length)
        rows["attention_mask"][:, 0] = 1
        wanted = bert.exit_logits(rows)
        for index in range(3):
            logits, exit_index = bert.run(rows, [NEVER] * index + [-NEVER] * (3 - index))
            assert exit_index.tolist() == [index] * num_rows
            np.testing.assert_allclose(logits, wanted[:, index], atol=1e-4)


@pytest.mark.slow
def test_windows_hold_at_any_length(tmp_path):
    """Fails if the graph is traced without the windows of its attention, or attends past them in longer texts."""
    model = make_model("modernbert", local_attention=4, global_attn_every_n_layers=2, pad_token_id=0)
    exported = Exported(tmp_path, model, {"criterion": "confidence", "thresholds": [0.5] * 3})
    for length in (1, 2, 3, 4, 17):
        rows = make_inputs("modernbert", 3, length, seed=length)
        del rows["token_type_ids"]
        rows["attention_mask"][:, 0] = 1
        wanted = exported.exit_logits(rows)
        for index in range(3):
            logits, exit_index = exported.run(rows, [NEVER] * index + [-NEVER] * (3 - index))
            assert exit_index.tolist() == [index] * 3
            np.testing.assert_allclose(logits, wanted[:, index], atol=1e-4)


def test_a_row_of_padding_disturbs_no_other(bert):
    """Fails if a row that is all padding turns into NaN, which never exits early."""
    rows = make_inputs("bert", 4)
    wanted = bert.exit_logits(rows)
    rows["attention_mask"][1] = 0
    logits, exit_index = bert.run(rows, [-NEVER] * 3)
    assert exit_index.tolist() == [0] * 4 and np.isfinite(logits).all()
    np.testing.assert_allclose(logits[[0, 2, 3]], wanted[[0, 2, 3], 0], atol=1e-4)


def test_rows_with_nan_never_exit_early(vit):
    """Fails if a NaN score counts as sure."""
    rows = make_inputs("vit", 3)
    assert vit.run(rows, [-NEVER] * 2)[1].tolist() == [0] * 3
    rows["pixel_values"][1, 0, 5, 5] = float("nan")
    logits, exit_index = vit.run(rows, [-NEVER] * 2)
    assert exit_index.tolist() == [0, 1, 0] and np.isnan(logits[1]).all()
    assert vit.dynamic(rows, [-NEVER] * 2).exit_index.tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_layers_run_for_the_rows_that_need_them(request, kind, tmp_path, monkeypatch):
    """Fails if ONNX Runtime computes a layer for a row that has exited: each has two layer norms, whose rows count."""
    monkeypatch.chdir(tmp_path)
    exported, rng = request.getfixturevalue(kind), np.random.default_rng(0)
    exit_layers, num_exits = exported.model.config.exit_layers, exported.model.num_exits
    rows = make_inputs(kind, 5, seed=2)
    scores = exported.scores(exported.exit_logits(rows))
    batches = [[5] + [0] * (num_exits - 1), [0] * (num_exits - 1) + [5]]
    batches += [np.bincount(rng.integers(num_exits, size=5), minlength=num_exits).tolist() for _ in range(6)]
    for leaving in batches:
        thresholds, left = [], np.arange(5)
        for index, count in enumerate(leaving[:-1]):
            left = left[np.argsort(-scores[left, index])]
            edges = [1.0, *scores[left, index], -1.0]
            thresholds.append((edges[count] + edges[count + 1]) / 2)
            left = left[count:]
        session = exported.start(enable_profiling=True, graph_optimization_level=OFF)
        _, exit_index = exported.run(rows, [*thresholds, 0.0], session)
        assert np.bincount(exit_index, minlength=num_exits).tolist() == leaving
        with open(session.end_profiling()) as file:
            events = [event["args"] for event in json.load(file) if event["name"].endswith("_kernel_time")]
        norms = [event for event in events if event["op_name"] == "LayerNormalization"]
        found = sum(next(iter(event["output_type_shape"][0].values()))[0] for event in norms)
        layers = sum(count * layer for count, layer in zip(leaving, exit_layers, strict=True))
        # BERT has one more in its embeddings, ViT one in the head of every exit.
        more = 5 if kind == "bert" else sum(count * (index + 1) for index, count in enumerate(leaving))
        assert found == 2 * layers + more


def test_weights_are_stored_once(bert):
    """Fails if a branch carries its own copy of the weights."""
    import onnx

    graph = onnx.load(bert.path).graph
    size = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    weights = sum(parameter.numel() for parameter in bert.model.parameters())
    assert size < 1.05 * weights
    branches = [attribute.g for node in graph.node if node.op_type == "If" for attribute in node.attribute]
    assert len(branches) == 4
    constants = [a.t for g in branches for node in g.node if node.op_type == "Constant" for a in node.attribute]
    own = [tensor for g in branches for tensor in g.initializer] + constants
    assert all(np.prod(tensor.dims) < 32 for tensor in own)


def test_metadata_tells_what_was_exported(bert):
    """Fails if labels, exits and policy cannot be read from the file, or paths of the exporting machine can."""
    found = {name: json.loads(v) for name, v in bert.session.get_modelmeta().custom_metadata_map.items()}
    assert found["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    assert found["exit_layers"] == [1, 2, 3] and found["exit_aggregation"] == "none"
    assert {name: found["exit_policy"][name] for name in bert.policy} == bert.policy
    assert b".py" not in bert.path.read_bytes()
    assert sorted(path.name for path in bert.path.parent.iterdir()) == ["model.onnx", "run"]


@pytest.mark.parametrize(
    "kind, aggregation", [("vit", "boosted"), pytest.param("bert", "none", marks=pytest.mark.slow)]
)
def test_all_exits(tmp_path, kind, aggregation):
    """Fails if --no_dynamic needs a policy, or does not give every exit's logits."""
    model = make_model(kind, exit_aggregation=aggregation, num_hidden_layers=2)
    exported = Exported(tmp_path, model, None, "--no_dynamic")
    assert [value.name for value in exported.session.get_outputs()] == ["exit_logits"]
    for num_rows in (1, 6):
        rows = make_inputs(kind, num_rows)
        (found,) = exported.run(rows)
        assert found.shape == (num_rows, 2, 4)
        np.testing.assert_allclose(found, exported.exit_logits(rows), atol=1e-4)


class OtherInGraphs(torch.nn.Linear):
    """Answers otherwise where it is exported."""

    def forward(self, hidden):
        return super().forward(hidden) + 0.01 * torch.compiler.is_exporting()


def test_a_wrong_graph_is_not_written(tmp_path):
    """Fails if the comparison with PyTorch on export lets a graph through whose logits differ."""
    from een_hf.inference.onnx import export_onnx

    model = make_model("vit", num_hidden_layers=1)
    model.classifier.__class__ = OtherInGraphs
    with pytest.raises(ExportError, match="differ from PyTorch's by 0.01"):
        export_onnx(model, tmp_path / "model.onnx", dynamic=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_model_stays_as_it_is(bert):
    """Fails if the export changes the model that it is given: mode, precision or attention."""
    from een_hf.inference.onnx import export_onnx

    model = make_model("vit", num_hidden_layers=1).train().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config._attn_implementation
    with pytest.raises(ExitConfigurationError, match="no exit policy"):
        export_onnx(model, bert.path)
    export_onnx(model, bert.path.parent / "run" / "half.onnx", dynamic=False)
    assert model.training and model.config._attn_implementation == attention
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved models without a policy, with one exit, and without exits."""
    folder = tmp_path_factory.mktemp("models")
    make_model("bert").save_pretrained(folder / "exits")
    single = make_model("bert", num_hidden_layers=1)
    single.set_exit_policy({"criterion": "confidence", "thresholds": [0.5]})
    single.save_pretrained(folder / "single")
    tiny_stock_model().save_pretrained(folder / "stock")
    (folder / "empty").mkdir()
    (folder / "weightless").mkdir()
    (folder / "weightless" / "config.json").write_text((folder / "exits" / "config.json").read_text())
    return folder


BAD = {
    "not .onnx": ("exits", "model.pt", "must end in .onnx"),
    "no folder": ("exits", "nowhere/model.onnx", "nowhere does not exist"),
    "a folder": ("exits", "taken.onnx", "is a folder"),
    "no policy": ("exits", "model.onnx", "een-hf calibrate.*--save.*--no_dynamic"),
    "one exit": ("single", "model.onnx", "one exit.*--no_dynamic"),
    "no exits": ("stock", "model.onnx", "of type 'bert' and has no exits"),
    "no model": ("missing", "model.onnx", "cannot be loaded"),
    "empty folder": ("empty", "model.onnx", "no config.json"),
    "no weights": ("weightless", "model.onnx", "cannot be loaded"),
}


@pytest.mark.parametrize("model, output, message", BAD.values(), ids=BAD)
def test_bad_input(folder, tmp_path, model, output, message):
    """Fails if bad input ends in a traceback, or is not answered with what would be right."""
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        main(["export", str(folder / model), "--output", str(tmp_path / output)])
    assert [path.name for path in tmp_path.iterdir()] == ["taken.onnx"]


@pytest.mark.parametrize("content", [None, b"", b"no graph", "half", "folder"])
def test_a_graph_that_cannot_be_loaded_is_named(bert, tmp_path, content):
    """What breaks: a graph that a full disk cut short ends in ONNX Runtime's own errors."""
    path = tmp_path / "cut.onnx"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        whole = bert.path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ExitConfigurationError, match=f"The graph {path} cannot be loaded: [^\n]*$"):
        load_session(path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    """Fails if a missing package is answered with an ImportError."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match=r'pip install "een_hf\[export\]"'):
        main(["export", "anything", "--output", str(tmp_path / "model.onnx")])


@pytest.mark.slow
def test_onnx_is_imported_only_to_export():
    """Fails if `import een_hf` or the command line itself needs the ONNX packages."""
    program = "import sys, een_hf, een_hf.commands.export; print([m for m in sys.modules if m.startswith('onnx')])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
