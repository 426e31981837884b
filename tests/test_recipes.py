"""Recipes as files and as shell scripts: methods compare by one recipe, and the scripts run whole."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from factory import tiny_stock_model
from PIL import Image
from text_runs import write_task
from transformers import AutoTokenizer, ViTImageProcessor

from een_hf.data.images import IMAGES
from een_hf.data.text import TEXT
from een_hf.runs import parse_arguments
from een_hf.training import get_scheme
from een_hf.training.history import RUN_FILE


ROOT = Path(__file__).parents[1]
LAYERS = 12


def own_flags(method):
    """What only this method reads, and where its run goes."""
    kind = get_scheme(method).arguments_class
    return {"method", "output_dir", *(field.name for field in (fields(kind) if kind else ()))}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_holds_flags_of_its_script(path):
    """What breaks: a recipe ends at a flag that was renamed, or its runs overwrite those of another."""
    modality = IMAGES if path.stem.startswith(("best_image", "cifar", "digits")) else TEXT
    arguments = parse_arguments(modality, [str(path), "--use_cpu"])  # bf16 needs that or a GPU
    assert Path(arguments.training.output_dir) == Path("runs") / path.stem


@pytest.mark.parametrize("family", ["cifar100_noniid_vit", "sst2_bert", "digits_vit_smoke"])
def test_methods_differ_in_their_own_flags_only(family):
    """What breaks: a method looks better than another by its optimizer, epochs or augmentation."""
    common = {}
    for method in ("joint", "boosted", "l2w"):
        recipe = yaml.safe_load((ROOT / "recipes" / f"{family}_{method}.yaml").read_text())
        assert recipe["method"] == method
        common[method] = {name: value for name, value in recipe.items() if name not in own_flags(method)}
    assert common["joint"] == common["boosted"] == common["l2w"]


@pytest.mark.parametrize("name", ["boosted", "l2w", "l2w_imagenet"])
def test_recipes_by_a_papers_settings_clip_nothing(name):
    """What breaks: transformers clips the norm to 1 by default, which the papers' SGD at rate 0.1 does not."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"cifar100_vit_{name}.yaml").read_text())
    assert (recipe["optim"], recipe["learning_rate"], recipe["max_grad_norm"]) == ("sgd", 0.1, 0)


# The shell scripts. They run where recipes/ and the Python scripts are, and write there: a folder of links is enough.


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("recipes", "run_cifar_een.py", "run_glue_een.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_script(workplace, name, *words, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **environment}
    command = ["bash", f"recipes/{name}", *map(str, words)]
    return subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)


def runs_of(folder):
    """Results and flags of the three runs in a folder, flags without each method's own."""
    results, settings = [], []
    for name, method in (("base", "joint"), ("l2w", "l2w"), ("boosted", "boosted")):
        results.append(json.loads((folder / name / "exit_results.json").read_text()))
        found = json.loads((folder / name / RUN_FILE).read_text())["settings"]
        settings.append({name: value for name, value in found.items() if name not in own_flags(method)})
    return results, settings


@pytest.mark.slow
def test_run_cifar_fills_a_folder(workplace, tmp_path):
    """Parts cut by the script itself, a ViT of twelve layers, 4,000 images of CIFAR-100's columns."""
    draw = np.random.default_rng(0)
    names = datasets.ClassLabel(num_classes=100)
    columns = {"img": datasets.Image(), "fine_label": names, "coarse_label": datasets.ClassLabel(num_classes=20)}
    for split, count in (("train", 4000), ("test", 200)):
        rows = {
            "img": [Image.fromarray(pixels) for pixels in draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)],
            "fine_label": [row % 100 for row in range(count)],
            "coarse_label": [row % 20 for row in range(count)],
        }
        path = tmp_path / "cifar" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, datasets.Features(columns)).to_parquet(path)
    tiny_stock_model("vit", image_size=224, patch_size=16, num_hidden_layers=LAYERS).base_model.save_pretrained(
        tmp_path / "vit"
    )
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    flags = ["--model_name_or_path", tmp_path / "vit", "--max_steps", 2, "--dataloader_num_workers", 0]
    for method in ("base", "l2w", "boosted"):
        done = run_script(
            workplace, "run_cifar.sh", tmp_path / "exps", method, "cpu", *flags, DATASET=str(tmp_path / "cifar")
        )
        assert done.returncode == 0, done.stderr[-3000:]
    results, settings = runs_of(tmp_path / "exps")
    assert [found["method"] for found in results] == ["joint", "l2w", "boosted"]
    assert all(found["exit_layers"] == [3, 6, 9, 12] and found["num_eval_samples"] == 200 for found in results)
    assert settings[0] == settings[1] == settings[2]
    assert (settings[0]["partition_dir"], settings[0]["partition_id"]) == ("dataset/cifar100_noniid1000", "all")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory, minilm_path):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    tiny_stock_model(
        "bert", vocab_size=len(tokenizer), max_position_embeddings=512, num_hidden_layers=LAYERS
    ).base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_run_glue_fills_a_folder(workplace, tiny_bert, tmp_path):
    glue = write_task(tmp_path / "glue", "mrpc")
    flags = ["--model_name_or_path", tiny_bert, "--dataset_name", glue, "--max_steps", 2]
    for method in ("base", "l2w", "boosted"):
        done = run_script(workplace, "run_glue.sh", tmp_path / "exps", method, "cpu", "mrpc", *flags)
        assert done.returncode == 0, done.stderr[-3000:]
    results, settings = runs_of(tmp_path / "exps")
    assert [found["method"] for found in results] == ["joint", "l2w", "boosted"]
    assert all(found["task_name"] == "mrpc" and len(found["exit_layers"]) == 12 for found in results)
    assert settings[0] == settings[1] == settings[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base", "boosted"])
def test_run_glue_on_a_regression(method, workplace, tiny_bert, tmp_path):
    """What breaks: the recipe's budget is calibrated by `confidence`, which a regression has not."""
    glue = write_task(tmp_path / "glue", "stsb")
    flags = ["--model_name_or_path", tiny_bert, "--dataset_name", glue, "--max_steps", 2]
    done = run_script(workplace, "run_glue.sh", tmp_path / "exps", method, "cpu", "stsb", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "exps" / method / "exit_results.json").read_text())
    assert results["policy"]["criterion"] == "patience"
    assert results["policy"]["calibrated_for"]["target_cost"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run_glue.sh", "exps", "l2w", "cpu", "stsb"], "l2w takes single-label classification only"),
        (["run_glue.sh", "exps", "plain", "cpu", "mrpc"], "METHOD must be base, l2w or boosted, not plain"),
        (["run_cifar.sh", "exps", "joint", "cpu"], "METHOD must be base, l2w or boosted, not joint"),
        (["run_cifar.sh", "exps", "base"], "recipes/run_cifar.sh SAVE_PATH METHOD DEVICE"),
        (["run_glue.sh", "exps", "base", "cpu"], "recipes/run_glue.sh SAVE_PATH METHOD DEVICE TASK"),
    ],
)
def test_wrong_words_are_answered_before_any_work(words, message, workplace):
    """What breaks: the data are cut or the model is loaded before the script finds out."""
    done = run_script(workplace, *words)
    assert done.returncode == 2 and message in done.stderr
    assert sorted(path.name for path in workplace.iterdir() if path.name != "dataset") == [
        "recipes",
        "run_cifar_een.py",
        "run_glue_een.py",
    ]
