"""What an installed kdmed must be able to do; run by try_wheel.py with the Python of a fresh environment, outside the checkout.

    python -I wheel_uses.py plain       every module imports, the command answers, one epoch is distilled
    python -I wheel_uses.py EXTRA       what only that extra makes possible

It imports kdmed and its dependencies alone, nothing of the checkout.
"""
import importlib, os, pkgutil, socket, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

COMMAND = Path(sys.executable).with_name('kdmed')

def output_of(*command, **kwargs):
    "What a command prints; an error with its output where it fails"
    done = subprocess.run([str(c) for c in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    if done.returncode: raise RuntimeError(f'{command[0]} failed with exit status {done.returncode}:\n{done.stdout[-4000:]}')
    return done.stdout

def module_names(inside=sys.prefix):
    "All modules of the package; an error where it was not installed below `inside`"
    import kdmed
    if inside and not Path(kdmed.__file__).is_relative_to(inside): raise RuntimeError(f'kdmed was imported from {kdmed.__file__}, not from {inside}')
    return ['kdmed', *(m.name for m in pkgutil.walk_packages(kdmed.__path__, 'kdmed.'))]

def small_dls(size=32, n=120, **kwargs):
    "Loaders of a few synthetic images in three classes"
    from kdmed.data.loaders import image_dls
    from kdmed.data.splits import split_groups
    from kdmed.data.images import synthetic_table
    table = split_groups(synthetic_table(n, classes=3, size=size), sizes=(.6, .2, .2))
    return image_dls(table, size, bs=16, **kwargs)

def distilled():
    "A student after one epoch, and its loaders"
    import numpy as np
    from kdmed.models.create import create_teacher
    from kdmed.distill.methods import distill
    from kdmed.evaluate.metrics import predict
    dls = small_dls()
    learn = distill(dls, 'test_efficientnet', create_teacher('test_resnet', dls.classes, 32), epochs=1, progress=False)
    scores,targets = predict(learn, dls.test)[:2]
    assert np.isfinite(scores).all() and scores.shape==(len(targets), 3), scores
    return learn,dls

def kept(learn, dls):
    "A student is exported, loaded and predicts as before; training goes on from a checkpoint"
    import torch
    from fastai.learner import load_learner
    from kdmed.distill.methods import fit_classifier
    from kdmed.train.resume import Resume
    images = dls.valid.one_batch()[0]
    with tempfile.TemporaryDirectory() as folder:
        learn.export(Path(folder)/'learner.pkl')
        again = load_learner(Path(folder)/'learner.pkl')
        with torch.no_grad(): torch.testing.assert_close(again.model.eval()(images), learn.model.eval()(images))
        for _ in range(2): fit_classifier(small_dls(), 'test_resnet', 1, cbs=Resume(Path(folder)/'run'), progress=False)

def plain():
    "Every module, the command, a distillation and what is kept of it"
    names = module_names()
    for name in names: importlib.import_module(name)
    said = output_of(COMMAND, '--version')
    assert version('kdmed') in said, said
    assert 'distill' in output_of(COMMAND, '--help')
    kept(*distilled())
    return f'{len(names)} modules import; kdmed --version, --help; one epoch distilled, exported, resumed'

def baselines():
    "Hand-made features of scikit-image, and a classifier that is saved and loaded by skops"
    import numpy as np
    from kdmed.baselines import fit_handmade, load_handmade, save_handmade
    from kdmed.evaluate.metrics import predict
    dls = small_dls(48, n=480) # several patients of each class, for calibration
    with tempfile.TemporaryDirectory() as folder:
        for features,classifier in (('hog+color+glcm', 'svm'), ('lbp+shapes+words', 'forest'), ('gray', 'boosting'),
                                    ('nuclei', 'mlp'), ('color', 'codes')):
            model = fit_handmade(dls, features, classifier, folder=folder)
            again = load_handmade(save_handmade(model, Path(folder)/classifier))
            np.testing.assert_allclose(predict(again, dls.test)[0], predict(model, dls.test)[0], atol=1e-6)
    return f"features of scikit-image {version('scikit-image')}; classifiers saved by skops {version('skops')}"

def filters():
    "A filter of each package"
    import numpy as np, spandrel # noqa: F401
    from kdmed.data.filters import CLAHE, MacenkoNormalizer
    from kdmed.data.images import open_image, synthetic_table
    pixels = np.asarray(open_image(synthetic_table(4, classes=3, size=64).image[0]).convert('RGB'))
    equalized,stained = CLAHE()(pixels),MacenkoNormalizer.fit(pixels)(pixels)
    assert all(p.dtype==np.uint8 and p.shape==pixels.shape for p in (equalized, stained)) and (equalized!=pixels).any()
    return f'CLAHE, Macenko stain normalization, spandrel {version("spandrel")}'

def medmnist():
    "An npz as MedMNIST publishes it, read with its official split"
    import medmnist as package, numpy as np
    from kdmed.data.datasets import read_medmnist
    rng = np.random.default_rng(0)
    parts = {'train': 6, 'val': 2, 'test': 3}
    arrays = {f'{s}_images': rng.integers(0, 255, (n, 28, 28), dtype=np.uint8) for s,n in parts.items()}
    arrays |= {f'{s}_labels': np.arange(n, dtype=np.uint8)[:, None]%2 for s,n in parts.items()}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder)/'breastmnist.npz', **arrays)
        table = read_medmnist(Path(folder)/'breastmnist.npz', print_card=False)
    assert table.split.value_counts().to_dict()=={'train': 6, 'test': 3, 'valid': 2}, table
    assert list(package.INFO['breastmnist']['label'].values())==table.attrs['classes'], table.attrs
    return 'an npz read, its classes those of the medmnist package'

def dicom():
    "A 16-bit image with a window"
    import numpy as np
    from kdmed.data.images import read_dicom
    from pydicom.dataset import Dataset, FileMetaDataset
    values = np.tile(np.linspace(0, 4095, 8).astype(np.uint16), (4, 1))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1'
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.Rows,ds.Columns,ds.SamplesPerPixel,ds.PhotometricInterpretation = *values.shape,1,'MONOCHROME2'
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit,ds.PixelRepresentation,ds.PixelData = 15,0,values.tobytes()
    ds.WindowCenter,ds.WindowWidth = 2048,4096
    with tempfile.TemporaryDirectory() as folder:
        ds.save_as(Path(folder)/'image.dcm', enforce_file_format=True)
        pixels = read_dicom(Path(folder)/'image.dcm')
    assert pixels.shape==(4, 8) and pixels[0, 0]==0 and pixels[0, -1]==255 and (np.diff(pixels[0].astype(int))>0).all(), pixels
    return 'a DICOM image through its window'

def interpret():
    "A map of each package"
    import numpy as np
    from kdmed.models.create import create_student
    from kdmed.evaluate.saliency import saliency_maps
    dls = small_dls(64)
    model,images = create_student('test_resnet', dls.classes, 64),dls.valid.one_batch()[0][:2]
    maps = [saliency_maps(model, images, method=m, samples=20, task='multiclass') for m in ('grad-cam', 'lime')]
    assert all(m.shape==(2, 64, 64) and np.isfinite(m).all() for m in maps)
    return 'Grad-CAM and LIME maps'

def weights():
    "ImageNet weights from a package, without a network"
    from kdmed.models.create import create_student
    made = []
    for name in ('tf_efficientnet_lite0', 'tf_efficientnet_lite2'):
        model,again = (create_student(name, 1000, 224, weights='pip') for _ in range(2))
        assert all((a==b).all() for a,b in zip(model.state_dict().values(), again.state_dict().values())), f'{name} has random weights'
        made.append(name)
    return f'{" and ".join(made)} with weights from their packages'

def transformers():
    "Features of each foundation model of that package, tiny, with random weights and with those of a folder"
    import torch
    from kdmed.models.foundation import FOUNDATION, create_encoder
    made,tiny = [],dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192)
    for name,recipe in FOUNDATION.items():
        if recipe.library!='transformers': continue
        side = 2*recipe.options['patch_size']
        encoder = create_encoder(name, weights=False, accept_license=True, size=side, **tiny)
        images = torch.rand(2, 3, side, side)
        with torch.no_grad(): features = encoder(images)
        assert features.shape==(2, encoder.spec['width']) and features.isfinite().all(), name
        with tempfile.TemporaryDirectory() as folder:
            encoder.backbone.save_pretrained(folder)
            again = create_encoder(name, weights=folder, accept_license=True, size=side, **tiny)
            with torch.no_grad(): torch.testing.assert_close(again(images), features)
        made.append(name)
    assert made
    return f'features of {", ".join(made)}, transformers {version("transformers")}'

def copies():
    "A turned copy is found among strangers, and the match shows its transform"
    import numpy as np
    from PIL import Image, ImageFilter
    from kdmed.data.copies import match_copies
    rng = np.random.default_rng(0)
    def picture(): return Image.fromarray(rng.integers(0, 255, (200, 200), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(3))
    def middle(image): return np.asarray(Image.eval(image, lambda v: min(max(4*v-384, 0), 255)).crop((30, 30, 170, 170)).convert('RGB'))
    pictures = [picture() for _ in range(6)]
    found = match_copies([*map(middle, pictures), middle(pictures[2].rotate(30, Image.Resampling.BICUBIC))])
    assert list(zip(found.a, found.b))==[(2, 6)] and abs(abs(found.angle[0])-30)<=2, found
    return f'a copy turned by 30° matched, turned by {found.angle[0]:.0f}°; no stranger'

def zarr():
    "Images and teacher outputs in Zarr arrays, behind a path and a URL"
    import numpy as np
    if sys.version_info < (3, 11): return 'nothing: zarr needs Python 3.11'
    from kdmed.data.images import synthetic_table
    from kdmed.data.store import pack_images
    from kdmed.distill.cache import TeacherCache
    from kdmed.models.create import create_teacher
    images = list(synthetic_table(40, classes=3, size=32).image)
    dls = small_dls(device='cpu')
    with tempfile.TemporaryDirectory() as folder:
        wanted = np.stack([images[i] for i in (5, 1, 5)]).transpose(0, 3, 1, 2)
        for place in (folder, f'{folder}/images.zarr', 'memory://images.zarr'):
            store = pack_images(images, 32, folder=place, progress=False)
            assert (store[[5, 1, 5]]==wanted).all(), store
        teacher = create_teacher('test_resnet', dls.classes, 32)
        cache = TeacherCache(teacher, 'memory://outputs.zarr').fill(dls, progress=False)
        assert cache.filled==1, cache
    return f'images and outputs in Zarr arrays, zarr {version("zarr")}'

def onnx():
    "A student in a file, as onnxruntime runs it"
    import numpy as np
    from kdmed.data.images import synthetic_table
    from kdmed.models.create import create_student, predict_images, set_model_stats
    from kdmed.ship import OnnxModel, export_onnx
    student = set_model_stats(create_student('test_resnet', 3, 32).eval(), .5, .2)
    images = list(synthetic_table(3, classes=3, size=32).image)
    with tempfile.TemporaryDirectory() as folder:
        model = OnnxModel(export_onnx(student, Path(folder)/'student.onnx'))
        assert np.abs(model.predict(images)-predict_images(student, images)).max().max()<1e-4
    versions = ', '.join(f'{name} {version(name)}' for name in ('onnx', 'onnxscript', 'onnxruntime'))
    return f'a student exported, and run with the same probabilities: {versions}'

def openvino():
    "A student's file in int8, as OpenVINO runs it"
    import numpy as np
    from kdmed.data.images import synthetic_table
    from kdmed.models.create import create_student, predict_images, set_model_stats
    from kdmed.ship import OpenVinoModel, export_onnx, quantize_openvino
    student = set_model_stats(create_student('test_resnet', 3, 32).eval(), .5, .2)
    images = list(synthetic_table(8, classes=3, size=32).image)
    with tempfile.TemporaryDirectory() as folder:
        source = export_onnx(student, Path(folder)/'student.onnx')
        model = OpenVinoModel(quantize_openvino(source, images, Path(folder)/'student.xml'))
        assert np.abs(model.predict(images)-predict_images(student, images)).max().max()<.1
    return f"a student in int8, openvino {version('openvino')}, nncf {version('nncf')}"

def torchao():
    "A student that is trained with rounded weights"
    import torch
    from kdmed.models.create import create_student, set_model_stats
    from kdmed.ship import prepare_rounding
    rounding = prepare_rounding(set_model_stats(create_student('test_resnet', 3, 32), .5, .2)).train()
    rounding(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in rounding.parameters())
    return f"a step with rounded weights, torchao {version('torchao')}"

def small_student():
    "An untrained student whose normalization is known"
    from kdmed.models.create import create_student, set_model_stats
    return set_model_stats(create_student('test_resnet', 3, 32).eval(), .5, .2)

def serve():
    "A bundle behind HTTP, started by the command, asked once and stopped"
    import json, signal, urllib.request
    import numpy as np
    from kdmed.data.images import open_image, synthetic_table
    from kdmed.ship import load_bundle, save_bundle
    image = synthetic_table(1, classes=3, size=32).image[0]
    with tempfile.TemporaryDirectory() as folder:
        bundle = save_bundle(small_student(), Path(folder)/'bundle', calibrate=False)
        open_image(image).save(Path(folder)/'a.png')
        command = [str(COMMAND), 'serve', str(bundle), '--port', '0']
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = process.stdout.readline().split()[2].rstrip(':')
            data = (Path(folder)/'a.png').read_bytes()
            asked = urllib.request.Request(f'{address}/predict', data, {'Content-Type': 'image/png'})
            answer = json.load(urllib.request.urlopen(asked, timeout=60))['predictions'][0]['probabilities']
            process.send_signal(signal.SIGINT)
            assert process.wait(30)==0
        finally: process.kill()
        assert np.allclose(list(answer.values()), load_bundle(bundle).predict(image), atol=1e-5)
    return f'an image predicted over HTTP: fastapi {version("fastapi")}, uvicorn {version("uvicorn")}'

def executorch():
    "A student as a program, run in ExecuTorch's runtime"
    from kdmed.ship import export_executorch
    with tempfile.TemporaryDirectory() as folder: export_executorch(small_student(), Path(folder)/'student.pte')
    return f'a student exported, and run with the same logits: executorch {version("executorch")}'

def coreml():
    "A student as a Core ML package"
    from kdmed.ship import export_coreml
    with tempfile.TemporaryDirectory() as folder: export_coreml(small_student(), Path(folder)/'student.mlpackage')
    return f'a student converted, not run: coremltools {version("coremltools")}'

def several_processes(rank):
    "What each of two processes does: one epoch on its half of every batch"
    import torch
    from fastai.learner import Learner
    from kdmed.distill.callbacks import LogitKD
    from kdmed.models.create import create_student, create_teacher
    torch.set_num_threads(1)
    dls = small_dls(device='cpu') # imports fastai.distributed, since WORLD_SIZE says that there are several processes
    from fastai.distributed import DistributedDL
    def broadcast(self, samples, source):
        "As fastai's, which takes a detour through CUDA"
        samples = torch.tensor(samples)
        torch.distributed.broadcast(samples, source)
        return samples.tolist()
    DistributedDL._broadcast = broadcast
    torch.manual_seed(0)
    teacher,student = create_teacher('test_resnet', dls.classes, 32),create_student('test_efficientnet', dls.classes, 32)
    learn = Learner(dls, student, cbs=LogitKD(teacher))
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1)
    sums = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
    torch.distributed.all_gather(sums, sum(p.double().abs().sum() for p in student.parameters()).detach()[None])
    assert sums[0]==sums[1], f'the processes have different students: {sums}'
    torch.distributed.destroy_process_group()

def wait_for(processes, seconds=600):
    "Until all have ended, or one has failed: the others would wait for it in vain"
    end = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and not any(p.returncode for p in processes):
        if time.monotonic()>end: raise TimeoutError(f'two processes did not finish in {seconds} s')
        time.sleep(.1)

def distributed():
    "Two processes on this machine train one student"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'GLOO_SOCKET_IFNAME': 'lo',
           'CUDA_VISIBLE_DEVICES': '', 'ACCELERATE_USE_CPU': 'yes', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-I', '-W', 'ignore', str(Path(__file__).resolve()), 'several_processes']
    with tempfile.TemporaryDirectory() as folder:
        logs = [open(Path(folder)/f'{rank}.txt', 'w+', encoding='utf-8') for rank in range(2)]
        ranks = [subprocess.Popen([*command, str(rank)], stdout=log, stderr=subprocess.STDOUT, env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)})
                 for rank,log in enumerate(logs)]
        try: wait_for(ranks)
        finally:
            for process in ranks: process.kill()
            said = [log.seek(0) or log.read() for log in logs]
            for log in logs: log.close()
    assert all(process.returncode==0 for process in ranks), '\n'.join(said)
    return 'two processes train one student'

USES = dict(plain=plain, baselines=baselines, filters=filters, medmnist=medmnist, dicom=dicom, interpret=interpret,
            weights=weights, transformers=transformers, copies=copies, distributed=distributed, zarr=zarr,
            onnx=onnx, openvino=openvino, torchao=torchao, serve=serve, executorch=executorch, coreml=coreml)

def main(name, *rank):
    if name=='several_processes': return several_processes(int(*rank))
    print(USES[name](), flush=True)

if __name__=='__main__': main(*sys.argv[1:])
