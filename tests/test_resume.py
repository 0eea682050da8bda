"Nothing is lost: scripts killed at random moments, by `kill -9`, come through with the weights, the log and the random numbers of a run that was never stopped"
import json, os, random, subprocess, sys

import pytest
import torch
from fastai.learner import Learner, load_learner
from torch import nn

from conftest import ROOT
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.train.resume import Resume

NAMES = ['fine_tuned', 'best_of', 'plain_pytorch', 'workers', 'distilled']


def run_helper(script, *args):
    "Lines that a script of this folder prints"
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore')
    done = subprocess.run([sys.executable, str(ROOT/'tests'/script), *map(str, args)], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, f'{script} {args}\n{done.stdout}\n{done.stderr[-3000:]}'
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    "What tests/killed_script.py says of each script"
    seed = os.environ.get('KDMED_KILL_SEED') or str(random.randrange(10**6)) # other moments every time
    found = run_helper('killed_script.py', tmp_path_factory.mktemp('killed'), seed, *NAMES)
    return {r['script']: r | dict(seed=seed) for r in found}


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_a_killed_script_ends_where_an_uninterrupted_one_does(name, reports):
    report = reports[name]
    assert not report['differing'], f'again with KDMED_KILL_SEED={report["seed"]}: {report}'


@pytest.mark.slow
def test_enough_kills_of_every_kind(reports):
    assert sum(r['kills'] for r in reports.values()) >= 12, reports
    assert reports['fine_tuned']['kills'] >= 5


@pytest.mark.slow
@pytest.mark.parametrize('name', ['best_of', 'distilled'])
def test_killed_at_every_checkpoint(name, tmp_path):
    "The moment after each, the last of a fit included, when no batch is left"
    report, = run_helper('killed_script.py', tmp_path, 'every', name)
    assert report['writes'] >= 10 and not report['wrong'], report


@pytest.mark.slow
def test_processes_that_train_together_are_killed_together(tmp_path):
    "Each gets its own random numbers back"
    report, = run_helper('killed_ranks.py', tmp_path)
    assert report == dict(killed=True, same_weights=True, same_draws=False, differing=[])


@pytest.mark.filterwarnings('ignore')
def test_an_exported_learner_is_small_and_predicts(tmp_path):
    "Nothing of a checkpoint is shipped, and its folder is not needed"
    sizes = []
    for cbs in ([], [Resume(tmp_path/'checkpoints', every=1)]):
        table = split_groups(synthetic_table(n=60, classes=3, size=16))
        learn = Learner(image_dls(table, 16, bs=16), nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), cbs=cbs, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        learn.export('student.pkl')
        sizes.append((tmp_path/'student.pkl').stat().st_size)
    assert sizes[1] < sizes[0] + 2000
    (tmp_path/'checkpoints').rename(tmp_path/'elsewhere')
    loaded = load_learner(tmp_path/'student.pkl')
    with loaded.no_bar(), learn.no_bar(): assert torch.equal(loaded.predict(table.image[0])[2], learn.predict(table.image[0])[2])
    assert not (tmp_path/'checkpoints').exists()
