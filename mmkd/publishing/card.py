"""Model and dataset cards: what a folder states, filled into the templates ``model_card.md`` and ``dataset_card.md``.

Nothing is guessed: what a folder does not state is "not stated" in the card. Text from files is escaped for Markdown
tables, and folders are reduced to their last name, so that no path of this machine is published.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from mmkd.data.licenses import NONE_DECLARED, OPEN, hub_id, strictest, terms
from mmkd.data.provenance import OTHERS, UNSTATED
from mmkd.files import read_object, read_yaml
from mmkd.publishing.publication import Draft

SETTINGS_FILE, PICTURE_FILE = "settings.yaml", "results.svg"
HUB = "https://huggingface.co"
ATLAS_SCHEMA = "https://atlas.rsna.org/schemas/2025-11/model.json"
FOLDER_SETTINGS = ("output", "pairs", "features", "aligned")
NOT_THE_RECIPE = ("output", "quiet", "overwrite", "workers", "checkpoint_every", "checkpoints_kept")
STAGES = {
    "pretrain": "Contrastive pretraining (`mmkd pretrain`)",
    "distill": "Distillation (`mmkd distill`)",
    "merge": "Averaging of weights (`mmkd merge`)",
    "finetune": "Fine-tuning (`mmkd finetune`)",
    "convert": "Conversion of the authors' checkpoint (`mmkd convert`)",
}
TAGS = ("mmkd-clip", "clip", "biomedical", "medical-imaging", "vision-language", "zero-shot")
MINIMUM_TRANSFORMERS = "5.8"
SHOWN_SOURCES = 5
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
ESCAPED = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "'", "[": "&#91;", "*": "&#42;"})
Row = dict[str, Any]
Component = tuple[str, str]


@dataclass(frozen=True)
class Scores:
    """The scores of an evaluation for a card.

    Attributes:
        rows: of the table, one for each task: escaped text by column.
        index: entries of the ``model-index``.
        on: the evaluated data: a split of pairs, or the test images of datasets.
        checks: shared groups and images.
        picture: the scores with their intervals as SVG; None where matplotlib is not installed.
    """

    rows: list[dict[str, str]]
    index: list[EvalResult]
    on: str
    checks: str
    picture: str | None


def escape(value: Any) -> str:
    """A value for a Markdown table: one line, without characters that a renderer interprets."""
    return " ".join(str(value).split()).translate(ESCAPED)


def model_card(
    draft: Draft,
    provenance: Row,
    sizes: dict[str, str],
    recipe: str,
    scores: Scores | None = None,
    base: str | None = None,
    examples: Sequence[str] = (),
) -> str:
    """The card of a model, or of an adapter where ``base`` is given.

    Args:
        draft: of the publication.
        provenance: ``provenance.json`` of the folder; empty where it has none.
        sizes: rows of the table of sizes, escaped.
        recipe: from `recipe_yaml`.
        scores: of the evaluation, or None.
        base: Hub id of the adapter's model.
        examples: files of the repository with images to try on its page; their names are the labels.
    """
    labels = ", ".join(dict.fromkeys(map(_label, examples)))
    place = f"{HUB}/{draft.repo}/resolve/main"
    widget = [
        {"src": f"{place}/{quote(file)}", "candidate_labels": labels, "example_title": _label(file)}
        for file in examples
    ]
    shown: dict[str, Any] = {"widget": widget} if widget else {}
    metadata = provenance_metadata(provenance)
    starts = [row for link in lineage(provenance) for row in link.get("started_from") or ()]
    bases = [row["weights"] for row in starts if not row.get("provenance")]
    data = ModelCardData(
        language="en",
        license=_card_license(draft.license),
        library_name="peft" if base else "transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[
            *TAGS,
            *(["knowledge-distillation"] if metadata["teachers"] else []),
            *([f"base_model:adapter:{base}"] if base else []),
        ],
        model_name=draft.repo.split("/")[1],
        base_model=base or [name for name in bases if name.count("/") == 1 and ":" not in name] or None,
        eval_results=scores.index if scores is not None and scores.index else None,
        **shown,
    )
    card = ModelCard.from_template(
        data,
        template_str=draft.template,
        name=draft.repo.split("/")[1],
        repo=draft.repo,
        base=base,
        sizes=sizes,
        recipe=recipe,
        scores=scores,
        image_size=image_size(draft.folder),
        license_statement=license_statement(components(provenance), draft.license, "the weights"),
        transformers_version=MINIMUM_TRANSFORMERS,
        repository=repository_url(),
        picture=PICTURE_FILE if scores is not None and scores.picture else None,
        onnx=(draft.staged / "onnx").is_dir(),
        needs_timm=needs_timm(draft.folder),
        **metadata,
    )
    return str(card.content)


def atlas_card(draft: Draft, sizes: dict[str, str], summary: str) -> Row:
    """The model's card for RSNA ATLAS, by its schema of December 2026.

    Args:
        draft: of the publication.
        sizes: rows of the table of sizes.
        summary: one paragraph.
    """
    limits = (
        "No clinical validation and no regulatory review. A score is not a probability of disease. Negation, number, "
        "side and size are poorly distinguished. Single two-dimensional images of 8 bits; scanners, protocols and "
        "populations beyond the training data are untested. The card at the link has every limit and result."
    )
    license = {"General metadata": {"License": {"Text": draft.license}}} if draft.license else {}
    return {
        "$schema": ATLAS_SCHEMA,
        "Model": {
            "Name": draft.repo,
            "Link": f"{HUB}/{draft.repo}",
            "Summary": summary,
            **license,
            "Model properties": {
                "Architecture": f"Dual encoder: {sizes['image tower']}; {sizes['text tower']}",
                "Availability": f"{HUB}/{draft.repo}",
                "Indications for use": "None: research on image-text retrieval and classification only.",
                "Input": {"Description": "An image, and texts such as the names of candidate classes."},
                "Output": {"Description": "Vectors of images and texts, and their similarities.", "Type": "Other"},
                "Limitations": limits,
            },
        },
    }


def repository_url() -> str | None:
    """The package's repository, where its ``pyproject.toml`` names one."""
    entries = importlib.metadata.metadata("mmkd-clip").get_all("Project-URL") or []
    addresses = dict(entry.split(", ", 1) for entry in entries)
    return addresses.get("Repository")


def needs_timm(folder: Path) -> bool:
    """Whether the model's image tower is a backbone of timm; an adapter's model is not known."""
    path = folder / "config.json"
    return path.is_file() and (read_object(path).get("vision_config") or {}).get("model_type") == "timm_wrapper"


def dataset_card(draft: Draft, parts: list[Component], count: int, data_file: str | None, **metadata: Any) -> str:
    """The card of pairs (``data_file`` is their manifest) or of features (None).

    Args:
        draft: of the publication.
        parts: what it was made from, with licences.
        count: of the pairs.
        data_file: what `datasets` loads.
        metadata: further values of the template, escaped.
    """
    shared = {hub_id(name) for _, name in parts}
    alike = next(iter(shared)) if len(shared) == 1 and data_file else None
    configs = [{"config_name": "default", "data_files": [{"split": "all", "path": data_file}]}]
    data = DatasetCardData(
        language="en",
        license=_card_license(draft.license) or alike,
        pretty_name=draft.repo.split("/")[1],
        task_categories=["zero-shot-image-classification"],
        size_categories=next((label for limit, label in SIZES if count < limit), "n>10M"),
        tags=["mmkd-clip", "biomedical", "image-text-pairs" if data_file else "feature-extraction"],
        **({"configs": configs} if data_file else {"viewer": False}),
    )
    card = DatasetCard.from_template(
        data,
        template_str=draft.template,
        name=draft.repo.split("/")[1],
        repo=draft.repo,
        count=count,
        data_file=data_file,
        license_statement=license_statement(parts, draft.license, "this dataset" if data_file else "these features"),
        **metadata,
    )
    return str(card.content)


def lineage(provenance: Row) -> Iterator[Row]:
    """The provenance of a model, and of every model that it started from."""
    yield provenance
    for start in provenance.get("started_from") or ():
        if start.get("provenance"):
            yield from lineage(start["provenance"])


def components(provenance: Row) -> list[Component]:
    """Everything with a licence that went into a model: name and licence."""
    found: list[Component] = []
    for link in lineage(provenance):
        found += [(f"teacher {row['teacher']}", row["license"]) for row in link.get("teachers") or ()]
        found += [(row["weights"], row["license"]) for row in link.get("started_from") or ()]
        licenses = (link.get("data") or {}).get("licenses") or {}
        found += [(f"{count} training pairs", license) for license, count in licenses.items() if license != OTHERS]
    return list(dict.fromkeys(found))


def provenance_metadata(provenance: Row) -> Row:
    """Teachers, starting weights and data of a model and its predecessors, as the template takes them."""
    links = list(lineage(provenance))
    data = [
        {
            "title": STAGES.get(link.get("stage", ""), escape(link.get("stage", "a stage"))),
            "pairs": link["data"]["pairs"],
            "groups": link["data"]["groups"],
            "licenses": count_rows(link["data"]["licenses"], licensed=True),
            "sources": count_rows(link["data"]["sources"]),
            "modalities": count_rows(link["data"]["modalities"]),
        }
        for link in links
        if link.get("data")
    ]
    sources = [row["name"] for stage in data for row in stage["sources"][:SHOWN_SOURCES] if row["name"] != UNSTATED]
    stage = provenance.get("stage", "")
    return {
        "stage": stage,
        "stage_title": STAGES.get(stage, ""),
        "teachers": [teacher_row(row) for link in links for row in link.get("teachers") or ()],
        "starts": [
            {"name": escape(row["weights"]), **license_row(row["license"])}
            for link in links
            for row in link.get("started_from") or ()
        ],
        "data": data,
        "sources": list(dict.fromkeys(sources)),
        "versions": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
    }


def teacher_row(teacher: Row) -> Row:
    """A row of the table of teachers."""
    return {
        "name": escape(teacher["teacher"]),
        "weights": escape(teacher.get("weights", UNSTATED)),
        "note": escape(teacher.get("note") or ""),
        **license_row(teacher["license"]),
    }


def license_row(license: str) -> Row:
    """A licence and its restrictions as columns of a table."""
    return {"license": escape(license), "restrictions": "" if license == OTHERS else terms(license).restrictions}


def count_rows(counts: dict[str, int], licensed: bool = False) -> list[Row]:
    """Rows of a table of counts; ``licensed`` where the names are licences."""
    return [
        {"name": escape(name), "count": count, **(license_row(name) if licensed else {})}
        for name, count in counts.items()
    ]


def license_statement(parts: list[Component], license: str | None, what: str) -> str:
    """The publisher's licence, and the strictest of the licences involved with its owners."""
    offered = (
        f"The publisher offers {what} under `{escape(license)}`." if license else "The publisher states no licence."
    )
    if not parts:
        return f"{offered} The folder does not state what went into it, so other licences are unknown."
    undeclared = [part for part in parts if terms(part[1]) == NONE_DECLARED]
    declared = [part for part in parts if part not in undeclared]
    worst = strictest(name for _, name in declared)
    sentences = [offered]
    if undeclared:
        sentences.append(f"No licence is declared for {_listed(undeclared)}: ask the owners before any use.")
    if declared and worst == OPEN:
        sentences.append("All declared licences involved require credit at most.")
    elif declared:
        owners = _listed([part for part in declared if terms(part[1]) == worst])
        sentences.append(f"The strictest declared licence is that of {owners}: {worst.restrictions}.")
    if undeclared or worst != OPEN:
        sentences.append(
            "Whether a model is bound by the licences of its teachers and training data is not settled everywhere: "
            "take legal advice; this card is not legal advice."
        )
    return " ".join(sentences)


def license_conflict(parts: list[Component], license: str | None) -> str | None:
    """A warning where the publisher offers more than the strictest licence involved."""
    worst = strictest(name for _, name in parts)
    if license is None:
        return "no licence is given; choose one with --license, or the Hub shows none"
    if worst == OPEN or terms(license).strictness >= worst.strictness:
        return None
    return f"--license {license} offers more than the strictest licence involved ({worst.restrictions})"


def recipe_yaml(folder: Path) -> str:
    """The resolved settings of a run as YAML, folders by their last name; empty where the folder holds none.

    Raises:
        ValueError: ``settings.yaml`` is not YAML of this form.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return ""
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `key: value` lines")
    kept = {key: _without_folders(key, value) for key, value in settings.items() if key not in NOT_THE_RECIPE}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip().replace("```", "'''")


def model_sizes(folder: Path, parameters: int, dtypes: Iterable[str]) -> dict[str, str]:
    """Sizes of a model as rows of a table."""
    config = read_object(folder / "config.json")
    vision, text = config["vision_config"], config["text_config"]
    architecture = vision.get("architecture") or f"{vision.get('model_type')}, {_layers(vision)}"
    path = folder / "tokenizer_config.json"
    context = read_object(path).get("model_max_length", UNSTATED) if path.is_file() else UNSTATED
    if isinstance(context, (int, float)) and context > 10**6:  # transformers' value for no limit
        context = UNSTATED
    return {
        "parameters": f"{parameters / 1e6:.1f} million, {', '.join(sorted(set(dtypes)))}",
        "image tower": escape(f"{architecture}, {image_size(folder)} pixels"),
        "text tower": escape(f"{text.get('model_type')}, {_layers(text)}, {config.get('text_pooling', 'cls')} pooling"),
        "context": f"{context} tokens; longer texts are truncated with a warning",
        "embedding": f"{config['projection_dim']} dimensions, compared by cosine similarity",
    }


def image_size(folder: Path) -> int | str:
    """Side of the images in pixels, as the processor makes them."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = read_object(folder / name)
            size = found.get("image_processor", found).get("crop_size") or {}
            return size.get("height", UNSTATED) if isinstance(size, dict) else size
    return UNSTATED


def _card_license(license: str | None) -> str | None:
    """The licence as the Hub spells it."""
    return hub_id(license) or license if license else None


def _without_folders(key: str, value: Any) -> Any:
    """A setting without the folders of this machine; Hub ids (``owner/name``) stay."""
    if isinstance(value, list):
        return [_without_folders(key, item) for item in value]
    if isinstance(value, dict):
        return {name: _without_folders(key, item) for name, item in value.items()}
    if not isinstance(value, str) or not ("/" in value or "\\" in value):
        return value
    kind, colon, rest = value.partition(":")
    if colon and len(kind) > 1 and rest.count("/") > 1:
        return f"{kind}:{Path(rest).name}"
    is_place = key in FOLDER_SETTINGS or value.startswith((".", "~", "/")) or "\\" in value or value.count("/") > 1
    return Path(value.replace("\\", "/")).name if is_place or Path(value).exists() else value


def _label(file: str) -> str:
    return Path(file).stem.replace("_", " ").replace(",", " ")


def _listed(parts: list[Component]) -> str:
    return ", ".join(f"{escape(part)} ({escape(name)})" for part, name in parts)


def _layers(config: Row) -> str:
    layers = config.get("num_hidden_layers", config.get("n_layers", "?"))
    return f"{layers} layers of {config.get('hidden_size', '?')}"
