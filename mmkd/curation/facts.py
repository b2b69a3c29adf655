"""The fields of a sample that decide about it, taken out of a JSON object without building the rest.

BIOMEDICA stores the whole article beside every figure. Decoding into a declared set of fields checks that all of it is
JSON and builds only what is asked for, in a fifth of the time of ``json.loads``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

TEXTS = (
    "image_panel_type", "image_panel_subtype", "image_cluster_id", "image_label_id", "image_hash",
    "article_accession_id", "article_license",
    "modality", "label", "group", "split", "license", "source",
)  # fmt: skip
LABELS = ("image_primary_label", "image_secondary_label")


class WrongFacts(ValueError):
    """Facts that cannot be used; ``reason`` says how they are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Facts:
    """What is known of a sample: texts by name, labels as lists, the article's context left undecoded."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def text(self, name: str) -> str:
        """A text field, empty where it is missing; numbers become text."""
        value = getattr(self._values, name)
        return "" if value is None or value == "None" else str(value).strip()

    def values(self, name: str) -> list[str]:
        """A field as a list of texts, whatever it is."""
        value = getattr(self._values, name)
        if value is None:
            return []
        return [str(entry) for entry in value] if isinstance(value, list) else [str(value)]

    def context(self) -> dict[str, Any]:
        """``image_context``: figure name -> paragraphs that mention it.

        Raises:
            WrongFacts: it is no object.
        """
        raw = bytes(self._values.image_context)
        value = json.loads(raw) if raw else {}
        if value is not None and not isinstance(value, dict):
            raise WrongFacts("wrong_type")
        return value or {}


def decode_facts(data: bytes | Mapping[str, Any] | None, extra: Sequence[str] = ()) -> Facts:
    """The facts of a sample.

    Args:
        data: a JSON object, or its values.
        extra: fields beside the usual ones that rules ask for.

    Raises:
        WrongFacts: no JSON, no object, or a field of another type than it must have.
    """
    import msgspec

    shape, decoder = _decoder(tuple(extra))
    try:
        if data is None:
            return Facts(shape())
        if isinstance(data, bytes):
            return Facts(_decoded(decoder, data, shape))
        return Facts(msgspec.convert(dict(data), shape))
    except msgspec.ValidationError as error:
        raise WrongFacts("wrong_type") from error
    except (ValueError, RecursionError) as error:
        raise WrongFacts("invalid_json") from error


def _decoded(decoder: Any, data: bytes, shape: type) -> Any:
    import msgspec

    try:
        return decoder.decode(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # NaN and lone surrogates are no JSON, but Python writes and reads them
        values = json.loads(data, parse_constant=lambda name: math.nan)
        if isinstance(values, dict) and "image_context" in values:
            values["image_context"] = msgspec.Raw(json.dumps(values["image_context"]).encode())
        return msgspec.convert(values, shape)


@cache
def _decoder(extra: tuple[str, ...]) -> tuple[type, Any]:
    import msgspec

    text, labels = str | int | float | None, list[str] | str | None
    fields: list[Any] = [(name, text, None) for name in TEXTS]
    fields += [(name, labels, None) for name in LABELS]
    fields += [(name, Any, None) for name in extra if name not in (*TEXTS, *LABELS)]
    fields.append(("image_context", msgspec.Raw, msgspec.Raw()))
    shape = msgspec.defstruct("SampleFacts", fields)
    return shape, msgspec.json.Decoder(shape)
