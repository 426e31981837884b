"""Files of texts, and one whole run on them."""

import pytest
from text_runs import tiny, write_csv

from een_hf.commands.train import main
from een_hf.data.text import TEXT


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        "train": write_csv(folder / "train.csv", 160, 1),
        "validation": write_csv(folder / "dev.csv", 60, 2),
        "test": write_csv(folder / "new.csv", 20, 3, labels=False),
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory, files, minilm_path):
    folder = tmp_path_factory.mktemp("whole") / "run"
    flags = [f"--{split}_file={path}" for split, path in files.items()]
    flags += ["--do_train", "--do_eval", "--do_predict", "--target_cost=0.8", "--learning_rate=0.01"]
    flags += ["--num_train_epochs=3", "--eval_strategy=epoch", f"--output_dir={folder}"]
    main(TEXT, tiny(minilm_path, *flags))
    return folder
