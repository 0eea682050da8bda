"What maps cost, against grad-cam called by hand; `tests/bench.py` runs it with the others."
import io, time
from contextlib import redirect_stderr
from statistics import median

import torch
from pytorch_grad_cam import GradCAM, ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from kdmed.models.create import create_student
from kdmed.evaluate.saliency import saliency_maps

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def by_hand(kind, model, x, bs):
    "Maps by the library alone, `bs` images at a time"
    with redirect_stderr(io.StringIO()): # it draws progress bars
        for part in x.split(bs):
            cam = kind(model, [model.layer4])
            cam.batch_size = 32
            cam(part, [ClassifierOutputTarget(1)]*len(part))
            cam.activations_and_grads.release()


def seconds(runs, rounds):
    "Median seconds of each run; they take turns, and the first round warms up"
    times = {name: [] for name in runs}
    for i in range(rounds+1):
        for name,run in runs.items():
            if DEVICE=='cuda': torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if DEVICE=='cuda': torch.cuda.synchronize()
            if i: times[name].append(time.perf_counter()-start)
    return {name: median(t) for name,t in times.items()}


def saliency_speed(size=64, rounds=3):
    "Grad-CAM of 32 images and Score-CAM of two: ours, the library's batched by hand, the library's image by image"
    torch.manual_seed(0)
    model,rows = create_student('resnet18', 4, size).eval().to(DEVICE),[]
    for name,kind,n in (('Grad-CAM', GradCAM, 32), ('Score-CAM', ScoreCAM, 2)):
        x = torch.randn(n, 3, size, size, device=DEVICE)
        t = seconds({'ours': lambda: saliency_maps(model, x, 1, name.lower()), 'batched': lambda: by_hand(kind, model, x, n),
                     'one by one': lambda: by_hand(kind, model, x, 1)}, rounds)
        print(f'{name}, {n} images: ' + ', '.join(f'{k} {1000*v:.0f} ms' for k,v in t.items()))
        rows.append(dict(name=f'{name}, ours / batched by hand', value=round(t['ours']/t['batched'], 3), unit='ratio', limit=1.05))
        rows.append(dict(name=f'{name}, ours / image by image by hand', value=round(t['ours']/t['one by one'], 3), unit='ratio', limit=1.05))
    return rows


if __name__ == '__main__':
    for row in saliency_speed(): print(row)
