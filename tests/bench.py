"Measure what kdmed promises about speed: ratios against a baseline timed in the same run. Prints a table and writes bench.json."
import argparse, json, os, platform, subprocess, sys, tempfile, time, warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median

warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bench_cache import cached_epoch
from bench_copies import copies_speed
from bench_foundation import features_speed
from bench_metrics import bootstrap_speed
from bench_quantize import quantization
from bench_report import report_cost
from bench_saliency import saliency_speed
from bench_serve import service_speed
from bench_whole_way import whole_way
from kdmed.data.datasets import read_ham10000
from kdmed.data.images import image_table, synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.store import pack_images
from kdmed.data.transforms import (
    Augment, BrightnessContrast, HorizontalFlip, Rotation, ScaledCrop, Shear, VerticalFlip)
from kdmed.models.create import create_student, create_teacher
from kdmed.distill.callbacks import LogitKD
from kdmed.distill.features import FeatureKD
from kdmed.distill.teacher import Teacher

HAM10000 = Path(os.environ.get('KDMED_HAM10000', Path(__file__).parents[2]/'shared/data/ham10000'))
WORK = tempfile.TemporaryDirectory(prefix='kdmed-bench-')
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


# -- a step: what a teacher costs

class Clock(Callback):
    "Seconds from the start of the first training batch to the end of the last"
    order,run_valid = -1000,False
    def before_batch(self):
        if self.iter==0:
            wait()
            self.start = time.perf_counter()
    def after_train(self):
        wait()
        self.took = time.perf_counter()-self.start

def wait():
    if DEVICE=='cuda': torch.cuda.synchronize()

class Bare(Callback):
    "The least a fastai Learner can do: one forward of the teacher under inference_mode, and the terms, written out"
    run_valid = False
    def __init__(self, teacher, student):
        self.teacher,self.projector,self.ours,self.theirs = teacher,nn.Conv2d(512, 2048, 1).to(DEVICE),{},{}
        teacher.layer4.register_forward_hook(lambda m,i,o: self.theirs.update(map=o))
        student.layer4.register_forward_hook(lambda m,i,o: self.ours.update(map=o))
    def loss(self, x, pred):
        with torch.inference_mode(): logits = self.teacher(x)
        soft = 16*F.kl_div(F.log_softmax(pred/4, 1), F.log_softmax(logits.clone()/4, 1), reduction='batchmean', log_target=True)
        return soft + F.mse_loss(self.projector(self.ours['map']), self.theirs['map'].clone())
    def after_loss(self): self.learn.loss_grad = self.loss_grad + self.loss(self.x, self.pred)

def make_pair(classes=10, size=64): return create_teacher('resnet50', classes, size).to(DEVICE).eval().requires_grad_(False),create_student('resnet18', classes, size)

def step_learner(dls, student, *cbs):
    "A Learner without progress bar and recorder, ready to be timed"
    clock = Clock()
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), cbs=[clock, *cbs])
    learn.remove_cbs([cb for cb in learn.cbs if cb.name in ('progress', 'recorder')])
    learn.create_opt()
    learn.dls.valid = []
    def run():
        learn.fit(1, 1e-4)
        return clock.took
    return run

def raw_loop(batches):
    "The same in a loop of one's own"
    teacher,student = make_pair()
    student.to(DEVICE).train()
    terms = Bare(teacher, student)
    opt = torch.optim.AdamW([*student.parameters(), *terms.projector.parameters()], lr=1e-4)
    def run():
        wait()
        start = time.perf_counter()
        for x,y in batches:
            pred = student(x)
            (F.cross_entropy(pred, y) + terms.loss(x, pred)).backward()
            opt.step()
            opt.zero_grad()
        wait()
        return time.perf_counter()-start
    return run

def their_step(dls):
    "A step with fasterai's callback (soft target, and features without a projector: it has none), if the package can be had; None else"
    if find_spec('fasterai') is None:
        folder = f'{WORK.name}/fasterai'
        if subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', folder, 'fasterai'], capture_output=True).returncode and \
           subprocess.run(['uv', 'pip', 'install', '-q', '--no-deps', '--target', folder, 'fasterai'], capture_output=True).returncode: return None
        sys.path.append(folder)
    from fasterai.distill.all import KnowledgeDistillationCallback, SoftTarget
    teacher,student = create_teacher('resnet50', 10, 64).to(DEVICE),create_student('resnet18', 10, 64)
    return step_learner(dls, student, KnowledgeDistillationCallback(teacher, SoftTarget))

def distillation_step(batches=6, rounds=9, bs=32, size=64, classes=10):
    """A fastai step with LogitKD and FeatureKD, against the least a fastai Learner can spend on the same terms, and against a raw loop.

    The baseline runs the teacher inside its step: two models that take turns share the processor's caches, which neither does alone.
    """
    torch.manual_seed(0)
    x,y = torch.randn(bs*batches, 3, size, size),torch.randint(classes, (bs*batches,))
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=bs) for _ in range(2)], device=DEVICE)
    teacher,student = make_pair()
    T = Teacher(teacher)
    runs = dict(distilled=step_learner(dls, student, LogitKD(T), FeatureKD(T, [('layer4', 'layer4')])), plain=step_learner(dls, make_pair()[1]))
    teacher,student = make_pair()
    runs['baseline'],runs['raw'] = step_learner(dls, student, Bare(teacher, student)),raw_loop([(a.to(DEVICE), b.to(DEVICE)) for a,b in zip(x.split(bs), y.split(bs))])
    if theirs := their_step(dls): runs['fasterai'] = theirs
    for run in runs.values(): run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name,run in runs.items(): times[name].append(run())
    print('a step: ' + ', '.join(f'{name} {1000*median(t)/batches:.0f} ms' for name,t in times.items()))
    def ratio(a, b): return round(median(x/y for x,y in zip(times[a], times[b])), 3)
    rows = [dict(name='distillation step / (fastai step + teacher forward + terms)', value=ratio('distilled', 'baseline'), unit='ratio', limit=1.05),
            dict(name='distillation step / raw PyTorch loop', value=ratio('distilled', 'raw'), unit='ratio', limit=1.15)]
    if 'fasterai' in times: rows.append(dict(name="fasterai's step, soft target alone / (fastai step + teacher forward + terms)", value=ratio('fasterai', 'baseline'), unit='ratio', limit=None))
    else: print('fasterai could not be installed: not compared')
    return rows


# -- input: images a second, as a training loop would get them

@cache
def photographs():
    "Image table: HAM10000 at 200 x 150 where it is at hand, else as many synthetic tiles saved as JPEGs of that size"
    if HAM10000.is_dir(): table = read_ham10000(HAM10000, print_card=False)
    else:
        tiles,folder = synthetic_table(n=1000, size=150),Path(WORK.name)/'tiles'
        folder.mkdir()
        files = [folder/f'{i:05d}.jpg' for i in range(10_000)]
        for i,file in enumerate(files): Image.fromarray(tiles.image[i%1000]).resize((200, 150)).rotate(i//1000).save(file, quality=90)
        table = image_table(files, [tiles.label[i%1000] for i in range(10_000)], classes=tiles.attrs['classes'])
    print(f"input: {table.attrs['name']}, {len(table):,} JPEGs of 200 x 150")
    return split_groups(table, sizes=(.98, .02, 0))

@cache
def large_photographs(n=2000):
    "Some of the images, upscaled to 600 x 450"
    table = photographs().sample(n, random_state=0)
    folder = Path(WORK.name)/'large'
    folder.mkdir()
    files = [folder/f'{i:05d}.jpg' for i in range(len(table))]
    for image,file in zip(table.image, files): Image.open(image).resize((600, 450), Image.Resampling.BICUBIC).save(file, quality=90)
    return table.assign(image=files)

def epoch(dl):
    "Images and seconds of a pass over the training data"
    n = 0
    def work():
        nonlocal n
        for x,y in dl: n += len(x)
    took = seconds(work)
    return n,took

def rate(dl, rounds):
    "Images a second: the best of some passes, the first not counted"
    epoch(dl)
    return max(n/s for n,s in (epoch(dl) for _ in range(rounds)))

def fastai_loaders(table, size, batch_tfms=()):
    "The usual loaders: files opened in two worker processes at every epoch"
    frame = table.assign(image=table.image.astype(str), is_valid=table.split!='train')[['image', 'label', 'is_valid']]
    return ImageDataLoaders.from_df(frame, path='/', fn_col='image', label_col='label', valid_col='is_valid', item_tfms=Resize(size, method='squish'),
                                    batch_tfms=[*batch_tfms, Normalize.from_stats(*imagenet_stats)], bs=64, num_workers=2, device=torch.device(DEVICE))

def input_ratio(name, table, limit, augment=None, aug=(), size=128):
    "Images a second out of a packed store, against fastai's loaders with two workers"
    dls = image_dls(table(), size, bs=64, store=WORK.name, augment=augment, device=torch.device(DEVICE))
    stock = fastai_loaders(table(), size, aug)
    theirs,ours = rate(stock.train, 1),rate(dls.train, 5)
    theirs = max(theirs, rate(stock.train, 1))
    print(f'{name}: {ours:,.0f} images a second, fastai {theirs:,.0f}')
    return dict(name=f'input, {name} / fastai ImageDataLoaders with 2 workers', value=round(ours/theirs, 1), unit='ratio', limit=limit, least=True)

def input_small(): return input_ratio('200 x 150 to 128', photographs, 10)
def input_large(): return input_ratio('600 x 450 to 128', large_photographs, 25)

def input_augmented():
    augment = Augment([HorizontalFlip(.5), VerticalFlip(.5), Rotation(10), ScaledCrop(.9, 1.1), Shear(.1), BrightnessContrast(.2, .2)])
    return input_ratio('200 x 150 to 128, augmented', photographs, 5, augment, aug_transforms(flip_vert=True))

def packing_time(size=128):
    "Packing, against one epoch of fastai's loaders"
    table = photographs()
    stock = fastai_loaders(table, size).train
    times = []
    for i in range(3):
        theirs = epoch(stock)
        ours = seconds(lambda: pack_images(table.image, size, folder=Path(WORK.name)/f'packing{i}', progress=False))
        times.append((ours/len(table)) / (theirs[1]/theirs[0]))
    return dict(name='packing / one epoch of fastai ImageDataLoaders, per image', value=round(median(times), 2), unit='ratio', limit=1.)

def packing_memory(n=10_000, size=128):
    "How much the memory of a process grows while it packs: its peak, less what it had before (Linux)"
    files = [str(f) for f in photographs().image[:n]]
    listed = Path(WORK.name)/'files.json'
    listed.write_text(json.dumps(files))
    code = f"""
import json, re
from pathlib import Path
from kdmed.data.store import pack_images
files = [Path(f) for f in json.loads(Path({str(listed)!r}).read_text())]
def status(name): return int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024
Path('/proc/self/clear_refs').write_text('5') # the peak is counted from here
before = status('VmRSS')
pack_images(files, {size}, folder={WORK.name + '/memory'!r}, progress=False)
print(status('VmHWM')-before)"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    return dict(name=f'memory growth while {len(files):,} images are packed', value=round(float(done.stdout)), unit='MB', limit=300)


BENCHES = [distillation_step, cached_epoch, features_speed, bootstrap_speed, report_cost, saliency_speed, input_small,
            input_large, input_augmented, packing_time, packing_memory, copies_speed, quantization, service_speed,
            whole_way]


def where():
    "The machine and the day: what a figure belongs to"
    device = torch.cuda.get_device_name() if DEVICE=='cuda' else f'{platform.machine()} processor'
    return f'{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime("%Y-%m-%d")}'

def judge(row):
    "The row with `ok`, and in words what was wanted"
    least,limit,value = row.pop('least', False),row['limit'],row['value']
    if limit is None: return dict(row, ok=True),'for comparison'
    return dict(row, ok=value>=limit if least else value<=limit),f"at {'least' if least else 'most'} {limit}"

def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument('--out', default='bench.json', help='where to write the results (default %(default)s)')
    args.add_argument('--only', nargs='+', metavar='NAME', choices=[b.__name__ for b in BENCHES], help=f"some of {', '.join(b.__name__ for b in BENCHES)}")
    args = args.parse_args()
    print(where(), flush=True)
    rows = []
    for bench in BENCHES:
        if args.only and bench.__name__ not in args.only: continue
        measured = bench()
        for row in measured if isinstance(measured, list) else [measured]:
            row,wanted = judge(row)
            rows.append(dict(row, where=where()))
            print(f"{row['name']:90}  {row['value']:7.3f} {row['unit']:5}  ({wanted})  {'ok' if row['ok'] else 'MISSED'}", flush=True)
        Path(args.out).write_text(json.dumps(rows, indent=1) + '\n') # what is measured is kept, whatever comes next


if __name__ == '__main__': main()
