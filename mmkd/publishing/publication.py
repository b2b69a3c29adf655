"""A publication: a staging folder that holds exactly the files of a repository, the card among them; and its upload.

Files are named one by one, never "all that is there": a note, a log or a list of patients in the folder of a run is not
staged. Large files are hard links where the file system allows, so that staging a model takes no space.

`HfApi.upload_folder` uploads only what changed, resumes, and retries reads and transfers of files. Added here: retries
of the calls that it makes once (creating the repository, the commit), a check that a repository meant to be private is
private, and protection of a card that was edited on the Hub. The token is read from the library and never shown.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from mmkd.data.folder import META_FILE
from mmkd.data.table import TABLE_FILE
from mmkd.files import leads_inside, read_json, read_object, write_json

Kind = Literal["model", "adapter", "features", "pairs"]
CARD_FILE = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
READ_FROM = ("_name_or_path", "name_or_path", "local_files_only", "is_local", "backend")  # how a file was read here
PLACE = re.compile(r"(\w{2,}:)?(~?/(?!/)|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)")
KINDS = (
    "a model (config.json and safetensors, from pretrain, distill or convert), an adapter (adapter_config.json, from "
    "finetune), features (meta.json, from extract or align) or pairs (manifest.arrow, from curate or screen)"
)
T = TypeVar("T")
WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT_SECONDS = 300.0
RETRIED = (408, 409, 412, 429, 500, 502, 503, 504)
MARK = "<!-- written by mmkd push, "
# The base of all errors of whichever HTTP library the installed client uses.
TransportError = cast(type[Exception], HfHubHTTPError.__bases__[0])
ADVICE = {
    401: (PermissionError, "The token is not valid: `hf auth login`, or set another HF_TOKEN"),
    403: (PermissionError, "The token may not write to {repo}; it needs write access there"),
    404: (FileNotFoundError, "There is no {repo} that this token may see, or no such owner"),
    409: (OSError, "{repo} is being changed by somebody else; run the same command again"),
    412: (OSError, "{repo} is being changed by somebody else; run the same command again"),
    429: (OSError, "The Hub allows no more requests for now; run the same command again later"),
}


@dataclass(frozen=True)
class Draft:
    """The content to publish, with its name, card template and licence.

    Attributes:
        folder: with the content.
        staged: an empty folder, which gets the files of the repository.
        repo: ``user/name``.
        template: of the card, in Jinja.
        license: under which the publisher offers the content; None states no licence.
    """

    folder: Path
    staged: Path
    repo: str
    template: str
    license: str | None

    def write_card(self, card: str) -> None:
        """Write ``README.md``."""
        (self.staged / CARD_FILE).write_text(card, encoding="utf-8")


@dataclass
class Publication:
    """A repository, ready for upload.

    Attributes:
        repo_type: model or dataset.
        staged: folder with its files.
        notes: what the publisher should read before the repository is public.
        replaces: patterns of files that an earlier upload may have left and this one removes.
    """

    repo_type: Literal["model", "dataset"]
    staged: Path
    notes: list[str] = field(default_factory=list)
    replaces: list[str] = field(default_factory=list)

    @property
    def card(self) -> str:
        """The text of ``README.md``."""
        return (self.staged / CARD_FILE).read_text(encoding="utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its path in the repository."""
        files = sorted(path for path in self.staged.rglob("*") if path.is_file())
        return {path.relative_to(self.staged).as_posix(): path.stat().st_size for path in files}

    def left_out(self, folder: Path) -> list[str]:
        """Top-level names of the published folder that are not staged."""
        staged = {path.name for path in self.staged.iterdir()}
        return sorted(path.name for path in folder.iterdir() if path.name not in staged)


def kind_of(folder: Path) -> Kind:
    """The kind of content of a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing that can be published, or a link out of it; the message says what to do.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give {KINDS}")
    if folder.name.endswith(".partial"):
        raise ValueError(f"{folder} is an unfinished run; run its command again to finish it")
    refuse_links(folder)
    if (folder / TABLE_FILE).is_file():
        return "pairs"
    if (folder / "meta.json").is_file() or any(folder.glob("*/meta.json")):
        return "features"
    if (folder / "config.json").is_file():
        model_type = read_object(folder / "config.json").get("model_type")
        if model_type != "mmkd_clip":
            raise ValueError(f"{folder} holds a model of type {model_type!r}; only type 'mmkd_clip' is pushed")
        return "model"
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (folder / META_FILE).is_file():
        raise ValueError(f"{folder} holds the authors' published data, which only the authors publish")
    if (folder / "summary.json").is_file():
        raise ValueError(f"{folder} holds results; push the evaluated model with --results {folder}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"{folder} holds {found}; expected {KINDS}")


def refuse_links(folder: Path) -> None:
    """Refuse links out of a folder that others may have made: what they name would be published.

    Raises:
        ValueError: there is one; those of the Hub's cache, from ``snapshots/REVISION`` to ``blobs``, are its own files.
    """
    blobs = folder.resolve().parent.parent / "blobs"
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.is_symlink() and not (leads_inside(folder, path) or leads_inside(blobs, path)):
            raise ValueError(f"{path} is a link out of the folder; put a copy of the file in its place, or remove it")


def stage_file(source: Path, target: Path) -> None:
    """Put a file into the staging folder: a hard link, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or a file of another owner
        shutil.copyfile(source, target)


def stage_json(source: Path, target: Path, **defaults: Any) -> None:
    """Write a JSON file into the staging folder, without folders of this machine and with the keys that it lacks."""
    write_json(target, defaults | without_places(read_json(source)))


def without_places(value: Any) -> Any:
    """JSON values without folders of this machine: these are given by their last name; text and Hub ids stay."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items() if key not in READ_FROM}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and (place := PLACE.match(value)):
        return (place[1] or "") + Path(value.replace("\\", "/")).name
    return value


@dataclass(frozen=True)
class Uploaded:
    """What an upload changed.

    Attributes:
        url: of the repository.
        changed: files that are new or different.
        removed: files of an earlier upload that this one removed.
        unchanged: number of files that were there already.
        card_kept: the card was edited on the Hub and stays.
    """

    url: str
    changed: list[str]
    removed: list[str]
    unchanged: int
    card_kept: bool


def upload(
    publication: Publication,
    repo: str,
    private: bool,
    message: str,
    overwrite_card: bool,
    notify: Callable[[str], None],
) -> Uploaded:
    """Create the repository if it does not exist, and upload the staging folder.

    Args:
        publication: what to upload; its card gets a last line by which a later upload recognises edits.
        repo: ``user/name``.
        private: only its owners may see it.
        message: of the commit.
        overwrite_card: also replace a card that was edited on the Hub.
        notify: gets a line for every retry.

    Raises:
        PermissionError: no token, or one that may not do this.
        ValueError: the repository exists and is public, but ``private`` is set.
        OSError: the Hub does not answer, or refuses for another reason.
    """
    token = require_token()
    api = HfApi(token=token)
    place: dict[str, Any] = {"repo_id": repo, "repo_type": publication.repo_type}

    def retried(action: Callable[[], T]) -> T:
        return with_retries(action, repo, token, notify)

    url = retried(partial(api.create_repo, **place, private=private or None, exist_ok=True))
    if private and not retried(partial(api.repo_info, **place)).private:
        raise ValueError(f"{repo} exists and is public; make it private in its settings, or choose another --repo")
    before = retried(partial(_files, api, place))
    kept = CARD_FILE in before and not overwrite_card and retried(partial(_card_is_edited, api, place))
    card = publication.staged / CARD_FILE
    card.write_text(with_mark(publication.card), encoding="utf-8")
    retried(
        partial(
            api.upload_folder,
            **place,
            folder_path=publication.staged,
            commit_message=message,
            ignore_patterns=[CARD_FILE] if kept else None,
            delete_patterns=publication.replaces,
        )
    )
    after = retried(partial(_files, api, place))
    changed = sorted(path for path, blob in after.items() if before.get(path) != blob)
    return Uploaded(str(url), changed, sorted(before.keys() - after), len(after) - len(changed), kept)


def require_token() -> str:
    """The user's token, where the library keeps it.

    Raises:
        PermissionError: there is none.
        ConnectionError: the library is set to stay offline.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or use --dry-run")
    token = get_token()
    if not token:
        raise PermissionError(
            "no token for the Hub: make one with write access at https://huggingface.co/settings/tokens, then "
            "`hf auth login` or set HF_TOKEN"
        )
    return token


def with_retries(action: Callable[[], T], repo: str, token: str, notify: Callable[[str], None]) -> T:
    """Run an action, and retry after temporary failures with growing waits, or as long as the Hub requests.

    Raises:
        PermissionError: the Hub refuses this token.
        OSError: it does not answer, or refuses for another reason.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return action()
        except (TransportError, ConnectionError, RuntimeError, ValueError) as error:
            cause = _http_cause(error)
            if cause is None and isinstance(error, RuntimeError):  # the library's native uploader
                cause = ConnectionError(f"{error} {error.__cause__ or ''}")
            if cause is None:
                raise
            if wait is None or (isinstance(cause, HfHubHTTPError) and _status(cause) not in RETRIED):
                raise _explained(cause, repo, token) from None
            pause = min(max(wait, _requested_wait(cause)), LONGEST_WAIT_SECONDS)
            notify(f"{_short(cause, token)}; trying again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def with_mark(card: str) -> str:
    """A card with a last line that shows whether it was edited since."""
    text = card.rstrip("\n") + "\n"
    return f"{text}\n{MARK}{_digest(text)} -->\n"


def is_edited(card: str) -> bool:
    """Whether a card differs from what `with_mark` wrote."""
    text, mark, rest = card.rpartition(MARK)
    return not mark or rest.strip() != f"{_digest(text)} -->"


def _explained(error: BaseException, repo: str, token: str) -> OSError:
    """The error as one line that states what to do."""
    status, short = _status(error), _short(error, token)
    if status in ADVICE:
        kind, advice = ADVICE[status]
        return kind(f"{short}. {advice.format(repo=repo)}")
    if status is not None and status < 500:
        return OSError(f"{short}. The Hub refuses what was sent")
    return ConnectionError(f"{short}. {constants.ENDPOINT} cannot be used now; run the same command again to resume")


def _short(error: BaseException, token: str) -> str:
    """The error on one line, without the token."""
    status = _status(error)
    text = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0] or type(error).__name__
    return (f"HTTP {status}, {text}" if status else f"{text}").replace(token, "***")[:300]


def _http_cause(error: BaseException | None) -> BaseException | None:
    """The HTTP or connection error behind an error; None if there is none."""
    while error is not None:
        if isinstance(error, (TransportError, ConnectionError)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _requested_wait(error: BaseException) -> float:
    """Seconds to wait that the Hub requests."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _files(api: HfApi, place: dict[str, Any]) -> dict[str, str]:
    """The git hash of each file of a repository."""
    tree = api.list_repo_tree(**place, recursive=True)
    return {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}


def _card_is_edited(api: HfApi, place: dict[str, Any]) -> bool:
    """Whether the card on the Hub was edited by hand."""
    with tempfile.TemporaryDirectory(prefix="mmkd-card-") as temporary:
        try:
            path = api.hf_hub_download(**place, filename=CARD_FILE, local_dir=temporary)
        except LocalEntryNotFoundError as error:  # no answer: the card may be there
            raise ConnectionError(f"the card cannot be read ({error})") from error
        except EntryNotFoundError:
            return False
        return is_edited(Path(path).read_text(encoding="utf-8", errors="replace"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
