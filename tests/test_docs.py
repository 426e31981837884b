"""The documentation: every public name is described, the page is that of the docstrings, links lead somewhere."""

import ast
import builtins
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import een_hf


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.glob("*.md"), *ROOT.glob("*.md"), *(ROOT / name / "README.md" for name in ("recipes", "benchmarks"))]
)


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them: lower case, spaces as hyphens, no other signs."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def python_blocks(page):
    if page.name == "api.md":  # signatures, and examples with prompts
        return []
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_api_page_is_that_of_the_docstrings(make_api):
    """What breaks: the reference describes arguments that are gone. `make docs` writes it."""
    assert (DOCS / "api.md").read_text(encoding="utf-8") == make_api.make_page()


def test_every_public_name_is_described(make_api):
    """What breaks: a name that users import is missing in the reference, or a whole package is."""
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    packages = [een_hf.__name__]
    packages += [f"een_hf.{found.name}" for found in pkgutil.iter_modules(een_hf.__path__) if found.ispkg]
    for package in packages:
        names = getattr(importlib.import_module(package), "__all__", None)
        if names is None:  # the commands offer no names; their --help describes them
            assert package == "een_hf.commands"
            continue
        assert package in make_api.MODULES
        missing = [name for name in names if f"\n### {package}.{name}\n" not in page]
        assert not missing, f"{package}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """What breaks: a link into a file or heading that was renamed."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_parse_and_import_what_is_there(page):
    """What breaks: an example that a reader copies does not even start."""
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "een_hf":
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_use_only_names_that_the_page_defines(page):
    """What breaks: a reader who copies the blocks of a page in order gets a NameError."""
    known = set(dir(builtins))
    for block in python_blocks(page):
        for statement in ast.parse(block).body:
            nodes = list(ast.walk(statement))
            known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
            known |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
            known |= {
                node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            }
            assert not {node.id for node in nodes if isinstance(node, ast.Name)} - known, block


@pytest.mark.slow
def test_notebook_runs_end_to_end(tmp_path, minilm_path):
    """What breaks: the first thing that a new user tries."""
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n\n".join(cells)]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracy, cost = map(float, re.search(r"accuracy (\S+) at (\S+) of the cost", done.stdout).groups())
    assert accuracy > 0.6  # five classes
    assert 0.3 < cost < 0.7
