"""Convert the authors' checkpoint to a ``from_pretrained`` folder, and such a folder back, or to one for open_clip.

Strict in both directions: every key and shape is accounted for, and the written tensors are read back and compared bit
for bit before the output gets its name. Tensors keep their precision; where a checkpoint mixes several, all take the
widest. The authors' form does not state the number of heads: they are 64 wide unless ``--config`` states it.
"""

from __future__ import annotations

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
    """Convert the authors' checkpoint to a folder for from_pretrained, or such a folder to their form or open_clip's.

    Example:
        mmkd convert --checkpoint MMKD-CLIP.pt --output mmkd-clip
    """

    checkpoint: Path = setting(help="the authors' file (.pt or .safetensors); with --to authors or open_clip a folder")
    output: Path = setting(help="folder to write; with --to authors the file to write")
    to: Literal["transformers", "authors", "open_clip"] = setting("transformers", "format to write")
    config: Path | None = setting(
        None, "JSON with sizes (vision, text, projection_dim) or a config.json; by default derived from the tensors"
    )
    tokenizer: str = setting(TOKENIZER, "folder or Hub id of the text tower's tokenizer")
    overwrite: bool = setting(False, "replace an existing output")
    quiet: bool = setting(False, "print warnings only")


if __name__ == "__main__":
    check_arguments(ConvertSettings)  # before the imports that take seconds

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from mmkd.command.settings import nearest
from mmkd.encoders.authors_checkpoint import (
    empty_model,
    from_authors,
    infer_config,
    one_precision,
    require_same_bits,
    to_authors,
)
from mmkd.encoders.weights import (
    CONFIG_FILES,
    listed,
    quiet_transformers,
    read_part,
    read_state_dict,
    require_hub,
    require_same_keys,
)
from mmkd.files import atomic_folder, atomic_write_bytes, fingerprint, read_json, refuse_existing
from mmkd.student.folder import conversion_provenance, read_weights, write_provenance, write_sentence_transformers
from modeling_mmkd import MMKDClipConfig, MMKDClipImageProcessor, MMKDClipProcessor

CONTEXT = 256  # tokens, as published
ROUNDING = 64  # rows that a word embedding may have more than its tokenizer has tokens
JOINT = ("projection_dim", "text_projection_hidden", "text_pooling", "logit_scale_init_value")
FORMER = ("_name_or_path", "gradient_checkpointing", "position_embedding_type", "torch_dtype")


def main(settings: ConvertSettings) -> None:
    """Convert in the requested direction."""
    refuse_existing(settings.output, settings.overwrite)
    if not settings.checkpoint.exists():
        raise FileNotFoundError(f"--checkpoint {settings.checkpoint}: no such file or folder")
    with quiet_transformers():
        if settings.to == "transformers":
            write_folder(settings)
        elif settings.to == "authors":
            write_checkpoint(settings)
        else:
            write_for_open_clip(settings)
    if not settings.quiet:
        print(f"wrote {settings.output}")


def write_folder(settings: ConvertSettings) -> None:
    """Write model, image processor and, if available, tokenizer.

    Raises:
        ValueError: not a checkpoint of the authors' form, or it does not fit ``--config``.
        FileNotFoundError: there is no ``--config``.
    """
    if settings.checkpoint.is_dir():
        raise ValueError(f"--checkpoint {settings.checkpoint} is a folder; --to authors and open_clip read folders")
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
    pixels = MMKDClipImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    with atomic_folder(settings.output, settings.overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer:
            MMKDClipProcessor(pixels, tokenizer).save_pretrained(folder)
            write_sentence_transformers(folder)
        else:
            pixels.save_pretrained(folder)
            shutil.copy(inspect.getfile(MMKDClipProcessor), folder)
        require_same_bits(read_weights(folder), state)
        write_provenance(folder, conversion_provenance(settings.checkpoint.name, fingerprint([settings.checkpoint])))
    if problem:
        _warn_of_missing_tokenizer(settings, problem, config)


def write_checkpoint(settings: ConvertSettings) -> None:
    """Write a folder's tensors as the authors store them: ``{"epoch", "name", "state_dict"}``.

    Raises:
        ValueError: the folder is not a model of this package, or one that the authors' form cannot hold.
    """
    require_folder(settings)
    if settings.output.is_dir():
        raise ValueError(f"--output {settings.output} is a folder; --to authors writes a file")
    try:
        config = read_part(MMKDClipConfig, settings.checkpoint, CONFIG_FILES[:1])
        state = read_weights(settings.checkpoint)
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


def write_for_open_clip(settings: ConvertSettings) -> None:
    """Write a folder that ``open_clip.create_model_and_transforms("local-dir:...")`` opens.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: the folder is not a model of this package, or one that open_clip cannot hold.
    """
    from mmkd.exporting.open_clip_folder import write_open_clip  # here, because only this form needs it

    require_folder(settings)
    with atomic_folder(settings.output, settings.overwrite) as folder:
        write_open_clip(str(settings.checkpoint), folder, settings.output)


def require_folder(settings: ConvertSettings) -> None:
    """Raise if the checkpoint is not a model folder, or if ``--config`` is given with one.

    Raises:
        ValueError: see above.
    """
    if settings.config is not None:
        raise ValueError("--config belongs to --to transformers; a folder states its own sizes")
    if not (settings.checkpoint / "config.json").is_file():
        raise ValueError(
            f"--checkpoint {settings.checkpoint} holds no config.json; --to {settings.to} reads a model folder"
        )


def read_config(path: Path, state: Mapping[str, Tensor]) -> MMKDClipConfig:
    """A configuration from JSON: sizes as the authors name them, or the ``config.json`` of a model folder.

    Args:
        path: ``{"vision": {...}, "text": {...}, "projection_dim": ...}``, where the tensors give absent sizes; or what
            `MMKDClipConfig.save_pretrained` writes.
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
        raise ValueError(f"{path} holds a size that is not a number: {' '.join(str(error).split())}") from error


def find_tokenizer(name: str, text_config: PreTrainedConfig) -> tuple[Any, str]:
    """The tokenizer with the model's context, or None and why it cannot be used.

    Args:
        name: a folder or Hub id; the Hub is used only for what its cache does not hold.
        text_config: of the tower that the tokenizer must fit.
    """
    try:
        tokenizer = _load_tokenizer(name)
    except (OSError, ValueError, ImportError) as error:
        return None, f"{name} is not available ({_on_one_line(error)})"
    tokens, rows = len(tokenizer), text_config.vocab_size
    if not 0 <= rows - tokens < ROUNDING:
        return None, f"{name} has {tokens} tokens, the model {rows}"
    if tokenizer.pad_token_id != text_config.pad_token_id:
        return None, f"{name} pads with {tokenizer.pad_token_id}, the model expects {text_config.pad_token_id}"
    tokenizer.model_max_length = min(CONTEXT, text_config.max_position_embeddings)
    return tokenizer, ""


def _load_tokenizer(name: str) -> Any:
    try:
        return read_part(AutoTokenizer, name, local_files_only=True)
    except OSError:
        if Path(name).is_dir() or constants.HF_HUB_OFFLINE:
            raise
        require_hub()
        return read_part(AutoTokenizer, name)


def _warn_of_missing_tokenizer(settings: ConvertSettings, problem: str, config: MMKDClipConfig) -> None:
    context = min(CONTEXT, config.text_config.max_position_embeddings)
    print(
        f"WARNING: {settings.output} has NO TOKENIZER: {problem}.\nThe model is complete and images work; texts need "
        f'the tokenizer that the model was trained with. Where it is available:\n  python -c "from transformers import '
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
