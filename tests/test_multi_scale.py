"A classifier of several scales in distillation, in files, and on chest X-rays"
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmed.data.datasets import read_chestxray14
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.distill.methods import distill, distill_callbacks, fit_classifier
from kdmed.distill.registry import METHODS
from kdmed.evaluate.comparison import compare
from kdmed.evaluate.saliency import saliency_maps
from kdmed.models import add_exits, create_student, load_student, multi_scale_classifier, save_student, set_model_stats
from kdmed.ship import export_onnx, load_bundle, save_bundle
from kdmed.ship.onnx_model import OnnxModel

NIH = Path(__file__).resolve().parents[2]/'shared'/'data'/'nih_chestxray14'
REFUSED = {'simkd': 'does not end in one linear layer', 'l2d': 'has no linear classifier'}
FITTING = [name for name,m in METHODS.items() if 'multilabel' in m.tasks and not m.needs]

@pytest.fixture(scope='module')
def dls():
    table = synthetic_table(36, classes=3, size=64, task='multilabel', seed=1)
    return image_dls(split_groups(table, sizes=(.5, .25, .25)), 64, bs=8, device='cpu')

def plain(dls, name='test_resnet'): return create_student(name, dls.classes, 64, 'multilabel')

def several(dls, **settings): return multi_scale_classifier(plain(dls, 'test_efficientnet'), **settings)

# -- distillation

@pytest.mark.slow(2)
@pytest.mark.parametrize('student, teacher', [(several, plain), (plain, several)], ids=['student', 'teacher'])
@pytest.mark.parametrize('method', FITTING)
def test_every_method_takes_it_or_says_why_not(dls, method, student, teacher):
    student,teacher = student(dls),teacher(dls)
    if method in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method]): distill(dls, student, teacher, method, 1, progress=False)
        return
    cbs = distill_callbacks(method, student, teacher) # before the slow part: a refusal would come here
    assert cbs
    before = {k: v.clone() for k,v in student.state_dict().items()}
    learn = distill(dls, student, teacher, method, 1, progress=False)
    assert np.isfinite(learn.history.valid_loss).all()
    assert type(learn.model) is type(student)
    changed = [k for k,v in learn.model.state_dict().items() if v.is_floating_point() and not torch.equal(v, before[k])]
    assert any(k.startswith(('heads', 'fc')) for k in changed)

@pytest.mark.parametrize('task, classes', [('binary', ['no', 'yes']), ('multiclass', ['a', 'b', 'c'])])
@pytest.mark.parametrize('pool', ['max', 'lse', 'mean'])
def test_other_tasks(task, classes, pool):
    table = synthetic_table(36, classes=len(classes), size=64, seed=1)
    loaders = image_dls(split_groups(table, sizes=(.5, .25, .25)), 64, bs=8, device='cpu')
    student = create_student('test_resnet', loaders.classes, 64, task)
    learn = fit_classifier(loaders, multi_scale_classifier(student, (16, 32), pool), 1, progress=False)
    assert np.isfinite(learn.history.valid_loss).all()

def test_labels_that_are_missing_have_no_gradient(dls):
    model = several(dls).eval()
    x,y = torch.randn(4, 3, 64, 64),torch.tensor([[1., float('nan'), 0.]]*4)
    loss = dls.train.loss_func if hasattr(dls.train, 'loss_func') else dls.loss_func
    loss(model(x), y).backward()
    for head in model.heads:
        assert head.weight.grad[1].abs().max()==0 and head.weight.grad[0].abs().max() > 0

# -- files

@pytest.mark.parametrize('name, levels, pool', [
    ('test_efficientnet', (8, 16, 32), 'lse'),
    pytest.param('convnext_atto', (8, 16, 32), 'mean', marks=pytest.mark.slow),
    pytest.param('mobilenetv3_small_050', (16, 32), 'max', marks=pytest.mark.slow)])
def test_bundle_and_onnx_give_its_predictions(tmp_path, name, levels, pool):
    torch.manual_seed(0)
    student = create_student(name, ['a', 'b'], 64, 'multilabel')
    model = set_model_stats(multi_scale_classifier(student, levels, pool), .5, .25).eval()
    images = list(np.random.default_rng(0).integers(0, 256, (3, 70, 90, 3), dtype=np.uint8))
    bundle = load_bundle(save_bundle(model, tmp_path/'bundle', calibrate=False))
    assert 'timm alone cannot build this model' in bundle.card
    expected = bundle.predict(images, 'logits').to_numpy()
    with torch.no_grad(): again = load_student(tmp_path/'bundle')
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    found = OnnxModel(export_onnx(bundle, tmp_path/'model.onnx')).predict(images, 'logits').to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)

def test_exits_can_be_added_and_saved(tmp_path, dls):
    model = add_exits(several(dls), ['backbone.blocks.1']).eval()
    x = torch.randn(2, 3, 64, 64)
    again = load_student(save_student(model, tmp_path/'student', .5, .25))
    with torch.no_grad(): torch.testing.assert_close(again(x), model(x))

def test_a_spec_with_levels_that_cannot_be_is_refused(tmp_path, dls):
    model = several(dls)
    model.spec['multi_scale']['levels'] = [8, 64]
    first = save_student(model, tmp_path/'a', .5, .2)
    with pytest.raises(ValueError, match='levels must be strides'): load_student(first)
    model.spec['multi_scale'] = dict(levels=[8, 16, 32], depth=3)
    other = save_student(model, tmp_path/'b', .5, .2)
    with pytest.raises(ValueError, match='multi_scale cannot hold'): load_student(other)

def test_heat_maps_of_the_saliency_page(dls):
    images = next(iter(dls.test))[0].float()[:2]
    maps = saliency_maps(several(dls).eval(), images, 0, 'grad-cam')
    assert maps.shape==(2, 64, 64)

# -- chest X-rays

@pytest.mark.skipif(not NIH.exists(), reason='needs the sample of ChestX-ray14')
@pytest.mark.slow(60)
def test_chest_x_rays_whose_split_is_by_patient():
    table = read_chestxray14(NIH, print_card=False)
    table = split_groups(table, sizes=(.6, .1, .3)) # as the survey: 7 to 3, a part of the 7 to watch
    per_group = table.groupby('group').split.nunique()
    assert (per_group==1).all()
    dls = image_dls(table, 64, bs=32, device='cpu', sampling='natural')
    student = create_student('test_efficientnet', dls.classes, 64, 'multilabel')
    learn = fit_classifier(dls, multi_scale_classifier(student), 1, progress=False)
    plain_fit = fit_classifier(dls, 'test_efficientnet', 1, progress=False)
    made = compare({'several scales': learn, 'plain': plain_fit}, dls.test, n_boot=20)
    assert 0 <= made.scores['several scales'].value['macro_auroc'] <= 1
