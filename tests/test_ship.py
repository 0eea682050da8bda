"What ships: bundles of every kind of student, ONNX files of every architecture, and what neither accepts"
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdmed.core.files import moved_aside
from kdmed.data.filters import CLAHE
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.evaluate import compare_predictions
from kdmed.models import (
    add_distillation_token, add_exits, create_fused_teacher, create_student, multi_scale_classifier, predict_images,
    reuse_classifier,
    save_student, set_model_stats, truncate_vit)
from kdmed.models.create import seal_settings
from kdmed.ship import load_bundle, save_bundle

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:.*lr_scheduler')
CLASSES = ['a', 'b', 'c']


def student(name='test_resnet', size=32, classes=CLASSES, task='multiclass', **options):
    torch.manual_seed(0)
    return set_model_stats(create_student(name, classes, size, task, **options).eval(), .5, .2)


def vit(depth=3, **options):
    return student('vit_tiny_patch16_224', 64, depth=depth, embed_dim=48, num_heads=3, **options)


def known(model): return set_model_stats(model.eval(), .5, .2)


def fused():
    torch.manual_seed(0)
    return known(create_fused_teacher(['test_vit', 'test_resnet'], CLASSES, 160))


KINDS = {
    'resnet': student, 'binary': lambda: student(classes=['no', 'yes'], task='binary'),
    'multilabel': lambda: student(task='multilabel'), 'gray': lambda: student(in_chans=1),
    'efficientnet': lambda: student('test_efficientnet'), 'convnext': lambda: student('test_convnext', 64),
    'vit': vit, 'registers': lambda: vit(reg_tokens=2), 'token': lambda: add_distillation_token(vit()).eval(),
    'truncated': lambda: truncate_vit(vit(6), (0, 2, 4)).eval(),
    'token_of_truncated': lambda: add_distillation_token(truncate_vit(vit(6), (0, 3))).eval(),
    'swin': lambda: student('swin_tiny_patch4_window7_224', 224, depths=(1, 1, 1, 1), embed_dim=24,
                            num_heads=(1, 1, 2, 2)),
    'fused': fused, 'exits': lambda: add_exits(student(size=64)).eval(),
    'exits_of_vit': lambda: add_exits(vit(4)).eval(),
    'multi_scale': lambda: multi_scale_classifier(student(size=64)).eval(),
    'reused': lambda: reuse_classifier(student(), student('test_efficientnet')).eval()}
MORE = {
    'mobilenetv3': lambda: student('mobilenetv3_small_050', 64), 'resnet18': lambda: student('resnet18', 64),
    'densenet': lambda: student('densenet121', 64, growth_rate=8), 'regnet': lambda: student('regnetx_002', 64),
    'convnextv2': lambda: student('convnextv2_atto', 64), 'mobilevit': lambda: student('mobilevit_xxs', 64),
    'efficientnet_lite': lambda: student('tf_efficientnet_lite0', 64), 'ghostnet': lambda: student('ghostnet_050', 64),
    'swinv2': lambda: student('swinv2_cr_tiny_224', 224, depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 1, 2, 2)),
    'deit3': lambda: student('deit3_small_patch16_224', 64, depth=2, embed_dim=48, num_heads=3),
    'exits_of_token': lambda: add_exits(add_distillation_token(vit(4))).eval(),
    'poolformer': lambda: student('poolformer_s12', 64), 'efficientformer': lambda: student('efficientformer_l1', 224)}
every = pytest.mark.parametrize('kind', [*KINDS, *(pytest.param(k, marks=pytest.mark.slow(8)) for k in MORE)])


def made(kind): return {**KINDS, **MORE}[kind]()


@pytest.fixture(scope='module')
def pictures():
    "Images of several sizes, one of them gray"
    rng = np.random.default_rng(0)
    sizes = ((70, 90, 3), (32, 32, 3), (41, 30))
    return [(127+60*np.sin(np.indices(s)[0]/7)+rng.normal(0, 20, s)).clip(0, 255).astype(np.uint8) for s in sizes]


@pytest.fixture(scope='module')
def dls():
    table = split_groups(synthetic_table(150, classes=3, size=32, seed=2), sizes=(.4, .4, .2))
    table.attrs['classes'],table['label'] = CLASSES,table.label.map(dict(zip(table.attrs['classes'], CLASSES)))
    return image_dls(table, 32, bs=32)


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


def tidy(folder, *names): assert sorted(f.name for f in folder.iterdir())==sorted(names)


# -- bundles

@every
def test_a_bundle_of_every_kind_predicts_as_its_student(kind, tmp_path, pictures):
    model = made(kind)
    bundle = load_bundle(save_bundle(model, tmp_path/'b', calibrate=False))
    for output in ('logits', 'probabilities', 'decisions'):
        ours,theirs = bundle.predict(pictures, output),predict_images(model, pictures, output=output)
        assert ours.equals(theirs) if output=='decisions' else np.allclose(ours, theirs, atol=1e-5)
    tidy(tmp_path, 'b')


@pytest.mark.slow(20)
@pytest.mark.parametrize('kind', ['resnet', 'binary', 'multilabel', 'gray', 'vit', 'truncated', 'swin'])
def test_the_code_of_a_card_runs_without_kdmed(kind, tmp_path, pictures):
    model = made(kind)
    model.spec.pop('temperature', None)
    bundle = load_bundle(save_bundle(model, tmp_path/'b', calibrate=False))
    code = bundle.card.split('```python\n')[-1].split('\n```')[0]
    Image.fromarray(pictures[0]).save(tmp_path/'b'/'image.png')
    blocked = "import sys\nsys.modules['kdmed'] = None\n"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', f'{blocked}{code}\nprint(probabilities)'],
                          cwd=tmp_path/'b', capture_output=True, text=True)
    assert not done.returncode, done.stderr
    ours = bundle.predict(pictures[0]).to_numpy()[0]
    assert np.allclose(json.loads(done.stdout.splitlines()[-1]), ours[1:] if kind=='binary' else ours, atol=1e-5)


@pytest.mark.parametrize('kind', ['token', 'fused', 'exits', 'reused', 'multi_scale'])
def test_a_card_says_where_timm_is_not_enough(kind, tmp_path):
    card = load_bundle(save_bundle(made(kind), tmp_path/'b', calibrate=False)).card
    assert 'timm alone cannot build this model' in card and 'timm.create_model' not in card


slow_compiled = pytest.param('compiled', marks=pytest.mark.slow(9))


@pytest.mark.parametrize('how', [slow_compiled, 'channels_last', 'half', 'wrapped'])
def test_a_bundle_of_a_changed_model(how, tmp_path, pictures):
    model,plain = student(),student()
    if how=='compiled': model = torch.compile(model)
    if how=='channels_last': model.to(memory_format=torch.channels_last)
    if how=='half': model.half()
    if how=='wrapped': model = torch.nn.DataParallel(model)
    bundle = load_bundle(save_bundle(model, tmp_path/'b', calibrate=False))
    assert np.allclose(bundle.predict(pictures), predict_images(plain, pictures), atol=1e-2 if how=='half' else 1e-5)
    assert next(bundle.student.parameters()).dtype==torch.float32


@pytest.mark.slow(7)
def test_a_bundle_of_a_distillation_run(dls, tmp_path):
    "As `kdmed distill` leaves it: student and report in one folder, among other files"
    run = save_student(student(), tmp_path/'run')
    rng = np.random.default_rng(0)
    seeds = dict(teacher=1, plain=2, distilled=2)
    probs = {name: [rng.dirichlet(np.ones(3), 60) for _ in range(n)] for name,n in seeds.items()}
    report = compare_predictions(probs, np.arange(60)%3, CLASSES, n_boot=20)
    report.about['models'] = dict(teacher='resnet50', distilled='test_resnet')
    report.save(run)
    (run/'config.toml').write_text('')
    bundle = load_bundle(save_bundle(run, tmp_path/'b', dls.valid))
    assert bundle.settings['bundle']['teacher']==['resnet50'] and bundle.settings['bundle']['report_name']=='distilled'
    assert (bundle.folder/'metrics.json').read_bytes()==(run/'metrics.json').read_bytes()
    assert list(bundle.report.scores)==['teacher', 'plain', 'distilled']
    assert 'means over 2 training seeds' in bundle.card and 'CC0-1.0' in bundle.card
    with pytest.raises(FileExistsError, match='contains other files, config.toml'):
        save_bundle(run, run, dls.valid, force=True)
    with pytest.raises(ValueError, match='name must be what the report calls the student'):
        save_bundle(run, tmp_path/'c', dls.valid, name='mine')
    with pytest.raises(ValueError, match='report is about another model'):
        save_bundle(student(classes=['x', 'y', 'z']), tmp_path/'c', report=report, calibrate=False)
    tidy(tmp_path, 'b', 'run')


def test_preprocessing_travels_with_a_bundle(tmp_path):
    table = split_groups(synthetic_table(150, classes=3, size=32, seed=2), sizes=(.4, .4, .2))
    loaders = image_dls(table, 32, preprocess=[CLAHE(clip_limit=.02)])
    bundle = load_bundle(save_bundle(student(classes=loaders.classes), tmp_path/'b', loaders.valid))
    assert bundle.settings['preprocess'][0].startswith('CLAHE(')
    with pytest.raises(ValueError, match=r'had gone through CLAHE\('): bundle.predict(table.image[:2])
    assert len(bundle.predict(table.image[:2], preprocess=[CLAHE(clip_limit=.02)]))==2
    again = load_bundle(save_bundle(bundle.student, tmp_path/'again', calibrate=False))
    assert again.settings['preprocess']==bundle.settings['preprocess'] and again.temperature==1


@pytest.mark.parametrize('name', ['student.safetensors', 'student.json', 'README.md'])
def test_every_changed_byte_is_noticed(name, tmp_path):
    "A byte in a hundred places of each file"
    file = save_bundle(student(), tmp_path/'b', calibrate=False)/name
    data = file.read_bytes()
    for at in np.linspace(0, len(data)-1, 100 if name!='student.safetensors' else 10).astype(int):
        file.write_bytes(data[:at] + bytes([data[at]^1]) + data[at+1:])
        with pytest.raises(ValueError): load_bundle(tmp_path/'b')
    file.write_bytes(data)
    load_bundle(tmp_path/'b')


def resealed(folder, **changes):
    "A bundle whose settings someone has changed together with their checksum"
    settings = json.loads((folder/'student.json').read_text())
    bundle = settings['bundle'] | changes.pop('bundle', {})
    (folder/'student.json').write_text(seal_settings(settings | changes | dict(bundle=bundle)))


@pytest.mark.parametrize('changes,message', [
    (dict(timm='0.9.9', model='test_efficientnet'),
     r'does not fit the model.*made with timm 0.9.9 \(here .*pip install timm==0.9.9'),
    (dict(classes=['a', 'b']), 'does not fit the model'),
    (dict(bundle=dict(files={'../secret': '1'*64})), 'must list files in its own folder'),
    (dict(bundle=dict(files={'/etc/hostname': '1'*64})), 'must list files in its own folder'),
    (dict(bundle=dict(format=99)), 'of a newer kdmed'), (dict(bundle=[]), 'but no bundle'),
    (dict(options=dict(checkpoint_path='x')), 'checkpoint_path cannot be passed on'),
    (dict(temperature='hot'), "temperature cannot be 'hot'"),
    (dict(thresholds=dict(a=.5)), 'thresholds of a multiclass task')])
def test_a_hostile_bundle_is_refused(changes, message, tmp_path):
    folder = save_bundle(student(), tmp_path/'b', calibrate=False)
    if changes.get('bundle')==[]:
        settings = json.loads((folder/'student.json').read_text()) | changes
        del settings['settings_sha256']
        (folder/'student.json').write_text(json.dumps(settings))
    else: resealed(folder, **changes)
    with pytest.raises(ValueError, match=message): load_bundle(folder)


def test_a_hostile_header_of_weights_is_refused(tmp_path):
    folder = save_bundle(student(), tmp_path/'b', calibrate=False)
    file = folder/'student.safetensors'
    file.write_bytes((2**60).to_bytes(8, 'little')+b'{'+file.read_bytes()[9:])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    files = json.loads((folder/'student.json').read_text())['bundle']['files'] | {'student.safetensors': digest}
    resealed(folder, weights_sha256=digest, bundle=dict(files=files))
    with pytest.raises(ValueError, match='student.safetensors cannot be read'): load_bundle(folder)


def test_settings_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    import kdmed.models.create as module
    folder = save_bundle(student(), tmp_path/'b', calibrate=False)
    monkeypatch.setattr(module, '_MOST_SETTINGS', 100)
    with pytest.raises(ValueError, match='too large for settings'): load_bundle(folder)


def test_a_bundle_is_loaded_without_network_and_pickle(tmp_path, monkeypatch, pictures):
    import pickle
    folder = save_bundle(student(), tmp_path/'b', calibrate=False)
    def refuse(*args, **kwargs): raise AssertionError('not allowed')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    for name in ('load', 'loads', 'Unpickler'): monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, 'load', refuse)
    assert len(load_bundle(folder).predict(pictures))==3


def nan_student():
    model = student()
    next(model.parameters()).data[0] = float('nan')
    return model


def no_stats():
    model = student()
    model.spec.update(mean=None, std=None)
    return model


@pytest.mark.parametrize('model,error,message', [
    (nan_student, ValueError, 'weights with NaN'),
    (no_stats, ValueError, 'normalization of the student is not known'),
    (lambda: torch.nn.Linear(2, 2), ValueError, 'student has no spec'),
    (lambda: 3, TypeError, 'student must be a Module')])
def test_a_student_that_cannot_be_saved_leaves_nothing(model, error, message, tmp_path):
    with pytest.raises(error, match=message): save_bundle(model(), tmp_path/'b', calibrate=False)
    tidy(tmp_path)


@pytest.mark.parametrize('at', ['save_student', '_write_report', 'seal_settings', 'load_bundle', 'replace_folder'])
def test_a_full_disk_at_any_moment_leaves_the_old_bundle(at, tmp_path, monkeypatch):
    import kdmed.core.files as files
    import kdmed.ship.bundle as module
    folder = save_bundle(student(), tmp_path/'b', calibrate=False)
    before = contents(folder)
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(files if at=='replace_folder' else module, at, full)
    with pytest.raises(OSError, match='No space left'):
        save_bundle(student('test_efficientnet'), folder, calibrate=False, force=True)
    assert contents(folder)==before
    tidy(tmp_path, 'b')


def test_an_error_in_the_last_step_brings_the_old_bundle_back(tmp_path, monkeypatch):
    import kdmed.ship.bundle as module
    folder = save_bundle(student(), tmp_path/'b', calibrate=False)
    before,replace = contents(folder),os.replace
    def fails(a, b):
        if Path(a).name=='new': raise PermissionError('no')
        return replace(a, b)
    monkeypatch.setattr(module.os, 'replace', fails)
    with pytest.raises(PermissionError):
        save_bundle(student('test_efficientnet'), folder, calibrate=False, force=True)
    assert contents(folder)==before
    tidy(tmp_path, 'b')


def test_a_save_killed_between_its_two_steps_is_repaired(tmp_path):
    folder = save_bundle(student(), tmp_path/'b', calibrate=False)
    before = contents(folder)
    os.replace(folder, moved_aside(folder))
    with pytest.raises(FileNotFoundError, match='rename it'): load_bundle(folder)
    with pytest.raises(FileExistsError, match='already contains'): save_bundle(student(), folder, calibrate=False)
    assert contents(folder)==before


def test_a_read_only_place_is_named(tmp_path, monkeypatch):
    import kdmed.core.files as module
    monkeypatch.setattr(module, 'is_writable', lambda folder: False)
    with pytest.raises(PermissionError, match='choose another folder'):
        save_bundle(student(), tmp_path/'b', calibrate=False)
    tidy(tmp_path)


def test_no_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    import kdmed.core.files as module
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda folder: usage._replace(free=10))
    with pytest.raises(OSError, match='the bundle b needs'): save_bundle(student(), tmp_path/'b', calibrate=False)
    tidy(tmp_path)


@pytest.mark.parametrize('loader,message', [
    ('train', 'valid must be a loader of validation images, such as dls.valid: dl shuffles'),
    ('test', 'such as dls.valid, got images of test')])
def test_only_validation_images_calibrate(loader, message, dls, tmp_path):
    with pytest.raises(ValueError, match=message): save_bundle(student(), tmp_path/'b', getattr(dls, loader))
    with pytest.raises(TypeError, match='valid must be a loader'): save_bundle(student(), tmp_path/'b', dls)
    with pytest.raises(ValueError, match='valid must be given'): save_bundle(student(), tmp_path/'b')
    tidy(tmp_path)


# -- ONNX

@pytest.fixture(scope='module')
def ship(): return pytest.importorskip('onnx') and pytest.importorskip('kdmed.ship')


@pytest.fixture(scope='module')
def exported(ship, tmp_path_factory):
    "The bytes of an exported file"
    return ship.export_onnx(student(), tmp_path_factory.mktemp('onnx')/'s.onnx').read_bytes()


QUICK = 'token','exits'
exports = [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow(6)) for k in {**KINDS, **MORE}]


@pytest.mark.parametrize('kind', exports)
def test_every_architecture_is_exported_and_predicts_as_in_torch(kind, tmp_path, pictures, ship):
    model = made(kind)
    size = model.spec['size']
    own_size = [np.asarray(Image.fromarray(p).convert('RGB').resize((size, size))) for p in pictures]
    onnx_model = ship.OnnxModel(ship.export_onnx(model, tmp_path/'s.onnx'), threads=1)
    here,there = onnx_model.predict(own_size, 'logits'),predict_images(model, own_size, output='logits')
    assert np.abs(here-there).max().max() < 1e-3
    assert np.abs(onnx_model.predict(pictures)-predict_images(model, pictures)).max().max() < .02 # Pillow rounds
    tidy(tmp_path, 's.onnx')


@pytest.mark.slow(20)
@pytest.mark.parametrize('how', ['compiled', 'channels_last', 'half', 'wrapped', 'training', 'frozen'])
def test_the_export_of_a_changed_model(how, tmp_path, pictures, ship):
    model,plain = student(),student()
    if how=='compiled': model = torch.compile(model)
    if how=='channels_last': model.to(memory_format=torch.channels_last)
    if how=='half': model.half()
    if how=='wrapped': model = torch.nn.DataParallel(model).eval()
    if how=='training': model.train()
    if how=='frozen': model.requires_grad_(False)
    before = deepcopy(model.state_dict())
    found = ship.OnnxModel(ship.export_onnx(model, tmp_path/'s.onnx'), threads=1).predict(pictures)
    assert np.abs(found-predict_images(plain, pictures)).max().max() < .02
    assert all(torch.equal(a, b) for a,b in zip(before.values(), model.state_dict().values()))
    assert model.training==(how=='training')


@pytest.mark.slow(15)
def test_a_bundle_is_exported_with_its_calibration(tmp_path, dls, ship):
    "From folder, bundle and module"
    table = split_groups(synthetic_table(150, classes=2, size=32, seed=2), sizes=(.4, .4, .2))
    loaders = image_dls(table, 32, bs=32)
    folder = save_bundle(student(classes=loaders.classes, task='binary'), tmp_path/'b', loaders.valid)
    bundle,images = load_bundle(folder),list(table.image[:9])
    for i,source in enumerate((folder, str(folder), bundle, bundle.student)):
        model = ship.OnnxModel(ship.export_onnx(source, tmp_path/f'{i}.onnx'), threads=1)
        assert (model.temperature, model.thresholds)==(bundle.temperature, bundle.thresholds)
        assert np.allclose(model.predict(images), bundle.predict(images), atol=1e-5)
        assert model.predict(images, 'decisions').equals(bundle.predict(images, 'decisions'))


@pytest.mark.parametrize('model,message', [
    (nan_student, 'weights with NaN'), (no_stats, 'normalization of the student is not known'),
    (lambda: torch.nn.Linear(2, 2), 'student has no spec'),
    (lambda: student(in_chans=4), 'images have 1 or 3 channels')])
def test_what_cannot_be_exported_leaves_nothing(model, message, tmp_path, ship):
    with pytest.raises(ValueError, match=message): ship.export_onnx(model(), tmp_path/'s.onnx')
    tidy(tmp_path)


def test_an_export_that_differs_is_not_kept(tmp_path, ship, exported):
    file,before = tmp_path/'s.onnx',exported
    file.write_bytes(before)
    with pytest.raises(ValueError, match='differs from PyTorch by .* more than the tolerance'):
        ship.export_onnx(student('test_efficientnet'), file, tolerance=1e-12, force=True)
    assert file.read_bytes()==before
    tidy(tmp_path, 's.onnx')


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, ship, exported):
    file,before,write = tmp_path/'s.onnx',exported,Path.write_bytes
    file.write_bytes(before)
    def full(self, data):
        write(self, data[:100])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left'): ship.export_onnx(student(), file, force=True)
    monkeypatch.undo()
    assert file.read_bytes()==before
    tidy(tmp_path, 's.onnx')


def test_an_export_into_a_read_only_folder(tmp_path, monkeypatch, ship):
    import kdmed.core.files as module
    monkeypatch.setattr(module, 'is_writable', lambda folder: False)
    with pytest.raises(PermissionError, match='its folder is read-only'):
        ship.export_onnx(student(), tmp_path/'s.onnx')


def test_weights_in_a_graph_inside_are_found(tmp_path, ship, exported):
    "External data hidden in the attribute of a node, and in the branch of an If"
    import onnx
    from onnx import TensorProto, helper
    def hidden(inside):
        file,proto = tmp_path/'s.onnx',onnx.ModelProto.FromString(exported)
        tensor = TensorProto(name='w', data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key='location', value='../../secret')
        node = helper.make_node('Constant', [], ['w'], value=tensor)
        if inside:
            out = helper.make_tensor_value_info('w', TensorProto.FLOAT, [1])
            graph = helper.make_graph([node], 'branch', [], [out])
            node = helper.make_node('If', ['c'], ['y'], then_branch=graph, else_branch=graph)
        proto.graph.node.append(node)
        file.write_bytes(proto.SerializeToString())
        return file
    for inside in (False, True):
        with pytest.raises(ValueError, match='refers to other files'): ship.OnnxModel(hidden(inside))


@pytest.mark.parametrize('name,error,message', [
    ('s.pt', ValueError, 'must end in .onnx'), ('none/s.onnx', FileNotFoundError, 'there is no folder')])
def test_paths_that_cannot_be_written(name, error, message, tmp_path, ship):
    with pytest.raises(error, match=message): ship.export_onnx(student(), tmp_path/name)


def test_truncated_files_are_refused(tmp_path, ship, exported):
    "Cut at thirty places"
    data = exported
    for at in np.linspace(1, len(data)-2, 30).astype(int):
        (tmp_path/'cut.onnx').write_bytes(data[:at])
        with pytest.raises(ValueError, match='cut.onnx'): ship.OnnxModel(tmp_path/'cut.onnx')
