"""int8 graphs: what they compute, the policy chosen on their own logits, and what is promised of it."""

import copy
import csv
import json

import numpy as np
import onnx
import pytest
import scipy.stats
import torch
from factory import TOKENS, tiny_model, tiny_processor

from een_hf import ExitConfigurationError, ExitPolicy
from een_hf.commands import main
from een_hf.errors import ExportError
from een_hf.hub import guarantee_in_words
from een_hf.inference.graph_calibration import GraphCalibrator
from een_hf.inference.onnx import export_onnx, load_session
from een_hf.inference.quantization import GraphCalibration
from een_hf.models.policies import NEVER
from een_hf.training.history import write_run


pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NUM_ROWS, LIMIT, SEED = 260, 0.03, 3


class Small:
    """A model, 260 texts, and the int8 graph that the command wrote of them."""

    def __init__(self, folder):
        self.path, rng = folder / "small.onnx", np.random.default_rng(0)
        self.model = tiny_model("bert", seed=1, noise=0.3, num_hidden_layers=2, hidden_size=64, vocab_size=4000)
        self.model.eval()
        # The promise of this policy is the model's and not the graph's.
        guarantee = {"risk": "consistency", "limit": 0.01, "confidence": 0.9, "errors": 0, "num_rows": 9}
        policy = {"criterion": "margin", "thresholds": [0.123, 0.0], "guarantee": guarantee}
        self.model.set_exit_policy(policy)
        self.model.save_pretrained(folder / "run")
        tokenizer = tiny_processor("bert")
        tokenizer.save_pretrained(folder / "run")
        letters = [token for token in TOKENS if len(token) == 1]
        texts = [" ".join(rng.choice(letters, size=rng.integers(1, 12))) for _ in range(NUM_ROWS)]
        with (folder / "texts.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
        flags = f"--quantize int8 --max_risk {LIMIT} --seed {SEED} --max_seq_length 12"
        files = ["--output", str(self.path), "--calibration_file", str(folder / "texts.csv")]
        main(["export", str(folder / "run"), *files, *flags.split()])
        self.rows = [dict(tokenizer(text, truncation=True, max_length=12, return_tensors="pt")) for text in texts]
        self.record = json.loads((folder / "small.onnx.json").read_text())
        self.policy = ExitPolicy.from_dict(self.record["exit_policy"])
        self.session, self.graph = load_session(self.path), onnx.load(self.path).graph

    def run(self, rows, thresholds=None):
        feed = {name: tensor.numpy() for name, tensor in rows.items()}
        return self.session.run(None, feed if thresholds is None else {**feed, "thresholds": np.float32(thresholds)})

    @torch.no_grad()
    def last_exits(self):
        return np.concatenate([self.model(**row, early_exit=False).exit_logits[:, -1] for row in self.rows])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("int8"))


def rounded(values, low, high, lowest, highest):
    """Values on the grid of the integers from `lowest` to `highest`, which reaches from `low` to `high`, and to 0."""
    scale = (high - low) / (highest - lowest)
    zero = (lowest - low / scale).round().clamp(lowest, highest)
    return ((values / scale).round() + zero).clamp(lowest, highest).sub(zero) * scale


class Int8Linear(torch.nn.Linear):
    """Inputs in 8 bits of one scale, weights in 7 bits and a sign, of one scale for each output."""

    def forward(self, inputs):
        inputs = rounded(inputs, inputs.min().clamp(max=0), inputs.max().clamp(min=0), 0, 255)
        largest = self.weight.abs().amax(1, keepdim=True)
        return torch.nn.functional.linear(inputs, rounded(self.weight, -largest, largest, -64, 64), self.bias)


def in_int8(model):
    """The model as the graph should compute it."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Int8Linear
        elif isinstance(module, torch.nn.Embedding):
            weight = module.weight.data
            module.weight.data = rounded(weight, weight.min().clamp(max=0), weight.max().clamp(min=0), 0, 255)
    return model


@torch.no_grad()
def test_logits_are_those_of_dynamic_quantization(small):
    """Fails if a product or an embedding stays in float32, or is rounded more coarsely than int8 has to be."""
    reference = in_int8(type(small.model).from_pretrained(small.path.parent / "run").eval())
    found, wanted, exact = [], [], []
    for row in small.rows[:60]:
        found.append([small.run(row, thresholds)[0][0] for thresholds in ([-NEVER] * 2, [NEVER] * 2)])
        wanted.append(reference(**row, early_exit=False).exit_logits[0].numpy())
        exact.append(small.model(**row, early_exit=False).exit_logits[0].numpy())
    found, wanted, exact = np.array(found), np.array(wanted), np.array(exact)
    # What lies midway between two integers may be rounded either way.
    assert (np.abs(found - wanted).max((1, 2)) < 1e-5).mean() >= 0.9
    assert (np.abs(found - exact).max((1, 2)) > 1e-2).all()


def test_the_guarantee_counts_answers_of_the_written_graph(small):
    """Fails if errors are those of another graph, of other rows, or not against the float32 model."""
    wanted, guarantee = small.last_exits().argmax(-1), small.policy.guarantee
    answered = [small.run(row) for row in small.rows]
    differs = np.array([int(logits.argmax()) for logits, _ in answered]) != wanted
    certifying = np.random.default_rng(SEED).permutation(NUM_ROWS)[52:]
    assert guarantee["num_rows"] == 208 and guarantee["errors"] == differs[certifying].sum()
    assert guarantee["p_value"] == pytest.approx(scipy.stats.binom.cdf(guarantee["errors"], 208, LIMIT))
    assert guarantee["p_value"] <= 0.1
    assert small.record["calibration"]["agreement"] == pytest.approx(1 - differs.mean())
    taken = np.bincount([int(exit_index[0]) for _, exit_index in answered], minlength=2) / NUM_ROWS
    assert small.record["calibration"]["exit_fractions"] == pytest.approx(taken.tolist()) and 0 < taken[0] < 1


def test_thresholds_are_chosen_on_the_logits_of_the_graph(small):
    """Fails if the model's thresholds, or scores without the new temperatures, decide in the graph."""
    forced = [[-NEVER] * 2, [NEVER] * 2]
    exit_logits = np.stack([np.concatenate([small.run(row, t)[0] for row in small.rows]) for t in forced], 1)
    wanted = small.policy.exits_of(torch.from_numpy(exit_logits))
    assert [int(small.run(row)[1][0]) for row in small.rows] == wanted.tolist()
    assert small.policy.thresholds[0] != 0.123 and small.policy.temperatures is not None


def test_default_thresholds_stay_exact(small):
    """Fails if the thresholds, which are gathered as embeddings are, are rounded to 8 bits."""
    (found,) = [onnx.numpy_helper.to_array(t) for t in small.graph.initializer if t.name == "thresholds"]
    assert found.tolist() == np.float32(small.policy.thresholds).tolist()


def test_weights_take_a_quarter_of_the_space(small):
    """Fails if products in the branches stay in float32, as ONNX Runtime leaves them by default."""
    (branch,) = [node for node in small.graph.node if node.op_type == "If"]
    parts, sizes = [small.graph, *(attribute.g for attribute in branch.attribute)], {}
    for tensor in [tensor for part in parts for tensor in part.initializer]:
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    weights = sum(parameter.numel() for parameter in small.model.parameters() if parameter.dim() == 2)
    assert 1.01 * weights > sizes[onnx.TensorProto.INT8] + sizes[onnx.TensorProto.UINT8] >= weights
    assert sizes[onnx.TensorProto.FLOAT] < 0.02 * weights and small.path.stat().st_size < 1.4 * weights
    products = [[node.op_type for node in part.node if "MatMul" in node.op_type] for part in parts]
    # A layer has six and a head of BERT two; keys and values of the attention are no weights.
    products = [(names.count("MatMulInteger"), names.count("MatMul")) for names in products if names]
    assert products == [(8, 2), (8, 2)]


def test_batches_exit_row_by_row(small, tmp_path, monkeypatch):
    """Fails if a batch of any size does not run, or the layers behind run for examples that have exited."""
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    tokens = torch.randint(5, len(TOKENS), (9, 7), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": tokens, "token_type_ids": torch.zeros_like(tokens), "attention_mask": torch.ones_like(tokens)}
    rows["attention_mask"][4:, 5:] = 0
    scores = small.policy.scores(torch.from_numpy(small.run(rows, [-NEVER] * 2)[0])[:, None])[:, 0]
    threshold = float(scores.sort().values[3:5].mean())
    wanted = (scores < threshold).long()
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(small.path), options, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in rows.items()} | {"thresholds": np.float32([threshold, 0.0])}
    logits, exit_index = session.run(None, feed)
    assert logits.shape == (9, 3) and np.isfinite(logits).all()
    assert exit_index.tolist() == wanted.tolist() and exit_index.sum() == 4
    with open(session.end_profiling()) as file:
        events = [event["args"] for event in json.load(file) if event["name"].endswith("_kernel_time")]
    norms = [event for event in events if event["op_name"] == "LayerNormalization"]
    assert [next(iter(event["output_type_shape"][0].values()))[0] for event in norms] == [9, 9, 9, 4, 4]


def test_what_is_written_says_what_it_is_about(small):
    """Fails if a reader of the file, or of the graph's metadata, takes the guarantee for the float32 model's."""
    found = {k: json.loads(v) for k, v in small.session.get_modelmeta().custom_metadata_map.items()}
    assert found["quantize"] == small.record["quantize"] == "int8" and small.record["graph"] == "small.onnx"
    assert found["exit_policy"] == small.record["exit_policy"]
    about = {"quantize": "int8", "reference": "last exit in float32"}
    assert about.items() <= found["exit_policy"]["guarantee"].items()
    assert about.items() <= found["exit_policy"]["calibrated_for"].items()
    assert "the int8 graph answers differently from the last exit in float32" in guarantee_in_words(
        small.policy.guarantee
    )
    plain = {"risk": "consistency", "limit": 0.02, "confidence": 0.9, "errors": 1, "num_rows": 200}
    assert "the policy answers differently from the last exit, with" in guarantee_in_words(plain)


def calibrator_of(small):
    """The rows of the command once more, and what the float32 model answers."""
    rows = [{name: values[0] for name, values in row.items()} for row in small.rows]
    return GraphCalibrator(GraphCalibration(rows, max_risk=LIMIT, seed=SEED), copy.deepcopy(small.model))


def test_a_graph_that_differs_too_often_is_refused(small):
    """Fails if the errors of the written graph are not looked at again."""
    calibrator = calibrator_of(small)
    assert calibrator.measure(small.session, small.policy).policy == small.policy
    calibrator.reference = np.roll(calibrator.reference, 1, axis=1)
    with pytest.raises(ExportError, match="errors in 208 certifying rows, too many to certify a risk of at most 0.03"):
        calibrator.measure(small.session, small.policy)


@pytest.mark.slow
def test_the_policy_is_chosen_on_all_exits_of_the_int8_graph(small, tmp_path):
    """Fails if a policy that cannot be certified is written, which without early exits would differ too."""
    export_onnx(small.model, tmp_path / "all.onnx", dynamic=False, quantize="int8")
    calibrator, session = calibrator_of(small), load_session(tmp_path / "all.onnx")
    assert calibrator.choose(session).thresholds == small.policy.thresholds
    calibrator.reference = np.roll(calibrator.reference, 1, axis=1)
    with pytest.raises(ExportError, match="(?s)too many to certify.*without early exits.*nothing is written"):
        calibrator.choose(session)


@pytest.mark.slow
def test_without_rows_the_models_promise_is_not_kept(small, tmp_path, caplog):
    """Fails if a guarantee of the float32 model goes with an int8 graph, or nobody is told that it does not."""
    from transformers.utils import logging

    logging.get_logger("een_hf").addHandler(caplog.handler)
    assert export_onnx(small.model, tmp_path / "model.onnx", quantize="int8") is None
    logging.get_logger("een_hf").removeHandler(caplog.handler)
    assert "calibrated for the model in its own precision" in caplog.text
    record = json.loads((tmp_path / "model.onnx.json").read_text())
    policy = record["exit_policy"]
    assert policy["guarantee"] is None and "no guarantee holds" in policy["calibrated_for"]["no_guarantee"]
    assert policy["thresholds"] == [0.123, 0.0] and "no guarantee holds" in record["about"]
    # A float32 graph in its place answers as the model: what was said of the int8 graph goes.
    export_onnx(small.model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_images_and_all_exits(tmp_path):
    """Fails if convolutions, which ONNX Runtime cannot run in int8, are quantized, or all exits need a policy."""
    model = tiny_model("vit", noise=0.3, num_hidden_layers=2, hidden_size=64).eval()
    export_onnx(model, tmp_path / "model.onnx", dynamic=False, quantize="int8")
    rows = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    session = load_session(tmp_path / "model.onnx")
    reference, far = in_int8(model), []
    with torch.no_grad():
        for row in rows.unsqueeze(1):
            (found,) = session.run(None, {"pixel_values": row.numpy()})
            far.append(np.abs(found - reference(row, early_exit=False).exit_logits.numpy()).max())
    assert (np.array(far) < 1e-5).mean() >= 0.9


ROWS = {"rows": [{"input_ids": [1, 2, 3]}] * 20}
BAD = {
    "another format": ({"quantize": "int4"}, "'int4' is not one of: int8"),
    "rows for float32": ({"calibration": {"max_risk": 0.1}}, "give --quantize int8"),
    "rows for all exits": ({"quantize": "int8", "dynamic": False, "calibration": {"max_risk": 0.1}}, "--no_dynamic"),
    "no target": ({"quantize": "int8", "calibration": {}}, "either --target_cost or --max_risk"),
    "two targets": ({"quantize": "int8", "calibration": {"max_risk": 0.1, "target_cost": 0.5}}, "give either"),
    "risk": ({"quantize": "int8", "calibration": {"max_risk": 1.5}}, "--max_risk must lie between 0 and 1"),
    "not a number": ({"quantize": "int8", "calibration": {"max_risk": float("nan")}}, "--max_risk must lie"),
    "seed": ({"quantize": "int8", "calibration": {"max_risk": 0.1, "seed": -1}}, "--seed must be a whole number"),
    "few rows": ({"quantize": "int8", "calibration": {"max_risk": 0.1}}, "20 calibration rows are too few.*least 72"),
    "no rows": ({"quantize": "int8", "calibration": {"target_cost": 0.9, "rows": []}}, "no calibration rows"),
    "cost": ({"quantize": "int8", "calibration": {"target_cost": 0.01}}, "--target_cost 0.01 is below the cost"),
    "criterion": (
        {"quantize": "int8", "calibration": {"target_cost": 0.9, "exit_criterion": "label_confidence"}},
        "label_confidence does not fit",
    ),
    "texts": ({"quantize": "int8", "calibration": {"target_cost": 0.9, "rows": ["a"]}}, "give tokenizer="),
}


@pytest.mark.parametrize("settings, message", BAD.values(), ids=BAD)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, settings, message):
    """Fails if a setting that cannot work is found out after minutes of export."""
    monkeypatch.setattr(torch.onnx, "export", None)
    settings = dict(settings)
    with pytest.raises(ExitConfigurationError, match=f"(?s){message}"):
        if "calibration" in settings:
            settings["calibration"] = GraphCalibration(**{**ROWS, **settings["calibration"]})
        export_onnx(tiny_model("bert").eval(), tmp_path / "model.onnx", **settings)
    assert list(tmp_path.iterdir()) == []


def test_numbers_have_no_risk_that_is_counted(tmp_path):
    """Fails if a regression is exported first, and told afterwards that it has no classes."""
    rows = GraphCalibration(**ROWS, max_risk=0.1)
    with pytest.raises(ExitConfigurationError, match="counts classes and does not fit regression"):
        export_onnx(
            tiny_model("bert", num_labels=1).eval(), tmp_path / "model.onnx", quantize="int8", calibration=rows
        )


FLAGS = {
    "a risk without rows": ("--quantize int8 --max_risk 0.1", "give --calibration_file too"),
    "rows for float32": ("--calibration_file {0}/texts.csv --max_risk 0.1", "give --quantize int8"),
    "few rows": (
        "--quantize int8 --max_risk 0.1 --risk_confidence 0.8 --calibration_file {0}/texts.csv",
        "9 calibration rows are too few: --max_risk 0.1 with --risk_confidence 0.8 takes",
    ),
    "no such file": ("--quantize int8 --max_risk 0.1 --calibration_file {0}/nowhere.csv", "nowhere.csv"),
    "rows it knows": ("--quantize int8 --max_risk 0.1 --calibration_file {0}/known.csv", "trained on these rows"),
    "images in text": (
        "--quantize int8 --max_risk 0.1 --calibration_file {0}/texts.csv --skip_corrupt",
        "--skip_corrupt skips images: it belongs to --calibration_file",
    ),
}


@pytest.mark.parametrize("flags, message", FLAGS.values(), ids=FLAGS)
def test_bad_flags(tmp_path, flags, message):
    """Fails if flags that do not go together end in a traceback, or in a file."""
    model = tiny_model("bert").eval()
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.5, 0.5, 0.0]})
    model.save_pretrained(tmp_path / "run")
    tiny_processor("bert").save_pretrained(tmp_path / "run")
    write_run(tmp_path / "run", {"train_file": str(tmp_path / "known.csv")}, trained=True, finished=True, history=[])
    for name in ("texts", "known"):
        (tmp_path / f"{name}.csv").write_text("text\n" + "a b c\n" * 9)
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        main(["export", str(tmp_path / "run"), "--output", f"{tmp_path}/x.onnx", *flags.format(tmp_path).split()])
    assert not list(tmp_path.glob("*.onnx*"))
