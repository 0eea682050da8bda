"Scarce classes: arms of equal budget, drawn images in training only, the same after kills, worlds with known results"
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from torch import nn

from conftest import ROOT
from kdmed.baselines.gan import fit_gan
from kdmed.data.images import image_table, is_synthetic, synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import Augment, HorizontalFlip, VerticalFlip
from kdmed.evaluate.intervals import evaluate, paired_difference
from kdmed.studies import scarce_classes
from kdmed.studies.scarce_classes import ARMS, compare_scarce, oversample, scarce_counts, scarce_harm, scarce_table
from kdmed.studies.study import targets_of

AUGMENT = Augment((HorizontalFlip(), VerticalFlip()))
GAN = dict(size=16, steps=12, bs=4, width=2, every=5)
HOW = dict(epochs=2, lr=1e-2, seeds=(0,), progress=False)

def cnn(n_out=3):
    def stage(a, b): return nn.Conv2d(a, b, 3, 2, 1),nn.BatchNorm2d(b),nn.ReLU()
    return nn.Sequential(*stage(3, 12), *stage(12, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, n_out))

def tissue(classes=3, bs=16, **how):
    "Loaders of tiles, of which few are of the last class"
    table = split_groups(synthetic_table(240, classes=classes, size=16, seed=6, tiles_per_patient=2), (.5, .25, .25))
    return image_dls(table, 16, bs, device='cpu', augment=AUGMENT, **how),table.attrs['classes'][-1]

@pytest.fixture(scope='module')
def data(): return tissue()

@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    "Predictions, and the loaders that each arm trained with"
    dls,rare = data
    seen,real = [],scarce_classes.fit_classifier
    def noted(loaders, *args, **kwargs):
        drawn = []
        for _ in range(3): drawn.append([int(i) for x,y in loaders.train for i in x.replay[0]])
        seen.append((loaders, drawn, args[1]))
        return real(loaders, *args, **kwargs)
    home = tmp_path_factory.mktemp('study')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scarce_classes, 'fit_classifier', noted)
        found = compare_scarce(dls, cnn, [rare], gan=GAN, folder=home, **HOW)
    return found,dict(zip(ARMS, seen)),home

def test_every_arm_has_the_same_budget(data, trained):
    dls,rare = data
    _,seen,_ = trained
    for arm,(loaders,drawn,epochs) in seen.items():
        assert (len(loaders.train), loaders.train.bs, epochs)==(len(dls.train), dls.train.bs, 2), arm
        for epoch in drawn: assert len(epoch)==len(set(epoch))==len(dls.train)*dls.train.bs, arm
    added = scarce_counts(dls.table, [rare])[rare]
    n = {arm: len(loaders.train_ds) for arm,(loaders,*_) in seen.items()}
    assert n=={'nothing': dls.train.n, 'oversampling': dls.train.n+added, 'stronger augmentation': dls.train.n,
               'synthetic': dls.train.n+added}

def test_scarce_classes_have_the_same_share_in_both_arms_that_add_images(data, trained):
    dls,rare = data
    _,seen,_ = trained
    shares = {arm: (loaders.train.table.label==rare).mean() for arm,(loaders,*_) in seen.items()}
    assert shares['oversampling']==shares['synthetic'] > shares['nothing']==shares['stronger augmentation']

def test_drawn_images_are_in_training_only_and_other_images_stay(data, trained):
    dls,rare = data
    _,seen,_ = trained
    for arm,(loaders,*_) in seen.items():
        for part in ('valid', 'test'):
            its = getattr(loaders, part)
            assert its.table[['image', 'label', 'group']].equals(getattr(dls, part).table[['image', 'label', 'group']])
            assert not is_synthetic(its.table).any()
        drawn = is_synthetic(loaders.train.table)
        assert drawn.any()==(arm=='synthetic') and set(loaders.train.table.label[drawn]) <= {rare}

def test_drawn_images_are_those_of_a_gan_that_saw_training_images_only(data, trained):
    dls,rare = data
    _,seen,home = trained
    table = seen['synthetic'][0].train.table
    gan = fit_gan(dls.table, home/'gan-0', seed=0, device='cpu', **GAN) # loaded
    assert set(table.origin.dropna())=={gan.fingerprint} and len(gan.seen)==(dls.table.split=='train').sum()

def test_arms_and_seeds_may_be_added_and_nothing_is_trained_twice(data, trained, monkeypatch):
    dls,rare = data
    found,_,home = trained
    fits,real = [],scarce_classes.fit_classifier
    def counted(*args, **kwargs):
        fits.append(args)
        return real(*args, **kwargs)
    monkeypatch.setattr(scarce_classes, 'fit_classifier', counted)
    how = dict(gan=GAN, folder=home, **HOW | dict(seeds=(0, 5)))
    more = compare_scarce(dls, cnn, [rare], ['synthetic', 'nothing'], **how)
    assert len(fits)==2
    for arm,probs in more.items(): assert np.array_equal(probs[0], found[arm][0])
    assert not np.array_equal(*more['nothing'])
    alone = compare_scarce(dls, cnn, [rare], ['synthetic'], gan=GAN, **HOW) # without a folder, without the other arms
    assert np.array_equal(alone['synthetic'][0], found['synthetic'][0])

@pytest.mark.parametrize('change, words', [
    (dict(epochs=3), 'epochs was 2, is 3'), (dict(gan=GAN | dict(steps=13)), 'steps was 12, is 13'),
    (dict(count=90), 'added was'), (dict(stronger=AUGMENT), 'stronger was'),
    (dict(gan=None, draw=lambda train, more, seed: train), 'steps was 12, is None')])
def test_another_study_in_the_folder_is_refused_by_name(data, trained, change, words):
    dls,rare = data
    with pytest.raises(ValueError, match=words):
        compare_scarce(dls, cnn, [rare], **dict(gan=GAN, folder=trained[2], **HOW) | change)

def test_the_table_holds_metrics_and_paired_differences(data, trained):
    dls,rare = data
    found = trained[0]
    table = scarce_table(found, dls, [rare], n_boot=200)
    given = dict(targets=targets_of(dls.test), classes=dls.classes, groups=dls.test.table.group.to_numpy(), n_boot=200)
    for arm,probs in found.items():
        own = evaluate(probs, **given)
        for metric in ('balanced_accuracy', 'macro_auroc', f'sensitivity/{rare}'):
            assert table.loc[(metric, arm), ['value', 'low', 'high']].tolist()==pytest.approx(
                own.loc[metric, ['value', 'low', 'high']].tolist(), nan_ok=True)
        for control in ('nothing', 'oversampling'):
            row = table.loc[f'auroc/{rare}', arm]
            if arm in ('nothing', control):
                assert np.isnan(row[f'over_{control}'])
                continue
            gain = paired_difference(probs, found[control], metrics=[f'auroc/{rare}'], **given).iloc[0]
            names = [f'over_{control}'+end for end in ('', '_low', '_high', '_p')]
            assert row[names].tolist()==pytest.approx(gain[['value', 'low', 'high', 'p']].tolist())
    of = dls.test.table[dls.test.table.label==rare]
    assert table.loc[f'sensitivity/{rare}', 'nothing'][['images', 'groups']].tolist()==[len(of), of.group.nunique()]
    harm = scarce_harm(found, dls, n_boot=100)
    assert list(zip(harm.model, harm['class']))==[(arm, c) for arm in ARMS[1:] for c in dls.classes]

def test_two_classes():
    dls,rare = tissue(2)
    found = compare_scarce(dls, lambda: cnn(1), [rare], gan=GAN, count=90, **HOW)
    table = scarce_table(found, dls, [rare], n_boot=50)
    assert np.isfinite(table.value).all() and set(table.index.get_level_values('arm'))==set(ARMS)

def test_only_the_training_part_is_drawn_from(data):
    dls,rare = data
    given = []
    def draw(train, more, seed):
        given.append(train)
        new = synthetic_table(9*more[rare], classes=3, size=16, seed=seed+99)
        return new[new.label==rare].head(more[rare])
    found = compare_scarce(dls, cnn, [rare], ['synthetic'], draw=draw, **HOW)
    assert set(given[0].split)=={'train'} and len(given[0])==dls.train.n
    assert np.isfinite(found['synthetic'][0]).all()

@pytest.mark.parametrize('part', ['valid', 'test'])
def test_a_drawer_of_scored_images_is_stopped(data, part):
    dls,rare = data
    table = getattr(dls, part).table
    own = table[table.label==rare]
    def cheats(train, more, seed): return own.iloc[np.resize(np.arange(len(own)), more[rare])]
    with pytest.raises(ValueError, match='are validation or test images'):
        compare_scarce(dls, cnn, [rare], ['synthetic'], draw=cheats, **HOW)

def test_repeated_rows_are_spread_evenly():
    table = split_groups(synthetic_table(90, classes=3, size=16, seed=1))
    own = table[(table.split=='train') & (table.label=='normal')]
    again = oversample(table, dict(normal=2*len(own)+3), seed=4)
    times = again.image.map(id)[again.index>=len(table)].value_counts()
    assert sorted(times)==[2]*(len(own)-3)+[3]*3 and len(again)==len(table)+2*len(own)+3
    assert again.iloc[:len(table)].equals(table) and again.attrs==table.attrs

def test_epochs_smaller_than_a_batch():
    dls,rare = tissue(bs=200)
    found = compare_scarce(dls, cnn, [rare], ['nothing', 'oversampling'], gan=GAN, **HOW)
    assert np.isfinite(found['oversampling'][0]).all()

@pytest.mark.parametrize('change, error, words', [
    (dict(scarce=['lung']), ValueError, "unknown scarce class 'lung'"),
    (dict(scarce=[]), ValueError, 'scarce must be names'),
    (dict(scarce='dysplasia'), ValueError, 'scarce must be names'),
    (dict(scarce=['dysplasia']*2), ValueError, 'each once'), (dict(count=2), ValueError, 'must have fewer than 2'),
    (dict(arms=['more']), ValueError, "unknown arm 'more'"), (dict(arms=[]), ValueError, 'arms must be several'),
    (dict(seeds=3), ValueError, 'seeds must be several'), (dict(seeds=(0, 0)), ValueError, 'each once'),
    (dict(epochs=0), ValueError, 'epochs must be'), (dict(lr=0), ValueError, 'lr must be'),
    (dict(gan=dict(step=3)), ValueError, "unknown setting of fit_gan 'step'"),
    (dict(gan=dict(strength=2)), ValueError, 'strength must be'),
    (dict(gan=dict(seed=2)), ValueError, 'must not contain'),
    (dict(gan=dict(size=20)), ValueError, 'choose one of these sizes'),
    (dict(draw=3, gan=None), TypeError, 'a function'),
    (dict(draw=print), ValueError, 'exclude each other'), (dict(stronger=1), TypeError, 'must be an Augment'),
    (dict(on='train'), ValueError, "unknown on 'train'")])
def test_bad_input_is_refused_before_anything_is_trained(data, monkeypatch, change, error, words):
    dls,rare = data
    def never(*args, **kwargs): raise AssertionError('trained')
    for name in ('fit_classifier', 'fit_gan', 'run_cell'): monkeypatch.setattr(scarce_classes, name, never)
    with pytest.raises(error, match=words):
        compare_scarce(dls, cnn, **dict(dict(scarce=[rare], gan=GAN), **HOW) | change)

def test_bad_tables_are_refused(monkeypatch):
    def never(*args, **kwargs): raise AssertionError('trained')
    for name in ('fit_classifier', 'fit_gan', 'run_cell'): monkeypatch.setattr(scarce_classes, name, never)
    dls,rare = tissue()
    table = dls.table
    def refused(words, changed, model=cnn, error=ValueError):
        with pytest.raises(error, match=words):
            compare_scarce(image_dls(changed, 16, device='cpu'), model, [rare], gan=GAN, **HOW)
    for part in ('valid', 'test'): refused(f'no image in {part}', table[(table.split!=part) | (table.label!=rare)])
    refused('no test images', table[table.split!='test'])
    refused('are synthetic already', table.assign(synthetic=(table.split=='train') & (table.label==rare)))
    refused('must be a timm name or a function', table, cnn(), TypeError)
    findings = split_groups(synthetic_table(120, classes=3, size=16, task='multilabel'))
    with pytest.raises(ValueError, match='must be exclusive'):
        compare_scarce(image_dls(findings, 16, device='cpu'), cnn, ['carcinoma'], gan=GAN, **HOW)

KILLED = '''
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import numpy as np
from fastai.learner import Learner
from test_scarce_classes import GAN, HOW, cnn, compare_scarce, tissue
import kdmed.baselines.gan as gan

folder,steps,out,left = sys.argv[2],int(sys.argv[3]),sys.argv[4],[int(sys.argv[3])]
def counted(real):
    def step(self, *args):
        left[0] -= 1
        if not left[0]: os._exit(9)
        return real(self, *args)
    return step
gan._Training.step = counted(gan._Training.step)
Learner.one_batch = counted(Learner.one_batch)
dls,rare = tissue()
found = compare_scarce(dls, cnn, [rare], gan=GAN, folder=folder, **HOW)
np.savez(out, **found)
'''

@pytest.mark.slow(seconds=120)
def test_killed_twice_it_makes_the_same_table(trained, data, tmp_path):
    "Killed within the GAN, after a checkpoint; in a student's second epoch; and in the first step of all"
    script,dls = tmp_path/'script.py',data[0]
    script.write_text(KILLED)
    def run(steps):
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore')
        words = [sys.executable, script, ROOT/'tests', tmp_path/'study', steps, tmp_path/'out.npz']
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=env, timeout=900)
        assert done.returncode==(9 if steps else 0), done.stderr[-2000:]
    of_a_fit = 2*(len(dls.train)+len(dls.valid))
    run(1)
    run(3*of_a_fit+8) # three students, and the GAN is in its eighth step
    assert (tmp_path/'study'/'gan-0'/'checkpoint.pt').exists()
    run(12-5+of_a_fit-3) # the rest of the GAN, and all but the last steps of its student
    assert (tmp_path/'study'/'gan-0'/'gan.json').exists()
    assert (tmp_path/'study'/'synthetic-0'/'fit').exists()
    run(0)
    with np.load(tmp_path/'out.npz') as again:
        for arm,probs in trained[0].items(): assert np.array_equal(again[arm], probs), arm


# -- worlds whose results are known

def shapes(kinds, seed=0, size=16):
    "A bar, a blob or a cross of any color, anywhere"
    rng,images = np.random.default_rng(seed),[]
    for kind in kinds:
        pixels = rng.uniform(.2, .8, 3) + .1*rng.normal(size=(size, size, 3))
        (y, x),color = rng.integers(1, size-7, 2),rng.choice([-1, 1])*rng.uniform(.3, .5, 3)
        if kind=='blob': pixels[y+1:y+5, x+1:x+5] += color
        else: pixels[y+2:y+4, x:x+6] += color
        if kind=='cross': pixels[y:y+6, x+2:x+4] += color
        images.append((255*pixels.clip(0, 1)).astype(np.uint8))
    return image_table(images, kinds, classes=['bar', 'blob', 'cross'], name='shapes')

def world():
    parts = dict(train=(150, 150, 6), valid=(5, 5, 5), test=(150, 150, 150))
    rows = [(k, part) for part,ns in parts.items() for k,n in zip(('bar', 'blob', 'cross'), ns) for _ in range(n)]
    kinds,split = zip(*rows)
    return image_dls(shapes(list(kinds), seed=8).assign(split=split), 16, 32, AUGMENT, device='cpu')

def new_ones(train, more, seed): return shapes([k for k,n in more.items() for _ in range(n)], seed+50)
def wrong_ones(train, more, seed): # drawn as another class, labeled as this one
    new = shapes(['bar']*sum(more.values()), seed+50)
    return new.assign(label=[k for k,n in more.items() for _ in range(n)])
def copies(train, more, seed):
    rows = [train[train.label==k].iloc[np.arange(n) % (train.label==k).sum()] for k,n in more.items()]
    return pd.concat(rows, ignore_index=True)

@pytest.mark.slow(seconds=150)
@pytest.mark.parametrize('draw, gains', [(new_ones, True), (copies, None), (wrong_ones, False)])
def test_true_images_help_and_copies_do_not(draw, gains):
    dls,how = world(),dict(epochs=10, lr=1e-2, seeds=(0, 1, 2), progress=False)
    found = compare_scarce(dls, cnn, ['cross'], ['oversampling', 'synthetic'], draw=draw, **how)
    row = scarce_table(found, dls, ['cross'], n_boot=400).loc['auroc/cross', 'synthetic']
    low,high = row.over_oversampling_low,row.over_oversampling_high
    if gains: assert low > .05
    elif gains is None: assert low <= 0 <= high and high-low < .2
    else: assert high < 0 or row.value < .6
