"""What all tests share. Nothing is downloaded: the Hub is switched off before any library reads the setting."""

import gc
import os
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


# Files that take long. They come first, so that two processes end at the same time.
LONG = {
    "test_benchmarks.py",
    "test_callbacks.py",
    "test_distributed.py",
    "test_docs.py",
    "test_docstrings.py",
    "test_gpu_benchmark.py",
    "test_load.py",
    "test_onnx.py",
    "test_pushing.py",
    "test_quantization.py",
    "test_ray.py",
    "test_recipes.py",
    "test_resume.py",
    "test_run_cifar_een.py",
    "test_scripts_distributed.py",
    "test_trained_models.py",
    "test_trainer.py",
    "test_transformers_common.py",
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_visit():
    """`Trainer.train` collects garbage; what imports and the files before have made need not be visited each time."""
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
