"""`een-hf retrofit`: exits on a fine-tuned model without labels, from one pass of the model over the rows."""

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

import een_hf
from een_hf.calibration import CalibrationReport, calibrate
from een_hf.commands import main, retrofit
from een_hf.evaluation import ExitCosts, load_exit_logits
from een_hf.inference import predict
from een_hf.models import EarlyExitBertForSequenceClassification, EarlyExitViTForImageClassification, ExitPolicy
from een_hf.retrofitting import RetrofitReport
from een_hf.training.frozen_heads import train_heads


NUM_ROWS, NUM_LABELS, CHUNK = 200, 3, 32
SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
MODEL_CLASSES = {"bert": BertForSequenceClassification, "vit": ViTForImageClassification}
EXIT_CLASSES = {"bert": EarlyExitBertForSequenceClassification, "vit": EarlyExitViTForImageClassification}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Kind to (folder of a stock classifier with its processor, the flag and the path of unlabelled rows)."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    words = [f"word{index}" for index in range(40)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    lines = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(NUM_ROWS)]
    (folder / "texts.csv").write_text("\n".join(["text", *lines]))
    (folder / "images").mkdir()
    for index in range(NUM_ROWS):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"images/{index:03d}.png")

    torch.manual_seed(0)
    bert = BertConfig(**SHAPE, vocab_size=len(vocabulary), max_position_embeddings=32, num_labels=NUM_LABELS)
    vit = ViTConfig(**SHAPE, image_size=16, patch_size=8, num_labels=NUM_LABELS)
    for kind, config in (("bert", bert), ("vit", vit)):
        model = MODEL_CLASSES[kind](config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.15)
        model.save_pretrained(folder / kind)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder / "bert")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    rows = {"bert": ["--train_file", f"{folder}/texts.csv"], "vit": ["--train_dir", f"{folder}/images"]}
    return {kind: (str(folder / kind), *rows[kind]) for kind in rows}


def words_of(source, out, **flags):
    """The command; a flag of None stands alone."""
    settings = {"max_risk": 0.3, "num_train_epochs": 2, "chunk_size": CHUNK, "batch_size": 8, "speed_samples": 0}
    settings |= {"output_dir": out, **flags}
    words = [word for name, value in settings.items() for word in (f"--{name}", value) if word is not None]
    return ["retrofit", *source, *map(str, words)]


@pytest.fixture(scope="module", params=["bert", "vit"])
def finished(request, sources, tmp_path_factory):
    """Kind, source and output folder of a finished retrofit."""
    out = tmp_path_factory.mktemp("finished") / "cheaper"
    main(words_of(sources[request.param], out, num_train_epochs=20, speed_samples=16))
    return request.param, sources[request.param], out


@pytest.fixture
def rows_read():
    """Grows by the rows of every batch that goes through the first layer of a model with real tensors."""
    counts, layers = [], {}

    def hook(module, inputs):
        if type(module).__name__ in ("BertLayer", "ViTLayer") and inputs[0].device.type != "meta":
            layers.setdefault("first", module)
            if module is layers["first"]:
                counts.append(len(inputs[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    yield lambda: (sum(counts), counts.clear(), layers.clear())[0]
    handle.remove()


@pytest.mark.parametrize("columns", ["Text,Category", "Text,Category,label"])
def test_two_columns_of_text_must_be_named(columns, sources, tmp_path, capsys):
    """Breaks if the labels of a file are read as second sentences, and agreement with that is certified."""
    folder, flag, path = sources["bert"]
    texts, extra = Path(path).read_text().splitlines()[1:], "".join(",0" for _ in columns.split(",")[2:])
    table = tmp_path / "own.csv"
    table.write_text(f"{columns}\n" + "".join(f"{text},word1{extra}\n" for text in texts))
    message = "two columns of text, Text and Category, .*--text_column_names"
    if "label" not in columns:
        message = "2 columns of text.*--text_column_names"
    with pytest.raises(SystemExit, match=message):
        main(words_of((folder, flag, str(table)), tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))
    main(words_of((folder, flag, str(table)), tmp_path / "out", text_column_names="Text"))
    assert "Columns read: Text\n" in capsys.readouterr().out
    main(words_of(sources["bert"], tmp_path / "same"))
    assert "Columns read: text\n" in capsys.readouterr().out
    first, second = (load_exit_logits(tmp_path / name)["logits"] for name in ("out", "same"))
    np.testing.assert_array_equal(first, second)


def test_empty_texts_are_left_out(sources, tmp_path):
    folder, flag, path = sources["bert"]
    texts = Path(path).read_text().splitlines()[1:]
    table = tmp_path / "gaps.jsonl"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts, " "]))
    with pytest.raises(SystemExit, match="2 such rows of 202.*--skip_empty"):
        main(words_of((folder, flag, str(table)), tmp_path / "out"))
    main(words_of((folder, flag, str(table)), tmp_path / "out", skip_empty=None))
    main(words_of(sources["bert"], tmp_path / "same"))
    first, second = (load_exit_logits(tmp_path / name)["logits"] for name in ("out", "same"))
    np.testing.assert_array_equal(first, second)


def test_the_installed_sample_is_found_by_its_name(sources, minilm_path, tmp_path):
    """Breaks if `minilm` is looked for on the Hub here, while the scripts know it."""
    with pytest.raises(SystemExit, match="MODEL minilm has no classifier"):
        main(words_of(("minilm", *sources["bert"][1:]), tmp_path / "out"))


def chunks(out):
    return sorted(out.glob("features/*/chunk-*.npz"))


def weights(out):
    return (out / "model.safetensors").read_bytes()


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


def test_every_row_is_read_once(sources, tmp_path, rows_read):
    """Fails if the model reads a row twice, or again for another risk, criterion or training of the exits."""
    main(words_of(sources["bert"], tmp_path / "out"))
    assert rows_read() == NUM_ROWS
    first = weights(tmp_path / "out")
    flags = {"max_risk": 0.25, "exit_criterion": "entropy", "num_train_epochs": 3, "risk_confidence": 0.8, "seed": 1}
    main(words_of(sources["bert"], tmp_path / "out", **flags))
    assert rows_read() == 0
    assert weights(tmp_path / "out") != first


def test_other_features_are_not_reused(sources, tmp_path, rows_read):
    """Fails if features of other exits, pooling, lengths or texts are taken for those that were asked for."""
    folder, flag, path = sources["bert"]
    lines = Path(path).read_text().splitlines()
    changed = tmp_path / "texts.csv"
    changed.write_text("\n".join([*lines[:-1], "word1 word2"]))
    for flags in (
        {},
        {"exit_layers": "2"},
        {"exit_pooling": "cls"},
        {"max_seq_length": 5},
        {"feature_dtype": "float16"},
    ):
        main(words_of(sources["bert"], tmp_path / "out", **flags))
        assert rows_read() == NUM_ROWS
    main(words_of((folder, flag, str(changed)), tmp_path / "out"))
    assert rows_read() == NUM_ROWS
    model = BertForSequenceClassification.from_pretrained(folder)
    model.classifier.bias.data += 0.5
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
    main(words_of((str(tmp_path / "model"), flag, path), tmp_path / "out"))
    assert rows_read() == NUM_ROWS


KILLED = """
import os, signal, sys
import torch
from een_hf.commands import main

seen = []

def hook(module, inputs):
    if type(module).__name__ == "BertLayer":
        seen.append(len(inputs[0]))
        if sum(seen) > 3 * 100:
            os.kill(os.getpid(), signal.SIGKILL)

torch.nn.modules.module.register_module_forward_pre_hook(hook)
main(sys.argv[1:])
"""


def test_a_kill_loses_the_chunk_in_work(sources, tmp_path, rows_read):
    """Fails if a run killed after 100 rows, in its 4th chunk of 32, reads the first 3 again or ends at other bits."""
    words = words_of(sources["bert"], tmp_path / "killed")
    environment = {**os.environ, "PYTHONPATH": str(Path(retrofit.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in chunks(tmp_path / "killed")] == [f"chunk-0000{index}.npz" for index in range(3)]
    main(words)
    assert rows_read() == NUM_ROWS - 3 * CHUNK
    main(words_of(sources["bert"], tmp_path / "whole"))
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert (tmp_path / "killed/config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()


def test_a_half_written_chunk_is_passed_over(sources, tmp_path, rows_read):
    """Fails if a truncated, empty or foreign file is read as features, or costs more than its own rows."""
    words = words_of(sources["vit"], tmp_path)
    main(words)
    wanted = weights(tmp_path)
    first, second, third, *_ = chunks(tmp_path)
    first.write_bytes(first.read_bytes()[:-40])
    second.write_bytes(b"")
    np.savez(third, features=np.zeros((CHUNK, 2, 15), np.float32), logits=np.zeros((CHUNK, NUM_LABELS), np.float32))
    (first.parent / f".{first.name}.1.tmp").write_bytes(b"half")
    rows_read()
    main(words)
    assert rows_read() == 3 * CHUNK
    assert weights(tmp_path) == wanted


FULL_DISK = """
import resource, sys
import torch
from een_hf.commands import main

seen, (rows, size) = [], map(int, sys.argv[1:3])

def hook(module, inputs):
    if type(module).__name__ == "BertLayer":
        seen.append(len(inputs[0]))
        if sum(seen) > 3 * rows:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

torch.nn.modules.module.register_module_forward_pre_hook(hook)
main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("rows", "size", "kept", "named"),
    [
        (100, 1_000, 3, "chunk-00003.npz"),
        pytest.param(0, 15_000, 7, "model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_says_so_and_keeps_the_finished_chunks(rows, size, kept, named, sources, tmp_path, rows_read):
    """Fails if a disk that is full, in the 4th chunk or when the model is saved, is a traceback or costs more rows.

    After some rows no file can grow beyond some bytes.
    """
    words = words_of(sources["bert"], tmp_path / "full")
    environment = {**os.environ, "PYTHONPATH": str(Path(retrofit.__file__).parents[2])}
    command = [sys.executable, "-c", FULL_DISK, str(rows), str(size), *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert re.match(f"error: .*{named} could not be written .*: make room below --output_dir, .* continues from", line)
    assert len(chunks(tmp_path / "full")) == kept and not list((tmp_path / "full").rglob(".*.tmp"))
    main(words)
    assert rows_read() == NUM_ROWS - min(kept * CHUNK, NUM_ROWS)
    main(words_of(sources["bert"], tmp_path / "whole"))
    assert weights(tmp_path / "full") == weights(tmp_path / "whole")


# Images


@pytest.fixture
def spoilt_images(sources, tmp_path):
    """The images, four of them spoilt: no image, cut short, with rubbish between two chunks of pixels, and empty."""
    folder, flag, path = sources["vit"]
    images = shutil.copytree(path, tmp_path / "images")
    whole = (images / "071.png").read_bytes()
    start = whole.index(b"IDAT") - 4
    half = int.from_bytes(whole[start : start + 4], "big") // 2
    chunk = b"IDAT" + whole[start + 8 : start + 8 + half]
    first = half.to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    rubbish = whole[:start] + first + bytes(16) + whole[start + 8 + half :]
    with pytest.raises(SyntaxError), Image.open(io.BytesIO(rubbish)) as image:
        image.load()
    for name, content in {"070": b"no image", "071": whole[: len(whole) // 2], "072": rubbish, "073": b""}.items():
        (images / f"{name}.png").write_bytes(content)
    return folder, flag, str(images)


def test_corrupt_images_are_named_before_any_work(spoilt_images, tmp_path):
    """Fails if one broken image of many ends an hour's work, or in a traceback."""
    with pytest.raises(SystemExit, match="4 of 200 images are corrupt, the first is .*070.png.*--skip_corrupt"):
        main(words_of(spoilt_images, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_corrupt_images_are_left_out_and_counted(spoilt_images, tmp_path, caplog):
    """Fails if a run without four images is not the run on a folder that never held them."""
    main(words_of(spoilt_images, tmp_path / "skipped", skip_corrupt=None))
    assert "4 of 200 images are corrupt and left out, the first is" in caplog.text
    for number in range(70, 74):
        (tmp_path / "images" / f"{number:03d}.png").unlink()
    main(words_of(spoilt_images, tmp_path / "whole"))
    assert weights(tmp_path / "skipped") == weights(tmp_path / "whole")
    record = json.loads((tmp_path / "skipped" / "retrofit.json").read_text())
    assert record["num_training_rows"] + record["num_calibration_rows"] == NUM_ROWS - 4


def test_a_model_of_grey_images_reads_grey(sources, tmp_path):
    """Fails if a model with one channel is given three."""
    config = ViTConfig(**SHAPE, image_size=16, patch_size=8, num_labels=NUM_LABELS, num_channels=1)
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "grey")
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path / "grey")
    _, flag, path = sources["vit"]
    main(words_of((str(tmp_path / "grey"), flag, path), tmp_path / "out"))
    stock, saved = (
        ViTForImageClassification.from_pretrained(tmp_path / "grey").eval(),
        load_exit_logits(tmp_path / "out"),
    )
    for row, logits in zip(saved["row_ids"][:10], saved["logits"], strict=False):
        grey = np.asarray(Image.open(f"{path}/{row:03d}.png").convert("L"), dtype=np.float32)
        with torch.no_grad():
            wanted = stock(torch.from_numpy(grey / 127.5 - 1)[None, None]).logits[0]
        np.testing.assert_allclose(logits[-1], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_step_of_the_exits_by_hand(sources, kind):
    """Fails if an exit learns anything but cross-entropy with the model's probabilities, or reads other features."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0} if kind == "bert" else {}
    model = EXIT_CLASSES[kind].from_pretrained(sources[kind][0], **dropout).eval()
    generator = np.random.default_rng(0)
    width = {"bert": 16, "vit": 32}[kind]  # mean of the tokens; class token and mean of the patches
    features = generator.normal(size=(8, 2, width)).astype(np.float32)
    teacher = generator.normal(size=(8, NUM_LABELS)).astype(np.float32)
    before = {name: tensor.clone() for name, tensor in model.exit_heads.state_dict().items()}

    losses = []
    for index, head in enumerate(model.exit_heads.values()):
        for row in range(8):
            log_probabilities = head.classify(torch.from_numpy(features[row : row + 1, index])).log_softmax(-1)[0]
            probabilities = np.exp(teacher[row].astype(np.float64)) / np.exp(teacher[row].astype(np.float64)).sum()
            losses.append(
                -sum(float(p) * value for p, value in zip(probabilities, log_probabilities, strict=True)) / 8
            )
    gradients = torch.autograd.grad(sum(losses), list(model.exit_heads.parameters()))
    wanted = {
        name: before[name] * (1 - 0.01 * 0.1) - 0.1 * gradient / (gradient.abs() + 1e-8)
        for (name, _), gradient in zip(model.exit_heads.named_parameters(), gradients, strict=True)
    }
    settings = {"seed": 0, "head_learning_rate": 0.1, "train_batch_size": 8, "num_train_epochs": 1}
    train_heads(model, features, teacher, **settings)
    for name, tensor in model.exit_heads.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4, msg=name)
    assert not any(module.training for module in model.modules())


def test_exits_learn_what_the_model_answers(sources, tmp_path):
    """Fails if training leaves the exits no better on unseen rows than the model's most frequent answer."""
    main(words_of(sources["vit"], tmp_path, num_train_epochs=40, head_learning_rate=0.01))
    answers = load_exit_logits(tmp_path)["logits"].argmax(-1)
    agreement = (answers[:, :-1] == answers[:, -1:]).mean(0)
    assert agreement.min() > np.bincount(answers[:, -1]).max() / len(answers) + 0.05


def report_of(policy=True, message="", seconds=None):
    policy = ExitPolicy("confidence", [0.5, 0.5], guarantee={"limit": 0.02, "confidence": 0.9}) if policy else None
    found = CalibrationReport(policy, relative_cost=0.4, score=0.9, exit_fractions=[0.5, 0.5], message=message)
    return RetrofitReport(None, None, found, None, None, 1, [0], [], seconds or {})


def test_the_summary():
    """Fails if agreement, confidence or a ratio is printed upside down."""
    start = "Agrees with your model on at least 98 % (90 % sure); 2.50 x less compute"
    assert report_of(seconds={"stock model": 3.0, "exits on": 2.0}).summary == start + ", 1.50 x less time here"
    assert report_of().summary == start
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


def test_python_refuses_rows_of_two_sources(sources, tmp_path):
    """Fails if one of two sources is taken without a message, or a folder is made for nothing."""
    folder, flag, path = sources["bert"]
    for rows, source in ((["a text"], {"train_file": path}), (None, {})):
        with pytest.raises(een_hf.ExitConfigurationError, match="Give the rows"):
            een_hf.retrofit(folder, rows, output_dir=tmp_path / "out", **source)
    assert not (tmp_path / "out").exists()


def test_a_risk_that_is_not_met_says_so(sources, tmp_path, capsys):
    """Fails if a model is saved with a policy, or praised, that could not be certified."""
    main(words_of(sources["bert"], tmp_path, max_risk=0.02, calibration_share=0.82, head_learning_rate=1e-9))
    assert capsys.readouterr().out.splitlines()[-1].startswith("Not cheaper, answers as your model: No early exit")
    assert EarlyExitBertForSequenceClassification.from_pretrained(tmp_path).config.exit_policy is None


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
        (lambda folder, config: _change_type(folder, config), "of type 'gpt2'; exits exist for: bert, .*vit.*'Add an"),
        (lambda folder, config: _save_regression(folder, config), "regression"),
        (lambda folder, config: _save_multi_label(folder, config), "multi_label"),
        (lambda folder, config: _change_weights(folder, config, layer=1), "lacks weights, for example bert.encoder"),
        (lambda folder, config: _change_weights(folder, config, head_size=5), "cannot be loaded: weights have other"),
        (lambda folder, config: _change_weights(folder, config, torn=True), "cannot be loaded: SafetensorError"),
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
    with pytest.raises(SystemExit, match="--feature_dtype float16 does not hold.*float32 for row 0 "):
        main(words_of((str(folder), *sources["bert"][1:]), tmp_path / "out", feature_dtype="float16", **flags))


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
    with pytest.raises(SystemExit, match="something else"):
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
