"Quantized files: what they contain, what they compute, and what is refused"
import json
import platform
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.models import create_student, set_model_stats

onnx,onnxruntime = pytest.importorskip('onnx'),pytest.importorskip('onnxruntime')
ship = pytest.importorskip('kdmed.ship.quantize')
from kdmed.ship.onnx import export_onnx  # noqa: E402
from kdmed.ship.onnx_model import OnnxModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:.*lr_scheduler')
CLASSES = ['a', 'b', 'c']
VIT = dict(depth=3, embed_dim=48, num_heads=3)


def student(name='test_resnet', size=32, classes=CLASSES, task='multiclass', **options):
    torch.manual_seed(0)
    return set_model_stats(create_student(name, classes, size, task, **options).eval(), .5, .2)


@pytest.fixture(scope='module')
def dls():
    table = split_groups(synthetic_table(150, classes=3, size=32, seed=2), sizes=(.4, .4, .2))
    table.attrs['classes'],table['label'] = CLASSES,table.label.map(dict(zip(table.attrs['classes'], CLASSES)))
    return image_dls(table, 32, bs=32)


@pytest.fixture(scope='module')
def exported(tmp_path_factory): return export_onnx(student(), tmp_path_factory.mktemp('float')/'s.onnx')


def tidy(folder, *names): assert sorted(f.name for f in folder.iterdir())==sorted(names)
def facts(path): return json.loads(OnnxModel(path, threads=1).properties['quantization'])


KINDS = {
    'resnet': (student, 'static', .4), 'gray': (lambda: student(in_chans=1), 'static', .4),
    'binary': (lambda: student(classes=['no', 'yes'], task='binary'), 'static', .4),
    'vit': (lambda: student('vit_tiny_patch16_224', 64, **VIT), 'dynamic', .6),
    'vit_static': (lambda: student('vit_tiny_patch16_224', 64, **VIT), 'static', .6),
    'half': (student, 'float16', .6), 'half_vit': (lambda: student('vit_tiny_patch16_224', 64, **VIT), 'float16', .7)}
MORE = {
    'resnet18': (lambda: student('resnet18', 64), 'static', .27),
    'convnext': (lambda: student('convnext_atto', 64), 'static', .27),
    'deit': (lambda: student('deit_tiny_patch16_224', 224), 'dynamic', .27),
    'mobilenet': (lambda: student('mobilenetv3_small_050', 64), 'static', .35),
    'efficientnet': (lambda: student('tf_efficientnet_lite0', 64), 'static', .3)}
QUICK = 'resnet',
every = [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow(10)) for k in {**KINDS, **MORE}]


@pytest.mark.parametrize('kind', every)
def test_every_kind_keeps_logits_classes_and_size(kind, dls, tmp_path):
    make,how,share = {**KINDS, **MORE}[kind]
    model = make()
    model.spec.update(temperature=1.7)
    source = export_onnx(model, tmp_path/'s.onnx')
    path = ship.quantize_onnx(source, dls.train, tmp_path/'q.onnx', how, n=16)
    here,there = OnnxModel(source, threads=1),OnnxModel(path, threads=1)
    images = [np.asarray(i) for i in dls.test.table.image[:8]]
    gap = np.abs(here.predict(images, 'logits')-there.predict(images, 'logits')).to_numpy()
    spread = here.predict(images, 'logits').to_numpy()
    assert gap.max() <= .5*max(np.abs(spread).max(), 1e-6)
    assert (there.classes, there.temperature, there.size)==(here.classes, 1.7, here.size)
    assert path.stat().st_size/source.stat().st_size <= share
    rest = {k: v for k,v in there.properties.items() if k!='quantization'}
    assert rest==here.properties and facts(path)['kind']==how
    tidy(tmp_path, 's.onnx', 'q.onnx')


def test_resizing_and_normalization_stay_in_floating_point(exported, dls, tmp_path):
    "No tensor before the student is rounded but the one that the first layer reads, and none behind the logits"
    proto = onnx.load(ship.quantize_onnx(exported, dls.train, tmp_path/'q.onnx', n=8))
    kinds = [n.op_type for n in proto.graph.node]
    assert kinds.index('BatchNormalization') < kinds.index('QuantizeLinear')
    assert kinds[-1]=='Softmax' and kinds.count('Resize')==1
    maker = {o: n for n in proto.graph.node for o in n.output}
    first = next(n for n in proto.graph.node if n.op_type=='QuantizeLinear' and maker.get(n.input[0]) is not None)
    assert maker[first.input[0]].name=='normalize'


def test_calibration_sees_training_images_alone(exported, dls, tmp_path, monkeypatch):
    seen = []
    class Noting(ship._Reader):
        def get_next(self):
            batch = super().get_next()
            if batch is not None: seen.extend(i.tobytes() for i in batch['images'])
            return batch
    monkeypatch.setattr(ship, '_Reader', Noting)
    ship.quantize_onnx(exported, dls.train, tmp_path/'q.onnx', n=1000)
    table = dls.table
    def pixels(split): return {np.asarray(i).tobytes() for i in table.image[table.split==split]}
    assert set(seen)==pixels('train') and len(seen)==len(set(seen))==(table.split=='train').sum()
    assert not set(seen) & (pixels('test') | pixels('valid'))


@pytest.mark.parametrize('images,message', [
    (None, 'images must be given'), ([], 'at least one image'), ('test', 'got images of test'),
    ('valid', 'got images of valid'), ([np.zeros((9, 9, 2), np.uint8)], 'image 0 cannot be read'),
    ([np.zeros((9, 9, 3), np.uint8), 'gone.png'], 'image 1 not found')])
def test_calibration_images_that_are_refused(images, message, exported, dls, tmp_path):
    if isinstance(images, str): images = getattr(dls, images)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ship.quantize_onnx(exported, images, tmp_path/'q.onnx')
    tidy(tmp_path)


def with_nan(path, folder):
    proto = onnx.load(path)
    weight = next(t for t in proto.graph.initializer if len(t.dims)==4)
    values = np.array(onnx.numpy_helper.to_array(weight))
    values.flat[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, folder/'nan.onnx')
    return folder/'nan.onnx'


def test_sources_that_are_refused(exported, dls, tmp_path):
    (tmp_path/'in').mkdir()
    q = ship.quantize_onnx(exported, dls.train, tmp_path/'in'/'q.onnx', n=8)
    half = ship.quantize_onnx(exported, None, tmp_path/'in'/'h.onnx', 'float16')
    for source,message in ((q, 'is quantized already'), (half, 'is quantized already'),
                           (with_nan(exported, tmp_path/'in'), 'weights with NaN'), (tmp_path/'none.onnx', 'no file')):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ship.quantize_onnx(source, dls.train, tmp_path/'x.onnx')
    tidy(tmp_path, 'in')


@pytest.mark.parametrize('name,options,error,message', [
    ('q.pt', {}, ValueError, 'must end in .onnx'), ('none/q.onnx', {}, FileNotFoundError, 'there is no folder'),
    ('q.onnx', dict(kind='int4'), ValueError, "unknown kind 'int4'"), ('q.onnx', dict(skip='fc9'), ValueError, 'skip'),
    ('q.onnx', dict(n=0), ValueError, 'n must be'), ('q.onnx', dict(bs=1.5), TypeError, 'bs must be')])
def test_arguments_that_are_refused(name, options, error, message, exported, dls, tmp_path):
    with pytest.raises(error, match=message): ship.quantize_onnx(exported, dls.train, tmp_path/name, **options)
    tidy(tmp_path)


def test_a_full_disk_keeps_the_old_file(exported, dls, tmp_path, monkeypatch):
    path = ship.quantize_onnx(exported, None, tmp_path/'q.onnx', 'float16')
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match='exists'): ship.quantize_onnx(exported, None, path, 'float16')
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setitem(ship._WRITERS, 'static', full)
    with pytest.raises(OSError, match='No space left'): ship.quantize_onnx(exported, dls.train, path, force=True)
    monkeypatch.setattr(ship.importlib.import_module('kdmed.core.files'), 'is_writable', lambda folder: False)
    with pytest.raises(PermissionError, match='read-only'):
        ship.quantize_onnx(exported, None, tmp_path/'x.onnx', 'float16')
    assert path.read_bytes()==before
    tidy(tmp_path, 'q.onnx')


@pytest.mark.parametrize('flags,machine,needed', [
    ('avx2 avx512f', 'x86_64', True), ('avx2 avx512_vnni', 'x86_64', False), ('avx2 avx_vnni', 'AMD64', False),
    ('', 'arm64', False), (None, 'x86_64', True)])
def test_weights_have_7_bits_where_8_would_overflow(flags, machine, needed, monkeypatch):
    from pathlib import Path
    def read(self):
        if flags is None: raise OSError
        return f'flags : {flags}'
    monkeypatch.setattr(Path, 'read_text', read)
    monkeypatch.setattr(platform, 'machine', lambda: machine)
    ship.needs_reduced_range.cache_clear()
    try: assert ship.needs_reduced_range()==needed
    finally: ship.needs_reduced_range.cache_clear()


def test_weights_of_8_bits_are_run_in_floating_point_where_their_sums_overflow(exported, dls, tmp_path, monkeypatch):
    "As if the file came from a newer machine; the fused layers of this one may be right or wrong, these must be right"
    from kdmed.ship import onnx_model
    path = ship.quantize_onnx(exported, dls.train, tmp_path/'q.onnx', reduce_range=False, n=8)
    images = list(dls.test.table.image)
    levels,options = onnxruntime.GraphOptimizationLevel,onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(str(path), options).run(['logits'], dict(images=np.stack(images)))[0]
    monkeypatch.setattr(onnx_model, 'needs_reduced_range', lambda: True)
    with pytest.warns(UserWarning, match='has int8 weights of 8 bits.*reduce_range=True'):
        model = OnnxModel(path, threads=1)
    assert model.session.get_session_options().graph_optimization_level==levels.ORT_ENABLE_BASIC
    assert np.allclose(model.run(np.stack(images))['logits'], exact, atol=.05*np.ptp(exact))
    dynamic = exported.with_name('dynamic.onnx')
    monkeypatch.setattr(ship, 'needs_reduced_range', lambda: False)
    monkeypatch.setattr(onnx_model, 'needs_reduced_range', lambda: False)
    ship.quantize_onnx(exported, None, dynamic, 'dynamic')
    monkeypatch.setattr(onnx_model, 'needs_reduced_range', lambda: True)
    with pytest.raises(ValueError, match='reduce_range=True'): OnnxModel(dynamic)
    dynamic.unlink()


def test_reduced_weights_have_7_bits(exported, dls, tmp_path):
    proto = onnx.load(ship.quantize_onnx(exported, dls.train, tmp_path/'q.onnx', reduce_range=True, n=8))
    weights = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type==onnx.TensorProto.INT8]
    largest = max(int(np.abs(w.astype(int)).max()) for w in weights if w.ndim>1)
    assert 60 <= largest <= 64 and facts(tmp_path/'q.onnx')['reduce_range']


def planted(model, by=1e4):
    "The same function, with one channel between two convolutions far larger than the others"
    made = deepcopy(model)
    _,norm,_,second,*_ = made.conv1
    for values in (norm.weight, norm.bias): values.data[0] *= by
    second.weight.data[:, 0] /= by
    return made


def trained_like(model):
    "A student whose normalizations do something"
    torch.manual_seed(1)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.uniform_(m.weight, .5, 1.5)
    return model


@pytest.mark.slow(20)
def test_a_planted_sensitive_layer_is_found_and_left_in_floating_point(dls, tmp_path):
    source = export_onnx(planted(trained_like(student())), tmp_path/'s.onnx')
    found = ship.sensitive_layers(source, dls.train, n=16)
    assert found.index[0]=='conv1.3' and set(found.index)==set(ship.quantizable_layers(source))
    whole = facts(ship.quantize_onnx(source, dls.train, tmp_path/'a.onnx', n=16))['error']
    part = facts(ship.quantize_onnx(source, dls.train, tmp_path/'b.onnx', n=16, skip=found.index[0]))['error']
    assert part < whole/2


@pytest.mark.slow(40)
def test_all_candidates_are_made_measured_and_saved(dls, tmp_path):
    small = student('vit_tiny_patch16_224', 32, patch_size=8, **VIT)
    result = ship.quantize_student(small, dls, tmp_path/'q', n=8, batch=2, runs=3, n_boot=20, limit=1., openvino=False)
    assert list(result.rows.index)==['float32', 'int8 static', 'int8 dynamic', 'float16']
    assert result.recommended in ('float32', 'int8 static', 'int8 dynamic') and result.path.is_file()
    saved = json.loads((tmp_path/'q'/'quantization.json').read_text())
    assert saved['recommended']==result.recommended and set(saved['candidates'])==set(result.rows.index)
    assert (result.rows.memory_mb.dropna() > 0).all() and (result.rows.latency_ms > 0).all()
    with pytest.raises(FileExistsError, match='already contains'): ship.quantize_student(student(), dls, tmp_path/'q')
    with pytest.raises(ValueError, match='classes of the student'):
        ship.quantize_student(student(classes=['c', 'b', 'a']), dls, tmp_path/'x')
    tidy(tmp_path, 'q')


def test_openvino_is_named_where_it_is_missing(exported, dls, tmp_path, monkeypatch):
    def missing(name): raise ModuleNotFoundError('no', name=name)
    monkeypatch.setattr(ship.importlib, 'import_module', missing)
    with pytest.raises(ImportError, match=r"pip install 'kdmed\[openvino\]'"):
        ship.quantize_openvino(exported, dls.train, tmp_path/'q.xml')


@pytest.mark.slow(30)
@pytest.mark.parametrize('kind', ['resnet', 'vit'])
def test_openvino_agrees_with_the_float_file(kind, dls, tmp_path):
    pytest.importorskip('openvino')
    pytest.importorskip('nncf')
    source = export_onnx(KINDS[kind][0](), tmp_path/'s.onnx')
    intel = ship.OpenVinoModel(ship.quantize_openvino(source, dls.train, tmp_path/'q.xml', n=8), threads=1)
    model = OnnxModel(source, threads=1)
    ramp = np.tile(np.arange(41, dtype=np.uint8)[None, :, None]*3, (70, 1, 3))
    images = [*map(np.asarray, dls.test.table.image[:4]), ramp]
    assert np.abs(intel.predict(images)-model.predict(images)).to_numpy().max() < .1
    assert (intel.classes, intel.size)==(model.classes, model.size)
    (tmp_path/'q.bin').unlink()
    with pytest.raises(FileNotFoundError, match='q.bin'): ship.OpenVinoModel(tmp_path/'q.xml')
    shutil.copy(source, tmp_path/'fake.xml')
    (tmp_path/'fake.bin').write_bytes(b'')
    with pytest.raises(ValueError, match='not written by quantize_openvino'): ship.OpenVinoModel(tmp_path/'fake.xml')
