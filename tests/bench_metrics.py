"What a thousand bootstrap replicates cost, against a loop over scikit-learn that does the same"
import time

import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from kdmed.evaluate.intervals import group_weights
from kdmed.evaluate.scores import scores

PREVALENCE = .103, .108, .182, .239, .068, .063, .022, .104, .071, .036, .043, .017, .045, .003 # of ChestX-ray14's official test images, roughly
METRICS = ['accuracy', 'balanced_accuracy', 'macro_precision', 'macro_recall', 'macro_specificity', 'macro_f1', 'macro_auroc', 'macro_average_precision']

def chest_films(n=25_596, patients=2_797, seed=0):
    "Predictions of the shape of ChestX-ray14's official test set: probabilities and findings [n, 14], patients [n]"
    rng = np.random.default_rng(seed)
    patient = rng.integers(patients, size=n)
    truth = (rng.random((n, len(PREVALENCE))) < PREVALENCE).astype(float)
    logits = 1.2*truth - 2 + .7*rng.normal(size=(patients, 1))[patient] + rng.normal(size=truth.shape)
    return (1/(1+np.exp(-logits))).round(6),truth,patient

def by_scikit_learn(probs, truth):
    "The same eight metrics of one replicate, label by label"
    hard = probs > .5
    each = []
    for y,p,h in zip(truth.T, probs.T, hard.T):
        found,left = recall_score(y, h),recall_score(1-y, ~h)
        each.append([accuracy_score(y, h), (found+left)/2, precision_score(y, h, zero_division=0), found, left, f1_score(y, h), roc_auc_score(y, p), average_precision_score(y, p)])
    return np.mean(each, axis=0)

def bootstrap_speed(n_boot=1000, looped=10):
    probs,truth,patient = chest_films()
    findings = [f'finding {i}' for i in range(truth.shape[1])]
    def replicates(n): return scores(probs, truth, findings, 'multilabel', group_weights(patient, n), METRICS)
    replicates(2)
    start = time.perf_counter()
    ours = replicates(n_boot)
    took = time.perf_counter()-start
    weights = group_weights(patient, n_boot)[:looped].astype(int)
    start = time.perf_counter()
    theirs = np.array([by_scikit_learn(*(x[np.repeat(np.arange(len(w)), w)] for x in (probs, truth))) for w in weights])
    loop = (time.perf_counter()-start)*n_boot/looped
    gap = np.abs(theirs-np.stack([ours[m][:looped] for m in METRICS], 1)).max()
    print(f'bootstrap: {n_boot:,} replicates of {len(METRICS)} metrics on {len(probs):,} x {truth.shape[1]} in {took:.1f} s; a loop over scikit-learn {loop:,.0f} s')
    return [dict(name=f'{n_boot:,} group-bootstrap replicates of {len(METRICS)} metrics, 25,596 x 14', value=round(took, 2), unit='s', limit=15),
            dict(name='the same in a loop over scikit-learn (from 10 replicates) / kdmed', value=round(loop/took, 1), unit='ratio', limit=30, least=True),
            dict(name='largest difference of the two', value=float(f'{gap:.1e}'), unit='1', limit=1e-9)]
