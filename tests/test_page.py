"The browser page: what is refused when it is made, and the page as a doctor meets it, from a file and off line"
import base64
import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import stat
import tarfile
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from browser import needs_browser, open_browser
from kdmed.data.images import open_image, synthetic_table
from kdmed.models import add_exits, create_student, set_model_stats

pytest.importorskip('onnx')
page = pytest.importorskip('kdmed.ship.page')
export_onnx = pytest.importorskip('kdmed.ship.onnx').export_onnx
OnnxModel = pytest.importorskip('kdmed.ship.onnx_model').OnnxModel
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')

HOSTILE = ['</script><script>document.title="broken in"</script>', '=HYPERLINK("http://127.0.0.1","x")', '@"a";b,c',
           '<img src=x onerror=alert(1)>', "it's & that"]
WASM = b'\0asm\1\0\0\0' + bytes([0, 5, 4]) + b'name'
PROGRAM = 'class A {}; export{A as InferenceSession,A as Tensor,A as env};\n'


def stand_in(folder, package='onnxruntime-web', version='0.0.1', program=PROGRAM, wasm=WASM, about=None):
    "A folder that looks like the package of the runtime"
    (folder/'dist').mkdir(parents=True)
    (folder/'package.json').write_text(json.dumps(dict(name=package, version=version)) if about is None else about)
    (folder/page._PROGRAM).write_text(program)
    (folder/page._WASM).write_bytes(wasm)
    return folder


def renamed(file, target, **properties):
    "A copy of an ONNX file with other properties"
    import onnx
    proto = onnx.load(file)
    for p in proto.metadata_props: p.value = properties.get(p.key, p.value)
    target.write_bytes(proto.SerializeToString())
    return target


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('page')


@pytest.fixture(scope='module')
def five(work):
    "An ONNX file of five findings with hostile names, with two early exits"
    torch.manual_seed(1)
    model = set_model_stats(create_student('test_resnet', HOSTILE, 64, 'multilabel').eval(), .5, .2)
    model = add_exits(model, ['layer1', 'layer3']).eval()
    model.spec.update(temperature=.5, thresholds=dict(zip(HOSTILE, (.4, None, .55, .5, .9))))
    return export_onnx(model, work/'five.onnx', exits=True)


# -- making it

def test_without_npm_and_path_an_error_names_both(tmp_path, monkeypatch, five):
    monkeypatch.setattr(page.shutil, 'which', lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'npm is not installed: install Node.js .*runtime=…: the folder'):
        page.export_page(five, tmp_path/'p.html')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('script,message', [
    ('echo "npm error code E404" >&2; echo "npm error A complete log of this run: /x" >&2; exit 1', r'\(code E404\)'),
    ('exit 0', r'\(exit status 0\)'), ('exit 7', r'\(exit status 7\)')])
def test_what_npm_says_is_passed_on(script, message, tmp_path, monkeypatch):
    npm = tmp_path/'npm'
    npm.write_text(f'#!/bin/sh\n{script}\n')
    npm.chmod(npm.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    with pytest.raises(OSError, match=f'npm could not fetch onnxruntime-web@.*{message}.*runtime=…'):
        page.find_runtime()


def test_a_package_from_npm_is_checked_too(tmp_path, monkeypatch):
    "Even one that npm accepts: a version with known digests must have them"
    with tarfile.open(tmp_path/'fake.tgz', 'w:gz') as packed:
        packed.add(stand_in(tmp_path/'fake', version=page.RUNTIME_VERSION), 'package')
    monkeypatch.setattr(page, '_with_npm', lambda folder: tmp_path/'fake.tgz')
    with pytest.raises(ValueError, match='is not that of onnxruntime-web'): page.find_runtime()


@pytest.mark.parametrize('changes,message', [
    (dict(package='left-pad'), "must be the package onnxruntime-web, got 'left-pad'"),
    (dict(wasm=WASM[:-2]), 'is damaged: pack or copy it again'), (dict(wasm=b''), 'is damaged'),
    (dict(wasm=b'<html>'), 'is damaged'), (dict(about='{'), 'is damaged'), (dict(about='[]'), 'must be the package'),
    (dict(program='console.log(1)'), 'is not as expected'), (dict(program=f'"</script>";{PROGRAM}'), 'not as expected'),
    (dict(version=page.RUNTIME_VERSION), 'is not that of onnxruntime-web')])
def test_a_runtime_that_is_not_one_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message): page.find_runtime(stand_in(tmp_path/'r', **changes))


def test_a_packed_runtime_that_is_damaged_is_refused(tmp_path):
    file = tmp_path/'r.tgz'
    with tarfile.open(file, 'w:gz') as packed: packed.add(stand_in(tmp_path/'r'), 'package')
    data = file.read_bytes()
    assert page.find_runtime(file).wasm==WASM
    for at in np.linspace(0, len(data)-20, 12).astype(int):
        file.write_bytes(data[:at])
        with pytest.raises(ValueError): page.find_runtime(file)


def test_a_runtime_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(page, '_MOST_RUNTIME', 20)
    with pytest.raises(ValueError, match='too large for onnxruntime-web'): page.find_runtime(stand_in(tmp_path/'r'))


@pytest.mark.parametrize('source,error,message', [
    ('none', FileNotFoundError, 'source must be the folder of a bundle, or an ONNX file'),
    ('weights.pt', ValueError, "an ONNX file of export_onnx, got 'weights.pt'"),
    ('text.onnx', ValueError, 'is not an ONNX file'), ('.', FileNotFoundError, 'no student in')])
def test_what_is_no_student_is_refused(source, error, message, tmp_path):
    for name in ('weights.pt', 'text.onnx'): (tmp_path/name).write_text('x')
    with pytest.raises(error, match=message):
        page.export_page(tmp_path/source, tmp_path/'p.html', stand_in(tmp_path/'r'))
    assert not (tmp_path/'p.html').exists()


def test_a_model_that_a_page_cannot_run_is_refused(tmp_path, five, monkeypatch):
    runtime = stand_in(tmp_path/'r')
    filtered = renamed(five, tmp_path/'f.onnx', preprocess='["CLAHE(clip_limit=0.02)"]')
    with pytest.raises(ValueError, match=r'had gone through CLAHE\(clip_limit=0.02\), which a page cannot do'):
        page.export_page(filtered, tmp_path/'p.html', runtime)
    monkeypatch.setattr(page, 'MOST_MODEL_BYTES', 1000)
    with pytest.raises(ValueError, match='a page holds up to 0.001 MB'):
        page.export_page(five, tmp_path/'p.html', runtime)
    assert not (tmp_path/'p.html').exists()


def test_a_page_is_replaced_as_a_whole_or_not_at_all(tmp_path, five, monkeypatch):
    runtime,file = stand_in(tmp_path/'r'),tmp_path/'p.html'
    file.write_text('mine')
    with pytest.raises(FileExistsError, match='pass force=True'): page.export_page(five, file, runtime)
    def full(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        with pytest.raises(OSError, match='No space left'): page.export_page(five, file, runtime, force=True)
    assert file.read_text()=='mine' and sorted(f.name for f in tmp_path.iterdir())==['p.html', 'r']
    page.export_page(five, file, runtime, force=True)
    assert file.read_text(encoding='utf-8').startswith('<!DOCTYPE html>')


def test_hostile_names_enter_as_text(tmp_path, five, capsys):
    text = page.export_page(five, tmp_path/'p.html', stand_in(tmp_path/'r')).read_text(encoding='utf-8')
    assert text.count('<script')==5==text.count('</script>') and '<img' not in text and 'onerror=alert' in text
    about = json.loads(re.search(r'id="about">(.*?)</script>', text)[1])
    assert about['classes']==HOSTILE and about['cuts'][1] is None
    assert re.match(r'p.html: \d\.\d MB, of which the model \d\.\d MB; onnxruntime-web 0.0.1', capsys.readouterr().out)
    titled = page.export_page(five, tmp_path/'t.html', tmp_path/'r', title='<b>a</b>').read_text(encoding='utf-8')
    assert '<title>&lt;b&gt;a&lt;/b&gt;</title>' in titled and '<b>' not in titled


# -- in a browser

browser_test = [*needs_browser(), pytest.mark.slow(15)]
SIZE = 64


@pytest.fixture(scope='module')
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp('npm')
    try: return page._with_npm(folder)
    except OSError as e: pytest.skip(f'needs onnxruntime-web from npm: {e}')


class SeesSpecks(torch.nn.Module):
    "A student made by hand: its logit grows with the yellow in an image"
    def __init__(self):
        super().__init__()
        self.yellow,self.start = torch.nn.Conv2d(3, 1, 1),torch.nn.Parameter(torch.tensor(.7))
        self.yellow.weight.data[0, :, 0, 0],self.yellow.bias.data[0] = torch.tensor([0., 1., -1.]),-1.
        self.spec = dict(model='made by hand', classes=['plain', 'speck'], size=SIZE, task='binary', mean=[.5]*3,
                         std=[.25]*3, temperature=.3, thresholds=dict(speck=.4))

    def forward(self, x): return .02*self.yellow(x).relu().sum((2, 3)) - self.start


@pytest.fixture(scope='module')
def specks(work):
    "An ONNX file of a student that sees a yellow speck on tissue; images, every second with one, and where it is"
    rng = np.random.default_rng(2)
    images,places = np.stack(list(synthetic_table(8, classes=2, size=SIZE, seed=2).image)),rng.integers(10, 54, (8, 2))
    y,x = np.mgrid[:SIZE, :SIZE]
    for i in range(1, 8, 2): images[i][(x-places[i, 0])**2 + (y-places[i, 1])**2 < 25] = 250,240,120
    return export_onnx(SeesSpecks().eval(), work/'specks.onnx'),(images,places)


@pytest.fixture(scope='module')
def three(work):
    "An ONNX file of a small ViT for three classes"
    torch.manual_seed(0)
    model = create_student('vit_tiny_patch16_224', ['a', 'b', 'c'], SIZE, depth=2, embed_dim=48, num_heads=3).eval()
    set_model_stats(model, .5, .2).head.weight.data *= 30
    return export_onnx(model, work/'three.onnx')


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp('profile')) as driver: yield driver


class Opened:
    "A page in the browser"
    def __init__(self, driver, file):
        self.driver = driver
        driver.get_log('performance'), driver.get_log('browser')
        driver.get(file.as_uri())
        self.until(lambda: self.js("return document.body.dataset.ready || !document.getElementById('fatal').hidden"))

    def js(self, code, *args): return self.driver.execute_script(code, *args)
    def css(self, selector): return self.driver.find_elements('css selector', selector)
    def id(self, name): return self.driver.find_element('id', name)
    status = property(lambda self: self.js("return document.getElementById('status').textContent"))
    fatal = property(lambda self: self.js("return document.getElementById('fatal').textContent"))

    def until(self, condition, seconds=120):
        end = time.monotonic()+seconds
        while not condition():
            assert time.monotonic() < end, self.status
            time.sleep(.05)

    def give(self, files, control='files'):
        self.id(control).send_keys('\n'.join(map(str, files)))
        self.until(lambda: re.match(r'\d+ of \d+ image', self.status))
        return self.rows()

    def rows(self):
        "{name: [label, probabilities …, why not read]}"
        rows = "[...document.querySelectorAll('#rows tr')]"
        cells = self.js(f'return {rows}.map(r => [...r.children].map(c => c.textContent))')
        return {name: values for name,*values in cells}

    def gone_to(self):
        "Addresses that were asked for, but the page itself"
        calls = [json.loads(e['message'])['message'] for e in self.driver.get_log('performance')]
        urls = [c['params']['request']['url'] for c in calls if c['method']=='Network.requestWillBeSent']
        elsewhere = [u for u in urls if not u.startswith(('file:', 'chrome', 'data:'))]
        return elsewhere,sum(u.startswith('file:') for u in urls)


@pytest.fixture(scope='module')
def pages(work, runtime, specks, five, three):
    files = dict(specks=specks[0], five=five, three=three)
    return {name: page.export_page(file, work/f'{name}.html', runtime) for name,file in files.items()}


@pytest.fixture(scope='module')
def pictures(work, specks):
    "PNG files of several sizes and kinds"
    folder,rng = work/'pictures',np.random.default_rng(0)
    folder.mkdir()
    tissue = list(synthetic_table(3, classes=3, size=150, seed=4).image)
    made = dict(tissue=Image.fromarray(tissue[0]), wide=Image.fromarray(tissue[1][20:90]),
                noise=Image.fromarray(rng.integers(0, 256, (77, 133, 3), dtype=np.uint8)),
                gray=Image.fromarray(tissue[2]).convert('L'), palette=Image.fromarray(tissue[2]).quantize(20),
                own=Image.fromarray(specks[1][0][1]), tiny=Image.fromarray(tissue[0][:5, :3]),
                bits=Image.fromarray(tissue[2]).convert('1'), large=Image.fromarray(tissue[1]).resize((1500, 1100)))
    shade = np.linspace(0, 255, 150*150).reshape(150, 150).astype(np.uint8)
    made['glass'] = Image.fromarray(np.dstack([tissue[0], shade]))
    for name,image in made.items(): image.save(folder/f'{name}.png')
    return folder


class TestInABrowser:
    pytestmark = browser_test

    @pytest.mark.parametrize('kind', ['specks', 'five', 'three'])
    def test_probabilities_and_decisions_are_onnxruntimes(self, kind, pages, driver, pictures, work):
        "From identical pixels: PNG files of every kind, of other sizes than the model's"
        model,files = OnnxModel(work/f'{kind}.onnx', threads=1),sorted(pictures.iterdir())
        found = Opened(driver, pages[kind]).give(files)
        expected,labels = model.predict(files, bs=1).to_numpy(),model.predict(files, 'decisions').label.tolist()
        for file,row,label in zip(files, expected, labels):
            seen = np.array(found[file.name][1:-1], float)
            assert np.abs(seen-row).max() < (1e-2 if file.stem=='glass' else 1e-5), file.name # glass: half a gray level
            assert found[file.name][0]==label, file.name

    def test_nothing_is_asked_of_the_net(self, pages, driver, pictures):
        "Also not when a program within the page tries to: the policy forbids it"
        hits = []
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path!='/page': hits.append(self.path)
                self.send_response(200)
                self.send_header('Content-Type', 'text/html')
                self.end_headers()
                self.wfile.write(b'<!DOCTYPE html><html><head></head><body></body></html>')
            do_POST = do_GET
            def log_message(self, *args): pass
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        attempt = """const [url, done] = arguments; const tried = []
            const note = p => p.then(() => 'sent', () => 'refused').then(r => tried.push(r))
            new Image().src = url+'image'; navigator.sendBeacon(url+'beacon', 'x')
            const s = document.createElement('script'); s.src = url+'script'; document.body.append(s)
            const f = document.createElement('iframe'); f.src = url+'frame'; document.body.append(f)
            const l = document.createElement('link'); l.rel = 'stylesheet'; l.href = url+'style'
            document.head.append(l)
            note(fetch(url+'fetch', {mode: 'no-cors'})).then(() => setTimeout(() => done(tried), 1000))"""
        try:
            url,opened = f'http://127.0.0.1:{server.server_port}/',Opened(driver, pages['specks'])
            opened.give(sorted(pictures.iterdir())[:3])
            opened.css('.explain button')[0].click()
            opened.until(lambda: opened.css('figure .map'))
            assert opened.gone_to()==([], 1) and not driver.get_log('browser')
            assert driver.execute_async_script(attempt, url)==['refused'] and not hits
            driver.get(f'{url}page')
            driver.execute_async_script(attempt, url)
            assert {'/image', '/script', '/fetch'} <= set(hits) # without the policy they arrive
        finally: server.shutdown()

    def test_it_works_with_the_network_off(self, pages, driver, pictures):
        off = dict(offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        driver.execute_cdp_cmd('Network.enable', {})
        driver.execute_cdp_cmd('Network.emulateNetworkConditions', off)
        try:
            opened = Opened(driver, pages['three'])
            assert opened.js('return navigator.onLine') is False
            assert 'own.png' in opened.give([pictures/'own.png'])
        finally:
            driver.execute_cdp_cmd('Network.emulateNetworkConditions', off | dict(offline=False, downloadThroughput=-1,
                                                                                  uploadThroughput=-1))

    def test_a_phone_scrolls_down_only(self, pages, driver, pictures):
        for kind in ('specks', 'five'):
            opened = Opened(driver, pages[kind])
            opened.give(sorted(pictures.iterdir())[:3])
            opened.css('.explain button')[0].click()
            opened.until(lambda: opened.css('figure .map'))
            opened.js("document.querySelectorAll('details').forEach(d => d.open = true)")
            size = dict(width=400, height=800, deviceScaleFactor=1, mobile=True)
            driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
            try: assert opened.js('return [document.documentElement.scrollWidth, innerWidth]')==[400, 400]
            finally: driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})

    def test_everything_can_be_reached_and_used_with_keys(self, pages, driver, pictures):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys
        opened = Opened(driver, pages['specks'])
        def press(*keys): ActionChains(driver).send_keys(*keys).perform()
        press(Keys.TAB)
        assert driver.switch_to.active_element.get_attribute('id')=='files'
        ring = "return getComputedStyle(document.querySelector('label[for=files]')).outlineStyle"
        assert opened.js(ring)=='solid'
        press(Keys.TAB)
        assert driver.switch_to.active_element.get_attribute('id')=='folder' and opened.js(ring)=='none'
        opened.give([pictures/'own.png'])
        reached = []
        for _ in range(14):
            press(Keys.TAB)
            focus = driver.switch_to.active_element
            reached.append(focus.get_attribute('id') or focus.text.split('\n')[0] or focus.tag_name)
            if focus.text=='Show what matters': press(Keys.SPACE)
        for name in ('save', 'copy', 'clear', 'Table of all results', 'Show what matters', 'How to read this'):
            assert name in reached, reached
        opened.until(lambda: opened.css('figure .map'))
        nameless = opened.js("""
            const all = [...document.querySelectorAll('button, select, input, canvas, progress, [role=region]')]
            const named = e => e.textContent.trim() || e.labels?.length || e.getAttribute('aria-label')
            return all.filter(e => !named(e)).map(e => e.outerHTML)""")
        assert nameless==[]
        assert opened.id('status').get_attribute('aria-live')=='polite'

    def test_motion_stops_where_none_is_wanted(self, pages, driver):
        opened = Opened(driver, pages['specks'])
        duration = "return getComputedStyle(document.getElementById('drop')).transitionDuration"
        wanted = dict(features=[dict(name='prefers-reduced-motion', value='reduce')])
        assert opened.js(duration)!='0s'
        driver.execute_cdp_cmd('Emulation.setEmulatedMedia', wanted)
        assert opened.js(duration)=='0s'
        driver.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[]))

    def test_hostile_names_are_shown_and_saved_as_text(self, pages, driver, pictures, tmp_path):
        driver.execute_cdp_cmd('Browser.setDownloadBehavior', dict(behavior='allow', downloadPath=str(tmp_path)))
        opened,strange = Opened(driver, pages['five']),tmp_path/'=1+1,"x" <b>.png'
        strange.write_bytes((pictures/'own.png').read_bytes())
        seen = opened.give([strange, pictures/'gray.png'])
        assert HOSTILE[0] in opened.css('.card')[0].text and 'broken in' not in driver.title
        assert not opened.css('main b, main img')
        opened.id('save').click()
        opened.until(lambda: (tmp_path/'predictions.csv').is_file())
        time.sleep(.2)
        text = (tmp_path/'predictions.csv').read_bytes().decode('utf-8-sig')
        rows = list(csv.DictReader(io.StringIO(text, newline='')))
        assert [r['image'] for r in rows]==[f"'{strange.name}", 'gray.png']
        names = [f"'{c}" if c[0] in '=@' else c for c in HOSTILE]
        assert list(rows[0])==['image', 'label', *names, 'not read because', 'model']
        assert [rows[1][c] for c in names]==seen['gray.png'][1:-1]
        about = json.loads(re.search(r'id="about">(.*?)</script>', pages['five'].read_text(encoding='utf-8'))[1])
        assert rows[0]['model']==about['sha256'][:12]
        cells = [cell for row in csv.reader(io.StringIO(text, newline='')) for cell in row]
        assert not [c for c in cells if c[:1] in list('=+-@\t\r')]

    def test_files_that_cannot_be_read_are_listed_with_the_reason(self, pages, driver, pictures, tmp_path):
        whole,photo = (pictures/'tissue.png').read_bytes(),io.BytesIO()
        tissue = Image.open(pictures/'tissue.png')
        tissue.save(photo, 'JPEG')
        flipped = bytearray(whole)
        flipped[len(whole)//2] ^= 255
        def header(w, h): return whole[:16] + w.to_bytes(4, 'big') + h.to_bytes(4, 'big') + whole[24:]
        bad = {'empty.png': (b'', 'the file is empty'),
               'text.png': (b'hello', 'it is not an image that this page reads'),
               'cut.png': (whole[:5000], 'cut off'), 'end.png': (whole[:-12], 'cut off'),
               'flipped.png': (bytes(flipped), 'may be damaged'),
               'cut.jpg': (photo.getvalue()[:2000], 'cut off'), 'start.jpg': (photo.getvalue()[:9], 'damaged'),
               'huge.png': (header(60000, 60000), '60000 × 60000 pixels; up to 25 million'),
               'scan.dcm': (bytes(128)+b'DICM'+bytes(500), 'DICOM'),
               'Thumbs.db': (b'\xd0\xcf\x11\xe0'+bytes(99), 'not an image')}
        for name,(data,_) in bad.items(): (tmp_path/name).write_bytes(data)
        film = dict(save_all=True, append_images=[tissue.rotate(90)])
        more = {'scan.tif': (tissue, {}, 'TIFF'), 'film.gif': (tissue, {}, 'GIF'),
                'print.jpg': (tissue.convert('CMYK'), {}, 'CMYK'),
                'deep.png': (Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)*16), {}, '16 bits'),
                'film.png': (tissue, film, 'animation'), 'film.webp': (tissue, film, 'animation')}
        for name,(image,options,_) in more.items(): image.save(tmp_path/name, **options)
        opened = Opened(driver, pages['specks'])
        rows = opened.give([*sorted(tmp_path.iterdir()), pictures/'own.png'])
        for name,(*_,why) in (bad | more).items():
            assert why in rows[name][-1] and not rows[name][0], (name, rows[name])
        assert rows['own.png'][-1]=='' and rows['own.png'][0]=='speck'
        assert len(opened.css('.card.unread'))==len(bad)+len(more) and f'{len(bad)+len(more)} not read' in opened.status
        for name in (bad | more).keys() - {'scan.tif', 'film.gif', 'huge.png', 'scan.dcm', 'end.png'}: # its own
            with pytest.raises((ValueError, OSError)): open_image(tmp_path/name)

    def test_other_formats_and_turned_photographs(self, pages, driver, work, pictures, tmp_path):
        "What decoders change is small, and a photograph is the right way up"
        tissue,turned = Image.open(pictures/'wide.png'),Image.Exif()
        turned[0x0112] = 6
        tissue.save(tmp_path/'lossless.webp', lossless=True)
        tissue.save(tmp_path/'map.bmp')
        kinds = dict(quality=95),dict(quality=60, progressive=True),dict(quality=90, subsampling=0)
        for i,options in enumerate(kinds):
            tissue.save(tmp_path/f'{i}.jpg', **options)
        tissue.save(tmp_path/'turned.jpg', quality=95, exif=turned)
        tissue.convert('L').save(tmp_path/'gray.jpg')
        model,files = OnnxModel(work/'three.onnx', threads=1),sorted(tmp_path.iterdir())
        rows,expected = Opened(driver, pages['three']).give(files),model.predict(files, bs=1).to_numpy()
        gaps = {f.name: np.abs(np.array(rows[f.name][1:-1], float)-row).max() for f,row in zip(files, expected)}
        assert max(gaps['lossless.webp'], gaps['map.bmp']) < 1e-5 and max(gaps.values()) < .02, gaps
        with Image.open(tmp_path/'turned.jpg') as raw: sideways = model.predict([np.asarray(raw)]).to_numpy()[0]
        assert np.abs(sideways-expected[files.index(tmp_path/'turned.jpg')]).max() > 1e-3 # so that turning matters

    def test_a_map_peaks_where_the_speck_is(self, pages, driver, specks, tmp_path):
        images,places = specks[1]
        for i in (1, 3, 5, 7): Image.fromarray(images[i]).save(tmp_path/f'{i}.png')
        opened = Opened(driver, pages['specks'])
        assert {r[0] for r in opened.give(sorted(tmp_path.iterdir())).values()}=={'speck'}
        for button in opened.css('.explain button'): button.click()
        opened.until(lambda: len(opened.css('figure .map'))==4)
        for i,figure in zip((1, 3, 5, 7), opened.css('figure')):
            x,y,patch = (int(figure.get_attribute(f'data-{k}')) for k in ('x', 'y', 'patch'))
            assert abs(x+patch/2-places[i, 0]) <= patch and abs(y+patch/2-places[i, 1]) <= patch
            before,after = map(float, re.search(r'from (?:> )?([\d.]+) to (?:< )?(\d\.\d+)', figure.text).groups())
            assert before > .4 > after

    def test_stop_continue_and_clear(self, pages, driver, pictures, tmp_path):
        for i in range(60): os.link(pictures/'large.png', tmp_path/f'{i:02d}.png')
        opened = Opened(driver, pages['three'])
        opened.id('files').send_keys('\n'.join(map(str, sorted(tmp_path.iterdir()))))
        opened.until(lambda: len(opened.rows())>1)
        opened.id('stop').click()
        opened.until(lambda: opened.status.startswith('Stopped.'))
        n = len(opened.rows())
        assert 1 < n < 60 and f'{60-n} still wait' in opened.status and opened.id('stop').text=='Continue'
        time.sleep(.3)
        assert len(opened.rows())==n
        opened.id('stop').click()
        opened.until(lambda: opened.status.startswith('60 of 60 images'))
        assert len(opened.rows())==60 and not opened.id('stop').is_enabled()
        opened.id('clear').click()
        assert not opened.rows() and opened.status=='Ready.'
        assert driver.switch_to.active_element.get_attribute('id')=='files'

    def test_a_folder_is_chosen_or_dropped_with_those_inside(self, pages, driver, pictures, tmp_path):
        folder = tmp_path/'ward 5'
        (folder/'a').mkdir(parents=True)
        for name in ('1.png', 'a/2.png'): (folder/name).write_bytes((pictures/'own.png').read_bytes())
        (folder/'notes.txt').write_text('x')
        wanted = {'ward 5/1.png', 'ward 5/a/2.png', 'ward 5/notes.txt'}
        opened = Opened(driver, pages['specks'])
        assert set(opened.give([folder], 'folder'))==wanted
        opened = Opened(driver, pages['specks'])
        data = dict(items=[], files=[str(folder), str(pictures/'gray.png')], dragOperationsMask=1)
        box = opened.id('drop').rect
        for kind in ('dragEnter', 'dragOver', 'drop'):
            driver.execute_cdp_cmd('Input.dispatchDragEvent', dict(type=kind, x=box['x']+50, y=box['y']+30, data=data))
        opened.until(lambda: opened.status.startswith('4 of 4'))
        assert set(opened.rows())==wanted | {'gray.png'}

    def test_a_large_photograph_fits_and_one_larger_is_refused(self, pages, driver, tmp_path):
        from kdmed.ship.page import MOST_PIXELS
        for name,height in (('fits', MOST_PIXELS//5000), ('larger', MOST_PIXELS//5000+1)):
            large = Image.effect_noise((50, 50), 60).convert('RGB').resize((5000, height))
            large.save(tmp_path/f'{name}.png', compress_level=1)
        rows = Opened(driver, pages['specks']).give(sorted(tmp_path.iterdir()))
        assert rows['fits.png'][-1]=='' and 'make it smaller' in rows['larger.png'][-1]

    @pytest.mark.parametrize('what', ['model', 'numbers', 'pixels', 'program'])
    def test_a_page_that_would_be_wrong_takes_no_images(self, what, pages, driver, tmp_path):
        text = pages['specks'].read_text(encoding='utf-8')
        about = re.search(r'id="about">(.*?)</script>', text)[1]
        if what=='numbers': # as if the runtime computed something else
            facts = json.loads(about)
            facts['trialProbabilities'][0] += .01
            text,message = text.replace(about, json.dumps(facts)),'does not compute what the model does elsewhere'
        if what=='model': # a weight that somebody changed
            packed = re.search(r'id="model">(.*?)</script>', text)[1]
            data = bytearray(gzip.decompress(base64.b64decode(packed)))
            data[len(data)//2] ^= 1
            changed = base64.b64encode(gzip.compress(bytes(data))).decode()
            text,message = text.replace(packed, changed),'was changed or is damaged'
        if what=='program': # another program than the policy names does not run at all
            text,message = text.replace("const say =", "const  say ="),''
        (tmp_path/'p.html').write_text(text, encoding='utf-8')
        if what=='program':
            driver.get((tmp_path/'p.html').as_uri())
            time.sleep(1)
            assert 'loaded' in driver.find_element('id', 'status').text
            assert any('Content Security Policy' in e['message'] for e in driver.get_log('browser'))
            return
        noise = """const read = CanvasRenderingContext2D.prototype.getImageData
            CanvasRenderingContext2D.prototype.getImageData = function(...a) {
                const pixels = read.apply(this, a)
                pixels.data[8] ^= 1
                return pixels
            }"""
        with added_script(driver, noise if what=='pixels' else ''):
            opened = Opened(driver, tmp_path/'p.html')
        assert (message if what!='pixels' else 'changes the pixels that a page reads') in opened.fatal
        assert not opened.id('drop').is_displayed() and opened.css('[role=alert]')[0].is_displayed()


@contextmanager
def added_script(driver, script):
    "Run a script before those of each page, as an extension of the browser might"
    made = driver.execute_cdp_cmd('Page.addScriptToEvaluateOnNewDocument', dict(source=script))
    try: yield
    finally: driver.execute_cdp_cmd('Page.removeScriptToEvaluateOnNewDocument', made)


@pytest.mark.slow(20)
def test_npm_gives_the_version_that_was_tried(runtime):
    found = page.find_runtime(runtime)
    assert found.version==page.RUNTIME_VERSION
    assert hashlib.sha256(found.wasm).hexdigest()==page._DIGESTS[found.version][page._WASM]
