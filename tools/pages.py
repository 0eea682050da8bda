"""Which pages' lessons are run when there is not time for all of them, and how long each took.

Those that changed against main, always. Then, as far as the budget goes, pages that use a module that changed,
nearest first, and then all others, quickest first. Tutorials, papers, explanations and README are left to
`make test-all`, unless they changed. The times stand in tools/lesson_times.json, which `make test-all` writes. The
same files on the same commit always give the same choice.
"""
import ast, hashlib, json, re, subprocess
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ROOT/'tools'/'lesson_times.json'
UNKNOWN = 20 # seconds that a page is taken to need which has not been timed
BUDGET = 160 # seconds of lessons, all pages together: half as long on two cores
LONG = 'tutorials', 'papers', 'explanations', 'nbs' # the folders of pages that are run when they changed

Choice = namedtuple('Choice', 'changed using others left base')

def name(path): return path.relative_to(ROOT).as_posix()

def pages():
    "All notebooks that become pages"
    found = sorted((ROOT/'nbs').rglob('*.ipynb'))
    return [p for p in found if not any(part[0] in '._' for part in p.relative_to(ROOT).parts)]

def read_times():
    "{page: seconds} as they were measured"
    return json.loads(TIMES.read_text(encoding='utf-8')) if TIMES.exists() else {}

def write_times(times):
    "Keep the times of pages that exist, the new ones with the old ones that were not measured"
    known = {name(p) for p in pages()}
    kept = {k: round(v, 1) for k,v in sorted((read_times() | times).items()) if k in known}
    TIMES.write_text(json.dumps(kept, indent=1) + '\n', encoding='utf-8')

def seconds(page, times): return times.get(page, UNKNOWN)

# -- what changed

def git(*args):
    "What git says, as lines; None where there is no git, no repository or no such commit"
    try: done = subprocess.run(['git', *args], cwd=ROOT, text=True, capture_output=True)
    except FileNotFoundError: return None
    return done.stdout.split('\n')[:-1] if done.returncode==0 else None

def base_commit():
    "Where this branch left main or, on main itself, the commit before: changes count from there. None if unknown"
    for main in ('origin/main', 'main'):
        found = git('merge-base', 'HEAD', main)
        if not found: continue
        if found==git('rev-parse', 'HEAD'): found = git('rev-parse', '--verify', '--quiet', 'HEAD~1')
        return found[0] if found else None

def shuffled(names):
    "`names` in an order that is another one for each commit: where there is no time for all, each has its turn"
    head = (git('rev-parse', 'HEAD') or [''])[0]
    return sorted(names, key=lambda n: hashlib.sha256(f'{head} {n}'.encode()).hexdigest())

def changed_files(base):
    "Files that differ from a commit, new ones included"
    if base is None: return set()
    return {*(git('diff', '--name-only', base) or []), *(git('ls-files', '--others', '--exclude-standard') or [])}

# -- what uses what

def imported(code, package=()):
    "Modules of kdmed that Python code imports, as `kdmed.a.b`; a name imported from a package may be one, too"
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.split('.')[0]=='kdmed')
        elif isinstance(node, ast.ImportFrom):
            start = '.'.join(package[:len(package)+1-node.level]) if node.level else ''
            whole = '.'.join(filter(None, [start, node.module]))
            if whole.split('.')[0]=='kdmed': yield from (whole, *(f'{whole}.{a.name}' for a in node.names))

def code_cells(page):
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type']=='code']

def uses(page):
    "What the cells of a page import of kdmed"
    found = set()
    for cell in code_cells(page):
        if 'kdmed' not in cell: continue
        try: found |= set(imported(cell))
        except SyntaxError: pass # a magic
    return found

def module_of(page):
    "The module that a page exports, or None"
    exp = re.search(r'^#\|\s*default_exp\s*:?\s*(\S+)', '\n'.join(code_cells(page)), re.M)
    return exp and f'kdmed.{exp[1]}'.removesuffix('.__init__')

def imports_of_modules():
    "{module: modules it imports}, all of kdmed"
    paths = [p.relative_to(ROOT) for p in (ROOT/'kdmed').rglob('*.py') if p.name!='_modidx.py']
    named = {'.'.join(p.with_suffix('').parts).removesuffix('.__init__'): p for p in paths}
    read = {m: set(imported((ROOT/p).read_text(encoding='utf-8'), p.parts[:-1])) for m,p in named.items()}
    return {m: used & read.keys() - {m} for m,used in read.items()}

def distances(changed):
    "{page: steps from a changed module, over what imports what}; a page that uses none is missing"
    modules,everything = imports_of_modules(),pages()
    own = {name(p): module_of(p) for p in everything}
    of_page = {name(p): (uses(p) | {own[name(p)]}) & modules.keys() for p in everything}
    reached = {own[p] for p in changed if own.get(p)}
    reached |= {m for m in modules if changed & {f"{m.replace('.', '/')}.py", f"{m.replace('.', '/')}/__init__.py"}}
    seen,found,steps = set(),{},0
    while reached:
        found |= {p: steps for p,used in of_page.items() if used & reached and p not in found}
        seen |= reached
        reached = {m for m,used in modules.items() if used & reached} - seen
        steps += 1
    return found

# -- the choice

def choose(
    times,         # {page: seconds}
    changed,       # Files that changed
    distance,      # {page: steps from a changed module}
    everything,    # All pages
    budget=BUDGET, # Seconds
    base=None,     # What `changed` refers to
)->Choice: # Lists of pages, each in the order of the choice
    "The pages whose lessons are run"
    mine = [p for p in everything if p in changed]
    rest = [p for p in everything if p not in changed and Path(p).parent.name not in LONG]
    rest.sort(key=lambda p: (distance.get(p, 99), seconds(p, times), p))
    spent,taken = sum(seconds(p, times) for p in mine),[]
    for page in rest:
        if spent+seconds(page, times) > budget: continue
        spent += seconds(page, times)
        taken.append(page)
    using,others = ([p for p in taken if (p in distance)==u] for u in (True, False))
    return Choice(mine, using, others, [p for p in everything if p not in {*mine, *taken}], base)

def chosen(budget=BUDGET):
    "The choice for the working tree"
    base = base_commit()
    changed = changed_files(base)
    return choose(read_times(), changed, distances(changed), [name(p) for p in pages()], budget, base)

def sentence(choice):
    "What was chosen, and why"
    n = sum(map(len, choice[:4]))
    if choice.base: told = [f'{len(choice.changed)} that changed against {choice.base[:7]}']
    else: told = ['none is taken as changed, since git knows no main here']
    if choice.using: told.append(f'{len(choice.using)} that use what changed')
    told.append(f'{len(choice.others)} more, quickest first')
    return f"Lessons of {n-len(choice.left)} of {n} pages: {', '.join(told)}"
