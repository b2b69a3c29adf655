"""Every training config and recipe on a few pictures, through the functions that the commands call."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import in_group
from safetensors.torch import load_file
from transformers import BertConfig, BertTokenizer, CLIPImageProcessorPil, CLIPVisionConfig

import mmkd.distillation.options
import mmkd.train.align
import mmkd.train.configs
import mmkd.train.distill
import mmkd.train.pipeline
import mmkd.train.pretrain
from mmkd.alignment import shards
from mmkd.alignment.aligner import Aligner
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.command.settings import parse
from mmkd.data.features.index import fingerprints_of
from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import hold_out_split, open_pairs, write_manifest
from mmkd.data.provenance import teachers_file, teachers_of
from mmkd.data.table import Pair
from mmkd.distillation.heads import TeacherHeads
from mmkd.training.batches import JoinedBatches, StoredBatches
from mmkd.training.settings import BatchSettings
from modeling_mmkd import MMKDClipConfig, MMKDClipModel, MMKDClipProcessor

CONFIGS = Path(mmkd.train.configs.__file__).parent
RECIPES = {"pretrain": mmkd.train.pretrain, "align": mmkd.train.align, "distill": mmkd.train.distill}
SETTINGS = {
    "pretrain": mmkd.train.pretrain.PretrainSettings,
    "align": mmkd.train.align.AlignSettings,
    "distill": mmkd.train.distill.DistillSettings,
}
PAIRS, DIM = 12, 16
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY = ["--epochs", "1", "--batch_size", "4", "--workers", "0", "--quiet"]


def make_student(folder, dim=DIM):
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnop")]
    vocabulary = {word: number for number, word in enumerate(words)}
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **SMALL)
    text = BertConfig(vocab_size=len(words), max_position_embeddings=64, **SMALL)
    MMKDClipModel(MMKDClipConfig(vision_config=vision, text_config=text, projection_dim=dim)).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=32)
    MMKDClipProcessor(CLIPImageProcessorPil(**sides), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs of random pictures, features of three teachers of two widths, and a tiny student."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    pairs = []
    (root / "pairs" / "images").mkdir(parents=True)
    for k in range(PAIRS + 2):
        pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pairs" / "images" / f"{k}.png")
        split = "train" if k < PAIRS else "validation"
        modality = ("ct", "mri")[k % 2]
        pairs.append(
            Pair(f"p{k}", f"{k}.png", f"{modality} of case {chr(97 + k)}", modality, group=f"g{k // 2}", split=split)
        )
    write_manifest(root / "pairs", pairs)
    for name, width in {"one": DIM, "two": DIM, "three": 24}.items():
        writer = FeatureWriter(root / "features" / name, name)
        features = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(2, PAIRS + 2, width))), dim=-1)
        writer.add([pair.id for pair in pairs], features[0].float(), features[1].float())
        writer.finish({"license": f"licence of {name}"})
    make_student(root / "student")
    align(root / "aligned", root, "--dim", DIM)
    return root


def call(recipe, *arguments):
    settings = parse(SETTINGS[recipe], [str(argument) for argument in arguments])
    RECIPES[recipe].main(settings)
    return settings


def align(output, world, *more):
    return call(
        "align", "--pairs", world / "pairs", "--features", world / "features", "--output", output, "--quiet", *more
    )


def distill(output, world, *more):
    inputs = [argument for name in ("pairs", "features", "aligned") for argument in (f"--{name}", world / name)]
    return call("distill", *inputs, "--model", world / "student", "--output", output, *TINY, *more)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def overrides(recipe, world, output):
    """What replaces the folders and sizes of a config, and nothing else."""
    common = {
        "output": output,
        "pairs": world / "pairs",
        "max_steps": 2,
        "batch_size": 4,
        "quiet": "true",
    }
    if recipe != "align":
        common["workers"] = 0
    own = {
        "pretrain": {"model": world / "student"},
        "align": {"features": world / "features", "dim": DIM},
        "distill": {name: world / name for name in ("features", "aligned")} | {"model": world / "student"},
    }[recipe]
    return [text for key, value in (common | own).items() for text in (f"--{key}", value)]


@pytest.mark.parametrize("name", ["pretrain", "pretrain_paper", "align", "distill", "distill_paper", "distill_base"])
def test_every_config_opens_with_its_commands_and_runs(tmp_path, world, name):
    path, recipe = CONFIGS / f"{name}.yaml", name.partition("_")[0]
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Before: ") for line in comment)
    assert f"# Run:    accelerate launch train/{recipe}.py --config train/configs/{name}.yaml" in comment
    call(recipe, "--config", path, *overrides(recipe, world, tmp_path / "out"))
    saved = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    given = yaml.safe_load(path.read_text())
    for key in ("learning_rate", "warmup_steps", "precision", "aligner", "recipe", "losses"):
        if key in given:
            assert given[key] == (saved[key] if key != "losses" else {name: saved[key][name] for name in given[key]})
    if recipe != "align":
        assert len(log(tmp_path / "out")) == 2


def test_stages_take_their_settings_of_the_paper_s_pipeline(tmp_path):
    path = CONFIGS / "pipeline_paper.yaml"
    given, base = yaml.safe_load(path.read_text()), yaml.safe_load((CONFIGS / "distill_base.yaml").read_text())
    settings = parse(mmkd.train.pipeline.PipelineSettings, ["--config", str(path)])
    assert settings.teachers == list(teachers_file()["paper"]) and settings.eval["suite"] == "paper58"
    stages = {name: values for name, values in given.items() if isinstance(values, dict)}
    assert set(stages) == {"curate", "pretrain", "extract", "align", "distill", "eval"}
    for name, values in stages.items():
        module = importlib.import_module(f"mmkd.train.{name}")
        (tmp_path / "stage.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(SystemExit) as ended:
            parse(getattr(module, f"{name.title()}Settings"), ["--config", str(tmp_path / "stage.yaml"), "--check"])
        assert ended.value.code == 0, name
    assert given["distill"] == {k: v for k, v in base.items() if k not in ("pairs", "features", "model", "output")}
    run: dict[str, dict] = {}
    stages = SimpleNamespace(check=lambda: None, record=tmp_path / "stages.json")
    stages.run = lambda recipe, name, output, values: run.update({name: values})
    mmkd.train.pipeline.run_stages(settings, stages)  # without pairs of a test split, as the suite is evaluated
    control = ["own towers", "control", "choice of the control"]
    assert list(run) == [*mmkd.train.pipeline.STAGES[:7], *control, "eval", "report"]
    assert run["eval"]["pairs"] is run["report"]["pairs"] is None and run["eval"]["suite"] == "paper58"
    assert run["curate"]["validation_share"] > 0 and run["distill"]["best_metric"], "a split to choose by"


@pytest.mark.parametrize("name", ["mmkd-clip-tiny", "mmkd-clip-mobile"])
def test_a_named_size_is_trained_from_random_weights(world, tmp_path, name):
    if name == "mmkd-clip-mobile":
        pytest.importorskip("timm")
    arguments = ["--pairs", world / "pairs", "--preset", name, "--text", "random:tiny", "--output", tmp_path / "out"]
    call("pretrain", *arguments, *TINY, "--max_steps", 2, "--learning_rate", 1e-3)
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in log(tmp_path / "out"))
    model, processor = (
        MMKDClipModel.from_pretrained(tmp_path / "out"),
        MMKDClipProcessor.from_pretrained(tmp_path / "out"),
    )
    expected = MMKDClipConfig.from_preset(name)
    assert model.config.projection_dim == expected.projection_dim
    for own, given in (
        (model.config.vision_config, expected.vision_config),
        (model.config.text_config, expected.text_config),
    ):
        for key in ("hidden_size", "num_hidden_layers", "architecture"):
            assert getattr(own, key, None) == getattr(given, key, None), key
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert told["stage"] == "pretrain" and told["started_from"] == [], "nothing is started from but chance"


def test_pretrained_folder_loads_and_has_learned(tmp_path, world):
    call("pretrain", "--pairs", world / "pairs", "--model", world / "student", "--output", tmp_path / "out", *TINY)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", "settings.yaml", "log.jsonl"}
    model = MMKDClipModel.from_pretrained(tmp_path / "out")
    assert MMKDClipProcessor.from_pretrained(tmp_path / "out").tokenizer.model_max_length == 32
    before = tensors(world / "student")
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > len(before) / 2
    assert [line["step"] for line in log(tmp_path / "out")] == [1, 2, 3]
    assert not (tmp_path / "out.partial").exists()


def test_evaluation_chooses_the_weights_and_needs_a_split(tmp_path, world):
    common = ["--pairs", world / "pairs", "--model", world / "student", *TINY, "--validate_every", 1]
    call("pretrain", *common, "--best_metric", "loss", "--ema_decay", 0.5, "--output", tmp_path / "out")
    assert all(0 <= line["validation_mean_recall"] <= 1 for line in log(tmp_path / "out"))
    write_manifest(tmp_path / "pairs", [Pair(f"p{k}", f"{k}.png", "x") for k in range(4)], world / "pairs" / "images")
    with pytest.raises(ValueError, match=r"no pairs in split 'validation'.*--hold_out 0.01.*--validate_every null"):
        call("pretrain", *common, "--pairs", tmp_path / "pairs", "--output", tmp_path / "none")
    with pytest.raises(ValueError, match=r"has a validation split.*leave --hold_out 0.5 out"):
        call("pretrain", *common, "--hold_out", 0.5, "--output", tmp_path / "none")


def test_the_best_of_the_authors_folder_by_a_share_that_is_held_out(tmp_path, shared_data):
    folder = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    make_student(tmp_path / "student", dim=512)
    inputs = [text for name in ("pairs", "features", "aligned") for text in (f"--{name}", folder)]
    settings = ["--recipe", "paper", "--hold_out", 0.4, "--validate_every", 1, "--best_metric", "mean_recall"]
    call("distill", *inputs, "--model", tmp_path / "student", "--output", tmp_path / "out", *TINY, *settings)
    assert all(0 <= line["validation_mean_recall"] <= 1 for line in log(tmp_path / "out"))
    whole = open_pairs(folder, "train")
    train, held_out = hold_out_split(whole, 0.4)
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["data"]["pairs"] == len(train.pairs)
    assert sorted(pair.id for pair in [*train.pairs, *held_out.pairs]) == sorted(pair.id for pair in whole.pairs)


def test_what_is_held_out_are_whole_groups_whatever_else_there_is(tmp_path):
    pairs = [Pair(f"p{k}", f"{k}.png", "x", group=f"g{k // 3}") for k in range(900)]
    sides = []
    for some in (pairs, pairs[::2]):
        write_manifest(tmp_path / str(len(some)), some)
        train, held_out = hold_out_split(open_pairs(tmp_path / str(len(some)), "train"), 0.2)
        sides.append(({pair.id for pair in train.pairs}, {pair.id for pair in held_out.pairs}))
        assert not {pair.group for pair in train.pairs} & {pair.group for pair in held_out.pairs}
        assert 0.14 < len(held_out.pairs) / len(some) < 0.26
    assert sides[1][1] < sides[0][1] and sides[1][0] < sides[0][0]
    with pytest.raises(ValueError, match=r"--hold_out 1e-05 takes 0 of the 900 training pairs"):
        hold_out_split(open_pairs(tmp_path / "900", "train"), 0.00001)


def test_attention_is_chosen_or_refused(tmp_path, world):
    common = ["--pairs", world / "pairs", "--model", world / "student", *TINY]
    for name in ("eager", "sdpa"):
        call("pretrain", *common, "--attention", name, "--output", tmp_path / name)
    eager, sdpa = tensors(tmp_path / "eager"), tensors(tmp_path / "sdpa")
    for name, tensor in eager.items():
        torch.testing.assert_close(tensor, sdpa[name], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="flash_attention_2 needs a GPU"):
        call("pretrain", *common, "--attention", "flash_attention_2", "--output", tmp_path / "flash")


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_compiled_towers_train_as_they_do_uncompiled(tmp_path, world, monkeypatch):
    """Traced and differentiated as for inductor, whose kernels alone are left out: they take minutes."""
    real, compiled = torch.nn.Module.compile, []

    def without_kernels(module, **options):
        compiled.append(type(module).__name__)
        real(module, backend="aot_eager", **options)

    common = ["--pairs", world / "pairs", "--model", world / "student", *TINY, "--learning_rate", 1e-3]
    call("pretrain", *common, "--output", tmp_path / "plain")
    monkeypatch.setattr(torch.nn.Module, "compile", without_kernels)
    call("pretrain", *common, "--output", tmp_path / "compiled", "--compile")
    assert compiled == ["CLIPVisionModel", "BertModel"]
    for ours, theirs in zip(log(tmp_path / "compiled"), log(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    plain, found = tensors(tmp_path / "plain"), tensors(tmp_path / "compiled")
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


def test_frozen_parts_stay(tmp_path, world):
    call(
        "pretrain", "--pairs", world / "pairs", "--model", world / "student", "--output", tmp_path / "out",
        "--freeze", "vision_model,text_model[:1]", "--gradient_checkpointing", *TINY,
    )  # fmt: skip
    before, after = tensors(world / "student"), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("vision_model.", "text_model.embeddings.")) for name in changed)
    assert any(name.startswith("text_model.") for name in changed)
    assert "visual_projection.weight" in changed


def test_gradient_checkpointing_changes_nothing(tmp_path, world):
    for name, more in {"plain": [], "checkpointed": ["--gradient_checkpointing"]}.items():
        distill(tmp_path / name, world, *more)
    plain, checkpointed = tensors(tmp_path / "plain"), tensors(tmp_path / "checkpointed")
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, checkpointed[name], atol=1e-6, rtol=0)


def test_selection_of_pairs(world):
    pairs = [Pair(f"p{k}", "x", "y", ("ct", "mri")[k % 2], group=f"g{k // 2}") for k in range(40)]
    select = mmkd.train.pretrain.select
    assert {pair.modality for pair in select(pairs, ["ct"], [], None)} == {"ct"}
    parts = [{pair.id for pair in select(pairs, [], [], f"{share}/3")} for share in (1, 2, 3)]
    assert set.union(*parts) == {pair.id for pair in pairs}
    assert sum(map(len, parts)) == 40
    groups = [{pair.group for pair in pairs if pair.id in part} for part in parts]
    assert not groups[0] & groups[1]
    with pytest.raises(ValueError, match=r"--modalities cta.*did you mean 'ct'"):
        select(pairs, ["cta"], [], None)
    with pytest.raises(ValueError, match="--part 4/3"):
        select(pairs, [], [], "4/3")


def test_aligned_stores_and_report(tmp_path, world):
    assert {row["license"] for row in teachers_of([world / "aligned"])} >= {"licence of one", "licence of three"}
    features = TeacherFeatures.open(world / "aligned")
    assert features.dims == {"one": DIM, "three": DIM, "two": DIM}
    assert len(features.ids) == PAIRS + 2
    report = json.loads((world / "aligned" / "report.json").read_text())
    assert report["teachers"] == {"one": PAIRS, "two": PAIRS, "three": PAIRS}
    after, before = report["after"]["same_sample_cross_teacher"], report["before"]["same_sample_cross_teacher"]
    assert after["image"] > before["image"]


def test_an_alignment_is_the_same_bytes_however_tasks_are_divided_and_where_a_killed_run_stopped(
    tmp_path, world, monkeypatch
):
    monkeypatch.setattr(shards, "SHARD_SIZE", 5)
    monkeypatch.setattr(shards, "SHORTEST_RUN", 4)
    align(tmp_path / "one", world, "--dim", DIM)
    align(tmp_path / "two", world, "--dim", DIM, "--workers", 2, "--tasks", 3)
    with monkeypatch.context() as killed:
        killed.setattr(Aligner, "save", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            align(tmp_path / "three", world, "--dim", DIM)
    align(tmp_path / "three", world, "--dim", DIM)
    expected, *others = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.[!y]*")}
        for name in ("one", "two", "three")
    )
    assert others == [expected, expected] and len([name for name in expected if name.match("one/shard-*")]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]
    one, cut = (TeacherFeatures.open(folder) for folder in (world / "aligned", tmp_path / "one"))
    assert list(one.ids) == list(cut.ids)
    for name, found in one.lookup(one.ids[:]).items():
        for key, value in cut.lookup(one.ids[:])[name].items():
            torch.testing.assert_close(value, found[key], atol=2e-3, rtol=2e-3)  # stored in fp16


def test_alignment_is_fitted_on_training_pairs_alone(tmp_path, world):
    """Other features of the held-out pairs leave the aligner as it was."""
    changed = tmp_path / "features"
    for name, store in ((n, TeacherFeatures.open(world / "features", [n])) for n in ("one", "two", "three")):
        found = store.lookup(store.ids)[name]
        for side in ("image", "text"):
            found[side][PAIRS:] = 7.0
        writer = FeatureWriter(changed / name, name)
        writer.add(list(store.ids), found["image"], found["text"])
        writer.finish({})
    call("align", "--pairs", world / "pairs", "--features", changed, "--output", tmp_path / "out", "--dim", DIM)
    for name, tensor in ProcrustesAligner.load(tmp_path / "out").tensors().items():
        assert torch.equal(tensor, ProcrustesAligner.load(world / "aligned").tensors()[name])


def test_autoencoder_aligns_through_the_loop(tmp_path, world):
    align(tmp_path / "out", world, "--aligner", "autoencoder", "--dim", DIM, "--epochs", 3, "--batch_size", 4)
    assert len(log(tmp_path / "out")) == 9
    assert TeacherFeatures.open(tmp_path / "out").dims["three"] == DIM


def test_distilling_twice_gives_the_same_bytes(tmp_path, world):
    for name in ("one", "two"):
        distill(tmp_path / name, world, "--losses.feature", "1", "--losses.interactive", "1")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert {"task", "affinity", "feature", "interactive", "relational"} <= set(log(tmp_path / "one")[0])
    told = json.loads((tmp_path / "one" / "provenance.json").read_text())
    assert {row["teacher"]: row["license"] for row in told["teachers"]} == {
        name: f"licence of {name}" for name in ("one", "two", "three")
    }
    assert (told["stage"], told["data"]["pairs"]) == ("distill", PAIRS)
    assert told["started_from"] == [{"weights": "student", "license": "not stated"}]


def test_heads_read_the_trunk_that_is_trained(tmp_path, world):
    heads = ("--losses.heads", 1, "--head_form", "angular", "--head_input", "trunk", "--max_steps", 2)
    distill(tmp_path / "out", world, *heads, "--micro_batch_size", 2, "--validate_every", 1, "--task_form", "sigmoid")
    loaded = TeacherHeads.load(tmp_path / "out")
    assert loaded.dims == {"image": SMALL["hidden_size"], "text": SMALL["hidden_size"]}
    model = MMKDClipModel.from_pretrained(tmp_path / "out")
    pooled = model.vision_model(torch.zeros(1, 3, 32, 32)).pooler_output
    assert loaded.emulate("three", pooled, "image").shape == (1, 24)
    with pytest.raises(ValueError, match="both are frozen"):
        distill(tmp_path / "frozen", world, *heads, "--freeze", "vision_model,text_model")
    off = [text for name in ("task", "affinity", "relational") for text in (f"--losses.{name}", 0)]
    with pytest.raises(ValueError, match="give another loss a weight"):
        distill(tmp_path / "alone", world, *heads, *off)


def test_images_without_captions_join_every_batch(tmp_path, world):
    more = ("--max_steps", 2, "--teacher_temperature", "spread", "--losses.affinity", 0)
    alone, joined = tmp_path / "alone", tmp_path / "joined"
    distill(alone, world, *more)
    distill(joined, world, *more, "--images", world / "pairs")
    first, both = log(alone)[0], log(joined)[0]
    assert first["task"] == both["task"]  # the same captioned pairs, whose losses see no other image
    assert first["relational"] != both["relational"]
    after, without = tensors(joined), tensors(alone)
    assert any(not torch.equal(after[name], without[name]) for name in without)
    with pytest.raises(ValueError, match="needs a weight of feature or relational or heads"):
        distill(tmp_path / "none", world, "--losses.relational", 0, "--images", world / "pairs")


def test_joined_batches_number_images_apart_and_resume_where_they_stopped(world):
    features = {"teachers": TeacherFeatures.open(world / "features")}
    pairs = open_pairs(world / "pairs", "train").pairs
    order = BatchSettings(batch_size=4, seed=1)
    own = {"pooled_images": torch.arange(PAIRS)[:, None].float(), "pooled_texts": torch.zeros(PAIRS, 2)}
    images = {name: tensor[:5] for name, tensor in own.items()}
    batches = JoinedBatches(
        StoredBatches(pairs, order, own, features), StoredBatches(pairs[:5], order, images, features), PAIRS
    )
    whole = [batch for epoch in range(3) for batch in batches.epoch(epoch)]
    assert len(whole) == 3 * len(batches) == 9
    resumed = [*batches.epoch(1, 2), *batches.epoch(2)]
    for one, other in zip(whole[5:], resumed, strict=True):
        assert one["ids"] == other["ids"]
    for batch in whole:
        assert batch["captioned"] == 4
        assert (batch["index"][4:] >= PAIRS).all()
        assert len(batch["teachers"]["one"]["image"]) == len(batch["ids"]) == 8


def test_recipe_paper_is_a_set_of_named_settings(tmp_path, world):
    paper = distill(tmp_path / "paper", world, "--recipe", "paper")
    assert (paper.target, paper.target_norm, paper.feature_form) == ("random", "stored", "squared")
    assert paper.interactive_scale == "constant"
    assert {name: weight for name, weight in paper.losses.items() if weight} == {
        "task": 1,
        "feature": 50,
        "interactive": 1,
    }
    spelled = ["--target", "random", "--target_norm", "stored", "--feature_form", "squared"]
    weights = ["--losses.task", "1", "--losses.feature", "50", "--losses.interactive", "1"]
    weights += ["--losses.affinity", "0", "--losses.relational", "0"]
    distill(tmp_path / "spelled", world, *spelled, "--interactive_scale", "constant", *weights)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("paper", "spelled")]
    assert files[0] == files[1]


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_distilling_from_the_authors_folder_as_it_is(tmp_path, shared_data, recipe):
    folder = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    student = make_student(tmp_path / "student", dim=512)
    inputs = [text for name in ("pairs", "features", "aligned") for text in (f"--{name}", folder)]
    output = tmp_path / "out"
    call("distill", *inputs, "--model", student, "--output", output, *TINY, "--recipe", recipe)
    assert len(log(output)) == 2
    assert {"task", {"default": "affinity", "paper": "feature"}[recipe]} < set(log(output)[0])


def test_a_caption_changed_since_extraction_is_refused_before_training(tmp_path, world):
    """Aligned features, too, know the captions of the raw ones."""
    pairs = list(open_pairs(world / "pairs").pairs)
    for name in ("one", "two"):
        features = torch.nn.functional.normalize(torch.randn(2, len(pairs), DIM), dim=-1)
        writer = FeatureWriter(tmp_path / "features" / name, name)
        writer.add([pair.id for pair in pairs], features[0], features[1], fingerprints_of(pairs))
        writer.finish({})
    pair_folder = ["--pairs", world / "pairs", "--features", tmp_path / "features"]
    call("align", *pair_folder, "--output", tmp_path / "aligned", "--dim", DIM, "--quiet")
    for number, place in ((2, "train"), (PAIRS + 1, "validation")):
        now = [dataclasses.replace(p, caption="rewritten") if k == number else p for k, p in enumerate(pairs)]
        write_manifest(tmp_path / place, now, world / "pairs" / "images")
        common = ["--pairs", tmp_path / place, "--model", world / "student", "--output", tmp_path / "out", *TINY]
        for more in (["--features", tmp_path / "features"], ["--aligned", tmp_path / "aligned", "--recipe", "paper"]):
            with pytest.raises(ValueError, match=rf"one: 1 captions; two: 1 captions; first p{number}\)"):
                call("distill", *common, *more, "--validate_every", 5)
    assert not (tmp_path / "out.partial").exists()


def test_what_changed_under_an_unfinished_run_is_refused_and_nothing_is_lost(tmp_path, world, monkeypatch):
    for folder in ("pairs", "features"):
        shutil.copytree(world / folder, tmp_path / folder)
    inputs = ["--pairs", tmp_path / "pairs", "--features", tmp_path / "features", "--model", world / "student"]
    common = [*inputs, "--output", tmp_path / "out", *TINY, "--checkpoint_every", 1]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mmkd.train.distill, "save_student", killed)
        call("distill", *common)
    shard = tmp_path / "features" / "one" / "shard-00000.safetensors"
    before = list(open_pairs(tmp_path / "pairs").pairs)
    changed = [dataclasses.replace(p, caption=p.caption.replace("ct of case a", "ct of case z")) for p in before]
    write_manifest(tmp_path / "pairs", changed)
    with pytest.raises(ValueError, match=r"unfinished run on other data: pairs_sha256 was \w+, is now"):
        call("distill", *common)
    write_manifest(tmp_path / "pairs", before)
    shard.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"one/shard-00000\.safetensors is missing; extract again with `mmkd extract`"
    ):
        call("distill", *common)
    (tmp_path / "moved").rename(shard)
    store = tmp_path / "features" / "one"
    shutil.move(store, tmp_path / "moved")
    again = FeatureWriter(store, "one")
    again.add([f"p{k}" for k in range(PAIRS + 2)], torch.ones(PAIRS + 2, DIM), torch.ones(PAIRS + 2, DIM))
    again.finish({})
    with pytest.raises(ValueError, match=r"unfinished run on other data: teachers was .*'one': '16 wide, store"):
        call("distill", *common)
    shutil.rmtree(store)
    shutil.move(tmp_path / "moved", store)
    call("distill", *common)
    assert [line["step"] for line in log(tmp_path / "out")] == [1, 2, 3]


def test_mixed_widths_are_refused_before_training(tmp_path, world):
    with pytest.raises(ValueError, match=r"student's features \(16\).*three 24.*mmkd align --dim 16"):
        distill(tmp_path / "out", world, "--losses.feature", "1", "--aligned", world / "features")
    assert not list(tmp_path.iterdir())


def test_missing_inputs_are_said_before_training(tmp_path, world):
    with pytest.raises(ValueError, match=r"--losses\.affinity needs --features FOLDER"):
        distill(tmp_path / "out", world, "--features", "none")
    with pytest.raises(FileNotFoundError, match=r"--model \./nowhere"):
        distill(tmp_path / "out", world, "--model", "./nowhere")
    with pytest.raises(ValueError, match="unknown loss 'tsk'"):
        distill(tmp_path / "out", world, "--losses.tsk", "1")
    assert not list(tmp_path.iterdir())


def test_two_processes_give_the_model_of_one(tmp_path, world):
    common = [
        "--pairs", world / "pairs", "--features", world / "features", "--aligned", world / "aligned",
        "--model", world / "student", "--epochs", 7, "--batch_size", 4, "--workers", 0, "--quiet",
        "--learning_rate", 1e-3, "--losses.interactive", 1, "--losses.feature", 1,
        "--target", "random",
    ]  # fmt: skip
    call("distill", *common, "--output", tmp_path / "one")
    in_group("-m", "mmkd.train.distill", *common, "--output", tmp_path / "two")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-5, rtol=0)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "distillation.md"
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {k}" for k in range(len(EXAMPLES))])
def test_examples_of_the_page_on_distillation_run(tmp_path, world, example):
    given = yaml.safe_load(example)
    folders = {"features": world / "features", "aligned": world / "aligned", "standardizer": tmp_path / "standard"}
    folders["images"] = world / "pairs"
    if "standardizer" in given:
        align(tmp_path / "standard", world, "--aligner", "phi-s")
    (tmp_path / "distill.yaml").write_text(example)
    replaced = [text for key in given if key in folders for text in (f"--{key}", folders[key])]
    settings = call(
        "distill", "--config", tmp_path / "distill.yaml", "--pairs", world / "pairs", "--model", world / "student",
        "--output", tmp_path / "out", *replaced, *TINY,
    )  # fmt: skip
    wanted = given.get("losses") or mmkd.distillation.options.RECIPES[given["recipe"]]["losses"]
    assert {name: weight for name, weight in settings.losses.items() if weight} == wanted
    assert wanted.keys() <= log(tmp_path / "out")[-1].keys()
    assert (tmp_path / "out" / "teacher_heads.safetensors").is_file() == ("heads" in wanted)
    MMKDClipModel.from_pretrained(tmp_path / "out")
