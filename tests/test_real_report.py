"Reports from real use: what would mislead is said, what fails costs only its own part, names are anybody's, nothing private is shared"
import json, os, re, subprocess, sys, warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

import kdmed.evaluate.report as report_module
from kdmed.core.basics import architecture_key, measure_latencies
from kdmed.data.images import synthetic_table
from kdmed.data.loaders import image_dls
from kdmed.data.splits import split_groups
from kdmed.models.create import create_student
from kdmed.evaluate.calibration import TEMPERATURE_BOUNDS, temperature_note
from kdmed.evaluate.collect import chance_levels
from kdmed.evaluate.comparison import compare, compare_predictions, load_comparison, rehearse_report
from kdmed.evaluate.costs import measure_costs
from kdmed.evaluate.intervals import (
    difference_table, evaluate, group_draws, group_weights, paired_difference, replicate)
from kdmed.evaluate.plots import VERTICES, pr_curves, roc_curves
from kdmed.evaluate.privacy import attempt, why_failed, without_private
from kdmed.evaluate.report import escape_markdown, markdown_table
from kdmed.evaluate.scores import scores

NAMES = ['nv', 'mel', 'bcc']
RNG = np.random.default_rng(0)
PATIENTS = np.repeat(np.arange(60), 5)
TRUTH = np.repeat(np.arange(60) % 3, 5)

def answers(skill, truth=TRUTH, c=3):
    p = np.exp(skill*np.eye(c)[truth] + RNG.normal(size=(len(truth), c)))
    return p/p.sum(1, keepdims=True)

def said(comparison, *words):
    "Sentences of a comparison that contain all words"
    return [str(c) for c in comparison.conclusions() if all(w in str(c) for w in words)]

def study(**more):
    models = {'teacher': answers(3.), 'plain': [answers(1.) for _ in range(2)], 'distilled': [answers(1.5) for _ in range(2)]}
    return compare_predictions(models, TRUTH, NAMES, PATIENTS, **dict(n_boot=40) | more)

@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')

# -- numbers: what is computed once and by group is what was computed image by image

@pytest.mark.parametrize('task', ['multiclass', 'multilabel', 'binary'])
def test_weights_of_groups_give_the_numbers_of_weights_of_images(task):
    rng = np.random.default_rng(1)
    groups,names = rng.integers(0, 40, 200),['a', 'b'] if task == 'binary' else ['a', 'b', 'c']
    truth = rng.integers(0, len(names), 200)
    probs = rng.dirichlet(np.ones(len(names)), 200)
    if task == 'multilabel': truth,probs = np.where(rng.random((200, 3)) < .1, np.nan, rng.random((200, 3)) < .3),rng.random((200, 3)).round(2)
    draws,codes = group_draws(groups, 70, seed=3)
    metrics = ['accuracy', 'balanced_accuracy', 'macro_auroc', 'macro_average_precision', 'micro_auroc', 'weighted_f1', 'brier', 'log_loss', 'ece', 'kappa', 'mcc']
    by_group = scores(probs, truth, names, task, draws, metrics, codes)
    by_image = scores(probs, truth, names, task, group_weights(groups, 70, seed=3), metrics)
    for m in metrics: np.testing.assert_allclose(by_group[m], by_image[m], rtol=1e-9, atol=1e-12, err_msg=m)
    weights = group_weights(groups, 70, seed=3)[7].astype(int)
    if task == 'binary': # an independent oracle: every image as often as its group was drawn
        again = np.repeat(np.arange(200), weights)
        assert by_group['macro_auroc'][7] == pytest.approx(roc_auc_score(truth[again], probs[again, 1]))

def test_a_comparison_gives_what_evaluate_and_paired_difference_give():
    c = study(n_boot=60, seed=4)
    p = c.predictions['probs']
    one = evaluate(p['plain'], TRUTH, NAMES, PATIENTS, n_boot=60, seed=4)
    pd.testing.assert_frame_equal(c.scores['plain'].loc[one.index, ['value', 'low', 'high', 'note']], one, check_names=False)
    d = paired_difference(p['distilled'], p['plain'], TRUTH, NAMES, PATIENTS, n_boot=60, seed=4)
    pd.testing.assert_frame_equal(c.differences['distilled − plain'].loc[d.index], d, check_names=False)

def test_replicates_of_other_draws_are_refused():
    a,b = (replicate(answers(1.), TRUTH, NAMES, PATIENTS, n_boot=20, seed=s) for s in (0, 1))
    with pytest.raises(ValueError, match='replicates of the same images and draws'): difference_table(a, b)

@pytest.mark.parametrize('curves', [roc_curves, pr_curves])
def test_long_curves_are_drawn_with_few_points_that_are_points_of_the_curve(curves):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 6000)
    probs = 1/(1+np.exp(-(truth + rng.normal(size=6000))))
    (every,areas),(few,same) = (curves(probs, truth, ['no', 'yes'], task='binary', n_boot=20, vertices=v) for v in (None, VERTICES))
    pd.testing.assert_frame_equal(areas, same)
    assert len(every) == 6001 and len(few) <= VERTICES + 2
    x,y = every.columns[2:4]
    assert set(zip(few[x], few[y])) <= set(zip(every[x], every[y]))
    assert np.diff(few[x]).max() < 2/VERTICES + 1e-3 or curves is roc_curves
    assert np.hypot(np.diff(few[x]), np.diff(few[y])).max() < .05 or curves is pr_curves
    if curves is roc_curves: assert areas.value[0] == pytest.approx(roc_auc_score(truth, probs), abs=1e-12)

def test_bands_of_a_curve_of_many_thresholds_are_those_of_all_thresholds():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 25_000)
    probs = 1/(1+np.exp(-(truth + rng.normal(size=25_000))))
    points,areas = roc_curves(probs, truth, ['no', 'yes'], np.arange(25_000)//100, 'binary', n_boot=30, vertices=200)
    weights = group_weights(np.arange(25_000)//100, 30)
    area = [roc_auc_score(truth, probs, sample_weight=w) for w in weights]
    assert [areas.low[0], areas.high[0]] == pytest.approx(np.quantile(area, [.025, .975]), abs=5e-5)
    heights = [np.interp(.25, *roc_curve(truth, probs, sample_weight=w, drop_intermediate=False)[:2]) for w in weights]
    assert [np.interp(.25, points.false_positive_rate, points[side]) for side in ('low', 'high')] == pytest.approx(np.quantile(heights, [.025, .975]), abs=.005)

# -- weight

@pytest.fixture(scope='module')
def demo_like(tmp_path_factory):
    rng = np.random.default_rng(0)
    truth = np.arange(960) % 4
    models = {name: answers(skill, truth, 4) for name,skill in (('teacher', 3.), ('plain', 1.), ('distilled', 1.5), ('other', 2.))}
    c = compare_predictions(models, truth, list('abcd'), np.arange(960)//5, n_boot=50)
    c.costs = {name: dict(parameters=1000*k, macs=1e6*k, latency_ms=k) for k,name in enumerate(models, 1)}
    return c.save(tmp_path_factory.mktemp('demo')/'report')

def test_the_page_of_a_demo_is_under_one_megabyte(demo_like):
    assert (demo_like/'report.html').stat().st_size < 1e6

def test_many_classes_are_in_tables_and_what_is_not_drawn_is_said(tmp_path):
    names,truth = [f'class {i}' for i in range(40)],np.arange(400) % 40
    c = compare_predictions({'plain': answers(1., truth, 40), 'distilled': answers(2., truth, 40)}, truth, names, n_boot=10)
    folder = c.save(tmp_path/'r')
    page = (folder/'report.html').read_text()
    assert '40 classes are more than the 30 that are drawn' in page and 'sensitivity for class 39' in page
    assert sorted(f.stem for f in (folder/'figures').glob('*.png')) == ['metrics', 'reliability']
    assert len(c.plot().axes) == 1

# -- what misleads is said

def test_a_temperature_of_few_images_is_said_to_be_unreliable():
    few = answers(1., TRUTH[:16*5:5])
    c = study(valid=({'teacher': few, 'plain': [few]*2, 'distilled': [few]*2}, TRUTH[:16*5:5]))
    assert said(c, 'Unreliable temperatures', 'teacher', '16 validation images, fewer than 100')
    assert '16 validation images' in c.to_markdown()

def test_a_temperature_at_its_bound_is_said_and_not_warned_of():
    sure,truth = np.eye(3)[TRUTH]*.9 + 1/30,TRUTH # never wrong
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        c = study(valid=({n: p if n == 'teacher' else [p]*2 for n,p in dict.fromkeys(('teacher', 'plain', 'distilled'), sure/sure.sum(1, keepdims=True)).items()}, truth))
    assert said(c, 'at its bound 0.01', 'no prediction is wrong')
    assert temperature_note(TEMPERATURE_BOUNDS[1], 500).startswith('at its bound 100: the logits carry no information')
    assert temperature_note(1.3, 500) == ''

def test_a_temperature_of_many_images_needs_no_word():
    enough = answers(1.)
    c = study(valid=({'teacher': enough, 'plain': [enough]*2, 'distilled': [enough]*2}, TRUTH))
    assert not said(c, 'Unreliable temperatures')

@pytest.mark.parametrize('runs,words', [(1, 'for every image: it does not distinguish between images'), (2, 'in 1 of 2 training runs')])
def test_a_student_that_names_one_class_only_is_said_to(runs, words):
    blind = np.tile([.2, .5, .3], (300, 1))
    c = compare_predictions({'plain': answers(2.), 'distilled': [blind] if runs == 1 else [blind, answers(2.)]}, TRUTH, NAMES, PATIENTS, n_boot=20)
    assert said(c, 'The distilled student predicts only one class, mel', words)
    assert not said(c, 'plain student predicts only one class')

def test_a_binary_student_that_names_one_class_only_is_said_to():
    c = compare_predictions({'plain': np.full(60, .2), 'distilled': np.linspace(0, 1, 60)}, [0, 1]*30, ['no', 'yes'], task='binary', n_boot=20)
    assert said(c, 'The plain student predicts only one class, no')

def test_findings_that_are_never_named_are_said():
    truth = (np.random.default_rng(0).random((80, 3)) < .4).astype(float)
    p = np.where(truth > 0, .9, .1)*[1, 1, .3]
    c = compare_predictions({'plain': p}, truth, ['edema', 'mass', 'hernia'], task='multilabel', n_boot=20)
    assert said(c, 'never predicts hernia: no image is above the threshold of 0.5')

def test_chance_stands_beside_the_metrics():
    c = study()
    assert c.about['chance'] == pytest.approx(dict(balanced_accuracy=1/3, macro_auroc=.5, accuracy=1/3))
    frame = c.sections()[0].frame
    assert frame.loc['chance', 'balanced accuracy'] == '0.333' and frame.loc['chance', 'macro AUROC'] == '0.500'
    assert 'The last row shows what chance achieves' in c.to_html(())
    assert chance_levels([0, 0, 0, 1], ['no', 'yes'], 'binary') == dict(balanced_accuracy=.5, macro_auroc=.5, accuracy=.75)
    assert chance_levels(np.array([[1, np.nan], [1, 0], [0, 0]]), ['a', 'b'], 'multilabel')['accuracy'] == pytest.approx((2/3+1)/2)

def test_no_better_than_chance_is_said_where_the_interval_includes_it():
    c = compare_predictions({'plain': answers(0.), 'distilled': answers(2.)}, TRUTH, NAMES, PATIENTS, n_boot=100)
    assert said(c, 'Not shown to be better than chance (0.333) in balanced accuracy: the plain student')
    assert not said(c, 'Not shown to be better than chance', 'distilled')

def test_binary_reports_name_positive_class_and_threshold(tmp_path):
    c = compare_predictions({'plain': np.tile([.2, .8], 30), 'distilled': np.tile([.3, .6], 30)}, [0, 1]*30, ['Parasitized', 'Uninfected'], task='binary', n_boot=20)
    folder = c.save(tmp_path/'r')
    for file in ('report.md', 'report.html'): assert 'Positive class: Uninfected. An image is classified as Uninfected if the probability of this class is above 0.5.' in (folder/file).read_text()
    about = json.loads((folder/'metrics.json').read_text())['about']
    assert (about['positive'], about['threshold']) == ('Uninfected', .5)

def test_few_groups_are_said():
    c = compare_predictions({'plain': answers(1.)}, TRUTH, NAMES, TRUTH*2 + np.arange(300) % 2, n_boot=20)
    assert said(c, 'Only 6 groups')

# -- data, and what is missing

DATA = dict(card=['Skin lesions of 7 kinds | two clinics'], copies=['12 test images have copies in training.'], guessed_groups=True, left_out={'not an image': 3})

@pytest.mark.slow
def test_what_is_known_of_the_data_stands_first(tmp_path):
    c = study()
    c.about['data'] = DATA
    folder = c.save(tmp_path/'r')
    text,page = (folder/'report.md').read_text(),(folder/'report.html').read_text()
    titles = [t for t in re.findall('^## (.*)', text, re.M) if t not in ('Verdict', 'Further observations')]
    assert titles[:2] == ['Data', 'Metrics'] and page.index('<h2>Data') < page.index('<h2>Metrics')
    for part in (text, page):
        for words in ('12 test images have copies in training.', 'was guessed', '3 (not an image)'): assert words in part
    assert 'kinds \\| two' in text and 'kinds | two' in page
    assert load_comparison(folder).about['data'] == DATA

def test_without_facts_of_the_data_there_is_no_such_section():
    assert study().sections()[0].title == 'Metrics'

@pytest.mark.slow
def test_what_is_missing_is_said_at_the_top(tmp_path):
    c = study()
    c.about['missing'] = ['Predictions of seed 2 are missing: not enough memory.']
    folder = c.save(tmp_path/'r')
    text = (folder/'report.md').read_text()
    assert text.index('## Verdict') < text.index('Predictions of seed 2') < text.index('###') < text.index('## Metrics')
    assert said(c, 'Predictions of seed 2')

# -- names are anybody's

ODD = ['a|b', 'x*y*z', '_under_', '<b>&amp;', '[x](http://evil)', 'new\nline', '$\\frac$ $', '`code`', 'accuracy', 'micro', 'plain', '# top', '1. first']

@pytest.mark.slow
def test_odd_names_neither_break_nor_hide_anything(tmp_path):
    truth = np.arange(len(ODD)*10) % len(ODD)
    names = {'plain': answers(2., truth, len(ODD)), 'a|b *x* <i>': answers(2., truth, len(ODD))}
    sex = pd.DataFrame({'se|x': np.where(np.arange(len(truth)) % 3, 'F<b>', 'M|*')})
    c = compare_predictions(names, truth, ODD, np.arange(len(truth))//2, n_boot=10, columns=sex)
    folder = c.save(tmp_path/'r')
    assert 'missing' not in json.loads((folder/'metrics.json').read_text())['about']
    text,page = (folder/'report.md').read_text(),(folder/'report.html').read_text()
    for block in re.findall(r'(?:^\|.*\n)+', text, re.M): # every row has the cells of its header
        assert len({len(re.findall(r'(?<!\\)\|', line)) for line in block.splitlines()}) == 1
    assert '<b>' not in page.split('<h1>')[1] and '<i>' not in page and '&lt;b&gt;' in page
    assert not re.search(r'(?<!\\)<b>', text) and not re.search(r'(?<!\\)\]\(http', text) and '\\`code\\`' in text
    for picture in re.findall(r'\]\((figures/[^)]*)\)', text): assert (folder/picture).is_file()
    assert load_comparison(folder).table().equals(c.table())

@pytest.mark.parametrize('name,shown', [('a|b', 'a\\|b'), ('*x*', '\\*x\\*'), ('balanced_accuracy', 'balanced_accuracy'), ('_x_', '\\_x\\_'), ('<b>', '\\<b>'), ('p < .05', 'p < .05'),
    ('a\nb', 'a b'), ('&lt;', '\\&lt;'), ('[a](b)', '[a\\](b)'), ('# a', '\\# a'), ('1. a', '1\\. a'), ('-', '\\-'), ('+0.1', '+0.1'), ('-0.1', '-0.1'), ('a\\|b', 'a\\\\\\|b'), (3, '3')])
def test_names_are_escaped_for_markdown(name, shown): assert escape_markdown(name) == shown

def test_headers_and_index_of_a_table_are_escaped():
    assert markdown_table(pd.DataFrame({'a|b': [1]}, index=['<i>'])) == '|  | a\\|b |\n| --- | --- |\n| \\<i> | 1 |'

@pytest.mark.slow
def test_pictures_of_long_names_have_files(tmp_path):
    c = compare_predictions({'plain': answers(1.), 'x'*300: answers(1.)}, TRUTH, NAMES, n_boot=5)
    assert len(list((c.save(tmp_path/'r')/'figures').glob('confusion-x*.png'))) == 1

@pytest.mark.parametrize('name', ['', 3, None, 'about', 'format', 'Teacher'])
def test_names_of_models_that_would_be_mistaken_are_refused(name):
    with pytest.raises(ValueError, match='names'  if name not in ('Teacher',) else 'must spell'): compare_predictions({name: answers(1.)}, TRUTH, NAMES)

# -- what fails costs only its own part

@pytest.mark.slow_after(1)
@pytest.mark.parametrize('part,error', [('draw_harm', MemoryError()), ('draw_roc', RuntimeError('no GPU')), ('draw_scores', ValueError('/data/jane/x.png cannot be read')), ('draw_reliability', KeyError('x'))])
def test_a_picture_that_fails_leaves_the_rest_of_the_report(part, error, tmp_path, monkeypatch):
    def fail(*args, **kwargs): raise error
    c = study()
    monkeypatch.setattr(report_module, part, fail)
    folder = c.save(tmp_path/'r')
    for file in ('report.md', 'report.html'):
        text = (folder/file).read_text()
        assert 'The picture' in text and 'is missing' in text and 'jane' not in text
        assert ('not enough memory' in text) == isinstance(error, MemoryError)
    again = load_comparison(folder)
    assert len(again.about['missing']) == 1 and again.table().equals(c.table())
    assert len(list((folder/'figures').glob('*.svg'))) >= 4 and plt.get_fignums() == []

@pytest.mark.slow_after(1)
@pytest.mark.parametrize('part', ['_harm_section', '_cost_section', '_subgroups_section'])
def test_a_section_that_fails_leaves_the_others(part, tmp_path, monkeypatch):
    def fail(comparison): raise MemoryError
    title = next(t for t,f in report_module._SECTIONS.items() if f is getattr(report_module, part))
    monkeypatch.setitem(report_module._SECTIONS, title, fail)
    text = (study().save(tmp_path/'r')/'report.md').read_text()
    assert f"The section '{title}' is missing: not enough memory." in text and '## Each class' in text

@pytest.mark.slow_after(1)
@pytest.mark.parametrize('part,attribute', [('harm_check', 'harm'), ('subgroup_scores', 'subgroups'), ('calibration_scores', 'calibration'), ('agreement', 'agreements')])
def test_a_part_that_cannot_be_computed_leaves_the_others(part, attribute, tmp_path, monkeypatch):
    import kdmed.evaluate.collect as module
    def fail(*args, **kwargs): raise MemoryError
    monkeypatch.setattr(module, part, fail)
    valid = {'teacher': answers(1.), 'plain': [answers(1.)]*2, 'distilled': [answers(1.)]*2}
    c = study(columns={'sex': np.where(PATIENTS % 2, 'F', 'M')}, valid=(valid, TRUTH))
    assert not getattr(c, attribute) and all('not enough memory' in s for s in c.about['missing'])
    assert 'is missing: not enough memory' in (c.save(tmp_path/'r')/'report.html').read_text()

def test_an_interrupt_is_no_part_that_fails():
    def interrupt(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): attempt('Calibration', interrupt, [])

@pytest.fixture(scope='module')
def dls(): return image_dls(split_groups(synthetic_table(n=120, classes=3, size=32), sizes=(.4, .3, .3)), size=32, bs=16)

@pytest.fixture(scope='module')
def two(dls): return {name: create_student('test_resnet', dls.classes, 32) for name in ('plain', 'distilled')}

def test_shared_groups_cost_the_calibration_and_nothing_else(dls, two):
    c = compare(two, dls.test, n_boot=10, valid=dls.test, batch=2)
    assert c.calibration is None and said(c, 'Calibration is missing', 'groups of the validation images are also groups of the test images')
    assert compare(two, dls.test, n_boot=10, valid=dls.valid, batch=2).calibration is not None

def test_a_model_whose_cost_cannot_be_measured_costs_that_alone(dls, two):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = create_student('test_resnet', dls.classes, 32)
        def forward(self, x):
            if len(x) == 3: raise RuntimeError('not three at once')
            return self.net(x)
    missing = []
    costs = measure_costs({'plain': two['plain'], 'odd': Stubborn()}, 32, batch=3, missing=missing)
    assert list(costs) == ['plain'] and missing == ['The cost of odd is missing: not three at once.']
    with pytest.raises(RuntimeError, match='not three at once'): measure_costs({'odd': Stubborn()}, 32, batch=3)

# -- latency

def test_one_architecture_has_one_latency(dls, two):
    costs = measure_costs(two | {'teacher': create_student('resnet10t', dls.classes, 32)}, 32, batch=4)
    for key in ('latency_ms', 'latency_batch_ms', 'throughput', 'macs'):
        assert costs['plain'][key] == costs['distilled'][key] != costs['teacher'][key]

def test_architectures_take_turns_and_each_is_timed_once():
    seen = []
    class Net(nn.Module):
        def __init__(self, name, width):
            super().__init__()
            self.name_,self.layer = [name],nn.Conv2d(3, width, 1)
        def forward(self, x):
            seen.append(self.name_[0])
            return self.layer(x)
    ms = measure_latencies({'a': Net('a', 2), 'b': Net('b', 3), 'c': Net('c', 2)}, 8, runs=4)
    assert seen == ['a', 'b']*7 and ms['a'] == ms['c']

@pytest.mark.parametrize('change,same', [(lambda m: m, True), (lambda m: m.half(), False), (lambda m: nn.Sequential(m, nn.Identity()), False), (lambda m: nn.DataParallel(m), True)])
def test_an_architecture_is_its_structure_not_its_weights(change, same):
    a,b = (create_student('test_resnet', NAMES, 32) for _ in range(2))
    assert (architecture_key(a) == architecture_key(change(b))) == same

def test_settings_that_change_the_work_make_another_architecture():
    assert architecture_key(nn.MaxPool2d(2)) != architecture_key(nn.MaxPool2d(3))
    assert architecture_key(nn.Conv2d(3, 4, 1)) != architecture_key(nn.Conv2d(3, 4, 1, stride=2))

# -- files

@pytest.mark.parametrize('text,words', [('{', 'is not valid JSON'), ('', 'is not valid JSON'), ('[]', 'is not a comparison'), ('3', 'is not a comparison'), ('{}', 'is not a comparison'),
    ('{"about":{}}', '`about` lacks classes, task, images, groups'), ('{"about":{"x":1},"teacher":3}', '`about` lacks'), ('{"about":3}', '`about` must be'),
    ('{"format":99,"about":{}}', 'of a newer kdmed'), ('{"format":"x","about":{}}', 'cannot read')])
def test_damaged_files_are_refused_by_name(text, words, tmp_path):
    (tmp_path/'metrics.json').write_text(text)
    with pytest.raises(ValueError, match='metrics.json') as e: load_comparison(tmp_path)
    assert words in str(e.value)

ABOUT = '"about":{"classes":["a","b"],"task":"binary","images":4,"groups":4}'
@pytest.mark.parametrize('models', ['"teacher":3', '"teacher":{}', '"teacher":{"accuracy":{"value":"x","low":0,"high":1}}', '"teacher":{"accuracy":{"value":1}}', '"teacher":[]',
    '"teacher":{"accuracy":{"value":1,"low":0,"high":1}},"differences":3', '"teacher":{"accuracy":{"value":1,"low":0,"high":1}},"harm":3', ''])
def test_damaged_numbers_are_refused_by_name(models, tmp_path):
    (tmp_path/'metrics.json').write_text('{' + ABOUT + (',' if models else '') + models + '}')
    with pytest.raises(ValueError, match='metrics.json is damaged'): load_comparison(tmp_path)

def test_a_report_of_the_first_releases_is_read(tmp_path):
    (tmp_path/'metrics.json').write_text('{' + ABOUT + ',"plain":{"accuracy":{"value":0.5,"low":0.2,"high":0.8}}}')
    assert load_comparison(tmp_path).scores['plain'].value['accuracy'] == .5

def test_metrics_have_a_format_and_come_back(tmp_path):
    c = study()
    folder = c.save(tmp_path/'r')
    assert json.loads((folder/'metrics.json').read_text())['format'] == 1
    assert load_comparison(folder).to_dict() == c.to_dict()

@pytest.mark.slow
def test_a_save_that_fails_leaves_the_report_before_it_whole(tmp_path, monkeypatch):
    folder = study().save(tmp_path/'r')
    before = {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}
    replace,calls = os.replace,[]
    def fail_once(a, b):
        calls.append(b)
        if len(calls) == 8: raise OSError(5, 'the disk is gone')
        return replace(a, b)
    monkeypatch.setattr(os, 'replace', fail_once)
    with pytest.raises(OSError, match='the disk is gone'): study(seed=1).save(folder, overwrite=True)
    monkeypatch.undo()
    assert {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()} == before

@pytest.mark.slow
def test_leftovers_of_a_killed_save_are_cleared(tmp_path):
    dead = subprocess.run([sys.executable, '-c', 'import os; print(os.getpid())'], capture_output=True, text=True).stdout.strip()
    (tmp_path/f'.report-{dead}-x').mkdir()
    study().save(tmp_path)
    assert not list(tmp_path.glob('.report-*'))

@pytest.mark.slow
def test_a_disk_without_room_is_said_before_anything_is_replaced(tmp_path, monkeypatch):
    folder = study().save(tmp_path/'r')
    before = (folder/'metrics.json').read_bytes()
    import kdmed.core.files
    monkeypatch.setattr(kdmed.core.files.shutil, 'disk_usage', lambda p: type('Usage', (), dict(total=0, used=0, free=1000))())
    with pytest.raises(OSError, match='needs'): study(seed=1).save(folder, overwrite=True)
    assert (folder/'metrics.json').read_bytes() == before

# -- bad input

@pytest.mark.parametrize('argument,value,words', [('classes', 3, 'classes must be a list of class names'), ('classes', 'abc', 'classes must be a list of class names'), ('classes', None, 'classes must be a list of class names'),
    ('classes', ['a', 'a', 'b'], 'different names'), ('n_boot', 1.5, 'n_boot must be a whole number'), ('n_boot', 0, 'n_boot must be a whole number of at least 1'), ('n_boot', True, 'n_boot'),
    ('level', float('nan'), 'level must be a finite number'), ('level', '0.9', 'level must be a finite number'), ('level', 1, 'level must be'), ('seed', -1, 'seed must be'), ('seed', 'a', 'seed must be'),
    ('groups', [1, 2], 'groups and targets must have the same length'), ('task', 'multi', 'unknown task'),
    ('serious', ['x'], "unknown serious class 'x'")])
def test_bad_input_names_the_argument(argument, value, words):
    given = dict(probs={'plain': answers(1.)}, targets=TRUTH, classes=NAMES, groups=PATIENTS) | {argument: value}
    with pytest.raises((TypeError, ValueError), match=words): compare_predictions(**given)

# -- nothing private

@pytest.mark.parametrize('text,public', [('/data/jane/data', '(path)'), ("cannot read '/mnt/my disk/a b.png'", 'cannot read (path)'), ('C:\\Users\\jane\\x', '(path)'), ('~/x/y', '(path)'),
    ('scan_0012.dcm is cut', '(file) is cut'), ('see https://doi.org/10.1/x', 'see https://doi.org/10.1/x'), ('images/s and 1 / 2', 'images/s and 1 / 2'), ('sensitivity/mel', 'sensitivity/mel'),
    (['/a/b', 3, {'x': '/a/b'}], ['(path)', 3, {'x': '(path)'}])])
def test_paths_and_names_of_files_are_private(text, public): assert without_private(text) == public

@pytest.mark.slow
def test_no_file_of_a_report_tells_where_data_lie(tmp_path):
    c = study()
    c.about |= dict(name='/data/jane/skin', data=dict(card=['Read from /data/jane/skin'], left_out={'/data/jane/skin/p01.png: cannot be read': 1}), missing=['p02.png is missing.'],
                    note='Made from /data/jane/skin.')
    folder = c.save(tmp_path/'r')
    for file in folder.rglob('*'):
        if file.is_file(): assert b'jane' not in file.read_bytes() and b'p01.png' not in file.read_bytes() and b'p02.png' not in file.read_bytes()

def test_errors_are_told_without_paths():
    assert why_failed(OSError(2, 'No such file', '/data/jane/x.png')) == '[Errno 2] No such file: (path)'
    assert why_failed(ValueError()) == 'ValueError'

# -- rehearsal

@pytest.mark.slow(seconds=15)
def test_a_rehearsal_makes_the_whole_report_and_leaves_nothing(dls, two, tmp_path):
    assert rehearse_report(dls, seeds=(0, 1), folder=tmp_path/'out') == []
    assert rehearse_report(dls, two, 1, folder=tmp_path/'out') == []
    assert list((tmp_path/'out').iterdir()) == []

@pytest.mark.slow
def test_a_rehearsal_tells_what_will_be_missing(dls):
    shared = image_dls(dls.valid.table.assign(split='train').pipe(lambda t: pd.concat([dls.train.table, t.assign(split='valid'), t.assign(split='test')])).pipe(_like, dls), size=32, bs=16, allow_leakage=True)
    assert rehearse_report(shared)[0].startswith('Calibration is missing')

def _like(table, dls):
    table = table.reset_index(drop=True)
    table.attrs = dls.test.table.attrs
    return table

def test_a_rehearsal_raises_what_would_fail_after_training(dls, monkeypatch):
    with pytest.raises(ValueError, match=r"subgroups must be columns of the image table, but \['age'\] are not"): rehearse_report(dls, subgroups='age')
    def fail(*args): raise MemoryError
    monkeypatch.setattr(report_module, 'draw_roc', fail)
    with pytest.raises(RuntimeError, match="the report cannot be made: The picture 'roc' is missing: not enough memory"): rehearse_report(dls)

def test_a_rehearsal_writes_where_the_report_will_be(dls, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): rehearse_report(dls, folder=tmp_path/'file')
