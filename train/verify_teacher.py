"""Verify a teacher: encode the authors' demo samples and compare with the features they published.

A cosine above 0.999 on every sample, image and text, shows that weights, preprocessing, tokenizer, context and pooling
are the authors'. It verifies what the specification of a teacher only infers. The demo folder is the authors'
(``meta.jsonl`` and ``features/``, https://github.com/wangshansong1/MMKD-CLIP); weights are given as in `extract`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.command.settings import check_arguments, run, setting


@dataclass
class VerifySettings:
    """Encode the authors' demo samples with a teacher and compare with the raw features they published.

    Example:
        mmkd verify-teacher PLIP --demo MMKDCLIP_DATA
    """

    teacher: str = setting(help="name, folder, Hub id or YAML file", positional=True)
    demo: Path = setting(help="the authors' folder of demo samples, with meta.jsonl and features/")
    weights: Path | None = setting(None, "local folder or file of the teacher's weights")
    published_name: str | None = setting(None, "the teacher's name in the folder, if it is another")
    threshold: float = setting(0.999, "cosine that every sample must exceed")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    output: Path | None = setting(None, "JSON file for the result")
    quiet: bool = setting(False, "print the result only")


if __name__ == "__main__":
    check_arguments(VerifySettings)  # before the imports that take seconds

import torch

from mmkd.command.settings import nearest
from mmkd.data.features.published import PublishedFeatures
from mmkd.data.folder import META_FILE, open_pairs
from mmkd.data.images import open_image
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import find_spec, load_encoder
from mmkd.files import write_json


def main(settings: VerifySettings) -> None:
    """Print a line for each sample and the result.

    Raises:
        FileNotFoundError: the demo folder or the weights are not there.
        ValueError: the folder has no features of this teacher, or they differ.
    """
    if not (settings.demo / META_FILE).is_file():
        raise FileNotFoundError(
            f"--demo {settings.demo} has no {META_FILE}: give the authors' folder of demo samples (MMKDCLIP_DATA in "
            "https://github.com/wangshansong1/MMKD-CLIP)"
        )
    published = PublishedFeatures(settings.demo, "raw")
    name = settings.published_name or find_spec(settings.teacher).name
    if name not in published.dims:
        raise ValueError(
            f"{settings.demo} holds no features of {name!r}{nearest(name, published.dims)}; it has: "
            f"{', '.join(published.dims)}; another name is given with --published_name"
        )
    encoder = load_encoder(settings.teacher, settings.device, settings.weights)
    if encoder.dim != published.dims[name]:
        raise ValueError(f"{encoder.name} is {encoder.dim} wide, the published {name} {published.dims[name]}")
    samples = compare(encoder, published, name, settings.demo)
    result = {
        "teacher": encoder.provenance,
        "published_name": name,
        "threshold": settings.threshold,
        "samples": samples,
        "passed": all(min(s["image"], s["text"]) > settings.threshold for s in samples.values()),
    }
    if settings.output is not None:
        write_json(settings.output, result)
    show(result, settings)


def compare(encoder: DualEncoder, published: PublishedFeatures, name: str, demo: Path) -> dict[str, dict[str, float]]:
    """Cosine of image and text features with the published ones, by id of the samples that have this teacher."""
    folder = open_pairs(demo)
    features = published.lookup([pair.id for pair in folder.pairs])[name]
    rows = features["mask"].nonzero().flatten().tolist()
    pairs = [folder.pairs[row] for row in rows]
    image = encoder.encode_images([open_image(folder.image_path(pair)) for pair in pairs])
    text = encoder.encode_texts([pair.caption for pair in pairs])
    cosines = {
        side: torch.nn.functional.cosine_similarity(ours.double(), features[side][rows].double(), dim=-1)
        for side, ours in (("image", image), ("text", text))
    }
    return {pair.id: {side: float(found[k]) for side, found in cosines.items()} for k, pair in enumerate(pairs)}


def show(result: dict[str, Any], settings: VerifySettings) -> None:
    """Print the table and the result.

    Raises:
        ValueError: the features differ.
    """
    samples, provenance = result["samples"], result["teacher"]
    worst = {side: min(sample[side] for sample in samples.values()) for side in ("image", "text")}
    if not settings.quiet:
        for key in ("weights", "fingerprint", "preprocessing", "tokenizer", "context", "pooling", "note"):
            print(f"{key}: {provenance[key]}")
        print(f"{'sample':<34}{'image':>10}{'text':>10}")
        for id, sample in samples.items():
            print(f"{id:<34}{sample['image']:>10.5f}{sample['text']:>10.5f}")
    summary = f"{len(samples)} samples, smallest cosine {worst['image']:.5f} of images and {worst['text']:.5f} of texts"
    if result["passed"]:
        print(f"{provenance['teacher']}: the published features, to a cosine above {settings.threshold} ({summary})")
        return
    sides = " and ".join(side for side in worst if worst[side] <= settings.threshold)
    noted = f"; note of its specification: {provenance['note']}" if provenance["note"] else ""
    raise ValueError(
        f"{provenance['teacher']}: the {sides} features are not the published {result['published_name']} ({summary}); "
        f"check weights, preprocessing, tokenizer, context and pooling above, and try others in a YAML file{noted}"
    )


if __name__ == "__main__":
    run(VerifySettings, main)
