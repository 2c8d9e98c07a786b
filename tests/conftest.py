"""What holds for all tests: the file that takes longest begins first, and each test sees its own warnings."""

import pytest

from runtime import warn


@pytest.fixture(autouse=True)
def each_warning_anew():
    warn.cache_clear()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_pipeline")
