"""``repro.lock``: everything that a result depends on, by its hash, so that it can be made again or told apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmkd.evaluation.summary import versions
from mmkd.tracking import git_state

VERSION = 1


def lock_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The lock of an evaluation.

    Args:
        summary: what ``summary.json`` says, with settings.

    Returns:
        JSON values: hash of every manifest and of all images and texts of every dataset, fingerprint and source of
        every encoder, settings, versions of packages, and the commit of the code where it runs from a checkout.
    """
    datasets = {
        name: {
            "content_sha256": hashlib.sha256(json.dumps(own["content"]).encode()).hexdigest(),
            **({"manifest_sha256": own["manifest_sha256"]} if "manifest_sha256" in own else {}),
        }
        for name, own in summary["datasets"].items()
    }
    encoders = {name: {key: own[key] for key in ("source", "fingerprint")} for name, own in summary["encoders"].items()}
    return {
        "version": VERSION,
        "encoders": encoders,
        "datasets": datasets,
        "settings": summary["settings"],
        "versions": versions(),
        "code": git_state(Path(__file__).resolve()),
    }
