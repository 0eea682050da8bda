"Students for phones: every kind of student as an ExecuTorch program, and what neither export accepts"
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmed.models import add_exits, create_student, predict_images, set_model_stats, truncate_vit
from kdmed.ship import export_coreml, export_executorch, save_bundle

pytestmark = [pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')]


def student(name='test_resnet', size=32, task='multiclass', classes=('a', 'b', 'c'), **options):
    torch.manual_seed(0)
    model = set_model_stats(create_student(name, list(classes), size, task, **options).eval(), .5, .2)
    model.spec |= dict(temperature=1.4)
    return model


def vit(depth=3): return student('vit_tiny_patch16_224', 64, depth=depth, embed_dim=48, num_heads=3)


KINDS = {
    'resnet': student, 'gray': lambda: student(in_chans=1), 'binary': lambda: student(task='binary',
            classes=('no', 'yes')),
    'multilabel': lambda: student(task='multilabel'), 'efficientnet': lambda: student('test_efficientnet'), 'vit': vit,
    'convnext': lambda: student('test_convnext', 64), 'mobilenetv3': lambda: student('mobilenetv3_small_050', 64),
    'truncated': lambda: truncate_vit(vit(6), (0, 2, 4)).eval(), 'exits': lambda: add_exits(student(size=64)).eval()}


@pytest.mark.slow(90)
@pytest.mark.parametrize('kind', KINDS)
def test_programs_give_the_logits_of_the_student(kind, tmp_path):
    "In ExecuTorch's runtime, for pixels of a photograph's kind, against the prediction of the package"
    runtime = pytest.importorskip('executorch.runtime')
    model = KINDS[kind]()
    size = model.spec['size']
    path = export_executorch(model, tmp_path/'s.pte')
    image = np.random.default_rng(2).integers(0, 256, (size, size, 3), dtype=np.uint8)
    method = runtime.Runtime.get().load_program(path).load_method('forward')
    logits,probabilities = method.execute([torch.tensor(image).permute(2, 0, 1)[None].float().contiguous()])
    assert np.allclose(logits.numpy(), predict_images(model, image, output='logits').to_numpy(), atol=1e-3)
    assert np.allclose(probabilities.numpy(), predict_images(model, image).to_numpy(), atol=1e-3)
    facts = json.loads((tmp_path/'s.json').read_text())
    assert facts['classes']==model.spec['classes'] and facts['image']['shape']==[1, 3, size,
            size] and facts['temperature']==1.4


@pytest.mark.slow(40)
@pytest.mark.parametrize('kind', ['resnet', 'gray', 'binary', 'vit', 'convnext'])
def test_packages_are_converted(kind, tmp_path):
    ct = pytest.importorskip('coremltools')
    model = KINDS[kind]()
    with pytest.warns(UserWarning, match='converted, but not run'):
        package = export_coreml(model, tmp_path/'s.mlpackage', 'float16')
    read = ct.models.MLModel(str(package), skip_model_load=True)
    facts = json.loads(read.user_defined_metadata['kdmed'])
    assert facts['precision']=='float16' and 'not run' in facts['checked'] and 'not run' in read.short_description
    assert [o.name for o in read.get_spec().description.output]==['logits', 'probabilities']


def no_stats():
    model = student()
    model.spec |= dict(mean=None, std=None)
    return model


def nan_student():
    model = deepcopy(student())
    model.fc.weight.data[0, 0] = float('nan')
    return model


@pytest.mark.slow
@pytest.mark.parametrize('export,name,needs', [(export_executorch, 's.pte', 'executorch'),
                                               (export_coreml, 's.mlpackage', 'coremltools')])
def test_what_cannot_be_exported_leaves_nothing(export, name, needs, tmp_path):
    pytest.importorskip(needs)
    for model,text in ((nan_student(), 'weights with NaN'), (no_stats(), 'normalization of the student is not known'),
                       (torch.nn.Linear(2, 2), 'student has no spec'), (student(in_chans=4),
                               'images have 1 or 3 channels')):
        with pytest.raises(ValueError, match=text): export(model, tmp_path/name)
    with pytest.raises(FileNotFoundError, match='there is no folder'): export(student(), tmp_path/'none'/name)
    with pytest.raises(ValueError, match='path must end in'): export(student(), tmp_path/'s.bin')
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_says_why(tmp_path, monkeypatch):
    pytest.importorskip('executorch')
    def fails(*args, **kwargs): raise RuntimeError('operator x is not supported')
    monkeypatch.setattr(torch.export, 'export', fails)
    with pytest.raises(ValueError, match='test_resnet cannot be exported to ExecuTorch: RuntimeError: operator x'):
        export_executorch(student(), tmp_path/'s.pte')
    pytest.importorskip('coremltools')
    with pytest.raises(ValueError, match='test_resnet cannot be converted to Core ML: RuntimeError: operator x'):
        export_coreml(student(), tmp_path/'s.mlpackage')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow(20)
def test_a_full_disk_keeps_the_old_program(tmp_path, monkeypatch):
    pytest.importorskip('executorch')
    path = export_executorch(save_bundle(student(), tmp_path/'b', calibrate=False), tmp_path/'s.pte')
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    write = Path.write_bytes
    def full(self, data):
        write(self, data[:100])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left'):
        export_executorch(student('test_efficientnet'), path, force=True)
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}==before


def test_a_package_is_not_written_over_other_things(tmp_path):
    pytest.importorskip('coremltools')
    (tmp_path/'a.mlpackage').mkdir()
    (tmp_path/'a.mlpackage/notes.txt').write_text('x')
    (tmp_path/'b.mlpackage').write_text('x')
    for name,text in (('a', 'is a folder of other files'), ('b', 'is a file, and a package is a folder')):
        for force in (False, True):
            with pytest.raises(FileExistsError, match=text):
                export_coreml(student(), tmp_path/f'{name}.mlpackage', force=force)
