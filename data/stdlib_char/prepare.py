"""
The source of Python's standard library, a token for each character: real text that every machine with
Python has, so nothing is downloaded.

    python data/stdlib_char/prepare.py

Takes the modules of the interpreter that runs it, in sorted order, without tests and tables; the last
tenth is for validation. Another Python version gives another text.
"""

import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure  # noqa: E402
from dataset import write_text_dataset  # noqa: E402

# tests, other people's packages, generated tables, and copies of what the text says elsewhere
SKIPPED = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '_bundled', 'encodings',
           'pydoc_data'}

configure(globals())

stdlib = Path(sysconfig.get_paths()['stdlib'])
paths = sorted(p for p in stdlib.rglob('*.py') if not SKIPPED & set(p.relative_to(stdlib).parts))
sources = [p.read_bytes() for p in paths]
text = ''.join(s.decode('ascii') for s in sources if s.isascii()).replace('\r\n', '\n')
write_text_dataset(HERE, text, 'char', source=f'standard library of Python {sys.version.split()[0]}')
