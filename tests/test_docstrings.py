"""The docstrings of public names: their sections, in one order, and their examples, which run."""

import ast
import asyncio
import doctest
import importlib
import importlib.util
import inspect
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from factory import TOKENS, tiny_processor, tiny_stock_model

import een_hf
from een_hf.data.text import TEXT
from een_hf.models import MODEL_CLASSES, register_architecture
from een_hf.models.criteria import CRITERIA
from een_hf.models.exits import EXIT_HEADS, POOLINGS
from een_hf.runs import parse_arguments, run_experiment
from een_hf.training.registry import get_scheme, scheme_names


ORDER = ("Args", "Returns", "Yields", "Raises", "Example", "References")
SLOW = {"een_hf.export_onnx", "een_hf.GraphCalibration"}  # take a minute; test_onnx.py and test_quantization.py export


def public_objects():
    """(name, object) of every public class and function, once, by the first module that offers it."""
    path = Path(__file__).parents[1] / "docs" / "make_api.py"
    spec = importlib.util.spec_from_file_location("make_api", path)
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    found = {}
    for module_name in make_api.MODULES:
        module = importlib.import_module(module_name)
        for name in make_api.public_names(module):
            value = getattr(module, name)
            if isinstance(value, type) or inspect.isfunction(value):
                found.setdefault(id(value), (f"{module_name}.{name}", value))
    return [*found.values()]


PUBLIC = dict(public_objects())


def sections_of(docstring: str) -> dict[str, str]:
    """The text of each section, in order; '' is what comes before the first."""
    parts = re.split(r"^(\w+):$", docstring, flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def described(sections: dict[str, str]) -> set[str]:
    """The arguments that Args describes; one line may describe several."""
    text = textwrap.dedent(sections.get("Args", ""))
    lines = re.findall(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*):", text, re.MULTILINE)
    return {name.lstrip("*") for line in lines for name in line.split(", ")}


def arguments_of(function: ast.FunctionDef) -> set[str]:
    given = function.args
    return {part.arg for part in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}


def problems_of_function(function: ast.FunctionDef) -> list[str]:
    sections = sections_of(ast.get_docstring(function))
    if sections[""].startswith("As in"):  # described where the method comes from
        return []
    found = problems_of_order(sections)
    if missing := arguments_of(function) - described(sections):
        found.append(f"Args lacks {sorted(missing)}")
    gives = any(isinstance(node, ast.Return | ast.Yield) and node.value for node in ast.walk(function))
    gives = gives and (function.returns is None or ast.unparse(function.returns) != "None")
    if gives and not {"Returns", "Yields"} & sections.keys():
        found.append("no Returns")
    raised = {ast.unparse(node.exc) for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc}
    if raised - {"NotImplementedError"} and "Raises" not in sections:
        found.append("no Raises")
    return found


def problems_of_order(sections: dict[str, str]) -> list[str]:
    names = [name for name in sections if name]
    if unknown := [name for name in names if name not in ORDER]:
        return [f"unknown sections {unknown}"]
    return [] if names == sorted(names, key=ORDER.index) else [f"order {names}"]


def problems_of_class(node: ast.ClassDef, value: type) -> list[str]:
    sections = sections_of(ast.get_docstring(node))
    found = problems_of_order(sections)
    init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if init is not None:
        missing = arguments_of(init) - described(sections)
        if issubclass(value, transformers.PreTrainedModel):
            missing -= {"config"}
    else:  # the fields of a dataclass; those with a help text are flags, which the reference lists
        fields = getattr(value, "__dataclass_fields__", {}) if node.decorator_list else {}
        own = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
        missing = {name for name in own if name in fields and "help" not in fields[name].metadata}
        missing -= described(sections)
        if issubclass(value, transformers.PreTrainedConfig) and len(fields) > len(own):
            missing = {name for name in missing if not name.startswith("_")}
    return [*found, *([f"Args lacks {sorted(missing)}"] if missing else [])]


@pytest.mark.parametrize("name", PUBLIC)
def test_sections(name):
    """What breaks: a reader looks for a shape, a result or an error, and has to read the code."""
    value = PUBLIC[name]
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]
    assert ast.get_docstring(node), "no docstring"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        assert problems_of_function(node) == []
        return
    assert problems_of_class(node, value) == []
    for method in node.body:
        if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) or method.name.startswith("_"):
            continue
        if not ast.get_docstring(method):  # then a base class describes it
            assert any(inspect.getdoc(getattr(base, method.name, None)) for base in value.__mro__[1:]), method.name
        elif not any("property" in ast.unparse(decorator) for decorator in method.decorator_list):
            assert problems_of_function(method) == [], method.name


def test_every_function_at_the_top_has_an_example():
    """What breaks: the first thing that a reader copies is missing."""
    functions = [name for name in een_hf.__all__ if inspect.isfunction(getattr(een_hf, name))]
    assert len(functions) > 10
    assert [name for name in functions if "Example:" not in getattr(een_hf, name).__doc__] == []


EXAMPLES = [name for name, value in PUBLIC.items() if ">>>" in (value.__doc__ or "") and name not in SLOW]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with fine-tuned models and finished runs under the names that examples use."""
    folder = tmp_path_factory.mktemp("examples")
    for kind in ("bert", "vit"):
        settings = {"vocab_size": len(TOKENS)} if kind == "bert" else {}
        model = tiny_stock_model(kind, noise=0.3, num_hidden_layers=3, num_labels=2, **settings)
        model.save_pretrained(folder / f"my-finetuned-{kind}")
        tiny_processor(kind).save_pretrained(folder / f"my-finetuned-{kind}")
    lines = [f"{TOKENS[5 + index % 6]} {TOKENS[5 + index % 5]},{index % 2}" for index in range(60)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]))
    flags = f"--model_name_or_path {folder}/my-finetuned-bert --train_file {folder}/rows.csv --use_cpu true "
    flags += f"--validation_file {folder}/rows.csv --do_train --do_eval --max_steps 2 --disable_tqdm true "
    flags += "--save_strategy no --target_cost 0.8"
    run_experiment(TEXT, parse_arguments(TEXT, [*flags.split(), "--output_dir", f"{folder}/runs/mine"]))
    shutil.copytree(folder / "runs" / "mine", folder / "runs" / "other")
    return folder


@pytest.fixture(scope="module")
def rows_with_labels():
    return een_hf.data.load_digits()["test"]


@pytest.fixture
def namespace(workplace, rows_with_labels, monkeypatch):
    """What an example may use without making it."""
    monkeypatch.chdir(workplace)
    registries = {id(registry): (registry, dict(registry)) for registry in (CRITERIA, EXIT_HEADS, POOLINGS)}
    names, classes = scheme_names(), dict(MODEL_CLASSES.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained("my-finetuned-bert")
    texts = [" ".join(TOKENS[5 + (index * step) % 6] for step in range(1, 5)) for index in range(120)]
    yield {
        **{module.__name__: module for module in (een_hf, torch, transformers, asyncio)},
        "np": np,
        "model": een_hf.inference.load_early_exit_model("runs/mine", device="cpu"),
        "tokenizer": tokenizer,
        "texts": texts,
        "rows": [{**tokenizer(text), "labels": index % 2} for index, text in enumerate(texts[:24])],
        "rows_with_labels": rows_with_labels,
    }
    for registry, before in registries.values():
        registry.clear()
        registry.update(before)
    for model_class in classes.values():
        register_architecture(model_class)
    registry = get_scheme.__globals__["_SCHEMES"]
    for name in {*scheme_names()} - {*names}:
        del registry[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, namespace):
    """What breaks: an example that a reader copies ends in an error, or shows another result."""
    docstring = inspect.getdoc(PUBLIC[name])
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    example = doctest.DocTestParser().get_doctest(docstring, namespace, name, None, None)
    output = []
    runner = doctest.DocTestRunner(optionflags=options, verbose=False)
    runner.run(example, out=output.append, clear_globs=False)
    assert not output, "".join(output)
