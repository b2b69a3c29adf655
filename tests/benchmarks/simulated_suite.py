"""Datasets of the catalog's sizes with simulated embeddings: what the benchmarks of an evaluation judge."""

from functools import lru_cache

import numpy as np
import torch

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Dataset
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.embeddings.embed import SHARD_SIZE, DatasetInputs, write_vectors
from mmkd.evaluation.embeddings.encoders import EncoderRecord
from mmkd.evaluation.run import inputs_of
from mmkd.evaluation.tasks.task import TaskOptions

JOINT, POOLED = 512, 768
# Images for learning and for tests, as published or about so.
SIZES = {
    "chexpert-5x200": (0, 1000),
    "rsna-pneumonia": (21347, 5337),
    "chestmnist": (89687, 22433),
    "pneumoniamnist": (5232, 624),
    "organamnist": (41052, 17778),
    "organcmnist": (15367, 8216),
    "organsmnist": (16384, 8827),
    "sars-cov-2-ct": (1985, 496),
    "mrnet-acl": (1130, 120),
    "mrnet-meniscus": (1130, 120),
    "brain-tumor-classification": (2870, 394),
    "figshare-brain-tumor": (2451, 613),
    "breastmnist": (624, 156),
    "busi": (624, 156),
    "tn3k": (2879, 614),
    "fetal-planes": (7129, 5271),
    "lc25000-lung": (0, 15000),
    "lc25000-colon": (0, 10000),
    "pcam": (294912, 32768),
    "nct-crc-he": (100000, 7180),
    "dermamnist": (8010, 2005),
    "pad-ufes-20": (1838, 460),
    "isic-2019": (20265, 5066),
    "ddi": (0, 656),
    "retinamnist": (1200, 400),
    "refuge": (800, 400),
    "fives": (600, 200),
    "odir200x3": (0, 600),
    "octmnist": (108309, 1000),
    "octdl": (1651, 413),
    "octid": (457, 115),
    "oct2017": (83484, 1000),
    "hyperkvasir": (8530, 2132),
    "kvasir-v2": (6400, 1600),
    "kvasir-capsule": (37790, 9448),
    "dsad": (11700, 2925),
    "rocov2": (0, 9927),
    "roco": (0, 8176),
    "pmc-oa": (0, 15000),
    "quilt-1m": (0, 13559),
    "deepeyenet": (12569, 3140),
}


class Simulated(Dataset):
    """Pairs of a dataset's size; two images to a patient, every class as often as every other."""

    def __init__(self, manifest: Manifest, learnt: int, tested: int) -> None:
        classes = list(manifest.classes) or [""]
        splits = ["train"] * (learnt * 9 // 10) + ["validation"] * (learnt - learnt * 9 // 10) + ["test"] * tested
        caption = "{} number {}" if manifest.task == "retrieval" else ""
        pairs = [
            Pair(
                f"{manifest.id}:{k}",
                "",
                caption.format(manifest.title, k),
                manifest.modality,
                classes[k % len(classes)],
                f"{split}-{k // 2}",
                split,
                manifest.id,
            )
            for k, split in enumerate(splits)
        ]
        super().__init__(manifest, pairs)

    def image(self, pair: Pair) -> None:
        raise AssertionError("nothing is opened when the cache is warm")

    def digest(self, pair: Pair) -> str:
        return pair.id


def simulated_inputs(collection: Dataset) -> DatasetInputs:
    """What is embedded of a simulated dataset."""
    return inputs_of(collection, lambda: collection, collection.manifest.kinds, "test", TaskOptions())


def write_cache(known: EncoderRecord, number: int, inputs: DatasetInputs, collection: Dataset) -> int:
    """Write an encoder's shards: images stand near the mean direction of their class; returns the bytes."""
    joint_noise, pooled_noise = noise_of(number)
    classes = list(collection.manifest.classes) or [""]
    position = {name: k for k, name in enumerate(classes)}
    centres = np.random.default_rng([number, len(classes)]).normal(size=(len(classes), JOINT)).astype(np.float32)
    labels = {pair.id: pair.label for pair in collection.image_pairs}
    files = known.files(inputs)
    for turn, (file, part) in enumerate(zip(files, [*inputs.images, *inputs.texts], strict=True)):
        rows = (np.arange(len(part)) + 97 * turn) % SHARD_SIZE
        joint, is_image = joint_noise[rows], turn < len(inputs.images)
        if is_image and classes != [""]:
            joint += 0.1 * centres[[position[labels[id].split("|")[0]] for id in part]]
        joint /= np.linalg.norm(joint, axis=1, keepdims=True)
        arrays = {"vectors": joint, "pooled": pooled_noise[rows]} if is_image else {"vectors": joint}
        ids = [f"{turn}-{row}" for row in range(len(part))]
        write_vectors(file, ids, {name: torch.from_numpy(array) for name, array in arrays.items()}, {}, [])
    return sum(file.stat().st_size for file in files)


@lru_cache(maxsize=16)
def noise_of(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers of an encoder that all its shards share, ``(4096, joint)`` and ``(4096, pooled)``."""
    noise = np.random.default_rng(number).normal(size=(SHARD_SIZE, JOINT + POOLED)).astype(np.float32)
    return noise[:, :JOINT].copy(), noise[:, JOINT:].copy()
