"""UniMed-CLIP: one checkpoint file in the published student's form, BiomedBERT's tokenizer beside or on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmkd.checkpoints import from_authors, infer_config
from mmkd.teachers.hfclip import HFClipEncoder, build
from mmkd.teachers.rows import TeacherRow
from mmkd.teachers.weights import TOKENIZER_FILES, companion, fetch, first_file, load_strictly, read_state_dict
from modeling_mmkd import MMKDClipModel, MMKDClipProcessor


def load(row: TeacherRow, device: str) -> HFClipEncoder:
    """Load a teacher of this form; towers' sizes are read off the tensors, heads are 64 wide.

    Raises:
        FileNotFoundError: the checkpoint or the tokenizer is not there.
        ValueError: keys that do not fit.
    """
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    checkpoint = Path(row.weights)
    if not checkpoint.is_file():
        folder = fetch(row.weights, TOKENIZER_FILES, row.files, revision=row.revision, gated=row.gated)
        checkpoint = first_file(folder, row.files)
    state = read_state_dict(checkpoint)
    config = infer_config(state)
    model: Any = MMKDClipModel(config)
    load_strictly(model, from_authors(state), str(checkpoint))
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, image_mean=list(row.mean), image_std=list(row.std)
    )
    tokenizer = AutoTokenizer.from_pretrained(companion(checkpoint.parent, row.text_model, TOKENIZER_FILES))
    processor = MMKDClipProcessor(image_processor, tokenizer)
    return build(row, model, device, processor, [checkpoint])
