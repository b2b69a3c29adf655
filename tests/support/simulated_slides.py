"""Slides whose tiles hold a number we chose, so that what a protocol ought to find is known: a test, no result."""

import h5py
import numpy as np

from mmkd.data.table import Pair
from mmkd.evaluation.datasets.dataset import Dataset
from mmkd.evaluation.datasets.manifest import Manifest

WIDTH, INFORMED_SHARE = 16, 0.3


class SlideDataset(Dataset):
    """Slides with bags under a root."""

    def __init__(self, manifest, pairs, root, facts=None):
        super().__init__(manifest, pairs)
        self.root, self.metadata = root, facts or {}

    def image(self, pair):
        raise AssertionError("slides are read through their bags")

    def digest(self, pair):
        return pair.id


def slide_manifest(task, classes=None, primary_metric=""):
    """A manifest of slides."""
    return Manifest(
        "slides", task, "pathology", {"bags": "."}, "CC0-1.0", classes=classes or {}, primary_metric=primary_metric
    )


def write_bag(path, tiles, proj=None, **names):
    """A bag; ``names`` are further datasets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = tiles.astype(np.float32)
        file["coords"] = np.stack([np.arange(len(tiles)), np.arange(len(tiles))], axis=1)
        if proj is not None:
            file["proj"] = proj.astype(np.float32)
        for name, array in names.items():
            file[name] = array


def risk_tiles(generator, risk, tiles=24, strength=2.0, width=WIDTH):
    """Tiles of noise, some of which are shifted by ``strength * risk`` along the first axis."""
    made = generator.normal(size=(tiles, width))
    informed = max(1, round(INFORMED_SHARE * tiles))
    made[:informed, 0] += strength * risk
    made[:informed, 1] += 2.0  # what attention can know them by
    return made


def exponential_cohort(count, beta=1.5, seed=0):
    """Risks ``(n,)`` with hazard ``exp(beta risk)``, times and events; about a third is censored."""
    generator = np.random.default_rng(seed)
    risk = generator.normal(size=count)
    event = generator.exponential(np.exp(-beta * risk))
    censored = generator.exponential(2.0 * np.median(event) + 0.2, size=count)
    return risk, np.round(np.minimum(event, censored), 2) + 0.01, event <= censored


def slide_pairs(names, cases=None, labels=None, splits=None):
    """A pair for each slide."""
    count = len(names)
    columns = (names, cases or names, labels or [""] * count, splits or ["test"] * count)
    rows = zip(*columns, strict=True)
    return [Pair(name, name, "", "pathology", label, case, split) for name, case, label, split in rows]
