"""PMC-CLIP: CLIP's modified ResNet-50 and PubMedBERT, published as three separate weight files.

The text feature is the first token of the last hidden state times the projection; taking BERT's pooler instead, as one
published example does, gives near-chance scores. The weights do not show whether the attention pool has 32 heads (the
training configuration) or 8 (a public port): ``heads`` in the teacher's specification decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmkd.encoders.openclip import clip_transform
from mmkd.encoders.spec import TeacherSpec, describe
from mmkd.encoders.tower_pair import TowerPairEncoder, Towers, bert_files
from mmkd.encoders.weights import fetch, first_file, load_strictly, read_state_dict, read_tensors

IMAGE_FILE, TEXT_FILE, PROJECTION_FILE = "image_encoder(resnet50).pth", "text_encoder.pth", "text_projection_layer.pth"


def load(spec: TeacherSpec, device: str) -> TowerPairEncoder:
    """Load a teacher of this form.

    Raises:
        FileNotFoundError: one of the three files, or PubMedBERT's configuration or tokenizer, is not there.
        ValueError: keys that do not fit, or a projection of another width.
    """
    from transformers import BertModel

    names = (IMAGE_FILE, TEXT_FILE, PROJECTION_FILE)
    folder = fetch(spec.weights, names, repo_type=spec.repo_type, revision=spec.revision, gated=spec.gated)
    files = [first_file(folder, [name]) for name in names]
    vision = _vision_tower(read_state_dict(files[0]), spec.heads, str(files[0]))
    config, tokenizer = bert_files(folder, spec.text_model)
    state = read_state_dict(files[1])
    text: Any = BertModel(config, add_pooling_layer="pooler.dense.weight" in state)
    load_strictly(text, state, str(files[1]))
    projection = read_tensors(files[2])
    if not isinstance(projection, Tensor) or projection.ndim != 2 or len(projection) != text.config.hidden_size:
        raise ValueError(f"{files[2]} must hold one matrix with {text.config.hidden_size} rows")
    transform = clip_transform({"size": vision.image_size, "mean": tuple(spec.mean), "std": tuple(spec.std)})
    provenance = describe(
        spec,
        files,
        ["open_clip_torch"],
        preprocessing=transform.description,
        tokenizer=spec.text_model,
        context=spec.context,
        pooling=f"last hidden state, first token; {spec.heads} heads in the image tower's attention pool",
        logit_scale=None,  # in none of the three files
    )
    towers = Towers(
        image=vision.to(device),
        image_projection=None,
        text=text.to(device),
        text_projection=projection.detach().float().to(device),
        pooling=lambda output, _: output.last_hidden_state[:, 0],
    )
    encoder = TowerPairEncoder(spec.name, provenance, towers, transform.exact, tokenizer, spec.context)
    encoder.fast_prepare = transform.fast
    return encoder


def _vision_tower(state: Mapping[str, Tensor], heads: int, source: str) -> Any:
    """CLIP's modified ResNet with the sizes that the tensors show."""
    from open_clip.modified_resnet import ModifiedResNet

    needed = ("conv1.weight", "attnpool.positional_embedding", "attnpool.c_proj.weight")
    absent = [key for key in needed if key not in state]
    if absent:
        raise ValueError(f"{source} is not a modified ResNet's state dict: missing {', '.join(absent)}")
    width, dim = 2 * len(state["conv1.weight"]), len(state["attnpool.c_proj.weight"])
    if (32 * width) % heads:
        raise ValueError(f"{heads} heads do not divide the attention pool's width {32 * width}; set another heads")
    grid = round((len(state["attnpool.positional_embedding"]) - 1) ** 0.5)  # side of the last feature map
    tower = ModifiedResNet(_layers(state), dim, heads, 32 * grid, width)
    load_strictly(tower, state, source)
    return tower


def _layers(state: Mapping[str, Tensor]) -> list[int]:
    """Number of blocks in each of the four stages."""
    found = [re.match(r"layer(\d)\.(\d+)\.", key) for key in state]
    return [1 + max((int(m[2]) for m in found if m and m[1] == str(stage)), default=-1) for stage in range(1, 5)]
