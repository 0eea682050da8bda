"Hand-made baselines as scikit-learn, `compare` and the command see them"
import csv
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from unittest import SkipTest

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils import estimator_checks
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.validation import check_is_fitted, validate_data

pytest.importorskip('skimage', reason='hand-made features need scikit-image')
from kdmed.baselines import (
    HANDMADE_FEATURES, ColorHistogram, GLCMFeatures, GrayHistogram, HOGFeatures, LBPFeatures, OutputCodes,
    ShapeFeatures, VisualWords, fit_handmade, make_features)
from kdmed.baselines.feature_sets import LoaderImages, fit_features, handmade_sets
from kdmed.cli.app import main
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.evaluate.comparison import compare, load_comparison
from kdmed.evaluate.metrics import predict

SIDE = 24 # pixels
KINDS = [ColorHistogram(bins=4), GrayHistogram(4), HOGFeatures(4, 3), GLCMFeatures((1,), 8), LBPFeatures((1,)),
         ShapeFeatures(smallest=4), VisualWords(2, contrast=1e-4)]
each_kind = pytest.mark.parametrize('features', KINDS, ids=lambda f: type(f).__name__)

@pytest.fixture(scope='module')
def tissue():
    "Image table with a split; 3 classes"
    return split_groups(synthetic_table(150, classes=3, size=32, seed=1), sizes=(.5, .2, .3))

@pytest.fixture(scope='module')
def dls(tissue): return image_dls(tissue, 32, bs=32, device='cpu')

# -- scikit-learn's own checks

API_CHECKS = [
    'check_estimator_cloneable', 'check_estimator_tags_renamed', 'check_valid_tag_types', 'check_estimator_repr',
    'check_no_attributes_set_in_init', 'check_get_params_invariance', 'check_set_params',
    'check_mixin_order', 'check_parameters_default_constructible']

@each_kind
@pytest.mark.parametrize('name', API_CHECKS)
def test_scikit_learns_checks_of_the_interface(features, name):
    check = getattr(estimator_checks, name)
    check(type(features).__name__, clone(features))

_Y,_X = np.indices((SIDE, SIDE))
_PLACES = (6, 6, 2), (6, 17, 1.5), (17, 6, 3), (17, 17, 2) # row, column, radius
_BLOBS = np.stack([np.exp(-((_Y-y)**2+(_X-x)**2)/(2*r**2)) for y,x,r in _PLACES])

def _pictures(X):
    "Rows of a table of numbers as pictures: blobs as bright as the numbers of a row"
    ranks = (np.clip(np.asarray(X, float), -4, 4)+4)/8
    columns = np.resize(np.arange(ranks.shape[1]), len(_BLOBS))
    return [(20 + np.tensordot(80+120*row[columns], _BLOBS, 1)).clip(0, 255).astype(np.uint8) for row in ranks]

def _of_rows(kind):
    "Features that take a table, of which they make pictures: what the checks of scikit-learn give"
    class OfRows(type(kind)):
        def _validate(self, X, reset):
            return _pictures(validate_data(self, X, reset=reset, ensure_min_samples=2 if reset else 1))
        def fit(self, X, y=None): return super().fit(self._validate(X, True))
        def transform(self, X):
            check_is_fitted(self)
            return super().transform(self._validate(X, False))
        def __sklearn_tags__(self):
            tags = super().__sklearn_tags__()
            tags.input_tags.two_d_array,tags.input_tags.three_d_array = True,False
            return tags
    OfRows.__init__,OfRows.__name__ = type(kind).__init__,type(kind).__name__
    return OfRows(**kind.get_params())

DATA_CHECKS = [
    'check_transformer_general', 'check_transformers_unfitted', 'check_fit_idempotent', 'check_dict_unchanged',
    'check_methods_sample_order_invariance', 'check_methods_subset_invariance',
    'check_estimators_overwrite_params', 'check_estimators_nan_inf', 'check_estimators_dtypes', 'check_fit2d_predict1d',
    'check_fit1d', 'check_n_features_in', 'check_readonly_memmap_input', 'check_pipeline_consistency']

@pytest.mark.slow(1)
@each_kind
@pytest.mark.parametrize('name', DATA_CHECKS)
def test_scikit_learns_checks_on_data(features, name):
    check = getattr(estimator_checks, name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        check(type(features).__name__, _of_rows(features))

def test_output_codes_pass_the_checks_of_classifiers():
    failed = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for codes,check in estimator_checks.estimator_checks_generator(OutputCodes()):
            try: check(codes)
            except SkipTest: continue
            except Exception as e:
                if 'output codes need at least 3 classes' in ''.join(traceback.format_exception(e)): continue
                failed.append(f'{check.func.__name__}: {e}')
    assert not failed, failed

# -- pipelines

def test_a_search_over_settings_keeps_groups_together(tissue):
    images,labels,groups = list(tissue.image),tissue.label.to_numpy(),tissue.group.to_numpy()
    seen = []
    class Noted(ColorHistogram):
        def fit(self, X, y=None):
            seen.append({id(x) for x in X})
            return super().fit(X)
    Noted.__init__ = ColorHistogram.__init__
    pipe = make_pipeline(Noted(), StandardScaler(), SVC())
    search = GridSearchCV(pipe, {'noted__bins': [4, 8], 'svc__C': [1, 10]}, cv=GroupKFold(3))
    search.fit(images, labels, groups=groups)
    assert len(seen)==13 and search.best_score_ > .4
    of = {id(x): g for x,g in zip(images, groups)}
    for ids in seen[:-1]: # of each fit, no group of the images that are scored
        fitted = {of[i] for i in ids}
        assert not fitted & ({*groups} - fitted)
        assert len(ids)==sum(g in fitted for g in groups)

def test_arrays_and_lists_gray_and_rgb_give_the_same():
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (5, 32, 32), dtype=np.uint8)
    for name in HANDMADE_FEATURES:
        if name=='words': continue # learned
        features, = make_features(name)
        expected = features.fit_transform(gray)
        for same in (list(gray), gray[..., None], np.repeat(gray[..., None], 3, 3)):
            np.testing.assert_allclose(clone(features).fit_transform(same), expected, atol=1e-5, err_msg=name)

@pytest.mark.slow
def test_processes_give_what_one_process_gives():
    images = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)
    several,one = (GLCMFeatures((1,), n_jobs=n).fit_transform(images) for n in (2, None))
    np.testing.assert_array_equal(several, one)

# -- leakage

def test_no_test_image_reaches_the_codebook(dls, tmp_path, monkeypatch):
    read = []
    original = LoaderImages.__getitem__
    def noted(self, i):
        read.append(self.dl)
        return original(self, i)
    monkeypatch.setattr(LoaderImages, '__getitem__', noted)
    fitted = fit_features(make_features(VisualWords(5)), dls.train, tmp_path)
    assert {id(d) for d in read}=={id(dls.train)}
    codebook = fitted[0].codebook_.copy()
    handmade_sets(fitted, dls, ('train', 'valid', 'test'), tmp_path)
    np.testing.assert_array_equal(fitted[0].codebook_, codebook)

def test_in_cross_validation_each_fold_has_its_own_codebook(tissue):
    images,books = list(tissue.image[:48]),[]
    class Noted(VisualWords):
        def learn(self, images):
            super().learn(images)
            books.append((len(images), self.codebook_))
    Noted.__init__ = VisualWords.__init__
    pipe = make_pipeline(Noted(4), RandomForestClassifier(5, random_state=0))
    cross_val_predict(pipe, images, tissue.label[:48], groups=tissue.group[:48], cv=GroupKFold(2))
    assert sum(n for n,_ in books)==48 and not np.allclose(books[0][1], books[1][1])

@pytest.mark.slow
def test_settings_are_chosen_without_test_images(tissue, tmp_path):
    other = tissue.copy()
    other['image'] = [255-i if s=='test' else i for i,s in zip(tissue.image, tissue.split)]
    other['label'] = [l if s!='test' else tissue.attrs['classes'][0] for l,s in zip(tissue.label, tissue.split)]
    other.attrs = tissue.attrs
    images = np.stack(list(tissue.image[tissue.split=='test']))
    fits = [fit_handmade(image_dls(t, 32, device='cpu'), 'words+color', 'svm', folder=tmp_path/str(i))
            for i,t in enumerate((tissue, other))]
    np.testing.assert_array_equal(*(f.predict_images(images).to_numpy() for f in fits))
    pd.testing.assert_frame_equal(fits[0].report, fits[1].report)

# -- tasks

@pytest.mark.slow
def test_findings_with_missing_labels(tmp_path):
    table = synthetic_table(160, classes=3, size=32, task='multilabel', seed=3)
    name = table.attrs['classes'][1]
    with_gaps = table.copy()
    with_gaps['label'] = [l if name in l or i % 3 else f'{l}|?{name}'.strip('|') for i,l in enumerate(table.label)]
    with_gaps.attrs = table.attrs
    dls = image_dls(split_groups(with_gaps, sizes=(.5, .2, .3)), 32, device='cpu')
    model = fit_handmade(dls, 'color', 'forest', folder=tmp_path)
    probs,targets = predict(model, dls.test)
    assert np.isnan(targets).any() and probs.shape==targets.shape and np.isfinite(probs).all()
    sets = handmade_sets(model.features, dls, folder=tmp_path)
    y = sets['train'].targets.numpy()
    assert np.isnan(y[:, 1]).any()
    known = ~np.isnan(y[:, 1])
    assert model.classifier.models[1].n_features_in_==sets['train'].features.shape[1]
    leaf = int(model.report.leaf[model.report.chosen].iloc[0])
    alone = RandomForestClassifier(300, min_samples_leaf=leaf, random_state=0)
    x,present = sets['train'].features.numpy()[known],y[known, 1].astype(int)
    alone.fit(x, present, compute_sample_weight('balanced', present))
    test = handmade_sets(model.features, dls, ('test',), tmp_path)['test']
    expected = alone.predict_proba(test.features.numpy())[:, 1]
    np.testing.assert_allclose(probs[:, 1], np.clip(expected, 1e-6, 1-1e-6), atol=1e-5)

def test_images_without_a_label_are_left_out(tissue, tmp_path):
    gaps = tissue.copy()
    train = np.flatnonzero(tissue.split=='train')
    gaps.loc[gaps.index[train[::4]], 'label'] = None
    fewer = tissue.drop(index=tissue.index[train[::4]])
    gaps.attrs = fewer.attrs = tissue.attrs
    made = [fit_handmade(image_dls(t, 32, device='cpu'), 'gray', 'forest', folder=tmp_path) for t in (gaps, fewer)]
    images = np.stack(list(tissue.image[tissue.split=='test']))
    np.testing.assert_array_equal(*(m.predict_images(images).to_numpy() for m in made))

@pytest.mark.slow_after(1)
@pytest.mark.parametrize('classifier', ['svm', 'boosting', 'mlp', 'codes'])
def test_every_classifier_stands_in_a_comparison(dls, classifier, tmp_path):
    models = {'plain': fit_handmade(dls, 'color', 'forest', folder=tmp_path),
              classifier: fit_handmade(dls, 'color', classifier, folder=tmp_path)}
    made = compare(models, dls.test, n_boot=20, valid=dls.valid)
    assert 0 < made.scores[classifier].value['macro_auroc'] <= 1 and made.costs[classifier]['latency_ms'] > 0
    assert 'cost' in {p for s in made.sections() for p in s.pictures}

# -- the command

@pytest.fixture
def folder(tissue, tmp_path, monkeypatch):
    "Folders of images by class, and a place for features"
    from PIL import Image
    monkeypatch.setenv('KDMED_STORE', str(tmp_path/'store'))
    for i,row in enumerate(tissue.itertuples()):
        (tmp_path/'images'/row.label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(tmp_path/'images'/row.label/f'{row.group[8:]}_{i}.png')
    return tmp_path

@pytest.mark.slow
def test_the_command_writes_what_report_reads(folder, capsys):
    line = ['baseline', '--data', folder/'images', '--group-pattern', r'(\d+)_', '--size', 32, '--no-copies']
    assert main([*line, '--features', 'color', 'gray+lbp', '--classifier', 'forest', '--out', folder/'out'])==0
    shown = capsys.readouterr()
    assert 'color-forest: validation loss' in shown.err and 'balanced accuracy' in shown.out
    files = sorted((folder/'out'/'predictions').iterdir())
    assert [f.name for f in files]==['color-forest.csv', 'gray+lbp-forest.csv']
    with open(files[0]) as f: rows = list(csv.DictReader(f))
    assert all(Path(r['image']).is_file() for r in rows)
    assert main(['report', '--predictions', *files, '--out', folder/'again'])==0
    one,two = load_comparison(folder/'out'),load_comparison(folder/'again')
    for name in one.scores:
        assert one.scores[name].value['balanced_accuracy']==pytest.approx(two.scores[name].value['balanced_accuracy'])
    # nothing is overwritten
    assert main([*line, '--features', 'color', '--classifier', 'forest', '--out', folder/'out'])==2
    assert 'already contains' in capsys.readouterr().err

@pytest.mark.parametrize('more, words', [
    (['--features', 'sift'], "unknown --features 'sift'"),
    (['--features', 'hog+'], "unknown --features ''"),
    (['--features', 'pip:resnet18'], 'resnet18'),
    (['--classifier', 'tree'], 'tree'),
    (['--jobs', '0'], '--jobs must be a whole number of at least 1, got 0'),
    (['--seed', '-1'], '--seed must be'),
    (['--size', '8', '--features', 'hog'], 'needs images of at least 16 pixels a side, got [8, 8]'),
    (['--features', 'glcm', '--views', '3'], '--views')])
def test_what_cannot_be_is_refused(folder, capsys, more, words):
    size = [] if '--size' in more else ['--size', '32']
    assert main(['baseline', '--data', folder/'images', '--no-copies', '--out', folder/'out', *size, *more])==2
    assert words in capsys.readouterr().err
    assert not (folder/'out').exists()

@pytest.mark.slow
def test_without_scikit_image_there_is_a_hint(folder):
    script = 'import sys; sys.modules["skimage"] = None; from kdmed.cli.app import main; sys.exit(main(sys.argv[1:]))'
    line = [sys.executable, '-c', script, 'baseline', '--data', folder/'images', '--out', folder/'out']
    done = subprocess.run([str(c) for c in line], capture_output=True, text=True, env=os.environ)
    assert done.returncode==2 and "pip install 'kdmed[baselines]'" in done.stderr

def test_codes_need_three_classes_and_say_so_before_images_are_read(folder, capsys):
    two = folder/'two'
    two.mkdir()
    for place in sorted((folder/'images').iterdir())[:2]: (two/place.name).symlink_to(place)
    assert main(['baseline', '--data', two, '--classifier', 'codes', '--out', folder/'out', '--size', '32'])==2
    assert "--classifier: classifier 'codes' needs at least three classes" in capsys.readouterr().err

def test_images_of_another_size_are_resized_as_the_loader_does(tissue, tmp_path):
    from PIL import Image
    large = tissue.copy()
    large['image'] = [np.asarray(Image.fromarray(i).resize((70, 50))) for i in tissue.image]
    large.attrs = tissue.attrs
    dls = image_dls(split_groups(large, (.5, .2, .3)), 32, device='cpu')
    model = fit_handmade(dls, 'color+glcm', 'forest', folder=tmp_path)
    found = model.predict_images(list(dls.test.table.image))
    np.testing.assert_allclose(found.to_numpy(), model.predict(dls.test, tmp_path), atol=1e-6)
