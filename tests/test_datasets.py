"The readers on real files. They cannot be had from a package registry; tests skip where the folder beside the project is absent."
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kdmed.data.datasets import (
    BREAKHIS_SUBTYPES, CHESTXRAY14_FINDINGS, HAM10000_CLASSES, read_breakhis, read_chestxray14, read_ham10000,
    read_medmnist)
from kdmed.data.images import card, open_image
from kdmed.data.readers import read_csv, read_folder
from kdmed.data.splits import split_groups

DATA = Path(os.environ.get('KDMED_DATA', Path(__file__).parents[2]/'shared/data'))

def needs(folder): return pytest.mark.skipif(not (DATA/folder).exists(), reason=f'{folder} is not here: set KDMED_DATA to the folder that holds it')


@needs('ham10000')
def test_all_of_ham10000(monkeypatch, capsys):
    monkeypatch.setenv('KDMED_INPUT', str(DATA))
    table = read_ham10000()
    assert len(table) == 10015 and table.group.nunique() == 7470 and table.attrs['anomalies'] == []
    assert table.label.value_counts().to_dict() == HAM10000_CLASSES
    assert table.age.isna().sum() == 57 and {'dx_type', 'sex', 'localization'} <= set(table)
    assert 'HAM10000: 10,015 images of 7,470 groups' in capsys.readouterr().out
    assert len(read_ham10000(DATA/'ham10000', print_card=False)) == 10015 and capsys.readouterr().out == ''


@needs('ham10000')
def test_a_part_of_ham10000(tmp_path):
    (tmp_path/'HAM10000_metadata.csv').symlink_to(DATA/'ham10000/HAM10000_metadata.csv')
    (tmp_path/'part').symlink_to(DATA/'ham10000/HAM10000_images_part_1')
    held = len(os.listdir(tmp_path/'part'))
    with pytest.raises(FileNotFoundError, match="missing='note' to continue"): read_ham10000(tmp_path)
    table = read_ham10000(tmp_path, missing='note')
    assert len(table) == held and f'{10015-held:,} of 10,015 listed images not found, left out' in table.attrs['anomalies']


@pytest.fixture(scope='module')
def films(): return read_chestxray14(DATA/'nih_chestxray14')

@needs('nih_chestxray14')
def test_chest_radiographs(films):
    assert len(films) == 1000 and films.group.nunique() == 264 and films.label.str.contains('|', regex=False).sum() == 213
    assert films.attrs['classes'] == list(CHESTXRAY14_FINDINGS) and '1,000 of 112,120 published images' in films.attrs['anomalies']
    rows = pd.read_csv(DATA/'nih_chestxray14/Data_Entry_2017.csv', index_col=False).set_index('Image Index')
    rows = rows.loc[[f.name for f in films.image]]
    assert (rows['Patient ID'].astype(str).to_numpy() == films.group).all() and (rows['Patient Age'].to_numpy() == films.age).all()
    assert (rows['Finding Labels'].replace('No Finding', '').to_numpy() == films.label).all()
    normal = read_chestxray14(DATA/'nih_chestxray14', no_finding=True, print_card=False)
    assert (normal.label == 'No Finding').sum() == (films.label == '').sum() > 0 and len(normal.attrs['classes']) == 15

@needs('nih_chestxray14')
def test_gray_and_rgba_radiographs_open_alike(films):
    from PIL import Image
    modes = {}
    for file in films.image:
        with Image.open(file) as opened: modes.setdefault(opened.mode, []).append(file)
    assert len(modes['RGBA']) == 21 and sum(map(len, modes.values())) == 1000
    for files in modes.values():
        pixels = np.asarray(open_image(files[0]))
        assert pixels.shape == (64, 64, 3) and (pixels[..., 0] == pixels[..., 2]).all() and pixels.std() > 10

@needs('nih_chestxray14')
def test_radiographs_split_by_patient(films):
    split = split_groups(films, seed=0)
    assert split.groupby('group').split.nunique().max() == 1 and set(split.split) == {'train', 'valid', 'test'}

@needs('nih_chestxray14')
def test_the_same_radiographs_as_a_csv(films):
    table = read_csv(DATA/'nih_chestxray14/Data_Entry_2017.csv', images=DATA/'nih_chestxray14/images_001/images', image='Image Index', label='Finding Labels',
                     group='Patient ID', classes=[*CHESTXRAY14_FINDINGS, 'No Finding'], task='multilabel')
    assert [f.name for f in table.image] == [f.name for f in films.image] and (table.group == films.group).all()


@needs('breakhis')
@pytest.mark.parametrize('start', ['breakhis', 'breakhis/BreaKHis_v1/BreaKHis_v1/histology_slides/breast', ''])
def test_breakhis_from_any_level(start):
    table = read_breakhis(DATA/start, 'multiclass')
    assert len(table) == 12 and set(table.label) == {name for name,_ in BREAKHIS_SUBTYPES.values()}
    assert table.slide.nunique() == 9 and {'14-22549AB', '14-3411F', '14-21998AB'} <= set(table.slide)
    assert {'14-22549', '14-3411', '14-21998'} <= set(table.group) and '12 of 7,909 published images' in table.attrs['anomalies']
    assert table.magnification.value_counts().to_dict() == {40: 9, 100: 1, 200: 1, 400: 1}
    assert open_image(table.image[0]).size == (700, 460)

@needs('breakhis')
def test_breakhis_agrees_with_its_folders():
    table = read_breakhis(DATA/'breakhis', print_card=False)
    parts = [f.parts for f in table.image]
    assert table.label.tolist() == [p[-6] for p in parts]
    assert table.subtype.str.replace(' ', '_').tolist() == [p[-4] for p in parts]
    assert [f'{m}X' for m in table.magnification] == [p[-2] for p in parts]
    assert [s in p[-3] for s,p in zip(table.slide, parts)] == [True]*12

@needs('breakhis')
def test_class_folders_of_real_files():
    table = read_folder(DATA/'breakhis/BreaKHis_v1/BreaKHis_v1/histology_slides/breast', group_pattern=r'-(\d+-\d+)[A-Z]*-')
    assert table.label.value_counts().to_dict() == {'benign': 8, 'malignant': 4} and table.group.nunique() == 9


@needs('medmnist/breastmnist.npz')
def test_breastmnist(tmp_path):
    file = DATA/'medmnist/breastmnist.npz'
    table = read_medmnist(file)
    assert table.split.value_counts().to_dict() == {'train': 546, 'valid': 78, 'test': 156} and (table.split == table.official).all()
    assert table.label.value_counts().to_dict() == {'normal, benign': 570, 'malignant': 210}
    assert 'BreastMNIST: 780 images, each its own group' in card(table) and len(table.attrs['anomalies']) == 1
    with np.load(file) as arrays: assert (np.stack(table.image[:546]) == arrays['train_images']).all()
    mapped = read_medmnist(file, memory=0, cache=tmp_path, print_card=False)
    assert (np.stack(mapped.image) == np.stack(table.image)).all() and len(list(tmp_path.iterdir())) == 3
    assert open_image(table.image[0]).size == (28, 28)

@needs('medmnist/breastmnist.npz')
def test_breastmnist_is_found(monkeypatch):
    monkeypatch.setenv('KDMED_INPUT', str(DATA))
    assert len(read_medmnist('breastmnist', download=False)) == 780
