"""An export in transformers.js, in Node and on the page of `examples/browser`, against torch on the same pixels.

    npm install --ignore-scripts --prefix .transformers-js @huggingface/transformers

gets the library into an ignored folder; without it, or without Node, these tests are skipped.
"""

import functools
import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from chromium_page import PROGRAM, ChromiumPage
from PIL import Image

from mmkd.command.settings import parse
from mmkd.hub import export
from mmkd.student.folder import load_student, save_student
from mmkd.student.towers import build_model

ROOT = Path(__file__).resolve().parents[2]
MODULES = ROOT / ".transformers-js" / "node_modules"
LIBRARY = MODULES / "@huggingface" / "transformers" / "dist"
PAGE = ROOT / "examples" / "browser"
TEXTS = ["an mri of the brain", "ct"]
IN_NODE = """
const [library, page, root, picture, texts] = process.argv.slice(1);
const transformers = await import(library);
const { loadTowers } = await import(page);
Object.assign(transformers.env, { allowRemoteModels: false, localModelPath: root + "/" });
const options = { dtype: "fp32" };
const towers = await loadTowers(transformers, "export", options);
const classify = await transformers.pipeline("zero-shot-image-classification", "export", options);
const features = await transformers.pipeline("image-feature-extraction", "export", options);
const labels = JSON.parse(texts);
console.log(JSON.stringify({
  image: await towers.encodeImage(picture), texts: await towers.encodeTexts(labels),
  features: (await features(picture)).tolist()[0],
  shares: await classify(picture, labels, { hypothesis_template: "{}" }),
}));
"""
pytestmark = [
    pytest.mark.skipif(not LIBRARY.is_dir(), reason=f"{LIBRARY} is missing; see the head of this file"),
    pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with an export, a picture of exactly the model's size, and the page; and what torch gives."""
    folder = tmp_path_factory.mktemp("site")
    torch.manual_seed(0)
    save_student(folder / "student", *build_model("random:tiny", "random:tiny", 16))
    arguments = [str(folder / "student"), "--output", str(folder / "export"), "--format", "onnx", "--repeats", "0"]
    export.main(parse(export.ExportSettings, [*arguments, "--quiet"]))
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    picture.save(folder / "picture.png")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    (folder / "modules").symlink_to(MODULES)
    model, processor = load_student(str(folder / "student"))
    with torch.inference_mode():
        return folder, model.eval()(**processor(images=picture, text=TEXTS, return_tensors="pt"))


@pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed")
def test_node_gives_what_torch_gives(site):
    folder, expected = site
    places = [LIBRARY / "transformers.node.mjs", PAGE / "towers.mjs", folder, folder / "picture.png"]
    command = ["node", "--input-type=module", "-e", IN_NODE, "--", *map(str, places), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for key, value in (("image", expected.image_embeds[0]), ("features", expected.image_embeds[0])):
        torch.testing.assert_close(torch.tensor(found[key]), value, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(found["texts"]), expected.text_embeds, atol=1e-4, rtol=0)
    shares = {row["label"]: row["score"] for row in found["shares"]}
    wanted = expected.logits_per_image.softmax(dim=-1)[0]
    assert [shares[text] for text in TEXTS] == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
def test_the_page_gives_what_torch_gives(site, tmp_path):
    folder, expected = site
    handler = functools.partial(QuietHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        library = "library=/modules/@huggingface/transformers/dist/transformers.min.js"
        page = ChromiumPage(tmp_path)
        try:
            page.open(
                f"http://127.0.0.1:{server.server_port}/index.html?model=export&{library}"
                "&wasm=/modules/onnxruntime-web/dist/"
            )
            state = page.run(
                "(async () => { for (;;) { const said = document.querySelector('#state').textContent;"
                " if (!said.startsWith('Loading')) return said; await new Promise(go => setTimeout(go, 100)); } })()"
            )
            assert state.startswith("Ready"), state
            image = page.run("window.towers.encodeImage('/picture.png')")
            texts = page.run(f"window.towers.encodeTexts({json.dumps(TEXTS)})")
            shares = page.run(f"window.towers.classify('/picture.png', {json.dumps(TEXTS)})")
        finally:
            page.close()
            server.shutdown()
    torch.testing.assert_close(torch.tensor(image), expected.image_embeds[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(texts), expected.text_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(shares), expected.logits_per_image.softmax(dim=-1)[0], atol=1e-4, rtol=0)


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a log, modules of JavaScript by their type."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def log_message(self, *_):
        pass
