"Package metadata from settings.ini: edit that file, not this one. Name, description, Python and URLs are in pyproject.toml"
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']

LICENSES = {'apache2': 'Apache-2.0'} # SPDX
STATUS = {'1': '1 - Planning', '2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}

def version():
    "The version, from the one place it is written in; importing kdmed here would need torch"
    init = (root/'kdmed'/'__init__.py').read_text(encoding='utf-8')
    return re.search(r'^__version__\s*=\s*[\'"]([^\'"]+)', init, re.M)[1]

def readme():
    "README.md with its images addressed absolutely, since a package index does not have the files beside it"
    path = root/'README.md'
    if not path.exists(): return ''
    raw = f"{settings['git_url'].replace('github.com', 'raw.githubusercontent.com')}/{settings['branch']}/"
    return re.sub(r'(!\[[^]]*\]\()(?!\w+:)', rf'\g<1>{raw}', path.read_text(encoding='utf-8'))

extra = '_requirements'
setup(
    version=version(),
    long_description=readme(),
    long_description_content_type='text/markdown',
    license_expression=LICENSES[settings['license']],
    license_files=['LICENSE'],
    author=settings['author'],
    keywords=settings['keywords'].split(),
    classifiers=[
        f"Development Status :: {STATUS[settings['status']]}",
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: {v}' for v in settings['python_versions'].split()),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Medical Science Apps.',
    ],
    packages=find_packages(include=['kdmed', 'kdmed.*']),
    install_requires=settings['requirements'].split(),
    extras_require={k[:-len(extra)]: v.split() for k,v in settings.items() if k.endswith(extra)},
    entry_points={
        'console_scripts': settings['console_scripts'].split(),
        'nbdev': ['kdmed=kdmed._modidx:d'],
    },
    zip_safe=False,
)
