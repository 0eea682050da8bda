"report.html as a reader meets it: opened from a file, off line, in a real browser, and printed"
import base64, json, re

import numpy as np
import pandas as pd
import pytest

from browser import needs_browser, open_browser
from kdmed.evaluate.comparison import compare_predictions

CLASSES = ['nv', 'mel & <b>more</b>', 'a rather long name of a class | with a bar', 'bcc']

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A saved report with every section, of a student that has become blind to the second class"
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(80), 4)
    truth = np.repeat(rng.choice(4, 80, p=[.4, .3, .2, .1]), 4)
    def made_up(skill, favor=(1, 1, 1, 1)):
        p = np.exp(skill*np.eye(4)[truth] + rng.normal(size=(320, 4)))*favor
        return p/p.sum(1, keepdims=True)
    models = {'teacher': made_up(3.), 'plain': [made_up(1.5) for _ in range(2)], 'distilled': [made_up(1.7, (1, .02, 1, 1)) for _ in range(2)]}
    columns = pd.DataFrame({'age': rng.integers(10, 95, 80).repeat(4), 'sex': np.array(['F', 'M'])[rng.integers(0, 2, 80)].repeat(4)})
    comparison = compare_predictions(models, truth, CLASSES, patients, columns=columns, valid=(models, truth), n_boot=200)
    comparison.costs = {name: dict(parameters=10_000*k, macs=10**6*k, file_mb=.04*k, latency_ms=.5*k) for name,k in (('teacher', 20), ('plain', 2), ('distilled', 2))}
    return comparison.save(tmp_path_factory.mktemp('report'))

@pytest.fixture(scope='module')
def page(folder, tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp('profile')) as driver:
        driver.get((folder/'report.html').as_uri())
        yield driver

pytestmark = [*needs_browser(), pytest.mark.slow]

def test_all_pictures_are_in_the_file_and_seen(page):
    sizes = page.execute_async_script("const done = arguments[0]; Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.clientWidth, i.alt.length]))).then(done)")
    assert len(sizes) == 9 and all(natural > 100 and shown > 100 and alt for natural,shown,alt in sizes)

def test_nothing_is_asked_of_the_net_and_nothing_goes_wrong(page):
    asked = [json.loads(entry['message'])['message'] for entry in page.get_log('performance')]
    urls = {m['params']['request']['url'].split(':')[0] for m in asked if m['method'] == 'Network.requestWillBeSent'}
    assert 'file' in urls and not urls & {'http', 'https', 'ws', 'wss', 'ftp'}
    assert not [entry for entry in page.get_log('browser') if entry['level'] in ('SEVERE', 'WARNING')]

def test_harm_is_the_first_thing_said(page):
    harm = page.find_element('css selector', '[role=alert]')
    assert harm.text.startswith('HARM: the distilled student has a lower sensitivity than the plain student for mel & <b>more</b>')
    first = page.find_element('css selector', 'table')
    assert harm.location['y'] < first.location['y'] and harm.location['y'] < 300
    assert 'HARM' in harm.text # said in words, not by color alone

def test_names_are_text_and_tables_stay_in_the_page(page):
    assert page.execute_script("return document.querySelectorAll('td b, th b').length") == 0
    assert page.execute_script('return document.documentElement.scrollWidth <= window.innerWidth')
    titles = [h.text for h in page.find_elements('css selector', 'h2')]
    parts = ['Metrics', 'Harm', 'Each class', 'Subgroups', 'Calibration', 'Student and teacher', 'Cost', 'Mistakes']
    assert [t for t in titles if t not in ('Training', 'Left out')] == parts

def test_a_narrow_screen_scrolls_tables_not_the_page(page):
    page.set_window_size(520, 900)
    assert page.execute_script('return document.documentElement.scrollWidth <= window.innerWidth')
    page.set_window_size(1200, 2200)

def test_on_paper_no_table_is_cut_off(page, tmp_path):
    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': 'print'})
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=680, height=1000, deviceScaleFactor=1, mobile=False)) # A4 less its margins, in CSS pixels
    widest = page.execute_script("return Math.max(...[...document.querySelectorAll('table, img')].map(t => t.getBoundingClientRect().right))")
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': ''})
    assert widest <= 681
    pdf = base64.b64decode(page.execute_cdp_cmd('Page.printToPDF', dict(preferCSSPageSize=True))['data'])
    (tmp_path/'report.pdf').write_bytes(pdf)
    assert pdf.startswith(b'%PDF') and 2 <= len(re.findall(rb'/Type\s*/Page\b', pdf)) <= 14
