"What is done to the pages of the site, on small pages made for the test; and that every fault of a page is seen"
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastcore.nbio import mk_cell, new_nb
from fastcore.xtras import dict2obj

import check, finish_site, page_processors, site_checks
from browser import needs_browser, open_browser

ROOT = Path(__file__).resolve().parents[1]
SYMBOL = '#| echo: false\n#| output: asis\nshow_doc(f)'
DOC = '### f\n\n```python\ndef f()\n```\n\n*What it does*'

def code(source, *outputs, **metadata):
    made = [dict(output_type='execute_result', metadata={}, execution_count=None, data=o) for o in outputs]
    return dict2obj(mk_cell(source, 'code', id='c', metadata=metadata, outputs=made, execution_count=None))

def text(source): return dict2obj(mk_cell(source, 'markdown', id='m', metadata={}))
def markdown(source, value): return code(source, {'text/markdown': value})
def shown(cell): return ''.join(cell.outputs[0]['data']['text/markdown'])

def processed(processor, *cells, path='nbs/data/00_x.ipynb'):
    "Cells after one processor"
    nb = dict2obj(new_nb([]))
    nb.cells,nb.path_ = list(cells),path
    if isinstance(processor, type): processor = processor(nb)
    if hasattr(processor, 'begin'): processor.begin()
    for cell in nb.cells: processor(cell)
    return nb.cells

# -- before the build

def test_times_of_execution_are_dropped():
    cell, = processed(page_processors.drop_execution, code('x', execution={'total': 1}, language='python'))
    assert dict(cell.metadata)=={'language': 'python'}

def test_signatures_name_types_as_the_module_does():
    signature = 'def f(a:NoneType=None, b:__main__.B)->__main__.C'
    cell, = processed(page_processors.clean_signatures, markdown(SYMBOL, signature))
    assert shown(cell)=='def f(a=None, b:B)->C'
    other, = processed(page_processors.clean_signatures, markdown('x', '__main__.B'))
    assert shown(other)=='__main__.B'

@pytest.mark.parametrize('source, folder, summary', [
    ('import a\nfrom b import c', 'data', 'Imports'),
    ('test_eq(f(1), 2)\nassert f(2)', 'tutorials', 'Checks'),
    ('with expect_fail(ValueError): f()\nfor x in y: test_close(x, 1)', 'papers', 'Checks'),
    ('test_eq(f(1), 2)', 'data', None), # on a module's page checks are what is read
    ('x = f(1)\ntest_eq(x, 2)', 'papers', None), ('import a\na.run()', 'papers', None),
    ('%pip install x', 'papers', None), ('#| echo: false\nimport a', 'papers', None)])
def test_imports_and_checks_are_folded(source, folder, summary):
    cell, = processed(page_processors.FoldCells, code(source), path=f'nbs/{folder}/x.ipynb')
    assert cell.source==(f'#| code-fold: true\n#| code-summary: "{summary}"\n{source}' if summary else source)

class Kind:
    def told(self, value:int): # Counted
        "What it says"
    def bare(self): pass
    def after_epoch(self): "Of a callback"
    def _own(self): "Of nobody's concern"
    @property
    def size(self): "How many"

def test_methods_stand_below_their_class_each_under_an_anchor(monkeypatch):
    monkeypatch.setattr(page_processors, 'linked_methods', lambda cls: ['told', 'moved'])
    found = page_processors.methods_text(Kind)
    assert '#### Kind.told\n' in found and '*What it says*' in found and '#### Kind.size\n\n*How many*' in found
    anchors = [f'<span id="kind.{name}"></span>' for name in ('bare', 'after_epoch', 'moved')]
    assert found.endswith('\n\n' + ''.join(anchors))
    assert '_own' not in found and '---' not in found

def test_every_heading_has_an_anchor_of_its_own(monkeypatch):
    monkeypatch.setattr(page_processors, 'twins', lambda: {'Claim': 'claim-class'})
    cells = [text('## Claims\n\n```\n# Claims\n```\n## Claims'), text('## Claim'),
             markdown('show_doc(Claim)', '### Claim'), markdown('show_doc(claim)', '### claim')]
    a,b,c,d = processed(page_processors.SeparateAnchors, *cells)
    assert a.source=='## Claims\n\n```\n# Claims\n```\n## Claims {#claims-1}' and b.source=='## Claim {#claim-1}'
    assert shown(c)=='### Claim {#claim-class}' and shown(d)=='### claim'

def test_classes_that_share_a_name_with_a_function_are_known():
    assert page_processors.twins()['Claim']=='claim-class' and 'LogitKD' not in page_processors.twins()

def test_a_link_holds_no_other_link(monkeypatch):
    monkeypatch.setattr(page_processors, 'twins', lambda: {'Claim': 'claim-class'})
    at = 'https://a.io/k/files.html'
    source = f'See [[`f`]({at}#f)](x.ipynb), [`Claim`]({at}#claim), [`claim`]({at}#claim)\n```\n[[`f`](a)](b)\n```'
    cell, = processed(page_processors.fix_links, text(source))
    lines = [f'See [`f`](x.ipynb), [`Claim`]({at}#claim-class), [`claim`]({at}#claim)', '```', '[[`f`](a)](b)', '```']
    assert cell.source=='\n'.join(lines)

def test_a_report_in_a_page_is_no_second_title():
    cell, = processed(page_processors.one_title, code('x', {'text/html': '<h1 id="a">A</h1><p>'}))
    assert cell.outputs[0]['data']['text/html']=='<h2 id="a">A</h2><p>'

# -- every fault is seen

PICTURE = {'image/png': '', 'text/plain': ''}
FAULTS = {
    'times of execution': code('x', execution={'total': 1}),
    'a link within the text': text('[[`f`](a#f)](b)'),
    '`__main__` or `NoneType`': markdown(SYMBOL, DOC.replace('f()', 'f(a:NoneType=None)')),
    'has no docstring': markdown(SYMBOL, DOC[:DOC.index('*')]),
    'a hook, stands among the symbols': markdown(SYMBOL.replace('(f)', '(C.before_fit)'), DOC),
    'a second title, <h1>': code('x', {'text/html': '<h1>A</h1>'}),
    'from another host': code('x', {'text/html': '<script src="https://a.io/a.js"></script>'}),
    '1 pictures, 0 of them': code('plot()', PICTURE),
    '2 pictures, 1 of them': code('#| fig-alt: Two lines\nplot()', PICTURE, PICTURE),
    'without alt text: <img': text('<img src="a.png">'),
    'without alt text: ![]': text('![](a.png)'),
    'a table is cut': code('x', {'text/html': '<td>a long te...</td>'}),
}

def problems(cell): return list(site_checks.page_problems(SimpleNamespace(cells=[cell])))

@pytest.mark.parametrize('told', FAULTS)
def test_a_fault_of_a_page_is_seen(told):
    found = problems(FAULTS[told])
    assert len(found)==1 and told in found[0]

@pytest.mark.parametrize('cell', [
    code('#| fig-alt: "Two lines: they cross"\nplot()', PICTURE),
    code('#| fig-alt: ["One", "Two"]\nplot()', PICTURE, PICTURE),
    code('#| include: false\nplot()', PICTURE), text('![A cell](a.png), `<img>` and [![test](b.svg)](c) [`d`](e)'),
    code('x', {'text/html': '<td>...</td><td>whole</td>'}), markdown(SYMBOL, DOC)])
def test_a_good_cell_passes(cell): assert problems(cell)==[]

def test_anchors_are_missed():
    symbols = [('f', 'a.html#f'), ('C.g', 'a.html#c.g'), ('h', 'b.html#h')]
    found = list(site_checks.anchor_problems('a.html', {'f', 'g'}, ['f', 'F'], symbols))
    assert found==["two headings with the same anchor: ['f']", "symbols without an anchor: ['C.g']"]

def config(): return check.yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))

def change(config, path, value):
    *most,last = path.split('.')
    for key in most: config = config[key]
    config[last] = value

@pytest.mark.parametrize('path, value, told', [
    ('format.html.code-overflow', 'scroll', 'code-overflow'), ('format.html.toc-expand', True, 'toc-expand'),
    ('format.html.html-math-method', 'mathjax', 'mathml'), ('website.navbar.left', [], "lacks ['Tutorials'"),
    ('website.navbar.right', [dict(text='GitHub', href='none.ipynb')], 'none.ipynb, which does not exist'),
    ('website.navbar.title', 'kdmed 0.0.1', 'the version of the package'),
    ('website.favicon', 'none.svg', 'none.svg does not exist'), ('project.resources', ['llms.txt'], 'no resource')])
def test_a_fault_of_the_settings_is_seen(path, value, told):
    changed,version = config(),finish_site.package_version()
    assert list(site_checks.config_problems(changed, ROOT/'nbs', version))==[]
    change(changed, path, value)
    assert any(told in p for p in site_checks.config_problems(changed, ROOT/'nbs', version))

def test_a_fault_of_the_styles_is_seen():
    css = (ROOT/'nbs'/'styles.css').read_text(encoding='utf-8')
    assert list(site_checks.style_problems(css))==[]
    assert 'another host' in next(site_checks.style_problems(css+'@import url("https://a.io/a.css");'))
    assert 'pre-wrap' in next(site_checks.style_problems(css.replace('pre-wrap', 'pre')))

def test_what_a_title_cell_would_lose_is_named(tmp_path):
    from test_tools import notebook
    good = notebook(tmp_path/'a.ipynb', ('markdown', '# A\n\n> Line\n\n- key: value'))
    bad = notebook(tmp_path/'b.ipynb', ('markdown', '# A\n\n> Line\n\n[![badge](a)](b)'))
    (path,told), = site_checks.in_title_cells([good, bad])
    assert path==bad and 'badge' in told

# -- after the build

PAGE = '''<html><head><title>Losses – kdmed</title><meta name="description" content="What &amp; why">
<link rel="stylesheet" href="https://fonts.googleapis.com/css"><link href="site_libs/a.css" rel="stylesheet">
<script src="https://cdnjs.cloudflare.com/require.js" crossorigin="anonymous"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script src="site_libs/a.js"></script></head><body><span class="navbar-title">kdmed VERSION</span><h1>Losses</h1>
<a href="https://kdmed.github.io/kdmed/distill/losses.html#f">f</a>
<a href="https://kdmed.github.io/kdmed/versions.html">all</a>
<a href="https://github.com/kdmed/kdmed/blob/main/kdmed/core/basics.py#L3">source</a>
<img src="a.png" alt="A"></body></html>'''
USAGE = 'distill/callbacks.html#logitkd'
ENTRIES = [dict(objectID=USAGE, href=USAGE, title='Callbacks', section='LogitKD', text='LogitKD')]

@pytest.fixture
def built(tmp_path):
    "A site as Quarto leaves it"
    docs = tmp_path/'_docs'
    (docs/'distill').mkdir(parents=True)
    page = PAGE.replace('VERSION', finish_site.package_version())
    for name in ('index.html', 'distill/losses.html', '404.html'): (docs/name).write_text(page)
    for name in ('index.html.md', 'distill/losses.html.md', 'favicon.svg'): (docs/name).touch()
    (docs/'a.css').write_text('@import"https://fonts.googleapis.com/css2?family=A";a{color:red}')
    (docs/'search.json').write_text(json.dumps(ENTRIES))
    return docs

def test_a_finished_site_loads_nothing_from_elsewhere_and_stays_within_its_version(built):
    before = list(site_checks.built_problems(built, ROOT))
    assert any('another host' in p for p in before) and any('llms.txt was not made' in p for p in before)
    assert any('search does not know' in p for p in before)
    finish_site.finish(built, finish_site.package_version())
    assert list(site_checks.built_problems(built, ROOT))==[]
    page = (built/'distill'/'losses.html').read_text()
    assert '<a href="../distill/losses.html#f">' in page and 'kdmed.github.io/kdmed/versions.html' in page
    assert 'site_libs/a.js' in page and 'site_libs/a.css' in page and 'jquery' not in page
    assert ', development</span>' in page
    assert (built/'a.css').read_text()=='a{color:red}' and '/blob/main/' in page
    again = {p: p.read_bytes() for p in built.rglob('*') if p.is_file()}
    finish_site.finish(built, finish_site.package_version())
    assert again=={p: p.read_bytes() for p in built.rglob('*') if p.is_file()}

def test_a_release_links_to_its_own_source(built):
    version = finish_site.package_version()
    finish_site.finish(built, version, release=True)
    page = (built/'index.html').read_text()
    assert f'/blob/v{version}/kdmed/core/basics.py#L3' in page and 'development' not in page

def test_llms_txt_lists_every_page(built):
    finish_site.finish(built, '0.1.0')
    assert (built/'llms.txt').read_text()=='\n'.join([
        '# kdmed', '', '> Distill medical image classifiers, and see what the student kept', '', '## Start', '',
        '- [Losses](https://kdmed.github.io/kdmed/index.html.md): What & why', '', '## Distill', '',
        '- [Losses](https://kdmed.github.io/kdmed/distill/losses.html.md): What & why', ''])

def test_search_finds_definitions_first(built):
    finish_site.finish(built, '0.1.0')
    records = json.loads((built/'search.json').read_text())
    titles = [r['title'] for r in records]
    assert records[-1]==ENTRIES[0] and len({r['objectID'] for r in records})==len(records)
    logit = records[titles.index('LogitKD')]
    assert logit['href']==USAGE and logit['section']=='LogitKD' and 'softened logits' in logit['text']
    method = titles.index('LogitKD.weights_of_classes')
    assert titles.index('LogitKD') < titles.index('Callbacks') and titles.index('distill') < method
    assert records[method]['section']=='' and not any('._' in t or t[0]=='_' for t in titles)

def test_each_version_has_its_place(built, tmp_path):
    published = tmp_path/'published'
    def top(): return (published/'index.html').read_text()
    def place(version, release=False):
        (built/'index.html').write_text(f'{version} {release}')
        return finish_site.place(built, published, version, release)
    assert place('0.1.0')==published/'dev' and top()=='0.1.0 False' # the first site of all stands at the top
    assert place('0.1.0', True)==published/'0.1.0' and top()=='0.1.0 True'
    (published/'old.html').touch()
    place('0.2.0', True)
    assert top()=='0.2.0 True' and not (published/'old.html').exists()
    assert (published/'0.1.0'/'index.html').read_text()=='0.1.0 True'
    place('0.1.1', True) # a repair of an older release
    place('0.3.0')
    assert top()=='0.2.0 True' and finish_site.releases(published)==['0.2.0', '0.1.1', '0.1.0']
    versions = (published/'versions.html').read_text()
    assert '0.2.0</a> (newest)' in versions and 'dev/index.html' in versions and (published/'.nojekyll').exists()

wide = needs_browser()
@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize('style', ['ours', ''])
def test_no_page_is_wider_than_a_telephone(style, tmp_path):
    for mark in wide:
        if mark.args[0]: pytest.skip(mark.kwargs['reason'])
    long = 'kdmed.evaluate.comparison.' * 6
    cells = ''.join(f'<td>column{i}</td>' for i in range(30))
    css = (ROOT/'nbs'/'styles.css').read_text(encoding='utf-8') if style else ''
    (tmp_path/'a.html').write_text(f'''<!DOCTYPE html><meta name="viewport" content="width=device-width">
<style>{css}</style><main><h1>{long}</h1><p><code>{long}</code></p><pre><code>{'x = 1; '*40}</code></pre>
<table><tr>{cells}</tr></table>
<div class="cell-output"><pre><code>{'1'*300}</code></pre></div>
<img alt="" width="900" height="20" src="data:,"></main>''')
    with open_browser(tmp_path/'profile') as driver:
        found = list(site_checks.too_wide(driver, [(tmp_path/'a.html').as_uri()]))
    assert bool(found)==(not style)
