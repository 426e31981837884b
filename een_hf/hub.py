"""The model card of a run, and the rows it shows: what the exits are, what they score and what was promised."""

import html
import json
import math
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .models import MODEL_CLASSES, ExitConfigurationError


CARD_NAME = "README.md"
# What stays in the run folder: a Trainer never pushes names that begin with an underscore.
PRIVATE_EXAMPLES = "_examples"
SHARED_EXAMPLES = "examples"
_TAG = "early-exit"
_KINDS = {
    "input_ids": ("text-classification", "AutoModelForSequenceClassification", "AutoTokenizer"),
    "pixel_values": ("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
}
_NETWORKS = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
    "camembert": "CamemBERT",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "mpnet": "MPNet",
    "modernbert": "ModernBERT",
    "deberta": "DeBERTa",
    "deberta-v2": "DeBERTa-v2",
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 (with registers)",
    "beit": "BEiT",
}
_PAPERS = {
    "joint": "BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks (ICPR 2016)",
    "boosted": "Boosted Dynamic Neural Networks (AAAI 2023)",
    "l2w": "Learning to Weight Samples for Dynamic Early-exiting Networks (ECCV 2022)",
}
_METRIC_TYPES = {"pearson": "pearsonr"}  # the Hub's names, where they differ
# The flags that a card shows, beside the scheme's own: none of them says where something lies.
_SHOWN = (
    "method exit_layers exit_pooling freeze_backbone exit_loss_weights max_seq_length image_size auto_augment mixup "
    "cutmix random_erase learning_rate head_learning_rate per_device_train_batch_size gradient_accumulation_steps "
    "num_train_epochs max_steps warm_start_epochs optim weight_decay lr_scheduler_type lr_milestones warmup_steps "
    "label_smoothing_factor max_train_samples load_best_model_at_end seed exit_criterion target_cost max_risk risk "
    "risk_confidence calibration_samples cost"
).split()
_EXAMPLE_TITLES = {
    "surest": "Surest right answers of exit 1",
    "deep": "Only the last exit was right",
    "mistakes": "Confident mistakes of exit 1",
}
_TOKEN = re.compile(r"(.*_)?token")
_EXAMPLE_IMAGE = re.compile(r"\w+-\d+\.png")


# The card


def write_model_card(
    folder: str | os.PathLike,
    results: dict[str, Any],
    config: PreTrainedConfig,
    *,
    settings: dict[str, Any] | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    dataset_id: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write the card of a run, `README.md`, and return its path.

    The plot `exit_curves.png` and the examples of `write_examples(..., shared=True)` are shown where the folder holds
    them.

    Args:
        folder: an existing folder.
        results: as `write_exit_results` takes them.
        config: of the early-exit model.
        settings: the run's flags by name; those that say how it was trained are shown, paths by their last part.
        repo_id: name on the Hub. Default: the folder's name.
        base_model: Hub name of the model that the run started from.
        dataset_id: Hub name of the data set.
        metadata: further fields of the card's header, for example `license` and `language`.
    """
    folder = Path(folder)
    repo_id = repo_id or folder.resolve().name
    tag = _kind(results)[0]
    scheme = None if results["method"] == "unknown" else results["method"]
    name = _last_part(results["dataset"]) + (f" {results['task_name']}" if results["task_name"] else "")
    data = ModelCardData(
        model_name=repo_id,
        library_name="transformers",
        pipeline_tag=tag,
        tags=[_TAG, *([] if scheme is None else [results["method"].rsplit(":", 1)[-1]]), results["model_type"]],
        base_model=base_model,
        datasets=[dataset_id] if dataset_id else None,
        metrics=[_METRIC_TYPES.get(metric, metric) for metric in results["anytime"][0]["metrics"]],
        eval_results=_eval_results(results, tag, dataset_id, name),
        **(metadata or {}),
    )
    sections = [
        f"# {_text(repo_id.split('/')[-1])}",
        _introduction(results, _trained_on(name, settings), base_model or _started_from(settings)),
        "## Load",
        _loading(results, repo_id),
        "## Exits",
        _exit_table(results),
        "## Exit policy",
        _policy(results, config),
        _changing(results, repo_id),
    ]
    if (folder / "exit_curves.png").is_file():
        sections.insert(6, "![Metric against relative cost, and where samples leave](exit_curves.png)")
    sections += _example_sections(folder / SHARED_EXAMPLES)
    sections += ["## Training", *_training(results, settings), "## Versions", _versions(), *_paper(results["method"])]
    path = folder / CARD_NAME
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def is_run_card(path: str | os.PathLike) -> bool:
    """Whether a file is there and was written by `write_model_card`."""
    try:
        return os.path.isfile(path) and _TAG in (ModelCard.load(path).data.tags or ())
    except (OSError, TypeError, ValueError, yaml.YAMLError):  # a header that is none
        return False


def refresh_model_card(folder, results: dict[str, Any], config: PreTrainedConfig, settings: dict[str, Any]) -> None:
    """Write a run's card anew after its policy changed; what the results do not say is kept from the old card."""
    path, kept = Path(folder, CARD_NAME), {}
    if is_run_card(path):
        old = ModelCard.load(path).data
        datasets = old.datasets if isinstance(old.datasets, list) else [old.datasets]
        kept = {"repo_id": old.model_name, "base_model": old.base_model, "dataset_id": (datasets or [None])[0]}
        kept = {name: value for name, value in kept.items() if isinstance(value, str)}
        kept["metadata"] = {name: old.get(name) for name in ("license", "language") if old.get(name)}
    write_model_card(folder, results, config, settings=settings, **kept)


def guarantee_in_words(guarantee: dict) -> str:
    """A policy's guarantee as a sentence."""
    event = {
        "accuracy_gap": "the policy is wrong where the last exit is right",
        "consistency": "the policy answers differently from the last exit",
        "hamming": "the policy answers differently from the last exit",
    }.get(guarantee["risk"], f"the risk {guarantee['risk']!r} is met")
    what = "labels of new rows" if guarantee["risk"] == "hamming" else "new rows"
    return (
        f"Guarantee: on at most {guarantee['limit']:.3g} of {what} like these {event}, with confidence "
        f"{guarantee['confidence']:g} ({guarantee['errors']:g} of {guarantee['num_rows']} certifying rows)."
    )


def hub_name(name: str | None, installed: tuple[str, ...] = ()) -> str | None:
    """`name` if it can only be a name on the Hub: no folder, and none of the `installed` samples."""
    if name is None or name in installed or os.path.exists(name):
        return None
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) else None


def _kind(results: dict) -> tuple[str, str, str]:
    model_class = MODEL_CLASSES.get(results["model_type"])
    if model_class is None:
        raise ExitConfigurationError(
            f"A card needs a model_type of: {', '.join(MODEL_CLASSES)}; the results say {results['model_type']!r}."
        )
    return _KINDS[model_class.main_input_name]


def _eval_results(results: dict, task: str, dataset_id: str | None, name: str) -> list[EvalResult]:
    """The metrics of every exit and of the policy, for the card's header."""
    measured = [(f"exit {row['exit']} (layer {row['layer']})", row["metrics"]) for row in results["anytime"]]
    if results["policy"]:
        cost = results["policy"]["relative_cost"]
        measured.append((f"early exit at relative cost {_figure(cost)}", results["policy"]["metrics"]))
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_id or _last_part(results["dataset"]),
            dataset_name=name,
            dataset_config=results["task_name"],
            metric_type=_METRIC_TYPES.get(metric, metric),
            metric_name=f"{metric}, {where}",
            metric_value=round(value, 4),
        )
        for where, metrics in measured
        for metric, value in metrics.items()
        if value is not None
    ]


def _introduction(results: dict, name: str | None, base_model: str | None) -> str:
    layers = results["exit_layers"]
    network = _NETWORKS.get(results["model_type"], results["model_type"])
    article = "An" if network[0] in "AEIOUaeiou" or network.startswith(("MP", "XLM")) else "A"
    origin = f", trained on {_text(name)}" if name else ""
    origin += f" from {_text(base_model)}" if name and base_model else ""
    return (
        f"{article} {network} classifier with early exits{origin}. After {_numbers('layer', layers)} stands an exit: "
        "a classifier on what the network knows by then. An easy input is answered at an early exit and the layers "
        "behind it do not run; only a hard one pays for the whole network. In a batch, rows that have left make room: "
        "the others go on in a smaller batch."
    )


def _trained_on(evaluated_on: str, settings: dict | None) -> str | None:
    """The data set, or the part of a partition, that a run trained on; `None` where that is not known."""
    folder = _public((settings or {}).get("partition_dir"))
    if folder is None:
        return evaluated_on if settings else None
    part = settings["partition_id"]
    name = f"{'all parts' if part == 'all' else f'part {part}'} of {folder}"
    return name if folder == evaluated_on else f"{name}, evaluated on {evaluated_on},"


def _loading(results: dict, repo_id: str) -> str:
    task, auto_class, processor = _kind(results)
    name = _string(repo_id)
    pipeline = _code(f'pipeline("early-exit-{task}", model={name})')
    return f"""```python
from transformers import {auto_class}, {processor}

model = {auto_class}.from_pretrained({name}, trust_remote_code=True)
processor = {processor}.from_pretrained({name}, trust_remote_code=True)
```

The code of the model lies beside its weights. Where the package `een_hf` is imported, `trust_remote_code` is not
needed, and {pipeline} also answers at which layer each
input left and what it saved. The model leaves early in eval mode; `model(**inputs, early_exit=False)` evaluates every
exit, and its `exit_logits` has shape (batch, {len(results["exit_layers"])}, labels)."""


def _exit_table(results: dict) -> str:
    policy, metrics = results["policy"], list(results["anytime"][0]["metrics"])
    header = ["exit", "layer", "relative cost", *map(_text, metrics), "loss", *(["share leaving"] if policy else [])]
    rows = [
        [
            str(row["exit"]),
            str(row["layer"]),
            *map(_figure, [row["relative_cost"], *(row["metrics"][metric] for metric in metrics), row["loss"]]),
            *([_figure(policy["exit_fractions"][index])] if policy else []),
        ]
        for index, row in enumerate(results["anytime"])
    ]
    unit = "Time" if results.get("cost_unit") == "latency" else "Multiply-accumulates"
    text = (
        f"{unit} up to and with the exit, divided by those of the plain model without exits, are its relative cost. "
        f"The metrics are each exit's on all {results['num_eval_samples']} rows of the evaluation split."
    )
    if latency := results.get("latency"):
        text += (
            f" Time was measured on {_text(latency['device'])} at batch size {latency['batch_size']}, where the model "
            f"without early exits takes {latency['milliseconds']:.3g} ms."
        )
    if policy:
        text += " The share leaving is the policy's, on the rows that calibrated nothing."
    return f"{text}\n\n{_table(header, rows)}"


def _policy(results: dict, config: PreTrainedConfig) -> str:
    policy = results["policy"]
    if policy is None:
        if getattr(config, "exit_policy", None) is not None:
            return "The model keeps the exit policy that it was loaded with; this run measured none."
        return "No exit policy is set: every input runs through the whole network until one is chosen (below)."
    goal = {
        "target_cost": "the most accurate found at an average relative cost of at most {:g}",
        "max_risk": "the cheapest found whose risk is certified to stay below {:g}",
    }
    reasons = [goal[name].format(value) for name, value in (policy["calibrated_for"] or {}).items() if name in goal]
    chosen = f" The policy is {reasons[0]}, chosen on {results['num_calibration_samples']} rows." if reasons else ""
    scores = ", ".join(f"{_text(name)} {_figure(value)}" for name, value in policy["metrics"].items())
    thresholds = ", ".join(map(_threshold, policy["thresholds"][:-1]))
    lines = [
        f"An input leaves at the first exit whose {_code(policy['criterion'])} is at least that exit's threshold "
        f"({thresholds}); the last exit takes whoever is left.{chosen}",
        f"On rows that calibrated nothing: relative cost {_figure(policy['relative_cost'])}, {scores}.",
        _text(guarantee_in_words(policy["guarantee"]))
        if policy["guarantee"]
        else "No guarantee goes with this policy.",
    ]
    return "\n\n".join(lines)


def _threshold(value: float) -> str:
    # Calibration writes numbers beyond every score where nobody, or whoever is there, leaves.
    return _figure(value) if abs(value) < 1e9 else "nobody leaves" if value > 0 else "all leave"


def _changing(results: dict, repo_id: str) -> str:
    budgets = results["budgeted"]
    if not budgets:
        return "No exit criterion fits this problem, so that there is no other policy to choose."
    metrics = list(budgets[0]["metrics"])
    rows = [
        [_figure(row["target_cost"]), _figure(row["relative_cost"]), *(_figure(row["metrics"][m]) for m in metrics)]
        for row in budgets
    ]
    costs = [row["target_cost"] for row in budgets]
    target = 0.5 if min(costs) <= 0.5 else math.ceil(min(costs) * 1000) / 1000
    chosen = budgets[costs.index(max(cost for cost in costs if cost <= target))]
    policy = {name: chosen[name] for name in ("criterion", "thresholds", "temperatures", "params") if chosen.get(name)}
    return f"""Budgets, measured on the rows that calibrated nothing:

{_table(["budget", "relative cost", *map(_text, metrics)], rows)}

To change the policy, set another, or `None` for no early exit:

```python
from een_hf import ExitPolicy
from huggingface_hub import hf_hub_download

path = hf_hub_download({_string(repo_id)}, "exit_results.json")
model.set_exit_policy(ExitPolicy.from_results(path, target_cost={target:g}))
```

Without `een_hf`, the same by hand:

{_fenced(f"model.set_exit_policy({policy})", "python")}"""


def _training(results: dict, settings: dict | None) -> list[str]:
    if results["method"] == "unknown":
        return ["What trained the exits is not recorded."]
    if not settings:
        return [f"Trained by the scheme {_code(results['method'])}."]
    own = _scheme_class(results["method"])
    own = getattr(getattr(own, "arguments_class", None), "__dataclass_fields__", {})
    sources = ("model_name_or_path", "dataset_name", "task_name", "partition_dir", "partition_id")
    shown = {name: settings[name] for name in sources if name in settings}
    shown |= {name: settings[name] for name in (*_SHOWN, *own) if name in settings}
    empty = (None, [], "", False)
    shown = {name: _public(value) for name, value in shown.items() if value not in empty}
    listed = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=100).strip()
    return [
        f"Trained by the scheme {_code(results['method'])} with these flags of the scripts of `een_hf`:",
        _fenced(listed, "yaml"),
    ]


def _versions() -> str:
    names = ("transformers", "torch", "datasets", "accelerate")
    from . import __version__

    # What follows a plus sign describes a build for one machine.
    return ", ".join([f"een_hf {__version__}", *(f"{name} {version(name).split('+')[0]}" for name in names)])


def _paper(method: str) -> list[str]:
    title, link = _PAPERS.get(method), getattr(_scheme_class(method), "citation", "")
    found = f"[{title}]({link})" if title and link else title or link
    return ["## Paper", f"The training scheme: {found}."] if found else []


def _scheme_class(method: str) -> type | None:
    """The registered class of a name that may come from a file: it is looked up, and never imported."""
    from .training.trainer import registered_scheme

    return registered_scheme(method)


def _started_from(settings: dict | None) -> str | None:
    name = (settings or {}).get("model_name_or_path")
    return _last_part(name) if name else None


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they may be pushed or logged: tokens left out, local paths by their last part.

    Args:
        settings: values by name, lists and dicts of them included; what ends in `_dir` or `_file` is a path.
    """
    return {
        name: None if _TOKEN.fullmatch(str(name)) else _public(value, str(name).endswith(("_dir", "_file")))
        for name, value in settings.items()
    }


def _public(value: Any, is_path: bool = False) -> Any:
    if isinstance(value, dict):
        return public_settings(value)
    if type(value) in (list, tuple):
        return type(value)(_public(item, is_path) for item in value)
    if not isinstance(value, str) or not {"/", os.sep} & {*value}:
        return value
    return os.path.basename(os.path.normpath(value)) if is_path else _last_part(value)


def _last_part(name: str) -> str:
    """A local path by its last part; anything else as it is."""
    return name if hub_name(name) else os.path.basename(os.path.normpath(name)) or name


# Examples


def choose_examples(
    exit_logits: np.ndarray, labels: np.ndarray, label_names: list[str], count: int = 3
) -> dict[str, list[dict]]:
    """Up to `count` rows each of: exit 1 surely right, only the last exit right, exit 1 surely wrong.

    Args:
        exit_logits: (num_rows, num_exits, num_labels).
        labels: (num_rows,), class ids.
        label_names: one per class.

    Returns:
        by `surest`, `deep` and `mistakes`: `row` (position), `label`, `predictions` (one per exit) and `confidence`
        (the largest softmax probability of these logits at exit 1), the surest first; `deep` by the last exit's.
    """
    logits = np.asarray(exit_logits, dtype=np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    confidence = 1 / odds.sum(-1)
    predictions = logits.argmax(-1)
    right = predictions == np.asarray(labels)[:, None]
    chosen = {
        "surest": (right[:, 0], confidence[:, 0]),
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
    """Keep examples in a run's folder, and return where.

    User data are private: only with `shared` do they go to `examples/`, which the card shows and a push takes along;
    else to `_examples/`, which stays. Images are PNG files, at most 160 pixels wide and high.

    Args:
        folder: of the run.
        examples: as `choose_examples` returns them.
        rows: the data set that `row` counts in.
        columns: its text columns, or its one image column.
        shared: whether they may be published.
    """
    for name in (PRIVATE_EXAMPLES, SHARED_EXAMPLES):
        shutil.rmtree(Path(folder, name), ignore_errors=True)
    path = Path(folder, SHARED_EXAMPLES if shared else PRIVATE_EXAMPLES)
    path.mkdir()
    from .data.decoding import standard_image

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


def _example_sections(folder: Path) -> list[str]:
    path = folder / "examples.json"
    if not path.is_file():
        return []
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))
        tables = {title: _example_table(folder.name, examples.get(kind)) for kind, title in _EXAMPLE_TITLES.items()}
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
            shown = _text(" / ".join(example["text"]))
        answers = map(_text, (example["label"], *example["predictions"]))
        rows.append([shown, *answers, _figure(example["confidence"])])
    exits = [f"exit {number}" for number in range(1, len(chosen[0]["predictions"]) + 1)]
    return _table(["input", "label", *exits, "confidence of exit 1"], rows)


# Markdown


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _text(value: str) -> str:
    """Text of unknown origin on one line, shown as it is; longer than 300 characters it is cut."""
    line = " ".join(str(value).split())
    line = html.escape(line if len(line) <= 300 else f"{line[:299]}…", quote=False)
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", line)


def _code(value: str) -> str:
    """Text of unknown origin as a code span of one line."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _string(value: str) -> str:
    """Text of unknown origin as a Python string of one line."""
    return json.dumps(value, ensure_ascii=False)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _numbers(noun: str, values: list[int]) -> str:
    if len(values) == 1:
        return f"{noun} {values[0]}"
    return f"{noun}s {', '.join(map(str, values[:-1]))} and {values[-1]}"
