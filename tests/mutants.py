"""Bugs planted in a module's syntax tree, where line breaks, comments and renamed variables do not matter.

`mutants(source)` are bugs of the general kind, in every function: an operator turned around, a statement or an
argument left out, another reduction, another dimension. `picked(source, bugs)` are bugs named one by one, as
`(function, what, before, after)`: the expression or statement `before` of `function` becomes `after`. They are
compared as syntax trees. In `before`, `_1`, `_2`, … stand for any expression, the same one each time, and for
that expression they stand in `after`; `...` as the last argument of a call stands for all other arguments, as the
body of an `if` or `with` for any body. Without `after`, a statement is left out. Needs nothing but Python.
"""
import ast, copy, hashlib, re
from collections import Counter
from dataclasses import dataclass, field

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
ANY = re.compile(r'_\d+$')

@dataclass
class Mutant:
    "One bug: where it is, what stands there and what instead"
    function:str   # `name`, `Class.name`, also of a method patched onto a class; '' outside of functions
    what:str       # the kind of bug
    before:str     # as `ast.unparse` writes it
    after:str
    place:tuple    # the way from the module's tree to the node: fields and positions
    new:object     # the node that stands there instead, or a list of statements
    number:int = 1 # of those with the same function, before and after
    picked:bool = False

    @property
    def key(self):
        "A name that survives line breaks and everything that happens elsewhere in the module"
        again = f' ({self.number})' if self.number > 1 else ''
        what = self.what if self.picked else f'{self.before} → {self.after}'
        return f'{self.function}: {what}{again}'

    @property
    def draw(self):
        "A number drawn from the key: the mutants with the least ones are a sample that lasts as the module changes"
        return hashlib.sha256(self.key.encode()).hexdigest()

# -- the tree

def at(tree, place):
    "The node at `place`"
    for step in place: tree = tree[step] if isinstance(step, int) else getattr(tree, step)
    return tree

def plant(tree, mutant):
    "A copy of the module's tree with the bug in it; what the bug does not touch is shared, not copied"
    def changed(node, place):
        if not place: return mutant.new
        step,rest = place[0],place[1:]
        if isinstance(step, int):
            new = changed(node[step], rest)
            return [*node[:step], *(new if isinstance(new, list) else [new]), *node[step+1:]]
        clone = copy.copy(node)
        setattr(clone, step, changed(getattr(node, step), rest))
        return clone
    return changed(tree, mutant.place)

def is_docstring(node): return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

def place_like(new, old):
    "`new`, with its nodes at the line of `old`, as a compiler wants it"
    for node in new if isinstance(new, list) else [new]:
        for n in ast.walk(node):
            if 'lineno' in n._attributes: ast.copy_location(n, old)
    return new

def is_default(place): return place[-2:-1] in (('defaults',), ('kw_defaults',))

def name_of(node):
    "A function's name; a method patched onto a class has the name of the class before it"
    first = next(iter(node.args.posonlyargs + node.args.args), None)
    patched = any('patch' in ast.unparse(d).split('(')[0] for d in node.decorator_list)
    if not patched or first is None or first.annotation is None: return node.name
    return f'{ast.unparse(first.annotation)}.{node.name}'

@dataclass
class Site:
    "A node, its place, the function around it, and what is known of its surroundings"
    node:ast.AST
    place:tuple
    function:str
    parents:list = field(default_factory=list)

def sites(tree):
    "Every node of a module but docstrings, annotations, decorators and the words of messages, each with its place"
    def visit(node, place, function, parents):
        yield Site(node, place, function, parents)
        if isinstance(node, ast.JoinedStr): return
        if isinstance(node, FUNCTIONS): function = '.'.join(filter(None, [function, name_of(node)]))
        if isinstance(node, ast.ClassDef): function = '.'.join(filter(None, [function, node.name]))
        for name,value in ast.iter_fields(node):
            if name in ('annotation', 'returns', 'decorator_list', 'type_comment', 'bases', 'ctx'): continue
            if isinstance(value, ast.AST): yield from visit(value, (*place, name), function, [*parents, node])
            for k,child in enumerate(value if isinstance(value, list) else []):
                if isinstance(child, ast.AST) and not (k==0 and name=='body' and is_docstring(child)):
                    yield from visit(child, (*place, name, k), function, [*parents, node])
    return visit(tree, (), '', [])

def functions(tree): return {s.function for s in sites(tree) if any(isinstance(p, FUNCTIONS) for p in s.parents)}

# -- the general kind

def is_text(node):
    "Whether an expression is a text as it stands in the source"
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))

def nothing(): return ast.Pass()
def is_not(node): return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
def negated(test): return test.operand if is_not(test) else ast.UnaryOp(ast.Not(), test)
def called(node): return getattr(node.func, 'attr', getattr(node.func, 'id', None))
def is_number(node): return isinstance(node, ast.Constant) and type(node.value) in (int, float)
def method(receiver, name, *args): return ast.Call(ast.Attribute(receiver, name, ast.Load()), list(args), [])
def without(items, k): return [*items[:k], *items[k+1:]]

def with_func(call, name):
    "The same call of another function"
    of_object = isinstance(call.func, ast.Attribute)
    func = ast.Attribute(call.func.value, name, ast.Load()) if of_object else ast.Name(name, ast.Load())
    return ast.Call(func, call.args, call.keywords)

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
              ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
COMPARISONS = {ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt],
               ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
               ast.In: [ast.NotIn], ast.NotIn: [ast.In]}
DROPPED_CALLS = {*'detach square exp log sqrt abs clamp clamp_min clamp_max where masked_fill masked_fill_'.split(),
                 *'float double half sigmoid softmax log_softmax flatten eval train clone copy contiguous cpu'.split(),
                 *'as_subclass reshape scatter any all requires_grad_ sum mean'.split()}
OTHER_CALLS = {'mean': ['sum', 'amax'], 'sum': ['mean'], 'amax': ['amin', 'mean'], 'amin': ['amax'],
               'any': ['all'], 'all': ['any'], 'argmax': ['argmin'], 'argmin': ['argmax'], 'logsumexp': ['amax'],
               'min': ['max'], 'max': ['min'], 'log_softmax': ['softmax'], 'softmax': ['log_softmax'],
               'logsigmoid': ['sigmoid'], 'sigmoid': ['tanh'], 'mse_loss': ['l1_loss'],
               'smooth_l1_loss': ['mse_loss'], 'startswith': ['endswith'], 'no_grad': ['enable_grad']}
ALONG = { # functions along a dimension
    *'sum mean amax amin any all argmax argmin logsumexp softmax log_softmax flatten var std gather'.split(),
    *'scatter vector_norm unsqueeze cat stack norm cumsum max min diff sort topk'.split()}
EITHER_WAY = {'min', 'max', 'mse_loss', 'l1_loss', 'smooth_l1_loss', 'cdist', 'equal', 'allclose'} # symmetric
BUILTIN = {'dict', 'set', 'list', 'len', 'print', 'isinstance', 'super', 'range'}

def of_binary(s):
    node = s.node
    if is_text(node.left) or is_text(node.right): return
    if other := ARITHMETIC.get(type(node.op)): yield 'another operator', ast.BinOp(node.left, other(), node.right)
    turned = ast.BinOp(node.right, node.op, node.left)
    if isinstance(node.op, (ast.Sub, ast.Div, ast.MatMult)): yield 'sides are exchanged', turned
    yield 'a factor or summand is dropped', node.left
    if not isinstance(node.op, (ast.Pow, ast.Mod, ast.FloorDiv)): yield 'a factor or summand is dropped', node.right

def of_compare(s):
    node = s.node
    for k,op in enumerate(node.ops):
        for other in COMPARISONS.get(type(op), []):
            ops = [*node.ops[:k], other(), *node.ops[k+1:]]
            yield 'another comparison', ast.Compare(node.left, ops, node.comparators)
    if len(node.ops) > 1:
        yield 'half a comparison', ast.Compare(node.left, node.ops[:-1], node.comparators[:-1])
        yield 'half a comparison', ast.Compare(node.comparators[0], node.ops[1:], node.comparators[1:])

def of_bool(s):
    node = s.node
    yield 'and, or', ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    for k in range(len(node.values)):
        rest = without(node.values, k)
        yield 'a condition is dropped', rest[0] if len(rest)==1 else ast.BoolOp(node.op, rest)

def of_unary(s):
    "A `not`, a minus; or a number with a minus, which the syntax has as an operation on a number"
    if not is_number(s.node.operand): yield 'a sign or a not is dropped', s.node.operand
    elif is_dimension(s): yield 'another dimension', ast.Constant(0)
    else: yield 'a sign is dropped', s.node.operand

def of_if(s):
    node = s.node
    yield 'the condition is negated', ast.If(negated(node.test), node.body, node.orelse)
    only_raises = len(node.body)==1 and isinstance(node.body[0], ast.Raise)
    if not only_raises: yield 'always', [*node.body]
    yield 'never', [*node.orelse] or nothing()

def of_ifexp(s):
    yield 'always', s.node.body
    yield 'never', s.node.orelse

def of_while(s): yield 'never', nothing()

def is_dimension(s):
    "Whether a number says along which dimension a function works"
    parent = s.parents[-1]
    if isinstance(parent, ast.keyword): return parent.arg in ('dim', 'axis')
    return isinstance(parent, ast.Call) and called(parent) in ALONG

def of_constant(s):
    value,parent = s.node.value,s.parents[-1]
    if isinstance(value, bool): yield 'the other truth', ast.Constant(not value)
    elif isinstance(parent, ast.UnaryOp): return
    elif type(value) is int and is_dimension(s): yield 'another dimension', ast.Constant(0 if value else 1)
    elif type(value) is int: yield 'off by one', ast.Constant(value+1)
    elif type(value) is float: yield 'another number', ast.Constant(2*value if value else 1.)
    elif isinstance(parent, ast.keyword) and value in ('mean', 'sum', 'none'):
        yield 'another reduction', ast.Constant('sum' if value=='mean' else 'mean')

def of_call(s):
    "Another function, or none; arguments that are exchanged or left out"
    node,name = s.node,called(s.node)
    of_object,statement = isinstance(node.func, ast.Attribute),isinstance(s.parents[-1], ast.Expr)
    if of_object and name in DROPPED_CALLS and not statement: yield f'{name} is dropped', node.func.value
    for other in OTHER_CALLS.get(name, []):
        if of_object or other in ('all', 'any', 'min', 'max'): yield 'another function', with_func(node, other)
    yield from of_logarithm(node, name)
    yield from of_arguments(node, name, s)

def of_logarithm(node, name):
    "What is the same for numbers that are not too large"
    if name=='log_softmax' and node.args:
        softmax = with_func(node, 'softmax')
        yield 'log of a probability', method(softmax, 'log')
        yield 'log of a clamped probability', method(method(softmax, 'clamp', ast.Constant(1e-7)), 'log')
    if name=='logsigmoid': yield 'log of a probability', method(method(node.args[0], 'sigmoid'), 'log')

def of_arguments(node, name, s):
    of_object = isinstance(node.func, ast.Attribute)
    starred = any(isinstance(a, ast.Starred) for a in node.args)
    first,*rest = node.args or [None]
    if rest and not starred and not is_text(first) and not (is_number(first) and is_number(rest[0])):
        if not (of_object and name in ALONG) and name not in EITHER_WAY:
            yield 'arguments are exchanged', ast.Call(node.func, [rest[0], first, *rest[1:]], node.keywords)
    alone = isinstance(s.parents[-1], (ast.Expr, ast.Raise)) or name in BUILTIN
    of_expression = of_object and not isinstance(node.func.value, ast.Name)
    if first is not None and not isinstance(first, ast.Starred) and not (alone or is_text(first) or of_expression):
        yield 'the first argument comes back', first
    for k,keyword in enumerate(node.keywords):
        if keyword.arg: yield 'an argument is dropped', ast.Call(node.func, node.args, without(node.keywords, k))
    for k,argument in enumerate(node.args):
        if not isinstance(argument, ast.Name) or argument.id not in optional(s.parents): continue
        args = [*node.args[:k], ast.Constant(None), *node.args[k+1:]]
        yield 'an argument is dropped', ast.Call(node.func, args, node.keywords)

def optional(parents):
    "Names of the arguments of the functions around that may be None"
    found = set()
    for f in parents:
        if not isinstance(f, FUNCTIONS): continue
        args = f.args.posonlyargs + f.args.args
        pairs = [*zip(args[::-1], f.args.defaults[::-1]), *zip(f.args.kwonlyargs, f.args.kw_defaults)]
        found |= {a.arg for a,default in pairs if isinstance(default, ast.Constant) and default.value is None}
    return found

LEFT_OUT = ast.AugAssign, ast.Continue, ast.Break, ast.Delete
WAITS = ast.Yield, ast.YieldFrom, ast.Await, ast.Constant

def of_statement(s):
    "Statements that nothing after them needs in order to run"
    node = s.node
    stored = isinstance(node, ast.Assign) and all(isinstance(t, (ast.Attribute, ast.Subscript)) for t in node.targets)
    called_only = isinstance(node, ast.Expr) and not isinstance(node.value, WAITS)
    again = isinstance(node, ast.Assign) and reassigns(s)
    if called_only or stored or again or isinstance(node, LEFT_OUT): yield 'a statement is dropped', nothing()
    if not isinstance(node, ast.Assign) or isinstance(node.value, ast.Tuple): return
    target = node.targets[0]
    if isinstance(target, ast.Tuple) and len(target.elts)==2:
        yield 'results are exchanged', ast.Assign([ast.Tuple(target.elts[::-1], ast.Store())], node.value)

def reassigns(s):
    "Whether an assignment gives a name another value made of its old one"
    names = {n.id for t in s.node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names <= {n.id for n in ast.walk(s.node.value) if isinstance(n, ast.Name)}

def of_return(s):
    if isinstance(s.node.value, (ast.BinOp, ast.Call, ast.UnaryOp)) and 'loss' in s.function.split('.')[-1]:
        yield 'a stray factor', ast.Return(ast.BinOp(ast.Constant(.5), ast.Mult(), s.node.value))

def of_with(s):
    node = s.node
    for k,item in enumerate(node.items):
        if item.optional_vars is not None: continue
        rest = [*node.items[:k], *node.items[k+1:]]
        yield f'without {ast.unparse(item)[:40]}', ast.With(rest, node.body) if rest else [*node.body]

KINDS = {ast.BinOp: of_binary, ast.Compare: of_compare, ast.BoolOp: of_bool, ast.UnaryOp: of_unary, ast.If: of_if,
         ast.IfExp: of_ifexp, ast.While: of_while, ast.Constant: of_constant, ast.Call: of_call, ast.Return: of_return,
         ast.With: of_with, ast.Expr: of_statement, ast.Assign: of_statement, **dict.fromkeys(LEFT_OUT, of_statement)}

def in_message(s):
    "Whether a node is a part of an error or a warning"
    return any(isinstance(p, ast.Raise) or isinstance(p, ast.Call) and called(p)=='warn' for p in s.parents)

def numbered(found):
    "Mutants with the same function, before and after get numbers, and those that are alike altogether are one"
    seen,places = Counter(),set()
    for m in found:
        if (m.place, m.after) in places or m.before==m.after: continue
        places.add((m.place, m.after))
        seen[m.function, m.before, m.after] += 1
        m.number = seen[m.function, m.before, m.after]
        yield m

def mutants(
    source, # Of a module
)->list: # Of `Mutant`s
    "Every bug of the general kind, in all functions"
    found = []
    for s in sites(ast.parse(source)):
        kind = KINDS.get(type(s.node))
        if kind is None or in_message(s) or not any(isinstance(p, FUNCTIONS) for p in s.parents): continue
        for what,new in kind(s):
            new = place_like(copy.deepcopy(new), s.node)
            compound = isinstance(s.node, (ast.If, ast.With)) # its text is long, and `what` says it all
            found.append(Mutant(s.function, what, head(s.node), f'({what})' if compound else head(new), s.place, new))
    return list(numbered(found))

def head(node):
    "A node as text; of a compound statement, its head"
    if isinstance(node, list): return '; '.join(map(head, node))
    if isinstance(node, (ast.If, ast.While)): return f'{type(node).__name__.lower()} {ast.unparse(node.test)}'
    if isinstance(node, ast.With): return f"with {', '.join(map(ast.unparse, node.items))}"
    return ast.unparse(node)

# -- bugs named one by one

def is_open(node): return isinstance(node, ast.Constant) and node.value is ...
def is_open_call(node): return isinstance(node, ast.Call) and bool(node.args) and is_open(node.args[-1])
def is_open_body(nodes):
    return isinstance(nodes, list) and len(nodes)==1 and isinstance(nodes[0], ast.Expr) and is_open(nodes[0].value)
def spelled(node): return node.id if isinstance(node, ast.Name) else node.arg

class Match:
    "What a pattern's `_1`, `_2`, …, its `...` and its outdated names stand for"
    def __init__(self, outdated=()): self.found,self.rest,self.names = {},None,dict.fromkeys(outdated)

    def fits(self, pattern, node):
        "Whether `node`, or a list of nodes, is as `pattern` says"
        if isinstance(pattern, list):
            if is_open_body(pattern) and node and isinstance(node[0], ast.stmt):
                self.rest = node
                return True
            return isinstance(node, list) and len(pattern)==len(node) and all(map(self.fits, pattern, node))
        if not isinstance(pattern, ast.AST): return pattern==node
        if isinstance(pattern, ast.Name) and ANY.match(pattern.id): return self.fits_any(pattern.id, node)
        if type(pattern) is not type(node): return False
        if isinstance(pattern, (ast.Name, ast.arg)): return self.fits_name(spelled(pattern), spelled(node))
        if is_open_call(pattern): return self.fits_call(pattern, node)
        fields = [f for f in pattern._fields if f not in ('ctx', 'kind', 'type_comment')]
        return all(self.fits(getattr(pattern, f), getattr(node, f)) for f in fields)

    def fits_any(self, name, node):
        if name in self.found: return ast.dump(self.found[name])==ast.dump(node)
        self.found[name] = node
        return isinstance(node, ast.expr)

    def fits_name(self, name, there):
        if name not in self.names: return name==there
        if self.names[name] is None: self.names[name] = there
        return self.names[name]==there

    def fits_call(self, pattern, call):
        "A call with `...` has at least the arguments that are named"
        n,named = len(pattern.args)-1,{k.arg: k for k in pattern.keywords}
        there = {k.arg: k for k in call.keywords}
        if len(call.args) < n or not named.keys() <= there.keys(): return False
        self.rest = call.args[n:],[k for k in call.keywords if k.arg not in named]
        keywords = [(k.value, there[a].value) for a,k in named.items()]
        pairs = [(pattern.func, call.func), *zip(pattern.args[:n], call.args), *keywords]
        return all(self.fits(p, c) for p,c in pairs)

class Filled(ast.NodeTransformer):
    "The replacement, with what `_1`, …, `...` and outdated names stand for"
    def __init__(self, match): self.match = match

    def generic_visit(self, node):
        for name in ('body', 'orelse'):
            if is_open_body(getattr(node, name, None)): setattr(node, name, copy.deepcopy(self.match.rest))
        return super().generic_visit(node)

    def visit_Name(self, node):
        if node.id in self.match.found: return copy.deepcopy(self.match.found[node.id])
        return ast.Name(self.match.names.get(node.id) or node.id, node.ctx)

    def visit_Call(self, node):
        if not is_open_call(node): return self.generic_visit(node)
        args,keywords = copy.deepcopy(self.match.rest)
        return self.generic_visit(ast.Call(node.func, [*node.args[:-1], *args], [*node.keywords, *keywords]))

def snippet(code):
    "The nodes of a pattern: one expression, or a list of statements"
    body = ast.parse(code).body
    return body[0].value if len(body)==1 and isinstance(body[0], ast.Expr) else body

def bodies(node):
    "(field, statements) of a compound statement"
    lists = ((f, value) for f,value in ast.iter_fields(node) if isinstance(value, list))
    return [(f, value) for f,value in lists if value and isinstance(value[0], ast.stmt)]

def candidates(pattern, scope, outdated):
    "(place, what is there, `Match`) of everything in `scope` that is as `pattern` says"
    for s in scope:
        options = [(s.place, s.node)]
        if isinstance(pattern, list):
            n = len(pattern)
            options = [((*s.place, f, k), b[k:k+n]) for f,b in bodies(s.node) for k in range(len(b)-n+1)]
        for place,there in options:
            match = Match(outdated)
            if match.fits(pattern, there): yield place, there, match

def inside(everything, function):
    "The nodes of a function, or of a class"
    def own(s):
        if isinstance(s.node, (*FUNCTIONS, ast.ClassDef)):
            name = name_of(s.node) if isinstance(s.node, FUNCTIONS) else s.node.name
            if '.'.join(filter(None, [s.function, name]))==function: return True
        return s.function==function or s.function.startswith(f'{function}.')
    return [s for s in everything if own(s)]

def words(nodes): return {spelled(n) for n in nodes if isinstance(n, (ast.Name, ast.arg))}

def find(before, everything, function):
    """(place, what is there, `Match`) of the only place in `function` that is as the code `before` says, or None.

    Names that the function no longer has may stand for any name. A function that is gone is looked for in the whole
    module, whose sites are `everything`."""
    pattern,own = snippet(before),inside(everything, function)
    if isinstance(pattern, list) and (default := find_default(pattern[0], own)): return default
    if is_text(pattern): return find_text(pattern, own)
    scope = own or everything
    named = words(n for p in (pattern if isinstance(pattern, list) else [pattern]) for n in ast.walk(p))
    outdated = {w for w in named - words(s.node for s in scope) if not ANY.match(w)}
    for names in (set(), outdated):
        found = list(candidates(pattern, scope, names))
        if found: return found[0] if len(found)==1 else None

def find_default(pattern, own):
    "The default of an argument, which a bug gives as `argument = default`"
    if not isinstance(pattern, ast.Assign): return
    name,value = getattr(pattern.targets[0], 'id', ''),ast.dump(pattern.value)
    for s in own:
        kind,args = s.place[-2:-1],s.parents[-1] if s.parents else None
        if kind==('kw_defaults',): names = args.kwonlyargs
        elif kind==('defaults',): names = (args.posonlyargs + args.args)[-len(args.defaults):]
        else: continue
        if names[s.place[-1]].arg==name and ast.dump(s.node)==value: return s.place, s.node, Match()

def find_text(pattern, own):
    "The only text that holds some words, or a value such as `{instead}`; one in the message of an error goes first"
    def holds(part):
        if isinstance(pattern, ast.JoinedStr): return ast.dump(part)==ast.dump(pattern.values[0])
        return isinstance(part, ast.Constant) and isinstance(part.value, str) and pattern.value in part.value
    found = []
    for s in own:
        parts = [(s.place, s.node)]
        if isinstance(s.node, ast.JoinedStr): parts = [((*s.place, 'values', k), v) for k,v in enumerate(s.node.values)]
        found += [(in_message(s), place, part, Match()) for place,part in parts if holds(part)]
    best = [f[1:] for f in found if f[0] or not any(f[0] for f in found)]
    return best[0] if len(best)==1 else None

def picked(
    source, # Of a module
    bugs,   # (function, what, before, after) of each; without `after` the statement is dropped
)->tuple: # The `Mutant`s, and the bugs that cannot be planted
    "Bugs named one by one"
    tree,planted,lost = ast.parse(source),[],[]
    everything = list(sites(tree))
    for function,what,before,after in bugs:
        hit = find(before, everything, function)
        if hit is None: lost.append((function, what, before, after))
        else:
            place,new = replacement(tree, before, after, *hit)
            planted.append(Mutant(function, what, before, after, place, new, picked=True))
    return planted, lost

def replacement(tree, before, after, place, there, match):
    "(place, new node or nodes) that put `after` where `before` was found"
    new = Filled(match).visit(ast.parse(after or 'pass')).body
    if isinstance(there, list): # statements
        *way,name,k = place
        body = getattr(at(tree, way), name)
        return (*way, name), [*body[:k], *place_like(new, there[0]), *body[k+len(there):]]
    if is_text(snippet(before)):
        is_words = isinstance(there, ast.Constant)
        rest = there.value.replace(snippet(before).value, new[0].value.value) if is_words else ''
        return place, place_like(ast.Constant(rest), there)
    if is_default(place): return place, place_like(new[0].value, there) # `argument = default`
    if isinstance(new[0], ast.Expr) and len(new)==1: return place, place_like(new[0].value, there)
    return place[:-1], place_like(new, there) # a statement that is an expression, such as a call
