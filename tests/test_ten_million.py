"""What ten million images ask of stores, caches and loaders, by simulation.

Memory; what 64 processes of one training see; outputs that they write once.

Run as a script, this file is a process that opens one thing and prints by how many MB its memory grew."""
import collections
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('zarr', reason='the package zarr needs Python 3.11')

import kdmed.data.loaders as loaders
import kdmed.data.store as stores
import kdmed.distill.cache as caches
from kdmed.core.sharded import ZarrFolder, shard_rows
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.data.store import ImageStore
from kdmed.data.transforms import tissue_augment

N,SIZE,RANKS = 10_000_000,8,64


def megabytes():
    "Memory of this process, with pages of mapped files and without them, since the system takes them back"
    facts = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines() if ':' in line)
    return [int(facts[name].split()[0])/1e3 for name in ('VmRSS', 'RssAnon')]


def made_store(home, n=N):
    "A store of `n` black images, as packing leaves it; for memory only the number of rows counts"
    shape,names = (n, 3, SIZE, SIZE),np.full(1, b'folder_of_a_slide/tile_0000000.png')
    about = dict(format=stores.STORE_FORMAT, key=home.name, images=n, size=SIZE, preprocess=[], unreadable={})
    crc = stores.zlib.crc32(bytes(math.prod(shape[1:])))
    if isinstance(home, ZarrFolder):
        chunk,shard = shard_rows(math.prod(shape[1:]))
        images = home.make('images', shape, np.uint8, chunk, shard, compress=True)
        for i in range(0, n, shard): images[i:i+shard] = 0
        home.make('checksums', (n,), np.uint32, 2**18)[:] = crc
        spelled = np.broadcast_to(names.view(np.uint8), (n, 34))
        home.make('names', spelled.shape, np.uint8, 2**12, 2**20, compress=True)[:] = spelled
        home.finish(about)
    else:
        home.mkdir(parents=True)
        def array(name, dtype, shape): return np.lib.format.open_memmap(home/f'{name}.npy', 'w+', dtype, shape)
        array('images', np.uint8, shape)
        array('checksums', np.uint32, (n,))[:] = crc
        array('names', names.dtype, (n,))[:] = names[0]
        (home/'store.json').write_text(json.dumps(about))
    return home


def compact_table(n=N, groups=10_000):
    "A table of `n` rows of a store: 8 bytes a row"
    import pandas as pd
    group = np.arange(n)//(n//groups)
    split = pd.Categorical.from_codes((group%10).clip(7)-7, ['train', 'valid', 'test'])
    label = pd.Categorical.from_codes((np.arange(n)%3).astype(np.int8), ['a', 'b', 'c'])
    image = np.arange(n, dtype=np.int32)
    table = pd.DataFrame(dict(image=image, label=label, group=group.astype(np.int16), split=split))
    table.attrs = dict(synthetic_table(6, classes=3, size=16).attrs, classes=['a', 'b', 'c'], task='multiclass')
    return table


def texts_table(n=N):
    "The same with texts"
    table = compact_table(n)
    table['image'] = [f'folder_of_a_slide/tile_{i:07}.png' for i in range(n)]
    return table.astype(dict(label=str, group=str, split=str))


def grown(what, place):
    "By how many MB memory grows"
    import time
    home = ZarrFolder(place)/'8px-0' if place.endswith('.zarr') else Path(place)/'8px-0'
    store = table = None
    if what in ('table', 'texts'): compact_table(10_000)
    before,start = megabytes(),time.perf_counter()
    if what in ('store', 'both', 'loaders'):
        store = ImageStore(home)
        rows = np.random.default_rng(0).integers(0, N, 64)
        assert store[rows].shape==(64, 3, SIZE, SIZE) and not store[rows].any()
    if what in ('table', 'both', 'loaders'): table = compact_table()
    if what=='texts': table = texts_table()
    if what=='loaders':
        dls = image_dls(table, SIZE, store=store, device='cpu')
        batch = dls.train.gather(np.arange(64))
        assert batch[0].shape==(64, 3, SIZE, SIZE) and batch[1].tolist()[:4]==[0, 1, 2, 0]
    if what=='cache':
        images,answers = dict(number=N, views=1),dict(logits=(3,))
        about = dict(format=caches.CACHE_FORMAT, teacher={}, images=images, answers=answers)
        home = ZarrFolder(place)/'teacher-0' if place.endswith('.zarr') else Path(place)/'teacher-0'
        if isinstance(home, ZarrFolder): home.finish(about)
        else: caches._make_files(home, about)
        stored = caches._open_outputs(home)
        rows = np.random.default_rng(0).permutation(N)[:1000]
        stored.add(rows, [np.ones((1000, 3), np.float16)])
        assert stored.read(rows)[1].all() and len(stored.missing())==N-1000
    with_files,own = (round(after-b) for after,b in zip(megabytes(), before))
    print(json.dumps(dict(MB=with_files, without_files=own, seconds=round(time.perf_counter()-start, 1))))


def measured(what, place):
    command = [sys.executable, '-W', 'ignore', str(Path(__file__).resolve()), what, str(place)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode==0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module', params=['folder', 'folder.zarr'])
def ten_million(request, tmp_path_factory):
    "A store of ten million black images"
    place = tmp_path_factory.mktemp('ten')/request.param
    made_store((ZarrFolder(place) if request.param.endswith('.zarr') else place)/'8px-0')
    return place


@pytest.mark.slow(120)
@pytest.mark.parametrize('what', ['store', 'both', 'cache'])
def test_ten_million_rows_take_less_than_200_mb(ten_million, what):
    "An opened store with a batch read; with the image table, of 8 bytes a row; a teacher cache"
    found = measured(what, ten_million)
    print(what, ten_million.name, found)
    assert found['MB'] < 200


@pytest.mark.slow(120)
def test_loaders_of_ten_million_rows_take_about_a_gigabyte(ten_million):
    found = measured('loaders', ten_million)
    print('loaders', ten_million.name, found)
    assert found['MB'] < 1200


# -- 64 processes of one training, simulated in this one

def of_rank(dl, rank, processes=RANKS):
    "fastai's loader for several processes, as one of them has it; none is started"
    distributed = pytest.importorskip('fastai.distributed')
    class Simulated(distributed.DistributedDL):
        def _broadcast(self, samples, source): return samples
    return Simulated(dl, rank=rank, world_size=processes)


def seen(dl, seed=0, processes=RANKS):
    "(image, view) of each sample that the processes read in an epoch, by process"
    found = []
    for rank in range(processes):
        dl.rng.seed(seed) # rank 0 draws, the others get its order
        views,images = np.divmod(np.asarray(of_rank(dl, rank, processes).get_idxs()), dl.n)
        found.append(list(zip(dl.ids[images].tolist(), views.tolist())))
    return found


@pytest.mark.slow_after(1)
@pytest.mark.parametrize('views', [None, 4])
@pytest.mark.parametrize('n', [1280, 1301, 1343])
def test_64_processes_see_each_image_once_an_epoch(n, views):
    "Where 64 does not divide their number, the first samples fill up: fewer than there are processes"
    table = synthetic_table(n+64, classes=3, size=16, tiles_per_patient=1)
    table['split'] = ['train']*n + ['valid']*64
    dls = image_dls(table, 16, bs=4, augment=tissue_augment(), views=views, device='cpu')
    drawn = collections.Counter()
    for epoch in range(5):
        ranks = seen(dls.train.set_epoch(epoch), seed=epoch)
        samples = [s for rank in ranks for s in rank]
        times = collections.Counter(i for i,_ in samples)
        assert set(times)==set(range(n)) and {len(r) for r in ranks}=={math.ceil(n/RANKS)}
        assert sum(times.values())-n == -n%RANKS and max(times.values())<=2
        assert {v for _,v in samples}=={epoch if views is None else epoch%views}
        drawn.update(set(samples))
    assert len(drawn)==n*(5 if views is None else 4)


@pytest.mark.parametrize('place', ['outputs', pytest.param('outputs.zarr', marks=pytest.mark.slow(15))])
def test_64_processes_write_each_output_once(place, tmp_path, monkeypatch):
    "Each with outputs of its own; all of them then read what the others wrote"
    n,views,classes = 1301,4,3
    images,answers = dict(number=n, views=views),dict(logits=(classes,), layer=(5,))
    about = dict(format=caches.CACHE_FORMAT, teacher={}, images=images, answers=answers)
    home = (ZarrFolder(tmp_path/place) if place.endswith('.zarr') else tmp_path/place)/'teacher-0'
    written = collections.Counter()
    if isinstance(home, ZarrFolder): home.finish(about)
    else:
        caches._make_files(home, about)
        write = caches._write_rows
        def counted(path, offset, rows, values):
            if path.name!='journal.npy': written.update((path.name, int(r)) for r in rows)
            write(path, offset, rows, values)
        monkeypatch.setattr(caches, '_write_rows', counted)
    rng = np.random.default_rng(0)
    whole = [rng.normal(size=(n*views, k)).astype(np.float16) for k in (classes, 5)]
    order = rng.permutation(n*views)
    ranks = [caches._open_outputs(home) for _ in range(RANKS)]
    shares = [np.array_split(order[r::RANKS], 3) for r in range(RANKS)]
    for turn in range(3):
        for rank,share in zip(ranks, shares): rank.add(share[turn], [v[share[turn]] for v in whole])
    for rank in ranks: rank.flush()
    if isinstance(home, ZarrFolder):
        for part in home.groups('part-'):
            entries = part.group()['journal'][:][:, 0]
            written.update((f'{name}.npy', int(e)) for e in entries for name in ('logits', 'layer_1'))
            assert part.group()['logits'].shape[0]==len(entries)
    assert set(written.values())=={1} and len(written)==2*n*views
    for rank in (ranks[0], ranks[-1], caches._open_outputs(home)):
        if isinstance(home, ZarrFolder): rank.refresh()
        wanted = rng.permutation(n*views)[:500]
        values,there = rank.read(wanted)
        assert there.all() and not len(rank.missing())
        for v,w in zip(values, whole): np.testing.assert_array_equal(v, w[wanted])


if __name__=='__main__': grown(*sys.argv[1:])
