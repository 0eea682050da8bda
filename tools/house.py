"""What the package looks like to someone who opens it: widths, patches, private names that travel, long cells.

`python tools/house.py` prints the table; each figure has a limit, and what is over it is listed. A limit is lowered when a figure has come down."""
import argparse, ast, json, re, sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH,LONG_CELL = 120,40

LIMITS = { # most that is allowed; `None`: for information
    f'lines over {WIDTH} columns': 4419,
    'uses of @patch': 258,
    'private names imported across modules': 0,
    f'exported cells over {LONG_CELL} lines': 81,
    'names with two meanings': 0,
    'longest function, in lines': None,
    'modules': None,
    'public names': None,
}

def modules(): return sorted(p for p in (ROOT/'kdmed').rglob('*.py') if p.name != '_modidx.py')
def name(path): return path.relative_to(ROOT).as_posix()

def notebook_code():
    "(place, source) of every code cell"
    for path in sorted((ROOT/'nbs').rglob('[!_.]*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == 'code': yield f"{name(path)}, cell {cell.get('id')}", ''.join(cell['source'])

def long_lines():
    "Lines of code that do not fit, in notebooks, tests and tools"
    paths = [p for folder in ('tests', 'tools') for p in sorted((ROOT/folder).rglob('*.py'))]
    files = [(name(p), p.read_text(encoding='utf-8')) for p in paths]
    for place,text in [*notebook_code(), *files]:
        for number,line in enumerate(text.split('\n'), 1):
            if len(line) > WIDTH: yield f'{place}, line {number}: {len(line)} columns'

def patches():
    "Functions that are patched onto a class"
    for path in modules():
        for number,line in enumerate(path.read_text(encoding='utf-8').split('\n'), 1):
            if re.match(r'@patch\b', line): yield f'{name(path)}:{number}'

def private_imports():
    "Names that begin with an underscore, imported from another module of the package"
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom): continue
            if not node.level and not (node.module or '').startswith('kdmed'): continue
            private = [a.name for a in node.names if a.name.startswith('_') and not a.name.startswith('__')]
            yield from (f'{name(path)}: {p} of {node.module}' for p in private)

def long_cells():
    "Exported cells that one does not take in at once"
    for place,source in notebook_code():
        lines,is_list = source.count('\n')+1,re.search(r'^_all_ = ', source, re.M)
        if lines > LONG_CELL and re.match(r'#\|\s*export', source) and not is_list: yield f'{place}: {lines} lines'

def definitions(path):
    "{name: where it is defined} of a module's public names, imported ones included"
    found,exports = {},[]
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found[node.name] = name(path)
        elif isinstance(node, ast.Assign):
            found |= {n.id: name(path) for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            if getattr(node.targets[0], 'id', '') == '__all__': exports = ast.literal_eval(node.value)
    return {n: found[n] for n in exports if n in found}

def public_names():
    "{name: modules that define it}"
    found = defaultdict(set)
    for path in modules():
        for n,where in definitions(path).items(): found[n].add(where)
    return found

def two_meanings(): return [f"{n}: {', '.join(sorted(where))}" for n,where in public_names().items() if len(where) > 1]

def longest_function():
    "(lines, where) of the longest function"
    found = []
    for path in modules():
        functions = (n for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, ast.FunctionDef))
        found += [(f.end_lineno-f.lineno+1, f'{name(path)}: {f.name}') for f in functions]
    return max(found)

def measure():
    "{figure: (number, what it consists of)}"
    counted = dict(zip(LIMITS, ([*f()] for f in (long_lines, patches, private_imports, long_cells, two_meanings))))
    lines,where = longest_function()
    told = {'longest function, in lines': (lines, [where]), 'modules': (len(modules()), []), 'public names': (len(public_names()), [])}
    return {k: (len(v), v) for k,v in counted.items()} | told

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--list', metavar='FIGURE', choices=list(LIMITS), help='list what one figure consists of')
    args = parser.parse_args()
    found = measure()
    if args.list: return print(*found[args.list][1], sep='\n')
    over = []
    for figure,(number,_) in found.items():
        limit = LIMITS[figure]
        print(f'{figure:40} {number:6,}' + ('' if limit is None else f'  (at most {limit:,})'))
        if limit is not None and number > limit: over.append(f'{figure}: {number:,}, at most {limit:,}; --list {figure!r} lists them')
    if over: sys.exit('\n'.join(over))

if __name__ == '__main__': main()
