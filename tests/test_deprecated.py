"""Old import paths: they give the same objects, with a warning that names the new place."""

import importlib
import sys

import pytest
import torch
from factory import tiny_model, tiny_rows

from een_hf.inference import pad_rows


MOVED_NAMES = {
    "een_hf.data.cifar": ("IMAGES", "ImageDataArguments", "load_image_data", "HUB_NAMES"),
    "een_hf.data.glue": ("TEXT", "TextDataArguments", "load_text_data", "encode_text_data", "text_columns"),
    "een_hf.data.images": ("decode_image", "standard_image", "seeded"),
    "een_hf.data.labels": ("model_label_ids", "PROBLEM_TYPES"),
    "een_hf.data.streaming": ("ImageStream",),
    "een_hf.data.task": ("check_splits", "cut_validation_split"),
    "een_hf.evaluation": ("calibrate",),
    "een_hf.training.arguments": ("publishing",),
    "een_hf.training.experiment": ("main", "parse_arguments", "load_model", "split_for_calibration"),
    "een_hf.training.trainer": ("EpochLengthGroupedSampler", "register_scheme"),
}
MOVED_MODULES = {
    "een_hf.callbacks": "een_hf.training.callbacks",
    "een_hf.onnx": "een_hf.inference.onnx",
    "een_hf.pipelines": "een_hf.inference.pipelines",
    "een_hf.evaluation.calibration": "een_hf.calibration",
    "een_hf.training.forward_mode": "een_hf.training.l2w.forward_mode",
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in MOVED_NAMES.items() for name in names]
)
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


@pytest.mark.parametrize("old", MOVED_MODULES)
def test_old_modules_are_the_new_ones(old):
    """What breaks: imports and pickles of before; a second copy of a class, which no `isinstance` knows."""
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MOVED_MODULES[old].replace(".", r"\.")):
        found = importlib.import_module(old)
    assert found is importlib.import_module(MOVED_MODULES[old])


def test_the_old_attribute_of_a_scheme_is_the_new_one():
    from een_hf.training import JointExitTrainer

    with pytest.warns(DeprecationWarning, match="scheme"):
        assert JointExitTrainer.method == JointExitTrainer.scheme == "joint"


def test_the_old_name_of_the_calibration_rows_is_taken():
    """What breaks: code of before that names its rows; the new name says what transformers would."""
    from een_hf.training import JointExitTrainer

    class Asked(Exception):
        pass

    class Trainer(JointExitTrainer):
        def __init__(self):
            pass

        def costs_of(self, dataset, *settings):
            assert dataset == [{"input_ids": [1, 2]}]
            raise Asked

    with pytest.warns(DeprecationWarning, match="calibration_dataset"), pytest.raises(Asked):
        Trainer().calibrate(calibration_data=[{"input_ids": [1, 2]}], target_cost=0.5)


def test_the_old_name_of_the_data_collator_is_taken():
    """What breaks: code of before that batches rows itself is answered by a TypeError, or two collators are taken."""
    from een_hf import predict

    model, rows, seen = tiny_model().eval(), tiny_rows(count=4), []

    def collate(batch):
        seen.append(len(batch))
        return pad_rows(batch, model.config)

    with pytest.warns(DeprecationWarning, match=r"predict\(collator=\) is deprecated: give data_collator"):
        found = predict(model, rows, 2, collator=collate)
    assert sum(seen) == 4
    torch.testing.assert_close(found.logits, predict(model, rows, 2, data_collator=collate).logits)
    with pytest.raises(TypeError, match="data_collator, of which collator is the old name"):
        predict(model, rows, 2, collator=collate, data_collator=collate)
