"""The model card of a run: its exits, their metrics, and the certified risk."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..files import replacing
from . import sections
from .examples import SHARED_EXAMPLES, example_sections
from .header import CARD_NAME, TAG, is_run_card
from .markdown import escaped, figure
from .settings import last_part


_METRIC_TYPES = {"pearson": "pearsonr"}  # the Hub's names, where they differ


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
    """Write the model card of a run, `README.md`.

    It shows the plot `exit_curves.png` and the examples of `write_examples(..., shared=True)`, if they are in the
    folder.

    Args:
        folder: an existing folder.
        results: as in `write_exit_results`.
        config: config of the early-exit model.
        settings: the run's flags by name; those of training are shown, paths by their last part.
        repo_id: name on the Hub. Default: the name of the folder.
        base_model: Hub name of the model that the run started from.
        dataset_id: Hub name of the data set.
        metadata: further fields of the card's header, for example `license` and `language`.

    Returns:
        path of the card.
    """
    folder = Path(folder)
    repo_id = repo_id or folder.resolve().name
    tag = sections.kind_of(results)[0]
    scheme = None if results["method"] == "unknown" else results["method"]
    name = last_part(results["dataset"]) + (f" {results['task_name']}" if results["task_name"] else "")
    data = ModelCardData(
        model_name=repo_id,
        library_name="transformers",
        pipeline_tag=tag,
        tags=[TAG, *([] if scheme is None else [results["method"].rsplit(":", 1)[-1]]), results["model_type"]],
        base_model=base_model,
        datasets=[dataset_id] if dataset_id else None,
        metrics=[_METRIC_TYPES.get(metric, metric) for metric in results["anytime"][0]["metrics"]],
        eval_results=_eval_results(results, tag, dataset_id, name),
        **(metadata or {}),
    )
    parts = [
        f"# {escaped(repo_id.split('/')[-1])}",
        sections.introduction(results, name, settings, base_model),
        "## Load",
        sections.loading(results, repo_id),
        "## Exits",
        sections.exit_table(results),
        "## Exit policy",
        sections.exit_policy(results, config),
        sections.other_policies(results, repo_id),
    ]
    if (folder / "exit_curves.png").is_file():
        parts.insert(6, "![Metric against relative cost, and where examples exit](exit_curves.png)")
    parts += example_sections(folder / SHARED_EXAMPLES)
    parts += [
        "## Training",
        *sections.training(results, settings),
        "## Versions",
        sections.versions(),
        *sections.paper(results["method"]),
    ]
    path = folder / CARD_NAME
    with replacing(path) as temporary:
        temporary.write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def refresh_model_card(folder, results: dict[str, Any], config: PreTrainedConfig, settings: dict[str, Any]) -> None:
    """Write the model card of a run again after its policy has changed.

    Args:
        folder: folder of the run. If it has a card, names and metadata are taken from it.
        results: as in `write_exit_results`.
        config: config of the early-exit model.
        settings: the run's flags by name.
    """
    path, kept = Path(folder, CARD_NAME), {}
    if is_run_card(path):
        old = ModelCard.load(path).data
        datasets = old.datasets if isinstance(old.datasets, list) else [old.datasets]
        kept = {"repo_id": old.model_name, "base_model": old.base_model, "dataset_id": (datasets or [None])[0]}
        kept = {name: value for name, value in kept.items() if isinstance(value, str)}
        kept["metadata"] = {name: old.get(name) for name in ("license", "language") if old.get(name)}
    write_model_card(folder, results, config, settings=settings, **kept)


def _eval_results(results: dict, task: str, dataset_id: str | None, name: str) -> list[EvalResult]:
    """The metrics of every exit and of the policy, for the card's header."""
    measured = [(f"exit {row['exit']} (layer {row['layer']})", row["metrics"]) for row in results["anytime"]]
    if results["policy"]:
        cost = results["policy"]["relative_cost"]
        measured.append((f"early exit at relative cost {figure(cost)}", results["policy"]["metrics"]))
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_id or last_part(results["dataset"]),
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
