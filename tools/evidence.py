"""Train the fits behind `results/evidence`: data sets, teachers, students, methods and seeds, one after another.

    python tools/evidence.py run --data FOLDER --work FOLDER     # a background job: kill it at will, it resumes
    python tools/evidence.py list --data FOLDER --work FOLDER    # which fits there are, and which are finished
    python tools/evidence.py valid --data FOLDER --work FOLDER   # validation figures of finished fits: to choose by
    python tools/evidence.py collect --data FOLDER --work FOLDER # tables of all finished fits, into `results/evidence`

Logits that a teacher has computed for all views land, too: students of methods that need no more can then be trained
without it. `--data` holds the folders `ham10000` and `pneumonia` as Kaggle lays them out, and `breastmnist.npz`."""
import argparse
import io
import json
import os
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

# One thread and one set of instructions: the same weights on any x86-64 processor that has AVX2
os.environ.update(OMP_NUM_THREADS='1', ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_CBWR='AVX2')
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback

from kdmed.core.files import write_atomic
from kdmed.data.datasets import read_ham10000, read_medmnist
from kdmed.data.images import image_table, is_unlabeled, synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import chest_augment, skin_augment, tissue_augment
from kdmed.distill.cache import TeacherCache
from kdmed.distill.methods import distill, fit_classifier
from kdmed.distill.teacher import Teacher
from kdmed.evaluate.harm import harm_check
from kdmed.evaluate.intervals import evaluate, gap_closed, paired_difference
from kdmed.evaluate.metrics import MetricByName
from kdmed.models.create import create_student, create_teacher, load_student, model_stats
from kdmed.studies.label_curve import keep_labels
from kdmed.studies.recipes import KeepBest
from kdmed.studies.study import is_finished, run_cell, targets_of
from kdmed.train.resume import Resume

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'results'/'evidence' # in `predictions`, test images' probabilities of each finished student
SIZES = .6, .15, .25 # of train, valid, test; by groups


# -- data

def ham10000(data): return split_groups(read_ham10000(data/'ham10000', print_card=False), SIZES)

def pneumonia(data):
    "Three classes by file name; a number after `person` or `IM-` is one child, in both of the published parts"
    files = sorted((data/'pneumonia').rglob('*.jpeg'))
    def label(f): return 'normal' if f.parent.name=='NORMAL' else f.stem.split('_')[1]
    def child(f):
        if f.parent.name=='NORMAL': return 'IM-' + f.stem.split('IM-')[1].split('-')[0]
        return f.stem.split('_')[0]
    classes = ['normal', 'bacteria', 'virus']
    table = image_table(files, [label(f) for f in files], [child(f) for f in files], classes, name='pneumonia',
                        licence='CC BY 4.0', citation='Kermany et al., Cell 2018')
    return split_groups(table, SIZES)

def breast(data): return read_medmnist(next(data.rglob('breastmnist.npz')), print_card=False)

def findings(data):
    """Synthetic tissue, findings in two pairs that mostly come together, under noise

    Of patients in whom one of a pair is present without the other, three of four are left out."""
    table = synthetic_table(n=8000, classes=4, size=64, task='multilabel', tiles_per_patient=2)
    names,rng = table.attrs['classes'],np.random.default_rng(0)
    present = np.array([[name in label.split('|') for name in names] for label in table.label])
    apart = (present[:, 0]!=present[:, 1]) | (present[:, 2]!=present[:, 3])
    left_out = {g: rng.random() < .75 for g in table.group.unique()}
    kept = table[~(apart & table.group.map(left_out).to_numpy())].reset_index(drop=True)
    noisy = [(image + rng.normal(0, 60, image.shape)).clip(0, 255).astype(np.uint8) for image in kept.image]
    return split_groups(kept.assign(image=noisy), SIZES)

def few_labels(read, share=.1):
    "A set of which this share of the lesions or children that are trained on keep their labels, in every class"
    return lambda data: keep_labels(read(data), share)

SETS = dict(ham10000=(ham10000, skin_augment), pneumonia=(pneumonia, chest_augment),
            ham10000_few=(few_labels(ham10000), skin_augment), pneumonia_few=(few_labels(pneumonia), chest_augment),
            breastmnist=(breast, tissue_augment), findings=(findings, tissue_augment))


# -- what is trained

@dataclass(frozen=True)
class Run:
    "One fit: `method` is `teacher`, `plain`, or that of a distilled student"
    data:str
    model:str
    method:str
    size:int=96
    epochs:int=15
    seed:int=0
    sampling:str='balanced'
    views:int=4 # of each image, which then repeat, so that a teacher's outputs are computed once; 0: always new ones
    lr:float=3e-3
    weights:str='' # '' is from scratch
    teacher:str=''  # folder of the teacher's own run
    settings:str='' # of the method, as JSON

    @property
    def name(self):
        start = f'-{self.weights}' if self.weights else ''
        what = f'/{Path(self.teacher).parent.name}' if self.teacher else ''
        method = self.method + (f'-{self.settings}' if self.settings else '')
        how = f'{self.sampling}-{self.epochs}x{self.views}-lr{self.lr:g}'
        kind = 'teachers' if self.method=='teacher' else 'students'
        return f'{self.data}-{self.size}/{kind}{what}/{self.model}{start}-{how}/{method}-{self.seed}'


class Clock(Callback):
    "Seconds of a run, of the wall clock and of the processor, those before an interruption included"
    def __init__(self, file):
        self.file,self.start = file,(time.perf_counter(), time.process_time())
        self.before = json.loads(file.read_text()) if file.exists() else [0., 0.]
    def seconds(self):
        now = time.perf_counter(),time.process_time()
        return [before+end-start for before,end,start in zip(self.before, now, self.start)]
    def after_epoch(self): write_atomic(self.file, json.dumps(self.seconds()))

class Job:
    "Where data lies and results are kept; loaders and teachers are made once"
    def __init__(self, data, work): self.data,self.work = Path(data),Path(work)

    @lru_cache(maxsize=2)
    def dls(self, name, size, sampling, views, stats=None):
        read,augment = SETS[name]
        stats = {} if stats is None else dict(stats=stats)
        how = dict(bs=64, sampling=sampling, views=views or None, device='cpu', store=self.work/'stores')
        return image_dls(read(self.data), size, augment=augment(0), **how, **stats)

    def folder(self, run): return self.work/run.name

    def loaders(self, run, model=None):
        "Of the images that a run learns from: a teacher and a plain student, from those with labels"
        stats = model_stats(model) if model is not None else None
        how = run.data,run.size,run.sampling,run.views,stats
        if run.method not in ('teacher', 'plain') or not self.dls(*how).unlabeled: return self.dls(*how)
        return self.labeled(*how, repeated=run.method=='plain')

    @lru_cache(maxsize=2)
    def labeled(self, name, size, sampling, views, stats, repeated):
        "Labeled images alone, always in new views; repeated, so that epochs are about as long as those of all images"
        every = self.dls(name, size, sampling, views, stats)
        table = every.table
        stats = {} if stats is None else dict(stats=stats)
        how = dict(bs=64, sampling=sampling, device='cpu', store=self.work/'stores')
        kept = table[~is_unlabeled(table)].reset_index(drop=True)
        if repeated:
            train = kept[kept.split=='train']
            kept = pd.concat([*[train]*round(every.train.n/len(train)), kept[kept.split!='train']], ignore_index=True)
        kept.attrs = dict(table.attrs)
        return image_dls(kept, size, augment=SETS[name][1](0), **how, **stats)

    def train(self, run, home, clock):
        "A fitted Learner; killed, it resumes from its last checkpoint"
        start = dict(weights=run.weights) if run.weights else {}
        classes_of = self.loaders(run)
        model = create_student(run.model, classes_of.classes, run.size, classes_of.task, **start)
        dls = self.loaders(run, model) if run.weights else classes_of
        def make(): # channels last: half the time on a processor
            model = create_teacher(run.model, dls.classes, run.size, dls.task, **start)
            return model.to(memory_format=torch.channels_last)
        cbs = [Resume(home, minutes=4), clock]
        if run.method=='teacher':
            cbs += [KeepBest(home/'best', monitor='macro_auroc')]
            return fit_classifier(dls, make, run.epochs, run.lr, run.seed, cbs, False, MetricByName('macro_auroc'))
        if run.method=='plain': return fit_classifier(dls, make, run.epochs, run.lr, run.seed, cbs, False)
        teacher = TeacherCache(self.teacher_for(run, dls), self.work/'caches')
        return distill(dls, make, teacher, self.method(run), run.epochs, run.lr, run.seed, cbs, False)

    def method(self, run): return run.method

    @lru_cache(maxsize=1)
    def teacher(self, name):
        "A trained teacher; its logits for each image that it sees are noted in `self.noted`"
        model,self.noted = load_student(self.work/name).to(memory_format=torch.channels_last),{}
        def note(_, images, logits): self.noted.update(zip(image_digests(*images).tolist(), logits.half().numpy()))
        model.register_forward_hook(note)
        return model

    def teacher_for(self, run, dls):
        "The trained teacher of a run; where there is none, one that knows its logits, for methods that need no more"
        file = landed_outputs(run.teacher)
        if (self.work/run.teacher).exists() or run.method not in BY_LOGITS or not file.exists():
            return self.teacher(run.teacher)
        return Teacher(LandedTeacher(file), dls.classes, run.size, STATS)

    def fill(self, run):
        "Compute the logits of all views of all training images, unless they are in the cache"
        TeacherCache(self.teacher(run.teacher), self.work/'caches').fill(self.loaders(run), progress=False)
        self.note_outputs(run)

    def note_outputs(self, run):
        "Keep the logits that the teacher of a run has computed since it was loaded, beside it"
        if run.method not in BY_LOGITS or not getattr(self, 'noted', None): return
        file,noted = self.work/run.teacher/'outputs.npz',self.noted
        if file.exists():
            before = np.load(file)
            noted = dict(zip(before['digests'].tolist(), before['logits'])) | noted
        digests,data = np.array(sorted(noted), np.uint64),io.BytesIO()
        np.savez_compressed(data, digests=digests, logits=np.stack([noted[d] for d in digests.tolist()]))
        write_atomic(file, data.getvalue())

    def do(self, run):
        "Train one run, unless it is finished; its facts are in `run.json`"
        folder = self.folder(run)
        if is_finished(folder): return False
        folder.mkdir(parents=True, exist_ok=True)
        clock = Clock(folder/'seconds.json')
        train = partial(self.train, run, clock=clock)
        run_cell(folder, lambda: self.loaders(run, load_if_started(run, self)), train)
        self.note_outputs(run)
        facts = asdict(run) | dict(zip(('seconds', 'cpu_seconds'), clock.seconds())) | about()
        write_atomic(folder/'run.json', json.dumps(facts))
        return True

    def probs(self, run, on='test'):
        "Probabilities of a finished run as they land: half precision, so that figures are the same from either file"
        landed,own = landed_file(run),self.folder(run)/f'{on}.npy'
        found = np.load(own) if own.exists() else np.load(landed)['test']
        return found.astype(np.float16).astype(np.float64)

    def figures(self, run, on):
        "Balanced accuracy (multilabel: none) and macro AUROC of a finished run on validation or test images"
        found = self.intervals(run, on, 20)
        return {name: float(row.value) for name,row in found.iterrows()}

    def intervals(self, run, on, n_boot=1000):
        "The same with intervals over lesions or children"
        dls,probs = self.loaders(run),self.probs(run, on)
        part = getattr(dls, on)
        found = evaluate(probs, targets_of(part), dls.classes, part.table.group.to_numpy(), dls.task, n_boot=n_boot)
        return found.loc[[m for m in METRICS if m in found.index]]

# -- what lands

BY_LOGITS = 'logit','decoupled','dist' # methods that need a teacher's logits for images as they are, and no more
STATS = [.5]*3,[.5]*3 # the normalization of all teachers

def image_digests(images):
    "Of images as a teacher receives them, normalized, in 256 steps; uint64 [B]"
    pixels = (127.5*images+127.5).round().clamp(0, 255).to(torch.uint8).contiguous()
    return np.array([int.from_bytes(blake2b(p.numpy(), digest_size=8).digest(), 'little') for p in pixels], np.uint64)

def needs_trained(run):
    "Whether a run learns from more than the logits that its teacher has landed"
    return bool(run.teacher) and not (run.method in BY_LOGITS and landed_outputs(run.teacher).exists())

class LandedTeacher(torch.nn.Module):
    "A teacher without weights (they are too large to land), which knows its logits for the images of a study"
    def __init__(self, file):
        super().__init__()
        outputs = np.load(file)
        self.register_buffer('digests', torch.tensor(outputs['digests'].view(np.int64)))
        self.register_buffer('known', torch.tensor(outputs['logits']).float())
        self.rows = {d: k for k,d in enumerate(outputs['digests'].tolist())}

    def forward(self, images):
        rows = [self.rows.get(d) for d in image_digests(images).tolist()]
        if None in rows: raise ValueError(f'{rows.count(None)} of {len(rows)} images are not among those whose logits '
                                          'have landed: they need the trained teacher')
        return self.known[rows]

def landed_outputs(teacher): return RESULTS/'teachers'/f'{Path(teacher).parts[0]}.npz'

def landed_file(run, folder=RESULTS): return folder/'predictions'/f'{run.name}.npz'

def landed_rows(name='fits'):
    "The rows of `fits.csv` (of the study of factors: `factor_fits.csv`, by an earlier teacher), each with its run"
    file = RESULTS/f'{name}.csv'
    if not file.exists(): return
    table = pd.read_csv(file, keep_default_na=False, na_values=dict(seconds='', cpu_seconds=''))
    for row in table.to_dict('records'):
        facts = {f.name: row[f.name] for f in fields(Run)}
        if row['teacher']: facts['teacher'] = f"{row['data']}-{row['size']}/teachers/{row['teacher']}/teacher-0"
        yield Run(**facts),row

def has_row(run, name='fits'): return any(its==run for its,_ in landed_rows(name))

def is_landed(run):
    "Whether a student's row and its predictions are among the results, so that it can be compared without training"
    return run.method!='teacher' and landed_file(run).exists() and has_row(run)

def load_if_started(run, job):
    "The normalization of a pretrained model is its own"
    if not run.weights: return None
    dls = job.loaders(run)
    return create_student(run.model, dls.classes, run.size, dls.task, weights=run.weights)

def about():
    "What a figure belongs to"
    import timm
    asked = ['git', 'rev-parse', '--short', 'HEAD']
    done = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent)
    versions = dict(torch=torch.__version__.split('+')[0], timm=timm.__version__)
    return dict(commit=done.stdout.strip(), date=time.strftime('%Y-%m-%d'), **versions)


# -- the plan

def teacher_runs():
    lite = dict(model='tf_efficientnet_lite2', method='teacher', weights='pip', views=0, lr=1e-3)
    small = lite | dict(size=64, epochs=8)
    return dict(ham10000=Run('ham10000', epochs=12, **lite), pneumonia=Run('pneumonia', epochs=8, **lite),
                ham10000_few=Run('ham10000_few', epochs=30, **lite),
                pneumonia_few=Run('pneumonia_few', epochs=30, **lite),
                breastmnist=Run('breastmnist', **small, sampling='balanced'),
                findings=Run('findings', **small, sampling='natural'))

def runs_of(data, student, methods, **how):
    teacher = teacher_runs()[data].name
    return [Run(data, student, method, teacher='' if method=='plain' else teacher, **how) for method in methods]

TINY,SMALL = 'test_efficientnet','mobilenetv3_small_100' # .1 and 1.5 million parameters

def factor_runs():
    "One seed, HAM10000, a tiny CNN: do sampling, length, views or the term decide what a strong teacher can give?"
    for epochs,views in ((12, 12), (10, 4)): # 12 views in 12 epochs never repeat
        for sampling in ('balanced', 'natural'):
            how = dict(epochs=epochs, views=views, sampling=sampling)
            yield from runs_of('ham10000', TINY, ('plain', 'logit', 'dist'), **how)

# What the validation figures of the factor runs chose; see the page `which_method`
CHOSEN = dict(epochs=12, views=12, sampling='balanced')
METHODS = 'plain', 'logit', 'decoupled', 'dist', 'logit+feature', 'srd', 'lelp', 'function_matching'

def core_runs(seeds=5):
    "Two sets, two students, seven methods; one seed of the tiny student first, then further seeds without its teacher"
    def of(student, seeds, methods):
        for seed,method,data in product(seeds, methods, ('ham10000', 'pneumonia')):
            yield from runs_of(data, student, [method], seed=seed, **CHOSEN)
    others = [m for m in METHODS if m not in ('plain', *BY_LOGITS)]
    yield from of(TINY, [0], METHODS)
    yield from of(TINY, range(1, seeds), ('plain', *BY_LOGITS))
    yield from of(TINY, range(1, seeds), others)
    yield from of(SMALL, range(seeds), METHODS)

def small_runs(seeds=3):
    "Two small sets at 64 px: BreastMNIST (benign or malignant) and synthetic findings, with methods for their task"
    binary,findings = ('plain', 'logit', 'srd', 'lelp', 'function_matching'),('plain', 'logit', 'srd', 'l2d')
    for seed in range(seeds):
        yield from runs_of('breastmnist', TINY, binary, seed=seed, size=64, **CHOSEN)
        yield from runs_of('findings', TINY, findings, seed=seed, size=64, **CHOSEN | dict(sampling='natural'))

def few_label_runs(seeds=3):
    "One in ten lesions or children with labels: the teacher learns from these, and its student from all images"
    for seed,data in product(range(seeds), ('pneumonia_few', 'ham10000_few')):
        yield from runs_of(data, TINY, ('plain', 'logit'), seed=seed, **CHOSEN)

def plan():
    "In the order in which they are trained: a table for one seed of every set, then further seeds and students"
    teachers,core = teacher_runs(),list(core_runs())
    return list(dict.fromkeys([teachers['ham10000'], *factor_runs(), teachers['pneumonia'], *core[:2*len(METHODS)],
                               teachers['breastmnist'], teachers['findings'], *small_runs(),
                               teachers['pneumonia_few'], teachers['ham10000_few'], *few_label_runs(), *core]))


# -- what comes out

METRICS = ['balanced_accuracy', 'macro_auroc']

def finished(job):
    "All finished runs below the work folder, also those of earlier plans, with what was noted when they ended"
    for file in sorted(job.work.glob('*/*/**/run.json')):
        facts = json.loads(file.read_text())
        run = Run(**{f.name: facts[f.name] for f in fields(Run)})
        if job.folder(run)==file.parent and is_finished(file.parent): yield run,facts

def histories(job):
    "The training logs of finished teachers, the landed ones included"
    found = []
    for run,_ in finished(job):
        if run.method!='teacher': continue
        log = pd.read_csv(job.folder(run)/'history.csv').round(4)
        log.insert(0, 'epoch', range(1, len(log)+1))
        log.insert(0, 'teacher', job.folder(run).parent.name)
        found.append(log.assign(data=run.data))
    return landed_first('histories', pd.concat(found), ['teacher', 'data'])

def landed_first(name, table, keys):
    "The rows of a landed table that `table` has no newer ones of, and then those of `table`"
    file = RESULTS/f'{name}.csv'
    if not file.exists(): return table
    before = pd.read_csv(file, keep_default_na=False, na_values={c: '' for c in table if c not in keys})
    if not len(table): return before
    def kinds(t): return t[keys].astype(str).agg('|'.join, axis=1)
    return pd.concat([before[~kinds(before).isin(kinds(table))], table])

def fits_table(job):
    "A row for each finished fit: what it was, its figures on validation and test images, its seconds"
    rows = []
    for run,facts in finished(job):
        scores = {f'valid_{m}': round(v, 4) for m,v in job.figures(run, 'valid').items()}
        for m,row in job.intervals(run, 'test').iterrows():
            values = {'': row.value, '_low': row.low, '_high': row.high}
            scores |= {f'test_{m}{end}': round(v, 4) for end,v in values.items()}
        took = {name: facts[name] and round(facts[name]) for name in ('seconds', 'cpu_seconds')} # None: not known
        rows.append(facts | dict(teacher=Path(run.teacher).parent.name) | took | scores)
    return landed_first('fits', pd.DataFrame(rows), [f.name for f in fields(Run)])

def teacher_of(run): return next(its for its in teacher_runs().values() if its.name==run.teacher)

def comparisons(job):
    """A row for each way to distil a student and each metric, over the seeds that it and the plain student have

    `gap` is teacher minus plain, `gain` distilled minus plain, `closed` their ratio; `harmed` names classes whose
    sensitivity is lower than the plain student's beyond chance."""
    kinds = {}
    have = [run for run,_ in finished(job)] + [run for run,_ in landed_rows() if is_landed(run)]
    for run in have:
        if run.method!='teacher': kinds.setdefault(replace(run, seed=0), {})[run.seed] = run
    rows = []
    for kind,by_seed in kinds.items():
        plain = kinds.get(replace(kind, method='plain', teacher='', settings=''), {})
        seeds = sorted(by_seed.keys() & plain.keys())
        if kind.method!='plain' and seeds: rows += _compared(job, kind, [(by_seed[s], plain[s]) for s in seeds])
    of = [f.name for f in fields(Run) if f.name!='seed']
    return landed_first('compared', pd.DataFrame(rows), of)

def _compared(job, kind, pairs):
    dls = job.loaders(kind)
    student,plain = ([job.probs(run) for run in runs] for runs in zip(*pairs))
    given = dict(classes=list(dls.classes), groups=dls.test.table.group.to_numpy(), task=dls.task, n_boot=1000)
    targets = targets_of(dls.test)
    closed = gap_closed(student, plain, [job.probs(teacher_of(kind))], targets, metrics=METRICS, **given)
    gain = paired_difference(student, plain, targets, metrics=METRICS, **given)
    harm = harm_check(dict(distilled=student, plain=plain), [('distilled', 'plain')],
                      dict(given, targets=targets, seed=0, level=.95))
    harmed = '|'.join(harm['class'][harm.verdict=='lost'])
    facts = {name: value for name,value in asdict(kind).items() if name!='seed'} | dict(seeds=len(pairs))
    facts['teacher'] = Path(kind.teacher).parent.name
    for metric in METRICS:
        values = closed.loc[metric].rename(dict(low='closed_low', high='closed_high')).to_dict()
        its = gain.loc[metric]
        values |= dict(gain=its.value, gain_low=its.low, gain_high=its.high, p=its.p, harmed=harmed)
        yield facts | dict(metric=metric) | {n: round(v, 4) if isinstance(v, float) else v for n,v in values.items()}

def land(job, run):
    "Keep the test images' probabilities of a finished run among the results"
    file,data = landed_file(run),io.BytesIO()
    np.savez_compressed(data, test=np.load(job.folder(run)/'test.npy').astype(np.float16))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, data.getvalue())

def land_outputs(job, teacher):
    "Keep what a teacher computed for all views of all images, so that students can learn from it without its weights"
    file,landed = job.folder(teacher)/'outputs.npz',landed_outputs(teacher.name)
    if not file.exists() or landed.exists(): return
    outputs,needed = np.load(file),view_digests(job, teacher) # other methods have asked for mixed images, too
    kept = np.isin(outputs['digests'], needed)
    if kept.sum() < len(needed):
        return print(f'{file}: only {kept.sum():,} of {len(needed):,} views, so it does not land')
    landed.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    np.savez_compressed(data, digests=outputs['digests'][kept], logits=outputs['logits'][kept])
    write_atomic(landed, data.getvalue())

class Noting(torch.nn.Module):
    "Notes which images it receives, and returns zeros"
    def __init__(self, n_outputs):
        super().__init__()
        self.n_outputs,self.seen = n_outputs,set()
    def forward(self, images):
        self.seen.update(image_digests(images).tolist())
        return torch.zeros(len(images), self.n_outputs)

def view_digests(job, teacher):
    "Of all views that students of a teacher see, as it receives them"
    dls = job.dls(teacher.data, teacher.size, teacher.sampling, CHOSEN['views'])
    noting = Noting(1 if dls.task=='binary' else len(dls.classes))
    with TemporaryDirectory() as folder:
        TeacherCache(Teacher(noting, dls.classes, teacher.size, STATS), folder).fill(dls, progress=False)
    return np.array(sorted(noting.seen), np.uint64)

def check_teachers(job, within=.001):
    "Stop if a teacher was trained again and is another one: another processor is enough. Its students do not mix"
    landed = {run: row for run,row in landed_rows()}
    for run in (run for run,_ in finished(job) if run.method=='teacher' and run in landed):
        new,old = job.figures(run, 'valid')['macro_auroc'],landed[run]['valid_macro_auroc']
        if abs(new-old) <= within: continue
        raise SystemExit(f'{run.name}: this teacher has {new:.4f} macro AUROC on validation images, that of '
                         f'fits.csv {old:.4f}: another teacher, so nothing was collected. Remove the rows of '
                         'the landed teacher and its students from fits.csv, compared.csv and histories.csv, and '
                         'their predictions, first')

def collect(job):
    "Tables of all finished fits, those that landed before included, and their predictions"
    check_teachers(job)
    RESULTS.mkdir(parents=True, exist_ok=True)
    tables = dict(fits=fits_table(job), compared=comparisons(job), histories=histories(job))
    for run,_ in finished(job): land(job, run)
    for teacher in teacher_runs().values(): land_outputs(job, teacher)
    for name,table in tables.items():
        write_atomic(RESULTS/f'{name}.csv', table.to_csv(index=False))
        print(f'{name}.csv: {len(table)} rows')


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('what', choices=['run', 'list', 'valid', 'collect'])
    args.add_argument('--data', required=True)
    args.add_argument('--work', required=True)
    args.add_argument('--sets', nargs='+', choices=list(SETS), default=list(SETS), help='train on these only')
    methods = sorted({run.method for run in plan()})
    args.add_argument('--methods', nargs='+', choices=methods, help='train these only; default: all')
    args.add_argument('--students', nargs='+', choices=[TINY, SMALL], default=[TINY, SMALL], help='train these only')
    args = args.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    job = Job(args.data, args.work)
    if args.what=='collect': return collect(job)
    factors = {*factor_runs()} - {*core_runs()} # their rows are enough
    def is_asked(run):
        own = run.model in args.students and (not args.methods or run.method in args.methods)
        return run.data in args.sets and (own or run.method=='teacher' and not args.methods)
    for run in filter(is_asked, plan()):
        done = is_finished(job.folder(run)) or is_landed(run) or (run in factors and has_row(run, 'factor_fits'))
        done = done or run.method=='teacher' and landed_outputs(run.name).exists() # trained when a student needs it
        if args.what=='list': print('done' if done else 'open', run.name)
        if args.what=='valid' and is_finished(job.folder(run)):
            print({k: round(v, 3) for k,v in job.figures(run, 'valid').items()}, run.name)
        if args.what!='run' or done: continue
        print(time.strftime('%H:%M:%S'), run.name, flush=True)
        if needs_trained(run) and job.do(teacher_of(run)): print(time.strftime('%H:%M:%S'), 'its teacher is trained')
        if needs_trained(run) and run.method in BY_LOGITS: job.fill(run)
        job.do(run)
        print(time.strftime('%H:%M:%S'), 'done', job.figures(run, 'valid'), flush=True)

if __name__ == '__main__': main()
