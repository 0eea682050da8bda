"The table of cases names tests that exist, and no case twice"
import ast
from collections import Counter, defaultdict
from functools import cache

import pytest

import cases
from conftest import ROOT


@cache
def known_tests(path):
    "Names of the tests in a file, as pytest writes them behind the path"
    if not (ROOT/path).is_file(): return frozenset()
    return frozenset(named_tests(ast.parse((ROOT/path).read_text(encoding='utf-8')).body))


def named_tests(body, prefix=''):
    for node in body:
        if isinstance(node, ast.ClassDef): yield from named_tests(node.body, f'{prefix}{node.name}::')
        elif isinstance(node, ast.FunctionDef) and node.name.startswith('test'): yield prefix + node.name


def collected(items):
    "{file: its tests with their parameters}, of the files that were collected whole"
    found = defaultdict(set)
    for item in items:
        path,_,test = item.nodeid.partition('::')
        found[path if (ROOT/path).is_file() else f'tests/{path}'].add(test)
    return {path: tests for path,tests in found.items() if known_tests(path) <= {t.partition('[')[0] for t in tests}}


def dead(rows, whole):
    "A message for each row whose test does not exist; parameters are looked at in files of `whole`"
    for row in rows:
        path,_,test = row.test.partition('::')
        plain = test.partition('[')[0]
        if plain not in known_tests(path): yield f'{row.where}: there is no test {row.test}'
        elif plain!=test and path in whole and test not in whole[path]:
            yield f"{row.where}: {path}::{plain} has no run {test}; it has {sorted(t for t in whole[path] if t.startswith(plain + '['))}"


def twice(rows):
    "A message for each case that is listed again"
    names = Counter((' '.join(r.kind.lower().split()), ' '.join(r.case.lower().split())) for r in rows)
    return [f'{kind}: {case!r} is listed {n} times' for (kind,case),n in names.items() if n>1]


def test_every_case_names_a_test(request):
    wrong = list(dead(cases.read_cases(), collected(request.session.items)))
    assert not wrong, 'mend the rows, or write the tests:\n' + '\n'.join(wrong)


def test_no_case_is_listed_twice():
    assert not (again := twice(cases.read_cases())), '\n'.join(again)


def row(test, kind='a kind', case='a case'): return cases.Case(kind, case, 'a value', test, 'x.csv:2')


def test_a_row_without_its_test_is_found():
    here = 'tests/test_cases.py'
    whole = {here: {'test_a_table_is_written[one]', *known_tests(here)}}
    assert not list(dead([row(f'{here}::test_no_case_is_listed_twice'), row(f'{here}::test_a_table_is_written[one]')], whole))
    for test in ('tests/test_none.py::test_a', f'{here}::test_none', f'{here}::named_tests', here, ''):
        assert 'there is no test' in list(dead([row(test)], whole))[0]
    assert "has no run" in list(dead([row(f'{here}::test_a_table_is_written[two]')], whole))[0]
    assert twice([row('t', case='A case'), row('u', case='a  case'), row('u', case='another')]) == ["a kind: 'a case' is listed 2 times"]


@pytest.mark.parametrize('line', ['a,b,c', 'a,b,,d', 'a,b,c,d,e', '"a,b,c,d'])
def test_an_incomplete_row_is_refused(line, tmp_path):
    (tmp_path/'x.csv').write_text('kind,case,expected,test\n' + line)
    with pytest.raises(Exception, match='x.csv:2|unexpected end of data'): list(cases.read_cases(tmp_path))


def test_a_table_is_written():
    table = '\n'.join(cases.markdown([row('tests/b.py::test_b', 'b kind', 'x | y'), row('tests/a.py::test_a'), row('tests/a.py::test_b', case='second')]))
    assert table.index('## A kind') < table.index('## B kind') and 'x \\| y' in table
    assert table.count('| case | expected | test |') == 2 and '| second | a value | `tests/a.py::test_b` |' in table
