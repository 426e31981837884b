"""`een-hf retrofit`: what it prints and refuses, and that Python does the same."""

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
from datasets import Dataset, load_dataset
from factory import TOKENS, tiny_processor, tiny_stock_model
from retrofitting.running import CHUNK, EXIT_CLASSES, MODEL_CLASSES, NUM_ROWS, chunks, weights, words_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import een_hf
from een_hf.calibration import CalibrationReport
from een_hf.commands import main, retrofit
from een_hf.inference import predict
from een_hf.models import EarlyExitBertForSequenceClassification, ExitPolicy
from een_hf.retrofitting import RetrofitReport


def test_the_installed_sample_is_found_by_its_name(sources, minilm_path, tmp_path):
    """Breaks if `minilm` is looked for on the Hub here, while the scripts know it."""
    with pytest.raises(SystemExit, match="MODEL minilm has no classifier"):
        main(words_of(("minilm", *sources["bert"][1:]), tmp_path / "out"))


def report_of(policy=True, message="", seconds=None):
    policy = ExitPolicy("confidence", [0.5, 0.5], guarantee={"limit": 0.02, "confidence": 0.9}) if policy else None
    found = CalibrationReport(policy, relative_cost=0.4, score=0.9, exit_fractions=[0.5, 0.5], message=message)
    return RetrofitReport(None, None, found, None, None, 1, [0], [], seconds or {})


def test_the_summary():
    """Fails if agreement, confidence or a ratio is printed upside down."""
    start = "Agrees with your model on at least 98 % (confidence 90 %); 2.50 x less compute"
    assert (
        report_of(seconds={"stock model": 3.0, "exits on": 2.0}).summary
        == start + ", 1.50 x less time on this machine"
    )
    assert report_of().summary == start and repr(report_of()) == f"RetrofitReport({start})"
    assert "too many" in report_of(policy=False, message="too many errors").summary


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_python_does_what_the_command_does(kind, sources, tmp_path):
    """Fails if the function, given the rows themselves and the command's flags as keywords, makes another model."""
    folder, _, path = sources[kind]
    main(words_of(sources[kind], tmp_path / "command", num_train_epochs=3))
    if kind == "bert":
        rows = Path(path).read_text().splitlines()[1:]
    else:
        images = {"image": sorted(map(str, Path(path).glob("*.png"))), "label": [0] * NUM_ROWS}
        rows = Dataset.from_dict(images).cast_column("image", datasets.Image())
    settings = {"max_risk": 0.3, "num_train_epochs": 3, "chunk_size": CHUNK, "batch_size": 8, "speed_samples": 0}
    report = een_hf.retrofit(folder, rows, output_dir=tmp_path / "python", **settings)
    assert weights(tmp_path / "python") == weights(tmp_path / "command")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("python", "command")]
    assert configs[0] == configs[1]
    record = json.loads((tmp_path / "command" / "retrofit.json").read_text())
    assert report.relative_cost == record["relative_cost"] and report.message == record["message"]
    assert (report.policy and report.policy.to_dict()) == record["policy"]


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_loaded_model_is_as_good_as_its_folder(kind, sources, tmp_path):
    """Fails if the weights in memory are not those that get exits, or if the given model changes."""
    folder, flag, path = sources[kind]
    main(words_of(sources[kind], tmp_path / "command"))
    model = MODEL_CLASSES[kind].from_pretrained(folder).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"max_risk": 0.3, "num_train_epochs": 2, "chunk_size": CHUNK, "batch_size": 8, "speed_samples": 0}
    settings[flag[2:]] = path
    een_hf.retrofit(model, output_dir=tmp_path / "loaded", **settings)
    loaded, wanted = (EXIT_CLASSES[kind].from_pretrained(tmp_path / name) for name in ("loaded", "command"))
    assert all(wanted.state_dict()[name].equal(tensor) for name, tensor in loaded.state_dict().items())
    assert loaded.config.to_dict() | {"_name_or_path": "command"} == wanted.config.to_dict()
    assert model.training and type(model) is MODEL_CLASSES[kind]
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())

    with torch.no_grad():
        model.classifier.weight.neg_()
    report = een_hf.retrofit(model, output_dir=tmp_path / "changed", **settings)
    assert report.model.classifier.weight.equal(model.classifier.weight)
    assert report.model.classifier.weight.data_ptr() != model.classifier.weight.data_ptr()


def test_a_model_that_came_from_nowhere_needs_its_processor(sources, tmp_path):
    """Fails if the name of a class is looked for on the Hub, or no message says what to give."""
    model = tiny_stock_model("bert", seed=1, noise=0.3, vocab_size=len(TOKENS))
    texts = Path(sources["bert"][2]).read_text().splitlines()[1:]
    settings = {"output_dir": tmp_path / "out", "max_risk": 0.3, "num_train_epochs": 1, "speed_samples": 0}
    with pytest.raises(een_hf.ExitConfigurationError, match="processing_class"):
        een_hf.retrofit(model, texts, **settings)
    with pytest.raises(een_hf.ExitConfigurationError, match="MODEL is a Linear: give a folder, a Hub name"):
        een_hf.retrofit(torch.nn.Linear(2, 2), texts, **settings)
    assert not (tmp_path / "out").exists()
    report = een_hf.retrofit(model, texts, processing_class=tiny_processor("bert"), **settings)
    assert torch.equal(report.model.classifier.weight, model.classifier.weight)


def test_python_refuses_rows_of_two_sources(sources, tmp_path):
    """Fails if one of two sources is taken without a message, or a folder is made for nothing."""
    folder, flag, path = sources["bert"]
    for rows, source in ((["a text"], {"train_file": path}), (None, {})):
        with pytest.raises(een_hf.ExitConfigurationError, match="Give the rows"):
            een_hf.retrofit(folder, rows, output_dir=tmp_path / "out", **source)
    assert not (tmp_path / "out").exists()


def test_help_says_what_every_flag_is():
    """Fails if a flag has no help, or `--help` cannot be printed."""
    parser = argparse.ArgumentParser()
    retrofit.add_arguments(parser)
    assert all(action.help for action in parser._actions)
    with pytest.raises(SystemExit) as ended:
        main(["retrofit", "--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"max_risk": 0.02, "max_train_samples": 190}, "190 rows are too few.*164"),
        ({"max_risk": 1.5}, "--max_risk"),
        ({"risk_confidence": 0}, "--risk_confidence"),
        ({"exit_criterion": "surest"}, "surest"),
        ({"exit_layers": 9}, "exit_layers.*9"),
        ({"exit_layers": 3}, "only the last"),
        ({"calibration_share": 1.5}, "--calibration_share"),
        ({"calibration_share": 0.1}, "too few"),
        ({"batch_size": 0}, "--batch_size"),
        ({"head_learning_rate": 0}, "--head_learning_rate"),
        ({"head_learning_rate": "inf"}, "--head_learning_rate"),
        ({"seed": -1}, "--seed must be a whole number, at least 0 and below 2.*32, not -1"),
        ({"seed": 2**32}, "--seed"),
        ({"max_risk": 1e-300}, "200 rows are too few"),
        ({"text_column_names": "text,text"}, "names 'text' twice"),
        ({"output_dir": ""}, "--output_dir"),
        ({"output_dir": "x" * 300}, "--output_dir x*: OSError.*too long"),
        ({"train_file": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"train_file": "texts.txt"}, "must end in"),
        ({"text_column_names": "body"}, "no column 'body'"),
        ({"tokenizer_name": "nowhere/at/all"}, "tokenizer"),
        ({"train_dir": "images"}, "either --train_file"),
        ({"skip_corrupt": None}, "--skip_corrupt.*belongs to --train_dir"),
    ],
)
def test_bad_flags(sources, tmp_path, flags, named):
    """Fails if bad input ends in a traceback, in work, or in a message that does not say what would be right."""
    with pytest.raises(SystemExit, match=named):
        main(words_of(sources["bert"], tmp_path, **flags))
    assert not chunks(tmp_path)


def _change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder, config: None, "cannot be loaded"),
        (lambda folder, config: BertModel(config).save_pretrained(folder), "no classifier.*BertModel"),
        (lambda folder, config: BertForTokenClassification(config).save_pretrained(folder), "no classifier.*Token"),
        (
            lambda folder, config: BertForMultipleChoice(config).save_pretrained(folder),
            "no classifier.*MultipleChoice",
        ),
        (lambda folder, config: _change_type(folder, config), "of type 'gpt2'; supported types: bert, .*vit.*'Add an"),
        (lambda folder, config: _save_regression(folder, config), "regression"),
        (lambda folder, config: _save_multi_label(folder, config), "multi_label"),
        (lambda folder, config: _change_weights(folder, config, layer=1), "lacks weights, for example bert.encoder"),
        (lambda folder, config: _change_weights(folder, config, head_size=5), "cannot be loaded: weights have other"),
        (
            lambda folder, config: _change_weights(folder, config, torn=True),
            "cannot be loaded: The weights of .*model",
        ),
        (lambda folder, config: BertForSequenceClassification(config).save_pretrained(folder), "holds no tokenizer"),
    ],
)
def test_models_that_cannot_be_retrofitted(sources, tmp_path, make, named):
    """Fails if a model without a head, of another kind or for another problem gets past the start."""
    folder = tmp_path / "model"
    make(folder, BertConfig.from_pretrained(sources["bert"][0]))
    with pytest.raises(SystemExit, match=named):
        main(words_of((str(folder), *sources["bert"][1:]), tmp_path / "out"))


def test_answers_that_are_not_finite_are_no_lesson(sources, tmp_path):
    """Fails if exits are trained on NaN, or on what float16 made of large numbers, and certified by rows of them."""
    folder = tmp_path / "model"
    _change_weights(folder, BertConfig.from_pretrained(sources["bert"][0]), head_value=np.nan)
    flags = {"tokenizer_name": sources["bert"][0], "exit_layers": "1"}
    with pytest.raises(SystemExit, match=r"MODEL .*model answers with NaN.* row 0 \(counted from 0\)"):
        main(words_of((str(folder), *sources["bert"][1:]), tmp_path / "out", **flags))
    _change_weights(folder, BertConfig.from_pretrained(sources["bert"][0]), norm_value=1e6)
    with pytest.raises(SystemExit, match="--feature_dtype float16 cannot store.*float32.*row 0 "):
        main(words_of((str(folder), *sources["bert"][1:]), tmp_path / "out", feature_dtype="float16", **flags))


def test_exits_whose_training_diverges_are_not_saved(sources, tmp_path):
    """What breaks: heads of NaN are saved as the result of a successful run."""
    with pytest.raises(SystemExit, match="^error: The loss of the early exits is not finite.*--head_learning_rate"):
        main(words_of(sources["bert"], tmp_path, head_learning_rate=1e30))
    assert not (tmp_path / "config.json").exists()


def test_a_run_that_fails_leaves_no_policy_beside_other_weights(sources, tmp_path):
    """What breaks: the folder of an earlier run has new heads and a certificate that is not theirs."""
    main(words_of(sources["bert"], tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["exit_policy"] is not None
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(BaseException, match="(?i)directory"):
        main(words_of(sources["bert"], tmp_path, num_train_epochs=3))
    assert json.loads((tmp_path / "config.json").read_text())["exit_policy"] is None


def _change_type(folder, config):
    BertForSequenceClassification(config).save_pretrained(folder)
    _change_config(folder, model_type="gpt2")


def _change_weights(folder, config, layer=None, head_size=None, head_value=0.0, norm_value=None, torn=False):
    """A classifier without a layer, with weights of another size or value, or cut short by a copy."""
    BertForSequenceClassification(config).save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if f"layer.{layer}." not in name}
    weights["classifier.weight"] = torch.full((head_size or config.num_labels, config.hidden_size), head_value)
    if norm_value is not None:
        weights["bert.encoder.layer.0.output.LayerNorm.weight"] = torch.full((config.hidden_size,), norm_value)
    save_file(weights, path, {"format": "pt"})
    if torn:
        path.write_bytes(path.read_bytes()[:-100])


def _save_regression(folder, config):
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(folder)


def _save_multi_label(folder, config):
    config.problem_type = "multi_label_classification"
    BertForSequenceClassification(config).save_pretrained(folder)


def test_folders_that_are_taken(sources, tmp_path):
    """Fails if the user's model, or another model, is overwritten."""
    with pytest.raises(SystemExit, match="model's own folder"):
        main(words_of(sources["bert"], sources["bert"][0]))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="another origin"):
        main(words_of(sources["bert"], tmp_path))
    with pytest.raises(SystemExit, match="reads text: give --train_file"):
        main(words_of((sources["bert"][0], *sources["vit"][1:]), tmp_path / "out"))
    with pytest.raises(SystemExit, match="holds no image files"):
        main(words_of((*sources["vit"][:2], str(tmp_path)), tmp_path / "out"))


@pytest.mark.slow
def test_a_minilm_fine_tuned_on_sst2(shared_dir, minilm_path, tmp_path, capsys):
    """Fails if a real fine-tuned model, retrofitted without labels, is not certified or not a third cheaper."""
    train = load_dataset("parquet", data_files=str(shared_dir / "data/glue/sst2/train-*.parquet"), split="train")
    train = train.shuffle(seed=0)
    labelled, unlabelled, unseen = (
        train.select(range(start, stop)) for start, stop in ((0, 2000), (2000, 14000), (14000, 15000))
    )
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    encoded = labelled.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)
    set_seed(0)
    model = BertForSequenceClassification.from_pretrained(minilm_path, num_labels=2)
    settings = {"num_train_epochs": 2, "learning_rate": 1e-4, "per_device_train_batch_size": 16}
    args = TrainingArguments(str(tmp_path / "training"), **settings, save_strategy="no", disable_tqdm=True)
    Trainer(model=model, args=args, train_dataset=encoded, processing_class=tokenizer).train()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    unlabelled.select_columns("sentence").to_csv(tmp_path / "texts.csv")
    source = (str(tmp_path / "model"), "--train_file", str(tmp_path / "texts.csv"))
    capsys.readouterr()
    main(["retrofit", *source, "--output_dir", str(tmp_path / "cheaper"), "--max_risk", "0.02"])
    print(capsys.readouterr().out)
    cheaper, record = tmp_path / "cheaper", json.loads((tmp_path / "cheaper/retrofit.json").read_text())
    assert record["policy"]["guarantee"]["confidence"] == 0.9
    assert record["relative_cost"] < 2 / 3

    # Other rows, more than certified: the share that differs stays within what chance allows beyond the limit.
    rows = [tokenizer(text, truncation=True, max_length=128) for text in unseen["sentence"]]
    dynamic = predict(EarlyExitBertForSequenceClassification.from_pretrained(cheaper), rows).logits.argmax(-1)
    full = EarlyExitBertForSequenceClassification.from_pretrained(cheaper, exit_policy=None)
    differing = int((dynamic != predict(full, rows).logits.argmax(-1)).sum())
    print(f"{differing} of 1000 unseen rows differ; record: {record['relative_cost']:.3f}, {record['seconds']}")
    assert scipy.stats.binom.sf(differing - 1, 1000, 0.02) > 1e-3


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_loaded_model_with_exits_gets_others(kind, sources, tmp_path):
    """Fails if only stock models can be given as objects, or if the exits of before stay."""
    folder, flag, path = sources[kind]
    model = EXIT_CLASSES[kind].from_pretrained(folder, exit_layers=[1])
    settings = {"max_risk": 0.3, "num_train_epochs": 1, "chunk_size": CHUNK, "speed_samples": 0, flag[2:]: path}
    report = een_hf.retrofit(model, output_dir=tmp_path, exit_layers=[2], **settings)
    assert report.model.config.exit_layers == [2, model.config.num_hidden_layers]
    assert model.config.exit_layers[0] == 1
    assert report.model.classifier.weight.equal(model.classifier.weight)
