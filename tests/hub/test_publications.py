"""What is made of a folder before anything is uploaded: kinds, cards, scores, and one clear error for a bad one."""

import base64
import io
import json
import os
import runpy
import shutil
import tarfile

import pytest
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image

from mmkd.command.settings import parse
from mmkd.data.features.store import FeatureStore, meta_sha256
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.table import Pair
from mmkd.hub.push import PushSettings, check_repo, make_publication
from mmkd.publishing.card import license_conflict, recipe_yaml
from mmkd.publishing.model import parse_size
from mmkd.train import eval as evaluation


@pytest.fixture
def publication(tmp_path_factory):
    """Stages a folder with the options of a command line."""

    def stage(folder, *arguments):
        settings = parse(PushSettings, [str(folder), "--repo", "user/name", *map(str, arguments)])
        return make_publication(settings, tmp_path_factory.mktemp("staged"))

    return stage


def test_scores_stand_in_table_and_index_with_their_intervals(published_student, results, publication):
    card = ModelCard(publication(published_student, "--results", results).card)
    summary = json.loads((results / "summary.json").read_text())
    task = summary["tasks"]["zeroshot-modality"]
    metric = task["rows"]["ours"]["metrics"]["balanced_accuracy"]
    found = {(row.task_name, row.metric_type): row for row in card.data.eval_results}
    entry = found[task["title"], "balanced_accuracy"]
    assert entry.metric_value == round(metric["value"], 4)
    assert entry.metric_args["low"] == round(metric["low"], 4) and entry.metric_args["high"] == round(metric["high"], 4)
    assert entry.metric_args["images"] == 48 and entry.metric_args["confidence"] == 0.95
    assert (entry.dataset_name, entry.dataset_split) == ("held-out", "test")
    assert f"| {metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}] | 0.333 |" in card.text
    assert len({row.task_type for row in card.data.eval_results}) == 2
    assert str(results.parent) not in card.content
    assert "shared with other splits: 0; identical images shared with other splits: 0." in card.content


def test_scores_on_datasets_bear_their_names(published_student, tmp_path, publication):
    for number in range(12):
        name = tmp_path / ("cat", "dog")[number % 2] / f"{number}.png"
        name.parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 24), (20 * number, 90, 40)).save(name)
    manifest = {"id": "pets", "task": "classification", "modality": "X-ray", "license": "CC0-1.0", "split": "held-out"}
    manifest |= {"source": {"imagefolder": str(tmp_path)}, "classes": ["cat", "dog"]}
    (tmp_path / "pets.yaml").write_text(json.dumps(manifest))
    arguments = ["--encoders", f"ours={published_student}", "--datasets", str(tmp_path / "pets.yaml"), "--quiet"]
    arguments += ["--output", str(tmp_path / "results"), "--kinds", "zeroshot", "--replicates", "100"]
    evaluation.main(parse(evaluation.EvalSettings, arguments))
    card = ModelCard(publication(published_student, "--results", tmp_path / "results").card)
    assert {(row.dataset_name, row.dataset_split) for row in card.data.eval_results} == {("pets", "test")}
    assert "On the test split of `pets`; brackets are" in card.text
    assert str(tmp_path) not in card.content


def test_results_of_other_weights_are_refused(published_student, results, tmp_path, publication):
    other = shutil.copytree(published_student, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"are of other weights \(ours\) than the model"):
        publication(other, "--results", results)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ValueError, "holds nothing; expected a model"),
        ({"notes.txt": "x"}, ValueError, "holds notes.txt; expected"),
        ({"summary.json": "{}"}, ValueError, "push the evaluated model with --results"),
        ({"meta.jsonl": "{}"}, ValueError, "which only the authors publish"),
        ({"adapter_config.json": "{}"}, ValueError, "has no peft_type"),
        ({"config.json": '{"model_type": "clip"}'}, ValueError, "a model of type 'clip'"),
        ({"config.json": '{"model_type": "mmkd_clip"}'}, FileNotFoundError, "has no model.safetensors; is the folder"),
        (
            {"config.json": '{"model_type": "mmkd_clip"}', "a.bin": ""},
            FileNotFoundError,
            "pickled weights are not read",
        ),
        ({"config.json": "{"}, ValueError, "is not valid JSON"),
        ({"manifest.arrow": "{}"}, ValueError, "not a complete Arrow file"),
    ],
)
def test_a_folder_that_holds_nothing_to_push_is_told_so(tmp_path, files, error, message, publication):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        publication(tmp_path)


def test_unfinished_and_missing_folders(tmp_path, publication):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        publication(tmp_path / "nowhere")
    (tmp_path / "student.partial").mkdir()
    with pytest.raises(ValueError, match="is an unfinished run"):
        publication(tmp_path / "student.partial")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer"),
        ("*processor_config.json", None, "has no image processor"),
        ("model.safetensors", b"{}", "is damaged"),
        ("settings.yaml", b"a: [", "is not valid YAML"),
        ("provenance.json", b"[]", "must hold a JSON object"),
    ],
)
def test_a_model_with_a_broken_file_names_it(published_student, tmp_path, name, change, message, publication):
    folder = shutil.copytree(published_student, tmp_path / "student")
    for path in folder.glob(name):
        path.unlink()
    if change is not None:
        (folder / name).write_bytes(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        publication(folder)


def test_options_of_another_kind_are_refused(published_student, published_pairs, results, publication):
    with pytest.raises(ValueError, match="--results belongs to a model"):
        publication(published_pairs, "--results", results)
    with pytest.raises(ValueError, match="--images belongs to pairs"):
        publication(published_student, "--images", "true")
    with pytest.raises(FileNotFoundError, match=r"holds no summary.json"):
        publication(published_student, "--results", published_pairs)


def test_images_in_archives_come_out_of_them(tmp_path, publication):
    tiny = io.BytesIO()
    Image.new("RGB", (4, 4)).save(tiny, "PNG")
    (tmp_path / "images" / "shards").mkdir(parents=True)
    with tarfile.open(tmp_path / "images" / "shards" / "000000.tar", "w") as tar:
        member = tarfile.TarInfo("secret-name.png")
        member.size = len(tiny.getvalue())
        tar.addfile(member, io.BytesIO(tiny.getvalue()))
    image = f"shards/000000.tar@512+{member.size}"
    write_manifest(tmp_path, [Pair("p", image, "caption", license="CC0")])
    staged = publication(tmp_path).staged
    published = open_pairs(staged)
    assert published.image_path(published.pairs[0]).read_bytes() == tiny.getvalue()
    assert [path.name for path in (staged / "images").iterdir()] == ["000000.tar"]
    assert b"secret-name" not in (staged / "images/000000.tar").read_bytes()
    loaded = load_dataset("webdataset", data_files=str(staged / "images/*.tar"), split="train", streaming=True)
    (row,) = loaded
    assert (row["png"].size, row["txt"], row["json"]["license"]) == ((4, 4), "caption", "CC0")


def test_datasets_reads_published_images_of_several_forms(tmp_path, publication):
    """It requires the same suffix of all images, and takes what follows the first dot of a name for a column."""
    (tmp_path / "images").mkdir()
    forms = {"a.1": "PNG", "b": "JPEG", "c": "BMP"}
    for name, form in forms.items():
        Image.new("RGB", (4, 6)).save(tmp_path / "images" / f"{name}.{form.lower()}")
    write_manifest(tmp_path, [Pair(k, f"{k}.{form.lower()}", f"of {k}", license="CC0") for k, form in forms.items()])
    staged = publication(tmp_path).staged
    rows = list(load_dataset("webdataset", data_files=str(staged / "images/*.tar"), split="train", streaming=True))
    assert [(row["png"].size, row["txt"], row["json"]["id"]) for row in rows] == [
        ((4, 6), f"of {name}", name) for name in forms
    ]
    (tmp_path / "images" / "b.jpeg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpeg.*push with --images false"):
        publication(tmp_path)


def test_a_store_without_a_shard_is_refused(published_features, tmp_path, publication):
    folder = shutil.copytree(published_features, tmp_path / "features")
    (folder / "PLIP" / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.safetensors is missing"):
        publication(folder)


def test_code_that_a_folder_lacks_comes_from_the_package(published_student, tmp_path, publication):
    folder = shutil.copytree(published_student, tmp_path / "student")
    (folder / "modeling_mmkd.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    made = publication(folder)
    assert (
        json.loads((made.staged / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_mmkd.MMKDClipModel"
    )
    assert made.sizes()["modeling_mmkd.py"] > 1000
    assert "auto_map" not in json.loads((folder / "config.json").read_text()), "the folder itself is not changed"


def test_large_files_are_linked_and_nothing_is_a_symlink(published_student, publication):
    staged = publication(published_student).staged
    assert (staged / "model.safetensors").samefile(published_student / "model.safetensors")
    assert not any(path.is_symlink() for path in staged.rglob("*"))


def test_links_out_of_the_folder_are_not_published(published_student, publication, tmp_path):
    folder = shutil.copytree(published_student, tmp_path / "student")
    (tmp_path / "private.txt").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(ValueError, match=r"vocab\.txt is a link out of the folder"):
        publication(folder)
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "mri.png").symlink_to(tmp_path / "private.txt")
    with pytest.raises(ValueError, match=r"mri\.png is a link out of the folder"):
        publication(published_student, "--examples", shown)
    cached = tmp_path / "cache" / "snapshots" / "main"
    cached.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    (folder / "vocab.txt").unlink()
    for number, file in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        blob = tmp_path / "cache" / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (cached / file.name).symlink_to(blob)
    assert (publication(cached).staged / "model.safetensors").is_file()


def test_without_hard_links_files_are_copied(published_student, publication, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    weights = publication(published_student).staged / "model.safetensors"
    assert weights.read_bytes() == (published_student / "model.safetensors").read_bytes()
    assert not weights.samefile(published_student / "model.safetensors")


def test_text_of_files_cannot_act_in_a_card(published_student, tmp_path, publication):
    folder = shutil.copytree(published_student, tmp_path / "student")
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["teachers"][0]["teacher"] = "a|b <script>x</script> [y](http://z) {{ 7 * 7 }}"
    (folder / "provenance.json").write_text(json.dumps(provenance))
    card = publication(folder).card
    assert "| a&#124;b &lt;script&gt;x&lt;/script&gt; &#91;y](http://z) {{ 7 &#42; 7 }} | vinid/plip |" in card
    assert "<script" not in card


def test_settings_tell_no_folder_of_the_machine(tmp_path):
    lines = ["pairs: data/screened", "model: owner/model", "vision: timm:vit/home/me/weights", "teachers: [./a/b]"]
    (tmp_path / "settings.yaml").write_text("\n".join([*lines, "text: /home/me/bert", "seed: 3"]))
    told = recipe_yaml(tmp_path)
    assert told.splitlines() == [
        "pairs: screened",
        "model: owner/model",
        "vision: timm:weights",
        "teachers:",
        "- b",
        "text: bert",
        "seed: 3",
    ]


def test_no_published_file_names_a_folder_of_the_machine(
    published_student, published_adapter, published_features, published_pairs, results, tmp_path, publication
):
    """Whatever a folder holds: paths in configurations, of a user's own teachers, of tokenizers and of adapters."""
    student = shutil.copytree(published_student, tmp_path / "student")
    rewrite(student / "config.json", lambda values: [part.update(_name_or_path="/secret/a") for part in
            (values, values["vision_config"], values["text_config"])])  # fmt: skip
    rewrite(student / "tokenizer_config.json", lambda values: values.update(name_or_path="/secret/b", is_local=True))
    rewrite(
        student / "provenance.json",
        lambda values: values["teachers"].append(
            {"teacher": "Ours", "weights": "/secret/c/ours", "license": "internal"}
        ),
    )
    adapter = shutil.copytree(published_adapter, tmp_path / "adapter")
    rewrite(adapter / "adapter_config.json", lambda values: values.update(base_model_name_or_path="~/secret/model"))
    features = shutil.copytree(published_features, tmp_path / "features")
    rewrite(features / "PLIP" / "meta.json", seal_with_folder)
    for folder, *arguments in (
        (student, "--results", results), (adapter, "--base_model", "user/model"), (features,), (published_pairs,),
    ):  # fmt: skip
        made = publication(folder, *arguments)
        for path in made.staged.rglob("*"):
            if path.is_file():
                held = path.read_bytes()
                for told in (b"secret", str(tmp_path).encode(), str(folder.parent).encode()):
                    assert told not in held, f"{path.name} holds {told!r}"
    assert FeatureStore(publication(features).staged / "PLIP").meta["provenance"]["weights"] == "plip"
    made = publication(student)
    assert "is_local" not in (made.staged / "tokenizer_config.json").read_text()
    assert "| Ours | ours | internal |" in made.card, "a folder is given by its last name"


def seal_with_folder(meta):
    meta["provenance"]["weights"] = "/secret/plip"
    meta["sha256"] = meta_sha256({key: value for key, value in meta.items() if key != "sha256"})


def rewrite(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_model_has_what_its_clients_look_for(published_student, results, tmp_path, publication):
    for name in ("chest radiograph", "brain_MRI"):
        Image.new("L", (20, 20), 90).save(tmp_path / f"{name}.png")
    made = publication(published_student, "--results", results, "--examples", tmp_path)
    wanted = {"modules.json", "sentence_bert_config.json", "1_Normalize/config.json", "preprocessor_config.json"}
    assert wanted | {"handler.py", "atlas.json", "results.svg", "examples/brain_MRI.png"} <= set(made.sizes())
    card = ModelCard(made.card)
    assert card.data.widget[1]["src"].endswith("user/name/resolve/main/examples/chest%20radiograph.png")
    assert card.data.widget[0]["candidate_labels"] == "brain MRI, chest radiograph"
    assert "](results.svg)" in card.text and (made.staged / "results.svg").read_text().lstrip().startswith("<?xml")
    assert made.card.index("## How to use it") < made.card.index("## Evaluation") < made.card.index("<details>")
    atlas = json.loads((made.staged / "atlas.json").read_text())
    assert atlas["Model"]["Link"] == "https://huggingface.co/user/name" and "PLIP" in atlas["Model"]["Summary"]
    with pytest.raises(FileNotFoundError, match="holds no PNG or JPEG"):
        publication(published_student, "--examples", published_student)
    with pytest.raises(FileNotFoundError, match="holds no export"):
        publication(published_student, "--onnx", tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_handler_of_inference_endpoints_classifies(published_student, publication, tmp_path):
    staged = publication(published_student).staged
    handler = runpy.run_path(str(staged / "handler.py"))["EndpointHandler"](str(staged))
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(buffer, "PNG")
    request = {
        "inputs": base64.b64encode(buffer.getvalue()).decode(),
        "parameters": {"candidate_labels": ["ct", "mri"]},
    }
    found = handler(request)
    assert {row["label"] for row in found} == {"ct", "mri"} and sum(row["score"] for row in found) == pytest.approx(1)
    with pytest.raises(ValueError, match="candidate_labels"):
        handler({"inputs": "x"})


def test_a_licence_that_offers_more_than_was_given_is_warned_of():
    parts = [("teacher A", "CC BY-NC 4.0"), ("teacher B", "MIT")]
    assert "offers more" in license_conflict(parts, "apache-2.0")
    assert license_conflict(parts, "cc-by-nc-4.0") is None
    assert license_conflict([("teacher B", "MIT")], "apache-2.0") is None
    assert "choose one with --license" in license_conflict(parts, None)


@pytest.mark.parametrize("repo", ["name", "a/b/c", "user/", "/name", "user/na me", "user/" + "x" * 200, "user/a..b"])
def test_malformed_names_are_refused(repo):
    with pytest.raises(ValueError, match="--repo"):
        check_repo(repo)


def test_sizes():
    assert parse_size("1.5gb") == 1_500_000_000
    for wrong in ("5", "GB", "-1GB", "0MB"):
        with pytest.raises(ValueError, match="a size such as 5GB"):
            parse_size(wrong)
