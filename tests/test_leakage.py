"""Copies and groups that cross splits, on real images. They cannot be had from a package registry: each test skips where its folder,
beside the project, is absent."""
import io, os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import train_test_split

from kdmed.data.copies import find_copies, fingerprints, group_copies, has_opencv, leakage_report
from kdmed.data.datasets import read_ham10000
from kdmed.data.images import image_table
from kdmed.data.splits import check_leakage, split_groups

DATA = Path(__file__).parents[2]/'shared/data'

def folder(name):
    "Where a set is; the test skips without it"
    path = Path(os.environ.get(f'KDMED_{name.upper()}', DATA/name))
    if not path.is_dir(): pytest.skip(f'{name} is not here: set KDMED_{name.upper()} to its folder')
    return path

@pytest.fixture(scope='module')
def lesions(): return read_ham10000(folder('ham10000'))

@pytest.fixture(scope='module')
def prints(lesions): return fingerprints(lesions.image)

# -- images changed as people change them

def saved(image, quality):
    "An image as it comes back from a file"
    file = io.BytesIO()
    image.save(file, *(('PNG',) if quality is None else ('JPEG',)), **({} if quality is None else {'quality': quality}))
    return Image.open(file).convert('RGB')

def plant_copy(image, rng):
    "In one of the eight orientations, resized by a factor from 1/2 to 3/2, saved as JPEG of quality 30 to 95 or as PNG"
    image = image.rotate(90*int(rng.integers(4)), expand=True)
    if rng.random()<.5: image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = [round(side*factor) for factor in [rng.uniform(.5, 1.5)] for side in image.size]
    return saved(image.resize(size, Image.Resampling(int(rng.choice([2, 3, 1])))), int(rng.integers(30, 96)) if rng.random()<.9 else None)

def turn_and_crop(image, rng, side):
    "As LC25000 was augmented: a turn by up to 25°, the largest upright square within, scaled to `side`, mirrored or not"
    angle = rng.uniform(-25, 25)
    kept = image.width/(np.cos(np.radians(abs(angle))) + np.sin(np.radians(abs(angle))))
    low,high = (image.width-kept)/2,(image.width+kept)/2
    image = image.rotate(angle, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC, box=(low, low, high, high))
    for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        if rng.random()<.5: image = image.transpose(flip)
    return saved(image, int(rng.integers(75, 96)))

def opened(path): return Image.open(path).convert('RGB')

def slide_crops(side):
    "Crops of the BreakHis originals that do not overlap: several tiles of one slide, one stain"
    slides = [opened(f) for f in sorted(folder('breakhis').rglob('*.png'))]
    return [s.crop((x, y, x+side, y+side)) for s in slides for x in range(0, s.width-side+1, side) for y in range(0, s.height-side+1, side)]

# -- the report

@pytest.mark.slow
def test_random_split_has_lesion_mates_and_grouped_split_none(lesions, prints):
    mates = []
    for seed in range(3):
        train,test = train_test_split(np.arange(len(lesions)), test_size=.2, random_state=seed)
        split = np.full(len(lesions), 'test', object)
        split[train] = 'train'
        report = leakage_report(lesions.assign(split=split), prints=prints, how='fingerprints')
        mates.append(report.share('group_mates'))
        assert mates[-1] == np.isin(lesions.group[test], lesions.group[train]).mean()
    assert abs(np.mean(mates)-.387) < .015, mates # a single split is off by .010 (standard deviation)
    assert .005 < report.share('copies') < .03 and not report.unreadable
    clean = leakage_report(split_groups(lesions), prints=prints, how='fingerprints')
    assert clean.counts.group_mates.sum() == clean.counts.groups.sum() == 0
    check_leakage(split_groups(lesions))

@pytest.mark.slow
def test_copies_within_ham10000_are_of_one_lesion_but_for_one_photograph(lesions, prints):
    pairs = find_copies(prints)
    strangers = pairs[lesions.group.to_numpy()[pairs.a] != lesions.group.to_numpy()[pairs.b]]
    names = {frozenset(Path(lesions.image.iloc[i]).stem for i in pair) for pair in zip(strangers.a, strangers.b)}
    assert len(names) == 1, names # one photograph, printed twice in different tones under two lesion numbers
    assert strangers.distance.max() < .03 and len(pairs) > 50

@pytest.mark.slow
def test_planted_copies_are_found_and_nothing_else(lesions, prints):
    rng = np.random.default_rng(0)
    rows = rng.choice(len(lesions), 600, replace=False)
    planted = fingerprints([plant_copy(opened(lesions.image.iloc[i]), rng) for i in rows])
    both = type(prints)(np.concatenate([prints.waves, planted.waves]), np.concatenate([prints.content, planted.content]), {})
    pairs = find_copies(both, ['train']*len(lesions) + ['test']*len(rows))
    origin = rows[pairs.b-len(lesions)]
    assert len(set(origin[pairs.a == origin])) >= .99*len(rows)
    group = lesions.group.to_numpy()
    assert (group[pairs.a] != group[origin]).sum() <= 1

@pytest.mark.parametrize('name', ['breakhis', 'nih_chestxray14'])
def test_planted_copies_of_slides_and_chest_films(name):
    "Of slides, only what shows tissue: blank glass saved as JPEG is noise"
    rng = np.random.default_rng(0)
    images = [i for i in slide_crops(115) if np.std(i.convert('L'))>5] if name=='breakhis' else [opened(f) for f in sorted(folder(name).rglob('*.png'))]
    patients = range(len(images)) if name=='breakhis' else [f.name[:8] for f in sorted(folder(name).rglob('*.png'))]
    table = image_table([*images, *(plant_copy(i, rng) for i in images)], ['a', 'b']*len(images), [*patients]*2)
    pairs = find_copies(fingerprints(table.image), ['train']*len(images) + ['test']*len(images))
    assert len(set(pairs.a[pairs.b == pairs.a+len(images)])) >= .99*len(images)
    assert (table.group.to_numpy()[pairs.a] == table.group.to_numpy()[pairs.b]).all()

def test_one_slide_under_two_names(tmp_path):
    slide = sorted(folder('breakhis').rglob('SOB_M_LC*.png'))[0]
    for kind in ('DC', 'LC'): (tmp_path/f'SOB_M_{kind}-14-13412-40-001.png').write_bytes(slide.read_bytes())
    opened(slide).transpose(Image.Transpose.ROTATE_90).save(tmp_path/'turned.jpg', quality=80)
    report = leakage_report(image_table(sorted(tmp_path.iterdir()), ['DC', 'LC', 'LC']).assign(split=['train', 'test', 'test']))
    assert report.counts.loc['train-test', ['identical', 'copies']].tolist() == [1, 2]
    assert report.pairs.orientation.tolist() == ['as it is', 'turned 90° left']

# -- groups of augmented copies

def score(groups, true):
    "Siblings that are together, pairs together that are siblings, adjusted Rand index"
    pairs = pd.crosstab(groups, true).to_numpy()
    both,together,siblings = ((n**2 - n).sum() for n in (pairs, pairs.sum(1), pairs.sum(0)))
    return both/siblings,both/together,adjusted_rand_score(true, groups)

@pytest.mark.slow
@pytest.mark.parametrize('name,side', [('breakhis', 224), ('breakhis', 64), ('ham10000', 224), ('ham10000', 64)])
def test_augmented_copies_are_grouped(name, side, request):
    rng = np.random.default_rng(0)
    if name=='breakhis': sources = slide_crops(150)
    else:
        one_each = request.getfixturevalue('lesions').drop_duplicates('group').image.sample(150, random_state=0)
        sources = [opened(p).crop((25, 0, 175, 150)) for p in one_each]
    images = [turn_and_crop(s, rng, side) for s in sources for _ in range(12)]
    recall,precision,rand = score(group_copies(images, how='rings'), np.repeat(np.arange(len(sources)), 12))
    assert recall > .985 and precision > .95 and rand > .97, (recall, precision, rand)

@pytest.mark.slow
@pytest.mark.skipif(not has_opencv(), reason='OpenCV is not installed (extra copies)')
@pytest.mark.parametrize('side', [224, 64])
def test_augmented_copies_are_grouped_by_features(side):
    rng = np.random.default_rng(0)
    sources = slide_crops(150)[:16]
    images = [turn_and_crop(s, rng, side) for s in sources for _ in range(6)]
    recall,precision,rand = score(group_copies(images, how='features'), np.repeat(np.arange(len(sources)), 6))
    assert recall > .98 and precision > .98 and rand > .98, (recall, precision, rand)

@pytest.mark.slow
def test_different_lesions_do_not_chain_into_giants(lesions):
    one_each = lesions.drop_duplicates('group').image
    sizes = pd.Series(group_copies(one_each, how='rings')).value_counts()
    assert sizes.max() <= 10 and (sizes==1).sum() > .97*len(one_each), sizes.head()
