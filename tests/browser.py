"A browser without a window that can reach this machine only"
import importlib.util
import shutil
from contextlib import contextmanager

import pytest

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)
DRIVER = shutil.which('chromedriver')
FLAGS = ['headless=new', 'no-sandbox', 'disable-gpu', 'disable-quic', 'disable-dev-shm-usage', 'no-first-run', 'disable-background-networking',
         'disable-component-update', 'disable-sync', 'window-size=1200,2200', 'no-proxy-server', 'host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']

def needs_browser(*packages):
    "Marks of tests that open a browser: they skip, and say so, where it or a package is missing"
    missing = [name for name in ('selenium', *packages) if not importlib.util.find_spec(name)]
    return [pytest.mark.skipif(not (BROWSER and DRIVER), reason='needs chromium and chromedriver (on Debian: apt-get install chromium chromium-driver)'),
            pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: pip install -e '.[dev]'")]

@contextmanager
def open_browser(profile, timeout=300):
    "A driver; its log holds what the page said and asked for"
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS + [f'user-data-dir={profile}']: options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        driver.set_page_load_timeout(timeout)
        yield driver
    finally: driver.quit()
