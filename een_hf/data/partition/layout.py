"""What the files of a partition are called."""

import hashlib
from pathlib import Path


FORMATS = ("parquet", "npz")
PARTITION_FILE = "partition.json"
PLOT_FILE = "partition.png"
FOLDERS = {"train": "train", "validation": "valid"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
