"""Fetching the published weights from a server of our own: whole, resumed, broken off, and what is not them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from brainldm.base.errors import BadInput, EnvironmentProblem, UsageError
from brainldm.model import fetch
from brainldm.model.fetch import MED3D_REPOSITORY, REPOSITORY, fetch_med3d, fetch_published
from brainldm.nets.medicalnet import MED3D_NAME

BLOCK = 1000
CONTENT = {"autoencoder.pt": bytes(range(256)) * 20, "model.pt": bytes(reversed(range(256))) * 50}
FOLDER_URL = f"/{REPOSITORY}/resolve/main/models"
MED3D_URL = f"/{MED3D_REPOSITORY}/resolve/main"


@dataclass
class Hub:
    """A host of the two files, and how it misbehaves."""

    content: dict[str, bytes]
    endpoint: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # file and range of every request
    ranges: bool = True
    breaks_after: int | None = None  # bytes of an answer after which the connection is cut
    status: int = 200
    content_type: str = "application/octet-stream"


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            folder, _, name = self.path.rpartition("/")
            wanted = self.headers["Range"]
            hub.asked.append((name, wanted))
            if hub.status != 200 or folder not in (FOLDER_URL, MED3D_URL):
                self.send_error(hub.status if hub.status != 200 else 404)
                return
            whole = hub.content[name]
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and hub.ranges else 0
            if start and start >= len(whole):
                self.send_error(416)
                return
            body = whole[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", hub.content_type)
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            self.end_headers()
            self.wfile.write(body[: hub.breaks_after])

        def log_message(self, *_: object) -> None: ...

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The host, running; the published md5s are those of its files."""
    hub = Hub(dict(CONTENT))
    published = {
        name: replace(file, md5=hashlib.md5(CONTENT[file.name]).hexdigest()) for name, file in fetch.PUBLISHED.items()
    }
    monkeypatch.setattr(fetch, "PUBLISHED", published)
    monkeypatch.setattr(fetch, "_BLOCK", BLOCK)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub)) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class Steps:
    """Notes what a person would see."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, int]] = []
        self.done = 0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.started.append((what, total, done))

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps


def is_whole(folder: Path) -> bool:
    """Both files and nothing else."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT


def test_both_files_are_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    steps = Steps()
    files = fetch_published(tmp_path / "ukb", endpoint=f"{hub.endpoint}/", progress=steps)
    assert files == {"autoencoder": tmp_path / "ukb" / "autoencoder.pt", "unet": tmp_path / "ukb" / "model.pt"}
    assert is_whole(tmp_path / "ukb")
    assert hub.asked == [("autoencoder.pt", None), ("model.pt", None)]
    assert steps.started == [("fetching autoencoder.pt (MB)", 5, 0), ("fetching model.pt (MB)", 12, 0)]
    assert steps.done == 6 + 13  # the last block of each is not full


def test_the_host_is_taken_from_the_environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    fetch_published(tmp_path)
    assert is_whole(tmp_path)


def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(CONTENT["model.pt"])
    fetch_published(tmp_path, endpoint=hub.endpoint)
    assert hub.asked == [("autoencoder.pt", None)]
    hub.asked.clear()
    hub.status = 500
    fetch_published(tmp_path, endpoint=hub.endpoint)
    assert hub.asked == []
    assert is_whole(tmp_path)


def test_a_part_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.pt.part").write_bytes(CONTENT["model.pt"][:3500])
    steps = Steps()
    fetch_published(tmp_path, endpoint=hub.endpoint, progress=steps)
    assert hub.asked[1] == ("model.pt", "bytes=3500-")
    assert steps.started[1] == ("fetching model.pt (MB)", 12, 3)
    assert is_whole(tmp_path)


def test_a_part_that_lacks_nothing_becomes_the_file(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.pt.part").write_bytes(CONTENT["model.pt"])
    fetch_published(tmp_path, endpoint=hub.endpoint)
    assert is_whole(tmp_path)


def test_a_host_that_knows_no_ranges_is_asked_for_all(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.pt.part").write_bytes(b"x" * 3500)
    hub.ranges = False
    steps = Steps()
    fetch_published(tmp_path, endpoint=hub.endpoint, progress=steps)
    assert steps.started[1] == ("fetching model.pt (MB)", 12, 0)
    assert is_whole(tmp_path)


def test_a_connection_that_breaks_is_taken_up_by_the_same_call(hub: Hub, tmp_path: Path) -> None:
    hub.breaks_after = 4321
    told = r"cannot get http://127\.0\.0\.1.*/autoencoder\.pt \(ChunkedEncodingError\)\. The same command goes on"
    with pytest.raises(EnvironmentProblem, match=told) as caught:
        fetch_published(tmp_path, endpoint=hub.endpoint)
    assert caught.value.reason == "network"
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder.pt.part"]
    kept = (tmp_path / "autoencoder.pt.part").read_bytes()
    assert kept == CONTENT["autoencoder.pt"][: len(kept)]
    assert len(kept) >= 4000  # no whole block is lost
    hub.breaks_after = None
    fetch_published(tmp_path, endpoint=hub.endpoint)
    assert hub.asked[1] == ("autoencoder.pt", f"bytes={len(kept)}-")
    assert is_whole(tmp_path)


@pytest.mark.parametrize("resumed", [0, 2000])
def test_a_wrong_file_is_kept_aside_and_refused(resumed: int, hub: Hub, tmp_path: Path) -> None:
    hub.content["autoencoder.pt"] = b"other" * 1000
    if resumed:
        (tmp_path / "autoencoder.pt.part").write_bytes(CONTENT["autoencoder.pt"][:resumed])
    found = hashlib.md5(CONTENT["autoencoder.pt"][:resumed] + hub.content["autoencoder.pt"][resumed:]).hexdigest()
    with pytest.raises(BadInput, match=rf"md5 {found}, .*kept as autoencoder\.pt\.wrong") as caught:
        fetch_published(tmp_path, endpoint=hub.endpoint)
    assert caught.value.reason == "checksum"
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder.pt.wrong"]

    # It is out of the way of the next try.
    hub.content.update(CONTENT)
    fetch_published(tmp_path, endpoint=hub.endpoint)
    (tmp_path / "autoencoder.pt.wrong").unlink()
    assert is_whole(tmp_path)


def test_another_file_of_that_name_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"somebody's own")
    with pytest.raises(BadInput, match=r"model\.pt: is not the published file.*Move it away") as caught:
        fetch_published(tmp_path, endpoint=hub.endpoint)
    assert caught.value.reason == "checksum"
    assert (tmp_path / "model.pt").read_bytes() == b"somebody's own"
    assert ("model.pt", None) not in hub.asked


def test_a_web_page_is_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.content["autoencoder.pt"] = b"<html>Sign in to this hotel</html>"
    hub.content_type = "text/html; charset=utf-8"
    part = tmp_path / "autoencoder.pt.part"
    part.write_bytes(CONTENT["autoencoder.pt"][:10])
    with pytest.raises(BadInput, match="answered with a web page") as caught:
        fetch_published(tmp_path, endpoint=hub.endpoint)
    assert caught.value.reason == "not_a_checkpoint"
    assert part.read_bytes() == CONTENT["autoencoder.pt"][:10]  # what was there is still good


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_what_the_host_refuses_is_told_with_its_status(status: int, hub: Hub, tmp_path: Path) -> None:
    hub.status = status
    with pytest.raises(EnvironmentProblem, match=rf"/models/autoencoder\.pt \(HTTP {status}\)") as caught:
        fetch_published(tmp_path, endpoint=hub.endpoint)
    assert caught.value.reason == "network"
    assert list(tmp_path.iterdir()) == []


def test_without_a_host_one_is_told_what_to_do_by_hand(hub: Hub, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub)) as closed:
        endpoint = f"http://127.0.0.1:{closed.server_port}"
    with pytest.raises(EnvironmentProblem, match="ConnectionError") as caught:
        fetch_published(tmp_path, endpoint=endpoint)
    assert caught.value.exit_code == 5
    assert f"download {endpoint}{FOLDER_URL}/autoencoder.pt elsewhere" in caught.value.remedy
    assert f"copy it to {tmp_path / 'autoencoder.pt'} and" in caught.value.remedy
    assert "HF_ENDPOINT" in caught.value.remedy

    # And that does it.
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    fetch_published(tmp_path, endpoint=endpoint)
    assert is_whole(tmp_path)


def test_a_disk_that_is_full_is_not_taken_for_the_network(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "autoencoder.pt.part").symlink_to("/dev/full")
    with pytest.raises(EnvironmentProblem, match="disk is full") as caught:
        fetch_published(tmp_path, endpoint=hub.endpoint)
    assert caught.value.reason == "disk_full"


def test_only_one_call_writes_to_a_folder(hub: Hub, tmp_path: Path) -> None:
    with fetch.locked_folder(tmp_path), pytest.raises(UsageError, match="another run"):
        fetch_published(tmp_path, endpoint=hub.endpoint)
    assert hub.asked == []


def test_med3d_is_fetched_and_proven_by_sha256(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.content[MED3D_NAME] = b"weights" * 500
    monkeypatch.setitem(fetch.MED3D_SHA256, MED3D_NAME, hashlib.sha256(hub.content[MED3D_NAME]).hexdigest())
    path = fetch_med3d(tmp_path / "med3d", endpoint=hub.endpoint)
    assert path.read_bytes() == hub.content[MED3D_NAME]
    monkeypatch.setitem(fetch.MED3D_SHA256, MED3D_NAME, "0" * 64)
    with pytest.raises(BadInput, match="sha256 differs"):
        fetch_med3d(tmp_path / "med3d", endpoint=hub.endpoint)
