"""Plant bugs in modules, one at a time, and see whether a lesson of the module's own notebook fails.

    mutation.py list MODULE…    every bug that would be planted
    mutation.py try MODULE…     plant them, and print which ones no lesson sees
    mutation.py all             all modules of `mutation_scores.py`, two at a time, with a table; fails below its scores

A notebook runs once. Before each cell the process is copied (`os.fork`). Bugs that this cell is the first to reach
are planted in such copies, one in each: the function gets other code, and lessons run until one fails. So no bug meets
the traces of another, and lessons before the bug are not run again. Which bugs there are, `mutants.py` says.
"""
import argparse, ast, contextlib, copy, gc, json, linecache, os, re, select, shutil, signal, subprocess, sys, tempfile
import time, traceback, types
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mutants as M
from mutation_scores import EQUIVALENT, LEAST, PARTS, SHARE
from planted_bugs import BUGS

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = re.compile(r'^#\|\s*(export|default_exp|cuda|slow|notest|eval:\s*false)', re.M)
PATIENCE = 15 # seconds of processor time for lessons behind the first cell that reaches a bug of the general kind
LONG_PATIENCE = 60 # the same for a bug named one by one, which must be seen
SLOWER = 8 # by which factor a clock may be ahead of the processor time, on a machine with other work

def file_of(module):
    "The file of a module, of which there is one by this name"
    found, = (ROOT/'kdmed').glob(f'*/{module}.py')
    return found

def source_of(module): return file_of(module).read_text(encoding='utf-8')
def there(module): return any((ROOT/'kdmed').glob(f'*/{module}.py'))

def lessons(module):
    "The cells of the module's notebook that are not exported, as text"
    notebook, = (p for p in (ROOT/'nbs').glob('*/*.ipynb') if re.fullmatch(rf'\d+_{module}', p.stem))
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    code = (''.join(c['source']) for c in cells if c['cell_type']=='code')
    return [c for c in code if not SKIPPED.search(c)]

def bugs_of(
    module,
    source,       # Of the module
    sample=None,  # So many bugs, those drawn first; all by default
    part=(1, 1),  # (i, n): every n-th bug
)->list: # Of `Mutant`s
    "Bugs named one by one, and those of the general kind that are not known to change nothing"
    named,_ = M.picked(source, BUGS.get(module, []))
    general = [m for m in M.mutants(source) if m.key not in EQUIVALENT.get(module, {})]
    if sample is None: found = [*named, *drawn(general, round(len(general)*SHARE.get(module, 1)))]
    else: found = drawn([*named, *general], sample)
    return found[part[0]-1::part[1]]

def drawn(bugs, n):
    "The `n` bugs that are drawn first, in the order of `bugs`"
    first = {id(b) for b in sorted(bugs, key=lambda b: b.draw)[:n]}
    return [b for b in bugs if id(b) in first]

# -- a module whose functions can be exchanged

def blocks_of(tree):
    "{place of a list of statements inside a function}"
    found = set()
    def visit(node, place, within):
        within = within or isinstance(node, M.FUNCTIONS)
        for name,value in ast.iter_fields(node):
            if isinstance(value, ast.AST): visit(value, (*place, name), within)
            elif isinstance(value, list):
                if within and value and isinstance(value[0], ast.stmt): found.add((*place, name))
                for k,child in enumerate(value):
                    if isinstance(child, ast.AST): visit(child, (*place, name, k), within)
    visit(tree, (), False)
    return found

def with_traces(tree, places):
    "A copy of the tree whose blocks note in `__touched__` that they run"
    tree = copy.deepcopy(tree)
    for number,place in sorted(enumerate(places), key=lambda found: -len(found[1])): # a note moves what is below it
        body = M.at(tree, place)
        note, = ast.parse(f'__touched__.add({number})').body
        body.insert(int(M.is_docstring(body[0])), M.place_like(note, body[0]))
    return tree

class Laboratory:
    "A module, run from its source with traces, its lessons, and bugs"
    def __init__(self, module, bugs=()):
        path = file_of(module)
        self.name,self.wing,self.filename = module,path.parent.name,f'<planted {module}>'
        self.tree,self.bugs,self.touched = ast.parse(path.read_text(encoding='utf-8')),{b.key: b for b in bugs},set()
        self.lessons = lessons(module)
        self.code = [as_cell(c, k) for k,c in enumerate(self.lessons)]

    def start(self, tree):
        "Run the module as `tree` says"
        self.module = types.ModuleType('kdmed.planted')
        sys.modules['kdmed.planted'] = self.module # where a pickle looks for its classes
        self.module.__package__,self.module.__touched__ = f'kdmed.{self.wing}',self.touched
        exec(compile(tree, self.filename, 'exec', dont_inherit=True), vars(self.module))

    def start_with_traces(self):
        places = sorted(blocks_of(self.tree), key=str)
        self.numbers = {place: k for k,place in enumerate(places)}
        self.start(with_traces(self.tree, places))
        self.functions = defaultdict(list)
        for f in gc.get_objects():
            if isinstance(f, types.FunctionType) and f.__code__.co_filename==self.filename:
                self.functions[f.__code__.co_name, f.__code__.co_firstlineno].append(f)
        self.at_import = set(self.touched)
        gc.collect()
        gc.freeze() # what copies do not look through, they share

    def block(self, bug):
        "The number of the block a bug is in; None when the module must run anew for it"
        way = function_place(self.tree, bug.place)
        if way is None: return None
        place = (*way, 'body') if default_of(bug.place) else bug.place
        inner = (self.numbers.get(place[:n]) for n in range(len(place), len(way), -1))
        number = next((n for n in inner if n is not None), None)
        return None if number is None or number in self.at_import else number

    def plant(self, bug):
        "Exchange the code, or a default, of the function that holds the bug; True when that worked"
        way,planted = function_place(self.tree, bug.place),M.plant(self.tree, bug)
        function = M.at(self.tree, way)
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        there = self.functions.get((function.name, first), [])
        if (default := default_of(bug.place)) and default[:len(way)]==way and len(default)==len(way)+3:
            value = eval(compile(ast.Expression(M.at(planted, default)), 'default', 'eval'), vars(self.module))
            for f in there: set_default(f, function, default, value)
            return bool(there)
        top = ast.Module([M.at(planted, bug.place[:2])], [])
        code = code_of(compile(top, self.filename, 'exec', dont_inherit=True), function.name, first)
        if not there or any(f.__code__.co_freevars!=code.co_freevars for f in there): return False
        for f in there: f.__code__ = code
        return True

    def run(self, k):
        "Run a lesson, as `__main__`: what it defines is a user's and no library's"
        import matplotlib.pyplot as plt
        before,self.module.__name__ = (self.module.__name__, sys.modules['__main__']),'__main__'
        sys.modules['__main__'] = self.module
        try: exec(self.code[k], vars(self.module))
        finally:
            self.module.__name__,sys.modules['__main__'] = before
            plt.close('all')

def as_cell(text, k):
    "The code of a lesson, whose source can be found as that of a notebook's cell can"
    name = f'<lesson {k}>'
    linecache.cache[name] = len(text), None, text.splitlines(True), name
    return compile(text, name, 'exec')

def default_of(place):
    "The place of the default of an argument that a place is in, or None"
    for n in range(len(place)):
        if place[n] in ('defaults', 'kw_defaults'): return place[:n+2]

def function_place(tree, place):
    "The place of the outermost function around a place"
    for n in range(len(place)+1):
        if isinstance(M.at(tree, place[:n]), M.FUNCTIONS): return place[:n] if n < len(place) else None

def code_of(code, name, line):
    "The code of a function, within the code of what defines it"
    if code.co_name==name and code.co_firstlineno==line: return code
    inner = (code_of(c, name, line) for c in code.co_consts if isinstance(c, types.CodeType))
    return next(filter(None, inner), None)

def set_default(f, function, place, value):
    kind,k = place[-2:]
    if kind=='defaults': f.__defaults__ = (*f.__defaults__[:k], value, *f.__defaults__[k+1:])
    else: f.__kwdefaults__ = {**f.__kwdefaults__, function.args.kwonlyargs[k].arg: value}

# -- copies of the process

class TimeUp(BaseException): pass
def raise_time_up(*_): raise TimeUp()

def limit_processor_time(seconds):
    "Raise `TimeUp` when this process has worked for so long, whatever else the machine does; 0: no limit"
    signal.signal(signal.SIGPROF, raise_time_up)
    signal.setitimer(signal.ITIMER_PROF, seconds)

def in_a_copy(work, limit):
    "What `work()` returns in a copy of this process, as JSON; a word where it does not: 'hangs', 'crashes'"
    source,sink = os.pipe()
    pid = os.fork()
    if pid==0:
        os.close(source)
        try:
            os.setpgrp()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            os.write(sink, json.dumps(work()).encode())
        finally: os._exit(0)
    os.close(sink)
    answer = read_until(source, time.monotonic()+limit)
    with contextlib.suppress(ProcessLookupError, PermissionError): os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(source)
    if answer is None: return 'hangs'
    return json.loads(answer) if answer else 'crashes'

def read_until(source, end):
    "Everything written to a pipe until it is closed; None when that takes too long"
    parts = []
    while (left := end-time.monotonic()) > 0:
        if not select.select([source], [], [], left)[0]: break
        part = os.read(source, 1<<16)
        if not part: return b''.join(parts).decode()
        parts.append(part)

class Folder:
    "The folder for temporary files, as each copy finds it before a lesson: copies share a disk"
    def __init__(self, root): self.live,self.before,self.after = (Path(root)/n for n in ('live', 'before', 'after'))
    def keep(self):
        shutil.rmtree(self.before, ignore_errors=True)
        shutil.copytree(self.live, self.before, symlinks=True)
    def leave(self): self.live.rename(self.after)
    def renew(self):
        shutil.rmtree(self.live, ignore_errors=True)
        shutil.copytree(self.before, self.live, symlinks=True)
    def come_back(self):
        shutil.rmtree(self.live, ignore_errors=True)
        self.after.rename(self.live)

# -- the experiment

def verdict(seen, **more): return dict(seen=seen, **more)

def run_on(lab, first, own, patience):
    "Run the lessons from `first` on, and say which one fails; the first may take `own` seconds, the others `patience`"
    limit_processor_time(own)
    for k in range(first, len(lab.lessons)):
        try:
            lab.run(k)
            if k==first: limit_processor_time(patience)
        except TimeUp: return verdict(k==first, how='hangs' if k==first else 'time is up', cell=k)
        except BaseException as error:
            limit_processor_time(0)
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith('<lesson ')]
            line = lab.lessons[k].splitlines()[lines[0]-1] if lines else ''
            return verdict(True, how=type(error).__name__, cell=k, line=line.strip()[:200])
    return verdict(False, how='no lesson fails', cell=None)

def patience_with(bug): return LONG_PATIENCE if bug.picked else PATIENCE

def one_try(lab, bug, first, own):
    "The verdict on a bug that the lesson `first` reaches"
    patience = patience_with(bug)
    def work(): return run_on(lab, first, own, patience) if lab.plant(bug) else None
    found = in_a_copy(work, SLOWER*(own + patience))
    return verdict(True, how=found, cell=first) if isinstance(found, str) else found

def try_anew(lab, bug):
    "The verdict on a bug outside of functions: the module runs anew"
    def work():
        try: lab.start(ast.fix_missing_locations(M.plant(lab.tree, bug)))
        except Exception as error: return verdict(True, how=type(error).__name__, cell=-1, line='import')
        return run_on(lab, 0, patience_with(bug), patience_with(bug))
    found = in_a_copy(work, 2*SLOWER*patience_with(bug))
    return verdict(True, how=found, cell=0) if isinstance(found, str) else found

class Copy:
    """A copy of this process from before the lesson `first`, or from before the module when that is None.

    It waits until it is asked to try bugs."""
    def __init__(self, lab, folder, first):
        self.folder = folder
        ask,self.sink = os.pipe()
        self.source,answer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(ask), os.close(answer)
            return
        os.close(self.sink), os.close(self.source)
        try: self.serve(lab, first, ask, answer)
        except BaseException: traceback.print_exc()
        finally: os._exit(0)

    def serve(self, lab, first, ask, answer):
        with os.fdopen(ask) as f: request = f.read()
        if not request: return
        keys,took,end = json.loads(request)
        found = {}
        for key in keys:
            if end is not None and time.monotonic() > end: break
            self.folder.renew()
            os.chdir(self.folder.live)
            bug = lab.bugs[key]
            found[key] = try_anew(lab, bug) if first is None else one_try(lab, bug, first, 5*took + 5)
        with os.fdopen(answer, 'w') as f: f.write(json.dumps(found))

    def judge(self, bugs, took=0, end=None):
        "{key: verdict}, as far as the time goes; None for a bug whose function cannot be exchanged"
        if bugs: self.folder.leave()
        with os.fdopen(self.sink, 'w') as f: f.write(json.dumps([[b.key for b in bugs], took, end]) if bugs else '')
        with os.fdopen(self.source) as f: answer = f.read()
        os.waitpid(self.pid, 0)
        if bugs: self.folder.come_back()
        return json.loads(answer) if answer else {}

def experiment(module, bugs, end=None):
    "{key: verdict} of bugs in a module; those that are not tried by `end`, of `time.monotonic`, are left out"
    import matplotlib
    matplotlib.use('Agg')
    os.environ['IN_TEST'] = '1'
    lab = Laboratory(module, bugs)
    with tempfile.TemporaryDirectory(prefix='kdmed-mutation-') as root, open(os.devnull, 'w') as silent:
        folder = Folder(root)
        folder.live.mkdir()
        tempfile.tempdir = str(folder.live)
        os.chdir(folder.live)
        try:
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                return run_through(lab, folder, end)
        finally:
            os.chdir(ROOT)
            tempfile.tempdir = None

def run_through(lab, folder, end):
    "The experiment: the lessons once, and the bugs as the lessons reach them"
    def is_over(): return end is not None and time.monotonic() > end
    folder.keep()
    start = Copy(lab, folder, None)
    lab.start_with_traces()
    blocks,found = {key: lab.block(b) for key,b in lab.bugs.items()},{}
    def pending(): return [b for key,b in lab.bugs.items() if blocks[key] is not None and key not in found]
    for k in range(len(lab.lessons)):
        if not pending() or is_over(): break
        folder.keep()
        before,began = Copy(lab, folder, k),time.process_time()
        lab.touched.clear()
        try: lab.run(k)
        except Exception as error:
            raise RuntimeError(f'without a bug, a lesson of {lab.name} fails:\n{lab.lessons[k]}') from error
        here = [b for b in pending() if blocks[b.key] in lab.touched]
        found |= before.judge(here, time.process_time()-began, end)
    else: found |= {b.key: verdict(False, how='no lesson gets there', cell=None) for b in pending()}
    anew = [b for key,b in lab.bugs.items() if blocks[key] is None or found.get(key, 0) is None]
    return {key: v for key,v in found.items() if v is not None} | start.judge(anew, end=end)

# -- the command

def try_module(module, sample=None, part=(1, 1), end=None):
    "What is known of a module when its bugs were tried, for JSON"
    began = time.monotonic()
    bugs = bugs_of(module, source_of(module), sample, part)
    found = experiment(module, bugs, end)
    rows = [dict(key=b.key, picked=b.picked, **found[b.key]) for b in bugs if b.key in found]
    return dict(module=module, rows=rows, left_out=len(bugs)-len(rows), seconds=time.monotonic()-began)

def lost_bugs():
    """(module, function, what) of the bugs named one by one that cannot be planted, and how many bugs there are.

    A bug may be listed more than once, where code has moved: in the engine, what is wrong tells them apart."""
    lost,planted = [],set()
    for module,bugs in BUGS.items():
        found,gone = M.picked(source_of(module), bugs) if there(module) else ([], bugs)
        planted |= {what_is_wrong(module, b.function, b.what) for b in found}
        lost += [(module, function, what) for function,what,*_ in gone]
    lost = {what_is_wrong(*bug): bug for bug in lost if what_is_wrong(*bug) not in planted}
    return [*lost.values()], len(planted)+len(lost)

def what_is_wrong(module, function, what): return (module, function, what) if module.endswith('losses') else what

def by_kind(result): return [[r for r in result['rows'] if r['picked']==picked] for picked in (True, False)]
def count(rows): return sum(r['seen'] for r in rows),len(rows)
def share(rows): return sum(r['seen'] for r in rows)/len(rows) if rows else 1.

def problems(results):
    "A message for each module in which lessons see less than they did"
    for module,result in results.items():
        named,general = by_kind(result)
        yield from (f"{module}: no lesson sees {r['key']!r} ({r['how']})" for r in named if not r['seen'])
        if not result['left_out'] and share(general) < LEAST[module]:
            seen = f'{share(general):.1%} of the bugs of the general kind'
            yield f'{module}: lessons see {seen}, less than {LEAST[module]:.1%}'

def table(results):
    "Lines of a table: what was seen, module by module and in total"
    yield f"{'module':16} {'named':>9} {'general':>11} {'share':>7} {'least':>7} {'change nothing':>15} {'seconds':>8}"
    sums = [0]*4
    for module,result in results.items():
        named,general = by_kind(result)
        (a,b),(c,d) = count(named),count(general)
        sums = [x+y for x,y in zip(sums, (a, b, c, d))]
        line = f'{module:16} {a:4}/{b:<4} {c:5}/{d:<5} {share(general):7.1%} {LEAST[module]:7.1%}'
        line += f" {len(EQUIVALENT.get(module, {})):15} {result['seconds']:8.0f}"
        yield line + (f"  {result['left_out']} not tried" if result['left_out'] else '')
    a,b,c,d = sums
    yield f"{'total':16} {a:4}/{b:<4} {c:5}/{d:<5}  {a+c} of {b+d} planted bugs are seen, {(a+c)/max(1, b+d):.1%}"

def run_job(job, until):
    "A part of a module, in a process of its own: (module, result or None, error)"
    module,*part = job
    if until and time.time() > until: return module, None, ''
    command = [sys.executable, __file__, 'try', module, '--json', '--part', *map(str, part)]
    if until: command += ['--until', str(until)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode: return module, None, done.stderr[-3000:]
    return module, json.loads(done.stdout.splitlines()[-1]), ''

def run_everything(workers, until=None):
    "All modules, `workers` processes at once; 0 when lessons see what they must, 1 else"
    parts = {m: PARTS.get(m, 1) for m in LEAST if there(m)} # modules with many bugs are taken apart
    jobs = [(m, i+1, n) for m,n in parts.items() for i in range(n)]
    results,failed = {},[]
    with ThreadPoolExecutor(workers) as pool:
        for module,result,error in pool.map(lambda job: run_job(job, until), jobs):
            if result is None and error: failed.append(f'{module}: {error}')
            if result is None: continue
            whole = results.setdefault(module, dict(module=module, rows=[], left_out=0, seconds=0.))
            for key in ('rows', 'left_out', 'seconds'): whole[key] += result[key]
    for module,result in results.items():
        for r in result['rows']:
            if not r['seen']: print(f"{module}: not seen ({r['how']}): {r['key']}")
    lost,known = lost_bugs()
    for bug in lost: print('cannot be planted any more:', *bug)
    print(*table(results), sep='\n')
    print(f'{known-len(lost)} of {known} bugs named one by one are planted')
    wrong = failed + list(problems(results))
    if left := [m for m in parts if m not in results]: print('Not tried:', ', '.join(left))
    if wrong: print(*wrong, sep='\n')
    return int(bool(wrong))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['list', 'try', 'all'])
    parser.add_argument('modules', nargs='*')
    parser.add_argument('--sample', type=int, help='only so many bugs of each module, the same ones each time')
    parser.add_argument('--part', type=int, nargs=2, default=(1, 1), metavar=('I', 'N'), help='every N-th bug')
    parser.add_argument('--until', type=float, help='leave out bugs not tried by this time, in seconds since 1970')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--json', action='store_true', help='print a line of JSON for each module')
    args = parser.parse_args()
    if args.what=='all': sys.exit(run_everything(args.workers, args.until))
    for module in args.modules:
        if args.what=='list':
            for b in bugs_of(module, source_of(module), args.sample, args.part): print(b.key)
            continue
        end = None if args.until is None else time.monotonic() + args.until - time.time()
        result = try_module(module, args.sample, args.part, end)
        if args.json: print(json.dumps(result), flush=True)
        else: tell(result)

def tell(result):
    for r in result['rows']:
        if not r['seen']: print(f"{result['module']}: not seen ({r['how']}): {r['key']}")
    seen,n = count(result['rows'])
    print(f"{result['module']}: {seen} of {n} bugs are seen, in {result['seconds']:.0f} s")

if __name__=='__main__': main()
