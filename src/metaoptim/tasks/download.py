"""Downloads that may be interrupted at any moment: resumed, verified by checksum, and in place only when complete."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from metaoptim.tasks.cache import progress

ELSEWHERE = "or fetch it by other means into a folder and name this folder with --data DIR or METAOPTIM_DATA"


def fetch(url: str, path: Path, md5: str, *, attempts: int = 3, timeout: float = 30.0) -> Path:
    """Downloads a file unless it is there already; OSError where that fails.

    What has arrived is kept in `path` + `.part`; a broken download resumes from there, in this call or in a
    later one.

    Args:
        url: The address.
        path: Where the file goes; its folder must exist.
        md5: The checksum it must have, as hexadecimal digits.
        attempts: How often to connect before giving up.
        timeout: Seconds of silence after which a connection counts as broken.
    """
    part = path.with_name(path.name + ".part")
    with FileLock(path.with_name(path.name + ".lock")):  # two processes must not write into one .part
        if path.is_file() and _md5(path) == md5:
            return path
        stopped = "nothing was received"
        for _ in range(attempts):
            try:
                whole = _receive(url, part, timeout)
            except urllib.error.HTTPError as error:
                error.close()
                raise OSError(f"{url} answered {error.code} {error.reason}; try again later, {ELSEWHERE}.") from error
            except (OSError, http.client.HTTPException) as error:  # no such host, refused, reset, timed out
                stopped = str(getattr(error, "reason", error)) or type(error).__name__
                continue
            if not whole:
                stopped = "the connection was closed early"
                continue
            if (found := _md5(part)) != md5:
                stopped = f"it arrived with MD5 {found} instead of {md5}"
                part.unlink()
                continue
            part.replace(path)
            return path
        size = part.stat().st_size if part.exists() else 0
        raise OSError(
            f"{url} could not be downloaded ({stopped}; {size} bytes are kept): run this again to go on, {ELSEWHERE}."
        )


def _receive(url: str, part: Path, timeout: float) -> bool:
    """Appends what is missing to `part`; returns whether the file is complete now."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        return True  # nothing is missing, or there is more than there should be: the checksum will tell
    with answer:
        if answer.status != http.client.PARTIAL_CONTENT:
            have = 0  # the server sends everything again
        length = answer.headers["Content-Length"]
        total = have + int(length) if length else None
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with part.open("ab" if have else "wb") as file, progress("{task.description}", *columns) as bar:
            shown = bar.add_task(url.rsplit("/", 1)[-1], total=total, completed=have)
            while chunk := answer.read(1 << 16):
                file.write(chunk)
                bar.advance(shown, len(chunk))
    return total is None or part.stat().st_size >= total


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
