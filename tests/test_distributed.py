"""Two processes, each with half of every batch, started as a notebook does and joined by fastai and Accelerate: what they learn is what one would.

Run as a script, this file is what the two processes do; each check below looks at what they left."""
import contextlib
import io
import os
import random
import socket
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from accelerate import InitProcessGroupKwargs, notebook_launcher
from fastai.callback.schedule import SchedLin
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL # and `distrib_ctx`
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastai.vision.core import imagenet_stats
from test_engine import PAIRS, At, cnn, hooks, last, tensors, weights
from test_peer_defects import Apart
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import ReplayMixUp, image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import tissue_augment
from kdmed.distill.cache import TeacherCache
from kdmed.distill.callbacks import DecoupledKD, LogitKD
from kdmed.distill.features import FeatureKD
from kdmed.distill.logit_losses import soft_target_loss
from kdmed.distill.teacher import MeanTeacher, Teacher

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is no better', 'ignore::DeprecationWarning', 'ignore:You are shadowing')
HALF = ((.5,)*3, (.5,)*3)


def tissue(): return split_groups(synthetic_table(n=96, classes=3, size=16), sizes=(.6, .2, .2))


def learner(cbs, data, bs, seed=0, **kwargs):
    loaders = [DataLoader(TensorDataset(*data), bs=bs, num_workers=0) for _ in range(2)]
    return Learner(DataLoaders(*loaders, device='cpu'), cnn(seed=seed, norm=False), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=cbs, **kwargs)


def fit(learn, epochs=1, lr=.1, processes=1):
    with learn.no_bar():
        if processes == 1: learn.fit(epochs, lr)
        else:
            with learn.distrib_ctx(sync_bn=False, cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=40))]): learn.fit(epochs, lr)
    return learn


def in_step(n, bs, processes):
    "The order in which one process would see the images, so that its batches are those of several"
    return torch.arange(n).reshape(processes, -1, bs).transpose(0, 1).flatten()


def setting(rank, processes, n=32, bs=8):
    "Data and batch size of a process, or of the one that stands for all; other seeds everywhere but in the first"
    x,y = tensors(n=n)
    order = in_step(n, bs, 2) if processes == 1 else slice(None)
    torch.manual_seed(5 + 100*rank)
    return (x[order], y[order]),bs*(2 if processes == 1 else 1)


def gradients(kd, grads):
    def note(learn): grads.append([p.grad.flatten().clone() for p in (*learn.model.parameters(), *kd.projectors.parameters())])
    return At('before_step', note, order=GradientAccumulation.order+1)


# -- what each process does; rank is 0 and processes 1 where it is one for comparison

def steps(rank, processes, folder):
    data,bs = setting(rank, processes)
    teacher,grads,out = cnn(8, seed=1, norm=False),[],io.StringIO()
    before = weights(teacher)
    torch.manual_seed(5 + 100*rank)
    kd = FeatureKD(teacher, PAIRS)
    learn = learner([kd, LogitKD(teacher), gradients(kd, grads)], data, bs, seed=0 if rank == 0 else 77)
    wrapped = []
    learn.add_cb(At('before_batch', lambda learn: wrapped.append((type(learn.model), *(type(m) for t in learn.distill_fit.teachers for m in t.models)))))
    learn.logger = lambda *args, **kwargs: print(*args, file=out)
    torch.manual_seed(5 + 100*rank)
    with contextlib.redirect_stdout(out): fit(learn, 2, processes=processes)
    twice = weights(kd.projectors)
    learn.logger = lambda *args, **kwargs: None
    fit(learn, 1, processes=processes)
    return dict(grads=grads, student=weights(learn), projectors=weights(kd.projectors), twice=twice, teacher=torch.equal(before, weights(teacher)),
                out=out.getvalue(), hooks=hooks(learn.model, teacher), ddp=[issubclass(w[0], DistributedDataParallel) for w in wrapped], teachers={w[1].__name__ for w in wrapped},
                after=type(learn.model).__name__, groups=[len(g) for g in learn.opt.param_lists])


def accumulate(rank, processes, folder):
    data,bs = setting(rank, processes, n=64)
    grads,kd = [],FeatureKD(cnn(8, seed=1, norm=False), PAIRS)
    learn = learner([kd, LogitKD(kd.teacher), GradientAccumulation(2*bs), gradients(kd, grads)], data, bs)
    torch.manual_seed(5 + 100*rank)
    with learn.no_logging(): fit(learn, processes=processes)
    return dict(grads=grads, student=weights(learn), projectors=weights(kd.projectors))


def schedule(rank, processes, folder):
    data,bs = setting(rank, processes)
    kd = FeatureKD(cnn(8, seed=1, norm=False), PAIRS, weight=SchedLin(0, 2))
    learn = learner([kd], data, bs)
    torch.manual_seed(5 + 100*rank)
    with learn.no_logging(): fit(learn, 2, processes=processes)
    return dict(student=weights(learn), projectors=weights(kd.projectors))


def mean(rank, processes, folder):
    data,bs = setting(rank, processes)
    teacher = MeanTeacher(.5)
    learn = learner([LogitKD(teacher), FeatureKD(teacher, PAIRS, pool=True)], data, bs, seed=0 if rank == 0 else 77)
    torch.manual_seed(5 + 100*rank)
    with learn.no_logging(): fit(learn, 2, processes=processes)
    return dict(student=weights(learn), teacher=weights(teacher.model))


def table(rank, processes, folder, *cbs, **kwargs):
    "Images of a table, augmented"
    random.seed(rank), torch.manual_seed(rank)
    dls = image_dls(tissue(), 16, bs=8, augment=tissue_augment(seed=4), device='cpu', **kwargs)
    learn = Learner(dls, cnn(seed=rank, norm=False), opt_func=SGD, cbs=cbs)
    with learn.no_logging(): fit(learn, 2, processes=processes)
    return dict(student=weights(learn), terms={k: v for k,v in last(learn).items() if k != 'time'})


def normalized(rank, processes, folder):
    "A teacher with other normalization, size and order of classes"
    model,gaps = cnn(8, seed=1, norm=False),[]
    def check(learn):
        m,s = (torch.tensor(v)[:, None, None] for v in imagenet_stats)
        pixels = torch.Tensor(learn.x)*s + m
        with torch.no_grad(): theirs = model(F.interpolate(2*pixels-1, (12, 12), mode='bilinear', antialias=True)).flip(1)
        gaps.append((learn.loss_terms.values['logit_kd'] - soft_target_loss(torch.Tensor(learn.pred), theirs, 4.)).abs().item())
    names = list(tissue().attrs['classes'])[::-1]
    return dict(table(rank, processes, folder, LogitKD(Teacher(model, classes=names, size=12, stats=HALF)), At('after_loss', check)), gaps=gaps)


def mixed(rank, processes, folder): return table(rank, processes, folder, LogitKD(cnn(8, seed=1)), DecoupledKD(cnn(8, seed=2)), ReplayMixUp(.4))
def balanced(rank, processes, folder): return table(rank, processes, folder, LogitKD(cnn(8, seed=1)), sampling='balanced')


def cached(rank, processes, folder):
    cache = TeacherCache(cnn(8, seed=1), Path(folder)/f'cache-{processes}')
    seen = table(rank, processes, folder, LogitKD(cache), views=2)
    if processes>1: torch.distributed.barrier() # the other process may still be writing
    return dict(seen, filled=cache.filled)


JOBS = {f.__name__: f for f in (steps, accumulate, schedule, mean, normalized, balanced, mixed, cached)}


def attempt(f, *args):
    try: return f(*args)
    except Exception as e: return dict(error=f'{type(e).__name__}: {e}', trace=traceback.format_exc())


def work(folder):
    "One of two processes"
    torch.set_num_threads(1)
    def broadcast(self, t, rank): # fastai takes a detour through CUDA
        t = torch.tensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
    rank = int(os.environ['RANK'])
    for name,job in JOBS.items(): torch.save(attempt(job, rank, 2, folder), f'{folder}/{name}-{rank}.pt')


@pytest.fixture(scope='module')
def together(tmp_path_factory):
    "What each job left in each of two processes"
    folder = tmp_path_factory.mktemp('processes')
    with socket.socket() as s:
        s.bind(('', 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'ACCELERATE_USE_CPU': 'yes', 'GLOO_SOCKET_IFNAME': 'lo'}
    done = subprocess.run([sys.executable, '-W', 'ignore', __file__, str(folder), port], capture_output=True, text=True, env=env, timeout=500)
    def get(name):
        files = [folder/f'{name}-{rank}.pt' for rank in (0, 1)]
        assert all(f.exists() for f in files), f'{name} left nothing:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
        left = [torch.load(f, weights_only=False) for f in files]
        for rank,l in enumerate(left): assert 'error' not in l, f"process {rank}: {l['error']}\n{l['trace'][-1500:]}"
        return left
    return get


def alone(job, tmp_path): return JOBS[job](0, 1, tmp_path)
def close(a, b, atol=1e-6): return (a-b).abs().max() <= atol


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one_with_twice_the_batch(together, tmp_path):
    "Student and projectors, to 1e-6, though each process began with its own random numbers"
    (first,second),one = together('steps'),alone('steps', tmp_path)
    assert len(first['grads']) == len(one['grads']) == 6
    for other in (first, second):
        for a,b in zip(other['grads'][0], one['grads'][0]): assert close(a, b)
        for a,b in zip(other['grads'][-1], one['grads'][-1]): assert close(a, b, 1e-4)
    assert max(g.abs().max() for g in one['grads'][0]) > 1e-3


@pytest.mark.slow
def test_both_processes_hold_the_same_student_and_projectors(together, tmp_path):
    (first,second),one = together('steps'),alone('steps', tmp_path)
    for key in ('student', 'projectors', 'twice'): assert torch.equal(first[key], second[key]) and close(first[key], one[key], 1e-5)
    assert not torch.equal(first['twice'], first['projectors']), 'projectors do not go on training in a second fit'


@pytest.mark.slow
def test_the_teacher_stays_apart(together):
    "It is not wrapped, moved, or sent to anyone; afterwards the student is itself again"
    for left in together('steps'):
        assert left['teacher'] and left['teachers'] == {'Sequential'} and all(left['ddp']) and left['after'] == 'Sequential'
        assert left['hooks'] == 0 and left['groups'] == [6]


@pytest.mark.slow
def test_the_log_is_printed_once(together):
    first,second = together('steps')
    assert first['out'].count('balanced accuracy') == 1 and first['out'].count('label_loss') <= 1 and len(first['out'].splitlines()) >= 3
    assert second['out'] == ''


@pytest.mark.slow
def test_accumulated_gradients(together, tmp_path):
    left,one = together('accumulate'),alone('accumulate', tmp_path)
    for l in left:
        assert len(l['grads']) == len(one['grads'])
        for a,b in zip(l['grads'][0], one['grads'][0]): assert close(a, b)
        assert close(l['student'], one['student'], 1e-5) and close(l['projectors'], one['projectors'], 1e-5)


@pytest.mark.slow
def test_a_term_whose_weight_begins_at_zero(together, tmp_path):
    "Projectors have no gradients yet when the processes first exchange theirs"
    left,one = together('schedule'),alone('schedule', tmp_path)
    for l in left: assert close(l['student'], one['student'], 1e-5) and close(l['projectors'], one['projectors'], 1e-5)


@pytest.mark.slow
def test_a_mean_teacher_is_the_same_everywhere(together):
    first,second = together('mean')
    assert torch.equal(first['student'], second['student']) and torch.equal(first['teacher'], second['teacher'])
    assert not torch.equal(first['student'], first['teacher'])


@pytest.mark.slow
def test_a_teacher_with_normalization_size_and_class_order_of_its_own(together):
    first,second = together('normalized')
    assert max(*first['gaps'], *second['gaps']) < 1e-3 and torch.equal(first['student'], second['student'])


@pytest.mark.slow
@pytest.mark.parametrize('job', ['balanced', 'mixed', 'cached'])
def test_tables_of_images(together, job):
    "Augmented, drawn evenly, mixed, with kept answers"
    first,second = together(job)
    assert torch.equal(first['student'], second['student']) and first['student'].isfinite().all()
    if job == 'cached': assert first['filled'] > .6


def test_batches_on_another_device_than_normalize():
    "On each of two GPUs, the loaders were made for one"
    dls = image_dls(tissue(), 16, bs=8, augment=tissue_augment(seed=4), device='cpu')
    dl = DistributedDL(dls.train, 1, 2)
    dl.before_iter()
    batch = TensorImage(torch.empty(4, 3, 16, 16, dtype=torch.uint8, device='meta')),torch.zeros(4, device='meta')
    with Apart(): assert dl.after_batch(batch)[0].device.type == 'meta'


if __name__ == '__main__':
    folder,port = sys.argv[1:]
    notebook_launcher(work, (folder,), num_processes=2, use_port=port)
