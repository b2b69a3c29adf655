"""Find the pictures of a folder that fit a sentence best.

python examples/search_images.py mmkd-clip pictures/ "sagittal T1-weighted MRI of the brain" 5
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

import modeling_mmkd  # noqa: F401  registers MMKDClipModel with the Auto classes
from mmkd.data.images import UnreadableImageError, open_image

BATCH = 32


@torch.inference_mode()
def main(folder: str, pictures: str, query: str, count: int) -> None:
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    paths, images = [], []
    for path in sorted(p for p in Path(pictures).rglob("*") if p.is_file()):
        try:
            images.append(open_image(path))
            paths.append(path)
        except UnreadableImageError as error:
            print(f"left out {path}: {error}", file=sys.stderr)
    features = []
    for start in range(0, len(images), BATCH):
        inputs = processor(images=images[start : start + BATCH], return_tensors="pt")
        features.append(model.get_image_features(**inputs).pooler_output)
    text = model.get_text_features(**processor(text=[query], return_tensors="pt")).pooler_output
    similarity = torch.cosine_similarity(torch.cat(features), text)
    for score, index in zip(*similarity.topk(min(count, len(paths))), strict=True):
        print(f"{score:6.3f}  {paths[int(index)]}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
