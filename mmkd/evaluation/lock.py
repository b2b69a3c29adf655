"""``repro.lock``: everything that a result depends on, by its hash, so that it can be made again or told apart."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from mmkd.evaluation.summary import versions

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
        "code": code_state(Path(__file__).resolve().parent),
    }


def code_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds the folder and whether files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed below some other checkout is no checkout
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
