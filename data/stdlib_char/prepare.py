"""
The source of Python's standard library, a token for each character: real text that every machine with Python
has, so nothing is downloaded.

    python data/stdlib_char/prepare.py

Joins the modules of the Python that runs it, in sorted order, without tests and tables; the last tenth is for
validation. Another Python version gives another text.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

import sysconfig
from pathlib import Path

from configurator import configure
from support.text.prepare import write_text_dataset

# tests, third-party packages, generated tables, and copies of text that is elsewhere in the library
SKIPPED = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '_bundled', 'encodings',
           'pydoc_data'}

configure(globals())

stdlib = Path(sysconfig.get_paths()['stdlib'])
paths = sorted(p for p in stdlib.rglob('*.py') if not SKIPPED & set(p.relative_to(stdlib).parts))
sources = [p.read_bytes() for p in paths]
text = ''.join(s.decode('ascii') for s in sources if s.isascii()).replace('\r\n', '\n')
write_text_dataset(Path(__file__).parent, text, 'char',
                   source=f'standard library of Python {sys.version.split()[0]}')
