"""Classify and embed a folder of images in FiftyOne; `fiftyone_zoo.json` is the entry of its model zoo.

    pip install fiftyone
    python examples/fiftyone_zoo.py mmkd-clip pictures "an MRI of the brain" "a fundus photograph"

For other programs, name the entry in the variable FIFTYONE_MODEL_ZOO_MANIFEST_PATHS.
"""

import sys
from pathlib import Path

import fiftyone as fo
import fiftyone.zoo as foz

import modeling_mmkd  # noqa: F401  registers MMKDClipModel with the Auto classes

fo.config.model_zoo_manifest_paths = [str(Path(__file__).with_suffix(".json"))]


def main(folder: str, pictures: str, *labels: str) -> None:
    model = foz.load_zoo_model("mmkd-clip", name_or_path=folder, classes=list(labels))
    dataset = fo.Dataset.from_images_dir(pictures)
    dataset.apply_model(model, label_field="modality")
    dataset.compute_embeddings(model, embeddings_field="embedding")
    print(dataset.count_values("modality.label"))
    fo.launch_app(dataset).wait()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
