"""What a run makes of a checkpoint: its scheme, its labels, its head, what it lacks."""

import json
import shutil

import pytest
from factory import TOKENS, download, tiny_model, tiny_processor, tiny_stock_config
from safetensors.torch import load_file, save_file
from text_runs import tiny
from transformers import (
    BertForTokenClassification,
    GPT2Config,
)

from een_hf.commands.train import main
from een_hf.data.text import TEXT, load_text_data
from een_hf.runs import parse_arguments
from een_hf.runs.model import load_for_run, load_model


def test_a_boosted_model_is_evaluated_as_one(files, minilm_path, tmp_path):
    """Without --method an evaluation must not take the boosting away: its exits would answer something else."""
    trained, again = tmp_path / "trained", tmp_path / "again"
    flags = [f"--validation_file={files['validation']}", "--do_eval", "--target_cost=0.8"]
    main(
        TEXT,
        tiny(
            minilm_path,
            *flags,
            f"--train_file={files['train']}",
            "--do_train",
            "--method=boosted",
            "--boost_temperature=1.0",
            "--learning_rate=0.01",
            f"--output_dir={trained}",
        ),
    )
    evaluate = [f"--model_name_or_path={trained}", *flags, "--max_seq_length=16", "--use_cpu", f"--output_dir={again}"]
    main(TEXT, evaluate)
    before, after = (json.loads((folder / "exit_results.json").read_text()) for folder in (trained, again))
    assert [row["loss"] for row in after["anytime"]] == pytest.approx([row["loss"] for row in before["anytime"]])
    config = json.loads((again / "config.json").read_text())
    assert (config["exit_aggregation"], config["boost_temperature"]) == ("boosted", 1.0)


def test_the_scheme_of_a_checkpoint_is_told_from_the_checkpoint(finished, files, tmp_path):
    """An evaluation that names no --method, or another, must not write that it trained the exits."""
    copy = shutil.copytree(finished, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    assert config["training_scheme"] == "joint"
    (copy / "config.json").write_text(json.dumps({**config, "training_scheme": "l2w"}))
    flags = [f"--model_name_or_path={copy}", f"--validation_file={files['validation']}", "--do_eval", "--use_cpu"]
    main(TEXT, [*flags, "--max_seq_length=16", f"--output_dir={tmp_path / 'again'}"])
    assert json.loads((tmp_path / "again" / "exit_results.json").read_text())["method"] == "l2w"
    assert "Learning to Weight Samples" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("do", ["--do_eval", "--do_predict"])
def test_a_checkpoint_without_a_layer_is_not_evaluated(do, finished, files, tmp_path):
    """What breaks: the figures, and the card, of a layer that was drawn at random."""
    shutil.copytree(finished, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    whole = {name: value for name, value in weights.items() if not name.startswith("bert.encoder.layer.1.")}
    assert len(whole) < len(weights)
    save_file(whole, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    flags = [f"--model_name_or_path={tmp_path / 'part'}", "--use_cpu", f"--output_dir={tmp_path / 'out'}", do]
    rows = [f"--{split}_file={files[split]}" for split in ("validation", "test")]
    with pytest.raises(SystemExit, match="--model_name_or_path .*part lacks weights, for example bert.encoder"):
        main(TEXT, [*flags, *rows])
    assert not (tmp_path / "out").exists()


def test_an_unsupported_architecture_is_named(files, minilm_path, tmp_path):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    flags = [f"--model_name_or_path={tmp_path / 'gpt2'}", f"--tokenizer_name={minilm_path}", "--do_train"]
    with pytest.raises(SystemExit, match="'gpt2'.*bert, .*mpnet.*Add an architecture"):
        main(TEXT, [*flags, f"--train_file={files['train']}", f"--output_dir={tmp_path / 'out'}"])


def test_labels_of_a_fine_tuned_checkpoint(finished, files, tmp_path):
    """Another number of labels, or an unknown one, is an error that names the way out."""
    three = tmp_path / "three.csv"
    three.write_text("text,label\n" + "".join(f"the plot is {w},{w}\n" for w in ("bad", "good", "odd") * 4))
    flags = [
        f"--model_name_or_path={finished}",
        "--do_train",
        f"--train_file={three}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    with pytest.raises(SystemExit, match="a head for 2 labels, the data have 3.*--ignore_mismatched_sizes"):
        main(TEXT, flags)
    other = tmp_path / "other.csv"
    other.write_text(three.read_text().replace("odd", "bad").replace("good", "fine"))
    with pytest.raises(SystemExit, match="label 'fine', which the model does not know"):
        main(TEXT, [*flags[:2], f"--train_file={other}", flags[3]])


def test_a_head_for_tokens_is_made_new(files, minilm_path, tmp_path):
    """Its labels are those of tokens: refusing it for their number, or keeping it as fine-tuned, is wrong."""
    config = tiny_stock_config(vocab_size=30522, num_labels=9)
    BertForTokenClassification(config).save_pretrained(tmp_path / "tokens")
    flags = tiny(minilm_path, "--do_train", f"--train_file={files['train']}", f"--output_dir={tmp_path / 'out'}")[2:]
    args = parse_arguments(TEXT, [f"--model_name_or_path={tmp_path / 'tokens'}", *flags])
    model = load_model(TEXT, args.model, load_text_data(args.data, splits_needed=["train"], seed=0))
    assert model.config.num_labels == 2
    assert model.is_new_head(model.num_exits - 1)


def test_a_checkpoint_of_another_scheme_is_not_resumed(files, minilm_path, tmp_path):
    flags = [f"--train_file={files['train']}", "--do_train", "--max_steps=2", "--save_steps=1"]
    main(TEXT, tiny(minilm_path, *flags, f"--output_dir={tmp_path / 'joint'}"))
    checkpoint = tmp_path / "joint" / "checkpoint-1"
    more = ["--method=boosted", f"--output_dir={tmp_path / 'boosted'}"]
    with pytest.raises(SystemExit, match="was trained with --method joint, not boosted.*--model_name_or_path"):
        main(TEXT, tiny(minilm_path, *flags, *more, f"--resume_from_checkpoint={checkpoint}"))
    shutil.rmtree(tmp_path / "boosted", ignore_errors=True)
    words = [
        word for word in tiny(minilm_path, *flags, *more) if not word.startswith(("--model_type", "--config_over"))
    ]
    main(TEXT, [*words, f"--model_name_or_path={checkpoint}"])
    assert json.loads((tmp_path / "boosted" / "config.json").read_text())["exit_aggregation"] == "boosted"


def test_the_tokenizer_is_of_the_models_revision(files, tmp_path):
    """What breaks: --model_revision takes the weights of one commit and the tokens of another, or is asked of the
    repository of another tokenizer, which has no such commit."""
    hub, other = tmp_path / "hub", TOKENS[::-1]
    for name, revision, tokens in (("model", "main", TOKENS), ("model", "old", other), ("tokens", "main", TOKENS)):
        download(hub, name, revision, tiny_model(num_labels=2), tiny_processor(tokens=tokens))
    flags = ["--model_name_or_path=someone/model", "--model_revision=old", f"--cache_dir={hub}", "--use_cpu"]
    flags += [f"--validation_file={files['validation']}", "--do_eval", f"--output_dir={tmp_path / 'out'}"]
    for more, wanted in (([], other), (["--tokenizer_name=someone/tokens"], TOKENS)):
        args = parse_arguments(TEXT, [*flags, *more])
        data = load_text_data(args.data, splits_needed=["validation"], seed=0)
        processor = load_for_run(TEXT, args, data).processor
        assert processor.convert_tokens_to_ids("a") == wanted.index("a")
