"The service: what it answers and refuses; quick tests call the application, slow ones start the command"
import asyncio
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from kdmed.data.images import open_image
from kdmed.models import create_student, set_model_stats
from kdmed.ship import load_bundle, save_bundle

fastapi = pytest.importorskip('fastapi')
pytest.importorskip('uvicorn')
pytest.importorskip('python_multipart')
from fastapi.testclient import TestClient  # noqa: E402

from kdmed.ship.serve import create_app, open_upload, take_port  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')
SOME = dict(max_mb=.2, max_images=3, max_pixels=20_000)


def student(task='multiclass', classes=('a', 'b', 'c'), **options):
    torch.manual_seed(0)
    model = set_model_stats(create_student('test_resnet', list(classes), 32, task, **options).eval(), .5, .2)
    model.fc.weight.data *= 20 # else all images give nearly the same
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return save_bundle(student(), tmp_path_factory.mktemp('serve')/'bundle', calibrate=False)


@pytest.fixture(scope='module')
def client(folder): return TestClient(create_app(folder, **SOME), raise_server_exceptions=False)


@pytest.fixture(scope='module')
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((50, 70, 3), (32, 32, 3), (41, 30))]


def encoded(pixels, kind='PNG', **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))


def png(width, height, pixels=b''):
    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')


def dicom(pixels, syntax='1.2.840.10008.1.2.1', **changes):
    "A DICOM file of gray pixels"
    pydicom = pytest.importorskip('pydicom')
    from pydicom.dataset import Dataset, FileMetaDataset
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1'
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.Rows,ds.Columns,ds.SamplesPerPixel,ds.PhotometricInterpretation = *pixels.shape,1,'MONOCHROME2'
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit,ds.PixelRepresentation,ds.PixelData = 7,0,pixels.tobytes()
    ds.WindowCenter,ds.WindowWidth = 128,256
    for name,value in changes.items(): setattr(ds, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return with_syntax(file.getvalue(), syntax)


def with_syntax(data, syntax):
    "A DICOM file that claims another transfer syntax"
    at,value = data.index(b'\x02\x00\x10\x00UI'),syntax.encode() + b'\0'*(len(syntax)%2)
    n = int.from_bytes(data[at+6:at+8], 'little')
    length = int.from_bytes(data[140:144], 'little')+len(value)-n # of the group
    data = data[:at+6] + struct.pack('<H', len(value)) + value + data[at+8+n:]
    return data[:140] + struct.pack('<I', length) + data[144:]


def post(client, data, kind='image/png', query=''):
    return client.post(f'/predict{query}', content=data, headers={'Content-Type': kind})


def values(response, kind='probabilities'):
    assert response.status_code==200, response.text
    return np.array([list(row[kind].values()) for row in response.json()['predictions']])


# -- what is answered

@pytest.mark.parametrize('task,classes', [('multiclass', 'abc'), ('binary', ['no', 'yes']), ('multilabel', 'abc')])
def test_answers_are_those_of_the_bundle(task, classes, tmp_path, pictures):
    model = student(task, classes)
    model.spec |= dict(temperature=1.9, thresholds={} if task=='multiclass' else dict.fromkeys(list(classes)[-2:]
            if task=='multilabel' else ['yes'], .3))
    bundle = load_bundle(save_bundle(model, tmp_path/'b', calibrate=False))
    bundle.student.spec.update(model.spec)
    client = TestClient(create_app(bundle))
    response = client.post('/predict?logits=1', files=[('images', encoded(p)) for p in pictures])
    assert np.allclose(values(response), bundle.predict(pictures), atol=1e-6)
    assert np.allclose(values(response, 'logits'), bundle.predict(pictures, 'logits'), atol=1e-5)
    assert [r['decision'] for r in response.json()['predictions']]==list(bundle.predict(pictures, 'decisions').label)
    assert 'logits' not in post(client, encoded(pictures[0])).json()['predictions'][0]
    assert 'not a medical device' in response.json()['note'] and response.headers['cache-control']=='no-store'


def test_an_onnx_file_is_served(tmp_path, pictures):
    ship = pytest.importorskip('kdmed.ship')
    for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)
    file = ship.export_onnx(student(), tmp_path/'s.onnx')
    client = TestClient(create_app(file))
    expected = ship.OnnxModel(file).predict(pictures)
    assert np.allclose(values(client.post('/predict', files=[('i', encoded(p)) for p in pictures])), expected,
                       atol=1e-6)
    assert 'test_resnet' in client.get('/card').text and client.get('/model').json()['size']==32


def test_dicom_files_are_served(client, folder):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (40, 30), dtype=np.uint8)
    expected = load_bundle(folder).predict(pixels)
    assert np.allclose(values(post(client, dicom(pixels), 'application/dicom')), expected, atol=.02)
    assert np.array_equal(open_upload(dicom(pixels), 20_000), pixels)


def test_formats_and_directions(client, folder, pictures):
    "The image as `open_image` sees it, whatever its file"
    turned = Image.fromarray(pictures[0])
    exif = turned.getexif()
    exif[0x0112] = 6
    files = [encoded(turned, 'JPEG', exif=exif), encoded(pictures[0], 'BMP'), encoded(pictures[2], 'TIFF'),
             encoded(pictures[0], 'WEBP', lossless=True),
             encoded(Image.fromarray(pictures[0]).convert('P'),
                     'GIF'), encoded(Image.fromarray(pictures[0]).convert('RGBA'))]
    for data in files:
        expected = load_bundle(folder).predict(open_image(Image.open(io.BytesIO(data))))
        assert np.allclose(values(post(client, data)), expected, atol=1e-6)


def test_what_is_known_about_the_student(client, folder):
    assert client.get('/health').json()==dict(status='ok', busy=0, queue=8)
    facts = client.get('/model').json()
    assert facts['classes']==['a', 'b', 'c'] and facts['limits']['max_images']==3
    assert client.get('/card').text==(folder/'README.md').read_text()
    assert str(folder) not in json.dumps(facts)
    assert '/predict' in client.get('/openapi.json').json()['paths']
    for page in ('/docs', '/redoc'): assert client.get(page).status_code==404


# -- what is refused

good = encoded(np.arange(48*40*3, dtype=np.uint8).reshape(48, 40, 3))
two_frames = encoded(Image.new('L', (8, 8)), 'GIF', save_all=True, append_images=[Image.new('L', (8, 8), 9)])
BAD = {
    'empty': (b'', 400, 'the request is empty'), 'text': (b'hello', 400, 'not an image of the kinds'),
    'html': (b'<html>', 400, 'not an image'),
    'truncated_png': (good[:len(good)//2], 400, 'image 0 cannot be read'), 'no_pixels': (png(20, 20), 400,
            'image 0 cannot be read'),
    'truncated_jpeg': (encoded(np.zeros((90, 90, 3), np.uint8), 'JPEG')[:400], 400, 'image 0 cannot be read'),
    'bomb': (png(100_000, 100_000), 400, 'pixels'), 'bomb_with_pixels': (png(8000, 8000, bytes(8001*8000)), 400,
            '64,000,000 pixels, and may have 20,000'),
    'bomb_gif': (b'GIF89a' + struct.pack('<HH', 65535, 65535) + bytes(20), 400, 'image 0 cannot be read'),
    'bomb_bmp': (encoded(np.zeros((4, 4, 3), np.uint8), 'BMP')[:18] + struct.pack('<ii', 60_000, 60_000) + bytes(80),
                 400, 'image 0 cannot be read'),
    'frames': (two_frames, 400, 'several frames'), 'deep': (encoded(np.zeros((9, 9), np.uint16)), 400,
                                                            'must have 8 bits'),
    'cmyk': (encoded(Image.new('CMYK', (9, 9)), 'JPEG'), 400, 'must be RGB or gray'), 'large': (b'0'*300_000, 413,
            'may have 0.2 MB'),
    'pickle': (b'\x80\x04cos\nsystem\n', 400, 'not an image'), 'pdf': (b'%PDF-1.4', 400, 'not an image'),
    'eps': (b'%!PS-Adobe-3.0 EPSF-3.0', 400, 'not an image')}


@pytest.mark.parametrize('case', BAD)
def test_bad_images_are_refused(case, client):
    data,status,text = BAD[case]
    for response in (post(client, data), *([client.post('/predict', files=[('images', data)])] if data else [])):
        assert response.status_code==status and text in response.json()['error'], response.text
    assert client.get('/health').json()['busy']==0


def test_a_bad_image_among_good_ones_is_counted(client):
    response = client.post('/predict', files=[('images', good), ('images', good[:60])])
    assert response.status_code==400 and response.json()['error'].startswith('image 1 cannot be read')


@pytest.mark.parametrize('ask,status,text', [
    (lambda c: c.post('/predict', files=[('images', good)]*4), 413, 'may have 3 images'),
    (lambda c: c.get('/nothing'), 404, 'GET /nothing is not served: there are GET /health'),
    (lambda c: c.get('/predict'), 405, 'POST /predict'), (lambda c: c.delete('/model'), 405, 'DELETE /model'),
    (lambda c: post(c, b'{}', 'application/json'), 415, "got 'application/json'"), (lambda c: post(c, good, ''), 415,
            "got 'none'"),
    (lambda c: post(c, b'a=b', 'application/x-www-form-urlencoded'), 415, 'paths and addresses are not opened'),
    (lambda c: post(c, good, 'multipart/form-data'), 400, 'no boundary'),
    (lambda c: post(c, b'--x\r\n', 'multipart/form-data; boundary=x'), 400, 'cut off'),
    (lambda c: post(c, b'--x\r\n', f"multipart/form-data; boundary={'x'*5000}"), 400, 'the form cannot be read'),
    (lambda c: post(c, b'??', 'multipart/form-data; boundary=x'), 400, 'cannot be read'),
    (lambda c: c.post('/predict', files=dict(path=(None, '/etc/passwd'))), 400,
     "field 'path' of the form is not a file"),
    (lambda c: c.post('/predict', json=dict(url='http://127.0.0.1/x.png')), 415, 'paths and addresses are not opened'),
    (lambda c: post(c, good, query='?path=/etc/passwd'), 400, "unknown parameter 'path'"),
    (lambda c: post(c, good, query='?logits=perhaps'), 400, 'logits must be true or false'),
    (lambda c: c.get('/../student.json'), 404, 'not served'), (lambda c: c.get('/%2e%2e/student.json'), 404,
                                                               'not served')])
def test_bad_requests_are_refused(ask, status, text, client):
    response = ask(client)
    assert response.status_code==status and text in response.json()['error'], response.text
    assert 'access-control-allow-origin' not in response.headers


PIXELS = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize('data,text', [
    (lambda: dicom(PIXELS, '1.2.840.10008.1.2.1.99'), 'transfer syntax'), (lambda: dicom(PIXELS,
            '1.2.840.10008.1.2.8.1'), 'transfer syntax'),
    (lambda: dicom(PIXELS, Rows=60_000, Columns=60_000), 'pixels'), (lambda: dicom(PIXELS, NumberOfFrames=3),
                                                                     'cannot be read'),
    (lambda: dicom(PIXELS)[:200], 'cannot be read'), (lambda: dicom(PIXELS)[:-5], 'cannot be read'),
    (lambda: bytes(128) + b'DICM', 'not stated'), (lambda: dicom(PIXELS, '1.2.840.10008.1.2.4.50'), 'cannot be read'),
    (lambda: dicom(PIXELS, '1.2.840.10008.1.2.5'), 'cannot be read')])
def test_bad_dicom_files_are_refused(data, text, client):
    response = post(client, data(), 'application/dicom')
    assert response.status_code==400 and text in response.json()['error'], response.text


def test_an_inner_jpeg_that_is_larger_than_its_dicom_file_says_is_refused(client):
    from pydicom.encaps import encapsulate
    inner = encoded(np.zeros((400, 400), np.uint8), 'JPEG')
    data = dicom(PIXELS)
    import pydicom
    ds = pydicom.dcmread(io.BytesIO(data))
    ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.4.50'
    ds.PixelData = encapsulate([inner])
    ds['PixelData'].VR,ds['PixelData'].is_undefined_length = 'OB',True
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    response = post(client, file.getvalue(), 'application/dicom')
    assert response.status_code==400 and '160,000 pixels, and may have 20,000' in response.json()['error']


def test_no_decision_without_numbers(tmp_path):
    "A student that computes NaN has not said a class"
    model = student()
    bundle = load_bundle(save_bundle(model, tmp_path/'b', calibrate=False))
    bundle.student.fc.bias.data[0] = float('nan')
    response = post(TestClient(create_app(bundle)), good)
    assert response.status_code==500 and 'no finite numbers for image 0' in response.json()['error']


def test_more_than_the_queue_holds_is_told_to_come_again(folder):
    "Two places, taken by clients that are slow; a third gets 503 before its body is read"
    app = create_app(folder, queue=2, patience=5)
    release = threading.Event()
    with TestClient(app) as client:
        found = []
        def send(): found.append(post(client, good).status_code)
        app_busy = [threading.Thread(target=send) for _ in range(2)]
        with patch('kdmed.ship.serve.read_body', side_effect=_held(release)):
            for t in app_busy: t.start()
            for _ in range(200):
                if client.get('/health').json()['busy']==2: break
                time.sleep(.01)
            response = post(client, good)
            release.set()
            for t in app_busy: t.join(10)
        assert response.status_code==503 and response.headers['retry-after']=='1'
        assert 'try again' in response.json()['error']
        assert found==[200, 200] and client.get('/health').json()['busy']==0


def _held(release):
    "`read_body` that waits for an event, without holding the loop"
    async def read(request, most, patience):
        while not release.is_set(): await asyncio.sleep(.01)
        return bytearray(good)
    return read


# -- what cannot be started

def test_a_port_that_cannot_be_taken_is_named(monkeypatch):
    with take_port('127.0.0.1', 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f'port {port} is in use: choose another with port'):
            take_port('127.0.0.1', port)
    def refused(self, place): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(socket.socket, 'bind', refused)
    with pytest.raises(PermissionError, match='port 80 needs the rights of an administrator'):
        take_port('127.0.0.1', 80)
    monkeypatch.undo()
    for host in ('not a host', '', '192.0.2.1'):
        with pytest.raises((ValueError, OSError), match='host'): take_port(host, 0)
    with pytest.raises(ValueError, match='port must be'): take_port('127.0.0.1', 65_536)


def test_sources_that_cannot_be_served(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source,text in ((tmp_path/'none', 'no such folder'), ('none.onnx', 'no file'), ('', 'source must be'),
                        (3, 'source must be')):
        with pytest.raises((OSError, TypeError, ValueError), match=text): create_app(source)
    (tmp_path/'a.onnx').write_bytes(b'?'*99)
    with pytest.raises(ValueError, match='not an ONNX file'): create_app(tmp_path/'a.onnx')
    filtered = load_bundle(folder)
    filtered.settings['preprocess'] = ['CLAHE()']
    with pytest.raises(ValueError, match='had gone through CLAHE'): create_app(filtered)


def test_an_onnx_file_that_refers_to_other_files_is_not_served(tmp_path):
    onnx = pytest.importorskip('onnx')
    for name in ('onnxscript', 'onnxruntime'): pytest.importorskip(name)
    from kdmed.ship import export_onnx
    proto = onnx.load(export_onnx(student(), tmp_path/'s.onnx'))
    weight = proto.graph.initializer[0]
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key='location', value='../../etc/passwd')
    (tmp_path/'elsewhere.onnx').write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match='refers to other files'): create_app(tmp_path/'elsewhere.onnx')


# -- the command itself

class Served:
    "`kdmed serve` in a process of its own, with a folder for temporary files that is watched"
    def __init__(self, source, tmp_path, *options):
        self.temporary = tmp_path/'temporary'
        self.temporary.mkdir()
        env = {**os.environ, 'TMPDIR': str(self.temporary), 'OMP_NUM_THREADS': '1'}
        command = [sys.executable, '-W', 'ignore', '-m', 'kdmed.cli', 'serve', str(source), '--port', '0', *options]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert 'Serving at http://127.0.0.1:' in line, line + self.process.communicate()[1]
        self.port = int(line.split('127.0.0.1:')[1].split(':')[0])
        for _ in range(100):
            try: return self.get('/health') and None
            except OSError: time.sleep(.1)

    def connect(self): return http.client.HTTPConnection('127.0.0.1', self.port, timeout=30)

    def get(self, route):
        connection = self.connect()
        connection.request('GET', route)
        return connection.getresponse().read()

    def post(self, data, **headers):
        connection = self.connect()
        connection.request('POST', '/predict', data, {'Content-Type': 'image/png'} | headers)
        response = connection.getresponse()
        return response.status,json.loads(response.read())

    def raw(self, data, wait=20, end=True):
        "What comes back for bytes that need not be HTTP"
        with socket.create_connection(('127.0.0.1', self.port), timeout=wait) as s:
            s.sendall(data)
            if end: s.shutdown(socket.SHUT_WR)
            answer = b''
            try:
                while part := s.recv(65536): answer += part
            except OSError: pass
            return answer

    def memory(self): # MB
        text = Path(f'/proc/{self.process.pid}/status').read_text()
        return int(text.split('VmHWM:')[1].split()[0])/1024

    def stop(self, signum=signal.SIGINT):
        self.process.send_signal(signum)
        out,err = self.process.communicate(timeout=30)
        return self.process.returncode,out,err


@pytest.fixture
def served(folder, tmp_path):
    service = Served(folder, tmp_path, '--max-mb', '4', '--max-pixels', '1000000', '--patience', '2')
    yield service
    service.process.kill()
    service.process.communicate()


@pytest.mark.slow(30)
def test_a_service_survives_everything_and_leaves_nothing(served, folder, pictures):
    "Good requests beside truncated, lying, slow and endless ones; then it ends as it should"
    expected = load_bundle(folder).predict(pictures[0]).to_numpy()[0]
    picture,wrong,bad = encoded(pictures[0]),[],[]
    end = time.monotonic() + 8
    def asks():
        while time.monotonic() < end:
            status,answer = served.post(picture)
            if status==503: continue
            if status!=200 or not np.allclose(list(answer['predictions'][0]['probabilities'].values()), expected,
                                              atol=1e-5): wrong.append((status, answer))
    head = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n'
    def attacks():
        while time.monotonic() < end:
            bad.append(served.raw(head + b'Content-Length: 90000\r\n\r\nabc')) # cut off
            bad.append(served.raw(head + b'Content-Length: 3\r\n\r\n' + picture)) # the rest is no request
            bad.append(served.raw(head + b'Content-Length: x\r\n\r\nabc'))
            bad.append(served.raw(head + b'Transfer-Encoding: chunked\r\n\r\n' + b'10000\r\n'*3))
            bad.append(served.raw(b'\x16\x03\x01 no HTTP\r\n\r\n'))
            for data in (png(100_000, 100_000), png(8000, 8000, bytes(8001*8000)), picture[:90], b'0'*4_500_000):
                served.post(data)
    before = served.memory()
    threads = [threading.Thread(target=f) for f in (asks, asks, attacks)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert not wrong, wrong[:3]
    assert json.loads(served.get('/health'))==dict(status='ok', busy=0, queue=8)
    assert served.post(picture)[0]==200
    assert not list(served.temporary.iterdir())
    assert served.memory()-before < 300, 'no bomb was unpacked'
    code,out,err = served.stop()
    assert (code, err)==(0, '') and out.endswith('The service has ended.\n')


@pytest.mark.slow(20)
def test_time_limits_of_a_service(served):
    "A body, a head and a silent connection that do not come to an end, and a body without a length that never does"
    head = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n'
    start = time.monotonic()
    assert b' 408 ' in served.raw(head + b'Content-Length: 90000\r\n\r\nabc', end=False)
    assert served.raw(b'POST /predict HTTP/1.1\r\nHost: loc', end=False)==b''
    assert served.raw(b'', end=False)==b''
    assert 5 < time.monotonic()-start < 15
    with socket.create_connection(('127.0.0.1', served.port), timeout=20) as s:
        s.sendall(head + b'Transfer-Encoding: chunked\r\n\r\n')
        sent = 0
        try:
            while sent < 100_000_000:
                s.sendall(b'10000\r\n' + bytes(0x10000) + b'\r\n')
                sent += 0x10000
        except OSError: pass
        assert sent < 40_000_000, 'it stopped reading'
    assert served.get('/health') and not list(served.temporary.iterdir())
    waits = served.raw(head + b'Content-Length: 90000000\r\nExpect: 100-continue\r\n\r\n', end=False)
    assert b' 413 ' in waits and b'100 Continue' not in waits
    assert b' 400 ' in served.raw(b'GET /model HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n')


@pytest.mark.slow(15)
def test_a_request_that_has_begun_is_answered_when_the_service_ends(served, pictures):
    connection = served.connect()
    picture = encoded(pictures[0])
    connection.putrequest('POST', '/predict')
    for name,value in {'Content-Type': 'image/png', 'Content-Length': str(len(picture))}.items():
        connection.putheader(name, value)
    connection.endheaders(picture[:100])
    time.sleep(.3)
    served.process.send_signal(signal.SIGTERM)
    time.sleep(.3)
    connection.send(picture[100:])
    assert connection.getresponse().status==200
    assert served.process.wait(20)==0
    with pytest.raises(OSError): served.get('/health')


@pytest.mark.slow(20)
def test_the_command_serves_with_the_filters_of_the_training(folder, monkeypatch):
    from kdmed.cli import main
    module,given = sys.modules['kdmed.ship.serve'],[] # the package has a function of this name
    monkeypatch.setattr(module, 'serve', lambda source, **options: given.append(options['preprocess']))
    for more in ((), ('--preprocess', 'clahe')): assert main(['serve', str(folder), *more])==0
    assert [list(map(str, filters)) for filters in given]==[[], ['CLAHE(clip_limit=0.01, tiles=8)']]


def test_what_the_command_says(folder, tmp_path, capsys):
    from kdmed.cli import main
    def said(*args):
        assert main(['serve', *map(str, args)])==2
        out,err = capsys.readouterr()
        assert not out
        return err
    with take_port('127.0.0.1', 0) as taken:
        port = taken.getsockname()[1]
        assert f'kdmed: error: port {port} is in use: choose another with --port' in said(folder, '--port', port)
    assert 'no such folder' in said(tmp_path/'none', '--port', 0)
    assert '--max-images must be' in said(folder, '--port', 0, '--max-images', 0)
    assert '--host' in said(folder, '--port', 0, '--host', '192.0.2.1')
