"""Datasets on the Hugging Face Hub: tars fetched one by one and forgotten, everything else streamed by `datasets`.

A BIOMEDICA tar is some ten gigabytes; a process has one at a time on its disk. Nothing is fetched before it is needed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from mmkd.curation.parquet import sample_of_row
from mmkd.curation.samples import Item
from mmkd.curation.tars import read_tar

HUB_PREFIX = "hf://"
FORM = "hf://datasets/OWNER/NAME, with @REVISION and a folder after it if you like"


def hub_units(source: str) -> list[dict[str, Any]]:
    """The tars of a dataset repository, or where it has none the shards that `datasets` streams.

    Raises:
        ValueError: the address has another form.
        PermissionError: the repository is gated and this account has no access; the message says how to get it.
        FileNotFoundError: there is no such repository, or the Hub cannot be reached.
    """
    repository, revision, folder = parse_address(source)
    listed = _listed(repository, revision)
    inside = f"{folder}/" if folder else ""
    tars = sorted((name, size) for name, size in listed if name.endswith(".tar") and name.startswith(inside))
    if tars:
        prefix = f"{HUB_PREFIX}datasets/{repository}@{revision or 'main'}/"
        return [{"kind": "hub_tar", "path": prefix + name, "size": size} for name, size in tars]
    count = _stream(source).num_shards
    return [{"kind": "hub_stream", "path": source, "start": n, "stop": count} for n in range(count)]


def parse_address(source: str) -> tuple[str, str | None, str]:
    """Repository, revision and folder of ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``.

    Raises:
        ValueError: another form.
    """
    parts = source.removeprefix(HUB_PREFIX).strip("/").split("/")
    if len(parts) < 3 or parts[0] != "datasets" or not all(parts):
        raise ValueError(f"--source {source}: write {FORM}")
    name, _, revision = parts[2].partition("@")
    return f"{parts[1]}/{name}", revision or None, "/".join(parts[3:])


def read_hub_tar(address: str, scratch: Path) -> Iterator[Item]:
    """The samples of one tar on the Hub, which lies in ``scratch`` as long as it is read."""
    from huggingface_hub import hf_hub_download

    repository, revision, name = parse_address(address)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with _explained(repository):
            path = hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_dir=scratch)
        yield from read_tar(Path(path))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_hub_stream(source: str, shard: int, shards: int) -> Iterator[Item]:
    """The samples of one of a dataset's shards, images as bytes."""
    for number, row in enumerate(_stream(source).shard(num_shards=shards, index=shard)):
        yield sample_of_row(row, f"{source}:{shard}:{number}")


def _stream(source: str) -> Any:
    from datasets import Image, load_dataset

    repository, revision, folder = parse_address(source)
    with _explained(repository):
        stream = load_dataset(repository, data_dir=folder or None, revision=revision, split="train", streaming=True)
        for name, feature in (stream.features or {}).items():
            if isinstance(feature, Image):
                stream = stream.cast_column(name, Image(decode=False))
        return stream


def _listed(repository: str, revision: str | None) -> list[tuple[str, int]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _explained(repository):
        tree = HfApi().list_repo_tree(repository, recursive=True, revision=revision, repo_type="dataset")
        return [(entry.path, entry.size) for entry in tree if isinstance(entry, RepoFile)]


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of the Hub as one line that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])  # whichever HTTP library the client uses
    page = f"https://huggingface.co/datasets/{repository}"
    try:
        yield
    except GatedRepoError:
        raise PermissionError(
            f"{repository} is gated: open {page}, accept its terms while logged in, make a token with read access at "
            "https://huggingface.co/settings/tokens and run `hf auth login`; then give the same command again"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repository} is not on the Hub, or is private and `hf auth login` has not been run ({page})"
        ) from None
    except (HfHubHTTPError, OfflineModeIsEnabled, transport_error, ConnectionError) as error:
        raise FileNotFoundError(
            f"the Hub could not be reached for {repository} ({type(error).__name__}); check the network and "
            "HF_HUB_OFFLINE, or download the files and give their folder as --source"
        ) from None
