"Data sets as they lie on real disks: every file counted once, every label what was meant, or an error before work starts."
import os
import socket
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kdmed.data import loaders as data
from kdmed.data.datasets import read_medmnist
from kdmed.data.folders import find_files
from kdmed.data.images import card, choose_positive, image_table, open_image, read_dicom, synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.readers import read_csv, read_dicom_folder, read_folder
from kdmed.data.splits import official_split, split_groups


def save(*path, shade=0, side=9):
    "A small gray image, each of another shade"
    file = Path(*path)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), shade % 256, np.uint8)).save(file)
    return file

@pytest.fixture
def folders(tmp_path):
    "Two classes of six images"
    for i in range(12): save(tmp_path/'set', 'ab'[i % 2], f'p{i//4}_{i}.png', shade=20*i)
    return tmp_path/'set'

def read(path, **how): return read_folder(path, print_card=False, **how)
def notes(table): return ' | '.join(table.attrs['anomalies'])


# -- folders

@pytest.mark.parametrize('target', ['.', '..', '../b/..', 'self'])
def test_a_link_that_leads_back_adds_no_image(folders, target):
    (folders/'a'/'self').symlink_to(target)
    if target == 'self':
        assert len(read(folders)) == 12 # a link to itself is no image, and leads nowhere
        return
    table = read(folders)
    assert len(table) == 12 and '1 links left out that lead back to a folder containing them: a/self' in notes(table)

def test_two_folders_that_link_to_each_other(folders):
    (folders/'a/other').symlink_to('../b')
    (folders/'b/other').symlink_to('../a')
    with pytest.raises(ValueError, match='are the same file, by a link, but differ in class'): read(folders)
    assert len(read(folders, exclude='other')) == 12

@pytest.mark.parametrize('link', ['symbolic', 'hard'])
def test_one_file_under_two_names(folders, link):
    make = Path.symlink_to if link == 'symbolic' else Path.hardlink_to
    make(folders/'a/again.png', folders/'a/p0_0.png')
    table = read(folders)
    assert len(table) == 12 and '1 files are links to others and left out' in notes(table)
    make(folders/'b/again.png', folders/'a/p0_0.png')
    with pytest.raises(ValueError, match=r'a/again.png and b/again.png are the same file.*keep one of them'): read(folders)

def test_one_file_in_two_splits(tmp_path):
    for part in ('train', 'test'):
        for c in 'ab':
            for i in range(3): save(tmp_path, part, c, f'{i}.png', shade=i)
    (tmp_path/'valid').symlink_to('train')
    with pytest.raises(ValueError, match='differ in class or split'): read(tmp_path)

def test_a_class_folder_that_links_to_another(folders):
    (folders/'c').symlink_to('a')
    with pytest.raises(ValueError, match='are the same file'): read(folders)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no named pipes')
def test_a_named_pipe_is_never_opened(folders, tmp_path):
    os.mkfifo(folders/'a/pipe.png')
    table = read(folders)
    assert len(table) == 12 and 'a/pipe.png is a named pipe' in notes(table)
    os.mkfifo(tmp_path/'list.csv')
    for wrong in (lambda: open_image(folders/'a/pipe.png'), lambda: read_csv(tmp_path/'list.csv'), lambda: read_medmnist(tmp_path/'list.csv', flag='breastmnist')):
        with pytest.raises(ValueError, match='is a named pipe'): wrong()

def test_devices_and_sockets(folders):
    with pytest.raises(ValueError, match='is a device'): open_image('/dev/zero')
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(folders/'a/s.png'))
        assert 'a/s.png is a socket' in notes(read(folders))

@pytest.mark.skipif(os.name == 'nt' or os.geteuid() != 0, reason='another user is needed, for whom permissions hold')
def test_a_class_folder_that_cannot_be_read(folders):
    for above in folders.parents:
        if above.stat().st_uid == os.geteuid() and above.name.startswith(('pytest', 'popen', 'test')): above.chmod(0o755)
    (folders/'b').chmod(0o700)
    if child := os.fork(): code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    else:
        os.setuid(65534) # nobody
        try: find_files(folders, '.png')
        except PermissionError as e: os._exit(0 if 'b cannot be read' in str(e) and "exclude='b'" in str(e) else 1)
        os._exit(2)
    assert code == 0

def test_a_class_folder_that_cannot_be_read_is_an_error_in_the_reader(folders, monkeypatch):
    scan = os.scandir
    def refuse(path):
        if Path(path).name == 'b': raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError, match='b cannot be read'): read(folders)

def test_an_empty_class_folder(folders):
    (folders/'c/deep').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no images in c, so a class would be missing; .*exclude='c'"): read(folders)
    assert read(folders, exclude='c').attrs['classes'] == ['a', 'b']
    (folders/'c/1.dcm').write_bytes(b'no image by its ending')
    with pytest.raises(FileNotFoundError, match='no images in c'): read(folders)

def test_a_class_that_is_empty_in_one_split_is_noted(tmp_path):
    for part in ('train', 'test'):
        for c in 'ab': save(tmp_path, part, c, f'{part}.png')
    save(tmp_path, 'valid/b', 'v.png')
    (tmp_path/'valid/a').mkdir(parents=True)
    assert 'no images in valid/a' in notes(read(tmp_path))

@pytest.mark.parametrize('name', ['a|b', 'a\nb', 'a\x1bb'])
def test_a_folder_whose_name_can_be_no_class(folders, name):
    save(folders, name, '1.png', shade=99)
    with pytest.raises(ValueError, match='no class name|class name'): read(folders)
    table = read(folders, classes={'a': 'a', 'b': 'b', name: 'either'})
    assert table.attrs['task'] == 'multiclass' and table.attrs['classes'] == ['a', 'b', 'either'] and len(table) == 13

def test_a_folder_whose_name_is_not_unicode(folders):
    try: save(folders, os.fsdecode(b'caf\xe9'), '1.png', shade=99)
    except OSError: pytest.skip('this file system takes Unicode only')
    with pytest.raises(ValueError, match='cannot be printed'): read(folders)

def test_markup_in_a_class_name_is_text(folders):
    save(folders, '<b>c<i>', '1.png', shade=99)
    assert '<b>c<i>' in read(folders).attrs['classes']

def test_hidden_and_junk_files(folders):
    save(folders, '.cache', 'x.png')
    save(folders, 'a', '.x.png')
    save(folders, '__MACOSX', 'a', 'x.png')
    (folders/'a/Thumbs.db').write_bytes(b'x')
    table = read(folders)
    assert len(table) == 12 and '1 files left out that are not images by their extension: .db (1)' in notes(table)

def test_a_link_that_leads_nowhere(folders):
    (folders/'a/lost.png').symlink_to('nowhere.png')
    with pytest.raises(FileNotFoundError, match='1 links lead nowhere: a/lost.png'): read(folders)
    assert len(read(folders, exclude='lost*')) == 12

def test_an_empty_path_is_not_the_current_folder():
    for reader in (read_folder, read_csv, read_dicom_folder):
        with pytest.raises(ValueError, match='the path is empty'): reader('')

def test_files_that_cannot_be_read_say_why(tmp_path):
    file = save(tmp_path, 'big.png', side=100)
    (tmp_path/'empty.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'empty.png: the file is empty \(0 bytes\)'): open_image(tmp_path/'empty.png')
    file.rename(tmp_path/'named.jpg')
    assert open_image(tmp_path/'named.jpg').size == (100, 100) # PNG by its content
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1000
    try:
        with pytest.raises(ValueError, match='has more than 2,000 pixels, which may be an attack'): open_image(tmp_path/'named.jpg')
    finally: Image.MAX_IMAGE_PIXELS = limit

def test_masks_beside_images_are_left_out(folders):
    for i in (0, 2): save(folders, 'a', f'p{i//4}_{i}_mask.png')
    save(folders, 'a', 'p0_0_mask_1.png')
    table = read(folders)
    assert len(table) == 12 and "3 masks left out, such as a/p0_0_mask.png of p0_0.png; masks='keep'" in notes(table)
    assert len(read(folders, masks='keep')) == 15 and len(read(folders, exclude='*_mask*')) == 12
    with pytest.raises(ValueError, match="masks='exclude' leaves them out"): read(folders, masks='error')
    with pytest.raises(ValueError, match='unknown masks'): read(folders, masks='drop')

def test_masks_in_a_folder_of_their_own(folders):
    for i in (0, 2): save(folders, 'a/masks', f'p{i//4}_{i}.png')
    assert len(read(folders)) == 12

def test_what_to_leave_out_and_which_endings(folders):
    save(folders, 'c', 'x.png')
    save(folders, 'a', 'x.bmp')
    assert len(read(folders, exclude='c')) == 13 and len(read(folders, exclude=['C/', '*.bmp'])) == 12
    assert len(read(folders, suffix='.png')) == 13 and len(read(folders, suffix=['png', 'BMP'])) == 14
    for how, message in ((dict(exclude='d'), 'matches nothing'), (dict(exclude=3), 'exclude must be'), (dict(suffix=3), 'suffix must be'), (dict(suffix='.tif'), 'no image files')):
        with pytest.raises((ValueError, FileNotFoundError), match=message): read(folders, **how)

@pytest.mark.parametrize('pattern, groups', [(r'(p\d)_', 3), (r'(x\d)|(p\d)_', 3), (r'(?:(x\d)|(p\d))_', 3), (r'(\d+)\.png', 12), (r'(?P<who>p0)|(p[12])', 3)])
def test_the_first_bracket_that_matches_is_the_group(folders, pattern, groups):
    table = read(folders, group_pattern=pattern)
    assert table.group.nunique() == groups and table.group.notna().all()

def test_an_empty_match_is_no_group(folders):
    with pytest.raises(ValueError, match='does not match 12 file names'): read(folders, group_pattern=r'(q*)')


# -- classes and the positive one

def test_classes_choose_order_part_and_names(folders):
    save(folders, 'c', 'x.png')
    assert read(folders, classes=['c', 'b', 'a']).attrs['classes'] == ['c', 'b', 'a']
    two = read(folders, classes=['b', 'a'])
    assert two.attrs['classes'] == ['b', 'a'] and two.attrs['task'] == 'binary' and "1 images of ['c'], which are not among the classes, left out" in notes(two)
    named = read(folders, classes={'a': 'ill', 'c': 'ill', 'b': 'well'})
    assert named.attrs['classes'] == ['ill', 'well'] and named.label.value_counts().to_dict() == {'ill': 7, 'well': 6}
    with pytest.raises(ValueError, match=r"no folder for classes \['d'\]; it has \['a', 'b', 'c'\]"): read(folders, classes=['a', 'd'])
    with pytest.raises(TypeError, match='classes must be a list'): read(folders, classes='ab')

@pytest.mark.parametrize('names, classes, note', [
    (('Parasitized', 'Uninfected'), ['Uninfected', 'Parasitized'], "positive class is 'Parasitized', since 'Uninfected' sounds like its absence"),
    (('NORMAL', 'PNEUMONIA'), ['NORMAL', 'PNEUMONIA'], ''),
    (('nv', 'mel'), ['mel', 'nv'], "positive class is 'nv', only because it comes second in the alphabet"),
    (('yes', 'no'), ['no', 'yes'], ''),
])
def test_the_positive_class_is_never_silent(tmp_path, names, classes, note):
    for c in names: save(tmp_path, c, '1.png')
    table = read(tmp_path)
    assert table.attrs['classes'] == classes and f'positive class: {classes[1]}' in card(table) and note in card(table)
    assert ('note: the positive class' in card(table)) == bool(note)
    for c in names:
        chosen = read(tmp_path, positive=c)
        assert chosen.attrs['classes'][1] == c and 'note: the positive class' not in card(chosen)
    with pytest.raises(ValueError, match="unknown positive 'other'"): read(tmp_path, positive='other')

def test_positive_needs_two_classes(folders):
    save(folders, 'c', 'x.png')
    with pytest.raises(ValueError, match='needs a binary task'): read(folders, positive='a')
    assert read(folders, classes=['a', 'b'], positive='a').attrs['classes'] == ['b', 'a']

def test_a_chosen_positive_class_reaches_the_targets():
    table = split_groups(synthetic_table(60, classes=['normal', 'carcinoma'], size=16))
    for positive in ('normal', 'carcinoma'):
        dls = image_dls(choose_positive(table, positive), 16)
        y = torch.cat([y for _, y in dls.valid])
        assert [dls.classes[1]] == [positive] and y.tolist() == (table.label[table.split == 'valid'] == positive).astype(int).tolist()


# -- labels

@pytest.mark.parametrize('labels, expected', [
    (np.array([0, 1, 1], np.float32), ['0', '1', '1']), (torch.tensor([0, 1, 1]), ['0', '1', '1']), ([torch.tensor(0.), torch.tensor([1]), None], ['0', '1', None]),
    (np.array([0, 1, 1], np.uint8), ['0', '1', '1']), ([True, False, np.bool_(True)], ['True', 'False', 'True']), (pd.Series([0, None, 1]), ['0', None, '1']),
    (np.array([[0], [1], [1]]), ['0', '1', '1']), ([' a', 'b ', pd.NA], ['a', 'b', None]), (pd.Categorical(['a', 'b', None]), ['a', 'b', None]),
], ids=lambda v: type(v).__name__)
def test_labels_of_every_type_are_text(labels, expected):
    found = image_table('xyz', labels).label
    assert [None if pd.isna(l) else l for l in found] == expected

@pytest.mark.parametrize('labels, error', [
    ([0, 'a', None], 'labels must be of one kind'), ([0, True, 1], 'labels must be of one kind'), ([b'x', b'y', b'x'], 'must be text or whole numbers'),
    ([('t',), ('u',), ('t',)], 'must be text or whole numbers'), ([.5, 1.5, .5], 'must be text or whole numbers'), ([float('inf'), 1., 2.], 'must be text or whole numbers'),
    ([[0, 1], [1, 0], [0, 1]], 'must be text or whole numbers'), (['', 'a', 'b'], 'labels are empty texts'), (['  ', 'a', 'b'], 'labels are empty texts'),
])
def test_labels_that_name_no_class(labels, error):
    with pytest.raises((TypeError, ValueError), match=error): image_table('xyz', labels)

@pytest.mark.parametrize('classes, error', [(3, 'must be a list of class names'), ('ab', 'must be a list of class names'), (['a', None], 'must be names, got None'),
                                            (['a', 'a'], 'repeat'), (['a', ''], 'must not be empty'), ({'a': None}, 'must be names, got None'), (['a', 1.5], 'text or whole numbers')])
def test_classes_that_are_none(classes, error):
    with pytest.raises((TypeError, ValueError), match=error): image_table('xy', ['a', 'b'], classes=classes)

def test_tables_with_an_index_of_several_levels(tmp_path):
    table = split_groups(synthetic_table(60, size=16))
    for index in (['group', 'label'], ['group']):
        wrong = table.set_index(index, drop=False)
        with pytest.raises(ValueError, match='the index must be plain'): image_dls(wrong, 16)


# -- pixels

def dicom(folder, pixels, **tags):
    pydicom = pytest.importorskip('pydicom')
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.2', '1.2.3'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, 'MONOCHROME2'
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.PixelData = 15, int(pixels.dtype == np.int16), pixels.tobytes()
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(folder/'x.dcm', enforce_file_format=True)
    return folder/'x.dcm'

def gray_by_the_standard(x, center, width, function):
    "PS3.3, C.11.2.1.2.1 and C.11.2.1.3.1 and 2, for one value, with 0 to 255 as output"
    if function == 'SIGMOID': return 255/(1 + np.exp(min(-4*(x-center)/width, 700.)))
    if function == 'LINEAR_EXACT':
        if x <= center - width/2: return 0
        return 255 if x > center + width/2 else ((x-center)/width + .5)*255
    if x <= center - .5 - (width-1)/2: return 0
    return 255 if x > center - .5 + (width-1)/2 else ((x - (center-.5))/(width-1) + .5)*255

@pytest.mark.parametrize('function', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
@pytest.mark.parametrize('center, width', [(2048, 1000), (2048, 1), (40, 400), (2047.5, 2), (100, 1.5)])
def test_windows_by_the_formulas_of_the_standard(tmp_path, function, center, width):
    x = np.r_[0, np.linspace(0, 4095, 21).round(), 39, 40, 41, 99, 100, 101, 2046, 2047, 2048, 2049].astype(np.uint16).reshape(2, -1)
    expected = np.array([[gray_by_the_standard(float(v), center, width, function) for v in row] for row in x])
    file = dicom(tmp_path, x, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    assert np.abs(read_dicom(file) - expected).max() <= .5
    assert np.abs(read_dicom(dicom(tmp_path, x), (center, width, function)) - expected).max() <= .5
    assert np.abs(read_dicom(dicom(tmp_path, x, PhotometricInterpretation='MONOCHROME1'), (center, width, function)) - (255-expected)).max() <= .5

@pytest.mark.parametrize('function, width, error', [('LINEAR', .5, 'at least 1'), ('LINEAR', 0, 'at least 1'), ('LINEAR_EXACT', 0, 'above 0'), ('SIGMOID', -1, 'above 0'), ('CURVE', 5, 'unknown window function')])
def test_windows_that_are_none(tmp_path, function, width, error):
    x = np.arange(8, dtype=np.uint16).reshape(2, 4)
    with pytest.raises(ValueError, match=error): read_dicom(dicom(tmp_path, x), (3, width, function))
    with pytest.raises(ValueError, match=f"the file's own window cannot be used: .*{error}.*window=\\(center, width\\)"):
        open_image(dicom(tmp_path, x, WindowCenter=3, WindowWidth=width, VOILUTFunction=function))

def test_a_small_exact_window_is_legal(tmp_path):
    x = np.arange(8, dtype=np.uint16).reshape(2, 4)
    assert read_dicom(dicom(tmp_path, x, WindowCenter=3, WindowWidth=.25, VOILUTFunction='LINEAR_EXACT')).ravel().tolist() == [0, 0, 0, 128, 255, 255, 255, 255]

@pytest.mark.parametrize('photometric', ['MONOCHROME1', 'MONOCHROME2'])
@pytest.mark.parametrize('window', [{}, dict(WindowCenter=2048, WindowWidth=4096)])
def test_padding_is_black_and_stretches_no_window(tmp_path, photometric, window):
    x = np.tile(np.linspace(0, 4095, 8).round(), (4, 1)).astype(np.int16)
    plain = read_dicom(dicom(tmp_path, x, PhotometricInterpretation=photometric, **window))
    padded = x.copy()
    padded[0], padded[1] = -2000, -1990
    gray = read_dicom(dicom(tmp_path, padded, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990, PhotometricInterpretation=photometric, **window))
    assert (gray[:2] == 0).all() and (gray[2:] == plain[2:]).all()

def test_what_is_transparent_shows_black(tmp_path):
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[:, :4], hidden[:, 4:] = (200, 10, 10, 0), (50, 60, 70, 255)
    Image.fromarray(hidden, 'RGBA').save(tmp_path/'a.png')
    shown = np.asarray(open_image(tmp_path/'a.png'))
    assert (shown[:, :4] == 0).all() and (shown[:, 4:] == (50, 60, 70)).all()
    assert (np.asarray(open_image(Image.fromarray(hidden[..., :3]).convert('RGBA'))) == hidden[..., :3]).all()


# -- lists

@pytest.fixture
def listed(tmp_path):
    for i in range(4): save(tmp_path, f'i{i}.png', shade=60*i)
    return pd.DataFrame(dict(image=[f'i{i}.png' for i in range(4)], label=['Nävus', 'b']*2, group=list('wxyz')))

def from_csv(folder, table, **how):
    writing = {k: how.pop(k) for k in ('sep', 'encoding') if k in how and k != 'encoding'}
    table.to_csv(folder/'list.csv', index=False, encoding=how.pop('written', 'utf-8'), **writing)
    return read_csv(folder/'list.csv', print_card=False, **how)

@pytest.mark.parametrize('sep', [',', ';', '\t', '|'])
@pytest.mark.parametrize('written', ['utf-8', 'utf-8-sig', 'cp1252', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_lists_of_every_separator_and_encoding(tmp_path, listed, sep, written):
    table = from_csv(tmp_path, listed, sep=sep, written=written)
    assert table.label.tolist() == ['Nävus', 'b']*2 and table.group.tolist() == list('wxyz') and [f.name for f in table.image] == listed.image.tolist()
    assert ('read as Windows-1252' in notes(table)) == (written == 'cp1252')

def test_an_encoding_can_be_named(tmp_path, listed):
    cyrillic = listed.assign(label=['невус', 'b']*2)
    assert from_csv(tmp_path, cyrillic, written='cp1251', encoding='cp1251').label[0] == 'невус'
    with pytest.raises(ValueError, match='is not text in ascii'): from_csv(tmp_path, listed, encoding='ascii')
    with pytest.raises(ValueError, match='unknown encoding'): from_csv(tmp_path, listed, encoding='klingon')

@pytest.mark.parametrize('names', [
    ['i0', 'i1', 'i2', 'i3'], ['x/i0.png', 'x/i1.png', 'x/i2.png', 'x/i3.png'], ['C:\\films\\i0.png', 'i1', 'i2.jpg', 'I3.PNG']])
def test_images_are_found_by_what_is_left_of_their_name(tmp_path, listed, names):
    table = from_csv(tmp_path, listed.assign(image=names))
    assert [f.name for f in table.image] == [f'i{i}.png' for i in range(4)] and 'images found by' in notes(table)

def test_images_are_found_by_their_number(tmp_path, listed):
    for i in range(4): save(tmp_path, 'n', f'{i:05d}.png', shade=i)
    for names in (['0', '1', '2', '3'], [0., 1., 2., 3.], ['000', '001', '0002', '3']):
        assert [f.name for f in from_csv(tmp_path, listed.assign(image=names), images=tmp_path/'n').image] == [f'{i:05d}.png' for i in range(4)]

def test_a_name_of_two_files_is_refused(tmp_path, listed):
    save(tmp_path, 'deep', 'i0.png')
    assert from_csv(tmp_path, listed).image[0] == tmp_path/'i0.png' # as it is written
    with pytest.raises(ValueError, match=r"'x/i0.png' could mean (i0.png, deep/i0.png|deep/i0.png, i0.png)"): from_csv(tmp_path, listed.assign(image=['x/i0.png', 'i1', 'i2', 'i3']))
    with pytest.raises(ValueError, match="'i1.png' and 'i1' both mean"): from_csv(tmp_path, listed.assign(image=['i0.png', 'i1.png', 'i1', 'i3.png']))
    (tmp_path/'twin.png').symlink_to('i3.png')
    with pytest.raises(ValueError, match="'i3.png' and 'twin.png' are the same file"): from_csv(tmp_path, listed.assign(image=['i3.png', 'twin.png', 'i1.png', 'i2.png']))

@pytest.mark.parametrize('cells, label, task, classes', [
    ([[1., 0, 0], [0., 1, 0], [0, 0, 1.], [1, 0, 0]], ['b', 'Nävus', 'c', 'b'], 'multiclass', ['b', 'Nävus', 'c']),
    ([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]], ['b|c', '', 'Nävus', 'b'], 'multilabel', ['b', 'Nävus', 'c']),
    ([[1, -1, 0], [0, 1, None], [0, 1, 0], [None, None, None]], ['b|?Nävus', 'Nävus|?c', 'Nävus', None], 'multilabel', ['b', 'Nävus', 'c']),
    ([[True, False, False], [False, True, False], [False, False, True], [True, False, False]], ['b', 'Nävus', 'c', 'b'], 'multiclass', ['b', 'Nävus', 'c']),
])
def test_one_column_for_each_class(tmp_path, listed, cells, label, task, classes):
    columns = ['b', 'Nävus', 'c']
    wide = listed.drop(columns='label').join(pd.DataFrame(cells, columns=columns))
    table = from_csv(tmp_path, wide, label=columns)
    assert [None if pd.isna(l) else l for l in table.label] == label and table.attrs['task'] == task and table.attrs['classes'] == classes
    assert not set(columns) & set(table)

def test_two_columns_are_a_binary_task(tmp_path, listed):
    wide = listed.drop(columns='label').assign(MEL=[1., 0, 0, 1], NV=[0., 1, 1, 0])
    table = from_csv(tmp_path, wide, label=['MEL', 'NV'], positive='MEL')
    assert (table.label.tolist(), table.attrs['task'], table.attrs['classes']) == (['MEL', 'NV', 'NV', 'MEL'], 'binary', ['NV', 'MEL'])
    with pytest.raises(ValueError, match="NV must be 1, 0, or empty for unknown, got '2' for i0.png"): from_csv(tmp_path, wide.assign(NV=[2, 1, 1, 0]), label=['MEL', 'NV'])
    with pytest.raises(ValueError, match='needs exactly one 1 in .* for every image, i0.png has'): from_csv(tmp_path, wide.assign(NV=1), label=['MEL', 'NV'], task='binary')
    with pytest.raises(ValueError, match="missing column \\['BCC'\\]"): from_csv(tmp_path, wide, label=['MEL', 'BCC'])

@pytest.mark.parametrize('text, error', [
    ('image,label,group\ni0.png,a\n', 'line 2 has 2 cells, the header has 3'), ('image,label,group\ni0.png,a,w,x\n', 'line 2 has 4 cells'),
    ('image,label,group\ni0.png,"a,w\n', 'a quotation mark may be open'), ('image,label,group\n', 'no rows below the header'), ('', 'it is empty'),
    ('image,label,label,group\ni0.png,a,b,w\n', "columns \\['label'\\] repeat"), ('image,label,group\ni0.png,' + 'x'*2**20 + ',w\n', 'line 2: field larger than field limit'),
    ('i0.png,a,w\ni1.png,b,x\n', "missing column \\['image', 'label', 'group'\\]"),
])
def test_lists_that_are_damaged(tmp_path, listed, text, error):
    (tmp_path/'list.csv').write_text(text)
    with pytest.raises(ValueError, match=error): read_csv(tmp_path/'list.csv')

def test_a_name_that_is_too_long_is_shortened(tmp_path, listed):
    with pytest.raises(FileNotFoundError) as error: from_csv(tmp_path, listed.assign(image=['x'*100_000, 'i1.png', 'i2.png', 'i3.png']))
    assert 'not found: xxx' in str(error.value) and len(str(error.value)) < 500

def test_a_column_that_holds_no_classes(tmp_path):
    for i in range(20): save(tmp_path, f'i{i}.png', shade=i)
    table = pd.DataFrame(dict(image=[f'i{i}.png' for i in range(20)], label=[f'n{i}' for i in range(20)], group=range(20)))
    with pytest.raises(ValueError, match='all 20 labels differ, such as n0, n1, n2 and 17 more: label does not contain classes'): from_csv(tmp_path, table)
    with pytest.raises(ValueError, match='label contains numbers such as 0.05, not classes'): from_csv(tmp_path, table.assign(label=[f'{.05+i//2*.1:.2f}' for i in range(20)]))

@pytest.mark.parametrize('label, expected', [
    (['0', '1.0', '1', '0.0'], ['0', '1', '1', '0']), ([' a', 'a ', 'b', '  '], ['a', 'a', 'b', None]), ([0., 1., None, 1.], ['0', '1', None, '1']), (['007', '7', '7', '007'], ['007', '7', '7', '007'])])
def test_labels_in_a_list(tmp_path, listed, label, expected):
    assert [None if pd.isna(l) else l for l in from_csv(tmp_path, listed.assign(label=label)).label] == expected

def test_a_label_called_nan_is_noted(tmp_path, listed):
    (tmp_path/'list.csv').write_text('image,label,group\ni0.png,nan,w\ni1.png,b,x\ni2.png,b,y\n')
    assert "'nan' counts as a class" in notes(read_csv(tmp_path/'list.csv', print_card=False))


# -- splits

def test_a_split_column_with_blank_cells(tmp_path, listed):
    listed['split'] = ['train', ' ', 'valid', 'test']
    with pytest.raises(ValueError, match=r"1 of 4 rows have no split, such as i1.png; fill it in, .*unlisted='drop'.*unlisted='train'.*split=''"): from_csv(tmp_path, listed)
    dropped = from_csv(tmp_path, listed, unlisted='drop', classes=['Nävus', 'b'])
    assert dropped.split.tolist() == ['train', 'valid', 'test'] and '1 of 4 rows have no split, left out' in notes(dropped) and len(dropped) == 3
    assert from_csv(tmp_path, listed, unlisted='train').split.tolist() == ['train', 'train', 'valid', 'test']
    anew = from_csv(tmp_path, listed, split='')
    assert anew.split.isna().all() and anew.listed_split.fillna('').tolist() == ['train', ' ', 'valid', 'test']
    assert from_csv(tmp_path, listed.assign(split='')).split.isna().all() # an empty column says nothing
    with pytest.raises(ValueError, match='unknown unlisted'): from_csv(tmp_path, listed, unlisted='keep')

def test_a_hand_made_table_with_blank_splits():
    table = split_groups(synthetic_table(60, size=16))
    table.loc[3, 'split'] = None
    with pytest.raises(ValueError, match="1 of 60 rows have no split, .*unlisted='drop'"): image_dls(table, 16)
    assert len(official_split(table, 'split', unlisted='drop')) == 59

@pytest.mark.parametrize('form', ['folders', 'csv'])
def test_no_validation_part_names_the_cure(tmp_path, form):
    for part in ('Training', 'Testing'):
        for i in range(24): save(tmp_path, part, 'ab'[i % 2], f'{part}{i}.png', shade=i)
    table = read(tmp_path)
    if form == 'csv':
        listed = pd.DataFrame(dict(image=[f.name for f in table.image], label=table.label, group=range(48), split=[f.parts[-3] for f in table.image]))
        table = from_csv(tmp_path, listed)
    assert set(table.split) == {'train', 'test'}
    with pytest.raises(ValueError, match=r"no images in split \['valid'\]; official_split\(table, 'split'\) moves some groups from train"): image_dls(table, 8)
    dls = image_dls(official_split(table, 'split'), 8)
    assert len(dls.valid_ds) >= 2 and set(dls.test.table.image) == set(table.image[table.split == 'test'])

def test_one_patient_cannot_be_split(tmp_path):
    one = split_groups(synthetic_table(60, size=16).assign(group='p'))
    with pytest.raises(ValueError, match="all 60 images are of one group, 'p', and a group is never split"): image_dls(one, 16)
    two = split_groups(synthetic_table(60, size=16, tiles_per_patient=30))
    with pytest.raises(ValueError, match='there are only 2 groups'): image_dls(two.assign(split='train'), 16)


# -- npz

def npz(file, **changes):
    rng = np.random.default_rng(0)
    arrays = {f'{s}_{what}': rng.integers(0, 2, (n, 1)) if what == 'labels' else rng.integers(0, 256, (n, 28, 28), np.uint8)
              for s, n in (('train', 6), ('val', 3), ('test', 3)) for what in ('images', 'labels')}
    np.savez(file, **{**arrays, **changes})
    return file

@pytest.mark.parametrize('name, error', [('foomnist.npz', 'contains none of the sets; pass flag'), ('breastmnist-pathmnist.npz', r"contains several of the sets, \['pathmnist', 'breastmnist'\]; pass flag")])
def test_npz_files_of_unknown_name(tmp_path, name, error):
    with pytest.raises(ValueError, match=error): read_medmnist(npz(tmp_path/name))
    assert len(read_medmnist(tmp_path/name, flag='breastmnist', print_card=False)) == 12

@pytest.mark.parametrize('part', ['train', 'val', 'test'])
def test_npz_files_without_images(tmp_path, part):
    npz(tmp_path/'breastmnist.npz', **{f'{part}_images': np.zeros((0, 28, 28), np.uint8), f'{part}_labels': np.zeros((0, 1), int)})
    with pytest.raises(ValueError, match=f'{part}_images contains no images'): read_medmnist(tmp_path/'breastmnist.npz')

@pytest.mark.parametrize('memory', [0, 1, 100])
def test_an_npz_header_that_claims_too_much(tmp_path, memory):
    import io
    file = npz(tmp_path/'breastmnist.npz')
    with zipfile.ZipFile(file) as old: members = {n: old.read(n) for n in old.namelist()}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr='|u1', fortran_order=False, shape=(12_000_000, 28, 28)))
    members['train_images.npy'] = header.getvalue() + bytes(100)
    with zipfile.ZipFile(file, 'w') as new:
        for n, content in members.items(): new.writestr(n, content)
    with pytest.raises(ValueError, match=r'train_images.npy should have 9,408,000,000 bytes by its header, .* but has 100'): read_medmnist(file, memory=memory, cache=tmp_path)

def test_the_positive_class_of_a_published_set(tmp_path):
    file = npz(tmp_path/'breastmnist.npz')
    table = read_medmnist(file, print_card=False)
    assert "positive class is 'normal, benign', which sounds like an absence; positive='malignant'" in card(table)
    assert read_medmnist(file, positive='malignant', print_card=False).attrs['classes'] == ['normal, benign', 'malignant']


# -- loading

@pytest.mark.parametrize('how', [dict(size=True), dict(size='64'), dict(size=64.), dict(size=0), dict(bs=0), dict(bs=True), dict(num_workers=-1), dict(num_workers='2'), dict(num_workers=1.), dict(views=0), dict(views=True)])
def test_numbers_of_image_dls(how):
    table = split_groups(synthetic_table(60, size=16))
    with pytest.raises((ValueError, TypeError), match=f'{next(iter(how))} must be a whole number of at least'): image_dls(table, **{'size': 16, **how})

def test_a_size_beyond_all_memory_is_refused_before_work():
    with pytest.raises(ValueError, match=r'a batch of 64 images of 10,000,000 pixels takes .* GB, .* GB of memory are free'):
        image_dls(split_groups(synthetic_table(60, size=16)), 10_000_000)

def test_a_batch_larger_than_the_set():
    dls = image_dls(split_groups(synthetic_table(120, classes=2, size=16)), 16, bs=1000)
    assert len(dls.train) == 1 and len(dls.one_batch()[0]) == dls.train.n

def test_images_that_would_fill_memory_go_into_a_store(tmp_path, monkeypatch, capsys):
    table = split_groups(synthetic_table(60, classes=2, size=16))
    monkeypatch.setenv('KDMED_STORE', str(tmp_path))
    monkeypatch.setattr(data, 'available_memory', lambda: 4*data.decoded_bytes(60, 16))
    fits = image_dls(table, 16, bs=4)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ''
    monkeypatch.setattr(data, 'available_memory', lambda: 4*data.decoded_bytes(60, 16) - 1)
    packed = image_dls(table, 16, bs=4)
    said = capsys.readouterr().out
    assert '60 decoded images of 16 pixels would take' in said and 'more than a quarter' in said and str(tmp_path) in said
    assert list(tmp_path.glob('16px-*')) and torch.equal(fits.valid.one_batch()[0], packed.valid.one_batch()[0])

def test_free_memory_is_that_of_the_system():
    free = data.available_memory()
    assert free is None or 2**20 < free < 2**50
    if Path('/proc/meminfo').exists(): assert free <= int(next(l for l in Path('/proc/meminfo').read_text().splitlines() if l.startswith('MemTotal')).split()[1])*1024


# -- more of the same kinds

def test_an_empty_split_folder_is_noted(tmp_path):
    for part in ('train', 'test'):
        for c in 'ab': save(tmp_path, part, c, f'{part}.png')
    (tmp_path/'valid').mkdir()
    assert 'no images in valid' in notes(read(tmp_path))

def test_classes_that_are_called_mask(tmp_path):
    for c in ('mask', 'no_mask'): save(tmp_path, c, '1.png', shade=len(c))
    with pytest.raises(FileNotFoundError, match="no images in mask, .*masks='keep' reads what was taken for masks"): read(tmp_path)
    assert read(tmp_path, masks='keep').attrs['classes'] == ['no_mask', 'mask']

@pytest.mark.parametrize('label', [(), None, 3, ['a', 'a'], ['a', 3], ''])
def test_label_must_name_columns(tmp_path, listed, label):
    with pytest.raises(ValueError, match='label must be the name of a column'): from_csv(tmp_path, listed, label=label)

@pytest.mark.parametrize('start', [b'PK\x03\x04', b'\xd0\xcf\x11\xe0', b'\x1f\x8b'])
def test_a_spreadsheet_is_no_list(tmp_path, start):
    (tmp_path/'list.csv').write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match='a spreadsheet or archive; save it as CSV'): read_csv(tmp_path/'list.csv')

def test_a_folder_of_dicom_files_in_the_same_way(tmp_path):
    for i, c in enumerate(('ill', 'normal', 'ill', 'normal')):
        (tmp_path/'d'/c).mkdir(parents=True, exist_ok=True)
        dicom(tmp_path, np.full((4, 4), i, np.uint16), PatientID=f'p{i}').rename(tmp_path/'d'/c/f'{i}.dcm')
    def films(**how): return read_dicom_folder(tmp_path/'d', print_card=False, **how)
    assert films().attrs['classes'] == ['normal', 'ill'] and films(positive='normal').attrs['classes'] == ['ill', 'normal']
    assert films(classes={'ill': 'krank', 'normal': 'gesund'}).label.tolist() == ['krank', 'krank', 'gesund', 'gesund']
    assert len(films(exclude='3.dcm')) == 3
    (tmp_path/'d/ill/up').symlink_to('..')
    assert len(films()) == 4
    (tmp_path/'d/normal/again.dcm').symlink_to('../ill/0.dcm')
    with pytest.raises(ValueError, match='are the same file'): films()
    (tmp_path/'d/normal/again.dcm').unlink()
    (tmp_path/'d/other').mkdir()
    with pytest.raises(FileNotFoundError, match='no images in other'): films()
    (tmp_path/'d/other').rmdir()
    rows = pd.DataFrame(dict(image=['0', '1', '2', '3'], label=['a', 'b']*2, split=['train', '', 'valid', 'test']))
    rows.to_csv(tmp_path/'list.csv', index=False, sep=';')
    with pytest.raises(ValueError, match='1 of 4 rows have no split, such as 1'): films(labels=tmp_path/'list.csv')
    assert films(labels=tmp_path/'list.csv', unlisted='drop').split.tolist() == ['train', 'valid', 'test']

def test_groups_of_every_type_hold_images_together():
    "A tensor is equal to no other as a key, so each image would have been a group of its own"
    for groups in (torch.tensor([0, 0, 1, 1]), [torch.tensor([0])]*2 + [torch.tensor(1)]*2, np.array([0, 0, 1, 1], np.float32), ['p ', 'p', ' q', 'q']):
        assert image_table('wxyz', 'abab', groups=groups).group.nunique() == 2
    with pytest.raises(TypeError, match='groups must be texts or numbers'): image_table('wxyz', 'abab', groups=[[0, 1]]*4)

def test_a_positive_class_called_0():
    assert image_table('xy', [0, 1], positive=0).attrs['classes'] == ['1', '0']

def test_a_table_without_images_in_some_rows():
    for nothing in (None, float('nan')):
        with pytest.raises(ValueError, match='1 rows have no image'): image_table(['a', nothing], 'xy')

def test_columns_with_two_meanings(tmp_path, listed):
    for how in (dict(group='label'), dict(label='image'), dict(label=['label', 'group'])):
        with pytest.raises(ValueError, match='cannot be a column of labels and of images, groups or splits at once'): from_csv(tmp_path, listed, **how)
    with pytest.raises(TypeError, match='suffix must be text'): from_csv(tmp_path, listed, suffix=None)
    with pytest.raises(NotADirectoryError, match='is a file; images='): from_csv(tmp_path, listed, images=tmp_path/'i0.png')
