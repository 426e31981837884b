"""The examples of a model card: exit 1 is right, only the last exit is right, or exit 1 is wrong."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from ..models import ExitConfigurationError
from .markdown import escaped, figure, table


# A Trainer never pushes files whose names begin with an underscore.
PRIVATE_EXAMPLES = "_examples"
SHARED_EXAMPLES = "examples"
_EXAMPLE_TITLES = {
    "most_confident": "The most confident right answers of exit 1",
    "deep": "Only the last exit was right",
    "mistakes": "The most confident mistakes of exit 1",
}
_OLD_KINDS = {"most_confident": "surest"}  # in files that earlier releases wrote
_EXAMPLE_IMAGE = re.compile(r"\w+-\d+\.png")


def choose_examples(
    exit_logits: np.ndarray, labels: np.ndarray, label_names: list[str], count: int = 3
) -> dict[str, list[dict]]:
    """Choose rows of three kinds: exit 1 confident and right, only the last exit right, exit 1 confident and wrong.

    Args:
        exit_logits: (num_rows, num_exits, num_labels).
        labels: (num_rows,), class ids.
        label_names: one per class.
        count: largest number of rows of each kind.

    Returns:
        by `most_confident`, `deep` and `mistakes`: `row` (position), `label`, `predictions` (one per exit) and
        `confidence` (the largest softmax probability at exit 1), the most confident first; `deep` is ordered by the
        confidence of the last exit.
    """
    logits = np.asarray(exit_logits, dtype=np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    confidence = 1 / odds.sum(-1)
    predictions = logits.argmax(-1)
    right = predictions == np.asarray(labels)[:, None]
    chosen = {
        "most_confident": (right[:, 0], confidence[:, 0]),
        "deep": (right[:, -1] & ~right[:, :-1].any(1), confidence[:, -1]),
        "mistakes": (~right[:, 0], confidence[:, 0]),
    }
    if logits.shape[1] == 1:
        del chosen["deep"]
    return {
        kind: [
            {
                "row": int(row),
                "label": label_names[int(labels[row])],
                "predictions": [label_names[index] for index in predictions[row]],
                "confidence": float(confidence[row, 0]),
            }
            for row in np.argsort(-scores, kind="stable")
            if fits[row]
        ][:count]
        for kind, (fits, scores) in chosen.items()
    }


def write_examples(
    folder: str | os.PathLike, examples: dict[str, list[dict]], rows, columns: list[str], *, shared: bool
) -> Path:
    """Write examples into the folder of a run.

    User data are private: only with `shared` they are written to `examples/`, which the card shows and a push
    includes; otherwise to `_examples/`, which is never pushed. Images are PNG files, at most 160 pixels wide and high.

    Args:
        folder: folder of the run.
        examples: as `choose_examples` returns them.
        rows: the data set whose positions are `row`.
        columns: its text columns, or its one image column.
        shared: whether they may be published.

    Returns:
        folder of the examples.
    """
    for name in (PRIVATE_EXAMPLES, SHARED_EXAMPLES):
        shutil.rmtree(Path(folder, name), ignore_errors=True)
    path = Path(folder, SHARED_EXAMPLES if shared else PRIVATE_EXAMPLES)
    path.mkdir()
    from ..data.decoding import standard_image

    told = {kind: [] for kind in examples}
    for kind, chosen in examples.items():
        for number, example in enumerate(chosen, 1):
            row = rows[example["row"]]
            values = [row[column] for column in columns]
            if isinstance(values[0], str):
                shown = {"text": values}
            else:
                shown = {"image": f"{kind}-{number}.png"}
                image = standard_image(values[0]).convert("RGB")
                image.thumbnail((160, 160))
                image.save(path / shown["image"])
            told[kind].append({**example, **shown})
    (path / "examples.json").write_text(json.dumps(told, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def example_sections(folder: Path) -> list[str]:
    path = folder / "examples.json"
    if not path.is_file():
        return []
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))
        tables = {
            title: _example_table(folder.name, examples.get(kind) or examples.get(_OLD_KINDS.get(kind)))
            for kind, title in _EXAMPLE_TITLES.items()
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ExitConfigurationError(
            f"{path} cannot be read as examples of a run ({error!r}): remove the folder."
        ) from error
    sections = [part for title, table in tables.items() if table for part in (f"### {title}", table)]
    return ["## Examples", *sections]


def _example_table(folder: str, chosen: list[dict] | None) -> str | None:
    if not chosen:
        return None
    rows = []
    for example in chosen:
        if "image" in example:
            if not _EXAMPLE_IMAGE.fullmatch(example["image"]):
                raise ValueError(f"{example['image']!r} is no image of a card")
            shown = f"![]({folder}/{example['image']})"
        else:
            shown = escaped(" / ".join(example["text"]))
        answers = map(escaped, (example["label"], *example["predictions"]))
        rows.append([shown, *answers, figure(example["confidence"])])
    exits = [f"exit {number}" for number in range(1, len(chosen[0]["predictions"]) + 1)]
    return table(["input", "label", *exits, "confidence of exit 1"], rows)
