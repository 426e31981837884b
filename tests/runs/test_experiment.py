"""What a run refuses before any work, where it may start, and the precision of the weights that it trains."""

import argparse
import dataclasses
import importlib
import json
import re

import pytest
import torch
from factory import tiny_processor, tiny_stock_model
from safetensors.torch import load_file

from een_hf.calibration import check_target_cost
from een_hf.commands import COMMANDS
from een_hf.commands import main as command_main
from een_hf.commands.train import main
from een_hf.data.arguments import DataArguments
from een_hf.data.images import IMAGES
from een_hf.data.text import TEXT
from een_hf.models import ExitConfigurationError
from een_hf.runs import parse_arguments, run_experiment
from een_hf.runs.experiment import prepare
from een_hf.training import EarlyExitTrainingArguments
from een_hf.training.arguments import CalibrationArguments, ModelArguments
from een_hf.training.registry import scheme_arguments


TINY = [
    "--model_type=vit",
    "--config_overrides=hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=16,patch_size=4",
    "--image_size=8",
    "--dataset_name=digits",
    "--max_train_samples=64",
    "--do_train",
    "--use_cpu",
    "--disable_tqdm=True",
    "--save_strategy=no",
]


def is_float(field) -> bool:
    return "float" in str(getattr(field.type, "__name__", field.type))


# Numbers


CLASSES = [ModelArguments, TEXT.data_arguments, IMAGES.data_arguments, EarlyExitTrainingArguments]
CLASSES += [CalibrationArguments, *scheme_arguments()]
FLOATS = {field.name: kind for kind in CLASSES for field in dataclasses.fields(kind) if is_float(field)}


def test_the_numeric_flags_are_found():
    assert {"target_cost", "learning_rate", "mixup", "lr_milestones", "meta_epsilon", "boost_temperature"} <= set(
        FLOATS
    )


@pytest.mark.parametrize("flag", sorted(FLOATS))
def test_nan_passes_no_check_of_the_scripts(flag, tmp_path):
    """What breaks: `x <= 0` is false for NaN, and the run goes on with it."""
    modality = IMAGES if issubclass(FLOATS[flag], DataArguments) else TEXT
    words = ["--model_name_or_path=minilm", "--dataset_name=bbc_news", f"--output_dir={tmp_path}", f"--{flag}", "nan"]
    with pytest.raises(ExitConfigurationError, match=f"--{flag} .*nan"):
        parse_arguments(modality, words)


def flags_of_commands() -> list[tuple[str, str]]:
    found = []
    for command in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"een_hf.commands.{command}").add_arguments(parser)
        found += [(command, action.option_strings[0]) for action in parser._actions if action.type is float]
    return found


@pytest.mark.parametrize(("command", "flag"), flags_of_commands())
def test_nan_passes_no_check_of_the_commands(command, flag):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"een_hf.commands.{command}").add_arguments(parser)
    words = [flag, "nan"]
    for action in parser._actions:
        if action.required:
            value = str(next(iter(action.choices))) if action.choices else "2" if action.type is int else "x"
            words += [*action.option_strings[:1], value]
    with pytest.raises(SystemExit, match=f"error: {flag} must be a number, not nan"):
        command_main([command, *words])


def test_nan_is_no_budget():
    with pytest.raises(ExitConfigurationError, match="--target_cost .*not nan"):
        check_target_cost(float("nan"), [0.5, 1.0])


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("learning_rate", "-1", "at least 0"),
        ("learning_rate", "inf", "at least 0"),
        ("weight_decay", "-0.1", "at least 0"),
        ("adam_beta1", "1", "below 1"),
        ("label_smoothing_factor", "1.5", "below 1"),
        ("per_device_train_batch_size", "0", "at least 1"),
        ("gradient_accumulation_steps", "0", "at least 1"),
        ("seed", "-1", "at least 0"),
        ("optim", "adamant", "adamant"),
        ("eval_strategy", "sometimes", "sometimes"),
        ("dtype", "float8", "float32, bfloat16, float16"),
        ("report_to", "nobody", "nobody is not installed, or unknown to transformers"),
        ("lr_scheduler_kwargs", '{"slope": 1}', "--lr_scheduler_type linear.*slope"),
        ("accelerator_config", "nowhere.json", "nowhere.json"),
        ("torch_compile_backend", "nothing", "NOTHING"),
        ("optim", "galore_adamw", "--optim galore_adamw.*galore_torch"),
        ("include_for_metrics", "input", "--include_for_metrics takes `inputs` and `loss`"),
        ("metric_for_best_model", "f1", "--metric_for_best_model f1 is not one of: eval_loss, eval_accuracy"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(flag, value, named, tmp_path, capsys):
    """What breaks: a traceback of the optimizer, after the data have been read."""
    with pytest.raises(SystemExit) as end:
        main(IMAGES, [*TINY, f"--output_dir={tmp_path}", f"--{flag}", value])
    message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert re.search(named, message) and "\n" not in message


# Folders


@pytest.mark.parametrize("below", ["", "/runs/mine"])
@pytest.mark.parametrize("do", ["--do_train", "--do_eval"])
def test_an_output_folder_that_is_a_file(do, below, tmp_path):
    (tmp_path / "out").write_text("")
    words = [word for word in TINY if word != "--do_train"]
    with pytest.raises(SystemExit, match=f"--output_dir .*out{below}: .*out is no folder"):
        main(IMAGES, [*words, do, f"--output_dir={tmp_path / 'out'}{below}"])


def test_a_run_that_failed_before_its_first_step_leaves_its_folder_free(tmp_path):
    """What breaks: the corrected command is refused, for a folder that holds no weights."""
    words = [*TINY, "--max_steps=3", f"--output_dir={tmp_path}", "--optim=sgd", "--max_grad_norm=0"]
    with pytest.raises(SystemExit, match="not finite.*--learning_rate"):
        main(IMAGES, [*words, "--learning_rate=1e30"])
    main(IMAGES, [*words, "--learning_rate=0.1"])
    record = json.loads((tmp_path / "_run_arguments.json").read_text())
    assert record["finished"] and record["settings"]["learning_rate"] == 0.1
    with pytest.raises(SystemExit, match="--learning_rate was 0.1, is 0.2"):
        main(IMAGES, [*words, "--learning_rate=0.2"])


# Precision


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Folder of a stock classifier stored in float16."""
    folder = tmp_path_factory.mktemp("half")
    tiny_stock_model("vit", num_labels=10).half().save_pretrained(folder)
    tiny_processor("vit").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["--do_train"], torch.float32),
        (["--do_train", "--bf16"], torch.float32),
        (["--do_train", "--freeze_backbone"], torch.float32),
        (["--do_train", "--method=l2w"], torch.float32),
        (["--do_train", "--dtype=bfloat16"], torch.bfloat16),
        (["--do_eval"], torch.float16),
        (["--do_eval", "--dtype=float32"], torch.float32),
    ],
)
def test_the_precision_of_the_weights(flags, dtype, half, tmp_path):
    """What breaks: AdamW on float16 weights, in which its steps are lost, because the checkpoint is stored so."""
    words = [word for word in TINY[2:] if word != "--do_train"]
    words += [f"--model_name_or_path={half}", f"--output_dir={tmp_path}", "--max_steps=1", *flags]
    args = parse_arguments(IMAGES, words)
    run = run_experiment(IMAGES, args) if "--do_train" in flags else prepare(IMAGES, args)
    if "--do_train" in flags:
        stored = load_file(tmp_path / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        kinds = {tensor.dtype for state in run.trainer.optimizer.state.values() for tensor in state.values()}
        assert kinds <= {dtype, torch.float32}
    assert {parameter.dtype for parameter in run.loaded.model.parameters()} == {dtype}
    # A tracker calls a run by its scheme; one that trains nothing has none.
    assert run.trainer.args.method == (args.training.method if "--do_train" in flags else None)


def test_training_in_half_precision_is_warned_of(half, tmp_path, caplog):
    words = [word for word in TINY[2:] if word != "--do_train"]
    words += [f"--model_name_or_path={half}", f"--output_dir={tmp_path}", "--do_train", "--dtype=float16"]
    prepare(IMAGES, parse_arguments(IMAGES, words))
    assert "trained in torch.float16" in caplog.text and "dtype=torch.float32" in caplog.text
