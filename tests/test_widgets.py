"Widgets as a person meets them: Voila serves a notebook, a browser without a window opens it, keys move the controls"
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from browser import needs_browser, open_browser
from conftest import ROOT

STARTUP,MOVE = 300,60 # seconds within which a page is there, and a control has done its work, also on a busy machine

SETUP = """
import numpy as np
from kdmed.evaluate.widgets import browse_mistakes, explore_temperature
rng = np.random.default_rng(0)
classes,targets,groups = ['normal', 'a rather long name of a class', 'carcinoma'],np.arange(60) % 3,[f'patient {i//4:02d}' for i in range(60)]
images = rng.integers(120, 255, (60, 32, 32, 3), dtype=np.uint8)
for i,t in enumerate(targets): images[i, 4:12+6*t, 4:12+6*t] = 40, 40, 120
maps = np.zeros((60, 32, 32)); maps[:, 8:24, 8:24] = 1
logits = {model: skill*np.eye(3)[targets] + rng.normal(0, 1.5, (60, 3)) for model,skill in dict(teacher=4, distilled=2).items()}
probs = {model: np.exp(z)/np.exp(z).sum(1, keepdims=True) for model,z in logits.items()}
"""
BROWSE = "browse_mistakes(probs, targets, classes, images, groups=groups, maps=maps).select(model='distilled')"
EXPLORE = "explore_temperature(logits, classes, images, targets, groups=groups)"

@contextmanager
def running(*command, **kwargs):
    "A process and all it starts, gone when the block ends"
    process = subprocess.Popen(command, start_new_session=True, **kwargs)
    try: yield process
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try: os.killpg(process.pid, sign)
            except ProcessLookupError: break
            try: process.wait(10)
            except subprocess.TimeoutExpired: pass

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def answers(port):
    "Whether somebody speaks HTTP there"
    try:
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=5)
        connection.request('GET', '/voila/static/nothing')
        return bool(connection.getresponse().status)
    except OSError: return False

@pytest.fixture(scope='module')
def voila(tmp_path_factory):
    "Address of a notebook with both explorers, served by Voila, and its folder"
    folder = tmp_path_factory.mktemp('voila')
    cells = [dict(cell_type='code', id=f'cell{i}', metadata={}, execution_count=None, outputs=[], source=code) for i,code in enumerate((SETUP, BROWSE, EXPLORE))]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    (folder/'both.ipynb').write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    env = {k: v for k,v in os.environ.items() if k != 'IN_TEST'} | {name: str(folder/name) for name in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    port,log = free_port(),folder/'voila.log'
    with log.open('w') as out, running(sys.executable, '-m', 'voila', 'both.ipynb', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1', '--show_tracebacks=True',
                                       cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT) as server:
        end = time.monotonic()+STARTUP
        while not answers(port):
            assert server.poll() is None and time.monotonic() < end, f'Voila does not start:\n{log.read_text()}'
            time.sleep(.1)
        yield f'http://127.0.0.1:{port}/',folder

@pytest.fixture(scope='module')
def browser(voila, tmp_path_factory):
    "A browser that can reach this machine only, with the notebook open"
    from selenium.webdriver.common.by import By
    with open_browser(tmp_path_factory.mktemp('profile'), STARTUP) as driver:
        driver.get(voila[0])
        wait(driver, lambda: len([i for i in driver.find_elements(By.CSS_SELECTOR, 'img.widget-image') if i.get_property('naturalWidth')]) == 2,
             lambda: f'no pictures in the page\n{driver.get_log("browser")}\n{(voila[1]/"voila.log").read_text()}', STARTUP)
        yield driver

def wait(driver, condition, otherwise, seconds=MOVE):
    "The first true value of `condition`; fails with what `otherwise` says when time is up"
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait
    try: return WebDriverWait(driver, seconds, poll_frequency=.1).until(lambda _: condition())
    except TimeoutException: pytest.fail(otherwise() if callable(otherwise) else otherwise)

CONTROL = 'contains(@class, "widget-inline-hbox") or contains(@class, "widget-checkbox")'

class Part:
    "One explorer in the page: its picture, its sentences and its controls by their description"
    def __init__(self, driver, number):
        from selenium.webdriver.common.by import By
        self.driver,self.css = driver,By.CSS_SELECTOR
        self.image = driver.find_elements(self.css, 'img.widget-image')[number]
        self.box = self.image.find_element(By.XPATH, './..')

    @property
    def text(self): return self.driver.execute_script("return arguments[0].querySelector('[role=status]')?.innerText ?? ''", self.box) # at once: it may be replaced any time

    @property
    def pixels(self):
        "What the browser shows of the picture: a digest, once it is decoded"
        return self.driver.execute_async_script("""
            const [image, done] = arguments;
            image.decode().then(async () => {
                const bytes = await (await fetch(image.src)).arrayBuffer(), digest = await crypto.subtle.digest('SHA-1', bytes);
                done([image.naturalWidth, image.naturalHeight, ...new Uint8Array(digest)].join(' '));
            }).catch(() => done(''));""", self.image)

    def control(self, description, inside):
        for label in self.box.find_elements(self.css, '.widget-label, .widget-label-basic'):
            if label.text == description: return label.find_element('xpath', f'./ancestor-or-self::*[{CONTROL}][1]').find_element(self.css, inside)
        raise AssertionError(f'no control {description!r}')

    @contextmanager
    def changing(self, picture=True, text=True):
        "What is done in the block changes the picture, or the sentences, or both"
        before = self.pixels,self.text
        assert all(before)
        yield
        wait(self.driver, lambda: (not picture or self.pixels not in ('', before[0])) and (not text or self.text != before[1]),
             lambda: f'picture {"changed" if self.pixels != before[0] else "did not change"}, sentences: {before[1]!r}, {self.text!r}')

    def choose(self, description, option):
        from selenium.webdriver.support.ui import Select
        Select(self.control(description, 'select')).select_by_visible_text(option)

def shoot(driver, folder, name): driver.save_screenshot(str(folder/f'{name}.png'))

def temperature_of(part): return float(part.text.split('τ = ')[1].split(',')[0])

@pytest.mark.slow
class TestInABrowser:
    pytestmark = needs_browser('voila', 'ipykernel')

    def test_the_page_needs_nothing_from_elsewhere(self, browser, voila):
        shoot(browser, voila[1], 'first')
        calls = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
        requests = [c['params'] for c in calls if c['method'] == 'Network.requestWillBeSent']
        elsewhere = [(r.get('type'), r['request']['url']) for r in requests if not r['request']['url'].startswith((voila[0], 'data:', 'blob:', 'chrome'))]
        assert any(r['request']['url'].startswith(voila[0]) and r.get('type') == 'Script' for r in requests)
        assert not [url for kind,url in elsewhere if kind != 'Stylesheet' or 'fontawesome' not in url] # Voila's page asks for icons; no control here has one
        assert 'Error displaying widget' not in browser.page_source

    def test_the_slider_moves_bars_and_numbers(self, browser, voila):
        from selenium.webdriver.common.keys import Keys
        part = Part(browser, 1)
        assert temperature_of(part) == 4 and 'entropy' in part.text
        handle = part.control('Temperature', '.noUi-handle')
        before = part.pixels
        with part.changing(): handle.send_keys(Keys.ARROW_RIGHT)
        warmer = temperature_of(part)
        assert warmer > 4
        with part.changing(): handle.send_keys(Keys.ARROW_LEFT)
        assert temperature_of(part) == 4 and part.pixels == before
        with part.changing(): handle.send_keys(Keys.END)
        assert temperature_of(part) == 16
        shoot(browser, voila[1], 'hot')
        with part.changing(): handle.send_keys(Keys.HOME)
        assert temperature_of(part) == .25
        shoot(browser, voila[1], 'cold')
        with part.changing(): part.control('Image', '.noUi-handle').send_keys(Keys.ARROW_RIGHT)
        assert 'image 1 ' in part.text

    def test_filters_pages_and_overlay_of_the_mistakes(self, browser, voila):
        from selenium.webdriver.common.keys import Keys
        part = Part(browser, 0)
        assert 'distilled is wrong on' in part.text
        first = part.pixels
        with part.changing(text=False): part.control('Overlay', 'input').send_keys(Keys.SPACE)
        shoot(browser, voila[1], 'overlay')
        with part.changing(text=False): part.control('Overlay', 'input').send_keys(Keys.SPACE)
        assert part.pixels == first
        with part.changing(): part.choose('True', 'a rather long name of a class')
        shoot(browser, voila[1], 'class')
        with part.changing(): part.choose('True', 'any')
        with part.changing(picture=False): part.choose('Where', 'teacher is right')
        with part.changing(): part.choose('Show', 'all')
        following = next(b for b in part.box.find_elements(part.css, 'button') if b.text == 'Next')
        with part.changing(): following.send_keys(Keys.ENTER)
        assert 'Page 2 of ' in part.text and ': 11 to 20 of ' in part.text
        with part.changing(): part.control('Confidence', '.noUi-handle-lower').send_keys(*[Keys.PAGE_UP]*8)
        assert 'Page 1 of ' in part.text
        shoot(browser, voila[1], 'confident')
        with part.changing(): part.choose('Group', 'patient 03')
        with part.changing(): part.choose('True', 'carcinoma')
        shoot(browser, voila[1], 'patient')
        with part.changing(picture=False): part.choose('Model', 'teacher')
        assert 'teacher is wrong on' in part.text

    def test_descriptions_are_shown_in_full(self, browser, voila):
        cut = browser.execute_script("return [...document.querySelectorAll('.widget-label')].filter(e => e.scrollWidth > e.clientWidth+1).map(e => e.innerText)")
        assert cut == []


def test_the_page_of_the_site_holds_pictures_and_no_dead_widgets(root):
    notebook = json.loads((root/'nbs/evaluate/50_widgets.ipynb').read_text(encoding='utf-8'))
    outputs = [o.get('data', {}) for c in notebook['cells'] for o in c.get('outputs', [])]
    assert sum('image/png' in o for o in outputs) >= 4
    assert not [k for o in outputs for k in o if 'widget' in k] and 'widgets' not in notebook['metadata']
