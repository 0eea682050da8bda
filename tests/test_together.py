"""Two processes of a launcher train what one would with batches twice as large: in Python, and as the command.

Run as a script by `torchrun`, this file is what the two processes do."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from safetensors.torch import load_file

from kdmed.core.processes import leave_processes, process_count, process_rank, wait_for_all
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import tissue_augment
from kdmed.distill.cache import TeacherCache
from kdmed.distill.callbacks import LogitKD
from kdmed.distill.features import FeatureKD
from kdmed.distill.methods import check_fit, distill, fit_classifier
from kdmed.distill.multidim import MultiDimKD
from kdmed.distill.multistage import MultiStageKD
from kdmed.models.create import create_student
from kdmed.models.exits import add_exits

pytestmark = pytest.mark.slow
SIZE = 32
CLASSES = synthetic_table(n=30, classes=3, size=16).attrs['classes']


def vit(seed, depth=2):
    "A small ViT: LayerNorm, no statistics of a batch"
    torch.manual_seed(seed)
    options = dict(patch_size=8, embed_dim=32, num_heads=2, depth=depth)
    return create_student('vit_tiny_patch16_224', CLASSES, SIZE, 'multiclass', **options)


def loaders(images=107, bs=16, **kwargs):
    "Images in a number that no batch divides; a batch of one process is its share"
    table = split_groups(synthetic_table(n=images, classes=3, size=SIZE), sizes=(.6, .2, .2))
    how = dict(augment=tissue_augment(seed=4), views=2, device='cpu') | kwargs
    return image_dls(table, SIZE, bs=bs//process_count(), **how)


class Seen(Callback):
    "Which images in which views each epoch had"
    run_valid = False
    def before_fit(self): self.epochs = []
    def before_train(self): self.epochs.append([])
    def before_batch(self): self.epochs[-1] += list(zip(*(v.tolist() for v in self.x.replay)))


def outcome(learn, kds=(), **more):
    projectors = [p.detach().flatten() for kd in kds if kd.projectors is not None for p in kd.projectors.parameters()]
    log = learn.history.drop(columns='time', errors='ignore').astype(float).to_numpy()
    return dict(weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]), log=torch.tensor(log),
                projectors=torch.cat(projectors) if projectors else torch.zeros(0),
                kind=type(learn.model).__name__, loaders={type(dl).__name__ for dl in learn.dls.loaders}, **more)


def taught(make, student=None, teacher=None, dls=None, cbs=(), epochs=2):
    kds = []
    def method(student, teacher):
        kds.extend(make(teacher))
        return kds
    learn = distill(dls or loaders(), student or vit(0), teacher or vit(5, 4), method, epochs, .05, cbs=cbs,
                    progress=False, optimizer=SGD)
    return outcome(learn, kds)


# -- what each process does

def logits(folder):
    seen = Seen()
    return taught(lambda t: [LogitKD(t)], cbs=seen) | dict(seen=seen.epochs)
def features(folder): return taught(lambda t: [FeatureKD(t, [('blocks.0', 'blocks.1')]), LogitKD(t)])
def later(folder): # projectors that have no gradients at first
    return taught(lambda t: [FeatureKD(t, [('blocks.0', 'blocks.1')], weight=lambda p: max(0., p-.5))])
def narrow(folder): # a teacher with other widths
    torch.manual_seed(5)
    wide = create_student('vit_tiny_patch16_224', CLASSES, SIZE, 'multiclass', patch_size=8, embed_dim=48, num_heads=2,
                          depth=4)
    return taught(lambda t: [MultiDimKD(t)], teacher=wide)
def cached(folder):
    cache = TeacherCache(vit(5, 4), Path(folder)/f'cache-{process_count()}')
    left = taught(lambda t: [MultiDimKD(t)], teacher=cache)
    wait_for_all()
    return left | dict(filled=cache.filled)
def stages(folder): return taught(lambda t: [MultiStageKD(t)], add_exits(vit(0, 3)))
def untrained_exits(folder): return taught(lambda t: [LogitKD(t)], add_exits(vit(0, 3)))
def balanced(folder):
    seen = Seen()
    return taught(lambda t: [LogitKD(t)], dls=loaders(sampling='balanced'), cbs=seen) | dict(seen=seen.epochs)
def few(folder): # fewer images than a process takes
    return taught(lambda t: [LogitKD(t)], dls=loaders(images=37, bs=64), epochs=3)
def middling(folder): # more than a process takes, fewer than a step
    return taught(lambda t: [LogitKD(t)], dls=loaders(images=75, bs=64), epochs=3)
def batch_norm(folder):
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for _ in range(2):
            check_fit(loaders(), create_student('test_efficientnet', CLASSES, SIZE, 'multiclass')) # says nothing
            learn = fit_classifier(loaders(), 'test_efficientnet', 1, progress=False)
    about = [str(w.message) for w in said if 'BatchNorm' in str(w.message)]
    return outcome(learn) | dict(said=about)


JOBS = {f.__name__: f for f in (logits, features, later, narrow, cached, stages, untrained_exits, balanced, few,
                                middling, batch_norm)}


def work(folder):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    for name,job in JOBS.items():
        torch.save(job(folder), f'{folder}/{name}-{process_rank()}.pt')
    leave_processes()


def fail(argv):
    "The command, in which the second process fails"
    from kdmed.cli import app, commands
    if process_rank()==1:
        def train(*args): raise ValueError('this process has no luck')
        commands._train = train
    sys.exit(app.main(argv))


# -- how they are started

def environment(folder):
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'GLOO_SOCKET_IFNAME': 'lo',
            'KDMED_STORE': str(folder/'stores'), 'PYTHONWARNINGS': 'ignore'}


def launch(folder, *what, processes=2):
    "Start a script or a module with its arguments, in processes of a launcher or in one of its own"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    start = [sys.executable] if processes==1 else [
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(processes), '--master_port', port]
    return subprocess.Popen([*start, *map(str, what)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment(folder))


def kill(process):
    "A launcher and its processes, which are not in its group, at once"
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    for pid in (process.pid, *map(int, children)): os.kill(pid, signal.SIGKILL)
    return process.communicate()[0]


def output(process, seconds=400):
    "What it printed, without what the launcher says; and its exit status"
    try: text,_ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f'it hangs:\n{kill(process)[-3000:]}')
    return text,process.returncode


@pytest.fixture(scope='module')
def together(tmp_path_factory):
    "What each job left in each of two processes"
    folder = tmp_path_factory.mktemp('processes')
    text,_ = output(launch(folder, __file__, 'work', folder))
    def get(name):
        files = [folder/f'{name}-{rank}.pt' for rank in (0, 1)]
        assert all(f.exists() for f in files), f'{name} left nothing:\n{text[-5000:]}'
        return [torch.load(f, weights_only=False) for f in files]
    return get


def gap(a, b): return (a.nan_to_num(-1)-b.nan_to_num(-1)).abs().max().item() if len(a) else 0.


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('job', [name for name in JOBS if name!='batch_norm'])
def test_two_processes_learn_what_one_does_with_batches_twice_as_large(together, job, tmp_path):
    "Weights, projectors and every column of the log; the two agree to the bit"
    (first,second),one = together(job),JOBS[job](tmp_path)
    for key in ('weights', 'projectors', 'log'): # a term without weight has no mean
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, equal_nan=True, msg=key)
    assert gap(first['weights'], one['weights']) < 1e-5 and gap(first['projectors'], one['projectors']) < 1e-5
    assert first['log'].shape==one['log'].shape and gap(first['log'], one['log']) < 1e-3
    assert (first['kind'], first['loaders'])==(one['kind'], one['loaders']) # nothing is left of how it was trained
    if job=='narrow': assert len(first['projectors'])
    if job=='cached': assert first['filled'] > .6


def test_each_image_once_an_epoch(together):
    "In its view, in one of the two processes"
    first,second = together('logits')
    for epoch,(mine,theirs) in enumerate(zip(first['seen'], second['seen'])):
        images = [i for i,_ in mine+theirs]
        assert len(set(images))==len(images) >= 48 and {v for _,v in mine+theirs}=={epoch%2}


def test_weighted_draws_are_shared(together, tmp_path):
    "What the two draw, step by step, is what one draws"
    (first,second),one = together('balanced'),balanced(tmp_path)
    for mine,theirs,all_of_them in zip(first['seen'], second['seen'], one['seen']):
        assert sorted(mine+theirs)==sorted(all_of_them)


def test_batch_norm_runs_and_says_once_what_differs(together):
    first,second = together('batch_norm')
    assert torch.equal(first['weights'], second['weights']) and first['weights'].isfinite().all()
    assert len(first['said'])==1 and 'by the 8 images of each process, not by the 16 of a step' in first['said'][0]
    assert second['said']==[]


# -- the command

SETTINGS = ('--size', 32, '--teacher', 'test_vit', '--student', 'test_vit', '--augment', 'none', '--optimizer', 'sgd',
            '--repeats', 1, '--method', 'logit', '--teacher-epochs', 1, '--lr', .01, '--no-copies')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Class folders with 90 images"
    from PIL import Image
    folder = tmp_path_factory.mktemp('images')
    for i,row in enumerate(synthetic_table(n=90, classes=3, size=SIZE, seed=3).itertuples()):
        (folder/'data'/str(row.label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(folder/'data'/str(row.label)/f'{i}.png')
    return folder


def command(images, out, *options, processes=2, device='cpu'):
    bs = 16//processes
    return launch(images, '-m', 'kdmed.cli', 'distill', '--data', images/'data', '--out', out, '--bs', bs, *SETTINGS,
                  '--device', device, *options, processes=processes)


def same_students(a, b, most=1e-5):
    for cell in ('teacher-0', 'plain-0', 'distilled-0'):
        one,other = (load_file(folder/'cells'/cell/'student.safetensors') for folder in (a, b))
        for name in one: assert (one[name].float()-other[name].float()).abs().max() <= most, (cell, name)


@pytest.fixture(scope='module')
def whole(images):
    "A run of two processes"
    text,status = output(command(images, images/'two', '--epochs', 3))
    assert status==0, text[-3000:]
    return images/'two',text


def test_the_command_in_two_processes(whole, images):
    out,text = whole
    assert text.count('2 processes train together: a step takes 2 × 8 = 16 images')==1
    assert text.count('Report, student and settings are in')==1 and text.count('epoch 3/3')==2, text[-3000:]
    assert json.loads((out/'settings.json').read_text())['environment']['processes']==2
    text,status = output(command(images, images/'one', '--epochs', 3, processes=1))
    assert status==0, text[-3000:]
    same_students(out, images/'one')


def test_both_killed_and_started_again(whole, images):
    "The same command resumes, and ends with the same metrics"
    run,out = command(images, images/'killed', '--epochs', 3),images/'killed'
    until,checkpoint = time.monotonic()+300,out/'cells'/'distilled-0'/'fit'/'fit_0.previous.pt'
    while not checkpoint.exists() and run.poll() is None and time.monotonic()<until: time.sleep(.01)
    assert run.poll() is None, run.communicate()[0][-3000:]
    kill(run)
    text,status = output(command(images, out, '--epochs', 3))
    assert status==0 and text.count('Finished before, not trained again')==1, text[-3000:]
    same_students(out, whole[0], 0)
    def metrics(folder):
        read = json.loads((folder/'metrics.json').read_text())
        return json.dumps([read[key] for key in ('differences', 'harm', 'calibration', 'agreements')])
    assert metrics(out)==metrics(whole[0])
    for cell in ('teacher-0', 'plain-0', 'distilled-0'):
        one,other = ((folder/'cells'/cell/'test.npy').read_bytes() for folder in (out, whole[0]))
        assert one==other


def test_other_settings_are_refused_once(whole, images):
    text,status = output(launch(images, '-m', 'kdmed.cli', 'distill', '--data', images/'data', '--out', whole[0],
                                '--bs', 8, *SETTINGS, '--epochs', 4, '--device', 'cpu'))
    assert status!=0 and text.count('kdmed: error:')==1 and 'already holds a run of other settings' in text


@pytest.mark.parametrize('options,message', [
    (('--metric', 'nonsense'), '--metric'), (('--epochs', 0), '--epochs'), (('--method', 'nonsense'), '--method'),
    ((), '--device cuda:1 is one GPU'), (('--sync-bn',), '--sync-bn needs several GPUs')])
def test_an_error_of_all_is_told_once(images, tmp_path, options, message):
    text,status = output(command(images, tmp_path/'out', *options, device='cpu' if options else 'cuda:1'), 200)
    assert status!=0 and text.count('kdmed: error:')==1 and message in text, text[-3000:]
    assert 'kdmed: stopped' not in text


def test_an_error_of_one_ends_all(images, tmp_path):
    run = launch(images, __file__, 'fail', 'distill', '--data', images/'data', '--out', tmp_path/'out', *SETTINGS,
                 '--device', 'cpu')
    text,status = output(run, 200)
    assert status!=0 and text.count('this process has no luck')==1 and text.count('kdmed: error:')==1, text[-3000:]


def test_a_recipe_in_two_processes(images):
    out = images/'recipe'
    settings = 'size=64', 'epochs=1', 'teacher_epochs=1', 'batch_size=8', 'shares=.6,.2,.2'
    text,status = output(launch(images, '-m', 'kdmed.cli', 'recipe', 'kd_convnext', '--scale', .1, '--data',
                                images/'data', '--out', out, '--device', 'cpu', '--set', *settings))
    assert status==0 and text.count('Everything is in')==1, text[-3000:]
    assert text.count('2 processes train together')==1 and (out/'report.md').is_file()


def test_what_trains_nothing_speaks_once(images):
    for what in (('check', images/'data', '--no-copies'), ('recipe', 'deit_lung'), ('--version',)):
        text,status = output(launch(images, '-m', 'kdmed.cli', *what), 200)
        lines = [line for line in text.splitlines() if line and 'torch/distributed/run.py' not in line]
        assert status==0 and lines.count(lines[0])==1, text


if __name__=='__main__':
    if sys.argv[1]=='work': work(sys.argv[2])
    else: fail(sys.argv[2:])
