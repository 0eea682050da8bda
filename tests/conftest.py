"Options and paths all tests share"
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# They copy their process, and train in the copy, which PyTorch refuses after some uses: they run before all others
COPY_THEMSELVES = 'test_real_durability.py','test_cache.py'
SEEN = pytest.StashKey() # cases by function

def pytest_addoption(parser):
    parser.addoption('--lessons', action='store_true',
                     help='also run every lesson against the installed package (minutes)')
    parser.addoption('--until', type=float,
                     help='skip tests that would start, or are known to end, after this time, in seconds since 1970')

def pytest_configure(config): config.option.loadscopereorder = False # pytest-xdist: files stay in the order below

def pytest_collection_modifyitems(config, items):
    if hasattr(config, 'workerinput'): begin_with_long_files(items)
    items.sort(key=lambda item: item.path.name not in COPY_THEMSELVES) # the order of the others stays
    if config.getoption('--lessons'): return
    chosen = [item for item in items if 'lessons' not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen

def begin_with_long_files(items):
    "Sort tests so that files which take long are not what everybody waits for in the end"
    weights = Counter()
    for item in items:
        slow = item.get_closest_marker('slow')
        weights[item.path] += 1 if slow is None else slow.kwargs.get('seconds', 10)
    items.sort(key=lambda item: (-weights[item.path], str(item.path)))

def pytest_itemcollected(item):
    "Of a function marked `slow_after(n)`, the first n cases are quick"
    marker = item.get_closest_marker('slow_after')
    if marker is None: return
    seen = item.config.stash.setdefault(SEEN, Counter())
    seen[item.parent.nodeid, item.originalname] += 1
    if seen[item.parent.nodeid, item.originalname] > marker.args[0]: item.add_marker(pytest.mark.slow)

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    until = item.config.getoption('--until')
    slow = item.get_closest_marker('slow')
    takes = slow.kwargs.get('seconds', 0) if slow else 0
    if until is not None and time.time()+takes > until: pytest.skip('left out: there was no time left')

@pytest.fixture(scope='session')
def root(): return ROOT
