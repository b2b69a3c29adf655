"""The interface of the service: OpenAI's embeddings and models, classification, search, health and metrics."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mmkd.serving.gate import Gate, RequestError, internal_error
from mmkd.serving.inputs import (
    FORM_TYPE,
    JSON_TYPE,
    ClassifyRequest,
    EmbeddingRequest,
    Form,
    Item,
    SearchRequest,
    read_request,
)
from mmkd.serving.service import Service, Vectors

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64)
NOTICE = "Not a clinical result."


class Embedding(BaseModel):
    """One vector, of unit length."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of the texts, each up to the model's context."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Vectors in the order of the input."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mmkd-clip"
    dim: int
    labels: list[str]
    archive_images: int | None


class Models(BaseModel):
    """All served models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Classification(BaseModel):
    """What is predicted for one image.

    Attributes:
        probabilities: label -> probability, the highest first.
        labels: the answer; none where the model abstains.
        conformal_set: labels that contain the true one at the calibrated rate; null without calibration.
        abstained: the image is unlike all labels.
    """

    index: int
    probabilities: dict[str, float]
    labels: list[str]
    conformal_set: list[str] | None
    abstained: bool


class Classifications(BaseModel):
    """Predictions in the order of the input."""

    model: str
    calibrated: bool
    notice: str = NOTICE
    data: list[Classification]


class Found(BaseModel):
    """An image of the archive, by its path in the folder that was indexed, and its cosine with the query."""

    id: str
    score: float


class SearchAnswer(BaseModel):
    """The most similar images, the most similar first."""

    model: str
    data: list[Found]


class ErrorBody(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorBody


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        """Register them."""
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("mmkd_requests", "requests", ["route", "status"], **own)
        self.seconds = Histogram("mmkd_request_seconds", "duration of requests", ["route"], buckets=SECONDS, **own)
        self.batches = Histogram("mmkd_batch_items", "items of a batch", ["kind"], buckets=SIZES, **own)
        self.pending = Gauge("mmkd_pending_items", "texts and images in work", **own)
        ProcessCollector(registry=self.registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def batch(self, kind: str, size: int) -> None:
        """Count a batch."""
        self.batches.labels(kind).observe(size)


def create_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application without its gate; `with_gate` adds it, after a page is mounted.

    Args:
        service: the model.
        metrics: that ``/metrics`` shows.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="MMKD-CLIP",
        description=f"Embeddings, zero-shot classification and search of biomedical images. {NOTICE}",
        version="1",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses={status: {"model": ErrorAnswer} for status in (400, 401, 404, 408, 413, 415, 503, 504)},
    )
    created = int(time.time())

    _add_errors(app)
    _add_health(app, service, metrics)

    @app.post("/v1/embeddings", response_model=Embeddings, openapi_extra=_body_of(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """Embed texts and images into one space: unit vectors, whose products are cosine similarities."""
        requested, items = await _read(service, request, EmbeddingRequest)
        if requested.dimensions not in (None, service.dim):
            message = f"dimensions is {requested.dimensions}; this model gives {service.dim}"
            raise RequestError(400, message, "invalid_request", "dimensions")
        vectors = await service.embed(items)
        texts = [item for item in items if isinstance(item, str)]
        tokens = await service.aside(sum(map(len, texts)), service.count_tokens, texts) if texts else 0
        data = [
            {"object": "embedding", "index": place, "embedding": vector}
            for place, vector in enumerate(_encoded(vectors, requested.encoding_format))
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = {"object": "list", "data": data, "model": service.name, "usage": usage}
        return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON_TYPE)

    @app.post("/v1/classify", openapi_extra=_body_of(ClassifyRequest))
    async def classify(request: Request) -> Classifications:
        """Probabilities of labels for images; calibrated where the model has a calibration of these labels."""
        requested, items = await _read(service, request, ClassifyRequest)
        texts = [place for place, item in enumerate(items) if isinstance(item, str)]
        if texts:
            raise RequestError(400, "images are classified, not texts", "invalid_item", f"input.{texts[0]}")
        try:
            predictor = await service.predictor(requested.labels)
        except ValueError as error:
            raise RequestError(400, str(error), "invalid_labels", "labels") from None
        predictions = await service.classify(await service.embed(items), predictor)
        data = [Classification(index=place, **asdict(own)) for place, own in enumerate(predictions)]
        return Classifications(model=service.name, calibrated=predictor.calibration is not None, data=data)

    @app.post("/v1/search", openapi_extra=_body_of(SearchRequest))
    async def search(request: Request) -> SearchAnswer:
        """The images of the archive that are most similar to a text or an image."""
        if service.archive is None:
            raise RequestError(404, "this service has no archive; start it with --index INDEX", "no_archive")
        requested, items = await _read(service, request, SearchRequest)
        if len(items) != 1:
            raise RequestError(400, f"input has {len(items)} items; search takes one", "too_many_items", "input")
        hits = await service.search((await service.embed(items))[0], requested.k)
        return SearchAnswer(model=service.name, data=[Found(id=hit.id, score=hit.score) for hit in hits])

    def served() -> Model:
        images = len(service.archive.index) if service.archive else None
        return Model(id=service.name, created=created, dim=service.dim, labels=service.labels, archive_images=images)

    @app.get("/v1/models")
    async def models() -> Models:
        """The served model."""
        return Models(data=[served()])

    return app


def with_gate(
    app: FastAPI,
    service: Service,
    metrics: Metrics,
    key: bytes | None = None,
    hosts: Sequence[str] = (),
    page_paths: Sequence[str] = (),
    frame_ancestors: Sequence[str] = (),
) -> Gate:
    """The application behind its gate; arguments as `mmkd.serving.gate.Gate`."""
    routes = [*list(app.openapi()["paths"]), "/openapi.json"]
    return Gate(app, service.limits, key, hosts, routes, page_paths, metrics.request, frame_ancestors)


def _add_errors(app: FastAPI) -> None:
    """Errors in the form of OpenAI, without what other users have sent."""

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def refuse_method(_: Request, error: HTTPException) -> JSONResponse:
        return RequestError(
            error.status_code, error.detail, "not_allowed", headers=dict(error.headers or {})
        ).response()

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> JSONResponse:
        return internal_error().response()  # the gate logs it


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Routes that say how the service is."""
    metrics.pending.set_function(lambda: service.pending)

    @app.get("/livez", response_class=Response)
    async def livez() -> Response:
        """Whether the process answers."""
        return Response("ok", media_type="text/plain")

    @app.get("/readyz", response_class=Response)
    async def readyz() -> Response:
        """Whether the model computes, and the queue has room."""
        if service.ready and service.pending < service.limits.waiting:
            return Response("ok", media_type="text/plain")
        return Response("not ready", 503, media_type="text/plain", headers={"Retry-After": "1"})

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Counters in the form of Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _read(service: Service, request: Request, form: type[Form]) -> tuple[Form, list[Item]]:
    """A request with the model that is served.

    Raises:
        RequestError: it is malformed, or of another model.
    """
    requested, items = await read_request(request, form, service.limits.items, service.aside)
    named = requested.model
    if named is not None and named != service.name:
        raise RequestError(
            404, f"model {named[:80]!r} is not served; allowed: {service.name}", "model_not_found", "model"
        )
    return requested, items


def _encoded(vectors: Vectors, form: Literal["float", "base64"]) -> list[Any]:
    """Each vector as it is, or as base64 of little-endian float32."""
    if form == "float":
        return list(vectors)
    return [b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]


def _body_of(form: type[BaseModel]) -> dict[str, Any]:
    """The body of a request in the schema of OpenAPI."""
    schema = form.model_json_schema()
    fields = {name: own for name, own in schema["properties"].items() if name not in ("input", "user")}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "image files"}
    texts = {"type": "array", "items": {"type": "string"}, "description": "texts and data URLs"}
    multipart = {"type": "object", "properties": {"image": files, "input": texts, **fields}}
    content = {JSON_TYPE: {"schema": schema}, FORM_TYPE: {"schema": multipart}}
    return {"requestBody": {"required": True, "content": content}}
