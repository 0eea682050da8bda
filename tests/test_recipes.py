"Recipes as their users meet them: every row on every task it is for, and studies that are killed"
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdmed.data.images import synthetic_table
from kdmed.data.splits import split_groups
from kdmed.models.create import load_student
from kdmed.evaluate.metrics import predict
from kdmed.studies.ablation import ablate
from kdmed.studies.recipes import RECIPES, rehearse, run

TINY = {name: r.scaled(.05, size=32, epochs=1, teacher_epochs=1, batch_size=16, views=2) for name,r in RECIPES.items()}


def tissue(task='multiclass', n=120):
    return split_groups(synthetic_table(n=n, classes=2 if task=='binary' else 3, size=32, task=task, seed=3), sizes=(.5, .2, .3))


@pytest.mark.slow_after(3)
@pytest.mark.parametrize('task', ['binary', 'multiclass', 'multilabel'])
@pytest.mark.parametrize('name', RECIPES)
def test_every_row_can_be_trained_on_every_task(name, task):
    recipe = TINY[name]
    rehearse(recipe, recipe.loaders(tissue(task)), list(recipe.rows))


@pytest.mark.slow
@pytest.mark.parametrize('name', RECIPES)
def test_run_leaves_a_report_and_the_student_it_is_about(name, tmp_path):
    table = tissue()
    comparison = run(TINY[name], table, tmp_path, progress=False)
    assert list(comparison.scores) == ['teacher', 'plain', 'distilled']
    assert 'Scaled to 0.05' in (tmp_path/'recipe.md').read_text()
    dls = TINY[name].loaders(table)
    student = load_student(tmp_path/'cells'/f'{TINY[name].full}-0')
    assert np.allclose(predict(student, dls.test)[0], comparison.predictions['probs']['distilled'][0], atol=1e-5)


def test_budgets_are_equal():
    "All rows of a recipe train as long, on the same views, with the same optimizer; plain and full student are one architecture"
    for name,recipe in TINY.items():
        dls = recipe.loaders(tissue())
        teacher = recipe.make_teacher(dls)
        plain,full = (recipe.make_student(row, dls, teacher) for row in ('plain', recipe.full))
        assert [(n, p.shape) for n,p in plain.named_parameters()] == [(n, p.shape) for n,p in full.named_parameters()], name


SCRIPT = '''
import sys, warnings
warnings.filterwarnings('ignore')
sys.path.insert(0, sys.argv[2])
from test_recipes import TINY, tissue
from kdmed.studies.ablation import ablate
ablate(TINY['kd_convnext'], tissue().assign(split=None), sys.argv[1], ['features', 'kd_convnext'], repeats=2, progress=False)
'''


def predictions(folder): return {f.relative_to(folder).as_posix(): np.load(f) for f in sorted(Path(folder).glob('split-*/*/test.npy'))}


@pytest.mark.slow(seconds=90)
def test_killed_study_goes_on_to_the_same_predictions(tmp_path):
    def start(folder): return subprocess.Popen([sys.executable, '-c', SCRIPT, str(folder), str(Path(__file__).parent)])
    assert start(tmp_path/'whole').wait() == 0
    whole = predictions(tmp_path/'whole')
    assert len(whole) == 2*4
    for cells in (1, 6): # killed after so many cells
        process = start(tmp_path/'killed')
        while process.poll() is None and len(predictions_there(tmp_path/'killed')) < cells: time.sleep(.05)
        time.sleep(.3) # into the next one
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path/'killed').wait() == 0
    killed = predictions(tmp_path/'killed')
    assert whole.keys() == killed.keys()
    for name in whole: assert np.array_equal(whole[name], killed[name]), name
    assert not list((tmp_path/'killed').glob('split-*/*/fit')), 'checkpoints of finished cells are deleted'
    assert not list((tmp_path/'killed').glob('split-*/answers')), 'and so are the answers of teachers'


def predictions_there(folder): return list(Path(folder).glob('split-*/*/test.npy'))


@pytest.mark.slow
def test_a_table_that_brings_its_split_keeps_it(tmp_path):
    table = tissue()
    study = ablate(TINY['deit_lung'], table, tmp_path, ['soft_token'], repeats=2, progress=False)
    assert study.about['splits'] == 1 and study.about['test'] == (table.split=='test').sum()
    assert study.cells.groupby('row').size().to_dict() == {'teacher': 1, 'plain': 2, 'soft_token': 2}


def test_misspelt_and_foreign_things_are_named_before_anything_is_trained(tmp_path):
    recipe,table = TINY['kd_convnext'],tissue()
    with pytest.raises(ValueError, match="unknown row 'featurs'; did you mean 'features'"): ablate(recipe, table, tmp_path/'a', ['featurs'])
    with pytest.raises(ValueError, match='repeats must be a whole number of at least 1, got 0'): ablate(recipe, table, tmp_path/'a', repeats=0)
    with pytest.raises(ValueError, match='subgroups must be columns of the image table'): run(recipe, table, tmp_path/'a', subgroups=['age'])
    with pytest.raises(ValueError, match="unknown timm model of student 'convnext_tinny'; did you mean 'convnext_tiny'"): run(replace(recipe, student='convnext_tinny'), table, tmp_path/'b', progress=False)
    assert not (tmp_path/'b'/'cells').exists()
    assert not (tmp_path/'a').exists()
