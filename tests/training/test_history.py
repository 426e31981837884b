"""What rows may certify, from what the runs behind a model have read."""

import json
import subprocess
import sys

import numpy as np
import pytest
from damage import wrong_json

from een_hf.models import ExitConfigurationError
from een_hf.training.history import history_of, only_run_in, rows_chose, trained_on, write_run


NOW = {"train_file": "train.csv", "validation_file": "dev.csv", "seed": 42}
HELD_OUT = {**NOW, "calibration_samples": 60}
CUT = {"train_file": "train.csv", "train_val_split": 0.1, "seed": 42}
CASES = {
    # now, history, whether this run trains, whether its head is new: what the calibration rows chose
    "validation rows": (NOW, [NOW], False, False, None),
    "validation rows of a stranger": (NOW, [None], True, False, None),
    "validation rows that train now": ({**NOW, "validation_file": "train.csv"}, [], True, True, "the weights"),
    "validation rows that trained": ({**NOW, "validation_file": "train.csv"}, [NOW], False, False, "the weights"),
    "below a folder that trained": ({"calibration_file": "a/b"}, [{"train_dir": "a"}], False, False, "the weights"),
    "around a folder that trained": ({"calibration_file": "a"}, [{"train_dir": "a/b"}], False, False, "the weights"),
    "beside a folder that trained": ({"calibration_file": "a/c"}, [{"train_dir": "a/b"}], False, False, None),
    "held out by both": (HELD_OUT, [HELD_OUT], False, False, None),
    "held out by one": (HELD_OUT, [NOW], False, False, "the weights, for all that is known"),
    "held out by other seeds": (
        HELD_OUT,
        [{**HELD_OUT, "seed": 1}],
        True,
        False,
        "the weights, for all that is known",
    ),
    "held out, a stranger before": (HELD_OUT, [None, HELD_OUT], False, False, "the weights, for all that is known"),
    "held out, a new head": (HELD_OUT, [], True, True, None),
    "cut alike": (CUT, [CUT], False, False, None),
    "cut by other seeds": ({**CUT, "seed": 1}, [CUT], False, False, "the weights, for all that is known"),
    "best of the run before": (NOW, [{**NOW, "load_best_model_at_end": True}], False, False, "the checkpoint"),
    "best of two runs before": (NOW, [{**NOW, "load_best_model_at_end": True}, NOW], True, False, "the checkpoint"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_rows_chose(case):
    """A wrong answer certifies a model on rows that it was fitted to, or denies a certificate for nothing."""
    now, history, trains, new_head, expected = CASES[case]
    assert rows_chose(now, history, trains=trains, new_head=new_head) == expected


def test_histories_grow_by_runs_that_trained(tmp_path):
    """A run that only calibrated adds nothing, forgets nothing, and a checkpoint is asked like its run."""
    assert history_of(None, has_head=False) == history_of("hub/backbone", has_head=False) == []
    before = history_of("hub/fine-tuned", has_head=True)
    assert before == [None]
    write_run(tmp_path / "a", NOW, trained=True, finished=False, history=before)
    write_run(tmp_path / "b", HELD_OUT, trained=False, finished=True, history=history_of(tmp_path / "a", True))
    (tmp_path / "b" / "checkpoint-1").mkdir()
    assert history_of(str(tmp_path / "b" / "checkpoint-1"), has_head=True) == [None, NOW]


def test_a_local_data_set_trains_on_its_training_files(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}-00000-of-00001.parquet").touch()
    history = [None, {"dataset_name": str(tmp_path)}]
    assert trained_on(str(tmp_path / "train-00000-of-00001.parquet"), history)
    assert not trained_on(str(tmp_path / "validation-00000-of-00001.parquet"), history)
    assert not trained_on(str(tmp_path.parent / "other.csv"), history)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_record_is_named(tmp_path, count):
    """A record that cannot be read must neither end in a traceback nor count as no record: that would certify more."""
    settings = {**CUT, "dataset_name": str(tmp_path), "load_best_model_at_end": False, "calibration_file": None}
    write_run(tmp_path, settings, trained=True, finished=False, history=[None, NOW])
    path, refused = tmp_path / "_run_arguments.json", 0
    for text in wrong_json(json.loads(path.read_text()), np.random.default_rng(count), count):
        path.write_text(text)
        try:
            history = history_of(str(tmp_path), has_head=True)
            trained_on(str(tmp_path / "x"), history)
            rows_chose(HELD_OUT, history, trains=True, new_head=False)
        except ExitConfigurationError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= count // 4


HOLD = """
import sys, time
from een_hf.training.history import only_run_in
with only_run_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_one_runs_while_it_lasts(tmp_path):
    """Two runs that write the same files leave a mixture; one that was killed must not keep the folder."""
    folder = tmp_path / "new" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert any(line == "held\n" for line in other.stdout)
            with pytest.raises(ExitConfigurationError, match=f"--output_dir {folder}: another run"):
                with only_run_in(folder):
                    raise AssertionError
        finally:
            other.kill()
    with only_run_in(folder), pytest.raises(ExitConfigurationError, match="another run"):
        with only_run_in(folder):
            raise AssertionError
    assert not list(folder.iterdir())
    with only_run_in(tmp_path / "failed"):
        pass
    assert not (tmp_path / "failed").exists()


def test_an_output_folder_that_cannot_be_made(tmp_path):
    folder = tmp_path / ("a" * 300)  # longer than names may be
    with pytest.raises(ExitConfigurationError, match="--output_dir .* cannot be made"):
        with only_run_in(folder / "run"):
            pass


@pytest.mark.parametrize("below", ["", "runs/mine"])
def test_an_output_folder_that_is_a_file(below, tmp_path):
    (tmp_path / "out").write_text("kept")
    with pytest.raises(ExitConfigurationError, match="--output_dir .*out is no folder"):
        with only_run_in(tmp_path / "out" / below):
            pass
    assert (tmp_path / "out").read_text() == "kept"
