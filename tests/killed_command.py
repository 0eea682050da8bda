"""`kdmed distill` killed at random moments by `kill -9` until it ends, interrupted, started twice, and on a small disk; a helper of test_real_kills.py

    killed_command.py FOLDER SEED KILLS

One process imports everything once, and each run is a fork of it, so that what is killed is a run and not an import.
Prints one JSON line with what was found.
"""
import contextlib, json, os, random, signal, subprocess, sys, time, warnings
from pathlib import Path

warnings.filterwarnings('ignore')

from PIL import Image

from kdmed.cli import app as cli, commands # noqa: F401
from kdmed.data.images import synthetic_table

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

def kills(folder, seed, wanted):
    "Runs that are killed at random moments, against one that is not"
    rng,argv,began = random.Random(seed),arguments(folder/'images', folder/'whole')[:-1],time.monotonic()
    if wait(start([*argv, folder/'whole'], folder/'log')): raise RuntimeError((folder/'log').read_text()[-2000:])
    longest,whole,done,runs,differing = time.monotonic()-began,result(folder/'whole'),0,0,[]
    while done < wanted:
        out = folder/f'killed-{runs}'
        done += run_killed(argv, out, rng, .5*longest, wanted-done, folder/'log')
        found = result(out)
        differing += [f'{out.name}: {k}' for k in whole if found[k]!=whole[k]] + [f'{out.name}: {f.name} left over' for f in out.rglob('*') if f.name=='fit' or f.name.endswith('.part')]
        runs += 1
    return dict(kills=done, runs=runs, differing=differing)

def long_run(folder, out):
    "A command that takes a while"
    argv = [str(a) for a in arguments(folder/'images', out)]
    argv[argv.index('--epochs')+1] = '40'
    return argv

def signals(folder):
    "A run that is interrupted, and one that is terminated, while a student trains"
    found = {}
    for name,signum in dict(int=signal.SIGINT, term=signal.SIGTERM).items():
        log,out = folder/f'{name}.log',folder/f'stopped-{name}'
        pid = start(long_run(folder, out), log)
        while not list(out.glob('cells/plain-0/fit/*.pt')):
            if (status := ended(pid)) is not None: return dict(error=f'ended with {status}: {log.read_text()[-2000:]}')
            time.sleep(.05)
        os.kill(pid, signum)
        began = time.monotonic()
        found[name] = dict(status=wait(pid), seconds=time.monotonic()-began, said=log.read_text())
    return found

def two_at_once(folder):
    "A second process with the folder of the first"
    first = start(long_run(folder, folder/'shared'), folder/'first.log')
    while not (folder/'shared'/'study.json').exists():
        if (status := ended(first)) is not None: return dict(error=f'ended with {status}: {(folder/"first.log").read_text()[-2000:]}')
        time.sleep(.05)
    second = wait(start(long_run(folder, folder/'shared'), folder/'second.log'))
    os.kill(first, signal.SIGKILL)
    wait(first)
    return dict(first=first, second=second, said=(folder/'second.log').read_text())

def small_disk(folder):
    "A run on a disk of 2 MB"
    disk = folder/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(disk)], capture_output=True).returncode: return dict(skipped='mounting a small disk needs root')
    try: status = wait(start(arguments(folder/'images', disk/'run'), folder/'disk.log'))
    finally:
        left = [f.name for f in disk.rglob('*')]
        subprocess.run(['umount', '-l', str(disk)])
    return dict(status=status, left=left, said=(folder/'disk.log').read_text())

if __name__=='__main__':
    folder = Path(sys.argv[1])
    write_images(folder/'images')
    reports = dict(disk=small_disk(folder), twice=two_at_once(folder), signals=signals(folder), kills=kills(folder, int(sys.argv[2]), int(sys.argv[3])))
    print(json.dumps(reports))
