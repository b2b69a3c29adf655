"""Zero-shot classification on the Hub's Inference Endpoints; `mmkd push` puts this file beside the weights.

A request holds an image in base64 as ``inputs``, and ``parameters`` with ``candidate_labels``.
"""

import base64
import io
from typing import Any

from PIL import Image
from transformers import pipeline


class EndpointHandler:
    """The interface that Inference Endpoints expect."""

    def __init__(self, path: str = "") -> None:
        """Load the model.

        Args:
            path: the folder of the repository.
        """
        self._classify = pipeline("zero-shot-image-classification", model=path, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Labels with their shares, the largest first.

        Raises:
            ValueError: a request without an image or without labels.
        """
        labels = (data.get("parameters") or {}).get("candidate_labels")
        if not data.get("inputs") or not labels:
            raise ValueError("a request needs `inputs` (an image in base64) and `parameters.candidate_labels` (a list)")
        image = Image.open(io.BytesIO(base64.b64decode(data["inputs"])))
        found: list[dict[str, Any]] = self._classify(image, candidate_labels=labels, hypothesis_template="{}")
        return found
