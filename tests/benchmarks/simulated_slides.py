"""Datasets of questions and of slides in the catalog's sizes, with simulated vectors and small simulated bags."""

from pathlib import Path

import h5py
import numpy as np
from simulated_suite import JOINT, POOLED, Simulated

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Dataset
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.source import Question

# Images, questions and distinct answers, about as published.
QUESTIONS = {"vqa-rad": (314, 2248, 500), "slake-en": (642, 7033, 220), "path-vqa": (4998, 32632, 4000)}
# Slides for learning and for tests where somebody states them, else about as published; one slide a case.
SLIDES = {
    "camelyon16": (270, 129),
    "panda": (8493, 2123),
    "tcga-nsclc": (840, 210),
    "tcga-rcc": (740, 184),
    "tcga-brca-subtype": (760, 190),
    "bracs": (460, 87),
    "ebrains": (1800, 450),
    "ubc-ocean": (430, 107),
    "tcga-blca": (0, 373),
    "tcga-brca": (0, 960),
    "tcga-coadread": (0, 530),
    "tcga-hnsc": (0, 430),
    "tcga-stad": (0, 370),
    "tcga-kirc": (0, 500),
}
KINDS = {"vqa": QUESTIONS, "diagnosis": SLIDES, "survival": SLIDES}


def asked(manifest: Manifest, share: float) -> Simulated:
    """Questions about images, two fifths of them closed; a fifth of the images is tested on."""
    images, questions, answers = (max(40, int(size * share)) for size in QUESTIONS[manifest.id])
    collection = Simulated(manifest, images * 4 // 5, images - images * 4 // 5)
    generator = np.random.default_rng(images)
    for k, number in enumerate(generator.integers(0, len(collection.pairs), questions)):
        pair, closed = collection.pairs[number], k % 5 < 2
        answer = ("yes", "no")[k % 2] if closed else f"answer {generator.integers(answers)}"
        text = f"is finding {k % 97} there?" if closed else f"what is shown, question {k % 211}?"
        collection.questions.append(
            Question(pair.id, text, answer, closed, "test" if pair.split == "test" else "train")
        )
    return collection


class Slides(Dataset):
    """Slides of a cohort or of classes, with their outcomes and bags in ``root``."""

    def __init__(self, manifest: Manifest, share: float, root: Path) -> None:
        learnt, tested = (int(size * share) for size in SLIDES[manifest.id])
        tested = max(tested, 60)
        splits = ["train"] * (learnt * 4 // 5) + ["validation"] * (learnt - learnt * 4 // 5) + ["test"] * tested
        classes = list(manifest.classes) or [""]
        names = [f"{manifest.id}-{k}" for k in range(len(splits))]
        pairs = [
            Pair(name, f"{name}.svs", "", manifest.modality, classes[k % len(classes)], name, split, manifest.id)
            for k, (name, split) in enumerate(zip(names, splits, strict=True))
        ]
        super().__init__(manifest, pairs)
        self.root = root
        generator = np.random.default_rng(len(pairs))
        self.metadata = {
            name: {"time": f"{time:.2f}", "event": str(k % 3 // 2), "age": f"{age:.0f}"}
            for k, (name, time, age) in enumerate(
                zip(names, generator.exponential(40, len(names)), generator.normal(62, 9, len(names)), strict=True)
            )
        }

    def image(self, pair: Pair) -> None:
        raise AssertionError("nothing is opened when bags are there")

    def digest(self, pair: Pair) -> str:
        return pair.id


def write_bags(collection: Slides, encoder: str, number: int, tiles: int) -> int:
    """Write an encoder's bags, ``tiles`` of noise each, whose mean leans to the slide's class; returns the bytes."""
    generator = np.random.default_rng(number)
    classes = list(collection.manifest.classes) or [""]
    centres = 0.3 * generator.normal(size=(len(classes), JOINT + POOLED))
    folder = collection.root / encoder
    folder.mkdir(parents=True)
    written = 0
    for pair in collection.pairs:
        rows = generator.normal(size=(tiles, JOINT + POOLED)) + centres[classes.index(pair.label)]
        with h5py.File(folder / f"{pair.id}.h5", "w") as file:
            file["proj"], file["features"] = (part.astype(np.float16) for part in np.split(rows, [JOINT], axis=1))
        written += (folder / f"{pair.id}.h5").stat().st_size
    return written
