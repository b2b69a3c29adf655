import asyncio
import base64
import json
import logging
import threading

import numpy as np
import pytest
from PIL import Image
from served import data_url, noise, serve_here
from tiny_model import save_tiny

from mmkd.encoders.encoder import token_counter
from mmkd.encoders.zoo import load_encoder
from mmkd.serving.gate import Limits
from mmkd.serving.service import Batching


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("served") / "tiny")


def answers(folder, *requests, **options):
    """Responses to JSON bodies, one after the other: (path, body) each."""

    async def work(client, service):
        return [await client.post(path, json=body) for path, body in requests]

    return serve_here(folder, work, **options)


def vectors(response):
    assert response.status_code == 200, response.text
    return np.array([entry["embedding"] for entry in response.json()["data"]], dtype=np.float32)


def error(response):
    content = response.json()["error"]
    assert set(content) == {"message", "type", "param", "code"}
    return response.status_code, content["code"], content["param"]


def test_embeddings_equal_those_of_the_encoder_in_every_shape_of_input(folder):
    encoder = load_encoder(str(folder))
    image = noise()
    expected_image = encoder.encode_images([Image.open(__import__("io").BytesIO(image))]).numpy()[0]
    expected_text = encoder.encode_texts(["w3 w4"]).numpy()[0]
    plain = base64.b64encode(image).decode()
    inputs = [
        "w3 w4",
        data_url(image),
        {"text": "w3 w4"},
        {"image": data_url(image)},
        {"image": plain},
        {"type": "text", "text": "w3 w4"},
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "image_url", "image_url": data_url(image)},
    ]
    many, one = answers(
        folder, ("/v1/embeddings", {"input": inputs, "model": "tiny"}), ("/v1/embeddings", {"input": "w3 w4"})
    )
    found = vectors(many)
    for place in (0, 2, 5):
        np.testing.assert_allclose(found[place], expected_text, atol=1e-5)
    for place in (1, 3, 4, 6, 7):
        np.testing.assert_allclose(found[place], expected_image, atol=1e-5)
    content = many.json()
    assert [entry["index"] for entry in content["data"]] == list(range(8))
    assert content["object"] == "list" and content["model"] == "tiny"
    tokens = one.json()["usage"]["prompt_tokens"]
    assert tokens > 2 and content["usage"] == {"prompt_tokens": 3 * tokens, "total_tokens": 3 * tokens}


def test_counting_tokens_leaves_the_padding_of_batches_alone(folder):
    encoder = load_encoder(str(folder))
    count, tokenizer = token_counter(encoder), encoder.processor.tokenizer.backend_tokenizer
    encoder.encode_texts(["w3", "w3 w4 w5"])
    padding = tokenizer.padding
    assert count(["w3", "w3 w4 w5"]) == 4 + 8 and padding is not None and tokenizer.padding == padding


def test_base64_holds_the_same_numbers(folder):
    as_numbers, as_text = answers(
        folder,
        ("/v1/embeddings", {"input": ["w3"]}),
        ("/v1/embeddings", {"input": ["w3"], "encoding_format": "base64", "dimensions": 16}),
    )
    decoded = np.frombuffer(base64.b64decode(as_text.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(decoded, vectors(as_numbers)[0])


def test_a_form_takes_files_and_texts(folder):
    async def work(client, service):
        files = [("image", ("a.png", noise(1), "image/png")), ("file", ("b", noise(2), "application/octet-stream"))]
        form = await client.post("/v1/embeddings", files=files, data={"input": "w5", "model": "tiny"})
        inputs = [data_url(noise(1)), data_url(noise(2)), "w5"]
        return form, await client.post("/v1/embeddings", json={"input": inputs})

    form, listed = serve_here(folder, work)
    found, expected = vectors(form), vectors(listed)
    assert len(found) == 3
    np.testing.assert_allclose(sorted(found.tolist()), sorted(expected.tolist()), atol=1e-5)


def test_batched_answers_equal_those_one_by_one_and_a_broken_image_fails_alone(folder):
    images = [noise(seed, (40 + seed, 64)) for seed in range(12)]
    sizes = []

    async def work(client, service):
        bodies = [{"input": data_url(image)} for image in images] + [{"input": data_url(b"no image")}]
        together = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies))
        alone = [await client.post("/v1/embeddings", json=body) for body in bodies[:-1]]
        return together, alone

    batching = Batching(largest=8, wait=0.2, observe=lambda kind, size: sizes.append(size))
    together, alone = serve_here(folder, work, batching=batching)
    assert error(together.pop()) == (400, "image_unsupported", "input.0")
    np.testing.assert_allclose(
        np.concatenate(list(map(vectors, together))), np.concatenate(list(map(vectors, alone))), atol=1e-5
    )
    assert max(sizes) == 8


def test_classification_with_labels_of_the_service_and_of_the_request(folder):
    body = {"input": [data_url(noise(1)), data_url(noise(2))]}
    own, named, again = answers(
        folder,
        ("/v1/classify", body),
        ("/v1/classify", {**body, "labels": ["w6", "w7"]}),
        ("/v1/classify", {"input": data_url(noise(2)), "labels": "w6, w7"}),
        labels="w3,w4,w5",
    )
    for response, labels in ((own, {"w3", "w4", "w5"}), (named, {"w6", "w7"})):
        content = response.json()
        assert content["calibrated"] is False and "clinical" in content["notice"] and len(content["data"]) == 2
        for entry in content["data"]:
            assert set(entry["probabilities"]) == labels
            assert sum(entry["probabilities"].values()) == pytest.approx(1)
            assert entry["labels"] == [max(entry["probabilities"], key=entry["probabilities"].get)]
            assert entry["abstained"] is False and entry["conformal_set"] is None
    assert again.json()["data"][0]["probabilities"] == pytest.approx(named.json()["data"][1]["probabilities"])


REFUSED = [
    ({"input": ""}, 400, "empty_input", "input.0"),
    ({"input": []}, 400, "empty_input", "input"),
    ({"input": ["w3", " "]}, 400, "empty_input", "input.1"),
    ({"input": {"image": ""}}, 400, "empty_input", "input.0"),
    ({}, 400, "invalid_request", "input"),
    ({"input": [1, 2, 3]}, 400, "invalid_request", "input.0"),
    ({"input": [[1, 2], [3]]}, 400, "invalid_request", "input.0"),
    ({"input": None}, 400, "invalid_request", "input.0"),
    ({"input": {"video": "x"}}, 400, "invalid_item", "input.0"),
    ({"input": {"text": "a", "image": "b"}}, 400, "invalid_item", "input.0"),
    ({"input": {"type": "image_url", "image_url": {"path": "/etc/passwd"}}}, 400, "invalid_item", "input.0"),
    ({"input": "https://example.org/scan.png"}, 400, "address_refused", "input.0"),
    ({"input": {"image": "http://127.0.0.1:1/scan.png"}}, 400, "address_refused", "input.0"),
    ({"input": {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}}, 400, "address_refused", "input.0"),
    ({"input": ["w3", data_url(b"nothing")]}, 400, "image_unsupported", "input.1"),
    ({"input": data_url(noise()[:-700])}, 400, "image_corrupt", "input.0"),
    ({"input": data_url(b"text", "text/plain")}, 415, "unsupported_media_type", "input.0"),
    ({"input": "data:image/png,abc"}, 400, "invalid_image", "input.0"),
    ({"input": "data:image/png;base64,????"}, 400, "invalid_image", "input.0"),
    ({"input": ["w3"] * 65}, 400, "too_many_items", "input"),
    ({"input": "w3", "model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"input": "w3", "dimensions": 8}, 400, "invalid_request", "dimensions"),
    ({"input": "w3", "encoding_format": "int8"}, 400, "invalid_request", "encoding_format"),
    ({"input": "w3", "encoding_fromat": "float"}, 400, "unknown_field", "encoding_fromat"),
]


def test_what_is_refused_and_how(folder):
    found = answers(folder, *(("/v1/embeddings", body) for body, *_ in REFUSED))
    for response, (body, *expected) in zip(found, REFUSED, strict=True):
        assert error(response) == tuple(expected), (str(body)[:100], response.text)
        assert "passwd" not in response.text and "example.org" not in response.text
    assert "encoding_format" in found[-1].json()["error"]["message"]


def test_malformed_requests(folder):
    bomb = Image.new("1", (20_000, 20_000))
    buffer = __import__("io").BytesIO()
    bomb.save(buffer, "PNG")

    async def work(client, service):
        kind = {"content-type": "application/json"}
        return {
            "json": await client.post("/v1/embeddings", content=b'{"input": ', headers=kind),
            "nested": await client.post("/v1/embeddings", content=b'{"input": ' + b"[" * 100_000, headers=kind),
            "utf8": await client.post("/v1/embeddings", content=b'{"input": "\xff"}', headers=kind),
            "type": await client.post("/v1/embeddings", content=b"w3", headers={"content-type": "text/plain"}),
            "form": await client.post(
                "/v1/embeddings", content=b"x", headers={"content-type": "multipart/form-data; boundary=a"}
            ),
            "no boundary": await client.post(
                "/v1/embeddings", content=b"x", headers={"content-type": "multipart/form-data"}
            ),
            "field": await client.post("/v1/embeddings", files={"video": ("a.png", noise(), "image/png")}),
            "file type": await client.post("/v1/embeddings", files={"image": ("a.txt", b"text", "text/plain")}),
            "empty file": await client.post("/v1/embeddings", files={"image": ("a.png", b"", "image/png")}),
            "bomb": await client.post("/v1/embeddings", files={"image": ("a.png", buffer.getvalue(), "image/png")}),
            "path": await client.get("/v2/embeddings"),
            "method": await client.get("/v1/embeddings"),
            "archive": await client.post("/v1/search", json={"input": "w3"}),
            "no labels": await client.post("/v1/classify", json={"input": data_url(noise())}),
            "one label": await client.post("/v1/classify", json={"input": data_url(noise()), "labels": ["w3"]}),
            "a text": await client.post("/v1/classify", json={"input": "w3", "labels": ["w3", "w4"]}),
            "after all": await client.post("/v1/embeddings", json={"input": "w3"}),
        }

    found = serve_here(folder, work)
    assert found.pop("after all").status_code == 200
    assert {name: error(response)[:2] for name, response in found.items()} == {
        "json": (400, "invalid_json"),
        "nested": (400, "invalid_json"),
        "utf8": (400, "invalid_json"),
        "type": (415, "unsupported_media_type"),
        "form": (400, "invalid_form"),
        "no boundary": (400, "invalid_form"),
        "field": (400, "unknown_field"),
        "file type": (415, "unsupported_media_type"),
        "empty file": (400, "empty_input"),
        "bomb": (400, "image_too_large"),
        "path": (404, "not_found"),
        "method": (405, "not_allowed"),
        "archive": (404, "no_archive"),
        "no labels": (400, "invalid_labels"),
        "one label": (400, "invalid_labels"),
        "a text": (400, "invalid_item"),
    }


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(folder):
    given = []

    async def endless():
        for _ in range(2 * 1024**3 // 65536):  # 2 GiB
            given.append(65536)
            yield bytes(65536)

    async def work(client, service):
        kind = {"content-type": "application/json"}
        streamed = await client.post("/v1/embeddings", content=endless(), headers=kind)
        announced = await client.post(
            "/v1/embeddings", content=endless(), headers={**kind, "content-length": "9999999"}
        )
        return streamed, announced

    streamed, announced = serve_here(folder, work, limits=Limits(body_bytes=1_000_000))
    assert error(streamed) == error(announced) == (413, "too_large", None)
    assert sum(given) <= 1_000_000 + 65536


def test_the_queue_refuses_what_it_cannot_hold_and_says_when_to_come_back(folder):
    async def work(client, service):
        held = threading.Event()
        service._model_thread.submit(held.wait, 10)  # the model is busy
        waiting = [asyncio.create_task(client.post("/v1/embeddings", json={"input": ["w3"] * 4})) for _ in range(2)]
        while service.pending < 8:
            await asyncio.sleep(0.01)
        refused, ready = await client.post("/v1/embeddings", json={"input": "w3"}), await client.get("/readyz")
        held.set()
        served = await asyncio.gather(*waiting)
        return refused, ready, served, await client.get("/readyz"), service.pending

    refused, ready, served, later, pending = serve_here(folder, work, limits=Limits(waiting=8))
    assert error(refused)[:2] == (503, "overloaded") and refused.headers["retry-after"] == "1"
    assert ready.status_code == 503 and later.status_code == 200 and pending == 0
    assert [response.status_code for response in served] == [200, 200]


def test_a_request_that_takes_too_long_ends(folder):
    async def work(client, service):
        held = threading.Event()
        service._model_thread.submit(held.wait, 10)
        late = await client.post("/v1/embeddings", json={"input": "w3"})
        held.set()
        return late, service.pending, await client.post("/v1/embeddings", json={"input": "w3"})

    late, pending, after = serve_here(folder, work, limits=Limits(seconds=0.3))
    assert error(late)[:2] == (504, "timeout") and pending == 0 and after.status_code == 200


def test_a_client_that_hangs_up_leaves_the_queue(folder):
    computed = []

    async def work(client, service):
        encode, held = service.encoder.encode_texts, threading.Event()
        service.encoder.encode_texts = lambda texts: computed.extend(texts) or (held.wait(10) and encode(texts))
        first = asyncio.create_task(client.post("/v1/embeddings", json={"input": "w7"}))
        while not computed:
            await asyncio.sleep(0.01)
        gone = asyncio.create_task(client.post("/v1/embeddings", json={"input": "w8"}))
        stays = asyncio.create_task(client.post("/v1/embeddings", json={"input": "w9"}))
        while service.pending < 3:
            await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        held.set()
        return await first, await stays

    assert [response.status_code for response in serve_here(folder, work)] == [200, 200]
    assert "w9" in computed and "w8" not in computed


def test_a_key_is_needed_where_there_is_one(folder):
    async def work(client, service):
        def post(authorization):
            headers = {"authorization": authorization} if authorization else {}
            return client.post("/v1/embeddings", json={"input": "w3"}, headers=headers)

        basic = base64.b64encode(b"anyone:sesame").decode()
        right = [await post("Bearer sesame"), await post(f"Basic {basic}"), await post("bearer  sesame")]
        wrong = [await post(text) for text in ("", "Bearer", "Bearer sesam", "Basic sesame", "Basic ====", "sesame")]
        open_ones = [await client.get(path) for path in ("/livez", "/readyz")]
        closed = [await client.get(path) for path in ("/metrics", "/v1/models", "/openapi.json", "/unknown")]
        return right, wrong, open_ones, closed

    right, wrong, open_ones, closed = serve_here(folder, work, key=b"sesame")
    assert {response.status_code for response in right + open_ones} == {200}
    assert {error(response) for response in wrong + closed} == {(401, "invalid_api_key", None)}
    assert wrong[0].headers["www-authenticate"].startswith("Basic")


def test_other_host_names_are_refused(folder):
    async def work(client, service):
        return [(await client.get("/livez", headers={"host": host})).status_code for host in hosts]

    hosts = ["localhost", "localhost:8000", "[::1]:8000", "evil.example", "localhost.evil.example", ""]
    assert serve_here(folder, work, hosts=("localhost", "::1")) == [200, 200, 200, 421, 421, 421]


def test_models_metrics_and_schema(folder):
    async def work(client, service):
        await client.post("/v1/embeddings", json={"input": ["w3", data_url(noise())]})
        await client.post("/v1/embeddings", json={"input": []})
        await client.get("/secret-name.png")
        return [await client.get(path) for path in ("/v1/models", "/metrics", "/openapi.json")]

    models, metrics, schema = serve_here(folder, work, labels="w3,w4")
    (entry,) = models.json()["data"]
    assert (entry["id"], entry["object"], entry["dim"], entry["labels"]) == ("tiny", "model", 16, ["w3", "w4"])
    lines = metrics.text.splitlines()
    assert 'mmkd_requests_total{route="/v1/embeddings",status="200"} 1.0' in lines
    assert 'mmkd_requests_total{route="/v1/embeddings",status="400"} 1.0' in lines
    assert 'mmkd_requests_total{route="unknown",status="404"} 1.0' in lines
    assert any(line.startswith("process_resident_memory_bytes") for line in lines)
    assert "secret" not in metrics.text
    described = schema.json()
    body = described["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    assert {"/v1/classify", "/v1/search", "/v1/models"} <= set(described["paths"])


def test_logs_hold_nothing_that_a_user_sends(folder, caplog):
    caplog.set_level(logging.INFO)

    async def work(client, service):
        await client.post("/v1/embeddings?patient=query-secret", json={"input": "caption-secret"})
        await client.post("/v1/embeddings", files={"image": ("file-secret.png", b"body-secret", "image/png")})
        await client.get("/path-secret.dcm", headers={"authorization": "Bearer key-secret"})
        service.embed = None  # a bug
        return await client.post("/v1/embeddings", json={"input": "caption-secret"})

    broken = serve_here(folder, work)
    assert error(broken)[:2] == (500, "internal_error")
    own = [record.getMessage() for record in caplog.records if record.name.startswith("mmkd")]
    assert [line.rsplit(" ", 2)[0] for line in own if line.startswith("POST /v1/embeddings")][:2] == [
        "POST /v1/embeddings 200",
        "POST /v1/embeddings 400",
    ]
    assert any("TypeError" in line for line in own)
    assert "secret" not in "".join(record.getMessage() for record in caplog.records if record.name != "httpx")


def test_two_hundred_and_fifty_clients_at_once(folder):
    async def work(client, service):
        bodies = [{"input": [f"w{n % 60}", data_url(noise(n % 5))]} for n in range(250)]
        return await asyncio.gather(*(client.post("/v1/embeddings", json=body) for body in bodies))

    found = serve_here(folder, work)
    assert {response.status_code for response in found} == {200}
    reference = vectors(found[0])
    np.testing.assert_allclose(vectors(found[60]), reference, atol=1e-5)
    assert json.loads(found[249].text)["model"] == "tiny"


def test_a_thousand_clients_at_once_are_answered_or_refused(folder):
    async def work(client, service):
        requests = (client.post("/v1/embeddings", json={"input": f"w{n % 60}"}) for n in range(1000))
        return await asyncio.gather(*requests), await client.post("/v1/embeddings", json={"input": "w3"})

    found, after = serve_here(folder, work)
    refused = [response for response in found if response.status_code != 200]
    assert {error(response)[:2] for response in refused} == {(503, "overloaded")}
    assert all("retry-after" in response.headers for response in refused)
    assert len(found) - len(refused) >= Limits().waiting and after.status_code == 200
