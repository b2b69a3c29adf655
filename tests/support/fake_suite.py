"""Two small datasets with manifests, and fake encoders."""

import csv
from pathlib import Path

from fake_encoder import FakeEncoder, make_pairs, write_pairs

import mmkd.train.eval as recipe
from mmkd.files import read_json

ENCODERS = {
    "student": FakeEncoder("student", 0.3),
    "good": FakeEncoder("good", 0.4),
    "weak": FakeEncoder("weak", 2.0),
}
LUNGS = """id: lungs
task: classification
modality: CT
source: {csv: "${DATA}/lungs/labels.csv"}
classes: {nodule: [nodule], cyst: [cyst], effusion: [effusion], healthy: [healthy]}
license: CC0-1.0
group: group
derived_from: [Origin]
"""
NOTES = """id: notes
task: retrieval
modality: MRI
source: {csv: "${DATA}/notes/labels.csv", caption: caption}
license: CC0-1.0
group: group
"""
GONE = """id: gone
task: classification
modality: CT
source: {csv: "${DATA}/gone/labels.csv"}
classes: [a, b]
license: CC0-1.0
register: https://example.org/gone
"""


def write_dataset(folder: Path, pairs, unreadable=()):
    write_pairs(folder, pairs, unreadable)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "caption", "group", "split"])
        rows.writerows([f"images/{p.image}", p.label, p.caption, p.group, p.split] for p in pairs)


def write_datasets(root: Path) -> Path:
    splits = [*make_pairs(48), *make_pairs(48, "train", 48), *make_pairs(24, "validation", 96)]
    write_dataset(root / "lungs", splits, unreadable=("p3",))
    write_dataset(root / "notes", make_pairs(24))
    for name, text in (("lungs", LUNGS), ("notes", NOTES), ("gone", GONE)):
        (root / f"{name}.yaml").write_text(text)
    return root


DEVICES = []


def load(source, device, precision):
    """In the place of `load_with_precision`, also in other processes."""
    DEVICES.append(device)
    return ENCODERS[source]


def evaluate(data, output, encoders=("student", "good", "weak"), names=("lungs", "notes", "gone"), **settings):
    settings = {"replicates": 100, "quiet": True, "kinds": ["zeroshot", "probe", "retrieval"], **settings}
    settings.setdefault("probe_curve", False)
    listed = [str(data / f"{name}.yaml") for name in names]
    recipe.main(recipe.EvalSettings(encoders=list(encoders), datasets=listed, data=data, output=output, **settings))
    return read_json(output / "summary.json")
