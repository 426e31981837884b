"""Arguments of a run that are published hold no secret; those that are not are whole."""

import copy
import pickle

from een_hf.training import EarlyExitTrainingArguments
from een_hf.training.publishing import publishing


def test_arguments_are_whole_unless_they_are_published(tmp_path):
    """Another process that gets them pickled must write to the same folder and push with the same token."""
    args = EarlyExitTrainingArguments(str(tmp_path / "out"), hub_token="hf_planted", report_to="none", use_cpu=True)
    for again in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), copy.copy(args)):
        assert (again.output_dir, again.hub_token) == (args.output_dir, "hf_planted")
    with publishing():
        told = pickle.loads(pickle.dumps(args))
    assert (told.output_dir, told.hub_token, told.learning_rate) == ("out", None, args.learning_rate)
    assert (args.to_dict()["output_dir"], args.to_dict()["hub_token"]) == ("out", None)
