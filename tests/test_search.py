"The search: killed it makes the same trials; time is kept; test images are read at the end alone; the command"
import json, os, random, shlex, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import ImageDL, image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import skin_augment
from kdmed.distill.methods import fit_classifier
from kdmed.studies import search as module
from kdmed.studies.search import search_method
from kdmed.cli import app as cli, commands

HERE,STUDENT,QUICK = Path(__file__).parent,'test_resnet',dict(n_boot=20, progress=False)


def tissue(n=240): return split_groups(synthetic_table(n=n, classes=3, size=32, seed=5), sizes=(.5, .25, .25))


def loaders(n=240): return image_dls(tissue(n), size=32, bs=32, augment=skin_augment(0), views=2)


def teacher_of(dls): return fit_classifier(dls, 'test_resnet', epochs=14, lr=1e-2, progress=False).model


@pytest.fixture(scope='module')
def data():
    dls = loaders()
    return dls,teacher_of(dls)


def trials(result): return result.trials.drop(columns='seconds')


def test_the_test_images_are_read_after_the_last_fit_alone(data, monkeypatch):
    dls,teacher = data
    seen,iterate,fit = [],ImageDL.__iter__,module.fit_classifier
    def watched(self):
        if self is dls.test: seen.append('test images')
        return iterate(self)
    def noted(*args, **kwargs):
        seen.append('fit')
        return fit(*args, **kwargs)
    monkeypatch.setattr(ImageDL, '__iter__', watched)
    monkeypatch.setattr(module, 'fit_classifier', noted)
    space = dict(method='logit', epochs=1, lr=[1e-3, 1e-2], weight=1., temperature=4.)
    result = search_method(dls, teacher, STUDENT, '12 epochs', space, epochs=1, seeds=(0, 1), **QUICK)
    assert seen.index('test images') > max(i for i,what in enumerate(seen) if what=='fit')
    models = len({result.name, 'default', 'plain'})
    assert seen.count('test images')==models*2 # each model of each seed, once
    assert result.finalists.test.notna().sum()==models


def test_a_trial_that_diverges_is_noted_and_does_not_win(data):
    dls,teacher = data
    space = dict(method='logit_mse', epochs=1, lr=[3e-3, 9e5], weight=1.)
    result = search_method(dls, teacher, STUDENT, '20 epochs', space, epochs=1, seeds=(0,), **QUICK)
    failed = result.trials[result.trials.lr==9e5]
    assert len(failed) and (failed.failed!='').all() and result.winner['lr']==3e-3


@pytest.mark.parametrize('lost,said', [
    ('valid', r"no images in split \['valid'\]"),
    ('test', 'dls has no test images')])
def test_data_without_a_part_are_refused(data, lost, said):
    _,teacher = data
    table = tissue()
    with pytest.raises(ValueError, match=said):
        search_method(image_dls(table[table.split!=lost], size=32, bs=32), teacher, STUDENT, '90 epochs', **QUICK)


@pytest.mark.slow
def test_a_refused_budget_leaves_no_search_behind(data, tmp_path):
    dls,teacher = data
    for budget in ('8 epochs', '2s'):
        with pytest.raises(ValueError, match='the least possible is'):
            search_method(dls, teacher, 'test_resnet', budget, folder=tmp_path/'s', epochs=2, progress=False)
    space = dict(method='logit', epochs=1, lr=[1e-3, 1e-2], weight=1., temperature=4.)
    search_method(dls, teacher, STUDENT, '9 epochs', space, epochs=1, seeds=(0,), folder=tmp_path/'s', **QUICK)


@pytest.mark.slow
def test_a_search_killed_twice_makes_the_same_trials(tmp_path):
    rng,script = random.Random(0),[sys.executable, str(HERE/'killed_search.py')]
    started = time.monotonic()
    subprocess.run([*script, tmp_path/'whole', tmp_path/'teacher'], check=True)
    took,kills = time.monotonic()-started,0
    while True:
        run = subprocess.Popen([*script, tmp_path/'killed', tmp_path/'teacher'])
        try: status = run.wait(rng.uniform(.3, .8)*took if kills < 3 else 900)
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
            continue
        assert status==0
        break
    assert kills >= 2
    read = {n: pd.read_csv(tmp_path/n/'trials.csv').drop(columns='seconds') for n in ('whole', 'killed')}
    pd.testing.assert_frame_equal(read['whole'], read['killed'])
    numbers = [json.loads((tmp_path/n/'search.json').read_text()) for n in ('whole', 'killed')]
    for kept in numbers:
        kept['cost'].pop('seconds')
        kept.pop('findings')
    assert numbers[0]==numbers[1]
    plans = [json.loads((tmp_path/n/'plan.json').read_text()) for n in ('whole', 'killed')]
    assert {k: v for k,v in plans[0].items() if k!='seconds'}=={k: v for k,v in plans[1].items() if k!='seconds'}


@pytest.fixture
def shared_clock(monkeypatch):
    """The search's clock counts this process's own work, and twice as much while another program takes half of the
    processor: from the 20th to the 40th second. So no real program on this machine decides whether the test passes."""
    threads,start = torch.get_num_threads(),time.process_time()
    def now():
        worked = time.process_time()-start
        return worked + min(max(worked-20, 0), 20)
    monkeypatch.setattr(module, 'time', SimpleNamespace(monotonic=now))
    monkeypatch.setattr(module, 'WorkClock', partial(module.WorkClock, now=now))
    torch.set_num_threads(1) # threads that wait for each other count as work
    yield now
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_budget_of_time_is_kept_while_another_program_comes_and_goes(data, shared_clock):
    dls,teacher = data
    started = shared_clock()
    result = search_method(dls, teacher, 'test_resnet', '80s', epochs=2, seeds=(0, 1), n_boot=100, progress=False)
    took = shared_clock()-started
    assert took <= 88, took
    assert took >= 60, took
    assert len(result.about['seeds'])==2


# -- the command

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tissue')/'images'
    for i,row in synthetic_table(n=240, classes=3, size=32, seed=5).iterrows():
        (folder/row.label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(folder/row.label/f'{row.group.split()[1]}_{i}.png')
    return folder


SMALL = ('--teacher test_resnet --student test_efficientnet --size 32 --epochs 1 --teacher-epochs 14 --lr .01 --bs 16 '
         '--repeats 1 --no-copies').split()


def command(images, out, *more):
    return ['search', '--data', images, '--group-pattern', r'(\d+)_', *SMALL, '--out', out, *more]


def kdmed(capsys, *argv):
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    return (status, *capsys.readouterr())


@pytest.mark.parametrize('more, said', [
    ([], 'kdmed search needs --budget'),
    (['--budget', '30'], "--budget must be a time, such as '90s', '30m'"),
    (['--budget', '-3m'], '--budget'),
    (['--budget', '1m', '--space', 'tau=3'], "unknown name in --space 'tau'"),
    (['--budget', '1m', '--space', 'lr='], 'expected NAME=VALUE,VALUE'),
    (['--budget', '1m', '--space', 'method=hard_token'], '--space method=hard_token: EfficientNet has no'),
    (['--budget', '1m', '--temperature', '2'], '--temperature is chosen by the search'),
    (['--budget', '1m', '--subgroups', 'age'], '--subgroups compares models of kdmed distill'),
    (['--budget', '1m', '--metric', 'acuracy'], '--metric: unknown multiclass metric'),
    (['--budget', '1m', '--method', 'logits'], "unknown --method 'logits'"),
    (['--budget', '2s'], '--budget 2s is too small'),
])
def test_a_search_that_cannot_be_meant_is_refused_before_work_starts(images, tmp_path, capsys, monkeypatch, more, said):
    monkeypatch.setattr(commands, '_searched_teachers', lambda *args: pytest.fail('work has begun'))
    status,out,err = kdmed(capsys, *command(images, tmp_path/'run', *more))
    assert (status, out)==(2, '') and said in err.splitlines()[-1] and 'Traceback' not in err, err


@pytest.mark.slow
def test_the_command_searches_and_its_line_trains_the_winner(images, tmp_path, capsys, monkeypatch):
    space = ['--budget', '9 epochs', '--space', 'method=logit', 'lr=.01,.02', 'epochs=1', 'weight=1', 'temperature=2']
    run = command(images, tmp_path/'run', *space)
    status,out,err = kdmed(capsys, *run)
    assert status==0, err
    assert 'not beyond chance' in out or 'better' in out or 'worse' in out
    line = out.strip().splitlines()[-1]
    assert line.startswith('kdmed distill --data') and line.endswith('--out ANOTHER_FOLDER')
    monkeypatch.setattr(commands, 'fit_classifier', lambda *args: pytest.fail('the teacher was trained again'))
    status,again,_ = kdmed(capsys, *run)
    assert (status, again)==(0, out)
    status,_,err = kdmed(capsys, *('.02' if a=='.01' else a for a in run))
    assert status==2 and 'lr was 0.01, is 0.02' in err
    words = [w if w!='ANOTHER_FOLDER' else str(tmp_path/'student') for w in shlex.split(line)[1:]]
    status,_,err = kdmed(capsys, *words)
    assert status==0 and (tmp_path/'student'/'student.safetensors').is_file(), err
    noted = json.loads((tmp_path/'student'/'study.json').read_text())['settings']
    winner = json.loads((tmp_path/'run'/'search.json').read_text())['winner']
    assert {k: noted[k] for k in winner}==winner
    status,_,err = kdmed(capsys, *command(images, tmp_path/'student', '--budget', '9 epochs'))
    assert status==2 and 'already holds a run that is no search' in err


def test_distill_takes_temperature_and_factors(images, tmp_path, capsys):
    base = ['distill', '--data', images, '--group-pattern', r'(\d+)_', *SMALL, '--out', tmp_path/'run']
    wrong = [(['--temperature', '0'], '--temperature must be a finite number above 0'),
             (['--weight', '-1'], '--weight must be'),
             (['--method', 'feature', '--temperature', '2'], '--method feature: temperature 2.0 was given')]
    for more,said in wrong:
        status,_,err = kdmed(capsys, *base, *more)
        assert status==2 and said in err, err


def test_a_search_of_other_settings_is_refused_before_images_are_read(images, tmp_path, capsys, monkeypatch):
    def killed(*args): raise KeyboardInterrupt
    monkeypatch.setattr(commands, '_searched_teachers', killed)
    run = command(images, tmp_path/'run', '--budget', '60 epochs')
    status,_,err = kdmed(capsys, *run)
    assert status==130 and 'no trial was finished yet' in err.splitlines()[-1], err
    monkeypatch.setattr(commands, 'read_table', lambda o: pytest.fail('images are read'))
    status,_,err = kdmed(capsys, *run, '--split-seed', '3')
    assert status==2, err
    assert f'--out {tmp_path}/run already holds a search of other settings: --split-seed was 0, is 3' in err, err
