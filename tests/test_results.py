"What is in results/ says what it belongs to; the demo, and a fit of a study, are made again and compared"
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import results # noqa: E402

FOLDERS = sorted(f.name for f in results.RESULTS.iterdir() if f.is_dir())
DATA = Path(os.environ.get('KDMED_DATA', ROOT.parent/'shared/data'))

@pytest.mark.parametrize('name', FOLDERS)
def test_a_folder_says_what_it_belongs_to(name):
    facts = results.noted(name)
    assert re.fullmatch(r'[0-9a-f]{7,40}', facts['commit']), 'made from files that no commit holds'
    assert re.fullmatch(r'20\d\d-\d\d-\d\d', facts['date'])
    assert {'kdmed', 'torch', 'timm', 'fastai', 'python'} <= set(facts['versions'])
    assert facts['made_by'] and all(isinstance(words, str) for words in facts['made_by'])
    assert facts['fingerprint']==results.fingerprint(facts['settings'])

def test_every_folder_can_be_made():
    assert set(FOLDERS) <= set(results.MAKERS), 'results that no command makes'
    for maker in results.MAKERS.values():
        for tool in maker.tools: assert (ROOT/tool).is_file(), tool

def test_results_of_other_settings_say_so():
    "A folder whose settings are no longer those of today has a sentence about it"
    for name in FOLDERS:
        if not results.is_of_today(name): assert len(results.noted(name).get('note', '')) > 20, name

def test_the_demo_is_of_todays_settings():
    assert results.is_of_today('demo'), 'make it again: python tools/results.py make demo'

def test_commits_are_known():
    words = ['git', 'rev-parse', '--is-shallow-repository']
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.stdout.strip()!='false': pytest.skip('no git history here')
    for name in FOLDERS:
        commit = results.noted(name)['commit']
        found = subprocess.run(['git', 'cat-file', '-e', f'{commit}^{{commit}}'], cwd=ROOT)
        assert not found.returncode, (name, commit)

def test_a_fingerprint_sees_every_setting():
    settings = results.settings_of('demo')
    for name in settings: assert results.fingerprint(settings | {name: 'other'})!=results.fingerprint(settings)
    assert results.settings_of('copies')['constants']['tests/bench_copies.py']['RESULTS']

@pytest.mark.slow(seconds=400)
def test_the_demo_made_again_gives_the_committed_report(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'WORK', tmp_path/'work')
    results.make('demo', out=tmp_path)
    old,new = (json.loads((folder/'demo'/'metrics.json').read_text()) for folder in (results.RESULTS, tmp_path))
    for model in ('teacher', 'plain', 'distilled'):
        for metric in ('balanced_accuracy', 'macro_auroc'):
            assert new[model][metric]['value']==pytest.approx(old[model][metric]['value'], abs=.03), (model, metric)
    def gain(metrics): return metrics['differences']['distilled − plain']['macro_auroc']['low']
    assert gain(old) > 0 and gain(new) > 0 # beyond chance, on another processor, too
    def files(folder): return {f.name for f in (folder/'demo').iterdir()}
    assert files(tmp_path)==files(results.RESULTS)-{'made.json', 'tried.csv'}
