"""Run as a script, this sees only what `pip install kdmed` without extras brings: every other package of this environment is hidden.

It imports every module, asks the command for help, distils for an epoch and prints what each extra's function says without its package."""
import importlib
import re
import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement


def flat(name): return re.sub('[-_.]+', '-', name).lower()


def required(name, extras=(), seen=None):
    "Names of the distributions that an installation of one brings"
    seen = {} if seen is None else seen
    known = seen.get(flat(name))
    if known is not None and known >= set(extras): return seen
    seen[flat(name)] = (known or set()) | set(extras)
    try: lines = distribution(name).requires or []
    except PackageNotFoundError: return seen # for another Python or system
    for r in map(Requirement, lines):
        if r.marker is None or any(r.marker.evaluate({'extra': e}) for e in ('', *extras)): required(r.name, r.extras, seen)
    return seen


BROUGHT = frozenset(required('kdmed'))
HIDDEN = frozenset(module for module,owners in packages_distributions().items() if not BROUGHT & {flat(o) for o in owners}) - {'kdmed'}


class PlainFinder(PathFinder):
    "Finds modules and metadata of a plain installation alone"
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition('.')[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        for d in super().find_distributions(*args, **kwargs):
            if flat(d.metadata['Name']) in BROUGHT: yield d


def hide():
    "Hide the other packages from imports that follow"
    sys.meta_path[:] = [PlainFinder if finder is PathFinder else finder for finder in sys.meta_path]
    for name in [m for m in sys.modules if m.partition('.')[0] in HIDDEN]: del sys.modules[name]


def said(f, *args, **kwargs):
    "What an ImportError says"
    try: f(*args, **kwargs)
    except ImportError as e: return str(e)
    return 'no ImportError'


def hints():
    "{extra: what its function says}"
    import os
    import tempfile

    import numpy as np

    from kdmed.data.loaders import load_distributed
    from kdmed.data.datasets import read_medmnist
    from kdmed.data.filters import CLAHE
    from kdmed.data.images import read_dicom
    from kdmed.data.store import store_folder
    from kdmed.models.create import create_student
    from kdmed.models.foundation import create_encoder
    from kdmed.evaluate.saliency import saliency_maps
    from kdmed.ship.onnx import import_onnx
    from kdmed.ship.quantize import import_openvino
    from kdmed.ship.quantize_aware import import_torchao
    from kdmed.ship.phones import export_coreml, export_executorch
    from kdmed.ship.serve import create_app
    import torch
    model = create_student('test_resnet', ['a', 'b'], 32)
    yield 'filters', said(CLAHE(), np.arange(64*64*3, dtype=np.uint8).reshape(64, 64, 3))
    yield 'dicom', said(read_dicom, 'none.dcm')
    yield 'interpret', said(saliency_maps, model, torch.zeros(1, 3, 32, 32), task='multiclass')
    yield 'weights', said(create_student, 'tf_efficientnet_lite0', ['a', 'b'], 64, weights='pip')
    yield 'transformers', said(create_encoder, 'kaiko-ai/midnight', weights=False)
    with tempfile.TemporaryDirectory() as empty:
        os.environ['KDMED_INPUT'] = empty
        yield 'medmnist', said(read_medmnist, 'breastmnist')
    yield 'onnx', said(import_onnx, 'onnxruntime')
    yield 'openvino', said(import_openvino, 'openvino')
    yield 'torchao', said(import_torchao)
    yield 'serve', said(create_app, 'bundle')
    yield 'executorch', said(export_executorch, model, 'student.pte')
    yield 'coreml', said(export_coreml, model, 'student.mlpackage')
    yield 'zarr', said(store_folder, 's3://bucket/images.zarr')
    os.environ['WORLD_SIZE'] = '2'
    yield 'distributed', said(load_distributed)


def main():
    hide()
    sys.path.append(str(Path(__file__).resolve().parent.parent/'tools'))
    import wheel_uses
    names = wheel_uses.module_names(inside=None)
    for name in names: importlib.import_module(name)
    print('modules:', *names)
    from kdmed.cli.app import main as command
    for option in ('--version', '--help'):
        try: command([option])
        except SystemExit as e: assert not e.code, e.code
    wheel_uses.kept(*wheel_uses.distilled())
    print('distilled: one epoch, exported, resumed')
    print('imported:', *sorted({m.partition('.')[0] for m in sys.modules} & HIDDEN))
    for extra,text in hints(): print(f'{extra}: {text}')
    print('hidden:', *sorted(HIDDEN))


if __name__=='__main__': main()
