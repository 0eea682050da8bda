"A check of inputs: of which images it knows nothing, in bundles, with models of every kind"
import numpy as np
import pytest
import torch

from kdmed.baselines.input_check import (
    InputCheck, collect_embeddings, embedding_layer, find_unfamiliar, fit_input_check, load_input_check,
    save_input_check)
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.models import (
    add_exits, create_fused_teacher, create_student, find_classifier, multi_scale_classifier, set_model_stats)
from kdmed.ship import load_bundle, save_bundle

@pytest.fixture(scope='module')
def dls():
    table = split_groups(synthetic_table(150, classes=3, size=32, seed=1), sizes=(.5, .25, .25))
    return image_dls(table, 32, bs=32, device='cpu')

def made(dls, name='test_resnet', size=32):
    torch.manual_seed(0)
    return set_model_stats(create_student(name, dls.classes, size), .5, .25).eval()

KINDS = {'resnet': made, 'vit': lambda d: made(d, 'vit_tiny_patch16_224'),
         'exits': lambda d: add_exits(made(d)), 'several scales': lambda d: multi_scale_classifier(made(d), (4, 8)),
         'fused': lambda d: set_model_stats(create_fused_teacher(['test_resnet', 'test_efficientnet'], d.classes, 32),
                                            .5, .25).eval()}

@pytest.mark.parametrize('kind', KINDS)
def test_models_of_every_kind_have_features(dls, kind):
    model = KINDS[kind](dls)
    check = fit_input_check(model, dls, 'knn', k=2)
    images = list(dls.valid.table.image)
    found = find_unfamiliar(model, check, images[:5])
    assert list(found)==['score', 'unfamiliar'] and np.isfinite(found.score).all()

def test_features_are_what_the_classifier_reads(dls):
    model = made(dls)
    x = torch.randn(3, 3, 32, 32)
    features = collect_embeddings(model, lambda: model(x))
    linear = model.get_submodule(find_classifier(model)[1])
    with torch.no_grad():
        torch.testing.assert_close(linear(torch.from_numpy(features)), model(x), atol=1e-5, rtol=1e-4)

def test_nothing_stays_on_the_model_after_an_error(dls):
    model = made(dls)
    def broken(): raise RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): collect_embeddings(model, broken)
    assert not model.get_submodule(embedding_layer(model))._forward_hooks

def test_test_images_and_augmentation_play_no_part(dls):
    seen = []
    model = made(dls)
    model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    fit_input_check(model, dls)
    trial = [n for n in seen if n==2]
    assert sum(seen)-sum(trial)==len(dls.train_ds)+len(dls.valid_ds)

def test_a_check_without_threshold_says_so(dls):
    model = made(dls)
    check = InputCheck().fit(np.random.default_rng(0).normal(size=(50, 8)))
    with pytest.raises(ValueError, match='has no threshold: call set_threshold'): find_unfamiliar(model, check, [])

def test_unlabeled_and_multilabel_have_one_mean():
    f = np.random.default_rng(0).normal(size=(30, 4))
    assert InputCheck().fit(f).arrays['means'].shape==(1, 4)
    assert InputCheck().fit(f, np.zeros((30, 3))).arrays['means'].shape==(1, 4)
    some = np.where(np.arange(30)<10, -100, np.arange(30)%2)
    means = InputCheck().fit(f, some).arrays['means']
    np.testing.assert_allclose(means, [f[10:][some[10:]==c].mean(0) for c in (0, 1)], atol=1e-6)
    assert InputCheck().fit(f, np.full(30, -100)).arrays['means'].shape==(1, 4)

def test_a_bundle_keeps_its_check(dls, tmp_path):
    model = made(dls)
    check = fit_input_check(model, dls)
    bundle = load_bundle(save_bundle(model, tmp_path/'b', calibrate=False, input_check=check))
    images = list(dls.valid.table.image)
    expected = find_unfamiliar(model, check, images)
    np.testing.assert_allclose(bundle.check_inputs(images).score, expected.score, rtol=1e-5)
    assert 'Input check: mahalanobis' in bundle.card and bundle.input_check.threshold==check.threshold
    file = bundle.folder/'input_check.safetensors'
    data = file.read_bytes()
    file.write_bytes(data[:-1]+bytes([data[-1]^1]))
    with pytest.raises(ValueError, match='input_check.safetensors'): load_bundle(tmp_path/'b')

@pytest.mark.parametrize('damage', ['cut', 'format', 'nan'])
def test_a_damaged_file_is_refused(tmp_path, damage):
    check = InputCheck().fit(np.random.default_rng(0).normal(size=(30, 4)))
    check.set_threshold(np.random.default_rng(1).normal(size=(30, 4)))
    if damage=='nan': check.arrays['means'][0, 0] = np.nan
    file = save_input_check(check, tmp_path/'c.safetensors')
    if damage=='cut': file.write_bytes(file.read_bytes()[:-8])
    if damage=='format': file.write_bytes(file.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 7'))
    with pytest.raises(ValueError, match='c.safetensors'): load_input_check(file)
