"""The authors' checkpoint to a ``from_pretrained`` folder, and such a folder back to their checkpoint.

Strict in both directions: every key and every shape is accounted for, and what was written is read back and compared
bit for bit before it gets its name. Tensors keep their precision; where a checkpoint mixes several, all take the widest
of them. The authors' form does not state the number of heads: 64-wide ones are assumed unless ``--config`` says.
"""

from __future__ import annotations

import functools
import inspect
import io
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.command.settings import check_arguments, run, setting

TOKENIZER = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"


@dataclass(kw_only=True)
class ConvertSettings:
    """Turn the authors' checkpoint into a folder for from_pretrained, or such a folder into their checkpoint."""

    checkpoint: Path = setting(help="the authors' file (.pt or .safetensors); with --to open_clip a folder of ours")
    output: Path = setting(help="folder to write; with --to open_clip the file to write")
    to: Literal["transformers", "open_clip"] = setting("transformers", "form to write")
    config: Path | None = setting(
        None, "JSON with sizes (vision, text, projection_dim) or a config.json; by default read off the tensors"
    )
    tokenizer: str = setting(TOKENIZER, "folder or Hub id of the text tower's tokenizer")
    overwrite: bool = setting(False, "replace an existing output")
    quiet: bool = setting(False, "print problems only")


if __name__ == "__main__":
    check_arguments(ConvertSettings)  # before the imports that take seconds

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, PreTrainedConfig

from mmkd.command.settings import nearest
from mmkd.encoders.authors_checkpoint import from_authors, infer_config, to_authors
from mmkd.encoders.weights import listed, quiet_transformers, read_state_dict, require_hub, require_same_keys
from mmkd.files import atomic_folder, atomic_write_bytes, fingerprint, read_json, refuse_existing
from mmkd.student.folder import conversion_provenance, write_provenance
from modeling_mmkd import MMKDClipConfig, MMKDClipModel, MMKDClipProcessor

CONTEXT = 256  # tokens, as published
ROUNDING = 64  # rows that a word embedding may have more than its tokenizer has words
JOINT = ("projection_dim", "text_projection_hidden", "text_pooling", "logit_scale_init_value")
FORMER = ("_name_or_path", "gradient_checkpointing", "position_embedding_type", "torch_dtype")


def main(settings: ConvertSettings) -> None:
    """Convert in the direction that is asked for."""
    refuse_existing(settings.output, settings.overwrite)
    if not settings.checkpoint.exists():
        raise FileNotFoundError(f"--checkpoint {settings.checkpoint}: no such file or folder")
    with quiet_transformers():
        if settings.to == "open_clip":
            write_checkpoint(settings)
        else:
            write_folder(settings)
    if not settings.quiet:
        print(f"wrote {settings.output}")


def write_folder(settings: ConvertSettings) -> None:
    """Write model, image processor and, if it can be had, tokenizer.

    Raises:
        ValueError: not a checkpoint of the authors' form, or it does not fit ``--config``.
        FileNotFoundError: ``--config`` is not there.
    """
    if settings.checkpoint.is_dir():
        raise ValueError(f"--checkpoint {settings.checkpoint} is a folder; only --to open_clip reads folders")
    authors = read_state_dict(settings.checkpoint)
    try:
        state = one_precision(from_authors(authors))
        config = infer_config(authors) if settings.config is None else read_config(settings.config, authors)
        model = empty_model(config)
        require_same_keys(state, model.state_dict(), "it")
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{settings.checkpoint}: {_on_one_line(error)}") from error
    model.load_state_dict(state, assign=True)
    tokenizer, problem = find_tokenizer(settings.tokenizer, config.text_config)
    side = config.vision_config.image_size
    pixels = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    with atomic_folder(settings.output, settings.overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer:
            MMKDClipProcessor(pixels, tokenizer).save_pretrained(folder)
        else:
            pixels.save_pretrained(folder)
            shutil.copy(inspect.getfile(MMKDClipProcessor), folder)
        require_same_bits(read_folder(folder), state)
        write_provenance(folder, conversion_provenance(settings.checkpoint.name, fingerprint([settings.checkpoint])))
    if problem:
        _tell_missing_tokenizer(settings, problem, config)


def write_checkpoint(settings: ConvertSettings) -> None:
    """Write a folder's tensors as the authors store them: ``{"epoch", "name", "state_dict"}``.

    Raises:
        ValueError: the folder is not a model of ours, or one that the authors' form cannot hold.
    """
    if settings.config is not None:
        raise ValueError("--config belongs to --to transformers: a folder states its own sizes")
    if settings.output.is_dir():
        raise ValueError(f"--output {settings.output} is a folder; --to open_clip writes a file")
    if not (settings.checkpoint / "config.json").is_file():
        raise ValueError(
            f"--checkpoint {settings.checkpoint} holds no config.json; --to open_clip reads a model folder"
        )
    try:
        config = MMKDClipConfig.from_pretrained(settings.checkpoint)
        state = read_folder(settings.checkpoint)
        require_same_keys(state, empty_model(config).state_dict(), "model.safetensors")
        authors = to_authors(state)
        if config.text_pooling != "cls":
            raise ValueError(f"its texts are pooled by {config.text_pooling}; the authors' form takes the first token")
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{settings.checkpoint}: {_on_one_line(error)}") from error
    require_same_bits(from_authors(authors), state)
    buffer = io.BytesIO()
    torch.save({"epoch": 0, "name": "mmkd-clip", "state_dict": authors}, buffer)
    atomic_write_bytes(settings.output, buffer.getvalue())


def read_config(path: Path, state: Mapping[str, Tensor]) -> MMKDClipConfig:
    """A configuration from JSON: sizes as the authors name them, or the ``config.json`` of a model of ours.

    Args:
        path: ``{"vision": {...}, "text": {...}, "projection_dim": ...}``, where absent sizes are read off the tensors;
            or what `MMKDClipConfig.save_pretrained` writes.
        state: the authors' tensors, without prefixes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON of one of these forms, or has a key that would have no effect.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    given = read_json(path)
    is_ours = isinstance(given, dict) and ("vision_config" in given or "text_config" in given)
    vision, text = ("vision_config", "text_config") if is_ours else ("vision", "text")
    if not isinstance(given, dict) or not all(isinstance(given.get(part, {}), dict) for part in (vision, text)):
        raise ValueError(f"{path} must hold an object with the objects {vision!r} and {text!r}")
    known = set(MMKDClipConfig().to_dict()) | set(FORMER) if is_ours else {vision, text, *JOINT}
    _require_known(given, known, str(path))
    for part, default in ((vision, "clip_vision_model"), (text, "bert")):
        values = given.get(part, {})
        model_type = values.get("model_type", default)
        known_sizes = set(AutoConfig.for_model(model_type).to_dict()) | set(FORMER)
        _require_known(values, known_sizes, f"{path}: {part}")
    try:
        return MMKDClipConfig.from_dict(given) if is_ours else infer_config(state, given)
    except (TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path} holds a size that is no number: {' '.join(str(error).split())}") from error


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a ``from_pretrained`` folder in the precision they are stored in.

    Raises:
        ValueError: there are none, or a file of theirs is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    state: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"no {name} in it")
        try:
            state |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{name} is damaged: {error}") from error
    return state


def empty_model(config: MMKDClipConfig) -> MMKDClipModel:
    """The model without memory for its weights: names and shapes.

    Raises:
        ValueError: the vision tower is of a kind that the authors' form does not hold.
    """
    if config.vision_config.model_type != "clip_vision_model":
        kind = config.vision_config.model_type
        raise ValueError(f"the vision tower is a {kind}; the authors' form holds a clip_vision_model only")
    with torch.device("meta"):
        return MMKDClipModel(config)


def one_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, all in the widest precision among them.

    Raises:
        ValueError: tensors that are not floating-point numbers.
    """
    others = [f"{key} ({value.dtype})" for key, value in state.items() if not value.is_floating_point()]
    if others:
        raise ValueError(f"weights must be floating-point numbers, these are not: {listed(others)}")
    widest = functools.reduce(torch.promote_types, {value.dtype for value in state.values()})
    return {key: value.to(widest) for key, value in state.items()}


def require_same_bits(written: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Compare tensors byte by byte, so that NaN equals itself.

    Raises:
        ValueError: a tensor changed.
    """
    require_same_keys(written, state, "what was written")
    changed = [
        key
        for key, value in state.items()
        if value.dtype != written[key].dtype
        or not torch.equal(value.contiguous().view(torch.uint8), written[key].contiguous().view(torch.uint8))
    ]
    if changed:
        raise ValueError(f"{len(changed)} tensors changed when written: {listed(changed)}; is the disk sound?")


def find_tokenizer(name: str, text_config: PreTrainedConfig) -> tuple[Any, str]:
    """The tokenizer with the model's context, or None and why it cannot be used.

    Args:
        name: a folder or Hub id; the Hub is asked only for what its cache does not hold.
        text_config: of the tower that the tokenizer must fit.
    """
    try:
        tokenizer = _load_tokenizer(name)
    except (OSError, ValueError, ImportError) as error:
        return None, f"{name} cannot be had ({_on_one_line(error)})"
    words, rows = len(tokenizer), text_config.vocab_size
    if not 0 <= rows - words < ROUNDING:
        return None, f"{name} has {words} words, the model {rows}"
    if tokenizer.pad_token_id != text_config.pad_token_id:
        return None, f"{name} pads with {tokenizer.pad_token_id}, the model expects {text_config.pad_token_id}"
    tokenizer.model_max_length = min(CONTEXT, text_config.max_position_embeddings)
    return tokenizer, ""


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except OSError:
        if Path(name).is_dir() or constants.HF_HUB_OFFLINE:
            raise
        require_hub()
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _tell_missing_tokenizer(settings: ConvertSettings, problem: str, config: MMKDClipConfig) -> None:
    context = min(CONTEXT, config.text_config.max_position_embeddings)
    print(
        f"WARNING: {settings.output} has NO TOKENIZER: {problem}.\nThe model is complete and images work; texts need "
        f'the tokenizer the model was trained with. Where it can be had:\n  python -c "from transformers import '
        f"AutoTokenizer; AutoTokenizer.from_pretrained('NAME', model_max_length={context})"
        f".save_pretrained('{settings.output}')\"\nor convert again with --tokenizer FOLDER.",
        file=sys.stderr,
    )


def _require_known(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    unknown = [f"{key!r}{nearest(key, known)}" for key in given if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown {listed(unknown)}; known: {', '.join(sorted(known))}")


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    run(ConvertSettings, main)
