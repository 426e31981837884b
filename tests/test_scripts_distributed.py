"""Both scripts in two processes give what one gives, and write it once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from factory import NO_DROPOUT, tiny_processor, tiny_stock_model
from transformers import AutoTokenizer


ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
SETTINGS = {"initializer_range": 0.3, **NO_DROPOUT}  # so that untrained layers tell rows apart
GLOBAL_BATCH, NUM_STEPS = 8, 6


def text_flags(folder, minilm_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    stock = tiny_stock_model("bert", seed=6, vocab_size=len(tokenizer), **SETTINGS)
    stock.base_model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    label = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    columns = {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "label": label}
    for number, split in enumerate(("train", "validation", "test")):
        # No row stands there twice: equal scores, or nearly, would make the choice of a threshold an accident.
        numbers = range(100 * number, 100 * number + 60)
        rows = {
            "sentence1": [f"film {n} is {'very ' * (n % 4)}{'good' if n % 2 else 'bad'}" for n in numbers],
            "sentence2": [f"it took {3 * n} days" for n in numbers],
            "label": [-1 if split == "test" else n % 2 for n in numbers],
        }
        path = folder / "glue" / "mrpc" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, datasets.Features(columns)).to_parquet(path)
    flags = ["--task_name=mrpc", f"--dataset_name={folder / 'glue'}", "--max_seq_length=16"]
    return ["run_glue_een.py", f"--model_name_or_path={folder / 'model'}", *flags]


def image_flags(folder):
    tiny_stock_model("vit", seed=1, image_size=16, **SETTINGS).base_model.save_pretrained(folder / "model")
    tiny_processor("vit", size=16).save_pretrained(folder / "model")
    return ["run_cifar_een.py", f"--model_name_or_path={folder / 'model'}", "--dataset_name=digits"]


def run(flags, processes, folder):
    script, *flags = flags
    # One epoch is not used up; the last of the evaluated batches is filled up with duplicates.
    flags += ["--max_train_samples=60", "--max_eval_samples=41", "--max_predict_samples=13"]
    flags += ["--do_train", "--do_eval", "--do_predict", "--target_cost=0.7"]
    # Adam would divide the rounding noise of a gradient that is zero (key biases) by its own size, and hide a wrong
    # scale.
    flags += ["--optim=sgd", "--learning_rate=0.05"]
    flags += [f"--per_device_train_batch_size={GLOBAL_BATCH // processes}", "--per_device_eval_batch_size=3"]
    flags += [f"--max_steps={NUM_STEPS}", "--save_strategy=steps", f"--save_steps={NUM_STEPS}", "--use_cpu"]
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *flags, f"--output_dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "images"])
def test_a_stream_in_two_processes_equals_one(modality, request, tmp_path):
    """What breaks: texts of several lengths cannot be stacked for the other process, or it trains on other rows."""
    flags = text_flags(tmp_path, request.getfixturevalue("minilm_path")) if modality == "text" else None
    flags = [*(flags or image_flags(tmp_path)), "--streaming"]
    logits = []
    for processes in (1, 2):
        run(flags, processes, tmp_path / str(processes))
        logits.append(np.load(tmp_path / str(processes) / "exit_logits.npz")["logits"])
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "images"])
def test_two_processes_equal_one(modality, request, tmp_path):
    """What breaks: rows of the other process are missing, doubled or out of order in a file, or a file is torn."""
    flags = text_flags(tmp_path, request.getfixturevalue("minilm_path")) if modality == "text" else None
    flags = flags or image_flags(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    outputs = [run(flags, 1, one), run(flags, 2, two)]
    for message in ("LOAD REPORT", "Calibration: "):
        assert [output.count(message) for output in outputs] == [1, 1]
    # A checkpoint holds the random state of each process, under a number if there are several.
    processes = {f"checkpoint-{NUM_STEPS}/rng_state_{index}.pth" for index in range(2)}
    assert files(two) - files(one) == processes
    assert files(one) - files(two) == {f"checkpoint-{NUM_STEPS}/rng_state.pth"}

    results, wanted = (json.loads((folder / "exit_results.json").read_text()) for folder in (two, one))
    assert wanted["num_eval_samples"] == 41
    for table in ("anytime", "anytime_report", "budgeted"):
        for row, other in zip(results[table], wanted[table], strict=True):
            assert (row["metrics"], row["relative_cost"]) == (other["metrics"], other["relative_cost"])
    assert results["policy"]["thresholds"] == pytest.approx(wanted["policy"]["thresholds"], abs=1e-5)
    assert results["policy"]["exit_fractions"] == wanted["policy"]["exit_fractions"]
    assert max(wanted["policy"]["exit_fractions"]) < 1, "all rows exit at one exit"
    found, alone = (np.load(folder / "exit_logits.npz") for folder in (two, one))
    np.testing.assert_allclose(found["logits"], alone["logits"], rtol=0, atol=1e-5)
    for name in ("labels", "row_ids", "part"):
        assert found[name].tolist() == alone[name].tolist()

    predictions = [name for name in files(one) if name.startswith(("predict_", "glue_submission/"))]
    assert len(predictions) == (3 if modality == "text" else 2)
    for name in predictions:
        lines = (two / name).read_text().splitlines()
        assert lines == (one / name).read_text().splitlines()
        assert len(lines) == 13 + (not name.endswith("jsonl"))  # with a heading
