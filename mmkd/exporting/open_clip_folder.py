"""A student in open_clip's form: a folder for ``local-dir:``, or an object with open_clip's methods.

open_clip holds towers of OpenAI's ViT and of timm with one linear projection, and BERT-like text towers. The written
folder is opened by open_clip and compared with the student before it gets its name; a student that open_clip cannot
hold is refused, and `load_open_clip` gives its `OpenClipAdapter`, which any student has. Tried with open_clip 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mmkd.encoders.authors_checkpoint import to_authors
from mmkd.exporting.folder import examples, require_exportable
from mmkd.files import write_json
from mmkd.student.folder import load_student
from modeling_mmkd import MMKDClipConfig, MMKDClipModel

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}
TIMM = ("vision_model.timm_model.", "visual.trunk.")
TOLERANCE = 1e-4  # largest difference of unit vectors


class OpenClipAdapter(nn.Module):
    """A student with the methods of open_clip's models, for programs that expect one."""

    def __init__(self, model: MMKDClipModel) -> None:
        super().__init__()
        self.model = model
        self.logit_scale = model.logit_scale

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Map pixels `(images, 3, side, side)` to `(images, dim)`."""
        return _features(self.model.get_image_features(image, return_dict=True), normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Map token ids `(texts, tokens)`, padded, to `(texts, dim)`."""
        return _features(self.model.get_text_features(text, return_dict=True), normalize)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of images and texts, and the factor of their similarities."""
        return self.encode_image(image, True), self.encode_text(text, True), self.logit_scale.exp()


def load_open_clip(
    name: str,
) -> tuple[OpenClipAdapter, Callable[[Any], Tensor], Callable[[str | Sequence[str]], Tensor]]:
    """A student as open_clip's functions would give it.

    Args:
        name: folder or Hub id.

    Returns:
        The model, the preprocessing of a PIL image `(3, side, side)`, and the tokenizer `(texts, context)`.

    Raises:
        FileNotFoundError: there is no such folder or Hub id.
        ValueError: damaged weights.

    Example:
        >>> model, preprocess, tokenizer = load_open_clip("mmkd-clip")
        >>> model.encode_image(preprocess(image)[None]) @ model.encode_text(tokenizer(["ct"])).T
    """
    model, processor = load_student(name)

    def preprocess(image: Any) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    def tokenize(texts: str | Sequence[str]) -> Tensor:
        rows = [texts] if isinstance(texts, str) else list(texts)
        return processor(text=rows, padding="max_length", return_tensors="pt")["input_ids"]

    return OpenClipAdapter(model).eval(), preprocess, tokenize


def write_open_clip(student: str, folder: Path, place: Path) -> None:
    """Write a folder that ``open_clip.create_model_and_transforms("local-dir:...")`` opens.

    Args:
        student: folder or Hub id.
        folder: an empty folder.
        place: where the folder will be: open_clip reads the form of the text tower by an absolute path.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: open_clip cannot hold the student, or gives other vectors.
    """
    import open_clip

    model, processor = load_student(student)
    model.eval()
    require_exportable(processor, Path(student))
    _require_open_clip_pixels(student, processor.image_processor)
    try:
        tensors = open_clip_tensors(model.state_dict())
    except ValueError as error:
        raise ValueError(_refusal(student, str(error))) from error
    save_file(tensors, folder / WEIGHTS_FILE)
    model.config.text_config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    assert isinstance(model.config, MMKDClipConfig)
    config = open_clip_config(model.config, processor.image_processor)
    write_json(folder / CONFIG_FILE, with_place(config, folder))
    try:
        theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    except Exception as error:  # whatever open_clip, timm and torch raise about towers that they do not hold
        raise ValueError(_refusal(student, str(error).partition("\n")[0])) from error
    inputs = examples(model, config["model_cfg"]["vision_cfg"]["image_size"])
    with torch.inference_mode():
        image = theirs.encode_image(inputs["image"]["pixel_values"], normalize=True)
        ids = inputs["text"]["input_ids"].where(
            inputs["text"]["attention_mask"].bool(), processor.tokenizer.pad_token_id
        )
        found = image, theirs.encode_text(ids, normalize=True)
        adapter = OpenClipAdapter(model)
        expected = adapter.encode_image(inputs["image"]["pixel_values"], True), adapter.encode_text(ids, True)
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if not difference <= TOLERANCE:
        raise ValueError(_refusal(student, f"vectors differ by {difference:.1e}, more than {TOLERANCE:.0e}"))
    write_json(folder / CONFIG_FILE, with_place(config, place))


def open_clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A student's tensors with the names of open_clip's ``CustomTextCLIP``.

    Raises:
        ValueError: a tensor of a tower or projection that open_clip has no place for.
    """
    renamed, others = {}, dict(state)
    if any(key.startswith(TIMM[0]) for key in state):
        renamed["visual.head.proj.weight"] = others.pop("visual_projection.weight", torch.empty(0))
        renamed |= {TIMM[1] + key.removeprefix(TIMM[0]): others.pop(key) for key in state if key.startswith(TIMM[0])}
    renamed |= {key.replace("text_encoder.", "text.", 1): value for key, value in to_authors(others).items()}
    return {key: value.contiguous() for key, value in renamed.items()}


def open_clip_config(config: MMKDClipConfig, pixels: Any) -> dict[str, Any]:
    """``open_clip_config.json`` without the place of the text tower."""
    vision, side = config.vision_config, int(pixels.crop_size["height"])
    quick = getattr(vision, "hidden_act", "") == "quick_gelu"
    if vision.model_type == "timm_wrapper":
        tower = {"timm_model_name": vision.architecture, "timm_pool": "", "timm_proj": "linear"}
    else:
        tower = {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
        }
    text = {
        "hf_proj_type": "mlp",
        "hf_pooler_type": POOLERS[config.text_pooling],
        "context_length": config.text_limit,
    }
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": quick,
            "vision_cfg": {"image_size": side, **tower},
            "text_cfg": text,
        },
        "preprocess_cfg": {
            "mean": list(pixels.image_mean),
            "std": list(pixels.image_std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def with_place(config: dict[str, Any], place: Path) -> dict[str, Any]:
    """The configuration with the folder in which open_clip finds text tower and tokenizer."""
    model = config["model_cfg"]
    names = dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), str(place.resolve()))
    return {**config, "model_cfg": {**model, "text_cfg": {**model["text_cfg"], **names}}}


def _require_open_clip_pixels(student: str, pixels: Any) -> None:
    """Refuse other preprocessing than `open_clip_config` states: bicubic, the shortest side to that of the crop."""
    side = pixels.crop_size["height"]
    if pixels.size.get("shortest_edge") != side or pixels.resample != Image.Resampling.BICUBIC:
        raise ValueError(
            _refusal(student, f"its images are resized to {dict(pixels.size)} by resample {int(pixels.resample)}")
        )


def _features(output: Any, normalize: bool) -> Tensor:
    return functional.normalize(output.pooler_output, dim=-1) if normalize else output.pooler_output


def _refusal(student: str, reason: str) -> str:
    return (
        f"open_clip cannot hold {student} ({reason}); use its methods on the student itself: "
        f"mmkd.exporting.open_clip_folder.load_open_clip({student!r})"
    )
