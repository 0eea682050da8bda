"Options and paths all tests share"
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

def pytest_addoption(parser):
    parser.addoption('--lessons', action='store_true', help='also run every lesson against the installed package (minutes)')

def pytest_collection_modifyitems(config, items):
    if config.getoption('--lessons'): return
    chosen = [item for item in items if 'lessons' not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen

@pytest.fixture(scope='session')
def root(): return ROOT
