"What features of a foundation model cost beyond its forward pass: a loader, half precision, checksums and the disk"
import tempfile
import time
from statistics import median

import torch

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.distill.heads import cached_features
from kdmed.models.foundation import create_encoder


def features_speed(n=512, size=128, bs=32, rounds=5):
    """Images a second of `cached_features`, against a bare forward loop over the same tensors, in the same batches.

    The images are decoded beforehand, as they are in a study; each round computes anew, in a new folder."""
    table = synthetic_table(n, classes=2, size=size, seed=0)
    dls = image_dls(split_groups(table, sizes=(.9, .1, 0), seed=0), size, bs=bs)
    encoder = create_encoder('tf_efficientnet_lite0', weights=False, size=size).to(dls.device)
    images = dls.train.n
    x,_ = dls.train.views_of(range(images), [0]*images)
    batches = [b.as_subclass(torch.Tensor).clone() for b in x.split(bs)]
    def wait():
        if dls.device.type=='cuda': torch.cuda.synchronize()
    def bare():
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches: encoder(batch)
        wait()
        return time.perf_counter()-start
    def ours():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            cached_features(encoder, dls, folder, ('train',), progress=False)
            return time.perf_counter()-start
    bare(), ours()
    times = [(bare(), ours()) for _ in range(rounds)]
    rates = [images/median(t) for t in zip(*times)]
    print(f'features: a bare loop {rates[0]:,.0f} images/s, cached {rates[1]:,.0f}')
    name = 'foundation features, loader and cache included / a bare forward loop'
    return dict(name=name, value=round(median(a/b for a,b in times), 3), unit='ratio', limit=.95, least=True)
