"""One bad sample does not end a curation, however bad, and does not make it slow."""

import io
import json
import tarfile
import time

import pytest
from PIL import Image

from mmkd.command.settings import parse
from mmkd.curation.captions import clean_caption, scrub_identifiers, split_panels
from mmkd.data.folder import open_pairs
from mmkd.files import read_json
from mmkd.train import curate

TEXT, LICENSE = b"a chest X-ray of the lung", b'{"license": "CC BY", "modality": "X-ray"}'
LONG = {
    "braces": "\\alpha" + "{" * 300 + "}" * 300,
    "blanks": "<b>a" + " " * 100_000 + "b</b>",
    "entities": "&" * 100_000,
    "formulas": "$x_" * 10_000,
    "documents": "\\documentclass" * 5_000,
    "tags": "<a " * 30_000,
    "brackets": "<b>" + "( " * 50_000,
    "panels": "(a) " * 20_000,
    "addresses": "a." * 50_000 + "@",
    "dates": "1-" * 50_000,
    "names": "Mr " * 30_000,
    "telephones": "+1 " * 50_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_no_caption_takes_more_than_linear_time(kind):
    started = time.monotonic()
    cleaned = clean_caption(LONG[kind])
    scrub_identifiers(cleaned)
    split_panels(cleaned)
    assert time.monotonic() - started < 30  # quadratic patterns take minutes


def curated(source, output, *options):
    command = ["--source", str(source), "--output", str(output), "--quiet", *options]
    curate.main(parse(curate.CurateSettings, command))
    return open_pairs(output), read_json(output / "report.json")


def picture(number):
    buffer = io.BytesIO()
    Image.effect_noise((40 + number, 40), 90).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def test_bad_rows_of_a_list_are_counted(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rows = []
    for number, bad in enumerate(("caption", "label", "group", "license", "source", "id", "modality", "")):
        (source / f"{number}.png").write_bytes(picture(number))
        row = {"image": f"{number}.png", "caption": f"a chest X-ray of the lung, number {number}", "id": f"p{number}"}
        rows.append(row | ({bad: "half a character \ud800"} if bad else {}))
    (source / "loop.png").symlink_to("loop.png")
    rows.append({"image": "loop.png", "caption": "an image that is a link to itself", "id": "loop"})
    rows.append({"image": f"{'x' * 300}.png", "caption": "an image with a name beyond the file system's", "id": "long"})
    rows.append({"image": "0.png\0", "caption": "an image with a null character", "id": "null"})
    (source / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder, report = curated(source, tmp_path / "pairs")
    assert len(folder.pairs) >= 1 and {"7.png"} <= {pair.caption[-1] + ".png" for pair in folder.pairs}
    for pair in folder.pairs:
        "".join((pair.id, pair.caption, pair.label, pair.group, pair.license, pair.source, pair.modality)).encode()
    assert sum(report["dropped"].values()) + len(folder.pairs) == len(rows)


@pytest.mark.parametrize("size", ["-1536", "-1", "99999999999999999999", "1e3", ""])
def test_a_tar_with_a_forged_size_ends_at_it(tmp_path, size):
    good, forged = tmp_path / "source" / "0.tar", tmp_path / "source" / "1.tar"
    good.parent.mkdir()
    for path, headers in ((good, {}), (forged, {"size": size})):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in (("a.png", picture(path is good)), ("a.txt", TEXT), ("a.json", LICENSE)):
                entry = tarfile.TarInfo(name)
                entry.size, entry.pax_headers = len(data), headers
                archive.addfile(entry, io.BytesIO(data))
    started = time.monotonic()
    folder, _ = curated(good.parent, tmp_path / "pairs", "--preset", "any")
    assert len(folder.pairs) >= 1
    assert time.monotonic() - started < 60
