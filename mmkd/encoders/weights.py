"""Read weights from a folder or the Hub without running code, and load them strictly.

A state dict whose prefix does not match leaves random weights behind a loader that is not strict. Every loader here
goes through `load_strictly`, or through `load_transformers` where transformers renames keys of older releases; both
raise the same error. Only the files that a loader needs are downloaded.
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

from mmkd.files import is_folder_name, note_read, read_json, read_object
from modeling_mmkd import MMKDClipProcessor
from modeling_mmkd.modeling_mmkd import check_bounds

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES)
INDEX_PATTERN, ADAPTER_CONFIG = "*.index.json", "adapter_config.json"
PIXEL_FILES = ("processor_config.json", "preprocessor_config.json")
PIXEL_KEYS = (
    *("size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "resample"),
    *("rescale_factor", "image_mean", "image_std"),
)
PROBE = "A 12-mm nodule of the LUNG (naïve, T2*)"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

STRAY_BUFFERS = ("position_ids", "relative_position_index")  # saved by older releases, derived by newer ones
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
SHOWN = 12  # keys that an error lists
HUB_TIMEOUT_SECONDS = 5


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
        patterns: names or patterns of the small files, downloaded as far as they exist.
        weights: names of weight files; the first that exists is downloaded.
        revision: a commit, tag or branch on the Hub.
        repo_type: ``model`` or ``dataset``.
        gated: whether the Hub grants access on request only, for the error.

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
    """The folder of a second repository that a model builds on: a sub-folder with its name, or the Hub's cache.

    Args:
        folder: of the weights; ``folder/NAME`` comes first, NAME being the last part of the id.
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
    """The first of these files that exists in ``folder``.

    Raises:
        FileNotFoundError: none does.
    """
    names = list(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or torch file, without the other state of training and wrappers' prefixes.

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


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without the other state of training and without prefixes.

    Args:
        checkpoint: what the file held: a state dictionary, or a dictionary with one under ``state_dict``.

    Raises:
        ValueError: there are no named tensors in it, or two keys differ by their prefix only.
    """
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else None
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        raise ValueError("it holds no state dictionary: names and tensors, alone or under 'state_dict', are expected")
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        while key.startswith(WRAPPERS):
            key = key[key.index(".") + 1 :]
        if key in plain:
            raise ValueError(f"{key!r} stands in it twice, with and without a prefix")
        plain[key] = value
    return plain


def read_tensors(path: Path) -> Any:
    """The content of a safetensors or torch file; nothing in it is executed.

    Raises:
        ValueError: it cannot be read; the message says what it seems to be and what to do.
    """
    note_read(path)
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


def _diagnosis(path: Path, message: str) -> str:
    """The probable kind of an unreadable weight file, and what to do.

    Args:
        path: the file.
        message: of the reader; torch's advice in it to run the file's code is not passed on.
    """
    with path.open("rb") as file:
        start = file.read(512)
    allowed = "safetensors or a torch file of tensors alone is required"
    if not start:
        return f"the file is empty; {allowed}: download it again"
    if start.startswith(b"version https://git-lfs"):
        return f"it is a Git LFS pointer; {allowed}: fetch the file behind it with `git lfs pull`"
    if start.lstrip().startswith(b"<"):
        return f"it is a web page, as a failed download leaves it; {allowed}: download it again"
    if re.fullmatch(rb"[\t\n\r -~\x80-\xff]+", start):
        return f"it is text; {allowed}"
    if blocked := re.search(r"GLOBAL (\S+)", message):
        return (
            f"it holds {blocked[1]}, which only running its code would restore; {allowed}: where the file is trusted, "
            "save its tensors alone with torch.save(model.state_dict(), FILE)"
        )
    return f"it is truncated, damaged or of another kind; {allowed}: download it again"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Load or save without transformers' progress bars and key reports, which the loaders here replace."""
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
    """Load a state dict strictly; only buffers that older libraries stored and newer ones derive are left out.

    Args:
        module: the model; left in evaluation mode.
        state: tensors by the module's own names.
        source: where they come from, for the error.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ; the message lists them.
    """
    expected = module.state_dict()
    given = {key: value for key, value in state.items() if key in expected or not is_stray(key)}
    require_same_keys(given, expected, source)
    module.load_state_dict(given)
    module.eval()


def require_same_keys(state: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: keys are missing or unexpected, or a tensor has another shape; the message lists them.
    """
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    _refuse_misfits(expected.keys() - state.keys(), state.keys() - expected.keys(), shapes, what)


def listed(keys: list[str]) -> str:
    """The first keys of a list, and how many more there are."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def load_transformers(model_class: Any, source: str, folder: Path | None = None, **options: Any) -> Any:
    """A transformers model in fp32 and evaluation mode, loaded strictly.

    transformers renames keys of older releases, and initializes missing weights at random; here that is an error.

    Args:
        model_class: a class with ``from_pretrained``.
        source: where the weights come from, for the error.
        folder: with weights and configuration; None with ``state_dict`` and ``config`` among the options.
        **options: of ``from_pretrained``.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ; the message lists them. Or the file is damaged.
    """
    model, info = read_transformers(model_class, source, folder, ignore_mismatched_sizes=True, **options)
    unexpected = (key for key in info["unexpected_keys"] if not is_stray(key))
    shapes = [f"{key} {tuple(a)} instead of {tuple(b)}" for key, a, b in info["mismatched_keys"]]
    _refuse_misfits(info["missing_keys"], unexpected, shapes, source)
    return model.eval()


def load_config(folder: Path | str) -> Any:
    """The configuration of a model in a folder, without code of its own.

    Raises:
        OSError: there is none.
        ValueError: it describes no model, or none that can be built; the message names it.
    """
    from transformers import AutoConfig

    _refuse_forged(folder)
    return read_part(AutoConfig, folder, CONFIG_FILES[:1])


def read_part(loader: Any, folder: Path | str, files: Sequence[str] = CONFIG_FILES[1:], **options: Any) -> Any:
    """A configuration, tokenizer or processor of transformers; code beside it runs only with ``trust_remote_code``.

    Args:
        loader: a class with ``from_pretrained``.
        folder: a folder, or a Hub id.
        files: that it may read, for the error.
        **options: of ``from_pretrained``.

    Raises:
        OSError: there is none.
        ValueError: a file is damaged, or holds what the loader does not expect; the message names it.
    """
    try:
        part = loader.from_pretrained(folder, **{"trust_remote_code": False, **options})
        if isinstance(part, MMKDClipProcessor) and part.tokenizer is not None:
            _refuse_other_tokens(Path(folder) / TOKENIZER_FILES[0], part.tokenizer)
        return part
    except BaseException as error:  # of wrong values, transformers raises anything, and tokenizers panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        found = [path for name in files if (path := Path(folder) / name).is_file()]
        if isinstance(error, OSError) and not found:
            raise
        for path in found:
            if path.suffix == ".json":
                read_json(path)
        named, told = ", ".join(map(str, found)), " ".join(str(error).split())
        raise ValueError(f"{named or folder} describes no model that {loader.__name__} can read: {told}") from error


def read_processor(loader: Any, folder: Path, **options: Any) -> Any:
    """A processor or image processor of transformers; see `read_part`.

    Raises:
        OSError: there is none.
        ValueError: a file is damaged, or two files describe different pixels; the message names them.
    """
    stated = [read_object(path) for name in PIXEL_FILES if (path := folder / name).is_file()]
    if len(stated) == len(PIXEL_FILES):
        first, second = stated[0].get("image_processor"), stated[1]
        for key in PIXEL_KEYS:
            if isinstance(first, dict) and key in first and key in second and _sizes(first[key]) != _sizes(second[key]):
                raise ValueError(
                    f"{folder / PIXEL_FILES[0]} has {key} {first[key]}, {PIXEL_FILES[1]} beside it {second[key]}: "
                    "transformers reads the first, other programs the second; write into both what training used"
                )
    return read_part(loader, folder, **options)


def _refuse_other_tokens(path: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that makes other tokens of a text than its file states, which other programs read alone.

    transformers takes the class from ``tokenizer_config.json``, and of ``tokenizer.json`` some classes take the
    vocabulary alone.

    Raises:
        ValueError: the class, or a setting beside it, is not that of the file.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        return
    stated = Tokenizer.from_file(str(path))
    stated.no_truncation()
    stated.no_padding()
    tokenizer(PROBE, truncation=True, padding=True)  # with a limit of another type, an error
    if stated.encode(PROBE).ids != tokenizer(PROBE, verbose=False)["input_ids"]:
        raise ValueError(
            f"{type(tokenizer).__name__}, as {TOKENIZER_FILES[1]} has it, makes other tokens of {PROBE!r} than "
            f"{path.name} states; write into both what training used"
        )


def _sizes(value: Any) -> Any:
    """A size as its numbers: older releases write 224 for a shortest edge, a height and a width of 224."""
    if isinstance(value, dict):
        return set(map(str, value.values()))
    return {str(value)} if isinstance(value, int) else value


def indexed_files(index: Path) -> list[str]:
    """Names of the files that the index of a model in several files states.

    Raises:
        ValueError: the index is damaged, or names a file in another folder.
    """
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not all(map(is_folder_name, named.values())):
        raise ValueError(f"{index} must map tensors to files beside it, and to no others")
    return sorted(set(named.values()))


def _refuse_forged(folder: Path | str) -> None:
    """Refuse a local model of a size that no model has, or of which transformers would open files elsewhere.

    Raises:
        ValueError: the message names the file.
    """
    for path in Path(folder).glob(INDEX_PATTERN):
        indexed_files(path)
    adapter, path = Path(folder) / ADAPTER_CONFIG, Path(folder) / CONFIG_FILES[0]
    if adapter.is_file():
        raise ValueError(f"{adapter}: transformers would load the model that it names; give the model without adapter")
    if path.is_file():
        values = read_object(path)
        try:
            check_bounds("it", values)
        except (AttributeError, RecursionError, ValueError) as error:
            raise ValueError(f"{path} describes no model: {error}") from error


def read_transformers(model_class: Any, source: str, folder: Path | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A transformers model in fp32 and transformers' report about its keys, without a progress bar.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, holds more than tensors, or describes no model.
    """
    if folder is not None:
        _refuse_forged(folder)
    try:
        with quiet_transformers():
            options = {"trust_remote_code": False, **options}
            return model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    except SafetensorError as error:
        raise ValueError(f"{source} is truncated or not a safetensors file: {error}") from error
    except OSError:
        raise
    except Exception as error:  # torch's unpickler raises anything; `read_tensors` names the broken file
        for path in sorted(folder.glob("*.bin")) if folder else ():
            read_tensors(path)
        if folder is not None:
            load_config(folder)
        told = " ".join(str(error).split())
        raise ValueError(f"{source}: {CONFIG_FILES[0]} describes no model that can be built: {told}") from error


def _refuse_misfits(missing: Iterable[str], unexpected: Iterable[str], shapes: list[str], what: str) -> None:
    """Raise a ValueError that lists the keys of a state dictionary that do not fit, if there are any."""
    faults = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": shapes}
    found = [f"{len(keys)} {fault}: {listed(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{what} does not fit the model; " + "; ".join(found))


def is_stray(key: str) -> bool:
    """Whether a key is a buffer that holds no weight: saved by older releases, derived by newer ones."""
    return key.split(".")[-1] in STRAY_BUFFERS


def _download(
    source: str, patterns: list[str], weights: Sequence[str], revision: str | None, repo_type: str, gated: bool
) -> Path:
    """The files of a Hub repository in its cache; offline those that the cache holds."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    where = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{source}"
    access = f"request access at {where}, then run `hf auth login`"
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
        raise FileNotFoundError(f"{source} is gated: {access}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{source} is not on the Hub, or is private: {access}") from error
    except OSError as error:
        hint = f" (gated: {access})" if gated else ""
        kind = " --repo-type dataset" if repo_type == "dataset" else ""
        raise FileNotFoundError(
            f"{source} is neither a local folder nor in the Hub's cache, and the Hub cannot be reached{hint}. With a "
            f"network, run `hf download {source}{kind} --local-dir DIR`, copy DIR here, and give DIR instead (for a "
            "teacher of `mmkd extract` as --weights.NAME DIR, elsewhere as `weights: DIR` in a YAML file); or copy the "
            "Hub's cache, ~/.cache/huggingface"
        ) from error
    return Path(folder)


def require_hub() -> None:
    """Check once and briefly that the Hub answers: without a network its client retries for most of a minute.

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
