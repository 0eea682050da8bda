"The command line as its users meet it: options, messages in its own words, runs that resume, configuration, check"
import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.readers import read_folder
from kdmed.data.splits import split_groups
from kdmed.distill.registry import METHODS
from kdmed.studies.recipes import RECIPES
from kdmed.studies.study import distillation_study
from kdmed.cli import app as cli, commands, images as cli_images, options, runs

SMALL = ['--teacher', 'test_resnet', '--student', 'test_efficientnet', '--size', '32', '--epochs', '1', '--teacher-epochs', '1', '--bs', '16', '--repeats', '1', '--no-copies']


def write_images(folder, n=90, parts=('',)):
    for i,row in synthetic_table(n=n, classes=3, size=32).iterrows():
        home = folder/parts[i%len(parts)]/row.label
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(home/f'{row.group.split()[1]}_{i}.png')
    return folder


@pytest.fixture(scope='module')
def images(tmp_path_factory): return write_images(tmp_path_factory.mktemp('tissue')/'images')


def kdmed(capsys, *argv):
    "Exit status, stdout and stderr of a command"
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    return (status, *capsys.readouterr())


def distill(images, out, *more): return ['distill', '--data', images, '--group-pattern', r'(\d+)_', *SMALL, '--out', out, *more]


# -- what the command offers is what the modules have

def test_choices_are_those_of_the_modules():
    assert set(options.METHOD_NAMES)=={'auto', *METHODS}
    assert set(options.RECIPE_NAMES)==set(RECIPES)
    assert set(options.AUGMENTATION_NAMES)==set(cli_images.AUGMENTS)
    assert set(options.FILTER_NAMES)==set(cli_images.FILTERS)
    assert set(options.OPTIMIZER_NAMES)==set(cli_images.OPTIMIZERS)
    assert set(options.DATASETS)==set(cli_images.find_readers())
    for name,sets in options.OPTION_DATASETS.items():
        for dataset in sets: assert name in cli_images.find_readers()[dataset][1], (name, dataset)


def test_readers_know_the_options_they_are_given():
    import inspect
    for dataset,(read,names) in cli_images.find_readers().items():
        assert set(names) <= set(inspect.signature(read).parameters), dataset


# -- numbers and options

@pytest.mark.parametrize('more, said', [
    (['--lr', '-1'], '--lr must be a finite number above 0, got -1.0'),
    (['--lr', 'inf'], '--lr must be a finite number above 0, got inf'),
    (['--lr', 'nan'], '--lr must be a finite number above 0, got nan'),
    (['--lr', '1e308'], '--lr must be below 1,000,000, got 1e+308'),
    (['--metric', 'nonsense'], "--metric: unknown multiclass metric 'nonsense'"),
    (['--lr', 'abc'], 'unable to convert "abc" into float'),
    (['--epochs', '0'], '--epochs must be a whole number of at least 1, got 0'),
    (['--epochs', '1.5'], 'Invalid value for --epochs: expected a whole number, got 1.5'),
    (['--size', '1'], '--size must be a whole number of at least 8, got 1'),
    (['--bs', '0'], '--bs must be a whole number of at least 1, got 0'),
    (['--workers', '-1'], '--workers must be a whole number of at least 0, got -1'),
    (['--split-seed', '-3'], '--split-seed must be in [0, 2**32), got -3'),
    (['--seed', '4294967296'], '--seed must be in [0, 2**32)'),
    (['--weight-decay', '-1'], '--weight-decay must be a finite number of at least 0, got -1.0'),
    (['--repeats', '0'], '--repeats must be a whole number of at least 1, got 0'),
    (['--group', 'patient'], '--group concerns --dataset csv and dicom, not folder; for class folders --group-pattern or --groups'),
    (['--image', 'foo'], '--image concerns --dataset csv and dicom, not folder'),
    (['--encoding', 'cp1252'], '--encoding concerns --dataset csv, not folder'),
    (['--separator', ';'], '--separator concerns --dataset csv, not folder'),
    (['--magnification', '40'], '--magnification concerns --dataset breakhis, not folder'),
    (['--task', 'multilabel'], '--task concerns --dataset csv and dicom and breakhis, not folder'),
    (['--tissue', 'colon'], '--tissue concerns --dataset lc25000, not folder'),
    (['--dataset', 'cvs'], "unknown --dataset 'cvs'; did you mean 'csv'?"),
    (['--dataset', 'csv'], '--group-pattern concerns --dataset folder, not csv'),
    (['--student', ''], '--student must be the name of a timm model'),
    (['--student', '../x'], '--student: '),
    (['--student', 'test_efficientnett'], "did you mean 'test_efficientnet'"),
    (['--method', 'logits'], "unknown --method 'logits'; did you mean 'logit'"),
    (['--method', 'hard_token'], '--method hard_token: '),
    (['--views', '3'], '--views needs a policy whose views repeat'),
    (['--cache'], '--cache keeps the teacher\'s outputs for views that repeat'),
    (['--device', 'gpu'], '--device must be cpu, cuda, cuda:1 or mps, got \'gpu\''),
    (['--device', 'cuda:9'], '--device cuda:9: this machine has no cuda device'),
    (['--store', 'a', 'b'], '--store'),
    (['--resplit', '--official'], '--resplit ignores the split that --official asks for'),
    (['--official'], '--official: the data has no split of its own'),
    (['--teacher-checkpoint', 'no.pth'], '--teacher-checkpoint no.pth: file not found'),
    (['--student-weights', 'no.pth'], '--student-weights no.pth: file not found'),
    (['--groups', 'no.csv'], '--groups no.csv: file not found'),
    (['--group-pattern', ''], '--group-pattern must not be empty'),
    (['--config', 'no.toml'], '--config no.toml: file not found'),
    (['--lrr', '1'], 'Unknown option: --lrr. Did you mean --lr?'),
])
def test_what_cannot_be_meant_is_refused_before_work_starts(images, tmp_path, capsys, more, said):
    base = [a for a in distill(images, tmp_path/'run') if a not in (r'(\d+)_', '--group-pattern')] if '--group-pattern' in more else distill(images, tmp_path/'run')
    if more[0].startswith('--') and more[0] in base: # the option is given once
        at = base.index(more[0])
        del base[at:at+2]
    status,out,err = kdmed(capsys, *base, *more)
    lines = [line for line in err.splitlines() if line.startswith('kdmed: error: ')]
    assert status==2 and len(lines)==1 and said in lines[0], err
    assert 'Traceback' not in err and not (tmp_path/'run').exists()


def test_amp_without_a_gpu_is_refused(images, tmp_path, capsys):
    status,_,err = kdmed(capsys, *distill(images, tmp_path/'run', '--amp', '--device', 'cpu'))
    assert status==2 and '--amp needs an NVIDIA GPU' in err and not (tmp_path/'run'/'cells').exists()


# -- where a run goes

def test_out_cannot_be_empty_a_file_or_among_the_images(images, tmp_path, capsys):
    (tmp_path/'file').write_text('mine')
    for out,said in (('', '--out must be a folder, got an empty text'), (images, 'is inside --data'), (images/'run', 'is inside --data'), (tmp_path/'file', 'is a file; expected a folder'), ('/proc/nowhere', 'cannot be written to')):
        status,_,err = kdmed(capsys, *distill(images, out))
        assert status==2 and said in err, err
    assert (tmp_path/'file').read_text()=='mine' and not (images/'run').exists()


@pytest.fixture(scope='module')
def run(images, tmp_path_factory):
    "A finished run"
    out = tmp_path_factory.mktemp('runs')/'run'
    assert cli.main([str(a) for a in distill(images, out, '--quiet')])==0
    return out


def contents(run): return {f.relative_to(run).as_posix(): f.read_bytes() for f in run.rglob('*') if f.is_file() and not f.name.startswith('.lock')}


def test_a_run_holds_its_files(run):
    assert set(commands.RUN_FILES)-{commands.PAIRS} == {f.name for f in run.iterdir() if not f.name.startswith('.')}
    assert json.loads((run/'settings.json').read_text())['environment']['torch']
    assert (run/'student.safetensors').read_bytes()==(run/'cells/distilled-0/student.safetensors').read_bytes()
    assert sorted(f.name for f in (run/'cells').iterdir())==['distilled-0', 'plain-0', 'teacher-0']
    assert not list(run.rglob('fit'))


def test_the_same_command_again_trains_nothing(images, run, capsys):
    before = contents(run)
    status,out,err = kdmed(capsys, *distill(images, run))
    assert status==0, err
    assert 'nothing was trained' in out and 'distilled − plain' in out
    assert contents(run)==before


def test_other_settings_in_the_same_folder_are_refused_by_name(images, run, capsys):
    before = contents(run)
    for more,said in ((['--lr', '1e-4'], '--lr was 0.003, is 0.0001'), (['--resplit'], '--resplit was False, is True'), (['--augment', 'flip'], '--augment was dihedral, is flip'), (['--positive', 'x'], '--positive was not given, is x')):
        status,_,err = kdmed(capsys, *distill(images, run, *more))
        assert status==2 and said in err and '--force to replace it' in err, err
    assert contents(run)==before


@pytest.mark.slow
def test_configuration_repeats_a_run(run, tmp_path, capsys):
    status,_,err = kdmed(capsys, 'distill', '--config', run/'config.toml', '--out', tmp_path/'again', '--quiet')
    assert status==0, err
    first,again = (json.loads((folder/'metrics.json').read_text()) for folder in (run, tmp_path/'again'))
    for name in ('teacher', 'plain', 'distilled'):
        for metric in ('balanced_accuracy', 'macro_auroc', 'log_loss'): assert first[name][metric]==again[name][metric]
    assert (run/'student.safetensors').read_bytes()==(tmp_path/'again'/'student.safetensors').read_bytes()


@pytest.mark.parametrize('text, said', [
    ('lrr = 1', 'Unknown option'), ('lr = "a"', 'unable to convert "a" into float'), ('lr = ', 'is no TOML file'), ('epochs = 1.5', 'expected a whole number, got 1.5'), ('lr = -1', '--lr must be a finite number above 0'),
    ('command = "recipe"', 'is for `kdmed recipe`, not for `kdmed distill`'), ('[training]\nlr = 1', "options stand at the top level, got table 'training'"), ('repeats = true', 'expected a whole number, got True'),
])
def test_a_wrong_configuration_is_refused(images, tmp_path, capsys, text, said):
    (tmp_path/'c.toml').write_text(text)
    base = distill(images, tmp_path/'run', '--config', tmp_path/'c.toml')
    for name in ('--epochs', '--repeats'): del base[base.index(name):base.index(name)+2]
    status,_,err = kdmed(capsys, *base)
    assert status==2 and said in err, err


@pytest.mark.slow
def test_force_replaces_a_run_when_the_new_one_is_finished(images, run, tmp_path, capsys, monkeypatch):
    import shutil
    out = tmp_path/'run'
    shutil.copytree(run, out)
    (out/'notes.txt').write_text('mine')
    before,other = contents(out),distill(images, out, '--lr', '1e-3', '--force', '--quiet')
    real = commands.distillation_study
    def stopped(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt # everything is trained, nothing is reported
    monkeypatch.setattr(commands, 'distillation_study', stopped)
    status,_,err = kdmed(capsys, *other)
    assert status==130 and '3 of 3 models are kept' in err
    assert {k: v for k,v in contents(out).items() if not k.startswith('.new/')}==before # the old run is whole
    monkeypatch.setattr(commands, 'distillation_study', real)
    trained = {f.name: f.stat().st_mtime_ns for f in (out/'.new'/'cells').iterdir()}
    status,_,err = kdmed(capsys, *other)
    assert status==0, err
    assert {f.name: f.stat().st_mtime_ns for f in (out/'cells').iterdir()}==trained # what was trained was not trained again
    assert json.loads((out/'settings.json').read_text())['lr']==1e-3 and json.loads((out/'study.json').read_text())['settings']['lr']==1e-3
    assert (out/'notes.txt').read_text()=='mine' and not (out/'.new').exists()


def test_a_swap_that_is_stopped_half_way_is_completed(run, tmp_path):
    import shutil
    names = [name for name in commands.RUN_FILES if (run/name).exists()]
    for moved in (0, 1, 3, len(names)):
        out = tmp_path/f'run{moved}'
        shutil.copytree(run, out)
        shutil.copytree(run, out/'.new')
        (out/'.new'/'history.csv').write_text('new')
        (out/'.new'/'complete').write_text(json.dumps(names))
        (out/'settings.json').unlink()
        for name in names[:moved]:
            runs.remove_path(out/name)
            (out/'.new'/name).replace(out/name)
        if moved < len(names): assert runs.run_state(out)=='unfinished'
        commands.swap_in(out)
        assert (out/'history.csv').read_text()=='new' and runs.run_state(out)=='finished' and not (out/'.new').exists()


def test_files_of_a_run_that_do_not_say_what_they_are_stay(images, tmp_path, capsys):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'metrics.json').write_text('precious')
    status,_,err = kdmed(capsys, *distill(images, tmp_path/'run'))
    assert status==2 and 'already holds a run (metrics.json)' in err and (tmp_path/'run'/'metrics.json').read_text()=='precious'


# -- splits

@pytest.mark.slow
def test_a_split_without_validation_images_names_the_cures(tmp_path, capsys):
    data = write_images(tmp_path/'images', parts=('Training', 'Testing'))
    status,_,err = kdmed(capsys, *distill(data, tmp_path/'run'))
    assert status==2 and 'the split of the data has no valid images: --official takes validation images from its training part, by groups; --resplit ignores it' in err
    status,_,err = kdmed(capsys, *distill(data, tmp_path/'run', '--official', '--allow-leakage'))
    assert status==0, err


@pytest.mark.slow
def test_leaking_groups_name_the_cures_and_can_be_accepted(tmp_path, capsys):
    data = write_images(tmp_path/'images', parts=('train', 'valid', 'test'))
    status,_,err = kdmed(capsys, *distill(data, tmp_path/'run'))
    assert status==2 and 'groups are in more than one split' in err and '--resplit' in err and '--allow-leakage' in err and 'allow_leakage' not in err
    status,out,err = kdmed(capsys, *distill(data, tmp_path/'run', '--allow-leakage'))
    assert status==0, err # the report is made, without the part that cannot be
    assert 'alibration' in out and (tmp_path/'run'/'report.html').is_file()
    status,_,err = kdmed(capsys, *distill(data, tmp_path/'anew', '--resplit'))
    assert status==0, err


def test_groups_can_come_from_a_list(images, tmp_path):
    table = read_folder(images, print_card=False)
    names = [Path(str(i)).name for i in table.image]
    pd.DataFrame(dict(image=names, group=[n.split('_')[0] for n in names])).to_csv(tmp_path/'groups.csv', index=False)
    grouped = cli_images.apply_groups(table, tmp_path/'groups.csv')
    assert list(grouped.group)==[n.split('_')[0] for n in names] and table.group.nunique()==len(table)
    for broken,said in ((lambda t: t.iloc[1:], '1 of 90 images have no group'), (lambda t: t.rename(columns={'group': 'patient'}), "missing column ['group']"), (lambda t: t.assign(group=''), 'rows have no group'),
                        (lambda t: pd.concat([t, t.iloc[:1].assign(group='other')]), 'has several groups')):
        broken(pd.read_csv(tmp_path/'groups.csv', dtype=str)).to_csv(tmp_path/'broken.csv', index=False)
        with pytest.raises(ValueError, match=said.replace('[', r'\[').replace(']', r'\]')): cli_images.apply_groups(table, tmp_path/'broken.csv')


# -- failures

@pytest.mark.parametrize('error, said', [
    (ImportError('reading DICOM needs pydicom: pip install pydicom'), 'reading DICOM needs pydicom: pip install pydicom'), (MemoryError(), 'not enough memory'), (RuntimeError('weights are not finite'), 'weights are not finite'),
    (FloatingPointError('the loss is not finite'), 'choose a smaller --lr'), (KeyError('x'), 'KeyError'), (OSError(28, 'No space left on device', '/x/y'), '/x/y'), (RuntimeError('CUDA out of memory. Tried'), 'choose a smaller --bs'),
    (RuntimeError('Exception occured in `LogitKD` when calling event `before_train`:\n\todd'), 'kdmed: error: odd'),
])
def test_what_a_user_can_cause_is_one_line(images, tmp_path, capsys, monkeypatch, error, said):
    def fails(*args, **kwargs): raise error
    monkeypatch.setattr(commands, 'distillation_study', fails)
    status,_,err = kdmed(capsys, *distill(images, tmp_path/'run'))
    lines = [line for line in err.splitlines() if line.startswith('kdmed: error: ')]
    assert status==2 and len(lines)==1 and said in lines[0] and 'Traceback' not in err


@pytest.mark.slow
def test_a_learning_rate_without_measure_is_an_error_and_keeps_what_was_trained(images, tmp_path, capsys):
    status,_,err = kdmed(capsys, *distill(images, tmp_path/'run', '--lr', '999999'))
    assert status==2 and 'Traceback' not in err and len([line for line in err.splitlines() if line.startswith('kdmed: error')])==1, err


@pytest.mark.slow
def test_a_failing_part_of_the_report_costs_itself_only(tmp_path, monkeypatch):
    from kdmed.evaluate import costs
    dls = image_dls(split_groups(synthetic_table(n=90, classes=3, size=32), sizes=(.5, .2, .3)), 32, 16)
    def fails(*args): raise MemoryError('too much')
    monkeypatch.setattr(costs, '_fixed_cost', fails)
    result,_ = distillation_study(dls, 'test_resnet', 'test_efficientnet', teacher_epochs=1, epochs=1, seeds=(0,), progress=False, folder=tmp_path/'run', n_boot=10)
    assert any('cost' in s.lower() and 'not enough memory' in s for s in result.about['missing']) and 'distilled' in result.scores


# -- recipes

@pytest.mark.parametrize('name, given, said', [
    ('kd_convnext', 'lr=inf', 'lr must be a finite number'), ('kd_convnext', 'shares=1,2,3', 'shares must be three positive numbers that sum to 1'), ('kd_convnext', 'shares=abc', 'shares must be three positive numbers'),
    ('kd_convnext', 'teacher=__import__("os")', 'unknown timm model of teacher'), ('multi_dim_kd', 'blocks=9,99', 'blocks must be in [0, 12)'), ('multi_dim_kd', 'blocks=9,3', 'blocks must be rising'),
    ('multi_dim_kd', 'teacher=resnet18', 'teacher must be a ViT'), ('kd_convnext', 'epochs=one', "epochs must be of type int, got 'one'"), ('kd_convnext', 'sise=3', "unknown setting in --set 'sise'"), ('kd_convnext', 'size', 'expected NAME=VALUE'),
    ('kd_convnext', 'feature_share=2', 'feature_share must be'), ('deit_lung', 'temperature=0', 'temperature must be a finite number above 0'), ('kd_convnext', 'gamma=nan', 'gamma must be a finite number'), ('kd_convnext', 'scale=7', 'scale must be a finite number of at most 1 and above 0, got 7.0'),
])
def test_a_card_refuses_impossible_settings(capsys, name, given, said):
    status,out,err = kdmed(capsys, 'recipe', name, '--set', given)
    assert status==2 and said in err and not out, (out, err)


@pytest.mark.parametrize('more, said', [
    (['--rows', 'plain'], '--rows needs --ablate'), (['--one-split'], '--one-split needs --ablate'), (['--scale', '2'], '--scale must be a finite number of at most 1 and above 0, got 2.0'), (['--repeats', '0'], '--repeats must be'),
    (['--ablate', '--subgroups', 'age'], '--subgroups compares models of a run'),
])
def test_options_of_a_recipe_that_cannot_be_meant(capsys, more, said):
    status,out,err = kdmed(capsys, 'recipe', 'kd_convnext', *more)
    assert status==2 and said in err and not out


# -- check

def test_check_tells_what_a_run_would_meet_without_training(images, tmp_path, capsys):
    status,out,err = kdmed(capsys, 'check', '--data', images, '--group-pattern', r'(\d+)_', *SMALL)
    assert status==0, err
    for words in ('Images of each split and class', 'can be read', 'Training takes about', 'Decoded images take', 'on the disk'): assert words in out, out
    import shutil
    shutil.copytree(images, tmp_path/'images')
    bad = next((tmp_path/'images').rglob('*.png'))
    bad.write_bytes(b'no image')
    status,out,_ = kdmed(capsys, 'check', '--data', tmp_path/'images', '--group-pattern', r'(\d+)_', *SMALL)
    assert status==0 and '1 of 90 images cannot be read' in out and bad.name in out


@pytest.mark.slow
def test_output_that_is_no_terminal_gets_a_line_an_epoch(images, tmp_path, capsys):
    status,out,err = kdmed(capsys, *distill(images, tmp_path/'run', '--epochs', '1')[:-2])
    assert status==0
    lines = [line for line in err.splitlines() if 'epoch 1/1' in line]
    assert len(lines)==3 and 'time left is known after the first epoch of each kind of model' in lines[0] and lines[2].endswith('left')
    assert '\r' not in err and '|---' not in err and 'epoch 1/1' not in out


# -- what a report tells of the data, and what is refused before minutes are spent

@pytest.fixture(scope='module')
def leaking(tmp_path_factory):
    "Two classes; every group is in all three splits"
    folder = tmp_path_factory.mktemp('leaking')/'images'
    for i,row in synthetic_table(n=90, classes=2, size=32).iterrows():
        home = folder/('train', 'valid', 'test')[i//10%3]/row.label
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(home/f'{i%10}_{i}.png')
    return folder


@pytest.mark.slow
def test_a_report_tells_shared_groups_the_card_and_the_metric_that_was_asked_for(leaking, tmp_path, capsys):
    status,out,err = kdmed(capsys, *distill(leaking, tmp_path/'run', '--allow-leakage', '--metric', 'f1'))
    assert status==0, err
    report = (tmp_path/'run'/'report.md').read_text()
    shared = '10 groups are in more than one split: 100.0% (30/30) of the test images are of a group that is also in train; scores are optimistic.'
    for text in (out, report):
        assert shared in text and 'the F1 of the distilled student' in text
        assert 'the balanced accuracy of the distilled student' not in text
    assert 'split: train 30, valid 30, test 30' in report and 'binary: ' in report
    assert str(tmp_path) not in report


def test_groups_in_two_splits_are_refused_before_copies_are_looked_for(leaking, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, 'look_for_copies', lambda *args: pytest.fail('looked for copies first'))
    command = [c for c in distill(leaking, tmp_path/'run') if c!='--no-copies']
    status,_,err = kdmed(capsys, *command)
    assert status==2 and '10 groups are in more than one split' in err and '--resplit' in err and '--allow-leakage' in err, err


@pytest.mark.slow
def test_a_command_that_trained_nothing_does_not_hold_its_folder(images, tmp_path, capsys, monkeypatch):
    def refuses(*args, **kwargs):
        commands.write_atomic(tmp_path/'run'/'study.json', json.dumps(dict(settings=dict(options=commands.settings_of(dict(lr=.5))))))
        raise ValueError('refused')
    (tmp_path/'run').mkdir()
    real = commands.distillation_study
    monkeypatch.setattr(commands, 'distillation_study', refuses)
    assert kdmed(capsys, *distill(images, tmp_path/'run', '--lr', '.5'))[0]==2 and (tmp_path/'run'/'study.json').exists()
    monkeypatch.setattr(commands, 'distillation_study', real)
    status,_,err = kdmed(capsys, *distill(images, tmp_path/'run'))
    assert status==0, err


def test_resplit_ignores_a_split_column_that_is_partly_blank(leaking, tmp_path, capsys):
    rows = [(f.relative_to(leaking).as_posix(), f.parent.name, f.name.split('_')[0], f.parts[-3]) for f in sorted(leaking.rglob('*.png'))]
    table = pd.DataFrame(rows, columns=['image', 'label', 'group', 'split'])
    table.loc[3, 'split'] = ''
    table.to_csv(tmp_path/'list.csv', index=False)
    how = '--dataset', 'csv', '--images', leaking, '--size', '32', '--no-copies', '--teacher', 'test_resnet'
    status,_,err = kdmed(capsys, 'check', tmp_path/'list.csv', *how)
    assert status==2 and '1 of 90 rows have no split' in err and 'use --resplit to split all images by groups' in err, err
    status,out,err = kdmed(capsys, 'check', tmp_path/'list.csv', *how, '--resplit')
    assert status==0 and 'Split by groups: ' in out+err, err


@pytest.mark.slow
def test_resplit_of_dicom_files_ignores_a_split_column_that_is_partly_blank(tmp_path, capsys):
    pydicom = pytest.importorskip('pydicom')
    table = synthetic_table(n=60, classes=2, size=32)
    for i,row in table.iterrows():
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.SOPClassUID,ds.SOPInstanceUID,ds.PatientID = '1.2.840.10008.5.1.4.1.1.2',f'1.2.{i}',row.group
        ds.Rows,ds.Columns,ds.SamplesPerPixel,ds.PhotometricInterpretation = 32,32,1,'MONOCHROME2'
        ds.BitsAllocated,ds.BitsStored,ds.HighBit,ds.PixelRepresentation = 16,16,15,0
        ds.PixelData = row.image[..., 1].astype('uint16').tobytes()
        (tmp_path/'films').mkdir(exist_ok=True)
        ds.save_as(tmp_path/f'films/{i}.dcm', enforce_file_format=True)
    splits = ['', *['train', 'valid', 'test']*20][:60] # groups are in several splits, and one row is blank
    listed = pd.DataFrame(dict(image=[str(i) for i in table.index], label=table.label, split=splits))
    listed.to_csv(tmp_path/'list.csv', index=False)
    how = ['distill', '--data', tmp_path/'films', '--dataset', 'dicom', '--labels', tmp_path/'list.csv', *SMALL]
    status,_,err = kdmed(capsys, *how, '--out', tmp_path/'run')
    assert status==2 and '1 of 60 rows have no split' in err and 'use --resplit to split all images by groups' in err, err
    status,out,err = kdmed(capsys, *how, '--out', tmp_path/'run', '--resplit')
    assert status==0 and 'Split by groups: ' in out+err, err


def test_a_file_where_class_folders_are_expected_names_the_data_sets_that_are_files(tmp_path, capsys):
    (tmp_path/'list.csv').write_text('image,label\n')
    status,_,err = kdmed(capsys, 'check', tmp_path/'list.csv')
    assert status==2 and 'give --dataset csv for a list of images' in err and '--dataset medmnist' in err, err


def test_check_shows_a_split_without_validation_images_and_says_that_it_is_refused(tmp_path, capsys):
    data = write_images(tmp_path/'images', parts=('train', 'test'))
    status,out,err = kdmed(capsys, 'check', data, '--size', '32', '--no-copies', '--teacher', 'test_resnet')
    assert status==0 and 'kdmed distill refuses this split: the split of the data has no valid images' in out and 'All 90 images can be read' in out, err


@pytest.mark.slow
def test_copies_are_listed_with_their_labels(leaking, tmp_path, capsys):
    import shutil
    data = tmp_path/'images'
    shutil.copytree(leaking, data)
    first,other = sorted(f.name for f in (data/'train').iterdir())
    source = next((data/'train'/first).iterdir())
    twins = data/'test'/first/'77_77.png',data/'test'/other/'78_78.png'
    for twin in twins: Image.open(source).transpose(Image.Transpose.ROTATE_90).save(twin)
    given = [c for c in distill(data, tmp_path/'run', '--allow-leakage', '--quiet') if c!='--no-copies']
    assert kdmed(capsys, *given)[0]==0
    pairs = pd.read_csv(tmp_path/'run'/'copies.csv')
    found = pairs[pairs.image_a==str(source)].set_index('image_b')[['label_a', 'label_b', 'split_a', 'split_b']]
    assert [tuple(found.loc[str(t)]) for t in twins]==[(first, first, 'train', 'test'), (first, other, 'train', 'test')]
    report = (tmp_path/'run'/'report.md').read_text()
    assert 'The pairs are listed in the folder of the run' in report and '77_77' not in report
    status,out,_ = kdmed(capsys, 'check', data, '--size', '32', '--allow-leakage', '--teacher', 'test_resnet')
    assert status==0 and f'{source} ({first}) and {twins[1]} ({other})' in out


def test_check_says_what_a_search_for_copies_would_take(images, capsys):
    status,out,_ = kdmed(capsys, 'check', images, '--group-pattern', r'(\d+)_', *SMALL)
    assert status==0 and 'were not looked for (--no-copies)' in out and 'To look for them would take about' in out


def test_images_whose_owners_are_unknown_are_told_of_with_the_options_that_tell(images, capsys):
    status,out,err = kdmed(capsys, 'check', images, *SMALL)
    assert status==0 and '--group-pattern or --groups FILE says which images belong together' in out+err


@pytest.mark.parametrize('more,said', [(['--data', 'nowhere'], '--data nowhere: no such file or folder'), (['--teacher-weights', 'no.pth'], '--teacher-weights no.pth: file not found'),
                                       (['--out', '/proc/run'], '--out /proc/run cannot be written to'), (['--groups', 'no.csv'], '--groups no.csv: file not found')])
def test_paths_are_looked_at_before_anything_heavy_is_imported(images, tmp_path, more, said):
    import subprocess, sys
    argv = [str(a) for a in distill(images, tmp_path/'run')]
    if more[0] in argv: argv[argv.index(more[0])+1] = more[1]
    else: argv += more
    code = f"import sys; from kdmed.cli import app as cli; print(cli.main({argv!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split()==['2', 'False'] and said in done.stderr, done.stderr


def test_a_folder_in_use_is_told_of_before_anything_heavy_is_imported(images, tmp_path):
    import subprocess, sys
    from kdmed.core.files import claim
    argv = [str(a) for a in distill(images, tmp_path/'run')]
    code = f"import sys; from kdmed.cli import app as cli; print(cli.main({argv!r}), 'torch' in sys.modules)"
    with claim(tmp_path/'run'): done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split()==['2', 'False'] and 'is in use: process' in done.stderr, done.stderr


def test_a_wrong_number_in_a_configuration_names_the_file(images, tmp_path, capsys):
    (tmp_path/'mine.toml').write_text('epochs = "many"\n')
    status,_,err = kdmed(capsys, 'distill', '--config', tmp_path/'mine.toml', '--data', images, '--out', tmp_path/'run')
    assert status==2 and 'epochs' in err and f"expected a whole number, got many in {tmp_path/'mine.toml'}" in err
