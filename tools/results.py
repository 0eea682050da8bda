"""Make what is in `results/`, and note what it belongs to.

    python tools/results.py list                     # each folder: commit, day, whether settings are today's
    python tools/results.py make --data FOLDER       # all of them, one after the other; long ones resume
    python tools/results.py make demo                # one of them
    python tools/results.py note copies              # after its tool was run by hand

`--data` holds the folders `ham10000`, `pneumonia` and others as Kaggle lays them out; the demo needs none. Each folder
has a `made.json`: the command, the commit, the day, versions, settings, and a fingerprint of these settings."""
import argparse
import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from kdmed.core.files import write_atomic
from kdmed.core.fingerprints import digest

ROOT = Path(__file__).resolve().parent.parent
RESULTS,WORK = ROOT/'results',ROOT/'runs'/'results'
PACKAGES = 'kdmed','torch','timm','fastai','numpy'
REPORT = 'metrics.json','report.md','report.png','history.csv','settings.json'
ABLATION = 'about.json','ablation.md','ablation.png','ablation.svg','cells.csv','differences.csv'


# -- what makes each folder

@dataclass(frozen=True)
class Maker:
    "One folder of results: what is run, one command after the other; `{data}` and `{work}` are filled in"
    commands:tuple # of arguments; the first word is `kdmed`, or a file of this project
    kept:tuple=()  # files that are copied from `{work}`; none: the command writes `results/` itself
    needs:tuple=() # folders of `--data`
    hours:float=0. # of one core, about

    @property
    def tools(self): return [words[0] for words in self.commands if words[0]!='kdmed']

HAM = '--data','{data}/ham10000','--dataset','ham10000'
RECIPE = *HAM,'--scale','.25','--repeats','3','--ablate','--out','{work}'
HANDMADE = 'color','lbp','glcm','hog','shapes','words','gray','nuclei','hog+color+lbp'
EVIDENCE = '--data','{data}','--work','{evidence}'
MAKERS = dict(
    demo=Maker((('kdmed', 'demo', '--out', '{work}', '--force'),), REPORT, hours=.1),
    ham10000=Maker((('kdmed', 'distill', *HAM, '--out', '{work}'),), REPORT, ('ham10000',), 1),
    kd_convnext_ham10000=Maker((('kdmed', 'recipe', 'kd_convnext', *RECIPE),), ABLATION, ('ham10000',), 4),
    multi_stage_kd_ham10000=Maker((('kdmed', 'recipe', 'multi_stage_kd', *RECIPE),), ABLATION, ('ham10000',), 3),
    evidence=Maker(tuple(('tools/evidence.py', what, *EVIDENCE) for what in ('run', 'collect')), (),
                   ('ham10000', 'pneumonia'), 40),
    few_labels=Maker(tuple(('tools/few_labels_evidence.py', what, '--data', '{data}', '--work', '{work}')
                           for what in ('run', 'collect')), (), ('ham10000',), 5),
    scarce_classes=Maker((('tools/scarce_evidence.py', 'collect', '--data', '{data}', '--work', '{work}'),), (),
                         ('ham10000',), .8),
    diffusion=Maker((('tools/diffusion_evidence.py', '--data', '{data}', '--work', '{work}'),), (), ('ham10000',), .4),
    ship=Maker((('tools/ship_results.py', *EVIDENCE),), (), ('ham10000', 'pneumonia'), .5),
    baselines=Maker((('tools/handmade_evidence.py', '--data', '{data}', '--work', '{work}', '--features', *HANDMADE),
                     ('tools/zoo_evidence.py', '--data', '{data}', '--work', '{work}')), (), ('ham10000',), 4),
    foundation_heads=Maker((('tests/foundation_heads.py',),), (), ('ham10000',), .3),
    copies=Maker((('tests/bench_copies.py',),), (), ('ham10000', 'breakhis', 'nih_chestxray14'), .2),
    super_resolution=Maker((('tests/bench_super_resolution.py',),), (), ('pneumonia', 'breakhis'), .3))

def constants(file):
    "Names in capitals and their source, of a file: the settings of a tool"
    tree = ast.parse(file.read_text(encoding='utf-8'))
    named = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]).strip('()').isupper()]
    return {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in named}

def settings_of(name):
    "What decides the results of a folder: the options of its run, or the constants of its tool"
    from kdmed.cli import commands
    if name=='demo':
        return dict(commands.DEMO, images=commands.DEMO_IMAGES, labeled=commands.DEMO_LABELED, seed=0)
    maker = MAKERS[name]
    options = [[w for w in words if w not in ('{data}', '{work}', '{evidence}')] for words in maker.commands]
    return dict(commands=options, constants={tool: constants(ROOT/tool) for tool in maker.tools})

def plain_settings(name): return json.loads(json.dumps(settings_of(name), default=str)) # as they are written
def fingerprint(settings): return digest(json.dumps(settings, sort_keys=True, default=str))


# -- what they belong to

def commit():
    "The commit that is checked out, with `+` if tracked files of the package differ from it"
    def git(*words): return subprocess.run(['git', *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain', '--', 'kdmed') else '')

def versions(): return {name: version(name) for name in PACKAGES} | dict(python=platform.python_version())

def note(name):
    "Write `made.json` beside results that were made just now"
    settings = plain_settings(name)
    command = [' '.join(words) for words in MAKERS[name].commands]
    facts = dict(made_by=command, commit=commit(), date=time.strftime('%Y-%m-%d'), versions=versions(),
                 settings=settings, fingerprint=fingerprint(settings))
    write_atomic(RESULTS/name/'made.json', json.dumps(facts, indent=1) + '\n')

def noted(name): return json.loads((RESULTS/name/'made.json').read_text(encoding='utf-8'))

def is_of_today(name):
    "Whether the settings that made a folder are those of today's code"
    return noted(name)['fingerprint']==fingerprint(plain_settings(name))


# -- making them

def make(name, data=None, out=RESULTS):
    "Run the commands of one folder, and take over what they wrote"
    maker = MAKERS[name]
    if maker.needs and data is None: sys.exit(f'{name} needs --data, a folder with {", ".join(maker.needs)}')
    work = WORK/name
    work.parent.mkdir(parents=True, exist_ok=True)
    folders = dict(data=data, work=work, evidence=WORK/'evidence')
    env = dict(os.environ, **{f'KDMED_{n.upper()}': str(Path(data).resolve()/n) for n in maker.needs})
    for words in maker.commands:
        first,*others = [word.format(**folders) for word in words]
        called = [sys.executable, '-m', 'kdmed.cli'] if first=='kdmed' else [sys.executable, str(ROOT/first)]
        subprocess.run([*called, *others], cwd=ROOT, env=env, check=True)
    (out/name).mkdir(parents=True, exist_ok=True)
    for file in maker.kept: shutil.copy2(work/file, out/name/file)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['list', 'make', 'note'])
    parser.add_argument('names', nargs='*', help=f'of {", ".join(MAKERS)}; default: all')
    parser.add_argument('--data', help='folder with data sets')
    args = parser.parse_args()
    if unknown := set(args.names)-MAKERS.keys():
        sys.exit(f'no results are called {sorted(unknown)}; there are {list(MAKERS)}')
    for name in args.names or MAKERS:
        if args.what=='make':
            print(f'== {name}, about {MAKERS[name].hours:g} hours of one core', flush=True)
            make(name, args.data)
        if args.what!='list': note(name)
        if not (RESULTS/name/'made.json').is_file():
            print(f'{name:25} not made yet')
            continue
        facts = noted(name)
        state = 'settings of today' if is_of_today(name) else 'settings have changed since'
        if facts.get('note'): state += f"; {facts['note']}"
        print(f"{name:25} {facts['commit']:10} {facts['date']}  {state}")

if __name__=='__main__': main()
