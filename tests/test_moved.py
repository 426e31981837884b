"""Old import paths: they give the same objects, with a warning that names the new place."""

import importlib

import pytest


MOVED = {
    "een_hf.data.cifar": ("IMAGES", "ImageDataArguments", "load_image_data", "HUB_NAMES"),
    "een_hf.data.glue": ("TEXT", "TextDataArguments", "load_text_data", "encode_text_data", "text_columns"),
    "een_hf.data.images": ("decode_image", "standard_image", "seeded"),
    "een_hf.data.labels": ("model_label_ids", "PROBLEM_TYPES"),
    "een_hf.data.streaming": ("ImageStream",),
    "een_hf.data.task": ("check_splits", "cut_validation_split"),
    "een_hf.training.experiment": ("main", "parse_arguments", "load_model", "split_for_calibration"),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in MOVED.items() for name in names])
def test_old_paths_keep_working(module, name):
    """What breaks: code that was written for an earlier version fails at its import, or is not told the new path."""
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is deprecated: import it from") as caught:
        value = getattr(importlib.import_module(module), name)
    new = str(caught[-1].message).removesuffix(".").split(" from ")[-1]
    assert value is getattr(importlib.import_module(new), name)


def test_what_never_was_there_is_missing():
    """What breaks: a misspelled import is answered by something else than an AttributeError."""
    with pytest.raises(AttributeError, match="een_hf.data.cifar.*nothing"):
        _ = importlib.import_module("een_hf.data.cifar").nothing
