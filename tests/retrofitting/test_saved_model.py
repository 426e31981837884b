"""The saved model: exit K is the user's own, and the certificate is true of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration.samples import make_rows
from PIL import Image
from retrofitting.running import EXIT_CLASSES, MODEL_CLASSES, NUM_ROWS, words_of
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from een_hf.calibration import calibrate
from een_hf.commands import main
from een_hf.evaluation import ExitCosts, load_exit_logits
from een_hf.models import EarlyExitBertForSequenceClassification
from een_hf.retrofitting.arguments import RetrofitArguments
from een_hf.retrofitting.certify import certify


@pytest.fixture(scope="module", params=["bert", "vit"])
def finished(request, sources, tmp_path_factory):
    """Kind, source and output folder of a finished retrofit."""
    out = tmp_path_factory.mktemp("finished") / "cheaper"
    main(words_of(sources[request.param], out, num_train_epochs=20, speed_samples=16))
    return request.param, sources[request.param], out


def inputs_of(kind, source, rows):
    """The inputs of some rows, one by one, made without the command's own loading."""
    folder, _, path = source
    if kind == "bert":
        lines = Path(path).read_text().splitlines()[1:]
        return [AutoTokenizer.from_pretrained(folder)(lines[row], return_tensors="pt") for row in rows]
    processor = AutoImageProcessor.from_pretrained(folder)
    return [processor(Image.open(f"{path}/{row:03d}.png"), return_tensors="pt") for row in rows]


def load_aligned(model_class, folder):
    """A model in eval mode in memory of its own: rounding depends on where in its file a mapped weight starts."""
    model = model_class.from_pretrained(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def test_rows_that_it_was_trained_on_certify_nothing(finished, tmp_path):
    """Fails if a model is promised to agree on new rows because it does on those that its exits learned from."""
    _, source, out = finished
    assert json.loads((out / "config.json").read_text())["training_scheme"] == "retrofit"
    with pytest.raises(SystemExit, match=f"{source[2]}: MODEL was trained on these rows"):
        main(words_of((str(out), *source[1:]), tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_the_last_exit_is_the_stock_model(finished):
    """Fails if a weight of the user's model moves, or exit K's answers differ from its own by one bit."""
    kind, source, out = finished
    stock, model = load_aligned(MODEL_CLASSES[kind], source[0]), load_aligned(EXIT_CLASSES[kind], out)
    kept = model.state_dict()
    for name, wanted in stock.state_dict().items():
        assert torch.equal(kept[name], wanted), name
    with torch.no_grad():
        for inputs in inputs_of(kind, source, range(10)):
            assert torch.equal(model(**inputs, early_exit=False).exit_logits[:, -1], stock(**inputs).logits)


def test_cached_features_give_the_models_own_logits(finished):
    """Fails if what is cached is not what the heads read, or if calibration used other rows or logits."""
    kind, source, out = finished
    model, saved = EXIT_CLASSES[kind].from_pretrained(out).eval(), load_exit_logits(out)
    with torch.no_grad():
        wanted = [
            model(**inputs, early_exit=False).exit_logits for inputs in inputs_of(kind, source, saved["row_ids"])
        ]
    np.testing.assert_allclose(saved["logits"], torch.cat(wanted).numpy(), atol=2e-5)


def test_exits_that_read_all_patches(sources, tmp_path, rows_read):
    """What breaks: what is cached is of another size than the pooled hidden states, and the features of another head
    are taken for it."""
    main(words_of(sources["vit"], tmp_path))
    rows_read()
    for wanted_rows in (NUM_ROWS, 0):
        main(words_of(sources["vit"], tmp_path, exit_head="attention"))
        assert rows_read() == wanted_rows
    test_cached_features_give_the_models_own_logits(("vit", sources["vit"], tmp_path))


def test_the_certificate_is_that_of_the_saved_model(finished):
    """Fails if the policy in the folder is certified on other rows or logits than those of the saved model."""
    kind, source, out = finished
    model, record = EXIT_CLASSES[kind].from_pretrained(out).eval(), json.loads((out / "retrofit.json").read_text())
    rows = load_exit_logits(out)["row_ids"]
    with torch.no_grad():
        logits = [model(**inputs, early_exit=False).exit_logits for inputs in inputs_of(kind, source, rows)]
    report = calibrate(
        torch.cat(logits),
        None,
        ExitCosts(**record["exit_costs"]),
        max_risk=0.3,
        risk="consistency",
        risk_confidence=0.9,
        seed=42,
    )
    assert report.policy.guarantee == model.config.exit_policy["guarantee"] == record["policy"]["guarantee"]
    assert report.relative_cost == pytest.approx(record["relative_cost"])
    np.testing.assert_allclose(report.policy.thresholds, model.config.exit_policy["thresholds"], rtol=1e-4)
    assert len(rows) == record["num_calibration_rows"] == round(NUM_ROWS / 3)
    assert record["num_training_rows"] == NUM_ROWS - len(rows)


def test_a_policy_that_saves_nothing_is_not_kept(tmp_path):
    """What breaks: where exits take more time than the layers after them, the model is called cheaper than itself."""
    logits, args = make_rows(400)[0], RetrofitArguments(model="mine", output_dir=tmp_path, max_risk=0.2)
    dear, cheap = ExitCosts([1.1, 1.1, 1.1, 1.0], [0.2, 0.2, 0.2, 0.0]), ExitCosts([0.25, 0.5, 0.75, 1.0])
    report = certify(logits, dear, args)
    assert report.policy is None and "costs 1.000 of your model's cost" in report.message
    assert certify(logits, cheap, args).policy is not None


def test_time_may_be_what_a_policy_saves(sources, tmp_path, capsys):
    """Fails if `--cost latency` certifies by other costs than it writes, or does not say what it measured."""
    main(words_of(sources["bert"], tmp_path / "out", cost="latency", latency_batch_size="2", max_risk="0.3"))
    record = json.loads((tmp_path / "out" / "retrofit.json").read_text())
    assert record["cost_unit"] == "latency" and record["latency"]["batch_size"] == 2
    assert record["latency"]["device"] and record["latency"]["milliseconds"] > 0
    costs, logits = ExitCosts(**record["exit_costs"]), load_exit_logits(tmp_path / "out")["logits"]
    assert [*costs] == record["relative_costs"] and costs.alone[-1] == 1.0
    report = calibrate(logits, None, costs, max_risk=0.3, seed=42)
    if record["policy"] is None:  # exits of so small a model may take more time than they save
        assert report.relative_cost >= 1
    else:
        assert record["relative_cost"] == pytest.approx(report.relative_cost) and report.relative_cost < 1
        assert record["policy"]["thresholds"] == pytest.approx(report.policy.thresholds)
        assert "less time, measured" in capsys.readouterr().out


def test_certified_rows_agree_as_often_as_said(finished):
    """Fails if the errors in the guarantee are not the rows on which the dynamic model differs from the stock one."""
    kind, source, out = finished
    auto_class = AutoModelForSequenceClassification if kind == "bert" else AutoModelForImageClassification
    model, stock = auto_class.from_pretrained(out).eval(), MODEL_CLASSES[kind].from_pretrained(source[0]).eval()
    rows = load_exit_logits(out)["row_ids"]
    guarantee = model.config.exit_policy["guarantee"]
    certify = np.random.default_rng(42).permutation(len(rows))[50:]
    differing = 0
    with torch.no_grad():
        for inputs in inputs_of(kind, source, rows[certify]):
            answers = model(**inputs)
            assert answers.exit_index is not None
            differing += int(answers.logits.argmax() != stock(**inputs).logits.argmax())
    assert guarantee["num_rows"] == len(certify) and guarantee["errors"] == differing


def test_the_folder_is_complete(finished):
    """Fails if the saved folder lacks the tokenizer or image processor, or the record lacks the measured times."""
    kind, source, out = finished
    load = AutoTokenizer if kind == "bert" else AutoImageProcessor
    assert type(load.from_pretrained(out)) is type(load.from_pretrained(source[0]))
    record = json.loads((out / "retrofit.json").read_text())
    wanted = {"bert": ["stock pipeline", "exits off", "exits on"], "vit": ["stock model", "exits on"]}[kind]
    assert list(record["seconds"]) == wanted and all(seconds > 0 for seconds in record["seconds"].values())


def test_a_risk_that_is_not_met_says_so(sources, tmp_path, capsys):
    """Fails if a model is saved with a policy, or praised, that could not be certified."""
    main(words_of(sources["bert"], tmp_path, max_risk=0.02, calibration_share=0.82, head_learning_rate=1e-9))
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("No saving, the answers are those of your model: No early exit")
    )
    assert EarlyExitBertForSequenceClassification.from_pretrained(tmp_path).config.exit_policy is None
