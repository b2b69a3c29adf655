"""Training input: independent of process and worker counts, equal to the processor for evaluation."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, CLIPImageProcessorPil

from mmkd.data.features.lookup import TeacherFeatures
from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import open_pairs, write_manifest
from mmkd.data.images import UnreadableImageError, open_image
from mmkd.data.pixels import random_crop, read_pixels, to_tensor
from mmkd.data.table import Pair
from mmkd.student.embed import PixelStatistics, normalized_pixels
from mmkd.training.batches import PairBatches
from mmkd.training.dataset import Collate, GlobalBatchSampler, PairDataset, center_crop
from modeling_mmkd import MMKDClipProcessor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(40, 30), (31, 77), (64, 64), (33, 50), (200, 60), (20, 21), (90, 91), (37, 38), (120, 40), (45, 45)]


class WordProcessor:
    """The two parts of a processor that `Collate` uses; a word is a token."""

    image_processor = SimpleNamespace(image_mean=MEAN, image_std=STD)

    def __call__(self, text, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == ("longest", True, "pt")
        tokens = [[len(word) for word in caption.split()][:max_length] for caption in text]
        longest = max(map(len, tokens))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    pairs = []
    for number, (width, height) in enumerate(SIZES):
        name = f"{number}.jpg" if number % 2 else f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
        pairs.append(Pair(f"p{number}", name, "word " * (number + 1)))
    write_manifest(tmp_path, pairs)
    return open_pairs(tmp_path)


def test_every_rank_takes_its_slice_of_the_same_batches():
    whole = GlobalBatchSampler(26, 8, seed=3)
    for world_size in (2, 4, 8):
        ranks = [GlobalBatchSampler(26, 8, rank, world_size, seed=3) for rank in range(world_size)]
        for epoch in range(3):
            for sampler in (whole, *ranks):
                sampler.set_epoch(epoch)
            shares = zip(*ranks, strict=True)
            assert list(whole) == [list(chain(*share)) for share in shares]
            assert len(whole) == len(ranks[0]) == 3


def test_order_depends_on_seed_and_epoch_only():
    sampler = GlobalBatchSampler(26, 8, seed=3)
    first = list(sampler)
    assert sorted(chain(*first)) != list(chain(*first))
    assert len(set(chain(*first))) == 24
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(GlobalBatchSampler(26, 8, seed=4)) != first


def test_fewer_pairs_than_a_batch():
    assert sorted(chain(*GlobalBatchSampler(5, 8))) == [0, 1, 2, 3, 4]
    ranks = [list(GlobalBatchSampler(5, 8, rank, 2)) for rank in range(2)]
    assert [len(batch) for batches in ranks for batch in batches] == [2, 2]
    with pytest.raises(ValueError, match="1 pairs"):
        GlobalBatchSampler(1, 8, 0, 2)
    with pytest.raises(ValueError, match=r"--batch_size 8 cannot be shared out among 3 .*multiple of 3"):
        GlobalBatchSampler(20, 8, 0, 3)


def test_center_crop_equals_the_processor(folder):
    size = 32
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    dataset = PairDataset(folder, size, crop="center")
    batch = Collate(WordProcessor(), 77)([dataset[index] for index in range(len(dataset))])
    images = [Image.open(folder.image_path(pair)) for pair in folder.pairs]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    pixels = normalized_pixels(batch["pixel_values"], batch["pixel_statistics"])
    torch.testing.assert_close(pixels, expected[batch["index"]], atol=1e-5, rtol=0)


def test_center_crop_equals_the_authors(shared_data, golden):
    reference = np.load(golden / "preprocess.npz")
    for path in sorted((shared_data / "mmkd_clip_official" / "modality_examples").iterdir()):
        pixels = np.asarray(center_crop(open_image(path), 224)).transpose(2, 0, 1) / 255
        values = (pixels - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
        assert np.abs(values[:, ::8, ::8] - reference[path.name]).max() < 1e-5


def test_random_crop_depends_on_seed_epoch_and_index_only(folder):
    dataset = PairDataset(folder, 16, crop="random", seed=1)
    first = [dataset[index]["pixel_values"] for index in range(len(dataset))]
    again = [dataset[index]["pixel_values"] for index in reversed(range(len(dataset)))][::-1]
    assert all(map(torch.equal, first, again))
    dataset.set_epoch(1)
    for other in (dataset, PairDataset(folder, 16, crop="random", seed=2)):
        same = sum(map(torch.equal, first, [other[index]["pixel_values"] for index in range(len(other))]))
        assert same <= 5  # panoramas have one crop and the smallest images few


def test_workers_that_outlive_an_epoch_see_the_next(folder):
    dataset = PairDataset(folder, 16, crop="random", seed=1)
    sampler = GlobalBatchSampler(len(dataset), 5, seed=1)
    options = {"batch_sampler": sampler, "collate_fn": Collate(WordProcessor(), 77)}
    alone = torch.utils.data.DataLoader(dataset, **options)
    crowd = torch.utils.data.DataLoader(dataset, num_workers=2, persistent_workers=True, **options)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch)
        for one, other in zip(alone, crowd, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert one["ids"] == other["ids"]


def test_random_crop_takes_most_of_the_image():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (150, 1))).convert("RGB")
    generator = np.random.default_rng(0)
    for _ in range(50):
        pixels = random_crop(to_tensor(ramp), 32, generator).numpy()[0, 16].astype(int)
        assert pixels[-1] - pixels[0] > 0.75 * 200
        assert (np.diff(pixels) >= 0).all()
    panorama = random_crop(to_tensor(Image.new("RGB", (900, 100))), 32, generator)  # no draw fits
    assert panorama.shape == (3, 32, 32)


def test_large_jpeg_is_decoded_at_reduced_size_and_looks_the_same(tmp_path):
    (tmp_path / "images").mkdir()
    y, x = np.mgrid[0:1200, 0:1600]
    image = Image.fromarray(np.stack([255 * x / 1600, 255 * y / 1200, 255 * (x + y) / 2800], 2).astype(np.uint8))
    image.save(tmp_path / "images" / "a.jpg", quality=95)
    image.save(tmp_path / "images" / "b.png")
    write_manifest(tmp_path, [Pair("a", "a.jpg", "c"), Pair("b", "b.png", "c")])
    dataset = PairDataset(open_pairs(tmp_path), 64, crop="random", seed=0)
    full = random_crop(to_tensor(image), 64, np.random.default_rng([0, 0, 0]))
    assert (dataset[0]["pixel_values"].int() - full.int()).abs().max() <= 4
    assert read_pixels(tmp_path / "images" / "a.jpg", draft_side=128).shape == (3, 150, 200)
    assert read_pixels(tmp_path / "images" / "a.jpg", draft_side=151).shape == (3, 300, 400)
    assert read_pixels(tmp_path / "images" / "a.jpg").shape == (3, 1200, 1600)


def test_batch(folder):
    dataset = PairDataset(folder, 16, crop="center")
    batch = Collate(WordProcessor(), 4)([dataset[index] for index in (7, 0, 2)])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_statistics"] == PixelStatistics(MEAN, STD)
    assert batch["input_ids"].shape == (3, 4)
    assert batch["attention_mask"].sum(1).tolist() == batch["text_lengths"] == [4, 3, 1]
    assert batch["index"].tolist() == [7, 2, 0]
    assert batch["ids"] == ["p7", "p2", "p0"]
    assert "teachers" not in batch


def test_batch_with_the_model_s_own_processor(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=256)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    dataset = PairDataset(folder, 16, crop="center")
    items = [dataset[index] for index in (9, 1)]
    batch = Collate(MMKDClipProcessor(images, tokenizer), 8)(items)
    assert batch["input_ids"].tolist() == [[2, 5, 5, 5, 5, 5, 5, 3], [2, 5, 5, 3, 0, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [8, 4]
    assert Collate(MMKDClipProcessor(images, tokenizer), 8)(items[1:])["input_ids"].shape == (1, 4)


def test_screened_teachers_are_masked(folder, tmp_path):
    writer = FeatureWriter(tmp_path / "features" / "plip", "plip")
    writer.add(["p0", "p1", "p2"], torch.ones(3, 5), torch.ones(3, 5))
    writer.finish({})
    features = TeacherFeatures.open(tmp_path / "features")
    dataset = PairDataset(folder, 16, crop="center")
    items = [dataset[index] for index in range(4)]
    for item, teachers in zip(items, (None, ("plip", "bmca"), (), None), strict=True):
        item["teachers"] = teachers
    batch = Collate(WordProcessor(), 4, {"teachers": features})(items)
    assert dict(zip(batch["ids"], batch["teachers"]["plip"]["mask"].tolist(), strict=True)) == {
        "p0": True,
        "p1": True,
        "p2": False,
        "p3": False,
    }
    assert batch["teachers"]["plip"]["image"].shape == (4, 5)


def test_a_broken_image_is_named(folder):
    path = folder.image_path(folder.pairs[3])
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UnreadableImageError, match=r"3\.jpg.*corrupt"):
        PairDataset(folder, 16, crop="center")[3]
    with pytest.raises(ValueError, match="allowed: random, center"):
        PairDataset(folder, 16, crop="centre")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_error_from_any_process(folder, workers):
    folder.image_path(folder.pairs[3]).write_bytes(b"")
    dataset, sampler = PairDataset(folder, 16, crop="center"), GlobalBatchSampler(len(folder.pairs), 10)
    with pytest.raises(ValueError, match=r"^\S*3\.jpg .*\(unsupported\)$"):
        list(PairBatches(dataset, sampler, Collate(WordProcessor(), 8), workers).epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_assemble_micro_batches_of_the_same_batch(folder, workers):
    dataset, sampler = PairDataset(folder, 16, crop="center"), GlobalBatchSampler(len(folder.pairs), 10, seed=1)
    whole, cut = (
        list(PairBatches(dataset, sampler, Collate(WordProcessor(), 8), workers, size).epoch(1)) for size in (None, 4)
    )
    for one, other in zip(whole, cut, strict=True):
        pieces = other["micro_batches"]
        assert [len(piece["ids"]) for piece in pieces] == [4, 4, 2]
        assert not {"pixel_values", "input_ids"} & other.keys()  # they never are one piece of memory
        assert other["ids"] == [id for piece in pieces for id in piece["ids"]]
        order = other["index"].argsort(), one["index"].argsort()
        assert torch.equal(other["index"][order[0]], one["index"][order[1]])
        pixels = torch.cat([piece["pixel_values"] for piece in pieces])
        assert torch.equal(pixels[order[0]], one["pixel_values"][order[1]])
