"""Copies under any angle and crop, and what is said of them. Tests on real images skip where their folder, beside the project, is absent."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kdmed.data import copies
from kdmed.data.copies import check_copies, describe_search, group_copies, guess_groups, leakage_report, link_groups
from kdmed.data.images import card, image_table, synthetic_table
from kdmed.data.splits import kfold_groups, repeat_splits, split_groups

from bench_copies import folder, make_copy, pick

needs_opencv = pytest.mark.skipif(not copies.has_opencv(), reason='OpenCV is not installed (extra copies)')

@pytest.fixture
def table(): return image_table(range(60), ['a', 'b', 'c']*20, groups=np.repeat(range(20), 3))

# -- bad input

@pytest.mark.parametrize('sizes', [None, .7, 'abc', (.7, .3), (True, False, False), (.7, .15, None), ('.7', '.2', '.1'), (np.nan, .5, .5)])
def test_sizes_are_refused(table, sizes):
    with pytest.raises(ValueError, match='sizes must be three shares'): split_groups(table, sizes=sizes)

@pytest.mark.parametrize('seed', [-1, 1.5, 'a', None, True, 2**32])
@pytest.mark.parametrize('split', [split_groups, kfold_groups, repeat_splits])
def test_seed_is_refused(table, split, seed):
    with pytest.raises((TypeError, ValueError), match='seed must be'): split(table, seed=seed)

@pytest.mark.parametrize('k', [2.5, '5', None, True])
def test_k_is_refused(table, k):
    with pytest.raises(TypeError, match='k must be a whole number'): kfold_groups(table, k=k)

@pytest.mark.parametrize('valid', ['a', None, 1, np.nan])
def test_valid_is_refused(table, valid):
    with pytest.raises((TypeError, ValueError), match='valid must be'): kfold_groups(table, valid=valid)

@pytest.mark.parametrize('wrong', [dict(correlation=70), dict(correlation='.7'), dict(neighbors=0), dict(neighbors=2.5), dict(how='eye')])
def test_group_copies_refuses(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))): group_copies([], **wrong)

# -- groups do not chain

TWO_GROUPS = [(0, 1, .9), (1, 2, .9), (0, 2, .9), (3, 4, .9), (4, 5, .9), (3, 5, .9)]

def groups_with(*bridge): return len(set(link_groups(6, pd.DataFrame([*TWO_GROUPS, *bridge], columns=['a', 'b', 'correlation']))[0]))

@pytest.mark.parametrize('bridge', [[(2, 3, .6)], [(2, 3, .99)], [(2, 3, .8), (2, 4, .8), (2, 5, .8)]], ids=['weak', 'strong', 'one image'])
def test_bridges_do_not_chain(bridge): assert groups_with(*bridge)==2

def test_two_links_without_a_common_image_join_groups(): assert groups_with((2, 3, .6), (1, 4, .6))==1

@needs_opencv
def test_a_collage_of_two_sources_does_not_join_their_copies():
    rng = np.random.default_rng(0)
    one,two = (Image.fromarray(i) for i in synthetic_table(n=12, size=128, seed=3).image[[0, 6]])
    collage = Image.new('RGB', (128, 128))
    collage.paste(one.crop((0, 0, 64, 128)), (0, 0))
    collage.paste(two.crop((64, 0, 128, 128)), (64, 0))
    groups = group_copies([*(make_copy(one, rng, False) for _ in range(4)), *(make_copy(two, rng, False) for _ in range(4)), collage], how='features')
    assert len(set(groups[:4]))==len(set(groups[4:8]))==1 and groups[0]!=groups[4]

# -- real images

@pytest.mark.slow
@needs_opencv
@pytest.mark.parametrize('name', ['ham10000', 'pneumonia', 'breakhis'])
def test_copies_of_real_images_are_found(name):
    if not folder(name).is_dir(): pytest.skip(f'{name} is not here')
    rng = np.random.default_rng(1)
    originals = pick(name, 24, seed=1)
    n = len(originals)
    groups = group_copies([*originals, *(make_copy(i, rng, False) for i in originals)], how='features')
    together = groups[:n]==groups[n:]
    strangers = n - len(set(groups[:n]))
    assert together.mean() >= .95 and strangers <= 1

@needs_opencv
def test_a_leak_that_fingerprints_do_not_see():
    rng = np.random.default_rng(0)
    tiles = [Image.fromarray(i) for i in synthetic_table(n=16, size=128, seed=4).image]
    images = [np.asarray(i) for i in [*tiles, *(make_copy(i, rng, False) for i in tiles)]]
    table = image_table(images, ['a', 'b']*16).assign(split=['train']*16 + ['test']*16)
    weak,strong = (leakage_report(table, how=how) for how in ('fingerprints', 'features'))
    assert strong.share('copies') >= .9 > weak.share('copies')
    assert weak.not_looked_for in str(weak) and weak.looked_for in str(weak) and not strong.not_looked_for

# -- what is said

def test_measured_recall_is_that_of_the_results():
    measured = json.loads((Path(__file__).parents[1]/'results/copies/measured.json').read_text())
    assert copies.MEASURED == measured['total']
    many = measured['large']
    assert copies.AMONG_MANY == dict(images=many['images'], recall=round(many['found']/many['copies'], 3))

@pytest.mark.parametrize('how', ['fingerprints', 'features', 'rings'])
def test_a_search_says_its_kinds_and_recall(how): assert f"{copies.MEASURED[how]['recall']:.1%}" in describe_search(how)

@pytest.fixture
def without_opencv(monkeypatch): monkeypatch.setattr(copies, 'has_opencv', lambda: False)

def small():
    tile,other = synthetic_table(n=2, size=64, tiles_per_patient=1).image
    return image_table([tile, np.fliplr(tile), other, tile], ['a', 'b', 'b', 'a'], name='small').assign(split=['train', 'test', 'test', 'valid'])

def test_without_opencv_it_works_and_says_what_was_not_looked_for(without_opencv):
    checked = check_copies(small())
    assert checked.shares['train-test'] == dict(images=2, with_copy=1, share=.5)
    assert 'kdmed[copies]' in checked.not_looked_for and any('Not looked for' in s for s in checked.sentences())
    assert 'kdmed[copies]' in leakage_report(small()).not_looked_for
    with pytest.warns(UserWarning, match='OpenCV is not installed'): group_copies(small().image)

def test_contradictory_labels_are_listed():
    checked = check_copies(small(), seconds=0)
    assert sorted(map(tuple, checked.contradictory[['label_a', 'label_b']].values)) == [('a', 'b'), ('a', 'b')]
    assert any('have different labels' in s for s in checked.sentences())

def test_a_copy_of_a_row_whose_bytes_are_there_twice_is_counted_in_both_splits():
    checked = check_copies(small(), seconds=0)
    assert {between: s['with_copy'] for between,s in checked.shares.items()} == {'train-valid': 1, 'train-test': 1, 'valid-test': 1}
    assert set(zip(checked.crossing.a, checked.crossing.b)) == {(0, 1), (0, 3), (3, 1)}

def test_too_little_time_is_said():
    assert not copies.has_opencv() or 'were allowed' in check_copies(small(), seconds=0).not_looked_for

def test_check_has_no_file_names(tmp_path):
    files = [tmp_path/f'patient-{i}.png' for i in range(3)]
    for f,i in zip(files, synthetic_table(n=3, size=32).image): Image.fromarray(i).save(f)
    files[2].write_bytes(b'no image')
    checked = check_copies(image_table(files, ['a', 'b', 'a']).assign(split=['train', 'train', 'test']))
    assert 'patient' not in json.dumps(checked.to_dict()) + ' '.join(checked.sentences())
    assert list(checked.unreadable)==[2] and any('could not be read' in s for s in checked.sentences())

def test_guessed_groups_are_marked():
    guessed = guess_groups(small(), how='rings')
    assert guessed.attrs['guessed_groups'] in card(guessed) and guessed.group.nunique()==2
    assert 'guessed' not in card(small())
