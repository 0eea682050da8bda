"""`kdmed distill` killed at random moments by `kill -9` until it ends; a helper of test_real_kills.py

    killed_command.py FOLDER SEED KILLS

One process imports everything once, and each run is a fork of it, so that what is killed is a run and not an import.
Prints one JSON line: kills, runs, and what differs from a run that was never killed.
"""
import contextlib, json, os, random, signal, sys, time, warnings
from pathlib import Path

warnings.filterwarnings('ignore')

from PIL import Image

from kdmed import cli, commands # noqa: F401
from kdmed.data import synthetic_table

def write_images(folder, n=120):
    "Class folders as a user has them"
    for i,row in synthetic_table(n=n, classes=3, size=32).iterrows():
        (folder/row.label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(folder/row.label/f'{row.group.split()[1]}_{i}.png')

def arguments(images, out):
    return ['distill', '--data', images, '--group-pattern', r'(\d+)_', '--teacher', 'test_resnet', '--student', 'test_efficientnet', '--size', 32, '--epochs', 2, '--teacher-epochs', 3,
            '--bs', 16, '--repeats', 1, '--no-copies', '--quiet', '--out', out]

def start(argv, log):
    "A run in a process of its own"
    pid = os.fork()
    if pid: return pid
    out = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    status = 3
    with contextlib.suppress(BaseException): status = cli.main(argv)
    sys.stdout.flush()
    os._exit(status)

def ended(pid):
    "Exit status of a process, None while it runs"
    done,status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None

def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def result(out):
    "What must be the same: metrics without costs and dates, log, weights"
    metrics = json.loads((out/'metrics.json').read_text())
    numbers = {name: {m: v for m,v in metrics[name].items() if isinstance(v, dict)} for name in ('teacher', 'plain', 'distilled')}
    cells = {f.relative_to(out).as_posix(): f.read_bytes() for f in sorted(out.glob('cells/*/*.safetensors'))}
    return dict(metrics=numbers, differences=metrics['differences'], history=(out/'history.csv').read_text(), student=(out/'student.safetensors').read_bytes(), cells=cells)

def run_killed(argv, out, rng, longest, most, log):
    "Start again after each kill until it ends; how often it was killed"
    kills = 0
    while True:
        pid,until = start([*argv, out], log),time.monotonic() + (rng.uniform(.05, longest) if kills < most else 1e6)
        while (status := ended(pid)) is None and time.monotonic() < until: time.sleep(.01)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            kills += 1
        elif status==0: return kills
        else: raise RuntimeError(f'ended with {status}: {Path(log).read_text()[-2000:]}')

if __name__=='__main__':
    folder,rng,wanted = Path(sys.argv[1]),random.Random(int(sys.argv[2])),int(sys.argv[3])
    write_images(folder/'images')
    argv,began = arguments(folder/'images', folder/'whole')[:-1],time.monotonic()
    if wait(start([*argv, folder/'whole'], folder/'log')): raise RuntimeError((folder/'log').read_text()[-2000:])
    longest,whole,kills,runs,differing = time.monotonic()-began,result(folder/'whole'),0,0,[]
    while kills < wanted:
        out = folder/f'killed-{runs}'
        kills += run_killed(argv, out, rng, .5*longest, wanted-kills, folder/'log')
        found = result(out)
        differing += [f'{out.name}: {k}' for k in whole if found[k]!=whole[k]] + [f'{out.name}: {f.name} left over' for f in out.rglob('*') if f.name=='fit' or f.name.endswith('.part')]
        runs += 1
    print(json.dumps(dict(kills=kills, runs=runs, differing=differing)))
