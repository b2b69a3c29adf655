"""What every source yields, whatever its form: samples as found, and things that are refused unread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2"))
CAPTION_SUFFIXES = frozenset(("txt", "caption", "text"))
FACTS_SUFFIX = "json"


@dataclass(frozen=True, slots=True)
class RawSample:
    """One image with what its source says of it; nothing is decoded yet.

    Attributes:
        key: the source's own name of the sample.
        place: where it lies, for reports.
        caption: text, or its bytes in an encoding that is still to be found out; None where there is none.
        facts: a JSON object as bytes, or already a mapping; None where there is none.
        read_image: reads the bytes of the image file.
        image_suffix: ending of the image's name, without the dot and in small letters; empty where it has none.
    """

    key: str
    place: str
    caption: str | bytes | None
    facts: bytes | Mapping[str, Any] | None
    read_image: Callable[[], bytes]
    image_suffix: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """Something that is no sample, and the reason under which it is counted."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fragment:
    """A sample of which members are missing here; they may be in another shard.

    Attributes:
        members: ``image``, ``caption`` and ``facts``, as far as they are here, as suffix and bytes.
    """

    key: str
    place: str
    members: dict[str, tuple[str, bytes]] = field(default_factory=dict)


Item = RawSample | Refused | Fragment


def kind_of(suffix: str) -> str:
    """Image, caption, facts, or an empty string for members that mean nothing here."""
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in CAPTION_SUFFIXES:
        return "caption"
    return "facts" if suffix == FACTS_SUFFIX else ""
