"""Models and adapters as Hub repositories: safetensors, the model's code, its processor and a card.

An adapter's repository holds a few megabytes and names its model by Hub id, in place of the folder that peft recorded.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open

from mmkd.data.provenance import UNSTATED
from mmkd.files import fingerprint, read_json, read_object, write_json
from mmkd.publishing import card as cards
from mmkd.publishing.publication import (
    ADAPTER_CONFIG,
    Draft,
    Publication,
    refuse_links,
    stage_file,
    stage_json,
    without_places,
)
from mmkd.publishing.scores import read_scores
from mmkd.student.folder import (
    INDEX_FILE,
    PROVENANCE_FILE,
    WEIGHTS_FILE,
    read_provenance,
    read_weights,
    weight_files,
    write_sentence_transformers,
)
from modeling_mmkd.modeling_mmkd import AUTO_MAP

ADAPTER_FILE, ATLAS_FILE = "adapter_model.safetensors", "atlas.json"
CODE = ("modeling_mmkd.py", "processing_mmkd.py")
SIBLING = re.compile(r"^\s*from \.(\w+_mmkd) import", re.MULTILINE)
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model")
OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
REPLACES = [WEIGHTS_FILE, "model-*-of-*.safetensors", INDEX_FILE, "*_mmkd.py", "onnx/*", "examples/*"]
BASE = "base_model_name_or_path"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def stage_model(
    draft: Draft, results: Path | None, shard_bytes: int, onnx: Path | None = None, examples: Path | None = None
) -> Publication:
    """Stage a model that pretrain, distill, merge, finetune or convert has written.

    Args:
        draft: of the publication.
        results: folder of ``mmkd eval``, or None.
        shard_bytes: largest file of weights.
        onnx: folder of ``mmkd export --format onnx``, or None.
        examples: folder of images to try on the model's page, named by their labels, or None.

    Raises:
        FileNotFoundError: weights, processor, tokenizer, results, ONNX files or examples are missing.
        ValueError: a file is damaged, the results or ONNX files are of other weights, or a file is a link out of its
            folder.
    """
    folder, staged = draft.folder, draft.staged
    files, provenance = weight_files(folder), without_places(read_provenance(folder))
    tensors = read_headers(files)
    scores = read_scores(results, files) if results is not None else None
    sizes = cards.model_sizes(folder, count_parameters(tensors), {dtype for dtype, _ in tensors.values()})
    for other in filter(None, (onnx, examples)):
        refuse_links(other)
    if onnx is not None:
        _stage_onnx(onnx, staged, files)
    shown = _stage_examples(examples, staged) if examples is not None else []
    card = cards.model_card(draft, provenance, sizes, cards.recipe_yaml(folder), scores, examples=shown)
    if scores is not None and scores.picture:
        (staged / cards.PICTURE_FILE).write_text(scores.picture, encoding="utf-8")
    summary = card.partition(f"# {draft.repo.split('/')[1]}\n")[2].strip().partition("\n")[0]
    write_json(staged / ATLAS_FILE, cards.atlas_card(draft, sizes, summary))
    stage_file(Path(__file__).with_name("handler.py"), staged / "handler.py")
    for path in [*_code(folder), *_processor(folder)]:
        (stage_json if path.name.endswith("_config.json") else stage_file)(path, staged / path.name)
    if provenance:
        write_json(staged / PROVENANCE_FILE, provenance)
    stage_json(folder / "config.json", staged / "config.json", auto_map=AUTO_MAP)
    write_sentence_transformers(staged)
    draft.write_card(card)
    stage_weights(folder, files, staged, shard_bytes)
    notes = _notes(draft, provenance)
    if results is None:
        notes.append("no --results are given: the card will hold no evaluation")
    return Publication("model", staged, notes, REPLACES)


def _stage_onnx(onnx: Path, staged: Path, files: Sequence[Path]) -> None:
    """The ONNX files of these weights.

    Raises:
        FileNotFoundError: the folder is no export as ONNX.
        ValueError: it is of other weights.
    """
    graphs = sorted((onnx / "onnx").glob("*.onnx*"))
    if not graphs or not (onnx / "export.json").is_file():
        raise FileNotFoundError(f"--onnx {onnx} holds no export; `mmkd export MODEL --format onnx` writes one")
    if (read_object(onnx / "export.json").get("provenance") or {}).get("fingerprint") != fingerprint(sorted(files)):
        raise ValueError(f"--onnx {onnx} is of other weights than the model; export it again")
    for path in graphs:
        stage_file(path, staged / "onnx" / path.name)


def _stage_examples(folder: Path, staged: Path) -> list[str]:
    """Images to try on the model's page; returns their paths in the repository.

    Raises:
        FileNotFoundError: there is no image.
    """
    images = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not images:
        raise FileNotFoundError(f"--examples {folder} holds no PNG or JPEG image; name each by its label")
    for path in images:
        stage_file(path, staged / "examples" / path.name)
    return [f"examples/{path.name}" for path in images]


def stage_adapter(draft: Draft, base: str | None = None) -> Publication:
    """Stage an adapter that finetune or peft has written.

    Args:
        draft: of the publication.
        base: Hub id of its model; None where the folder states it.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: a file is damaged, it adapts another kind of model, or its model's Hub id is not stated.
    """
    folder, staged = draft.folder, draft.staged
    config = _adapter_config(folder)
    weights = folder / ADAPTER_FILE
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} has no {ADAPTER_FILE}; pickled adapters are not pushed: save it with safetensors"
        )
    tensors, provenance = read_headers([weights]), without_places(read_provenance(folder))
    base = base or _base_of(config, provenance, folder)
    beside = folder.parent if folder.name == "adapter" and provenance else folder  # where finetune keeps its settings
    recipe = cards.recipe_yaml(folder if (folder / cards.SETTINGS_FILE).is_file() else beside)
    sizes = _adapter_sizes(config, tensors)
    draft.write_card(cards.model_card(draft, provenance, sizes, recipe, base=base))
    write_json(staged / ADAPTER_CONFIG, {**without_places(config), BASE: base})
    stage_file(weights, staged / ADAPTER_FILE)
    if provenance:
        write_json(staged / PROVENANCE_FILE, provenance)
    return Publication("model", staged, _notes(draft, provenance), [ADAPTER_FILE])


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``.

    Raises:
        ValueError: it is not a number with KB, MB or GB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)\s*", text.upper())
    if match is None or not float(match[1]):
        raise ValueError(f"--max_shard_size {text!r} must be a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def read_headers(files: Sequence[Path]) -> Tensors:
    """Type and shape of every tensor; no numbers are read.

    Raises:
        ValueError: a file is damaged.
    """
    tensors: Tensors = {}
    for path in files:
        try:
            with safe_open(path, "np") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a dictionary
                    part = opened.get_slice(name)
                    tensors[name] = (part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return tensors


def count_parameters(tensors: Tensors) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(shape) for _, shape in tensors.values())


def stage_weights(folder: Path, files: Sequence[Path], staged: Path, shard_bytes: int) -> None:
    """Link the files of the weights, or write shards of at most ``shard_bytes`` where a file is larger."""
    if all(path.stat().st_size <= shard_bytes for path in files):
        index = folder / INDEX_FILE
        for path in [*files, index] if index.is_file() else files:
            stage_file(path, staged / path.name)
        return
    save_torch_state_dict(read_weights(folder), staged, max_shard_size=shard_bytes)


def _notes(draft: Draft, provenance: dict[str, Any]) -> list[str]:
    conflict = cards.license_conflict(cards.components(provenance), draft.license)
    notes = [conflict] if conflict else []
    if not provenance:
        notes.append(f"{draft.folder} has no {PROVENANCE_FILE}: the card cannot name teachers, data and their licences")
    return notes


def _code(folder: Path) -> list[Path]:
    """The model's code in the folder where it is complete, else that of the installed package."""
    found = sorted(folder.glob("*_mmkd.py"))
    imported = {f"{name}.py" for path in found for name in SIBLING.findall(path.read_text(encoding="utf-8"))}
    if imported.union(CODE) <= {path.name for path in found}:
        return found
    spec = importlib.util.find_spec("modeling_mmkd")
    assert spec is not None and spec.submodule_search_locations, "modeling_mmkd is installed with this package"
    return sorted(Path(next(iter(spec.submodule_search_locations))).glob("*_mmkd.py"))


def _processor(folder: Path) -> list[Path]:
    """The files that AutoProcessor reads.

    Raises:
        FileNotFoundError: there is no image processor or no tokenizer.
    """
    for kind, names in (("image processor", PROCESSOR), ("tokenizer", TOKENIZER)):
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(
                f"{folder} has no {kind} ({' or '.join(names[:2])}), so the model cannot be used; save the one it was "
                "trained with there"
            )
    return [folder / name for name in PROCESSOR + TOKENIZER + OPTIONAL if (folder / name).is_file()]


def _adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``.

    Raises:
        ValueError: it is not an object, or of an adapter for another kind of model.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or not config.get("peft_type"):
        raise ValueError(f"{path} is not an adapter_config.json of peft: it has no peft_type")
    adapted = (config.get("auto_mapping") or {}).get("base_model_class", "MMKDClipModel")
    if not adapted.startswith("MMKDClip"):
        raise ValueError(f"{folder} holds an adapter of a {adapted}; only those of an MMKDClipModel are pushed")
    return config


def _base_of(config: dict[str, Any], provenance: dict[str, Any], folder: Path) -> str:
    """Hub id of an adapter's model, where the folder states one.

    Raises:
        ValueError: it states a folder, or nothing.
    """
    stated = config.get(BASE) or ""
    starts = [row["weights"] for row in provenance.get("started_from") or ()]
    is_id = stated.count("/") == 1 and not stated.startswith((".", "~", "/")) and not Path(stated).exists()
    if is_id and (not starts or stated in starts):
        return str(stated)
    raise ValueError(
        f"{folder} does not state the Hub id of its model (it was read from {Path(stated).name or 'nowhere'}); push "
        "the model first and give its id: --base_model user/name"
    )


def _adapter_sizes(config: dict[str, Any], tensors: Tensors) -> dict[str, str]:
    """Kind and size of an adapter as rows of a table."""
    kind = "DoRA" if config.get("use_dora") else str(config["peft_type"])
    types = ", ".join(sorted({dtype for dtype, _ in tensors.values()}))
    targets = config.get("target_modules") or ()
    names = [targets] if isinstance(targets, str) else sorted({str(name).rsplit(".", 1)[-1] for name in targets})
    rank, alpha = config.get("r", UNSTATED), config.get("lora_alpha", UNSTATED)
    return {
        "adapter": cards.escape(f"{kind}, rank {rank}, alpha {alpha}"),
        "layers": cards.escape(", ".join(names) or UNSTATED),
        "parameters": f"{count_parameters(tensors) / 1e6:.2f} million, {types}",
    }
