import functools
import logging
import sys

import huggingface_hub
import pytest
import torch
from PIL import Image

from mmkd.data.licenses import is_open
from mmkd.encoders import spec as specs
from mmkd.encoders.encoder import NoTokens
from mmkd.encoders.weights import fetch, read_state_dict
from mmkd.encoders.zoo import LOADERS, NEWER_TEACHERS, TEACHERS, find_spec, load_encoder, named_sources

FUNCTION = """
import numpy as np

class Mine:
    def encode_images(self, images):
        return np.array([[*image.getpixel((0, 0)), 1.0] for image in images])

    def encode_texts(self, texts):
        return np.array([[len(text), 0.0, 0.0, 2.0] for text in texts])

def build(device):
    return Mine()

def nothing(device):
    return {}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's own module in the working directory."""
    (tmp_path / "own_teacher.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_teacher", None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hub cache; returns a function that puts a repository's files into it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repository, files, kind="model"):
        folder = tmp_path / "hub" / f"{kind}s--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        for name in files:
            (snapshot / name).write_bytes(b"")
        return snapshot

    return put


def test_nine_teachers_by_the_authors_names():
    names = ["BMCA", "BiomedCLIP", "UniMedCLIP", "QuiltNet", "GenMedClip", "PLIP", "PUBMEDCLIP", "PMCCLIP", "MedCLIP"]
    assert list(TEACHERS) == names
    for name, row in TEACHERS.items():
        assert row.name == name and row.form in LOADERS and row.dim in (512, 768) and row.license
        assert find_spec(name.lower()) is row and find_spec(name.upper()) is row


def test_newer_teachers_state_what_is_unconfirmed():
    for name, row in NEWER_TEACHERS.items():
        assert row.name == name and row.form in LOADERS and find_spec(name.lower()) is row
        assert not row.trust_remote_code
        assert (row.dim and row.context and row.license != "not declared") or "unconfirmed" in row.note


def test_teachers_are_filtered_by_licence_and_gate():
    ungated, commercial = named_sources(["ungated"]), named_sources(["commercial"])
    assert not {"BMCA", "MedSigLIP"} & ungated.keys() and {"PLIP", "UniMedCLIP", "DermLIP"} <= ungated.keys()
    assert not {"PLIP", "UniMedCLIP", "DermLIP"} & commercial.keys() and {"BMCA", "BiomedCLIP"} <= commercial.keys()
    assert named_sources(["ungated", "commercial"]).keys() == ungated.keys() & commercial.keys()
    assert named_sources(["plip", "other=biomedclip", "commercial"]) == {"other": "biomedclip"}
    with pytest.raises(ValueError, match="none passes the filters; known: BMCA"):
        named_sources(["plip", "commercial"])


def test_unknown_names_answer_with_the_known_ones():
    with pytest.raises(ValueError, match=r"did you mean 'biomedclip'.*BMCA, BiomedCLIP, UniMedCLIP"):
        load_encoder("biomedclp")
    for path in ("./plip", "/nowhere/plip", "a/b/c", "mine.yaml"):
        with pytest.raises(FileNotFoundError, match=path):
            load_encoder(path)


def test_folders_say_what_they_are(tmp_path):
    with pytest.raises(ValueError, match=r"neither config.json nor open_clip_config.json"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert find_spec(str(tmp_path)).form == "hfclip"
    (tmp_path / "config.json").write_text('{"model_type": "mmkd_clip"}')
    assert find_spec(str(tmp_path)).form == "ours"
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert find_spec(str(tmp_path)).form == "openclip"


def test_a_teacher_of_ones_own_in_five_lines(mine):
    row = mine / "row.yaml"
    row.write_text("name: mine\nform: python\nweights: own_teacher.build\ndim: 4\nlicense: MIT\n")
    encoder = load_encoder(str(row))
    assert (encoder.name, encoder.dim) == ("mine", 4)
    torch.testing.assert_close(encoder.encode_texts(["aa"])[0], torch.tensor([2.0, 0.0, 0.0, 2.0]) / 8**0.5)
    assert encoder.encode_images([Image.new("RGB", (2, 2))])[0].tolist() == [0, 0, 0, 1]
    assert len(encoder.provenance["fingerprint"]) == 64
    assert load_encoder("python:own_teacher.build").dim == 4
    with pytest.raises(NoTokens, match=r"mine .* gives no sequences"):
        encoder.text_token_features(["a"])
    assert encoder.provenance["logit_scale"] is None
    encoder.encodes.image_tokens = lambda images: [[[1.0, 2.0]]] * len(images)
    encoder.encodes.text_tokens = lambda texts: ([[[len(text)], [0]] for text in texts], [[True, False]] * len(texts))
    assert encoder.image_token_features([Image.new("RGB", (2, 2))] * 3).shape == (3, 1, 2)
    tokens, mask = encoder.text_token_features(["aa", "b"])
    assert tokens.tolist() == [[[2], [0]], [[1], [0]]] and mask.tolist() == [[True, False]] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nform: opnclip\nweights: y\n", "did you mean 'openclip'"),
        ("name: x\nform: ours\nweights: y\nwieghts: z\n", "did you mean 'weights'"),
        ("form: ours\nweights: y\n", "--name is required"),
        ("name: a/b\nform: ours\nweights: y\n", "without slashes"),
        ("name: x\nform: ours\nweights: y\ndim: wide\n", "dim must be int"),
        ("[1]", "key: value"),
        ("name: x\nform: python\nweights: no_such.thing\n", "not module.function"),
        ("name: x\nform: python\nweights: own_teacher.absent\n", "not module.function"),
        ("name: x\nform: python\nweights: own_teacher.nothing\n", "dict without encode_images"),
        ("name: x\nform: python\nweights: own_teacher.build\ndim: 9\n", "expected|dim 9"),
    ],
)
def test_rows_that_cannot_work(mine, text, said):
    (mine / "row.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_encoder(str(mine / "row.yaml")).encode_texts(["a"])


def test_offline_without_weights_says_what_to_do(cache):
    with pytest.raises(FileNotFoundError, match=r"vinid/plip.*`hf download vinid/plip"):
        load_encoder("PLIP")
    with pytest.raises(FileNotFoundError, match=r"gated: request access at https://huggingface.co/BIOMEDICA"):
        load_encoder("BMCA")
    with pytest.raises(FileNotFoundError, match=r"--repo-type dataset"):
        load_encoder("PMCCLIP")
    with pytest.raises(FileNotFoundError, match="owner/name"):
        fetch("no hub id", ["config.json"])


def test_the_hub_cache_is_enough_offline(cache):
    snapshot = cache("owner/model", ["config.json", "pytorch_model.bin"])
    assert fetch("owner/model", ["config.json"], ["model.safetensors", "pytorch_model.bin"]) == snapshot
    with pytest.raises(FileNotFoundError, match="holds none of other"):
        fetch("owner/model", ["config.json"], ["other.bin"])


def test_the_commit_that_was_read_is_recorded(cache, mine):
    snapshot = cache("owner/model", ["weights.bin"])
    row = specs.TeacherSpec("x", "ours", "owner/model", revision="main")
    unknown = {"preprocessing": "", "tokenizer": "", "context": 0, "pooling": "", "logit_scale": None}
    describe = functools.partial(specs.describe, row, **unknown)
    assert describe([snapshot / "weights.bin"])["revision"] == "0" * 40
    (mine / "weights.bin").write_bytes(b"")
    assert describe([mine / "weights.bin"])["revision"] == "main"


def test_licenses_are_said_once_and_loudly(mine, caplog, monkeypatch):
    monkeypatch.setattr(specs, "_announced", set())
    (mine / "row.yaml").write_text("name: mine\nform: python\nweights: own_teacher.build\nlicense: CC BY-NC 4.0\n")
    with caplog.at_level(logging.WARNING):
        load_encoder(str(mine / "row.yaml"))
        load_encoder(str(mine / "row.yaml"))
    assert [record.getMessage().startswith("LICENSE of teacher mine: CC BY-NC") for record in caplog.records] == [True]


def test_which_licenses_are_open():
    assert all(map(is_open, ["MIT", "Apache-2.0", "BSD (the code's)", "CC BY 4.0", "own model"]))
    assert not any(map(is_open, ["CC BY-NC 4.0", "cc-by-nc-4.0", "not declared", "", "research only"]))
    restricted = [name for name, row in TEACHERS.items() if not is_open(row.license)]
    assert restricted == ["UniMedCLIP", "PLIP", "PMCCLIP"]


def test_named_sources(tmp_path):
    (tmp_path / "ct mri").mkdir()
    (tmp_path / "ct mri" / "config.json").write_text('{"model_type": "mmkd_clip"}')
    folder = str(tmp_path / "ct mri")
    assert named_sources(["plip", folder, f"other={folder}"]) == {"PLIP": "plip", "ct-mri": folder, "other": folder}
    for sources, said in (([], "no teacher"), (["plip", "PLIP=x"], "two teachers"), (["=x"], "NAME=SOURCE")):
        with pytest.raises(ValueError, match=said):
            named_sources(sources)


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"nonsense", "it is text"),
        (b"e", "it is text"),
        (b"<!DOCTYPE html><html>404</html>", "a web page.* download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*`git lfs pull`"),
        (b"PK\x03\x04 not a zip", "truncated, damaged or of another kind"),
        (b"\x80\x04\x95\x00\x00", "truncated, damaged or of another kind"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: cannot be read as weights: .*{said}") as caught:
        read_state_dict(tmp_path / name)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_in_a_weight_file_is_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"state_dict": {"a": Payload()}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"it holds \S*exec, which only running its code would restore") as caught:
        read_state_dict(tmp_path / "weights.pt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
