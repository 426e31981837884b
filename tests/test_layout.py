"""The files of the library: what they import, and what they say of themselves."""

import ast
import importlib
import sys
from functools import cache
from pathlib import Path

import pytest

import een_hf


ROOT = Path(een_hf.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOVED = {
    "een_hf.callbacks": "een_hf.training.callbacks",
    "een_hf.onnx": "een_hf.inference.onnx",
    "een_hf.pipelines": "een_hf.inference.pipelines",
    "een_hf.evaluation.calibration": "een_hf.calibration",
    "een_hf.training.forward_mode": "een_hf.training.l2w.forward_mode",
}
MOVED_NAMES = {
    ("een_hf.evaluation", "calibrate"): "een_hf.calibration",
    ("een_hf.training.arguments", "publishing"): "een_hf.training.publishing",
    ("een_hf.training.trainer", "register_scheme"): "een_hf.training.registry",
    ("een_hf.training.trainer", "EpochLengthGroupedSampler"): "een_hf.training.sampling",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path):
    """(module, name) of every import from the library itself, those inside functions too, those for types not."""
    for_types = {
        inner
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node not in for_types:
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "een_hf":
                yield from ((module, alias.name) for alias in node.names)


def test_no_module_imports_itself_by_way_of_others():
    """What breaks: which of two modules is imported first decides whether both can be."""
    known = {module_of(path) for path in FILES}
    needs = {}
    for path in FILES:
        targets = {f"{module}.{name}" if f"{module}.{name}" in known else module for module, name in imports_of(path)}
        # A package that hands on names of its own files is not needed by them.
        needs[module_of(path)] = {t for t in targets if not module_of(path).startswith(f"{t}.")} - {module_of(path)}
    done = set()

    def visit(module: str, above: tuple[str, ...]):
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for target in sorted(needs.get(module, ())):
                visit(target, (*above, module))
            done.add(module)

    for module in sorted(needs):
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_is_and_takes_no_private_name(path):
    """What breaks: a helper of one file cannot be changed without reading all the others."""
    assert path.name == "__main__.py" or ast.get_docstring(tree_of(path)), path
    private = [(module, name) for module, name in imports_of(path) if name.startswith("_") and name != "__version__"]
    assert private == []


@pytest.mark.parametrize("old", MOVED)
def test_old_modules_are_the_new_ones(old):
    """What breaks: imports and pickles of before; a second copy of a class, which no `isinstance` knows."""
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MOVED[old].replace(".", r"\.")):
        found = importlib.import_module(old)
    assert found is importlib.import_module(MOVED[old])


@pytest.mark.parametrize(("module", "name"), MOVED_NAMES)
def test_old_names_are_the_new_ones(module, name):
    with pytest.warns(DeprecationWarning, match=MOVED_NAMES[module, name].replace(".", r"\.")):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(MOVED_NAMES[module, name]), name)


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

        def predict_exits(self, dataset, metric_key_prefix="test"):
            assert dataset == [{"input_ids": [1, 2]}]
            raise Asked

    with pytest.warns(DeprecationWarning, match="calibration_dataset"), pytest.raises(Asked):
        Trainer().calibrate(calibration_data=[{"input_ids": [1, 2]}], target_cost=0.5)
