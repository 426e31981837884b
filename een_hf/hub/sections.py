"""The sections of a model card."""

import math
from importlib.metadata import version

import yaml
from transformers import PreTrainedConfig

from ..models import MODEL_CLASSES, ExitConfigurationError
from .markdown import code_span, escaped, fenced, figure, numbered, python_string, table
from .settings import last_part, public_value


_KINDS = {
    "input_ids": ("text-classification", "AutoModelForSequenceClassification", "AutoTokenizer"),
    "pixel_values": ("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
}
NETWORKS = {
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
# The flags that a card shows, in addition to those of the scheme; none of them is a path.
_SHOWN = (
    "method exit_layers exit_pooling exit_head freeze_backbone exit_loss_weights max_seq_length image_size "
    "auto_augment mixup cutmix random_erase learning_rate head_learning_rate per_device_train_batch_size "
    "gradient_accumulation_steps num_train_epochs max_steps warm_start_epochs optim weight_decay lr_scheduler_type "
    "lr_milestones warmup_steps label_smoothing_factor max_train_samples load_best_model_at_end seed exit_criterion "
    "target_cost max_risk risk risk_confidence calibration_samples cost"
).split()


def kind_of(results: dict) -> tuple[str, str, str]:
    model_class = MODEL_CLASSES.get(results["model_type"])
    if model_class is None:
        raise ExitConfigurationError(
            f"A model card needs a model_type of: {', '.join(MODEL_CLASSES)}; that of the results is "
            f"{results['model_type']!r}."
        )
    return _KINDS[model_class.main_input_name]


def introduction(results: dict, evaluated_on: str, settings: dict | None, base_model: str | None) -> str:
    name, base_model = trained_on(evaluated_on, settings), base_model or started_from(settings)
    layers = results["exit_layers"]
    network = NETWORKS.get(results["model_type"], results["model_type"])
    article = "An" if network[0] in "AEIOUaeiou" or network.startswith(("MP", "XLM")) else "A"
    origin = f", trained on {escaped(name)}" if name else ""
    origin += f" from {escaped(base_model)}" if name and base_model else ""
    return (
        f"{article} {network} classifier with early exits{origin}. After {numbered('layer', layers)} there is an "
        "exit: a classifier on the hidden state at that depth. An easy input exits early, and the deeper layers do "
        "not run for it; only a hard one needs the whole network. Examples that have exited are removed from the "
        "batch, and the others continue in a smaller one."
    )


def trained_on(evaluated_on: str, settings: dict | None) -> str | None:
    """The data set, or the part of a partition, that a run trained on; `None` if it is not known."""
    folder = public_value((settings or {}).get("partition_dir"))
    if folder is None:
        return evaluated_on if settings else None
    part = settings["partition_id"]
    name = f"{'all parts' if part == 'all' else f'part {part}'} of {folder}"
    return name if folder == evaluated_on else f"{name}, evaluated on {evaluated_on},"


def started_from(settings: dict | None) -> str | None:
    name = (settings or {}).get("model_name_or_path")
    return last_part(name) if name else None


def loading(results: dict, repo_id: str) -> str:
    task, auto_class, processor = kind_of(results)
    name = python_string(repo_id)
    pipeline = code_span(f'pipeline("early-exit-{task}", model={name})')
    return f"""```python
from transformers import {auto_class}, {processor}

model = {auto_class}.from_pretrained({name}, trust_remote_code=True)
processor = {processor}.from_pretrained({name}, trust_remote_code=True)
```

The code of the model is stored with its weights. Where the package `een_hf` is imported, `trust_remote_code` is not
needed, and {pipeline} also answers at which layer each
input exited and what it saved. The model exits early in eval mode; `model(**inputs, early_exit=False)` evaluates every
exit, and its `exit_logits` has shape (batch, {len(results["exit_layers"])}, labels)."""


def exit_table(results: dict) -> str:
    policy, metrics = results["policy"], list(results["anytime"][0]["metrics"])
    header = ["exit", "layer", "relative cost", *map(escaped, metrics), "loss", *(["share exiting"] if policy else [])]
    rows = [
        [
            str(row["exit"]),
            str(row["layer"]),
            *map(figure, [row["relative_cost"], *(row["metrics"][metric] for metric in metrics), row["loss"]]),
            *([figure(policy["exit_fractions"][index])] if policy else []),
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
            f" Time was measured on {escaped(latency['device'])} at batch size {latency['batch_size']}, where the "
            f"model without early exits takes {latency['milliseconds']:.3g} ms."
        )
    if policy:
        text += " The share exiting is that of the policy, on the rows that were not used for calibration."
    return f"{text}\n\n{table(header, rows)}"


def exit_policy(results: dict, config: PreTrainedConfig) -> str:
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
    scores = ", ".join(f"{escaped(name)} {figure(value)}" for name, value in policy["metrics"].items())
    thresholds = thresholds_in_words(policy["thresholds"])
    lines = [
        f"An input exits at the first exit whose {code_span(policy['criterion'])} is at least that exit's threshold "
        f"({thresholds}); the last exit answers all that remain.{chosen}",
        f"On rows that were not used for calibration: relative cost {figure(policy['relative_cost'])}, {scores}.",
        escaped(guarantee_in_words(policy["guarantee"]))
        if policy["guarantee"]
        else "No guarantee goes with this policy.",
    ]
    return "\n\n".join(lines)


def thresholds_in_words(thresholds: list[float]) -> str:
    """The thresholds of the exits before the last; calibration's numbers outside the range of scores as words."""
    return ", ".join(
        figure(value) if abs(value) < 1e9 else "none exit" if value > 0 else "all exit" for value in thresholds[:-1]
    )


def guarantee_in_words(guarantee: dict) -> str:
    """Describe the guarantee of a policy.

    Args:
        guarantee: `ExitPolicy.guarantee`.

    Returns:
        one sentence.
    """
    who = f"the {guarantee['quantize']} graph" if "quantize" in guarantee else "the policy"
    event = {
        "accuracy_gap": "the policy is wrong where the last exit is right",
        "consistency": f"{who} answers differently from the {guarantee.get('reference', 'last exit')}",
        "hamming": "the policy answers differently from the last exit",
    }.get(guarantee["risk"], f"the risk {guarantee['risk']!r} is met")
    what = "labels of new rows" if guarantee["risk"] == "hamming" else "new rows"
    return (
        f"Guarantee: on at most {guarantee['limit']:.3g} of {what} like these {event}, with confidence "
        f"{guarantee['confidence']:g} ({guarantee['errors']:g} of {guarantee['num_rows']} certifying rows)."
    )


def other_policies(results: dict, repo_id: str) -> str:
    budgets = results["budgeted"]
    if not budgets:
        return "No exit criterion fits this problem, so that there is no other policy to choose."
    metrics = list(budgets[0]["metrics"])
    rows = [
        [figure(row["target_cost"]), figure(row["relative_cost"]), *(figure(row["metrics"][m]) for m in metrics)]
        for row in budgets
    ]
    costs = [row["target_cost"] for row in budgets]
    target = 0.5 if min(costs) <= 0.5 else math.ceil(min(costs) * 1000) / 1000
    chosen = budgets[costs.index(max(cost for cost in costs if cost <= target))]
    policy = {name: chosen[name] for name in ("criterion", "thresholds", "temperatures", "params") if chosen.get(name)}
    return f"""Budgets, measured on rows that were not used for calibration:

{table(["budget", "relative cost", *map(escaped, metrics)], rows)}

To change the policy, set another, or `None` for no early exit:

```python
from een_hf import ExitPolicy
from huggingface_hub import hf_hub_download

path = hf_hub_download({python_string(repo_id)}, "exit_results.json")
model.set_exit_policy(ExitPolicy.from_results(path, target_cost={target:g}))
```

Without `een_hf`, the same by hand:

{fenced(f"model.set_exit_policy({policy})", "python")}"""


def training(results: dict, settings: dict | None) -> list[str]:
    if results["method"] == "unknown":
        return ["How the exits were trained is not recorded."]
    if not settings:
        return [f"Trained by the scheme {code_span(results['method'])}."]
    own = scheme_class(results["method"])
    own = getattr(getattr(own, "arguments_class", None), "__dataclass_fields__", {})
    sources = ("model_name_or_path", "dataset_name", "task_name", "partition_dir", "partition_id")
    shown = {name: settings[name] for name in sources if name in settings}
    shown |= {name: settings[name] for name in (*_SHOWN, *own) if name in settings}
    empty = (None, [], "", False)
    shown = {name: public_value(value) for name, value in shown.items() if value not in empty}
    listed = yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=100).strip()
    return [
        f"Trained by the scheme {code_span(results['method'])} with these flags of the scripts of `een_hf`:",
        fenced(listed, "yaml"),
    ]


def versions() -> str:
    names = ("transformers", "torch", "datasets", "accelerate")
    from .. import __version__

    # What follows a plus sign describes a build for one machine.
    return ", ".join([f"een_hf {__version__}", *(f"{name} {version(name).split('+')[0]}" for name in names)])


def paper(scheme: str) -> list[str]:
    """The section of the scheme's paper, which its class names; empty if it names none."""
    known = scheme_class(scheme)
    title, link = getattr(known, "paper", ""), getattr(known, "citation", "")
    found = f"[{title}]({link})" if title and link else title or link
    return ["## Paper", f"The training scheme: {found}."] if found else []


def scheme_class(name: str) -> type | None:
    """The registered class of a scheme; for names in files, nothing is imported."""
    from ..training.registry import registered_scheme  # brings the trainers

    return registered_scheme(name)
