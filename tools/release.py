"""A release: whether all that names a version agrees with its tag, and what CHANGELOG.md says of it.

    release.py check v0.1.0    fails unless package, CITATION.cff, site and a dated section of CHANGELOG.md are of 0.1.0
    release.py notes v0.1.0    prints that section
"""
import argparse, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATE = r'\d{4}-\d\d-\d\d'

def sections(text):
    "{version: (date or what stands for it, text)} of a changelog"
    parts = re.split(r'^## \[(.+?)\] - (.+)$', text, flags=re.M)
    return {version: (date.strip(), body.strip()) for version,date,body in zip(parts[1::3], parts[2::3], parts[3::3])}

def stated(pattern, path):
    "What a file states, or None"
    found = re.search(pattern, path.read_text(encoding='utf-8'), re.M)
    return found[1] if found else None

def problems(tag, root=ROOT):
    "Messages about what keeps a tag from being released"
    if not re.fullmatch(r'v\d+\.\d+\.\d+\S*', tag): yield f'the tag must be like v0.1.0, got {tag}'
    version = tag.removeprefix('v')
    places = {'kdmed/__init__.py': r'^__version__ = "(.+)"', 'CITATION.cff': r'^version: "?([^"\n]+)"?$',
              '_quarto.yml': r'^    title: kdmed (\S+)'}
    for name,pattern in places.items():
        found = stated(pattern, root/name)
        if found!=version: yield f'{name} states {found}, the tag {version}'
    date,body = sections((root/'CHANGELOG.md').read_text(encoding='utf-8')).get(version, (None, ''))
    if date is None: yield f'CHANGELOG.md has no section `## [{version}] - DATE`'
    elif not re.fullmatch(DATE, date):
        yield f'CHANGELOG.md gives {date!r} as the date of {version}: write it as 2026-01-31'
    elif stated(rf'^date-released: "?({DATE})"?$', root/'CITATION.cff')!=date:
        yield f'CITATION.cff must state `date-released: {date}`, the date in CHANGELOG.md'
    if date and not body: yield f'CHANGELOG.md says nothing of {version}'

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['check', 'notes'])
    parser.add_argument('tag')
    args = parser.parse_args()
    if args.what=='check':
        found = list(problems(args.tag))
        if found: sys.exit('\n'.join(found))
        print(f'{args.tag} can be released')
    else:
        known = sections((ROOT/'CHANGELOG.md').read_text(encoding='utf-8'))
        if args.tag.removeprefix('v') not in known: sys.exit(f'CHANGELOG.md has no section for {args.tag}')
        print(known[args.tag.removeprefix('v')][1])

if __name__=='__main__': main()
