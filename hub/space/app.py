"""A Hugging Face Space: the page and the interface of `mmkd serve` for one model of the Hub.

The Space's variables choose the model (``MODEL``, a Hub id or a folder of the Space) and its labels (``LABELS``, a file
of the Space or a,b,c). Everyone may use a public Space, hence there is no key; Spaces show it in a frame.
"""

from __future__ import annotations

import os
import sys

from mmkd.command.cli import main

PORT = 7860  # where Spaces expect a Gradio app
SITES = ("https://huggingface.co", "https://*.hf.space")
LABELS = "X-ray,computed tomography,magnetic resonance imaging,ultrasound,fundus photograph,histopathology,dermatoscopy"


def arguments(environment: dict[str, str]) -> list[str]:
    """The command line of the service.

    Raises:
        ValueError: no model is named.
    """
    if not environment.get("MODEL"):
        raise ValueError("set the variable MODEL of this Space to the Hub id of a model, such as owner/mmkd-clip")
    return [
        *("serve", environment["MODEL"], "--labels", environment.get("LABELS") or LABELS),
        *("--host", "0.0.0.0", "--port", environment.get("PORT", str(PORT)), "--without_key", "true"),
        *("--frame_ancestors", ",".join(SITES)),
    ]


if __name__ == "__main__":
    try:
        main(arguments(dict(os.environ)))
    except ValueError as error:
        sys.exit(str(error))
