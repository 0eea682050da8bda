"""Build the wheel and use it as a stranger does: alone, in fresh environments, outside the checkout.

    try_wheel.py                     a plain installation, with the newest releases and with the lowest that settings.ini allows
    try_wheel.py all                 the same, and each extra with its own feature
    try_wheel.py filters dicom       these extras alone
    try_wheel.py --versions lowest --python python3.10

Environments are made one after the other, and removed: each takes 6 GB where uv cannot link to its cache, almost nothing where it can.
"""
import argparse, subprocess, sys, tempfile, time, zipfile
from configparser import ConfigParser
from pathlib import Path

from install import installer_env

ROOT = Path(__file__).resolve().parent.parent
USES = ROOT/'tools'/'wheel_uses.py'
VERSIONS = 'newest','lowest'
DEVELOPMENT = 'dev', # extras of the checkout, not of those who use kdmed

def settings():
    "The section of settings.ini"
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def extras(settings):
    "{extra: its requirements}, less those for development"
    end = '_requirements'
    return {k[:-len(end)]: v.split() for k,v in settings.items() if k.endswith(end) and k[:-len(end)] not in DEVELOPMENT}

def uv(*args):
    "Run this environment's uv; exit with what it says where it fails"
    command = [sys.executable, '-m', 'uv', *map(str, args)]
    done = subprocess.run(command, env=installer_env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode: sys.exit(f"{done.stdout}\n{' '.join(command[2:])} failed")
    return done.stdout

def build_wheel(folder):
    "Path of a wheel, built from the source distribution as pip does where a release has no wheel"
    uv('build', '--quiet', '--out-dir', folder, ROOT)
    wheel, = Path(folder).glob('*.whl')
    return wheel

def missing_modules(wheel):
    "Modules of the checkout that the wheel lacks"
    with zipfile.ZipFile(wheel) as archive: there = set(archive.namelist())
    return sorted({p.relative_to(ROOT).as_posix() for p in (ROOT/'kdmed').rglob('*.py')} - there)

def requirements(wheel, extra, versions, config):
    "What uv is asked to install. The lowest versions of direct requirements are chosen only of those that are named"
    name = f"kdmed{'' if extra=='plain' else f'[{extra}]'} @ {wheel.as_uri()}"
    if versions=='newest': return [name]
    return ['--resolution', 'lowest-direct', name, *config['requirements'].split(), *extras(config).get(extra, [])]

def use(python, name, folder):
    "Run one of the uses in an environment; what it reports"
    done = subprocess.run([python, '-I', '-W', 'ignore', USES, name], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode: sys.exit(f'{done.stdout}\n{name} failed in {python}')
    return done.stdout.strip().splitlines()[-1]

def trial(wheel, extra, versions, base, config):
    "Install the wheel with an extra (or `plain`) into a fresh environment of the interpreter `base` and use it there; a line of what was done"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='kdmed-wheel-') as folder:
        folder = Path(folder).resolve()
        python = folder/'env'/'bin'/'python'
        uv('venv', '--quiet', '--no-project', '--python', base, folder/'env')
        uv('pip', 'install', '--quiet', '--python', python, *requirements(wheel, extra, versions, config))
        installed = time.monotonic()
        (folder/'elsewhere').mkdir()
        reports = [use(python, name, folder/'elsewhere') for name in dict.fromkeys(['plain', extra])]
    seconds = f'{installed-started:.0f} s to install, {time.monotonic()-installed:.0f} s to use'
    return f"{extra}, {versions}: {'; '.join(reports)} ({seconds})"

def chosen(names, known):
    "Extras in the order given; `plain` where none is"
    wrong = [n for n in names if n not in ('plain', 'all', *known)]
    if wrong: sys.exit(f"unknown extras {wrong}: expected plain, all or some of {', '.join(known)}")
    if 'all' in names: return ['plain', *known]
    return list(dict.fromkeys(names)) or ['plain']

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('extras', nargs='*', help='plain, all, or names of extras (default: plain)')
    parser.add_argument('--versions', nargs='+', choices=VERSIONS, default=VERSIONS, help='of the requirements (default: both)')
    parser.add_argument('--python', default=sys.executable, help='of the environments; the oldest that kdmed supports has the lowest versions (default: this one)')
    args = parser.parse_args()
    config = settings()
    names = chosen(args.extras, list(extras(config)))
    with tempfile.TemporaryDirectory(prefix='kdmed-wheel-') as folder:
        wheel = build_wheel(folder)
        missing = missing_modules(wheel)
        if missing: sys.exit(f'{wheel.name} lacks {missing}')
        print(f'{wheel.name} holds every module', flush=True)
        for extra in names:
            for versions in args.versions: print(trial(wheel, extra, versions, args.python, config), flush=True)

if __name__ == '__main__': main()
