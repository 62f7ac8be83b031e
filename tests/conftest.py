"""What all tests share: the package first, one thread, no display, a cache of their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import expunge  # noqa: F401  installs the torchvision import hook before anything imports torchvision

import matplotlib  # isort: skip
import pytest  # isort: skip
import torch  # isort: skip
from hypothesis import settings  # isort: skip

SHARED = Path(os.environ.get("EXPUNGE_SHARED", Path(__file__).parents[1].parent / "shared"))

matplotlib.use("Agg")
torch.set_num_threads(1)
# The same examples on every run, and no verdict that depends on how busy the machine is.
settings.register_profile("expunge", deadline=None, derandomize=True)
settings.load_profile("expunge")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("EXPUNGE_CACHE")
    os.environ["EXPUNGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["EXPUNGE_CACHE"]
    else:
        os.environ["EXPUNGE_CACHE"] = before


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data and full golden files beside the project; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared folder at {SHARED}")
    return SHARED
