"Teachers and students as users bring them: other normalizations, outputs, channels, sizes and wrappers; numbers that cannot be meant; training that diverges."
import copy
import types
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.models.adapt import prepared_for, renormalize
from kdmed.models.create import (
    create_student, create_teacher, find_normalization, load_student, model_stats, normalization_of, save_student,
    set_model_stats, stage_names, truncate_vit)
from kdmed.distill.cache import TeacherCache
from kdmed.distill.callbacks import DecoupledKD, DistKD, FocalKD, LogitKD
from kdmed.distill.features import FeatureKD, RelationalKD
from kdmed.distill.methods import check_fit, distill, distill_callbacks, fit_classifier
from kdmed.distill.multidim import MultiDimKD, ViTKD
from kdmed.distill.teacher import MeanTeacher, Teacher, evaluate_teacher
from kdmed.evaluate.metrics import predict

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is no better', 'ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore:.*y_pred', 'ignore:You are shadowing',
                                        'ignore:load_learner', 'ignore:Saved file', 'ignore:.*y_true')

OTHER = ([.8, .6, .7], [.1, .1, .1])
IMAGENET = ([.485, .456, .406], [.229, .224, .225])


@pytest.fixture(scope='module')
def table(): return split_groups(synthetic_table(n=90, classes=3, size=32, seed=1), (.5, .2, .3))

@pytest.fixture(scope='module')
def dls(table): return image_dls(table, 32, 16)

@pytest.fixture(scope='module')
def other_dls(table): return image_dls(table, 32, 16, stats=OTHER)

@pytest.fixture(scope='module')
def stained(other_dls): return fit_classifier(other_dls, 'test_resnet', 2, progress=False)


def sharp(model, by=8.):
    "A model whose logits differ between images and classes, as trained ones do"
    with torch.no_grad(): model.get_classifier().weight.mul_(by)
    return model.eval()

def warned(f):
    "The warnings of a call"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in caught]

def images_of(loaders): return torch.Tensor(loaders.test.one_batch()[0])

def in_loaders(loaders, x, other): return renormalize(x, find_normalization(other), find_normalization(loaders))


class Gives(nn.Module):
    "A model whose outputs have another form"
    def __init__(self, model, form): super().__init__(); self.model,self.form = model,form
    def forward(self, x): return self.form(self.model(x))


# -- normalization

@pytest.mark.parametrize('bring', ['folder', 'loaded', 'learner', 'module', 'averaged'])
def test_teacher_has_its_own_normalization(bring, stained, dls, other_dls, tmp_path):
    "A teacher from a folder of save_student got images with the student's statistics."
    model = stained.model
    given = dict(folder=lambda: str(save_student(model, tmp_path/'t')), loaded=lambda: load_student(save_student(model, tmp_path/'t')), learner=lambda: stained,
                 module=lambda: copy.deepcopy(model), averaged=lambda: AveragedModel(model))[bring]()
    teacher = Teacher(given)
    np.testing.assert_allclose(teacher.members[0].stats, find_normalization(other_dls), atol=1e-5)
    teacher.match_data(dls)
    x = images_of(other_dls)
    with torch.no_grad(): expected = copy.deepcopy(model).eval()(x)
    torch.testing.assert_close(teacher.forward((in_loaders(dls, x, other_dls),))[0], expected, atol=1e-3, rtol=1e-3)
    model.requires_grad_(True)


def test_predictions_do_not_depend_on_the_normalization_of_the_loader(stained, dls, other_dls, tmp_path):
    "Accuracy .62 became .43 on a loader with other statistics, without a word."
    probs,targets = predict(stained, other_dls.test)
    for model in (stained, stained.model, AveragedModel(stained.model), load_student(save_student(stained.model, tmp_path/'s'))):
        found,same = predict(model, dls.test)
        np.testing.assert_allclose(found, probs, atol=1e-3)
        assert (same==targets).all()
    assert np.abs(predict(copy.deepcopy(stained.model).eval(), other_dls.test)[0]-probs).max() < 1e-6


def test_training_records_the_normalization(dls, other_dls):
    "And says so when it is not that of the weights it began with."
    model = create_student('test_resnet', dls.classes, 32)
    assert model_stats(model) is None
    check_fit(dls, model)
    assert model_stats(model) is None
    assert not [w for w in warned(lambda: fit_classifier(dls, model, 1, progress=False)) if 'normalized with' in w]
    np.testing.assert_allclose(model_stats(model), IMAGENET, atol=1e-5)
    said = [w for w in warned(lambda: fit_classifier(other_dls, model, 1, progress=False)) if 'normalized with' in w]
    assert len(said)==1 and '0.485' in said[0] and '0.8' in said[0] and 'stats=model_stats(model)' in said[0]
    np.testing.assert_allclose(model_stats(model), OTHER, atol=1e-5)
    np.testing.assert_allclose(normalization_of(Learner(dls, model)), OTHER, atol=1e-5) # that Learner has not trained it


def test_student_keeps_the_normalization_in_its_folder(dls, other_dls, tmp_path):
    learn = distill(other_dls, 'test_resnet', sharp(create_teacher('test_resnet', dls.classes, 32)), 'logit', epochs=1, progress=False)
    np.testing.assert_allclose(model_stats(load_student(save_student(learn.model, tmp_path/'s'))), OTHER, atol=1e-5)


def test_loaders_without_normalize_are_warned_of(stained):
    x,y = torch.rand(8, 3, 32, 32),torch.arange(8) % 3
    bare = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=4) for _ in range(2)])
    assert any('have no Normalize' in w for w in warned(lambda: prepared_for(stained, bare)))
    assert any('have no Normalize' in w for w in warned(lambda: fit_classifier(bare, copy.deepcopy(stained.model).requires_grad_(True), 1, progress=False)))


def test_stats_that_contradict_the_model_are_warned_of(stained):
    model = copy.deepcopy(stained.model)
    assert any('are not those the teacher was trained with' in w for w in warned(lambda: Teacher(model, stats=IMAGENET)))
    assert not warned(lambda: Teacher(model, stats=OTHER))


def test_peers_teacher_features_do_not_change_with_the_students_normalization(stained, dls, other_dls):
    "Changing the student's normalization changed the teacher's features (lightly-train#901)."
    features = []
    for loaders in (dls, other_dls):
        teacher = Teacher(copy.deepcopy(stained.model))
        teacher.add_tap('layer4', 'map')
        teacher.match_data(loaders)
        features.append(teacher.forward((in_loaders(loaders, images_of(other_dls), other_dls),))[1]['layer4', 'map'])
    torch.testing.assert_close(*features, atol=1e-3, rtol=1e-3)


def test_saliency_in_the_models_own_normalization(stained, dls, other_dls):
    pytest.importorskip('pytorch_grad_cam')
    from kdmed.evaluate.interpret import deletion_insertion
    from kdmed.evaluate.saliency import saliency_maps
    x = images_of(other_dls)[:4]
    elsewhere = in_loaders(dls, x, other_dls)
    maps = saliency_maps(stained, x, layer='layer2')
    np.testing.assert_allclose(saliency_maps(stained, elsewhere, layer='layer2', stats=find_normalization(dls)), maps, atol=1e-2)
    own,given = (deletion_insertion(stained, images, maps, steps=2, **more) for images,more in ((x, {}), (elsewhere, dict(stats=find_normalization(dls)))))
    np.testing.assert_allclose(given.deletion[:, 0], own.deletion[:, 0], atol=1e-3)


# -- outputs

FORMS = dict(dictionary=lambda z: {'features': torch.zeros(len(z), 16), 'logits': z}, attribute=lambda z: types.SimpleNamespace(logits=z, hidden=None),
             one=lambda z: [z], twice=lambda z: (z, z), beside_features=lambda z: (torch.zeros(len(z), 16), z), nested=lambda z: {'out': (z,)}, log_softmax=lambda z: z.log_softmax(1))

@pytest.mark.parametrize('form', FORMS)
def test_teacher_outputs_of_any_form(form, dls):
    "A list, tuple, dict or object was `AttributeError: … has no attribute 'dtype'`."
    model = sharp(create_teacher('test_resnet', dls.classes, 32))
    teacher = Teacher(Gives(model, FORMS[form]), dls.classes)
    teacher.match_data(dls)
    x = images_of(dls)
    with torch.no_grad(): torch.testing.assert_close(teacher.forward((x,))[0].softmax(1), model(x).softmax(1))
    teacher.check_outputs()
    np.testing.assert_allclose(predict(Gives(model, FORMS[form]), dls.test)[0], predict(model, dls.test)[0], atol=1e-6)


@pytest.mark.parametrize('make,why', [
    (lambda: timm.create_model('test_resnet', features_only=True), 'features_only=True'),
    (lambda: Gives(timm.create_model('test_resnet', num_classes=3), lambda z: (z, 2*z)), 'which of them are its logits'),
    (lambda: Gives(timm.create_model('test_resnet', num_classes=3), lambda z: {'a': z, 'b': -z}), "'a'"),
    (lambda: Gives(timm.create_model('test_resnet', num_classes=3), lambda z: None), 'NoneType'),
    (lambda: Gives(timm.create_model('test_resnet', num_classes=3), lambda z: 'logits'), 'str'),
    (lambda: nn.Conv2d(3, 3, 3), 'not logits')], ids=['features', 'pair', 'dictionary', 'none', 'text', 'map'])
def test_outputs_without_clear_logits_are_refused_before_training(make, why, dls):
    student = create_student('test_resnet', dls.classes, 32)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(TypeError, match=why): distill(dls, student, make(), 'logit', epochs=1, progress=False)
    for k,v in student.state_dict().items(): assert torch.equal(v, before[k])


def test_features_teach_without_logits(dls):
    teacher = timm.create_model('test_resnet', features_only=True)
    layer = teacher.feature_info.module_name()[-1]
    learn = fit_classifier(dls, 'test_efficientnet', 1, cbs=FeatureKD(teacher, [(stage_names(create_student('test_efficientnet', 3, 32))[-1], layer)], pool=True), progress=False)
    assert learn.history.feature_kd.iloc[-1] > 0


@pytest.mark.parametrize('outputs', ['auto', 'probabilities'])
def test_probabilities_are_not_softened_as_logits(outputs, dls):
    "A softmax at the end of a teacher was softened once more, without a word: all classes became equally likely."
    model = sharp(create_teacher('test_resnet', dls.classes, 32))
    def learn(given): return distill(dls, 'test_efficientnet', given, 'logit', epochs=1, progress=False)
    said = []
    exact = learn(Teacher(model))
    said += warned(lambda: said.append(learn(Teacher(Gives(model, lambda z: z.softmax(1)), dls.classes, outputs=outputs))))
    assert said[0].history.logit_kd.iloc[0] == pytest.approx(exact.history.logit_kd.iloc[0], rel=1e-3)
    assert any('rows in [0, 1] that sum to 1' in w for w in said[1:]) == (outputs=='auto')
    taken = learn(Teacher(Gives(model, lambda z: z.softmax(1)), dls.classes, outputs='logits'))
    assert abs(taken.history.logit_kd.iloc[0]-exact.history.logit_kd.iloc[0]) > .05*exact.history.logit_kd.iloc[0]


def test_probabilities_of_0_and_1():
    def given(p): return nn.Sequential(nn.Flatten(), Gives(nn.Identity(), lambda x: torch.tensor(p).expand(len(x), -1)))
    x = (torch.zeros(2, 3, 4, 4),)
    z = Teacher(given([0., 1., 0.]), outputs='probabilities').forward(x)[0]
    assert z.isfinite().all() and z.softmax(1)[0, 1] == 1
    z = Teacher(given([0., 1., 1.]), outputs='probabilities').forward(x)[0]
    assert z.isfinite().all() and torch.allclose(z.sigmoid(), torch.tensor([0., 1., 1.]), atol=1e-6)
    with pytest.raises(ValueError, match="outputs='probabilities': they must be in"): Teacher(given([-1., 2., 0.]), outputs='probabilities').forward(x)


def test_independent_sigmoids(table):
    "They are probabilities where declared; else logits, with a warning."
    findings = image_dls(split_groups(synthetic_table(n=90, classes=3, size=32, task='multilabel', seed=1), (.5, .3, .2)), 32, 16)
    model = sharp(create_teacher('test_resnet', findings.classes, 32, 'multilabel'), 30.)
    x = images_of(findings)
    with torch.no_grad(): z = model(x)
    declared = Teacher(Gives(model, torch.sigmoid), findings.classes, outputs='probabilities')
    declared.match_data(findings)
    torch.testing.assert_close(declared.forward((x,))[0].sigmoid(), z.sigmoid(), atol=1e-5, rtol=1e-4)
    assert any('as sigmoids are' in w for w in warned(lambda: distill(findings, 'test_resnet', Gives(model, torch.sigmoid), 'logit', epochs=1, progress=False)))
    assert not any('as sigmoids are' in w for w in warned(lambda: distill(findings, 'test_resnet', model, 'logit', epochs=1, progress=False)))


@pytest.mark.parametrize('form', [lambda z: 0*z, lambda z: (0*z).softmax(1), lambda z: (0*z).sigmoid()], ids=['zeros', 'uniform', 'half'])
def test_a_head_of_zeros_is_no_false_alarm(form, dls):
    teacher = Gives(create_teacher('test_resnet', dls.classes, 32), form)
    said = warned(lambda: distill(dls, 'test_resnet', teacher, 'logit', epochs=1, progress=False))
    assert not [w for w in said if 'probabilities' in w or 'sigmoids' in w]


def test_peers_a_sigmoid_teacher_for_a_softmax_student(dls):
    "It was softened as a softmax (torchdistill#211): it is refused by its task, or read as declared."
    model = sharp(create_teacher('test_resnet', dls.classes, 32, 'multilabel'))
    with pytest.raises(ValueError, match='different tasks'): distill(dls, 'test_resnet', model, 'logit', epochs=1, progress=False)
    plain = Gives(sharp(timm.create_model('test_resnet', num_classes=3)), torch.sigmoid)
    teacher = Teacher(plain, dls.classes, outputs='probabilities')
    teacher.match_data(dls)
    with torch.no_grad(): torch.testing.assert_close(teacher.forward((images_of(dls),))[0], plain.model(images_of(dls)), atol=1e-3, rtol=1e-3)


def test_cached_teacher_reads_outputs_the_same_way(dls, tmp_path):
    model = sharp(create_teacher('test_resnet', dls.classes, 32))
    fixed = image_dls(dls.table, 32, 16, views=1)
    def run(teacher): return distill(fixed, 'test_efficientnet', teacher, 'logit', epochs=1, progress=False).history.logit_kd.iloc[0]
    exact = run(Teacher(model))
    softmax = Gives(model, lambda z: {'probs': z.softmax(1)})
    assert run(TeacherCache(Teacher(softmax, dls.classes, outputs='probabilities'), tmp_path)) == pytest.approx(exact, rel=1e-2)
    taken = run(Teacher(softmax, dls.classes, outputs='logits'))
    assert run(TeacherCache(Teacher(softmax, dls.classes, outputs='logits'), tmp_path)) == pytest.approx(taken, rel=1e-2) # not the answers of the other reading
    assert abs(taken-exact) > .05*exact


def test_number_of_classes_must_be_that_of_the_outputs(dls):
    for classes in ([*dls.classes, 'more'], dls.classes[:2]):
        with pytest.raises((TypeError, ValueError), match='the teacher has 3 outputs|does not know|different'): distill(dls, 'test_resnet', Teacher(timm.create_model('test_resnet', num_classes=3), classes=classes), 'logit', epochs=1, progress=False)
    with pytest.raises(TypeError, match="classes must be a list of class names.*, got 'abc'"): Teacher(nn.Identity(), classes='abc')
    with pytest.raises(TypeError, match='got 3'): Teacher(nn.Identity(), classes=3)
    with pytest.raises(ValueError, match='different names'): Teacher(nn.Identity(), classes=['a', 'a'])
    for size in (True, 0, -1, '32', 1.5):
        with pytest.raises((TypeError, ValueError), match='size must be'): Teacher(nn.Identity(), size=size)


# -- what `auto` means

@pytest.mark.parametrize('name', ['pit_ti_224', 'hrnet_w18_small', 'twins_pcpvt_small', 'mvitv2_tiny', 'hiera_tiny_224', 'tnt_s_patch16_224', 'coat_tiny'])
def test_auto_needs_no_named_stages(name):
    "Models whose listed stages are no layers, or give tuples, stopped `auto`."
    dls = image_dls(split_groups(synthetic_table(60, 3, 64, seed=1)), 64, 8)
    student = create_student('test_efficientnet', dls.classes, 64)
    cbs = distill_callbacks('auto', student, create_teacher(name, dls.classes, 64))
    assert isinstance(cbs[0], LogitKD)
    check_fit(dls, student, cbs)


@pytest.mark.parametrize('wrap', [AveragedModel, nn.DataParallel, lambda m: timm.utils.ModelEmaV3(m), lambda m: torch.compile(m, backend='eager')], ids=['averaged', 'parallel', 'ema', 'compiled'])
def test_a_wrapper_changes_neither_auto_nor_classes(wrap, dls):
    "A wrapper hid classes, size and what `auto` means; elsewhere it was refused as teacher (lightly-train#449)."
    teacher,student = create_teacher('test_resnet', dls.classes, 32),create_student('test_efficientnet', dls.classes, 32)
    plain = distill_callbacks('auto', student, Teacher(copy.deepcopy(teacher)))
    kds = distill_callbacks('auto', student, Teacher(wrap(teacher)))
    assert [type(cb) for cb in kds]==[type(cb) for cb in plain]==[LogitKD, FeatureKD] and kds[1].pairs==plain[1].pairs
    assert (kds[0].teacher.classes,kds[0].teacher.members[0].size)==(plain[0].teacher.classes,plain[0].teacher.members[0].size)
    check_fit(dls, student, kds)


# -- channels and sizes

def test_one_channel_teacher(dls):
    "A teacher of one channel under color images was a RuntimeError of a convolution: it gets their luminance."
    gray = sharp(create_teacher('test_resnet', dls.classes, 32, in_chans=1))
    set_model_stats(gray, [.4], [.2])
    teacher = Teacher(gray)
    teacher.match_data(dls)
    x = images_of(dls)
    pixels = renormalize(x, IMAGENET, ([0.]*3, [1.]*3))
    luminance = (torch.tensor([.299, .587, .114]).view(3, 1, 1)*pixels).sum(1, keepdim=True)
    with torch.no_grad(): torch.testing.assert_close(teacher.forward((x,))[0], gray((luminance-.4)/.2), atol=1e-4, rtol=1e-4)
    assert len(distill(dls, 'test_resnet', teacher, epochs=1, progress=False).history)==1
    assert predict(gray, dls.test)[0].shape[1]==3


def test_color_teacher_of_gray_images():
    x,y = torch.rand(12, 1, 32, 32),torch.arange(12) % 3
    gray = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=4) for _ in range(2)])
    model = sharp(timm.create_model('test_resnet', num_classes=3))
    teacher = Teacher(model)
    teacher.match_data(gray)
    with torch.no_grad(): torch.testing.assert_close(teacher.forward((x,))[0], model(x.expand(-1, 3, -1, -1)))
    fit_classifier(gray, timm.create_model('test_resnet', num_classes=3, in_chans=1), 1, cbs=LogitKD(model), progress=False)


def test_student_of_other_channels_is_refused_before_training(dls):
    with pytest.raises(ValueError, match='takes images of 1 channels, those of the loaders have 3: create it with in_chans=3'): fit_classifier(dls, create_student('test_resnet', dls.classes, 32, in_chans=1), 1, progress=False)
    with pytest.raises(ValueError, match='takes images of 4 channels, those of the loaders have 3'): distill(dls, timm.create_model('test_resnet', num_classes=3, in_chans=4), timm.create_model('test_resnet', num_classes=3), epochs=1, progress=False)
    with pytest.raises(ValueError, match='takes images of 4 channels, these have 3'): distill(dls, 'test_resnet', timm.create_model('test_resnet', num_classes=3, in_chans=4), 'logit', epochs=1, progress=False)


def test_channels_are_those_the_images_meet_first(dls):
    "A first convolution by name need not be the first in use."
    class Crossed(nn.Module):
        def __init__(self): super().__init__(); self.b,self.a = nn.Conv2d(1, 3, 1),nn.Conv2d(3, 1, 1)
        def forward(self, x): return self.b(self.a(x)).mean((2, 3))
    fit_classifier(dls, Crossed, 1, progress=False)
    assert Teacher(Crossed()).forward((images_of(dls),))[0].shape[1]==3


def test_teacher_of_a_fixed_size_gets_resized_images(dls):
    "A ViT of 224 pixels, not made by kdmed, under smaller images."
    vit = sharp(timm.create_model('vit_tiny_patch16_224', num_classes=3, img_size=48))
    teacher = Teacher(vit, dls.classes)
    teacher.match_data(dls)
    x = images_of(dls)
    with torch.no_grad(): torch.testing.assert_close(teacher.forward((x,))[0], vit(F.interpolate(x, (48, 48), mode='bilinear', antialias=True)), atol=1e-4, rtol=1e-4)
    assert teacher.members[0].size==48 and predict(vit, dls.test)[0].shape[1]==3
    check_fit(dls, create_student('test_resnet', dls.classes, 32), LogitKD(teacher))


# -- numbers

@pytest.mark.parametrize('name,value', [('epochs', 1.5), ('epochs', '2'), ('epochs', float('nan')), ('epochs', None), ('epochs', True), ('epochs', 0), ('epochs', -1),
    ('lr', float('nan')), ('lr', float('inf')), ('lr', '1e-3'), ('lr', True), ('lr', 1e308), ('lr', 0), ('lr', None), ('seed', 1.5), ('seed', 'a'), ('seed', -1), ('seed', None), ('seed', True),
    ('weight_decay', -1), ('weight_decay', 'x'), ('weight_decay', float('nan')), ('weight_decay', True), ('schedule', 'cosine'), ('cbs', 'LogitKD'), ('cbs', 3)])
def test_numbers_that_cannot_be_meant(name, value, dls):
    "Each error names the argument, before a model is made or a weight is changed."
    made = []
    def make(): made.append(1); return create_student('test_resnet', 3, 32)
    for call in (lambda: fit_classifier(dls, make, **{name: value}), lambda: distill(dls, make, method='mean_teacher', **{name: value})):
        with pytest.raises((TypeError, ValueError), match=rf'\b{name}\b') as e: call()
        assert value is None or repr(value) in str(e.value) or str(value) in str(e.value)
    assert not made


@pytest.mark.parametrize('make,name', [(lambda t, v: LogitKD(t, temperature=v), 'temperature'), (lambda t, v: LogitKD(t, weight=v), 'weight'), (lambda t, v: LogitKD(t, label_weight=v), 'label_weight'),
    (lambda t, v: DecoupledKD(t, other_weight=v), 'other_weight'), (lambda t, v: DistKD(t, inter_weight=v), 'inter_weight'), (lambda t, v: FocalKD(gamma=v), 'gamma'),
    (lambda t, v: RelationalKD(t, [('layer4', 'layer4')], angle_weight=v), 'angle_weight'), (lambda t, v: MultiDimKD(t, spatial_weight=v), 'spatial_weight'),
    (lambda t, v: ViTKD(t, mask_ratio=v), 'mask_ratio'), (lambda t, v: MeanTeacher(v), 'decay')])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1, '1', True, None])
def test_settings_of_methods_that_cannot_be_meant(make, name, value, dls):
    with pytest.raises((TypeError, ValueError), match=f'{name} must be'): make(create_teacher('test_resnet', 3, 32), value)


@pytest.mark.parametrize('wrong', [None, 3, [1]])
def test_a_model_that_is_none(wrong, dls):
    with pytest.raises(TypeError, match='model must be a Module'): fit_classifier(dls, wrong, 1)
    with pytest.raises(TypeError, match='model must be a Module'): fit_classifier(dls, lambda: wrong, 1)
    with pytest.raises(TypeError, match='dls must be DataLoaders'): fit_classifier(wrong, 'test_resnet', 1)


# -- training that cannot go on

def test_training_that_diverges_stops_with_its_place(dls):
    "Training at a rate too high ended in weights that are not numbers, without a word."
    with pytest.raises(FloatingPointError, match=r'^the loss is (nan|inf) in epoch \d+, batch \d+: is the learning rate too high') as e:
        fit_classifier(dls, 'test_resnet', 8, lr=9e5, optimizer=SGD, schedule='constant', progress=False)
    assert 'Exception occured' not in str(e.value)


def test_weights_that_are_not_finite_are_not_returned(dls):
    class Break(Callback):
        def after_step(self):
            with torch.no_grad(): next(self.model.parameters()).fill_(float('nan'))
    one = image_dls(dls.table, 32, 64) # one batch an epoch: no later loss would tell
    with pytest.raises(FloatingPointError, match='after epoch 0 the weights are not finite, such as'): fit_classifier(one, 'test_resnet', 1, cbs=Break(), progress=False)


def test_images_that_are_not_finite_stop_the_fit():
    x,y = torch.rand(12, 3, 8, 8),torch.arange(12) % 3
    x[5] = float('nan')
    bad = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=4) for _ in range(2)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(FloatingPointError, match='the loss is nan in epoch 0, batch 1'): fit_classifier(bad, model, 1, progress=False)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('n,bs', [(30, 1), (31, 10)])
def test_a_batch_of_one_under_batch_norm_is_refused_before_training(n, bs):
    "PyTorch's 'Expected more than 1 value per channel' came in the middle of an epoch."
    x,y = torch.rand(n, 3, 32, 32),torch.arange(n) % 3
    data = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=bs) for _ in range(2)])
    model = timm.create_model('resnet10t', num_classes=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"a batch of one image cannot be trained on: BatchNorm layer 'layer4.0.bn1'.*Choose a bs of 2 or more"): fit_classifier(data, model, 1, progress=False)
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])
    fit_classifier(data, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), 1, progress=False) # many places: nothing is amiss


@pytest.mark.parametrize('error', [MemoryError, ImportError, OSError, KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError, TypeError])
def test_check_fit_raises_what_a_fit_would_raise(error, dls):
    class Raises(Callback):
        def before_fit(self): raise error('no room')
    with pytest.raises(error, match='no room'): check_fit(dls, create_student('test_resnet', dls.classes, 32), Raises())


# -- callbacks

def test_best_epoch_comes_back_with_its_optimizer(dls, tmp_path):
    "SaveModelCallback(with_opt=True) found an optimizer without the projectors, and dropped its state."
    student,teacher = create_student('test_efficientnet', dls.classes, 32),create_teacher('test_resnet', dls.classes, 32)
    kd,saved = FeatureKD(teacher, [(stage_names(student)[-1], 'layer4')], pool=True),[]
    class Note(SaveModelCallback):
        def _save(self, name):
            super()._save(name)
            saved[:] = [{k: v.clone() for k,v in self.opt.state[p].items() if torch.is_tensor(v)} for p in self.model.parameters()]
    learn = Learner(dls, student, cbs=[kd, Note(with_opt=True)], path=tmp_path)
    def fit():
        with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert not [w for w in warned(fit) if 'optimizer' in w]
    assert sum(map(len, learn.opt.param_lists))==len(list(student.parameters())) and len(kd.projectors)==1
    for p,state in zip(student.parameters(), saved):
        for k,v in state.items(): assert torch.equal(learn.opt.state[p][k], v)
    learn.remove_cbs([kd, *[cb for cb in learn.cbs if isinstance(cb, Note)]])
    learn.export(tmp_path/'student.pkl')
    again = load_learner(tmp_path/'student.pkl')
    assert {k: v.shape for k,v in again.model.state_dict().items()}=={k: v.shape for k,v in student.state_dict().items()}
    assert not any('Projector' in type(cb).__name__ or hasattr(cb, 'projectors') for cb in again.cbs)


def test_a_weight_of_zero_is_warned_of(dls):
    teacher = sharp(create_teacher('test_resnet', dls.classes, 32))
    said = warned(lambda: fit_classifier(dls, 'test_resnet', 1, cbs=LogitKD(teacher, weight=0), progress=False))
    assert any('logit_kd: the weight is 0 during the whole fit' in w for w in said)
    said = warned(lambda: fit_classifier(dls, 'test_resnet', 1, cbs=LogitKD(teacher, weight=lambda p: float(p>.5)), progress=False))
    assert not any('the weight is 0' in w for w in said)


def test_a_learner_that_has_taught_can_be_exported_and_thawed(dls, tmp_path):
    "Its frozen parameters made fastai's new optimizer an IndexError, after the Learner had lost its data."
    learn = fit_classifier(dls, 'test_resnet', 1, progress=False)
    distill(dls, 'test_efficientnet', learn, 'logit', epochs=1, progress=False)
    learn.export(tmp_path/'teacher.pkl')
    assert len(learn.dls.train)==len(dls.train)
    assert load_learner(tmp_path/'teacher.pkl').model is not None
    with pytest.raises(ValueError, match=r'model.requires_grad_\(True\) unfreezes it'): fit_classifier(dls, learn.model, 1, progress=False)
    learn.model.requires_grad_(True)
    fit_classifier(dls, learn.model, 1, progress=False)


# -- complaints of other libraries' users

def test_peers_a_patch_only_loss_leaves_the_class_token_to_its_own_term():
    "A loss of patches alone left the class token untrained (lightly-train#476): the four terms name it, and it learns."
    dls = image_dls(split_groups(synthetic_table(60, 3, 32, seed=1)), 32, 16)
    vit = sharp(create_teacher('test_vit', dls.classes, 32))
    losses = []
    for weight in (0., 1.):
        learn = fit_classifier(dls, lambda: truncate_vit(vit, [0]), 3, progress=False, cbs=MultiDimKD(vit, class_token_weight=weight, response_weight=0, label_weight=0))
        x = images_of(dls)
        with torch.no_grad(): ours,theirs = (m.eval().forward_features(x)[:, 0] for m in (learn.model, vit))
        losses.append(1-F.cosine_similarity(ours, theirs).mean().item())
        assert ('mdkd_class_token' in learn.history) == (weight>0)
    assert losses[1] < losses[0]


def test_peers_standardizing_changes_the_loss(dls):
    "A switch changed nothing (logit-standardization-stage-KD#15)."
    teacher = sharp(create_teacher('test_resnet', dls.classes, 32), 20.)
    terms = [fit_classifier(dls, 'test_resnet', 1, cbs=LogitKD(teacher, standardize=on), progress=False).history.logit_kd.iloc[0] for on in (False, True)]
    assert abs(terms[0]-terms[1]) > .05*max(terms)


def test_peers_pooled_features_are_not_normalized_away(dls):
    "Normalizing before pooling gave zeros (Simple-Recipe-Distillation#2)."
    teacher = Teacher(create_teacher('test_resnet', dls.classes, 32))
    for kind in ('map', 'pooled'): teacher.add_tap('layer3', kind)
    features = teacher.forward((images_of(dls),))[1]
    torch.testing.assert_close(features['layer3', 'pooled'], features['layer3', 'map'].mean((2, 3)))
    assert features['layer3', 'pooled'].abs().mean() > 1e-3


def test_peers_pos_weight_is_that_of_the_label_loss():
    "`pos_weight` was lost on the way (fastai#2745)."
    binary = image_dls(split_groups(synthetic_table(n=60, classes=2, size=32, task='binary')), 32, 16)
    student,teacher = (create_student('test_resnet', 2, 32, 'binary') for _ in range(2))
    weight,seen = torch.tensor([7.]),[]
    def weighted(pred, y): return F.binary_cross_entropy_with_logits(pred, y.float().reshape(pred.shape), pos_weight=weight)
    def by_hand(z, y): return sum(-7*F.logsigmoid(a).item() if b else -F.logsigmoid(-a).item() for a,b in zip(torch.Tensor(z), y.tolist()))/len(y)
    class Look(Callback):
        order = LogitKD.order+1
        def after_loss(self):
            if self.training: seen.append((self.learn.loss_terms.values['label_loss'].item(), by_hand(self.pred.detach()[:, 0], self.y.flatten())))
    learn = Learner(binary, student, loss_func=weighted, cbs=[LogitKD(teacher), Look()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for label,expected in seen: assert label == pytest.approx(expected, rel=1e-4)


def test_peers_the_printed_score_is_the_one_it_is_called(capsys):
    "AUC and accuracy were swapped in print (MedMNIST#19)."
    x = torch.linspace(-1, 1, 40)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    class First(nn.Module):
        def forward(self, x): return x[:, 0, 0, :1]+.5 # ranks right, but says yes too often
    y = (x[:, 0, 0, 0]>.3).float()[:, None]
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    evaluate_teacher(Teacher(First()), loader, exclusive=False)
    assert 'AUROC 1.000' in capsys.readouterr().out
    two = DataLoader(TensorDataset(x, y[:, 0].long()), batch_size=8)
    evaluate_teacher(Teacher(Gives(First(), lambda z: torch.cat([-z, z], 1))), two, exclusive=True)
    right = [(x[:, 0, 0, 0]>-.5)[y[:, 0]==c] for c in (0, 1)]
    assert f'balanced accuracy {((~right[0]).float().mean()+right[1].float().mean())/2:.3f}' in capsys.readouterr().out


@pytest.mark.parametrize('method', ['relational', 'similarity', 'dist'])
def test_terms_that_compare_images_need_two(method, dls):
    "With batches of one image the term was 0, and the student learned from its labels alone, without a word."
    one = image_dls(dls.table, 32, 1)
    with pytest.raises(ValueError, match='compares the images of a batch with each other, so a batch must have at least 2, got bs=1'):
        distill(one, 'test_vit', create_teacher('test_resnet', 3, 32), method, epochs=1, progress=False)


def test_peers_untrained_findings_are_named():
    "Findings that a teacher never learned were random, and looked like the others (torchxrayvision#8, #89)."
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (200, 3), generator=g).float()
    x = torch.cat([y+.3*torch.randn(200, 3, generator=g)], 1)[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    x[:, 1] = torch.randn(200, 1, 1, generator=g) # the second says nothing
    class First(nn.Module):
        def forward(self, x): return 4*x[:, :, 0, 0]-2
    teacher = Teacher(First())
    teacher.student_classes = ['edema', 'hernia', 'mass']
    said = warned(lambda: evaluate_teacher(teacher, DataLoader(TensorDataset(x, y), batch_size=50), exclusive=False, show=lambda _: None))
    assert len(said)==1 and "no better than chance for these findings" in said[0] and "['hernia']" in said[0]


def test_a_learning_rate_test_puts_the_optimizer_back(dls, tmp_path):
    student,teacher = create_student('test_efficientnet', dls.classes, 32),create_teacher('test_resnet', dls.classes, 32)
    learn = Learner(dls, student, cbs=FeatureKD(teacher, [(stage_names(student)[-1], 'layer4')], pool=True), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    before = [learn.opt.state[p]['grad_avg'].clone() for p in student.parameters()]
    def find():
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=4, show_plot=False)
    assert not [w for w in warned(find) if 'optimizer' in w]
    for p,average in zip(student.parameters(), before): torch.testing.assert_close(learn.opt.state[p]['grad_avg'], average)
