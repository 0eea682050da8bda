"Work is never lost, or taken for other work: bars, changed data, older formats, folders that cannot be written, two processes, full disks, odd files"
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import fastai.callback.progress as progress
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.schedule import fit_one_cycle # noqa: F401
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.vision.augment import Flip
from fastprogress.fastprogress import ConsoleMasterBar, ConsoleProgressBar, NBMasterBar, NBProgressBar
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdmed.core.basics import seed_everything
from kdmed.core.files import claim
from kdmed.core.fingerprints import fingerprint
from kdmed.data import store
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.store import STORE_FORMAT, ImageStore, list_stores, pack_images
from kdmed.data.transforms import Augment, HorizontalFlip, Rotation
from kdmed.train import resume
from kdmed.train.checkpoints import load_checkpoint, read_checkpoint, write_checkpoint
from kdmed.train.description import describe_data
from kdmed.train.resume import Resume
from kdmed.distill import cache
from kdmed.distill.cache import TeacherCache, list_caches

TISSUE = split_groups(synthetic_table(n=90, classes=3, size=16), sizes=(.6, .2, .2))
CHILDREN = dict(reason='needs Linux: forks, limits, users and mounts')
linux = pytest.mark.skipif(not sys.platform.startswith('linux'), **CHILDREN)
as_root = pytest.mark.skipif(not sys.platform.startswith('linux') or os.getuid()!=0, reason='only root can become another user, or mount a small disk')


class Died(Exception): pass


def in_child(work, seconds=100):
    "What `work` returns in a forked process, as JSON; `Died` if it was killed"
    read,write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            signal.alarm(seconds)
            os.write(write, json.dumps(work()).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f: said = f.read()
    _,status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): raise Died(os.WTERMSIG(status))
    assert not status, 'the child failed: see its traceback'
    return json.loads(said)

def message_of(work):
    "Type and text of the error that `work` raises"
    try: work()
    except Exception as e: return type(e).__name__,str(e)
    return 'nothing',''

def model(): return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def loaders(table=TISSUE, **kwargs): return image_dls(table, 16, **dict(bs=16, augment=Augment([HorizontalFlip(), Rotation(20)])) | kwargs)

def learner(*cbs, dls=None, **kwargs):
    seed_everything(0)
    return Learner(dls or loaders(), model(), metrics=accuracy, cbs=list(cbs), **kwargs)

def quietly(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn

def weights(learn): return nn.utils.parameters_to_vector(learn.model.parameters()).tolist()


# -- progress bars

class DieAt(Callback):
    "kill -9 in a batch, after its step"
    order,run_valid = 90,False
    def __init__(self, epoch, batch): self.at = epoch,batch
    def after_batch(self):
        if (self.epoch, self.iter)==self.at: os.kill(os.getpid(), signal.SIGKILL)

BARS = dict(console=(ConsoleMasterBar, ConsoleProgressBar), notebook=(NBMasterBar, NBProgressBar))

def train_with_bars(kind, folder, die=None, path='.'):
    "Weights after a fit with bars, and what was printed"
    progress.master_bar,progress.progress_bar = BARS[kind]
    if kind=='notebook': InteractiveShell.instance() # else there is nothing to draw on
    cbs = [Resume(folder/'run', every=2), CSVLogger(folder/'log.csv'), ShowGraphCallback(), DieAt(*(die or (-1, -1)))]
    learn = learner(*cbs, path=folder)
    with open(folder/'printed', 'w') as printed, redirect_stdout(printed): learn.fit_one_cycle(3, 1e-2)
    return dict(weights=weights(learn), printed=(folder/'printed').read_text())

@pytest.mark.slow
@linux
@pytest.mark.parametrize('kind', BARS)
def test_a_killed_run_with_progress_bars_resumes_to_the_same_weights(kind, tmp_path):
    "Killed in epoch 0, when it is over, in epoch 1, when that is over, and in the last one"
    (tmp_path/'whole').mkdir()
    goal = in_child(lambda: train_with_bars(kind, tmp_path/'whole'))
    for die in ((0, 1), (1, 0), (1, 2), (2, 0), (2, 2)):
        home = tmp_path/f'{die}'
        home.mkdir()
        with pytest.raises(Died): in_child(lambda: train_with_bars(kind, home, die))
        again = in_child(lambda: train_with_bars(kind, home))
        assert again['weights']==goal['weights'], die
        assert 'resumes at epoch' in again['printed']
    log = (home/'log.csv').read_text().splitlines()
    assert [line.split(',')[0] for line in log]==['epoch', '0', '1', '2'], 'the note is no row of the log'
    done = in_child(lambda: train_with_bars(kind, home)) # finished: loaded
    assert done['weights']==goal['weights'] and 'is finished: loaded' in done['printed']


# -- changed data

def reversed_labels():
    table = TISSUE.copy()
    table['label'] = table.label.map(dict(zip(TISSUE.attrs['classes'], TISSUE.attrs['classes'][::-1])))
    return table

def with_label(split):
    "One label of a split is another one"
    table = TISSUE.copy()
    row = table.index[table.split==split][3]
    table.loc[row, 'label'] = next(c for c in table.attrs['classes'] if c!=table.label[row])
    return table

def darker(pixels): return pixels//2

def with_pixel(split):
    "One pixel of an image of a split is another one"
    table = TISSUE.copy()
    row = np.flatnonzero(table.split==split)[2]
    image = table.image.iloc[row].copy()
    image[5, 5] = 255-image[5, 5]
    table['image'] = [image if i==row else old for i,old in enumerate(table.image)]
    return table

CHANGES = { # what: (how, what the error names)
    'labels reversed': (lambda: loaders(reversed_labels()), 'labels of training images'),
    'one training label': (lambda: loaders(with_label('train')), 'labels of training images'),
    'one validation label': (lambda: loaders(with_label('valid')), 'labels of validation images'),
    'one training pixel': (lambda: loaders(with_pixel('train')), 'pixels of training images'),
    'one validation pixel': (lambda: loaders(with_pixel('valid')), 'pixels of validation images'),
    'preprocessing': (lambda: loaders(preprocess=darker), 'preprocessing was [], is'),
    'no augmentation': (lambda: loaders(augment=None), 'augmentation'),
    'a parameter of the augmentation': (lambda: loaders(augment=Augment([HorizontalFlip(), Rotation(21)])), 'augmentation 2 was Rotation(degrees=20.0)'),
    'the seed of the augmentation': (lambda: loaders(augment=Augment([HorizontalFlip(), Rotation(20)], seed=1)), 'augmentation seed was 0, is 1'),
    'transforms of batches': (lambda: loaders(batch_tfms=[Flip()]), 'transforms of batches'),
    'normalization': (lambda: loaders(stats=([.5]*3, [.5]*3)), 'normalization mean was [0.485'),
    'batch size': (lambda: loaders(bs=15), 'batch size was 16, is 15'),
    'sampling': (lambda: loaders(sampling='balanced'), 'sampling weights'),
    'views': (lambda: loaders(views=2), 'views of an image was None, is 2'),
    'other split': (lambda: loaders(split_groups(TISSUE, sizes=(.6, .2, .2), seed=7)), 'choice of training images'),
}

class Stop(Callback):
    "Interrupts a fit before an epoch, or fails where nothing must be trained"
    def __init__(self, epoch=None): self.at = epoch
    def before_epoch(self):
        if self.epoch==self.at: raise KeyboardInterrupt
    def before_batch(self):
        if self.at is None: raise AssertionError('trained')

@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    "A folder with the checkpoint of a run that has two of three epochs"
    folder = tmp_path_factory.mktemp('interrupted')/'run'
    with pytest.raises(KeyboardInterrupt): quietly(learner(Resume(folder), Stop(2)), 3)
    resume._release_folder(folder)
    return folder

@pytest.mark.parametrize('change', CHANGES)
def test_changed_data_is_refused_by_name(change, interrupted):
    make,named = CHANGES[change]
    kind,said = message_of(lambda: quietly(learner(Resume(interrupted), Stop(), dls=make()), 3))
    assert kind=='ValueError' and 'belongs to another run' in said and named in said, said
    assert 'Undo the change' in said and 'use another folder' in said and 'only_model=True' in said

def test_the_same_data_resumes_from_memory_store_or_moved_files(tmp_path):
    "What does not change a pixel or a label changes no run"
    files = tmp_path/'images'
    files.mkdir()
    table = TISSUE.copy()
    for i,pixels in enumerate(table.image): Image.fromarray(pixels).save(files/f'{i}.png')
    table['image'] = [files/f'{i}.png' for i in range(len(table))]
    here = describe_data(loaders(table))
    assert describe_data(loaders(table, store=tmp_path/'stores'))==here
    stock = describe_data(loaders(table, store=False))
    shutil.copytree(files, tmp_path/'moved')
    table['image'] = [tmp_path/'moved'/f.name for f in table.image]
    assert describe_data(loaders(table))==here
    assert describe_data(loaders(table, store=False))==stock
    Image.fromarray(255-TISSUE.image[np.flatnonzero(TISSUE.split=='train')[0]]).save(table.image[np.flatnonzero(TISSUE.split=='train')[0]])
    assert describe_data(loaders(table, store=False))!=stock

def test_plain_pytorch_data_is_compared(tmp_path):
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(16)%3
    def run(labels, images=x, kill=False):
        learn = Learner(DataLoaders(*[DataLoader(TensorDataset(images, labels), batch_size=4)]*2), model(), loss_func=nn.CrossEntropyLoss(), cbs=Resume(tmp_path/'run'))
        learn.model.load_state_dict(start)
        quietly(learn, 2)
    start = model().state_dict()
    run(y)
    for labels,images,named in ((y.flip(0), x, 'tensors'), (y, x+1, 'tensors')):
        kind,said = message_of(lambda: run(labels, images))
        assert kind=='ValueError' and named in said and 'belongs to another run' in said
    run(y)


# -- formats, and damage

def rewrite(file, **changes): file.write_text(json.dumps(json.loads(file.read_text()) | changes))

@pytest.mark.parametrize('number, outcome', [(1, 'read'), (99, 'has format 99, of a newer kdmed; this version reads up to'), (None, 'has no format number'), ('2', "has format '2'")])
def test_a_store_of_another_format_is_read_or_refused_by_name(number, outcome, tmp_path):
    home = pack_images(TISSUE.image[:4], 16, folder=tmp_path, progress=False).home
    assert json.loads((home/'store.json').read_text())['format']==STORE_FORMAT
    rewrite(home/'store.json', format=number)
    kind,said = message_of(lambda: ImageStore(home))
    assert (kind=='nothing') if outcome=='read' else (kind=='ValueError' and outcome in said and str(home) in said)

@pytest.mark.parametrize('number, outcome', [(1, 'read'), (99, 'of a newer kdmed'), (None, 'has no format number')])
def test_a_teacher_cache_of_another_format_is_read_or_refused_by_name(number, outcome, tmp_path):
    home = TeacherCache(model(), tmp_path).fill(loaders(views=2), progress=False).stored.home
    rewrite(home/'about.json', format=number)
    kind,said = message_of(lambda: cache._StoredOutputs(home))
    assert (kind=='nothing') if outcome=='read' else (kind=='ValueError' and outcome in said and home.name in said)
    assert len(list_caches(tmp_path))==1

@pytest.mark.parametrize('number, outcome', [(1, 'finish its run with the version of kdmed that began it'), (99, 'of a newer kdmed'), (None, 'has no format number')])
def test_a_checkpoint_of_another_format_is_refused_by_name(number, outcome, interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path/'run')
    for file in (tmp_path/'run').glob('fit_0*.pt'): write_checkpoint(read_checkpoint(file) | dict(format=number), file)
    kind,said = message_of(lambda: quietly(learner(Resume(tmp_path/'run')), 3))
    assert kind=='ValueError' and outcome in said and 'fit_0.pt' in said
    kind,said = message_of(lambda: load_checkpoint(learner(), tmp_path/'run/fit_0.pt', only_model=True))
    assert kind=='nothing' if number==1 else outcome in said, 'weights of an older checkpoint can still be read'

DAMAGE = { # of a finished store
    'no images in store.json': lambda home: (home/'store.json').write_text('{"format": 2}'), 'store.json a list': lambda home: (home/'store.json').write_text('[1]'),
    'store.json cut': lambda home: (home/'store.json').write_text('{'), 'store.json gone': lambda home: (home/'store.json').unlink(),
    'store.json not UTF-8': lambda home: (home/'store.json').write_bytes(b'\xff\xfe{'), 'empty pixels': lambda home: (home/'images.npy').write_bytes(b''),
    'pixels cut': lambda home: os.truncate(home/'images.npy', 500), 'no checksums': lambda home: (home/'checksums.npy').unlink(),
    'checksums of others': lambda home: np.save(home/'checksums.npy', np.zeros(9, np.uint32)),
}

@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_stores_are_listed_and_refused_by_name(damage, tmp_path):
    home = pack_images(TISSUE.image[:4], 16, folder=tmp_path, progress=False).home
    good = pack_images(TISSUE.image[:5], 16, folder=tmp_path, progress=False)
    DAMAGE[damage](home)
    stores = list_stores(tmp_path).set_index('store')
    assert stores.whole.to_dict()=={home.name: False, good.home.name: True}
    assert str(home) in stores.note[home.name] and stores.note[good.home.name]==''
    kind,said = message_of(lambda: pack_images(TISSUE.image[:4], 16, folder=tmp_path, progress=False))
    assert kind=='ValueError' and home.name in said and 'delete the folder' in said

@pytest.mark.parametrize('spoil', ['longer', 'empty', 'text', 'folder'])
def test_an_interrupted_packing_with_a_spoilt_journal_starts_again(spoil, tmp_path):
    def unready(pixels): raise OSError('not yet')
    ready = tmp_path/'ready'
    def when_ready(pixels):
        if not ready.exists(): raise KeyboardInterrupt
        return pixels
    pack = partial(pack_images, TISSUE.image[:4], 16, when_ready, tmp_path/'stores', progress=False)
    with pytest.raises(KeyboardInterrupt): pack()
    journal = next((tmp_path/'stores').glob('*.part'))/'journal.npy'
    if spoil=='longer': np.save(journal, np.full(7, 1<<32, np.uint64))
    if spoil=='empty': journal.write_bytes(b'')
    if spoil=='text': journal.write_text('not an array')
    if spoil=='folder': journal.unlink(), journal.mkdir()
    assert list_stores(tmp_path/'stores').note.tolist()==['unfinished']
    ready.touch()
    with pytest.warns(UserWarning, match='packing starts again'): store = pack()
    assert np.array_equal(store[:], np.stack(TISSUE.image[:4]).transpose(0, 3, 1, 2))

@pytest.mark.parametrize('folder', ['', '  ', None, 3])
def test_resume_without_a_folder_is_refused(folder):
    with pytest.raises(ValueError, match='folder must be the name of a folder'): Resume(folder)

def test_a_folder_in_the_place_of_a_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path/'fit_0.pt').mkdir()
    kind,said = message_of(lambda: quietly(learner(Resume(tmp_path))))
    assert kind=='ValueError' and f"{tmp_path/'fit_0.pt'} is not a file: expected a checkpoint" in said and 'Move the content of' in said


# -- folders that cannot be written

@contextmanager
def public_folder():
    "A folder that other users may read"
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try: yield folder
    finally: shutil.rmtree(folder)

class _Header(ctypes.Structure): _fields_ = [('version', ctypes.c_uint32), ('pid', ctypes.c_int)]
class _Sets(ctypes.Structure): _fields_ = [(name, ctypes.c_uint32) for name in ('effective', 'permitted', 'inheritable')]

def lock_up(folder):
    "Take away everybody's permission to write, and give that to read"
    subprocess.run(['chmod', '-R', 'a-w,a+rX', str(folder)], check=True)

def as_nobody(work):
    "`work` without root's capabilities, so that permissions hold; another user could not read root's Python, where it is in root's home"
    def other():
        none = (_Sets*2)()
        assert ctypes.CDLL(None).capset(ctypes.byref(_Header(0x20080522, 0)), none)==0
        return work()
    return in_child(other)

def finished_work(folder):
    "A store, a full cache and a finished run, and what each holds"
    store = pack_images(TISSUE.image, 16, folder=folder/'stores', progress=False)
    dls = loaders(views=2, store=folder/'stores')
    teacher = torch.load(folder/'teacher.pt', weights_only=False) if (folder/'teacher.pt').exists() else model()
    if not (folder/'teacher.pt').exists(): torch.save(teacher, folder/'teacher.pt')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        filled = TeacherCache(teacher, folder/'answers').fill(dls, progress=False)
    learn = quietly(learner(Resume(folder/'run')))
    return dict(pixels=int(store[:].astype(int).sum()), listed=len(list_stores(folder/'stores')), filled=filled.filled, cached=filled.stored.read(np.arange(9))[0][0].tolist(),
                weights=weights(learn), warnings=[str(w.message) for w in said if 'kdmed' in str(w.filename) or 'written' in str(w.message)])

@as_root
@pytest.mark.parametrize('how', ['without permission', 'read-only disk'])
def test_finished_work_in_a_folder_that_cannot_be_written_is_read(how):
    "As on Kaggle, which shows the output of an earlier session read-only"
    with public_folder() as folder:
        mounted = how=='read-only disk' and subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300m', 'tmpfs', str(folder)]).returncode==0
        if how=='read-only disk' and not mounted: pytest.skip('nothing can be mounted here')
        try:
            there = in_child(lambda: finished_work(folder))
            lock_up(folder)
            if mounted: subprocess.run(['mount', '-o', 'remount,ro', str(folder)], check=True)
            before = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob('*'))
            again = (in_child if mounted else as_nobody)(lambda: finished_work(folder))
            assert again==there and there['warnings']==[]
            assert sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob('*'))==before
            assert not [p for p in folder.rglob('stores/*') if p.suffix=='.lock']
        finally:
            if mounted: subprocess.run(['umount', str(folder)], check=True)

@as_root
def test_unfinished_work_in_a_folder_that_cannot_be_written_is_refused_before_training(interrupted):
    with public_folder() as folder:
        shutil.copytree(interrupted, folder/'run')
        lock_up(folder)
        kind,said = as_nobody(lambda: message_of(lambda: quietly(learner(Resume(folder/'run'), Stop()), 3)))
        assert kind=='PermissionError' and f'{folder}/run is read-only' in said and 'copy it to a folder that can be written' in said
        kind,said = as_nobody(lambda: message_of(lambda: pack_images(TISSUE.image, 16, folder=folder, progress=False)))
        assert kind=='PermissionError' and str(folder) in said and 'choose another folder' in said
        kind,said = as_nobody(lambda: message_of(lambda: TeacherCache(model(), folder).fill(loaders(views=2), progress=False)))
        assert kind=='PermissionError' and str(folder) in said and 'choose another place' in said

@as_root
def test_a_cache_that_cannot_be_written_serves_what_it_has():
    "The teacher is asked for the rest, with one warning"
    with public_folder() as folder:
        teacher = model()
        home = TeacherCache(teacher, folder).fill(loaders(views=2), progress=False).stored.home
        answers = cache._StoredOutputs(home)
        cache._write_rows(home/'journal.npy', answers.offsets[0], range(0, 40, 2), np.zeros(20, np.uint64))
        lock_up(folder)
        def train():
            from kdmed.distill.callbacks import LogitKD
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter('always')
                quietly(learner(LogitKD(TeacherCache(teacher, folder)), dls=loaders(views=2)))
            return [str(w.message) for w in said if 'cannot be written' in str(w.message)]
        assert len(as_nobody(train))==1


# -- two at once

@contextmanager
def another_process(work):
    "A forked process that does `work`, and is killed in the end"
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            work()
        except BaseException: traceback.print_exc()
        os._exit(1)
    try: yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

def wait_for(condition, seconds=60):
    end = time.monotonic()+seconds
    while not condition():
        assert time.monotonic()<end, 'waited in vain'
        time.sleep(.02)

def soon(work, seconds=5):
    "What `message_of` says, within seconds"
    start = time.monotonic()
    told = message_of(work)
    assert time.monotonic()-start < seconds, 'not at once'
    return told

def slowly(pixels):
    while True: time.sleep(.05)

@linux
def test_a_second_process_that_packs_the_same_store_is_told_at_once(tmp_path):
    with another_process(lambda: pack_images(TISSUE.image, 16, slowly, folder=tmp_path, progress=False)) as pid:
        wait_for(lambda: list(tmp_path.glob('*.part/journal.npy')))
        kind,said = soon(lambda: pack_images(TISSUE.image, 16, slowly, folder=tmp_path, progress=False))
        assert kind=='RuntimeError' and f'process {pid} on' in said and str(tmp_path) in said
        assert pack_images(TISSUE.image, 16, folder=tmp_path, progress=False).verify() # another store is free

@linux
def test_a_second_process_that_trains_in_the_same_folder_is_told_at_once(tmp_path):
    class Wait(Callback):
        seconds = 0
        def before_batch(self):
            (tmp_path/'begun').touch()
            time.sleep(self.seconds)
    def train(seconds):
        Wait.seconds = seconds
        quietly(learner(Resume(tmp_path/'run'), Wait()))
    with another_process(lambda: train(60)) as pid:
        wait_for((tmp_path/'begun').exists)
        kind,said = soon(lambda: train(0))
        assert kind=='RuntimeError' and f'process {pid} on' in said and str(tmp_path/'run') in said
    train(0) # the other one has ended

@linux
def test_the_workers_of_a_killed_run_are_waited_for(tmp_path):
    "With filelock before 4 they hold the lock for a moment; the next start must not fail for that"
    def with_worker():
        held,parent = claim(tmp_path/'run', 'run'),os.getpid()
        if not os.fork():
            while os.getppid()==parent: time.sleep(.01)
            time.sleep(1.5)
            os._exit(0)
        (tmp_path/'begun').touch()
        time.sleep(60)
    with another_process(with_worker): wait_for((tmp_path/'begun').exists)
    quietly(learner(Resume(tmp_path/'run')))

@linux
def test_a_second_process_at_a_teacher_cache_is_told_at_once_and_shares_it(tmp_path):
    teacher,dls = model(),loaders(views=2)
    home = TeacherCache(teacher, tmp_path).fill(dls, progress=False).stored.home
    def hold():
        held = claim(home, 'teacher cache')
        (tmp_path/'begun').touch()
        time.sleep(60)
    with another_process(hold) as pid:
        wait_for((tmp_path/'begun').exists)
        with pytest.warns(UserWarning, match=f'is in use: process {pid} on .* share their outputs'): assert TeacherCache(teacher, tmp_path).fill(dls, progress=False).filled==1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        TeacherCache(teacher, tmp_path).fill(dls, progress=False)


# -- full disks

@contextmanager
def small_disk(megabytes):
    "A disk of so many MiB"
    folder = Path(tempfile.mkdtemp())
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', str(folder)]).returncode: pytest.skip('nothing can be mounted here')
    try: yield folder
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)
        folder.rmdir()

def wide(width=40_000): return nn.Sequential(nn.Flatten(), nn.Linear(768, 1), nn.Linear(1, width), nn.Linear(width, 3)) # 160 kB a weight matrix

@as_root
def test_a_disk_too_small_for_checkpoints_is_refused_before_training():
    with small_disk(1) as folder:
        learn = Learner(loaders(), wide(), cbs=[Resume(folder/'run'), Stop()])
        kind,said = message_of(lambda: quietly(learn))
        assert kind=='OSError' and str(folder/'run') in said and 'checkpoints' in said and 'needs' in said and 'free' in said
        kind,said = message_of(lambda: pack_images(TISSUE.image, 256, folder=folder, progress=False))
        assert kind=='OSError' and str(folder) in said and 'the packed store 256px-' in said and 'needs 18 MB, the disk has 1 MB free' in said
        kind,said = message_of(lambda: TeacherCache(model(), folder).fill(loaders(views=2), progress=False))
        assert kind=='OSError' and str(folder) in said and 'needs 100 MB, the disk has 1 MB free' in said
        assert not list(folder.rglob('*.npy'))

class FillDisk(Callback):
    "Somebody else fills the disk after the first epoch"
    def __init__(self, folder): self.folder = folder
    def after_epoch(self):
        if self.folder is not None and self.epoch==0: fill(self.folder)

def fill(folder):
    with open(folder/'filler', 'wb', buffering=0) as f:
        try:
            while f.write(bytes(4096)): pass
        except OSError: pass

@as_root
def test_a_disk_that_fills_up_while_training_leaves_the_last_checkpoint_whole():
    with small_disk(16) as folder:
        def train(filled=None):
            seed_everything(0)
            return quietly(Learner(loaders(), wide(), cbs=[Resume(folder/'run'), FillDisk(filled)]), 3)
        kind,said = message_of(lambda: train(folder))
        assert kind=='OSError' and 'fit_0.pt could not be written' in said and 'No space left on device' in said and 'MB free' in said, said
        assert sorted(p.name for p in (folder/'run').glob('*.pt'))==['fit_0.pt'] and not list((folder/'run').glob('.fit*'))
        assert read_checkpoint(folder/'run/fit_0.pt')['position']==dict(epoch=0, batch=0, finished=False)
        (folder/'filler').unlink()
        resumed = weights(train())
        shutil.rmtree(folder/'run')
        assert weights(train())==resumed

@as_root
def test_a_disk_that_fills_up_while_packing_leaves_what_is_packed():
    with small_disk(4) as folder:
        seen = []
        def filling(pixels):
            seen.append(1)
            if len(seen)==30: fill(folder)
            return pixels
        pack = partial(pack_images, TISSUE.image, 96, filling, folder=folder, progress=False)
        kind,said = message_of(pack)
        assert kind=='OSError' and '96px-' in said and 'cannot be written' in said and 'MB free' in said, said

@linux
@pytest.mark.parametrize('limit', [100, 20_000, 200_000])
def test_a_limit_on_file_size_is_an_error_that_names_the_file(limit, tmp_path):
    "As `ulimit -f` sets it: too small for any file, for the checkpoint and the pixels, for the checkpoint of a later epoch"
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        pack = message_of(lambda: pack_images(TISSUE.image, 32, folder=tmp_path/'stores', progress=False))
        train = message_of(lambda: quietly(Learner(loaders(), wide(4_000), cbs=Resume(tmp_path/'run'))))
        return pack,train
    pack,train = in_child(work)
    for (kind,said),where in ((pack, 'stores'), (train, 'run')):
        assert kind=='OSError' and str(tmp_path/where) in said and 'written' in said and 'File too large' in said, said
    assert not [p for p in (tmp_path/'run').glob('.fit*')]
    for file in (tmp_path/'run').glob('*.pt'): read_checkpoint(file)


# -- odd files

@linux
def test_a_named_pipe_is_named_and_not_waited_for(tmp_path):
    for i,pixels in enumerate(TISSUE.image): Image.fromarray(pixels).save(tmp_path/f'{i}.png')
    table = TISSUE.copy()
    table['image'] = [tmp_path/f'{i}.png' for i in range(len(table))]
    table.image.iloc[4].unlink()
    os.mkfifo(table.image.iloc[4])
    for store in ('memory', tmp_path/'stores'):
        kind,said = in_child(lambda: soon(lambda: loaders(table, store=store), 20))
        assert kind=='ValueError' and '4.png: expected an image file, found a pipe, socket or device' in said

@linux
def test_names_that_are_not_utf8_are_packed(tmp_path):
    file = tmp_path/os.fsdecode(b'caf\xe9.png')
    Image.fromarray(TISSUE.image[0]).save(file)
    store = pack_images([file], 16, folder=tmp_path/'stores', progress=False)
    assert np.array_equal(store[0], TISSUE.image[0].transpose(2, 0, 1))
    assert len(list_stores(tmp_path/'stores'))==1 and pack_images([file], 16, folder=tmp_path/'stores', progress=False).home==store.home


# -- fingerprints

MINE = '''
def halve(pixels):
    "A docstring, which -OO drops"
    assert pixels.max() > 0, 'and an assertion'
    return pixels//2

class Darker:
    by = 3
    def __init__(self, more): self.more = more
    def __call__(self, pixels): return halve(pixels)//self.by - self.more
'''

def mine(code):
    "What some code, in a file of its own, defines as `f`"
    folder = Path(tempfile.mkdtemp())
    (folder/'some.py').write_text(code)
    import importlib.util
    spec = importlib.util.spec_from_file_location('some', folder/'some.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.f

def test_a_fingerprint_is_the_same_in_every_version_of_python():
    "Golden values: no compiled code counts"
    darker = mine(MINE + 'f = Darker(1)')
    assert fingerprint(darker, versions=False)=='b75ca254d32540c4'
    assert fingerprint(mine(MINE + 'f = halve'), versions=False)=='b80dce3b0c18665f'

DIFFERENT = {
    'an operator': ('def f(p): return p+1', 'def f(p): return p-1'), 'a number': ('def f(p): return p+1', 'def f(p): return p+2'),
    'a default': ('def f(p, a=1): return p+a', 'def f(p, a=2): return p+a'), 'what a helper does': ('def h(p): return p\ndef f(p): return h(p)', 'def h(p): return -p\ndef f(p): return h(p)'),
    'a global value': ('a = 1\ndef f(p): return p+a', 'a = 2\ndef f(p): return p+a'), 'a closure': ('def g(k): return lambda p: p*k\nf = g(1)', 'def g(k): return lambda p: p*k\nf = g(2)'),
    'lambdas of one line': ('f = [lambda p: p+1, lambda p: p-1][0]', 'f = [lambda p: p+1, lambda p: p-1][1]'),
    'an attribute': ('class C:\n def __init__(self, k): self._k = k\n def __call__(self, p): return p*self._k\nf = C(1)', 'class C:\n def __init__(self, k): self._k = k\n def __call__(self, p): return p*self._k\nf = C(2)'),
    'a class attribute': ('class C:\n _k = 1\n def __call__(self, p): return p*self._k\nf = C()', 'class C:\n _k = 2\n def __call__(self, p): return p*self._k\nf = C()'),
    'a base class': ('class B:\n def k(self): return 1\nclass C(B):\n def __call__(self, p): return p*self.k()\nf = C()', 'class B:\n def k(self): return 2\nclass C(B):\n def __call__(self, p): return p*self.k()\nf = C()'),
    'a property': ('class C:\n k = property(lambda s: 1)\n def __call__(self, p): return p*self.k\nf = C()', 'class C:\n k = property(lambda s: 2)\n def __call__(self, p): return p*self.k\nf = C()'),
    'a hidden field': ('from dataclasses import *\n@dataclass\nclass C:\n k: int = field(default=1, repr=False)\n def __call__(self, p): return p\nf = C()', 'from dataclasses import *\n@dataclass\nclass C:\n k: int = field(default=1, repr=False)\n def __call__(self, p): return p\nf = C(2)'),
    'a table in an array': ('import numpy as np\nt = np.arange(5000)\ndef f(p): return t[p]', 'import numpy as np\nt = np.arange(5000)\nt[2500] = 0\ndef f(p): return t[p]'),
    'the type of an array': ('import numpy as np\nt = np.zeros(2, np.int32)\ndef f(p): return p/t', 'import numpy as np\nt = np.zeros(2, np.float32)\ndef f(p): return p/t'),
    'a method of a dict': ('f = {1: 2}.get', 'f = {1: 3}.get'), 'a long pattern': ('import re\nr = re.compile("a"*300)\ndef f(p): return r', 'import re\nr = re.compile("a"*300+"b")\ndef f(p): return r'),
    'a decorator': ('import functools\n@functools.lru_cache\ndef f(p): return p', 'import functools\n@functools.lru_cache\ndef f(p): return -p'),
}

@pytest.mark.parametrize('what', DIFFERENT)
def test_a_change_of_preprocessing_makes_another_fingerprint(what):
    one,other = DIFFERENT[what]
    assert fingerprint(mine(one))==fingerprint(mine(one))!=fingerprint(mine(other))

def test_a_teacher_with_other_hidden_settings_has_a_cache_of_its_own(tmp_path):
    "Same weights, same `repr`: only the number of heads differs"
    class Attends(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.attention,self.head = nn.MultiheadAttention(8, heads, batch_first=True),nn.Linear(8, 3)
        def forward(self, x):
            tokens = x.flatten(2)[..., :8]
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))
    two,four = Attends(2),Attends(4)
    four.load_state_dict(two.state_dict())
    assert repr(two)==repr(four)
    for teacher in (two, four): TeacherCache(teacher, tmp_path).fill(loaders(views=2), progress=False)
    assert len(list_caches(tmp_path))==2
