"""Show which parts of an image its similarity with a text depends on, as a heat map over the image.

Parts of the image are hidden one after another and the fall of the similarity is measured (occlusion), which works for
every model: a student, a teacher, an export. With ``--against`` the map shows what speaks for the one text rather than
for the other. A heat map describes the model, not the disease.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmkd.command.settings import check_arguments, run, setting
from mmkd.data.pixel_rules import Window, WindowPreset


@dataclass
class ExplainSettings:
    """Write a heat map of an image and a text.

    Example:
        mmkd explain xray.png --model mmkd-clip --text "chest x-ray with pneumonia" --output heat.png
    """

    image: Path = setting(help="image file", positional=True)
    text: str = setting(help="caption that the map is for")
    output: Path = setting(help="PNG file to write")
    model: str = setting(help="folder or Hub id of a model, or the name of a teacher")
    against: str = setting("", "another caption, whose similarity is subtracted")
    window: WindowPreset = setting("auto", "window of CT: auto, lung, soft, bone, brain, or three of them as RGB")
    cells: int = setting(10, "number of cells along the shorter side")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    quiet: bool = setting(False, "print nothing")
    overwrite: bool = setting(False, "replace OUTPUT if it exists")


if __name__ == "__main__":
    check_arguments(ExplainSettings)  # before the imports that take seconds

from mmkd.data.images import encode, open_image
from mmkd.encoders.zoo import load_encoder
from mmkd.files import atomic_write_bytes, refuse_existing
from mmkd.serving.explain import heat_map, overlay


def main(settings: ExplainSettings) -> None:
    """Encode the image with and without its parts, and write the map.

    Raises:
        FileExistsError: OUTPUT exists.
        FileNotFoundError: the model does not exist.
        ValueError: the image cannot be read (`mmkd.data.images.UnreadableImageError`), or a setting is out of range.
    """
    refuse_existing(settings.output, settings.overwrite)
    if settings.output.suffix.lower() != ".png":
        raise ValueError(f"--output {settings.output} must end in .png")
    image = open_image(settings.image, window=Window(settings.window))
    encoder = load_encoder(settings.model, settings.device)
    heat = heat_map(encoder, image, settings.text, settings.against, settings.cells)
    atomic_write_bytes(settings.output, encode(overlay(image, heat), None)[1])
    if not settings.quiet:
        print(f"{settings.output}: hiding a part lowers the similarity by up to {max(0.0, float(heat.max())):.3f}")
        if heat.max() <= 0:
            print("no part of the image speaks for this text")


if __name__ == "__main__":
    run(ExplainSettings, main)
