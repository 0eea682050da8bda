"Runs that are killed, interrupted, started twice, or out of disk lose nothing and say what is kept"
import json, os, random, subprocess, sys
from pathlib import Path

import pytest

from conftest import ROOT

BIN = Path(sys.executable).parent
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore')
KILLS = int(os.environ.get('KDMED_KILLS') or 3) # 20 by night
SEED = os.environ.get('KDMED_KILL_SEED') or str(random.randrange(10**6)) # other moments every time


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What tests/killed_command.py found"
    if not hasattr(os, 'fork'): pytest.skip('needs os.fork')
    command = [sys.executable, str(ROOT/'tests'/'killed_command.py'), str(tmp_path_factory.mktemp('killed')), SEED, str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=900 + 120*KILLS)
    assert done.returncode==0, f'KDMED_KILL_SEED={SEED}\n{done.stdout}\n{done.stderr[-3000:]}'
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow(seconds=60)
def test_killed_at_random_moments_a_run_ends_in_the_same_metrics(found):
    assert found['kills']['kills'] >= KILLS and not found['kills']['differing'], f"again with KDMED_KILL_SEED={SEED}: {found['kills']}"


@pytest.mark.slow
@pytest.mark.parametrize('name, status', [('int', 130), ('term', 143)])
def test_a_signal_ends_a_run_in_one_line_that_says_what_is_kept(found, name, status):
    result = found['signals'].get(name) or pytest.fail(str(found['signals']))
    lines = [line for line in result['said'].splitlines() if line.strip() and 'warning' not in line]
    assert result['status']==status and result['seconds'] < 15, result
    assert len(lines)==1 and '1 of 3 models are kept in' in lines[0] and lines[0].endswith('the same command resumes'), lines


@pytest.mark.slow
def test_the_second_of_two_processes_is_told_at_once(found):
    result = found['twice']
    assert result.get('second')==2 and f"is in use: process {result['first']}" in result['said'], result


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_found_before_training(found):
    result = found['disk']
    if 'skipped' in result: pytest.skip(result['skipped'])
    assert result['status']==2 and result['left']==[], result
    assert 'the study needs' in result['said'] and '2 MB free' in result['said'], result


def test_help_and_version_import_neither_torch_nor_fastai():
    code = "import sys; from kdmed.cli import app as cli; cli.main([{!r}]); cli.main(['distill', '--help']); print(sorted({{'torch', 'fastai', 'timm', 'pandas', 'numpy'}} & set(sys.modules)))"
    for option in ('--version', '--help'):
        done = subprocess.run([sys.executable, '-c', code.format(option)], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1]=='[]'
    began = os.times()
    subprocess.run([BIN/'kdmed', '--help'], capture_output=True, check=True)
    assert os.times().children_user - began.children_user < 5 # seconds of processor time
