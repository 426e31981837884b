"""Converts the texts or images of requests to rows of model inputs, in threads, many requests at a time."""

import copy
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from ..extras import named_extras
from ..inference.runner import input_names
from ..models import EarlyExitMixin, ExitConfigurationError
from .stages import Request, Row


class Reader:
    """Converts the examples of requests to rows, in its own threads.

    Args:
        model: an early-exit model.
        processor: its tokenizer or image processor; `None`: requests contain only rows of model inputs.
        max_length: tokens to which longer texts are truncated, at most what the model takes.
        length_step: texts run together if their lengths are equal when rounded up to a multiple of this.
        max_pixels: larger images, given as bytes, are refused.
        done: called in a thread with each request that has been read, and with the error if reading failed.
    """

    def __init__(
        self,
        model: EarlyExitMixin,
        processor,
        max_length: int | None,
        length_step: int,
        max_pixels: int,
        done: Callable[[Request, Exception | None], None],
    ):
        self.model, self.done, self.length_step, self.max_pixels = model, done, length_step, max_pixels
        self.text = model.main_input_name == "input_ids"
        self._names, self._main = frozenset(input_names(model)), model.main_input_name
        # A call changes the settings of a tokenizer: it belongs to this reader, and one thread uses it at a time.
        self.processor = copy.deepcopy(processor) if self.text else processor
        self.max_length = model.config.input_limit(max_length)
        if not self.text and processor is not None:
            with named_extras():
                from ..data.decoding import decode_image
                from ..data.transforms import EvaluationTransform

            self._transform, self._decode = EvaluationTransform(processor, model.config.num_channels), decode_image
        self._one_at_a_time = threading.Lock()
        self._pending: deque[Request] = deque()
        self._threads = ThreadPoolExecutor(1 if self.text else min(4, os.cpu_count() or 1), "een_hf reader")

    def submit(self, request: Request) -> None:
        self._pending.append(request)
        self._threads.submit(self._work)

    def close(self) -> None:
        """Wait until what was submitted has been read."""
        self._threads.shutdown()

    def _work(self) -> None:
        requests = []
        while self._pending and len(requests) < (64 if self.text else 1):
            try:
                requests.append(self._pending.popleft())
            except IndexError:  # another thread took it
                break
        if requests:
            self.read(requests)

    def read(self, requests: list[Request]) -> None:
        """Read requests in this thread."""
        try:
            examples = [example for request in requests for example in request.examples]
            rows = iter(self._encode(examples))
            for request in requests:
                request.rows = [self._row(request, next(rows)) for _ in request.examples]
        except Exception as error:
            if len(requests) == 1:
                self.done(requests[0], error)
                return
            for request in requests:  # only the request at fault may fail
                self.read([request])
            return
        for request in requests:
            request.examples = None
            self.done(request, None)

    def _encode(self, examples: list) -> list[dict]:
        """Model inputs of each example."""
        raw = [place for place, example in enumerate(examples) if not isinstance(example, Mapping)]
        encoded = list(examples)
        if raw and self.processor is None:
            raise ExitConfigurationError("The engine has no tokenizer or image processor: give rows of model inputs.")
        if raw and self.text:
            with self._one_at_a_time:
                columns = self._tokenize([examples[place] for place in raw])
            for number, place in enumerate(raw):
                encoded[place] = {name: values[number] for name, values in columns.items()}
        elif raw:
            for place in raw:
                encoded[place] = {"pixel_values": self._transform(self._image(examples[place]))}
        return encoded

    def _image(self, given):
        if not isinstance(given, bytes):
            return given
        from PIL import Image

        try:
            width, height = Image.open(io.BytesIO(given)).size  # reads only the header of the file
        except Exception as error:  # Pillow's readers raise errors of many kinds on a broken file
            raise ExitConfigurationError("An image cannot be read: its format is not known.") from error
        if width * height > self.max_pixels:
            raise ExitConfigurationError(f"An image has {width} x {height} pixels, more than {self.max_pixels}.")
        image, problem = self._decode({"bytes": given, "path": None})
        if image is None:
            raise ExitConfigurationError(f"An image cannot be read: {problem}.")
        return image

    def _tokenize(self, texts: list[str | tuple[str, str]]) -> Mapping[str, list]:
        wrong = next((text for text in texts if not (isinstance(text, str) or _is_pair(text))), None)
        if wrong is not None:
            raise ExitConfigurationError(f"A text is a string or a pair of two, not {type(wrong).__name__}.")
        # Pairs and single texts need separate calls; most requests contain one kind.
        if all(isinstance(text, str) for text in texts):
            columns = self.processor(texts, truncation=True, max_length=self.max_length)
        elif not any(isinstance(text, str) for text in texts):
            columns = self.processor(*map(list, zip(*texts, strict=True)), truncation=True, max_length=self.max_length)
        else:
            singles = [self._tokenize([text]) for text in texts]
            columns = {name: [one[name][0] for one in singles] for name in singles[0]}
        return columns

    def _row(self, request: Request, example: Mapping) -> Row:
        inputs = {n: torch.as_tensor(v) for n, v in example.items() if n in self._names and v is not None}
        if self._main not in inputs:
            raise ExitConfigurationError(f"A row has no {self._main}; its columns are: {', '.join(example)}.")
        shape = inputs[self._main].shape
        if len(shape) != (1 if self.text else 3):
            raise ExitConfigurationError(
                f"A row has {self._main} of shape {tuple(shape)}: it is one example, without a batch dimension."
            )
        if not self.text:
            return Row(request, inputs, size=shape)
        length = shape[0]
        if length == 0:
            raise ExitConfigurationError("A row has no tokens.")
        self.model.config.check_input_length(length, "A text")
        self.model.config.check_tokens(inputs, "A row")
        mask = inputs.get("attention_mask")
        masked = mask is not None and not bool(mask.all())
        if mask is not None:
            self.model.check_padding(mask[None], (1, length))
        return Row(request, inputs, -(-length // self.length_step), length, masked)


def _is_pair(text) -> bool:
    return isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text)
