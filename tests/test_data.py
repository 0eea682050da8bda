"Loaders as training uses them: several processes, a Learner from fit to export, sets with odd files, constant memory, missing labels."
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
import fastai.callback.mixup
import fastai.callback.schedule # fit_one_cycle
from fastai.distributed import DistributedDL
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import accuracy
from PIL import Image
from torch import nn

import kdmed.data
from kdmed.data.images import image_table, is_unlabeled, synthetic_table
from kdmed.data.loaders import ClassLossFlat, FindingsAccuracy, image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import tissue_augment


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc, which this system lacks')
def test_reading_a_store_larger_than_its_share_of_memory(tmp_path):
    "400 MB of images are packed and read three times over in a process that grows by less than 200 MB"
    code = f"""
import re
from pathlib import Path
import numpy as np
from PIL import Image
from kdmed.data.store import pack_images
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024
folder = Path({str(tmp_path)!r})
rng = np.random.default_rng(0)
tile = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
files = [folder/f'{{i}}.png' for i in range(2000)]
for f in files: tile.save(f)
pack_images(files[:2], 16, folder=folder/'first', progress=False) # what packing imports is not counted
before = peak()
store = pack_images(files, 256, folder=folder/'stores', progress=False)
for _ in range(3):
    for i in range(0, 2000, 50): store[rng.permutation(2000)[:50]].mean()
print(peak()-before)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200


# -- images without a label, unknown findings

def hide_labels(table, seed=0):
    "Two of three training groups without a label; of several findings some unknown, in every part"
    rng = np.random.default_rng(seed)
    groups = table.group[table.split == 'train'].unique()
    labels = table.label.mask(table.group.isin(rng.choice(groups, 2*len(groups)//3, replace=False)))
    if table.attrs['task'] == 'multilabel':
        def open_some(label):
            unknown = [c for c in table.attrs['classes'] if rng.random() < .2]
            return '|'.join([c for c in label.split('|') if c and c not in unknown] + [f'?{c}' for c in unknown])
        labels = labels.map(open_some, na_action='ignore')
    return table.assign(label=labels)


TASKS = {'binary': dict(classes=2), 'multiclass': dict(classes=3), 'multilabel': dict(classes=3, task='multilabel')}


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('mix', [None, 'MixUp', 'CutMix', 'ReplayMixUp', 'ReplayCutMix'])
def test_training_with_missing_labels(task, mix):
    "Every task, with every way to mix: finite losses, weights that move, and none that a missing label moved"
    table = hide_labels(split_groups(synthetic_table(n=180, size=16, seed=1, **TASKS[task]), sizes=(.6, .2, .2)))
    dls = image_dls(table, 16, bs=16, device='cpu')
    cbs = [getattr(kdmed.data if mix.startswith('Replay') else fastai.callback.mixup, mix)()] if mix else []
    metrics = {'multilabel': [FindingsAccuracy()], 'multiclass': [accuracy], 'binary': []}[task]
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, dls.c)), cbs=cbs, metrics=metrics)
    before = learn.model[2].weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    assert np.isfinite(np.array(learn.recorder.values, float)).all() and max(v[0] for v in learn.recorder.values) < 5
    assert learn.model[2].weight.isfinite().all() and not torch.equal(before, learn.model[2].weight)
    assert dls.unlabeled == table.label.isna().sum() > 50
    if mix is None: # a batch nobody has labeled: nothing but weight decay moves anything
        mute = np.flatnonzero(dls.train.table.label.isna())[:8]
        x,y = dls.train.views_of(mute, [0]*len(mute))
        learn.model.zero_grad()
        loss = learn.loss_func(learn.model(x), y)
        loss.backward()
        assert loss == 0 and all(p.grad.count_nonzero() == 0 for p in learn.model.parameters())


@pytest.mark.parametrize('task', TASKS)
def test_labels_that_are_all_there_train_as_they_do_with_fastai(task):
    "With a full table, the losses are fastai's to the last bit, and so are the trained weights"
    table = split_groups(synthetic_table(n=120, size=16, **TASKS[task]), sizes=(.6, .2, .2))
    trained = []
    for loss_func in (None, BCEWithLogitsLossFlat() if task != 'multiclass' else CrossEntropyLossFlat()):
        torch.manual_seed(0)
        dls = image_dls(table, 16, bs=16, device='cpu')
        dls.train.rng = random.Random(0)
        learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, dls.c)), loss_func=loss_func)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
        trained.append((learn.model[2].weight, learn.recorder.values))
    assert torch.equal(trained[0][0], trained[1][0]) and trained[0][1] == trained[1][1]


def test_class_weights_and_half_precision_with_missing_labels():
    table = hide_labels(split_groups(synthetic_table(n=180, size=16, classes=3, seed=1), sizes=(.6, .2, .2)))
    dls = image_dls(table, 16, bs=16, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)), loss_func=ClassLossFlat(weight=torch.tensor([1., 2., 4.])))
    with learn.no_bar(), learn.no_logging(), torch.autocast('cpu', torch.bfloat16): learn.fit(1)
    assert np.isfinite(learn.recorder.values[0]).all()


def test_a_learner_exported_with_missing_labels_predicts(tmp_path):
    for task in TASKS:
        table = hide_labels(split_groups(synthetic_table(n=120, size=16, **TASKS[task]), sizes=(.6, .2, .2)))
        dls = image_dls(table, 16, bs=16, device='cpu')
        learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, dls.c)))
        learn.export(tmp_path/'learner.pkl')
        loaded = load_learner(tmp_path/'learner.pkl')
        with learn.no_bar(), loaded.no_bar():
            assert str(loaded.predict(table.image[0])[0]) == str(learn.predict(table.image[0])[0])
            targets = loaded.get_preds(dl=loaded.dls.test_dl(table, with_labels=True))[1]
        missing = targets.isnan().all(-1) if task == 'multilabel' else targets == -100
        assert missing.flatten().tolist() == is_unlabeled(table).tolist()


KEY = """
import os, sys
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.transforms import mskd_augment, skin_augment, tissue_augment
def darker(pixels): return pixels//2 if pixels.shape[2] in {3} else pixels
tissue = split_groups(synthetic_table(n=60, classes=3, size=32), sizes=(.6, .2, .2))
for augment in (tissue_augment(seed=4), skin_augment(seed=4), mskd_augment(seed=4)):
    dls = image_dls(tissue, 32, bs=16, augment=augment, preprocess=darker, store=sys.argv[1], device='cpu')
    print(dls.train.pixels_key(), dls.valid.pixels_key())
"""


@pytest.mark.slow
def test_the_key_of_pixels_is_the_same_in_another_process(tmp_path):
    "Whatever the seed of Python's hashes, and whether a store is packed or found"
    script,printed = tmp_path/'key.py',[]
    script.write_text(KEY)
    for seed in '123':
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONHASHSEED': seed}
        command = [sys.executable, '-W', 'ignore', str(script), str(tmp_path/'stores')]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.split())
    assert printed[0] == printed[1] == printed[2]
    assert len(set(printed[0])) == 4 # three training keys, one of validation
