"""Encode images or texts with a model and write unit vectors with ids: Parquet, npy or safetensors.

The ids of images are their paths relative to the folder that is given, those of texts the texts. Images that cannot be
read are left out, listed on standard error with the reason, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.data.pixel_rules import Window, WindowPreset


@dataclass
class EmbedSettings:
    """Encode images or texts, and write their vectors.

    Example:
        mmkd embed scans --model mmkd-clip --output scans.parquet
    """

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "inputs kind window",
        "computing": "batch_size workers device quiet",
        "settings": "log overwrite",
    }

    inputs: list[str] = setting(
        help="image files, folders or patterns; with --kind texts sentences, or .txt files with one on each line",
        positional=True,
        whole=True,
    )
    model: str = setting(help="folder or Hub id of a model, or the name of a teacher")
    output: Path = setting(help="file to write: .parquet, .npy (ids in .ids.json beside it) or .safetensors")
    kind: Literal["images", "texts"] = setting("images", "kind of the inputs")
    log: Path | None = setting(None, "file for the provenance of the run: weights, preprocessing, versions")
    window: WindowPreset = setting("auto", "window of CT: auto, lung, soft, bone, brain, or three of them as RGB")
    batch_size: int = setting(32, "images or texts at a time", least=1)
    workers: int = setting(0, "threads that read images; 0 takes this process' share of the cores", least=0)
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    overwrite: bool = setting(False, "replace OUTPUT if it exists")
    quiet: bool = setting(False, "no progress bar")


if __name__ == "__main__":
    check_arguments(EmbedSettings)  # before the imports that take seconds

import io
import json
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mmkd.data.features.shards import write_shard
from mmkd.encoders.encoder import DualEncoder
from mmkd.encoders.zoo import load_encoder
from mmkd.files import atomic_write_bytes, refuse_existing, write_json
from mmkd.serving.encoding import counted, encode_items, write_log
from mmkd.serving.images import ImageFile, find_images, read_image
from mmkd.serving.predictor import read_utf8

SUFFIXES = (".parquet", ".npy", ".safetensors")


def main(settings: EmbedSettings) -> None:
    """Encode and write.

    Raises:
        FileNotFoundError: an input or the model is not there.
        FileExistsError: OUTPUT exists.
        ValueError: settings that cannot work, no text, or no readable image.
    """
    check(settings)
    skipped: dict[str, str] = {}
    if settings.kind == "texts":
        ids = read_texts(settings.inputs)
        encoder = load(settings)
        vectors = encoder.encode_texts(ids)
    else:
        files = find_images(settings.inputs)
        encoder = load(settings)
        ids, vectors, skipped = embed_images(encoder, files, settings)
    write(settings.output, ids, vectors, encoder)
    if settings.log is not None:
        facts = {"kind": settings.kind, "vectors": len(ids), "dim": encoder.dim, "skipped": skipped}
        write_log(settings.log, "embed", encoder, settings.output, **facts)
    if not settings.quiet:
        print(f"{settings.output}: {len(ids)} vectors of {encoder.dim} numbers")


def check(settings: EmbedSettings) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        FileExistsError: OUTPUT exists.
        ValueError: what came, what is allowed and what to do.
    """
    if settings.output.suffix not in SUFFIXES:
        raise ValueError(f"--output {settings.output} must end in {', '.join(SUFFIXES)}")
    refuse_existing(settings.output, settings.overwrite)


def load(settings: EmbedSettings) -> DualEncoder:
    """The model."""
    encoder = load_encoder(settings.model, settings.device)
    encoder.batch_size = settings.batch_size
    return encoder


def embed_images(
    encoder: DualEncoder, files: list[ImageFile], settings: EmbedSettings
) -> tuple[list[str], Tensor, dict[str, str]]:
    """Ids and vectors ``(n, dim)`` of the images that can be read, and ids of the others with the reason.

    Raises:
        ValueError: none can be read.
    """
    ids: list[str] = []
    parts: list[Tensor] = []

    def take(items: list[ImageFile], vectors: Tensor) -> None:
        ids.extend(item.id for item in items)
        parts.append(vectors)

    read = partial(read_image, window=Window(settings.window))
    skipped = encode_items(encoder, files, read, take, workers=settings.workers, quiet=settings.quiet)
    if not ids:
        raise ValueError(f"none of the {len(files)} images could be read ({counted(skipped)})")
    return ids, torch.cat(parts), skipped


def read_texts(inputs: list[str]) -> list[str]:
    """Sentences of the command line, and the lines of text files, in order; equal ones once.

    Raises:
        FileNotFoundError: a text file is not there.
        ValueError: a file is not UTF-8, or there is no text.
    """
    texts: list[str] = []
    for entry in inputs:
        if entry.lower().endswith(".txt"):
            if not Path(entry).exists():
                raise FileNotFoundError(f"{entry}: no such file")
            texts += [line.strip() for line in read_utf8(Path(entry)).splitlines()]
        else:
            texts.append(entry.strip())
    texts = list(dict.fromkeys(text for text in texts if text))
    if not texts:
        raise ValueError("no text is given; give sentences, or .txt files with one on each line")
    return texts


def write(output: Path, ids: list[str], vectors: Tensor, encoder: DualEncoder) -> None:
    """Write ids and float32 vectors ``(n, dim)`` in the form that the suffix names."""
    if output.suffix == ".safetensors":
        write_shard(output, ids, {"vectors": vectors}, notes={"model": encoder.provenance})
        return
    data = io.BytesIO()
    if output.suffix == ".npy":
        np.save(data, vectors.numpy())
        write_json(output.with_suffix(".ids.json"), ids)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.numpy().ravel()), vectors.shape[1])
        table = pa.table({"id": pa.array(ids), "vector": column})
        pq.write_table(table.replace_schema_metadata({"mmkd": json.dumps(encoder.provenance)}), data)
    atomic_write_bytes(output, data.getvalue())


if __name__ == "__main__":
    run(EmbedSettings, main)
