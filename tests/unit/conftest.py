"""The small pipeline that tests of concept erasers share, found by each as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
from concept_runs import put_back


@pytest.fixture(scope="module")
def tiny_pipeline() -> Any:
    from expunge.tasks.tiny_text_to_image import tiny_text_to_image

    return tiny_text_to_image()


@pytest.fixture
def task(tiny_pipeline: Any) -> Iterator[Any]:
    with put_back(tiny_pipeline):
        yield tiny_pipeline
