"""The handler that Inference Endpoints call: a copy of this file is saved with the model as `handler.py`.

It needs only transformers and torch; the code of the model is loaded from the model's repository.
"""

import base64
import io
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)


class EndpointHandler:
    """Answers one request at a time: for each input its labels, the most probable first.

    Args:
        path: folder of the model.
    """

    def __init__(self, path: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        if "AutoModelForImageClassification" in config.auto_map:
            model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
            self.processor = AutoImageProcessor.from_pretrained(path)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
            self.processor = AutoTokenizer.from_pretrained(path)
        self.model = model.eval().to(device)

    @torch.inference_mode()
    def __call__(self, data: dict[str, Any]) -> list[list[dict]] | list[dict]:
        """Answer one request.

        Args:
            data: `inputs`, a text or a list of texts, or an image (PIL, bytes or base64) or a list of images; and
                optionally `parameters`: `top_k`, the number of labels; `exits`, whether to add `exit_layer` to each.

        Returns:
            for each input the list of its labels; for a single image that list itself.
        """
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        examples = inputs if isinstance(inputs, list) else [inputs]
        if self.model.main_input_name == "input_ids":
            longest = self.model.config.max_input_length
            encoded = self.processor(
                examples, padding=True, truncation=longest is not None, max_length=longest, return_tensors="pt"
            )
        else:
            mode = {1: "L", 4: "RGBA"}.get(self.model.config.num_channels, "RGB")
            images = [_open(example).convert(mode) for example in examples]
            encoded = self.processor(images, return_tensors="pt")
        outputs = self.model(**encoded.to(self.model.device))
        logits, exit_index, policy = outputs.logits.float(), outputs.exit_index, self.model.get_exit_policy()
        if policy is not None:
            logits = policy.temper(logits, exit_index)
        config, rows = self.model.config, []
        scores = logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)
        if config.num_labels == 1 and config.problem_type != "multi_label_classification":
            scores = logits
        for number, row in enumerate(scores.cpu()):
            order = row.argsort(descending=True)[: parameters.get("top_k")].tolist()
            rows.append([{"label": config.id2label[place], "score": float(row[place])} for place in order])
            if parameters.get("exits"):
                layer = config.exit_layers[-1 if exit_index is None else int(exit_index[number])]
                rows[-1] = [{**label, "exit_layer": layer} for label in rows[-1]]
        single_image = not isinstance(inputs, list) and self.model.main_input_name == "pixel_values"
        return rows[0] if single_image else rows


def _open(given):
    from PIL import Image

    if isinstance(given, str):
        given = base64.b64decode(given.partition(",")[2] if given.startswith("data:") else given)
    return Image.open(io.BytesIO(given)) if isinstance(given, bytes) else given
