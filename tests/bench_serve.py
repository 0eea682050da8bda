"The service under load: images a second, waiting times, and bad requests among good ones, each part for a few seconds"
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdmed.data.images import synthetic_table
from kdmed.models.create import create_student, set_model_stats
from kdmed.ship import load_bundle, save_bundle

HEAD = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n'


def as_file(pixels, kind='JPEG'):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bomb(side=100_000):
    "A PNG file that claims many pixels"
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(bytes(10**6))) + chunk(b'IEND',
            b'')


class Client:
    "Requests to the service, and what became of them"
    def __init__(self, port): self.port,self.times,self.statuses,self.wrong = port,[],{},0

    def post(self, data, connection=None):
        connection = connection or HTTPConnection('127.0.0.1', self.port, timeout=30)
        connection.request('POST', '/predict', data, {'Content-Type': 'image/jpeg'})
        response = connection.getresponse()
        answer = json.loads(response.read())
        self.statuses[response.status] = self.statuses.get(response.status, 0)+1
        return response.status,answer

    def good(self, files, expected, until):
        "One image after the other, over one connection"
        connection,i = HTTPConnection('127.0.0.1', self.port, timeout=30),0
        while time.perf_counter() < until:
            start = time.perf_counter()
            status,answer = self.post(files[i%len(files)], connection)
            self.times.append(time.perf_counter()-start)
            values = list(answer['predictions'][0]['probabilities'].values()) if status==200 else None
            self.wrong += values is None or not np.allclose(values, expected[i%len(files)], atol=1e-5)
            i += 1

    def bad(self, picture, until):
        "No image, a bomb, a body that is cut off, a length that lies"
        while time.perf_counter() < until:
            for data in (b'no image', bomb(), picture[:200]): self.wrong += self.post(data)[0]!=400
            for data in (HEAD + b'Content-Length: 90000\r\n\r\nabc', HEAD + b'Content-Length: 3\r\n\r\n' + picture,
                         b'no HTTP\r\n\r\n'):
                with socket.create_connection(('127.0.0.1', self.port), timeout=30) as s:
                    s.sendall(data)
                    s.shutdown(socket.SHUT_WR)
                    try:
                        while s.recv(65536): pass
                    except OSError: pass


def load(port, jobs):
    "Run jobs at the same time, each with a client of its own; the clients, and the seconds it took"
    clients = [Client(port) for _ in jobs]
    threads = [threading.Thread(target=job, args=(client,)) for job,client in zip(jobs, clients)]
    start = time.perf_counter()
    for t in threads: t.start()
    for t in threads: t.join()
    return clients,time.perf_counter()-start


def service_speed(seconds=6, size=64):
    "Images a second and waiting times of `kdmed serve`, alone and while others send what is no image"
    images = list(synthetic_table(8, classes=3, size=150, seed=0).image)
    files = [as_file(p) for p in images]
    with tempfile.TemporaryDirectory(prefix='kdmed-bench-') as folder:
        folder = Path(folder)
        temporary = folder/'temporary'
        temporary.mkdir()
        torch.manual_seed(0)
        student = set_model_stats(create_student('resnet18', 3, size).eval(), .5, .2)
        bundle = load_bundle(save_bundle(student, folder/'bundle', calibrate=False))
        expected = [bundle.predict(Image.open(io.BytesIO(f))).to_numpy()[0] for f in files]
        start = time.perf_counter()
        while time.perf_counter()-start < 2: bundle.predict(Image.open(io.BytesIO(files[0])))
        n,start = 0,time.perf_counter()
        while time.perf_counter()-start < 2:
            bundle.predict(Image.open(io.BytesIO(files[n%8])))
            n += 1
        alone = n/(time.perf_counter()-start)
        command = [sys.executable, '-W', 'ignore', '-m', 'kdmed.cli', 'serve', str(folder/'bundle'), '--port', '0']
        env = os.environ | dict(TMPDIR=str(temporary))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        try:
            port = int(process.stdout.readline().split('127.0.0.1:')[1].split(':')[0])
            def asking(client): client.good(files, expected, time.perf_counter()+seconds)
            def spoiling(client): client.bad(files[0], time.perf_counter()+seconds)
            load(port, [lambda c: c.good(files, expected, time.perf_counter()+1)])
            calm,calm_s = load(port, [asking, asking])
            storm,storm_s = load(port, [asking, asking, spoiling, spoiling])
            left = len(list(temporary.iterdir()))
            alive = process.poll() is None and Client(port).post(files[0])[0]==200
        finally:
            process.terminate()
            _,err = process.communicate(timeout=30)
    def rate(clients, took): return sum(len(c.times) for c in clients)/took
    def wait(clients, share): return 1000*float(np.quantile([t for c in clients for t in c.times], share))
    wrong = sum(c.wrong for c in [*calm, *storm]) + left + (not alive) + bool(err.strip())
    refused = sum(n for c in storm for status,n in c.statuses.items() if status!=200)
    print(f'service: {rate(calm, calm_s):.0f} images a second, p50 {wait(calm, .5):.1f} ms, '
          f'p99 {wait(calm, .99):.1f} ms; '
          f'with {refused} bad requests {rate(storm[:2], storm_s):.0f}, p50 {wait(storm[:2], .5):.1f}, '
          f'p99 {wait(storm[:2], .99):.1f}; `predict` alone {alone:.0f}')
    return [dict(name='service, images a second / those of `predict` in a loop',
                 value=round(rate(calm, calm_s)/alone, 2),
                 unit='ratio', limit=.4, least=True),
            dict(name='service, p99 of the waiting time, two clients', value=round(wait(calm, .99), 1), unit='ms',
                 limit=None),
            dict(name='service, p99 under bad requests', value=round(wait(storm[:2], .99), 1), unit='ms', limit=None),
            dict(name='service, wrong answers, crashes, files left', value=wrong, unit='', limit=0)]
