"Loaders as training uses them: several processes, a Learner from fit to export, sets with odd files, constant memory."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
import fastai.callback.schedule # fit_one_cycle
from fastai.distributed import DistributedDL
from fastai.learner import Learner, load_learner
from PIL import Image
from torch import nn

from kdmed.data import image_dls, image_table, split_groups, synthetic_table
from kdmed.transforms import tissue_augment


@pytest.fixture(scope='module')
def tissue(): return split_groups(synthetic_table(n=240, classes=3, size=32), sizes=(.6, .2, .2))


def loaders(tissue, store, **kwargs): return image_dls(tissue, 32, bs=16, augment=tissue_augment(seed=4), store=store, device='cpu', **kwargs)


class GlooDL(DistributedDL):
    "fastai's loader for several processes, without its detour through CUDA"
    def _broadcast(self, samples, rank):
        samples = torch.tensor(samples)
        torch.distributed.broadcast(samples, rank)
        return samples.tolist()


def one_process(rank, folder, tissue):
    "What this process sees in two epochs: image, view, sum of its pixels"
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    dl = GlooDL(loaders(tissue, folder/'stores', sampling='balanced').train, rank, 2)
    seen = [(i, v, pixels.double().sum().item()) for _ in range(2) for x,_ in dl for i,v,pixels in zip(*x.replay, x)]
    torch.save(seen, folder/f'{rank}.pt')


def test_two_processes_see_what_one_would(tissue, tmp_path):
    torch.multiprocessing.spawn(one_process, (tmp_path, tissue), nprocs=2)
    seen = [torch.load(tmp_path/f'{rank}.pt', weights_only=False) for rank in range(2)]
    dl = loaders(tissue, 'memory').train
    number = {i: k for k,i in enumerate(dl.ids)}
    together = sum(seen, [])
    assert len({(i, v) for i,v,_ in together}) == len(together), 'an image was shown twice in one view'
    assert {v & 1 for _,v,_ in together} == {0, 1} and len(together) == 2*2*(dl.n//2//16)*16
    for i,v,total in together[::7]:
        assert dl.views_of([number[i]], [v])[0].double().sum().item() == pytest.approx(total, abs=1e-3)
    assert len(list((tmp_path/'stores').glob('32px-*/images.npy'))) == 1


def test_a_learner_from_fit_to_export(tissue, tmp_path):
    dls = loaders(tissue, tmp_path/'stores')
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        learn.show_results(max_n=4)
        predictions,targets = learn.get_preds(dl=dls.test)
        name,index,probabilities = learn.predict(tissue.image[0])
        learn.export(tmp_path/'learner.pkl')
    test = tissue[tissue.split == 'test']
    assert [dls.vocab[t] for t in targets] == test.label.tolist()
    assert (tmp_path/'learner.pkl').stat().st_size < 60_000, 'the images went along'
    loaded = load_learner(tmp_path/'learner.pkl')
    with loaded.no_bar(): again,_ = loaded.get_preds(dl=loaded.dls.test_dl(test.image.tolist()))
    assert torch.allclose(again, predictions, atol=1e-6)
    assert name in dls.vocab and probabilities.sum() == pytest.approx(1)


def test_lr_find_and_one_batch_do_not_use_up_views(tissue):
    dls = loaders(tissue, 'memory')
    dls.show_batch()
    dls.one_batch()
    assert dls.train.epoch == 0
    assert set(next(iter(dls.train))[0].replay[1]) == {0}


def test_files_of_every_kind_in_one_set(tissue, tmp_path):
    "Palette, gray, transparent, sideways and plain files are images; the others are listed, each with its reason"
    exif = Image.Exif()
    exif[0x0112] = 3
    deep = (tissue.image[0][..., 0].astype(np.uint16)*200)
    good,bad = ['palette.png', 'gray.png', 'clear.png', 'sideways.jpg'],['cmyk.jpg', 'deep.png', 'moving.gif', 'cut.jpg', 'empty.png']
    first = Image.fromarray(tissue.image[0])
    first.convert('P').save(tmp_path/'palette.png')
    first.convert('L').save(tmp_path/'gray.png')
    first.convert('RGBA').save(tmp_path/'clear.png')
    first.save(tmp_path/'sideways.jpg', exif=exif)
    first.convert('CMYK').save(tmp_path/'cmyk.jpg')
    Image.fromarray(deep).save(tmp_path/'deep.png')
    first.save(tmp_path/'moving.gif', save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    first.save(tmp_path/'cut.jpg')
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'cut.jpg').read_bytes()[:500])
    (tmp_path/'empty.png').touch()
    table = image_table([*tissue.image[:40], *(tmp_path/name for name in good+bad)], [*(['a', 'b']*20), *(['a']*9)])
    table['split'] = ['train']*30 + ['valid']*10 + ['train']*9
    with pytest.raises(ValueError) as error: image_dls(table, 32, store=tmp_path/'stores')
    assert str(error.value).startswith('5 of 49 images cannot be read') and all(name in str(error.value) for name in bad)
    for store in ('memory', tmp_path/'stores'):
        dls = image_dls(table, 32, store=store, unreadable='quarantine')
        assert [p.name for p in dls.quarantine.image] == bad and dls.quarantine.reason.str.len().min() > 20
        assert len(dls.train.ids) == 34 and set(range(40, 44)) <= set(dls.train.ids)


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc, which this system lacks')
def test_reading_a_store_larger_than_its_share_of_memory(tmp_path):
    "400 MB of images are packed and read three times over in a process that grows by less than 200 MB"
    code = f"""
import re
from pathlib import Path
import numpy as np
from PIL import Image
from kdmed.store import pack_images
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024
folder = Path({str(tmp_path)!r})
rng = np.random.default_rng(0)
tile = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
files = [folder/f'{{i}}.png' for i in range(2000)]
for f in files: tile.save(f)
before = peak()
store = pack_images(files, 256, folder=folder/'stores', progress=False)
for _ in range(3):
    for i in range(0, 2000, 50): store[rng.permutation(2000)[:50]].mean()
print(peak()-before)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200
