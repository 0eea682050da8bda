"""Train the fits behind `results/scarce_classes`: rare classes of HAM10000, with and without images that a GAN drew.

    python tools/scarce_evidence.py run --data FOLDER --work FOLDER     # a background job that resumes when killed
    python tools/scarce_evidence.py collect --data FOLDER --work FOLDER # tables of the whole study

`--data` holds the folder `ham10000` as Kaggle lays it out. `run` fits a GAN for each seed, then the students of all
arms. `collect` writes `compared.csv` and `harm.csv`, what each arm gains and which classes lose, and `drawn.csv`: how
far from real images the drawn ones are, and how many of them repeat training images."""
import argparse
import json
import time
import warnings
from pathlib import Path

from evidence import SETS # first: it chooses the processor's instructions
import numpy as np
import pandas as pd
import torch

from kdmed.baselines.gan import fit_gan
from kdmed.baselines.synthetic_images import (
    draw_images, image_features, kid_table, memorization, nearest_training_image)
from kdmed.core.files import write_atomic
from kdmed.data.loaders import image_dls
from kdmed.data.store import decode_images
from kdmed.data.transforms import Augment, HorizontalFlip, RightAngleTurn
from kdmed.models.create import create_student
from kdmed.studies.scarce_classes import ARMS, compare_scarce, scarce_counts, scarce_harm, scarce_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'results'/'scarce_classes'
SCARCE,SEEDS = ('df', 'vasc', 'akiec'),(0, 1, 2)
MODEL,SIZE,BATCH,EPOCHS,LR = 'test_efficientnet',32,64,8,3e-3 # .1 million parameters, from scratch
GAN = dict(size=32, steps=3000) # augmented: real images turned and mirrored

def gan_settings(): return GAN | dict(augment=Augment((HorizontalFlip(), RightAngleTurn())))

class Job:
    "The images, each read once, at the size that everything here uses"
    def __init__(self, data, work):
        self.study,file = Path(work)/'study',Path(work)/f'pixels-{SIZE}.npy'
        read,augment = SETS['ham10000']
        table = read(Path(data))
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            def save(part):
                with open(part, 'wb') as opened: np.save(opened, decode_images(table.image, SIZE).transpose(0, 2, 3, 1))
            write_atomic(file, save)
        self.table = table.assign(image=list(np.load(file)))
        self.dls = image_dls(self.table, SIZE, BATCH, augment(0), device='cpu')
        self.more = scarce_counts(self.table, SCARCE)

    def make(self):
        "A student, channels last: half the time on a processor"
        model = create_student(MODEL, self.dls.classes, SIZE, self.dls.task)
        return model.to(memory_format=torch.channels_last)

    def gan(self, seed):
        "The GAN of a seed, and how many seconds of a processor its training took, if it was not interrupted"
        folder,start = self.study/f'gan-{seed}',time.process_time()
        fresh = not folder.exists()
        gan,seconds = fit_gan(self.table, folder, seed=seed, device='cpu', **gan_settings()),time.process_time()-start
        if fresh: write_atomic(self.study/f'gan-{seed}.json', json.dumps(round(seconds)))
        file = self.study/f'gan-{seed}.json'
        return gan,json.loads(file.read_text()) if file.exists() else None

    def run(self):
        "Predictions of all students; what is finished is read"
        for seed in SEEDS:
            print(time.strftime('%H:%M:%S'), 'GAN', seed, *self.gan(seed)[1:], flush=True)
        how = dict(epochs=EPOCHS, lr=LR, gan=gan_settings(), folder=self.study)
        return compare_scarce(self.dls, self.make, SCARCE, ARMS, seeds=SEEDS, **how)

    def collect(self):
        found = self.run()
        compared = scarce_table(found, self.dls, SCARCE, n_boot=2000).round(4)
        harm = scarce_harm(found, self.dls, n_boot=2000).round(4)
        keep('compared', compared.reset_index())
        keep('harm', harm)
        measured = [measure(self.table, draw_images(gan, self.more, seed=seed)).assign(
            kind='GAN', seed=seed, cpu_seconds=seconds) for seed in SEEDS for gan,seconds in [self.gan(seed)]]
        keep('drawn', pd.concat(measured, ignore_index=True).round(4))

def measure(table, drawn):
    "How far drawn images of each class are from real ones, and how many repeat training images"
    classes = list(dict.fromkeys(drawn.label))
    own = table[table.label.isin(classes)].reset_index(drop=True)
    own.attrs = dict(table.attrs)
    features,of_drawn = image_features(own),image_features(drawn)
    nearest = nearest_training_image(drawn, own, of_drawn, features)
    distances = kid_table(drawn, own, of_drawn, features)
    return distances.join(memorization(nearest)).rename_axis('label').reset_index()

def keep(name, table):
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS/f'{name}.csv', table.to_csv(index=False))
    print(f'{name}.csv\n{table.to_string()}', flush=True)

def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('what', choices=['run', 'collect'])
    args.add_argument('--data', required=True)
    args.add_argument('--work', required=True)
    args = args.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    job = Job(args.data, args.work)
    job.run() if args.what=='run' else job.collect()
    print(time.strftime('%H:%M:%S'), 'done', flush=True)

if __name__ == '__main__': main()
