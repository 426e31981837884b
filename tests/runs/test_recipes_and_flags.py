"""Recipes and flags: what is understood, and bad input that is named before any work."""

import json

import pytest
import yaml
from text_runs import ROOT, tiny, write_task

from een_hf.commands.train import main
from een_hf.data.images import IMAGES
from een_hf.data.text import TEXT
from een_hf.runs import parse_arguments
from een_hf.training.registry import scheme_arguments


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_understood(path, tmp_path):
    """What breaks: a recipe with a flag that no longer exists."""
    recipe = yaml.safe_load(path.read_text())
    images = recipe.get("model_type") == "vit" or "image_size" in recipe
    args = parse_arguments(IMAGES if images else TEXT, [str(path), f"--output_dir={tmp_path}", "--bf16=false"])
    for name, value in recipe.items():
        parts = (args.model, args.data, args.training, args.calibration, args.scheme)
        owner = next((part for part in parts if hasattr(part, name)), None)
        if owner is None:  # of another scheme, for runs that override the method
            assert any(hasattr(kind, name) for kind in scheme_arguments())
        elif isinstance(value, (int, float)) and name != "bf16":
            assert getattr(owner, name) == value


def test_flags_override_a_recipe(tmp_path):
    recipe = tmp_path / "mine.json"
    recipe.write_text(
        json.dumps({"model_name_or_path": "minilm", "dataset_name": "bbc_news", "seed": 3, "do_train": True})
    )
    args = parse_arguments(TEXT, [str(recipe), "--seed", "5", f"--output_dir={tmp_path}"])
    assert args.training.seed == 5 and args.training.do_train and args.data.dataset_name == "bbc_news"


BAD = {
    "nothing to do": ([], "Nothing to do"),
    "steps": (["--do_train", "--max_steps=-7"], "--max_steps must be at least -1, not -7"),
    "logging steps": (["--do_train", "--logging_steps=-1"], "--logging_steps must be at least 0, not -1"),
    "layer outside": (["--do_train", "--exit_layers", "2", "7"], "exit_layers"),
    "layer twice": (["--do_train", "--exit_layers", "2", "2"], "exit_layers"),
    "weights": (["--do_train", "--exit_loss_weights", "1", "2"], "--exit_loss_weights has 2 numbers.*3 exits"),
    "cost": (["--do_train", "--do_eval", "--target_cost=0.05"], "--target_cost 0.05 is below the cost of the first"),
    "cost in seconds": (["--do_train", "--do_eval", "--target_cost=0.001", "--cost=latency"], "below the cost of the"),
    "risk of numbers": (
        ["--do_train", "--do_eval", "--task_name=stsb", "--exit_criterion=patience", "--max_risk=0.1"],
        "--max_risk .* does not fit regression",
    ),
    "risk without labels": (
        ["--do_train", "--do_eval", "--max_risk=0.1", "--risk=accuracy_gap", "--calibration_file=UNLABELLED"],
        "accuracy_gap needs labels",
    ),
    "long warm start": (
        ["--do_train", "--warm_start_epochs=2", "--num_train_epochs=2"],
        "--warm_start_epochs 2 leaves no step for the early exits",
    ),
    "warm start in steps": (
        ["--do_train", "--warm_start_epochs=2", "--max_steps=10", "--per_device_train_batch_size=16"],
        "--warm_start_epochs 2 leaves no step for the early exits: this run trains 1 epochs",
    ),
    "warm start of short epochs": (
        ["--do_train", "--warm_start_epochs=3", "--max_steps=3", "--per_device_train_batch_size=500"],
        "--warm_start_epochs 3 leaves no step for the early exits: this run trains 3 epochs",
    ),
    "warm start of a stream": (
        ["--do_train", "--warm_start_epochs=1", "--max_steps=10", "--streaming", "--do_eval"],
        "--warm_start_epochs 1 leaves no step for the early exits",
    ),
    "re-entrant checkpoints": (
        [
            "--do_train",
            "--method=l2w",
            "--gradient_checkpointing",
            '--gradient_checkpointing_kwargs={"use_reentrant": true}',
        ],
        "use_reentrant",
    ),
    "no evaluation": (["--do_train", "--target_cost=0.5"], "add --do_eval"),
    "criterion": (["--do_eval", "--exit_criterion=sure"], "sure.*confidence"),
    "scheme": (["--do_train", "--method=best"], "--method is 'best'; it must be one of: base, boosted, joint, l2w"),
    "outside scheme": (
        ["--do_train", "--method=no_package:Trainer"],
        "--method is 'no_package:Trainer', which cannot be imported",
    ),
    "unknown flag": (["--do_train", "--exit_layer", "2"], "Unknown flag --exit_layer; did you mean --exit_layers"),
    "optimizer": (["--do_train", "--method=l2w", "--optim=adafactor"], "--optim"),
    "frozen": (["--do_train", "--freeze_backbone"], "freeze_backbone"),
    "two targets": (["--do_eval", "--target_cost=0.5", "--max_risk=0.1"], "--target_cost and --max_risk"),
    "calibration rows": (
        ["--do_train", "--calibration_samples=160"],
        "--calibration_samples 160 leaves no training row",
    ),
    "missing split": (["--do_predict"], "--test_file"),
    "config field": (["--do_train", "--config_overrides=sise=3"], "sise"),
    "config value": (
        ["--do_train", "--config_overrides=hidden_size=abc"],
        "^error: --config_overrides hidden_size=abc does not define a valid EarlyExitBert[^\n]*$",
    ),
    "config values": (
        ["--do_train", "--config_overrides=hidden_size=16,num_attention_heads=3"],
        "^error: --config_overrides hidden_size=16,num_attention_heads=3 does not define a valid [^\n]*3[^\n]*$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_work(case, files, minilm_path, tmp_path):
    flags, message = BAD[case]
    flags = [flag.replace("UNLABELLED", str(files["test"])) for flag in flags]
    rows = [f"--{split}_file={files[split]}" for split in ("train", "validation")]
    if "--task_name=stsb" in flags:
        rows = [f"--dataset_name={write_task(tmp_path / 'glue', 'stsb')}"]
    with pytest.raises(SystemExit, match=message):
        main(TEXT, [*tiny(minilm_path, *rows), *flags, f"--output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("exit_layer: [2]\n", "recipe .*: key 'exit_layer'; did you mean --exit_layers"),
        ("- just a list\n", "must be a mapping"),
        ("exit_layers: [2, 3", "^error: Recipe .*bad.yaml cannot be read: [^\n]*$"),
        ("a: \x00", "^error: Recipe .*bad.yaml cannot be read: [^\n]*$"),
        (None, "does not exist"),
    ],
)
def test_bad_recipes(content, message, tmp_path):
    recipe = tmp_path / "bad.yaml"
    if content:
        recipe.write_text(content)
    with pytest.raises(SystemExit, match=message):
        main(TEXT, [str(recipe), "--model_type=bert", f"--output_dir={tmp_path}"])
