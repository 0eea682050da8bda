"""Package and notebooks agree.

The exported cells of a notebook and the cells of its module are compared as text, always. With --lessons (`make coverage`), each
notebook also runs with its exported cells replaced by imports from the installed module: its lessons then test, and cover, the package.
`nbdev-test` runs the notebooks as they are.
"""
import ast, importlib, re
from types import SimpleNamespace

import pytest
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.test import nb_test_cells

from conftest import ROOT

EXPORTS = {'export', 'exporti', 'exports'}

def default_exp(nb):
    "The module that notebook `nb` exports to, or None"
    return next((c.directives_['default_exp'] for c in nb.cells if 'default_exp' in c.directives_), None)

def read(path): return NBProcessor(path).nb
def exported(nb): return [c for c in nb.cells if c.cell_type == 'code' and EXPORTS & c.directives_.keys()]

NOTEBOOKS = [p for p in sorted((ROOT/'nbs').glob('*/*.ipynb')) if default_exp(read(p))]
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: f'{p.parent.name}/{p.stem}')

def module_cells(path):
    "{cell id: code} of an exported module"
    cells = path.read_text(encoding='utf-8').split('\n# %% ')[1:]
    found = (re.match(r'(\S+) #(\S+)\n(.*)', c, re.S).groups() for c in cells)
    return {i: code.strip('\n') for source,i,code in found if source != 'auto'}

@each_notebook
def test_module_holds_the_exported_cells(path):
    nb = read(path)
    module = ROOT/'kdmed'/f'{default_exp(nb).replace(".", "/")}.py'
    assert module.exists(), f'{path.name} has no module: run nbdev-export'
    package = module.relative_to(ROOT).parent.parts
    def absolute(found): return f"from {'.'.join([*package[:len(package)+1-len(found[1])], *([found[2]] if found[2] else [])])} import"
    def code(source): return re.sub(r'(?<![.\w])from (\.+)([\w.]*) import', absolute, source.strip('\n'))
    assert {i: code(s) for i,s in module_cells(module).items()} == {c.id: code(c.source) for c in exported(nb) if c.source.strip()}, \
        f'kdmed/{module.name} is not what {path.name} exports: run nbdev-export'

@each_notebook
def test_notebook_exports_to_its_own_module_only(path):
    elsewhere = [c.source for c in exported(read(path)) for d in EXPORTS & c.directives_.keys() if c.directives_[d]]
    assert not elsewhere, f'{path.name} exports to another module; one notebook is one module:\n' + '\n\n'.join(elsewhere)

def test_every_module_has_a_notebook():
    modules = {'.'.join(p.relative_to(ROOT/'kdmed').with_suffix('').parts) for p in (ROOT/'kdmed').rglob('[!_]*.py')}
    orphans = modules - {default_exp(read(p)) for p in NOTEBOOKS}
    assert not orphans, f'kdmed/ has modules that no notebook exports: {sorted(orphans)}; delete them'

# -- lessons against the package

def bound_names(code):
    "Names that `code` binds at its top level, in order"
    def names(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)): yield from ((a.asname or a.name).split('.')[0] for a in node.names)
        elif isinstance(node, ast.Name): yield from ([node.id] if isinstance(node.ctx, ast.Store) else [])
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            for child in ast.iter_child_nodes(node): yield from names(child)
    return list(dict.fromkeys(names(ast.parse(code))))

def as_import(code, module):
    "The import from `module` that binds what `code` binds"
    names = [n for n in bound_names(code) if hasattr(module, n)]
    return f"from {module.__name__} import {', '.join(names)}" if names else ''

def test_as_import_binds_what_the_cell_binds():
    code = 'import os.path, numpy as np\nA,(B,c) = 1,(2,[x for x in ()])\ntry: D = 1\nexcept E as e: pass\ndef f(z): y = 1\nclass G: h = 1'
    assert bound_names(code) == ['os', 'np', 'A', 'B', 'c', 'D', 'f', 'G']
    module = SimpleNamespace(__name__='kdmed.some', f=1, D=2)
    assert as_import(code, module) == 'from kdmed.some import D, f'
    assert as_import('print(1)', module) == ''

@pytest.mark.lessons
@each_notebook
def test_lessons_hold_for_the_package(path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    config = get_config(ROOT)
    runs = {c.id for c in nb_test_cells(path, skip_flags=config.tst_flags.split())}
    nb = NBProcessor(path, rm_directives=False).nb
    module = importlib.import_module(f'kdmed.{default_exp(nb)}'.removesuffix('.__init__'))
    for cell in exported(nb): cell.source = as_import(cell.source, module)
    shell = CaptureShell(path)
    try:
        with working_directory(path.parent):
            shell.run_all(nb, exc_stop=True, preproc=lambda c: c.id not in runs, cell_timeout=config.cell_timeout)
    finally: shell.close()

PAGES = sorted([*(ROOT/'nbs').glob('papers/*.ipynb'), *(ROOT/'nbs').glob('tutorials/*.ipynb')])

@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_page_runs_where_its_badges_lead(path):
    "Colab and Kaggle open the notebook itself: every cell is Python, and one of the first installs kdmed"
    nb,translate = read(path),TransformerManager().transform_cell
    for cell in nb.cells:
        if cell.cell_type == 'code': ast.parse(translate(cell.source))
    badges = nb.cells[1].source
    assert all(site in badges and f'nbs/{path.parent.name}/{path.name}' in badges for site in ('colab.research.google.com/github/', 'kaggle.com/kernels/welcome?src='))
    assert any(re.search(r"^\s+%pip install -q (kdmed|'kdmed\[[\w,]+\]')$", c.source, re.M) for c in nb.cells[:4]), 'no cell installs kdmed'
