"""The items that every source yields: samples, refused items, and the metadata of a sample.

BIOMEDICA stores the whole article beside every figure. Decoding into a declared set of fields checks that all of it is
JSON and builds only the fields that rules and captions use, in a fifth of the time of ``json.loads``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mmkd.data.readers import IMAGE_SUFFIXES

# What a file is to a sample, by its suffix; others are not used.
KINDS = dict.fromkeys(IMAGE_SUFFIXES, "image") | dict.fromkeys(("txt", "caption", "text"), "caption")
KINDS |= {"json": "metadata"}


@dataclass(frozen=True, slots=True)
class RawSample:
    """One image with the metadata of its source; nothing is decoded yet.

    Attributes:
        key: the source's own name of the sample.
        place: where it lies, for reports.
        caption: text, or its bytes in an unknown encoding; None where there is none.
        metadata: a JSON object as bytes, or already a mapping; None where there is none.
        read_image: reads the bytes of the image file.
        image_suffix: of the image's name, without the dot and in small letters; empty where it has none.
        id: the id that the pair keeps; empty where it gets one.
        teachers: names of available teachers, where the source lists them.
        listed: somebody chose the file: by a list, a folder of a class, or a caption. False for files of an archive,
            which need no caption, and are left out where they may show text about a patient.
    """

    key: str
    place: str
    caption: str | bytes | None
    metadata: bytes | Mapping[str, Any] | None
    read_image: Callable[[], bytes]
    image_suffix: str = ""
    id: str = ""
    teachers: tuple[str, ...] | None = None
    listed: bool = True


@dataclass(frozen=True, slots=True)
class Refused:
    """An item that is not a sample, and the reason under which it is counted."""

    place: str
    reason: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Fragment:
    """An incomplete sample; its other members may be in another shard.

    Attributes:
        members: ``image``, ``caption`` and ``metadata``, as far as they are here, as suffix and bytes.
    """

    key: str
    place: str
    members: dict[str, tuple[str, bytes]] = field(default_factory=dict)


Item = RawSample | Refused | Fragment


TEXTS = (
    "image_panel_type", "image_panel_subtype", "image_cluster_id", "image_label_id", "image_hash",
    "article_accession_id", "article_license",
    "modality", "label", "group", "study", "split", "license", "source",
)  # fmt: skip

LABELS = ("image_primary_label", "image_secondary_label")


class DroppedError(ValueError):
    """A sample that cannot be used; ``reason`` is the name under which it is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Metadata:
    """The metadata of a sample: texts by name, labels as lists, the article's context not yet decoded."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def text(self, name: str) -> str:
        """A text field, empty if it is missing; numbers become text."""
        value = getattr(self._values, name)
        return "" if value is None or value == "None" else str(value).strip()

    def set(self, name: str, value: str) -> None:
        """Give a field another value."""
        setattr(self._values, name, value)

    def values(self, name: str) -> list[str]:
        """A field of any type as a list of texts."""
        value = getattr(self._values, name)
        if value is None:
            return []
        return [str(entry) for entry in value] if isinstance(value, list) else [str(value)]

    def context(self) -> dict[str, Any]:
        """``image_context``: figure name -> paragraphs that mention it.

        Raises:
            DroppedError: it is not an object.
        """
        raw = bytes(self._values.image_context)
        value = json.loads(raw) if raw else {}
        if value is not None and not isinstance(value, dict):
            raise DroppedError("wrong_type")
        return value or {}


def decode_metadata(data: bytes | Mapping[str, Any] | None, extra: Sequence[str] = ()) -> Metadata:
    """The metadata of a sample.

    Args:
        data: a JSON object, or its values.
        extra: further fields that the rules name.

    Raises:
        DroppedError: it is not a JSON object, or a field has the wrong type.
    """
    import msgspec

    shape, decoder = _decoder(tuple(extra))
    try:
        if data is None:
            return Metadata(shape())
        if not isinstance(data, bytes):
            return Metadata(msgspec.convert(dict(data), shape))
        try:
            return Metadata(decoder.decode(data))
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # NaN and lone surrogates are not JSON, but Python writes and reads them
            values = json.loads(data, parse_constant=lambda name: math.nan)
            if isinstance(values, dict) and "image_context" in values:
                values["image_context"] = msgspec.Raw(json.dumps(values["image_context"]).encode())
            return Metadata(msgspec.convert(values, shape))
    except msgspec.ValidationError as error:
        raise DroppedError("wrong_type") from error
    except (ValueError, RecursionError) as error:
        raise DroppedError("invalid_json") from error


@cache
def _decoder(extra: tuple[str, ...]) -> tuple[type, Any]:
    import msgspec

    text, labels = str | int | float | None, list[str] | str | None
    fields: list[Any] = [(name, text, None) for name in TEXTS]
    fields += [(name, labels, None) for name in LABELS]
    fields += [(name, Any, None) for name in extra if name not in (*TEXTS, *LABELS)]
    fields.append(("image_context", msgspec.Raw, msgspec.Raw()))
    shape = msgspec.defstruct("SampleMetadata", fields)
    return shape, msgspec.json.Decoder(shape)
