"Latency and size of int8 files against the same student in PyTorch; `tests/bench.py` runs it with the others."
import tempfile, time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from kdmed.models.create import create_student, set_model_stats
from kdmed.ship.onnx import export_onnx
from kdmed.ship.onnx_model import OnnxModel
from kdmed.ship.quantize import needs_reduced_range, quantize_onnx

STUDENTS = [ # name, side in pixels, kind that suits it, times as fast as torch eager at least
    ('resnet18', 128, 'static', 4), ('convnext_atto', 128, 'static', 2.5),
    ('deit_tiny_patch16_224', 224, 'dynamic', 1.5)]


def by_turns(calls, runs):
    "Median seconds of each call; they take turns, and three rounds warm up"
    times = {name: [] for name in calls}
    for _ in range(3+runs):
        for name,call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter()-start)
    return {name: median(t[3:]) for name,t in times.items()}


def one_student(name, size, kind, folder, runs):
    "Seconds of one image by torch, float32 and int8, with one thread, and the share of int8 in the size"
    torch.manual_seed(0)
    student = set_model_stats(create_student(name, 4, size).eval(), .5, .2)
    files = dict(float32=export_onnx(student, folder/f'{name}.onnx'))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, size, size, 3), dtype=np.uint8)
    files['int8'] = quantize_onnx(files['float32'], list(images), folder/f'{name}_int8.onnx', kind)
    calls,x = {k: OnnxModel(f, threads=1) for k,f in files.items()},torch.randn(1, 3, size, size)
    def eager():
        with torch.inference_mode(): student(x)
    seconds = by_turns(dict(torch=eager, **{k: lambda m=m: m.run(images[:1]) for k,m in calls.items()}), runs)
    return seconds,files['int8'].stat().st_size/files['float32'].stat().st_size


def quantization(runs=40):
    "int8 ONNX against torch eager, batch 1, one thread; bars hold for a processor with VNNI"
    rows,threads = [],torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name,size,kind,least in STUDENTS:
                t,share = one_student(name, size, kind, Path(folder), runs)
                times = ', '.join(f'{k} {1000*s:.2f} ms' for k,s in t.items())
                print(f'{name} at {size}: {times}, {share:.3f} of the size')
                limit = None if needs_reduced_range() else least
                rows.append(dict(name=f'{name} at {size} px, torch eager / int8', value=round(t['torch']/t['int8'], 2),
                                 unit='ratio', limit=limit, least=True))
                rows.append(dict(name=f'{name}, size of int8 / float32', value=round(share, 3), unit='ratio',
                                 limit=.27))
    finally: torch.set_num_threads(threads)
    return rows


if __name__ == '__main__':
    for row in quantization(): print(row)
