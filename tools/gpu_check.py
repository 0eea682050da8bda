"""Everything that waits for a GPU, in ten minutes, with a report; without one, what it would run.

    gpu_check.py                    run it all, write gpu_report.md; exit status 1 if something failed
    gpu_check.py --list             say what would run, and what it lacks here
    gpu_check.py --only amp rates   some of it
    gpu_check.py --part amp --device cpu   one part of this script by itself, to try it where there is no GPU

Only torch is needed to start; a job whose packages are missing is named as not run.
"""
import argparse, importlib.util, json, os, platform, re, subprocess, sys, tempfile, time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 600 # seconds, all jobs together
REPORT = 'gpu_report.md'
LEARNING = 'fastai', 'timm', 'sklearn', 'pandas' # what a fit with kdmed imports

Job = namedtuple('Job', 'name about command needs gpus seconds', defaults=((), 1, 60))
Result = namedtuple('Result', 'job state seconds output') # state: passed, failed, or why it did not run

def tool(*args): return [sys.executable, *map(str, args)]
def part(name): return tool(__file__, '--part', name)

def cuda_pages():
    "Notebooks with cells marked `#| cuda`, and how many each has"
    found = {}
    for path in sorted((ROOT/'nbs').rglob('[!_.]*.ipynb')):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        n = sum(bool(re.search(r'^#\| *cuda\b', ''.join(c['source']), re.M)) for c in cells if c['cell_type']=='code')
        if n: found[path.relative_to(ROOT).as_posix()] = n
    return found

def bench_names():
    "Benchmarks that are quick on a GPU and say something about it"
    return 'distillation_step', 'input_small', 'input_augmented'

def jobs():
    "All that waits for a GPU, what tells most first"
    yield Job('amp', 'distillation in float16 and bfloat16 follows that in float32', part('amp'), LEARNING, 1, 60)
    told = 'images a second of teachers and students: float32, bfloat16, compiled'
    yield Job('rates', told, part('rates'), ('timm',), 1, 60)
    for page,n in cuda_pages().items():
        call = 'from nbdev.test import nbdev_test; nbdev_test()'
        command = tool('-c', call, page, '--flags', 'cuda', '--n-workers', '0')
        yield Job('lessons', f'{n} lessons marked `#| cuda` on {page}', command, ('nbdev', *LEARNING), 1, 60)
    asked = ROOT/'tests'/'test_engine.py','-k','mixed_precision_on_a_gpu'
    tests = tool('-m', 'pytest', '-q', '-p', 'no:cacheprovider', *asked)
    yield Job('tests', 'tests that skip without a GPU', tests, ('pytest', *LEARNING), 1, 60)
    told = 'a compiled student is distilled, and has the logits of the plain one'
    yield Job('compile', told, part('compile'), LEARNING, 1, 90)
    yield Job('two_gpus', '`kdmed distill` as two processes on two GPUs', part('two_gpus'), LEARNING, 2, 90)
    for name in bench_names():
        command = tool(ROOT/'tests'/'bench.py', '--only', name, '--out', os.devnull)
        yield Job('bench', f'benchmark {name}', command, LEARNING, 1, 60)

# -- running

def gpus():
    "Number of GPUs, and what the first is called; (0, reason) without torch or without one"
    try: import torch
    except ImportError: return 0,'torch is not installed'
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return n,torch.cuda.get_device_name(0) if n else 'torch sees no GPU'

def lacks(job, n):
    "Why a job cannot run here, or None"
    missing = [p for p in job.needs if importlib.util.find_spec(p) is None]
    if missing: return f"needs {', '.join(missing)}"
    if n < job.gpus: return f'needs {job.gpus} GPU{"s"[:job.gpus>1]}, there {"is" if n==1 else "are"} {n}'

def run(job, limit):
    "Run a job, at most `limit` seconds long"
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT/'tools'), os.environ.get('PYTHONPATH')]))
    env,start = os.environ | {'PYTHONPATH': path},time.time()
    process = subprocess.Popen(job.command, cwd=ROOT, env=env, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output,_ = process.communicate(timeout=limit)
        state = 'failed' if process.returncode else 'passed'
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9) # the processes it started, too
        output,state = process.communicate()[0],f'failed: not done after {limit:.0f} s'
    return Result(job, state, time.time()-start, output.strip())

def run_all(chosen, n, budget=BUDGET, tell=print):
    "A result for each job; one that would not be done in time does not begin"
    end,found = time.time()+budget,[]
    for job in chosen:
        left,why = end-time.time(),lacks(job, n)
        if why is None and left < job.seconds/2: why = f'not run: {left:.0f} s were left'
        result = Result(job, why, 0., '') if why else run(job, min(left, 3*job.seconds))
        found.append(result)
        tell(f'{result.state:30} {result.seconds:5.0f} s  {job.name}: {job.about}')
    return found

def machine():
    "Versions and hardware, one line each"
    n,name = gpus()
    lines = [f'- {n} × {name}' if n else f'- no GPU: {name}',
             f'- Python {platform.python_version()}, {platform.platform()}']
    for package in ('torch', 'timm', 'fastai'):
        if importlib.util.find_spec(package):
            lines.append(f'- {package} {importlib.import_module(package).__version__}')
    return lines

def report(results, lines):
    "The results as Markdown"
    rows = [f'| {r.job.name} | {r.job.about} | {r.state} | {r.seconds:.0f} |' for r in results]
    counts = {s: sum(r.state.startswith(s) for r in results) for s in ('passed', 'failed')}
    others = len(results)-sum(counts.values())
    text = ['# What was run on a GPU', '', *lines, '',
            f"{counts['passed']} passed, {counts['failed']} failed, {others} not run.", '',
            '| job | what | result | s |', '|---|---|---|---|', *rows]
    for r in results:
        if r.output: text += ['', f'## {r.job.name}: {r.job.about}', '', '~~~', r.output[-4000:], '~~~']
    return '\n'.join(text) + '\n'

# -- parts

def some_images(device, n=600):
    "Loaders of synthetic tissue"
    from kdmed.data.images import synthetic_table
    from kdmed.data.loaders import image_dls
    from kdmed.data.splits import split_groups
    return image_dls(split_groups(synthetic_table(n=n, classes=3, size=32)), size=32, bs=64, device=device)

def a_fit(dls, teacher, *cbs, student=None, epochs=3):
    "A student after a short distillation: (its last validation loss, its logits on validation images)"
    from kdmed.core.basics import seed_everything
    from kdmed.distill.callbacks import LogitKD
    from fastai.learner import Learner
    from kdmed.models.create import create_student
    seed_everything(0)
    if student is None: student = create_student('test_resnet', 3, 32)
    learn = Learner(dls, student, loss_func=dls.loss_func, cbs=[LogitKD(teacher), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    with learn.no_bar(): return float(learn.validate()[0]),learn.get_preds()[0].float()

def amp(device):
    "float16 and bfloat16 against float32; on a CPU bfloat16 alone"
    import torch
    from fastai.callback.fp16 import MixedPrecision
    from kdmed.distill.methods import fit_classifier
    dls = some_images(device)
    teacher = fit_classifier(dls, 'test_resnet', epochs=3, progress=False).model
    exact,preds = a_fit(dls, teacher)
    print(f'float32: validation loss {exact:.4f}')
    if device=='cpu': return print('mixed precision of fastai needs a GPU')
    for mode in ('fp16', 'bf16'):
        loss,half = a_fit(dls, teacher, MixedPrecision(mode))
        same = (half.argmax(1)==preds.argmax(1)).float().mean().item()
        print(f'{mode}: validation loss {loss:.4f}, same class for {100*same:.1f} % of the validation images')
        assert torch.isfinite(half).all() and abs(loss-exact) < .25*abs(exact), f'{mode} does not follow float32'

def compiled(device):
    "A compiled student"
    import torch
    from kdmed.distill.methods import fit_classifier
    from kdmed.models.create import create_student
    dls = some_images(device, 300)
    teacher = fit_classifier(dls, 'test_resnet', epochs=1, progress=False).model
    x = dls.valid.one_batch()[0].as_subclass(torch.Tensor) # torch.compile knows no tensors of fastai
    student = create_student('test_resnet', 3, 32).to(device).eval()
    with torch.no_grad(): difference = (torch.compile(student)(x)-student(x)).abs().max().item()
    print(f'largest difference of logits, compiled and not: {difference:.1e}')
    assert difference < 1e-3
    loss,preds = a_fit(dls, teacher, student=torch.compile(create_student('test_resnet', 3, 32).to(device)), epochs=1)
    print(f'distilled while compiled: validation loss {loss:.4f}')
    assert torch.isfinite(preds).all()

def two_gpus(device):
    "`kdmed distill` under torchrun with two processes"
    with tempfile.TemporaryDirectory() as folder:
        from PIL import Image
        from kdmed.data.images import synthetic_table
        table = synthetic_table(n=240, classes=2, size=32)
        for i,row in enumerate(table.itertuples()):
            path = Path(folder)/'images'/str(row.label)/f'{row.group}_{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row.image).save(path)
        options = ['--data', f'{folder}/images', '--group-pattern', r'(.+)_\d+', '--size', '32',
                   '--teacher', 'test_resnet', '--student', 'test_efficientnet', '--teacher-epochs', '1',
                   '--epochs', '1', '--repeats', '1', '--out', f'{folder}/run']
        launcher = '-m','torch.distributed.run','--standalone','--nproc-per-node','2'
        command = tool(*launcher, '-m', 'kdmed.cli', 'distill')
        subprocess.run([*command, *options], check=True)
        used = json.loads((Path(folder)/'run'/'settings.json').read_text(encoding='utf-8'))['environment']
        print(f"processes: {used['processes']}")
        assert used['processes']==2

def rates(device):
    "Images a second of the forward pass; needs torch and timm alone"
    import timm, torch
    on_gpu,size = device!='cpu',224 if device!='cpu' else 64
    x = torch.rand(256 if on_gpu else 4, 3, size, size, device=device)
    def rate(model, dtype):
        def once():
            with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype!=torch.float32): model(x)
            if on_gpu: torch.cuda.synchronize()
        for _ in range(3): once()
        start,rounds = time.perf_counter(),10 if on_gpu else 1
        for _ in range(rounds): once()
        return rounds*len(x)/(time.perf_counter()-start)
    names = ('resnet50', 'vit_small_patch16_224', 'resnet18', 'mobilenetv3_small_100') if on_gpu else ('test_resnet',)
    print(f'images a second, {size} px, batches of {len(x)}: float32, bfloat16, bfloat16 compiled')
    for name in names:
        model = timm.create_model(name, pretrained=False, num_classes=7).to(device).eval()
        numbers = [rate(model, torch.float32), rate(model, torch.bfloat16)]
        if on_gpu: numbers.append(rate(torch.compile(model), torch.bfloat16))
        print(f'{name:25}' + ''.join(f'{n:12,.0f}' for n in numbers))

PARTS = dict(amp=amp, compile=compiled, two_gpus=two_gpus, rates=rates)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--list', action='store_true', help='say what would run')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='some jobs, by name')
    parser.add_argument('--budget', type=float, default=BUDGET, help='seconds (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=ROOT/REPORT, help=f'the report (default: {REPORT})')
    parser.add_argument('--part', choices=PARTS, help='one part of this script, in this process')
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'], help='of --part (default: cuda)')
    args = parser.parse_args()
    if args.part: return PARTS[args.part](args.device)
    chosen = [j for j in jobs() if not args.only or j.name in args.only]
    if not chosen: sys.exit(f'--only must name some of {sorted({j.name for j in jobs()})}, got {args.only}')
    n,name = gpus()
    if args.list or not n:
        print(f'{n} × {name}. Within {args.budget/60:.0f} minutes it would run:' if n else
              f'{name}: nothing is run. Where there is a GPU, within {args.budget/60:.0f} minutes:')
        for job in chosen:
            why = lacks(job, n)
            print(f'  {job.name:10} some {job.seconds} s: {job.about}' + (f' ({why})' if why else ''))
        return
    results = run_all(chosen, n, args.budget)
    args.out.write_text(report(results, machine()), encoding='utf-8')
    print(f'report: {args.out}')
    if any(r.state.startswith('failed') for r in results): sys.exit(1)

if __name__=='__main__': main()
