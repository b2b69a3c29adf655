"""What clients send: texts and images as JSON or as a form, in the shapes that OpenAI's embeddings and chat use.

An item is a text, or an image as bytes. Images come as ``data:`` URLs, as base64, or as files of a form. Addresses of
images are refused, because the service opens no connection; a form is kept in memory, because uploads must not lie on a
disk.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mmkd.command.settings import nearest
from mmkd.serving.gate import RequestError

Item = str | bytes

DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*)(;base64)?,", re.IGNORECASE)
ADDRESS = re.compile(r"\s*(?:https?|ftp|file|s3|gs)://\S+\s*", re.IGNORECASE)
FILE_TYPES = ("application/octet-stream", "application/dicom", "application/gzip", "application/x-gzip")
JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data"
FIELD_BYTES = 1024**2  # of a text in a form
EXAMPLE_IMAGE = "data:image/png;base64,iVBORw0KGgo..."


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _separated(value: Any) -> Any:
    """Labels as a list; a form may give them in one text."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Items = Annotated[
    list[str | dict[str, Any]],
    BeforeValidator(_listed, json_schema_input_type=str | dict[str, Any] | list[str | dict[str, Any]]),
]
ITEMS_HELP = (
    "one item or a list: a text; an image as a `data:` URL; {'text': ...}; {'image': data URL or base64}; or a content "
    "part {'type': 'image_url', 'image_url': {'url': data URL}}"
)


class RequestBody(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="forbid")

    input: Items = Field(description=ITEMS_HELP, examples=["an MRI of the brain", [EXAMPLE_IMAGE]])
    model: str | None = Field(None, description="name of the served model")
    user: str | None = Field(None, description="accepted for OpenAI's clients, and not used")


Form = TypeVar("Form", bound=RequestBody)


class EmbeddingRequest(RequestBody):
    """Texts and images to embed."""

    encoding_format: Literal["float", "base64"] = Field("float", description="numbers, or base64 of float32")
    dimensions: int | None = Field(None, description="the model's own width; no other is possible")


class ClassifyRequest(RequestBody):
    """Images to classify."""

    input: Items = Field(description=f"images only; {ITEMS_HELP}", examples=[EXAMPLE_IMAGE])
    labels: Annotated[list[str], BeforeValidator(_separated)] | None = Field(
        None, description="labels to choose from; by default those of the service"
    )


class SearchRequest(RequestBody):
    """A text or an image to search the archive with."""

    input: Items = Field(description=f"one text or image; {ITEMS_HELP}", examples=["power Doppler ultrasound"])
    k: int = Field(5, ge=1, le=100, description="number of answers")


async def read_request(
    request: Request, form: type[Form], most_items: int, aside: Callable[..., Awaitable[Any]]
) -> tuple[Form, list[Item]]:
    """Read a request as JSON or as a form.

    Args:
        request: with a body that the gate has read.
        form: what it must hold.
        most_items: allowed in ``input``.
        aside: calls a function, in a thread where its work is large: its size in bytes, the function, its arguments.

    Returns:
        The request, and its items.

    Raises:
        RequestError: 400, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM_TYPE:
        return await _read_form(request, form, most_items)
    if kind != JSON_TYPE and not kind.endswith("+json"):
        message = f"Content-Type is {kind or 'missing'}; allowed: {JSON_TYPE}, {FORM_TYPE}"
        raise RequestError(415, message, "unsupported_media_type")
    body = await request.body()
    parsed: tuple[Form, list[Item]] = await aside(len(body), parse_json, body, form, most_items)
    return parsed


def parse_json(body: bytes, form: type[Form], most_items: int) -> tuple[Form, list[Item]]:
    """Read a request from JSON; see `read_request`."""
    try:
        parsed = form.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error, form) from None
    return parsed, parse_items(parsed.input, most_items)


def parse_items(values: Sequence[str | dict[str, Any]], most: int) -> list[Item]:
    """The texts and images of ``input``.

    Raises:
        RequestError: 400, with the place of the item.
    """
    if not values:
        raise RequestError(400, "input is empty; give a text or an image", "empty_input", "input")
    if len(values) > most:
        message = f"input has {len(values)} items; at most {most} are allowed in one request"
        raise RequestError(400, message, "too_many_items", "input")
    return [_item(value, f"input.{place}") for place, value in enumerate(values)]


def _item(value: str | dict[str, Any], place: str) -> Item:
    if isinstance(value, str):
        if DATA_URL.match(value):
            return _image(value, place)
        if ADDRESS.fullmatch(value):
            raise _address(place, ', or {"text": ...} to embed it as a text')
        return _text(value, place)
    content = {name: own for name, own in value.items() if name != "type"}
    kind = value.get("type", next(iter(content), None))
    own = content.get(kind) if isinstance(kind, str) else None
    if kind == "image_url" and isinstance(own, dict):
        own = own.get("url")
    if len(content) != 1 or kind not in ("text", "image", "image_url") or not isinstance(own, str):
        message = 'an item must be a text, {"text": text}, {"image": data URL or base64}, or a content part of these'
        raise RequestError(400, message, "invalid_item", place)
    return _text(own, place) if kind == "text" else _image(own, place)


def _text(value: str, place: str) -> str:
    if not value.strip():
        raise RequestError(400, "a text is empty; leave it out", "empty_input", place)
    return value


def _image(value: str, place: str) -> bytes:
    """The bytes of a data URL, or of bare base64."""
    if ADDRESS.fullmatch(value):
        raise _address(place)
    matched = DATA_URL.match(value)
    if matched is not None:
        _check_type(matched[1] or "text/plain", place)
        if matched[3] is None:
            raise RequestError(
                400, "a data URL of an image must be base64: data:image/png;base64,...", "invalid_image", place
            )
    try:
        data = b64decode(value[matched.end() :] if matched else value, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, "an image is not valid base64; is it cut off?", "invalid_image", place) from None
    return _not_empty(data, place)


def _not_empty(data: bytes, place: str) -> bytes:
    if not data:
        raise RequestError(400, "an image has no bytes", "empty_input", place)
    return data


def _check_type(kind: str, place: str) -> None:
    """Refuse what states that it is no image."""
    if not kind.startswith("image/") and kind not in FILE_TYPES:
        message = f"an image is sent as {kind}; allowed: image/..., {', '.join(FILE_TYPES)}"
        raise RequestError(415, message, "unsupported_media_type", place)


def _address(place: str, also: str = "") -> RequestError:
    message = f"addresses are not fetched: this service opens no connection; send the bytes as a data: URL{also}"
    return RequestError(400, message, "address_refused", place)


class _InMemoryParser(MultiPartParser):
    spool_max_size = 1 << 62  # the gate has limited the body, which is in memory already


async def _read_form(request: Request, form: type[Form], most_items: int) -> tuple[Form, list[Item]]:
    """Read fields and files; ``input``, ``image`` and ``file`` may be repeated, and keep their order."""
    limits = {
        "max_files": most_items + 1,
        "max_fields": most_items + len(form.model_fields),
        "max_part_size": FIELD_BYTES,
    }
    try:
        parsed = await _InMemoryParser(request.headers, request.stream(), **limits).parse()
    except (MultiPartException, KeyError) as error:
        raise RequestError(400, f"the form is malformed: {error}", "invalid_form") from None
    try:
        fields: dict[str, list[str]] = {}
        items: list[Item] = []
        for name, value in parsed.multi_items():
            place = f"input.{len(items)}"
            if isinstance(value, UploadFile):
                if name not in ("input", "image", "file"):
                    raise RequestError(
                        400, f"the file field {name[:40]!r} is unknown; use image", "unknown_field", "input"
                    )
                _check_type(value.content_type or FILE_TYPES[0], place)
                items.append(_not_empty(await value.read(), place))
            elif name == "input":
                items.append(_item(value, place))
            else:
                fields.setdefault(name, []).append(value)
        if not items or len(items) > most_items:
            parse_items([""] * len(items), most_items)  # the error of JSON
    finally:
        await parsed.close()
    try:
        single = {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
        return form.model_validate({**single, "input": ["form"]}), items
    except ValidationError as error:
        raise _refusal(error, form) from None


def _refusal(error: ValidationError, form: type[RequestBody]) -> RequestError:
    """The first of the errors, without the value that caused it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"][:2])) or None
    message = first["msg"]
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON ({message})", "invalid_json")
    if first["type"] == "extra_forbidden":
        name, allowed = str(first["loc"][-1])[:40], [key for key in form.model_fields if key != "user"]
        message = f"{name!r} is unknown{nearest(name, allowed)}; allowed: {', '.join(allowed)}"
        return RequestError(400, message, "unknown_field", name)
    if place is not None and place.startswith("input."):
        message = "an item must be a text or an object; tokens are not taken, send the text"
    return RequestError(400, f"{place}: {message}" if place else message, "invalid_request", place)
