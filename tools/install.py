"""Make .venv and install kdmed into it for development, unless that has been done.

Standard library only, and nothing an old Python cannot parse: it must run to say that Python is too old.
"""
import hashlib, json, os, re, shutil, ssl, subprocess, sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, '.venv')
VENV_PYTHON = os.path.join(VENV, 'bin', 'python')
STAMP = os.path.join(VENV, 'kdmed-installed.json')

def read(name):
    with open(os.path.join(ROOT, name), 'rb') as f: return f.read()

def check_python():
    "Exit with a sentence when this Python is older than settings.ini asks for"
    least = tuple(int(n) for n in re.search(r'(?m)^min_python\s*=\s*(\d+)\.(\d+)', read('settings.ini').decode('utf-8')).groups())
    if sys.version_info[:2] >= least: return
    sys.exit('kdmed needs Python %d.%d or newer, but %s is Python %d.%d. Name a newer one, for example: PYTHON=python3.12 make test'
             % (least + (sys.executable,) + tuple(sys.version_info[:2])))

def wanted():
    "What the stamp of an up-to-date .venv says; a .venv copied from elsewhere has another root, and runs that place's code"
    files = hashlib.sha256(b'\0'.join(read(name) for name in ('settings.ini', 'pyproject.toml', 'setup.py')))
    return {'root': ROOT, 'python': '%d.%d' % sys.version_info[:2], 'files': files.hexdigest()}

def stamp():
    "What was installed, or nothing when that was interrupted or never done"
    try:
        with open(STAMP) as f: return json.load(f) if os.path.exists(VENV_PYTHON) else {}
    except (IOError, ValueError): return {}

def run(command, sentence, env=None):
    if subprocess.call(command, cwd=ROOT, env=env) != 0: sys.exit('kdmed: ' + sentence)

def make_venv():
    "An empty .venv, of the interpreter behind this one when this one is itself of a virtual environment"
    python = sys.executable if sys.prefix == sys.base_prefix else sys._base_executable
    if os.path.islink(VENV): os.remove(VENV)
    shutil.rmtree(VENV, ignore_errors=True)
    run([python, '-m', 'venv', VENV],
        'cannot make .venv: %s needs the venv module (on Debian and Ubuntu: apt-get install python3-venv)' % python)

def has_certificates():
    "Whether the machine brings certificate authorities, perhaps one of its own; else uv uses those it carries"
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or paths.capath and os.listdir(paths.capath))

def installer_env():
    "The environment for pip and uv: only the machine's index, so that torch and torchvision come from one place and fit together"
    env = {k: v for k,v in os.environ.items() if k not in ('PIP_FIND_LINKS', 'UV_FIND_LINKS', 'PIP_TARGET', 'PIP_PREFIX', 'PIP_USER')}
    env.setdefault('UV_HTTP_TIMEOUT', '300')
    if has_certificates(): env.setdefault('UV_SYSTEM_CERTS', '1')
    return env

def install():
    "uv, then kdmed in place with its dev extra"
    env = installer_env()
    again = 'installation failed (see above); the same command starts it again'
    run([VENV_PYTHON, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', 'uv'], again, env)
    run([VENV_PYTHON, '-m', 'uv', 'pip', 'install', '--python', VENV_PYTHON, '-e', '.[dev]'], again, env)

def main():
    check_python()
    new,old = wanted(),stamp()
    if new == old: return
    print('Installing kdmed into .venv (about 6 GB with PyTorch; the first time takes minutes)')
    sys.stdout.flush()
    if old: os.remove(STAMP)
    if (old.get('root'), old.get('python')) != (new['root'], new['python']): make_venv()
    install()
    with open(STAMP + '.new', 'w') as f: json.dump(new, f)
    os.replace(STAMP + '.new', STAMP)

if __name__ == '__main__': main()
