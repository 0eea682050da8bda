"""What goes wrong in other distillation libraries, one test each, through fits of a Learner.

Each docstring's first sentence says what was seen elsewhere; the test shows that it is not so here."""
import random
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import CancelFitException, TrainEvalCallback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastai.vision.core import imagenet_stats
from test_engine import PAIRS, At, Count, CPUAutocast, cnn, columns, hooks, last, learner, quietly, tensors, weights
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import TensorDataset

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import tissue_augment
from kdmed.models.create import create_student
from kdmed.distill.cache import TeacherCache
from kdmed.distill.callbacks import DecoupledKD, DistillTokenKD, DistKD, FocalKD, LogitKD, NormalizedKD
from kdmed.distill.features import AttentionKD, ChannelKD, FeatureKD, RelationalKD, SimilarityKD
from kdmed.distill.teacher import Teacher
from kdmed.train.distributed import parameters_of

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is no better', 'ignore::DeprecationWarning', 'ignore:You are shadowing', 'ignore:load_learner')


@pytest.fixture(scope='module')
def tissue(): return split_groups(synthetic_table(n=96, classes=3, size=24), sizes=(.6, .2, .2))


def gradient(make, event='after_backward', **kwargs):
    "The student's gradient at the first batch"
    found = []
    def keep(learn):
        found.append(torch.cat([p.grad.flatten().clone() for p in learn.model.parameters()]))
        raise CancelFitException
    torch.manual_seed(3)
    quietly(learner([*make, At(event, keep)], **kwargs))
    return found[0]


def test_01_teacher_keeps_no_gradients():
    "A teacher ran with gradients: 2.3 times the time, and `.grad` left on its parameters."
    teacher = cnn(8, seed=1).train() # as a user may bring it: training, all parameters trainable
    kds = [LogitKD(teacher), FeatureKD(teacher, PAIRS), DecoupledKD(teacher)]
    graphs = []
    learn = learner(kds)
    def look(learn):
        logits,features = kds[0].teacher.forward(learn.xb)
        assert not logits.requires_grad and not any(f.requires_grad for f in features.values())
        graphs.append(parameters_of(learn.loss_grad))
    learn.add_cb(At('after_loss', look))
    quietly(learn)
    ours = {id(p) for p in (*learn.model.parameters(), *kds[1].projectors.parameters())}
    assert graphs and all(g == ours for g in graphs), 'the loss reaches parameters besides those of student and projectors'
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_02_teacher_goes_where_the_student_is(monkeypatch):
    "A teacher was never moved to the student's device."
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda *_: False) # `meta`, the other device that every machine has, knows no autocast
    x,y = tensors(16)
    dls = DataLoaders(FastaiLoader(TensorDataset(x, y), bs=8), FastaiLoader(TensorDataset(x[:0], y[:0]), bs=8), device='meta')
    teachers = cnn(8, seed=1),cnn(8, seed=2)
    kds = [LogitKD(Teacher(list(teachers))), FeatureKD(teachers[0], PAIRS)]
    devices = []
    def look(learn): devices.extend(t.device.type for t in (learn.pred, kds[0].teacher.forward(learn.xb)[0], *teachers[0].parameters(), *teachers[1].buffers(), *kds[1].projectors.parameters()))
    learn = Learner(dls, cnn(seed=0), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=[TrainEvalCallback(), *kds, At('after_loss', look)], default_cbs=False)
    quietly(learn)
    assert set(devices) == {'meta'}


def test_03_validation_is_the_label_loss_without_a_teacher(tmp_path):
    "`valid_loss` held the distillation term and the teacher ran in validation: EarlyStopping and SaveModel ranked on the wrong number."
    x,y = tensors(n=32)
    teacher = cnn(8, seed=1)
    with torch.no_grad(): teacher[-1].weight.mul_(30)
    learn = learner([LogitKD(teacher, weight=100., label_weight=0), SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=2)], data=(x, y), path=tmp_path)
    in_validation = []
    teacher.register_forward_hook(lambda *_: in_validation.append(getattr(learn, 'dl', None) is learn.dls.valid and not learn.training))
    with learn.no_bar(), learn.no_logging(): learn.fit(30, 3e-2)
    assert not any(in_validation[2:]) # before training it is examined, and says how good it is
    losses = [dict(zip(columns(learn)[1:], v))['valid_loss'] for v in learn.recorder.values]
    assert len(losses) == losses.index(min(losses))+1+2 < 30
    best = F.cross_entropy(learn.model.eval()(x), y).item()
    assert best == pytest.approx(min(losses), rel=1e-5), 'the student kept is not the best by label loss'


def test_04_every_term_has_a_weight_of_its_own_that_makes_it_felt():
    "One weight of at most 1 for all terms left attention and similarity inert, with gradients 1/70 to 1/200 of the label loss's."
    teacher = cnn(8, seed=1)
    label = gradient([LogitKD(teacher, weight=0)], data=tensors(size=32)).norm()
    for make in (FeatureKD, AttentionKD, ChannelKD, RelationalKD, SimilarityKD):
        one,own = (gradient([make(teacher, [('5', '5')], label_weight=0, **w)], data=tensors(size=32)).norm() for w in (dict(weight=1.), {}))
        assert own/label > .05, f'{make.__name__} is inert: {own/label:.4f} of the gradient of the label loss'
        assert own/one == pytest.approx(make(teacher, [('5', '5')]).weight, rel=1e-3)
    both = gradient([AttentionKD(teacher, [('5', '5')], weight=300., label_weight=.5), LogitKD(teacher, weight=2.)])
    alone = [gradient([AttentionKD(teacher, [('5', '5')], weight=300., label_weight=0)]), gradient([LogitKD(teacher, weight=2., label_weight=0)]), gradient([LogitKD(teacher, weight=0)])]
    assert torch.allclose(both, alone[0]+alone[1]+.5*alone[2], atol=1e-5)


class Table(nn.Module):
    "Logits to begin with, whatever the image; they can be trained"
    def __init__(self, logits): super().__init__(); self.logits = nn.Parameter(torch.tensor(logits))
    def forward(self, x): return self.logits + 0*x.mean((1, 2, 3))[:, None]


def test_05_decoupled_distillation_is_what_it_says_and_stays_alive():
    "A 'normalized' variant changed nothing; two classes silently gave plain KD; a clamp before the log gave a confidently wrong student no gradient; extreme logits gave NaN."
    teacher = cnn(8, seed=1)
    found = [gradient([make(teacher, label_weight=0)]) for make in (LogitKD, DecoupledKD, NormalizedKD)]
    for i,j in ((0, 1), (0, 2), (1, 2)): assert F.cosine_similarity(found[i], found[j], dim=0) < .9999
    for make in (DecoupledKD, NormalizedKD, DistKD):
        with pytest.raises(ValueError, match='needs 3 or more classes'): quietly(learner([make(cnn(8, 2, seed=1))], model=cnn(outputs=2), data=(tensors()[0], tensors()[1] % 2)))
    x,y = tensors()
    y = torch.zeros_like(y)
    for wrong in (40., 200., 1e4):
        for make in (LogitKD, DecoupledKD, NormalizedKD):
            learn = learner([make(Table([wrong, -wrong, 0.]), label_weight=0)], model=Table([-wrong, wrong, 0.]), data=(x, y), opt_func=SGD)
            before = weights(learn)
            quietly(learn, lr=.1)
            moved = weights(learn)-before
            assert moved.isfinite().all() and moved[0] > 1e-3 > -1e-3 > moved[1], f'{make.__name__}, logits of {wrong}: {moved.tolist()}'


@pytest.mark.parametrize('flat', [False, True])
def test_06_a_single_logit_is_taught(flat):
    "A softmax over one logit gave loss 0 and gradient 0, silently."
    class Flat(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return self.model(x)[:, 0]
    x,y = tensors(task='binary')
    student,teacher = cnn(outputs=1, seed=0),cnn(8, 1, seed=1)
    with torch.no_grad(): teacher[-1].bias += 3.
    if flat: student,teacher,y = Flat(student),Flat(teacher),y[:, 0]
    learn = learner([LogitKD(teacher, label_weight=0)], model=student, data=(x, y), task='binary')
    quietly(learn, 1)
    first = last(learn)['logit_kd']
    quietly(learn, 15)
    assert first > .05 and last(learn)['logit_kd'] < .5*first
    with torch.no_grad(): assert learn.model.eval()(x).mean() > 1.


def test_07_findings_are_taught_each_for_itself():
    "Softmax distillation of findings was blind to a shift of all logits; DKD crashed."
    class Shifted(nn.Module):
        def __init__(self, model, by): super().__init__(); self.model,self.by = model,by
        def forward(self, x): return self.model(x) + self.by
    found = [gradient([LogitKD(Shifted(cnn(8, 4, seed=1), by), label_weight=0)], task='multilabel') for by in (0., 4.)]
    assert (found[0]-found[1]).norm() > .5*found[0].norm(), 'all findings rise together, and the student does not see it'
    for make in (DecoupledKD, NormalizedKD, DistKD):
        with pytest.raises(ValueError, match=r'needs 3 or more classes that exclude each other.*LogitKD.*FeatureKD'): quietly(learner([make(cnn(8, 4, seed=1))], task='multilabel'))


def test_08_layers_are_paired_as_the_user_says():
    "Layers were paired by the order in which they run, and repeated or surplus names vanished."
    class Crossed(nn.Module):
        "Defined and named in one order, run in the other"
        def __init__(self, width):
            super().__init__()
            self.a,self.b,self.head = nn.Conv2d(width, 2*width, 3, 2, 1),nn.Conv2d(3, width, 3, 2, 1),nn.Linear(2*width, 3)
        def forward(self, x): return self.head(self.a(self.b(x).relu()).mean((2, 3)))
    torch.manual_seed(0)
    teacher,student = Crossed(8),Crossed(4)
    pairs = [('b', 'b'), ('a', 'a'), ('b', 'a'), ('a', 'b')] # each layer twice
    kd = FeatureKD(teacher, pairs)
    def check(learn):
        with torch.no_grad():
            maps = {n: (m.b(learn.x), m.a(m.b(learn.x).relu())) for n,m in (('s', learn.model), ('t', teacher))}
            maps = {n: dict(zip('ba', v)) for n,v in maps.items()}
            expected = []
            for p,(s,t) in zip(kd.projectors, pairs):
                ours,theirs = maps['s'][s],maps['t'][t]
                assert p.weight.shape[:2] == (theirs.shape[1], ours.shape[1])
                side = min(ours.shape[-1], theirs.shape[-1])
                expected.append(F.mse_loss(p(F.adaptive_avg_pool2d(ours, side)), F.adaptive_avg_pool2d(theirs, side)))
        assert len(kd.projectors) == 4
        assert learn.loss_terms.values['feature_kd'].item() == pytest.approx(sum(expected).item()/4, rel=1e-4)
    quietly(learner([kd, At('after_loss', check)], model=student))
    with pytest.raises(ValueError, match='pairs repeat'): FeatureKD(teacher, [('a', 'a'), ('a', 'a')])
    with pytest.raises(ValueError, match='pairs must be'): FeatureKD(teacher, ['a', 'b'])


def test_09_what_is_captured_is_not_overwritten():
    "An in-place ReLU overwrote the pre-activation that was captured before it."
    teacher,student = cnn(8, seed=1),cnn(seed=0) # layer 1 is a norm, layer 2 a ReLU in place
    kd = FeatureKD(teacher, [('1', '1')])
    def check(learn):
        with torch.no_grad():
            theirs = teacher[1](teacher[0](learn.x))
            model = deepcopy(learn.model)
            ours = F.batch_norm(model[0](learn.x), None, None, model[1].weight, model[1].bias, training=True)
            assert theirs.min() < 0 and ours.min() < 0
            assert learn.loss_terms.values['feature_kd'].item() == pytest.approx(F.mse_loss(kd.projectors[0](ours), theirs).item(), rel=1e-4)
    quietly(learner([kd, At('after_loss', check)], model=student), 2)


def test_10_widths_are_projected_and_a_dry_run_changes_nothing():
    "Without a projector FitNet crashed across widths; a dry run in training mode moved the statistics of the student's BatchNorm."
    kd,student = FeatureKD(cnn(8, seed=1), PAIRS),cnn(seed=0)
    before,seen = deepcopy(student.state_dict()),[]
    modes = []
    def first(learn):
        if seen: return
        seen.append({k: v.clone() for k,v in learn.model.state_dict().items()})
        modes.extend(m.training for m in learn.model.modules())
    torch.manual_seed(7)
    quietly(learner([kd, LogitKD(kd.teacher), At('before_batch', first)], model=student))
    for k,v in before.items(): assert torch.equal(v, seen[0][k]), f'{k} was moved before training'
    assert all(modes)
    assert [tuple(p.weight.shape[:2]) for p in kd.projectors] == [(8, 4), (16, 8)]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, None])
def test_11_similarity_in_half_precision_and_channels_last(dtype):
    "The similarity term was NaN in fp16, and crashed on channels_last."
    teacher = cnn(8, seed=1)
    with torch.no_grad(): teacher[3].weight.mul_(300) # inner products far above 65504
    def turn(learn): learn.xb = tuple(x.to(memory_format=torch.channels_last) for x in learn.xb)
    cbs = [SimilarityKD(teacher, [('4', '3')]), At('before_batch', turn, order=-1), *([CPUAutocast(dtype)] if dtype else [])]
    student = cnn(seed=0).to(memory_format=torch.channels_last)
    found = gradient(cbs, model=student)
    exact = gradient([SimilarityKD(teacher, [('4', '3')])])
    assert found.isfinite().all() and found.norm() > 0 and F.cosine_similarity(found, exact, dim=0) > .95


def test_12_export_holds_the_student_alone(tissue, tmp_path):
    "`learn.export()` shipped the teacher: 9.8 MB instead of 235 kB."
    dls = image_dls(tissue, 24, bs=16, device='cpu')
    teacher,sizes = cnn(128, seed=1),{}
    for name,cbs in dict(plain=[], distilled=[LogitKD(teacher), FeatureKD(teacher, PAIRS), AttentionKD(teacher, PAIRS)]).items():
        learn = quietly(Learner(dls, cnn(seed=0), cbs=cbs, path=tmp_path))
        learn.export(f'{name}.pkl')
        sizes[name] = (tmp_path/f'{name}.pkl').stat().st_size
        loaded = load_learner(tmp_path/f'{name}.pkl')
        with learn.no_bar(), loaded.no_bar(): assert torch.allclose(loaded.predict(tissue.image[3])[2], learn.predict(tissue.image[3])[2], atol=1e-6)
    assert 4*sum(p.numel() for p in teacher.parameters()) > 1_000_000 and sizes['distilled']-sizes['plain'] < 20_000


class Breaks(nn.Module):
    "Raises in the forward or the backward pass of the second training batch"
    def __init__(self, error, where): super().__init__(); self.error,self.where,self.batches = error,where,0
    def forward(self, x):
        if not (self.training and torch.is_grad_enabled()): return x
        self.batches += 1
        if self.batches == 2 and self.where == 'forward': raise self.error('stop')
        if self.batches == 2 and self.where == 'backward': x.register_hook(self.stop)
        return x
    def stop(self, grad): raise self.error('stop')


ENDS = [(None, 'normal end'), *((error, where) for error in (RuntimeError, KeyboardInterrupt) for where in ('forward', 'backward', 'teacher', 'callback before', 'callback after'))]


@pytest.mark.parametrize('error,where', ENDS)
def test_13_no_hook_stays(error, where):
    "An interrupted cell left hooks on both models."
    student,teacher = cnn(seed=0),cnn(8, seed=1)
    student.insert(6, Breaks(error, where))
    if where == 'teacher':
        teacher.insert(6, Breaks(error, ''))
        calls = []
        def now(module, inputs):
            calls.append(1)
            if len(calls) == 5: raise error('stop')
        handle = teacher[6].register_forward_pre_hook(now)
    cbs = [FeatureKD(teacher, PAIRS), LogitKD(teacher)]
    def stop(learn):
        if learn.iter == 1: raise error('stop')
    if where.startswith('callback'): cbs.append(At({'callback before': 'before_batch', 'callback after': 'after_backward'}[where], stop))
    learn = learner(cbs, model=student)
    if error is None: quietly(learn)
    else:
        with pytest.raises(error): quietly(learn)
    if where == 'teacher': handle.remove()
    assert not hooks(student, teacher), 'hooks stay on a model'
    learn.remove_cb(At)
    quietly(learn)
    assert not hooks(student, teacher) and weights(learn).isfinite().all()


class TwoInputs(nn.Module):
    "An image and its patient's age"
    def __init__(self, width): super().__init__(); self.net,self.age = cnn(width),nn.Linear(1, 3)
    def forward(self, image, age): return self.net(image) + self.age(age)


def test_14_teachers_of_every_form_and_mistakes_with_their_names(tissue):
    "A `Learner` as teacher raised TypeError, a misspelt layer a NoneType error; a one-class teacher broadcast over five classes; several inputs failed."
    dls = image_dls(tissue, 24, bs=16, device='cpu')
    quietly(Learner(dls, cnn(seed=0), cbs=LogitKD(quietly(Learner(dls, cnn(8, seed=1))))))
    for pairs,side in (([('55', '5')], 'student'), ([('5', '55')], 'teacher')):
        with pytest.raises(ValueError, match=f"unknown {side} layer '55'; did you mean '5'"): quietly(learner([FeatureKD(cnn(8, seed=1), pairs)]))
    student = cnn(outputs=5, seed=0)
    before = weights(student)
    for task,loss,y in (('multiclass', nn.CrossEntropyLoss(), torch.randint(5, (48,))), ('multilabel', nn.BCEWithLogitsLoss(), torch.rand(48, 5).round())):
        with pytest.raises(ValueError, match='student.* 5.*teacher.* 1|student_logits'): quietly(learner([LogitKD(cnn(8, 1, seed=1))], model=student, data=(tensors()[0], y), loss_func=loss))
        assert torch.equal(weights(student), before), 'a step was taken before the mistake was told'
    x,y = tensors()
    torch.manual_seed(0)
    teacher = TwoInputs(8)
    kds = [LogitKD(teacher), FeatureKD(teacher, [('net.5', 'net.5')])]
    learn = learner(kds, model=TwoInputs(4), data=(x, torch.rand(48, 1), y))
    def check(learn):
        with torch.no_grad(): theirs = teacher(*learn.xb)
        soft = 16*F.kl_div(F.log_softmax(learn.pred/4, 1), F.softmax(theirs/4, 1), reduction='batchmean')
        assert learn.loss_terms.values['logit_kd'].item() == pytest.approx(soft.item(), rel=1e-4)
    learn.add_cb(At('after_loss', check))
    quietly(learn)
    assert last(learn)['feature_kd'] > 0


def test_15_a_teacher_inside_the_student_stays_in_eval_mode():
    "A teacher that was a submodule of the student's model ran in training mode."
    class Holds(nn.Module):
        def __init__(self): super().__init__(); self.net,self.teacher = cnn(seed=0),nn.Sequential(cnn(8, seed=1), nn.Dropout(.9))
        def forward(self, x): return self.net(x)
    model = Holds()
    before,count,answers = deepcopy(model.teacher.state_dict()),Count(model.teacher),[]
    kd = LogitKD(model.teacher)
    def look(learn): answers.append(torch.equal(kd.teacher.forward(learn.xb)[0], deepcopy(model.teacher).eval()(learn.x)))
    learn = quietly(learner([kd, FeatureKD(model.teacher, [('net.5', '0.5')]), At('after_loss', look)], model=model), 2)
    assert count.calls > 6 and not any(count.training) and all(answers)
    for k,v in model.teacher.state_dict().items(): assert torch.equal(v, before[k]), k
    assert learn.model.net[1].num_batches_tracked == 6 and learn.model.net.training is False # validation came last


@pytest.mark.parametrize('mix', [lambda: MixUp(.4), lambda: CutMix(1.)], ids=['MixUp', 'CutMix'])
@pytest.mark.parametrize('make', [DecoupledKD, NormalizedKD, FocalKD])
def test_16_targets_are_mixed_as_the_images_are(mix, make):
    "MixUp handed targets that were not mixed to the loss."
    teacher = cnn(8, seed=1)
    cb = make(teacher) if make is not FocalKD else FocalKD()
    def check(learn):
        handler,n = next(c for c in learn.cbs if isinstance(c, (MixUp, CutMix))),len(learn.x)
        terms = learn.loss_terms.values
        value = terms['label_loss' if make is FocalKD else cb.term_name].item()
        with torch.no_grad(): theirs = teacher(learn.x) # the mixed images
        total = 0.
        for ys,share in ((handler.yb1[0], 1-handler.lam), (learn.y, handler.lam)):
            for i,s in enumerate(share.expand(n)): total += s.item()*one(learn.pred[i:i+1], theirs[i:i+1], ys[i:i+1])/n
        assert value == pytest.approx(total, rel=1e-3)
    def one(z, t, y):
        others = torch.arange(3) != y
        if make is FocalKD: p = F.softmax(z, 1)[0, y]; return (-(1-p)**2*p.log()).item()
        p,q = (F.softmax(v/(4 if make is DecoupledKD else 1), 1)[0] for v in (t, z))
        po,qo = p[others]/p[others].sum(),q[others]/q[others].sum()
        if make is NormalizedKD: return (-p[y]*q[y].log() - 1.5*(po*qo.log()).sum()).item()
        coin = p[y]*(p[y]/q[y]).log() + (1-p[y])*((1-p[y])/(1-q[y])).log()
        return 16*(coin + 8*(po*(po/qo).log()).sum()).item()
    x,y = tensors()
    quietly(learner([cb, mix(), At('after_loss', check)], loss_func=CrossEntropyLossFlat()))


def test_17_temperature_squared_is_in_every_branch_and_the_divisor_is_the_batch():
    "T² was dropped in one branch; KL was divided by batch × classes without saying so."
    def scale(make, temperature, **kwargs): return gradient([make(temperature)], **kwargs).norm().item()
    teachers = {'multiclass': cnn(8, seed=1), 'binary': cnn(8, 1, seed=1), 'multilabel': cnn(8, 4, seed=1)}
    branches = [('multiclass', lambda t: LogitKD(teachers['multiclass'], t, label_weight=0)),
                ('multiclass', lambda t: LogitKD(teachers['multiclass'], t, label_weight=0, loss='cross_entropy')),
                ('multiclass', lambda t: DecoupledKD(teachers['multiclass'], t, label_weight=0)),
                ('multiclass', lambda t: NormalizedKD(teachers['multiclass'], t, label_weight=0, other_weight=1000.)),
                ('binary', lambda t: LogitKD(teachers['binary'], t, label_weight=0)), ('multilabel', lambda t: LogitKD(teachers['multilabel'], t, label_weight=0)),
                ('multiclass', lambda t: ChannelKD(teachers['multiclass'], [('5', '5')], label_weight=0, temperature=t))]
    for task,make in branches: # τ² makes the gradient's size converge as τ grows; without it, it falls by 100 from 30 to 300
        ratio = scale(make, 300., task=task)/scale(make, 30., task=task)
        assert .8 < ratio < 1.25, (task, make(1.), ratio)
    def literal(learn):
        z,y = learn.pred,learn.y
        with torch.no_grad(): t = teacher(learn.x)
        p,q = F.softmax(t/4, 1),F.log_softmax(z/4, 1)
        assert learn.loss_terms.values['logit_kd'].item() == pytest.approx(16*(p*(p.log()-q)).sum().item()/len(z), rel=1e-4)
    teacher = cnn(8, seed=1)
    quietly(learner([LogitKD(teacher), At('after_loss', literal)]))
    student = create_student('deit_tiny_distilled_patch16_224', 3, size=32)
    terms = {}
    for divide in (False, True):
        kd = DistillTokenKD(cnn(8, seed=1), 'soft', divide_by_classes=divide)
        def keep(learn):
            terms[divide] = learn.loss_terms.values['distill_token_kd'].item()
            raise CancelFitException
        quietly(learner([kd, At('after_loss', keep)], model=deepcopy(student), data=tensors(n=16, size=32)))
    assert terms[True] == pytest.approx(terms[False]/3, rel=1e-4)


def test_18_a_cache_answers_for_the_view_that_is_shown(tissue, tmp_path):
    "A cache replayed the first view's teacher output for a view that was augmented otherwise."
    dls = image_dls(tissue, 24, bs=16, augment=tissue_augment(seed=4), views=2, device='cpu')
    model = cnn(8, seed=1)
    with torch.no_grad(): model[-1].weight.mul_(20)
    x0,x1 = (dls.train.views_of(range(dls.train.n), [v]*dls.train.n)[0] for v in (0, 1))
    says = [dict(zip(dls.train.ids.tolist(), Teacher(model).forward((torch.Tensor(x),))[0])) for x in (x0, x1)]
    logits = [torch.stack([s[i] for i in dls.train.ids.tolist()]) for s in says]
    apart = (logits[0]-logits[1]).abs().mean().item()
    assert apart > .02*logits[0].abs().mean().item(), 'these views do not differ enough to tell'
    for again in (False, True): # the second fit finds all answers
        seen = []
        def check(learn):
            ids,views = learn.x.replay
            assert set((views % 2).tolist()) == {learn.epoch % 2}
            theirs = torch.stack([says[v % 2][i] for i,v in zip(ids.tolist(), views.tolist())])
            given = learn.logit_kd.teacher.forward(learn.xb)[0]
            seen.append((learn.epoch, (given-theirs).abs().max().item(), learn.loss_terms.values['logit_kd'].item(), soft(learn.pred, theirs)))
        def soft(z, t): return 16*F.kl_div(F.log_softmax(torch.Tensor(z)/4, 1), F.softmax(t/4, 1), reduction='batchmean').item()
        dls.train.rng,dls.train.epoch = random.Random(0),0
        count = Count(model)
        learn = Learner(dls, cnn(seed=0), cbs=[LogitKD(TeacherCache(model, tmp_path)), At('after_loss', check)])
        calls = []
        learn.add_cb(At('after_train', lambda learn: calls.append(count.calls)))
        quietly(learn, 4)
        count.handle.remove()
        assert {e for e,*_ in seen} == {0, 1, 2, 3} and max(gap for _,gap,*_ in seen) < .1*apart, 'the answer to another view'
        for _,_,term,literal in seen: assert term == pytest.approx(literal, rel=.01, abs=1e-4)
        assert not again or calls[-1] == calls[0] <= 5, f'the teacher ran though all its answers were known: {calls}'



def test_19_a_teacher_has_learned_something_and_says_how_much(capsys):
    "The default teacher's head was random, and the teacher's accuracy was never printed."
    for given in ('resnet10t', 'resnet18'):
        with pytest.raises(ValueError, match='random head'): LogitKD(given)
    x,y = tensors(n=96)
    x[:, 0] += 3*y[:, None, None] # something to learn
    teacher = cnn(16, seed=1)
    learn = learner(model=teacher, data=(x, y))
    quietly(learn, 6)
    def distil(model):
        learn,printed = learner([LogitKD(model)], data=(x, y)),[]
        learn.add_cb(At('before_batch', lambda learn: printed.append(capsys.readouterr().out)))
        with learn.no_bar(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            learn.logger = lambda *a, **k: None
            learn.fit(1, 1e-3)
        return printed[0],[str(w.message) for w in said if 'teacher' in str(w.message)]
    printed,said = distil(teacher)
    teacher.eval()
    recall = np.mean([(teacher(x[y == c]).argmax(1) == c).float().mean().item() for c in range(3)])
    assert f'teacher: balanced accuracy {recall:.3f} on 96 validation images (chance 0.333' in printed and recall > .8 and not said
    printed,said = distil(cnn(8, seed=2))
    assert 'teacher: balanced accuracy' in printed and 'no better than' in said[0]


class Apart(TorchFunctionMode):
    "Refuse an operation between two devices, as GPUs do; PyTorch's `meta` device lets some pass"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        devices = {a.device for a in args if isinstance(a, torch.Tensor) and a.ndim}
        if len(devices) > 1: raise RuntimeError(f'tensors on different devices: {devices}')
        return func(*args, **(kwargs or {}))


def test_20_normalize_on_every_device(tissue):
    "fastai's `Normalize`, pinned to cuda:0, broke a launch on two GPUs (Kaggle's T4×2)."
    dls = image_dls(tissue, 24, bs=16, augment=tissue_augment(), device='cpu')
    batch = TensorImage(torch.empty(4, 3, 24, 24, dtype=torch.uint8, device='meta'))
    teacher = Teacher(cnn(8, seed=1), stats=((.5,)*3, (.5,)*3))
    teacher.match_data(dls)
    with Apart():
        with pytest.raises(RuntimeError, match='device'): Normalize.from_stats(*imagenet_stats, cuda=False)(batch.float(), split_idx=0) # the trap
        for dl in dls.loaders: assert dl.after_batch(batch.clone()).device.type == 'meta'
        assert next(f for f in dls.train.after_batch.fs if isinstance(f, Normalize)).decode(batch.float()).device.type == 'meta'
        assert teacher.members[0].prepare(batch.float(), teacher.stats).device.type == 'meta'
    x = dls.one_batch()[0]
    assert x.device.type == 'cpu' and dls.decode((x, torch.zeros(len(x), dtype=torch.long)))[0].min() > -.01
    quietly(Learner(dls, cnn(seed=0), cbs=LogitKD(teacher)))
