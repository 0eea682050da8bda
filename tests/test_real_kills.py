"Runs that are killed, interrupted, started twice, or out of disk lose nothing and say what is kept"
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

from conftest import ROOT

BIN = Path(sys.executable).parent
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore')
forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')


@forks
def test_killed_at_random_moments_a_run_ends_in_the_same_metrics(tmp_path):
    "20 kills with KDMED_KILLS=20; a few each time the tests run, at other moments each time"
    kills,seed = int(os.environ.get('KDMED_KILLS') or 4),os.environ.get('KDMED_KILL_SEED') or str(random.randrange(10**6))
    done = subprocess.run([sys.executable, str(ROOT/'tests'/'killed_command.py'), str(tmp_path), seed, str(kills)], capture_output=True, text=True, env=ENV, timeout=240 + 60*kills)
    assert done.returncode==0, f'KDMED_KILL_SEED={seed}\n{done.stdout}\n{done.stderr[-3000:]}'
    report = json.loads(done.stdout.splitlines()[-1])
    assert report['kills'] >= kills and not report['differing'], f'again with KDMED_KILL_SEED={seed}: {report}'


SIGNALS = '''
import os, sys, time, json, signal
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import killed_command as k
folder = Path(sys.argv[2])
k.write_images(folder/'images')
argv = [str(a) for a in k.arguments(folder/'images', folder/'run')]
argv[argv.index('--epochs')+1] = '40'
results = {}
for name,signum in dict(int=signal.SIGINT, term=signal.SIGTERM).items():
    log = folder/f'{name}.log'
    pid = k.start(argv, log)
    while k.ended(pid) is None and not list((folder/'run').glob('cells/plain-0/fit/*')): time.sleep(.05)
    time.sleep(.3)
    os.kill(pid, signum)
    began = time.monotonic()
    results[name] = dict(status=k.wait(pid), seconds=time.monotonic()-began, said=log.read_text())
print(json.dumps(results))
'''


@forks
def test_a_signal_ends_a_run_in_one_line_that_says_what_is_kept(tmp_path):
    done = subprocess.run([sys.executable, '-c', SIGNALS, str(ROOT/'tests'), str(tmp_path)], capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode==0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for name,status in dict(int=130, term=143).items():
        lines = [line for line in results[name]['said'].splitlines() if line.strip() and 'warning' not in line]
        assert results[name]['status']==status and results[name]['seconds'] < 10, results[name]
        assert len(lines)==1 and '1 of 3 models are kept in' in lines[0] and lines[0].endswith('the same command resumes'), lines


TWICE = '''
import os, sys, time, json
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import killed_command as k
folder = Path(sys.argv[2])
k.write_images(folder/'images')
argv = [str(a) for a in k.arguments(folder/'images', folder/'run')]
argv[argv.index('--epochs')+1] = '40'
first = k.start(argv, folder/'first.log')
while k.ended(first) is None and not (folder/'run'/'study.json').exists(): time.sleep(.05)
began = time.monotonic()
second = k.wait(k.start(argv, folder/'second.log'))
seconds = time.monotonic()-began
os.kill(first, 9)
k.wait(first)
print(json.dumps(dict(first=first, second=second, seconds=seconds, said=(folder/'second.log').read_text())))
'''


@forks
def test_the_second_of_two_processes_is_told_at_once(tmp_path):
    done = subprocess.run([sys.executable, '-c', TWICE, str(ROOT/'tests'), str(tmp_path)], capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode==0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['second']==2 and f"is in use: process {result['first']}" in result['said'], result


FULL = '''
import sys, json, subprocess
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import killed_command as k
from kdmed import cli
folder,disk = Path(sys.argv[2]),Path(sys.argv[3])
k.write_images(folder/'images')
argv = [str(a) for a in k.arguments(folder/'images', disk/'run')]
status = cli.main(argv)
print(json.dumps(dict(status=status, left=[f.name for f in disk.rglob('*')])))
'''


def test_a_disk_that_is_too_small_is_found_before_training(tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(disk)], capture_output=True)
    if made.returncode: pytest.skip('mounting a small disk needs root')
    try: done = subprocess.run([sys.executable, '-c', FULL, str(ROOT/'tests'), str(tmp_path), str(disk)], capture_output=True, text=True, env=ENV, timeout=200)
    finally: subprocess.run(['umount', '-l', str(disk)])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['status']==2 and result['left']==[], (result, done.stderr)
    assert 'the study needs' in done.stderr and '2 MB free' in done.stderr and str(disk) in done.stderr


def test_help_and_version_import_neither_torch_nor_fastai():
    code = "import sys; from kdmed import cli; cli.main([{!r}]); cli.main(['distill', '--help']); print(sorted({{'torch', 'fastai', 'timm', 'pandas', 'numpy'}} & set(sys.modules)))"
    for option in ('--version', '--help'):
        done = subprocess.run([sys.executable, '-c', code.format(option)], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1]=='[]'
    began = os.times()
    subprocess.run([BIN/'kdmed', '--help'], capture_output=True, check=True)
    assert os.times().children_user - began.children_user < 5 # seconds of processor time
