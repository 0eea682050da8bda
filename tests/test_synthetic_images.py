"Images of a GAN: refused where scores are taken, the same after a kill, told apart by fingerprint, damage is named"
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from kdmed.baselines.gan import fit_gan, load_gan
from kdmed.baselines.synthetic_images import (
    add_synthetic, draw_images, kid, kid_table, load_drawn, memorization, nearest_training_image, show_nearest)
from kdmed.data.images import check_table, image_table, synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import kfold_groups, official_split, repeat_splits, split_groups

HOW = dict(size=16, steps=40, bs=8, width=4, every=4, device='cpu')
TABLE = """
from kdmed.data.images import synthetic_table
from kdmed.data.splits import split_groups
table = split_groups(synthetic_table(120, classes=3, size=16, seed=2))
"""

@pytest.fixture(scope='module')
def table(): return split_groups(synthetic_table(120, classes=3, size=16, seed=2))

@pytest.fixture(scope='module')
def more_patients(): return split_groups(synthetic_table(360, classes=3, size=16, seed=3))

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('gan')

@pytest.fixture(scope='module')
def gan(table, home): return fit_gan(table, home/'gan', **HOW)

@pytest.mark.slow(seconds=30)
def test_a_killed_process_resumes_with_the_same_weights(table, gan, tmp_path):
    script = f"{TABLE}\nfrom kdmed.baselines.gan import fit_gan\nfit_gan(table, {str(tmp_path/'gan')!r}, **{HOW})"
    process = subprocess.Popen([sys.executable, '-c', script])
    checkpoint = tmp_path/'gan'/'checkpoint.pt'
    end = time.monotonic()+120
    while not checkpoint.exists() and process.poll() is None and time.monotonic()<end: time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists(), 'killed too late, or never began'
    assert fit_gan(table, tmp_path/'gan', **HOW).fingerprint==gan.fingerprint
    assert not checkpoint.exists()

def test_synthetic_images_are_refused_where_scores_are_taken(table, gan):
    drawn = draw_images(gan, 3)
    both = add_synthetic(table, drawn, gan)
    assert (both.split[both.synthetic]=='train').all() and set(both.origin[both.synthetic])=={gan.fingerprint}
    for split in ('valid', 'test'):
        moved = both.assign(split=both.split.mask(both.synthetic, split))
        for door in (check_table, lambda t: image_dls(t, 16, device='cpu')):
            with pytest.raises(ValueError, match=f'synthetic images can be in train only, got 9 in {split}'):
                door(moved)
    for door in (split_groups, repeat_splits, kfold_groups, lambda t: official_split(t.assign(official='train'))):
        with pytest.raises(ValueError, match='9 of 129 images are synthetic; split the real images first'):
            door(both)

def test_a_gan_never_adds_to_a_table_whose_test_images_it_saw(table, gan):
    drawn = draw_images(gan, 1)
    with pytest.raises(ValueError, match='are among those that the GAN was trained on'):
        add_synthetic(split_groups(table.assign(split=None), seed=7), drawn, gan)
    with pytest.raises(ValueError, match='drawn must be images of this GAN'):
        add_synthetic(table, drawn.assign(origin='0'*16), gan)

def test_a_table_of_drawn_images_survives_a_list_of_text(table, gan, tmp_path):
    drawn = draw_images(gan, 2, tmp_path/'drawn')
    drawn.to_csv(tmp_path/'drawn.csv', index=False)
    again = pd.read_csv(tmp_path/'drawn.csv')
    again.attrs = dict(drawn.attrs)
    with pytest.raises(ValueError, match='synthetic images can be in train only'):
        check_table(again.assign(split='test'))
    assert load_drawn(tmp_path/'drawn').equals(drawn)

@pytest.mark.parametrize('change', [dict(seed=1), dict(steps=39), dict(strength=.5), dict(codes=1)])
def test_whatever_changes_the_gan_changes_its_fingerprint(table, gan, tmp_path, change):
    assert fit_gan(table, tmp_path, **HOW | change).fingerprint!=gan.fingerprint
    with pytest.raises(ValueError, match='belongs to another GAN'): fit_gan(table, tmp_path, **HOW)

@pytest.mark.parametrize('file', ['gan.safetensors', 'gan.json'])
@pytest.mark.parametrize('damage', ['cut', 'flipped', 'missing'])
def test_damaged_files_are_refused_by_name(gan, home, tmp_path, file, damage):
    for name in ('gan.safetensors', 'gan.json'): (tmp_path/name).write_bytes((home/'gan'/name).read_bytes())
    data = (tmp_path/file).read_bytes()
    if damage=='missing': (tmp_path/file).unlink()
    else: (tmp_path/file).write_bytes(data[:-30] if damage=='cut' else b'?'+data[1:])
    with pytest.raises((ValueError, FileNotFoundError), match=file): load_gan(tmp_path)

def test_files_of_a_newer_version_are_refused(home, tmp_path, gan):
    for name in ('gan.safetensors', 'gan.json'): (tmp_path/name).write_bytes((home/'gan'/name).read_bytes())
    about = json.loads((tmp_path/'gan.json').read_text())
    (tmp_path/'gan.json').write_text(json.dumps(about | dict(format=99)))
    with pytest.raises(ValueError, match='update kdmed'): load_gan(tmp_path)

def test_copies_are_memorized_and_other_kinds_are_not(more_patients):
    table = more_patients
    rng = np.random.default_rng(0)
    f = rng.normal(size=(len(table), 8))
    train = np.flatnonzero(table.split=='train')
    drawn = table.iloc[train].assign(synthetic=True)
    copies = memorization(nearest_training_image(drawn, table, f[train], f))
    assert (copies.share==1).all() and copies.images['all']==len(train)
    far = memorization(nearest_training_image(drawn, table, f[train]+100, f))
    assert (far.share==0).all()
    found = nearest_training_image(drawn, table, f[train], f)
    assert (found.nearest.to_numpy()==train).all() # each copy's nearest is its original, by row of the table

def test_kid_is_symmetric_and_zero_on_average():
    rng = np.random.default_rng(2)
    values = [kid(rng.normal(size=(30, 6)), rng.normal(size=(25, 6)), subsets=2).value for _ in range(300)]
    assert abs(np.mean(values)) < 3*np.std(values)/300**.5
    x,y = rng.normal(size=(20, 6)),rng.normal(size=(15, 6))+1
    assert kid(x, y, subsets=2).value==pytest.approx(kid(y, x, subsets=2).value)
    assert kid(x, y).low > 0

def test_pairs_are_shown_and_kid_has_a_control(more_patients, gan):
    table = more_patients
    rng,drawn = np.random.default_rng(1),draw_images(gan, 5)
    f,g = rng.normal(size=(len(table), 6)),rng.normal(size=(len(drawn), 6))
    pairs = nearest_training_image(drawn, table, g, f)
    assert (table.label.iloc[pairs.nearest].to_numpy()==drawn.label.to_numpy()).all()
    assert (table.split.iloc[pairs.nearest]=='train').all()
    assert show_nearest(drawn, table, pairs, n=3).shape==(2, 3)
    distances = kid_table(drawn, table, g, f, subsets=20)
    assert list(distances.index)==gan.classes and np.isfinite(distances[['kid', 'low', 'high']]).all(axis=None)

@pytest.mark.parametrize('wrong, words', [
    (dict(lr=1e-3), 'lr must be two learning rates'), (dict(lr=(1e-3, 0)), 'lr must be'),
    (dict(steps=0), 'steps must be'),
    (dict(codes=64), 'latent must be'), (dict(strength=2), 'strength must be')])
def test_wrong_settings_are_refused_before_images_are_read(tmp_path, wrong, words):
    table = image_table([f'{i}.png' for i in range(8)], ['a', 'b']*4, list(range(8)), name='files that are not there')
    with pytest.raises(ValueError, match=words): fit_gan(table.assign(split='train'), tmp_path/'gan', **wrong)
    assert not (tmp_path/'gan').exists()
