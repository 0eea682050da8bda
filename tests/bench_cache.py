"What a student's epoch costs when the teacher's answers are read from disk; `tests/bench.py` runs it with the others."
import tempfile, time
from statistics import median

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import tissue_augment
from kdmed.models.create import create_student, create_teacher
from kdmed.distill.cache import TeacherCache
from kdmed.distill.callbacks import LogitKD
from kdmed.distill.features import FeatureKD
from kdmed.distill.teacher import Teacher

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


class Clock(Callback):
    "Seconds of each epoch but the first of a fit, in which teachers are introduced; what comes with it in `fit` is not counted"
    order = -100
    def __init__(self): self.seconds = []
    def before_epoch(self):
        if DEVICE=='cuda': torch.cuda.synchronize()
        self.start = time.perf_counter()
    def after_epoch(self):
        if DEVICE=='cuda': torch.cuda.synchronize()
        if self.epoch: self.seconds.append(time.perf_counter()-self.start)


def cached_epoch(batches=8, rounds=6, epochs=3, bs=32, size=64, classes=4):
    "An epoch with LogitKD and pooled FeatureKD from a full cache, against an epoch of the plain student, on the same augmented images"
    torch.manual_seed(0)
    table = split_groups(synthetic_table(n=2*bs*batches, classes=classes, size=size, tiles_per_patient=1), sizes=(.5, .25, .25))
    teacher = Teacher(create_teacher('resnet50', classes, size), classes=table.attrs['classes'])

    def learner(*cbs):
        dls = image_dls(table, size, bs=bs, augment=tissue_augment(seed=0), views=2, device=torch.device(DEVICE))
        dls.valid = []
        learn = Learner(dls, create_student('resnet18', classes, size), loss_func=CrossEntropyLossFlat(), cbs=[*cbs, Clock()])
        learn.remove_cbs([cb for cb in learn.cbs if cb.name in ('progress', 'recorder')])
        return learn

    def distilled(T): return learner(LogitKD(T), FeatureKD(T, [('layer4', 'layer4')], pool=True))

    with tempfile.TemporaryDirectory(prefix='kdmed-bench-') as folder:
        cache = TeacherCache(teacher, folder)
        runs = dict(plain=learner(), teacher=distilled(teacher), cached=distilled(cache))
        cache.fill(runs['cached'].dls, progress=False)
        for _ in range(rounds):
            for learn in runs.values():
                with learn.no_logging(): learn.fit(epochs, 1e-4)
        times = {name: learn.clock.seconds for name,learn in runs.items()}
    ms = {name: 1000*median(t)/len(runs['plain'].dls.train) for name,t in times.items()}
    ratio = median(times['cached'])/median(times['plain'])
    print(f"a step: plain {ms['plain']:.0f} ms, with a running teacher {ms['teacher']:.0f} ms, with a full cache {ms['cached']:.0f} ms")
    return dict(name='epoch from a full teacher cache / plain epoch', value=round(ratio, 3), unit='ratio', limit=1.08)


if __name__ == '__main__': print(cached_epoch())
