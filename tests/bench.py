"Measure what kdmed promises about speed: ratios against a baseline timed in the same run. Prints a table and writes bench.json."
import argparse, json, platform, time, warnings
from pathlib import Path
from statistics import median

warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)

import torch
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


def distillation_step(batches=6, rounds=7, bs=32, size=64, classes=10):
    "A fastai step with LogitKD and FeatureKD, against a plain fastai step plus one teacher forward under inference_mode"
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

    def teach():
        with torch.inference_mode():
            for i in range(batches): teacher(x[i*bs:(i+1)*bs].to(DEVICE))

    plain,distilled = learner(),learner([LogitKD(T), FeatureKD(T, [('layer4', 'layer4')])])
    works = dict(plain=lambda: train(plain), teacher=teach, distilled=lambda: train(distilled))
    for work in works.values(): work()
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name,work in works.items(): times[name].append(seconds(work))
    ms = {name: 1000*median(t)/batches for name,t in times.items()}
    ratio = median(d/(p+t) for p,t,d in zip(times['plain'], times['teacher'], times['distilled']))
    print(f"plain {ms['plain']:.0f} ms, teacher {ms['teacher']:.0f} ms, distilled {ms['distilled']:.0f} ms a step")
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
