"Kept answers of a teacher: after kill -9, with several processes at work, when anything about teacher or images changes, when files are damaged."
import os
import resource
import signal
import time
import traceback
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import fastai.callback.schedule # lr_find, fit_one_cycle # noqa: F401
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastcore.basics import noop
from torch import nn

from kdmed.core.basics import seed_everything
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import ReplayCutMix, ReplayMixUp, image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import Augment, BrightnessContrast, HorizontalFlip, Rotation
from kdmed.train.resume import Resume
from kdmed.distill import cache as module
from kdmed.distill.cache import TeacherCache, list_caches
from kdmed.distill.callbacks import LogitKD
from kdmed.distill.features import FeatureKD
from kdmed.distill.teacher import Teacher

AUGMENT = [HorizontalFlip(), BrightnessContrast(.3, .3)]
CLASSES = ['a', 'b', 'c']


class Slow(nn.Module):
    "A teacher that takes its time; what it says of an image does not depend on the others of a batch"
    def __init__(self, seconds=0.):
        super().__init__()
        self.places,self.weight,self.seconds = nn.AdaptiveAvgPool2d(2),nn.Parameter(torch.randn(3, 12, generator=torch.Generator().manual_seed(1))),seconds
    def forward(self, x):
        time.sleep(self.seconds)
        return (self.places(x).flatten(1)[:, None]*self.weight).sum(2)


@pytest.fixture(scope='module')
def tissue(): return split_groups(synthetic_table(n=160, classes=3, size=16, tiles_per_patient=1), sizes=(.6, .2, .2))

def loaders(table, size=16, views=2, augment=AUGMENT, seed=1, **kwargs):
    return image_dls(table, size, **{**dict(bs=8, views=views, augment=Augment(augment, seed) if augment else None, device='cpu'), **kwargs})

def in_child(work):
    "Run `work` in a forked process: its id"
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        torch.set_num_threads(1)
        warnings.simplefilter('ignore')
        work()
        status = 0
    except Exception: traceback.print_exc()
    finally: os._exit(status)

def end_of(pid):
    "'killed', or the exit status of a process"
    _,status = os.waitpid(pid, 0)
    return 'killed' if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def truth(cache, dls):
    "What the teacher says of every view, as it is to be kept"
    n,views = len(dls.train.ids),dls.train.views
    x = dls.train.views_of(*np.divmod(np.arange(n*views), views))[0].as_subclass(torch.Tensor)
    return cache.model(x).detach().half().numpy()

def check(cache, dls, folder):
    "Every answer that is there is the right one; how many there are"
    homes = [h for h in folder.glob('teacher-*') if h.is_dir() and h.suffix!='.part']
    if not homes: return 0
    answers = module._StoredOutputs(homes[0])
    there = np.flatnonzero(answers.journal)
    (logits,*_),known = answers.read(there)
    assert known.all(), 'a kill has left a damaged answer'
    np.testing.assert_allclose(logits.astype(float), truth(cache, dls)[there].astype(float), rtol=2**-9, atol=1e-5)
    return len(there)


# -- kill -9

@pytest.mark.slow
def test_killed_at_any_moment_of_filling(tissue, tmp_path):
    dls,teacher = loaders(tissue),Slow(.004)
    cache = TeacherCache(teacher, tmp_path, every=1)
    rng,kept,kills = np.random.default_rng(0),0,0
    for _ in range(60):
        pid = in_child(lambda: TeacherCache(teacher, tmp_path, every=1).fill(dls, progress=False))
        time.sleep(rng.uniform(.01, .1))
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
        outcome = end_of(pid)
        assert outcome in ('killed', 0)
        now = check(cache, dls, tmp_path)
        assert now>=kept, 'what was kept before is gone'
        kept,kills = now,kills + (outcome=='killed')
        if outcome==0: break
    cache.fill(dls, progress=False)
    assert kills>2 and cache.filled==1 and check(cache, dls, tmp_path)==len(truth(cache, dls))

def test_killed_at_every_step_of_writing(tissue, tmp_path):
    dls,kept = loaders(tissue),[]
    for step in range(6): # logits, layer, journal, logits, …: each is written by half, then comes the end
        cache = TeacherCache(Slow(), tmp_path/str(step), every=3)
        cache.add_tap('places', 'raw')
        def work():
            write,calls = module._write_rows,[]
            def half(path, offset, rows, values):
                calls.append(path)
                if len(calls)<=step: return write(path, offset, rows, values)
                write(path, offset, rows[:len(rows)//2], values[:len(rows)//2])
                os.kill(os.getpid(), signal.SIGKILL)
            module._write_rows = half
            cache.fill(dls, progress=False)
        assert end_of(in_child(work))=='killed'
        kept.append(check(cache, dls, cache.folder))
        assert cache.fill(dls, progress=False).filled==1 and check(cache, dls, cache.folder)==2*len(dls.train.ids)
    assert kept==[0, 0, 12, 24, 24, 36]

def test_killed_while_files_are_made(tissue, tmp_path):
    dls = loaders(tissue)
    def work():
        module.open_memmap = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        TeacherCache(Slow(), tmp_path).fill(dls, progress=False)
    assert end_of(in_child(work))=='killed'
    assert [p.suffix for p in tmp_path.iterdir() if p.is_dir()]==['.part']
    assert TeacherCache(Slow(), tmp_path).fill(dls, progress=False).filled==1
    assert [p.suffix for p in tmp_path.iterdir() if p.is_dir()]==['']

def test_a_killed_run_resumes_to_the_same_bits(tissue, tmp_path):
    "Whatever was kept or lost when it was killed, between checkpoints or at one"
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    class DieAt(Callback):
        order,run_valid = 60,False
        def __init__(self, batch): self.batch = batch
        def after_loss(self):
            if self.learn.train_iter==self.batch: os.kill(os.getpid(), signal.SIGKILL)
    def run(name, out, die=10**9):
        torch.use_deterministic_algorithms(True)
        seed_everything(3)
        dls = loaders(tissue, augment=[*AUGMENT, Rotation(20)])
        learn = Learner(dls, student())
        cache = TeacherCache(teacher, tmp_path/name/'answers', every=5)
        with learn.no_bar(), learn.no_logging():
            learn.fit(4, 1e-2, cbs=[Resume(tmp_path/name/'run', every=3), LogitKD(cache), FeatureKD(cache, [('2', '1')], pool=True), DieAt(die)])
        torch.save(nn.utils.parameters_to_vector(learn.model.parameters()).detach(), tmp_path/out)
    assert end_of(in_child(lambda: run('whole', 'whole.pt')))==0
    rng = np.random.default_rng(1)
    for batch in sorted(rng.choice(np.arange(2, 40), 6, replace=False).tolist()):
        assert end_of(in_child(lambda: run('killed', 'killed.pt', die=batch)))=='killed', batch
    assert end_of(in_child(lambda: run('killed', 'killed.pt')))==0
    assert torch.equal(torch.load(tmp_path/'whole.pt'), torch.load(tmp_path/'killed.pt'))


# -- several processes

def test_two_processes_fill_one_cache(tissue, tmp_path):
    dls,teacher = loaders(tissue),Slow(.002)
    def work(): assert TeacherCache(teacher, tmp_path, every=2).fill(dls, progress=False).filled==1
    assert [end_of(pid) for pid in [in_child(work) for _ in range(3)]]==[0, 0, 0]
    cache = TeacherCache(teacher, tmp_path)
    assert check(cache, dls, tmp_path)==2*len(dls.train.ids)
    assert len(list_caches(tmp_path))==1

def test_two_processes_train_from_one_cache(tissue, tmp_path):
    dls = loaders(tissue, sampling='balanced')
    def work():
        seed_everything(os.getpid())
        learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)))
        with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-2, cbs=LogitKD(TeacherCache(Slow(.001), tmp_path, every=2)))
    assert [end_of(pid) for pid in [in_child(work) for _ in range(2)]]==[0, 0]
    assert check(TeacherCache(Slow(), tmp_path), loaders(tissue), tmp_path) > len(dls.train.ids)


# -- with the callbacks

def student(): return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def test_callbacks_learn_the_same_from_a_cache(tissue, tmp_path):
    "Logits and features; each callback may have been given a cache of its own"
    torch.manual_seed(0)
    model,values = student(),[]
    for wrap in (lambda: Teacher(model), lambda: TeacherCache(model, tmp_path)):
        seed_everything(0)
        learn = Learner(loaders(tissue), student(), cbs=[LogitKD(wrap()), FeatureKD(wrap(), [('2', '2')], pool=True), FeatureKD(wrap(), [('0', '0')])])
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter('ignore') # a teacher that knows nothing
            learn.fit(5, 1e-2)
        values.append(np.array(learn.recorder.values))
    np.testing.assert_allclose(*values, rtol=5e-3)
    caches = list_caches(tmp_path)
    assert caches.answers.tolist()==['logits, 2 (pooled), 0 (map)'] and caches.filled.tolist()==[1.]
    assert len({id(cb.teacher) for cb in learn.cbs if hasattr(cb, 'teacher')})==1
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=7, show_plot=False)
        learn.validate()
        learn.get_preds()
        learn.export(tmp_path/'learn.pkl')
        learn.fit_one_cycle(1, 1e-3)
    assert len(list_caches(tmp_path))==1

def test_a_student_may_hold_its_teacher(tissue, tmp_path):
    inner = student()
    outer = nn.Sequential(inner, nn.Linear(3, 3))
    before = {k: v.clone() for k,v in inner.state_dict().items()}
    learn = Learner(loaders(tissue), outer, cbs=LogitKD(TeacherCache(inner, tmp_path)))
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(5, 1e-2)
    assert all(torch.equal(v, before[k]) for k,v in inner.state_dict().items())


# -- keys

def key(folder, dls, teacher=None, taps=(), cbs=(), **kwargs):
    "Name of the folder in which answers would be kept"
    cache = TeacherCache(teacher if isinstance(teacher, Teacher) else Teacher(teacher or Slow(), **kwargs), folder)
    for tap in taps: cache.add_tap(*tap)
    cache.begin(SimpleNamespace(dls=dls, cbs=list(cbs), model=nn.Linear(1, 1), logger=noop))
    cache._open()
    return cache.stored.home.name

def changed(f):
    "A teacher that differs a little"
    teacher = Slow()
    with torch.no_grad(): f(teacher)
    return teacher

def test_any_change_makes_another_key(tissue, tmp_path):
    names = tissue.attrs['classes']
    swapped = tissue.copy()
    swapped.attrs = {**tissue.attrs, 'classes': names[::-1]}
    painted = tissue.assign(image=[i^(k==np.flatnonzero(tissue.split=='train')[5]) for k,i in enumerate(tissue.image)])
    def brighter(pixels): return pixels//2+100
    plain = loaders(tissue)
    here = key(tmp_path, plain)
    others = dict(
        weights=key(tmp_path, plain, changed(lambda t: t.weight.data[0, 0].add_(1e-6))),
        settings=key(tmp_path, plain, changed(lambda t: setattr(t, 'places', nn.AdaptiveAvgPool2d((1, 4))))),
        size_of_teacher=key(tmp_path, plain, size=8), statistics_of_teacher=key(tmp_path, plain, stats=([.5]*3, [.25]*3)),
        classes=key(tmp_path, plain, classes=names), classes_turned=key(tmp_path, plain, classes=names[::-1]), order_of_student=key(tmp_path, loaders(swapped), classes=names),
        two=key(tmp_path, plain, Teacher([Slow(), Slow()])), two_uneven=key(tmp_path, plain, Teacher([Slow(), Slow()], weights=[3, 1])),
        tap=key(tmp_path, plain, taps=[('places', 'map')]), pooled=key(tmp_path, plain, taps=[('places', 'pooled')]), raw=key(tmp_path, plain, taps=[('places', 'raw')]),
        views=key(tmp_path, loaders(tissue, views=3)), size=key(tmp_path, loaders(tissue, size=24)), seed=key(tmp_path, loaders(tissue, seed=2)),
        augmentation=key(tmp_path, loaders(tissue, augment=[HorizontalFlip(.4), *AUGMENT[1:]])), without=key(tmp_path, loaders(tissue, augment=None)),
        normalization=key(tmp_path, loaders(tissue, stats=([.5]*3, [.5]*3))), preprocessing=key(tmp_path, loaders(tissue, preprocess=brighter)),
        an_image=key(tmp_path, loaders(painted)), split=key(tmp_path, loaders(split_groups(tissue, seed=5))),
        mixup=key(tmp_path, plain, cbs=[ReplayMixUp(.4)]), alpha=key(tmp_path, plain, cbs=[ReplayMixUp(.5)]), mix_seed=key(tmp_path, plain, cbs=[ReplayMixUp(.4, seed=1)]),
        cutmix=key(tmp_path, plain, cbs=[ReplayCutMix(.4)]))
    assert len({here, *others.values()})==1+len(others), sorted(k for k,v in others.items() if v==here or list(others.values()).count(v)>1)
    assert len(list_caches(tmp_path))==1+len(others)

def test_what_does_not_matter_makes_no_other_key(tissue, tmp_path):
    here = key(tmp_path/'a', loaders(tissue))
    for how in (dict(bs=5), dict(sampling='balanced'), dict(store=tmp_path), dict(store=False), dict(num_workers=1)): assert key(tmp_path/'a', loaders(tissue, **how))==here, how
    assert key(tmp_path/'a', loaders(tissue), cbs=[LogitKD(Slow())])==here
    assert key(tmp_path/'a', loaders(tissue), TeacherCache(Slow(), tmp_path))==here
    assert key(tmp_path/'a', loaders(tissue, augment=None, views=None))==key(tmp_path/'a', loaders(tissue, augment=None, views=7)), 'without augmentation an image has one view'
    assert len(list_caches(tmp_path/'a'))==2


# -- damage, and a full disk

def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)

def test_damage_is_found_and_mended(tissue, tmp_path):
    dls,teacher = loaders(tissue),Slow()
    home = TeacherCache(teacher, tmp_path).fill(dls, progress=False).stored.home
    start = np.load(home/'logits.npy', mmap_mode='r').offset
    for at in (start, start + 6*7 + 3, (home/'logits.npy').stat().st_size-1): flip(home/'logits.npy', at)
    flip(home/'journal.npy', np.load(home/'journal.npy', mmap_mode='r').offset + 8*20)
    seen = []
    teacher.register_forward_hook(lambda m,x,y: seen.append(len(y)))
    with pytest.warns(UserWarning, match='cached outputs are damaged; they are computed again'): mended = TeacherCache(teacher, tmp_path).fill(dls, progress=False)
    assert sum(seen)==2+4, 'a trial, and four damaged answers' 
    assert mended.filled==1 and check(mended, dls, tmp_path)==2*len(dls.train.ids)

@pytest.mark.parametrize('file', ['logits.npy', 'journal.npy', 'about.json'])
def test_a_file_cut_short_is_refused_by_name(tissue, tmp_path, file):
    cache = TeacherCache(Slow(), tmp_path).fill(loaders(tissue), progress=False)
    path = cache.stored.home/file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match='not a teacher cache, or a damaged one; delete the folder'): TeacherCache(Slow(), tmp_path).fill(loaders(tissue), progress=False)

def test_a_disk_that_fills_up_ends_in_an_error(tissue, tmp_path):
    dls = loaders(tissue)
    key(tmp_path, dls) # makes the files
    limit = np.load(next(tmp_path.glob('*/logits.npy')), mmap_mode='r').offset + 200
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: TeacherCache(Slow(), tmp_path, every=1).fill(dls, progress=False)
        except OSError as e: os._exit(7 if 'teacher outputs cannot be written' in str(e) else 8)
    assert end_of(in_child(work))==7
    cache = TeacherCache(Slow(), tmp_path)
    check(cache, dls, tmp_path)
    assert cache.fill(dls, progress=False).filled==1 and check(cache, dls, tmp_path)==2*len(dls.train.ids)

def test_a_place_that_cannot_be_written_is_refused(tissue, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='teacher outputs cannot be kept here .*choose another place'): TeacherCache(Slow(), tmp_path/'file').fill(loaders(tissue), progress=False)
