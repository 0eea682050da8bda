"""Scripts as users write them, killed by `kill -9` again and again until they come through: python killed_script.py FOLDER SEED|every

The scripts train; this file's last part starts each of them many times, in forked processes that share one import of everything,
kills them at random moments, and prints as JSON whether what came out at last is what comes out of a run that nobody killed.
"""
import json, os, random, signal, sys, time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedLin, fit_one_cycle # noqa: F401
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD, OptimWrapper
from fastai.vision.augment import Flip
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kdmed.core.basics import seed_everything
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import ReplayMixUp, image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import Augment, HorizontalFlip, Rotation
from kdmed.train.resume import Resume
from kdmed.distill.cache import TeacherCache
from kdmed.distill.callbacks import FocalKD, LogitKD
from kdmed.distill.features import FeatureKD
from kdmed.distill.teacher import MeanTeacher

# -- what is trained

def cnn(outputs=3):
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.2), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)))

def body_and_head(model): return [list(part.parameters()) for part in model]


class MovingAverage(Callback):
    "An average of the weights that pulls on them a little, so that forgetting it would show"
    run_valid = False
    def __init__(self): self.mean = None
    def after_step(self):
        with torch.no_grad():
            params = list(self.model.parameters())
            self.mean = [p.clone() for p in params] if self.mean is None else [m.lerp(p, .1) for m,p in zip(self.mean, params)]
            for m,p in zip(self.mean, params): p.lerp_(m, .01)
    def state_dict(self): return dict(mean=self.mean)
    def load_state_dict(self, state): self.mean = state['mean']


class Counts(Callback):
    "Has a state, and no state_dict: every fifth batch the learning rate stumbles"
    run_valid,order = False,70
    def __init__(self): self.batches,self.history = 0,[]
    def before_batch(self):
        self.batches += 1
        self.history.append(self.batches%5)
        if self.batches%5==0: self.opt.set_hyper('lr', float(self.opt.hypers[-1]['lr'])/3)


class Regressor(Callback):
    "A term of the loss with a layer of its own, made at the first batch and lent to the optimizer"
    order,run_valid = 5,False
    def __init__(self): self.layer,self.lent = None,False
    def before_fit(self):
        if self.layer is not None: self.lend()
    def make(self, inputs):
        if self.layer is None:
            with torch.random.fork_rng(): self.layer = nn.Linear(inputs, 4)
    def lend(self):
        if self.lent: return
        self.opt.param_lists = [*[list(g) for g in self.opt.param_lists[:-1]], [*self.opt.param_lists[-1], *self.layer.parameters()]]
        self.lent = True
    def after_loss(self):
        self.make(self.pred.shape[1])
        self.lend()
        self.learn.loss_grad = self.learn.loss_grad + self.layer(self.pred).square().mean()
        self.learn.loss = self.learn.loss_grad.detach().clone()
    def after_fit(self):
        ours = {id(p) for p in self.layer.parameters()}
        self.opt.param_lists = [[p for p in g if id(p) not in ours] for g in self.opt.param_lists]
        for p in self.layer.parameters(): self.opt.state.pop(p, None)
        self.lent = False
    def state_dict(self): return dict(layer=None if self.layer is None else self.layer.state_dict(), lent=self.lent)
    def load_state_dict(self, state):
        if state['layer'] is None: return
        self.make(state['layer']['weight'].shape[1])
        self.layer.load_state_dict(state['layer'])
        if state['lent']: self.lend()


def quiet(learn, fit):
    with learn.no_bar(), learn.no_logging(): fit()
    return learn

def shown(learn, fit):
    "With progress bars and the log, as by default; nobody looks"
    with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere): fit()
    return learn

# -- scripts: each takes the folder of its checkpoints, or None, and one for its other files

TISSUE = split_groups(synthetic_table(n=150, classes=3, size=16))

def fine_tuned(resume, home):
    "Two fits with freezing; views, MixUp, balanced classes, accumulated gradients, a regressor"
    seed_everything(0)
    dls = image_dls(TISSUE, 16, bs=16, augment=Augment([HorizontalFlip(), Rotation(20)]), batch_tfms=[Flip()], sampling='balanced')
    cbs = [MixUp(), GradientAccumulation(24), MovingAverage(), Counts(), Regressor(), EarlyStoppingCallback(patience=9)]
    if resume: cbs.append(Resume(resume, every=2))
    learn = Learner(dls, cnn(), splitter=body_and_head, metrics=accuracy, cbs=cbs)
    return quiet(learn, lambda: learn.fine_tune(2, 1e-2, freeze_epochs=1))


def best_of(resume, home):
    "SGD, clipped, ends early, keeps its best model, then goes on with another optimizer"
    seed_everything(1)
    dls = image_dls(TISSUE, 16, bs=16, augment=Augment([HorizontalFlip()]))
    cbs = [ReplayMixUp(seed=3), GradientClip(.5), SaveModelCallback(fname='best'), EarlyStoppingCallback(monitor='accuracy', min_delta=.9, patience=2)]
    if resume: cbs.append(Resume(resume, every=3))
    learn = Learner(dls, cnn(), opt_func=partial(SGD, mom=.9), metrics=accuracy, cbs=cbs, path=home)
    return shown(learn, lambda: (learn.fit(5, 1e-2), learn.fit_one_cycle(1, 1e-3, cbs=MovingAverage(), reset_opt=True)))


class Noisy(Dataset):
    "Plain PyTorch data with random augmentation from three libraries"
    def __init__(self, n):
        generator = torch.Generator().manual_seed(n)
        self.x,self.y = torch.randn(n, 3, 12, 12, generator=generator),torch.randint(3, (n,), generator=generator)
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i]*random.uniform(.9, 1.1) + np.float32(np.random.normal()) + torch.randn(1),self.y[i]


def plain_pytorch(resume, home):
    "PyTorch's loaders and optimizer, random numbers everywhere, a checkpoint after every batch"
    seed_everything(2)
    dls = DataLoaders(DataLoader(Noisy(60), batch_size=8, shuffle=True), DataLoader(Noisy(20), batch_size=8))
    cbs = [MovingAverage(), Counts()] + ([Resume(resume, minutes=1e-6)] if resume else [])
    learn = Learner(dls, cnn(), loss_func=nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), metrics=accuracy, cbs=cbs)
    return quiet(learn, lambda: (learn.fit_one_cycle(2, 1e-2), learn.fit(1, 1e-3)))

def workers(resume, home):
    "The same with worker processes, which outlive a killed parent by a moment"
    seed_everything(3)
    dls = DataLoaders(DataLoader(Noisy(48), batch_size=8, shuffle=True, num_workers=1), DataLoader(Noisy(16), batch_size=8))
    learn = Learner(dls, cnn(), loss_func=nn.CrossEntropyLoss(), cbs=[Counts()] + ([Resume(resume, every=2)] if resume else []))
    return quiet(learn, lambda: learn.fit_one_cycle(2, 1e-2))

def distilled(resume, home):
    "Two fits of a student that learns from kept answers of a teacher and from its own average: projectors, schedules, MixUp, accumulated gradients, freezing"
    seed_everything(4)
    dls = image_dls(TISSUE, 16, bs=16, augment=Augment([HorizontalFlip(), Rotation(20)]), views=2)
    teacher,average = TeacherCache(cnn(), folder=home/'answers', every=2),MeanTeacher(decay=.9)
    cbs = [LogitKD(teacher, temperature=SchedLin(4, 1)), FeatureKD(teacher, [('0', '0')], pool=True, weight=SchedLin(0, 2)), LogitKD(average, weight=.5),
           FocalKD(gamma=1), ReplayMixUp(seed=1), GradientAccumulation(24)]
    if resume: cbs.append(Resume(resume, every=2))
    learn = Learner(dls, cnn(), splitter=body_and_head, metrics=accuracy, cbs=cbs)
    return shown(learn, lambda: learn.fine_tune(2, 1e-2, freeze_epochs=1))

SCRIPTS = dict(fine_tuned=fine_tuned, best_of=best_of, plain_pytorch=plain_pytorch, workers=workers, distilled=distilled)

def outcome(learn):
    "All that must be equal"
    r,average = learn.recorder,next((cb for cb in learn.cbs if isinstance(cb, MovingAverage)), None)
    return dict(weights=dict(learn.model.state_dict()), moments=[{k: v for k,v in s.items()} for s in learn.opt.state_dict()['state']] if hasattr(learn.opt, 'cbs')
                else learn.opt.state_dict()['state'], average=average and average.mean, values=[[None if x is None else float(x) for x in v] for v in r.values], lrs=list(map(float, r.lrs)),
                losses=[l.item() for l in r.losses], iters=list(r.iters), next=[torch.rand(1).item(), random.random(), np.random.rand()],
                counts=next((cb.history for cb in learn.cbs if isinstance(cb, Counts)), None),
                projectors=[dict(cb.projectors.state_dict()) for cb in learn.cbs if isinstance(cb, FeatureKD)])

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype==b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b

# -- ways to die

def die(): os.kill(os.getpid(), signal.SIGKILL)

def after_calls(n):
    "At the n-th function call from now on, whichever it is; a worker process that is forked meanwhile does not count"
    left,own = [n],os.getpid()
    def count(frame, event, arg):
        if event=='call' or event=='c_call':
            left[0] -= 1
            if left[0]<0 and os.getpid()==own: die()
    sys.setprofile(count)
    return left

def within_write(n, place):
    "While the n-th file is written: half of it on the disk, before its first or second change of names, or when it is there"
    writes,replace,save = [0],os.replace,torch.save
    def deadly_save(state, f, **kwargs):
        if not str(getattr(f, 'name', '')).endswith('.part'): return save(state, f, **kwargs)
        writes[0] += 1
        if writes[0]==n and place=='half':
            f.write(os.urandom(1000))
            f.flush()
            die()
        return save(state, f, **kwargs)
    def deadly_replace(a, b):
        previous = str(b).endswith('.previous.pt')
        if writes[0]>=n and place==('first' if previous else 'second'): die()
        replace(a, b)
        if writes[0]==n and place=='done' and not previous: die()
    torch.save,os.replace = deadly_save,deadly_replace

def start(script, resume, home, arm=None, delay=None):
    "Run a script in a forked process: 'killed', or where its outcome is"
    result = home/'outcome.pt'
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            if arm: arm()
            learn = script(resume, home)
            sys.setprofile(None)
            torch.save(outcome(learn), home/'outcome.part')
            os.rename(home/'outcome.part', result)
        except BaseException as e:
            print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        if not result.exists(): os.kill(pid, signal.SIGKILL)
    _,status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): return 'killed'
    if status: raise SystemExit(f'{script.__name__} failed')
    return result

def calls_of(script, home):
    "Number of function calls, and seconds, of a whole run"
    def arm():
        left = after_calls(10**12)
        import atexit # noqa: F401
        script.left = left
    home.mkdir()
    begun = time.time()
    read,write = os.pipe()
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        arm()
        script(home/'checkpoints', home)
        sys.setprofile(None)
        os.write(write, str(10**12-script.left[0]).encode())
        os._exit(0)
    os.close(write)
    calls = int(os.read(read, 100))
    os.waitpid(pid, 0)
    return calls,time.time()-begun

def torture(script, home, rng, least):
    "Kill a script at random moments until it has died `least` times and come through"
    straight = home/'straight'
    straight.mkdir(parents=True)
    goal = torch.load(start(script, None, straight), weights_only=True)
    calls,seconds = calls_of(script, home/'counted')
    kinds,runs,differing = [],0,set()
    while len(kinds)<least:
        runs += 1
        here = home/f'run{runs}'
        here.mkdir()
        while True:
            kind = rng.choice(['calls']*2 + ['time', 'write']) if len(kinds)<least or rng.random()<.5 else 'none'
            arm,delay = None,None
            if kind=='calls': arm = partial(after_calls, rng.randrange(int(.4*calls)))
            if kind=='write': arm = partial(within_write, rng.randint(1, 6), rng.choice(['half', 'first', 'second', 'done']))
            if kind=='time': delay = rng.uniform(0, .5*seconds)
            result = start(script, here/'checkpoints', here, arm, delay)
            if result!='killed': break
            kinds.append(kind)
        got = torch.load(result, weights_only=True)
        differing |= {k for k in goal if not same(goal[k], got[k])}
        again = torch.load(start(script, here/'checkpoints', here), weights_only=True) # finished: loads what came out
        differing |= {f'{k} of a finished run' for k in goal if not same(goal[k], again[k])}
    return dict(kills=len(kinds), kinds={k: kinds.count(k) for k in sorted(set(kinds))}, runs=runs, calls=calls, seconds=round(seconds, 2), differing=sorted(differing))

def at_every_write(script, home):
    "Kill a script when its n-th checkpoint is there, and again at the next one, for every n: which differ, or fail"
    straight = home/'straight'
    straight.mkdir(parents=True)
    goal,n,wrong = torch.load(start(script, None, straight), weights_only=True),0,[]
    while True:
        n += 1
        here = home/f'write{n}'
        here.mkdir()
        result = start(script, here/'checkpoints', here, partial(within_write, n, 'done'))
        if result!='killed': break
        start(script, here/'checkpoints', here, partial(within_write, 1, 'done'))
        try: got = torch.load(start(script, here/'checkpoints', here), weights_only=True)
        except SystemExit as e: wrong.append(f'write {n}: {e}')
        else: wrong += [f'write {n}: {k} differs' for k in goal if not same(goal[k], got[k])]
    return dict(writes=n-1, wrong=wrong)

if __name__=='__main__':
    folder,seed = Path(sys.argv[1]),sys.argv[2]
    for name in sys.argv[3:] or SCRIPTS:
        begun = time.time()
        if sys.argv[2]=='every': report = at_every_write(SCRIPTS[name], folder/name)
        else: report = torture(SCRIPTS[name], folder/name, random.Random(f'{seed} {name}'), dict(fine_tuned=6, workers=3, distilled=6).get(name, 4))
        print(json.dumps(dict(script=name, took=round(time.time()-begun, 1), **report)), flush=True)
