"""Weights from a folder or the Hub, read without running code and loaded without leaving a key unaccounted for.

A state dict whose prefix does not match leaves random weights behind a loader that does not look; every loader here
goes through `load_strictly`, which makes that an error. Only the files a loader needs are downloaded.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmkd.encoders.authors_checkpoint import listed, require_same_keys, unwrap

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)

STRAY_BUFFERS = ("position_ids", "relative_position_index")


def fetch(
    source: str,
    patterns: Sequence[str],
    weights: Sequence[str] = (),
    *,
    revision: str | None = None,
    repo_type: str = "model",
    gated: bool = False,
) -> Path:
    """A local folder with the files of a model: ``source`` itself, or a Hub repository's files in the Hub's cache.

    Args:
        source: a folder, or a Hub id.
        patterns: names or patterns of the small files that are wanted, as far as they exist.
        weights: names of weight files, the first that exists is enough.
        revision: a commit, tag or branch on the Hub.
        repo_type: ``model`` or ``dataset``.
        gated: whether access has to be asked for, said in the error.

    Raises:
        FileNotFoundError: no such folder or repository, no network, or no access; or none of ``weights`` is there.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(source, [*patterns], weights, revision, repo_type, gated)
    if weights and not any((folder / name).is_file() for name in weights):
        raise FileNotFoundError(f"{source} holds none of {', '.join(weights)}, the weights")
    return folder


def companion(folder: Path, hub_id: str, patterns: Sequence[str]) -> Path:
    """The folder of a second repository a model builds on: a sub-folder with its name, or the Hub.

    Args:
        folder: where the weights lie; ``folder/NAME`` is looked at first, NAME being the last part of the id.
        hub_id: the Hub repository, or a folder.
        patterns: files needed from it.

    Raises:
        FileNotFoundError: neither is there.
    """
    beside = folder / hub_id.rstrip("/").split("/")[-1]
    if beside.is_dir():
        return beside
    try:
        return fetch(hub_id, patterns)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or put {', '.join(patterns)} of {hub_id} into {beside}") from error


def first_file(folder: Path, names: Iterable[str]) -> Path:
    """The first of some files that exists in ``folder``.

    Raises:
        FileNotFoundError: none does.
    """
    names = list(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from safetensors or a torch file, out of a training envelope and without wrappers' prefixes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, holds other objects than tensors, or is truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    tensors = read_tensors(path)
    try:
        return unwrap(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(path: Path) -> Any:
    """What a safetensors or torch file holds; nothing in it is executed.

    Raises:
        ValueError: it cannot be read so; the message says what it seems to be and what to do.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files raise anything from EOFError to the unpickler's own
        raise ValueError(f"{path}: cannot be read as weights: {_diagnosis(path, str(error))}") from error


def _diagnosis(path: Path, said: str) -> str:
    """What a file that is no weights seems to be, and what to do.

    Args:
        path: the file.
        said: the reader's message; torch's advice in it to run the file's code is not passed on.
    """
    with path.open("rb") as file:
        start = file.read(512)
    allowed = "safetensors, or a torch file of nothing but tensors, is wanted"
    if not start:
        return f"the file is empty; {allowed}: download it again"
    if start.startswith(b"version https://git-lfs"):
        return f"it is a Git LFS pointer; {allowed}: fetch the file behind it with `git lfs pull`"
    if start.lstrip().startswith(b"<"):
        return f"it is a web page, as a failed download leaves it; {allowed}: download it again"
    if re.fullmatch(rb"[\t\n\r -~\x80-\xff]+", start):
        return f"it is text; {allowed}"
    if blocked := re.search(r"GLOBAL (\S+)", said):
        return (
            f"it holds {blocked[1]}, which only running its code would restore; {allowed}: where the file is trusted, "
            "save its tensors alone with torch.save(model.state_dict(), FILE)"
        )
    return f"it is truncated, damaged or of another kind; {allowed}: download it again"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Load or save without transformers' progress bars and key reports: bars are ours, and so is the check of keys."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor into its place; buffers that libraries once stored and now derive are the only ones left out.

    Args:
        module: takes the weights; left in evaluation mode.
        state: tensors by the module's own names.
        source: where they come from, for the error.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ; the message lists them.
    """
    wanted = module.state_dict()
    given = {key: value for key, value in state.items() if key in wanted or not is_stray(key)}
    require_same_keys(given, wanted, source)
    module.load_state_dict(given)
    module.eval()


def load_transformers(model_class: Any, source: str, folder: Path | None = None, **options: Any) -> Any:
    """A transformers model in fp32 and evaluation mode, with every key of its weights accounted for.

    transformers renames keys of older releases, and initializes anew what it does not find; here that is an error.

    Args:
        model_class: a class with ``from_pretrained``.
        source: where the weights come from, for the error.
        folder: with weights and configuration; None with ``state_dict`` and ``config`` among the options.
        **options: of ``from_pretrained``.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ; the message lists them. Or the file is damaged.
    """
    model, info = read_transformers(model_class, source, folder, ignore_mismatched_sizes=True, **options)
    faults = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(key for key in info["unexpected_keys"] if not is_stray(key)),
        "of another shape": [f"{key} {tuple(a)} instead of {tuple(b)}" for key, a, b in info["mismatched_keys"]],
    }
    found = [f"{len(keys)} {fault}: {listed(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit the model; " + "; ".join(found))
    return model.eval()


def read_transformers(model_class: Any, source: str, folder: Path | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A transformers model in fp32 and what transformers says about its keys, without a bar.

    Raises:
        ValueError: a weight file is damaged, or holds more than tensors.
    """
    try:
        with quiet_transformers():
            return model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    except SafetensorError as error:
        raise ValueError(f"{source} is truncated or no safetensors file: {error}") from error
    except Exception:  # torch's unpickler raises anything: where it is the file's fault, `read_tensors` says so better
        for path in sorted(folder.glob("*.bin")) if folder else ():
            read_tensors(path)
        raise


def is_stray(key: str) -> bool:
    """Whether a key is a buffer that holds no weight: saved by older releases, derived by newer ones."""
    return key.split(".")[-1] in STRAY_BUFFERS


def _download(
    source: str, patterns: list[str], weights: Sequence[str], revision: str | None, repo_type: str, gated: bool
) -> Path:
    """The files of a Hub repository in its cache; offline what the cache holds."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    where = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{source}"
    asked = f"ask for access at {where}, then `hf auth login`"
    try:
        folder = snapshot_download(source, allow_patterns=patterns, revision=revision, repo_type=repo_type)
        for name in weights:
            try:
                hf_hub_download(source, name, revision=revision, repo_type=repo_type)
                break
            except EntryNotFoundError:
                continue
    except HFValidationError as error:
        raise FileNotFoundError(f"{source} is neither a folder nor a Hub id (owner/name)") from error
    except GatedRepoError as error:
        raise FileNotFoundError(f"{source} is gated: {asked}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{source} is not on the Hub, or is private: {asked}") from error
    except OSError as error:
        hint = f" (gated: {asked})" if gated else ""
        kind = " --repo-type dataset" if repo_type == "dataset" else ""
        raise FileNotFoundError(
            f"{source} is no folder here and not in the Hub's cache, and the Hub cannot be reached{hint}. Where there "
            f"is a network, run `hf download {source}{kind} --local-dir DIR`, copy DIR here, and name DIR instead (a "
            "teacher's to `mmkd extract` as --weights.NAME DIR, to all as `weights: DIR` in a YAML row); or copy the "
            "Hub's cache, ~/.cache/huggingface"
        ) from error
    return Path(folder)


# Section: Whether the Hub answers, asked once and briefly.


HUB_TIMEOUT_SECONDS = 5


def require_hub() -> None:
    """Look once, because the Hub's client retries for most of a minute where there is no network.

    Raises:
        OSError: the Hub does not answer, or fails.
    """
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{constants.ENDPOINT} does not answer: {error}") from error
