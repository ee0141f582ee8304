"""The example service: its network, every endpoint, every bad request, and a real process."""

from __future__ import annotations

import asyncio
import io
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import bodies
import httpx2
import load
import numpy as np
import pytest
import service
import train
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from network import Served, Trained, store
from network import load as load_model
from numpy.typing import NDArray
from rich.console import Console
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Message

import fastbn
from fastbn.demo import Digits, load_digits
from fastbn.demo.network import softmax

pytestmark = pytest.mark.slow

Array = NDArray[Any]

SERVE = Path(service.__file__).parent
README = (SERVE / "README.md").read_text()
BACKENDS = fastbn.get_config()["backends"]
DEADLINE = 60  # seconds, for a process to start or to end
ENDPOINTS = ("/predict", "/predict.npy")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def network() -> Trained:
    return train.train(train.EPOCHS, Console(quiet=True))


@pytest.fixture(scope="module")
def model(network: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "model.npz"
    store(network, path)
    return path


@pytest.fixture(scope="module")
def images(digits: Digits) -> Array:
    """Some held-out images, as clients send them."""
    return (digits.test_x[:20] * 16).astype(np.float64)


@pytest.fixture(scope="module")
def expected(model: Path, images: Array) -> Array:
    """Their probabilities."""
    return load_model(model)(images.reshape(-1, 8, 8))


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[TestClient]:
    with TestClient(service.make_app(load_model(model))) as client:
        yield client


def npy(array: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    """An .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def header(text: str) -> bytes:
    """The beginning of an .npy file, saying anything."""
    told = text.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told


# The network.


def test_training_reaches_its_goal(network: Trained, digits: Digits) -> None:
    assert network.accuracy(digits.test_x.reshape(-1, 8, 8, 1), digits.test_labels) >= 0.97


@pytest.mark.parametrize("normalization", ["fastbn", "numpy"])
def test_the_served_network_is_the_trained_one(
    network: Trained, model: Path, digits: Digits, normalization: str
) -> None:
    """Folding, storing and frozen statistics change roundings alone."""
    x = digits.test_x.reshape(-1, 8, 8)
    served = load_model(model, normalization)(x * 16)
    np.testing.assert_allclose(served, softmax(network.scores(x[..., None])), atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_sees_the_same_digits(model: Path, digits: Digits, name: str) -> None:
    x = digits.test_x.reshape(-1, 8, 8) * 16
    with fastbn.use_backend("numpy"):
        reference = load_model(model)(x)
    with fastbn.use_backend(name):
        served = load_model(model)(x)
    np.testing.assert_allclose(served, reference, atol=1e-6)
    assert np.array_equal(served.argmax(axis=1), reference.argmax(axis=1))


def test_train_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.npz"
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "1", "--output", str(path)])
    train.main()
    assert load_model(path)(np.zeros((3, 8, 8))).shape == (3, 10)
    assert list(tmp_path.iterdir()) == [path]


# What it answers.


@pytest.mark.parametrize("shape", [(-1, 64), (-1, 8, 8)])
def test_json(client: TestClient, images: Array, expected: Array, shape: tuple[int, ...]) -> None:
    answer = client.post("/predict", json={"images": images.reshape(shape).tolist()})
    assert answer.status_code == 200
    assert list(answer.json()) == ["digits", "probabilities"]
    assert answer.json()["digits"] == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose(answer.json()["probabilities"], expected, atol=1e-6)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "f2", "u1", "i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(
    client: TestClient,
    images: Array,
    expected: Array,
    dtype: str,
    order: Any,
    version: tuple[int, int],
) -> None:
    sent = images.reshape(-1, 8, 8).astype(dtype, order=order)
    answer = client.post("/predict.npy", content=npy(sent, version))
    assert answer.status_code == 200
    probabilities = np.load(io.BytesIO(answer.content), allow_pickle=False)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_answers_side_by_side(client: TestClient, images: Array, expected: Array) -> None:
    """Each request gets its own images' answer."""

    def ask(i: int) -> Array:
        answer = client.post("/predict.npy", content=npy(images[i : i + 1]))
        return np.asarray(np.load(io.BytesIO(answer.content)))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, list(range(20)) * 4))
    np.testing.assert_allclose(np.concatenate(answers), np.tile(expected, (4, 1)), atol=1e-5)


def test_headers_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's parser, which reads them, may fail where threads take turns in it."""
    body, read = npy(np.zeros((1, 64))), np.lib.format.read_array_header_1_0
    inside = Lock()

    def alone(file: Any) -> Any:
        assert inside.acquire(blocking=False), "two at once"
        time.sleep(0.01)
        inside.release()
        return read(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", alone)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bodies.from_npy, [body] * 8))


def test_health(client: TestClient) -> None:
    answer = client.get("/health")
    assert answer.status_code == 200
    told = answer.json()
    assert told.pop("status") == "ok"
    assert told == service.what_runs() | {"normalization": "fastbn"}


def test_metrics_count_everything(model: Path, images: Array) -> None:
    client = TestClient(service.make_app(load_model(model, "numpy"), "numpy"))
    for content in (npy(images), npy(images), b"no file"):
        client.post("/predict.npy", content=content)
    client.get("/unknown")
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
    runs = service.what_runs()
    named = ",".join(f'{name}="{value}"' for name, value in runs.items())
    assert values[f'serve_info{{{named},normalization="numpy"}}'] == 1
    assert values['serve_requests_total{path="/predict.npy",status="200"}'] == 2
    assert values['serve_requests_total{path="/predict.npy",status="400"}'] == 1
    assert values['serve_requests_total{path="other",status="404"}'] == 1
    assert values['serve_latency_seconds_count{path="/predict.npy"}'] == 3
    p50, p90, p99 = (
        values[f'serve_latency_seconds{{path="/predict.npy",quantile="{q}"}}']
        for q in (0.5, 0.9, 0.99)
    )
    assert 0 < p50 <= p90 <= p99 <= values['serve_latency_seconds_sum{path="/predict.npy"}']


# What it refuses.

BLANK = [0] * 64
ROW = "[" + ",".join("0" * 64) + "]"
MANY = bodies.MAX_IMAGES + 1
BAD_JSON = {
    "nothing": (b"", 400, "no JSON"),
    "no JSON": (b"images", 400, "no JSON"),
    "cut short": (b'{"images": [[1, 2', 400, "no JSON"),
    "no text": (b"\xff\xfe\x00", 400, "no JSON"),
    "nested without end": (b'{"images": ' + b"[" * 100_000, 422, "array"),
    "an unknown key nested without end": (b'{"a": ' + b"[" * 100_000, 422, "unknown field `a`"),
    "NaN": (b'{"images": [[NaN]]}', 400, "no JSON"),
    "1e999": (b'{"images": [[1e999]]}', 422, "out of range"),
    "a list": (b"[]", 422, "Expected `object`"),
    "no images": (b"{}", 422, "`images`"),
    "another key": (b'{"images": [], "labels": []}', 422, "labels"),
    "null": (b'{"images": null}', 422, "`null`"),
    "strings": (b'{"images": [["1", "2"]]}', 422, "`str` - at `$.images[0][0]`"),
    "a flag": (b'{"images": [[true]]}', 422, "`bool`"),
    "an object": (b'{"images": [[{}]]}', 422, "`object`"),
    "no image": (b'{"images": []}', 422, "shape (0,)"),
    "empty images": (b'{"images": [[], []]}', 422, "shape (2, 0)"),
    "63 pixels": (b'{"images": [' + ROW.replace("0,", "", 1).encode() + b"]}", 422, "(1, 63)"),
    "different images": (f'{{"images": [{ROW}, [0]]}}'.encode(), 422, "differ in shape"),
    "numbers beside rows": (b'{"images": [[0, [0]]]}', 422, "differ in shape"),
    "negative": (f'{{"images": [{ROW.replace("0", "-1", 1)}]}}'.encode(), 422, "[0, 0] is -1.0"),
    "too bright": (f'{{"images": [{ROW}, {ROW.replace("0]", "17]")}]}}'.encode(), 422, "[1, 63]"),
    "a long number": (f'{{"images": [[{"9" * 5000}]]}}'.encode(), 422, "out of range"),
    "many images": (f'{{"images": [{",".join([ROW] * MANY)}]}}'.encode(), 413, "257 images"),
    "many bytes": (b" " * (bodies.MAX_BYTES + 1), 413, "1048576 bytes"),
}
GOOD = npy(np.zeros((2, 64), np.float32))
CLAIM = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
BAD_NPY = {
    "nothing": (b"", 400, "no .npy file"),
    "no file": (b"images of digits", 400, "no .npy file"),
    "a zip": (b"PK\x03\x04" + bytes(100), 400, "no .npy file"),
    "a pickle": (b"\x80\x04N.", 400, "no .npy file"),
    "version 3": (npy(np.zeros((1, 64)), (3, 0)), 400, "(3, 0)"),
    "version 9": (b"\x93NUMPY\x09\x00" + bytes(100), 400, "no .npy file"),
    "half a header": (GOOD[:50], 400, "no .npy file"),
    "half the data": (GOOD[:-256], 400, "256 bytes of data, expected 512"),
    "one byte less": (GOOD[:-1], 400, "511 bytes of data, expected 512"),
    "one byte more": (GOOD + b"\0", 400, "513 bytes of data, expected 512"),
    "objects": (npy(np.array([[None] * 64])), 422, "dtype object"),
    "text": (npy(np.array([["a"] * 64])), 422, "dtype <U1"),
    "flags": (npy(np.zeros((1, 64), bool)), 422, "dtype bool"),
    "complex": (npy(np.zeros((1, 64), complex)), 422, "dtype complex128"),
    "records": (npy(np.zeros((1, 64), [("a", "f4")])), 422, "dtype"),
    "one number": (npy(np.float64(1.0)), 422, "shape ()"),
    "no image": (npy(np.zeros((0, 64))), 422, "0 images"),
    "one axis": (npy(np.zeros(64)), 422, "shape (64,)"),
    "28x28": (npy(np.zeros((1, 28, 28))), 422, "shape (1, 28, 28)"),
    "NaN": (npy(np.full((1, 64), np.nan)), 422, "images[0, 0] is nan"),
    "infinity": (npy(np.full((1, 8, 8), np.inf)), 422, "images[0, 0, 0] is inf"),
    "negative": (npy(np.full((1, 64), -1)), 422, "is -1"),
    "too bright": (npy(np.full((1, 64), 255, np.uint8)), 422, "is 255"),
    "many images": (npy(np.zeros((MANY, 64), np.uint8)), 413, "257 images"),
    "a huge claim": (header(CLAIM.format("'<f8'", "(1 << 60, 64)")), 400, "no .npy file"),
    "many claimed": (header(CLAIM.format("'<f8'", "(99999999999, 64)")), 413, "99999999999"),
    "few claimed": (header(CLAIM.format("'<f8'", "(256, 64)")), 400, "0 bytes of data"),
    "negative claim": (header(CLAIM.format("'<f8'", "(-1, 64)")), 413, "-1 images"),
    "no dtype": (header(CLAIM.format("'<q9'", "(1, 64)")), 400, "no .npy file"),
    "code": (header("__import__('os').abort()"), 400, "no .npy file"),
    "nested": (header("(" * 9000), 400, "no .npy file"),
    "open quotes": (header("'''"), 400, "no .npy file"),
    "a long header": (header(" " * 60_000), 400, "no .npy file"),
    "many bytes": (GOOD + bytes(bodies.MAX_BYTES), 413, "1048576 bytes"),
}
BAD = [
    pytest.param(path, *row, id=f"{path}, {name}")
    for path, table in zip(ENDPOINTS, (BAD_JSON, BAD_NPY), strict=True)
    for name, row in table.items()
]


@pytest.mark.parametrize(("path", "body", "status", "said"), BAD)
def test_bad_bodies(client: TestClient, path: str, body: bytes, status: int, said: str) -> None:
    """Each is a 4xx whose message says what came, what was expected and what to do."""
    answer = client.post(path, content=body)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    message = answer.json()["error"]
    assert said in message
    assert "; " in message
    assert "\n" not in message


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_body_of_unknown_length_has_the_same_limit(client: TestClient, path: str) -> None:
    chunks = (bytes(1 << 16) for _ in range(100))
    answer = client.post(path, content=chunks)
    assert "content-length" not in answer.request.headers
    assert answer.status_code == 413


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda s: f'{{"images": {s}}}'.encode()))
def test_any_json_is_read_or_refused(body: bytes) -> None:
    refused(bodies.from_json, body)


@given(st.text(st.characters(max_codepoint=255), max_size=100) | st.just(CLAIM.format("(1,)", 2)))
def test_any_npy_is_read_or_refused(text: str) -> None:
    refused(bodies.from_npy, header(text))
    refused(bodies.from_npy, header(CLAIM.format(repr(text), "(1, 64)")))
    refused(bodies.from_npy, header(CLAIM.format("'<f4'", text)))


def refused(read: Any, body: bytes) -> None:
    """It is a client's error and nothing else."""
    with pytest.raises(HTTPException) as caught:
        read(body)
    assert 400 <= caught.value.status_code < 500


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/predict", 405, "GET came for /predict, expected POST"),
        ("PUT", "/predict.npy", 405, "PUT came for /predict.npy, expected POST"),
        ("POST", "/metrics", 405, "POST came for /metrics, expected GET"),
        ("BREW", "/health", 405, "BREW came for /health, expected GET"),
        ("GET", "/", 404, "'/' is no path of this service; it has POST /predict, "),
        ("POST", "/predict/", 404, "'/predict/' is no path"),
        ("GET", "/../model.npz", 404, "is no path"),
        ("GET", "/%00%ff", 404, "is no path"),
    ],
)
def test_wrong_methods_and_paths(
    client: TestClient, method: str, path: str, status: int, said: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert said in answer.json()["error"]
    if status == 405:
        assert said.rsplit(" ", 1)[1] in answer.headers["allow"]


def test_a_slow_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_SECONDS", 0.01)

    async def receive() -> Message:
        await asyncio.sleep(DEADLINE)
        raise AssertionError

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(HTTPException) as caught:
        asyncio.run(bodies.read(request))
    assert caught.value.status_code == 408
    assert "0 bytes of the body came in 0.01 seconds" in caught.value.detail


def test_a_client_that_leaves_is_counted(model: Path) -> None:
    app, sent = service.make_app(load_model(model)), []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400
    page = TestClient(app).get("/metrics").text
    assert 'serve_requests_total{path="/predict",status="400"} 1' in page


def test_a_bug_is_told_without_a_traceback(model: Path, images: Array) -> None:
    class Failing(Served):
        def __call__(self, images: Array) -> Array:
            if images.any():
                raise RuntimeError("secret")
            return super().__call__(images)

    with np.load(model) as arrays:
        app = service.make_app(Failing(arrays))
    client = TestClient(app, raise_server_exceptions=False)
    answer = client.post("/predict.npy", content=npy(images))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "log" in answer.json()["error"]
    assert 'serve_requests_total{path="/predict.npy",status="500"} 1' in client.get("/metrics").text


# Real processes.


def test_a_real_server(
    model: Path, images: Array, expected: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started, asked, refused, loaded and stopped."""
    with load.server({"FASTBN_BACKEND": "numpy"}, "--model", str(model)) as url:
        with httpx2.Client(base_url=url, timeout=DEADLINE) as client:
            told = client.get("/health").json()
            assert (told["backend"], told["threads"]) == ("numpy", "1")
            answer = client.post("/predict", json={"images": images.tolist()})
            assert answer.json()["digits"] == expected.argmax(axis=1).tolist()
            for content in (bytes(5_000_000), (bytes(1 << 16) for _ in range(80))):
                assert client.post("/predict", content=content).status_code == 413
        load.main(["--url", url, "--rounds", "1", "--seconds", "0.2", "--images", "1", "3"])
    printed = capsys.readouterr().out
    assert "images a request: 1; connections: 4" in printed
    assert "images a request: 3; connections: 4" in printed


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with service.listen(uvicorn.Config("", "127.0.0.1", 0)) as listening:
        listening.listen()
        with (
            socket.create_connection(listening.getsockname(), DEADLINE),
            listening.accept()[0] as accepted,
        ):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def run_service(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A service that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, str(load.SERVICE), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    np.savez(path, stem=np.zeros(3))
    done = run_service("--model", str(path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path} is no model of this network")
    assert "Traceback" not in done.stderr


def test_a_model_is_trained_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "EPOCHS", 1)
    path = train.ready(tmp_path / "model.npz")
    written = path.stat().st_mtime_ns
    assert train.ready(path).stat().st_mtime_ns == written


# What the README says.


def commands() -> list[list[str]]:
    """The commands of its sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    found, command = [], ""
    for line in "".join(blocks).replace(" && ", "\n").splitlines():
        command += line + "\n"
        if command.count("'") % 2 == 0:  # else the next line belongs to it
            found.append(shlex.split(command))
            command = ""
    return found


def test_the_commands_of_the_readme(client: TestClient, images: Array) -> None:
    """Scripts take the options that are shown, and the service answers what curl sends."""
    run = set()
    for command in commands():
        words = [word for word in command if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "curl":
            run.add(words[0])
            answer = curl(client, words, images)
            assert answer.status_code == 200, answer.text
        elif words[:2] != ["python", "-m"]:
            assert words[0] == "python"
            script = SERVE.parents[1] / words[1]
            run.add(script.name)
            parse = {"service.py": service.parse, "load.py": load.parse, "train.py": train.parse}
            parse[script.name](words[2:])
    assert run == {"curl", "load.py", "service.py", "train.py"}


def curl(client: TestClient, words: list[str], images: Array) -> Any:
    """What curl would send, with images for a file."""
    path = words[1].removeprefix("localhost:8000")
    if "--data-binary" in words:
        assert words[words.index("--data-binary") + 1].startswith("@")
        return client.post(path, content=npy(images))
    if "-d" in words:
        return client.post(path, content=words[words.index("-d") + 1])
    return client.get(path)
