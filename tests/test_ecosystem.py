"""What transformers' users do with a model: pipelines, Trainer, devices, sharding, adapters, sentence-transformers."""

import pytest
import torch
from PIL import Image
from processes import in_another_process, in_group
from tiny_model import CONTEXT, save_tiny
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, Trainer, TrainingArguments, pipeline

from mmkd.student.folder import save_student
from modeling_mmkd import MMKDClipModel, MMKDClipProcessor, MMKDClipTextModelWithProjection

NOISE = Image.effect_noise((60, 44), 90).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(folder):
    return MMKDClipProcessor.from_pretrained(folder)


@pytest.fixture
def batch(processor):
    images = [Image.effect_noise((40, 50), 20 + 40 * k).convert("RGB") for k in range(4)]
    return dict(processor(images=images, text=["ct", "mri of the lung", "a lung", "ct of a b"], return_tensors="pt"))


@torch.no_grad()
def test_zero_shot_pipeline_cuts_labels_to_the_context(folder, processor):
    long = "lung " * 200
    classify = pipeline("zero-shot-image-classification", str(folder))
    found = {row["label"]: row["score"] for row in classify(NOISE, candidate_labels=["ct", long])}
    model = MMKDClipModel.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(NOISE, return_tensors="pt")
    texts = [f"This is a photo of {label}." for label in ("ct", long)]
    tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == CONTEXT
    expected = model(**pixels, **tokens).logits_per_image.softmax(dim=-1)[0]
    assert [found["ct"], found[long]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_zero_shot_pipeline_takes_a_model_in_half_precision_and_batches(folder):
    model = MMKDClipModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.logit_scale.dtype == torch.float32
    classify = pipeline(
        "zero-shot-image-classification", model, tokenizer=AutoTokenizer.from_pretrained(folder),
        image_processor=AutoImageProcessor.from_pretrained(folder),
    )  # fmt: skip
    found = classify([NOISE, NOISE], candidate_labels=["ct", "mri"], batch_size=2)
    assert [len(rows) for rows in found] == [2, 2]
    assert sum(row["score"] for row in found[0]) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_feature_pipelines_give_the_embeddings(folder, processor):
    model = MMKDClipModel.from_pretrained(folder)
    image = pipeline("image-feature-extraction", str(folder))(NOISE, return_tensors=True)
    pixels = AutoImageProcessor.from_pretrained(folder)(NOISE, return_tensors="pt")
    torch.testing.assert_close(image, model(**pixels).image_embeds)
    for text in ("ct of the lung", "lung " * 200):
        found = pipeline("feature-extraction", str(folder))(text, return_tensors=True)
        torch.testing.assert_close(found, model(**processor(text=[text], return_tensors="pt")).text_embeds)


def test_saved_again_from_the_package_a_folder_keeps_its_code(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    MMKDClipProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    modules = ("modeling", "processing")
    assert {path.name for path in tmp_path.glob("*.py")} == {f"{name}_mmkd.py" for name in modules}


def test_with_the_package_no_code_of_a_folder_runs(tmp_path):
    save_tiny(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.write_text("raise SystemExit('code of a checkpoint ran')\n")
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=True)) is MMKDClipModel
    assert type(MMKDClipProcessor.from_pretrained(tmp_path, trust_remote_code=True)) is MMKDClipProcessor
    pipeline("zero-shot-image-classification", str(tmp_path), trust_remote_code=True)


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 4

    def __getitem__(self, k):
        return {name: value[k] for name, value in self.batch.items()}


def with_loss(rows):
    return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "return_loss": True}


def test_trainer_trains_evaluates_and_resumes_what_it_saved(folder, tmp_path, batch):
    pytest.importorskip("accelerate")
    model = MMKDClipModel.from_pretrained(folder)
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=12, learning_rate=3e-3,
        report_to="none", remove_unused_columns=False, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, with_loss, train_dataset=Rows(batch), eval_dataset=Rows(batch))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predicted = trainer.predict(Rows(batch)).predictions
    assert all(getattr(part, "shape", (4,))[0] == 4 for part in predicted), "no tower's states are gathered"
    trainer.save_model(tmp_path / "saved")
    again = MMKDClipModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.logit_scale, model.logit_scale)


@pytest.mark.parametrize("attention", ["eager", {"vision_config": "sdpa", "text_config": "eager"}])
@torch.no_grad()
def test_attention_implementations_agree(folder, batch, attention):
    expected = MMKDClipModel.from_pretrained(folder, attn_implementation="sdpa")(**batch)
    model = MMKDClipModel.from_pretrained(folder, attn_implementation=attention)
    torch.testing.assert_close(model(**batch).logits_per_image, expected.logits_per_image, atol=1e-5, rtol=1e-5)
    assert model.text_model.config._attn_implementation == "eager"


@torch.no_grad()
def test_device_map_and_half_precision(folder, batch):
    pytest.importorskip("accelerate")
    expected = MMKDClipModel.from_pretrained(folder)(**batch).logits_per_image
    for device_map in ("auto", "cpu"):
        found = MMKDClipModel.from_pretrained(folder, device_map=device_map)(**batch).logits_per_image
        torch.testing.assert_close(found, expected)
    for dtype in (torch.bfloat16, torch.float16):
        found = MMKDClipModel.from_pretrained(folder, dtype=dtype)(**batch).logits_per_image
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.3, rtol=0)


@pytest.mark.filterwarnings("ignore:.*device_map keys do not match:UserWarning")  # of a bare parameter such as ours
@torch.no_grad()
def test_what_does_not_fit_in_memory_is_read_from_disk(folder, tmp_path, batch):
    pytest.importorskip("accelerate")
    expected = MMKDClipModel.from_pretrained(folder)(**batch)
    room = {"cpu": 120_000}  # bytes, about half of it
    model = MMKDClipModel.from_pretrained(folder, device_map="auto", max_memory=room, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    torch.testing.assert_close(model(**batch).logits_per_image, expected.logits_per_image)
    pooled = model.get_image_features(batch["pixel_values"], pooled_only=True)
    torch.testing.assert_close(pooled.pooler_output, expected.vision_model_output.pooler_output)
    assert pooled.last_hidden_state is not None, "parts of a layer are not called past what moves it"


@pytest.mark.parametrize("model_class", [MMKDClipModel, MMKDClipTextModelWithProjection])
def test_the_policies_that_shard_find_every_layer(folder, model_class):
    accelerate = pytest.importorskip("accelerate")
    model = model_class.from_pretrained(folder)
    layers = {name for name, part in model.named_modules() if type(part).__name__ in ("CLIPEncoderLayer", "BertLayer")}
    assert len(layers) == (4 if model_class is MMKDClipModel else 2)
    own = {"auto_wrap_policy": "transformer_based_wrap"}
    first = accelerate.FullyShardedDataParallelPlugin(fsdp_version=1, **own)
    first.set_auto_wrap_policy(model)
    second = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, **own)
    wraps = accelerate.utils.fsdp_utils.fsdp2_prepare_auto_wrap_policy(second, model)
    parts = dict(model.named_modules())
    found = {name for name, part in parts.items() if first.auto_wrap_policy(part, recurse=False, nonwrapped_numel=0)}
    assert layers <= found and found == {name for name, part in parts.items() if wraps(part)}


SHARDED = """
import os
import sys
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from modeling_mmkd import MMKDClipModel
accelerator = Accelerator()
# accelerate itself chooses it on GPUs alone; from here on all is its code
accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
)
model = MMKDClipModel.from_pretrained(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
model, optimizer = accelerator.prepare(model, optimizer)
wrapped = [type(part).__name__ for part in model.modules() if isinstance(part, FSDPModule)]
assert sum(name.endswith(("CLIPEncoderLayer", "BertLayer")) for name in wrapped) == 4, wrapped
assert type(model.logit_scale.data).__name__ == "DTensor" or hasattr(model.logit_scale, "placements")
batch = torch.load(sys.argv[2], weights_only=True)
losses = []
for _ in range(4):
    loss = model(**batch, return_loss=True).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
torch.distributed.fsdp.register_fsdp_forward_method(model, "get_image_features")
with torch.no_grad():
    pixels = batch["pixel_values"]
    whole, alone = (model.get_image_features(pixels, pooled_only=only).pooler_output for only in (False, True))
    assert torch.allclose(whole, alone, atol=1e-5)
if accelerator.is_main_process:
    torch.save(losses, sys.argv[2] + ".losses")
accelerator.end_training()
os._exit(0)  # shards keep gloo's threads beyond their group, and these may abort an interpreter that ends
"""


def test_fsdp_wraps_and_trains_to_the_same_losses(folder, tmp_path, batch):
    pytest.importorskip("accelerate")
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    torch.save(batch, tmp_path / "batch")
    in_group(script, folder, tmp_path / "batch")
    found = torch.load(tmp_path / "batch.losses", weights_only=True)
    model = MMKDClipModel.from_pretrained(folder)
    optimizer, expected = torch.optim.AdamW(model.parameters(), 3e-4), []
    for _ in range(4):
        loss = model(**batch, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_with_the_documented_targets(folder, tmp_path, batch, dora):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "query", "value", "visual_projection", "text_projection.fc1", "text_projection.fc2"]
    config = peft.LoraConfig(r=4, target_modules=targets, use_dora=dora, task_type="FEATURE_EXTRACTION")
    model = peft.get_peft_model(MMKDClipModel.from_pretrained(folder), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for part in ("vision_model", "text_model", "visual_projection", "text_projection"):
        assert any(part in name for name in trained), part
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for _ in range(5):
        losses.append(model(**batch, return_loss=True).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(MMKDClipModel.from_pretrained(folder), tmp_path).eval()
    with torch.no_grad():
        expected = model(**batch).logits_per_image
        torch.testing.assert_close(again(**batch).logits_per_image, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits_per_image, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.logit_scale, MMKDClipModel.from_pretrained(folder).logit_scale)


@torch.no_grad()
def test_sentence_transformers_gives_the_models_unit_vectors(folder, processor, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    save_student(tmp_path, MMKDClipModel.from_pretrained(folder), processor)
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    texts, images = ["ct of the lung", "mri"], [NOISE, Image.new("RGB", (40, 40), "gray")]
    expected = MMKDClipModel.from_pretrained(folder)(**processor(images=images, text=texts, return_tensors="pt"))
    words, found = (model.encode(items, convert_to_tensor=True) for items in (texts, images))
    torch.testing.assert_close(words, expected.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, expected.image_embeds, atol=1e-5, rtol=0)
    assert set(model.modalities) == {"text", "image"} and model.max_seq_length == CONTEXT
    hits = library.util.semantic_search(found, words, top_k=2)
    assert [len(row) for row in hits] == [2, 2] and hits[0][0]["score"] >= hits[0][1]["score"]


def test_sentence_transformers_reads_the_folder_without_this_package(folder, processor, tmp_path):
    pytest.importorskip("sentence_transformers")
    save_student(tmp_path / "student", MMKDClipModel.from_pretrained(folder), processor)
    code = """
from PIL import Image
from sentence_transformers import SentenceTransformer, util
encoder = SentenceTransformer(sys.argv[2], trust_remote_code=True, device="cpu")
texts = encoder.encode(["ct of the lung", "mri"], convert_to_tensor=True)
images = encoder.encode([Image.new("RGB", (40, 50))], convert_to_tensor=True)
print(len(util.semantic_search(images, texts)[0]), type(encoder[0].auto_model).__module__)
"""
    printed = in_another_process("modeling_mmkd,mmkd", code, tmp_path / "student", HF_MODULES_CACHE=str(tmp_path / "m"))
    assert printed.split()[0] == "2" and printed.split()[1].startswith("transformers_modules")
