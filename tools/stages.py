"""All checks, one after the other, with the time each took.

    stages.py test   what a change must pass; within 8 minutes on two cores, installation not counted
    stages.py all    everything: all pages, slow tests, planted bugs, the wheel; an hour or so
    stages.py ci     `test`, and of the rest what is done within 20 minutes of $KDMED_STARTED (seconds since 1970)

A check that fails does not keep the others from running. When `test` took longer than it may, that is a warning and no
failure: machines differ.
"""
import argparse, os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAY_TAKE = {'test': 8*60, 'ci': 20*60} # seconds
RESERVE = 60 # seconds before the end when `ci` starts nothing more: what runs then must end, too
KILLS = '20' # random moments at which a run is killed, in `all`; otherwise 3

def tool(name, *args): return [sys.executable, str(ROOT/'tools'/name), *args]
def pytest(workers, *args):
    shown = ['--durations', '15', '--durations-min', '3']
    shared = ['-n', workers, '--dist', 'loadfile'] # tests/conftest.py orders the files
    return [sys.executable, '-m', 'pytest', *shared, *shown, *args]

def quick(workers, lessons=()):
    "(what is checked, command) of the checks that `test` and `all` begin with"
    yield 'Modules are what the notebooks export; notebooks are clean', tool('check.py', 'sources')
    yield 'The house keeps its limits', tool('house.py')
    yield 'Every name is defined, and every import is used', tool('check.py', 'lint')
    yield 'README.md is what nbs/index.ipynb says', tool('readme.py', '--check')
    yield 'Lessons hold', tool('check.py', 'lessons', '--workers', workers, *lessons)
    yield 'Pages can be made', tool('check.py', 'site', '--workers', workers)

def stages(what, workers, end=None):
    "(what is checked, command)"
    mutation = [sys.executable, str(ROOT/'tests'/'mutation.py'), 'all', '--workers', workers]
    if what=='all':
        yield from quick(workers, ['--all'])
        yield 'Tests', pytest(workers)
        yield 'Lessons see planted bugs', mutation
        yield 'The wheel works alone', tool('try_wheel.py', '--versions', 'newest')
        return
    yield from quick(workers)
    yield 'Tests', pytest(workers, '-m', 'not slow')
    if what=='ci':
        others = tool('check.py', 'lessons', '--left-out', '--until', end, '--workers', workers)
        yield 'Slow tests, as far as the time goes', pytest(workers, '-m', 'slow', '--until', end)
        yield 'Lessons of the other pages, as far as the time goes', others
        yield 'Lessons see planted bugs, as far as the time goes', [*mutation, '--until', end]

def clock(seconds): return f'{int(seconds)//60}:{int(seconds)%60:02d}'

def run(what, workers):
    "Run the stages; the names of those that failed"
    started = time.time()
    began = float(os.environ.get('KDMED_STARTED') or started) if what=='ci' else started
    end = began + MAY_TAKE['ci'] - RESERVE
    env = dict(os.environ, **({'KDMED_KILLS': os.environ.get('KDMED_KILLS', KILLS)} if what=='all' else {}))
    took,failed,left = [],[],[]
    def note(name, seconds): took.append((name, seconds))
    of_test = len(list(stages('test', workers)))
    for k,(name,command) in enumerate(stages(what, workers, str(end))):
        if what=='ci' and k >= of_test and time.time() > end:
            left.append(name)
            continue
        print(f'== {name}', flush=True)
        at = time.time()
        if subprocess.run(command, cwd=ROOT, env=env).returncode: failed.append(name)
        note(name, time.time()-at)
    print('== Time used')
    if began < started: print(f'{clock(started-began):>6}  Installation, and what came before')
    for name,seconds in took: print(f"{clock(seconds):>6}  {name}{' (FAILED)' if name in failed else ''}")
    print(f'{clock(time.time()-began):>6}  all together')
    for name in left: print(f'Not run, for want of time: {name}')
    of_those = sum(seconds for _,seconds in took[:of_test])
    if what!='all' and of_those > MAY_TAKE['test']:
        print(f"warning: what `make test` runs took {clock(of_those)}, more than {clock(MAY_TAKE['test'])}. "
              'If this machine did nothing else, mark the slowest tests `slow`, or make them smaller')
    if what=='test':
        print('Left to `make test-all`: slow tests, pages named above, planted bugs but for a sample, the wheel')
    return failed

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['test', 'all', 'ci'])
    parser.add_argument('--workers', default='2', help='processes at once (default: 2)')
    args = parser.parse_args()
    failed = run(args.what, args.workers)
    if failed: sys.exit(f"{len(failed)} of the checks failed: {'; '.join(failed)}")

if __name__=='__main__': main()
