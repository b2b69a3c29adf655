"""``mmkd explain`` as a user runs it."""

import pytest
from PIL import Image
from tiny_model import save_tiny

from mmkd.command.settings import parse
from mmkd.hub import explain


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain") / "model"
    save_tiny(folder)
    return folder


def explained(*arguments):
    explain.main(parse(explain.ExplainSettings, [str(argument) for argument in arguments]))


def test_a_map_of_the_image_s_size_is_written(model, tmp_path, capsys):
    image, output = tmp_path / "image.png", tmp_path / "heat.png"
    Image.effect_noise((90, 60), 80).save(image)
    command = (image, "--model", model, "--text", "CT scan", "--against", "MRI", "--cells", 4, "--output", output)
    explained(*command)
    with Image.open(output) as drawn:
        assert (drawn.size, drawn.mode) == ((90, 60), "RGB")
    assert "lowers the similarity by up to" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="--overwrite true"):
        explained(*command)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--output": "heat.jpg"}, r"must end in \.png"),
        ({"--cells": "1"}, "at least 3"),
        ({"--text": ""}, "text is empty"),
        ({"--model": "no/such/model/here"}, "no such folder"),
    ],
)
def test_what_is_wrong_is_named(model, tmp_path, changed, message):
    image = tmp_path / "image.png"
    Image.effect_noise((40, 40), 80).save(image)
    options = {"--model": model, "--text": "CT scan", "--output": "heat.png"} | changed
    options["--output"] = tmp_path / options["--output"]
    with pytest.raises((ValueError, OSError), match=message):
        explained(image, *(part for pair in options.items() for part in pair))
    assert not (tmp_path / "heat.png").exists()


def test_a_file_that_is_no_image_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("no pixels")
    with pytest.raises(ValueError, match="unsupported"):
        explained(tmp_path / "notes.txt", "--model", model, "--text", "CT", "--output", tmp_path / "heat.png")
