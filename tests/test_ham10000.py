"HAM10000 as it is on Kaggle. The images cannot be had from a package registry; tests skip where the folder beside the project is absent."
import os
from pathlib import Path

import pytest

from kdmed.data.datasets import HAM10000_CLASSES, read_ham10000
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups

FOLDER = Path(os.environ.get('KDMED_HAM10000', Path(__file__).parents[2]/'shared/data/ham10000'))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason='HAM10000 is not here: set KDMED_HAM10000 to its folder')


@pytest.fixture(scope='module')
def table(): return read_ham10000(FOLDER)


def test_published_counts(table):
    assert len(table) == 10015 and table.group.nunique() == 7470
    assert table.label.value_counts().to_dict() == HAM10000_CLASSES
    assert table.groupby('group').label.nunique().max() == 1


def test_grouped_split_shares_no_lesion_and_keeps_class_shares(table):
    split = split_groups(table, sizes=(.7, .15, .15), seed=0)
    assert split.groupby('group').split.nunique().max() == 1
    shares = split.groupby('label').split.value_counts(normalize=True).unstack()
    assert (shares[['train', 'valid', 'test']] - [.7, .15, .15]).abs().max().max() < .01


def test_batches_of_real_images(table):
    some = split_groups(table.groupby('label', group_keys=False).head(20))
    dls = image_dls(some, size=64, bs=16)
    x,y = dls.one_batch()
    assert x.shape == (16, 3, 64, 64) and x.isfinite().all() and -3 < x.mean() < 3
    assert dls.c == 7 and set(dls.classes) == set(HAM10000_CLASSES)
