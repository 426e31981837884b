"""How the files of the package import each other: no circles, no private names, no path that is deprecated."""

import ast
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def modules() -> dict[str, Path]:
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "een_hf").rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def at_import(body):
    """The import statements that run when a file is imported."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node
        elif isinstance(node, (ast.With, ast.Try)):
            yield from at_import(node.body)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from at_import([*node.body, *node.orelse])


def imported(name: str, path: Path, node: ast.ImportFrom) -> list[str]:
    """Full names that a statement imports."""
    parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return [".".join([*parts, *(node.module or "").split("."), alias.name]).replace("..", ".") for alias in node.names]


def test_no_file_imports_itself_through_others():
    """What breaks: whether an import works depends on which file is imported first."""
    files = modules()
    graph = {name: set() for name in files}
    for name, path in files.items():
        for node in at_import(ast.parse(path.read_text(encoding="utf-8")).body):
            found = imported(name, path, node)
            graph[name].update(full if full in files else full.rpartition(".")[0] for full in found)
    while graph:  # files that import none of the others are taken away, until none are left
        free = {name for name, others in graph.items() if not (others & graph.keys()) - {name}}
        assert free, sorted(graph)
        graph = {name: others for name, others in graph.items() if name not in free}


def test_private_names_stay_in_their_file():
    """What breaks: a change within one file breaks another."""
    files, private = modules(), []
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [full for full in imported(name, path, node) if full not in files]
                last = [full.rpartition(".")[2] for full in names]
                private += [full for full, own in zip(names, last, strict=True) if own[0] == "_" and own[:2] != "__"]
    assert not private


def test_the_package_uses_no_path_of_its_own_that_is_deprecated():
    """What breaks: users see warnings over imports that are not theirs."""
    shims = {name for name, path in modules().items() if "moved_module(" in path.read_text(encoding="utf-8")}
    names = [name for name in sorted(modules()) if name not in shims and not name.endswith("__main__")]
    program = "import importlib, sys, warnings\nwarnings.filterwarnings('error', message='een_hf')\n"
    program += "for name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
