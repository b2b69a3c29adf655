"""A folder of peft's as a Hub repository: a few megabytes, and a card that names the model; the rest is the model's.

peft keeps the folder from which the model was read. In what is published the model's Hub id stands there instead, so
that the adapter finds its model and nothing is told of this machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmkd.files import read_json
from mmkd.provenance import PROVENANCE_FILE, UNSTATED, read_provenance
from mmkd.publishing import card_facts
from mmkd.publishing.model import model_card
from mmkd.publishing.publication import ADAPTER_CONFIG, Publication, existing, made, not_taken
from mmkd.publishing.weights import Tensors, count_parameters, read_headers

WEIGHTS_FILE = "adapter_model.safetensors"
BASE = "base_model_name_or_path"


def adapter_publication(
    folder: Path, repo: str, template: str, license: str | None, base: str | None = None
) -> Publication:
    """Everything that is uploaded of an adapter.

    Args:
        folder: written by finetune or by peft.
        repo: ``user/name``.
        template: of the card.
        license: under which the publisher offers it, or None.
        base: Hub id of its model; None where the folder says it.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: a file is damaged, it is no adapter of ours, or nothing says which model it belongs to.
    """
    config = _config(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_FILE}; pickled adapters are not pushed: save it with safetensors"
        )
    tensors, provenance = read_headers([weights]), read_provenance(folder)
    base = base or _base_of(config, provenance, folder)
    text = json.dumps({**config, BASE: base}, indent=2, sort_keys=True) + "\n"
    items = {ADAPTER_CONFIG: made(text), WEIGHTS_FILE: existing(weights)}
    if provenance:
        items[PROVENANCE_FILE] = existing(folder / PROVENANCE_FILE)
    beside = folder.parent if folder.name == "adapter" and provenance else folder  # where finetune keeps its settings
    recipe = card_facts.recipe_yaml(folder if (folder / card_facts.SETTINGS_FILE).is_file() else beside)
    card = model_card(folder, repo, template, provenance, license, _facts(config, tensors), recipe, base=base)
    conflict = card_facts.license_conflict(card_facts.components(provenance), license)
    notes = [conflict] if conflict else []
    if not provenance:
        notes.append(f"{folder} has no {PROVENANCE_FILE}: the card cannot name the data and its licences")
    return Publication("model", card, items, not_taken(folder, items), notes, [WEIGHTS_FILE])


def _config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``.

    Raises:
        ValueError: it is no object, or of an adapter for another kind of model.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or not config.get("peft_type"):
        raise ValueError(f"{path} is not what peft writes: it has no peft_type")
    of = (config.get("auto_mapping") or {}).get("base_model_class", "MMKDClipModel")
    if not of.startswith("MMKDClip"):
        raise ValueError(f"{folder} holds an adapter of a {of}; only those of an MMKDClipModel are pushed")
    return config


def _base_of(config: dict[str, Any], provenance: dict[str, Any], folder: Path) -> str:
    """Hub id of an adapter's model, where the folder says one.

    Raises:
        ValueError: it says a folder, or nothing.
    """
    told = config.get(BASE) or ""
    starts = [row["weights"] for row in provenance.get("started_from") or ()]
    is_id = told.count("/") == 1 and not told.startswith((".", "~", "/")) and not Path(told).exists()
    if is_id and (not starts or told in starts):
        return str(told)
    raise ValueError(
        f"{folder} does not say which repository its model is in (it was read from {Path(told).name or 'nowhere'}); "
        "push the model first and give its id: --base_model user/name"
    )


def _facts(config: dict[str, Any], tensors: Tensors) -> dict[str, str]:
    """Kind and size of an adapter as rows of a table."""
    kind = "DoRA" if config.get("use_dora") else str(config["peft_type"])
    types = ", ".join(sorted({dtype for _, dtype, _ in tensors.values()}))
    targets = config.get("target_modules") or ()
    names = [targets] if isinstance(targets, str) else sorted({str(name).rsplit(".", 1)[-1] for name in targets})
    rank, alpha = config.get("r", UNSTATED), config.get("lora_alpha", UNSTATED)
    return {
        "adapter": card_facts.cell(f"{kind}, rank {rank}, alpha {alpha}"),
        "layers": card_facts.cell(", ".join(names) or UNSTATED),
        "parameters": f"{count_parameters(tensors) / 1e6:.2f} million, {types}",
    }
