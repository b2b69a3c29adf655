"""Ask a model folder which description fits a picture best.

python examples/zero_shot.py mmkd-clip picture.png "a chest X-ray" "an MRI of the brain" "a fundus photograph"
"""

import sys

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import modeling_mmkd  # noqa: F401  registers MMKDClipModel with the Auto classes


def main(folder: str, picture: str, *descriptions: str) -> None:
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=list(descriptions), images=Image.open(picture), return_tensors="pt")
    with torch.inference_mode():
        probabilities = model(**inputs).logits_per_image.softmax(dim=-1)[0]
    for probability, description in sorted(zip(probabilities.tolist(), descriptions, strict=True), reverse=True):
        print(f"{probability:6.1%}  {description}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
