"Heads on the features of a foundation model, and its last block trained, on images of HAM10000. Writes heads.csv."
import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from kdmed.data.datasets import read_ham10000
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.distill.foundation import foundation_teacher
from kdmed.distill.heads import score_logits

HAM10000 = Path(os.environ.get('KDMED_HAM10000', Path(__file__).parents[2]/'shared/data/ham10000'))
ROWS = { # name: arguments of `foundation_teacher`
    'linear': dict(), 'linear, classes balanced': dict(balanced=True), 'nearest neighbors': dict(head='knn'),
    'attention': dict(head='attention'), 'attention, classes balanced': dict(head='attention', balanced=True),
    'linear, then last block': dict(tune='last'), 'linear, then low-rank products': dict(tune='lora')}


def some_images(n):
    "The images of so many lesions, drawn at random, split by lesion"
    table = read_ham10000(HAM10000, print_card=False)
    lesions = table.group.drop_duplicates().sample(n, random_state=0)
    part = table[table.group.isin(lesions)].reset_index(drop=True)
    part.attrs = table.attrs
    return split_groups(part, sizes=(.6, .2, .2), seed=0)


@torch.no_grad()
def test_score(teacher, dls):
    "Score on the test images, which chose nothing"
    teacher.match_data(dls)
    pairs = [(teacher.compute((x,))[0].cpu().as_subclass(torch.Tensor), y.cpu().as_subclass(torch.Tensor))
             for x,y in dls.test]
    return score_logits(*map(torch.cat, zip(*pairs)), dls.task)


test_score.__test__ = False # not one of pytest's

def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument('--out', default='results/foundation_heads', help='folder (default %(default)s)')
    args.add_argument('--lesions', type=int, default=1500)
    args.add_argument('--size', type=int, default=128)
    args.add_argument('--epochs', type=int, default=3, help='of what is trained after the head')
    args = args.parse_args()
    dls = image_dls(some_images(args.lesions), args.size, bs=32)
    out,rows = Path(args.out),[]
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        for name,how in ROWS.items():
            start = time.perf_counter()
            teacher = foundation_teacher('tf_efficientnet_lite0', dls, weights='pip', size=args.size, folder=folder,
                                         epochs=args.epochs, progress=False, **how)
            seconds,valid,test = time.perf_counter()-start,teacher.report.iloc[-1],test_score(teacher, dls)
            rows.append(dict(head=name, seconds=round(seconds), valid_loss=valid.loss, valid_score=valid.score,
                             test_loss=test['loss'], test_score=test['score'], test_images=test['images'],
                             fewest_test_images=dls.test.table.label.value_counts().min())) # of a class
            print(rows[-1], flush=True)
            pd.DataFrame(rows).round(3).to_csv(out/'heads.csv', index=False)


if __name__=='__main__': main()
