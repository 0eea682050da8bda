"""Train the survey's networks from scratch under one budget, into `results/baselines`: `zoo.csv`, `costs.csv`.

    python tools/zoo_evidence.py --data FOLDER --work FOLDER [--models lenet alexnet …]

HAM10000 at 96 px: 1,500 training images (whole lesions), drawn evenly by class, eight epochs, one learning rate, the
whole test part. A row for each network that has finished; an interrupted one resumes. `--data` holds `ham10000`."""
import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from evidence import SETS, Clock, about

from kdmed.core.basics import count_macs, count_parameters, evaluating
from kdmed.core.files import write_atomic
from kdmed.data.loaders import image_dls
from kdmed.distill.methods import fit_classifier
from kdmed.evaluate.intervals import evaluate
from kdmed.evaluate.metrics import predict
from kdmed.models.create import create_student
from kdmed.studies.study import targets_of
from kdmed.train.resume import Resume

FILE = Path(__file__).resolve().parent.parent/'results/baselines/zoo.csv'
SIZE,IMAGES,EPOCHS,LR,SEED = 96,1500,8,3e-4,0
METRICS = 'balanced_accuracy','macro_auroc'
# as the survey names them, cheapest first: {name of timm: name in the survey}
ZOO = dict(lenet='LeNet', alexnet='AlexNet', efficientnet_b0='EfficientNet', densenet121='DenseNet121',
           resnet50='ResNet50', inception_v3='Inception-v3', seresnet50='SE-ResNet50', darknet53='DarkNet-53',
           inception_resnet_v2='Inception-ResNet-v2', vgg16_bn='VGG16')

OTHERS = 'tf_efficientnet_lite2','mobilenetv3_small_100','test_efficientnet' # teacher and students of the evidence

def subset(table):
    "All validation and test images, and training images of whole lesions drawn at random, as many as the budget has"
    train = table[table.split=='train']
    lesions = np.random.default_rng(SEED).permutation(train.group.unique())
    counts = train.group.value_counts().loc[lesions].cumsum()
    kept = set(counts[counts<=IMAGES].index)
    return table[(table.split!='train') | table.group.isin(kept)].reset_index(drop=True)

def ms_per_image(model):
    "Processor milliseconds of an image in a batch of 32"
    images,rounds = torch.rand(32, 3, SIZE, SIZE).to(memory_format=torch.channels_last),[]
    with evaluating(model), torch.inference_mode():
        for _ in range(4):
            start = time.process_time()
            model(images)
            rounds.append(1000*(time.process_time()-start)/len(images))
    return round(min(rounds), 2)

def costs_of(name):
    "What a network costs, without training"
    model = create_student(name, 7, SIZE).to(memory_format=torch.channels_last)
    millions,macs = count_parameters(model)/1e6,count_macs(model, SIZE)/1e6
    return dict(model=name, millions=round(millions, 2), million_macs=round(macs), ms_per_image=ms_per_image(model))

def row_of(name, dls, work):
    "Train one network, and measure it on the test part"
    home = work/name
    home.mkdir(parents=True, exist_ok=True)
    clock = Clock(home/'seconds.json')
    def make(): return create_student(name, dls.classes, SIZE, dls.task).to(memory_format=torch.channels_last)
    learn = fit_classifier(dls, make, EPOCHS, LR, SEED, [Resume(home, minutes=4), clock], False)
    probs,targets = predict(learn, dls.test)[0],targets_of(dls.test)
    found = evaluate(probs, targets, dls.classes, dls.test.table.group.to_numpy(), dls.task, metrics=list(METRICS))
    facts = dict(model=name, survey=ZOO[name], train_images=dls.train.n, size=SIZE, epochs=EPOCHS, lr=LR, seed=SEED,
                 cpu_seconds=round(clock.seconds()[1])) | about()
    return [facts | dict(metric=m, **found.loc[m, ['value', 'low', 'high']].astype(float).round(4)) for m in METRICS]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--work', type=Path, required=True)
    parser.add_argument('--models', nargs='+', choices=list(ZOO), default=list(ZOO))
    o = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    FILE.parent.mkdir(parents=True, exist_ok=True)
    costs = pd.DataFrame([costs_of(name) | about() for name in (*ZOO, *OTHERS)])
    write_atomic(FILE.with_name('costs.csv'), costs.to_csv(index=False))
    rows = pd.read_csv(FILE).to_dict('records') if FILE.is_file() else []
    left = [name for name in o.models if name not in {row['model'] for row in rows}]
    if not left: return
    read,augment = SETS['ham10000']
    dls = image_dls(subset(read(o.data)), SIZE, augment=augment(SEED), bs=32, sampling='balanced', device='cpu',
                    store=o.work/'stores')
    for name in left:
        rows += row_of(name, dls, o.work)
        write_atomic(FILE, pd.DataFrame(rows).to_csv(index=False))
        print(pd.DataFrame(rows[-len(METRICS):]).to_string(), flush=True)

if __name__=='__main__': main()
