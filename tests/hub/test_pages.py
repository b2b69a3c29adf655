"""The commands of the page on publishing, as they are written, in a folder that holds what they name."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mmkd.command.settings import parse
from mmkd.data.folder import open_pairs
from mmkd.data.images import read_image_bytes
from mmkd.hub import push

PAGE = Path(__file__).resolve().parents[2] / "docs" / "publishing.md"
BLOCK = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_every_command_of_the_page_on_publishing_runs(
    at_hub,
    published_student,
    published_adapter,
    results,
    published_features,
    published_pairs,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    Path("finetuned").mkdir()
    places = {"mmkd-clip": published_student, "finetuned/adapter": published_adapter, "results": results}
    for name, folder in {**places, "features": published_features, "pairs": published_pairs}.items():
        Path(name).symlink_to(folder)
    lines = [shlex.split(line) for line in BLOCK.splitlines()]
    assert len(lines) == 5 and all(words[:2] == ["mmkd", "push"] for words in lines)
    for words in lines:
        push.main(parse(push.PushSettings, words[2:]))
        printed = capsys.readouterr().out
        assert ("nothing was uploaded" in printed) == ("--dry-run" in words)
        assert bool(at_hub.repositories) == ("--dry-run" not in words), "the page shows the dry run first"
    kinds = {(kind, repo) for kind, repo in at_hub.repositories}
    assert kinds == {
        ("model", "user/mmkd-clip"), ("model", "user/mmkd-clip-lung"),
        ("dataset", "user/plip-features"), ("dataset", "user/pairs"),
    }  # fmt: skip
    assert at_hub.repository("user/pairs", "dataset").private
    for words in lines[1:]:
        push.main(parse(push.PushSettings, words[2:]))
        assert ": 0 files changed, " in capsys.readouterr().out, "nothing goes up twice"
    card = at_hub.repository("user/mmkd-clip").files["README.md"][0].decode()
    assert "model-index" in card and "cc-by-nc-4.0" in card


def test_pairs_come_down_by_the_clients_command_as_the_page_says(at_hub, published_pairs, tmp_path):
    from huggingface_hub import snapshot_download

    push.main(parse(push.PushSettings, [str(published_pairs), "--repo", "user/pairs", "--quiet"]))
    words = re.search(r"`(hf download [^`]+)`", PAGE.read_text(encoding="utf-8"))[1].split()
    assert words == ["hf", "download", "user/pairs", "--repo-type", "dataset", "--local-dir", "pairs"]
    snapshot_download(words[2], repo_type=words[4], local_dir=tmp_path / words[6])
    down, up = open_pairs(tmp_path / "pairs"), open_pairs(published_pairs)
    assert [replace(pair, image="") for pair in down.pairs] == [replace(pair, image="") for pair in up.pairs]
    for theirs, ours in zip(down.pairs, up.pairs, strict=True):  # images come down in archives
        assert read_image_bytes(down.image_path(theirs)) == read_image_bytes(up.image_path(ours))
