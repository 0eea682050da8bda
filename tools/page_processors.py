"""What is done to a page between nbdev and Quarto: `doc_procs` in pyproject.toml names these.

Quarto wraps the output of a cell that has times of execution in a block, where headings are not listed under "On this
page"; the times differ from build to build, too. nbdev documents a class without its methods, names types after
`__main__`, where it ran the cells, gives two headings that differ in case only the same anchor, and links a symbol
within the text of a link, which then is no link at all.
"""
import ast, importlib, inspect, re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer

from readme import FENCED

HEADING = re.compile(r'^(#{1,6}) +(.+?)[ \t]*$', re.M)
FOLDED = 'tutorials', 'papers', 'explanations' # folders whose checks are folded; imports are everywhere
HOOK = re.compile(r'(before|after)_(fit|epoch|train|validate|batch|pred|loss|backward|step|cancel_\w+|all)$')
CHECKS = re.compile(r'(test_\w+|expect_fail|check_\w+)$')

# -- cells

def drop_execution(cell):
    "Without times of execution a symbol's heading stands on the page itself, and two builds are equal"
    if cell.cell_type=='code': cell.metadata.pop('execution', None)

def shown_symbol(cell):
    "The symbol that a `show_doc` cell documents, or None"
    found = cell.cell_type=='code' and re.search(r'^show_doc\(([\w.]+)\)\s*$', cell.source, re.M)
    return found[1] if found else None

def map_markdown(cell, function):
    "Apply `function` to the text of each Markdown output"
    for out in cell.get('outputs', []):
        text = out.get('data', {}).get('text/markdown')
        if text is not None: out['data']['text/markdown'] = function(''.join(text))

def plain_types(text):
    "A signature as the module has it: no `__main__.`, and no type that says only that the default is None"
    return re.sub(r'\b__main__\.', '', text).replace(':NoneType=None', '=None')

def clean_signatures(cell):
    if shown_symbol(cell): map_markdown(cell, plain_types)

def one_title(cell):
    "A report that a cell shows has a title, <h1>, which on the page is a heading below the page's own"
    for out in cell.get('outputs', []):
        text = ''.join(out.get('data', {}).get('text/html', ''))
        if '<h1' in text: out['data']['text/html'] = re.sub(r'<(/?)h1\b', r'<\1h2', text)

# -- folded cells

def is_call(node, name):
    "Whether an expression is a call of a function whose name matches"
    func = getattr(node, 'func', None)
    return isinstance(node, ast.Call) and bool(name.match(getattr(func, 'id', getattr(func, 'attr', ''))))

def is_check(node):
    "Whether a statement only tests"
    if isinstance(node, ast.Assert): return True
    if isinstance(node, ast.Expr): return is_call(node.value, CHECKS)
    if isinstance(node, ast.With): return all(is_call(i.context_expr, CHECKS) for i in node.items)
    if isinstance(node, ast.For): return all(map(is_check, node.body))
    return False

def kind(source):
    "`Imports` or `Checks`, if the code does nothing else; None otherwise"
    try: statements = ast.parse(source).body
    except SyntaxError: return None # a magic
    if not statements: return None
    if all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements): return 'Imports'
    return 'Checks' if all(map(is_check, statements)) else None

def fold(cell, folder=''):
    "Fold cells that only import, and in lessons of the folders `FOLDED` those that only check"
    if cell.cell_type!='code' or 'code-fold' in cell.source: return
    if re.search(r'^#\| *echo: *false', cell.source, re.M): return
    summary = kind(cell.source)
    if summary=='Imports' or (summary=='Checks' and folder in FOLDED):
        cell.source = f'#| code-fold: true\n#| code-summary: "{summary}"\n{cell.source}'

class FoldCells(Processor):
    def cell(self, cell): fold(cell, Path(self.nb.path_).parent.name)

# -- methods

def public_methods(cls):
    "(name, object) of the public methods and properties that a class defines itself, in order"
    for name,o in vars(cls).items():
        o = getattr(o, '__func__', o)
        if not name.startswith('_') and (inspect.isfunction(o) or isinstance(o, property)): yield name,o

def method_text(qualified, method):
    "Markdown that documents a method under an anchor; without a docstring, and of a callback's hooks, the anchor alone"
    if not inspect.getdoc(method) or HOOK.search(qualified): return f'<span id="{qualified.lower()}"></span>'
    if isinstance(method, property): return f'#### {qualified}\n\n*{inspect.getdoc(method)}*'
    text = BasicMarkdownRenderer(method, name=qualified, title_level=4)._repr_markdown_()
    text = text.replace('#LNone)', f'#L{inspect.getsourcelines(method)[1]})') # nbdev finds lines of functions only
    return NbdevLookup().linkify(plain_types(text.removeprefix('---\n\n')))

def linked_methods(cls):
    "Names of the public methods that links may lead to, those that fastai moves elsewhere included"
    symbols = importlib.import_module('kdmed._modidx').d['syms'].get(cls.__module__, {})
    start = f'{cls.__module__}.{cls.__name__}.'
    return [n.removeprefix(start) for n in symbols if n.startswith(start) and not n.startswith(start+'_')]

def methods_text(cls):
    "Markdown for all methods of a class: those that are documented, then anchors of the others"
    methods = dict(public_methods(cls))
    texts = [method_text(f'{cls.__name__}.{name}', m) for name,m in methods.items()]
    texts += [f'<span id="{cls.__name__.lower()}.{name.lower()}"></span>'
              for name in linked_methods(cls) if name not in methods]
    bare = ''.join(t for t in texts if t.startswith('<span'))
    return '\n\n'.join([*(t for t in texts if not t.startswith('<span')), *([bare] if bare else [])])

class AddMethods(Processor):
    "Below the documentation of a class that of its methods, each under its anchor"
    def begin(self):
        code = '\n'.join(c.source for c in self.nb.cells if c.cell_type=='code')
        source = Path(self.nb.path_).read_text(encoding='utf-8') if hasattr(self.nb, 'path_') else code
        found = re.search(r'#\| *default_exp:? +([\w.]+)', source)
        self.module = importlib.import_module(f'kdmed.{found[1]}') if found else None

    def cell(self, cell):
        symbol = shown_symbol(cell)
        cls = getattr(self.module, symbol, None) if symbol and self.module else None
        if not inspect.isclass(cls): return
        more = methods_text(cls)
        if more: map_markdown(cell, lambda text: f'{text.rstrip()}\n\n{more}')

# -- anchors

def anchor(heading):
    "The anchor that Pandoc gives a heading"
    explicit = re.search(r'\{[^}]*#([\w.:-]+)[^}]*\}\s*$', heading)
    if explicit: return explicit[1]
    text = re.sub(r'!?\[([^]]*)\]\([^)]*\)|\{[^}]*\}\s*$', r'\1', heading).strip().lower()
    return re.sub(r'^[^a-zA-Z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text))) or 'section'

def map_unfenced(text, function):
    "`text` with `function` applied to what is in no fence"
    parts,at = [],0
    for fence in re.finditer(FENCED, text, re.M|re.S):
        parts += [function(text[at:fence.start()]), fence[0]]
        at = fence.end()
    return ''.join([*parts, function(text[at:])])

def map_headings(text, function):
    "`text` with `function(level, heading)` in place of each heading that is not in a fence"
    def replace(m): return f'{m[1]} {function(m[1], m[2])}'
    return map_unfenced(text, lambda part: HEADING.sub(replace, part))

@lru_cache
def twins():
    "{class: anchor} of those whose name is a function's, too, but for case: links could not tell them apart"
    found = defaultdict(set)
    for symbols in importlib.import_module('kdmed._modidx').d['syms'].values():
        for name,(url,_) in symbols.items(): found[url].add(name.split('.')[-1])
    several = [names for url,names in found.items() if len(names) > 1]
    return {n: f'{n.lower()}-class' for names in several for n in names if n[0].isupper()}

class SeparateAnchors(Processor):
    "Headings that would share an anchor get one of their own; symbols, which links lead to, keep theirs"
    def begin(self):
        self.symbols,self.taken = set(),set()
        def note(level, heading):
            self.symbols.add(anchor(heading))
            return heading
        for cell in self.nb.cells:
            if shown_symbol(cell): map_markdown(cell, lambda text: map_headings(text, note))

    def own(self, heading, is_symbol):
        wanted = twins().get(heading, anchor(heading)) if is_symbol else anchor(heading)
        name,k = wanted,1
        while name in self.taken or (not is_symbol and name in self.symbols): name,k = f'{wanted}-{k}',k+1
        self.taken.add(name)
        return heading if name==anchor(heading) else f'{heading} {{#{name}}}'

    def cell(self, cell):
        is_symbol = shown_symbol(cell) is not None
        def change(text): return map_headings(text, lambda level, heading: self.own(heading, is_symbol))
        if cell.cell_type=='markdown': cell.source = change(cell.source)
        else: map_markdown(cell, change)

# -- links

NESTED = re.compile(r'(?<!!)\[\[(`[^`\n]+`)\]\([^()\s]*\)\](?=\()')
SYMBOL = re.compile(r'\[`(\w+)`\]\((https?:[^()\s#]*#)(\w+)\)')

def plain_links(text):
    "Links to symbols within the text of a link are taken out, and links to a class lead to the class"
    def lead(m): return f'[`{m[1]}`]({m[2]}{twins()[m[1]]})' if m[1] in twins() and m[3]==m[1].lower() else m[0]
    return map_unfenced(text, lambda part: SYMBOL.sub(lead, NESTED.sub(r'[\1]', part)))

def fix_links(cell):
    if cell.cell_type=='markdown': cell.source = plain_links(cell.source)
    else: map_markdown(cell, plain_links)
