"""Print the table of tested cases as Markdown, kind by kind: what was tried, what must come, which test shows it.

Each part of the project keeps its rows in a file of its own, tests/cases/NAME.csv.
"""
import csv
from collections import namedtuple
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT/'tests'/'cases'
COLUMNS = 'kind','case','expected','test'
Case = namedtuple('Case', [*COLUMNS, 'where']) # where: file and line

def read_cases(folder=CASES):
    "The rows of all files in `folder`; an error where a row is not complete"
    for path in sorted(Path(folder).glob('*.csv')):
        with open(path, encoding='utf-8', newline='') as f:
            rows = csv.reader(f, strict=True)
            header = next(rows, [])
            if tuple(header)!=COLUMNS: raise ValueError(f"{path.name}: the header must be {','.join(COLUMNS)}, got {','.join(header)}")
            for row in rows:
                where = f'{path.name}:{rows.line_num}'
                if len(row)!=len(COLUMNS) or not all(v.strip() for v in row):
                    raise ValueError(f"{where}: each of {', '.join(COLUMNS)} must be filled, got {row}")
                yield Case(*(v.strip() for v in row), where)

def markdown(cases):
    "A section with a table for each kind"
    def cell(text): return ' '.join(text.split()).replace('|', '\\|')
    for kind,rows in groupby(sorted(cases, key=lambda c: c.kind.casefold()), key=lambda c: c.kind):
        yield f'## {kind[0].upper()}{kind[1:]}\n\n| case | expected | test |\n|---|---|---|'
        for c in rows: yield f'| {cell(c.case)} | {cell(c.expected)} | `{cell(c.test)}` |'
        yield ''

def main():
    cases = list(read_cases())
    print(f"# What is tested: {len(cases)} cases of {len({c.kind for c in cases})} kinds\n")
    print('\n'.join(markdown(cases)))

if __name__=='__main__': main()
