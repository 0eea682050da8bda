"""Each line of `kdmed.losses` is broken once, and a lesson of its notebook must notice.

The lessons are the code cells of `nbs/30_losses.ipynb` that are not exported. They run, in order, on the
exported module after one bug was planted in it by text replacement.
"""
import json, re, types
from pathlib import Path

import matplotlib
import pytest
from torch.autograd.gradcheck import GradcheckError

matplotlib.use('Agg')

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT/'kdmed/losses.py').read_text(encoding='utf-8')
SKIPPED = re.compile(r'^#\|\s*(export|default_exp|cuda|slow|notest|eval:\s*false)|= figure\(', re.M) # figures assert nothing

SAME_SHAPE = r'    check_same_shape\(.*\)\n'
CLASSES = r'    _check_classes\(.*\)\n'
TEMPERATURE = r'    _check_temperature\(temperature\)\n'
T2 = re.escape(' * temperature**2')

# function, what is wrong, pattern in its source, replacement
BUGS = [
    ('_promote', 'half precision is kept', r't\.float\(\)', 't'),
    ('_promote', 'float64 is truncated', r't if .* else t\.float\(\)', 't.float()'),
    ('_check_temperature', 'zero is accepted', '0 <', '0 <='),
    ('_check_temperature', 'a negative is accepted', '0 < temperature', 'temperature'),
    ('_check_temperature', 'infinity is accepted', '< math.inf', ''),
    ('_check_classes', 'one logit is accepted', r'shape\[1\]<2', 'shape[1]<1'),
    ('_check_classes', 'the way out is not named', r' use \{instead\}', ''),

    ('soft_target_loss', 'τ² is dropped', T2, ''),
    ('soft_target_loss', 'τ² is only τ', r'temperature\*\*2', 'temperature'),
    ('soft_target_loss', 'the divergence is reversed', r'student_logits, teacher_logits\)\)', 'teacher_logits, student_logits))'),
    ('soft_target_loss', 'divided by batch × classes', r"'batchmean', log_target=True\)", "'none', log_target=True).mean()"),
    ('soft_target_loss', 'summed over the batch', "'batchmean'", "'sum'"),
    ('soft_target_loss', 'softmax over the batch', 'dim=1', 'dim=0'),
    ('soft_target_loss', 'log of a clamped probability', r'F\.log_softmax\(z/temperature, dim=1\)',
        'F.softmax(z/temperature, dim=1).clamp(1e-7).log()'),
    ('soft_target_loss', 'log of a probability',
        r'F\.log_softmax\(z/temperature, dim=1\)', 'F.softmax(z/temperature, dim=1).log()'),
    ('soft_target_loss', 'log-targets are taken for probabilities', 'log_target=True', 'log_target=False'),
    ('soft_target_loss', 'the teacher is not softened', r'\(F\.log_softmax\(z/temperature, dim=1\) for z in (.*)\)\n',
        r'(F.log_softmax(z/tau, dim=1) for z,tau in zip(\1, (temperature, 1)))' + '\n'),
    ('soft_target_loss', 'the default temperature changes', 'temperature:float=4.', 'temperature:float=3.'),
    ('soft_target_loss', 'half precision is kept', r'_promote\(', '('),
    ('soft_target_loss', 'shapes broadcast', SAME_SHAPE, ''),
    ('soft_target_loss', 'softmax over one logit', CLASSES, ''),
    ('soft_target_loss', 'any temperature goes', TEMPERATURE, ''),

    ('bernoulli_soft_target_loss', 'τ² is dropped', T2, ''),
    ('bernoulli_soft_target_loss', 'τ² is only τ', r'temperature\*\*2', 'temperature'),
    ('bernoulli_soft_target_loss', 'the divergence is reversed', r's,t = ', 't,s = '),
    ('bernoulli_soft_target_loss', 'absent labels are forgotten', r'\(present \+ absent\)', 'present'),
    ('bernoulli_soft_target_loss', 'present labels are forgotten', r'\(present \+ absent\)', 'absent'),
    ('bernoulli_soft_target_loss', 'absence weighs as presence', r'\(-t\)\.sigmoid', 't.sigmoid'),
    ('bernoulli_soft_target_loss', 'summed over labels', r'\.mean\(\)', '.sum(-1).mean()'),
    ('bernoulli_soft_target_loss', 'log of a clamped probability', r'F\.logsigmoid\(s\)', 's.sigmoid().clamp(1e-7).log()'),
    ('bernoulli_soft_target_loss', 'log of a probability', r'F\.logsigmoid\(-s\)', '(1 - s.sigmoid()).log()'),
    ('bernoulli_soft_target_loss', 'the teacher is not softened',
        r's,t = .*\n', 's,t = _promote(student_logits/temperature, teacher_logits)\n'),
    ('bernoulli_soft_target_loss', 'softmax over the labels', r'F\.logsigmoid\(s\)', 'F.log_softmax(s, dim=-1)'),
    ('bernoulli_soft_target_loss', 'the default temperature changes', 'temperature:float=4.', 'temperature:float=3.'),
    ('bernoulli_soft_target_loss', 'half precision is kept', r'_promote\(', '('),
    ('bernoulli_soft_target_loss', 'shapes broadcast', SAME_SHAPE, ''),
    ('bernoulli_soft_target_loss', 'any temperature goes', TEMPERATURE, ''),

    ('hint_loss', 'a stray ½', r'return ', 'return .5*'),
    ('hint_loss', 'summed', r'teacher_features\)\)', "teacher_features), reduction='sum')"),
    ('hint_loss', 'summed over each image',
        r'F\.mse_loss\((.*)\)\n', r'F.mse_loss(\1, reduction="sum") / len(student_features)' + '\n'),
    ('hint_loss', 'absolute error', 'mse_loss', 'l1_loss'),
    ('hint_loss', 'half precision is kept', r'_promote\(', '('),
    ('hint_loss', 'shapes broadcast', SAME_SHAPE, ''),

    ('_column_weights', 'weights are ignored', r'if class_weights is None: ', ''),
    ('_column_weights', 'any number of weights goes', r'if weights\.shape == .*: ', ''),
    ('_focus', 'γ is ignored', r'gamma\*log_rest', 'log_rest'),
    ('_focus', 'γ is doubled', r'gamma\*log_rest', '2*gamma*log_rest'),
    ('_focus', 'the factor is held constant', r'\.exp\(\)', '.exp().detach()'),
    ('_focus', 'the formula as it stands', r'\(gamma\*log_rest\)\.exp\(\)', '(1 - log_p.exp())**gamma'),
    ('_focus', 'easy images are turned up', 'gamma\\*log_rest', 'gamma*log_p'),
    ('_focus', 'a negative γ is accepted', r'    if not gamma.*\n', ''),

    ('focal_loss', 'class weights are dropped', r'_column_weights\(class_weights, log_p\)\[y\] \* ', ''),
    ('focal_loss', 'divided by the sum of the weights', r'return \((.*)\)\.mean\(\)',
        r'return (\1).sum() / _column_weights(class_weights, log_p)[y].sum()'),
    ('focal_loss', 'summed over the batch', r'\.mean\(\)', '.sum()'),
    ('focal_loss', 'a stray ½', r'return ', 'return .5*'),
    ('focal_loss', 'the default γ changes', 'gamma:float=2.', 'gamma:float=1.'),
    ('focal_loss', 'the rest includes the true class', r'log_p\.scatter\(1, y, -math\.inf\)', 'log_p'),
    ('focal_loss', 'the rest is its largest class', r'\.logsumexp\(1', '.amax(1'),
    ('focal_loss', 'weights follow the prediction', r'log_p\)\[y\]', 'log_p)[log_p.argmax(1, keepdim=True)]'),
    ('focal_loss', 'log of a clamped probability', r'F\.log_softmax\(\*_promote\(logits\), dim=1\)',
        'F.softmax(_promote(logits)[0], dim=1).clamp(1e-7).log()'),
    ('focal_loss', 'half precision is kept', r'\*_promote\(logits\)', 'logits'),
    ('focal_loss', 'softmax over one logit', CLASSES, ''),
    ('focal_loss', 'fewer targets than images are accepted', r'targets\.shape!=logits\.shape\[:1\] or ', ''),
    ('focal_loss', 'float targets are accepted', r' or targets\.is_floating_point\(\)', ''),

    ('inverse_frequency_weights', 'the number of classes is forgotten', r'\(len\(n\)\*n\)', 'n'),
    ('inverse_frequency_weights', 'averaged over classes instead of images',
        r'\(n\.sum\(\) / \(len\(n\)\*n\)\)', '(len(n) / n / (1/n).sum())'),
    ('inverse_frequency_weights', 'root of the frequency', r'len\(n\)\*n\)', 'len(n)*n).sqrt()'),
    ('inverse_frequency_weights', 'frequency instead of its inverse', r'n\.sum\(\) / \(len\(n\)\*n\)', 'len(n)*n / n.sum()'),
    ('inverse_frequency_weights', 'an empty class is accepted', 'count > 0', 'count >= 0'),
    ('inverse_frequency_weights', 'one number is accepted', r'    if n\.ndim.*\n', '    n = n.reshape(-1)\n'),

    ('bernoulli_focal_loss', 'absences are forgotten', r' \+ \(1-targets\).*', ''),
    ('bernoulli_focal_loss', 'presences are forgotten', r'targets\*_focus\(.*?\) \+ ', ''),
    ('bernoulli_focal_loss', 'absences are turned down the wrong way',
        r'_focus\(log_rest, log_p, gamma\)', '_focus(log_rest, log_rest, gamma)'),
    ('bernoulli_focal_loss', 'targets are exchanged',
        r'targets\*_focus\(log_p, log_rest, gamma\)', 'targets*_focus(log_rest, log_p, gamma)'),
    ('bernoulli_focal_loss', 'class weights are dropped', r'_column_weights\(class_weights, logits\) \* ', ''),
    ('bernoulli_focal_loss', 'class weights reach presences only', r'_column_weights\(class_weights, logits\) \* loss',
        '(1 + (_column_weights(class_weights, logits)-1)*targets) * loss'),
    ('bernoulli_focal_loss', 'divided by the sum of the weights',
        r'\.mean\(\)', '.mean() / _column_weights(class_weights, logits).mean()'),
    ('bernoulli_focal_loss', 'summed over labels', r'\.mean\(\)', '.sum(-1).mean()'),
    ('bernoulli_focal_loss', 'the default γ changes', 'gamma:float=2.', 'gamma:float=1.'),
    ('bernoulli_focal_loss', 'log of a probability', r'F\.logsigmoid\(-logits\)', '(1 - logits.sigmoid()).log()'),
    ('bernoulli_focal_loss', 'half precision is kept', r'_promote\(logits, targets\)', '(logits, targets.to(logits))'),
    ('bernoulli_focal_loss', 'shapes broadcast', SAME_SHAPE, ''),

    ('hard_token_loss', 'the least likely class', 'argmax', 'argmin'),
    ('hard_token_loss', 'the token decides',
        r'F\.cross_entropy\(.*', 'F.cross_entropy(*_promote(teacher_logits), token_logits.argmax(1))'),
    ('hard_token_loss', 'soft instead of hard',
        r'teacher_logits\.argmax\(1\)', 'teacher_logits.float().softmax(1).to(_promote(token_logits)[0])'),
    ('hard_token_loss', 'a stray ½', r'return ', 'return .5*'),
    ('hard_token_loss', 'summed over the batch', r'argmax\(1\)', "argmax(1), reduction='sum'"),
    ('hard_token_loss', 'labels are smoothed', r'argmax\(1\)', 'argmax(1), label_smoothing=.1'),
    ('hard_token_loss', 'half precision is kept', r'\*_promote\(token_logits\)', 'token_logits'),
    ('hard_token_loss', 'softmax over one logit', CLASSES, ''),
    ('hard_token_loss', 'shapes broadcast', SAME_SHAPE, ''),

    ('bernoulli_hard_token_loss', 'logits are taken for probabilities', '>0', '>.5'),
    ('bernoulli_hard_token_loss', 'present and absent are exchanged', '>0', '<0'),
    ('bernoulli_hard_token_loss', 'soft instead of hard', r'\(teacher_logits>0\)', 'teacher_logits.sigmoid()'),
    ('bernoulli_hard_token_loss', 'the most likely label only', r'\(teacher_logits>0\)',
        '(teacher_logits == teacher_logits.amax(-1, keepdim=True))'),
    ('bernoulli_hard_token_loss', 'a stray ½', r'return ', 'return .5*'),
    ('bernoulli_hard_token_loss', 'summed over labels', r'return ', 'return logits.shape[-1]*'),
    ('bernoulli_hard_token_loss', 'half precision is kept', r'_promote\(token_logits\)\[0\]', 'token_logits'),
    ('bernoulli_hard_token_loss', 'shapes broadcast', SAME_SHAPE, ''),

    ('soft_token_loss', 'always divided by the classes', r' if divide_by_classes else loss', ''),
    ('soft_token_loss', 'never divided by the classes', r'loss/token_logits\.shape\[1\] if divide_by_classes else ', ''),
    ('soft_token_loss', 'divided by the classes by default', 'divide_by_classes:bool=False', 'divide_by_classes:bool=True'),
    ('soft_token_loss', 'divided by the batch once more', r'shape\[1\]', 'shape[0]'),
    ('soft_token_loss', 'the temperature is not passed on', r'teacher_logits, temperature\)', 'teacher_logits)'),
    ('soft_token_loss', 'the default temperature changes', 'temperature:float=3.', 'temperature:float=4.'),
    ('soft_token_loss', 'the divergence is reversed',
        r'soft_target_loss\(token_logits, teacher_logits', 'soft_target_loss(teacher_logits, token_logits'),
    ('soft_token_loss', 'an error speaks of a student', SAME_SHAPE, ''),
    ('soft_token_loss', 'softmax over one logit', CLASSES, '    if token_logits.shape[1]==1: return token_logits.sum()*0\n'),
]


def _function(name):
    "Where the source of function `name` starts and ends"
    return re.search(rf'^def {name}\(.*?(?=^def |^# %%|\Z)', SOURCE, re.M | re.S).span()


def plant(name, pattern, replacement):
    "The module's source with one bug in function `name`"
    start,end = _function(name)
    changed,n = re.subn(pattern, replacement, SOURCE[start:end])
    assert n==1, f'{pattern!r} occurs {n} times in {name}: has its source changed?'
    assert changed!=SOURCE[start:end]
    return SOURCE[:start] + changed + SOURCE[end:]


@pytest.fixture(scope='module')
def lessons():
    "The notebook's code cells that are not exported, compiled"
    cells = json.loads((ROOT/'nbs/30_losses.ipynb').read_text(encoding='utf-8'))['cells']
    sources = {i: ''.join(cell['source']) for i,cell in enumerate(cells) if cell['cell_type']=='code'}
    return {i: compile(source, f'30_losses.ipynb cell {i}', 'exec') for i,source in sources.items() if not SKIPPED.search(source)}


def first_failure(source, lessons):
    "(cell index, error) of the first lesson that fails on this source of the module; None if all hold"
    module = types.ModuleType('kdmed.planted')
    module.__package__ = 'kdmed'
    exec(compile(source, 'losses.py with a planted bug', 'exec'), vars(module))
    for i,lesson in lessons.items():
        try: exec(lesson, vars(module))
        except Exception as error: return i,error


def test_lessons_hold_without_a_bug(lessons):
    assert len(lessons) > 30
    assert first_failure(SOURCE, lessons) is None


@pytest.mark.filterwarnings('ignore:Using a target size')
@pytest.mark.parametrize('name,pattern,replacement', [(f,p,r) for f,_,p,r in BUGS], ids=[f'{f}: {what}' for f,what,_,_ in BUGS])
def test_a_lesson_sees(name, pattern, replacement, lessons):
    failure = first_failure(plant(name, pattern, replacement), lessons)
    assert failure is not None, 'no lesson sees this bug'
    i,error = failure
    assert isinstance(error, (AssertionError, GradcheckError)), f'cell {i} did not fail, it crashed: {error!r}'


def test_every_function_has_a_bug():
    assert {name for name,*_ in BUGS} == set(re.findall(r'^def (\w+)', SOURCE, re.M))
