"""Where a package of an extra is missing, one sentence names the extra; what inference on text needs is in none."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import een_hf
from een_hf.extras import MissingPackageError, named_extras


ROOT = Path(__file__).parents[1]
EXTRAS = ("vision", "train", "serve", "peft", "export")  # whose packages een_hf imports
NEEDS = {
    "from een_hf import calibrate": "train",
    "from een_hf import JointExitTrainer": "train",
    "from een_hf.data import load_bbc_news": "train",
    "import een_hf.training.callbacks": "train",
    "from een_hf.inference.onnx import check_output; check_output(Path('model.onnx'))": "export",
    "from een_hf.serving import create_app": "serve",
    "from een_hf.commands import main; main(['serve', 'runs/none'])": "serve",
    "from een_hf.commands import main; main(['calibrate', 'runs/none'])": "train",
}


def packages_of_extras(*extras) -> list[str]:
    """The packages, as they are imported, that extras bring (default: all that een_hf imports from)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    imported = {"pillow": ["PIL"], "scikit-learn": ["sklearn"], "datasets": ["datasets", "pyarrow"]}
    imported["onnxscript"] = ["onnxscript", "onnx_ir"]
    found = set()
    for extra in extras or EXTRAS:
        listed = re.search(rf"^{extra} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)[1]
        for name in re.findall(r'"([\w-]+)>=', listed):
            found.update(imported.get(name, [name]))
    return sorted(found)


# An interpreter in which no package of an extra is found: it answers a text, then says what each line above raises.
WITHOUT_EXTRAS = """
import importlib, json, sys
from importlib.machinery import PathFinder
from pathlib import Path

packages, lines = json.loads(sys.argv[1]), json.loads(sys.argv[2])
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *args: None if name.split(".")[0] in packages else find(name, *args))
import een_hf
from een_hf.evaluation import relative_costs

config = een_hf.EarlyExitBertConfig(
    vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
)
model = een_hf.EarlyExitBertForSequenceClassification(config).eval()
model.set_exit_policy({"criterion": "confidence", "thresholds": [0.0, 0.0]})
exits = een_hf.predict(model, [{"input_ids": [1, 2, 3]}]).exit_index.tolist()
errors = []
for line in lines:
    try:
        exec(line)
    except BaseException as error:
        errors.append(f"{type(error).__name__}: {error}")
raw = []
for module in sorted(Path("een_hf").rglob("*.py")):
    try:
        if module.parent.name != "commands" and module.stem != "__main__":  # `een-hf` imports those
            importlib.import_module(".".join(module.with_suffix("").parts).removesuffix(".__init__"))
    except ImportError as error:
        if type(error).__name__ != "MissingPackageError":
            raw.append(f"{module}: {error}")
costs = len(relative_costs(model, sequence_length=3))
print(json.dumps({"exits": exits, "costs": costs, "errors": errors, "raw": raw}))
"""


@pytest.fixture(scope="module")
def without_extras():
    command = [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps(packages_of_extras()), json.dumps([*NEEDS])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_text_inference_needs_no_extra(without_extras):
    """What breaks: `pip install een_hf` cannot answer a text."""
    assert without_extras["exits"] == [0]
    assert without_extras["costs"] == 2


def test_missing_package_names_its_extra(without_extras):
    """What breaks: `No module named ...` from the depth of an import, and a user who installs packages one by one."""
    sentence = r'This needs the package (\w+), which is not installed: pip install "een_hf\[(\w+)\]"\.'
    for (line, extra), error in zip(NEEDS.items(), without_extras["errors"], strict=True):
        kind = "SystemExit: error" if "main" in line else "MissingPackageError"
        found = re.fullmatch(f"{kind}: {sentence}", error)
        assert found, error
        assert found[2] == extra and found[1] in packages_of_extras(extra)


def test_every_module_names_the_extra_that_it_lacks(without_extras):
    """What breaks: a module that is imported by its own path, not through its package, ends in a raw ImportError."""
    assert without_extras["raw"] == []


def test_text_runs_do_not_speak_of_torchvision():
    """What breaks: with the extra `train` alone every text run warns that a processor of images lacks torchvision."""
    hidden = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *args: None if name.startswith("torchvision") else find(name, *args))
import een_hf.commands.train
"""
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "torchvision" not in done.stderr, done.stderr


def test_other_missing_modules_pass():
    """What breaks: an error of someone's own module is hidden behind a wrong remedy."""
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught, named_extras():
        import no_such_module  # noqa: F401
    assert not isinstance(caught.value, MissingPackageError)


@pytest.mark.parametrize("package", packages_of_extras())
def test_a_missing_package_is_told_with_an_extra_that_brings_it(package):
    """What breaks: the extra that an error names does not bring the package, or a package has none."""
    with pytest.raises(MissingPackageError, match=f"needs the package {package}, ") as caught, named_extras():
        raise ModuleNotFoundError(f"No module named '{package}.part'", name=f"{package}.part")
    assert package in packages_of_extras(re.search(r"een_hf\[(\w+)\]", str(caught.value))[1])


def test_names_of_extras_are_those_of_the_metadata():
    """What breaks: the built metadata has `-` for `_`, and pip 23.2 then installs nothing of such an extra."""
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    names = re.findall(r"^([\w-]+) = \[", section.split("[project.scripts]")[0], re.MULTILINE)
    assert "demo-app" in names
    assert [name for name in names if name != re.sub(r"[-_.]+", "-", name).lower()] == []


def test_version_is_in_one_place():
    """What breaks: a release whose metadata and module say different versions."""
    assert 'version = {attr = "een_hf.__version__"}' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("pyproject.toml", "setup.py"):
        assert een_hf.__version__ not in (ROOT / name).read_text(encoding="utf-8")


def test_the_lowest_versions_are_installed_for_every_bound(tmp_path):
    """What breaks: a bound with a name or extras that the Makefile does not read is never tested."""
    folder = tmp_path / "lowest"
    folder.mkdir()
    made = subprocess.run(
        ["make", "--always-make", "--dry-run", f"LOWEST={folder}", f"{folder}/.installed"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    subprocess.run(next(line for line in made.stdout.splitlines() if "lowest.txt" in line), shell=True, cwd=ROOT)
    needs = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.scripts]")[0].split("dynamic = ")[1]
    bounds = {f"{name.split('[')[0]}=={version}" for name, version in re.findall(r'"([^"]+)>=([^"]+)"', needs)}
    assert {*(folder / "lowest.txt").read_text().split()} == bounds
