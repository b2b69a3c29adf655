"""WebDataset tars in BIOMEDICA's form with small images, and the damage that untrusted tars come with."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

LABELS = (
    ["computerized tomography"],
    ["bar plot"],
    ["light microscopy", "immunohistochemistry", "plot"],
    ["scientific illustration"],
)


def picture(seed, width=160, height=120, format="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def facts(number, **changes):
    values = {
        "image_primary_label": ["Clinical Imaging"],
        "image_secondary_label": LABELS[number % 4],
        "image_panel_type": "single",
        "image_label_id": "7",
        "image_cluster_id": f"fig{number}",
        "image_context": {},
        "article_accession_id": f"PMC{1000 + number // 3}",
        "article_license": "CC BY",
    }
    return json.dumps(values | changes).encode()


def key(number, subset="commercial"):
    return f"filelist_{subset}_batch_1_{number}-PMC{1000 + number // 3}-{number}-fig{number}"


WORDS = ("lesion", "mass", "node", "tissue", "stain", "arrow", "panel", "axial", "view", "tumour", "cell", "nucleus")


def caption(number):
    return " ".join(np.random.default_rng(number).choice(WORDS, 20)).encode()


def sample(number, subset="commercial", **changes):
    name = key(number, subset)
    return [
        (f"{name}.jpg", picture(number)),
        (f"{name}.txt", caption(number)),
        (f"{name}.json", facts(number, **changes)),
    ]


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    """A tar of (name, bytes), or of TarInfo for what is no plain file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                name, data = member
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def write_source(folder, shards=3, samples=12):
    for shard in range(shards):
        numbers = range(shard * samples, (shard + 1) * samples)
        write_tar(folder / f"{shard:03d}.tar", [member for number in numbers for member in sample(number)])
    return folder
