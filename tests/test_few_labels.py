"Few labels: every method for every task, the same twice and after a kill, where unlabeled images help and where not"
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from conftest import ROOT
from kdmed.baselines.evidential_vote import EvidentialVote
from kdmed.baselines.few_labels import FEW_LABEL_METHODS, FixMatch, NoisyStudent, fit_few_labels
from kdmed.data.images import image_table, is_unlabeled, synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.transforms import Augment, HorizontalFlip, Translation, VerticalFlip
from kdmed.distill.methods import fit_classifier
from kdmed.evaluate.intervals import paired_difference
from kdmed.evaluate.metrics import predict
from kdmed.train.resume import Resume

AUGMENT = Augment((HorizontalFlip(), VerticalFlip(), Translation(.1)))

def cnn(n_out=3, width=8):
    def stage(a, b): return nn.Conv2d(a, b, 3, 2, 1),nn.BatchNorm2d(b),nn.ReLU()
    return nn.Sequential(*stage(3, width), *stage(width, 2*width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(2*width, n_out))

def tissue(task='multiclass', classes=3, **how):
    "Loaders of tiles, of which four in five have no label; of findings, some are unknown"
    table = synthetic_table(120, classes=classes, size=16, task=task, tiles_per_patient=2)
    table['split'] = np.repeat(['train', 'valid', 'test'], [80, 20, 20])
    names = table.attrs['classes']
    unlabeled = [i for i in range(80) if i>=64 and i%4 or 8<=i<64]
    table.loc[unlabeled, 'label'] = None
    for i,name in enumerate(names if task!='multilabel' else names[:1]): table.loc[2*i, 'label'] = name
    if task=='multilabel': table.loc[4, 'label'] = f'?{names[0]}|{names[1]}'
    return image_dls(table, 16, **(dict(bs=16, augment=AUGMENT, device='cpu') | how))

TERMS = 'pseudo_labels','noisy_student','mean_teacher_consistency','fix_match','mix_match','unlabeled_kd' # columns

def weights(learn): return nn.utils.parameters_to_vector(learn.model.parameters()).detach()

@pytest.mark.parametrize('method', FEW_LABEL_METHODS)
@pytest.mark.parametrize('task,classes', [('binary', 2), ('multiclass', 3), ('multilabel', 3)])
def test_every_method_for_every_task(task, classes, method):
    dls = tissue(task, classes)
    learn = fit_few_labels(dls, lambda: cnn(dls.c), method, epochs=2, progress=False)
    log = learn.history
    assert np.isfinite(log.label_loss).all() and np.isfinite(log.valid_loss).all()
    terms = [c for c in log if c in TERMS]
    assert len(terms)==(method!='supervised') and np.isfinite(log[terms].to_numpy(float)).all()
    assert not [cb for cb in learn.cbs if 'Distill' in type(cb).__name__ and cb.kept] # nothing is left of the fit
    probs,_ = predict(learn, dls.test)
    assert np.isfinite(probs).all()

@pytest.mark.parametrize('method', ['mixmatch', 'fixmatch', 'mean_teacher'])
def test_the_same_twice_and_another_with_another_seed(method):
    dls = tissue(sampling='balanced', views=3)
    def fit(seed): return weights(fit_few_labels(dls, cnn, method, epochs=2, seed=seed, progress=False))
    assert torch.equal(fit(3), fit(3))
    assert not torch.equal(fit(3), fit(4))

def test_labels_of_other_images_are_not_looked_at():
    "Labels of validation and test images do not train"
    dls = tissue()
    first = weights(fit_few_labels(dls, cnn, 'mixmatch', epochs=1, progress=False))
    table = dls.table.copy()
    table.attrs = dict(dls.table.attrs)
    held = table.index[table.split!='train']
    table.loc[held, 'label'] = table.label[held].iloc[::-1].to_numpy() # other labels, the same images
    other = image_dls(table, 16, bs=16, augment=AUGMENT, device='cpu')
    assert torch.equal(first, weights(fit_few_labels(other, cnn, 'mixmatch', epochs=1, progress=False)))

KILLED = '''
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from fastai.callback.core import Callback
from test_few_labels import cnn, fit_few_labels, tissue, Resume, weights

class Dies(Callback):
    run_valid = False
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.train_iter==self.at: os._exit(9)
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

folder,method,at = sys.argv[2],sys.argv[3],int(sys.argv[4])
cbs = [] if folder=='none' else [Resume(folder, every=2)]
learn = fit_few_labels(tissue(), cnn, method, epochs=3, progress=False, average=.9, cbs=[*cbs, Dies(at)])
torch.save(dict(weights=weights(learn), log=learn.history.to_csv()), sys.argv[5])
'''

@pytest.mark.slow(seconds=130)
@pytest.mark.parametrize('method', ['mixmatch', 'mean_teacher', 'noisy_student'])
def test_killed_and_resumed_gives_the_same_weights(method, tmp_path):
    "Killed within the first epoch, right after it, and in the last one; the checkpoints hold averages and teachers"
    script = tmp_path/'script.py'
    script.write_text(KILLED)
    def run(folder, at):
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore')
        words = [sys.executable, str(script), str(ROOT/'tests'), str(folder), method, str(at), str(tmp_path/'out.pt')]
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=900)
        assert done.returncode==(0 if at<0 else 9), done.stderr[-2000:]
        return torch.load(tmp_path/'out.pt') if at<0 else None
    once = run('none', -1)
    for at in (3, 5, 13): run(tmp_path/'checkpoints', at)
    resumed = run(tmp_path/'checkpoints', -1)
    assert torch.equal(once['weights'], resumed['weights'])
    assert once['log']==resumed['log']

def test_a_vote_decides_what_a_noisy_student_learns():
    dls = tissue()
    teacher = fit_few_labels(dls, cnn, 'supervised', epochs=2, progress=False).model
    label,trusted = EvidentialVote(belief=.5).decide_on(teacher, dls)
    seen = {}
    class Notes(Callback):
        run_valid = False
        def before_batch(self): self.ids = getattr(self.x, 'replay', None)
        def after_loss(self):
            cb = next(c for c in self.learn.cbs if isinstance(c, NoisyStudent))
            of,(its,counted) = cb._of,cb.decisions(torch.ones(len(cb._of), 3))
            seen.update(zip(of.tolist(), zip(its.tolist(), counted.tolist())))
    fit_classifier(dls, cnn, 2, cbs=[NoisyStudent(teacher, vote=EvidentialVote(belief=.5)), Notes()], progress=False)
    assert seen and all((label[i], trusted[i])==pair for i,pair in seen.items())

def test_loaders_of_others_are_refused():
    from fastai.data.core import DataLoaders
    from torch.utils.data import DataLoader, TensorDataset
    data = TensorDataset(torch.randn(20, 3, 16, 16), torch.randint(3, (20,)))
    dls = DataLoaders(DataLoader(data, batch_size=5), DataLoader(data, batch_size=5))
    with pytest.raises(TypeError, match='use the loaders of image_dls'):
        fit_classifier(dls, cnn(), 1, cbs=FixMatch(), progress=False)


# -- where unlabeled images help, and where they do not

def striped(seed, others=False, n=(320, 40, 400), size=16, labeled=4):
    "Stripes in any color, four labeled images of each class; `others`: the unlabeled images are tiles of tissue"
    rng,kinds = np.random.default_rng(seed),['horizontal', 'vertical', 'crossed']
    labels = rng.choice(kinds, sum(n)).tolist()
    def image(kind):
        y,x = np.mgrid[:size, :size]*2*np.pi/rng.uniform(4, 6)
        h,v = np.sin(y+rng.uniform(0, 6.3)),np.sin(x+rng.uniform(0, 6.3))
        wave = dict(horizontal=h, vertical=v, crossed=h*v)[kind][..., None]*rng.uniform(.03, .25, 3)
        pixels = rng.uniform(.25, .75, 3) + wave + .08*rng.normal(size=(size, size, 3))
        return (255*pixels.clip(0, 1)).astype(np.uint8)
    table = image_table([image(k) for k in labels], labels, classes=kinds, name='stripes')
    table['split'] = np.repeat(['train', 'valid', 'test'], n)
    train = table[table.split=='train']
    table.loc[train.index.difference(train.groupby('label').head(labeled).index), 'label'] = None
    if others:
        rows = table.index[is_unlabeled(table)]
        for i,tile in zip(rows, synthetic_table(len(rows), classes=2, size=size).image): table.at[i, 'image'] = tile
    return image_dls(table, size, bs=32, augment=AUGMENT, device='cpu')

def gain(method, dls, seeds=(0, 1, 2)):
    "Accuracy of a method minus that of supervised training, with its interval over images and seeds"
    def probs(name):
        how = dict(epochs=12, lr=1e-2, average=.99, progress=False)
        learns = [fit_few_labels(dls, lambda: cnn(width=12), name, seed=s, **how) for s in seeds]
        return [predict(learn, dls.test) for learn in learns]
    ours,plain = probs(method),probs('supervised')
    return paired_difference([p for p,_ in ours], [p for p,_ in plain], ours[0][1], dls.classes, metrics=['accuracy'],
                             n_boot=500).loc['accuracy']

@pytest.mark.slow
@pytest.mark.parametrize('method', ['fixmatch', 'mixmatch'])
def test_unlabeled_images_help_where_classes_are_far_apart(method):
    found = gain(method, striped(0))
    assert found.low > 0, found

@pytest.mark.slow
def test_pseudo_labels_do_not_help_where_unlabeled_images_show_something_else():
    "Their interval holds 0, or they harm: few tiles are taken for stripes, and none of these guesses is right"
    found = gain('pseudo_labels', striped(0, others=True))
    assert found.low < .02, found
