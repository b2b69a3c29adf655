"""Serve a model: embeddings in OpenAI's form, classification, search, and a page for people.

The service listens on this machine alone unless ``--host`` names another address, which then needs a key. It opens no
connection: what it needs is loaded before the first request, and every later attempt of a library is refused.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmkd.command.settings import check_arguments, run, setting
from mmkd.data.pixel_rules import Window, WindowPreset

KEY_VARIABLE = "MMKD_SERVE_KEY"
LEAST_KEY = 16


@dataclass
class ServeSettings:
    """Serve a model over HTTP, with a page at the root.

    Example:
        mmkd serve mmkd-clip --labels "normal,pneumonia" --index archive --images pictures
    """

    model: str = setting(help="folder or Hub id of a model, or an ONNX folder of `mmkd export`", positional=True)
    labels: str = setting("", "labels of requests that name none: a file, or a,b,c")
    templates: str = setting("", "(labels) a modality, a sentence with {}, or a file of sentences")
    mode: Literal["single", "multilabel", "normal"] = setting(
        "single", "(labels) one label, independent labels, or normal against abnormal"
    )
    index: Path | None = setting(None, "archive to search: a folder of `mmkd index`")
    images: Path | None = setting(None, "(index) the folder that was indexed, to show what is found on the page")
    pairs: Path | None = setting(None, "pairs on which the page shows the model beside its teachers")
    features: Path | None = setting(None, "(pairs) the teachers' features of these pairs: a folder of `mmkd extract`")
    window: WindowPreset | None = setting(
        None, "window of CT: auto, lung, soft, bone, brain or three; by default that of the index, else auto"
    )
    device: str = setting("auto", "cpu, cuda, cuda:1 ...; auto = a GPU if there is one")
    resize: Literal["exact", "fast"] = setting("exact", "the model's own, or faster and within one grey level")
    page: bool = setting(True, "web page at /")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is all addresses of this machine")
    port: int = setting(8000, "port to listen on; 0 takes a free one", least=0, most=65535)
    key_file: Path | None = setting(None, f"file with the key that clients must send; or the variable {KEY_VARIABLE}")
    without_key: bool = setting(False, "serve without a key, where another layer restricts access")
    names: list[str] = setting(factory=list, help="other host names that requests may use, such as a reverse proxy's")
    frame_ancestors: list[str] = setting(factory=list, help="web sites that may embed the page")
    max_batch: int = setting(32, "maximum number of images or texts computed together", above=0)
    max_wait_ms: float = setting(1.0, "time that a lone item waits for others [ms]", least=0)
    max_queue: int = setting(512, "maximum number of waiting images and texts; more are refused with 503", above=0)
    max_items: int = setting(64, "maximum number of images and texts of a request", above=0)
    max_body: int = setting(32, "maximum body of a request [MiB]", above=0)
    max_memory: int = setting(512, "maximum of the bodies of all requests together [MiB]", above=0)
    timeout: float = setting(30.0, "maximum time of a request [s]", above=0)
    grace: int = setting(20, "time to finish requests when the service is stopped [s]", least=0)

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "labels templates mode index images pairs features window",
        "computing": "device resize max_batch max_wait_ms",
    }


if __name__ == "__main__":
    check_arguments(ServeSettings)  # before the imports that take seconds

import importlib.metadata
import logging
import socket
import sys

import uvicorn

from mmkd.command.settings import nearest
from mmkd.exporting.served import OnnxEncoder
from mmkd.exporting.usage import DESCRIPTION
from mmkd.files import read_json
from mmkd.serving.api import Metrics, create_app, with_gate
from mmkd.serving.calibration import read_calibration
from mmkd.serving.gate import LOOPBACK_NAMES, MEBIBYTE, Limits
from mmkd.serving.index import SearchIndex
from mmkd.serving.predictor import Label, Predictor, ServedEncoder, normal_labels, read_labels, read_templates
from mmkd.serving.service import Archive, Batching, Service


def main(settings: ServeSettings) -> None:
    """Load the model and serve it until the process is stopped.

    Raises:
        FileNotFoundError: the model, the index, the export, the labels or the key are not there.
        OSError: the address or the port cannot be used.
        ValueError: settings out of range, an index or export of another model, or an open address without a key.
    """
    check(settings)
    key = read_key(settings)
    with listen(settings.host, settings.port) as listening:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        for name in ("mmkd.serving", "uvicorn"):
            logging.getLogger(name).setLevel(logging.INFO)
        metrics = Metrics()
        service = load(settings, metrics)
        app = create_app(service, metrics)
        paths: tuple[str, ...] = ()
        if settings.page:
            from mmkd.serving.page import PATHS, mount_page

            app, paths = mount_page(app, service), PATHS
        hosts = (*LOOPBACK_NAMES, *settings.names) if is_loopback(settings.host) else ()
        gate = with_gate(app, service, metrics, key, hosts, paths, settings.frame_ancestors)
        address, port = listening.getsockname()[:2]
        where = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        print(f"{service.name} on {where}; stop it with ctrl-C", flush=True)
        refuse_outgoing_connections()
        config = uvicorn.Config(
            gate,
            log_config=None,
            access_log=False,  # uvicorn's shows query strings; the gate has its own
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=30,  # [s]; proxies keep connections for about a minute
            timeout_graceful_shutdown=settings.grace,
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def check(settings: ServeSettings) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: what came, what is allowed and what to do.
    """
    if settings.max_queue < settings.max_items:
        raise ValueError(
            f"--max_queue {settings.max_queue} is below --max_items {settings.max_items}: such requests never fit"
        )
    if settings.max_memory < settings.max_body:
        raise ValueError(f"--max_memory {settings.max_memory} is below --max_body {settings.max_body}")
    if settings.images is not None and settings.index is None:
        raise ValueError("--images shows what --index finds; give --index too")
    if settings.images is not None and not settings.images.is_dir():
        raise FileNotFoundError(f"--images {settings.images}: no such folder")
    if (settings.pairs is None) != (settings.features is None):
        raise ValueError("--pairs and --features are needed together: pairs, and the teachers' features of them")
    if settings.pairs is not None and not settings.page:
        raise ValueError("--pairs are shown on the page; leave out --page false")


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone.

    Raises:
        ValueError: it is no address.
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ValueError(
            f"--host {host!r} is no IP address{nearest(host, LOOPBACK_NAMES)}; such as 127.0.0.1"
        ) from None


def read_key(settings: ServeSettings) -> bytes | None:
    """The key of the file or the variable; None where there is none and none is needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the key is too short to be one, or others can reach the service and there is neither a key nor
            ``--without_key``.
    """
    if settings.key_file is not None:
        if not settings.key_file.is_file():
            raise FileNotFoundError(f"--key_file {settings.key_file}: no such file")
        key, place = settings.key_file.read_bytes().strip(), f"--key_file {settings.key_file}"
    else:
        key, place = os.environb.pop(KEY_VARIABLE.encode(), b"").strip(), f"the variable {KEY_VARIABLE}"
        if not key and (settings.without_key or is_loopback(settings.host)):
            return None
        if not key:
            raise ValueError(
                f"--host {settings.host} can be reached from other machines: give --key_file FILE, or --without_key "
                "true if another layer restricts access"
            )
    if len(key) < LEAST_KEY or len(key.split()) != 1:
        raise ValueError(
            f"{place} must hold one word of at least {LEAST_KEY} characters; `openssl rand -hex 32` makes one"
        )
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before the model is loaded.

    Raises:
        OSError: the port is in use, or the address is not of this machine.
    """
    address = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # asyncio turns Nagle's delay (40 ms between the head of an answer and its body) off only where TCP is named
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
        listening.listen(0)  # another service must see now that the port is taken
    except OSError as error:
        listening.close()
        raise OSError(
            f"cannot listen on {host}, port {port} ({error.strerror}); choose another with --port, 0 is a free one"
        ) from None
    return listening


def load(settings: ServeSettings, metrics: Metrics) -> Service:
    """The model with its labels and its archive.

    Raises:
        FileNotFoundError: the model, the index, the pairs, the features or the labels are not there.
        ValueError: an index or export of another model, features of other pairs, or labels that are wrong.
    """
    templates = read_templates(settings.templates) if settings.templates else []
    default = normal_labels(templates) if settings.mode == "normal" else []
    labels = read_labels(settings.labels, settings.mode) if settings.labels else default
    archive = None if settings.index is None else Archive(SearchIndex.open(settings.index), settings.images)
    folder = Path(settings.model)
    encoder, count_tokens = load_served(settings.model, settings.device, settings.resize == "fast")
    if archive is not None:
        archive.index.require_model(encoder.provenance)
        archive.index.require_window(settings.window)
    comparison = None
    if settings.pairs is not None and settings.features is not None:
        from mmkd.data.features.lookup import TeacherFeatures  # with torch
        from mmkd.data.folder import open_pairs
        from mmkd.serving.comparison import Comparison

        comparison = Comparison(open_pairs(settings.pairs), TeacherFeatures.open(settings.features))

    def predict(own: Sequence[Label]) -> Predictor:
        predictor = Predictor(encoder, own, templates, settings.mode)
        predictor.calibrate(read_calibration(folder, predictor.fingerprint, predictor.key))
        return predictor

    return Service(
        encoder,
        folder.resolve().name if folder.is_dir() else settings.model,
        predict,
        labels,
        archive,
        comparison,
        facts(settings, encoder),
        count_tokens,
        Limits(
            settings.max_body * MEBIBYTE,
            settings.max_memory * MEBIBYTE,
            settings.max_items,
            settings.timeout,
            settings.max_queue,
        ),
        Batching(settings.max_batch, settings.max_wait_ms / 1000, observe=metrics.batch),
        Window(settings.window or "auto") if archive is None else archive.index.window,
    )


def load_served(model: str, device: str, fast: bool) -> tuple[ServedEncoder, Callable[[Sequence[str]], int]]:
    """An encoder, and the function that counts the tokens of texts; the ONNX folder of `mmkd export` without torch.

    Raises:
        FileNotFoundError: the model is not there.
        ValueError: it cannot be served, or resizes images in one way alone.
    """
    if (Path(model) / DESCRIPTION).is_file():
        if fast:
            raise ValueError("--resize fast: an exported folder supports exact alone; leave it out")
        exported = OnnxEncoder(Path(model))
        return exported, exported.count_tokens
    from mmkd.encoders.encoder import HFClipEncoder, token_counter
    from mmkd.encoders.zoo import load_encoder

    encoder = load_encoder(model, device)
    if fast and encoder.fast_prepare is None:
        raise ValueError("--resize fast: this model's preprocessing has no faster form; leave it out")
    encoder.fast = fast
    if isinstance(encoder, HFClipEncoder):
        encoder.fold_batch_norms()
    return encoder, token_counter(encoder)


def facts(settings: ServeSettings, encoder: ServedEncoder) -> dict[str, str]:
    """What the page shows of the model."""
    path = Path(settings.model) / "provenance.json"
    provenance = read_json(path) if path.is_file() else {}
    if not isinstance(provenance, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(provenance).__name__}")
    library = "onnxruntime" if isinstance(encoder, OnnxEncoder) else "torch"
    data = provenance.get("data") or {}
    teachers = [str(teacher.get("teacher")) for teacher in provenance.get("teachers") or []]
    found = {
        "Width of the vectors": str(encoder.dim),
        "Computed by": f"{library} {importlib.metadata.version(library).partition('+')[0]}",
        "Weights": str(encoder.provenance.get("fingerprint") or "")[:12],
        "Licence": str(encoder.provenance.get("license") or ""),
        "Teachers": ", ".join(teachers),
        "Trained on": f"{data['pairs']} pairs of {data['groups']} groups" if "pairs" in data else "",
        "Modalities": ", ".join(data.get("modalities") or {}),
    }
    return {name: value for name, value in found.items() if value}


def refuse_outgoing_connections() -> None:
    """From now on, refuse every connection of this process to another machine, whichever library opens it."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address = arguments[1]
            if not isinstance(address, tuple):  # a socket of this machine's file system, or one that is connected
                return
            host = str(address[0])
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            host = str(arguments[0] or "localhost")
        else:
            return
        try:
            inside = is_loopback(host)
        except ValueError:
            inside = False
        if not inside:
            raise PermissionError("the service opens no connection to other machines")

    sys.addaudithook(refuse)


if __name__ == "__main__":
    run(ServeSettings, main)
