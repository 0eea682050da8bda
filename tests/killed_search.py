"A small search that a test kills: killed_search.py FOLDER TEACHER; a helper of test_search.py"
import sys, warnings
from pathlib import Path

warnings.filterwarnings('ignore')

from kdmed.models.create import load_student, save_student
from kdmed.studies.search import search_method
from test_search import loaders, teacher_of

if __name__=='__main__':
    folder,home = map(Path, sys.argv[1:])
    dls = loaders()
    if not home.exists(): save_student(teacher_of(dls), home)
    space = dict(method=['logit', 'similarity'], epochs=3, weight=[1., 4.])
    how = dict(epochs=3, seeds=(0, 1), n_boot=50)
    search_method(dls, load_student(home), 'test_resnet', '40 epochs', space, folder=folder, **how)
