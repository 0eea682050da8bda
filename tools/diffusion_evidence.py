"""Train a small diffusion model on what the GANs of `results/scarce_classes` learned from: `results/diffusion`.

    pip install diffusers
    python tools/diffusion_evidence.py --data FOLDER --work FOLDER

A class-conditional U-Net from scratch, on one core for about twice as long as one of the GANs, 8 minutes; it begins
again when killed. Its images are measured as theirs are."""
import argparse
import time
import warnings
from pathlib import Path

from scarce_evidence import SCARCE, SIZE, Job, gan_settings, measure # first: it chooses the processor's instructions
import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdmed.core.files import write_atomic
from kdmed.data.images import image_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'results'/'diffusion'
CHANNELS,BATCH,STEPS,LR,SEED = (16, 32, 64),32,900,1e-3,0
TRAINED,SAMPLED,KEPT = 1000,50,.99 # noise levels; steps of DDIM; share of the average that a step keeps
DRAWN = 150 # images of each class

def network(n_classes):
    from diffusers import UNet2DModel
    plain = len(CHANNELS)-1
    return UNet2DModel(
        sample_size=SIZE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=CHANNELS,
        down_block_types=('DownBlock2D',)*plain + ('AttnDownBlock2D',),
        up_block_types=('AttnUpBlock2D',) + ('UpBlock2D',)*plain, num_class_embeds=n_classes, norm_num_groups=8)

def train(job):
    "The averaged network, and its losses"
    from diffusers import DDPMScheduler
    torch.manual_seed(SEED)
    classes,own = job.dls.classes,job.table[job.table.split=='train']
    pixels = torch.from_numpy(np.stack(own.image)).permute(0, 3, 1, 2)
    labels = torch.tensor([classes.index(label) for label in own.label])
    weights = (1/torch.bincount(labels))[labels] # classes evenly, as for the GAN
    model = network(len(classes)).to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(KEPT))
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS, pct_start=.1)
    noises,augment,losses = DDPMScheduler(TRAINED, beta_schedule='squaredcos_cap_v2'),gan_settings()['augment'],[]
    for step in range(STEPS):
        rows = torch.multinomial(weights, BATCH, True)
        x = 2*augment(pixels[rows].float()/255, rows.numpy(), step) - 1
        noise,t = torch.randn_like(x),torch.randint(TRAINED, (BATCH,))
        loss = (model(noises.add_noise(x, noise, t), t, labels[rows]).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        rate.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if step%250==0: print(time.strftime('%H:%M:%S'), step, np.mean(losses[-250:]), flush=True)
    return average.module.eval(),losses

@torch.no_grad()
def draw(model, labels):
    "uint8 [N, H, W, 3] of classes by number, by DDIM"
    from diffusers import DDIMScheduler
    schedule,drawn = DDIMScheduler(TRAINED, beta_schedule='squaredcos_cap_v2'),[]
    schedule.set_timesteps(SAMPLED)
    rng = torch.Generator().manual_seed(SEED)
    for y in labels.split(50):
        x = torch.randn(len(y), 3, SIZE, SIZE, generator=rng)
        for t in schedule.timesteps: x = schedule.step(model(x, t, y).sample, t, x).prev_sample
        drawn.append(x)
    return ((torch.cat(drawn).clamp(-1, 1)+1)*127.5).round().byte().permute(0, 2, 3, 1).numpy()

def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--data', required=True)
    args.add_argument('--work', required=True)
    args = args.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    job,start = Job(args.data, args.work),time.process_time()
    model,losses = train(job)
    trained,start = time.process_time()-start,time.process_time()
    names = [name for name in SCARCE for _ in range(DRAWN)]
    images = draw(model, torch.tensor([job.dls.classes.index(name) for name in names]))
    drawing = time.process_time()-start
    np.save(Path(args.work)/'diffusion.npy', images)
    table = image_table(list(images), names, classes=job.dls.classes, name='drawn by a diffusion model')
    parameters = sum(p.numel() for p in model.parameters())
    rows = measure(job.table, table).round(4).assign(
        kind='diffusion', seed=SEED, cpu_seconds=round(trained), drawing_seconds=round(drawing), steps=STEPS,
        parameters=parameters, loss=round(float(np.mean(losses[-250:])), 4))
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS/'drawn.csv', rows.to_csv(index=False))
    print(rows.to_string())

if __name__ == '__main__': main()
