"""What is downloaded or cached is whole or isn't there: against a server on this machine that breaks off."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from metaoptim.tasks import cache
from metaoptim.tasks.download import fetch

BLOB = np.random.Philox(key=1).random_raw(50_000).tobytes()
MD5 = hashlib.md5(BLOB).hexdigest()


class Server:
    """A server of BLOB on this machine; `cuts` says after how many bytes each answer breaks off."""

    def __init__(self) -> None:
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []
        self.knows_ranges = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.path != "/file.zip":
            return request.send_error(404)
        wanted = request.headers["Range"]
        self.ranges.append(wanted)
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.knows_ranges else 0
        if first >= len(BLOB):
            return request.send_error(416)
        request.send_response(206 if first else 200)
        request.send_header("Content-Length", str(len(BLOB) - first))
        request.end_headers()
        body = BLOB[first:]
        request.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)
        return None


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_download(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    assert fetch(f"{server.url}/file.zip", path, MD5) == path
    assert path.read_bytes() == BLOB and not path.with_name("file.zip.part").exists()
    fetch(f"{server.url}/file.zip", path, MD5)
    assert server.ranges == [None]  # the second call asked nobody
    path.write_bytes(BLOB[:-1])
    assert fetch(f"{server.url}/file.zip", path, MD5).read_bytes() == BLOB  # a damaged file is replaced


def test_download_goes_on_after_a_broken_connection(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 70_000]
    assert fetch(f"{server.url}/file.zip", tmp_path / "file.zip", MD5).read_bytes() == BLOB
    assert server.ranges == [None, "bytes=100000-", "bytes=170000-"]


def test_download_goes_on_in_a_later_run(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    server.cuts = [100_000]
    with pytest.raises(OSError, match=r"closed early; 100000 bytes are kept\): run this again to go on, or fetch"):
        fetch(f"{server.url}/file.zip", path, MD5, attempts=1)
    assert not path.exists()
    assert fetch(f"{server.url}/file.zip", path, MD5).read_bytes() == BLOB
    assert server.ranges == [None, "bytes=100000-"]


def test_download_from_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.cuts, server.knows_ranges = [100_000], False
    assert fetch(f"{server.url}/file.zip", tmp_path / "file.zip", MD5).read_bytes() == BLOB


def test_a_part_that_is_complete_already_is_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(BLOB)
    assert fetch(f"{server.url}/file.zip", tmp_path / "file.zip", MD5).read_bytes() == BLOB
    (tmp_path / "other.zip.part").write_bytes(b"x" * 1_000_000)  # the rest of another download
    assert fetch(f"{server.url}/file.zip", tmp_path / "other.zip", MD5).read_bytes() == BLOB


FAILING: dict[str, tuple[Callable[[str], str], str, str]] = {
    "wrong checksum": (
        lambda url: f"{url}/file.zip",
        "0" * 32,
        f"it arrived with MD5 {MD5} instead of {'0' * 32}",
    ),
    "not found": (lambda url: f"{url}/none.zip", MD5, "answered 404 Not Found"),
    "refused": (lambda url: "http://127.0.0.1:9/file.zip", MD5, "could not be downloaded (["),
}


@pytest.mark.parametrize("case", FAILING)
def test_downloads_that_fail_say_what_to_do(case: str, server: Server, tmp_path: Path) -> None:
    address, md5, words = FAILING[case]
    with pytest.raises(OSError) as caught:
        fetch(address(server.url), tmp_path / "file.zip", md5)
    message = str(caught.value)
    assert words in message and "name this folder with --data DIR or METAOPTIM_DATA." in message
    assert "\n" not in message
    assert not (tmp_path / "file.zip").exists() and not (tmp_path / "file.zip.part").exists()


def test_the_cache_reads_only_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(50, dtype=np.uint8), "b": np.array(["x", "yy"])}
    assert cache.read(path) is None
    cache.write(path, arrays)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found = cache.read(path)
        if found is not None and set(found) == set(arrays):
            assert all(np.array_equal(found[n], arrays[n]) for n in arrays), place
    np.savez(path, a=np.array([{}], dtype=object), allow_pickle=True)
    assert cache.read(path) is None  # a pickle is never opened
