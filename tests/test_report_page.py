"report.html as a reader meets it: opened from a file, off line, in a real browser, and printed"
import base64, hashlib, html, json, re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from browser import needs_browser, open_browser
from kdmed.evaluate.comparison import compare_predictions, load_comparison

CLASSES = ['nv', 'mel & <b>more</b>', 'a rather long name of a class | with a bar', 'bcc']
RNG = np.random.default_rng(0)
PATIENTS = np.repeat(np.arange(80), 4)
TRUTH = np.repeat(RNG.choice(4, 80, p=[.4, .3, .2, .1]), 4)

def made_up(skill, favor=(1, 1, 1, 1)):
    p = np.exp(skill*np.eye(4)[TRUTH] + RNG.normal(size=(320, 4)))*favor
    return p/p.sum(1, keepdims=True)

@pytest.fixture(scope='module')
def comparison():
    "Every section, of a student that has become blind to the second class"
    models = {'teacher': made_up(3.), 'plain': [made_up(1.5) for _ in range(2)],
              'distilled': [made_up(1.7, (1, .02, 1, 1)) for _ in range(2)]}
    columns = pd.DataFrame({'age': RNG.integers(10, 95, 80).repeat(4),
                            'sex': np.array(['F', 'M'])[RNG.integers(0, 2, 80)].repeat(4)})
    made = compare_predictions(models, TRUTH, CLASSES, PATIENTS, columns=columns, valid=(models, TRUTH), n_boot=200,
                               serious=[CLASSES[1], 'bcc'])
    made.costs = {name: dict(parameters=10_000*k, macs=10**6*k, file_mb=.04*k, latency_ms=.5*k)
                  for name,k in (('teacher', 20), ('plain', 2), ('distilled', 2))}
    made.about |= dict(models=dict(teacher='resnet10t', plain='test_efficientnet'), name='skin')
    return made

@pytest.fixture(scope='module')
def text(comparison): return comparison.to_html(('metrics', 'harm', 'reliability'))

@pytest.fixture(scope='module')
def folder(comparison, tmp_path_factory): return comparison.save(tmp_path_factory.mktemp('report'))

@pytest.fixture(scope='module')
def page(folder, tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp('profile')) as driver:
        driver.get((folder/'report.html').as_uri())
        yield driver

def in_browser(test):
    for mark in [*needs_browser(), pytest.mark.slow]: test = mark(test)
    return test

# -- the text of the page

class Elements(HTMLParser):
    "All elements with their attributes, and how deep tables lie in scrollers"
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))
    def __call__(self, tag, **having):
        return [a for t,a in self.found if t == tag and all(a.get(k) == v for k,v in having.items())]

def body_of(text): return text.split('<body>')[1].split('<script>')[0]
def words_of(text): return html.unescape(re.sub('<[^>]*>', '', text))

def test_the_first_screen_says_what_was_compared_before_any_result(text):
    body = body_of(text)
    facts,verdict = body.split('<section class="verdict"')[:2]
    for words in ('skin, all: n = 320 images of 80 groups', 'teacher resnet10t (1 training run)',
                  'plain test_efficientnet (2 training runs)', 'one of 4 classes',
                  'Research software, not a medical device.'): assert words in facts
    assert '<table' not in facts and '<table' not in verdict.split('</section>')[0]

def test_the_verdict_names_the_teacher_plain_and_each_serious_class_in_words_and_numbers(text, comparison):
    verdict = words_of(body_of(text).split('<section class="verdict"')[1].split('</section>')[0])
    value = {name: f.value for name,f in comparison.scores.items()}
    for other in ('teacher', 'plain'):
        change = f"{value[other]['balanced_accuracy']:.3f} → {value['distilled']['balanced_accuracy']:.3f}, a difference of"
        assert change in verdict
    mel = f'sensitivity/{CLASSES[1]}'
    n = (TRUTH == 1).sum()
    recognized = np.mean([(p.argmax(1)[TRUTH == 1] == 1).sum() for p in comparison.predictions['probs']['distilled']])
    assert f'{recognized:.0f} of {n} images recognized by the distilled student, sensitivity {recognized/n:.3f} (' in verdict
    taught = value['teacher'][mel]
    assert f'the teacher {taught*n:.0f} ({taught:.3f})' in verdict and 'LOST compared with the' in verdict
    assert 'Sensitivity for serious classes' in verdict and f'{CLASSES[2]}: ' not in verdict

def test_what_reassures_never_stands_above_a_loss():
    models = {'teacher': made_up(5.), 'plain': made_up(1.), 'distilled': made_up(1.5)}
    c = compare_predictions(models, TRUTH, CLASSES, PATIENTS, n_boot=50)
    for page in (c.to_html(()), c.to_markdown()):
        lost = page.index('Compared with its teacher, the distilled student has a lower')
        reassuring = page.index('No loss of sensitivity beyond chance')
        assert page.index('Verdict') < lost < reassuring < page.index('Metrics')
    kinds = [c.loss for c in c.conclusions()]
    assert kinds == sorted(kinds, reverse=True) and any(kinds)

def test_a_change_is_no_interval_and_scaling_that_made_it_worse_is_said():
    sure = made_up(2.)
    valid = {'plain': made_up(.2), 'distilled': made_up(.2)} # a temperature from quite different images
    models = {'plain': sure, 'distilled': made_up(2.)}
    c = compare_predictions(models, TRUTH, CLASSES, PATIENTS, valid=(valid, TRUTH), n_boot=20)
    before,after = c.calibration.loc['plain', ['ece', 'ece_scaled']]
    assert after > before
    page = words_of(c.to_html(()))
    assert f'{before:.3f} → {after:.3f} (worse)' in page
    assert 'Scaling made it worse for the plain student and the distilled student.' in page

def test_p_stands_beside_holm_and_intervals_are_said_to_be_uncorrected(text, comparison):
    page = words_of(text)
    row = comparison.harm[comparison.harm.verdict == 'lost'].iloc[0]
    assert row.p < row.holm
    assert f'p = {row.p:.3f}, Holm-corrected p = {row.holm:.3f}' in page
    assert re.search(rf'<td>{row.p:.3f}</td><td>{row.holm:.3f}</td>', text)
    assert 'never below the Holm p of a smaller p, so several can be equal' in page
    assert 'Intervals and the column p are not corrected' in page
    assert 'intervals are not corrected' in page.split('Subgroups\n')[1]

def test_the_page_can_be_read_by_ear_and_by_keyboard(text):
    e = Elements(body_of(text))
    assert len(e('main')) == len(e('h1')) == 1
    assert len(e('table')) == len(e('caption')) >= 6
    assert all(th.get('scope') in ('col', 'row') for th in e('th'))
    scrollers = e('div', **{'class': 'scroll'})
    assert len(scrollers) == len(e('table')) + len(e('img'))
    assert all(s['tabindex'] == '0' and s['role'] == 'region' and s['aria-label'] for s in scrollers)
    assert len(e('figure')) == len(e('figcaption')) == 3
    pictures = [i['alt'] for i in e('img')] + [s['aria-label'] for s in e('svg', role='img')]
    assert len(pictures) == 5 and all(len(re.findall(r'\d\.\d{3}', p)) >= 3 for p in pictures)
    assert not re.search('balanced_accuracy|macro_|log_loss|kl_div|sensitivity/|auroc/', body_of(text))

def test_counts_are_whole(comparison):
    for section in comparison.sections():
        for column in {'images', 'groups'} & set([] if section.frame is None else section.frame):
            assert all(float(v) == int(v) for v in section.frame[column])
    drawn = comparison.plot_confusion('distilled').axes[0]
    counts = [t.get_text().split('\n')[0] for t in drawn.texts]
    assert len(counts) == 16 and all(c.isdecimal() for c in counts)

def test_the_only_script_is_allowed_by_its_hash_and_nothing_is_fetched(text):
    script, = re.findall('<script>(.*?)</script>', text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = Elements(text)('meta', **{'http-equiv': 'Content-Security-Policy'})[0]['content']
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    for tag,a in Elements(text).found:
        assert not [k for k in a if k.startswith('on')] and 'href' not in a, (tag, a)
        assert a.get('src', 'data:').startswith('data:'), (tag, a)

def test_a_name_cannot_become_script():
    bad = ['a</script><script>alert(1)</script>', '"onmouseover="alert(1)', "x' y", 'd']
    c = compare_predictions({'plain': made_up(1.), bad[0]: made_up(1.5)}, TRUTH, bad, PATIENTS, n_boot=20)
    page = c.to_html(('metrics', 'harm'))
    assert page.count('<script') == 1
    assert not [a for _,a in Elements(body_of(page)).found if any(k.startswith('on') for k in a)]

@pytest.mark.slow # saving draws every picture
def test_one_picture_does_not_make_the_page_heavy(folder):
    page = (folder/'report.html').read_text()
    heaviest = max(len(src) for src in re.findall('src="(.*?)"', page))
    assert len(page) < 1e6 and heaviest < 300_000

@pytest.mark.slow # saving draws every picture
def test_a_saved_report_makes_the_same_verdict(folder, comparison):
    again = load_comparison(folder)
    part = [c.to_html(()).split('<section class="verdict"')[1].split('</section>')[0] for c in (comparison, again)]
    assert part[0] == part[1]

# -- in a browser

@in_browser
def test_all_pictures_are_in_the_file_and_seen(page):
    sizes = page.execute_async_script("const done = arguments[0]; Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.clientWidth, i.alt.length]))).then(done)")
    assert len(sizes) == 6 and all(natural > 100 and shown > 100 and alt for natural,shown,alt in sizes)
    charts = page.execute_script('''return [...document.querySelectorAll('svg.chart')].map(
        s => [s.clientWidth, s.querySelectorAll('.mark').length])''')
    assert len(charts) == 5 # metrics, classes, two pairs, subgroups
    assert all(width > 200 and marks >= 4 for width,marks in charts)

@in_browser
def test_nothing_is_asked_of_the_net_and_nothing_goes_wrong(page):
    asked = [json.loads(entry['message'])['message'] for entry in page.get_log('performance')]
    urls = {m['params']['request']['url'].split(':')[0] for m in asked if m['method'] == 'Network.requestWillBeSent'}
    assert 'file' in urls and not urls & {'http', 'https', 'ws', 'wss', 'ftp'}
    assert not [entry for entry in page.get_log('browser') if entry['level'] in ('SEVERE', 'WARNING')]

@in_browser
def test_harm_is_the_first_thing_said(page):
    harm = page.find_element('css selector', '[role=alert]')
    assert harm.text.startswith('HARM: the distilled student has a lower sensitivity than the plain student for mel & <b>more</b>')
    first = page.find_element('css selector', 'table')
    assert harm.location['y'] < first.location['y'] and harm.location['y'] < 300
    assert 'HARM' in harm.text # said in words, not by color alone

@in_browser
def test_names_are_text_and_tables_stay_in_the_page(page):
    assert page.execute_script("return document.querySelectorAll('td b, th b').length") == 0
    assert page.execute_script('return document.documentElement.scrollWidth <= window.innerWidth')
    titles = [h.text for h in page.find_elements('css selector', 'h2')]
    parts = ['Verdict', 'Further observations', 'Metrics', 'Harm', 'Each class', 'Subgroups', 'Calibration', 'Student and teacher', 'Cost', 'Mistakes']
    assert [t for t in titles if t not in ('Training', 'Left out')] == parts

def device(page, width, height=900):
    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)

@in_browser
def test_on_a_phone_figures_are_readable_and_the_verdict_comes_first(page):
    device(page, 400)
    assert page.execute_script('return document.documentElement.scrollWidth <= window.innerWidth')
    widths = page.execute_script("return [...document.images].map(i => i.clientWidth)")
    assert min(widths) >= 600 # not shrunk: their text keeps its size, in a box that scrolls
    sizes = page.execute_script('''return [...document.querySelectorAll('.chart text')].map(
        t => [parseFloat(getComputedStyle(t).fontSize), t.getBoundingClientRect().right])''')
    assert all(size >= 12 and right <= 401 for size,right in sizes)
    right = page.execute_script('''return [...document.querySelectorAll('table')].find(
        t => t.caption.textContent == 'Harm').tBodies[0].rows[0].cells[1].getBoundingClientRect().right''')
    assert right <= 400
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})

@in_browser
def test_a_table_is_sorted_by_number_and_back(page):
    tables = page.find_elements('css selector', 'table')
    table = next(t for t in tables if t.find_element('tag name', 'caption').text == 'Harm')
    head = next(h for h in table.find_elements('css selector', 'thead th') if h.text.startswith('difference'))
    def values():
        cells = [r.find_elements('css selector', 'td')[3] for r in table.find_elements('css selector', 'tbody tr')]
        return [float(cell.text.split()[0]) for cell in cells]
    first,button = values(),head.find_element('tag name', 'button')
    assert first != sorted(first)
    for order,said in ((sorted(first), 'ascending'), (sorted(first, reverse=True), 'descending'), (first, None)):
        page.execute_script('arguments[0].click()', button)
        assert (values(), head.get_attribute('aria-sort')) == (order, said)

@in_browser
def test_a_model_is_hidden_and_shown_and_a_mark_tells_its_interval(page, comparison):
    def visible(name): return page.execute_script('''return [...document.querySelectorAll('.mark')].filter(
        m => m.dataset.model == arguments[0] && m.getBoundingClientRect().height > 0).length''', name)
    button = next(b for b in page.find_elements('css selector', '.models button') if b.text == 'plain')
    n,others = visible('plain'),visible('teacher')
    page.execute_script('arguments[0].click()', button)
    assert (visible('plain'), visible('teacher'), button.get_attribute('aria-pressed')) == (0, others, 'false') and n > 5
    page.execute_script('arguments[0].click()', button)
    assert visible('plain') == n
    tip = page.execute_script('''const mark = document.querySelector('.mark[data-model=distilled]');
        mark.dispatchEvent(new PointerEvent('pointerenter'));
        return mark.closest('figure').querySelector('.tip').textContent''')
    row = comparison.scores['distilled'].loc['balanced_accuracy']
    assert tip == f'balanced accuracy: distilled {row.value:.3f} ({row.low:.3f} to {row.high:.3f})'

@in_browser
def test_without_script_everything_is_there(page, folder):
    page.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': True})
    page.get((folder/'report.html').as_uri())
    assert not page.find_elements('css selector', 'button')
    assert page.find_elements('css selector', '.mark title')
    assert page.find_element('css selector', '.models').text.split() == ['teacher', 'plain', 'distilled']
    page.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': False})
    page.get((folder/'report.html').as_uri())

def paper(page):
    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': 'print'})
    device(page, 680, 1000) # A4 less its margins, in CSS pixels
    widest = page.execute_script('''return Math.max(...[...document.querySelectorAll('table, img, svg.chart')].map(
        t => t.getBoundingClientRect().right))''')
    whole = page.execute_script('''return [...document.querySelectorAll('figure, .keep, tr')].every(
        f => getComputedStyle(f).breakInside == 'avoid')''')
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': ''})
    return widest,whole

@in_browser
def test_on_paper_no_table_is_cut_off_and_a_figure_stays_whole(page, tmp_path):
    widest,whole = paper(page)
    assert widest <= 681 and whole
    alone = page.execute_script('''return [...document.querySelectorAll('section')].filter(
        s => s.querySelector('figure') && !s.querySelector('table')).map(
        s => s.querySelector('.keep').querySelectorAll('h2, figure').length)''')
    assert alone and set(alone) == {2} # a heading with its figure
    pdf = base64.b64decode(page.execute_cdp_cmd('Page.printToPDF', dict(preferCSSPageSize=True))['data'])
    (tmp_path/'report.pdf').write_bytes(pdf)
    assert pdf.startswith(b'%PDF') and 2 <= len(re.findall(rb'/Type\s*/Page\b', pdf)) <= 14

@in_browser
def test_on_paper_tables_of_many_models_are_not_cut_off(page, tmp_path, folder):
    models = {'plain': made_up(1.)} | {f'distilled with method {k} of a long name': made_up(1.2) for k in range(7)}
    c = compare_predictions(models, TRUTH, CLASSES, PATIENTS, columns={'sex': np.where(PATIENTS % 2, 'F', 'M')}, n_boot=20)
    (tmp_path/'many.html').write_text(c.to_html(('metrics',)))
    page.get((tmp_path/'many.html').as_uri())
    widest,_ = paper(page)
    page.get((folder/'report.html').as_uri())
    assert widest <= 681

@in_browser
def test_no_other_script_runs(page):
    page.execute_script('''const s = document.createElement('script');
        s.textContent = 'window.intruded = 1';
        document.body.append(s)''')
    assert page.execute_script('return window.intruded === undefined')
