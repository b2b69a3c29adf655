"""A publication to the Hub with its own client, patiently, and with errors that say what to do.

The client uploads only what changed and goes on where it was cut off; here are added the retries of the calls that it
makes once (creating a repository, committing), the check that a repository meant to be private is, and the care for a
card that somebody edited on the Hub. A token is read where the client keeps it, and never shown.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from mmkd.publishing.publication import CARD_FILE, Publication, gather

T = TypeVar("T")
WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT_SECONDS = 300.0
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
MARK = "<!-- written by mmkd push, "
# The base of all errors of whichever HTTP library the installed client uses.
TransportError = cast(type[Exception], HfHubHTTPError.__bases__[0])


@dataclass(frozen=True)
class Uploaded:
    """What an upload did.

    Attributes:
        url: of the repository.
        changed: files that are new or another now.
        removed: files that an earlier upload left and this one took away.
        unchanged: files that were there already.
        card_kept: the card on the Hub was edited by hand and stayed.
    """

    url: str
    changed: list[str]
    removed: list[str]
    unchanged: int
    card_kept: bool


def upload(
    publication: Publication, repo: str, private: bool, message: str, overwrite_card: bool, tell: Callable[[str], None]
) -> Uploaded:
    """Create the repository where it is not there, and bring it to what the publication holds.

    Args:
        publication: what to upload.
        repo: ``user/name``.
        private: only its owners may see it.
        message: of the commit.
        overwrite_card: also replace a card that was edited on the Hub.
        tell: gets a line for every wait.

    Raises:
        PermissionError: no token, or one that may not do this.
        ValueError: the repository is there and public, but was to be private.
        OSError: the Hub does not answer, or refuses for another reason.
    """
    token = require_token()
    api = HfApi(token=token)
    place: dict[str, Any] = {"repo_id": repo, "repo_type": publication.repo_type}
    patient = _Patience(token, repo, tell)
    user = patient.call("asking who you are", lambda: api.whoami())["name"]
    patient.user = user
    create = "creating the repository"
    url = patient.call(create, lambda: api.create_repo(**place, private=private or None, exist_ok=True))
    info = patient.call("looking at the repository", lambda: api.repo_info(**place))
    if private and not info.private:
        raise ValueError(f"{repo} is there and public; make it private in its settings, or choose another --repo")
    before = _oids(patient.call("listing the repository", lambda: _tree(api, place)))
    with tempfile.TemporaryDirectory(prefix="mmkd-push-") as temporary:
        folder = Path(temporary)
        marked = Publication(**{**vars(publication), "card": with_mark(publication.card)})
        gather(marked, folder)
        kept = (
            CARD_FILE in before and not overwrite_card and patient.call("reading the card", lambda: _edited(api, place))
        )
        patient.call(
            "uploading",
            lambda: api.upload_folder(
                **place,
                folder_path=folder,
                commit_message=message,
                ignore_patterns=[CARD_FILE] if kept else None,
                delete_patterns=publication.owned,
            ),
        )
    after = _oids(patient.call("listing the repository", lambda: _tree(api, place)))
    changed = sorted(path for path, oid in after.items() if before.get(path) != oid)
    return Uploaded(str(url), changed, sorted(before.keys() - after), len(after) - len(changed), kept)


def require_token() -> str:
    """The user's token, where the Hub's client keeps it.

    Raises:
        PermissionError: there is none.
        ConnectionError: the client was told to stay offline.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or look with --dry-run")
    token = get_token()
    if not token:
        raise PermissionError(
            "no token for the Hub: make one with write access at https://huggingface.co/settings/tokens, then "
            "`hf auth login` or set HF_TOKEN"
        )
    return token


def with_mark(card: str) -> str:
    """A card with a last line that tells whether it was edited since."""
    text = card.rstrip("\n") + "\n"
    return f"{text}\n{MARK}{_digest(text)} -->\n"


def is_edited(card: str) -> bool:
    """Whether a card is another than `with_mark` wrote."""
    text, mark, rest = card.rpartition(MARK)
    return not mark or rest.strip() != f"{_digest(text)} -->"


def hidden(text: str, token: str) -> str:
    """A text without the token."""
    return text.replace(token, "***") if token else text


class _Patience:
    """Repeats what fails for a passing reason, and says in the user's words what fails for good."""

    def __init__(self, token: str, repo: str, tell: Callable[[str], None]) -> None:
        self.token, self.repo, self.tell, self.user = token, repo, tell, ""

    def call(self, what: str, action: Callable[[], T]) -> T:
        """The action's value.

        Raises:
            PermissionError: the Hub refuses this token.
            OSError: it does not answer or refuses for another reason.
        """
        for wait in (*WAITS_SECONDS, None):
            try:
                return action()
            except (TransportError, ConnectionError, RuntimeError, ValueError) as error:
                cause = _http_cause(error)
                if cause is None and isinstance(error, RuntimeError):  # the client's native uploader
                    cause = ConnectionError(f"{error} {error.__cause__ or ''}")
                if cause is None:
                    raise
                if wait is None or not _is_passing(cause):
                    raise self._explained(what, cause) from None
                pause = min(max(wait, _asked_wait(cause)), LONGEST_WAIT_SECONDS)
                self.tell(f"{what}: {self._short(cause)}; again in {pause:g} s")
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _explained(self, what: str, error: BaseException) -> OSError:
        status = _status(error)
        own = f"{what}: {self._short(error)}"
        if status == 401:
            return PermissionError(f"{own}. The token is not valid: `hf auth login`, or set another HF_TOKEN")
        if status == 403:
            who = f" of {self.user}" if self.user else ""
            return PermissionError(f"{own}. The token{who} may not write to {self.repo}; it needs write access there")
        if status == 404:
            return FileNotFoundError(f"{own}. There is no {self.repo} that this token may see, or no such owner")
        if status in (409, 412):
            return OSError(f"{own}. Somebody else is changing {self.repo}; run the same command again")
        if status == 429:
            return OSError(f"{own}. The Hub allows no more requests for now; run the same command again later")
        if status is not None and status < 500:
            return OSError(f"{own}. The Hub refuses what was sent")
        again = "what is up stays there, and the same command goes on"
        return ConnectionError(f"{own}. {constants.ENDPOINT} cannot be used now; {again}")

    def _short(self, error: BaseException) -> str:
        """The error on one line, without the token."""
        status = _status(error)
        said = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        return hidden(f"HTTP {status}, {said}" if status else f"{said}", self.token)[:300]


def _http_cause(error: BaseException | None) -> BaseException | None:
    """The HTTP or connection error behind an error, None where there is none."""
    while error is not None:
        if isinstance(error, (TransportError, ConnectionError)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_passing(error: BaseException) -> bool:
    return not isinstance(error, HfHubHTTPError) or _status(error) in PASSING


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _asked_wait(error: BaseException) -> float:
    """Seconds that the Hub asks to wait."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _tree(api: HfApi, place: dict[str, Any]) -> list[Any]:
    return list(api.list_repo_tree(**place, recursive=True))


def _oids(tree: list[Any]) -> dict[str, str]:
    return {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}


def _edited(api: HfApi, place: dict[str, Any]) -> bool:
    """Whether the card on the Hub was edited by hand."""
    with tempfile.TemporaryDirectory(prefix="mmkd-card-") as temporary:
        try:
            path = api.hf_hub_download(**place, filename=CARD_FILE, local_dir=temporary)
        except LocalEntryNotFoundError as error:  # nobody answered: it may be there
            raise ConnectionError(f"the card cannot be read ({error})") from error
        except EntryNotFoundError:
            return False
        return is_edited(Path(path).read_text(encoding="utf-8", errors="replace"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
