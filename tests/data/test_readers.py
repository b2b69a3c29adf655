"""Readers of every form: spellings of CSV, JSON lines by ranges, cells of Parquet, members of tars, names of files."""

import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkd.data.readers import (
    ParquetCells,
    find_file,
    is_empty,
    parquet_columns,
    parquet_rows,
    parse_hub_address,
    read_csv,
)
from mmkd.files import is_inside, json_lines, parse_json_object


def table_of(tmp_path, content):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "labels.csv").write_bytes(data)
    return read_csv(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    "content",
    [
        'file,caption,group\na.png,"x, y",1\nb.png,"two\nlines",\n',
        '\ufefffile,caption,group\r\na.png,"x, y",1\r\nb.png,"two\nlines",\r\n',
        ' file ; caption; group\na.png;x, y;1\nb.png;"two\nlines";\n',
        'file\tcaption\tgroup\na.png\tx, y\t1\nb.png\t"two\nlines"\n',
        '\n\nfile,caption,group\na.png,"x, y",1\n\nb.png,"two\nlines",\n',
        'sep=;\r\nfile;caption;group\na.png;x, y;1\nb.png;"two\nlines";\n',
        '"sep=|"\nfile|caption|group\na.png|x, y|1\nb.png|"two\nlines"|\n',
    ],
)
def test_spellings_of_csv(tmp_path, content):
    table = table_of(tmp_path, content)
    assert table.columns == ("file", "caption", "group")
    first, second = table.rows
    assert (first.cells, first.extra, first.missing) == ({"file": "a.png", "caption": "x, y", "group": "1"}, (), 0)
    assert (second.cells["caption"].splitlines(), second.cells["group"]) == (["two", "lines"], "")


def test_encodings_and_nul(tmp_path):
    for encoding in ("cp1252", "utf-16", "utf-8"):
        assert (
            table_of(tmp_path, "file\tcaption\na.png\tLäsion\n".encode(encoding)).rows[0].cells["caption"] == "Läsion"
        )
    assert table_of(tmp_path, "file,caption\na.png,x\0y\n").rows[0].cells["caption"] == "xy"


def test_rows_that_do_not_fit_and_lines(tmp_path):
    table = table_of(tmp_path, 'file,caption,group\na.png,one, two,g\nb.png,"two\nlines",,\nc.png\n')
    assert [(row.line, row.extra, row.missing) for row in table.rows] == [(2, ("g",), 0), (4, ("",), 0), (5, (), 2)]
    assert table_of(tmp_path, "").columns == ()
    assert len(table_of(tmp_path, "a,b\nx," + "word " * 100_000 + "\n").rows[0].cells["b"].split()) == 100_000
    with pytest.raises(ValueError, match="line 4 opens a quote"):
        table_of(tmp_path, 'file,label\na.png,"x\ny"\nb.png,"x\nc.png,y\n')


def test_marks_of_empty_cells():
    assert all(map(is_empty, ("", " ", "NaN", "None", "<NA>", "#N/A", "n/a", "-", "null")))
    assert not any(map(is_empty, ("0", "no", "nothing", "nantes", "--")))


def test_json_lines_by_ranges(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n[3]\n{"a"')
    lines = list(json_lines(path))
    assert [line for line, _ in lines] == [1, 3, 4, 5]
    assert [text for _, text in json_lines(path, 10, 19, line=3)] == [b'{"a": 2}\n']
    assert parse_json_object(lines[1][1], "a:3") == {"a": 2}
    with pytest.raises(TypeError, match="a:4 must hold a JSON object, not a list"):
        parse_json_object(lines[2][1], "a:4")
    for broken in (lines[3][1], b"[" * 100_000, b"\xff"):
        with pytest.raises(ValueError, match="a:5 is not JSON"):
            parse_json_object(broken, "a:5")


def test_parquet_rows_and_cells(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [b"%d" % n for n in range(7)], "text": [str(n) for n in range(7)]})
    pq.write_table(table, path, row_group_size=3)
    assert parquet_columns(path) == ["image", "text"]
    rows = list(parquet_rows(path, ["text"], batch_rows=2))
    assert [(group, row) for group, row, _ in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert [values for _, _, values in rows] == [{"text": str(n)} for n in range(7)]
    cells = ParquetCells()
    assert [cells.read(path, "image", group, row) for group, row, _ in rows] == [b"%d" % n for n in range(7)]
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="not a Parquet file"):
        list(parquet_rows(path))
    with pytest.raises(FileNotFoundError):
        list(parquet_rows(tmp_path / "none.parquet"))


def test_names_of_files(tmp_path):
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    composed, decomposed = (unicodedata.normalize(form, "Läsion.png") for form in ("NFC", "NFD"))
    (root / "images" / decomposed).touch()
    (root / "b.png").touch()
    assert find_file(root, composed, ("", "images")) == root / "images" / decomposed
    assert find_file(root, "images\\" + decomposed) == root / "images" / decomposed
    assert find_file(root, "none.png", ("", "images")) == root / "none.png"
    (tmp_path / "secret.png").touch()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    assert [find_file(root, name) for name in ("../secret.png", "link.png", str(tmp_path / "secret.png"))] == [None] * 3
    assert not any(map(is_inside, ("../x", "/x", "a/../../x", "..\\x", "C:\\x", "", "a\0b")))


def test_addresses_of_the_hub():
    assert parse_hub_address("hf://datasets/a/b@main/c/d") == ("a/b", "main", "c/d")
    assert parse_hub_address("hf://datasets/a/b") == ("a/b", None, "")
    for wrong in ("hf://a/b", "hf://datasets/a", "hf://datasets/a//b", "hf://models/a/b"):
        with pytest.raises(ValueError, match="OWNER/NAME"):
            parse_hub_address(wrong)
