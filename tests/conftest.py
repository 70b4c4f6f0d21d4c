"""What several tests share: where the real data are, and a cache of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from metaoptim.engine.graphs import buffers
from metaoptim.tasks import ImageTasks


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets: METAOPTIM_DATA, else ../shared/data beside the repository."""
    named = os.environ.get("METAOPTIM_DATA")
    path = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not (path / "omniglot").is_dir():
        reason = f"{path} holds no real data; name a folder with `omniglot` in METAOPTIM_DATA"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For this process and its children: what tests compute is small, and threads that fight for busy cores are slow."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Made data are kept between test runs, but not among the user's."""
    if "METAOPTIM_CACHE" not in os.environ:
        kept: pytest.Cache | None = getattr(request.config, "cache", None)  # none with -p no:cacheprovider
        path = kept.mkdir("metaoptim") if kept else tmp_path_factory.mktemp("cache")
        os.environ["METAOPTIM_CACHE"] = str(path)


@pytest.fixture
def doubles() -> Iterator[None]:
    """Default floats of 64 bits, and torch's generator from one seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def reused_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs reuse even the smallest buffers, where they would reuse large ones alone."""
    monkeypatch.setattr(buffers, "LARGE", 1)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for one test, with nothing in it."""
    monkeypatch.setenv("METAOPTIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pixel_accuracy() -> Callable[[ImageTasks, int], float]:
    """Test accuracy, in percent, of the nearest mean of the raw pixels: tells whether a data set is what it was."""

    def nearest_centroid(tasks: ImageTasks, episodes: int) -> float:
        (xs, ys), (xq, yq) = tasks.sample("test", seed=0, start=0, count=episodes)
        member = torch.nn.functional.one_hot(ys, tasks.ways).float().transpose(1, 2) / tasks.shots
        nearest = torch.cdist(xq.flatten(2), member @ xs.flatten(2)).argmin(2)
        return 100 * (nearest == yq).float().mean().item()

    return nearest_centroid
