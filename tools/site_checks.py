"""What a page must be besides reachable: its symbols can be found, its pictures are described, nothing is cut.

`check.py site` asks all of it, of processed notebooks; what only a built page shows, where Quarto is found.
"""
import html, re, runpy
from collections import Counter

import yaml
from fastcore.nbio import read_nb

from finish_site import other_hosts, package_version, public_symbols
from page_processors import FENCED, HOOK, plain_types, shown_symbol, twins

WIDTH = 400 # pixels of a telephone
NESTED = re.compile(r'(?<!!)\[\[`[^`\n]+`\]\([^()\s]*\)\]\([^)\n]*\)|(?<!\])\]\([^)\s]*\)\]\(')
PICTURES = 'image/png', 'image/jpeg', 'image/svg+xml'

def unfenced(text): return re.sub(FENCED, '', text, flags=re.M|re.S)
def data(cell): return [o['data'] for o in cell.get('outputs', []) if 'data' in o]
def text_of(o, mime): return ''.join(o.get(mime, ''))

# -- one page

def described(cell):
    "How many pictures of a code cell have a description: `#| fig-alt: one`, or `#| fig-alt: [\"one\", \"two\"]`"
    found = re.search(r'^#\| *fig-alt: *(.+)$', cell.source, re.M)
    if not found: return 0
    value = yaml.safe_load(found[1])
    return len([v for v in value if v]) if isinstance(value, list) else int(bool(value))

def without_alt(cell):
    "Messages about pictures that have no alternative text"
    if re.search(r'^#\| *(include|output): *false', cell.source, re.M): return
    pictures = sum(any(mime in o for mime in PICTURES) for o in data(cell))
    if pictures > described(cell):
        yield f'{pictures} pictures, {described(cell)} of them described: add `#| fig-alt: what it shows`'
    text = '\n'.join([text_of(o, 'text/html') + unfenced(text_of(o, 'text/markdown')) for o in data(cell)])
    if cell.cell_type=='markdown': text = re.sub(r'`[^`\n]+`', '', unfenced(cell.source))
    for tag in re.findall(r'<img\b[^>]*>', text):
        if not re.search(r'\balt="[^"]+"', tag): yield f'a picture without alt text: {tag[:80]}'
    yield from (f'a picture without alt text: {found}' for found in re.findall(r'!\[\]\([^)]*\)', text))

def cut_cells(cell):
    "Messages about tables whose cells pandas cut; a row or column of dots, which stands for others, is none"
    for o in data(cell):
        cut = [html.unescape(c) for c in re.findall(r'<t[dh][^>]*>([^<]*\.\.\.)</t[dh]>', text_of(o, 'text/html'))]
        cut = [c for c in cut if c!='...']
        if cut: yield f'a table is cut, as in {cut[0]!r}: show it with pd.option_context("display.max_colwidth", None)'

def page_problems(nb):
    "Messages about a processed notebook"
    for cell in nb.cells:
        where = f'cell {cell.get("id")}: '
        if 'execution' in cell.get('metadata', {}): yield where + 'has times of execution: doc_procs did not run'
        texts = [text_of(o, 'text/markdown') for o in data(cell)]
        if cell.cell_type=='markdown': texts.append(cell.source)
        plain = [re.sub(r'!\[[^]]*\]\([^)]*\)', 'picture', unfenced(t)) for t in texts]
        nested = [m[0] for t in plain for m in NESTED.finditer(t)]
        yield from (where + f'a link within the text of a link: {found}' for found in nested)
        symbol = shown_symbol(cell)
        if symbol:
            text = '\n'.join(texts)
            if HOOK.search(symbol): yield where + f'{symbol}, a hook, stands among the symbols: leave it in its class'
            if plain_types(text)!=text: yield where + f'the signature of {symbol} names `__main__` or `NoneType`'
            if not re.search(r'```\n\n\*', text): yield where + f'{symbol} has no docstring'
        if any('<h1' in text_of(o, 'text/html') for o in data(cell)): yield where + 'an output has a second title, <h1>'
        hosts = [h for o in data(cell) for h in other_hosts(text_of(o, 'text/html'))]
        if hosts: yield where + f'an output loads from another host: {hosts[0]}'
        yield from (where + problem for problem in [*without_alt(cell), *cut_cells(cell)])

def anchor_problems(page, anchors, of_headings, symbols):
    "Messages about headings that share an anchor but for case, and about public symbols without one"
    twice = [a for a,n in Counter(a.lower() for a in of_headings).items() if n > 1]
    if twice: yield f'two headings with the same anchor: {twice}'
    lost = [name for name,address in symbols if address.split('#')[0]==page and address.split('#')[1] not in anchors]
    if lost: yield f'symbols without an anchor: {lost}'

def symbols_of(root):
    "(name, address) of all public symbols, methods without a docstring, too"
    for module,symbols in runpy.run_path(str(root/'kdmed'/'_modidx.py'))['d']['syms'].items():
        for full,(address,_) in symbols.items():
            name = full.removeprefix(f'{module}.')
            if any(part.startswith('_') for part in name.split('.')): continue
            yield name, f'{address.split("#")[0]}#{twins().get(name, name.lower())}'

# -- the site's settings

def in_title_cells(paths):
    "Messages about what nbdev drops: all that stands in a title cell besides title, `> line` and `- key: value`"
    for path in paths:
        sources = [c.source for c in read_nb(path).cells if c.cell_type=='markdown']
        first = next((s for s in sources if s.startswith('# ')), '')
        lost = [l for l in first.split('\n')[1:] if l.strip() and not re.match(r'> |- \w[\w-]*:', l)]
        if lost: yield path, f'the page would lose {lost[0][:80]!r} of its title cell; give it a cell of its own'

def nav_items(items):
    for item in items: yield from [item['href']] if 'href' in item else []

def config_problems(config, nbs, version):
    "Messages about _quarto.yml"
    page,site = config['format']['html'],config['website']
    if page.get('code-overflow')!='wrap': yield 'format.html.code-overflow must be wrap: else long lines are cut'
    if page.get('toc-expand')!=2: yield 'format.html.toc-expand must be 2: else symbols are folded away'
    if page.get('html-math-method')!='mathml': yield 'format.html.html-math-method must be mathml: others load scripts'
    bar = site['navbar']
    items = [*nav_items(bar.get('left', [])), *nav_items(bar.get('right', []))]
    texts = [i.get('text') or i.get('aria-label') for i in [*bar.get('left', []), *bar.get('right', [])]]
    missing = [t for t in ('Tutorials', 'Papers', 'API', 'Results', 'GitHub') if t not in texts]
    if missing: yield f'the navbar lacks {missing}'
    for href in items:
        if '://' in href or (nbs/href.split('#')[0]).exists(): continue
        yield f'the navbar leads to {href}, which does not exist'
    if bar.get('title')!=f'kdmed {version}':
        yield f'website.navbar.title must be `kdmed {version}`, the version of the package'
    for name in (site.get('favicon', 'favicon'), '404.md'):
        if not (nbs/name).exists(): yield f'nbs/{name} does not exist'
    if 'llms.txt' in config['project'].get('resources', []): yield 'llms.txt is made after the build: it is no resource'

def style_problems(css):
    "Messages about nbs/styles.css"
    if other_hosts(css) or re.search(r'url\(\s*["\']?(?:https?:)?//', css): yield 'a style loads from another host'
    for needed in ('overflow-x: auto', 'pre-wrap', 'max-width: 100%'):
        if needed not in css: yield f'no rule says `{needed}`: pages get wider than a telephone'

# -- built pages

def built_problems(docs, root, release=False):
    "Messages about the finished site"
    for path in [*docs.rglob('*.html'), *docs.rglob('*.css')]:
        text = path.read_text(encoding='utf-8')
        name = path.relative_to(docs).as_posix()
        hosts = other_hosts(text)
        if hosts: yield f'{name} loads from another host: {hosts[0]}'
        if path.suffix!='.html' or 'http-equiv="refresh"' in text: continue
        titles = len(re.findall(r'<h1\b', text))
        if titles!=1: yield f'{name} has {titles} titles, <h1>'
        if package_version(root) not in text: yield f'{name} does not say which version it is of'
        for tag in re.findall(r'<img\b[^>]*>', text):
            if re.search(r'\balt="[^"]+"|role="presentation"', tag): continue
            yield f'{name}: a picture without alt text: {tag[:80]}'
    for name in ('llms.txt', '404.html', 'search.json', 'favicon.svg'):
        if not (docs/name).exists(): yield f'{name} was not made'
    found = (docs/'search.json').read_text(encoding='utf-8') if (docs/'search.json').exists() else ''
    lost = [name for name,address,_ in public_symbols(root) if f'"{address}"' not in found]
    if lost: yield f'search does not know {lost[:5]}'

def too_wide(driver, addresses):
    "(address, pixels) of pages that a telephone would have to scroll sideways; `driver` is a browser of Selenium"
    size = dict(width=WIDTH, height=800, deviceScaleFactor=1, mobile=True)
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    for address in addresses:
        driver.get(address)
        width = driver.execute_script('return document.documentElement.scrollWidth')
        if width > WIDTH: yield address,width
