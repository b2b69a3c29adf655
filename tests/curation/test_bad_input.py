"""Everything that untrusted shards come with: counted under a reason, the run goes on, nothing outside is touched."""

import io
import json
import tarfile
import zipfile

import pytest
from biomedica_form import caption, facts, key, picture, sample, write_tar
from damage import png_of_size
from PIL import Image

from mmkd.curation.rules import read_rules
from mmkd.curation.stream import curate
from mmkd.data.archives import members
from mmkd.data.folder import open_pairs
from mmkd.data.images import read_image_bytes


def zip_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    return buffer.getvalue()


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def with_image(number, data, suffix="jpg"):
    return [(f"{key(number)}.{suffix}", data), *sample(number)[1:]]


def with_facts(number, data):
    return [*sample(number)[:2], (f"{key(number)}.json", data)]


def with_caption(number, data):
    return [sample(number)[0], (f"{key(number)}.txt", data), sample(number)[2]]


JPEG = picture(400)
CASES = {
    "corrupt": with_image(4, picture(4)[:-200]),
    "unsupported": with_image(8, b"this is no image"),
    "empty_image": with_image(12, b""),
    "too_large": with_image(16, png_of_size(100_000, 100_000), "png"),
    "too_small": with_image(20, picture(20, 40, 4)),
    "invalid_json": with_facts(24, b'{"image_secondary_label": ["computer'),
    "invalid_json ": with_facts(28, b'{"a": ' + b"[" * 100_000),
    "wrong_type": with_facts(32, facts(32, image_secondary_label=7)),
    "wrong_type ": with_facts(36, b"[1, 2]"),
    "wrong_type  ": with_facts(40, facts(40, article_license={"a": 1})),
    "caption_not_text": with_caption(44, b"\x00\x01\x02\x89PNG"),
    "no_caption": with_caption(48, b"  \n\t "),
    "caption_too_long": with_caption(52, b"word " * 2000),
    "license": sample(56, article_license="CC BY-NC 4.0"),
    "license ": sample(60, subset="noncommercial", article_license=None),
    "path_outside": [("../../escaped.jpg", JPEG), ("/tmp/escaped.txt", b"x"), ("a/../../escaped.json", b"{}")],
    "link_in_archive": [link("linked.jpg", "/etc/passwd"), link("hard.jpg", "../x", tarfile.LNKTYPE)],
    "no_key": [(".jpg", JPEG)],
    "duplicate_key": [*sample(64), *sample(64)],
}
EXPECTED = {"path_outside": 3, "link_in_archive": 2}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    found = [*sample(0)]
    for case in CASES.values():
        found += case
    mended = [*with_image(68, picture(68, format="PNG")), *with_caption(72, "Läsion der Lunge".encode("cp1252"))]
    odd = [("deep/er/Ünï cödé.v2.1.JPG", picture(500)), ("deep/er/Ünï cödé.v2.1.TXT", b"odd key"),
           ("deep/er/Ünï cödé.v2.1.json", facts(0)), ("._hidden.jpg", b"x"), ("bomb.zip", zip_bomb())]  # fmt: skip
    python_json = with_facts(76, facts(76)[:-1] + b', "score": NaN, "text": "\\ud800"}')
    write_tar(root / "s" / "0.tar", [*found, *mended, *odd, *python_json])
    whole = write_tar(root / "s" / "1.tar", [*sample(80), *sample(84)])
    *_, last = members(whole)
    whole.write_bytes(whole.read_bytes()[: last.offset + 10])
    (root / "s" / "2.tar").write_bytes(b"no tar")
    before = sorted(root.rglob("*"))
    report = curate(str(root / "s"), root / "pairs", read_rules("paper"), quiet=True)
    assert [path for path in sorted(root.rglob("*")) if root / "pairs" not in (path, *path.parents)] == before
    return report, root / "pairs"


def test_every_reason_is_counted(outcome):
    report, _ = outcome
    expected = {}
    for name in CASES:
        expected[name.strip()] = expected.get(name.strip(), 0) + EXPECTED.get(name.strip(), 1)
    expected |= {"damaged_shard": 2, "no_metadata": 1}  # the second is cut in the JSON of its last sample
    assert report["dropped"] == expected
    assert report["read"] == report["kept"] + sum(report["dropped"].values())


def test_the_good_ones_stay_whole(outcome):
    report, output = outcome
    folder = open_pairs(output)
    captions = [pair.caption for pair in folder.pairs]
    expected = [caption(0).decode(), caption(64).decode(), caption(68).decode(), "Läsion der Lunge", "odd key",
                caption(76).decode(), caption(80).decode()]  # fmt: skip
    assert captions == expected
    assert report["fixed"] == {"encoding_guessed": 1, "wrong_extension": 1}
    for pair in folder.pairs:
        Image.open(io.BytesIO(read_image_bytes(folder.image_path(pair)))).verify()
    names = {member.name for tar in (output / "shards").glob("*.tar") for member in members(tar)}
    assert all(name.partition(".")[0].isalnum() for name in names)


def test_the_list_of_what_was_dropped(outcome):
    report, output = outcome
    rows = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    assert len(rows) == sum(report["dropped"].values())
    assert {row["reason"] for row in rows} == set(report["dropped"])


def test_a_manifest_that_was_tampered_with(outcome, tmp_path):
    """A manifest that was tampered with is refused before an image is read."""
    import pyarrow as pa

    from mmkd.data.table import map_table

    _, output = outcome
    table = map_table(output / "manifest.arrow")
    wrong = {"image": "../../etc/passwd@0+10", "split": "secret"}
    for column, value in wrong.items():
        place = table.column_names.index(column)
        changed = table.set_column(place, column, pa.array([value] * len(table)))
        folder = tmp_path / column
        folder.mkdir()
        with pa.OSFile(str(folder / "manifest.arrow"), "wb") as file, pa.ipc.new_file(file, changed.schema) as writer:
            writer.write_table(changed)
        with pytest.raises(ValueError, match="refused"):
            open_pairs(folder)
    (tmp_path / "split" / "manifest.arrow").write_bytes((output / "manifest.arrow").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete Arrow file"):
        open_pairs(tmp_path / "split")
