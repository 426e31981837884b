"""What every benchmark shares: models, machine, and results as JSON beside the script."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


PACKAGES = ("torch", "transformers", "datasets", "accelerate", "timm")


def summarize(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles of repeats, in milliseconds."""
    low, middle, high = (1000 * np.percentile(seconds, (25, 50, 75))).tolist()
    return {"median_ms": middle, "quartile_1_ms": low, "quartile_3_ms": high, "repeats": len(seconds)}


def machine() -> dict:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


RESULTS = Path(__file__).parent / "results"


def add_results_argument(parser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")


def command_line(script: str, words: list[str]) -> str:
    """The command as anyone would type it: what lies outside the project is named without its place."""
    words = [f"path/to/{Path(word).name}" if word.startswith(("..", os.sep)) else word for word in words]
    return shlex.join(["python", script, *words])


def write_results(folder: Path, name: str, rows: list[dict]) -> None:
    """Write `<folder>/<name>.json`: the rows, the machine, the versions and the command."""
    folder.mkdir(parents=True, exist_ok=True)
    command = command_line(f"benchmarks/{Path(sys.argv[0]).name}", sys.argv[1:])
    content = {"command": command, "machine": machine(), "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {folder / name}.json")
