"""The Hub's refusals and bad moments, met by the code that uploads, in this process and without real waits."""

import pytest
from huggingface_hub import constants
from loopback_hub import TOKEN

from mmkd.publishing.publication import Publication, is_edited, upload, with_mark

# The Hub's client hands parts of files to its HTTP library in a way that the library wants another word for.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


CARD = "---\nlanguage: en\n---\n# A card\n"


@pytest.fixture
def publication(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"w" * 450_000)  # three parts
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(CARD)
    return Publication("model", tmp_path, replaces=["model*.safetensors"])


def push(publication, lines=None, private=False, overwrite_card=False):
    (publication.staged / "README.md").write_text(CARD)  # each push stages anew
    lines = [] if lines is None else lines
    return upload(publication, "user/model", private, "message", overwrite_card, lines.append)


def whole(hub):
    files = hub.repository("user/model").files
    return files["model.safetensors"][0] == b"w" * 450_000 and set(files) == {
        "README.md",
        "model.safetensors",
        "config.json",
    }


@pytest.mark.parametrize(
    ("method", "pattern", "status"),
    [
        ("POST", "repos/create", 503),
        ("POST", "repos/create", 500),
        ("POST", "repos/create", "cut"),
        ("GET", "tree", 502),
        ("POST", "preupload", 504),
        ("POST", "objects/batch", 429),
        ("PUT", "/lfs/part/.*/2", "cut"),
        ("PUT", "/lfs/part/.*/3", 500),
        ("POST", "/lfs/complete", "cut"),
        ("POST", "/commit/", 409),
        ("POST", "/commit/", 429),
        ("POST", "/commit/", "cut"),
    ],
)
def test_a_passing_failure_costs_a_wait_and_nothing_else(at_hub, publication, method, pattern, status):
    at_hub.fail(method, pattern, status)
    told = []
    done = push(publication, told)
    assert whole(at_hub) and len(done.changed) == 3
    assert not any(fault.times for fault in at_hub.faults)
    assert at_hub.waits
    assert not any(TOKEN in line for line in told)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(at_hub, publication):
    commit = type(at_hub).repository
    at_hub.fail("POST", "/commit/", "lost")
    done = push(publication)
    assert whole(at_hub) and len(done.changed) == 3
    assert len(commit(at_hub, "user/model").commits) == 2  # the first is the empty repository's


def test_the_wait_that_the_hub_asks_for_is_kept(at_hub, publication):
    at_hub.fail("POST", "repos/create", 429, **{"Retry-After": "17"})
    told = []
    push(publication, told)
    assert at_hub.waits == [17.0]
    assert told == ["HTTP 429, planned 429; trying again in 17 s"]


@pytest.mark.parametrize(
    ("pattern", "status", "error", "message"),
    [
        ("repos/create", 401, PermissionError, "The token is not valid"),
        ("repos/create", 403, PermissionError, "The token may not write to user/model"),
        ("tree", 404, FileNotFoundError, "There is no user/model that this token may see"),
        ("preupload", 400, OSError, "The Hub refuses what was sent"),
        ("/commit/", 409, OSError, "user/model is being changed by somebody else"),
        ("repos/create", 429, OSError, "allows no more requests for now"),
        ("repos/create", 500, ConnectionError, "run the same command again to resume"),
        ("repos/create", "cut", ConnectionError, "run the same command again to resume"),
    ],
)
def test_a_failure_that_stays_is_one_line_that_says_what_to_do(at_hub, publication, pattern, status, error, message):
    for method in ("GET", "POST"):
        at_hub.fail(method, pattern, status, times=99)
    with pytest.raises(error, match=message) as caught:
        push(publication)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_what_was_cut_off_goes_on_where_it_was(at_hub, publication):
    at_hub.fail("POST", "/commit/", 403, times=99)
    with pytest.raises(PermissionError):
        push(publication)
    uploads = at_hub.count("PUT", "/lfs/")
    at_hub.faults.clear()
    push(publication)
    assert whole(at_hub) and at_hub.count("PUT", "/lfs/") == uploads  # the weights were up already


def test_a_public_repository_is_not_taken_for_a_private_one(at_hub, publication):
    push(publication)
    commits = at_hub.count("POST", "/commit/")
    with pytest.raises(ValueError, match="user/model exists and is public"):
        push(publication, private=True)
    assert at_hub.count("POST", "/commit/") == commits


def test_a_card_that_was_edited_on_the_hub_stays(at_hub, publication):
    push(publication)
    files = at_hub.repository("user/model").files
    edited = files["README.md"][0].replace(b"# A card", b"# Our card")
    files["README.md"] = (edited, False)
    assert push(publication).card_kept
    assert at_hub.repository("user/model").files["README.md"][0] == edited
    done = push(publication, overwrite_card=True)
    assert done.changed == ["README.md"] and not done.card_kept


def test_a_card_that_cannot_be_read_is_not_replaced(at_hub, publication):
    push(publication)
    at_hub.fail("HEAD", "README.md", 503, times=99)
    at_hub.fail("GET", "README.md", 503, times=99)
    commits = at_hub.count("POST", "/commit/")
    with pytest.raises(ConnectionError, match="the card cannot be read"):
        push(publication, overwrite_card=False)
    assert at_hub.count("POST", "/commit/") == commits


def test_files_of_an_earlier_upload_go_and_those_of_others_stay(at_hub, publication):
    push(publication)
    files = at_hub.repository("user/model").files
    files["model-00001-of-00002.safetensors"] = (b"old", True)
    files["notes.md"] = (b"somebody's", False)
    done = push(publication)
    assert done.removed == ["model-00001-of-00002.safetensors"]
    assert "notes.md" in at_hub.repository("user/model").files


def test_offline_is_said_before_anything_is_asked(at_hub, publication, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        push(publication)
    assert at_hub.requests == []


def test_an_edit_of_a_card_is_seen():
    card = with_mark("---\nlanguage: en\n---\n# Title\n\ntext")
    assert not is_edited(card) and not is_edited(card.replace("\n\n<!--", "\n<!--"))
    assert is_edited(card.replace("text", "other text"))
    assert is_edited(card + "more") and is_edited("written by hand")
