"The project's promises to itself: nothing is said in two places that differ, and nothing is committed that should not be"
import ast, fnmatch, importlib, importlib.metadata, json, os, re, subprocess
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from conftest import ROOT
from readme import CODE

try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10

NBS = ROOT/'nbs'
NOTEBOOKS = [p for p in sorted(NBS.rglob('*.ipynb')) if not any(part[0] in '._' for part in p.relative_to(NBS).parts)]
MODULES = sorted((ROOT/'kdmed').rglob('[!_]*.py'))
WEIGHTS = {'.pt', '.pth', '.pkl', '.pickle', '.ckpt', '.safetensors', '.onnx', '.h5', '.bin', '.npy', '.npz', '.zip', '.gz', '.parquet'}
MAX_BYTES = 1_500_000

def name(path): return path.relative_to(ROOT).as_posix()
def read(path): return (ROOT/path).read_text(encoding='utf-8')
def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def code_of(path): return [''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code']
def python(source): return ast.parse(TransformerManager().transform_cell(source))
def flat(text): return ''.join(text.split())

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
each_module = pytest.mark.parametrize('path', MODULES, ids=name)

@pytest.fixture(scope='module')
def settings():
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

@pytest.fixture(scope='module')
def pyproject(): return tomllib.loads(read('pyproject.toml'))

def version(): return re.search(r'^__version__\s*=\s*[\'"]([^\'"]+)', read('kdmed/__init__.py'), re.M)[1]

# -- metadata

def test_settings_and_pyproject_agree(settings, pyproject):
    project = pyproject['project']
    there = {k: project[k] for k in ('name', 'description', 'requires-python')} | project['urls']
    here = {'name': settings['lib_name'], 'description': settings['description'], 'requires-python': f">={settings['min_python']}",
            'Repository': settings['git_url'], 'Documentation': settings['doc_host'] + settings['doc_baseurl']}
    assert there == here, 'settings.ini and [project] of pyproject.toml differ: change both'

def test_version_lives_in_the_package_only(settings, pyproject):
    assert 'version' not in settings, 'settings.ini holds a version: it lives in kdmed/__init__.py'
    assert 'version' in pyproject['project']['dynamic'], 'pyproject.toml must leave the version dynamic'
    again = [f for f in ('setup.py', 'settings.ini', 'pyproject.toml') if re.search(rf'^\W*version.*{re.escape(version())}', read(f), re.M)]
    assert not again, f'the version is written again in {again}: it lives in kdmed/__init__.py'

def test_changelog_tells_of_this_version():
    assert f'## [{version()}]' in read('CHANGELOG.md'), f'CHANGELOG.md has no section "## [{version()}]": add it'

def test_requirements_have_lower_bounds_only(settings):
    lists = {k: v.split() for k,v in settings.items() if k.endswith('requirements')}
    bad = [f'{k}: {r}' for k,rs in lists.items() for r in rs if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?(>=[\w.]+)?(;python_version>='3\.\d+')?", r)]
    assert not bad, f'write NAME or NAME>=VERSION, without spaces, other markers or upper pins: {bad}'

def test_installed_metadata_is_that_of_settings(settings):
    try: found = importlib.metadata.metadata('kdmed')
    except importlib.metadata.PackageNotFoundError: pytest.fail('kdmed is not installed here: run `make install` and use .venv')
    extras = {k[:-len('_requirements')]: v.split() for k,v in settings.items() if k.endswith('_requirements')}
    def with_extra(r, e): return f'{r}andextra=="{e}"' if ';' in r else f'{r};extra=="{e}"'
    wanted = set(settings['requirements'].split()) | {with_extra(r, e) for e,rs in extras.items() for r in rs}
    wanted = {r.replace("'", '"') for r in wanted}
    installed = {flat(r).replace("'", '"') for r in found.get_all('Requires-Dist')}
    assert installed == wanted, 'the dependencies installed are not those of settings.ini: run `make install`'
    assert found['License-Expression'] == 'Apache-2.0', 'run `make install`; if that does not help, mend license in setup.py'
    points = {(p.group, p.name): p.value for p in importlib.metadata.distribution('kdmed').entry_points}
    wanted = {('console_scripts', 'kdmed'): 'kdmed.cli:main', ('nbdev', 'kdmed'): 'kdmed._modidx:d'}
    assert points == wanted, 'run `make install`; if that does not help, mend entry_points in setup.py'

# -- site

def test_quarto_config_is_a_link():
    link = NBS/'_quarto.yml'
    assert link.is_symlink() and os.readlink(link) == '../_quarto.yml', 'make it one: ln -sfn ../_quarto.yml nbs/_quarto.yml'

def sidebar():
    "Contents of all sidebars, in order"
    return [item for bar in yaml.safe_load(read('_quarto.yml'))['website']['sidebar'] for item in bar['contents']]

def sidebar_pages(contents):
    "Notebooks named in a Quarto sidebar, in order"
    for item in contents:
        if isinstance(item, str): yield item
        else: yield from ([item['href']] if 'href' in item else []) + list(sidebar_pages(item.get('contents', [])))

def test_sidebar_lists_every_notebook_once():
    listed = list(sidebar_pages(sidebar()))
    there = [p.relative_to(NBS).as_posix() for p in NOTEBOOKS]
    assert len(listed) == len(set(listed)), 'the sidebar in _quarto.yml names a notebook twice'
    assert not set(there) - set(listed), f'add to the sidebar in _quarto.yml: {sorted(set(there) - set(listed))}'
    assert not set(listed) - set(there), f'take out of the sidebar in _quarto.yml, or write: {sorted(set(listed) - set(there))}'

def test_sidebar_sections_keep_their_order():
    sections = {i['section']: i['contents'] for i in sidebar() if isinstance(i, dict)}
    order = ['Tutorials', 'Papers', 'API', 'Explanations']
    assert list(sections) == [s for s in order if s in sections], f'sidebar sections in _quarto.yml must be among {order}, in that order; got {list(sections)}'
    assert [s['href'] for s in sections['API']] == [f'{w}/index.ipynb' for w in WINGS], 'the wings stand in the order of their imports'
    for wing in sections['API']: assert wing['contents'] == sorted(wing['contents']), f"{wing['section']}: by number"

# -- modules and notebooks

WINGS = 'core', 'data', 'models', 'train', 'distill', 'evaluate', 'baselines', 'ship', 'studies', 'cli'
IN_WINGS = [p for p in NOTEBOOKS if p.parent.name in WINGS]

def place(path):
    "(wing, number) of a notebook; the front door of a wing is behind all its rooms"
    return WINGS.index(path.parent.name), 100 if path.stem == 'index' else int(path.name.split('_')[0])

def places():
    "{module: place of the notebook that exports it}"
    found = ((p, re.search(r'^#\|\s*default_exp\s*:?\s*(\S+)', '\n'.join(code_of(p)), re.M)) for p in IN_WINGS)
    return {f'kdmed.{exp[1]}'.removesuffix('.__init__'): place(p) for p,exp in found if exp}

def kdmed_imports(tree):
    "Names of the kdmed modules that `tree` imports"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and re.fullmatch(r'kdmed(\.\w+)?', node.module or ''):
            names = [f'{node.module}.{a.name}' if (ROOT/node.module.replace('.', '/')/f'{a.name}.py').is_file() else node.module for a in node.names]
        elif isinstance(node, ast.ImportFrom): names = [node.module or '']
        else: continue
        yield from (n for n in names if n.startswith('kdmed.'))

@pytest.mark.parametrize('path', IN_WINGS, ids=name)
def test_imports_point_down(path):
    known,own = places(),place(path)
    wrong = {m for source in code_of(path) for m in kdmed_imports(python(source)) if known[m] >= own}
    assert not wrong, f'{name(path)} imports {sorted(wrong)}: a notebook imports only from wings below its own ({", ".join(WINGS)}) and from lower numbers of its own wing'

def test_every_wing_has_a_front_door():
    assert {p.parent.name for p in NBS.glob('*/index.ipynb')} == set(WINGS) == {p.parent.name for p in NBS.glob('*/[0-9]*.ipynb')}

def public(path):
    "{name: object} of what a module exports"
    module = importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'))
    return {n: getattr(module, n) for n in module.__all__}

def test_no_name_has_two_meanings():
    "Star-imports of any two modules, in any order, give the same"
    meanings = {}
    for path in [*MODULES, *(ROOT/'kdmed').glob('*/__init__.py')]:
        if path.name == '__init__.py' and '__all__' not in path.read_text(encoding='utf-8'): continue
        for n,value in public(path).items(): meanings.setdefault(n, []).append((name(path), value))
    two = {n: [f for f,_ in found] for n,found in meanings.items() if any(v is not found[0][1] for _,v in found)}
    assert not two, f'names with two meanings: {two}'

@each_module
def test_module_says_what_it_exports(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    stars = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*']
    assert not stars, f'{name(path)} star-imports {stars}: import names'
    exports = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__']
    assert exports and ast.literal_eval(exports[0]), f'{name(path)} has no __all__, or an empty one: mark its public cells `#| export`'

@each_notebook
def test_notebook_is_small(path):
    size = path.stat().st_size
    assert size <= MAX_BYTES, f'{name(path)} has {size/1e6:.1f} MB, at most {MAX_BYTES/1e6} allowed: save fewer or smaller figures'

@each_notebook
def test_notebook_holds_no_error_or_warning(path):
    bad = [f"cell {i} ({o.get('name') or o.get('ename')})" for i,c in enumerate(cells(path)) for o in c.get('outputs', [])
           if o['output_type'] == 'error' or o.get('name') == 'stderr']
    assert not bad, f'{name(path)} holds errors or warnings in {bad}: mend what causes them and run `make prepare`'

# -- what is committed

def committed():
    "Files git tracks or would track; outside a git checkout, those .gitignore does not name"
    def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True)
    try: inside = Path(git('rev-parse', '--show-toplevel').stdout.strip() or '.') == ROOT
    except FileNotFoundError: inside = False
    if inside: found = [ROOT/f for f in git('ls-files', '-co', '--exclude-standard', '-z').stdout.split('\0') if f]
    else:
        rules = ['.git'] + [l.rstrip('/') for l in read('.gitignore').splitlines() if l and l[0] != '#']
        def ignored(p): return any(fnmatch.fnmatch(part, r) for part in p.parts for r in rules) or p.as_posix() in rules
        found = [p for p in ROOT.rglob('*') if not ignored(p.relative_to(ROOT))]
    return sorted(p for p in found if p.is_file())

def texts():
    "(name, text) of the committed files that are text"
    for path in committed():
        try: yield name(path), path.read_text(encoding='utf-8')
        except UnicodeDecodeError: pass

def lines_with(pattern):
    "file:line of committed text in which `pattern` occurs"
    return [f'{f}:{text.count(chr(10), 0, m.start())+1} {m[0]}' for f,text in texts() for m in re.finditer(pattern, text)]

def test_no_weights_or_data_are_committed():
    def is_result(p): return p.suffix=='.npz' and name(p).startswith('results/') # predictions that tables are made from
    big = [f'{name(p)} ({p.stat().st_size/1e6:.1f} MB)' for p in committed()
           if (p.suffix in WEIGHTS and not is_result(p)) or (p.stat().st_size > MAX_BYTES and p.suffix != '.ipynb')]
    assert not big, f'weights, data or large files: {big}; keep them out of git (runs/ is ignored)'

@pytest.mark.parametrize('path', sorted((ROOT/'nbs'/'tutorials').glob('*.ipynb')), ids=name)
def test_a_reader_with_larger_settings_meets_no_check_of_this_pages_numbers(path):
    "Hidden checks of what the text says hold for the small settings alone, with which the page is built"
    code = code_of(path)
    if not any('IN_TEST' in c and 'small =' in c for c in code): return
    checks = [c for c in code if c.startswith('#| hide') and 'assert ' in c]
    assert all('\nif small:' in c for c in checks), [c[:200] for c in checks if '\nif small:' not in c]

def test_results_are_tables_and_no_images():
    "Files of NumPy in results hold one row of numbers for each image, and nothing that has to be unpickled"
    for path in ROOT.glob('results/**/*.npz'):
        with np.load(path, allow_pickle=False) as found: assert all(found[k].ndim<=2 for k in found), name(path)

def test_no_path_of_one_machine_is_committed():
    found = lines_with(r'(?<![\w.:~-])/(?:work|root|home|Users|tmp|opt)/[\w.-]*')
    assert not found, f'paths of one machine: {found}; use a relative path, or tempfile in a lesson'

def test_no_package_registry_is_committed():
    variables = [v for v in os.environ if re.fullmatch('(PIP|UV)_.*INDEX.*|https?_proxy', v, re.I)]
    hosts = {urlsplit(url).hostname for v in variables for url in os.environ[v].split()} - {None, 'pypi.org'}
    options = ['--(?:extra-)?index[-]url', '--find[-]links', 'pypi[.]org/simple', 'files[.]pythonhosted']
    found = lines_with('|'.join([*options, *map(re.escape, hosts)]))
    assert not found, f'addresses of package registries: {found}; leave the choice to the machine'

@pytest.mark.parametrize('path', sorted(ROOT.glob('*.md')), ids=name)
def test_links_between_documents_hold(path):
    links = re.findall(r'\]\(<?(?!\w+:|#)([^)\s>#]+)', CODE.sub('', path.read_text(encoding='utf-8')))
    dead = [l for l in links if not (ROOT/l).exists()]
    assert not dead, f'{path.name} links to what does not exist: {dead}' + ('; mend nbs/index.ipynb' if path.name == 'README.md' else '')

def test_continuous_integration_can_run():
    scripts = ['.ci/run', 'tools/stub/quarto']
    assert all(os.access(ROOT/s, os.X_OK) for s in scripts), f"run: chmod +x {' '.join(scripts)}"
