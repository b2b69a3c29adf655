"""The model behind the service: images are prepared by several threads, and one thread computes batches.

`Service` returns NumPy arrays and plain Python, no tensors. A request that does not fit into the queues is refused at
once, so that the memory of the service stays bounded.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from mmkd.data.images import open_image
from mmkd.data.pixel_rules import DEFAULT_WINDOW, UnreadableImageError, Window
from mmkd.files import is_inside, leads_inside
from mmkd.serving.batching import Batcher
from mmkd.serving.explain import heat_map, overlay
from mmkd.serving.gate import Limits, RequestError, overloaded
from mmkd.serving.index import Hit, SearchIndex
from mmkd.serving.predictor import Label, Prediction, Predictor, ServedEncoder

if TYPE_CHECKING:
    from mmkd.serving.comparison import Answer, Comparison

Vectors = NDArray[np.float32]
Result = TypeVar("Result")
SHARED_ITEMS = 16  # of a heat map that wait at once
SMALL_BYTES = 8192  # of a text or a body that the event loop reads itself
MOST_LABELS = 256  # of one request
KEPT_LABEL_SETS = 32


@dataclass(frozen=True)
class Archive:
    """The images that can be found.

    Attributes:
        index: their vectors.
        images: the folder that was indexed, to show what is found; None shows names alone.
    """

    index: SearchIndex
    images: Path | None = None

    def path(self, id: str) -> Path | None:
        """The file of an image, if it lies in the folder."""
        if self.images is None or not is_inside(id):
            return None
        path = self.images / id
        return path if leads_inside(self.images, path) and path.is_file() else None


@dataclass(frozen=True)
class Batching:
    """How items are collected.

    Attributes:
        largest: most items of a batch.
        wait: seconds that a lone item waits for others.
        threads: that decode and prepare images.
        observe: called with the kind (``image``, ``text``) and the size of each batch.
    """

    largest: int = 32
    wait: float = 0.001
    threads: int = field(default_factory=lambda: max(2, os.cpu_count() or 2))
    observe: Callable[[str, int], object] = lambda kind, size: None


class Service:
    """An encoder, its labels and its archive, for many clients at once.

    Attributes:
        name: of the model.
        dim: width of its vectors.
        labels: of the service; empty where each request must name its own.
        archive: None without an index.
        comparison: of the model with its teachers; None without their features.
        facts: what the page shows of the model: name of the fact -> its value.
    """

    def __init__(
        self,
        encoder: ServedEncoder,
        name: str,
        predict: Callable[[Sequence[Label]], Predictor],
        labels: Sequence[Label] = (),
        archive: Archive | None = None,
        comparison: Comparison | None = None,
        facts: dict[str, str] | None = None,
        count_tokens: Callable[[Sequence[str]], int] = lambda texts: 0,
        limits: Limits | None = None,
        batching: Batching | None = None,
        window: Window = DEFAULT_WINDOW,
    ) -> None:
        """Take an encoder in evaluation mode; `start` begins to compute.

        Args:
            encoder: of images and texts.
            name: under which clients address it.
            predict: makes the predictor of a set of labels.
            labels: of requests that name none.
            archive: to search.
            comparison: of the model with its teachers.
            facts: of the model.
            count_tokens: of texts, for ``usage``.
            limits: of requests.
            batching: of items.
            window: in which CT images are read.
        """
        self.encoder, self.name, self.dim = encoder, name, encoder.dim
        self.archive, self.comparison, self.facts = archive, comparison, facts or {}
        self.count_tokens = count_tokens
        self.limits, self.batching, self.window = limits or Limits(), batching or Batching(), window
        self._predict, self._own = predict, predict(labels) if labels else None
        self.labels = [label.name for label in labels]
        self._predictors: OrderedDict[tuple[str, ...], Predictor] = OrderedDict()
        self._pending = 0
        self._captions: Vectors | None = None
        self.ready = False

    async def start(self) -> None:
        """Start the threads, and compute one image and one text, so that the first request is not slow."""
        self._turn = asyncio.Lock()
        self._model_thread: Executor = ThreadPoolExecutor(1, "model")
        self._pool: Executor = ThreadPoolExecutor(self.batching.threads, "prepare")
        self._explaining: Executor = ThreadPoolExecutor(1, "explain")
        self._images: Batcher[Any, Vectors] = self._batcher(lambda items: self.encoder.encode_prepared(items), "image")
        self._texts: Batcher[str, Vectors] = self._batcher(lambda items: self.encoder.encode_texts(items), "text")
        await self.embed([Image.new("RGB", (64, 64)), "warm-up"])
        self.ready = True

    async def stop(self) -> None:
        """Finish what waits, and end the threads."""
        self.ready = False
        await asyncio.gather(self._images.close(), self._texts.close())
        for executor in (self._explaining, self._pool):
            executor.shutdown(wait=False, cancel_futures=True)
        self._model_thread.shutdown()

    @property
    def pending(self) -> int:
        """Items that are being prepared, or wait for the model."""
        return self._pending

    async def embed(self, items: Sequence[str | bytes | Image.Image]) -> Vectors:
        """Vectors of texts, and of images as files or decoded.

        Returns:
            (n, dim), unit length, in the order of the items.

        Raises:
            RequestError: 503, too many items wait; 400, an image cannot be used, with the number of the item.
        """
        texts = [place for place, item in enumerate(items) if isinstance(item, str)]
        images = [place for place, item in enumerate(items) if not isinstance(item, str)]
        with self._room(len(items)):
            prepared = await asyncio.gather(*(self.in_pool(self._prepare, items[place], place) for place in images))
            found = await asyncio.gather(
                self._images.submit(prepared) if images else _nothing(),
                self._texts.submit([str(items[place]) for place in texts]) if texts else _nothing(),
            )
        vectors = np.empty((len(items), self.dim), dtype=np.float32)
        for places, own in zip((images, texts), found, strict=True):
            for place, vector in zip(places, own, strict=True):
                vectors[place] = vector
        return vectors

    async def predictor(self, names: Sequence[str] | None) -> Predictor:
        """The predictor of a request's labels, or of the service's where it names none.

        Raises:
            ValueError: no labels, too few, too many, an empty one, or one twice.
        """
        if names is None:
            if self._own is None:
                raise ValueError("this service has no labels of its own; name them in the request")
            return self._own
        if len(names) > MOST_LABELS:
            raise ValueError(f"{len(names)} labels are given; at most {MOST_LABELS} are allowed in one request")
        key = tuple(name.strip() for name in names)
        if not all(key):
            raise ValueError("a label is empty; leave it out")
        if key not in self._predictors:
            labels = [Label(name) for name in key]
            loop = asyncio.get_running_loop()
            with self._room(1):
                async with self._turn:
                    self._predictors[key] = await loop.run_in_executor(self._model_thread, self._predict, labels)
            while len(self._predictors) > KEPT_LABEL_SETS:
                self._predictors.popitem(last=False)
        self._predictors.move_to_end(key)
        return self._predictors[key]

    async def classify(self, vectors: Vectors, predictor: Predictor) -> list[Prediction]:
        """Predictions of images (n, dim) of `embed`."""
        return await self.in_pool(predictor.predict, vectors)

    async def search(self, vector: Vectors, k: int) -> list[Hit]:
        """The images of the archive that are most similar to a vector (dim,)."""
        assert self.archive is not None
        (hits,) = await self.in_pool(self.archive.index.search, vector[None], k)
        return hits

    async def compare(self, place: int) -> tuple[Image.Image, list[Answer]]:
        """The image of a pair of the comparison, and what the model and its teachers find for it.

        Raises:
            UnreadableImageError: the image is missing or broken.
        """
        assert self.comparison is not None
        image = await self.in_pool(partial(open_image, window=self.window), self.comparison.images[place])
        captions = self.comparison.captions
        if self._captions is None:
            size = self.batching.largest
            parts = [await self.embed(captions[k : k + size]) for k in range(0, len(captions), size)]
            self._captions = np.concatenate(parts)
        (vector,) = await self.embed([image])
        return image, self.comparison.answers(place, self.name, vector, self._captions)

    async def explain(self, image: Image.Image, text: str) -> Image.Image:
        """The image with what speaks for a text in colour."""
        shared = _SharedEncoder(self, asyncio.get_running_loop())
        with self._room(1):
            heat = await asyncio.get_running_loop().run_in_executor(self._explaining, heat_map, shared, image, text)
        return await self.in_pool(overlay, image, heat)

    async def aside(self, size: int, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of a function; in a thread where its input has more than some thousand bytes.

        A thread costs more than what it saves the event loop for a caption.
        """
        return function(*arguments) if size <= SMALL_BYTES else await self.in_pool(function, *arguments)

    async def in_pool(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of a function in a thread that prepares images."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    @contextmanager
    def _room(self, items: int) -> Iterator[None]:
        """Count items while they are in work.

        Raises:
            RequestError: 503.
        """
        if self._pending + items > self.limits.waiting:
            raise overloaded(
                f"{self._pending} texts and images wait for the model, the queue takes {self.limits.waiting}"
            )
        self._pending += items
        try:
            yield
        finally:
            self._pending -= items

    def _batcher(self, compute: Callable[[Sequence[Any]], ArrayLike], kind: str) -> Batcher[Any, Vectors]:
        how = self.batching
        batcher: Batcher[Any, Vectors] = Batcher(
            lambda items: list(np.asarray(compute(items))),
            self._model_thread,
            self._turn,
            how.largest,
            how.wait,
            self.limits.waiting,
            lambda size: how.observe(kind, size),
        )
        batcher.start()
        return batcher

    def _prepare(self, item: bytes | Image.Image, place: int) -> Any:
        return self.encoder.prepare_any(self.read(item, f"input.{place}") if isinstance(item, bytes) else item)

    def read(self, data: bytes, place: str) -> Image.Image:
        """Decode an image that a client has sent.

        Args:
            data: the bytes of its file.
            place: of the image in the request, for errors.

        Raises:
            RequestError: 400, it cannot be used.
        """
        try:
            return open_image(data, window=self.window)
        except UnreadableImageError as error:
            raise RequestError(400, str(error), f"image_{error.reason}", place) from None


class _SharedEncoder:
    """The service as an encoder for another thread, so that its many images share batches with those of clients."""

    batch_size = SHARED_ITEMS

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self._service, self._loop = service, loop

    def encode_images(self, items: Sequence[str | Image.Image]) -> Vectors:
        """See `Encoder`."""
        vectors = asyncio.run_coroutine_threadsafe(self._service.embed(items), self._loop)
        return vectors.result(self._service.limits.seconds)

    encode_texts = encode_images  # the service tells them apart


async def _nothing() -> list[Vectors]:
    return []
