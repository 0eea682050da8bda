"A script as a user writes it: everything from `kdmed.kd`, plain PyTorch data, no vocabulary."
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdmed.kd import *

ALL = ('Teacher LogitKD FeatureKD DistillTokenKD FocalKD distill fit_classifier soft_target_loss bernoulli_soft_target_loss hint_loss focal_loss '
       'bernoulli_focal_loss hard_token_loss soft_token_loss inverse_frequency_weights create_student create_teacher truncate_vit add_distillation_token').split()


def test_star_import_gives_callbacks_losses_and_models():
    missing = [name for name in ALL if name not in globals()]
    assert not missing


def cnn(width, outputs):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, 2*width, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*width, outputs))


TASKS = {
    'multiclass': (3, nn.CrossEntropyLoss(), lambda n: torch.randint(3, (n,))),
    'binary, one logit': (1, nn.BCEWithLogitsLoss(), lambda n: torch.randint(2, (n, 1)).float()),
    'binary, two logits': (2, nn.CrossEntropyLoss(), lambda n: torch.randint(2, (n,))),
    'multilabel': (5, nn.BCEWithLogitsLoss(), lambda n: torch.randint(2, (n, 5)).float()),
}


def learner(outputs, loss, targets, cbs=(), width=4):
    torch.manual_seed(0)
    x,y = torch.randn(48, 3, 12, 12),targets(48)
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=16) for _ in range(2)])
    return Learner(dls, cnn(width, outputs), loss_func=loss, cbs=cbs)


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn


@pytest.mark.parametrize('task', TASKS)
def test_every_callback_trains_every_task(task):
    outputs,loss,targets = TASKS[task]
    teacher = Teacher(cnn(16, outputs))
    before = {k: v.clone() for k,v in teacher.model.state_dict().items()}
    learn = fit(learner(outputs, loss, targets, [LogitKD(teacher), FeatureKD(teacher, [('1', '1'), ('4', '4')], weight=.5), FocalKD(gamma=2)]))
    names = list(learn.recorder.metric_names)
    assert names[1:4] == ['train_loss', 'valid_loss', 'label_loss'] and set(names[4:-1]) == {'logit_kd', 'feature_kd'}
    assert all(v is not None and torch.tensor(v).isfinite() and v > 0 for v in learn.recorder.values[-1])
    assert all(torch.equal(v, before[k]) for k,v in teacher.model.state_dict().items())
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize('task', TASKS)
def test_a_teacher_alone_pulls_the_student_towards_it(task):
    outputs,loss,targets = TASKS[task]
    torch.manual_seed(1)
    teacher = cnn(16, outputs)
    nn.init.normal_(teacher[-1].weight, std=2.)
    def gap(learn):
        x = learn.dls.train.dataset.tensors[0]
        with torch.no_grad(): ours,theirs = learn.model.eval()(x),teacher.eval()(x)
        if outputs>1: ours,theirs = ours - ours.mean(1, keepdim=True),theirs - theirs.mean(1, keepdim=True)
        return (ours-theirs).pow(2).mean().item()
    before = gap(learner(outputs, loss, targets))
    assert gap(fit(learner(outputs, loss, targets, [LogitKD(teacher, label_weight=0)]), epochs=8)) < .8*before


def test_token_student_on_plain_tensors():
    torch.manual_seed(0)
    x,y = torch.randn(16, 3, 32, 32),torch.randint(3, (16,))
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=8) for _ in range(2)])
    student = add_distillation_token(truncate_vit(create_student('vit_tiny_patch16_224', 3, size=32)))
    for kind in ('hard', 'soft'):
        learn = fit(Learner(dls, student, loss_func=nn.CrossEntropyLoss(), cbs=DistillTokenKD(cnn(8, 3), kind)), epochs=1)
        assert learn.recorder.metric_names[3] == 'label_loss' and learn.recorder.metric_names[4] == 'distill_token_kd'
    assert student.train()(x).shape == (16, 3)


@pytest.mark.parametrize('task', TASKS)
def test_distill_on_plain_tensors_is_repeatable(task):
    outputs,loss,targets = TASKS[task]
    dls = learner(outputs, loss, targets).dls
    torch.manual_seed(3)
    teacher = cnn(16, outputs)
    runs = [distill(dls, lambda: cnn(4, outputs), teacher, epochs=2, progress=False) for _ in range(2)]
    for a,b in zip(*[r.model.state_dict().values() for r in runs]): assert torch.equal(a, b)
    assert list(runs[0].history) == ['train_loss', 'valid_loss', 'label_loss', 'logit_kd']
    with pytest.raises(ValueError, match='pass a Module'): distill(dls, 'resnet18', teacher)


def test_one_logit_is_binary_whatever_the_type_of_its_targets():
    dls = learner(1, nn.BCEWithLogitsLoss(), lambda n: torch.randint(2, (n,))).dls
    assert 'BCE' in str(distill(dls, lambda: cnn(4, 1), cnn(8, 1), epochs=1, progress=False).loss_func)


def test_wrong_teacher_is_named_before_a_step_is_taken():
    outputs,loss,targets = TASKS['multiclass']
    learn = learner(outputs, loss, targets, [LogitKD(cnn(8, 1))])
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match='the student has 3 outputs, the teacher 1'): fit(learn)
    assert all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), before))
    with pytest.raises(ValueError, match="unknown student layer '44'; did you mean"): fit(learner(outputs, loss, targets, [FeatureKD(cnn(8, 3), [('44', '4')])]))
