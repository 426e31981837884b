"""What every benchmark shares: models, machine, and results as JSON beside the script."""

import base64
import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from een_hf.models.policies import NEVER


# Of a training step; scheme: (against, time at most, memory at most).
STEP_TARGETS = {
    "joint": ("plain fine-tuning", 1.05, None),
    "boosted": ("plain fine-tuning", 1.05, None),
    "l2w, interval 1": ("joint", 4.0, 1.6),
    "l2w, interval 10": ("joint", 1.35, None),
}
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
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def make_inputs(model, batch_size: int, length: int | None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pixels (`length` None), or random tokens of full length."""
    generator = torch.Generator().manual_seed(seed)
    if length is None:
        size = model.config.image_size
        inputs = {"pixel_values": torch.randn(batch_size, 3, size, size, generator=generator)}
    else:
        vocabulary = model.config.vocab_size
        tokens = torch.randint(vocabulary // 30, vocabulary, (batch_size, length), generator=generator)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.inference_mode()
def exit_in_shares(model, inputs: dict, shares: list[float], criterion: str = "confidence") -> np.ndarray:
    """Set thresholds at which these shares of the inputs exit at each exit; equal scores exit together.

    Returns:
        (num_layers,): the share of the inputs that each layer sees.
    """
    policy = {"criterion": criterion, "thresholds": [NEVER] * model.num_exits}
    model.set_exit_policy(policy)
    scores = model.get_exit_policy().scores(model(**inputs, early_exit=False).exit_logits.float()).cpu()
    remaining = torch.ones(len(scores), dtype=torch.bool)
    for index, share in enumerate(np.cumsum(shares)[:-1]):
        count = round(share * len(scores)) - int((~remaining).sum())
        ordered = scores[remaining, index].sort(descending=True).values
        if count < 1 or len(ordered) == 0:
            continue
        last = ordered[min(count, len(ordered)) - 1]
        lower = ordered[ordered < last]
        if len(lower):
            last = (last + lower[0]) / 2
        elif len(ordered) > 1 and last == ordered[0]:
            continue  # all the same: all or none would exit
        policy["thresholds"][index] = last.item()
        remaining &= scores[:, index] < last
    model.set_exit_policy(policy)
    exits = model(**inputs).exit_index.cpu().numpy()
    depth = np.array(model.config.exit_layers)[exits]
    return np.array([(depth > layer).mean() for layer in range(len(model.backbone_layers))])


def pack_bits(bits: np.ndarray) -> str:
    """Booleans as text: eight to a byte, base 64."""
    return base64.b64encode(np.packbits(bits)).decode()


def unpack_bits(text: str, count: int) -> np.ndarray:
    """The `count` booleans that `pack_bits` made text of."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count).astype(bool)


def ratio(seconds: dict, numerator: str, denominator: str) -> float:
    """Median over the rounds: one and the other of a round saw the same machine."""
    return float(np.median(np.divide(seconds[numerator], seconds[denominator])))


RESULTS = Path(__file__).parent / "results"


def add_results_argument(parser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")


def command_line(script: str, words: list[str]) -> str:
    """The command as anyone would type it: what lies outside the project is named without its place."""
    words = [f"path/to/{Path(word).name}" if word.startswith(("..", os.sep)) else word for word in words]
    return shlex.join(["python", script, *words])


def write_results(folder: Path, name: str, rows: list[dict], **more) -> None:
    """Write `<folder>/<name>.json`: the rows, the machine, the versions, the command, and what else is given."""
    folder.mkdir(parents=True, exist_ok=True)
    command = command_line(f"benchmarks/{Path(sys.argv[0]).name}", sys.argv[1:])
    content = {"command": command, "machine": machine(), "rows": rows, **more}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {folder / name}.json")
