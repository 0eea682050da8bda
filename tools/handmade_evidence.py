"""Measure hand-made baselines on HAM10000, into `results/baselines/ham10000.csv`.

    python tools/handmade_evidence.py --data FOLDER --work FOLDER --features hog color --classifiers svm forest

A row for each features, classifier and metric. `--data` holds the folder `ham10000` as Kaggle lays it out. Size and
split are those of `tools/evidence.py`. Features are kept in `--work`; what the table has is not measured again."""
import argparse
import pickle
import time
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pandas as pd
from evidence import SETS, about

from kdmed.baselines.handmade import fit_handmade
from kdmed.core.files import write_atomic
from kdmed.data.loaders import image_dls
from kdmed.evaluate.intervals import evaluate
from kdmed.studies.study import targets_of

ROOT = Path(__file__).resolve().parent.parent
SIZE,METRICS = 96,('balanced_accuracy', 'macro_auroc', 'macro_f1')

def ms_per_image(model):
    "Processor milliseconds from pixels to logits, of 32 validation images at a time"
    rounds = []
    for _ in range(3):
        start = time.process_time()
        model.logits(model.rows(model.examples))
        rounds.append(1000*(time.process_time()-start)/len(model.examples))
    return min(rounds)

def rows_of(features, classifier, dls, work):
    "A fit, its costs, and a row for each metric with its interval over lesions"
    start = time.process_time()
    model = fit_handmade(dls, features, classifier, folder=work)
    seconds = time.process_time()-start
    table = dls.test.table
    found = evaluate(model.predict(dls.test, work), targets_of(dls.test), dls.classes, table.group.to_numpy(), dls.task)
    facts = dict(features=features, classifier=classifier, size=SIZE, seed=0, settings=str(chosen(model.report)))
    facts |= dict(cpu_seconds=round(seconds, 1), ms_per_image=round(ms_per_image(model), 2))
    facts['mb'] = round(len(pickle.dumps(model.classifier))/1e6, 2)
    code = about()
    facts |= dict(test_images=dls.test.n, commit=code['commit'], date=date.today().isoformat(),
                  **{n.replace('-', '_'): version(n) for n in ('scikit-image', 'scikit-learn')})
    return [facts | dict(metric=m, **found.loc[m, ['value', 'low', 'high']].astype(float).round(4)) for m in METRICS]

def chosen(report):
    "Settings of the chosen row"
    return report[report.chosen].drop(columns=['valid_loss', 'chosen']).to_dict('records')[0]

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--work', type=Path, required=True)
    parser.add_argument('--features', nargs='+', required=True)
    parser.add_argument('--classifiers', nargs='+', default=['svm', 'forest'])
    o = parser.parse_args()
    file = ROOT/'results/baselines/ham10000.csv'
    file.parent.mkdir(parents=True, exist_ok=True)
    done = pd.read_csv(file).to_dict('records') if file.is_file() else []
    known = {(row['features'], row['classifier']) for row in done}
    left = [pair for pair in product(o.features, o.classifiers) if pair not in known]
    if not left: return
    read,_ = SETS['ham10000']
    dls = image_dls(read(o.data), SIZE, device='cpu', store=o.work/'stores')
    for features,classifier in left:
        done += rows_of(features, classifier, dls, o.work)
        write_atomic(file, pd.DataFrame(done).to_csv(index=False))
        print(pd.DataFrame(done[-len(METRICS):]).to_string(), flush=True)

if __name__=='__main__': main()
