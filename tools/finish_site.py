"""What is done to the site after Quarto has built it, and where each version of it is kept.

    finish_site.py finish _docs [--release]        search finds definitions first; nothing is loaded from other hosts;
                                                   links stay within the version; llms.txt; every page says its version
    finish_site.py place _docs published [--release]  the built site as `dev` or, of a release, under its number, among
                                                   all versions in `published`; the newest release is at the top, too
"""
import argparse, ast, html, json, posixpath, re, runpy, shutil, sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

from page_processors import twins

ROOT = Path(__file__).resolve().parent.parent
HOME,REPO = 'https://kdmed.github.io/kdmed', 'https://github.com/kdmed/kdmed'
VERSIONS = 'versions.html'

def package_version(root=ROOT):
    "The version in kdmed/__init__.py"
    return re.search(r'^__version__ = "(.+)"', (root/'kdmed'/'__init__.py').read_text(encoding='utf-8'), re.M)[1]

# -- symbols

def docstrings(path):
    "{name or Class.name: first line of its docstring} of what a module defines"
    found = {}
    def visit(nodes, prefix=''):
        for node in nodes:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            found[prefix+node.name] = (ast.get_docstring(node) or '').split('\n')[0]
            if isinstance(node, ast.ClassDef): visit(node.body, f'{prefix}{node.name}.')
    visit(ast.parse(path.read_text(encoding='utf-8')).body)
    return found

def public_symbols(root=ROOT):
    "(name, address on the site, first line of its docstring) of public functions, classes and documented methods"
    for module,symbols in runpy.run_path(str(root/'kdmed'/'_modidx.py'))['d']['syms'].items():
        told = {}
        for full,(address,path) in symbols.items():
            name = full.removeprefix(f'{module}.')
            if any(part.startswith('_') for part in name.split('.')): continue
            told = told or docstrings(root/path)
            if name in twins(): address = f'{address.split("#")[0]}#{twins()[name]}'
            if '.' not in name or told.get(name): yield name,address,told.get(name, '')

def symbol_records(symbols):
    """One record of `search.json` for each symbol, functions and classes before methods. The fields that have the name
    decide the order in Quarto's search, so functions and classes have it in one more than methods."""
    records = []
    for name,address,doc in sorted(symbols, key=lambda s: ('.' in s[0], s[0].lower(), s[0])):
        wing = address.split('/')[0].capitalize()
        told = f'{name}: {doc}' if doc else name
        records.append(dict(objectID=f'{address}--definition', href=address, title=name,
                            section='' if '.' in name else name, text=told, crumbs=['API', wing]))
    return records

def search_definitions(entries, symbols):
    "Quarto's search records behind those of the symbols"
    mine = symbol_records(symbols)
    known = {r['objectID'] for r in mine}
    return mine + [e for e in entries if e.get('objectID') not in known]

# -- other hosts

QUOTED = r'["\'](?:https?:)?//[^"\']*["\']'
TAGS = [rf'<script\b[^>]*\bsrc={QUOTED}[^>]*>\s*</script>\s*',
        rf'<link\b(?=[^>]*\bhref={QUOTED})(?=[^>]*\brel=["\'](?:stylesheet|preconnect|preload|dns-prefetch)["\'])'
        r'[^>]*>\s*',
        r'<script\b[^>]*>\s*define\([\'"]jquery[\'"].*?</script>\s*']
RULES = [r'@import\s*(?:url\()?\s*["\']?(?:https?:)?//[^;]*;',
         r'@font-face\s*\{[^}]*url\(\s*["\']?(?:https?:)?//[^}]*\}']

def without_other_hosts(text):
    "HTML or CSS without scripts, styles and fonts that would come from another host"
    for pattern in [*TAGS, *RULES]: text = re.sub(pattern, '', text, flags=re.S)
    return text

def other_hosts(text):
    "What a page or style would load from elsewhere; images are not meant: badges are"
    patterns = [*TAGS[:2], *RULES, rf'<iframe\b[^>]*\bsrc={QUOTED}']
    return [m[0][:120] for pattern in patterns for m in re.finditer(pattern, text, re.S)]

# -- pages

def stay_within(text, page):
    "Links to the site's own address as relative ones, so that a version's pages lead to pages of that version"
    up = '../'*page.count('/')
    def lead(m): return m[0] if m[2].startswith(VERSIONS) else f'{m[1]}{up}{m[2] or "index.html"}"'
    return re.sub(rf'(<a\b[^>]*\bhref="){re.escape(HOME)}/?([^"]*)"', lead, text)

def at_release(text, version):
    "Links to the source as it was released"
    return text.replace(f'{REPO}/blob/main/', f'{REPO}/blob/v{version}/')

def finish_page(text, page, version, release):
    "A built page, finished"
    text = stay_within(without_other_hosts(text), page)
    if release: return at_release(text, version)
    return text.replace(f'kdmed {version}</', f'kdmed {version}, development</')

def meta(text, name):
    found = re.search(rf'<meta name="{name}" content="([^"]*)"', text)
    return html.unescape(found[1]) if found else ''

def llms_text(pages):
    "llms.txt of (address, title, description) of pages, by folder"
    lines,last = ['# kdmed', '', '> Distill medical image classifiers, and see what the student kept', ''], None
    for address,title,description in sorted(pages, key=lambda p: (posixpath.dirname(p[0]), p[0])):
        folder = posixpath.dirname(address) or 'Start'
        if folder!=last: lines += [*([''] if last else []), f'## {folder.capitalize()}', '']
        lines.append(f'- [{title}]({HOME}/{address}.md)' + (f': {description}' if description else ''))
        last = folder
    return '\n'.join(lines) + '\n'

def title_of(text):
    found = re.search(r'<title>(.*?)</title>', text, re.S)
    return re.sub(r'\s+[–-]\s+kdmed.*$', '', html.unescape(found[1])).strip() if found else ''

def finish(docs, version, release=False, root=ROOT):
    "Finish the site in the folder `docs`"
    pages = []
    for path in sorted(docs.rglob('*.html')):
        name = path.relative_to(docs).as_posix()
        old = path.read_text(encoding='utf-8')
        new = finish_page(old, name, version, release)
        if new!=old: path.write_text(new, encoding='utf-8')
        if (docs/f'{name}.md').exists(): pages.append((name, title_of(new), meta(new, 'description')))
    for path in docs.rglob('*.css'):
        old = path.read_text(encoding='utf-8')
        new = without_other_hosts(old)
        if new!=old: path.write_text(new, encoding='utf-8')
    (docs/'llms.txt').write_text(llms_text(pages), encoding='utf-8')
    search = docs/'search.json'
    entries = json.loads(search.read_text(encoding='utf-8'))
    search.write_text(json.dumps(search_definitions(entries, public_symbols(root))), encoding='utf-8')
    return len(pages)

# -- versions

def releases(published):
    "Numbers of the releases that are kept, newest first"
    def version(path):
        try: return Version(path.name)
        except InvalidVersion: return None
    found = [(version(p), p.name) for p in published.iterdir() if p.is_dir() and version(p)]
    return [name for _,name in sorted(found, reverse=True)]

def versions_page(numbers, dev):
    "The page that lists all versions"
    rows = [f'<li><a href="{n}/index.html">{n}</a>{" (newest)" if i==0 else ""}</li>' for i,n in enumerate(numbers)]
    if dev: rows.append('<li><a href="dev/index.html">development</a>: what is on the main branch</li>')
    return f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Versions of kdmed</title>
<style>body {{ font: 1.1rem/1.5 sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }}</style>
</head><body><main><h1>Versions of kdmed</h1>
<p>Each release has its own documentation; every page names its version at the top.</p>
<ul>
{chr(10).join(rows)}
</ul></main></body></html>
'''

def place(docs, published, version, release=False):
    "Put the site in `docs` among the versions in `published`; the folder it went to"
    published.mkdir(parents=True, exist_ok=True)
    target = published/(version if release else 'dev')
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(docs, target)
    numbers = releases(published)
    if (release and numbers[0]==version) or not numbers: # at the top is the newest release, or the first site
        kept = {*numbers, 'dev', '.git', 'CNAME'}
        for old in published.iterdir():
            if old.name in kept: continue
            if old.is_dir(): shutil.rmtree(old)
            else: old.unlink()
        shutil.copytree(docs, published, dirs_exist_ok=True)
    (published/'.nojekyll').touch()
    (published/VERSIONS).write_text(versions_page(numbers, (published/'dev').exists()), encoding='utf-8')
    return target

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['finish', 'place'])
    parser.add_argument('docs', type=Path, help='the site that Quarto built')
    parser.add_argument('published', type=Path, nargs='?', help='for `place`: the folder of all versions')
    parser.add_argument('--release', action='store_true', help='this is the site of a release, not of the main branch')
    args = parser.parse_args()
    if not (args.docs/'index.html').exists(): sys.exit(f'{args.docs} has no index.html: run `make docs` first')
    version = package_version()
    if args.what=='finish': print(f'{finish(args.docs, version, args.release)} pages finished')
    elif args.published is None: sys.exit('place needs the folder of all versions')
    else: print(f'placed in {place(args.docs, args.published, version, args.release)}')

if __name__=='__main__': main()
