"""A service of a tiny model: in this process without a socket, or as ``mmkd serve`` in one of its own."""

import asyncio
import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import httpx
from PIL import Image

from mmkd.encoders.encoder import token_counter
from mmkd.encoders.zoo import load_encoder
from mmkd.serving.api import Metrics, create_app, with_gate
from mmkd.serving.predictor import Predictor, read_labels
from mmkd.serving.service import Batching, Service

PATIENCE = 240


def noise(seed=0, size=(48, 40), form="PNG"):
    """The bytes of an image file of noise."""
    generator = __import__("random").Random(seed)
    image = Image.frombytes("RGB", size, generator.randbytes(3 * size[0] * size[1]))
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def serve_here(folder, work, *, labels="", key=None, hosts=(), batching=None, **options):
    """Run ``work(client, service)`` against a service in this process."""
    encoder = load_encoder(str(folder))
    metrics = Metrics()
    service = Service(
        encoder,
        "tiny",
        lambda own: Predictor(encoder, own),
        read_labels(labels) if labels else (),
        count_tokens=token_counter(encoder),
        batching=batching or Batching(observe=metrics.batch),
        **options,
    )
    app = create_app(service, metrics)
    gate = with_gate(app, service, metrics, key, hosts)

    async def run():
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(gate)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE) as client:
                return await work(client, service)

    return asyncio.run(run())


@contextlib.contextmanager
def serve_apart(folder, *arguments, program=None, **environment):
    """``mmkd serve FOLDER`` in a process of its own; yields the process and the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = program or [sys.executable, "-m", "mmkd.command.cli"]
    command = [*command, "serve", str(folder), "--port", str(port), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, address)
        yield process, address
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


def wait_until_ready(process, address):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/readyz", timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError("the service is not ready")
