"""The page for people: drop an image, see labels with their probabilities, a heat map and the nearest of the archive.

Images travel from the browser inside the events of the page, and reduced copies of the last ones are kept in memory for
half an hour: they are never written to a disk, as the upload components of Gradio would. For the same reason what is
shown is embedded in the page. Nothing is loaded from another machine.
"""

from __future__ import annotations

import os
import secrets
import time
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from fastapi import FastAPI
from PIL import Image

from mmkd.data.images import encode, open_image, shrink
from mmkd.data.pixel_rules import UnreadableImageError, Window
from mmkd.pages.page import macros
from mmkd.serving.api import NOTICE
from mmkd.serving.gate import MEBIBYTE, RequestError
from mmkd.serving.index import Hit
from mmkd.serving.inputs import parse_items
from mmkd.serving.service import Archive, Service, Vectors

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

PATHS = (  # of the page; Gradio's own upload, file and proxy addresses are not among them
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/assets/", "/static/", "/svelte/"),
    *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/startup-events", "/gradio_api/heartbeat/"),
)
PREVIEW_SIDE, THUMBNAIL_SIDE, QUALITY = 960, 192, 90
SHOWN_LABELS, NEIGHBOURS = 12, 8
MOST_WAITING, MOST_READ = 32, 4  # events of all visitors; images that are decoded at once, each held as base64
MOST_KEPT, KEPT_SECONDS = 128, 1800  # images of all visitors
BASE64_GROWTH = 4 / 3
PARTS = macros("serving/page.html.j2")
NO_IMAGE = "Choose an image first."
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "Arial", "sans-serif")
MONOSPACED = ("ui-monospace", "Cascadia Mono", "Liberation Mono", "Menlo", "monospace")


@dataclass(frozen=True)
class Picture:
    """The image of one visitor.

    Attributes:
        shown: a reduced copy.
        vector: (1, dim).
        added: when it came, by the monotonic clock.
        best: the most probable label, to explain.
    """

    shown: Image.Image
    vector: Vectors
    added: float
    best: str = ""


def mount_page(app: FastAPI, service: Service) -> FastAPI:
    """Mount the page at the root of the application; addresses of the interface keep their meaning."""
    theme = gr.themes.Default(font=FONTS, font_mono=MONOSPACED, primary_hue="teal", secondary_hue="teal").set(
        button_primary_background_fill="#0b6b66",
        button_primary_background_fill_hover="#095a56",
        button_primary_background_fill_dark="#0b6b66",
        button_primary_background_fill_hover_dark="#0d7d77",
    )
    return gr.mount_gradio_app(
        app,
        build_page(service),
        path="/",
        theme=theme,
        css=_resource("page.css"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=1,
        allowed_paths=[],
    )


def build_page(service: Service) -> gr.Blocks:
    """The page of a service."""
    actions = _Actions(service)
    limit = int(service.limits.body_bytes / BASE64_GROWTH / MEBIBYTE)
    own: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "minimal"}
    with gr.Blocks(title=f"{service.name}: MMKD-CLIP", analytics_enabled=False) as page:
        picture = gr.State("", time_to_live=KEPT_SECONDS, delete_callback=actions.forget)
        gr.HTML(PARTS.title(service.name, NOTICE), elem_classes="mmkd")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picker = gr.HTML(
                    "",
                    html_template=_resource("picker.html"),
                    js_on_load=_resource("picker.js"),
                    limit=limit,
                    elem_classes="mmkd",
                )
                shown = gr.HTML("", elem_classes="mmkd mmkd-picture")
            with gr.Column(scale=3, min_width=300):
                labels = gr.Textbox(
                    ", ".join(service.labels), label="Labels, separated by commas", lines=2, max_lines=8
                )
                classify = gr.Button("Classify", variant="primary")
                answer = gr.HTML(
                    PARTS.quiet("Choose an image to see the probabilities of the labels."), elem_classes="mmkd"
                )
        with gr.Row():
            with gr.Column(min_width=300):
                text = gr.Textbox(label="Heat map for a text", placeholder="by default the most probable label")
                explain = gr.Button("Show heat map")
            with gr.Column(min_width=300):
                heat = gr.HTML("", elem_classes="mmkd mmkd-picture")
        if service.archive is not None:
            gr.HTML(f"<h2>Archive of {len(service.archive.index)} images</h2>", elem_classes="mmkd")
            near = gr.HTML(PARTS.quiet("Choose an image to see the most similar ones."), elem_classes="mmkd")
            caption = gr.Textbox(label="Search the archive by caption", placeholder="power Doppler ultrasound")
            search = gr.Button("Search")
            found = gr.HTML("", elem_classes="mmkd")
            gr.on([search.click, caption.submit], actions.search, [caption], [found], **own)
        if service.comparison is not None:
            gr.HTML(PARTS.compared(service.comparison), elem_classes="mmkd")
            place = gr.State(-1)
            another = gr.Button("Show another pair")
            beside = gr.HTML("", elem_classes="mmkd")
            another.click(actions.compare, [place], [place, beside], **own)
        gr.HTML(PARTS.facts(service.facts), elem_classes="mmkd")
        read = picker.upload(actions.read, [picker], [picture, shown, heat], **own | {"concurrency_limit": MOST_READ})
        read.success(actions.classify, [picture, labels], [answer], **own)
        if service.archive is not None:
            read.success(actions.neighbours, [picture], [near], **own)
        gr.on([classify.click, labels.submit], actions.classify, [picture, labels], [answer], **own)
        gr.on([explain.click, text.submit], actions.explain, [picture, text], [heat], **own)
    page.queue(max_size=MOST_WAITING, api_open=False)
    return page


class _Actions:
    """What the buttons do; errors meant for people become messages of the page."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.pictures: OrderedDict[str, Picture] = OrderedDict()  # by a key that only its visitor has

    def forget(self, key: str) -> None:
        """Drop the picture of a visitor, and those that are too old or too many."""
        self.pictures.pop(key, None)
        oldest = time.monotonic() - KEPT_SECONDS
        while self.pictures and (len(self.pictures) > MOST_KEPT or next(iter(self.pictures.values())).added < oldest):
            self.pictures.popitem(last=False)

    async def read(self, uploaded: str) -> tuple[str, str, str]:
        """Decode and embed what was dropped; the key of the picture, and what is shown."""
        try:
            (data,) = parse_items([uploaded], 1)
            if not isinstance(data, bytes):
                raise gr.Error("this is no image", print_exception=False)
            image = await self.service.in_pool(self.service.read, data, "image")
            vector = await self.service.embed([image])
        except (RequestError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        alt = f"The chosen image, {image.width} x {image.height} pixels"
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        key = secrets.token_urlsafe()
        self.pictures[key] = Picture(image, vector, time.monotonic())
        self.forget("")
        return key, PARTS.image(await self.service.in_pool(_jpeg, image), alt), ""

    async def classify(self, key: str, labels: str) -> str:
        """Probabilities of the labels."""
        picture = self.pictures.get(key)
        if picture is None:
            return PARTS.quiet(NO_IMAGE)
        names = [name for line in labels.splitlines() for name in line.split(",") if name.strip()]
        if not names:
            return PARTS.quiet("Write the labels to choose from, such as: normal, pneumonia.")
        same = [name.strip() for name in names] == self.service.labels
        try:
            predictor = await self.service.predictor(None if same else names)
            (prediction,) = await self.service.classify(picture.vector, predictor)
        except (RequestError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        if key in self.pictures:
            self.pictures[key] = replace(picture, best=next(iter(prediction.probabilities)))
        return PARTS.answer(prediction, predictor.calibration, SHOWN_LABELS)

    async def explain(self, key: str, text: str) -> str:
        """The heat map of a text."""
        picture = self.pictures.get(key)
        if picture is None:
            return PARTS.quiet(NO_IMAGE)
        text = text.strip() or picture.best
        if not text:
            return PARTS.quiet("Write the text to explain.")
        try:
            coloured = await self.service.explain(picture.shown, text)
        except (RequestError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        return PARTS.heat(text, await self.service.in_pool(_jpeg, coloured))

    async def neighbours(self, key: str) -> str:
        """The most similar images of the archive."""
        picture = self.pictures.get(key)
        return "" if picture is None else await self._hits(picture.vector[0], "Most similar images")

    async def search(self, caption: str) -> str:
        """The images of the archive that fit a caption."""
        if not caption.strip():
            return PARTS.quiet("Write a caption to search for.")
        try:
            vectors = await self.service.embed([caption])
        except (RequestError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        return await self._hits(vectors[0], f"Images for “{caption.strip()}”")

    async def compare(self, place: int) -> tuple[int, str]:
        """The model beside its teachers for the next pair."""
        comparison = self.service.comparison
        assert comparison is not None
        place = (place + 1) % len(comparison.captions)
        try:
            image, answers = await self.service.compare(place)
        except (RequestError, UnreadableImageError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        data = await self.service.in_pool(_jpeg, shrink(image, PREVIEW_SIDE))
        return place, PARTS.beside(comparison, place, data, answers)

    async def _hits(self, vector: Vectors, title: str) -> str:
        archive = self.service.archive
        assert archive is not None
        hits = await self.service.search(vector, NEIGHBOURS)
        return PARTS.hits(title, await self.service.in_pool(_found, archive, hits, self.service.window))


def _jpeg(image: Image.Image) -> str:
    """An image as base64, to be embedded in the page."""
    return b64encode(encode(image, QUALITY)[1]).decode()


def _found(archive: Archive, hits: Sequence[Hit], window: Window) -> list[tuple[Hit, str]]:
    """Images that were found, each as base64; empty where it has changed since it was indexed, or is not shown."""
    found = []
    for hit in hits:
        path, data = archive.path(hit.id), ""
        if path is not None:
            with suppress(UnreadableImageError):
                data = _jpeg(shrink(open_image(path, window=window), THUMBNAIL_SIDE))
        found.append((hit, data))
    return found


def _resource(name: str) -> str:
    """A file beside this one."""
    return (resources.files("mmkd.serving") / name).read_text(encoding="utf-8")
