"""A page that shows where a text or an image exits: a Hugging Face Space, or `python recipes/space/app.py runs/demo`.

The model is the first argument or, in a Space, the variable MODEL: a folder or a Hub name. The slider chooses among
the budgets in the run's `exit_results.json`; without that file the page shows the model's own policy.
"""

import html
import os
import sys
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from een_hf import AutoEarlyExitModel, ExitPolicy
from een_hf.errors import one_line_errors
from een_hf.evaluation import read_exit_results, relative_costs
from een_hf.extras import named_extras
from een_hf.models.criteria import resolve_problem_type


PROBABILITIES = ("confidence", "margin", "label_confidence")  # criteria whose scores lie between 0 and 1
GREEN, GREY, RED = "#2e7d32", "#b0bec5", "#c62828"


class Explainer:
    """One model, and what it does with one input under a policy.

    Args:
        name: folder or Hub name of an early-exit model.
    """

    def __init__(self, name: str):
        self.name = name
        self.model = AutoEarlyExitModel.from_pretrained(name).eval()
        config = self.model.config
        self.names = [config.id2label[index] for index in range(config.num_labels)]
        self.problem_type = resolve_problem_type(config.problem_type, config.num_labels)
        self.text = self.model.main_input_name == "input_ids"
        self.processor = (AutoTokenizer if self.text else AutoImageProcessor).from_pretrained(name)
        self.results = cached_file(name, "exit_results.json", _raise_exceptions_for_missing_entries=False)
        rows = read_exit_results(Path(self.results).parent)["budgeted"] if self.results else []
        self.budgets = sorted({round(row["target_cost"], 4) for row in rows})

    def policy(self, budget: float | None) -> ExitPolicy | None:
        """The policy of the largest known budget up to this one, or the model's own."""
        if budget is None or not self.budgets:
            return self.model.get_exit_policy()
        return ExitPolicy.from_results(self.results, target_cost=max(budget, self.budgets[0]) + 1e-4)

    @torch.no_grad()
    def explain(self, given, budget: float | None = None) -> tuple[dict[str, float] | str, str]:
        """What each exit answers to an input under a policy.

        Args:
            given: a text or an image.
            budget: largest average cost of the policy; `None`: the model's own policy.

        Returns:
            the probability of each label where the input exits, or the number of a regression; and HTML that shows how
            the input got there.
        """
        if given is None or (self.text and not given.strip()):
            return {}, ""
        if self.text:
            longest = self.model.config.max_input_length
            settings = {"truncation": longest is not None, "max_length": longest}
            inputs = self.processor(given, return_tensors="pt", **settings)
            costs = relative_costs(self.model, sequence_length=inputs["input_ids"].shape[1])
        else:
            inputs = self.processor(given.convert("RGB"), return_tensors="pt")
            costs = relative_costs(self.model)
        logits, policy = self.model(**inputs, early_exit=False).exit_logits, self.policy(budget)
        last = self.model.num_exits - 1
        exit_index = last if policy is None else int(policy.exits_of(logits))
        own = logits[:, exit_index]
        if policy is not None:
            own = policy.temper(own, torch.tensor([exit_index]))
        saved = 1 - float(costs.of_policy(policy)[exit_index])
        head = f"exits after layer {self.model.config.exit_layers[exit_index]}: {saved:.0%} of the computation saved"
        rows = [self._row(index, logits, policy, exit_index) for index in range(last + 1)]
        style = "<style>.exits td, .exits th {padding: 4px 10px; text-align: left}</style>"
        titles = "".join(f"<th>{title}</th>" for title in ("layer", "would answer", "score and threshold", ""))
        table = f"<table class='exits' style='width:100%'><tr>{titles}</tr>{''.join(rows)}</table>"
        if exit_index < last:
            table += (
                "<p>Later exits are evaluated for this page only: in use, the layers after the exit do not run.</p>"
            )
        shown = f"{style}<h3>{head}</h3>{table}"
        if self.problem_type == "regression":
            return self._answer(own[0]), shown
        scores = own.sigmoid() if self.problem_type == "multi_label_classification" else own.softmax(-1)
        return dict(zip(self.names, scores[0].tolist(), strict=True)), shown

    def _answer(self, logits: torch.Tensor) -> str:
        """The label, the labels or the number that these logits (num_labels,) mean."""
        if self.problem_type == "regression":
            return f"{float(logits[0]):.3f}"
        if self.problem_type == "multi_label_classification":
            return ", ".join(self.names[index] for index in (logits > 0).nonzero()[:, 0].tolist()) or "no label"
        return self.names[int(logits.argmax())]

    def _row(self, index: int, logits: torch.Tensor, policy: ExitPolicy | None, taken: int) -> str:
        answer, last = html.escape(self._answer(logits[0, index])), index == self.model.num_exits - 1
        used = last or (policy is not None and policy.lets_exit(index))
        state = "exits here" if index == taken else "not computed" if index > taken else "continues"
        score = ""
        if policy is not None:
            value, threshold = float(policy.scores(logits)[0, index]), policy.thresholds[index]
            sign = "≥" if value >= threshold else "&lt;"
            score = f"{value:.3f}" + (f" {sign} {threshold:.3f}" if used and not last else "")
            if policy.criterion in PROBABILITIES:
                colour = GREEN if index == taken else GREY
                mark = _bar(threshold, 0.004, RED) if used and not last else ""
                track = "position:relative;height:14px;background:#eceff1"
                score = f"<div style='{track}'>{_bar(0, value, colour)}{mark}</div>{score}"
        cells = (self.model.config.exit_layers[index], answer, score, state if used else "not used by this policy")
        faint = "opacity:0.4" if index > taken or not used else ""
        return f"<tr style='{faint}'>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _bar(start: float, width: float, colour: str) -> str:
    start, width = (100 * min(max(value, 0), 1) for value in (start, width))
    return (
        f"<div style='position:absolute;left:{start:.1f}%;width:{width:.1f}%;height:14px;background:{colour}'></div>"
    )


def build(explainer: Explainer):
    """The page."""
    with named_extras():
        import gradio

    budgets = explainer.budgets
    with gradio.Blocks(title="Early exits") as page:
        gradio.Markdown(f"# Where does it exit?\n{html.escape(Path(explainer.name).name)}")
        with gradio.Row():
            with gradio.Column():
                given = (
                    gradio.Textbox(label="Text", lines=3, placeholder="A text to classify")
                    if explainer.text
                    else gradio.Image(type="pil")
                )
                slider = gradio.Slider(
                    budgets[0] if budgets else 0,
                    budgets[-1] if budgets else 1,
                    value=budgets[len(budgets) // 2] if budgets else 1,
                    label="Budget: average share of the computation",
                    visible=bool(budgets),
                )
                button = gradio.Button("Classify", variant="primary")
                labels = gradio.Label(label="Answer", num_top_classes=3)
            shown = gradio.HTML()
        inputs = [given, slider] if budgets else [given]
        events = [button.click, *([given.submit] if explainer.text else []), *([slider.release] if budgets else [])]
        for number, event in enumerate(events):
            event(explainer.explain, inputs, [labels, shown], api_name="explain" if number == 0 else False)
    return page


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MODEL")
    if not model:
        sys.exit("Give a model with exits: python recipes/space/app.py runs/demo, or the variable MODEL of a Space.")
    with one_line_errors():
        build(Explainer(model)).launch()
