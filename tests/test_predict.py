"The commands for a finished student: predictions, reports of predictions, another site; and what they refuse"
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kdmed import cli
from kdmed.data.images import image_table, synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.models import create_student, save_student, set_model_stats
from kdmed.ship import (
    OnnxModel, compare_prediction_files, evaluate_bundle, load_bundle, predict_files, save_bundle)

onnx = pytest.importorskip('onnx')
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')
CLASSES = ['benign', 'malignant']
GROUPS = '--group-pattern',r'(\d+)_'


def tissue(n, size, seed):
    "Synthetic images of two classes"
    made = synthetic_table(n, classes=2, size=size, seed=seed)
    made['label'],made.attrs['classes'] = made.label.map(dict(zip(made.attrs['classes'], CLASSES))),CLASSES
    return made


def by_hand(path, classes=CLASSES, **changes):
    "An ONNX file of three nodes, without PyTorch: the logit is the mean of red minus that of green"
    from onnx import TensorProto, helper, numpy_helper
    def tensor(name, kind, shape): return helper.make_tensor_value_info(name, kind, shape)
    nodes = [helper.make_node('Cast', ['images'], ['pixels'], to=TensorProto.FLOAT),
             helper.make_node('ReduceMean', ['pixels', 'sides'], ['means'], keepdims=0),
             helper.make_node('MatMul', ['means', 'weights'], ['logits']),
             helper.make_node('Sigmoid', ['logits'], ['second']),
             helper.make_node('Sub', ['one', 'second'], ['first']),
             helper.make_node('Concat', ['first', 'second'], ['probabilities'], axis=1)]
    weights = [numpy_helper.from_array(np.array([1, 2]), 'sides'), numpy_helper.from_array(np.float32([1]), 'one'),
               numpy_helper.from_array(np.float32([[.1], [-.1], [0]]), 'weights')]
    outputs = [tensor(name, TensorProto.FLOAT, ['batch', n]) for n,name in enumerate(('logits', 'probabilities'), 1)]
    images = tensor('images', TensorProto.UINT8, ['batch', 'height', 'width', 3])
    proto = helper.make_model(helper.make_graph(nodes, 'by hand', [images], outputs, weights),
                              opset_imports=[helper.make_opsetid('', 18)], ir_version=8)
    facts = dict(kdmed_format=1, model='by hand', task='binary', classes=classes, size=8, temperature=1.,
                 thresholds={classes[1]: .3}, mean=[0, 0, 0], std=[1, 1, 1], preprocess=[], exits=0) | changes
    helper.set_model_props(proto, {k: v if isinstance(v, str) else json.dumps(v) for k,v in facts.items()})
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    student = set_model_stats(create_student('test_resnet', CLASSES, 32, 'binary').eval(), .5, .2)
    table = split_groups(tissue(160, 32, 2), sizes=(.2, .4, .4))
    dls = image_dls(table, 32, bs=32)
    return save_bundle(student, tmp_path_factory.mktemp('bundles')/'bundle', valid=dls.valid, test=dls.test)


@pytest.fixture
def place(tmp_path):
    "Images of two classes, in folders and as lists, and an ONNX file"
    made = tissue(12, 24, 1)
    for i,r in enumerate(made.itertuples()):
        (tmp_path/'images'/r.label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(r.image).save(tmp_path/'images'/r.label/f'{r.group.split()[1]}_{i}.png')
    by_hand(tmp_path/'student.onnx')
    return tmp_path


def kdmed(capsys, *argv):
    status = cli.main([str(a) for a in argv])
    return status,*capsys.readouterr()


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob('*') if f.is_file()}


def read(path): return pd.read_csv(path, keep_default_na=False)


# -- predict

def test_predictions_are_right(place):
    "By hand: mean red minus mean green"
    done = predict_files(place/'student.onnx', place/'images', place/'p.csv', bs=5)
    table = read(done.file)
    assert len(table)==done.images==12 and not done.unreadable
    for r in table.itertuples():
        red,green,_ = np.asarray(Image.open(r.image)).reshape(-1, 3).mean(0)
        p = 1/(1+np.exp(-(red-green)/10))
        assert abs(r.probability_malignant-p) < 1e-4 and r.decision==CLASSES[int(p > .3)]


def test_a_bundle_predicts_files_as_it_does_images(bundle, place):
    table = read(predict_files(bundle, place/'images', place/'p.csv').file)
    expected = load_bundle(bundle).predict([Image.open(i) for i in table.image])
    assert np.allclose(table[['probability_benign', 'probability_malignant']], expected, atol=1e-6)


def damage(place, kind):
    "A damaged or hostile student"
    file,data = place/'student.onnx',(place/'student.onnx').read_bytes()
    if kind=='truncated': file.write_bytes(data[:200])
    if kind=='foreign': file.write_text('<html>not found</html>')
    if kind=='empty': file.write_bytes(b'')
    if kind=='newer': by_hand(file, kdmed_format=99)
    if kind=='classes': by_hand(file, classes=['a', 'b'], thresholds=dict(c=.5))
    if kind=='json': by_hand(file, mean='[[[[')
    if kind=='size': by_hand(file, size=0)
    if kind=='exits': by_hand(file, exits=10**9) # as many names would fill the memory
    if kind=='negative': by_hand(file, exits=-1)
    if kind=='stats': by_hand(file, mean=[1, 2, 3, 4, 5])
    if kind=='infinite': by_hand(file, std='[1, 1, Infinity]')
    if kind=='external':
        proto = onnx.ModelProto.FromString(data)
        proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        proto.graph.initializer[0].external_data.add(key='location', value='../../../etc/passwd')
        file.write_bytes(proto.SerializeToString())
    if kind=='operation':
        proto = onnx.ModelProto.FromString(data)
        proto.graph.node[1].op_type = 'Nonsense'
        file.write_bytes(proto.SerializeToString())
    return file


@pytest.mark.parametrize('kind,said', [
    ('truncated', 'is not an ONNX file'), ('foreign', 'is not an ONNX file'), ('empty', 'it has 0 bytes'),
    ('newer', 'of a newer kdmed'), ('classes', 'thresholds of a binary task'), ('json', 'property mean'),
    ('size', 'property size cannot be 0'), ('exits', 'property exits cannot be 1000000000'),
    ('negative', 'property exits cannot be -1'), ('stats', 'property mean cannot be'),
    ('infinite', 'property std cannot be'),
    ('external', 'refers to other files'),
    ('operation', 'cannot be run by onnxruntime')])
def test_a_damaged_onnx_file_predicts_nothing(place, capsys, kind, said):
    file = damage(place, kind)
    before = contents(place)
    status,_,err = kdmed(capsys, 'predict', file, place/'images', '--out', place/'p.csv')
    assert status==2 and said in err and 'student.onnx' in err, err
    assert contents(place)==before


@pytest.mark.parametrize('name', ['student.safetensors', 'student.json'])
@pytest.mark.parametrize('how', ['truncated', 'foreign', 'header'])
def test_a_damaged_bundle_predicts_nothing(place, bundle, capsys, name, how):
    import shutil
    shutil.copytree(bundle, place/'bundle')
    file = place/'bundle'/name
    data = file.read_bytes()
    header = (2**60).to_bytes(8, 'little')+data[8:]
    file.write_bytes(dict(truncated=data[:len(data)//2], foreign=b'<html>', header=header)[how])
    before = contents(place)
    for command in (['predict', place/'bundle', place/'images', '--out', place/'p.csv'],
                    ['export', place/'bundle', '--onnx', place/'e.onnx'],
                    ['evaluate', place/'bundle', '--data', place/'images', '--out', place/'site', '--quiet']):
        status,_,err = kdmed(capsys, *command)
        assert status==2 and name in err, err
    assert contents(place)==before and not (place/'site').exists()


def wrong_images(place):
    "{case: (what is given as images, what the error says)}"
    (place/'empty').mkdir()
    (place/'texts').mkdir()
    (place/'texts'/'a.txt').write_text('')
    os.mkfifo(place/'pipe.png')
    os.mkfifo(place/'pipe.csv')
    (place/'columns.csv').write_text('file,label\na.png,b\n')
    (place/'blank.csv').write_text('image,label\na.png,b\n,c\n')
    (place/'rows.csv').write_text('image\n')
    (place/'zip.csv').write_bytes(b'PK\x03\x04' + bytes(100))
    (place/'twice.csv').write_text('image,label\na.png,b\na.png,c\n')
    return {'none': ('gone', 'not found'), 'empty': ('empty', 'contains no images, but no files'),
            'texts': ('texts', 'contains no images, but 1 other files'), 'pipe': ('pipe.png', 'is a named pipe'),
            'list pipe': ('pipe.csv', 'is a named pipe'), 'columns': ('columns.csv', 'has no column image'),
            'blank': ('blank.csv', 'name no image'), 'rows': ('rows.csv', 'no rows below the header'),
            'zip': ('zip.csv', 'zip.csv'), 'twice': ('twice.csv', 'is listed twice')}


def test_images_that_are_none_are_named(place, capsys):
    wrong,before = wrong_images(place),contents(place)
    for name,said in wrong.values():
        status,_,err = kdmed(capsys, 'predict', place/'student.onnx', place/name, '--out', place/'p.csv')
        assert status==2 and said in err and name in err, err
    status,_,err = kdmed(capsys, 'predict', place/'student.onnx', '--out', place/'p.csv')
    assert status==2 and 'needs images' in err
    assert contents(place)==before


def test_places_that_cannot_be_written(place, capsys, monkeypatch):
    import kdmed.core.files as module
    (place/'there.csv').write_text('mine')
    line = ['predict', place/'student.onnx', place/'images', '--out']
    for name,said in (('there.csv', '--force to replace it'), ('images', 'is a folder'),
                      ('p.txt', 'must end in .csv'), ('gone/p.csv', 'there is no folder')):
        status,_,err = kdmed(capsys, *line, place/name)
        assert status==2 and '--out' in err and said in err, err
    monkeypatch.setattr(module, 'is_writable', lambda folder: False)
    status,_,err = kdmed(capsys, *line, place/'p.csv')
    assert status==2 and '--out' in err and 'read-only' in err, err
    assert (place/'there.csv').read_text()=='mine' and not list(place.glob('.*'))


def test_force_replaces_a_file(place, capsys):
    (place/'p.csv').write_text('old')
    status,out,err = kdmed(capsys, 'predict', place/'student.onnx', place/'images', '--out', place/'p.csv', '--force')
    assert status==0 and '12 images' in out and len(read(place/'p.csv'))==12, err


@pytest.mark.skipif(sys.platform!='linux', reason='file names of any bytes')
def test_names_of_any_bytes(place):
    folder = place/'odd'
    folder.mkdir()
    data = next((place/'images').rglob('*.png')).read_bytes()
    for name in (b'new\nline.png', b'comma,"quote".png', b'invalid\xff.png', 'ümläut.png'.encode(), b'=1+1.png'):
        Path(os.fsdecode(os.fsencode(folder)+b'/'+name)).write_bytes(data)
    done = predict_files(place/'student.onnx', folder, place/'p.csv', bs=2)
    with open(place/'p.csv', newline='', encoding='utf-8', errors='surrogateescape') as f: rows = list(csv.reader(f))
    assert done.images==5 and not done.unreadable
    assert sorted(r[0] for r in rows[1:])==sorted(str(f) for f in folder.iterdir())


def test_dicom_files_named_by_a_uid(place):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    ds.Rows,ds.Columns,ds.SamplesPerPixel,ds.PhotometricInterpretation = 8,8,1,'MONOCHROME2'
    ds.BitsAllocated,ds.BitsStored,ds.HighBit,ds.PixelRepresentation = 16,12,11,0
    ds.PixelData = np.arange(64, dtype=np.uint16).tobytes()
    (place/'dicom').mkdir()
    pydicom.dcmwrite(place/'dicom'/'1.2.840.99', ds, enforce_file_format=True)
    (place/'dicom'/'README').write_text('no image')
    done = predict_files(place/'student.onnx', place/'dicom', place/'p.csv')
    assert (done.images, done.unreadable)==(1, 0) and abs(read(place/'p.csv').probability_malignant[0]-.5) < 1e-6


def without_numbers(place):
    "The ONNX file with a weight that is NaN"
    from onnx import numpy_helper
    proto = onnx.ModelProto.FromString((place/'student.onnx').read_bytes())
    weights, = [t for t in proto.graph.initializer if t.name=='weights']
    weights.CopyFrom(numpy_helper.from_array(np.float32([[np.nan], [0], [0]]), 'weights'))
    (place/'nan.onnx').write_bytes(proto.SerializeToString())
    return place/'nan.onnx'


def test_no_decision_without_numbers(place, capsys):
    "A student that computes NaN has not said benign"
    status,out,err = kdmed(capsys, 'predict', without_numbers(place), place/'images', '--out', place/'p.csv')
    table = read(place/'p.csv')
    assert status==1 and '12 could not be' in out
    assert (table.decision=='').all() and (table.probability_benign=='').all()
    assert table.error.str.contains('no finite numbers').all()
    with pytest.raises(ValueError, match='those of image 0 are not'):
        OnnxModel(place/'nan.onnx').predict(np.zeros((8, 8, 3), np.uint8), 'decisions')


def test_images_of_kinds_that_are_not_read_are_listed(place):
    for name in ('phone.heic', 'slide.mrxs', 'head.nii.gz', 'notes.md', 'scan.mhd'):
        (place/'images'/name).write_text('?')
    shutil.copy(next((place/'images').rglob('*.png')), place/'images'/'a.jfif')
    table = read(predict_files(place/'student.onnx', place/'images', place/'p.csv').file)
    failed = table[table.error!=''].image.map(lambda i: Path(i).name)
    assert len(table)==17 and sorted(failed)==['head.nii.gz', 'phone.heic', 'scan.mhd', 'slide.mrxs']


def test_filters_that_are_not_those_of_the_training_are_noted(place, capsys):
    line = 'predict',place/'student.onnx',place/'images','--out',place/'p.csv','--force','--preprocess','median'
    assert 'go through MedianFilter' in kdmed(capsys, *line)[2]
    by_hand(place/'student.onnx', preprocess=['CLAHE()'])
    assert 'the student was trained on went through CLAHE()' in kdmed(capsys, *line)[2]


def test_large_images_make_small_batches(place, monkeypatch):
    import kdmed.ship.predict as module
    seen = []
    model = module.open_model(place/'student.onnx')
    real = model.predict
    monkeypatch.setattr(model, 'predict', lambda images, **more: seen.append(len(images)) or real(images, **more))
    monkeypatch.setattr(module, 'BATCH_PIXELS', 3*24*24)
    predict_files(model, place/'images', place/'p.csv', bs=32)
    assert seen==[3]*4


def test_another_student_does_not_resume(place):
    def stop(done, total): raise KeyboardInterrupt
    how = place/'student.onnx',place/'images',place/'p.csv'
    with pytest.raises(KeyboardInterrupt): predict_files(*how, bs=4, progress=stop)
    by_hand(place/'student.onnx', thresholds=dict(malignant=.9))
    assert predict_files(*how).resumed==0
    assert not list(place.glob('.p.csv*'))


def many(place, n):
    "A folder of many names for a few tiny images"
    folder = place/'many'
    folder.mkdir()
    sources = []
    for i in range(20):
        Image.fromarray(np.full((8, 8, 3), i*10, np.uint8)).save(place/f'tiny{i}.png')
        sources.append(place/f'tiny{i}.png')
    for i in range(n): os.link(sources[i%20], folder/f'{i:06}.png')
    return folder


MEASURED = """
import sys
from kdmed.ship.predict import predict_files
pages = []
def resident(): return int(open('/proc/self/statm').read().split()[1])*4096/1e6
def progress(done, total):
    if done in (total//10//100*100, total): pages.append(resident())
done = predict_files(*sys.argv[1:], bs=100, progress=progress)
print(pages[0], pages[-1], 'torch' in sys.modules)
"""


@pytest.mark.slow(60)
@pytest.mark.skipif(sys.platform!='linux', reason='reads /proc')
def test_memory_is_flat(place):
    "One batch is held at a time, beside the names of the files"
    folder,n = many(place, 20_000),20_000
    command = [sys.executable, '-c', MEASURED, place/'student.onnx', folder, place/'p.csv']
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    first,last,has_torch = done.stdout.split()
    assert float(last)-float(first) < 20 and has_torch=='False'
    assert sum(1 for _ in open(place/'p.csv'))==n+1


@pytest.mark.slow(60)
@pytest.mark.skipif(sys.platform=='win32', reason='needs SIGKILL')
def test_a_killed_command_resumes(place, capsys):
    folder = many(place, 6000)
    command = ['predict', place/'student.onnx', folder, '--out', place/'p.csv', '--bs', '10']
    def written(): return sum(f.stat().st_size for f in place.glob('.p.csv.*.rows'))
    for sent in (signal.SIGKILL, signal.SIGINT):
        line = [sys.executable, '-m', 'kdmed.cli', *map(str, command)]
        started = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        before,end = written(),time.monotonic()+120
        while written() <= before+4000 and time.monotonic() < end: time.sleep(.02)
        started.send_signal(sent)
        _,err = started.communicate()
        assert not (place/'p.csv').exists() and started.returncode!=0
    assert 'the same command resumes' in err
    status,out,err = kdmed(capsys, *command)
    assert status==0 and 'had been predicted before' in out, err
    assert [Path(i).name for i in read(place/'p.csv').image]==[f'{i:06}.png' for i in range(6000)]
    assert not list(place.glob('.p.csv*'))


# -- report

def prediction_file(path, n=40, seed=0, **changes):
    rng = np.random.default_rng(seed)
    truth = np.arange(n)%2
    p = np.clip(truth*.3+rng.random(n)*.7, 0, 1)
    images = [f'{i}.png' for i in range(n)]
    frame = pd.DataFrame(dict(image=images, label=np.array(CLASSES)[truth], group=np.arange(n)//2,
                              probability_benign=1-p, probability_malignant=p))
    for name,values in changes.items(): frame[name] = values
    frame.to_csv(path, index=False)
    return path


WRONG_FILES = {
    'other images': (dict(image=[f'{i}.jpg' for i in range(40)]), 'lacks 40 of the images'),
    'an image twice': (dict(image=['0.png']*40), 'must have one row each'),
    'other labels': (dict(label=['malignant', 'benign']*20), 'have another label'),
    'a label that is no class': (dict(label=['nevus']*40), 'have another label'),
    'other groups': (dict(group=range(40)), 'have another group'),
    'probabilities above 1': (dict(probability_malignant=1.5), 'must be from 0 to 1'),
    'sums that are not 1': (dict(probability_malignant=.5), 'must sum to 1'),
    'text for a number': (dict(probability_malignant='high'), 'must be a finite number'),
    'infinity': (dict(probability_malignant=np.inf), 'must be a finite number'),
    'gaps': (dict(probability_malignant=[None]+[.5]*39), 'must have a probability of every class'),
    'another class': (dict(probability_nevus=0.), 'has the classes')}


@pytest.mark.parametrize('case', WRONG_FILES)
def test_files_that_do_not_fit_are_refused(case, tmp_path, capsys):
    changes,said = WRONG_FILES[case]
    prediction_file(tmp_path/'a.csv')
    prediction_file(tmp_path/'b.csv', **changes)
    before = contents(tmp_path)
    status,_,err = kdmed(capsys, 'report', '--predictions', tmp_path/'a.csv', tmp_path/'b.csv', '--out', tmp_path/'r')
    assert status==2 and '--predictions' in err and said in err and 'b.csv' in err, err
    assert contents(tmp_path)==before and not (tmp_path/'r').exists()


def test_a_label_that_is_no_class_is_named(tmp_path):
    prediction_file(tmp_path/'a.csv', label=['nevus']+['malignant', 'benign']*19+['malignant'])
    with pytest.raises(ValueError, match="label of 0.png must be one of .*, got 'nevus'"):
        compare_prediction_files(tmp_path/'a.csv')


def test_a_report_that_exists_is_not_replaced(tmp_path, capsys):
    line = ['report', '--predictions', prediction_file(tmp_path/'a.csv'), '--out', tmp_path/'r']
    (tmp_path/'r').mkdir()
    (tmp_path/'r'/'notes.txt').write_text('mine')
    status,_,err = kdmed(capsys, *line, '--force')
    assert status==2 and '--out' in err and 'contains other files, notes.txt' in err, err
    assert contents(tmp_path/'r')=={'notes.txt': b'mine'}
    (tmp_path/'x').mkdir()
    prediction_file(tmp_path/'x'/'a.csv')
    same = tmp_path/'a.csv',tmp_path/'x'/'a.csv'
    status,_,err = kdmed(capsys, 'report', '--predictions', *same, '--out', tmp_path/'s')
    assert status==2 and 'have the same name' in err


def test_files_of_other_libraries(tmp_path):
    "Logits of one column, plain names of classes, another order: the same figures"
    table = pd.read_csv(prediction_file(tmp_path/'a.csv'))
    p = table.probability_malignant.clip(1e-6, 1-1e-6)
    known = table[['image', 'label']]
    known.assign(logit_malignant=np.log(p/(1-p))).iloc[::-1].to_csv(tmp_path/'b.csv', index=False)
    known.assign(benign=1-p, malignant=p).to_csv(tmp_path/'c.csv', index=False)
    made = compare_prediction_files([tmp_path/f'{n}.csv' for n in 'abc'], classes=CLASSES, n_boot=20)
    values = pd.DataFrame({n: f.value for n,f in made.scores.items()}).drop('log_loss')
    assert np.allclose(values.sub(values.a, axis=0), 0, atol=1e-5)


# -- another site

def test_a_site_with_other_classes_is_refused(place, bundle, capsys):
    (place/'images'/'benign').rename(place/'images'/'nevus')
    line = ['evaluate', bundle, '--data', place/'images', '--out', place/'site', *GROUPS, '--quiet']
    status,_,err = kdmed(capsys, *line)
    assert status==2 and "classes that the student does not know, ['nevus']" in err, err
    assert not (place/'site').exists()
    status,_,err = kdmed(capsys, 'evaluate', bundle, '--data', place/'gone', '--out', place/'site')
    assert status==2 and '--data' in err
    status,_,err = kdmed(capsys, 'evaluate', place/'student.onnx', *line[2:])
    assert status==2 and 'must be a bundle' in err


def test_a_site_is_evaluated(place, bundle, capsys):
    line = ['evaluate', bundle, '--data', place/'images', '--out', place/'site', *GROUPS, '--quiet']
    status,out,err = kdmed(capsys, *line)
    assert status==0, err
    assert {'report.html', 'shift.csv', 'shift.png', 'predictions.csv'} <= {f.name for f in (place/'site').iterdir()}
    shift = pd.read_csv(place/'site'/'shift.csv', index_col=0)
    noted = load_bundle(bundle).settings['bundle']['test']['figures']
    assert np.isclose(shift.before['sensitivity/malignant'], noted['sensitivity/malignant'][0])
    status,_,err = kdmed(capsys, *line)
    assert status==2 and '--out' in err and 'pass --force' in err
    made = compare_prediction_files(place/'site'/'predictions.csv', n_boot=20)
    assert made.about['images']==12


def test_a_site_where_nothing_shifted_says_so(bundle):
    "The same images again"
    table = split_groups(tissue(160, 32, 2), sizes=(.2, .4, .4))
    site = evaluate_bundle(bundle, table[table.split=='test'].reset_index(drop=True), n_boot=50)
    assert not site.shift.shifted.any() and len(site.sentences())==1
    assert site.sentences()[0].startswith(f'None of {site.shift.difference.notna().sum()} figures differ')


def test_a_site_of_one_class(bundle):
    "Sensitivity and prevalence are known, specificity is not"
    made = tissue(30, 32, 3)
    made = made[made.label=='malignant']
    table = image_table(made.image, made.label, made.group, CLASSES, 'binary')
    site = evaluate_bundle(bundle, table, n_boot=20)
    assert site.figures.value['prevalence/malignant']==1 and np.isnan(site.figures.value['specificity/malignant'])


# -- all together

@pytest.mark.slow(60)
def test_from_a_run_to_another_site(place, capsys):
    made = tissue(120, 32, 1)
    for i,r in enumerate(made.itertuples()):
        (place/'training'/r.label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(r.image).save(place/'training'/r.label/f'{r.group.split()[1]}_{i}.png')
    small = '--teacher test_resnet --student test_efficientnet --size 32 --epochs 1 --teacher-epochs 1 --bs 16'
    run,how = place/'run',[*small.split(), '--repeats', 1, *GROUPS, '--quiet']
    status,_,err = kdmed(capsys, 'distill', '--data', place/'training', *how, '--out', run)
    assert status==0, err
    bundle = load_bundle(run)
    assert bundle.report is not None and bundle.settings['bundle']['test']['figures'] and bundle.thresholds
    status,out,err = kdmed(capsys, 'export', run, '--onnx', place/'run.onnx', '--bundle', place/'copy')
    assert status==0 and load_bundle(place/'copy').classes==bundle.classes, err
    for name,student in dict(torch=run, onnx=place/'run.onnx').items():
        status,_,err = kdmed(capsys, 'predict', student, place/'images', '--out', place/f'{name}.csv', '--quiet')
        assert status==0 and err=='', err
    a,b = (read(place/f'{n}.csv').probability_malignant for n in ('torch', 'onnx'))
    assert np.allclose(a, b, atol=.02)
    status,out,err = kdmed(capsys, 'quantize', run, '--limit', 1, '--out', place/'int8', '--quiet')
    assert status==0 and '| int8 static |' in out and 'Recommended' in out, err
    status,_,err = kdmed(capsys, 'predict', place/'int8'/'int8_static.onnx', place/'images', '--out', place/'int8.csv')
    assert status==0 and np.allclose(read(place/'int8.csv').probability_malignant, b, atol=.2), err
    (place/'training').rename(place/'moved')
    status,_,err = kdmed(capsys, 'quantize', run, '--out', place/'again')
    assert status==2 and '--data' in err and 'no such file or folder' in err, err
    shutil.copytree(place/'moved', place/'fewer')
    next((place/'fewer').rglob('*.png')).unlink()
    status,_,err = kdmed(capsys, 'quantize', run, '--data', place/'fewer', '--out', place/'again')
    assert status==2 and 'are not those that the run' in err and not (place/'again').exists(), err
    (place/'moved').rename(place/'training')
    status,_,err = kdmed(capsys, 'evaluate', run, '--data', place/'images', *GROUPS, '--out', place/'site')
    assert status==0, err
    mine = f"mine={place/'site'/'predictions.csv'}"
    status,_,err = kdmed(capsys, 'report', '--predictions', mine, '--out', place/'report')
    assert status==0, err


def test_a_run_of_an_older_version_is_exported_with_a_warning(place, capsys):
    torch.manual_seed(0)
    save_student(set_model_stats(create_student('test_resnet', CLASSES, 32, 'binary').eval(), .5, .2), place/'old')
    status,_,err = kdmed(capsys, 'export', place/'old', '--bundle', place/'new')
    assert status==2 and 'holds a student without a bundle' in err and '--bundle' in err, err
    assert not (place/'new').exists()
