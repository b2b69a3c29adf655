"""The page in Chromium: by keyboard, at 400 px, in dark mode, without network, and nothing on a disk."""

import base64
import json
import urllib.error
import urllib.request

import pytest
import torch
from chromium_page import PROGRAM, ChromiumPage
from served import noise, serve_apart
from tiny_model import save_tiny

from mmkd.data.features.writer import FeatureWriter
from mmkd.data.folder import write_manifest
from mmkd.data.table import Pair
from mmkd.encoders.zoo import load_encoder
from mmkd.serving.index import SearchIndex

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
TAB, ENTER = ("Tab", 9), ("Enter", 13)
CHOOSE = """
(() => {
  const bytes = Uint8Array.from(atob('DATA'), c => c.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], 'name-of-a-patient'));
  const input = document.querySelector('input[type=file]');
  input.files = files.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
})()
"""
FOCUS = "(document.activeElement.closest('label,button') || document.activeElement).innerText.trim()"
MOST_TABS = 40


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a service with an archive and a teacher's features, and the folder that Gradio would write to."""
    place = tmp_path_factory.mktemp("page")
    folder, pictures = save_tiny(place / "tiny"), place / "pairs" / "images"
    pictures.mkdir(parents=True)
    names = [f"picture-{seed}.png" for seed in range(3)]
    for seed, name in enumerate(names):
        (pictures / name).write_bytes(noise(seed))
    encoder = load_encoder(str(folder))
    index = SearchIndex.create(place / "index", encoder.provenance, encoder.dim)
    index.add([*names, "gone.png"], encoder.encode_texts(["w3", "w4", "w5", "w6"]))
    pairs = [Pair(name, name, f"<i>w{seed}</i>", modality="MRI") for seed, name in enumerate(names)]
    write_manifest(place / "pairs", pairs)
    writer = FeatureWriter(place / "features" / "PLIP", "PLIP")
    writer.add(names, torch.eye(3), torch.eye(3).roll(1, 0))
    writer.finish({})
    options = ["--labels", "w3,<b>w4</b>", "--index", place / "index", "--images", pictures]
    options += ["--pairs", place / "pairs", "--features", place / "features"]
    with serve_apart(folder, *options, GRADIO_TEMP_DIR=str(place / "gradio")) as (_, address):
        yield address, place / "gradio"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = ChromiumPage(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def opened(browser, address, width, dark=False):
    browser.emulate(width, 1000, dark)
    browser.open(f"{address}/")
    browser.wait_for("document.querySelector('input[type=file]') !== null")
    return browser


def choose(page, data):
    page.run(CHOOSE.replace("DATA", base64.b64encode(data).decode()))


def tab_to(page, words):
    """Press Tab until what has the focus shows these words."""
    for _ in range(MOST_TABS):
        page.press(*TAB)
        if words in page.run(FOCUS):
            return
    raise AssertionError(f"{words} cannot be reached by keyboard")


def test_everything_by_keyboard_at_400_pixels(served, browser):
    address, written = served
    page = opened(browser, address, 400)
    assert "Not a clinical result" in page.run("document.body.innerText")
    tab_to(page, "Drop an image")
    choose(page, noise(1))
    page.wait_for("document.querySelectorAll('.mmkd-bars li').length === 2")
    shown = page.run("[...document.querySelectorAll('.mmkd-bars .name')].map(e => e.innerText).sort()")
    assert shown == ["<b>w4</b>", "w3"]  # text of users is no markup
    assert "Not calibrated" in page.run("document.body.innerText")
    page.wait_for("document.querySelectorAll('.mmkd-found li').length === 4")
    page.wait_for("document.querySelectorAll('.mmkd-found img').length === 3")  # the fourth file is gone
    tab_to(page, "Labels")
    page.write(", w9")
    tab_to(page, "Classify")
    page.press(*ENTER)
    page.wait_for("document.querySelectorAll('.mmkd-bars li').length === 3")
    tab_to(page, "Show heat map")
    page.press(*ENTER)
    page.wait_for("document.querySelector('img[alt^=\"Heat map\"]') !== null")
    tab_to(page, "Search the archive")
    page.write("w5 w6")
    page.press(*ENTER)
    page.wait_for("document.body.innerText.includes('Images for “w5 w6”')")
    tab_to(page, "Show another pair")
    page.press(*ENTER)
    page.wait_for("document.querySelectorAll('.mmkd-encoders dt').length === 2")
    beside = page.run("document.querySelector('.mmkd-beside').innerText")
    assert "tiny" in beside and "PLIP" in beside and "number 2 of 3" in beside and "<i>w" in beside
    assert page.run("document.documentElement.scrollWidth") <= 400
    assert page.run("[...document.querySelectorAll('img')].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
    assert page.requests and all(url.startswith((address, "data:", "blob:")) for url in page.requests)
    complaints = [entry for entry in page.complaints if "error" in json.dumps(entry).lower()]
    assert not complaints, complaints
    assert not [path for path in written.rglob("*") if path.is_file()]


def test_what_cannot_be_read_is_an_answer_and_the_page_goes_on(served, browser):
    page = opened(browser, served[0], 1280)
    page.run("[...document.querySelectorAll('button')].find(b => b.innerText === 'Classify').click()")
    page.wait_for("document.body.innerText.includes('Choose an image first')")
    choose(page, b"no image")
    page.wait_for("document.body.innerText.includes('unsupported')")
    choose(page, noise(2))
    page.wait_for("document.querySelectorAll('.mmkd-bars li').length === 2")


def test_dark_mode_and_contrast(served, browser):
    for dark in (False, True):
        page = opened(browser, served[0], 1280, dark)
        ground = page.run("getComputedStyle(document.body).backgroundColor")
        for selector in (".mmkd-title h1", ".mmkd-quiet", ".mmkd-notice"):
            ink = page.run(f"getComputedStyle(document.querySelector('{selector}')).color")
            assert contrast(ink, ground) >= 4.5, (dark, selector, ink, ground)
        assert (luminance(ground) < 0.1) is dark


def luminance(colour):
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    values = [float(value) / 255 for value in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_addresses_of_gradio_that_write_or_read_files_are_closed(served):
    address, written = served
    paths = ["upload", "file=/etc/passwd", "proxy=http://192.0.2.1/", "stream/a/b/c", "component_server", "run/predict"]
    for path in paths:
        for data in (None, b"{}"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/{path}", data), timeout=10)
            assert caught.value.code == 404
            caught.value.close()
    assert not [path for path in written.rglob("*") if path.is_file()]
