"""Push a model, an adapter, features or pairs to the Hub, with a card made from what is known.

    mmkd push mmkd-clip --repo user/mmkd-clip --results results --dry-run
    mmkd push finetuned/adapter --repo user/mmkd-clip-lung --base_model user/mmkd-clip
    mmkd push features/PLIP --repo user/plip-features
    mmkd push pairs --repo user/pairs

What the folder holds is seen from its files. ``--dry-run`` shows card and files and touches no network. Pushed again,
only what changed goes up; a card that was edited on the Hub stays.
"""

from __future__ import annotations

import importlib.resources
import sys
from dataclasses import dataclass
from pathlib import Path

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class PushSettings:
    """Push a model, an adapter, features or pairs to the Hub."""

    folder: Path = setting(help="a model, an adapter, a feature store or a folder of them, or pairs", positional=True)
    repo: str = setting(help="where to: user/name or organization/name")
    results: Path | None = setting(None, "folder of `mmkd eval` on this model, for the card")
    base_model: str | None = setting(None, "adapter: Hub id of its model, where the folder does not say it")
    license: str | None = setting(None, "under which you offer it, such as apache-2.0 or cc-by-nc-4.0")
    private: bool = setting(False, "a new repository is private; an existing public one is refused")
    images: bool | None = setting(None, "pairs: with their images; none = if all their licences are open")
    max_shard_size: str = setting("5GB", "model: largest file of weights")
    message: str = setting("Upload with mmkd push", "of the commit")
    overwrite_card: bool = setting(False, "also replace a card that was edited on the Hub")
    dry_run: bool = setting(False, "show card and files, touch no network")
    quiet: bool = setting(False, "no progress bars")


if __name__ == "__main__":
    check_arguments(PushSettings)  # before the imports that take seconds

from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id

from mmkd.publishing.datasets import features_publication, pairs_publication
from mmkd.publishing.model import adapter_publication, model_publication
from mmkd.publishing.publication import Publication, kind_of, parse_size
from mmkd.publishing.upload import Uploaded, require_token, upload

SHOWN_FILES = 40


def main(settings: PushSettings) -> None:
    """Put the publication together, and show or upload it.

    Raises:
        FileNotFoundError: the folder, or a file it should have, is not there.
        PermissionError: no token, or one that may not write there.
        ValueError: the repository's name is malformed, or the folder holds nothing that is pushed.
        OSError: the Hub does not answer.
    """
    publication = make_publication(settings)
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


def make_publication(settings: PushSettings) -> Publication:
    """What would be uploaded; all that can be wrong with it is found here."""
    check_repo(settings.repo)
    limit = parse_size(settings.max_shard_size)
    kind = kind_of(settings.folder)
    if settings.results is not None and kind != "model":
        raise ValueError(f"--results belongs to a model; {settings.folder} holds {kind}")
    if settings.images is not None and kind != "pairs":
        raise ValueError(f"--images belongs to pairs; {settings.folder} holds {kind}")
    if settings.base_model is not None:
        if kind != "adapter":
            raise ValueError(f"--base_model belongs to an adapter; {settings.folder} holds {kind}")
        check_repo(settings.base_model, "--base_model")
    name = "model_card.md" if kind in ("model", "adapter") else "dataset_card.md"
    template = (importlib.resources.files("mmkd.hub") / name).read_text(encoding="utf-8")
    if kind == "model":
        return model_publication(settings.folder, settings.repo, template, settings.results, settings.license, limit)
    if kind == "adapter":
        return adapter_publication(settings.folder, settings.repo, template, settings.license, settings.base_model)
    if kind == "features":
        return features_publication(settings.folder, settings.repo, template, settings.license)
    return pairs_publication(settings.folder, settings.repo, template, settings.license, settings.images)


def check_repo(repo: str, option: str = "--repo") -> None:
    """Refuse a name that the Hub would refuse, and one without an owner; ``option`` is where it was given.

    Raises:
        ValueError: it is not ``user/name``.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{option} {repo!r}: {' '.join(str(error).split())}") from None
    if repo.count("/") != 1:
        raise ValueError(f"{option} {repo!r} has no owner; give user/{repo} or organization/{repo}")


def show(settings: PushSettings, publication: Publication) -> None:
    """Print card and files."""
    print(publication.card)
    sizes = {"README.md": len(publication.card.encode()), **{name: i.size for name, i in publication.items.items()}}
    print(f"--- {len(sizes)} files for the {publication.repo_type} {settings.repo}, {_shown(sum(sizes.values()))}")
    for name, size in list(sizes.items())[:SHOWN_FILES]:
        print(f"{_shown(size):>10}  {name}")
    if len(sizes) > SHOWN_FILES:
        print(f"{'':>10}  and {len(sizes) - SHOWN_FILES} more")
    if publication.left_out:
        print(f"stays here: {', '.join(publication.left_out)}")
    print("nothing was uploaded (--dry-run)")


def report(done: Uploaded) -> None:
    """One line of what was done."""
    more = f" and {len(done.changed) - 5} more" if len(done.changed) > 5 else ""
    changed = f" ({', '.join(done.changed[:5])}{more})" if done.changed else ""
    removed = f"; removed {', '.join(done.removed)}" if done.removed else ""
    print(f"{done.url}: {len(done.changed)} files changed{changed}, {done.unchanged} as they were{removed}")
    if done.card_kept:
        print("the card was edited on the Hub and stays as it is there; --overwrite_card replaces it")


def _shown(size: int) -> str:
    for unit, limit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} B"


if __name__ == "__main__":
    run(PushSettings, main)
