"""Which files a user names, and which of them are opened."""

import pytest
from PIL import Image

from mmkd.serving.images import OUTSIDE, find_images, read_image


@pytest.fixture
def folder(tmp_path):
    """A folder of images, others and links, beside a file that is none of it."""
    root = tmp_path / "scans"
    (root / "b" / "deep").mkdir(parents=True)
    for name in ("z.png", "b/a.PNG", "b/deep/IM0001", "b/x.dcm", "b/volume.nii.gz"):
        Image.new("RGB", (16, 16)).save(root / name, format="PNG")
    for name in ("labels.csv", "b/notes.txt", ".hidden.png", "DICOMDIR"):
        (root / name).write_text("no image")
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inner.png").symlink_to(root / "z.png")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "o.png")
    (root / "linked").symlink_to(tmp_path / "other")
    return root


INSIDE = ["b/a.PNG", "b/deep/IM0001", "b/volume.nii.gz", "b/x.dcm", "inner.png", "link.png", "z.png"]


def test_a_folder_gives_all_that_may_be_images_in_order(folder):
    files = find_images([folder])
    assert [file.id for file in files] == INSIDE
    assert {file.id: file.reason for file in files if file.reason} == {"link.png": OUTSIDE}
    assert read_image(files[5]) == OUTSIDE and read_image(files[0]).size == (16, 16)


def test_patterns_files_and_several_folders(folder, tmp_path):
    assert [file.id for file in find_images([f"{folder}/**/*.dcm"])] == ["b/x.dcm"]
    assert [file.id for file in find_images([folder / "z.png"])] == ["z.png"]
    both = find_images([folder / "b", tmp_path / "other", folder / "b" / "a.PNG"])
    assert len(both) == 5
    assert {file.id for file in both} == {"other/o.png", *(f"scans/{id}" for id in INSIDE[:4])}
    assert find_images([f"{folder}/li*.png"])[0].reason == OUTSIDE
    assert [file.reason for file in find_images([f"{folder}/linked/*"])] == [""]  # a link that the user names


def test_a_name_with_magic_characters_is_a_name_first(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a[1], b.png")
    assert [file.id for file in find_images([tmp_path / "a[1], b.png"])] == ["a[1], b.png"]


@pytest.mark.parametrize("source", ["https://host/a.png", "s3://bucket/a.png", "file:///etc/passwd", "HTTP://x"])
def test_urls_are_refused(source):
    with pytest.raises(ValueError, match="is a URL; nothing is downloaded"):
        find_images([source])


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("x")
    for source, error, text in (
        ("none.png", FileNotFoundError, "no such file or folder"),
        ("*.png", FileNotFoundError, "matches no file"),
        ("empty", ValueError, "holds no file that may be an image"),
    ):
        with pytest.raises(error, match=text):
            find_images([tmp_path / source])
    with pytest.raises(ValueError, match="no image is named"):
        find_images([])
