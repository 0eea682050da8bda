"""Each line of the loss modules is broken once, and the rest of the engine in the ways that distillation code is known for; a lesson of the module's notebook must notice.

`planted_NAME.py` lists bugs for the module `kdmed.NAME`: (function, what is wrong, pattern in its source, replacement). The lessons are
the code cells of its notebook that are not exported. They run, in order, on the module's source with one bug in it, until one fails.
"""
import importlib, json, re, sys, traceback, types
from functools import cache

import matplotlib
import matplotlib.pyplot as plt
import pytest
from torch.autograd.gradcheck import GradcheckError

from conftest import ROOT
from engine_bugs import ENGINE_BUGS

matplotlib.use('Agg')

SKIPPED = re.compile(r'^#\|\s*(export|default_exp|cuda|slow|notest|eval:\s*false)', re.M)
MODULES = sorted(p.stem.removeprefix('planted_') for p in (ROOT/'tests').glob('planted_*.py'))
BUGS = [(module, *bug) for module in MODULES for bug in importlib.import_module(f'planted_{module}').BUGS]
each_module = pytest.mark.parametrize('module', MODULES)


def file_of(module):
    "The file of a module, of which there is one by this name"
    found, = (ROOT/'kdmed').glob(f'*/{module}.py')
    return found

@cache
def source(module): return file_of(module).read_text(encoding='utf-8')


@cache
def lessons(module):
    "The cells of the module's notebook that are not exported, by their index"
    notebook, = (p for p in (ROOT/'nbs').glob('*/*.ipynb') if re.fullmatch(rf'\d+_{module}', p.stem))
    cells = enumerate(json.loads(notebook.read_text(encoding='utf-8'))['cells'])
    sources = {i: ''.join(cell['source']) for i,cell in cells if cell['cell_type']=='code'}
    return {i: code for i,code in sources.items() if not SKIPPED.search(code)}


def plant(module, name, pattern, replacement):
    "The module's source with one bug in function `name`"
    code = source(module)
    start,end = re.search(rf'^def {name}\(.*?(?=^def |^# %%|\Z)', code, re.M | re.S).span()
    changed,n = re.subn(pattern, replacement, code[start:end])
    assert n==1, f'{pattern!r} occurs {n} times in {name}: has its source changed?'
    assert changed!=code[start:end]
    return code[:start] + changed + code[end:]


@cache
def compiled(lesson): return compile(lesson, 'lesson', 'exec')


def first_failure(code, lessons, wing):
    "(cell index, error, line) of the first lesson that fails on this source of a module; None if all hold"
    module = sys.modules['kdmed.planted'] = types.ModuleType('kdmed.planted') # where a pickle looks for its classes
    module.__package__ = f'kdmed.{wing}'
    exec(compile(code, 'a module with a planted bug', 'exec'), vars(module))
    for i,lesson in lessons.items():
        try: exec(compiled(lesson), vars(module))
        except Exception as error:
            number = next(frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename=='lesson')
            return i,error,lesson.splitlines()[number-1]
        finally: plt.close('all')


@each_module
def test_lessons_hold_without_a_bug(module):
    assert len(lessons(module)) > 10
    assert first_failure(source(module), lessons(module), file_of(module).parent.name) is None


@each_module
def test_every_function_has_a_bug(module):
    assert {name for m,name,*_ in BUGS if m==module} == set(re.findall(r'^def (\w+)', source(module), re.M))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('module,name,pattern,replacement', [(m,f,p,r) for m,f,_,p,r in BUGS], ids=[f'{m}.{f}: {what}' for m,f,what,*_ in BUGS])
def test_a_lesson_sees(module, name, pattern, replacement):
    failure = first_failure(plant(module, name, pattern, replacement), lessons(module), file_of(module).parent.name)
    assert failure is not None, 'no lesson sees this bug'
    i,error,line = failure
    refusal = 'expect_fail' in line # a refusal was expected, by name, and another error came
    assert refusal or isinstance(error, (AssertionError, GradcheckError)), f'cell {i} did not fail, it crashed: {error!r} in {line!r}'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('module', list(dict.fromkeys(m for m,*_ in ENGINE_BUGS)))
def test_lessons_of_the_engine_hold_without_a_bug(module): assert first_failure(source(module), lessons(module), file_of(module).parent.name) is None


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('module,old,new', [(m,old,new) for m,_,old,new in ENGINE_BUGS], ids=[f'{m}: {what}' for m,what,*_ in ENGINE_BUGS])
def test_a_lesson_of_the_engine_sees(module, old, new):
    assert source(module).count(old)==1, f'{old!r} occurs {source(module).count(old)} times in {module}: has its source changed?'
    assert first_failure(source(module).replace(old, new), lessons(module), file_of(module).parent.name) is not None, 'no lesson sees this bug'
