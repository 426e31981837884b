"""Write docs/api.md, the reference of every public name, from the docstrings in the source.

python docs/make_api.py
"""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType


PAGE = Path(__file__).with_name("api.md")
MODULES = (
    "een_hf",
    "een_hf.models",
    "een_hf.inference",
    "een_hf.inference.pipelines",
    "een_hf.serving",
    "een_hf.training",
    "een_hf.training.callbacks",
    "een_hf.calibration",
    "een_hf.evaluation",
    "een_hf.data",
    "een_hf.hub",
    "een_hf.runs",
    "een_hf.retrofitting",
    "een_hf.inference.onnx",
    "een_hf.inference.quantization",
)
_SECTIONS = ("Args", "Returns", "Yields", "Raises", "References")


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: `__all__`, or the public classes and functions that it defines."""
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return sorted(getattr(module, "__all__", defined))


def make_page() -> str:
    """The whole page. Every object is described once, in the first module that offers it, and linked from others."""
    parts = [
        "# API reference",
        "Written by `make docs` from the docstrings. [Extending](extending.md) says how to add your own parts.",
        "Examples use a saved model with exits as `model`, its `tokenizer`, a list of `texts`, and `rows`, which are\n"
        "tokenized texts with labels.",
    ]
    described = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        parts += [f"## {module_name}", _text(inspect.getdoc(module) or "")]
        for name in public_names(module):
            value = getattr(module, name)
            place = described.setdefault(id(value), f"{module_name}.{name}")
            if place != f"{module_name}.{name}":
                parts.append(f"### {module_name}.{name}\n\nThe same as [{place}](#{place.replace('.', '').lower()}).")
            else:
                parts.append(f"### {place}")
                parts += _describe(value)
    return "\n\n".join(part for part in parts if part) + "\n"


def _describe(value) -> list[str]:
    if isinstance(value, str):
        return [f"`{value!r}`"]
    if not callable(value):  # a registry; what was added from outside is no part of the library
        own = [name for name, part in value.items() if part.__module__.startswith("een_hf.")]
        return ["By name: " + ", ".join(f"`{name}`" for name in sorted(own)) + "."]
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]
    if not isinstance(node, ast.ClassDef):
        return [_signature(node, node.name), _text(ast.get_docstring(node) or "")]
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    init = next((method for method in methods if method.name == "__init__"), None)
    bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
    parts = [_signature(init, node.name) if init else "", f"Bases: {bases}." if bases else ""]
    parts += [_text(ast.get_docstring(node) or ""), _fields(node)]
    for method in methods:
        if not method.name.startswith("_") and (text := ast.get_docstring(method)):
            parts += [f"#### {node.name}.{method.name}", _signature(method, method.name), _text(text)]
    return parts


def _signature(node: ast.FunctionDef, name: str) -> str:
    if any(ast.unparse(decorator) in ("property", "cached_property") for decorator in node.decorator_list):
        return f"```python\n{name}  # property\n```"
    given = [*node.args.posonlyargs, *node.args.args]
    if given and given[0].arg in ("self", "cls"):
        del (node.args.posonlyargs or node.args.args)[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and name == node.name else ""
    line = f"{name}({ast.unparse(node.args)}){returns}"
    return f"```python\n{line}\n```"


def _fields(node: ast.ClassDef) -> str:
    """The fields of a dataclass whose metadata hold help, as flags of the scripts do."""
    lines = []
    for part in node.body:
        if not isinstance(part, ast.AnnAssign) or not isinstance(part.value, ast.Call):
            continue
        settings = {keyword.arg: keyword.value for keyword in part.value.keywords}
        if "metadata" not in settings:
            continue
        metadata = dict(
            zip(map(ast.literal_eval, settings["metadata"].keys), settings["metadata"].values, strict=True)
        )
        try:
            text = ast.literal_eval(metadata["help"])
        except (KeyError, ValueError):  # none, or put together from other names
            text = None
        default = f", default `{ast.unparse(settings['default'])}`" if "default" in settings else ""
        lines.append(f"- `{ast.unparse(part.target)}` (`{ast.unparse(part.annotation)}`{default})")
        lines[-1] += f": {text}" if text else ""
    return "\n".join(lines)


def _prose(text: str) -> str:
    """Text in which a formula as `f[i](x)` is no link."""
    return text.replace("](", "]\\(")


def _text(docstring: str) -> str:
    """A Google docstring as Markdown."""
    blocks, lines = [], docstring.splitlines()
    while lines:
        line = lines.pop(0)
        section = re.fullmatch(rf"({'|'.join(_SECTIONS)}|Examples?):", line)
        if not section:
            blocks.append(_prose(line))
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        body = textwrap.dedent("\n".join(body)).strip("\n")
        blocks += ["", f"**{section[1]}**", ""]
        if section[1].startswith("Example"):
            blocks += ["```python", body, "```", ""]
        elif section[1] in ("Args", "Raises"):
            items = re.sub(r"^(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*):", r"- `\1`:", _prose(body), flags=re.MULTILINE)
            blocks += [items, ""]
        else:
            blocks += [_prose(body), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(blocks)).strip()


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"Page: {PAGE}")
