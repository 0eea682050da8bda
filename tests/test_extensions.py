"A package outside of kdmed adds a method, a reader, a metric and a recipe: the example of CONTRIBUTING.md, as it is"
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

COMMAND = 'import sys; from kdmed.cli import main; sys.exit(main())' # what the script `kdmed` does


@pytest.fixture(scope='module')
def package(root, tmp_path_factory):
    "A folder as pip would leave it: the module, and the metadata that name it as an extension"
    folder,text = tmp_path_factory.mktemp('site'),(root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    code, = re.findall(r'```python\n("my_kdmed.py".*?)```', text, re.S)
    points, = re.findall(r'```toml\n\[project\.entry-points\."(kdmed\.extensions)"\]\n(.*?)```', text, re.S)
    (folder/'my_kdmed.py').write_text(code)
    (folder/'my_kdmed-0.1.dist-info').mkdir()
    (folder/'my_kdmed-0.1.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: my-kdmed\nVersion: 0.1\n')
    (folder/'my_kdmed-0.1.dist-info/entry_points.txt').write_text(f'[{points[0]}]\n{points[1].replace(chr(34), "")}')
    return folder


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "An npz file of 90 images of 45 patients, dark and bright ones"
    rng,labels = np.random.default_rng(0),np.arange(90)//2 % 3
    pixels = (rng.integers(0, 60, (90, 16, 16, 3)) + 60*labels[:, None, None, None]).astype(np.uint8)
    file = tmp_path_factory.mktemp('data')/'hospital.npz'
    np.savez(file, images=pixels, labels=np.array(['dark', 'gray', 'white'])[labels], patients=np.arange(90)//2)
    return file


def run(package, *command):
    paths = [str(package), *os.environ.get('PYTHONPATH', '').split(os.pathsep)]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(p for p in paths if p))
    command = [sys.executable, '-W', 'ignore', *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow(18)
def test_all_four_are_found_without_being_imported(package):
    code = """
from kdmed.core.extensions import load_extensions
print(load_extensions())
from kdmed.data.readers import READERS
from kdmed.distill.registry import METHODS
from kdmed.evaluate import metrics_table
from kdmed.studies import RECIPES
metrics = str(list(metrics_table().index))
print(READERS['npz'].reads, METHODS['distance'].what, 'warm_logits' in RECIPES, 'my_youden' in metrics, sep=' | ')
"""
    done = run(package, '-c', code)
    assert done.returncode==0, done.stderr
    assert done.stdout.splitlines()[1]=='an npz file of my hospital | mean absolute difference of logits | True | True'


@pytest.mark.slow
def test_the_command_uses_them(package, images, tmp_path):
    options = dict(size=32, teacher='test_resnet', student='test_resnet', epochs=1, teacher_epochs=1, repeats=1)
    options = [part for name,value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = run(package, '-c', COMMAND, 'distill', '--data', images, '--dataset', 'npz', '--method', 'distance',
               '--metric', 'macro_my_youden', '--out', tmp_path/'run', *options)
    assert done.returncode==0, done.stderr[-2000:]
    settings = json.loads((tmp_path/'run/settings.json').read_text())
    assert (settings['dataset'],settings['method'],settings['metric'])==('npz', 'distance', 'macro_my_youden')
    assert 'distance_kd' in (tmp_path/'run/history.csv').read_text().splitlines()[0]
    assert 'my_youden' in (tmp_path/'run/metrics.json').read_text()


@pytest.mark.slow
def test_the_command_runs_the_recipe(package, images, tmp_path):
    command = '-c',COMMAND,'recipe','warm_logits','--data',images
    done = run(package, *command, '--dataset', 'npz', '--out', tmp_path/'recipe')
    assert done.returncode==0, done.stderr[-2000:]
    assert (tmp_path/'recipe/recipe.md').read_text().startswith('# warm_logits')


def test_what_an_extension_cannot_be_is_named(package, tmp_path):
    "A package whose module fails costs only itself"
    broken = tmp_path/'broken-0.1.dist-info'
    broken.mkdir()
    (broken/'METADATA').write_text('Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n')
    (broken/'entry_points.txt').write_text('[kdmed.extensions]\nbroken = no_such_module\n')
    done = run(tmp_path, '-W', 'always', '-c', 'from kdmed.core.extensions import load_extensions; load_extensions()')
    assert done.returncode==0 and "broken: the extension broken (no_such_module) cannot be imported" in done.stderr
