"""Render README.md from nbs/index.ipynb, without Quarto.

Prose stays as it is, except that links to pages become addresses on the site; code cells become fenced blocks
without their
directives; of the outputs, Markdown stays, text is fenced, and images are files under README_files/. Cells marked `#| hide` are left out.
"""
import argparse, base64, difflib, posixpath, re, sys
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 'README_files'
WARNING = '<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file -->'
FENCED = r'^[ \t]*(```+|~~~+)[^\n]*\n.*?^[ \t]*\1[ \t]*$'
CODE = re.compile(rf'{FENCED}|`[^`\n]+`', re.M|re.S)
UNSEEN = {'hide', 'default_exp', 'export', 'exporti'}

def is_true(directives, name): return name in directives and directives[name] in ('', 'true')
def is_false(directives, name): return directives.get(name) == 'false'
def fence(text, language=''): return f'```{language}\n{text}\n```'

def readme_target(
    target, # What a link or image in nbs/index.ipynb points to
    site,   # Address of the documentation
): # Where that is, seen from README.md
    "A link target in `index.ipynb`, for README.md: pages are on the site, other files stand under nbs/"
    u = urlsplit(target)
    if u.scheme or u.netloc or not u.path: return target
    path = posixpath.normpath(u.path)
    page = nbpath2html(path).as_posix() if path.endswith('.ipynb') else path
    if page.endswith(('.html', '.html.md')): return f"{site.rstrip('/')}/{urlunsplit(('', '', page, u.query, u.fragment))}"
    return urlunsplit(('', '', posixpath.normpath(posixpath.join('nbs', path)), u.query, u.fragment))

def map_prose(markdown, function):
    "`markdown` with `function` applied to what is neither fenced nor inline code"
    done,at = [],0
    for code in CODE.finditer(markdown):
        done += [function(markdown[at:code.start()]), code[0]]
        at = code.end()
    return ''.join([*done, function(markdown[at:])])

def readme_prose(markdown, site):
    "A Markdown cell without Quarto's fenced divs and with links that work from README.md"
    def fix(prose):
        prose = re.sub(r'^:::.*\n?', '', prose, flags=re.M)
        prose = re.sub(r'(\]\(<?)([^)\s>]+)', lambda m: m[1] + readme_target(m[2], site), prose)
        return re.sub(r'\b((?:href|src)=")([^"]+)', lambda m: m[1] + readme_target(m[2], site), prose)
    return map_prose(markdown, fix).strip()

def output_blocks(cell, alt, images):
    "Markdown blocks for the outputs of a code cell; the files they show are added to `images` by name"
    for i,out in enumerate(cell.get('outputs', [])):
        data = {k: v if isinstance(v, str) else ''.join(v) for k,v in out.get('data', {}).items()}
        if out.output_type == 'stream':
            if out.name == 'stdout': yield fence(''.join(out.text).rstrip())
        elif 'image/png' in data or 'image/svg+xml' in data:
            png = 'image/png' in data
            name = f"{cell.id}-{i}.{'png' if png else 'svg'}"
            images[name] = base64.b64decode(data['image/png']) if png else data['image/svg+xml'].encode()
            yield f'![{alt}]({IMAGES}/{name})'
        elif '<table' not in data.get('text/markdown', '<table'): yield data['text/markdown'].strip()
        elif 'text/plain' in data: yield fence(data['text/plain'].rstrip())

def blocks(nb, site, images):
    "Markdown blocks for the cells of `nb`, in order"
    heading = ''
    for cell in nb.cells:
        directives = cell.directives
        cell.remove_directives()
        if cell.cell_type == 'markdown':
            found = re.findall(r'^#+ (.+)', cell.source, re.M)
            heading = found[-1] if found else heading
            yield readme_prose(cell.source, site)
        elif cell.cell_type == 'code' and not UNSEEN & directives.keys() and not is_false(directives, 'include'):
            source = '\n'.join(l for l in cell.source.splitlines() if not re.search(r'#\|\s*hide_line\s*$', l)).strip()
            if source and not is_false(directives, 'echo') and not is_true(directives, 'hide_input'): yield fence(source, 'python')
            alt = directives.get('fig-alt') or directives.get('fig-cap') or heading
            if not is_false(directives, 'output') and not is_true(directives, 'hide_output'):
                yield from output_blocks(cell, alt.strip('"\''), images)

def render(
    path, # Notebook to render
    site, # Address of the documentation
): # (text, {image name: bytes})
    "README text and images of the notebook at `path`"
    images = {}
    text = '\n\n'.join(filter(None, [WARNING, *blocks(read_nb(path), site, images)]))
    return text+'\n', images

def differences(root, text, images):
    "What in the tree at `root` is not as rendered, one message each"
    readme = root/'README.md'
    old = readme.read_text(encoding='utf-8') if readme.exists() else ''
    diff = list(difflib.unified_diff(old.splitlines(), text.splitlines(), 'README.md', 'nbs/index.ipynb', lineterm='', n=1))
    if diff: yield '\n'.join(diff[:30])
    there = {p.name: p.read_bytes() for p in (root/IMAGES).glob('*')}
    yield from (f'{IMAGES}/{name} differs' for name in sorted(there.keys() | images) if there.get(name) != images.get(name))

def write(root, text, images):
    "Write README.md and its images, and delete images that it no longer shows"
    (root/'README.md').write_text(text, encoding='utf-8')
    for old in (root/IMAGES).glob('*'):
        if old.name not in images: old.unlink()
    if images: (root/IMAGES).mkdir(exist_ok=True)
    for name,data in images.items(): (root/IMAGES/name).write_bytes(data)

def main():
    parser = argparse.ArgumentParser(description='Render README.md from nbs/index.ipynb')
    parser.add_argument('--check', action='store_true', help='write nothing; fail when README.md is not up to date')
    args = parser.parse_args()
    index = ROOT/'nbs'/'index.ipynb'
    if not index.exists(): sys.exit('nbs/index.ipynb, from which README.md is made, does not exist')
    text,images = render(index, get_config(ROOT).doc_url)
    changed = list(differences(ROOT, text, images))
    if not args.check: write(ROOT, text, images)
    elif changed: sys.exit('\n'.join(changed) + '\nREADME.md is not what nbs/index.ipynb says: run `make readme` and commit the result')
    print('README.md is up to date' if not changed else 'README.md written')

if __name__ == '__main__': main()
