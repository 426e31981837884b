"""Features are read once, kept in chunks, and used again only where they are the same."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factory import NUM_LABELS
from retrofitting.running import CHUNK, NUM_ROWS, chunks, weights, words_of
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForSequenceClassification,
)

from een_hf.commands import main, retrofit
from een_hf.evaluation import load_exit_logits
from een_hf.retrofitting.arguments import RowArguments
from een_hf.retrofitting.rows import UnlabelledImages


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
    changed.write_text("\n".join([*lines[:-1], "a a a"]))
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


def test_an_image_that_was_replaced_is_another_row(sources, tmp_path):
    """What breaks: features of the image before, which had the same name, are taken for its own."""
    folder, _, images = sources["vit"]
    for path in sorted(Path(images).iterdir())[:3]:
        shutil.copy(path, tmp_path)
    args, config = RowArguments(model=folder, train_dir=str(tmp_path)), AutoConfig.from_pretrained(folder)
    before = UnlabelledImages(args, config).fingerprint()
    shutil.copy(sorted(Path(images).iterdir())[3], tmp_path / "001.png")
    after = UnlabelledImages(args, config).fingerprint()
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, False, True]


def test_exits_are_trained_on_no_row_that_certifies(sources, tmp_path):
    """What breaks: the certificate is measured on rows that the exits have seen, and promises too much."""
    folder, flag, path = sources["bert"]
    main(words_of(sources["bert"], tmp_path / "one"))
    certifying = load_exit_logits(tmp_path / "one")["row_ids"]
    lines = Path(path).read_text().splitlines()
    for row in certifying.tolist():
        lines[1 + row] = " ".join("a" * len(lines[1 + row].split()))  # as long: batches stay as they are
    (tmp_path / "texts.csv").write_text("\n".join(lines))
    main(words_of((folder, flag, str(tmp_path / "texts.csv")), tmp_path / "other"))
    assert 0 < len(certifying) < NUM_ROWS and weights(tmp_path / "one") == weights(tmp_path / "other")
    assert not np.array_equal(*(load_exit_logits(tmp_path / name)["logits"] for name in ("one", "other")))


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
    first, second, third, *others = chunks(tmp_path)
    first.write_bytes(first.read_bytes()[:-40])
    second.write_bytes(b"")
    np.savez(third, features=np.zeros((CHUNK, 2, 15), np.float32), logits=np.zeros((CHUNK, NUM_LABELS), np.float32))
    with np.load(others[0]) as found:
        np.savez(others[0], features=found["features"], logits=found["logits"][:, 1:])
    with np.load(others[1]) as found:
        np.savez(others[1], features=found["features"] * np.nan, logits=found["logits"])
    (first.parent / f".{first.name}.1.tmp").write_bytes(b"half")
    rows_read()
    main(words)
    assert rows_read() == 5 * CHUNK
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
    assert re.match(
        f"error: .*{named} could not be written .*: free space on the disk of --output_dir, .* continues from", line
    )
    assert len(chunks(tmp_path / "full")) == kept and not list((tmp_path / "full").rglob(".*.tmp"))
    main(words)
    assert rows_read() == NUM_ROWS - min(kept * CHUNK, NUM_ROWS)
    main(words_of(sources["bert"], tmp_path / "whole"))
    assert weights(tmp_path / "full") == weights(tmp_path / "whole")
