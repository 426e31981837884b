"""`een-hf calibrate`: a policy from a run's saved logits is the one that the run itself would have set."""

import json
import os
import shutil

import numpy as np
import pytest
from transformers import AutoConfig, BertTokenizer

import een_hf
from een_hf.commands import main
from een_hf.data.text import TEXT
from een_hf.evaluation import load_exit_logits
from een_hf.hub import guarantee_in_words
from een_hf.runs import parse_arguments, run_experiment


WORDS = ("good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "a")


@pytest.fixture(scope="module")
def train_run(tmp_path_factory):
    """Train a tiny model and evaluate it, with these flags more: `train_run(*flags)` gives the output folder."""
    folder = tmp_path_factory.mktemp("run")
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name, num_rows in (("train", 160), ("dev", 200)):
        lines = ["text,label"]
        for _ in range(num_rows):
            label = int(rng.integers(2))
            chosen = [WORDS[int(rng.integers(3)) + 3 * (label if rng.random() < 0.8 else 1 - label)] for _ in range(3)]
            lines.append(f"{' '.join([*chosen, *rng.choice(WORDS[6:], 3)])},{label}")
        (folder / f"{name}.csv").write_text("\n".join(lines))
    shape = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=16,vocab_size=15"
    words = f"--model_type bert --config_overrides {shape} --tokenizer_name {folder}/tokenizer".split()
    words += f"--train_file {folder}/train.csv --validation_file {folder}/dev.csv --max_seq_length 12".split()
    words += "--do_train --do_eval --num_train_epochs 2 --learning_rate 5e-3 --seed 3".split()
    words += "--disable_tqdm true --use_cpu true --save_strategy no --per_device_train_batch_size 16".split()
    made = {}

    def train(*flags):
        if flags not in made:
            made[flags] = folder / f"out{len(made)}"
            run_experiment(TEXT, parse_arguments(TEXT, [*words, *flags, "--output_dir", str(made[flags])]))
        return made[flags]

    return train


@pytest.fixture
def run(train_run, tmp_path):
    """A copy of a run that set no policy, without the model's weights."""
    return _copy(train_run(), tmp_path)


def _copy(folder, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*"))
    return copied


def read(path):
    return json.loads(path.read_text())


POLICIES = {
    "target": ["--target_cost", "0.6"],
    "criterion": ["--target_cost", "0.7", "--exit_criterion", "entropy"],
    "risk": ["--max_risk", "0.2", "--risk", "consistency"],
    "labelled risk": ["--max_risk", "0.25", "--risk_confidence", "0.8", "--exit_criterion", "margin"],
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_is_the_training_runs(train_run, run, name):
    """Fails if rows, seed, costs or criterion differ from those of a training run with the same flags."""
    trained = train_run(*POLICIES[name])
    main(["calibrate", str(run), *POLICIES[name], "--save"])
    wanted = read(trained / "exit_results.json")["policy"]
    assert wanted is not None and read(run / "exit_results.json")["policy"] == wanted
    assert AutoConfig.from_pretrained(run).exit_policy == AutoConfig.from_pretrained(trained).exit_policy


def test_python_does_what_the_command_does(run, tmp_path):
    """Fails if the function has other defaults than the command, or writes something else."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    main(["calibrate", str(run), *POLICIES["risk"], "--save"])
    found = een_hf.calibrate_run(other, max_risk=0.2, risk="consistency", save=True)
    assert repr(found) == f"RunCalibration({found.report.message})"
    assert found.report.policy.to_dict() == AutoConfig.from_pretrained(run).exit_policy
    for name in ("exit_results.json", "config.json"):
        assert (other / name).read_bytes() == (run / name).read_bytes()


BEST = ["--load_best_model_at_end", "--save_strategy", "epoch", "--eval_strategy", "epoch"]


@pytest.mark.parametrize("flags", [["--calibration_samples", "100"], BEST])
def test_rows_that_chose_something_else(train_run, tmp_path, flags):
    """Fails if held-out calibration rows are lost, or a guarantee is written for rows that chose the checkpoint."""
    policy = POLICIES["risk"]
    trained, run = train_run(*flags, *policy), _copy(train_run(*flags), tmp_path)
    main(["calibrate", str(run), *policy, "--save"])
    found = read(run / "exit_results.json")["policy"]
    assert found == read(trained / "exit_results.json")["policy"]
    assert (found["guarantee"] is None) == (flags == BEST)


def test_nothing_is_written_without_save(run, capsys):
    """Fails if a look at a budget changes the run, or if the printed cost is not that of the report rows."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main(["calibrate", str(run), "--target_cost", "0.6"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    said = capsys.readouterr().out
    assert "--save" in said and "100 evaluation rows" in said

    main(["calibrate", str(run), "--target_cost", "0.6", "--save"])
    results, rows = read(run / "exit_results.json"), load_exit_logits(run)
    policy, report = results["policy"], rows["part"] == "report"
    logits = rows["logits"][report].astype(np.float64) / np.reshape(policy["temperatures"], (1, -1, 1))
    confidence = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).max(-1)
    exiting = confidence >= policy["thresholds"]
    exiting[:, -1] = True
    exits = exiting.argmax(1)
    costs = np.array([entry["relative_cost"] for entry in results["anytime"]])
    right = rows["logits"][report][np.arange(len(exits)), exits].argmax(-1) == rows["labels"][report]
    assert policy["relative_cost"] == pytest.approx(costs[exits].mean())
    assert policy["metrics"]["accuracy"] == pytest.approx(right.mean())
    assert f"relative cost {costs[exits].mean():.4f}, accuracy {right.mean():.4f}" in said


def test_a_folder_that_cannot_be_written_stays_as_it_is(run):
    """What breaks: the model has the new policy, and the results and the card have the old one."""
    before = (run / "config.json").read_bytes()
    (run / f".exit_results.json.{os.getpid()}.tmp").mkdir()  # where the results would be written first
    with pytest.raises(SystemExit, match="error: a file cannot be read or written .*exit_results.json"):
        main(["calibrate", str(run), "--target_cost", "0.6", "--save"])
    assert (run / "config.json").read_bytes() == before


def test_the_hint_of_a_run_is_a_command_that_works(train_run, run, capsys):
    """Fails if the command that a run without a target prints is not one."""
    train_run("--data_seed", "1")  # no run of another test, which would print nothing here
    hint = next(line for line in capsys.readouterr().out.splitlines() if "een-hf calibrate" in line)
    words = hint.split("een-hf ")[1].split()
    assert words[0] == "calibrate" and words[-1] == "--save"
    words[1] = str(run)
    main(words)
    assert AutoConfig.from_pretrained(run).exit_policy["calibrated_for"] == {"target_cost": float(words[3])}


def test_numbers_are_calibrated_by_patience(train_run, tmp_path, capsys):
    """Fails if a regression run's hint names a command that refuses it: the default criterion scores classes."""
    rows = tmp_path / "numbers.csv"
    rng = np.random.default_rng(0)
    rows.write_text(
        "text,label\n" + "".join(f"{' '.join(rng.choice(WORDS, 4))},{rng.random():.3f}\n" for _ in range(80))
    )
    trained = train_run("--train_file", str(rows), "--validation_file", str(rows))
    hint = next(line for line in capsys.readouterr().out.splitlines() if "een-hf calibrate" in line)
    run = _copy(trained, tmp_path)
    words = hint.split("een-hf ")[1].split()
    main([words[0], str(run), *words[2:]])
    assert AutoConfig.from_pretrained(run).exit_policy["criterion"] == "patience"


def test_too_few_rows_change_nothing(run, capsys):
    """Fails if a risk that cannot be certified removes the policy that the run has."""
    main(["calibrate", str(run), "--target_cost", "0.6", "--save"])
    before = (run / "config.json").read_bytes()
    main(["calibrate", str(run), "--max_risk", "0.001", "--save"])
    assert (run / "config.json").read_bytes() == before
    assert "No early exit" in capsys.readouterr().out


def test_exits_that_nobody_uses_are_named(run, capsys):
    """Fails if a reader has to know that 1e+30 is a threshold that no score reaches."""
    main(["calibrate", str(run), "--target_cost", "5"])
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("thresholds"))
    assert set(said.split(": ")[1].split(", ")) == {"none exit"}


def test_the_guarantee_in_words():
    """Fails if the sentence turns limit and confidence round, or names the other risk."""
    certified = {"risk": "consistency", "limit": 0.02, "confidence": 0.9, "num_rows": 290, "errors": 1.0}
    assert guarantee_in_words(certified) == (
        "Guarantee: on at most 0.02 of new rows like these the policy answers differently from the last exit, with "
        "confidence 0.9 (1 of 290 certifying rows)."
    )


def _truncate_logits(run):
    path = run / "exit_logits.npz"
    path.write_bytes(path.read_bytes()[:-100])


def _change_rows(change):
    """Damage that writes `exit_logits.npz` again, with the arrays that `change` makes of its own."""

    def damage(run):
        path = run / "exit_logits.npz"
        arrays = dict(np.load(path))
        np.savez_compressed(path, **{**arrays, **change(arrays)})

    return damage


def _last_label_missing(arrays):
    labels = arrays["labels"].copy()
    labels[np.flatnonzero(arrays["part"] == "report")[-1]] = -100
    return {"labels": labels}


@pytest.mark.parametrize(
    ("flags", "damage", "named"),
    [
        ([], None, "--target_cost"),
        (["--target_cost", "0.6", "--max_risk", "0.1"], None, "give one of them"),
        (["--target_cost", "0.01"], None, "below the cost of the first exit"),
        (["--target_cost", "0.6", "--exit_criterion", "surest"], None, "surest"),
        (["--max_risk", "2"], None, "--max_risk"),
        (["--target_cost", "0.6", "--risk", "consistency"], None, "--max_risk too"),
        (
            ["--target_cost", "0.6"],
            lambda run: (run / "exit_results.json").unlink(),
            "exit_results.json does not exist",
        ),
        (["--target_cost", "0.6"], lambda run: (run / "exit_results.json").write_text("{"), "exit_results.json"),
        (["--target_cost", "0.6"], _truncate_logits, "exit_logits.npz"),
        (["--target_cost", "0.6"], lambda run: (run / "exit_logits.npz").unlink(), "exit_logits.npz"),
        (["--target_cost", "0.6"], lambda run: (run / "config.json").unlink(), "holds no config.json"),
        *(
            (["--target_cost", "0.6"], _change_rows(change), f"exit_logits.npz.* {named}")
            for change, named in [
                (lambda arrays: {"part": np.full(len(arrays["part"]), "report")}, "no calibration rows"),
                (lambda arrays: {"part": np.full(len(arrays["part"]), "calibration")}, "only calibration rows"),
                (lambda arrays: {"logits": arrays["logits"][..., :1]}, "has 1 labels.*different runs"),
                (lambda arrays: {"logits": arrays["logits"][:, :1]}, "has 1 exits.*different runs"),
                (lambda arrays: {"labels": arrays["labels"].astype(float)}, "Labels of single_label_classification"),
                (_last_label_missing, "1 of .* rows have no label that the model knows.*-100"),
            ]
        ),
    ],
)
def test_bad_input(run, flags, damage, named):
    """Fails if bad input ends in a traceback or in a message that does not say what would be right."""
    if damage is not None:
        damage(run)
    with pytest.raises(SystemExit, match=named):
        main(["calibrate", str(run), *flags])
