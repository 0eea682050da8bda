"Foundation models: every recipe, tiny and at random weights; licenses that are refused; a hub that cannot be reached"
import json
import re
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdmed.cli import commands, main
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.distill.foundation import foundation_teacher
from kdmed.distill.methods import distill
from kdmed.kd import Teacher, TeacherCache
from kdmed.models.create import create_student, load_student, save_student
from kdmed.models.foundation import FOUNDATION, create_encoder, foundation_recipe, licenses_of

TINY = dict( # options instead of those of the recipe
    timm=dict(embed_dim=96, depth=2, num_heads=2), clip=dict(embed_dim=96, depth=2, num_heads=2),
    transformers=dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=2))

def tiny(recipe):
    "Options that make a model of the recipe small"
    if recipe.architecture.startswith('convnext'): return dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    more = dict(intermediate_size=192) if recipe.options.get('model_type')=='siglip_vision_model' else {}
    return TINY[recipe.library] | more

def side(recipe):
    "A small image side that its patches fill"
    if recipe.architecture.startswith('convnext'): return 64
    named = re.search(r'patch(\d+)', recipe.architecture)
    return 4*(recipe.options.get('patch_size') or int(named[1]))

@pytest.mark.parametrize('name', FOUNDATION)
def test_every_recipe_builds_and_reads_tokens(name):
    recipe = FOUNDATION[name]
    if recipe.library=='transformers' and find_spec('transformers') is None:
        with pytest.raises(ImportError, match=r"pip install transformers"):
            create_encoder(name, weights=False, accept_license=True)
        pytest.skip('transformers is not installed')
    size = side(recipe)
    encoder = create_encoder(name, weights=False, accept_license=True, size=size, **tiny(recipe))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad(): features,tokens = encoder.encode(images)
    assert features.shape==(2, encoder.spec['width']) and tokens.ndim==3 and features.isfinite().all()
    width = tokens.shape[2]
    if recipe.library!='clip': assert features.shape[1]==(2*width if recipe.features=='class+mean' else width)
    if recipe.features=='class+mean': # by hand
        mean = torch.stack([tokens[:, i] for i in range(recipe.first_patch, tokens.shape[1])]).mean(0)
        torch.testing.assert_close(features, torch.cat([tokens[:, 0], mean], 1), atol=1e-5, rtol=1e-4)
    if recipe.features!='pooled' and 'convnext' not in recipe.architecture: # class and register tokens, then 16 patches
        assert tokens.shape[1]==recipe.first_patch+16
    assert not any(p.requires_grad for p in encoder.parameters()) and json.loads(json.dumps(encoder.spec))

@pytest.mark.parametrize('name', [n for n,r in FOUNDATION.items() if not r.open])
def test_a_license_that_is_not_open_must_be_accepted(name, capsys):
    start = time.monotonic()
    with pytest.raises(PermissionError, match='accept_license=True'): create_encoder(name)
    assert time.monotonic()-start<2 # nothing was downloaded, no hub was asked
    assert FOUNDATION[name].license in capsys.readouterr().out

@pytest.mark.parametrize('name', ['bioptimus/H-optimus-0', 'microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224',
                                  'vit_small_patch14_dinov2.lvd142m'])
def test_without_a_hub_it_is_said_within_ten_seconds(name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    start = time.monotonic()
    with pytest.raises(OSError, match='weights='): create_encoder(name)
    assert time.monotonic()-start<10

@pytest.mark.parametrize('wrong, near', [
    ('virchow-2', 'paige-ai/Virchow2'), ('hf-hub:MahmoodLab/UNI2', 'MahmoodLab/UNI2-h'),
    ('rad-dinov2', 'microsoft/rad-dino'), ('efficientnet_b00', 'efficientnet_b0')])
def test_a_wrong_name_gets_the_closest(wrong, near):
    with pytest.raises(ValueError, match=near): foundation_recipe(wrong)

def test_the_recipe_of_a_clip_model_reads_a_whole_checkpoint(tmp_path):
    recipe = foundation_recipe('BiomedCLIP-PubMedBERT_256-vit_base_patch16_224')
    how = dict(weights=False, size=32, **TINY['clip'])
    encoder = create_encoder(recipe.name, **how)
    names = {'trunk.': 'visual.trunk.', 'projection.': 'visual.head.proj.'}
    own = encoder.backbone.state_dict().items()
    state = {new+n[len(old):]: t for n,t in own for old,new in names.items() if n.startswith(old)}
    state |= {'text.weight': torch.zeros(3), 'logit_scale': torch.ones(())} # the text side is left out
    torch.save(state, tmp_path/'open_clip_pytorch_model.bin')
    again = create_encoder(recipe.name, **how | dict(weights=tmp_path))
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(images), encoder(images))
    torch.save({n: t for n,t in state.items() if 'blocks' not in n}, tmp_path/'open_clip_pytorch_model.bin')
    with pytest.raises(ValueError, match='does not hold the image side'):
        create_encoder(recipe.name, **how | dict(weights=tmp_path))

@pytest.mark.parametrize('name', [n for n,r in FOUNDATION.items() if r.library=='transformers'])
def test_weights_of_transformers_come_from_a_folder_and_go_into_a_teacher(name, tmp_path, capsys):
    pytest.importorskip('transformers')
    recipe = FOUNDATION[name]
    how = dict(accept_license=True, size=side(recipe), **tiny(recipe))
    encoder = create_encoder(name, weights=False, **how)
    encoder.backbone.save_pretrained(tmp_path/'hub')
    images = torch.randn(2, 3, how['size'], how['size'])
    for place in (tmp_path/'hub', tmp_path/'hub'/'model.safetensors'):
        again = create_encoder(name, weights=place, **how)
        torch.testing.assert_close(again(images), encoder(images))
    teacher = foundation_teacher(again, loaders(size=how['size']), folder=tmp_path, progress=False)
    saved = load_student(save_student(teacher.model, tmp_path/'saved')) # without the folder
    torch.testing.assert_close(saved(images), teacher.model(images))
    with pytest.raises(FileNotFoundError, match='weights'): create_encoder(name, weights=tmp_path/'none', **how)
    (tmp_path/'empty').mkdir()
    state = load_file(tmp_path/'hub'/'model.safetensors')
    lost = next(n for n in state if n.endswith('.bias'))
    save_file({n: t for n,t in state.items() if n!=lost}, tmp_path/'hub'/'model.safetensors', dict(format='pt'))
    with pytest.raises(ValueError, match=re.escape(lost)): create_encoder(name, weights=tmp_path/'hub', **how)
    with pytest.raises(FileNotFoundError, match='weights='): create_encoder(name, weights=tmp_path/'empty', **how)

def loaders(task='multiclass', n=200, size=32, **more):
    table = synthetic_table(n, classes=2 if task=='binary' else 3, size=size, seed=3)
    if task=='binary': table.attrs['task'] = 'binary'
    if task=='multilabel':
        table['label'] = [f'{a}|{b}' if a!=b else a for a,b in zip(table.label, np.roll(table.label, 1))]
        table.attrs['task'] = 'multilabel'
    return image_dls(split_groups(table, sizes=(.5, .3, .2), seed=0), size, bs=32, **more)

@pytest.mark.slow_after(3)
@pytest.mark.parametrize('task', ['binary', 'multiclass', 'multilabel'])
@pytest.mark.parametrize('head', ['linear', 'knn', 'attention'])
def test_a_teacher_for_every_task_and_head(task, head, tmp_path):
    dls = loaders(task)
    how = dict(weights='pip', size=32, folder=tmp_path, progress=False)
    teacher = foundation_teacher('tf_efficientnet_lite0', dls, head, **how)
    row = teacher.report.iloc[0] # 48 validation images at 32 px: better than chance is all that can be asked
    assert row.score > row.chance
    again = load_student(save_student(teacher.model, tmp_path/'saved'))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), teacher.model(images))
    learn = distill(dls, 'test_resnet', teacher, 'logit', epochs=1, progress=False)
    assert np.isfinite(learn.history.logit_kd.iloc[0])

def test_a_cached_teacher_has_the_same_logits(tmp_path):
    dls = loaders()
    how = dict(weights='pip', size=32, folder=tmp_path, progress=False)
    teacher = foundation_teacher('tf_efficientnet_lite0', dls, **how)
    cache = TeacherCache(teacher, tmp_path)
    def weights(t): return distill(dls, 'test_resnet', t, 'logit', epochs=1, progress=False).model.state_dict()
    plain,cached = weights(teacher),weights(cache)
    for name,t in plain.items(): torch.testing.assert_close(cached[name].float(), t.float(), atol=2e-2, rtol=2e-2)

def test_licenses_reach_a_student_through_caches_ensembles_and_files(tmp_path):
    dls = loaders()
    recipe = foundation_recipe('UNI2-h')
    uni = create_encoder(recipe.name, weights=False, accept_license=True, size=56, **tiny(recipe))
    lite = create_encoder('tf_efficientnet_lite0', weights='pip', size=32)
    teacher = foundation_teacher([uni, lite], dls, folder=tmp_path, progress=False)
    learn = distill(dls, 'test_resnet', TeacherCache(teacher, tmp_path), 'logit', epochs=1, progress=False)
    saved = load_student(save_student(learn, tmp_path/'student'))
    assert {note['model'] for note in licenses_of(saved)}=={'MahmoodLab/UNI2-h', 'tf_efficientnet_lite0'}
    assert 'CC-BY-NC-ND' in (tmp_path/'student'/'student.json').read_text()
    second = distill(dls, 'test_resnet', Teacher(saved), 'logit', epochs=1, progress=False)
    assert len(licenses_of(second.model))==2 # a student's student, too

@pytest.fixture
def folder_of_images(tmp_path):
    from PIL import Image
    table = synthetic_table(120, classes=3, size=32, seed=1)
    for i,row in table.iterrows():
        (tmp_path/'tissue'/row.label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(tmp_path/'tissue'/row.label/f"{row.group.split()[1]}_{i}.png")
    return tmp_path/'tissue'

SMALL = '--group-pattern (\\d+)_ --student test_resnet --size 32 --epochs 1 --teacher-epochs 1 --bs 16 --repeats 1'

LITE = '--foundation tf_efficientnet_lite0 --foundation-size 32 --teacher-weights pip --augment none'

@pytest.mark.slow
def test_the_command_distils_a_foundation_model(folder_of_images, tmp_path, capsys):
    run = f'distill --data {folder_of_images} {SMALL} {LITE} --out {tmp_path}/run'
    assert main(run.split())==0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert 'The student learned from tf_efficientnet_lite0: license apache-2.0' in printed.out
    assert 'balanced accuracy' in printed.err
    assert licenses_of(load_student(tmp_path/'run'))[0]['model']=='tf_efficientnet_lite0'
    assert not (tmp_path/'run'/'.foundation').exists()
    assert main(run.split())==0 and 'nothing was trained' in capsys.readouterr().out

@pytest.mark.slow(15)
def test_a_head_that_was_fitted_on_other_images_is_not_taken(folder_of_images, tmp_path, monkeypatch):
    "A run that failed before its first student leaves the head it fitted, for the same images and settings only"
    fitted = []
    def fit_head(name, dls, *args, **kwargs):
        fitted.append(name)
        return SimpleNamespace(model=create_student('test_resnet', dls.classes, 32))
    def fail(*args, **kwargs): raise ValueError('it fails before the first student')
    monkeypatch.setattr(commands, 'foundation_teacher', fit_head)
    monkeypatch.setattr(commands, 'distillation_study', fail)
    for more,heads in (('', 1), ('', 1), ('--split-seed 1', 2), ('--sampling balanced', 3)):
        assert main(f'distill --data {folder_of_images} {SMALL} {LITE} {more} --out {tmp_path}/run'.split())==2
        assert len(fitted)==heads, more

@pytest.mark.parametrize('options, message', [
    ('--foundation UNI2-h', '--accept-license'),
    ('--foundation uni3 --accept-license', "did you mean 'MahmoodLab/UNI2-h'"),
    ('--foundation tf_efficientnet_lite0 --teacher-weights pip', '--foundation computes the features'),
    ('--head knn', '--head needs --foundation'),
    ('--foundation UNI2-h --head knn --tune last', '--tune last trains a linear head'),
    ('--foundation UNI2-h --teacher-weights no/where', '--teacher-weights no/where: file not found')])
def test_the_command_refuses(options, message, folder_of_images, tmp_path, capsys):
    assert main(f'distill --data {folder_of_images} {SMALL} {options} --out {tmp_path}/run'.split())==2
    assert message in capsys.readouterr().err
    assert not (tmp_path/'run').exists()

def test_the_command_lists_models(capsys):
    assert main(['models'])==0
    printed = capsys.readouterr().out
    assert all(name in printed for name in FOUNDATION) and 'DINOv3 License' in printed
