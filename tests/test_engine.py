"The distillation engine under every way fastai can train: schedules, freezing, precision, memory formats, compilation, mixing, missing labels, memory."
import math
import random
import warnings
import weakref
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedLin, fine_tune, fit_one_cycle, lr_find # noqa: F401
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import params
from fastai.vision.augment import Flip
from fastai.vision.core import imagenet_stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

from kdmed.core.basics import unwrap
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import UNLABELED, ClassLossFlat, FindingsLossFlat, ReplayCutMix, ReplayMixUp, image_dls
from kdmed.data.splits import split_groups
from kdmed.models.create import add_distillation_token, create_student, truncate_vit
from kdmed.distill.callbacks import DecoupledKD, DistillTokenKD, DistKD, FocalKD, LogitKD, NormalizedKD
from kdmed.distill.features import AttentionKD, ChannelKD, FeatureKD, RelationalKD, SimilarityKD
from kdmed.distill.fit import DistillCallback
from kdmed.distill.logit_losses import bernoulli_soft_target_loss, decoupled_loss, soft_target_loss
from kdmed.distill.teacher import MeanTeacher, Teacher
from kdmed.train.resume import Resume

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is no better', 'ignore:.*lr_scheduler', 'ignore::DeprecationWarning', 'ignore:You are shadowing', 'ignore:load_learner', 'ignore:Saved file')


def cnn(width=4, outputs=3, norm=True, seed=None):
    "Layers: 0 convolution, 1 norm, 2 ReLU in place, 3 convolution, 4 norm, 5 ReLU, 6 pool, 7 flatten, 8 linear"
    if seed is not None: torch.manual_seed(seed)
    def bn(n): return nn.BatchNorm2d(n) if norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), bn(width), nn.ReLU(inplace=norm), nn.Conv2d(width, 2*width, 3, 2, 1), bn(2*width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*width, outputs))


LOSSES = {'multiclass': nn.CrossEntropyLoss, 'binary': nn.BCEWithLogitsLoss, 'multilabel': nn.BCEWithLogitsLoss}
OUTPUTS = {'multiclass': 3, 'binary': 1, 'multilabel': 4}
PAIRS = [('2', '2'), ('5', '5')]


def tensors(n=48, size=12, task='multiclass', seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g) if task == 'multiclass' else torch.randint(2, (n, OUTPUTS[task]), generator=g).float()
    return torch.randn(n, 3, size, size, generator=g),y


def learner(cbs=(), model=None, data=None, bs=16, task='multiclass', **kwargs):
    "A Learner over plain tensors, never shuffled"
    data = data or tensors(task=task)
    dls = DataLoaders(*[DataLoader(TensorDataset(*data), batch_size=bs) for _ in range(2)])
    if len(data) > 2: dls.n_inp = len(data)-1
    return Learner(dls, cnn(seed=0, outputs=OUTPUTS[task]) if model is None else model, loss_func=kwargs.pop('loss_func', LOSSES[task]()), cbs=cbs, **kwargs)


def quietly(learn, epochs=1, lr=1e-2, how='fit', **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(epochs, lr, **kwargs)
    return learn


def weights(model): return nn.utils.parameters_to_vector(getattr(model, 'model', model).parameters()).detach().clone()
def hooks(*models): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ('forward' in m.__dict__) for model in models for m in model.modules())
def columns(learn): return list(learn.recorder.metric_names)
def last(learn): return dict(zip(columns(learn)[1:], learn.recorder.values[-1]))


@pytest.fixture(scope='module')
def tissue(): return split_groups(synthetic_table(n=96, classes=3, size=24), sizes=(.6, .2, .2))


class At(Callback):
    "Call a function of the Learner at one event of training batches"
    run_valid = False
    def __init__(self, event, f, order=DistillCallback.order+1):
        self.order = order
        setattr(self, event, lambda: f(self.learn))


class Count:
    "How often a module was called, and in which mode"
    def __init__(self, module): self.calls,self.training,self.handle = 0,[],module.register_forward_hook(self)
    def __call__(self, module, *_):
        self.calls += 1
        self.training.append(any(m.training for m in module.modules()))


# -- fits of every kind

def test_lr_find_leaves_everything_as_it_was(tmp_path):
    "Student, projectors, optimizer and an average of the student: a learning rate test ruins what it trains, and puts it back"
    kd,mean = FeatureKD(cnn(8, seed=1), PAIRS),MeanTeacher(.5)
    learn = learner([kd, LogitKD(mean)], path=tmp_path)
    quietly(learn)
    student,projectors,average = weights(learn),weights(kd.projectors),weights(mean.model)
    groups = [len(g) for g in learn.opt.param_lists]
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=15, show_plot=False, start_lr=1e-3, end_lr=100)
    assert torch.equal(weights(learn), student) and torch.equal(weights(kd.projectors), projectors)
    assert torch.equal(weights(mean.model), average), 'the mean teacher holds what the learning rate test made of the student'
    assert [len(g) for g in learn.opt.param_lists] == groups and not hooks(learn.model, kd.teacher.model)
    quietly(learn)
    assert np.isfinite([v for v in last(learn).values() if not isinstance(v, str)]).all()


def test_a_mean_teacher_starts_from_the_student_that_is_fitted(tmp_path):
    "Not from one that a learning rate test has ruined"
    mean = MeanTeacher(.999)
    learn = learner([LogitKD(mean)], path=tmp_path)
    start = weights(learn)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=15, show_plot=False, start_lr=1e-3, end_lr=100)
    begun = []
    learn.add_cb(At('before_batch', lambda learn: begun.append(weights(mean.model))))
    quietly(learn)
    assert torch.equal(begun[0], start)


def test_fit_one_cycle_twice():
    kd = FeatureKD(cnn(8, seed=1), PAIRS)
    learn = learner([kd, LogitKD(kd.teacher)])
    groups,seen = None,[]
    for _ in range(2):
        quietly(learn, 2, how='fit_one_cycle')
        seen.append((weights(kd.projectors), columns(learn), [id(p) for p in kd.projectors.parameters()]))
        assert groups in (None, [len(g) for g in learn.opt.param_lists])
        groups = [len(g) for g in learn.opt.param_lists]
    assert not torch.equal(seen[0][0], seen[1][0]) and seen[0][1:] == seen[1][1:]
    assert columns(learn) == ['epoch', 'train_loss', 'valid_loss', 'label_loss', 'feature_kd', 'logit_kd', 'time']
    assert not hooks(learn.model, kd.teacher.model)


class BodyAndHead(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body,self.head = cnn(width, seed=0)[:8],nn.Linear(2*width, 3)
    def forward(self, x): return self.head(self.body(x))


def body_and_head(model): return [params(model.body), params(model.head)]


def test_fine_tune_freezes_the_body_and_trains_projectors_throughout():
    kd = FeatureKD(cnn(8, seed=1), [('body.5', '5')])
    moved = []
    def note(learn): moved.append((learn.opt.frozen_idx, *(p.detach().clone() for p in (learn.model.body[3].weight, learn.model.head.weight, kd.projectors[0].weight))))
    learn = learner([kd, At('before_batch', note)], model=BodyAndHead(), splitter=body_and_head)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, 1e-2, freeze_epochs=1)
    frozen,free = ([m[1:] for m in moved if m[0] == idx] for idx in (1, 0))
    assert len(frozen) == 3 and len(free) == 6
    assert torch.equal(frozen[0][0], frozen[-1][0]) and not torch.equal(free[0][0], free[-1][0])
    for phase in (frozen, free):
        for i in (1, 2): assert not torch.equal(phase[0][i], phase[-1][i])
    assert [len(g) for g in learn.opt.param_lists] == [len(params(learn.model.body)), 2]
    assert learn.splitter is body_and_head


def test_unfreezing_a_student_does_not_unfreeze_the_teacher_inside_it():
    "`unfreeze` wants gradients for all that a splitter lists, a teacher within the body too"
    class Holds(BodyAndHead):
        def __init__(self):
            super().__init__()
            self.body.add_module('teacher', cnn(8, seed=1))
        def forward(self, x): return self.head(self.body[:8](x)) + 0*self.body.teacher(x).sum()
    model = Holds()
    teacher = model.body.teacher
    before = deepcopy(teacher.state_dict())
    asked = []
    learn = learner([LogitKD(Teacher(teacher)), At('before_backward', lambda learn: asked.append(any(p.requires_grad for p in teacher.parameters())))], model=model,
                    splitter=body_and_head, wd=.1)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-2)
    assert not any(asked), 'the teacher had gradients'
    for k,v in teacher.state_dict().items(): assert torch.equal(v, before[k]), f'{k} of the teacher moved'


@pytest.mark.parametrize('opt_func', [SGD, Adam])
def test_gradient_accumulation_equals_the_big_batch(opt_func):
    "Without BatchNorm, gradients and steps of two batches of 8 are those of one of 16, the projectors' too"
    runs = []
    for bs,cbs in ((16, []), (8, [GradientAccumulation(16)])):
        torch.manual_seed(5)
        kd = FeatureKD(cnn(8, seed=1, norm=False), PAIRS)
        grads = []
        def note(learn): grads.append(torch.cat([p.grad.flatten().clone() for p in (*learn.model.parameters(), *kd.projectors.parameters())]))
        learn = learner([kd, LogitKD(kd.teacher, weight=.7, label_weight=.3), *cbs, At('before_step', note, order=GradientAccumulation.order+1)],
                        model=cnn(seed=0, norm=False), bs=bs, opt_func=opt_func)
        quietly(learn, 2)
        runs.append((torch.stack(grads), weights(learn), weights(kd.projectors), last(learn)))
    (g1,w1,p1,l1),(g2,w2,p2,l2) = runs
    assert g1.shape == g2.shape and (g1[0]-g2[0]).abs().max() < 1e-6
    assert (w1-w2).abs().max() < 1e-5 and (p1-p2).abs().max() < 1e-5
    for k in ('label_loss', 'feature_kd', 'logit_kd'): assert l1[k] == pytest.approx(l2[k], rel=1e-3)


def test_gradients_are_clipped_after_all_terms_are_in():
    kd = FeatureKD(cnn(8, seed=1), PAIRS, weight=50.)
    norms = []
    def norm(ps): return torch.stack([p.grad.norm() for p in ps]).norm().item()
    def note(when): return lambda learn: norms.append((when, norm(list(learn.model.parameters())), norm(list(kd.projectors.parameters()))))
    cbs = [At('before_step', note('before'), order=GradientClip.order-1), GradientClip(.1), At('before_step', note('after'), order=GradientClip.order+1)]
    learn = quietly(learner([kd, *cbs]))
    assert min(n for when,n,_ in norms if when == 'before') > .1 and max(n for when,n,_ in norms if when == 'after') <= .1001
    assert np.isfinite([n for _,_,n in norms]).all() and weights(learn).isfinite().all()


def test_a_torch_optimizer_trains_the_projectors():
    "Through fastai's wrapper"
    kd = FeatureKD(cnn(8, seed=1), PAIRS)
    learn = learner([kd], opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.AdamW, **kw))
    quietly(learn)
    first = weights(kd.projectors)
    quietly(learn)
    assert not torch.equal(first, weights(kd.projectors))
    assert sum(len(g) for g in learn.opt.param_lists) == len(list(learn.model.parameters()))


# -- precision, memory format, compilation

class CPUAutocast(MixedPrecision):
    "Mixed precision as fastai enters and leaves it, on the CPU"
    def __init__(self, dtype): self.dtype = dtype
    def before_fit(self): self.autocast = torch.autocast('cpu', self.dtype)
    def before_backward(self): pass
    def before_step(self): pass
    def after_step(self): pass
    def after_fit(self): self.autocast = None


METHODS = {'LogitKD': lambda t: LogitKD(t), 'standardized': lambda t: LogitKD(t, standardize=True), 'mse': lambda t: LogitKD(t, loss='mse'),
           'cross_entropy': lambda t: LogitKD(t, loss='cross_entropy'), 'DecoupledKD': lambda t: DecoupledKD(t), 'NormalizedKD': lambda t: NormalizedKD(t),
           'DistKD': lambda t: DistKD(t), 'FocalKD': lambda t: FocalKD(), 'FeatureKD': lambda t: FeatureKD(t, PAIRS), 'pooled': lambda t: FeatureKD(t, PAIRS, pool=True),
           'AttentionKD': lambda t: AttentionKD(t, PAIRS), 'ChannelKD': lambda t: ChannelKD(t, PAIRS), 'RelationalKD': lambda t: RelationalKD(t, PAIRS),
           'SimilarityKD': lambda t: SimilarityKD(t, PAIRS)}


def first_batch(make, *cbs, **kwargs):
    "Terms and the student's gradient at the first batch"
    seen = {}
    def note(learn):
        seen.update(terms={k: v.item() for k,v in learn.loss_terms.values.items()}, grad=torch.cat([p.grad.flatten().float() for p in learn.model.parameters()]))
        raise CancelFitException
    torch.manual_seed(3)
    teacher,ran = cnn(8, seed=1),[]
    teacher[0].register_forward_hook(lambda m, i, o: ran.append(o.dtype))
    def running(learn): seen['taught'] = ran[-1:] # none where there is no teacher
    quietly(learner([make(Teacher(teacher)), *cbs, At('after_loss', running), At('after_backward', note)], **kwargs))
    return seen


@pytest.mark.parametrize('name', METHODS)
def test_half_precision(name):
    "bf16 and fp16: terms near those of float32, finite gradients that point the same way"
    exact = first_batch(METHODS[name])
    for dtype in (torch.bfloat16, torch.float16):
        half = first_batch(METHODS[name], CPUAutocast(dtype))
        assert half['taught'] in ([], [dtype]), 'the teacher did not run in the precision of the student'
        for k,v in half['terms'].items(): assert v == pytest.approx(exact['terms'][k], rel=.1, abs=2e-2)
        assert half['grad'].isfinite().all() and F.cosine_similarity(half['grad'], exact['grad'], dim=0) > .95


@pytest.mark.skipif(not torch.cuda.is_available(), reason='fastai enters mixed precision on CUDA only')
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision_on_a_gpu(mode):
    kd = FeatureKD(cnn(8, seed=1), PAIRS)
    learn = learner([kd, LogitKD(kd.teacher), GradientClip(1.), MixedPrecision(mode)])
    learn.dls.device = torch.device('cuda')
    quietly(learn, 3, how='fit_one_cycle')
    assert next(kd.teacher.model.parameters()).is_cuda and weights(learn).isfinite().all() and weights(kd.projectors).isfinite().all()


@pytest.mark.parametrize('name', METHODS)
def test_channels_last_changes_no_term(name):
    plain = first_batch(METHODS[name])
    def turn(learn): learn.xb = tuple(x.to(memory_format=torch.channels_last) for x in learn.xb)
    there = first_batch(METHODS[name], ChannelsLast(), At('before_batch', turn, order=-1))
    assert there['terms'] == pytest.approx(plain['terms'], rel=1e-4, abs=1e-6)
    assert F.cosine_similarity(there['grad'], plain['grad'], dim=0) > .999


def test_the_teacher_follows_channels_last():
    teacher = Teacher(cnn(8, seed=1))
    def turn(learn): learn.xb = tuple(x.to(memory_format=torch.channels_last) for x in learn.xb)
    quietly(learner([LogitKD(teacher), ChannelsLast(), At('before_batch', turn, order=-1)]))
    assert teacher.model[0].weight.is_contiguous(memory_format=torch.channels_last) and not teacher.model[0].weight.is_contiguous()


@pytest.mark.slow(seconds=36)
@pytest.mark.parametrize('way', ['torch.compile(model)', 'model.compile()'])
def test_a_compiled_student(way):
    "Compiled once, not for every batch; features are captured, projectors learn, no hook stays; numbers are those without"
    from torch._dynamo.utils import counters
    torch.compiler.reset()
    counters.clear()
    graphs,terms = [],{}
    for compiled in (False, True):
        torch.manual_seed(3)
        kd,model = FeatureKD(cnn(8, seed=1), [('1', '5')]),nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        if compiled and way == 'model.compile()': model.compile(backend='aot_eager')
        elif compiled: model = torch.compile(model)
        note = At('after_batch', lambda learn: graphs.append(counters['stats']['unique_graphs']))
        learn = learner([kd, LogitKD(kd.teacher), *([note] if compiled else [])], model=model, data=tensors(n=64))
        quietly(learn)
        first = weights(kd.projectors)
        quietly(learn, 2)
        terms[compiled] = {k: v for k,v in last(learn).items() if k != 'time'}
        assert not hooks(unwrap(learn.model), kd.teacher.model) and not torch.equal(first, weights(kd.projectors))
    assert counters['stats']['calls_captured'] > 0, 'nothing was compiled'
    assert graphs[1] == graphs[3] and graphs[5] == graphs[-1], f'compiled again for every batch: {graphs}'
    assert terms[True] == pytest.approx(terms[False], rel=1e-3)
    torch.compiler.reset()


# -- teachers

def test_a_student_that_contains_its_teacher():
    "Its teacher is in eval mode and without gradients at every step, its statistics never move"
    class Holds(nn.Module):
        def __init__(self): super().__init__(); self.teacher,self.net = cnn(8, seed=1),cnn(seed=0)
        def forward(self, x): return self.net(x) + .1*self.teacher(x).detach()
    model = Holds()
    before,count = deepcopy(model.teacher.state_dict()),Count(model.teacher)
    modes = []
    learn = learner([LogitKD(model.teacher), FeatureKD(model.teacher, [('net.5', '5')]),
                     At('after_batch', lambda learn: modes.append((learn.model.training, learn.model.net[1].training, learn.model.teacher[1].training)))], model=model)
    quietly(learn, 2)
    assert set(modes) == {(True, True, False)} and not any(count.training)
    for k,v in model.teacher.state_dict().items(): assert torch.equal(v, before[k]), k
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def test_a_student_cannot_be_its_own_frozen_teacher():
    "The same object as both would freeze the student without a word"
    model = cnn(seed=0)
    with pytest.raises(ValueError, match='the teacher is the student itself.*MeanTeacher'): quietly(learner([LogitKD(model)], model=model))
    assert all(p.requires_grad for p in model.parameters())
    quietly(learner([LogitKD(deepcopy(model))], model=model))


def test_one_forward_of_the_teacher_a_batch_whatever_the_callbacks():
    model = cnn(8, seed=1)
    learn = learner([LogitKD(model), DecoupledKD(model), FeatureKD(model, PAIRS), AttentionKD(Teacher(model), PAIRS), SimilarityKD(model, [('5', '5')]), FocalKD()])
    quietly(learn) # the first fit rehearses and examines
    count = Count(model)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    rehearsal = 1
    assert count.calls == rehearsal + 2*3 and not any(count.training)
    assert len({id(cb.teacher) for cb in learn.cbs if getattr(cb, 'teacher', None) is not None}) == 1


def test_validation_and_prediction_run_no_teacher(tissue):
    teacher = cnn(8, seed=1)
    dls = image_dls(tissue, 24, bs=16, device='cpu')
    learn = Learner(dls, cnn(seed=0), cbs=[LogitKD(teacher), FeatureKD(teacher, PAIRS), DecoupledKD(MeanTeacher())])
    quietly(learn)
    counts = [Count(cb.teacher.model) for cb in learn.cbs if isinstance(cb, DistillCallback)]
    x,y = (torch.cat([torch.Tensor(t) for t in parts]) for parts in zip(*dls.valid))
    with learn.no_bar(), learn.no_logging():
        loss, = learn.validate()
        preds,targets = learn.get_preds()
        learn.predict(tissue.image[0])
    assert [c.calls for c in counts] == [0, 0, 0]
    for c in counts: c.handle.remove()
    with torch.no_grad(): logits = learn.model.eval()(x)
    assert loss == pytest.approx(F.cross_entropy(logits, y.long()).item(), rel=1e-5) and torch.allclose(preds, logits.softmax(1), atol=1e-5)
    assert len(learn.metrics) == 0 and not hooks(learn.model, teacher)


def test_valid_loss_is_the_label_loss_in_every_epoch():
    learn = learner([LogitKD(cnn(8, seed=1), weight=7.)])
    quietly(learn, 2)
    x,y = learn.dls.valid.dataset.tensors
    assert last(learn)['valid_loss'] == pytest.approx(F.cross_entropy(learn.model.eval()(x), y).item(), rel=1e-5)


def test_a_mean_teacher_is_an_average_of_the_student():
    mean,path = MeanTeacher(.6),[]
    learn = learner([LogitKD(mean), FeatureKD(mean, [('5', '5')])])
    path.append({k: v.clone() for k,v in learn.model.state_dict().items()})
    learn.add_cb(At('after_step', lambda learn: path.append({k: v.clone() for k,v in learn.model.state_dict().items()})))
    quietly(learn, 2)
    average = path[0]
    for step,new in enumerate(path[1:], 1):
        d = min(.6, (1+step)/(10+step))
        average = {k: d*average[k] + (1-d)*v if v.is_floating_point() else v for k,v in new.items()}
    for k,v in mean.model.state_dict().items(): assert torch.allclose(v.float(), average[k].float(), atol=1e-6), k
    assert not any(p.requires_grad for p in mean.model.parameters())


def test_two_mean_teachers_of_different_memory_stay_two():
    fast,slow = MeanTeacher(.1),MeanTeacher(.99)
    kds = [LogitKD(fast), FeatureKD(slow, [('5', '5')])]
    quietly(learner(kds), 2)
    assert kds[0].teacher.decay == .1 and kds[1].teacher.decay == .99


def test_several_teachers_are_averaged():
    models = [cnn(8, seed=s) for s in (1, 2)]
    learn = learner([LogitKD(models, temperature=2.)])
    def check(learn):
        with torch.no_grad(): theirs = sum(m(learn.x) for m in models)/2
        assert learn.loss_terms.values['logit_kd'] == pytest.approx(soft_target_loss(learn.pred, theirs, 2.).item(), rel=1e-5)
    learn.add_cb(At('after_loss', check))
    quietly(learn)


def test_several_teachers_weighted_by_their_validation_loss():
    good,bad = cnn(8, seed=1),cnn(8, seed=2)
    quietly(learner(model=good), 5)
    with torch.no_grad(): bad[-1].weight.mul_(-20)
    kd = LogitKD(Teacher([good, bad], weights='valid_loss'))
    learn = learner([kd])
    quietly(learn)
    x,y = learn.dls.valid.dataset.tensors
    with torch.no_grad(): shares = torch.tensor([-F.cross_entropy(m(x), y) for m in (good, bad)]).softmax(0).tolist()
    assert kd.teacher.weights == pytest.approx(shares, rel=1e-4) and shares[0] > .51


def test_a_teacher_of_other_size_normalization_and_class_order(tissue):
    "Its answer in the loss is what it says to pixels as it knows them, in the student's order of classes"
    half = ((.5,)*3, (.5,)*3)
    dls = image_dls(tissue, 24, bs=16, device='cpu')
    names = dls.classes[::-1]
    model = cnn(8, seed=1)
    learn = Learner(dls, cnn(seed=0), cbs=LogitKD(Teacher(model, classes=names, size=20, stats=half), temperature=3.))
    def check(learn):
        mean,std = (torch.tensor(v)[:, None, None] for v in imagenet_stats)
        pixels = torch.Tensor(learn.x)*std + mean
        with torch.no_grad(): theirs = model(F.interpolate(2*pixels-1, (20, 20), mode='bilinear', antialias=True)).flip(1)
        assert learn.loss_terms.values['logit_kd'].item() == pytest.approx(soft_target_loss(torch.Tensor(learn.pred), theirs, 3.).item(), rel=1e-3)
    learn.add_cb(At('after_loss', check))
    quietly(learn)


def test_a_learner_as_teacher_brings_size_normalization_and_classes(tissue):
    half = ((.5,)*3, (.5,)*3)
    theirs = Learner(image_dls(tissue, 20, bs=16, stats=half, device='cpu'), cnn(8, seed=1))
    kd = LogitKD(theirs)
    assert kd.teacher.members[0].size == 20 and kd.teacher.members[0].stats == half and kd.teacher.classes == theirs.dls.classes
    quietly(Learner(image_dls(tissue, 24, bs=16, device='cpu'), cnn(seed=0), cbs=kd))


def test_a_teacher_with_normalization_of_its_own_and_a_student_without_any(tissue):
    "Nobody can tell what the student's pixels are: an error, or a warning, but no wrong answers in silence"
    theirs = Learner(image_dls(tissue, 24, bs=16, device='cpu'), cnn(8, seed=1))
    learn = learner([LogitKD(theirs)])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try: quietly(learn)
        except ValueError as e: said.append(e)
    assert any('normaliz' in str(getattr(w, 'message', w)).lower() for w in said)


# -- missing labels, findings, class weights

def hidden(task, y, rows):
    "Targets with some rows unlabeled"
    y = y.clone()
    y[rows] = UNLABELED if task == 'multiclass' else float('nan')
    return y


def loss_for(task):
    return ClassLossFlat() if task == 'multiclass' else FindingsLossFlat()


@pytest.mark.parametrize('task', LOSSES)
def test_unlabeled_images_have_distillation_terms_alone(task):
    "Also where a whole batch has no label: the gradient is then the term's, and nothing is NaN"
    x,y = tensors(task=task)
    y = hidden(task, y, torch.tensor([*range(16), *range(20, 48, 2)])) # all of the first batch, half of the others
    teacher = cnn(8, OUTPUTS[task], seed=1)
    soft = soft_target_loss if task == 'multiclass' else bernoulli_soft_target_loss
    checked = []
    def check(learn):
        with torch.no_grad(): theirs = teacher(learn.x)
        terms = learn.loss_terms.values
        assert terms['logit_kd'].item() == pytest.approx(soft(learn.pred, theirs, 4.).item(), rel=1e-4)
        known = learn.y != UNLABELED if task == 'multiclass' else ~learn.y.isnan()
        if task == 'multiclass': labels = F.cross_entropy(learn.pred[known], learn.y[known]) if known.any() else torch.tensor(0.)
        else: labels = F.binary_cross_entropy_with_logits(learn.pred[known], learn.y[known]) if known.any() else torch.tensor(0.)
        assert terms['label_loss'].item() == pytest.approx(labels.item(), rel=1e-4)
        assert learn.loss.item() == pytest.approx((terms['label_loss']+terms['logit_kd']).item(), rel=1e-5)
        checked.append(known.sum().item())
    dls_valid = TensorDataset(*tensors(task=task, seed=1))
    learn = learner([LogitKD(teacher), At('after_loss', check)], data=(x, y), task=task, loss_func=loss_for(task))
    learn.dls = DataLoaders(learn.dls.train, DataLoader(dls_valid, batch_size=16))
    before = weights(learn)
    quietly(learn, 2)
    assert checked[0] == 0 and max(checked) > 0 and weights(learn).isfinite().all() and not torch.equal(before, weights(learn))


@pytest.mark.parametrize('name', [n for n in METHODS if n != 'FocalKD'])
@pytest.mark.parametrize('class_weights', [None, torch.tensor([1., 2., 5.])], ids=['', 'weighted'])
def test_a_batch_without_labels_moves_the_student_by_every_method(name, class_weights):
    x,y = tensors(n=16)
    data = x,torch.full_like(y, UNLABELED)
    learn = learner([METHODS[name](cnn(8, seed=1))], data=data, loss_func=ClassLossFlat(weight=class_weights))
    learn.dls = DataLoaders(learn.dls.train, DataLoader(TensorDataset(x, y), batch_size=16))
    before = weights(learn)
    quietly(learn)
    assert last(learn)['label_loss'] == 0 and weights(learn).isfinite().all() and (weights(learn)-before).abs().max() > 1e-4


@pytest.mark.parametrize('task', LOSSES)
def test_the_focal_loss_leaves_unlabeled_images_out(task):
    x,y = tensors(task=task)
    rows = torch.arange(0, 48, 2)
    grads = []
    for data in ((x, hidden(task, y, rows)), (x[1::2], y[1::2])):
        torch.manual_seed(0)
        grad = []
        learn = learner([FocalKD(), At('after_backward', lambda learn: grad.append(torch.cat([p.grad.flatten().clone() for p in learn.model.parameters()])))],
                        data=data, bs=len(data[0]), task=task, model=cnn(seed=0, outputs=OUTPUTS[task], norm=False), loss_func=loss_for(task))
        learn.dls = DataLoaders(learn.dls.train, DataLoader(TensorDataset(x, y), batch_size=48))
        quietly(learn)
        grads += grad
    assert torch.allclose(*grads, atol=1e-6), 'an image without a label moved the student'


@pytest.mark.parametrize('task', ['binary', 'multiclass', 'multilabel'])
@pytest.mark.parametrize('label_loss', ['plain', 'focal'])
def test_missing_labels_of_a_table(task, label_loss):
    "Binary tables have class numbers, UNLABELED among them, where findings have NaN: an unlabeled image gives the label loss no gradient"
    table = split_groups(synthetic_table(n=120, classes=dict(binary=2).get(task, 3), size=16, task=task), sizes=(.6, .2, .2))
    attrs = dict(table.attrs)
    rows = table.index[table.split == 'train'][::2]
    table.loc[rows, 'label'] = None
    table.attrs = attrs
    dls = image_dls(table, 16, bs=16, device='cpu')
    learn = Learner(dls, cnn(outputs=dls.c, seed=0, norm=False), cbs=[LogitKD(cnn(8, dls.c, seed=1), weight=0), *([FocalKD()] if label_loss == 'focal' else [])])
    grads = []
    def check(learn):
        y = learn.y.reshape(len(learn.x), -1).float()
        known = ~(y.isnan() | (y == UNLABELED)).all(1)
        grad, = torch.autograd.grad(learn.loss_grad, learn.pred, retain_graph=True)
        assert known.any() and not known.all() and grad.reshape(len(y), -1)[~known].abs().max() == 0
        assert learn.loss.item() < 5
        grads.append(grad)
    learn.add_cb(At('after_loss', check))
    quietly(learn)
    assert grads


def test_masked_findings_do_not_count_in_the_term():
    "Whatever the teacher says of a finding that is unknown, in a row that says something about others"
    x,y = tensors(task='multilabel')
    g = torch.Generator().manual_seed(1)
    unknown = torch.rand(y.shape, generator=g) < .4
    unknown[torch.arange(48), torch.randint(4, (48,), generator=g)] = False
    y[unknown] = float('nan')
    class Says(nn.Module):
        "Answers of a table, whatever the image"
        def __init__(self, logits): super().__init__(); self.logits = logits
        def forward(self, x): return torch.stack([self.logits[round(float(i))] for i in x[:, 0, 0, 0]])
    x[:, 0, 0, 0] = torch.arange(48)
    answers = torch.randn(48, 4, generator=g)
    fitted = []
    for make in (LogitKD, lambda t: LogitKD(t, loss='mse')):
        for wild in (0., 1e3):
            torch.manual_seed(0)
            learn = learner([make(Says(answers + wild*unknown))], data=(x, y), task='multilabel', loss_func=loss_for('multilabel'))
            learn.dls = DataLoaders(learn.dls.train, DataLoader(TensorDataset(x, torch.nan_to_num(y)), batch_size=16))
            fitted.append(weights(quietly(learn)))
        assert torch.equal(*fitted[-2:]), 'a masked entry of the teacher reached the student'
    wild = learner([LogitKD(Says(answers + 1e3*~unknown))], data=(x, y), task='multilabel', loss_func=loss_for('multilabel'))
    wild.dls = learn.dls
    assert not torch.equal(weights(quietly(wild)), fitted[0])


def test_class_weights_act_on_label_and_distillation_terms_alike():
    heavy = torch.tensor([1., 2., 5.])
    teacher = cnn(8, seed=1)
    def check(name, literal):
        def f(learn):
            with torch.no_grad(): theirs = teacher(learn.x)
            assert learn.loss_terms.values[name].item() == pytest.approx(literal(learn.pred.double(), theirs.double(), learn.y).item(), rel=1e-4)
        return At('after_loss', f)
    def weighted_kl(z, t, y):
        p = F.softmax(t/4, 1)*heavy
        w = p.sum(1, keepdim=True)
        p = p/w
        return 16*(w*p*(p.log()-F.log_softmax(z/4, 1))).sum()/len(z)
    def dkd(z, t, y):
        return sum(heavy[yi]*decoupled_loss(zi[None], ti[None], yi[None], 4.) for zi,ti,yi in zip(z, t, y))/len(y)
    for make,name,literal in ((LogitKD, 'logit_kd', weighted_kl), (DecoupledKD, 'decoupled_kd', dkd)):
        quietly(learner([make(teacher), check(name, literal)], loss_func=nn.CrossEntropyLoss(weight=heavy)))
        quietly(learner([make(teacher), FocalKD(class_weights=heavy), check(name, literal)]))


def test_a_custom_loss_of_findings_is_not_taken_for_classes():
    "Float targets in the shape of the outputs are findings, whatever the loss is called: softmax would not see them rise together"
    def asymmetric(logits, y): return F.binary_cross_entropy(logits.sigmoid(), y)
    learn = learner([LogitKD(cnn(8, 4, seed=1))], task='multilabel', loss_func=asymmetric)
    teacher = learn.logit_kd.teacher.model
    def check(learn):
        with torch.no_grad(): theirs = teacher(learn.x)
        assert learn.loss_terms.values['logit_kd'].item() == pytest.approx(bernoulli_soft_target_loss(learn.pred, theirs, 4.).item(), rel=1e-4)
    learn.add_cb(At('after_loss', check))
    quietly(learn)


# -- mixing

LABEL_LOSSES = {'plain': lambda: [], 'focal': lambda: [FocalKD()], 'focal, weighted': lambda: [FocalKD(class_weights=torch.tensor([1., 2., 5.]))]}


@pytest.mark.parametrize('mix', [lambda: MixUp(.4), lambda: CutMix(1.), lambda: ReplayMixUp(.4), lambda: ReplayCutMix(1.)], ids=['MixUp', 'CutMix', 'ReplayMixUp', 'ReplayCutMix'])
@pytest.mark.parametrize('focal', LABEL_LOSSES)
def test_mixing_reaches_student_teacher_and_targets_alike(tissue, mix, focal):
    "The teacher sees the student's mixed images, and whatever needs a target is a blend of both targets' losses"
    dls = image_dls(tissue, 24, bs=16, device='cpu')
    teacher,count = cnn(8, seed=1),[]
    heavy = torch.tensor([1., 2., 5.]) if 'weighted' in focal else torch.ones(3)
    def literal(z, y): # focal loss of each image
        p = F.softmax(z, 1).gather(1, y[:, None])[:, 0]
        return -heavy[y]*(1-p)**(2 if 'focal' in focal else 0)*p.log()
    def check(learn):
        handler = next(cb for cb in learn.cbs if isinstance(cb, (MixUp, CutMix, ReplayMixUp)))
        z,lam = torch.Tensor(learn.pred),handler.lam.reshape(-1)
        ys = [y.as_subclass(torch.Tensor).long() for y in (handler.yb1[0], learn.y)]
        with torch.no_grad(): theirs = teacher(torch.Tensor(learn.x))
        terms = {k: v.item() for k,v in learn.loss_terms.values.items()}
        assert terms['label_loss'] == pytest.approx(((1-lam)*literal(z, ys[0]) + lam*literal(z, ys[1])).mean().item(), rel=1e-4)
        share = (1-lam)*torch.ones(len(z)),lam*torch.ones(len(z))
        dkd = sum(s*heavy[y]*torch.stack([decoupled_loss(z[i:i+1], theirs[i:i+1], y[i:i+1], 4.) for i in range(len(z))]) for s,y in zip(share, ys)).mean()
        assert terms['decoupled_kd'] == pytest.approx(dkd.item(), rel=1e-3)
        count.append(lam)
    learn = Learner(dls, cnn(seed=0), cbs=[LogitKD(teacher), DecoupledKD(teacher), mix(), *LABEL_LOSSES[focal](), At('after_loss', check)])
    quietly(learn)
    assert count and any(((.01 < lam) & (lam < .99)).any() for lam in count)


@pytest.mark.parametrize('task', ['binary', 'multilabel'])
@pytest.mark.parametrize('mix', [lambda: MixUp(.4), lambda: CutMix(1.), lambda: ReplayMixUp(.4)], ids=['MixUp', 'CutMix', 'ReplayMixUp'])
@pytest.mark.parametrize('focal', [False, True])
def test_mixing_of_other_tasks(task, mix, focal):
    dls = image_dls(split_groups(synthetic_table(n=96, classes=2 if task == 'binary' else 3, size=16, task=task), sizes=(.6, .2, .2)), 16, bs=16, device='cpu')
    plain,learned = [],[]
    for gamma in ((None, 0) if focal else (None,)): # the focal loss at gamma 0 is the plain loss, mixed or not
        random.seed(0), torch.manual_seed(0)
        dls.train.rng,dls.train.epoch = random.Random(0),0
        learn = Learner(dls, cnn(outputs=dls.c, seed=0), cbs=[LogitKD(cnn(8, dls.c, seed=1)), mix(), *([FocalKD(gamma=0)] if gamma == 0 else [])])
        torch.manual_seed(0)
        learned.append(weights(quietly(learn)))
        plain.append(last(learn)['label_loss'])
    assert np.isfinite(plain).all() and (not focal or torch.allclose(*learned, atol=1e-4))


def test_mixing_with_missing_labels_weighs_as_the_plain_loss_does():
    "The focal loss at gamma 0 is the plain loss, under ReplayMixUp with unlabeled images too"
    table = split_groups(synthetic_table(n=96, classes=3, size=16), sizes=(.6, .2, .2))
    attrs = dict(table.attrs)
    table.loc[table.index[table.split == 'train'][::2], 'label'] = None
    table.attrs = attrs
    dls,losses = image_dls(table, 16, bs=16, device='cpu'),[]
    for cbs in ([], [FocalKD(gamma=0)]):
        dls.train.rng,dls.train.epoch = random.Random(0),0
        learn = Learner(dls, cnn(seed=0), cbs=[LogitKD(cnn(8, seed=1)), ReplayMixUp(.4), *cbs])
        quietly(learn)
        losses.append(last(learn)['label_loss'])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# -- what fastai ranks, saves and exports

def test_early_stopping_and_checkpoints_rank_on_the_label_loss(tmp_path):
    "A distillation term that falls while the label loss rises must not keep a run going"
    x,y = tensors(n=32)
    teacher = cnn(8, seed=1)
    with torch.no_grad(): teacher[-1].weight.mul_(30)
    learn = learner([LogitKD(teacher, weight=100., label_weight=0), SaveModelCallback(fname='best', with_opt=True), EarlyStoppingCallback(patience=2)],
                    data=(x, y), path=tmp_path, metrics=[])
    with learn.no_bar(), learn.no_logging(): learn.fit(30, 3e-2)
    losses = [v[columns(learn).index('valid_loss')-1] for v in learn.recorder.values]
    assert len(losses) < 30 and len(losses) == losses.index(min(losses))+1+2
    assert F.cross_entropy(learn.model.eval()(x), y).item() == pytest.approx(min(losses), rel=1e-5), 'not the best by label loss'


def test_checkpoints_with_projectors_can_be_loaded(tmp_path):
    "`SaveModelCallback(with_opt=True)` saves the optimizer while projectors are in it, and loads it when they are gone"
    kd = FeatureKD(cnn(8, seed=1), PAIRS)
    learn = learner([kd, SaveModelCallback(fname='best', with_opt=True)], path=tmp_path)
    quietly(learn, 2)
    learn.save('after')
    quietly(learn)
    learn.load('after')
    quietly(learn)
    assert weights(learn).isfinite().all()


def test_export_load_predict_with_callbacks_attached(tissue, tmp_path):
    dls = image_dls(tissue, 24, bs=16, device='cpu')
    teacher = cnn(64, seed=1)
    cbs = [LogitKD(teacher), FeatureKD(teacher, PAIRS), FocalKD(), ReplayMixUp(.4), DecoupledKD(Teacher([teacher, cnn(64, seed=2)])), SimilarityKD(MeanTeacher(), [('5', '5')])]
    learn,plain = Learner(dls, cnn(seed=0), cbs=cbs, path=tmp_path),Learner(dls, cnn(seed=0), path=tmp_path)
    quietly(learn), quietly(plain)
    learn.export('learner.pkl'), plain.export('plain.pkl')
    own,theirs = ((tmp_path/name).stat().st_size for name in ('learner.pkl', 'plain.pkl'))
    assert own - theirs < 20_000 and 4*sum(p.numel() for p in teacher.parameters()) > 200_000
    loaded = load_learner(tmp_path/'learner.pkl')
    with learn.no_bar(), loaded.no_bar():
        assert torch.allclose(loaded.predict(tissue.image[0])[2], learn.predict(tissue.image[0])[2], atol=1e-6)
    assert list(loaded.model.state_dict()) == list(plain.model.state_dict())
    quietly(learn) # exporting takes nothing from the Learner
    with pytest.raises(ValueError, match='loaded from a file'):
        loaded.dls = dls
        quietly(loaded)


# -- interrupts

class Stop(Callback):
    "Raise at the second batch, once"
    def __init__(self, event, error, order=200): self.error,self.order,self.armed = error,order,True; setattr(self, event, self.stop)
    def stop(self):
        if self.training and self.armed and self.iter == 1:
            self.armed = False
            raise self.error('stop')


EVENTS = ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch']


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_a_fit_after_an_interrupted_fit(event, error):
    "No hook is left, memory is let go, and the next fits train as if nothing had been"
    teacher = cnn(8, seed=1)
    kd,stop = FeatureKD(teacher, PAIRS),Stop(event, error)
    learn = learner([kd, LogitKD(teacher), stop])
    with pytest.raises(error): quietly(learn)
    assert not hooks(learn.model, teacher), 'hooks are left on a model'
    state = {k: v.clone() for k,v in learn.model.state_dict().items()}
    loss, = learn.validate()
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, state[k])
    for _ in range(2): quietly(learn)
    assert columns(learn) == ['epoch', 'train_loss', 'valid_loss', 'label_loss', 'feature_kd', 'logit_kd', 'time']
    assert sum(len(g) for g in learn.opt.param_lists) == len(list(learn.model.parameters()))
    assert not hooks(learn.model, teacher) and kd.teacher._batch is None and learn.metrics == []
    assert len(learn.splitter(learn.model)) == len(list(learn.model.parameters()))


def test_an_interrupted_fit_can_be_exported(tissue, tmp_path):
    dls = image_dls(tissue, 24, bs=16, device='cpu')
    learn = Learner(dls, cnn(seed=0), cbs=[FeatureKD(cnn(64, seed=1), PAIRS), Stop('before_batch', KeyboardInterrupt)], path=tmp_path)
    with pytest.raises(KeyboardInterrupt): quietly(learn)
    learn.export('learner.pkl')
    assert (tmp_path/'learner.pkl').stat().st_size < 80_000


@pytest.mark.parametrize('event, order', [('after_epoch', 1001), ('after_fit', -2000), ('after_fit', 999)])
def test_a_fit_stopped_between_its_last_epoch_and_its_end(event, order, tmp_path):
    "No batch is left to train then, and what the end saves must be loaded by the next start"
    def start(stopped=False):
        stop = Callback()
        def interrupt():
            if learn.epoch==1: raise KeyboardInterrupt
        if stopped: setattr(stop, event, interrupt); stop.order = order
        learn = learner([FeatureKD(cnn(8, seed=1), PAIRS), LogitKD(MeanTeacher()), Resume(tmp_path/'run'), stop])
        return quietly(learn, 2)
    with pytest.raises(KeyboardInterrupt): start(stopped=True)
    ended,loaded = start(),start()
    assert torch.equal(weights(ended.model), weights(loaded.model))


def test_a_callback_taken_away_after_an_interrupt_leaves_no_projectors():
    kd = FeatureKD(cnn(8, seed=1), PAIRS)
    learn = learner([kd, Stop('after_loss', KeyboardInterrupt)])
    with pytest.raises(KeyboardInterrupt): quietly(learn)
    learn.remove_cb(kd)
    quietly(learn)
    assert columns(learn) == ['epoch', 'train_loss', 'valid_loss', 'time']
    assert sum(len(g) for g in learn.opt.param_lists) == len(list(learn.model.parameters()))


# -- schedules, nothing where the weight is nothing

def test_weights_and_temperature_follow_the_progress_of_the_fit():
    teacher = cnn(8, seed=1)
    seen = []
    def check(learn):
        p = learn.train_iter/6
        with torch.no_grad(): theirs = teacher(learn.x)
        terms = learn.loss_terms.values
        soft = soft_target_loss(learn.pred, theirs, 4-3*p)
        if p: assert terms['logit_kd'].item() == pytest.approx(soft.item(), rel=1e-4)
        assert ('logit_kd' in terms) == (p > 0), 'a term of weight zero is not computed'
        assert learn.loss.item() == pytest.approx(((1-.5*p)*F.cross_entropy(learn.pred, learn.y) + 2*p*soft).item(), rel=1e-4)
        seen.append(p)
    quietly(learner([LogitKD(teacher, temperature=SchedLin(4, 1), weight=SchedLin(0, 2), label_weight=SchedLin(1, .5)), At('after_loss', check)]), 2)
    assert seen == pytest.approx([i/6 for i in range(6)])


def test_weight_zero_is_the_plain_student_to_the_last_bit(tissue):
    "With dropout, random batch transforms and shuffling: the callbacks draw no random number that the student would have drawn"
    def run(*cbs):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        dls = image_dls(tissue, 24, bs=16, device='cpu', batch_tfms=Flip(p=.5))
        model = nn.Sequential(*cnn(seed=0)[:8], nn.Dropout(.5), nn.Linear(8, 3))
        torch.manual_seed(1)
        return quietly(Learner(dls, model, cbs=cbs), 2, how='fit_one_cycle').model.state_dict()
    teacher = cnn(8, seed=1)
    plain,zero = run(),run(LogitKD(teacher, weight=0), FeatureKD(teacher, PAIRS, weight=0), DecoupledKD(teacher, weight=0), SimilarityKD(MeanTeacher(), [('5', '5')], weight=0))
    for k,v in plain.items(): assert torch.equal(v, zero[k]), k


# -- features

def test_two_sets_of_features_on_the_same_layers():
    teacher = cnn(8, seed=1)
    kds = [FeatureKD(teacher, PAIRS, weight=.2), FeatureKD(teacher, PAIRS[::-1], weight=2.), AttentionKD(teacher, PAIRS)]
    def check(learn):
        with torch.no_grad():
            theirs = {n: teacher[:int(n)+1](learn.x) for n in '25'}
            ours = {n: v.detach() for n,v in student.items()}
        for kd in kds[:2]:
            hints = [F.mse_loss(p(ours[a]), theirs[b]) for p,(a,b) in zip(kd.projectors, kd.pairs)]
            assert learn.loss_terms.values[kd.term_name].item() == pytest.approx(sum(hints).item()/2, rel=1e-4)
    learn = learner([*kds, At('after_loss', check)])
    student = {}
    for n in '25': learn.model[int(n)].register_forward_hook(lambda m, i, o, n=n: student.__setitem__(n, o.clone()))
    quietly(learn)
    assert columns(learn)[3:6] == ['label_loss', 'feature_kd', 'feature_kd_2'] and not torch.equal(weights(kds[0].projectors), weights(kds[1].projectors[::-1]))


MODELS = {
    'swin': (lambda: create_student('swin_tiny_patch4_window7_224', 3, size=32), 'layers.1'),
    'vit': (lambda: create_student('vit_tiny_patch16_224', 3, size=32), 'blocks.3'),
    'convnext': (lambda: create_student('convnext_atto', 3, size=32), 'stages.1'),
    'maxvit': (lambda: create_student('maxvit_pico_rw_256', 3, size=64), 'stages.1'),
    'resnet': (lambda: create_student('resnet10t', 3, size=32), 'layer2'),
    'deit': (lambda: create_student('deit_tiny_distilled_patch16_224', 3, size=32), 'blocks.3'),
}


@pytest.fixture(scope='module')
def zoo():
    made = {}
    def get(name):
        if name not in made: made[name] = MODELS[name][0]()
        return deepcopy(made[name]),MODELS[name][1]
    return get


def by_hand(model, layer, x):
    "A layer's output as a map [B, C, H, W], the format told by name, not by shape"
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o.detach()))
    with torch.no_grad(): model(x)
    handle.remove()
    out, = kept
    kind = type(model).__name__
    if kind == 'SwinTransformer': return out.permute(0, 3, 1, 2)
    if 'VisionTransformer' in kind:
        tokens = out[:, model.num_prefix_tokens:]
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).reshape(len(out), -1, side, side)
    return out


CROSS = [('swin', 'convnext'), ('vit', 'resnet'), ('maxvit', 'vit'), ('convnext', 'vit'), ('resnet', 'swin'), ('deit', 'convnext')]


@pytest.mark.slow_after(4)
@pytest.mark.parametrize('teacher_name,student_name', CROSS)
@pytest.mark.parametrize('pool', [False, True])
def test_features_of_any_kind_of_teacher_for_any_kind_of_student(zoo, teacher_name, student_name, pool):
    "NHWC, tokens and maps, pooled and by place: the term is that of maps made by hand, and both student and projector learn"
    (teacher,t),(student,s) = zoo(teacher_name),zoo(student_name)
    size = 64 if 'maxvit' in (teacher_name, student_name) else 32
    kd = FeatureKD(Teacher(teacher, size=size), [(s, t)], pool=pool)
    if size == 64 and student_name == 'vit': student = create_student('vit_tiny_patch16_224', 3, size=64)
    seen = []
    def check(learn):
        ours,theirs = by_hand(learn.model, s, learn.x),by_hand(teacher, t, learn.x)
        if pool: ours,theirs = (f.mean((2, 3), keepdim=True) for f in (ours, theirs))
        side = min(ours.shape[-1], theirs.shape[-1])
        ours,theirs = (F.adaptive_avg_pool2d(f, side) for f in (ours, theirs))
        assert kd.projectors[0].weight.shape[:2] == (theirs.shape[1], ours.shape[1])
        with torch.no_grad(): seen.append((learn.loss_terms.values['feature_kd'].item(), F.mse_loss(kd.projectors[0](ours), theirs).item()))
        raise CancelFitException
    x,y = tensors(n=6, size=size)
    learn = learner([kd, At('after_loss', check)], model=student, data=(x, y), bs=6)
    learn.add_cb(At('before_batch', lambda learn: learn.model.eval(), order=DistillCallback.order-1)) # no random depth, and the same statistics in both passes
    quietly(learn)
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-3)
    learn.remove_cb(At)
    before = weights(kd.projectors),weights(learn)
    quietly(learn)
    assert not torch.equal(before[0], weights(kd.projectors)) and not torch.equal(before[1], weights(learn))


@pytest.mark.parametrize('make', [AttentionKD, ChannelKD])
def test_a_map_of_one_place_is_refused(make):
    "Where there is one place, every distribution over places is the same: the term would be 0 for ever, without a word"
    student = nn.Sequential(*cnn(seed=0)[:6], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match='place'): quietly(learner([make(cnn(8, seed=1), [('6', '6')])], model=student))


# -- memory

class Live(TorchDispatchMode):
    "Bytes of tensors that are alive at once, at most, of those made while this is on"
    def __init__(self): super().__init__(); self.now,self.peak,self.seen = 0,0,set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, out)
        return out

    def note(self, t):
        storage = t.untyped_storage()
        if storage._cdata in self.seen: return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, key, nbytes):
        self.seen.discard(key)
        self.now -= nbytes


def peak_of(f):
    with Live() as live: f()
    return live.peak/2**20


def peak_of_steps(*cbs, size=32):
    "MiB alive at once in three training steps, what is left over from one to the next included"
    live = Live()
    def start(learn):
        if learn.iter == 0: live.__enter__()
    def stop(learn):
        if learn.iter == 2: live.__exit__(None, None, None)
    quietly(learner([*cbs, At('before_batch', start, order=-100), At('after_batch', stop, order=100)], model=cnn(16, seed=0), data=tensors(n=96, size=size), bs=32, opt_func=SGD))
    return live.peak/2**20


MEMORY = {'logits': lambda t: [LogitKD(t)], 'logits and two more': lambda t: [LogitKD(t), DecoupledKD(t), DistKD(t)], 'pooled features': lambda t: [LogitKD(t), FeatureKD(t, PAIRS, pool=True)],
          'features': lambda t: [LogitKD(t), FeatureKD(t, [('5', '5')])], 'similarity': lambda t: [SimilarityKD(t, [('5', '5')])], 'attention': lambda t: [AttentionKD(t, [('5', '5')])]}


@pytest.mark.parametrize('name', MEMORY)
def test_memory_of_a_step_is_the_students_and_the_teachers_inference(name):
    "Teachers keep nothing for a backward pass, and let go of a batch when it is over"
    model = cnn(32, seed=1).eval()
    x = tensors(n=32, size=32)[0]
    with torch.no_grad(): teacher = peak_of(lambda: model(x))
    assert peak_of(lambda: model(x)) > 1.5*teacher, 'the measurement does not see what a backward pass keeps'
    student,both = peak_of_steps(),peak_of_steps(*MEMORY[name](Teacher(model)))
    print(f'{name}: student {student:.2f} MiB, teacher {teacher:.2f} MiB, both {both:.2f} MiB, {both/(student+teacher):.3f}')
    assert student < both <= 1.05*(student+teacher)


# -- what users do next

def test_callbacks_used_again_begin_anew_with_another_student():
    "In a loop over seeds, say: no projector, no average and no captured layer of the student before"
    def cbs(): return [FeatureKD(Teacher(cnn(8, seed=1)), PAIRS), LogitKD(MeanTeacher(.9)), SimilarityKD(MeanTeacher(.5), [('5', '5')])]
    def run(cbs, seed, width=4):
        torch.manual_seed(seed)
        model = cnn(width)
        torch.manual_seed(100)
        return weights(quietly(learner(cbs, model=model), 2))
    used = cbs()
    assert torch.equal(run(used, 0), run(cbs(), 0))
    assert torch.equal(run(used, 1), run(cbs(), 1)), 'the second student was taught with what the first one left'
    assert torch.equal(run(used, 2, width=6), run(cbs(), 2, width=6)), 'of another width'


def test_nothing_but_a_teacher_and_no_label_at_all():
    "`label_weight=0` takes a label loss out of the sum, even one that is NaN where PyTorch's cross entropy finds no label"
    x,y = tensors()
    learn = learner([LogitKD(cnn(8, seed=1), label_weight=0)], data=(x, torch.full_like(y, UNLABELED)))
    before = weights(learn)
    quietly(learn)
    assert weights(learn).isfinite().all() and not torch.equal(weights(learn), before)


def test_a_batch_without_labels_under_a_plain_cross_entropy():
    "PyTorch's mean over no labels is NaN; there is nothing to learn from no labels"
    x,y = tensors()
    y[16:32] = UNLABELED
    learn = quietly(learner([LogitKD(cnn(8, seed=1))], data=(x, y)), 2)
    assert weights(learn).isfinite().all()


@pytest.mark.parametrize('name', METHODS)
def test_a_last_batch_of_one_image(name):
    x,y = tensors(n=17)
    learn = learner([METHODS[name](cnn(8, seed=1))], model=cnn(seed=0, norm=False), data=(x, y))
    quietly(learn)
    assert weights(learn).isfinite().all() and np.isfinite([v for v in last(learn).values() if not isinstance(v, str)]).all()


@pytest.mark.parametrize('where', ['LogitKD', 'DecoupledKD', 'FocalKD'])
def test_class_weights_of_another_number_of_classes_are_told_before_training(where):
    make = dict(LogitKD=lambda: LogitKD(cnn(8, seed=1), class_weights=[1., 2.]), DecoupledKD=lambda: DecoupledKD(cnn(8, seed=1), class_weights=[1., 2.]),
                FocalKD=lambda: FocalKD(class_weights=[1., 2.]))[where]
    learn = learner([make()])
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='class_weights'): quietly(learn)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), f'{k} was moved before the mistake was told'


@pytest.mark.parametrize('form', ['bfloat16', 'float64', 'compiled', 'compiled in place'])
def test_teachers_of_other_precision_or_compiled(form):
    "A compiled teacher that ran before, without anyone looking inside"
    model = cnn(8, seed=1).eval()
    x,_ = tensors()
    if form.startswith('b') or form.startswith('f'): model = model.to(getattr(torch, form))
    elif form == 'compiled': model = torch.compile(model, backend='aot_eager')
    else: model.compile(backend='aot_eager')
    if 'compiled' in form:
        with torch.no_grad(): model(x[:16])
    plain = {k: v for k,v in last(quietly(learner([LogitKD(cnn(8, seed=1)), FeatureKD(cnn(8, seed=1), [('5', '5')], label_weight=1.)]))).items() if k != 'time'}
    torch.manual_seed(0)
    learn = quietly(learner([LogitKD(model), FeatureKD(model, [('5', '5')])]))
    assert {k: v for k,v in last(learn).items() if k != 'time'}['logit_kd'] == pytest.approx(plain['logit_kd'], rel=.05)
    assert weights(learn).isfinite().all() and last(learn)['feature_kd'] > 0
    torch.compiler.reset()


# -- a token of its own

@pytest.fixture(scope='module')
def token_student(): return add_distillation_token(truncate_vit(create_student('vit_tiny_patch16_224', 3, size=32), (0, 1)))


def both_heads(model, x):
    "Logits of both tokens"
    model = deepcopy(model).train()
    model.set_distilled_training(True)
    return model(x)


@pytest.mark.parametrize('extra', ['plain', 'half precision', 'accumulation', 'MixUp', 'compiled'])
def test_a_distillation_token(token_student, extra):
    "Both heads answer in training alone; the class token has the labels, the distillation token the teacher"
    student,data = deepcopy(token_student),tensors(n=16, size=32)
    teacher = cnn(8, seed=1)
    cbs = {'plain': [], 'half precision': [CPUAutocast(torch.bfloat16)], 'accumulation': [GradientAccumulation(16)], 'MixUp': [MixUp(.4)], 'compiled': []}[extra]
    seen = []
    def check(learn):
        assert not unwrap(learn.model).distilled_training, 'the mode is left on after the forward pass'
        if extra in ('MixUp', 'half precision'): return seen.append(learn.iter)
        with torch.no_grad(): (ours,token),theirs = both_heads(unwrap(learn.model), learn.x),teacher(learn.x)
        terms = learn.loss_terms.values
        assert terms['label_loss'].item() == pytest.approx(F.cross_entropy(ours, learn.y).item(), rel=1e-3)
        assert terms['distill_token_kd'].item() == pytest.approx(F.cross_entropy(token, theirs.argmax(1)).item(), rel=1e-3)
        seen.append(learn.iter)
    model = torch.compile(student, backend='aot_eager') if extra == 'compiled' else student
    learn = quietly(learner([DistillTokenKD(teacher), *cbs, At('after_loss', check)], model=model, data=data, bs=8, loss_func=CrossEntropyLossFlat()), lr=1e-4)
    assert len(seen) == 2 and learn.validate()[0] == pytest.approx(F.cross_entropy(unwrap(learn.model).eval()(data[0]), data[1]).item(), rel=1e-3)
    torch.compiler.reset()


@pytest.mark.parametrize('event', ['after_pred', 'after_backward', 'before_batch'])
def test_an_interrupt_leaves_a_token_student_with_one_answer(token_student, event):
    learn = learner([DistillTokenKD(cnn(8, seed=1)), Stop(event, KeyboardInterrupt)], model=deepcopy(token_student), data=tensors(n=16, size=32), bs=8)
    with pytest.raises(KeyboardInterrupt): quietly(learn, lr=1e-4)
    assert learn.model.train()(tensors(n=2, size=32)[0]).shape == (2, 3) and not hooks(learn.model)
    quietly(learn, lr=1e-4)


# -- the log

def test_the_log_goes_to_a_file(tmp_path):
    "fastai's own logger writes the terms, one column each"
    learn = learner([LogitKD(cnn(8, seed=1)), FeatureKD(cnn(8, seed=1), PAIRS, weight=0), CSVLogger()], path=tmp_path)
    with learn.no_bar(): learn.fit(2)
    lines = (tmp_path/'history.csv').read_text().splitlines()
    assert lines[0] == 'epoch,train_loss,valid_loss,label_loss,logit_kd,feature_kd,time' and len(lines) == 3 and len(set(l.count(',') for l in lines)) == 1
