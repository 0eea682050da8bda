"The scripts in tools/, on small projects made for the test"
import base64, json, sys

import pytest
from fastcore.nbio import mk_cell, new_nb, write_nb

import check, finish_site, gpu_check, install, pages, readme, release, stages

PNG = base64.b64encode(b'not really a picture').decode()
SITE = 'https://kdmed.github.io/kdmed'

def notebook(path, *cells):
    "Write a notebook of (type, source, outputs) and return its path"
    made = [mk_cell(source, kind, id=f'cell{i}', metadata={}, **({'outputs': outputs, 'execution_count': None} if kind == 'code' else {}))
            for i,(kind,source,*outputs) in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nb(new_nb(made), path)
    return path

def result(**data):
    data = {k.replace('_', '/'): v for k,v in data.items()}
    return {'output_type': 'execute_result', 'metadata': {}, 'execution_count': None, 'data': data}

def stream(text, name='stdout'): return {'output_type': 'stream', 'name': name, 'text': text}

# -- readme

@pytest.fixture
def index(tmp_path):
    return notebook(tmp_path/'index.ipynb',
        ('code', '#| hide\nfrom kdmed.kd import *'),
        ('markdown', '# kdmed\n\n> A line'),
        ('markdown', '#| export\nSee [core](01_core.ipynb#seeds), [page](tutorials/01_start.ipynb), `[code](01_core.ipynb)`,\n'
                     '![plot](images/plot.png) and [out](https://fast.ai).\n\n```\n[fenced](01_core.ipynb)\n```'),
        ('markdown', '## Result'),
        ('code', '#| echo: true\nx = 1 #| hide_line\nx+1', stream('noise', 'stderr'), stream('printed\n'), result(text_plain='2')),
        ('code', 'frame', result(text_html='<table></table>', text_plain='  a\n0 1')),
        ('code', 'table', result(text_markdown='|a|\n|-|\n|1|', text_plain='Table')),
        ('code', '#| echo: false\nplot()', result(image_png=PNG, text_plain='<Figure>')))

def test_readme_says_what_the_index_says(index):
    text,images = readme.render(index, SITE)
    assert text == '\n\n'.join([readme.WARNING, '# kdmed\n\n> A line',
        f'See [core]({SITE}/core.html#seeds), [page]({SITE}/tutorials/start.html), `[code](01_core.ipynb)`,\n'
        '![plot](nbs/images/plot.png) and [out](https://fast.ai).\n\n```\n[fenced](01_core.ipynb)\n```',
        '## Result', '```python\nx+1\n```', '```\nprinted\n```', '```\n2\n```', '```python\nframe\n```', '```\n  a\n0 1\n```',
        '```python\ntable\n```', '|a|\n|-|\n|1|', '![Result](README_files/cell7-0.png)']) + '\n'
    assert images == {'cell7-0.png': b'not really a picture'}

def test_readme_check_sees_every_difference(index, tmp_path):
    text,images = readme.render(index, SITE)
    readme.write(tmp_path, text, {**images, 'old.png': b''})
    assert list(readme.differences(tmp_path, text, images)) == ['README_files/old.png differs']
    readme.write(tmp_path, text, images)
    assert list(readme.differences(tmp_path, text, images)) == []
    (tmp_path/'README_files'/'cell7-0.png').write_bytes(b'another')
    diff,image = readme.differences(tmp_path, text.replace('> A line', '> Another'), images)
    assert '-> A line' in diff and '+> Another' in diff and image == 'README_files/cell7-0.png differs'

# -- site

class Config: doc_url,git_url,user,repo,branch = SITE,'https://github.com/kdmed/kdmed','kdmed','kdmed','main'

def site_problems(folder, text):
    notebook(folder/'01_core.ipynb', ('raw', '---\ntitle: Core\n---'), ('markdown', '## A first `step`: done'))
    notebook(folder/'tutorials'/'01_start.ipynb', ('raw', '---\ntitle: Start\n---'), ('markdown', text))
    (folder/'plot.png').write_bytes(b'')
    return list(check.Site(folder, Config).problems())

@pytest.mark.parametrize('link', [
    '../01_core.ipynb', '../core.html#a-first-step-done', '../01_core.ipynb#a-first-step-done', '#here', '../plot.png',
    f'{SITE}/core.html#anything', f'{SITE}/', f'{SITE}/core.html.md', 'https://fast.ai', f'{Config.git_url}/blob/main/settings.ini',
    'https://colab.research.google.com/github/kdmed/kdmed/blob/main/nbs/core/00_checks.ipynb'])
def test_site_lets_good_links_pass(link, tmp_path):
    notebook(tmp_path/'index.ipynb', ('raw', '---\ntitle: Home\n---'))
    assert site_problems(tmp_path, f'## Here\n\n[a]({link})') == []

@pytest.mark.parametrize('link', [
    '01_core.ipynb', '../01_core.ipynb#second', '../other.html', '#there', '../none.png', f'{SITE}/other.html',
    f'{Config.git_url}/blob/main/none.py',
    'attachment:a.png', '../../setup.py'])
@pytest.mark.parametrize('form', ['[a]({})', '![a]({})', '<img src="{}" alt="a">', '[a]: {}'])
def test_site_finds_dead_links(link, form, tmp_path):
    found = site_problems(tmp_path, '## Here\n\n' + form.format(link))
    assert len(found) == 1 and link in found[0]

def test_site_wants_one_title(tmp_path):
    assert 'second title' in site_problems(tmp_path, '# Again')[0]
    assert site_problems(tmp_path, '```\n# a comment\n[a](nowhere.html)\n```\n`[b](nowhere.html)` and $[c](d)$') == []
    notebook(tmp_path/'02_none.ipynb', ('markdown', 'No title'))
    assert 'has no title' in site_problems(tmp_path, 'Text')[0]

# -- sources

def test_changes_names_what_to_do():
    found = list(check.changes({'a': b'1', 'b': b'1', 'd': b'1'}, {'b': b'2', 'c': b'', 'd': b'1'}, 'do'))
    assert found == ['a should not exist: do', 'b is out of date: do', 'c is missing: do']

# -- install

def test_install_refuses_an_old_python(monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 18))
    with pytest.raises(SystemExit, match='needs Python 3.10 or newer.* is Python 3.9'): install.check_python()

def test_install_trusts_only_its_own_finished_work(tmp_path, monkeypatch):
    python,stamp = tmp_path/'python',tmp_path/'stamp.json'
    monkeypatch.setattr(install, 'VENV_PYTHON', str(python))
    monkeypatch.setattr(install, 'STAMP', str(stamp))
    assert install.stamp() == {}
    stamp.write_text(json.dumps(install.wanted()))
    assert install.stamp() == {} # the environment is gone
    python.touch()
    assert install.stamp() == install.wanted()
    monkeypatch.setattr(install, 'ROOT', str(tmp_path))
    for name in ('settings.ini', 'pyproject.toml', 'setup.py'): (tmp_path/name).write_text('changed')
    assert install.stamp() != install.wanted()
    stamp.write_text('{"root"')
    assert install.stamp() == {}

# -- house

def test_the_table_of_the_house_counts_what_it_says(tmp_path, monkeypatch):
    import house
    monkeypatch.setattr(house, 'ROOT', tmp_path)
    for folder in ('kdmed/data', 'nbs/data', 'tests', 'tools'): (tmp_path/folder).mkdir(parents=True)
    (tmp_path/'kdmed/data/a.py').write_text("__all__ = ['f', 'g']\n@patch\ndef f(self:C): pass\ndef g():\n    return 1\ndef _h(): pass\n")
    (tmp_path/'kdmed/data/b.py').write_text("__all__ = ['g']\nfrom .a import _h, f\nfrom os import _exit\ndef g(): pass\n")
    why = '# Long because: one table, read at once\n'
    cells = [dict(cell_type='code', id=str(i), source=lines) for i,lines in enumerate([
        ['#| export\n', *['x = 1\n']*40], ['#| export\n', why, *['x = 1\n']*40], ['#| fig-alt: ' + 'a'*120 + '\n', 'y' + ' '*120]])]
    (tmp_path/'nbs/data/00_a.ipynb').write_text(json.dumps(dict(cells=cells)))
    (tmp_path/'tests/test_a.py').write_text('z'*121 + '\n' + 'z'*120)
    found = {k: number for k,(number,_) in house.measure().items()}
    assert found=={'lines over 120 columns': 1, 'lines over 120 columns in tests and tools': 1, 'uses of @patch': 1,
                   'private names imported across modules': 1, 'exported cells over 40 lines': 1,
                   'exported cells over 40 lines, with a reason': 1, 'names with two meanings': 1,
                   'longest function, in lines': 2, 'modules': 2, 'public names': 2}

# -- what `make test` has time for

NAMES = ['nbs/index.ipynb', 'nbs/a/00_one.ipynb', 'nbs/a/05_two.ipynb', 'nbs/b/00_three.ipynb', 'nbs/tutorials/long.ipynb']
SECONDS = dict(zip(NAMES, (60, 10, 20, 30, 40)))

@pytest.mark.parametrize('changed, distance, budget, expected', [
    ([], {}, 60, ([], [], NAMES[1:4])),
    ([], {}, 35, ([], [], NAMES[1:3])),
    (NAMES[3:4], {NAMES[3]: 0}, 45, (NAMES[3:4], [], NAMES[1:2])),
    (NAMES[3:], {}, 10, (NAMES[3:], [], [])), # what changed is run, whatever it takes
    ([], {NAMES[3]: 0, NAMES[2]: 1, NAMES[0]: 1}, 50, ([], [NAMES[3], NAMES[2]], []))])
def test_what_changed_is_run_and_then_what_there_is_time_for(changed, distance, budget, expected):
    choice = pages.choose(SECONDS, set(changed), distance, NAMES, budget)
    assert (choice.changed, choice.using, choice.others)==expected
    assert sorted([*sum(expected, []), *choice.left])==sorted(NAMES)

def test_a_page_that_was_never_timed_costs_something():
    assert pages.choose({}, set(), {}, NAMES, 2*pages.UNKNOWN).others==NAMES[1:3]

def test_pages_near_to_a_change_are_known():
    found = pages.distances({'nbs/distill/10_losses.ipynb'})
    assert found['nbs/distill/10_losses.ipynb']==found['nbs/distill/25_callbacks.ipynb']==0 < found['nbs/cli/10_app.ipynb']
    assert 'nbs/core/05_basics.ipynb' not in found and pages.distances({'README.md'})=={}

def test_every_commit_shuffles_anew(monkeypatch):
    orders = set()
    for commit in 'abcdef':
        monkeypatch.setattr(pages, 'git', lambda *args: [commit])
        assert pages.shuffled(NAMES)==pages.shuffled(NAMES[::-1])
        orders.add(tuple(pages.shuffled(NAMES)))
    assert len(orders) > 3

def test_times_are_kept_for_pages_that_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, 'TIMES', tmp_path/'times.json')
    known = pages.name(pages.pages()[0])
    pages.write_times({known: 1.26, 'nbs/gone.ipynb': 1.})
    assert pages.read_times()=={known: 1.3}

def test_every_check_of_make_test_is_one_of_make_test_all():
    def names(what): return [name for name,_ in stages.stages(what, '2', '0')]
    assert names('ci')[:len(names('test'))]==names('test') and set(names('test')) <= set(names('all'))
    assert stages.clock(61.9)=='1:01' and stages.clock(3600)=='60:00'

def test_a_failing_check_does_not_hide_the_others(monkeypatch, capfd):
    def some(what, workers, end=None):
        for k,name in enumerate(('good', 'bad', 'late')): yield name, [sys.executable, '-c', f'import sys; sys.exit({k==1})']
    monkeypatch.setattr(stages, 'stages', lambda what, *args: list(some(what, *args))[:2] if what=='test' else some(what, *args))
    monkeypatch.setenv('KDMED_STARTED', '0')
    assert stages.run('test', '2')==['bad'] and 'bad (FAILED)' in capfd.readouterr().out
    assert stages.run('ci', '2')==['bad'] and 'Not run, for want of time: late' in capfd.readouterr().out

# -- a release

CHANGES = '# Changelog\n\n## [0.2.0] - {date}\n\n### Added\n\n- more\n\n## [0.1.0] - 2026-01-31\n\n- first\n'

@pytest.fixture
def releasable(tmp_path):
    (tmp_path/'kdmed').mkdir()
    (tmp_path/'kdmed'/'__init__.py').write_text('"""kdmed"""\n__version__ = "0.2.0"\n')
    (tmp_path/'CITATION.cff').write_text('cff-version: 1.2.0\nversion: 0.2.0\ndate-released: 2026-02-01\n')
    (tmp_path/'_quarto.yml').write_text('website:\n  navbar:\n    title: kdmed 0.2.0 # the version\n')
    (tmp_path/'CHANGELOG.md').write_text(CHANGES.format(date='2026-02-01'))
    return tmp_path

def test_a_tag_is_released_if_all_files_agree(releasable):
    assert list(release.problems('v0.2.0', releasable))==[]
    found = release.sections(CHANGES)
    assert found['0.2.0'][1]=='### Added\n\n- more' and found['0.1.0']==('2026-01-31', '- first')

@pytest.mark.parametrize('file, text, told', [
    ('kdmed/__init__.py', '__version__ = "0.1.0"\n', 'states 0.1.0, the tag 0.2.0'),
    ('CITATION.cff', 'version: 0.1.0\ndate-released: 2026-02-01\n', 'CITATION.cff states 0.1.0'),
    ('CITATION.cff', 'version: 0.2.0\n', 'must state `date-released: 2026-02-01`'),
    ('_quarto.yml', '    title: kdmed 0.1.0\n', '_quarto.yml states 0.1.0'),
    ('CHANGELOG.md', CHANGES.format(date='Unreleased'), "'Unreleased' as the date"),
    ('CHANGELOG.md', '## [0.1.0] - 2026-01-31\n\n- first\n', 'has no section'),
    ('CHANGELOG.md', '## [0.2.0] - 2026-02-01\n', 'says nothing of 0.2.0')])
def test_what_keeps_a_tag_from_being_released_is_named(file, text, told, releasable):
    (releasable/file).write_text(text)
    found = list(release.problems('v0.2.0', releasable))
    assert len(found)==1 and told in found[0]

def test_a_tag_has_the_form_of_a_version(releasable): assert 'like v0.1.0' in next(release.problems('0.2', releasable))

def test_the_citation_is_of_this_version():
    import yaml
    cited = yaml.safe_load((check.ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert cited['version']==finish_site.package_version() and cited['license']=='Apache-2.0'
    assert {'cff-version', 'message', 'title', 'authors'} <= cited.keys()

def test_every_workflow_and_form_is_readable():
    import yaml
    folder = check.ROOT/'.github'
    flows = {p.name: yaml.safe_load(p.read_text(encoding='utf-8')) for p in (folder/'workflows').glob('*.yml')}
    steps = flows['release.yml']['jobs']
    assert steps['test']['needs']=='check' and steps['wheel']['needs']=='test' and steps['index']['needs']=='wheel'
    assert steps['index']['permissions']=={'id-token': 'write'} and steps['site']['with']=={'release': True}
    for called in ('test-all.yml', 'docs.yml'): assert 'workflow_call' in flows[called][True] # YAML reads `on` as true
    for path in (folder/'ISSUE_TEMPLATE').glob('*.yml'):
        form = yaml.safe_load(path.read_text(encoding='utf-8'))
        if path.name in ('bug.yml', 'question.yml'):
            asked = {f.get('id'): f for f in form['body']}['check']
            assert 'kdmed check' in asked['attributes']['label'] and asked['validations']['required']

# -- a GPU

def job(name, code, needs=(), n=1, seconds=20):
    return gpu_check.Job(name, 'for a test', [sys.executable, '-c', code], needs, n, seconds)

def test_jobs_for_a_gpu_are_run_and_reported(tmp_path):
    some = [job('good', 'print("fine")'), job('bad', 'raise SystemExit("broken")'),
            job('poor', '', ('no_such_package',)), job('pair', '', n=2),
            job('slow', 'import time; time.sleep(60)', seconds=.5), job('late', '', seconds=1000)]
    said = []
    found = gpu_check.run_all(some, 1, budget=30, tell=said.append)
    assert [r.state.split(':')[0] for r in found]==[
        'passed', 'failed', 'needs no_such_package', 'needs 2 GPUs, there is 1', 'failed', 'not run']
    assert 'not done after 2 s' in found[4].state and len(said)==6
    text = gpu_check.report(found, ['- 1 × a GPU'])
    assert '1 passed, 2 failed, 3 not run' in text and '## bad: for a test\n\n~~~\nbroken\n~~~' in text

def test_without_a_gpu_it_is_said_what_would_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, 'gpus', lambda: (0, 'torch sees no GPU'))
    monkeypatch.setattr(sys, 'argv', ['gpu_check.py', '--out', str(tmp_path/'report.md')])
    gpu_check.main()
    told = capsys.readouterr().out
    assert 'nothing is run' in told and not (tmp_path/'report.md').exists()
    assert {j.name for j in gpu_check.jobs()}=={'amp', 'rates', 'lessons', 'tests', 'compile', 'two_gpus', 'bench'}
    assert all(f'{j.name} ' in told and j.about in told for j in gpu_check.jobs())
    assert sum(j.seconds for j in gpu_check.jobs()) <= gpu_check.BUDGET + 90

def test_every_lesson_that_needs_a_gpu_is_among_the_jobs():
    marked = {p.relative_to(check.ROOT).as_posix() for p in (check.ROOT/'nbs').rglob('[!_.]*.ipynb')
              if '"#| cuda' in p.read_text(encoding='utf-8')}
    assert marked==set(gpu_check.cuda_pages()) and marked <= {a for j in gpu_check.jobs() for a in j.command}
