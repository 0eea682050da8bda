"Run as a script: run the scripts named, one after the other, and print {name: what it printed and warned of} as JSON"
import contextlib
import io
import json
import os
import re
import sys
import time
import traceback
import warnings
from pathlib import Path


# The scripts were written before modules stood in wings
MOVED = {'readers': 'data', 'datasets': 'data', 'images': 'data.images', 'metrics': 'evaluate', 'report': 'evaluate'}

def run(path):
    "Run a script as if it were called by itself"
    source = re.sub(r'(?<=from kdmed\.)\w+', lambda found: MOVED.get(found[0], found[0]), path.read_text(encoding='utf-8'))
    source = source.replace('.voices', '.members')
    exec(compile(source, str(path), 'exec'), dict(__name__='__main__', __file__=str(path)))


def output_of(path):
    "What a script prints, with its warnings as lines `warning: …`, and its error, if it ends with one"
    printed,folder = io.StringIO(),os.getcwd()
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter('default')
            warnings.showwarning = lambda message, *_: print(f'warning: {message}')
            run(path)
    except BaseException: printed.write('\n' + traceback.format_exc())
    finally: os.chdir(folder)
    return printed.getvalue()


def main(*paths):
    found = {}
    for path in map(Path, paths):
        started = time.process_time()
        found[path.name] = output_of(path)
        print(f'{path.name}: {time.process_time()-started:.0f} s', file=sys.stderr)
    print(json.dumps(found))


if __name__=='__main__': main(*sys.argv[1:])
