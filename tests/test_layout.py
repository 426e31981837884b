"""The files of the library: what they import, and what they say of themselves."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import een_hf


ROOT = Path(een_hf.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


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


def test_the_package_uses_no_path_of_its_own_that_is_deprecated():
    """What breaks: users see warnings over imports that are not theirs."""
    program = "import importlib, sys, warnings\nwarnings.filterwarnings('error', message='een_hf')\n"
    program += "for name in sys.argv[1:]: importlib.import_module(name)"
    names = [module_of(path) for path in FILES if path.name != "__main__.py"]
    done = subprocess.run([sys.executable, "-c", program, *names], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
