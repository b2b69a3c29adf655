"""``mmkd serve`` as a process: what its sockets do, and how it ends."""

import asyncio
import base64
import concurrent.futures
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from processes import mmkd
from served import data_url, noise, serve_apart
from tiny_model import save_tiny

from mmkd.encoders.zoo import load_encoder
from mmkd.hub.serve import listen
from mmkd.serving.calibration import Calibration, write_calibration
from mmkd.serving.index import SearchIndex
from mmkd.serving.predictor import Predictor, read_labels

KEY = "a-key-of-many-characters"
SPY = """
import os, sys
def spy(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        log = os.open(os.environ["SPY"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{event} {arguments}\\n".encode())
        os.close(log)
sys.addaudithook(spy)
from mmkd.command.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def archive(folder, tmp_path_factory):
    """An index of three pictures, and their folder."""
    place = tmp_path_factory.mktemp("archive")
    (place / "pictures").mkdir()
    for seed in range(3):
        (place / "pictures" / f"{seed}.png").write_bytes(noise(seed))
    encoder = load_encoder(str(folder))
    index = SearchIndex.create(place / "index", encoder.provenance, encoder.dim)
    index.add(
        [f"{seed}.png" for seed in range(3)],
        encoder.encode_texts(["w3", "w4", "w5"]) * torch.tensor([[-1.0], [1.0], [-1.0]]),
    )
    return place


def post(address, path, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{address}{path}", content, {"content-type": "application/json", **headers}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_one_service_from_start_to_stop(folder, archive, tmp_path):
    """Embeddings, search, a key, 2 GB that are refused, clients that hang up, 200 at once, and a graceful end."""
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n")
    options = ["--index", archive / "index", "--key_file", key_file, "--page", "false", "--labels", "w3,w4"]
    program = [sys.executable, "-c", SPY]
    with serve_apart(folder, *options, program=program, SPY=str(tmp_path / "spy")) as (process, address):
        port = int(address.rpartition(":")[2])
        allowed = {"Authorization": f"Bearer {KEY}"}
        status, found = post(address, "/v1/embeddings", {"input": ["w3", data_url(noise())]}, **allowed)
        assert status == 200 and len(found["data"]) == 2
        status, found = post(address, "/v1/search", {"input": "w4", "k": 2}, **allowed)
        assert status == 200 and next(hit["id"] for hit in found["data"]) == "1.png" and len(found["data"]) == 2
        assert post(address, "/v1/embeddings", {"input": "w3"})[0] == 401

        memory = resident(process)
        assert send_two_gigabytes(port) == 413
        assert resident(process) - memory < 100e6

        for _ in range(5):  # clients that hang up, before and after their body is whole
            with socket.create_connection(("127.0.0.1", port)) as client:
                body = json.dumps({"input": ["w3"] * 8}).encode()
                head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(body) + 1}\r\n\r\n"
                client.sendall(head.encode() + body)
        body = json.dumps({"input": ["w3", data_url(noise())]}).encode()
        with concurrent.futures.ThreadPoolExecutor(200) as clients:
            answers = clients.map(lambda _: post(address, "/v1/embeddings", body, **allowed)[0], range(200))
            assert set(answers) == {200}
        assert urllib.request.urlopen(f"{address}/livez", timeout=10).status == 200

        waiting = concurrent.futures.ThreadPoolExecutor(4)
        last = [
            waiting.submit(
                post, address, "/v1/embeddings", {"input": [data_url(noise(n)) for n in range(32)]}, **allowed
            )
            for _ in range(4)
        ]
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert {future.result()[0] for future in last} == {200}
        output, _ = process.communicate(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM)
    assert KEY not in output and "w3" not in output
    spied = (tmp_path / "spy").read_text() if (tmp_path / "spy").exists() else ""
    outside = [line for line in spied.splitlines() if "127.0.0.1" not in line and "localhost" not in line]
    assert not outside, outside


def send_two_gigabytes(port):
    """The status of the answer to a body of 2 GB that is sent in chunks until the service answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        try:
            for _ in range(2048):
                client.sendall(chunk)
        except OSError:
            pass  # the service has answered and closed
        answer = client.recv(100)
    return int(answer.split()[1])


def resident(process):
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_other_machines_are_out_of_reach(tmp_path):
    """The process refuses connections, whichever library opens them."""
    code = """
import socket, sys
from mmkd.hub.serve import refuse_outgoing_connections
refuse_outgoing_connections()
with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0)); listening.listen()
    socket.create_connection(listening.getsockname()).close()
import httpx, urllib.request
for attempt in (
    lambda: socket.create_connection(("192.0.2.1", 80), 1),
    lambda: socket.getaddrinfo("example.org", 80),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    lambda: httpx.get("http://192.0.2.1"),
    lambda: urllib.request.urlopen("https://example.org"),
):
    try:
        attempt()
    except Exception as error:
        assert "no connection to other machines" in str(error), repr(error)
    else:
        raise AssertionError
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REFUSED = [
    (["--host", "0.0.0.0"], "--key_file"),
    (["--host", "example.org"], "no IP address"),
    (["--host", "192.0.2.7", "--without_key", "true"], "cannot listen"),
    (["--port", "70000"], "--port is 70000"),
    (["--index", "nowhere"], "mmkd index"),
    (["--images", "nowhere"], "--index"),
    (["--pairs", "nowhere"], "--features"),
    (["--pairs", "a", "--features", "b", "--page", "false"], "--page"),
    (["--pairs", "nowhere", "--features", "nowhere"], "nowhere"),
    (["--max_queue", "8"], "--max_items 64"),
    (["--timeout", "0"], "--timeout"),
    (["--key_file", "nowhere"], "no such file"),
    (["--labels", "one"], "at least 2"),
]


@pytest.mark.parametrize(
    ("options", "part"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_settings_that_cannot_work(folder, options, part):
    port = [] if "--port" in options else ["--port", "0"]
    done = mmkd("serve", folder, *port, *options)
    assert done.returncode in (1, 2) and part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = mmkd("serve", tmp_path, "--port", port)  # the folder holds no model
    assert done.returncode == 1 and f"port {port}" in done.stderr and "--port" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_are_sent_without_delay(host):
    """Head and body of an answer are two packets, and the second would wait for the client to confirm the first."""

    async def accepted():
        found = asyncio.Future()
        with listen(host, 0) as listening:
            server = await asyncio.start_server(lambda _, writer: found.set_result(writer), sock=listening)
            _, client = await asyncio.open_connection(*listening.getsockname()[:2])
            writer = await asyncio.wait_for(found, 10)
            delay = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for own in (client, writer):
                own.close()
            server.close()
            return delay

    assert asyncio.run(accepted()) == 1


def test_a_short_key_is_refused(folder, tmp_path):
    (tmp_path / "key").write_text("sesame")
    done = mmkd("serve", folder, "--key_file", tmp_path / "key", "--port", "0")
    assert done.returncode == 1 and "16 characters" in done.stderr and "sesame" not in done.stderr


def test_an_index_of_another_model_is_refused(folder, tmp_path):
    SearchIndex.create(tmp_path / "index", {"fingerprint": "another"}, 16)
    done = mmkd("serve", folder, "--index", tmp_path / "index", "--port", "0")
    assert done.returncode == 1 and "other weights" in done.stderr


WITHOUT_TORCH = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "torchvision", "scipy", "sklearn", "accelerate"):
            raise ImportError(f"{name} is not part of the container")
sys.meta_path.insert(0, Blocker())
from mmkd.command.cli import main
main(sys.argv[1:])
"""


def test_an_export_is_served_without_torch(folder, archive, tmp_path):
    """With the answers of its model, calibrated by the file beside the weights, and its index."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    encoder = load_encoder(str(model))
    predictor = Predictor(encoder, read_labels("w3,w4"))
    own = {"scale": 7.0, "quantile": 1.0, "abstain_below": 2.0, "images": 50}
    write_calibration(model, Calibration(predictor.fingerprint, predictor.key, "single", ["w3", "w4"], **own))
    done = mmkd("export", model, "--format", "onnx", "--repeats", 0, "--output", tmp_path / "onnx", "--quiet", "true")
    assert done.returncode == 0, done.stderr
    options = ["--labels", "w3,w4", "--index", archive / "index"]
    program = [sys.executable, "-c", WITHOUT_TORCH]
    with serve_apart(tmp_path / "onnx", *options, program=program) as (_, address):
        status, found = post(address, "/v1/classify", {"input": data_url(noise())})
        _, embedded = post(address, "/v1/embeddings", {"input": ["w3", data_url(noise())], "encoding_format": "base64"})
        _, near = post(address, "/v1/search", {"input": "w4", "k": 1})
        assert urllib.request.urlopen(address, timeout=60).status == 200  # the page
    assert near["data"][0]["id"] == "1.png" and embedded["usage"]["prompt_tokens"] == 4
    (entry,) = found["data"]
    assert status == 200 and found["calibrated"] and entry["abstained"] and entry["labels"] == []
    assert set(entry["conformal_set"]) == {"w3", "w4"}
    text = torch.frombuffer(bytearray(base64.b64decode(embedded["data"][0]["embedding"])), dtype=torch.float32)
    torch.testing.assert_close(text, encoder.encode_texts(["w3"])[0], atol=1e-4, rtol=0)
    (tmp_path / "onnx" / "export.json").write_text('{"format": "exported-program"}')
    done = mmkd("serve", tmp_path / "onnx", "--port", "0")
    assert done.returncode == 1 and "can run code when they are loaded" in done.stderr


def test_the_container_without_torch_installs_what_the_project_names():
    root = Path(__file__).resolve().parents[2]
    needed = (root / "examples" / "serving" / "requirements-onnx.txt").read_text().split()
    project = (root / "pyproject.toml").read_text()
    assert not [requirement for requirement in needed if f'"{requirement}"' not in project]
    assert not [requirement for requirement in needed if requirement.startswith(("torch", "transformers"))]
