"Every method by its name: tasks, teachers, precision, accumulated gradients, interruption"
import random
import warnings
from functools import cache

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from torch import nn

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.models.create import add_distillation_token, create_student, truncate_vit
from kdmed.models.exits import add_exits
from kdmed.train.resume import Resume
from kdmed.distill.cache import TeacherCache
from kdmed.distill.methods import adapt_student, distill
from kdmed.distill.registry import METHODS, SEVERAL
from kdmed.distill.teacher import Teacher

pytestmark = pytest.mark.filterwarnings('ignore')
NEW = 'srd', 'vkd', 'simkd', 'l2d', 'lelp', 'function_matching', 'proteus'
TASKS = dict(binary=2, multiclass=3, multilabel=3)

def each(names):
    "Parameters: the methods for few classes at once, the others where there is time"
    return [pytest.param(n, marks=() if n in NEW else pytest.mark.slow(seconds=4)) for n in names]

@cache
def loaders(task):
    more = {} if task=='multiclass' else dict(task=task)
    table = synthetic_table(n=80, classes=TASKS[task], size=32, **more)
    return image_dls(split_groups(table, sizes=(.6, .2, .2)), size=32, bs=16, views=1)

def model(name, dls, seed):
    torch.manual_seed(seed)
    return create_student(name, dls.classes, 32, dls.task)

def pair(method, dls):
    "A student with what a method needs, and its teacher"
    needs,teacher = METHODS[method].needs,model('test_vit' if METHODS[method].needs=='vit' else 'test_resnet', dls, 1)
    if needs=='vit': return truncate_vit(model('test_vit', dls, 0), [1, 3]),teacher
    if needs=='exits': return add_exits(model('test_resnet', dls, 0)),teacher
    if needs=='token': return add_distillation_token(model('test_vit', dls, 0)),teacher
    return model('test_efficientnet', dls, 0),teacher

def run(method, task=None, wrap=lambda teacher: teacher, cbs=(), epochs=1):
    dls = loaders(task or own_task(method))
    student,teacher = pair(method, dls)
    random.seed(0)
    return distill(dls, student, wrap(teacher), method, epochs, cbs=cbs, progress=False)

def suits(method, task):
    tasks = METHODS[method].tasks
    return task=='multiclass' if tasks==SEVERAL else task in tasks.split(', ')

def own_task(method): return 'multiclass' if suits(method, 'multiclass') else 'multilabel'
def weights(learn): return nn.utils.parameters_to_vector(learn.model.parameters())
def assert_trained(learn): assert weights(learn).isfinite().all() and learn.history.train_loss.notna().all()

@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('method', each(METHODS))
def test_a_method_trains_the_tasks_it_names_and_refuses_the_others(method, task):
    if suits(method, task): return assert_trained(run(method, task))
    with pytest.raises(ValueError, match='[Uu]se|is right for|leave it out'): run(method, task)

class HalfPrecision(MixedPrecision):
    "Mixed precision as fastai enters and leaves it, on the CPU"
    def __init__(self): "There is nothing to scale"
    def before_fit(self): self.autocast = torch.autocast('cpu', torch.bfloat16)
    def before_backward(self): pass
    def before_step(self): pass
    def after_step(self): pass
    def after_fit(self): self.autocast = None

@pytest.mark.parametrize('method', each(METHODS))
def test_in_half_precision(method): assert_trained(run(method, cbs=[HalfPrecision()]))

@pytest.mark.parametrize('method', each(METHODS))
def test_with_accumulated_gradients(method): assert_trained(run(method, cbs=[GradientAccumulation(32)]))

@pytest.mark.parametrize('method', each(METHODS))
def test_an_ensemble_teaches_or_is_refused(method):
    def two(teacher): return Teacher([teacher, model('test_resnet', loaders(own_task(method)), 2)])
    try: learn = run(method, wrap=two)
    except ValueError as e: assert 'several' in str(e) or 'single' in str(e), e
    else: assert_trained(learn)

@pytest.mark.parametrize('method', each(n for n,m in METHODS.items() if m.teacher))
def test_a_cached_teacher_teaches_the_same(method, tmp_path):
    cached,direct = run(method, wrap=lambda t: TeacherCache(t, tmp_path)),run(method)
    assert (weights(cached)-weights(direct)).abs().max() < .05

STOPPING = []
class Interrupt(Callback):
    "Interrupts the second epoch while `STOPPING`; it belongs to every run, since runs are compared by their callbacks"
    order = 50
    def after_step(self):
        if STOPPING and self.epoch==1 and self.iter==1: raise KeyboardInterrupt

@pytest.mark.parametrize('method', each(METHODS))
def test_an_interrupted_run_resumes_with_the_same_weights(method, tmp_path):
    def start(folder): return run(method, cbs=[Resume(tmp_path/folder, minutes=1e-6), Interrupt()], epochs=2)
    whole = start('whole')
    STOPPING.append(True)
    try:
        with pytest.raises(KeyboardInterrupt): start('run')
    finally: STOPPING.clear()
    assert torch.allclose(weights(start('run')), weights(whole), atol=1e-5)

@pytest.mark.parametrize('method', each(METHODS))
def test_the_student_changes_only_where_a_method_says_so(method):
    student,teacher = pair(method, loaders(own_task(method)))
    assert (adapt_student(method, student, Teacher(teacher)) is student)==(METHODS[method].adapt is None)

@pytest.mark.parametrize('method', each(n for n in METHODS))
def test_shares_of_the_gradient_change_no_weight(method):
    dls = loaders(own_task(method))
    student,teacher = pair(method, dls)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = distill(dls, student, teacher, method, 1, progress=False, log_shares=True)
    shares = learn.history.filter(like='share_').iloc[-1].dropna()
    assert shares.sum()==pytest.approx(1, abs=1e-4) and shares.between(0, 1).all()
    assert torch.equal(weights(learn), weights(run(method)))
