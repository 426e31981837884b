"""Small files of texts, and the flags of a tiny run on them."""

import csv
from pathlib import Path

import datasets
import numpy as np

from een_hf.data.glue import GLUE_TASKS


ROOT = Path(__file__).parents[1]
SHAPE = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32"
ADJECTIVES = {"good": 1, "great": 1, "bad": 0, "poor": 0}


def tiny(tokenizer, *flags):
    return [
        "--model_type=bert",
        f"--config_overrides={SHAPE}",
        f"--tokenizer_name={tokenizer}",
        "--max_seq_length=16",
        "--use_cpu",
        "--disable_tqdm=True",
        *map(str, flags),
    ]


def sentences(count, seed):
    rng = np.random.default_rng(seed)
    words = rng.choice(list(ADJECTIVES), count)
    filler = rng.choice(["plot", "cast", "music"], count)
    return [f"the {noun} is {word}" for noun, word in zip(filler, words, strict=True)], [ADJECTIVES[w] for w in words]


def write_csv(path, count, seed, labels=True):
    texts, classes = sentences(count, seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"] if labels else ["text"])
        writer.writerows(zip(texts, (["bad", "good"][c] for c in classes), strict=True) if labels else zip(texts))
    return path


def write_task(folder, task, count=40):
    """Small files in the Hub's schema, with hidden labels in the test split."""
    known = GLUE_TASKS[task]
    splits = ["train", "validation", "test"]
    if task == "mnli":
        splits = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    kind = datasets.ClassLabel(names=list(known.label_names)) if known.label_names else datasets.Value("float32")
    features = {name: datasets.Value("string") for name in known.text_columns}
    features |= {"label": kind, "idx": datasets.Value("int32")}
    for seed, split in enumerate(splits):
        columns = {name: sentences(count, 10 * seed + k)[0] for k, name in enumerate(known.text_columns)}
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, len(known.label_names), count) if known.label_names else rng.uniform(0, 5, count)
        labels = [-1] * count if split.startswith("test") else labels.tolist()
        rows = {**columns, "label": labels, "idx": list(range(100, 100 + count))}
        path = folder / task / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(path)
    return folder
