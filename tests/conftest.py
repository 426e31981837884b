"""What all tests share. Nothing is downloaded: the Hub is switched off before any library reads the setting."""

import gc
import os
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_finish():
    """`Trainer.train` collects garbage; what the imports made, by far the most objects, need not be visited."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real data sets and models that are too large for the repository."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs the folder shared/data beside the repository")
    return folder


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Folder of the installed MiniLM encoder."""
    from een_hf.data import DataError, sample_model_path

    try:
        return sample_model_path("minilm")
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture
def tokens_read():
    """Grows by the token ids of every row that a text model is trained on."""
    import torch

    read = []

    def hook(module, inputs):
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings > 1000 and module.training:
            read.extend(inputs[0].tolist())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    yield read
    handle.remove()
