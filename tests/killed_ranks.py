"Two processes that train together on the CPU, both killed by `kill -9` at the same batch and started again: python killed_ranks.py FOLDER"
import json, os, socket, sys, traceback
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback.schedule import fit_one_cycle # noqa: F401
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.metrics import accuracy
from killed_script import TISSUE, Counts, MovingAverage, cnn, die, outcome, quiet, same

from kdmed.core.basics import seed_everything
from kdmed.data.loaders import image_dls
from kdmed.train.resume import Resume

def broadcast(self, t, rank):
    "fastai's, without a GPU"
    t = torch.LongTensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

def train(rank, resume, kill):
    "What each process does: same weights and batches to begin with, its own dropout"
    seed_everything(0)
    dls,model = image_dls(TISSUE, 16, bs=8),cnn()
    torch.manual_seed(rank)
    learn = Learner(dls, model, metrics=accuracy, cbs=[MovingAverage(), Counts()] + ([Resume(resume, every=2)] if resume else []))
    step,left = learn._do_one_batch,[kill]
    def deadly():
        left[0] -= learn.training
        if left[0]<0: die()
        step()
    learn._do_one_batch = deadly
    learn.to_distributed(sync_bn=False, cpu=True)
    return quiet(learn, lambda: (learn.fit_one_cycle(2, 1e-2), learn.fit(1, 1e-3)))

def start(resume, home, kill=10**9):
    "Outcomes of both processes, or None if they were killed"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1]: continue
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='1')
            torch.set_num_threads(1)
            DistributedDL._broadcast = broadcast
            dist.init_process_group('gloo', rank=rank, world_size=2)
            torch.save(outcome(train(rank, resume, kill)), home/f'{rank}.pt')
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if 1 in ends: raise SystemExit('training failed')
    return [torch.load(home/f'{rank}.pt', weights_only=True) for rank in range(2)] if ends==[0, 0] else None

if __name__=='__main__':
    home = Path(sys.argv[1])
    goal = start(None, home)
    kills = (3, 12)
    killed = [start(home/f'checkpoints{k}', home, k) is None for k in kills]
    got = [start(home/f'checkpoints{k}', home) for k in kills]
    differing = sorted({f'{name} of rank {rank}' for ends in got for rank in range(2) for name in goal[0] if not same(goal[rank][name], ends[rank][name])})
    print(json.dumps(dict(killed=all(killed), same_weights=same(goal[0]['weights'], goal[1]['weights']), same_draws=same(goal[0]['next'], goal[1]['next']), differing=differing)))
