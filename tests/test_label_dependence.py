"Findings that depend on each other: against brute force, in files, with labels that are missing"
import itertools

import numpy as np
import pytest
import torch

from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.distill.methods import distill
from kdmed.models import create_student, load_student, save_student, set_model_stats
from kdmed.models.label_dependence import (
    LABEL_MODELS, LabelChain, LabelGraph, LabelRecurrent, add_label_dependence, finding_logits, fit_label_model,
    known_log_likelihood)
from kdmed.ship import export_onnx, load_bundle, save_bundle
from kdmed.ship.onnx_model import OnnxModel

NAN = float('nan')

def drawn(kind, n=4, seed=0):
    "A model with random weights, and random logits"
    torch.manual_seed(seed)
    model = LABEL_MODELS[kind](n)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p))
    return model.double(),torch.randn(5, n, dtype=torch.float64)

def sigmoid(a): return 1/(1+np.exp(-a))

def prior_by_hand(p, state):
    "Log probability of a state by an LSTM that is written out (gates in PyTorch's order)"
    n,hidden = p['read'].shape
    h,c,total = np.zeros(hidden),np.zeros(hidden),0.
    for k in range(n):
        a = p['read'][k] @ h if k else 0.
        total += np.log(sigmoid(a if state[k] else -a))
        told = np.eye(n)[k]*(2*state[k]-1)
        gates = p['lstm.weight_ih_l0'] @ told + p['lstm.bias_ih_l0'] + p['lstm.weight_hh_l0'] @ h + p['lstm.bias_hh_l0']
        i,f,g,o = np.split(gates, 4)
        c = sigmoid(f)*c + sigmoid(i)*np.tanh(g)
        h = sigmoid(o)*np.tanh(c)
    return total

def score_by_hand(model, z, state):
    "Unnormalized log probability of one state of one image; of a chain, the log probability"
    p = {k: v.detach().numpy() for k,v in model.named_parameters()}
    own = p['slope']*z + p['bias']
    if isinstance(model, LabelChain):
        total = 0.
        for k in range(len(z)):
            a = own[k] + sum(p['others'][k, j]*z[j] for j in range(len(z)) if j!=k)
            a += sum(p['before'][k, j]*state[j] for j in range(k))
            total += -np.logaddexp(0, -a if state[k] else a)
        return total
    total = sum(own[k]*state[k] for k in range(len(z)))
    if isinstance(model, LabelRecurrent): total += prior_by_hand(p, state)
    if isinstance(model, LabelGraph):
        total += sum(p['weights'][j, k]*state[j]*state[k] for k in range(len(z)) for j in range(k))
    return total

@pytest.mark.parametrize('kind', LABEL_MODELS)
def test_every_sum_is_that_of_brute_force(kind):
    model,z = drawn(kind)
    states = list(itertools.product([0, 1], repeat=4))
    for row in range(5):
        weights = np.exp([score_by_hand(model, z[row].numpy(), s) for s in states])
        p = weights/weights.sum()
        if kind=='chain': assert weights.sum()==pytest.approx(1)
        marginal = [sum(q for q,s in zip(p, states) if s[k]) for k in range(4)]
        found = finding_logits(model, z[row:row+1]).sigmoid()[0].detach().numpy()
        np.testing.assert_allclose(found, marginal, atol=1e-7)
        known = torch.tensor([[NAN, 1., -100., 0.]], dtype=torch.float64)
        agree = [q if s[1]==1 and s[3]==0 else 0 for q,s in zip(p, states)]
        assert known_log_likelihood(model, z[row:row+1], known).item()==pytest.approx(np.log(sum(agree)))
        given = finding_logits(model, z[row:row+1], known).sigmoid()[0].detach().numpy()
        by_hand = [sum(q for q,s in zip(agree, states) if s[k])/sum(agree) for k in range(4)]
        np.testing.assert_allclose(given, by_hand, atol=1e-7)

@pytest.mark.parametrize('kind', LABEL_MODELS)
def test_images_of_which_nothing_is_known_change_nothing(kind):
    rng = np.random.default_rng(0)
    y = (rng.random((80, 3))<.5).astype(float)
    z = 2*y-1+rng.normal(size=y.shape)
    more_z,more_y = np.r_[z, rng.normal(size=(20, 3))],np.r_[y, np.full((20, 3), np.nan)]
    one,two = fit_label_model(z, y, kind),fit_label_model(more_z, more_y, kind)
    for a,b in zip(one.parameters(), two.parameters()): torch.testing.assert_close(a, b, atol=.02, rtol=.02)

@pytest.mark.parametrize('kind', ['graph', 'recurrent'])
def test_fourteen_findings_are_fitted(kind):
    rng = np.random.default_rng(0)
    y = (rng.random((40, 14))<.3).astype(float)
    model = fit_label_model(2*y-1+rng.normal(size=y.shape), y, kind, steps=2)
    assert finding_logits(model, torch.randn(2, 14)).isfinite().all()
    with pytest.raises(ValueError, match='2 to 14 findings'): fit_label_model(np.zeros((3, 15)), np.zeros((3, 15)))

@pytest.mark.parametrize('kind', ['graph', 'recurrent'])
def test_a_finding_that_is_never_seen_does_no_harm(kind):
    rng = np.random.default_rng(0)
    y = (rng.random((60, 3))<.5).astype(float)
    y[:, 2] = 0
    model = fit_label_model(2*y-1+rng.normal(size=y.shape), y, kind)
    assert all(p.isfinite().all() for p in model.parameters())
    assert (finding_logits(model, torch.zeros(1, 3)).sigmoid()[0, 2] < .1).item()

@pytest.fixture(scope='module')
def dls():
    table = synthetic_table(60, classes=3, size=32, task='multilabel', seed=1)
    table.loc[table.index[::7], 'label'] = f"?{table.attrs['classes'][0]}"
    return image_dls(split_groups(table, sizes=(.5, .25, .25)), 32, bs=8, device='cpu')

@pytest.mark.slow_after(1)
@pytest.mark.parametrize('kind', ['graph', 'chain', 'recurrent'])
def test_bundle_and_onnx_give_its_predictions(dls, tmp_path, kind):
    torch.manual_seed(0)
    student = set_model_stats(create_student('test_efficientnet', dls.classes, 32, 'multilabel'), .5, .25).eval()
    model = add_label_dependence(student, dls.valid, kind)
    images = list(np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8))
    bundle = load_bundle(save_bundle(model, tmp_path/'bundle', calibrate=False))
    assert 'label dependence' in bundle.card
    expected = bundle.predict(images, 'logits').to_numpy()
    found = OnnxModel(export_onnx(bundle, tmp_path/'model.onnx')).predict(images, 'logits').to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)

def test_it_can_teach_and_be_taught(dls):
    def student(): return create_student('test_efficientnet', dls.classes, 32, 'multilabel')
    teacher = add_label_dependence(student(), dls.valid)
    for pair in ((student(), teacher), (add_label_dependence(student(), dls.valid), student())):
        learn = distill(dls, *pair, 'logit+feature', 1, progress=False)
        assert np.isfinite(learn.history.valid_loss).all()

def test_a_wrong_kind_in_a_file_is_refused(dls, tmp_path):
    model = add_label_dependence(create_student('test_efficientnet', dls.classes, 32, 'multilabel'), dls.valid)
    model.spec['label_dependence']['kind'] = 'tree'
    with pytest.raises(ValueError, match='unknown kind'): load_student(save_student(model, tmp_path/'a', .5, .2))
