"""Push a model, an adapter, features or pairs to the Hub, with a card of what its folder states.

The kind of the folder is recognised by its files. A staging folder with exactly the files of the repository is made,
which ``--dry-run`` shows without network access and ``HfApi.upload_folder`` uploads. A second push uploads only what
changed; a card that was edited on the Hub stays.
"""

from __future__ import annotations

import importlib.resources
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class PushSettings:
    """Push a model, an adapter, features or pairs to the Hub.

    Example:
        mmkd push mmkd-clip --repo user/mmkd-clip --results results --dry_run
    """

    folder: Path = setting(help="a model, an adapter, a feature store or a folder of them, or pairs", positional=True)
    repo: str = setting(help="user/name or organization/name")
    results: Path | None = setting(None, "model: folder of `mmkd eval` on it, for the card")
    onnx: Path | None = setting(None, "model: folder of `mmkd export --format onnx` on it, for browsers")
    examples: Path | None = setting(None, "model: folder of images to try on its page, named by labels; published")
    base_model: str | None = setting(None, "adapter: Hub id of its model, where the folder does not state it")
    license: str | None = setting(None, "licence of the publication, such as apache-2.0 or cc-by-nc-4.0")
    private: bool = setting(False, "make a new repository private; an existing public one is refused")
    images: bool | None = setting(None, "pairs: with their images; null includes them if all their licences are open")
    max_shard_size: str = setting("5GB", "model: largest file of weights")
    message: str = setting("Upload with mmkd push", "commit message")
    overwrite_card: bool = setting(False, "also replace a card that was edited on the Hub")
    dry_run: bool = setting(False, "show card and files without network access")
    quiet: bool = setting(False, "no progress bars")


if __name__ == "__main__":
    check_arguments(PushSettings)  # before the imports that take seconds

from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id

from mmkd.files import as_written
from mmkd.publishing.datasets import stage_features, stage_pairs
from mmkd.publishing.model import parse_size, stage_adapter, stage_model
from mmkd.publishing.publication import Draft, Publication, Uploaded, kind_of, require_token, upload

SHOWN_FILES = 5
OF_KINDS = dict.fromkeys(("results", "onnx", "examples"), "a model") | {"images": "pairs", "base_model": "an adapter"}


def main(settings: PushSettings) -> None:
    """Stage the publication, and show or upload it.

    Raises:
        FileNotFoundError: the folder, or a file that it should hold, does not exist.
        PermissionError: no token, or one that may not write there.
        ValueError: the repository's name is malformed, or the folder holds nothing that is pushed.
        OSError: the Hub does not answer.
    """
    with tempfile.TemporaryDirectory(prefix=".mmkd-push-", dir=staging_place(settings.folder)) as staged:
        with as_written():
            publication = make_publication(settings, Path(staged))
        for note in publication.notes:
            print(f"note: {note}", file=sys.stderr)
        if settings.dry_run:
            show(settings, publication)
            return
        require_token()
        if settings.quiet:
            disable_progress_bars()
        done = upload(
            publication,
            settings.repo,
            settings.private,
            settings.message,
            settings.overwrite_card,
            lambda line: print(line, file=sys.stderr),
        )
    report(done)


def staging_place(folder: Path) -> Path | None:
    """Where the staging folder is made: beside the folder, so that files can be linked; None for the system's place."""
    parent = folder.resolve().parent
    return parent if parent.is_dir() and os.access(parent, os.W_OK) else None


def make_publication(settings: PushSettings, staged: Path) -> Publication:
    """Stage the files to upload in an empty folder; raises for every fault of the published folder."""
    check_repo(settings.repo)
    shard_bytes = parse_size(settings.max_shard_size)
    folder = settings.folder
    kind = kind_of(folder)
    for option, owner in OF_KINDS.items():
        if getattr(settings, option) is not None and kind != owner.split()[-1]:
            raise ValueError(f"--{option} belongs to {owner}; {folder} holds {kind}")
    if settings.base_model is not None:
        check_repo(settings.base_model, "--base_model")
    name = "model_card.md" if kind in ("model", "adapter") else "dataset_card.md"
    template = (importlib.resources.files("mmkd.hub") / name).read_text(encoding="utf-8")
    draft = Draft(folder, staged, settings.repo, template, settings.license)
    if kind == "model":
        return stage_model(draft, settings.results, shard_bytes, settings.onnx, settings.examples)
    if kind == "adapter":
        return stage_adapter(draft, settings.base_model)
    if kind == "features":
        return stage_features(draft)
    return stage_pairs(draft, settings.images)


def check_repo(repo: str, option: str = "--repo") -> None:
    """Refuse a name that the Hub would refuse, and one without an owner.

    Raises:
        ValueError: it is not ``user/name``; the message names the ``option``.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{option} {repo!r}: {' '.join(str(error).split())}") from None
    if repo.count("/") != 1:
        raise ValueError(f"{option} {repo!r} has no owner; give user/{repo} or organization/{repo}")


def show(settings: PushSettings, publication: Publication) -> None:
    """Print the card and every file that would be uploaded."""
    print(publication.card)
    sizes = publication.sizes()
    print(f"--- {len(sizes)} files for the {publication.repo_type} {settings.repo}, {_in_units(sum(sizes.values()))}")
    for name, size in sizes.items():
        print(f"{_in_units(size):>10}  {name}")
    if left_out := publication.left_out(settings.folder):
        print(f"not uploaded: {', '.join(left_out)}")
    print("nothing was uploaded (--dry-run)")


def report(done: Uploaded) -> None:
    """Print what was changed."""
    more = f" and {len(done.changed) - SHOWN_FILES} more" if len(done.changed) > SHOWN_FILES else ""
    changed = f" ({', '.join(done.changed[:SHOWN_FILES])}{more})" if done.changed else ""
    removed = f"; removed {', '.join(done.removed)}" if done.removed else ""
    print(f"{done.url}: {len(done.changed)} files changed{changed}, {done.unchanged} unchanged{removed}")
    if done.card_kept:
        print("the card was edited on the Hub and stays; --overwrite_card replaces it")


def _in_units(size: int) -> str:
    for unit, limit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} B"


if __name__ == "__main__":
    run(PushSettings, main)
