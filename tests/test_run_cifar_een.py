"""run_cifar_een.py as a user runs it: real processes and files, the digits of scikit-learn and CIFAR-100."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import tiny_processor, tiny_stock_model
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
)

from een_hf.commands.train import main
from een_hf.data.images import IMAGES
from een_hf.data.samples import load_digits
from een_hf.training.checkpoints import last_whole_checkpoint
from een_hf.training.history import RUN_FILE


ROOT = Path(__file__).parents[1]
TINY = [
    "--model_type=vit",
    "--config_overrides=hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32,patch_size=2",
    "--image_size=8",
    "--dataset_name=digits",
    "--learning_rate=0.005",
    "--do_train",
    "--use_cpu",
    "--disable_tqdm=True",
]
LEARN = ["--num_train_epochs=15", "--per_device_train_batch_size=32", "--hflip=0", "--min_crop=0.9"]
RANDOM = ["--auto_augment=rand-m5-mstd0.5", "--mixup=0.2", "--cutmix=1.0", "--random_erase=0.3"]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(found, wanted):
    for name, tensor in weights(wanted).items():
        assert torch.equal(weights(found)[name], tensor), name


# One whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    flags = ["--do_eval", "--do_predict", "--max_predict_samples=40", "--target_cost=0.8", *LEARN]
    main(IMAGES, [*TINY, *flags, f"--output_dir={folder}"])
    return folder


def test_every_exit_learns(finished):
    """Ten classes: an exit that learned nothing is right one time in ten."""
    results = json.loads((finished / "exit_results.json").read_text())
    assert (results["model_type"], results["dataset"], results["num_eval_samples"]) == ("vit", "digits", 500)
    assert all(row["metrics"]["accuracy"] > 0.5 for row in results["anytime"])
    assert results["policy"]["relative_cost"] < 0.95


def test_metrics_are_scikit_learns_on_the_written_logits(finished):
    results = json.loads((finished / "exit_results.json").read_text())
    saved = np.load(finished / "exit_logits.npz")
    assert saved["labels"].tolist() == load_digits()["test"]["label"][:]
    for index, row in enumerate(results["anytime"]):
        own = accuracy_score(saved["labels"], saved["logits"][:, index].argmax(-1))
        assert row["metrics"]["accuracy"] == pytest.approx(own)


def test_the_saved_model_answers_as_predicted(finished):
    """Model, processor and policy in the folder are all that serving needs: row by row they repeat the files."""
    model = AutoModelForImageClassification.from_pretrained(finished).eval()
    processor = AutoImageProcessor.from_pretrained(finished)
    exits = [json.loads(line) for line in (finished / "predict_exits_digits.jsonl").read_text().splitlines()]
    answers = [line.split("\t")[1] for line in (finished / "predict_results_digits.txt").read_text().splitlines()[1:]]
    assert len(exits) == len(answers) == 40
    for image, line, answer in zip(load_digits()["test"]["image"][:40], exits, answers, strict=True):
        with torch.inference_mode():
            output = model(**processor(image.convert("RGB"), return_tensors="pt"))
        assert int(output.exit_index) + 1 == line["exit"]
        assert model.config.id2label[int(output.logits.argmax())] == answer == line["predictions"][line["exit"] - 1]


def test_a_finished_run_is_not_overwritten(finished):
    with pytest.raises(SystemExit, match="--output_dir .* contains a finished run"):
        main(
            IMAGES,
            [
                *TINY,
                "--do_eval",
                "--do_predict",
                "--max_predict_samples=40",
                "--target_cost=0.8",
                *LEARN,
                f"--output_dir={finished}",
            ],
        )


# Interruption


def start(flags, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "run_cifar_een.py"), *TINY, *flags, f"--output_dir={folder}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def is_finished(folder):
    """Whether a run has written all that it has to write, even if its process was killed thereafter."""
    path = folder / RUN_FILE
    return path.exists() and json.loads(path.read_text())["finished"]


@pytest.mark.parametrize(
    "stop", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGKILL", "SIGTERM"]
)
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, stop):
    """With random augmentation, mixing and an odd last batch: each pixel depends on seed, epoch and row alone."""
    flags = [*RANDOM, "--max_train_samples=75", "--per_device_train_batch_size=16", "--max_steps=150"]
    flags += ["--save_strategy=steps", "--save_steps=7", "--save_total_limit=2"]
    process = start(flags, tmp_path / "killed")
    while last_whole_checkpoint(tmp_path / "killed") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(stop)
    error = process.communicate()[1].decode()
    assert process.returncode == -stop, error[-2000:]
    main(IMAGES, [*TINY, *flags, f"--output_dir={tmp_path / 'killed'}"])
    main(IMAGES, [*TINY, *flags, f"--output_dir={tmp_path / 'whole'}"])
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_workers_do_not_change_the_result(tmp_path):
    flags = [*RANDOM, "--max_train_samples=75", "--per_device_train_batch_size=16", "--num_train_epochs=2"]
    for workers in (0, 2):
        own = [f"--dataloader_num_workers={workers}", f"--output_dir={tmp_path / str(workers)}"]
        main(IMAGES, [*TINY, *flags, *own])
    assert_same_weights(tmp_path / "2", tmp_path / "0")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["joint", "boosted", "l2w"])
def test_killed_at_random_moments(tmp_path, method):
    """At least four kills of each scheme, also while it starts and while it saves: the same weights to the bit."""
    flags = [*RANDOM, f"--method={method}", "--max_train_samples=75", "--per_device_train_batch_size=16"]
    flags += ["--max_steps=200", "--save_strategy=steps", "--save_steps=5", "--save_total_limit=2"]
    begin = time.monotonic()
    process = start(flags, tmp_path / "whole")
    assert process.wait() == 0, process.stderr.read().decode()[-2000:]
    duration = time.monotonic() - begin
    draw, kills, attempt = random.Random(method), 0, 0
    while True:
        folder = tmp_path / str(attempt)
        process = start(flags, folder)
        try:
            error = process.communicate(timeout=duration * draw.uniform(0.3, 0.9) if kills < 4 else None)[1]
            assert process.returncode == 0, error.decode()[-2000:]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            if not is_finished(folder):
                continue
        assert_same_weights(folder, tmp_path / "whole")
        if kills >= 4:
            return
        attempt += 1  # it came to its end before the kill


# Schemes and mixing


@pytest.mark.parametrize("method", ["joint", "boosted", "l2w"])
def test_every_scheme_trains_on_mixed_labels(tmp_path, method):
    """Soft labels, frozen nothing, an odd last batch: 75 rows in batches of 16."""
    flags = [*RANDOM, f"--method={method}", "--max_train_samples=75", "--per_device_train_batch_size=16"]
    main(IMAGES, [*TINY, *flags, "--max_steps=6", "--logging_steps=1", f"--output_dir={tmp_path}"])
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 6 and np.isfinite(losses).all()


@pytest.mark.parametrize("method", ["joint", "boosted", "l2w"])
def test_precision_and_memory_flags_train_alike(tmp_path, method):
    """Mixed precision and checkpointing change rounding, not what is learned: the same losses over four steps."""
    found = {}
    for flag, tolerance in (("--fp16=False", 0), ("--bf16", 0.02), ("--gradient_checkpointing", 1e-4)):
        folder = tmp_path / flag.strip("-")
        flags = [f"--method={method}", "--max_train_samples=64", "--per_device_train_batch_size=16", "--max_steps=4"]
        main(IMAGES, [*TINY, *flags, "--logging_steps=1", flag, f"--output_dir={folder}"])
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        found[flag] = [line["loss"] for line in log if "loss" in line]
        assert found[flag] == pytest.approx(found["--fp16=False"], rel=tolerance)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_learns_the_same(tmp_path):
    """What breaks: the model is no longer one that torch.compile takes, or its saved parts have other names."""
    losses = {}
    for flag in ("--torch_compile=False", "--torch_compile"):
        folder = tmp_path / flag.strip("-")
        flags = ["--max_train_samples=32", "--per_device_train_batch_size=16", "--max_steps=2", "--logging_steps=1"]
        main(IMAGES, [*TINY, *flags, flag, "--do_eval", "--max_eval_samples=40", f"--output_dir={folder}"])
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses[flag] = [line["loss"] for line in log if "loss" in line]
        assert len(losses[flag]) == 2
        assert (folder / "exit_results.json").exists()
    assert losses["--torch_compile"] == pytest.approx(losses["--torch_compile=False"], rel=1e-3)
    assert weights(tmp_path / "torch_compile").keys() == weights(tmp_path / "torch_compile=False").keys()


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size=9"], "--image_size 9 must be a multiple"),
        (["--model_type=bert"], "--model_type bert does not fit"),
        (["--exit_layers", "2", "9"], "exit_layers"),
        (["--mixupp=1"], "Unknown flag --mixupp.*--mixup"),
        (["--do_eval", "--target_cost=0.1"], "--target_cost 0.1 is below the cost of the first exit"),
        (["--do_eval", "--measure_speed"], "--measure_speed is for text"),
    ],
)
def test_bad_input_is_answered_before_training(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        main(IMAGES, [*TINY, *flags, f"--output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def write_folder(folder):
    rows = load_digits()["train"].select(range(24))
    for number, row in enumerate(rows):
        place = folder / str(row["label"])
        place.mkdir(parents=True, exist_ok=True)
        row["image"].resize((16, 16), Image.BICUBIC).save(place / f"{number}.png")
    return folder


def test_a_corrupt_image_stops_the_run_before_training(tmp_path):
    folder = write_folder(tmp_path / "images")
    broken = next(folder.glob("*/*.png"))
    broken.write_bytes(broken.read_bytes()[:40])
    flags = [flag for flag in TINY if "dataset_name" not in flag] + [f"--train_dir={folder}", "--max_steps=1"]
    with pytest.raises(SystemExit, match=rf"corrupt, the first is .*{broken.name}.*--skip_corrupt"):
        main(IMAGES, [*flags, f"--output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    main(IMAGES, [*flags, "--skip_corrupt", f"--output_dir={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "model.safetensors").exists()


# Real images


@pytest.mark.slow
def test_cifar100_with_a_pretrained_vit(tmp_path, shared_dir):
    """A few hundred steps: every exit far above chance (1 %), later exits above earlier ones."""
    model, images = shared_dir / "models" / "vit-small-patch14-224", shared_dir / "data" / "cifar100"
    if not (model.is_dir() and images.is_dir()):
        pytest.skip("needs shared/models/vit-small-patch14-224 and shared/data/cifar100")
    recipe = str(ROOT / "recipes" / "cifar100_vit_small.yaml")
    main(IMAGES, [recipe, f"--model_name_or_path={model}", f"--dataset_name={images}", f"--output_dir={tmp_path}"])
    results = json.loads((tmp_path / "exit_results.json").read_text())
    accuracy = [row["metrics"]["accuracy"] for row in results["anytime"]]
    assert min(accuracy) > 0.05
    assert all(earlier < later for earlier, later in pairwise(accuracy))


def test_exits_of_a_stock_checkpoint_read_what_is_the_default(tmp_path):
    """The script took the default of models saved before the field was written: the class token, the worst to read."""
    tiny_stock_model("vit", patch_size=2, num_labels=10).save_pretrained(tmp_path / "stock")
    tiny_processor("vit").save_pretrained(tmp_path / "stock")
    flags = ["--dataset_name=digits", "--do_train", "--max_steps=1", "--use_cpu", "--disable_tqdm=True"]
    for given, wanted in (([], "cls_mean"), (["--exit_pooling=mean"], "mean")):
        folder = tmp_path / wanted
        main(IMAGES, [f"--model_name_or_path={tmp_path / 'stock'}", *flags, *given, f"--output_dir={folder}"])
        config = json.loads((folder / "config.json").read_text())
        assert (config["exit_pooling"], config["last_exit_pooling"]) == (wanted, "cls")
