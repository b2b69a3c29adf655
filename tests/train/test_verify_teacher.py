"""`mmkd verify-teacher`: a teacher is the authors' or is not, by their published features."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkd.command.settings import parse
from mmkd.files import read_json
from mmkd.train.verify_teacher import VerifySettings, main

TEACHER = """
import numpy as np

class Pixels:
    def __init__(self, image_shift=0.0, text_shift=0.0):
        self.image_shift, self.text_shift = image_shift, text_shift

    def encode_images(self, images):
        return np.array([np.asarray(i.resize((2, 2)), dtype=np.float64).ravel() + self.image_shift for i in images])

    def encode_texts(self, texts):
        return np.array([[len(t), *([1.0 + self.text_shift] * 11)] for t in texts])

def right(device):
    return Pixels()

def wrong_images(device):
    return Pixels(image_shift=-120.0)

def wrong_texts(device):
    return Pixels(text_shift=9.0)
"""


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Eight samples in the authors' form; the third lacks the teacher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("pixel_teachers.py").write_text(TEACHER)
    for name in ("right", "wrong_images", "wrong_texts"):
        row = f"name: Pixels\nform: python\nweights: pixel_teachers.{name}\nnote: heads are inferred\n"
        Path(f"{name}.yaml").write_text(row)
    sys.path.append(str(tmp_path))
    import pixel_teachers

    teacher, rows = pixel_teachers.right("cpu"), []
    for k in range(8):
        folder = Path(f"demo/features/f/s{k}")
        folder.mkdir(parents=True)
        image = Image.fromarray(np.random.default_rng(k).integers(0, 256, (9, 12, 3), dtype=np.uint8))
        image.save(folder / "i.png")
        names = ["Pixels", "Other"] if k != 2 else ["Other"]
        caption = f"caption {'x' * k}"
        rows.append({"id": f"s{k}", "folderid": "f", "imgpath": f"features/f/s{k}/i.png", "txt": caption})
        rows[-1]["available_clips"] = names
        sides = {"img": teacher.encode_images([image])[0], "txt": teacher.encode_texts([caption])[0]}
        features = {
            f"{name}_{side}": torch.tensor(values / np.linalg.norm(values)).float()
            for name in names
            for side, values in sides.items()
        }
        torch.save(features, folder / "clips_output.pt")
    Path("demo/meta.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield
    sys.modules.pop("pixel_teachers", None)


def run(teacher, *more):
    main(parse(VerifySettings, [teacher, "--demo", "demo", "--device", "cpu", *more]))


def test_the_right_teacher_passes_on_every_sample(demo, capsys):
    run("right.yaml", "--output", "result.json")
    out = capsys.readouterr().out
    assert "Pixels: the published features" in out and "7 samples" in out
    assert all(f"s{k} " in out for k in (0, 1, 3, 7)) and "s2 " not in out
    result = read_json(Path("result.json"))
    assert result["passed"] and len(result["samples"]) == 7
    assert min(min(sample.values()) for sample in result["samples"].values()) > 0.99999


@pytest.mark.parametrize(("teacher", "side"), [("wrong_images", "image"), ("wrong_texts", "text")])
def test_another_teacher_fails_and_says_where(demo, capsys, teacher, side):
    with pytest.raises(ValueError, match=rf"the {side} features are not the published.*heads are inferred"):
        run(f"{teacher}.yaml", "--output", "result.json")
    assert not read_json(Path("result.json"))["passed"]
    run(f"{teacher}.yaml", "--threshold", "-1")


def test_what_is_not_there_is_said(demo):
    with pytest.raises(FileNotFoundError, match=r"nowhere has no meta.jsonl: give the authors' folder"):
        main(parse(VerifySettings, ["PLIP", "--demo", "nowhere"]))
    with pytest.raises(ValueError, match=r"no features of 'PLIP'.*it has: Pixels, Other"):
        run("PLIP")
    with pytest.raises(FileNotFoundError, match="hf download vinid/plip"):
        run("PLIP", "--published_name", "Pixels")
    with pytest.raises(ValueError, match="did you mean 'Pixels'"):
        run("right.yaml", "--published_name", "Pixel")


def test_the_real_demo_folder_is_taken_as_it_is(shared_data, tmp_path, monkeypatch):
    """A teacher that knows the published features by heart, and one that swaps two of them."""
    folder = shared_data / "mmkd_clip_official" / "MMKDCLIP_DATA"
    code = f"""
import json, torch
from pathlib import Path
rows = [json.loads(line) for line in (Path({str(folder)!r}) / "meta.jsonl").read_text().splitlines()]
files = [next(Path({str(folder)!r}).glob(f"features/*/{{row['id']}}/clips_output.pt")) for row in rows]
known = [torch.load(file, weights_only=True) for file in files]
known = [sample for sample in known if "PLIP_img" in sample]
captions = [row["txt"] for row in rows if "PLIP" in row["available_clips"]]

class Memory:
    def __init__(self, swapped):
        self.texts = dict(zip(captions, [sample["PLIP_txt"].flatten() for sample in known]))
        self.images = [sample["PLIP_img"].flatten() for sample in known]
        if swapped:
            self.images[:2] = self.images[1::-1]

    def encode_images(self, images):
        return torch.stack([self.images.pop(0) for image in images])

    def encode_texts(self, texts):
        return torch.stack([self.texts[text] for text in texts])

def right(device):
    return Memory(False)

def swapped(device):
    return Memory(True)
"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("memory_teachers.py").write_text(code)
    for name in ("right", "swapped"):
        Path(f"{name}.yaml").write_text(f"name: PLIP\nform: python\nweights: memory_teachers.{name}\ndim: 512\n")
    arguments = ["--demo", str(folder), "--device", "cpu", "--quiet"]
    main(parse(VerifySettings, ["right.yaml", *arguments]))
    with pytest.raises(ValueError, match="the image features are not the published PLIP"):
        main(parse(VerifySettings, ["swapped.yaml", *arguments]))
    sys.modules.pop("memory_teachers", None)
