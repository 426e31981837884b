"""The HTTP server of an `AsyncExitEngine`; requests as for text-embeddings-inference and Inference Endpoints."""

import asyncio
import base64
import binascii
import logging
import math
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
import torch

from ..evaluation import relative_costs
from ..extras import named_extras
from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.criteria import resolve_problem_type
from .engine import AsyncExitEngine, EngineBusyError, EngineClosedError, ExitAnswers
from .metrics import PrometheusObserver


with named_extras():
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, RedirectResponse
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
    from starlette.requests import ClientDisconnect


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerLimits:
    """The limits of a server; a request beyond them is answered by an error (status in brackets).

    Args:
        max_body_bytes: largest body of a request, in bytes (413).
        max_inputs: largest number of examples of a request (413).
        timeout: seconds that a request may take, including receipt of its body (408, 504).
    """

    max_body_bytes: int = 2 << 20
    max_inputs: int = 64
    timeout: float = 30.0


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPair(_Model):
    """A pair of texts."""

    text: str
    text_pair: str


class Policy(_Model):
    """The exit policy: a criterion and a threshold for each exit; the threshold of the last exit is ignored."""

    criterion: str
    thresholds: list[float]
    temperatures: list[float] | None = None
    params: dict[str, float] | None = None


class Parameters(_Model):
    """How to answer."""

    top_k: Annotated[int, Field(ge=1)] | None = Field(None, description="labels that are returned; default: all")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None, description="default: by the problem; before it, logits are divided by the temperature of their exit"
    )
    exits: bool = Field(False, description="add `exit_layer` and `cost_saved` to each label")
    policy: Literal["full"] | Policy | None = Field(
        None, description="the exit policy; `full`: no early exit; default: the model's own policy"
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds; at most the server's own limit")


Text = str | TextPair | Annotated[list[str], Field(min_length=1, max_length=2)]


class PredictRequest(_Model):
    """Texts, or images in base64."""

    inputs: str | TextPair | Annotated[list[Text], Field(min_length=1)] = Field(
        description="a text, or a list of texts; of pairs: `[first, second]` inside the list, or `{text, text_pair}`. "
        "Image models: an image in base64, or a list of them."
    )
    parameters: Parameters = Parameters()
    raw_scores: bool = Field(False, description="the same as `function_to_apply: none`, and no temperature")
    truncate: Literal[True] = Field(True, description="longer texts are always truncated")


_ONE_IMAGE = PredictRequest(inputs="")  # stands for a body that is an image


class Prediction(BaseModel):
    """One label of one input."""

    label: str
    score: float
    exit_layer: int | None = Field(None, description="the layer after which the input exited, counted from 1")
    cost_saved: float | None = Field(
        None, description="saved multiply-accumulates, as a share of those of the model without exits"
    )


class ErrorResponse(BaseModel):
    """Why there is no answer."""

    error: str
    error_type: str


class _RefusedError(Exception):
    def __init__(self, status: int, kind: str, message: str, **headers: str):
        super().__init__(message)
        self.response = JSONResponse({"error": message, "error_type": kind}, status, headers or None)


def create_app(engine: AsyncExitEngine, *, name: str = "", limits: ServerLimits | None = None) -> "FastAPI":
    """The server of an engine as an ASGI application; the engine is started and stopped with it.

    Args:
        engine: an engine that has not been started. If its observer is a `PrometheusObserver`, `/metrics` answers.
        name: name of the model, for `/info`.
        limits: limits of requests; `None`: the defaults of `ServerLimits`.

    Returns:
        the application, for any ASGI server.
    """
    limits = limits or ServerLimits()

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with engine:
            yield

    app = FastAPI(title="een_hf", description="A classifier with early exits.", lifespan=lifespan)
    _answer_requests(app, engine, limits)
    _answer_questions(app, engine, name, limits)
    _describe_requests(app)
    return app


def _answer_requests(app: "FastAPI", engine: AsyncExitEngine, limits: ServerLimits) -> None:
    """`/predict`, and the same at `/`."""
    answerer = _Answerer(engine, limits)
    errors = {status: {"model": ErrorResponse} for status in (400, 408, 413, 415, 422, 500, 503, 504)}
    schema = {"$ref": "#/components/schemas/PredictRequest"}
    body = {"application/json": {"schema": schema}, "image/*": {"schema": {"type": "string", "format": "binary"}}}

    @app.post(
        "/predict",
        response_model=list[list[Prediction]] | list[Prediction],
        responses=errors,
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )
    async def predict(request: Request) -> Response:
        """Classify texts or images: for each input its labels, the most probable first.

        A single image is answered by one list of labels, anything else by a list of such lists.
        """
        started = time.perf_counter()
        try:
            response = JSONResponse(await answerer.answer(request))
        except _RefusedError as refused:
            response = refused.response
        except ClientDisconnect:
            response = Response(status_code=499)
        engine.observer.responded(response.status_code, time.perf_counter() - started)
        return response

    @app.post("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        return await predict(request)


def _answer_questions(app: "FastAPI", engine: AsyncExitEngine, name: str, limits: ServerLimits) -> None:
    """`/health`, `/info` and `/metrics`; in a browser the server's address leads to `/docs`."""

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return RedirectResponse("docs")

    @app.get("/health", responses={503: {"model": ErrorResponse}})
    async def health() -> Response:
        """Whether requests are answered."""
        if engine.is_running:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"error": "The engine does not run.", "error_type": "unhealthy"}, 503)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """The model, its exits and policy, and the server's limits."""
        return {
            **_model_info(engine.model),
            "model_id": name,
            "limits": vars(limits),
            "audits": engine.auditor and engine.auditor.summary(),
        }

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters and histograms in the text format of Prometheus."""
        if not isinstance(engine.observer, PrometheusObserver):
            return Response(status_code=404)
        return Response(*engine.observer.exposition(engine.num_waiting))


def _describe_requests(app: "FastAPI") -> None:
    """Add the schema of requests, whose bodies `/predict` reads itself, to `/openapi.json`."""
    plain = app.openapi

    def openapi() -> dict:
        if app.openapi_schema is None:
            definitions = PredictRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas = plain()["components"]["schemas"]
            schemas |= {**definitions.pop("$defs"), "PredictRequest": definitions}
        return app.openapi_schema

    app.openapi = openapi


def _model_info(model: EarlyExitMixin) -> dict[str, Any]:
    from .. import __version__

    config, policy = model.config, model.get_exit_policy()
    return {
        "model_type": config.model_type,
        "problem_type": resolve_problem_type(config.problem_type, config.num_labels),
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "exit_layers": list(config.exit_layers),
        "policy": policy and policy.to_dict(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "version": __version__,
    }


class _Answerer:
    """Converts the body of a request to examples, and their answers to the response."""

    def __init__(self, engine: AsyncExitEngine, limits: ServerLimits):
        self.engine, self.limits, config = engine, limits, engine.model.config
        self.text = engine.model.main_input_name == "input_ids"
        self.problem_type = resolve_problem_type(config.problem_type, config.num_labels)
        self.labels = [config.id2label[index] for index in range(config.num_labels)]
        self._costs_at = cache(lambda length: relative_costs(engine.model, sequence_length=length))

    async def answer(self, request: Request) -> list[list[dict]] | list[dict]:
        """The content of the response.

        Raises:
            _RefusedError: with the response that says why.
            ClientDisconnect: the client has closed the connection.
        """
        started = time.perf_counter()
        try:
            body = await asyncio.wait_for(self._body(request), self.limits.timeout)
        except asyncio.TimeoutError:
            message = f"The body took longer than {self.limits.timeout:g} s."
            raise _RefusedError(408, "timeout", message, Connection="close") from None
        if self.text and request.headers.get("content-type", "").startswith("image/"):
            raise _RefusedError(415, "validation", "The model classifies texts, not images.")
        if not self.text and not body.lstrip().startswith(b"{"):  # its content type may be wrong
            asked, examples = _ONE_IMAGE, [body]
        else:
            asked = self._parse(body)
            inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
            examples = [self._example(one) for one in inputs]
        if len(examples) > self.limits.max_inputs:
            raise _RefusedError(
                413, "validation", f"{len(examples)} inputs; a request holds at most {self.limits.max_inputs}."
            )
        policy = asked.parameters.policy
        policy = False if policy == "full" else policy and policy.model_dump(exclude_none=True)
        left = self.limits.timeout - (time.perf_counter() - started)
        timeout = min(asked.parameters.timeout or math.inf, left)
        answers = await self._while_connected(request, self.engine.predict(examples, policy, timeout))
        rows = await self._labels(answers, asked)
        return rows if self.text or isinstance(asked.inputs, list) else rows[0]

    async def _body(self, request: Request) -> bytes:
        limit = self.limits.max_body_bytes
        too_large = _RefusedError(413, "validation", f"The body is larger than {limit} bytes.", Connection="close")
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _parse(self, body: bytes) -> PredictRequest:
        try:
            return PredictRequest.model_validate_json(body)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)[0]
            status = 400 if found["type"] == "json_invalid" else 422
            where = ".".join(map(str, found["loc"]))
            raise _RefusedError(status, "validation", f"{where}: {found['msg']}".removeprefix(": ")) from None

    def _example(self, given: str | list[str] | TextPair) -> str | tuple[str, str] | bytes:
        if self.text:
            if isinstance(given, TextPair):
                return given.text, given.text_pair
            return given if isinstance(given, str) else given[0] if len(given) == 1 else tuple(given)
        given = given[0] if isinstance(given, list) and len(given) == 1 else given
        if not isinstance(given, str):
            raise _RefusedError(422, "validation", "The model classifies images: give each in base64.")
        try:
            return base64.b64decode(given.partition(",")[2] if given.startswith("data:") else given, validate=True)
        except (binascii.Error, ValueError):
            raise _RefusedError(422, "validation", "An input is no image in base64.") from None

    async def _while_connected(self, request: Request, answering) -> ExitAnswers:
        """The answers, unless the client closes the connection before."""
        answering, gone = asyncio.ensure_future(answering), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ClientDisconnect
            return answering.result()
        except ExitConfigurationError as error:
            raise _RefusedError(422, "validation", str(error)) from error
        except EngineBusyError as error:
            wait = str(math.ceil(error.retry_after))
            raise _RefusedError(503, "overloaded", str(error), **{"Retry-After": wait}) from error
        except EngineClosedError as error:
            raise _RefusedError(503, "unhealthy", str(error), **{"Retry-After": "1"}) from error
        except asyncio.TimeoutError as error:
            raise _RefusedError(504, "timeout", "The answer took longer than the request may take.") from error
        except ClientDisconnect:
            raise
        except Exception as error:
            # The message of an error may contain the user's text, so it is neither logged nor returned.
            logger.error("A request failed with %s.", type(error).__name__)
            raise _RefusedError(500, "backend", f"The model failed with {type(error).__name__}.") from error
        finally:
            answering.cancel()
            gone.cancel()

    async def _labels(self, answers: ExitAnswers, asked: PredictRequest) -> list[list[dict]]:
        logits, policy, wanted = answers.logits, answers.policy, asked.parameters
        function = "none" if asked.raw_scores else wanted.function_to_apply
        if policy is not None and function != "none":
            logits = policy.temper(logits, answers.exit_index)
        scores = self._scores(logits, function).numpy()
        if not np.isfinite(scores).all():  # JSON has no such numbers
            raise _RefusedError(500, "backend", "The model answers with NaN or infinity.")
        rows = []
        for number, row in enumerate(scores):
            order = np.argsort(-row, kind="stable")[: wanted.top_k]
            rows.append([{"label": self.labels[index], "score": float(row[index])} for index in order])
            if wanted.exits:
                exit_index = int(answers.exit_index[number])
                length = answers.lengths[number] if self.text else None
                costs = (await asyncio.to_thread(self._costs_at, length)).of_policy(policy)
                layer = self.engine.model.config.exit_layers[exit_index]
                left = {"exit_layer": layer, "cost_saved": 1 - float(costs[exit_index])}
                rows[-1] = [one | left for one in rows[-1]]
        return rows

    def _scores(self, logits: torch.Tensor, function: str | None) -> torch.Tensor:
        if function is None:
            names = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}
            function = names.get(self.problem_type)
        if function == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if function == "sigmoid" else logits
