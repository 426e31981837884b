"""`--help` of a run: every flag once, ours first and in groups."""

import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from een_hf.commands import main
from een_hf.commands.train import MODALITIES
from een_hf.runs.parser import RunParser
from een_hf.training.arguments import CalibrationArguments, EarlyExitTrainingArguments, ModelArguments
from een_hf.training.registry import scheme_arguments, scheme_names


STOCK = {field.name for field in fields(TrainingArguments)}


def groups_of(text: str) -> dict[str, list[str]]:
    """Title to the names of the flags below it."""
    found = {}
    for line in text.splitlines():
        if title := re.fullmatch(r"(\S.*):", line):
            found[title[1]] = []
        elif flag := re.match(r"  --(\w+)", line):
            found[list(found)[-1]].append(flag[1])
    return found


def show(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("modality", MODALITIES)
def test_our_flags_come_first_and_those_of_transformers_on_demand(modality, capsys):
    """What breaks: a flag that no help shows, or 900 lines in which nobody finds the exits'."""
    short, whole = (show(["train", modality, flag], capsys) for flag in ("--help", "--help_all"))
    classes = [ModelArguments, MODALITIES[modality].data_arguments, EarlyExitTrainingArguments, CalibrationArguments]
    own = [field.name for kind in [*classes, *scheme_arguments()] for field in fields(kind) if field.name not in STOCK]
    for text in (short, whole):
        flags = [name for names in groups_of(text).values() for name in names]
        assert len(flags) == len(set(flags))
        ours = [name for name in flags if name in own]
        assert set(ours) == set(own)
        assert max(map(flags.index, ours)) < min(flags.index(name) for name in flags if name in STOCK)
    assert {"model", "data", "--method l2w", "--method boosted"} <= groups_of(short).keys()
    assert STOCK <= {name for names in groups_of(whole).values() for name in names}
    assert {"output_dir", "learning_rate", "num_train_epochs"} <= {n for ns in groups_of(short).values() for n in ns}
    assert len(short.splitlines()) < len(whole.splitlines()) / 2
    assert "--help_all" in short.splitlines()[-1]


def test_defaults_are_shown_once(capsys):
    """What breaks: a reader does not learn a default, or reads `Default: None`."""
    text = " ".join(show(["train", "text", "--help"], capsys).split())
    assert "truncated. Default: 128." in text and "Default: None" not in text
    assert "Turns --standardize_heads off." in text
    assert all(
        f"`{name}`" in text.split("--method NAME")[1].split("--exit_loss_weights")[0] for name in scheme_names()
    )


@pytest.mark.parametrize("trackers", [["wandb"], ["wandb", "tensorboard"]])
def test_several_trackers_can_be_named(trackers, tmp_path):
    """What breaks: the second tracker is refused as an argument that nothing uses."""
    flags = ["--report_to", *trackers, "--output_dir", str(tmp_path)]
    (arguments,) = RunParser({"training": EarlyExitTrainingArguments}).parse_args_into_dataclasses(flags)
    assert arguments.report_to == trackers
