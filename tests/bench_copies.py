"""Copies made from real images: what share is found, how often a match is wrong, and what it costs. `python tests/bench_copies.py` writes results/copies/measured.json.

Every lesion, patient, slide and seed is in one of two halves by a hash of its name: thresholds were set on the first, figures come from the second.
"""
import argparse, hashlib, io, json, os, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from kdmed.data.copies import find_copies, fingerprints, group_copies, match_copies
from kdmed.data.images import synthetic_table

DATA = Path(__file__).parents[2]/'shared/data'
RESULTS = Path(__file__).parents[1]/'results/copies/measured.json'

# -- real images, one of each lesion or patient

def folder(name): return Path(os.environ.get(f'KDMED_{name.upper()}', DATA/name))

def half(name):
    "0 for what thresholds were set on, 1 for what is measured"
    return int(hashlib.md5(str(name).encode()).hexdigest(), 16)%2

def ham10000_sources():
    listed = pd.read_csv(folder('ham10000')/'HAM10000_metadata.csv').drop_duplicates('lesion_id')
    files = {f.stem: f for f in folder('ham10000').glob('*/*.jpg')}
    return {lesion: files[image] for lesion,image in zip(listed.lesion_id, listed.image_id)}

def pneumonia_sources():
    sources = {}
    for f in sorted(folder('pneumonia').glob('chest_xray/*/*/*.jpeg')):
        patient = f.stem.split('_')[0] if f.stem.startswith('person') else f.stem.rsplit('-', 1)[0]
        sources.setdefault(patient, f)
    return sources

def breakhis_sources(side=150):
    sources = {}
    for f in sorted(folder('breakhis').rglob('*.png')):
        slide = Image.open(f).convert('RGB')
        for x in range(0, slide.width-side+1, side):
            for y in range(0, slide.height-side+1, side):
                crop = slide.crop((x, y, x+side, y+side))
                if np.std(crop.convert('L'))>5: sources[f'{f.stem} {x} {y}'] = crop # blank glass shows nothing
    return sources

def synthetic_sources():
    return {f'seed {seed} tile {i}': Image.fromarray(image) for seed in range(8) for i,image in enumerate(synthetic_table(n=24, size=128, seed=seed).image)}

SOURCES = dict(ham10000=ham10000_sources, pneumonia=pneumonia_sources, breakhis=breakhis_sources, synthetic=synthetic_sources)

def whose(source, name):
    "What is in one half or the other as a whole"
    return source.rsplit(' ', 2)[0] if name in ('breakhis', 'synthetic') else source

def pick(name, n, measured=True, seed=0):
    "Up to `n` images of one half, as PIL images"
    sources = [image for source,image in SOURCES[name]().items() if half(whose(source, name))==measured]
    rows = np.random.default_rng(seed).permutation(len(sources))[:n]
    return [image if isinstance(image:=sources[row], Image.Image) else Image.open(image).convert('RGB') for row in rows]

# -- copies

def largest_upright(width, height, angle):
    "Width and height of the largest upright rectangle inside one turned by `angle` (radians)"
    sin,cos = abs(np.sin(angle)),abs(np.cos(angle))
    long,short = max(width, height),min(width, height)
    if short<=2*sin*cos*long or abs(sin-cos)<1e-9:
        return (short/2/sin, short/2/cos) if width>=height else (short/2/cos, short/2/sin)
    return (width*cos-height*sin)/(cos**2-sin**2),(height*cos-width*sin)/(cos**2-sin**2)

def turn(image, degrees, black):
    "An image turned left: with black corners, or what of it has none"
    if black: return image.rotate(degrees, Image.Resampling.BICUBIC)
    width,height = largest_upright(*image.size, np.radians(degrees))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    left,top = (turned.width-width)/2+1,(turned.height-height)/2+1
    return turned.crop(tuple(round(v) for v in (left, top, left+width-2, top+height-2)))

def brighten(image, factor): return Image.fromarray((np.asarray(image).astype(float)*factor).clip(0, 255).astype(np.uint8))

def saved(image, quality):
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=quality)
    return Image.open(file).convert('RGB')

def make_copy(image, rng, worst):
    "Turned by any angle (with black corners in three of ten), mirrored or not, cropped anywhere to 80 % of its sides or more, brightness ±20 %, JPEG 30 or better; `worst` has the limit of each"
    turned = turn(image, rng.uniform(0, 360), rng.random()<.3)
    if rng.random()<.5: turned = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    share = .8 if worst else rng.uniform(.8, 1)
    width,height = turned.width*share,turned.height*share
    left,top = rng.uniform(0, turned.width-width),rng.uniform(0, turned.height-height)
    zoom = np.sqrt(image.width*image.height/(width*height))
    size = round(width*zoom),round(height*zoom)
    cropped = turned.resize(size, Image.Resampling.BICUBIC, box=(left, top, left+width, top+height))
    return saved(brighten(cropped, rng.choice([.8, 1.2]) if worst else rng.uniform(.8, 1.2)), 30 if worst else int(rng.integers(30, 96)))

# -- figures

def pair_figures(a, b, n):
    "Originals and copies: how many of `n` pairs are found, and how many pairs are of strangers; rows of copies follow those of originals"
    true = b-a==n
    return dict(copies=n, found=int(true.sum()), wrong=int((~true).sum()))

def measure(name, n, measured=True, seed=0):
    "Pairs found by each way among `n` images and a copy of each, every other copy the worst"
    rng = np.random.default_rng(seed)
    originals = pick(name, n, measured, seed)
    n = len(originals)
    images = originals + [make_copy(image, rng, i%2==0) for i,image in enumerate(originals)]
    start = time.process_time()
    matched = match_copies(images)
    took = time.process_time()-start
    alike = find_copies(fingerprints(images))
    rings = group_copies(images, how='rings')
    a,b = np.nonzero(np.triu(rings[:, None]==rings[None], 1))
    return dict(features={**pair_figures(matched.a.to_numpy(), matched.b.to_numpy(), n), 'cpu_ms_per_image': round(1000*took/len(images), 1)},
                fingerprints=pair_figures(alike.a.to_numpy(), alike.b.to_numpy(), n), rings=pair_figures(a, b, n))

def measure_large(name='ham10000', n=2500, copies=150, seed=0):
    "The same for copies of a few among many images: with more images, a feature's partner is harder to find"
    rng = np.random.default_rng(seed)
    originals = pick(name, n, True, seed)
    images = originals + [make_copy(image, rng, i%2==0) for i,image in enumerate(originals[:copies])]
    matched = match_copies(images)
    made = matched[matched.b>=len(originals)]
    return dict(images=len(images), **pair_figures(made.a.to_numpy(), made.b.to_numpy(), len(originals)) | dict(copies=copies))

def summary(figures):
    "Recall and precision of each way, over all sets"
    total = {}
    for how in ('features', 'fingerprints', 'rings'):
        copies,found,wrong = (sum(f[how][what] for f in figures.values()) for what in ('copies', 'found', 'wrong'))
        total[how] = dict(recall=round(found/copies, 3), precision=round(found/(found+wrong), 4) if found+wrong else None)
    return total

# -- speed

def copies_speed(n=15_000, side=224):
    "Seconds and memory of group_copies on files of 224 pixels, a quarter of them copies (Linux)"
    with tempfile.TemporaryDirectory(prefix='kdmed-bench-copies-') as work:
        rng,files = np.random.default_rng(0),[]
        sources = [f for f in ham10000_sources().values()] if folder('ham10000').is_dir() else list(synthetic_table(n=3*n//4, size=side).image)
        for i in range(n):
            source = sources[i%min(3*n//4, len(sources))]
            image = Image.open(source).convert('RGB') if isinstance(source, Path) else Image.fromarray(source)
            image = image.resize((side, side), Image.Resampling.BICUBIC)
            if i>=3*n//4: image = image.rotate(float(rng.uniform(0, 360)), Image.Resampling.BICUBIC)
            files.append(f'{work}/{i}.jpg')
            image.save(files[-1], quality=90)
        listed = Path(work)/'files.json'
        listed.write_text(json.dumps(files))
        code = f"""
import json, re, time
from pathlib import Path
from kdmed.data.copies import group_copies
files = json.loads(Path({str(listed)!r}).read_text())
def status(name): return int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])/1024
group_copies(files[:4])
Path('/proc/self/clear_refs').write_text('5')
before,start,cpu = status('VmRSS'),time.perf_counter(),time.process_time()
group_copies(files)
print(time.perf_counter()-start, time.process_time()-cpu, status('VmHWM')-before)"""
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    wall,cpu,memory = map(float, done.stdout.split())
    print(f'copies: {n:,} images of {side} px in {wall:.0f} s, {cpu:.0f} s of processor time, {memory:.0f} MB')
    return [dict(name=f'group_copies, {n:,} images of {side} px', value=round(wall), unit='s', limit=600),
            dict(name=f'its memory growth, {n:,} images', value=round(memory), unit='MB', limit=500)]

def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument('--n', type=int, default=150, help='images of each set (default %(default)s)')
    args.add_argument('--tuning', action='store_true', help='print the figures of the half that thresholds were set on, and write nothing')
    args.add_argument('--speed', type=int, help='measure the speed on so many images instead')
    args = args.parse_args()
    if args.speed: return copies_speed(args.speed)
    figures = {}
    for name in SOURCES:
        figures[name] = measure(name, args.n, not args.tuning)
        print(name, figures[name], flush=True)
    print(summary(figures))
    if args.tuning: return
    large = measure_large() if folder('ham10000').is_dir() else None
    print('among many:', large)
    RESULTS.write_text(json.dumps(dict(total=summary(figures), sets=figures, large=large), indent=1) + '\n')

if __name__ == '__main__': main()
