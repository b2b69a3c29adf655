"""Lists of collections: every spelling of a CSV is read, a needed column that is missing is named."""

import json

import pytest

from mmkd.curation.captions import caption_from_facts, clean_text
from mmkd.curation.labels import read_rows

HEADER = "file,modality,label,caption,group,split\n"


def rows_of(tmp_path, content):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "labels.csv").write_bytes(data)
    return read_rows(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        'file,caption,group\na.png,"x, y",1\nb.png,"two\nlines",\n',
        '\ufefffile,caption,group\r\na.png,"x, y",1\r\nb.png,"two\nlines",\r\n',
        'File ; CAPTION; Group\na.png;x, y;1\nb.png;"two\nlines";\n',
        'file\tcaption\tgroup\na.png\tx, y\t1\nb.png\t"two\nlines"\n',
        '\n\nid,file,caption,group,site\n7,a.png,"x, y",1,hand\n8,b.png,"two\nlines",,\n',
    ],
)
def test_spellings_of_csv(tmp_path, content):
    first, second = rows_of(tmp_path, content)
    assert (first.file, first.caption, first.group, first.malformed) == ("a.png", "x, y", "1", False)
    assert (second.file, second.caption.splitlines(), second.group) == ("b.png", ["two", "lines"], "")


def test_code_pages_nul_and_backslashes(tmp_path):
    assert rows_of(tmp_path, "file,caption\na.png,Läsion\n".encode("cp1252"))[0].caption == "Läsion"
    assert (
        rows_of(tmp_path, "file,caption\nimages\\a.png,x\0y\n")[0]
        == rows_of(tmp_path, "file,caption\nimages/a.png,xy\n")[0]
    )


def test_utf16_as_spreadsheets_write_it(tmp_path):
    assert rows_of(tmp_path, "file\tcaption\na.png\tLäsion\n".encode("utf-16"))[0].caption == "Läsion"


def test_marks_of_empty_cells_are_empty(tmp_path):
    row = rows_of(tmp_path, HEADER + "a.png,NaN,None,nan,<NA>,#N/A\n")[0]
    assert (row.modality, row.label, row.caption, row.group, row.split) == ("", "None", "", "", "")


def test_unquoted_commas_are_seen(tmp_path):
    rows = rows_of(tmp_path, "file,caption,group\na.png,one, two,g\nb.png,one,g,,\n")
    assert [row.malformed for row in rows] == [True, False]


def test_very_long_captions_are_read(tmp_path):
    assert len(rows_of(tmp_path, "file,caption\na.png," + "word " * 100_000 + "\n")[0].caption.split()) == 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "name,caption\n",
            "has the columns name, caption; needed are file and at least one of caption, label, modality",
        ),
        ("file,group\na,b\n", "needed are file"),
        ("", "has the columns"),
        ("file,label,label\na,b,c\n", "label more than once"),
        (HEADER, "lists no images"),
        ('file,label\na.png,"x\ny"\nb.png,"x\nc.png,y\n', r"line 4 opens a quote"),
        ("\x01\x02\rjunk\nmore\n", r"has the columns [^\n\r]*; needed"),
    ],
)
def test_errors_name_what_is_needed(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, content)


def test_folders_that_are_no_collection(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_rows(tmp_path / "nowhere")
    (tmp_path / "table.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"neither labels\.csv nor meta\.jsonl \(found: table\.csv\)"):
        read_rows(tmp_path)


def test_published_rows_carry_what_the_sidecar_says(tmp_path):
    sample = {"folderid": "f", "id": "1", "imgpath": "features/f/1/x.jpg", "txt": "c", "available_clips": ["PLIP"]}
    (tmp_path / "meta.jsonl").write_text(json.dumps(sample) + "\n" + json.dumps({**sample, "id": "2"}) + "\n")
    sidecar = tmp_path / "features" / "f" / "1" / "x.json"
    sidecar.parent.mkdir(parents=True)
    facts = {"article_license": "CC BY", "article_accession_id": "PMC1", "image_secondary_label": ["endoscopy"]}
    sidecar.write_text(json.dumps(facts))
    row = read_rows(tmp_path)[0]
    assert (row.id, row.license, row.group, row.modality, row.teachers) == (
        "1",
        "CC BY",
        "PMC1",
        "endoscopy",
        ("PLIP",),
    )
    for broken in ("{", "[]", '{"image_secondary_label": "endoscopy"}'):
        sidecar.write_text(broken)
        row = read_rows(tmp_path)[0]
        assert (row.caption, row.group) == ("c", "1")
    (tmp_path / "meta.jsonl").write_text((json.dumps(sample) + "\n") * 2)
    with pytest.raises(ValueError, match="twice"):
        read_rows(tmp_path)


def test_captions_state_the_facts_and_no_more():
    sentences = {caption_from_facts("polyp", "endoscopy", str(key)) for key in range(100)}
    assert len(sentences) >= 4
    assert all("polyp" in sentence.lower() and "endoscopy" in sentence.lower() for sentence in sentences)
    assert caption_from_facts("polyp", "endoscopy", "7") == caption_from_facts("polyp", "endoscopy", "7")
    assert "unknown" not in caption_from_facts("polyp", "unknown", "1").lower()
    assert caption_from_facts("CT", "ct", "1").lower().count("ct") == 1
    assert "OCT" in caption_from_facts("", "OCT", "1")
    assert caption_from_facts("", "unknown", "1") == caption_from_facts("", "", "1") == ""
    assert caption_from_facts("{modality}", "CT", "1").count("{modality}") == 1


def test_clean_text():
    assert clean_text(" a\n\tb \x00\x07 e\u0301 日本 \u00a0🙂 ") == "a b é 日本 🙂"
