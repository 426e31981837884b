"""Moved to `een_hf.runs`."""

from .._moved import moved_names


_PLACES = {
    "RunArguments": "een_hf.runs.arguments",
    "parse_arguments": "een_hf.runs.arguments",
    "load_model": "een_hf.runs.model",
    "labels_of_checkpoint": "een_hf.runs.model",
    "split_for_calibration": "een_hf.runs.results",
    "fitting_criterion": "een_hf.runs.costs",
    "main": "een_hf.commands.train",
}
__getattr__ = moved_names(__name__, _PLACES)
