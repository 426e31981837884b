"""Markdown, with text of unknown origin escaped."""

import html
import json
import re


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def escaped(value: str) -> str:
    """Text on one line, escaped so that it is shown literally, and cut after 300 characters."""
    line = " ".join(str(value).split())
    line = html.escape(line if len(line) <= 300 else f"{line[:299]}…", quote=False)
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", line)


def code_span(value: str) -> str:
    """Text as a code span of one line."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any fence in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def python_string(value: str) -> str:
    """Text as a Python string of one line."""
    return json.dumps(value, ensure_ascii=False)


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def numbered(noun: str, values: list[int]) -> str:
    if len(values) == 1:
        return f"{noun} {values[0]}"
    return f"{noun}s {', '.join(map(str, values[:-1]))} and {values[-1]}"
