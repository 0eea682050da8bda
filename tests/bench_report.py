"What a report costs at the size of ChestX-ray14's official test images, of a demo, and with 200 classes: seconds, memory, bytes of the page"
import json, os, re, resource, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

from bench_metrics import chest_films

MODELS = {'teacher': 1.6, 'plain': 1.2, 'distilled': 1.3} # how far their logits tell the classes apart

def findings(n=25_596, seeds=3):
    "Predictions of three models, each trained on some seeds, the truth `[n, 14]`, and patients"
    _,truth,patient = chest_films(n)
    def probs(skill, seed):
        rng = np.random.default_rng(seed)
        logits = skill*truth - 2 + .7*rng.normal(size=(patient.max()+1, 1))[patient] + rng.normal(size=truth.shape)
        return (1/(1+np.exp(-logits))).round(6)
    models = {name: [probs(skill, 10*i+k) for k in range(seeds)] for i,(name,skill) in enumerate(MODELS.items())}
    return models,truth,[f'finding {i}' for i in range(truth.shape[1])],patient,'multilabel'

def classes(n, n_classes, seeds, models=MODELS):
    "The same for one of many classes"
    rng = np.random.default_rng(0)
    truth,groups = rng.permutation(np.resize(np.arange(n_classes), n)),np.arange(n)//2
    def probs(skill):
        z = np.exp(2*skill*np.eye(n_classes)[truth] + rng.normal(size=(n, n_classes)))
        return z/z.sum(1, keepdims=True)
    made = {name: [probs(skill) for _ in range(seeds)] for name,skill in models.items()}
    return made,truth,[f'class {i}' for i in range(n_classes)],groups,'multiclass'

SIZES = dict(chest=findings, demo=lambda: classes(960, 4, 1, MODELS | {'other': 1.}), many=lambda: classes(5000, 200, 3))

def peak_mb():
    "Most memory that this process had; the `ru_maxrss` of a child begins with what its parent had"
    status = Path('/proc/self/status')
    if status.exists(): return int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1])/1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def one(size):
    "Compare and save; figures as a dict"
    from kdmed.evaluate.comparison import compare_predictions
    models,truth,names,groups,task = SIZES[size]()
    wall,cpu = time.perf_counter(),time.process_time()
    comparison = compare_predictions(models, truth, names, groups, task)
    compared = time.perf_counter()-wall,time.process_time()-cpu
    with tempfile.TemporaryDirectory() as folder:
        comparison.save(folder)
        sizes = {f.name: f.stat().st_size for f in Path(folder).iterdir() if f.is_file()}
    return dict(wall=time.perf_counter()-wall, cpu=time.process_time()-cpu, compare_wall=compared[0], compare_cpu=compared[1],
                peak_mb=peak_mb(), html_mb=sizes['report.html']/1e6, missing=comparison.about.get('missing', []))

LIMITS = dict(chest=(60, 1000, 2), demo=(60, 1100, 1), many=(300, None, None)) # seconds, MB of memory, MB of the page
WHAT = dict(chest='25,596 x 14, 3 models x 3 seeds', demo='960 x 4, 4 models', many='5,000 x 200 classes, 3 models x 3 seeds')

def report_cost(sizes=tuple(SIZES)):
    "Rows for `bench.json`; each size in a process of its own, whose memory is its own"
    rows = []
    for size in sizes:
        done = subprocess.run([sys.executable, '-W', 'ignore', __file__, size], capture_output=True, text=True, check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        f = json.loads(done.stdout.splitlines()[-1])
        print(f"report, {WHAT[size]}: compared and saved in {f['wall']:.1f} s ({f['cpu']:.1f} s of the processor; {f['compare_cpu']:.1f} s to compare), "
              f"{f['peak_mb']:.0f} MB at most, report.html {f['html_mb']:.2f} MB")
        seconds,memory,page = LIMITS[size]
        rows += [dict(name=f'report, {WHAT[size]}: seconds', value=round(f['wall'], 1), unit='s', limit=seconds),
                 dict(name=f'report, {WHAT[size]}: processor seconds', value=round(f['cpu'], 1), unit='s', limit=None),
                 dict(name=f'report, {WHAT[size]}: peak memory', value=round(f['peak_mb']), unit='MB', limit=memory),
                 dict(name=f'report, {WHAT[size]}: report.html', value=round(f['html_mb'], 2), unit='MB', limit=page)]
    return rows

if __name__ == '__main__': print(json.dumps(one(sys.argv[1])))
