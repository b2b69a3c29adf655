"""A model's folder as a Hub repository: sharded safetensors, its code, its processor and a card of what is known."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mmkd.data.licenses import UNSTATED
from mmkd.files import read_json
from mmkd.publishing import card as card_facts
from mmkd.publishing.publication import (
    ADAPTER_CONFIG,
    Item,
    Publication,
    Tensors,
    count_parameters,
    existing,
    made,
    not_taken,
    read_headers,
    weight_files,
    weight_items,
)
from mmkd.publishing.scores import Scores, read_scores
from mmkd.student.folder import PROVENANCE_FILE, read_provenance

CODE = ("configuration_mmkd.py", "modeling_mmkd.py", "processing_mmkd.py")

SIBLING = re.compile(r"^\s*from \.(\w+_mmkd) import", re.MULTILINE)

PROCESSOR = ("processor_config.json", "preprocessor_config.json")

TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model")

OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "modules.json")

OWNED = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "*_mmkd.py"]

TAGS = ["mmkd-clip", "clip", "biomedical", "medical-imaging", "vision-language", "zero-shot"]

MINIMUM_TRANSFORMERS = "5.8"

CITATION = """@article{wang2025unifying,
  title   = {Unifying Biomedical Vision-Language Expertise: Towards a Generalist Foundation Model via Multi-CLIP
             Knowledge Distillation},
  author  = {Wang, Shansong and others},
  journal = {arXiv preprint arXiv:2506.22567},
  year    = {2025}
}"""


def model_publication(
    folder: Path, repo: str, template: str, results: Path | None, license: str | None, max_shard_bytes: int
) -> Publication:
    """Everything that is uploaded of a model.

    Args:
        folder: written by pretrain, distill, finetune or convert.
        repo: ``user/name``.
        template: of the card.
        results: folder of ``mmkd eval``, or None.
        license: under which the publisher offers the weights, or None.
        max_shard_bytes: largest file of weights.

    Raises:
        FileNotFoundError: weights, processor, tokenizer or results are missing.
        ValueError: a file is damaged, or results are of other weights.
    """
    provenance = read_provenance(folder)
    files = weight_files(folder)
    items = weight_items(folder, max_shard_bytes) | {"config.json": _config(folder)} | _code(folder)
    items |= _processor(folder)
    if provenance:
        items[PROVENANCE_FILE] = existing(folder / PROVENANCE_FILE)
    scores = read_scores(results, files) if results is not None else None
    tensors = read_headers(files)
    facts = card_facts.model_facts(folder, count_parameters(tensors), [dtype for _, dtype, _ in tensors.values()])
    recipe = card_facts.recipe_yaml(folder)
    card = model_card(folder, repo, template, provenance, license, facts, recipe, scores)
    conflict = card_facts.license_conflict(card_facts.components(provenance), license)
    notes = [conflict] if conflict else []
    if not provenance:
        notes.append(f"{folder} has no {PROVENANCE_FILE}: the card cannot name teachers, data and their licences")
    if results is None:
        notes.append("no --results are given: the card will hold no evaluation")
    return Publication("model", card, items, not_taken(folder, items), notes, OWNED)


def _config(folder: Path) -> Item:
    """``config.json``; one that does not lead to the model's code gets the lines that do."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("auto_map"):
        return existing(path)
    from modeling_mmkd.configuration_mmkd import AUTO_MAP  # here, because it loads torch

    return made(json.dumps({**config, "auto_map": AUTO_MAP}, indent=2, sort_keys=True) + "\n")


def _code(folder: Path) -> dict[str, Item]:
    """The model's code as it lies in the folder if no file of it is missing, else that of the installed package."""
    found = sorted(path.name for path in folder.glob("*_mmkd.py"))
    needed = set(CODE).union(*(SIBLING.findall((folder / name).read_text(encoding="utf-8")) for name in found))
    if {name if name.endswith(".py") else f"{name}.py" for name in needed} <= set(found):
        return {name: existing(folder / name) for name in found}
    spec = importlib.util.find_spec("modeling_mmkd")
    assert spec is not None and spec.submodule_search_locations, "modeling_mmkd is installed with this package"
    installed = Path(next(iter(spec.submodule_search_locations)))
    return {path.name: existing(path) for path in sorted(installed.glob("*_mmkd.py"))}


def _processor(folder: Path) -> dict[str, Item]:
    """What AutoProcessor reads.

    Raises:
        FileNotFoundError: there is no image processor or no tokenizer.
    """
    for kind, names in (("image processor", PROCESSOR), ("tokenizer", TOKENIZER)):
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(
                f"{folder} has no {kind} ({' or '.join(names[:2])}), so nobody could use the model; save the one there "
                "that it was trained with"
            )
    found = [name for name in PROCESSOR + TOKENIZER + OPTIONAL if (folder / name).is_file()]
    return {name: existing(folder / name) for name in found}


def model_card(
    folder: Path,
    repo: str,
    template: str,
    provenance: dict[str, Any],
    license: str | None,
    facts: dict[str, str],
    recipe: str,
    scores: Scores | None = None,
    base: str | None = None,
) -> str:
    """The card of a model, or of an adapter where ``base`` is the Hub id of its model.

    Args:
        folder: has the processor.
        repo: ``user/name``.
        template: of the card.
        provenance: of the folder; nothing is known where it is empty.
        license: under which the publisher offers it, or None.
        facts: rows of the table of sizes.
        recipe: YAML.
        scores: of the evaluation, or None.
        base: of an adapter.
    """
    name = repo.split("/")[1]
    teachers, starts = card_facts.teacher_rows(provenance), card_facts.start_rows(provenance)
    stage = provenance.get("stage", "")
    tags = [*TAGS, *(["knowledge-distillation"] if teachers else []), *([f"base_model:adapter:{base}"] if base else [])]
    data = ModelCardData(
        language="en",
        license=card_facts.card_license(license),
        library_name="peft" if base else "transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=tags,
        model_name=name,
        base_model=base or _base_models(provenance) or None,
        eval_results=scores.index if scores is not None and scores.index else None,
    )
    card = ModelCard.from_template(
        data,
        template_str=template,
        name=name,
        repo=repo,
        base=base,
        summary=f"A low-rank adapter for `{base}`." if base else _summary(teachers, stage),
        facts=facts,
        teachers=teachers,
        teacher_notes=card_facts.teacher_notes(provenance),
        no_teachers=_no_teachers(stage),
        starts=starts,
        data=card_facts.data_rows(provenance),
        license_statement=card_facts.license_statement(card_facts.components(provenance), license),
        recipe=recipe,
        recipe_title=card_facts.STAGES.get(stage, "Made"),
        versions=", ".join(f"{package} {version}" for package, version in (provenance.get("versions") or {}).items()),
        scores=scores,
        image_size=card_facts.image_size(folder),
        data_caution=_caution(provenance),
        citation=CITATION,
        transformers_version=MINIMUM_TRANSFORMERS,
    )
    return str(card.content)


def _summary(teachers: list[card_facts.Row], stage: str) -> str:
    kind = "A biomedical CLIP: images and texts in one space, for zero-shot classification and retrieval."
    if teachers:
        return f"{kind} One student distilled from {', '.join(row['name'] for row in teachers)}."
    return f"{kind} {card_facts.STAGES[stage]}." if stage in card_facts.STAGES else kind


def _no_teachers(stage: str) -> str:
    if stage in ("pretrain", "finetune"):
        return "No teacher took part: it was trained on images and texts alone."
    return "The folder that was published does not say whether teachers took part."


def _base_models(provenance: dict[str, Any]) -> list[str]:
    """Hub ids of the weights it started from."""
    rows = [row for link in card_facts.chain(provenance) for row in link.get("started_from") or ()]
    names = [row["weights"] for row in rows if not row.get("provenance")]
    return [name for name in names if name.count("/") == 1 and ":" not in name]


def _caution(provenance: dict[str, Any]) -> str:
    """What is known of where images come from, as a caution."""
    stages = card_facts.data_rows(provenance)
    known = [row["name"] for stage in stages for row in stage["sources"][:5] if row["raw"] != UNSTATED]
    if not known:
        return "Where its training images come from is not stated here, so no site can be ruled out."
    return f"Its training images come from: {', '.join(dict.fromkeys(known))}; test it on images from elsewhere."


# Section: A folder of peft's as a Hub repository: a few megabytes, and a card that names the model; the rest is the
# model's.
#
# peft keeps the folder from which the model was read. In what is published the model's Hub id stands there instead, so
# that the adapter finds its model and nothing is told of this machine.


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
    config = _adapter_config(folder)
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


def _adapter_config(folder: Path) -> dict[str, Any]:
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
