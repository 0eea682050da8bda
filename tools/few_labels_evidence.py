"""Train the fits behind `results/few_labels`: HAM10000 with few labeled lesions, by every method for few labels.

    python tools/few_labels_evidence.py run --data FOLDER --work FOLDER     # a background job that resumes when killed
    python tools/few_labels_evidence.py list --data FOLDER --work FOLDER    # which fits there are, which are finished
    python tools/few_labels_evidence.py collect --data FOLDER --work FOLDER # tables of all finished fits

`--shares 0.1 --seeds 0 --methods mixmatch` choose fits. `--data` holds the folder `ham10000` as Kaggle lays it out. A
finished fit lands at once: a row of `fits.csv`, and its test images' probabilities. `collect` makes `curve.csv`, the
table of `label_curve_table`, of all fits that have landed."""
import argparse
import io
import os
import time
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import pandas as pd
import torch
from evidence import SETS, Clock, about

from kdmed.baselines.few_labels import FEW_LABEL_METHODS
from kdmed.core.files import write_atomic
from kdmed.data.loaders import image_dls
from kdmed.evaluate.intervals import evaluate
from kdmed.models.create import create_student
from kdmed.studies.label_curve import fit_on_share, keep_labels, label_curve_table
from kdmed.studies.study import is_finished, run_cell, targets_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'results'/'few_labels' # in `predictions`, test images' probabilities of each finished student
SHARES,SEEDS,METHODS = (.05, .1, .25, 1.),(0, 1, 2),tuple(FEW_LABEL_METHODS)
MODEL,TEACHER = 'test_efficientnet','mobilenetv3_small_100' # .1 and 1.5 million parameters, from scratch
SIZE,EPOCHS,LR,AVERAGE,SAMPLING,VIEWS = 64,8,3e-3,.99,'balanced',None
METRICS = 'balanced_accuracy','macro_auroc'
COLUMNS = 'share','method','seed'

class Job:
    "Where data lies and results are kept"
    def __init__(self, data, work):
        self.work = Path(work)
        read,augment = SETS['ham10000']
        how = dict(augment=augment(0), views=VIEWS, device='cpu', store=self.store)
        self.dls = image_dls(read(Path(data)), SIZE, bs=64, **how)

    @property
    def store(self): return self.work/'stores'
    def folder(self, run): return self.work/'fits'/'{0:g}/{1}-{2}'.format(*run)

    def make(self, name):
        "A model, channels last: half the time on a processor"
        return create_student(name, self.dls.classes, SIZE, self.dls.task).to(memory_format=torch.channels_last)

    def do(self, run):
        "Train one fit; killed, it resumes"
        share,method,seed = run
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        clock = Clock(folder/'seconds.json')
        how = dict(epochs=EPOCHS, lr=LR, average=AVERAGE, sampling=SAMPLING, store=self.store)
        def train(home):
            teacher = partial(self.make, TEACHER)
            return fit_on_share(self.dls, partial(self.make, MODEL), method, share, seed, home, teacher=teacher, **how)
        run_cell(folder, self.dls, train, keep_model=False)
        self.land(run, clock.seconds())

    def land(self, run, seconds):
        "Keep the row of a finished fit, and its test images' probabilities, among the results"
        share,method,seed = run
        dls,few = self.dls,keep_labels(self.dls.table, share, seed)
        labeled = few[(few.split=='train') & few.label.notna()]
        row = dict(share=share, method=method, seed=seed, labeled_lesions=labeled.group.nunique(),
                   labeled_images=len(labeled), model=MODEL, size=SIZE, epochs=EPOCHS)
        if FEW_LABEL_METHODS[method].teacher: row['teacher'] = TEACHER
        for on in ('valid', 'test'):
            probs = np.load(self.folder(run)/f'{on}.npy').astype(np.float16)
            found = evaluate(probs.astype(float), targets_of(getattr(dls, on)), dls.classes, task=dls.task, n_boot=20)
            row |= {f'{on}_{m}': round(float(found.value[m]), 4) for m in METRICS}
        row |= dict(zip(('seconds', 'cpu_seconds'), np.round(seconds))) | about()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, test=probs)
        file = landed_file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, buffer.getvalue())
        before = landed_rows()
        others = before[(before[list(COLUMNS)].astype(str) != pd.Series(row)[list(COLUMNS)].astype(str)).any(axis=1)]
        table = pd.concat([others, pd.DataFrame([row])], ignore_index=True).sort_values(list(COLUMNS))
        write_atomic(RESULTS/'fits.csv', table.to_csv(index=False))

    def collect(self):
        "The label curve of all fits that have landed: of each share, the seeds that supervised training has, too"
        rows,found = landed_rows(),{}
        for (share,method),own in rows.groupby(['share', 'method']):
            plain = rows[(rows.share==share) & (rows.method=='supervised')]
            seeds = sorted(set(own.seed) & set(plain.seed))
            runs = [(share, method, seed) for seed in seeds if landed_file((share, method, seed)).exists()]
            if runs and len(seeds)==len(plain): found[method, share] = [landed_probs(run) for run in runs]
        if not found: return print('no fit of supervised training has landed yet')
        table = label_curve_table(found, self.dls, 'balanced_accuracy').round(4)
        write_atomic(RESULTS/'curve.csv', table.to_csv(index=False))
        print(table.to_string())

def landed_file(run): return RESULTS/'predictions'/'{0:g}-{1}-{2}.npz'.format(*run)
def landed_probs(run): return np.load(landed_file(run))['test'].astype(float)
def landed_rows():
    file = RESULTS/'fits.csv'
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=[*COLUMNS])

def is_landed(run):
    known = set(landed_rows()[list(COLUMNS)].astype(str).agg('|'.join, axis=1)) if len(landed_rows()) else set()
    return '|'.join(map(str, run)) in known and landed_file(run).exists()

def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('what', choices=['run', 'list', 'collect'])
    args.add_argument('--data', required=True)
    args.add_argument('--work', required=True)
    args.add_argument('--shares', type=float, nargs='+', default=SHARES)
    args.add_argument('--seeds', type=int, nargs='+', default=SEEDS)
    args.add_argument('--methods', nargs='+', default=METHODS, choices=METHODS)
    args = args.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    job = Job(args.data, args.work)
    if args.what=='collect': return job.collect()
    for run in [(share, method, seed) for seed in args.seeds for share in args.shares for method in args.methods]:
        done = is_landed(run)
        if args.what=='list': print('done' if done else 'open', *run)
        if args.what!='run' or done: continue
        print(time.strftime('%H:%M:%S'), *run, flush=True)
        if is_finished(job.folder(run)): job.land(run, Clock(job.folder(run)/'seconds.json').seconds())
        else: job.do(run)
        print(time.strftime('%H:%M:%S'), 'done', landed_rows().tail(1).to_dict('records'), flush=True)

if __name__ == '__main__': main()
