"""With two processes (tests/run.sh), the file that takes longest has to begin first."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_pipeline")
