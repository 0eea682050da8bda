"Files that are handed on: none of them says a word about the machine that made it"
import os
import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kdmed.models import create_student, set_model_stats
from kdmed.ship import export_coreml, export_executorch, save_bundle, save_for_hub

pytestmark = [pytest.mark.slow(120), pytest.mark.filterwarnings('ignore')]


@pytest.fixture(scope='module')
def student():
    torch.manual_seed(0)
    return set_model_stats(create_student('test_resnet', ['a', 'b', 'c'], 32).eval(), .5, .2)


def onnx(student, folder):
    from kdmed.ship import export_onnx
    return export_onnx(student, folder/'float'/'s.onnx')


def int8(student, folder):
    from kdmed.ship import quantize_onnx
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    return quantize_onnx(onnx(student, folder), list(images), folder/'out'/'s.onnx')


def openvino(student, folder):
    pytest.importorskip('nncf')
    from kdmed.ship import quantize_openvino
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    return quantize_openvino(onnx(student, folder), list(images), folder/'out'/'s.xml')


def phone(student, folder):
    pytest.importorskip('executorch')
    return export_executorch(student, folder/'out'/'s.pte')


def apple(student, folder):
    pytest.importorskip('coremltools')
    return export_coreml(student, folder/'out'/'s.mlpackage')


def hub(student, folder): return save_for_hub(save_bundle(student, folder/'b', calibrate=False), folder/'out'/'hub')


WAYS = {'bundle': lambda s, f: save_bundle(s, f/'out'/'b', calibrate=False), 'onnx': onnx, 'int8': int8, 'openvino': openvino,
        'phone': phone, 'apple': apple, 'hub': hub}


def words_of_this_machine(folder):
    packages = Path(torch.__file__).parents[1]
    words = {str(folder), str(packages), str(Path.home()), 'site-packages', 'File "', sys.prefix,
             socket.gethostname(), str(Path(__file__).parents[1])} - {'localhost'}
    return {w for w in words if len(w)>4} # shorter ones are in any weights


@pytest.mark.parametrize('way', WAYS)
def test_nothing_of_this_machine_is_in_a_file(way, student, tmp_path):
    for name in 'out','float': (tmp_path/name).mkdir()
    made = WAYS[way](student, tmp_path)
    files = [f for f in [made, *Path(made).rglob('*'), *made.parent.glob(f'{made.stem}.*')] if f.is_file()]
    assert files
    for file in files:
        data = file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive: data += b''.join(archive.read(n) for n in archive.namelist())
        found = [w for w in words_of_this_machine(tmp_path) if os.fsencode(w) in data]
        assert not found, (file.name, found)
