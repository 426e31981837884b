"""The pipelines `early-exit-text-classification` and `early-exit-image-classification`."""

import base64
import io
import os
import urllib.request
from functools import cache
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, BatchFeature
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.text_classification import TextClassificationPipeline

from ..models import EarlyExitMixin, ExitConfigurationError
from .predict import in_eval_mode
from .runner import runner_of, runs_graphs


if TYPE_CHECKING:
    from PIL import Image

    from ..evaluation import ExitCosts


class _ExitAnswers:
    """Adds the exit of each input to its answer; comes before a stock pipeline in the bases.

    The keys are `exit_layer`, the 1-based layer of the exit, and `cost_saved`, the share of the plain model's cost
    that was saved: 1 minus the exit's relative cost under the policy, at the input's own length. At the last exit it
    is negative if earlier heads were evaluated. `score` is the probability from the logits divided by the temperature
    of their exit, as `ExitPredictions.confidence`; with `function_to_apply="none"` logits are not divided.

    The attribute `cuda_graphs` says whether `ExitRunner` runs the batches; `None`, the default: on CUDA, unless the
    model's own attribute `cuda_graphs` is `False`.
    """

    cuda_graphs: bool | None = None

    def check_model_type(self, supported_models) -> None:
        """Check that the pipeline's model has exits.

        Args:
            supported_models: not used.

        Raises:
            ExitConfigurationError: a model without exits.
        """
        if not isinstance(self.model, EarlyExitMixin):
            raise ExitConfigurationError(
                f"The pipeline {self.task!r} needs an early-exit model, not {type(self.model).__name__}: import "
                "een_hf before you load the model and do not use trust_remote_code, or train a model with exits."
            )
        self._costs_at = cache(self._costs_at)

    def _costs_at(self, length: int | None) -> "ExitCosts":
        from ..evaluation import relative_costs  # not needed before the first answer

        return relative_costs(self.model, sequence_length=length)

    def _forward(self, model_inputs) -> dict[str, Any]:
        if "input_ids" in model_inputs:
            self.model.config.check_input_length(model_inputs["input_ids"].shape[1], "A text, or one beside it,")
        model = in_eval_mode(self.model)
        if model is self.model and runs_graphs(model, self.cuda_graphs):
            outputs = runner_of(model)(**model_inputs)
        else:
            outputs = model(**model_inputs)
        answers, policy = {"logits": outputs.logits}, self.model.get_exit_policy()
        if policy is not None:
            answers["exit_index"] = outputs.exit_index
            answers["tempered_logits"] = policy.temper(outputs.logits.float(), outputs.exit_index)
        if "input_ids" in model_inputs:
            mask = model_inputs.get("attention_mask")
            ids = model_inputs["input_ids"]
            answers["num_tokens"] = ids.new_full(ids.shape[:1], ids.shape[1]) if mask is None else mask.sum(1)
        return answers

    def postprocess(self, model_outputs, function_to_apply=None, **kwargs):
        if "tempered_logits" in model_outputs and function_to_apply != "none":
            model_outputs["logits"] = model_outputs["tempered_logits"]
        answer = super().postprocess(model_outputs, function_to_apply=function_to_apply, **kwargs)
        exit_index = int(model_outputs["exit_index"]) if "exit_index" in model_outputs else self.model.num_exits - 1
        length = int(model_outputs["num_tokens"]) if "num_tokens" in model_outputs else None
        costs = self._costs_at(length)
        if "exit_index" in model_outputs:  # else every exit was evaluated
            costs = costs.of_policy(self.model.get_exit_policy())
        found = {
            "exit_layer": self.model.config.exit_layers[exit_index],
            "cost_saved": 1 - float(costs[exit_index]),
        }
        return [{**one, **found} for one in answer] if isinstance(answer, list) else {**answer, **found}


class EarlyExitTextClassificationPipeline(_ExitAnswers, TextClassificationPipeline):
    """`TextClassificationPipeline` whose answers include `exit_layer` and `cost_saved`.

    Example:
        >>> classify = transformers.pipeline("early-exit-text-classification", model="runs/mine")
        >>> classify("A fine film.")
        [{'label': ..., 'score': 0..., 'exit_layer': ..., 'cost_saved': ...}]
    """

    def preprocess(self, inputs, **tokenizer_kwargs):
        longest = self.model.config.max_input_length
        if tokenizer_kwargs.get("truncation") and longest is not None:  # the tokenizer may not know the model's limit
            wanted = tokenizer_kwargs.get("max_length") or self.tokenizer.model_max_length
            tokenizer_kwargs["max_length"] = min(wanted, longest)
        return super().preprocess(inputs, **tokenizer_kwargs)


class EarlyExitImageClassificationPipeline(_ExitAnswers, ImageClassificationPipeline):
    """`ImageClassificationPipeline` whose answers include `exit_layer` and `cost_saved`.

    Images may be given as PIL images, as files, as addresses (http) or in base64. They are decoded like the images
    that the model was trained and calibrated on.
    """

    def preprocess(self, image, timeout=None):
        from PIL import Image

        from ..data.transforms import EvaluationTransform

        if isinstance(image, str):
            image = _open_image(image, timeout)
        if not isinstance(image, Image.Image):
            return super().preprocess(image, timeout)
        transform = EvaluationTransform(self.image_processor, self.model.config.num_channels)
        return BatchFeature({"pixel_values": transform(image)[None].to(self.dtype)})


def _open_image(source: str, timeout: float | None) -> "Image.Image":
    """Open an image from an address, a file, or base64 with or without a media type, as transformers' pipelines do."""
    from PIL import Image  # not needed for text

    if source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "een_hf"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return Image.open(io.BytesIO(answer.read()))
    if os.path.isfile(source):
        return Image.open(source)
    try:
        encoded = source.split(",")[1] if source.startswith("data:image/") else source
        return Image.open(io.BytesIO(base64.decodebytes(encoded.encode())))
    except (ValueError, OSError, IndexError) as error:
        raise ExitConfigurationError(
            f"{source[:80]!r} is no image: give an address (http), a file that is there, or an image in base64."
        ) from error


for _type, _pipeline_class, _model_class in (
    ("text", EarlyExitTextClassificationPipeline, AutoModelForSequenceClassification),
    ("image", EarlyExitImageClassificationPipeline, AutoModelForImageClassification),
):
    _task = f"early-exit-{_type}-classification"
    if _task not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(_task, _pipeline_class, pt_model=_model_class, type=_type)
        # With this attribute a saved pipeline would include this file, which runs only where een_hf is installed.
        del _pipeline_class._registered_impl
