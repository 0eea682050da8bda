"""Small scripts that once printed something wrong, kept in a folder beside the project: each prints what is right.

They skip where the folder is absent: each fault also has a test of its own, listed in tests/cases."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get('KDMED_FAULTS', Path(__file__).parents[2]/'shared/faults'))
SCRIPTS = {p.name[:2]: p for p in sorted(FOLDER.glob('[0-9][0-9]_*.py'))}
SCRIPT = Path(__file__).with_name('fault_scripts.py')


def own_lines(text): return [l for l in text.splitlines() if l.strip() and not l.startswith('warning: ')]
def verdicts(text): return dict(l.split(' -> ', 1) for l in own_lines(text) if ' -> ' in l)


def folder_teacher(text): assert re.search(r'stats = .*\D0?\.8\d*, 0?\.6\d*, 0?\.7\d*\D+0?\.1\d*, 0?\.1\d*, 0?\.1\d*\D', text)


def learner_statistics(text):
    "Accuracy does not depend on the loader, and the mean saved is that of the training"
    own,other = re.search(r'own loader ([\d.]+) \| loader with imagenet stats ([\d.]+)', text).groups()
    assert float(own) > .5 and abs(float(own)-float(other)) < .01
    saved = json.loads(re.search(r'student\.json mean: (\[.*\])', text)[1])
    assert saved == pytest.approx([.8, .6, .7], abs=1e-6)


def saved_with_tied_weights(text): assert not own_lines(text)


def auto_for_every_model(text):
    names = 'twins_pcpvt_small','mvitv2_tiny','pit_ti_224','tnt_s_patch16_224','hrnet_w18_small','hiera_tiny_224','coat_tiny'
    assert [l for l in own_lines(text) if l.split()[0] in names] == [f'{n} ok' for n in names]


def averaged_weights(text):
    kinds = 'state_dict_and_ema','model_ema','lightning','compiled_ddp','model_state_dict'
    assert verdicts(text) == dict.fromkeys(kinds, 'averaged weights')


def dicom_windows(text):
    "By the formulas of DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3, for the values 0, 585, …, 4095"
    rows = re.findall(r'^([A-Z_]+)( width 1)? \[([\d ]+)\]', text, re.M)
    step = [0]*4 + [255]*4
    assert {kind+width: [int(v) for v in values.split()] for kind,width,values in rows} == {
        'LINEAR': [0, 0, 0, 53, 202, 255, 255, 255], 'SIGMOID': [0, 1, 7, 60, 195, 248, 254, 255], 'LINEAR width 1': step, 'LINEAR_EXACT width 1': step}
    assert re.search(r'scan lines start at gray 0\b', text)


def teacher_outputs(text):
    "Feature maps are refused, logits are found wherever they are, and probabilities are never silently taken for logits"
    found = verdicts(text)
    assert re.match(r'(ValueError|TypeError) .*(list|feature)', found.pop('list')), text
    probabilities = found.pop('probabilities')
    assert 'probabilit' in probabilities or re.search(r'^(?!probabilities -> ).*probabilit', text, re.M), text
    assert found == dict.fromkeys(['dict', 'tuple', 'object'], 'trained, no word')


def gray_models(text): assert not verdicts(text)
def lists_are_read(text): assert not verdicts(text)


def no_validation_part(text):
    found = verdicts(text)
    assert 'official_split' in found['folders'] and re.search('group|patient', found['one_patient']), text
    assert re.search(r'way out: [1-9]\d* validation images', text)


def batch_of_one(text): assert not own_lines(text) or re.search(r'\bbs\b|batch', text) and re.search(r'BatchNorm|normaliz', text) and 'Traceback' not in text


def masks_are_no_images(text): assert 'mask' in text.lower() and re.search(r'\b6 images', text) and not re.search(r'\b12 images', text)
def optimizer_kept(text): assert own_lines(text)[-1] == '[]'


RIGHT = {'01': folder_teacher, '02': learner_statistics, '03': saved_with_tied_weights, '04': auto_for_every_model, '06': averaged_weights,
         '07': dicom_windows, '09': teacher_outputs, '12': gray_models, '14': lists_are_read, '15': no_validation_part, '16': batch_of_one,
         '17': masks_are_no_images, '18': optimizer_kept}


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
    "{number: what its script printed}"
    if not SCRIPTS: pytest.skip('the folder of scripts is not here: set KDMED_FAULTS to it')
    folder = tmp_path_factory.mktemp('faults')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, SCRIPT, *SCRIPTS.values()], cwd=folder, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode==0, done.stderr[-4000:]
    return {name[:2]: text for name,text in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.slow
@pytest.mark.parametrize('number', RIGHT)
def test_a_script_prints_the_right_thing(number, printed):
    if number not in printed: pytest.skip(f'there is no script {number} here')
    text = printed[number]
    assert 'Traceback' not in text, text
    RIGHT[number](text)


@pytest.mark.skipif(not SCRIPTS, reason='the folder of scripts is not here: set KDMED_FAULTS to it')
def test_every_script_has_an_expected_output():
    assert set(SCRIPTS) <= set(RIGHT), 'say in RIGHT what each script must print'
