"""Bugs are planted in the losses and in the engine of distillation, and a lesson of the module's notebook must fail.

Here, that they can be planted, and a sample. All of them: `python tests/mutation.py all`, a part of `make test-all`.
"""
import ast
import json
import subprocess
import sys

import pytest

import mutants
import mutation
from conftest import ROOT
from mutation_scores import EQUIVALENT, LEAST
from planted_bugs import BUGS

LOSSES = ['logit_losses', 'feature_losses', 'losses']
SAMPLE = 24 # bugs of each module of losses

SOURCE = '''
def softened(logits, temperature=4., weights=None):
    "Log probabilities"
    if weights is not None: logits = logits * weights
    return F.log_softmax(logits.detach() / temperature, dim=1)

def loss(student, teacher, temperature=4.):
    check(student, teacher)
    with torch.no_grad(): target = softened(teacher, temperature)
    return F.kl_div(softened(student, temperature), target, reduction='sum') * temperature**2

@patch
def update(self:Mean, student, rate=.5): self.steps += 1
'''

def keys(source): return {m.key for m in mutants.mutants(source)}

DIVIDED = 'logits.detach() / temperature'
SOFTMAX = f'F.log_softmax({DIVIDED}, dim=1)'
KL = "F.kl_div(softened(student, temperature), target, reduction='sum')"

@pytest.mark.parametrize('function, before, after', [
    ('softened', 'logits.detach()', 'logits'), ('softened', DIVIDED, 'logits.detach() * temperature'),
    ('softened', DIVIDED, 'logits.detach()'), ('softened', '1', '0'), ('softened', '4.0', '8.0'),
    ('softened', 'if weights is not None', '(never)'), ('softened', 'weights is not None', 'weights is None'),
    ('softened', SOFTMAX, f'F.softmax({DIVIDED}, dim=1)'), ('softened', SOFTMAX, f'F.softmax({DIVIDED}, dim=1).log()'),
    ('softened', SOFTMAX, f'F.log_softmax({DIVIDED})'), ('softened', SOFTMAX, DIVIDED),
    ('loss', 'check(student, teacher)', 'pass'), ('loss', "'sum'", "'mean'"), ('loss', '2', '3'),
    ('loss', 'with torch.no_grad()', '(without torch.no_grad())'), ('loss', 'temperature ** 2', 'temperature'),
    ('loss', KL, 'F.kl_div(softened(student, temperature), target)'), ('loss', f'{KL} * temperature ** 2', KL),
    ('loss', KL, "F.kl_div(target, softened(student, temperature), reduction='sum')"),
    ('loss', 'softened(teacher, temperature)', 'teacher'), ('Mean.update', 'self.steps += 1', 'pass')])
def test_what_can_be_wrong_is_planted(function, before, after): assert f'{function}: {before} → {after}' in keys(SOURCE)

def test_every_bug_changes_the_module_and_compiles():
    tree = ast.parse(SOURCE)
    for bug in mutants.mutants(SOURCE):
        planted = ast.fix_missing_locations(mutants.plant(tree, bug))
        compile(planted, 'planted', 'exec')
        assert ast.unparse(planted)!=ast.unparse(tree), bug.key
    assert ast.unparse(tree)==ast.unparse(ast.parse(SOURCE)), 'planting changed the original'

def test_line_breaks_and_comments_change_nothing():
    broken = SOURCE.replace('(logits.detach()', '( # a comment\n        logits.detach()')
    broken = broken.replace(' * temperature**2', ' * (temperature\n        **2)')
    assert keys(broken)==keys(SOURCE)

NAMED = [ # function, what is wrong, before, after; what the planted module holds
    ('loss', 'reversed', 'F.kl_div(_1, _2, ...)', 'F.kl_div(_2, _1, ...)', 'F.kl_div(target, softened(student, '),
    ('loss', 'τ² is dropped', '_1 * temperature**2', '_1', "reduction='sum')\n"),
    ('loss', 'not checked', 'check(...)', '', 'def loss(student, teacher, temperature=4.0):\n    pass\n'),
    ('loss', 'with gradients', 'with torch.no_grad(): ...', 'with torch.enable_grad(): ...', 'torch.enable_grad()'),
    ('loss', 'the default changes', 'temperature = 4.', 'temperature = 1.', 'teacher, temperature=1.0)'),
    ('softened', 'weighed twice', 'logits * weights', 'logits * weights**2', 'weights ** 2'),
    ('Mean.update', 'two steps', 'self.steps += 1', 'self.steps += 2', 'self.steps += 2')]

def named(source):
    "{what: module with that bug}, and what can no longer be planted"
    planted,lost = mutants.picked(source, [bug[:4] for bug in NAMED])
    modules = {bug.what: ast.unparse(mutants.plant(ast.parse(source), bug)) for bug in planted}
    return modules, [what for _,what,*_ in lost]

def test_bugs_named_one_by_one():
    modules,lost = named(SOURCE)
    assert not lost
    for _,what,_,_,text in NAMED: assert text in modules[what]

def test_a_renamed_variable_or_function_keeps_its_bugs():
    renamed = SOURCE.replace('weights', 'factors').replace('softened(', 'soft(')
    assert named(renamed)[1]==[]
    gone = SOURCE.replace('check(student, teacher)', 'pass').replace('temperature**2', 'temperature')
    assert named(gone)[1]==['τ² is dropped', 'not checked']

# -- the package

def test_nearly_all_bugs_can_still_be_planted():
    lost,known = mutation.lost_bugs()
    told = '\n'.join(f'{module}.{function}: {what}' for module,function,what in lost)
    assert len(lost) <= .03*known, f'mend these lines of tests/planted_bugs.py:\n{told}'

@pytest.mark.parametrize('module', LOSSES)
def test_every_function_of_the_losses_has_a_bug(module):
    source = mutation.source_of(module)
    assert mutants.functions(ast.parse(source)) <= {m.function for m in mutation.bugs_of(module, source)}

def test_a_bug_that_changes_nothing_is_a_bug_that_could_be_planted():
    known = {module: keys(mutation.source_of(module)) for module in EQUIVALENT}
    gone = [f'{module}: {key}' for module,listed in EQUIVALENT.items() for key in listed if key not in known[module]]
    listed = sum(map(len, EQUIVALENT.values()))
    assert len(gone) <= max(3, .1*listed), 'take out of tests/mutation_scores.py:\n' + '\n'.join(gone)

def test_every_module_with_bugs_has_a_score(): assert set(BUGS) <= set(LEAST)

@pytest.mark.slow(25)
def test_lessons_see_a_sample_of_bugs():
    "The same ones each time, most of them; a bug of the general kind that no lesson sees may be among them"
    command = [sys.executable, ROOT/'tests'/'mutation.py', 'try', *LOSSES, '--sample', str(SAMPLE), '--json']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode==0, done.stderr[-3000:]
    rows = [row for line in done.stdout.splitlines() for row in json.loads(line)['rows']]
    unseen = [r['key'] for r in rows if not r['seen']]
    assert len(rows)==3*SAMPLE and len(unseen) <= .1*len(rows), unseen
