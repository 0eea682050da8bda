"Measure what kdmed promises about speed: ratios against a baseline timed in the same run. Prints a table and writes bench.json."
import argparse, json, platform, time, warnings
from pathlib import Path
from statistics import median

warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch.utils.data import DataLoader, TensorDataset

from kdmed.kd import FeatureKD, LogitKD, Teacher, create_student, create_teacher

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def seconds(work):
    "Wall-clock seconds of `work()`, device included"
    def wait():
        if DEVICE=='cuda': torch.cuda.synchronize()
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter()-start


def distillation_step(batches=6, rounds=11, bs=32, size=64, classes=10):
    """A fastai step with LogitKD and FeatureKD, against a plain fastai step plus one teacher forward under inference_mode.

    The baseline runs that forward inside its step, too: two models that take turns share the processor's caches, which neither does alone.
    """
    torch.manual_seed(0)
    x,y = torch.randn(bs*batches, 3, size, size),torch.randint(classes, (bs*batches,))
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=bs) for _ in range(2)], device=DEVICE)
    teacher = create_teacher('resnet50', classes, size).to(DEVICE).eval()
    T = Teacher(teacher)

    def learner(cbs=()):
        learn = Learner(dls, create_student('resnet18', classes, size), loss_func=CrossEntropyLossFlat(), cbs=cbs)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name in ('progress', 'recorder')])
        learn.create_opt()
        learn.dls.valid = []
        return learn

    def train(learn):
        learn.model.train()
        learn.fit(1, 1e-4)

    class BareTeacher(Callback):
        run_valid = False
        def after_loss(self):
            with torch.inference_mode(): teacher(*self.xb)

    steps = dict(plain=learner(), baseline=learner(BareTeacher()), distilled=learner([LogitKD(T), FeatureKD(T, [('layer4', 'layer4')])]))
    for learn in steps.values(): train(learn)
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name,learn in steps.items(): times[name].append(seconds(lambda: train(learn)))
    ms = {name: 1000*median(t)/batches for name,t in times.items()}
    ratio = median(d/b for b,d in zip(times['baseline'], times['distilled']))
    print(f"a step: plain {ms['plain']:.0f} ms, with a bare teacher forward {ms['baseline']:.0f} ms, distilled {ms['distilled']:.0f} ms")
    return dict(name='distillation step / (plain fastai step + teacher forward)', value=round(ratio, 3), unit='ratio', limit=1.1)


BENCHES = [distillation_step]


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument('--out', default='bench.json', help='where to write the results (default %(default)s)')
    out = Path(args.parse_args().out)
    print(f'torch {torch.__version__} on {DEVICE} ({platform.machine()}), {torch.get_num_threads()} threads')
    rows = [bench() for bench in BENCHES]
    for row in rows: row['ok'] = row['value'] <= row['limit']
    width = max(len(row['name']) for row in rows)
    for row in rows: print(f"{row['name']:{width}}  {row['value']:6.3f} {row['unit']}  (limit {row['limit']})  {'ok' if row['ok'] else 'MISSED'}")
    out.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__': main()
