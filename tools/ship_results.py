"""Measure students of `evidence.py` as files, into `results/ship`: teacher and student in PyTorch, and every file.

    python tools/ship_results.py --data FOLDER --work FOLDER # the folders of `evidence.py`; on a machine that does nothing else

Of each data set and student architecture, the distilled student with the best balanced accuracy on validation images is
exported; int8 is calibrated on training, chosen on validation and measured on test images by `quantize_student`."""
import argparse
import json
import platform
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch
from evidence import METRICS, ROOT, Job, about, finished

from kdmed.core.files import write_atomic
from kdmed.ship import quantize_student, save_bundle

COLUMNS = ['data', 'student', 'method', 'seed', 'file', 'recommended', 'size_mb', 'latency_ms', 'times_faster', 'fall',
           'float_layers']

def chosen(job):
    "The distilled student with the best validation figure, for each data set and architecture"
    best = {}
    for run,_ in finished(job):
        if run.method in ('teacher', 'plain') or run.sampling!='balanced' or run.views!=run.epochs: continue
        value = job.figures(run, 'valid')['balanced_accuracy']
        key = run.data,run.model
        if key not in best or value > best[key][0]: best[key] = value,run
    return [run for _,run in best.values()]

def measured(job, run, folder):
    "A row for each file, and for teacher and student in PyTorch"
    dls = job.loaders(run)
    bundle = save_bundle(job.folder(run), folder/'bundle', dls.valid, force=True)
    beside = {'teacher in PyTorch': job.work/run.teacher, 'student in PyTorch': bundle}
    made = quantize_student(bundle, dls, folder/'files', beside=beside, runs=100)
    rows = []
    for name,row in made.rows.iterrows():
        found = dict(data=run.data, student=run.model, method=run.method, seed=run.seed, file=name,
                     recommended=name==made.recommended, size_mb=round(row.size_mb, 3), fall=round(row.fall, 4),
                     latency_ms=round(row.latency_ms, 3), float_layers=row.float_layers.replace(', ', '|'))
        found['times_faster'] = round(made.rows.latency_ms['teacher in PyTorch']/row.latency_ms, 1)
        for metric in METRICS:
            its = made.comparison.scores[name].loc[metric]
            found |= {f'{metric}{end}': round(its[part], 4) for end,part in
                      (('', 'value'), ('_low', 'low'), ('_high', 'high'))}
            if (pair := made.comparison.differences.get(f'{name} − float32')) is not None:
                it = pair.loc[metric]
                found |= {f'{metric}_change{end}': round(it[part], 4) for end,part in
                          (('', 'value'), ('_low', 'low'), ('_high', 'high'))}
        rows.append(found)
    return rows

def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--data', required=True)
    args.add_argument('--work', required=True)
    args = args.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    job,rows = Job(args.data, args.work),[]
    for run in chosen(job):
        with tempfile.TemporaryDirectory() as folder: rows += measured(job, run, Path(folder))
        print(run.name, flush=True)
    out = ROOT/'results'/'ship'
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    write_atomic(out/'files.csv', table[[*COLUMNS, *[c for c in table if c not in COLUMNS]]].to_csv(index=False))
    write_atomic(out/'about.json', json.dumps(about() | dict(processor=processor(), threads=1), indent=1))

def processor():
    "The name of the processor"
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return (names or [platform.processor() or platform.machine()])[0]

if __name__ == '__main__': main()
