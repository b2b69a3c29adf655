"""Datasets of which only pairs exist, and samples of them."""

from pathlib import Path

from mmkd.data.folder import PairFolder
from mmkd.evaluation.datasets.dataset import Dataset, Samples
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.pairs import PairsDataset
from mmkd.evaluation.run import task_options, tasks_for
from mmkd.evaluation.settings import EvalSettings


class FakeDataset(Dataset):
    """A dataset whose images are never opened."""

    def image(self, pair):
        raise AssertionError("no task may open images: they are embedded")

    def digest(self, pair):
        return pair.sha256


def make_samples(manifest, held_out, train=(), validation=(), digests=None, questions=()):
    """Samples of a manifest, by default one of captions; images are told apart by their file names."""
    manifest = manifest or Manifest("toy", "retrieval", "CT", {}, "CC0-1.0")
    pairs = [*held_out, *train, *validation]
    digests = {pair.id: pair.image for pair in pairs} if digests is None else digests
    dataset = FakeDataset(manifest, pairs, questions)
    return Samples(manifest, list(held_out), list(train), list(validation), digests, dataset)


PAIRS = task_options(EvalSettings([], pairs=Path("pairs")))


def pairs_samples(held_out, train=(), validation=(), digests=None, questions=()):
    """Samples of a folder of pairs."""
    pairs = [*held_out, *train, *validation]
    digests = {pair.id: pair.image for pair in pairs} if digests is None else digests
    dataset = PairsDataset(PairFolder(Path("pairs"), Path("pairs"), pairs), "test", questions=questions)
    return Samples(dataset.manifest, list(held_out), list(train), list(validation), digests, dataset)


def pairs_tasks(samples, *kinds):
    """The tasks of these kinds, and why others are left out."""
    return tasks_for(samples, kinds, PAIRS)
