"""Tiny fine-tuned models with unlabelled rows."""

import numpy as np
import pytest
import torch
from factory import TOKENS, tiny_processor, tiny_stock_model
from PIL import Image
from retrofitting.running import NUM_ROWS


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Kind to (folder of a stock classifier with its processor, the flag and the path of unlabelled rows)."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(TOKENS[5:], rng.integers(1, 12))) for _ in range(NUM_ROWS)]
    (folder / "texts.csv").write_text("\n".join(["text", *lines]))
    (folder / "images").mkdir()
    for index in range(NUM_ROWS):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"images/{index:03d}.png")

    # Models whose answers differ from row to row.
    for kind, settings in (("bert", {"vocab_size": len(TOKENS)}), ("vit", {"image_size": 16, "patch_size": 8})):
        tiny_stock_model(kind, seed=1, noise=0.3, **settings).save_pretrained(folder / kind)
        tiny_processor(kind, size=16).save_pretrained(folder / kind)
    rows = {"bert": ["--train_file", f"{folder}/texts.csv"], "vit": ["--train_dir", f"{folder}/images"]}
    return {kind: (str(folder / kind), *rows[kind]) for kind in rows}


@pytest.fixture
def rows_read():
    """Grows by the rows of every batch that goes through the first layer of a model with real tensors."""
    counts, layers = [], {}

    def hook(module, inputs):
        if type(module).__name__ in ("BertLayer", "ViTLayer") and inputs[0].device.type != "meta":
            layers.setdefault("first", module)
            if module is layers["first"]:
                counts.append(len(inputs[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    yield lambda: (sum(counts), counts.clear(), layers.clear())[0]
    handle.remove()
