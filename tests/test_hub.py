"A bundle in timm's layout: in a folder, and in repositories of a server on this machine that plays the hub"
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from kdmed.models import add_distillation_token, add_exits, create_student, load_student, set_model_stats, truncate_vit
from kdmed.models.weights import hub_student
from kdmed.ship import export_onnx, load_bundle, push_to_hub, save_bundle, save_for_hub
from kdmed.ship.serve import ServedModel

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def student(name='test_resnet', size=32, task='multiclass', classes=('a', 'b', 'c'), **options):
    torch.manual_seed(0)
    return set_model_stats(create_student(name, list(classes), size, task, **options).eval(), .5, .2)


def vit(depth=3): return student('vit_tiny_patch16_224', 64, depth=depth, embed_dim=48, num_heads=3)


KINDS = {
    'resnet': student, 'gray': lambda: student(in_chans=1), 'binary': lambda: student(task='binary',
            classes=('no', 'yes')),
    'multilabel': lambda: student(task='multilabel'), 'efficientnet': lambda: student('test_efficientnet',
            drop_rate=.2), 'vit': vit,
    'swin': lambda: student('swin_tiny_patch4_window7_224', 96, depths=(1, 1, 1, 1), embed_dim=24,
                            num_heads=(1, 1, 2, 2)),
    'exits': lambda: add_exits(student(size=64)).eval(), 'token': lambda: add_distillation_token(vit()).eval(),
    'truncated': lambda: truncate_vit(vit(6), (0, 2, 4)).eval()}
OURS_ALONE = 'exits','token','truncated'


@pytest.fixture
def pictures(): return list(np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8))


def bundle_of(model, folder): return load_bundle(save_bundle(model, folder, calibrate=False))


# -- folders

@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_student_comes_back(kind, tmp_path, pictures):
    model = KINDS[kind]()
    bundle = bundle_of(model, tmp_path/'b')
    folder = save_for_hub(bundle, tmp_path/'hub')
    again = load_bundle(f'local-dir:{folder}')
    assert again.predict(pictures).equals(bundle.predict(pictures)) and again.classes==bundle.classes
    assert load_student(folder).spec==bundle.student.spec
    assert sorted(f.name for f in folder.iterdir())==['README.md', 'config.json', 'model.safetensors', 'student.json']
    if kind in OURS_ALONE:
        with pytest.raises(RuntimeError, match='kdmed_student'):
            timm.create_model(f'local-dir:{folder}', pretrained=True)
        return
    theirs = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, model.spec.get('options', {}).get('in_chans', 3), model.spec['size'], model.spec['size'])
    with torch.no_grad(): assert torch.allclose(theirs(x), model(x), atol=1e-5)
    data = timm.data.resolve_model_data_config(theirs)
    assert (data['input_size'][1], data['crop_mode'], data['crop_pct'], data['interpolation'])==(model.spec['size'],
            'squash', 1., 'bilinear')
    assert list(data['mean'])==model.spec['mean'] and list(data['std'])==model.spec['std']


def test_every_changed_byte_is_noticed(tmp_path):
    folder = save_for_hub(bundle_of(student(), tmp_path/'b'), tmp_path/'hub')
    for name in ('model.safetensors', 'student.json', 'config.json', 'README.md'):
        data = (folder/name).read_bytes()
        (folder/name).write_bytes(data[:-9] + bytes([data[-9]^1]) + data[-8:])
        with pytest.raises(ValueError, match=name): load_bundle(folder)
        (folder/name).write_bytes(data)
    load_bundle(folder)


PRIVATE = '/data/ann/scans', r'C:\patients\42', 'mueller_1970.dcm', 'ann_42.png', 'fold3.safetensors'


def test_nothing_private_is_written(tmp_path):
    model = student()
    model.spec['weights'] = dict(source='fold3.safetensors', notes=['from /data/ann/scans'])
    folder = save_bundle(model, tmp_path/'b', calibrate=False, teacher='/data/ann/scans/teacher',
                         intended_use=r'see C:\patients\42 and ann_42.png',
                         data=dict(name='/data/ann/scans', first='mueller_1970.dcm'))
    hub = save_for_hub(folder, tmp_path/'hub')
    for file in hub.iterdir():
        text = file.read_bytes().decode('latin-1')
        assert not any(p in text or p.replace('\\', '\\\\') in text for p in (*PRIVATE, str(tmp_path))), file.name
    assert load_bundle(hub).settings['weights']['source']=='(file)'


@pytest.mark.parametrize('prepare,error,text', [
    (lambda f: f.write_text(''), NotADirectoryError, 'is a file'),
    (lambda f: (f.mkdir(), (f/'notes.txt').write_text('x')), FileExistsError, 'contains other files, notes.txt'),
    (lambda f: (f.mkdir(), (f/'config.json').write_text('x')), FileExistsError,
     'already contains config.json; pass force=True')])
def test_a_folder_that_exists_is_kept(prepare, error, text, tmp_path):
    bundle = bundle_of(student(), tmp_path/'b')
    prepare(tmp_path/'hub')
    with pytest.raises(error, match=text): save_for_hub(bundle, tmp_path/'hub')
    assert sorted(f.name for f in tmp_path.iterdir())==['b', 'hub']


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    import shutil
    folder = save_for_hub(bundle_of(student(), tmp_path/'b'), tmp_path/'hub')
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(shutil, 'copyfile', full)
    with pytest.raises(OSError, match='No space left'): save_for_hub(tmp_path/'b', folder, force=True)
    assert {f.name: f.read_bytes() for f in folder.iterdir()}==before
    assert sorted(f.name for f in tmp_path.iterdir())==['b', 'hub']


# -- a server that plays the hub

def commit_of(files): return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    "As much of the hub as its client asks for; repositories are dicts, and so are their commits"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def send(self, status, body=b'', **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name,value in ({'Content-Length': str(len(body))} | {k.replace('_', '-'): v for k,
                                                                 v in headers.items()}).items(): self.send_header(name,
                                                                         value)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)

    def do_GET(self):
        state,path = self.server.state,unquote(urlsplit(self.path).path).strip('/')
        state['asked'].append(f'{self.command} {path}')
        api = re.fullmatch(r'api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?', path)
        file = re.fullmatch(r'([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        match = api or file
        if not match: return self.send(200)
        files = state['repositories'].get(match[1])
        if files is None: return self.send(404, dict(error='Repository not found'), X_Error_Code='RepoNotFound')
        sha = state['tags'].get(match[2], match[2])
        files = state['history'].get(sha, files) # an older commit
        sha = commit_of(files)
        if match[2] not in (None, 'main', sha, *state['tags']):
            return self.send(404, dict(error='Invalid rev id'), X_Error_Code='RevisionNotFound')
        if api and '/tree/' in path:
            return self.send(200, [dict(type='file', path=n, size=len(d), oid='0'*40) for n,d in files.items()])
        if api:
            return self.send(200, dict(id=match[1], modelId=match[1], sha=sha, private=True,
                                       siblings=[dict(rfilename=n) for n in files]))
        if match[3] not in files: return self.send(404, X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
        data = files[match[3]]
        self.send(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=sha)

    do_HEAD = do_GET

    def do_POST(self):
        state,path = self.server.state,urlsplit(self.path).path.strip('/')
        body = self.rfile.read(int(self.headers['Content-Length']))
        state['tokens'].add(self.headers['Authorization'])
        state['asked'].append(f'POST {path}')
        if state.get('refuses') and state['refuses'] in path: return self.send(state['status'], dict(error='no'))
        if path=='api/validate-yaml': return self.send(200, dict(errors=[], warnings=[]))
        if path=='api/repos/create':
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = f"{state['url']}/{name}"
            if name in state['repositories']: return self.send(409, dict(error='It exists', url=url))
            state['repositories'][name] = {}
            state['private'] = asked.get('private') or asked.get('visibility')=='private' # older and newer clients
            return self.send(200, dict(url=f"{state['url']}/{name}"))
        if path.endswith('.git/info/lfs/objects/batch'):
            def place(o): return dict(upload=dict(href=f"{state['url']}/large/{o['oid']}"))
            return self.send(200, dict(objects=[o | dict(actions=place(o)) for o in json.loads(body)['objects']]))
        name = re.match(r'api/models/([^/]+/[^/]+)/', path)[1]
        if '/preupload/' in path:
            def how(f): return 'lfs' if f['path'] in state['large'] else 'regular'
            return self.send(200, dict(files=[dict(path=f['path'], uploadMode=how(f), shouldIgnore=False)
                                              for f in json.loads(body)['files']]))
        for line in map(json.loads, body.splitlines()):
            value = line['value']
            if line['key']=='lfsFile': state['repositories'][name][value['path']] = state['objects'][value['oid']]
            if line['key']=='file': state['repositories'][name][value['path']] = base64.b64decode(value['content'])
            if line['key']=='deletedFile': del state['repositories'][name][value['path']]
        state['commits'] = state.get('commits', 0)+1
        files = dict(state['repositories'][name])
        state['history'][commit_of(files)] = files
        self.send(200, dict(commitUrl=f"{state['url']}/{name}/commit/1", commitOid='1'*40))

    def do_PUT(self):
        "A large file, to where the batch said"
        data = self.rfile.read(int(self.headers['Content-Length']))
        self.server.state['objects'][hashlib.sha256(data).hexdigest()] = data
        self.send(200)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    url = f'http://127.0.0.1:{server.server_address[1]}'
    server.state = dict(repositories={}, asked=[], url=url, history={}, tags={}, large=(), objects={}, tokens=set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ('NO_PROXY', 'no_proxy'): monkeypatch.setenv(name, '127.0.0.1')
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    yield server.state
    server.shutdown()
    server.server_close()


def off(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')


def test_a_bundle_goes_to_the_hub_and_comes_back(hub, tmp_path, pictures, monkeypatch):
    bundle = bundle_of(student(), tmp_path/'b')
    assert push_to_hub(bundle, 'me/mine')==f"{hub['url']}/me/mine"
    assert hub['private'] is True and hub['commits']==1
    assert sorted(hub['repositories']['me/mine'])==['README.md', 'config.json', 'model.safetensors', 'student.json']
    assert b'load_bundle("hf-hub:me/mine")' in hub['repositories']['me/mine']['README.md']
    again = load_bundle('hf-hub:me/mine')
    assert again.predict(pictures).equals(bundle.predict(pictures))
    assert torch.equal(load_student('hf-hub:me/mine').fc.weight, bundle.student.fc.weight)
    assert ServedModel('hf-hub:me/mine').facts['classes']==['a', 'b', 'c']
    theirs = timm.create_model('hf-hub:me/mine', pretrained=True, cache_dir=tmp_path/'cache').eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(theirs(x), bundle.student(x), atol=1e-6)
    start = create_student('test_resnet', ['a', 'b', 'c'], 32, weights='hf-hub:me/mine')
    assert torch.equal(start.fc.weight, bundle.student.fc.weight)
    off(monkeypatch)
    with pytest.warns(UserWarning, match='the copy of hf-hub:me/mine in the cache is used'):
        assert load_bundle('hf-hub:me/mine').classes==['a', 'b', 'c']


@pytest.mark.slow(10)
def test_a_student_of_the_hub_is_exported(hub, tmp_path):
    for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)
    push_to_hub(bundle_of(student(), tmp_path/'b'), 'me/mine')
    assert export_onnx('hf-hub:me/mine', tmp_path/'s.onnx').is_file()


def test_a_newer_student_is_found(hub, tmp_path):
    bundle = bundle_of(student(), tmp_path/'b')
    push_to_hub(bundle, 'me/mine')
    old = hub_student('hf-hub:me/mine')
    with pytest.raises(FileExistsError, match='me/mine already contains .*force=True'): push_to_hub(bundle, 'me/mine')
    hub['repositories']['me/mine']['report.md'] = b'of an older one'
    push_to_hub(bundle_of(student('test_efficientnet'), tmp_path/'c'), 'me/mine', force=True)
    assert 'report.md' not in hub['repositories']['me/mine']
    assert load_bundle('hf-hub:me/mine').student.spec['model']=='test_efficientnet'
    commit = hub_student('hf-hub:me/mine').name
    assert load_bundle(f'hf-hub:me/mine@{commit}').student.spec['model']=='test_efficientnet'
    assert load_bundle(old).student.spec['model']=='test_resnet'
    first = next(iter(hub['history']))
    hub['tags']['v1.0'] = first
    for revision in (first, 'v1.0'): # the newest commit is another student
        assert load_bundle(f'hf-hub:me/mine@{revision}').student.spec['model']=='test_resnet'
    with pytest.raises(OSError, match='me/mine@v2 could not be loaded: RevisionNotFoundError'):
        load_bundle('hf-hub:me/mine@v2')


COMMANDS = """
import sys
from kdmed.cli import main
folder = sys.argv[1]
for line in (['push', f'{folder}/b', 'me/mine'],
             ['predict', 'hf-hub:me/mine', f'{folder}/a.png', '--out', f'{folder}/p.csv'],
             ['export', 'hf-hub:me/mine', '--bundle', f'{folder}/copy'],
             ['predict', 'hf-hub:me/pickle', f'{folder}/a.png', '--out', f'{folder}/q.csv']):
    print(main(line))
"""


@pytest.mark.slow(30)
def test_commands_in_another_process_use_the_hub(hub, tmp_path, pictures):
    "As a user sets it: HF_ENDPOINT and a token; the weights go the way of large files"
    bundle = bundle_of(student(), tmp_path/'b')
    Image.fromarray(pictures[0]).save(tmp_path/'a.png')
    hub['large'],hub['repositories']['me/pickle'] = ('model.safetensors',),{'pytorch_model.bin': b'cos\nsystem\n'}
    env = os.environ | dict(HF_ENDPOINT=hub['url'], HF_HOME=str(tmp_path/'home'), HF_TOKEN='hf_of_mine',
                            HF_HUB_DISABLE_XET='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', COMMANDS, str(tmp_path)], capture_output=True,
                          text=True, env=env)
    statuses = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert statuses==['0', '0', '0', '2'] and 'as a pickle only' in done.stderr, done.stdout+done.stderr
    assert hub['objects'] and hub['tokens']=={'Bearer hf_of_mine'}
    assert not any('pytorch_model.bin' in a for a in hub['asked']) and not (tmp_path/'q.csv').exists()
    found = pd.read_csv(tmp_path/'p.csv')[['probability_a', 'probability_b', 'probability_c']]
    assert np.allclose(found, bundle.predict(pictures[0]), atol=1e-5)
    assert load_bundle(tmp_path/'copy').predict(pictures).equals(bundle.predict(pictures))


@pytest.mark.parametrize('files,text', [
    (['pytorch_model.bin', 'config.json'],
     'hf-hub:a/b has its weights as a pickle only, pytorch_model.bin, which could run code'),
    (['model.pth'], 'as a pickle only, model.pth'), (['config.json', 'model.safetensors'],
                                                     'a model of timm, but no student'),
    (['README.md'], 'lacks student.json and model.safetensors, and has README.md'), ([], 'has no file')])
def test_repositories_that_are_no_student_are_refused(files, text, hub):
    hub['repositories']['a/b'] = dict.fromkeys(files, b'cos\nsystem\n')
    with pytest.raises(ValueError, match=text): load_student('hf-hub:a/b')
    with pytest.raises(ValueError, match=text): load_bundle('hf-hub:a/b')
    assert not [a for a in hub['asked'] if 'resolve' in a], 'nothing was downloaded'


def test_hostile_repositories(hub, tmp_path):
    push_to_hub(bundle_of(student(), tmp_path/'b'), 'me/mine')
    files = hub['repositories']['me/mine']
    settings = json.loads(files['student.json'])
    settings.pop('settings_sha256')
    settings['bundle']['files'] = {'../../secret': '0'*64}
    files['student.json'] = json.dumps(settings).encode()
    with pytest.raises(ValueError): load_bundle('hf-hub:me/mine')
    files['student.json'] = b'{"options": {"checkpoint_path": "x"}}'
    with pytest.raises(ValueError, match='student.json'): load_student('hf-hub:me/mine')
    assert not (tmp_path/'secret').exists() and not any('secret' in a for a in hub['asked'])


def test_a_repository_that_does_not_exist(hub):
    with pytest.raises(OSError,
                       match='hf-hub:a/none could not be loaded: RepositoryNotFoundError.*Alternatives: local-dir'):
        load_bundle('hf-hub:a/none')
    for name in ('hf-hub:none', 'hf-hub:', 'hf-hub:a/b/c', 'hf-hub:@v1', 'hf-hub:a/../b'):
        with pytest.raises(ValueError, match='must name a repository as hf-hub:OWNER/NAME'): load_student(name)


@pytest.mark.parametrize('where,status,error,text', [
    ('repos/create', 403, PermissionError, 'does not let you write there; log in'), ('commit', 400, OSError,
            'was not sent: .*What is left: save_for_hub'),
    ('repos/create', 401, PermissionError, 'log in')])
def test_a_push_that_fails_sends_nothing(where, status, error, text, hub, tmp_path):
    hub |= dict(refuses=where, status=status)
    with pytest.raises(error, match=text): push_to_hub(bundle_of(student(), tmp_path/'b'), 'me/mine')
    assert not hub['repositories'].get('me/mine')


def test_no_network_is_told_within_ten_seconds(tmp_path, monkeypatch):
    from huggingface_hub import constants
    off(monkeypatch)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    bundle = bundle_of(student(), tmp_path/'b')
    start = time.monotonic()
    with pytest.raises(OSError, match='cannot be reached .*What is left: save_for_hub writes the same files'):
        push_to_hub(bundle, 'me/mine')
    with pytest.raises(OSError, match='cannot be reached .*Alternatives: local-dir:FOLDER'):
        load_bundle('hf-hub:me/mine')
    assert time.monotonic()-start < 20
    with pytest.raises(ValueError, match='repo_id must be OWNER/NAME'): push_to_hub(bundle, 'mine')
    with pytest.raises(TypeError, match='save_bundle makes one'): push_to_hub(student(), 'me/mine')


@pytest.mark.slow(10)
def test_the_command_pushes(tmp_path, capsys):
    from kdmed.cli import main
    save_bundle(student(), tmp_path/'b', calibrate=False)
    assert main(['push', str(tmp_path/'b'), f"local-dir:{tmp_path/'hub'}"])==0
    assert load_bundle(tmp_path/'hub').classes==['a', 'b', 'c']
    assert main(['push', str(tmp_path/'b'), f"local-dir:{tmp_path/'hub'}"])==2
    assert main(['push', str(tmp_path/'b'), 'mine'])==2
    for line in ([str(tmp_path/'b'), 'local-dir:'], [str(tmp_path/'b'/'student.json'), 'me/mine']):
        assert main(['push', *line])==2
    assert 'must name a folder' in (said := capsys.readouterr().err) and 'student.json is a file' in said
