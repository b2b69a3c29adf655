"""What is known of a model, from its folder to the words and rows of its card.

Nothing is guessed: what a folder does not say stands in the card as not stated. Values that come from files are made
fit for a table; folders are reduced to their last name, so that the card tells nothing of the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mmkd.data.licenses import NONE_DECLARED, OPEN, OTHERS, UNSTATED, hub_id, strictest, terms
from mmkd.files import read_json

SETTINGS_FILE = "settings.yaml"
FOLDER_SETTINGS = ("output", "pairs", "features", "aligned")
NOT_THE_RECIPE = ("output", "quiet", "overwrite", "workers", "checkpoint_every", "checkpoints_kept")
STAGES = {
    "pretrain": "Contrastive pretraining (`mmkd pretrain`)",
    "distill": "Distillation (`mmkd distill`)",
    "finetune": "Fine-tuning (`mmkd finetune`)",
    "convert": "Conversion of the authors' checkpoint (`mmkd convert`)",
}
Row = dict[str, Any]


def cell(value: Any) -> str:
    """A value as it may stand in a Markdown table: one line, without anything a renderer would act on."""
    text = " ".join(str(value).split())
    for character, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "'"), ("[", "&#91;")):
        text = text.replace(character, safe)
    return text


def chain(provenance: Row) -> Iterator[Row]:
    """The provenance of a model, and of every model it started from."""
    yield provenance
    for start in provenance.get("started_from") or ():
        if start.get("provenance"):
            yield from chain(start["provenance"])


def components(provenance: Row) -> list[tuple[str, str]]:
    """Everything with a licence that went into a model: name and licence."""
    found: list[tuple[str, str]] = []
    for link in chain(provenance):
        found += [(f"teacher {row['teacher']}", row["license"]) for row in link.get("teachers") or ()]
        found += [(row["weights"], row["license"]) for row in link.get("started_from") or ()]
        licenses = (link.get("data") or {}).get("licenses") or {}
        found += [(f"{count} training pairs", license) for license, count in licenses.items() if license != OTHERS]
    return list(dict.fromkeys(found))


def teacher_rows(provenance: Row) -> list[Row]:
    """Rows of the table of teachers."""
    rows = [row for link in chain(provenance) for row in link.get("teachers") or ()]
    return [
        {
            "name": cell(row["teacher"]),
            "weights": cell(row.get("weights", UNSTATED)),
            "license": cell(row["license"]),
            "forbids": terms(row["license"]).forbids,
        }
        for row in rows
    ]


def teacher_notes(provenance: Row) -> list[str]:
    """What is inferred or unknown of teachers."""
    rows = [row for link in chain(provenance) for row in link.get("teachers") or ()]
    return [f"{cell(row['teacher'])}: {cell(row['note'])}" for row in rows if row.get("note")]


def start_rows(provenance: Row) -> list[Row]:
    """Rows of the table of starting weights; a model of the publisher's own is told by what it started from."""
    rows = [row for link in chain(provenance) for row in link.get("started_from") or ()]
    return [
        {"name": cell(row["weights"]), "license": cell(row["license"]), "forbids": terms(row["license"]).forbids}
        for row in rows
    ]


def data_rows(provenance: Row) -> list[Row]:
    """What each stage was trained on."""
    stages = []
    for link in chain(provenance):
        data = link.get("data")
        if data:
            licenses = [row | {"forbids": terms(row["raw"]).forbids} for row in _counted(data["licenses"])]
            stages.append(
                {
                    "title": STAGES.get(link.get("stage", ""), cell(link.get("stage", "a stage"))),
                    "pairs": data["pairs"],
                    "groups": data["groups"],
                    "licenses": licenses,
                    "sources": _counted(data["sources"]),
                    "modalities": _counted(data["modalities"]),
                }
            )
    return stages


def license_statement(parts: list[tuple[str, str]], license: str | None) -> str:
    """What the strictest of the licences forbids, whose it is, and what the publisher has chosen."""
    chosen = f"The publisher offers the weights under `{license}`." if license else "The publisher states no licence."
    if not parts:
        return f"{chosen} The folder does not say what the model was made from, so nothing is known of other licences."
    undeclared = [part for part in parts if terms(part[1]) == NONE_DECLARED]
    declared = [part for part in parts if part not in undeclared]
    worst = strictest(name for _, name in declared)
    said = [chosen]
    if undeclared:
        said.append(f"No licence is declared for {_listed(undeclared)}: their owners have allowed no use, so ask them.")
    if worst == OPEN:
        said.append("All other licences of what went into it ask for no more than credit." if declared else "")
    else:
        owners = [part for part in declared if terms(part[1]) == worst]
        said.append(f"The strictest declared licence forbids {worst.forbids}; it is that of {_listed(owners)}.")
    if undeclared or worst != OPEN:
        said.append(
            "Whether a model is bound by the licences of what it learned from is not settled everywhere: decide on "
            "advice of your own, not on this card."
        )
    return " ".join(filter(None, said))


def license_conflict(parts: list[tuple[str, str]], license: str | None) -> str | None:
    """A warning when the publisher offers more than the strictest of the licences gives."""
    worst = strictest(name for _, name in parts)
    if license is None:
        return "no licence is given; choose one with --license, or the Hub shows none"
    if worst == OPEN or terms(license).strictness >= worst.strictness:
        return None
    return f"--license {license} offers more than what went into the model: the strictest forbids {worst.forbids}"


def card_license(license: str | None) -> str | None:
    """The licence as the metadata of a card spells it."""
    return hub_id(license) or license if license else None


def recipe_yaml(folder: Path) -> str:
    """The resolved settings that make the recipe, as YAML, folders by their last name; empty if there are none.

    Raises:
        ValueError: ``settings.yaml`` is not YAML of this form.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return ""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `key: value` lines")
    kept = {key: _placeless(key, value) for key, value in settings.items() if key not in NOT_THE_RECIPE}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip().replace("```", "'''")


def _placeless(key: str, value: Any) -> Any:
    """A setting without the folders of this machine; Hub ids (``owner/name``) stay."""
    if isinstance(value, list):
        return [_placeless(key, item) for item in value]
    if isinstance(value, dict):
        return {name: _placeless(key, item) for name, item in value.items()}
    if not isinstance(value, str) or not ("/" in value or "\\" in value):
        return value
    kind, colon, rest = value.partition(":")
    if colon and len(kind) > 1 and rest.count("/") > 1:
        return f"{kind}:{Path(rest).name}"
    is_place = key in FOLDER_SETTINGS or value.startswith((".", "~", "/")) or "\\" in value or value.count("/") > 1
    return Path(value.replace("\\", "/")).name if is_place or Path(value).exists() else value


def model_facts(folder: Path, parameters: int, dtypes: Iterable[str]) -> dict[str, str]:
    """Sizes of a model as rows of a table."""
    config = read_json(folder / "config.json")
    vision, text = config["vision_config"], config["text_config"]
    eyes = vision.get("architecture") or f"{vision.get('model_type')}, {_layers(vision)}"
    words = f"{text.get('model_type')}, {_layers(text)}, {config.get('text_pooling', 'cls')} pooling"
    return {
        "parameters": f"{parameters / 1e6:.1f} million, {', '.join(sorted(set(dtypes)))}",
        "image tower": cell(f"{eyes}, {image_size(folder)} pixels"),
        "text tower": cell(words),
        "context": f"{_context(folder)} tokens; longer texts are cut with a warning",
        "embedding": f"{config['projection_dim']} dimensions, compare by cosine",
    }


def image_size(folder: Path) -> int | str:
    """Side of the images in pixels, as the processor makes them."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            size = found.get("image_processor", found).get("crop_size") or {}
            return size.get("height", UNSTATED) if isinstance(size, dict) else size
    return UNSTATED


def _context(folder: Path) -> int | str:
    path = folder / "tokenizer_config.json"
    limit = read_json(path).get("model_max_length", UNSTATED) if path.is_file() else UNSTATED
    return UNSTATED if isinstance(limit, (int, float)) and limit > 10**6 else limit


def _listed(parts: list[tuple[str, str]]) -> str:
    return ", ".join(f"{cell(part)} ({cell(name)})" for part, name in parts)


def _layers(config: Row) -> str:
    layers = config.get("num_hidden_layers", config.get("n_layers", "?"))
    return f"{layers} layers of {config.get('hidden_size', '?')}"


def _counted(counts: dict[str, int]) -> list[Row]:
    return [{"name": cell(name), "raw": name, "count": count} for name, count in counts.items()]
