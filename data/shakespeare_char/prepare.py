"""
Tiny Shakespeare, a token for each character.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=my_copy.txt

Writes 1,003,854 tokens to train.bin and 111,540 to val.bin, with a vocabulary of 65.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from pathlib import Path

from configurator import configure
from support.machine.files import read_text
from support.text.prepare import write_text_dataset
from support.text.reading import tiny_shakespeare

input = ''  # a text file; empty: input.txt beside this script, downloaded unless it exists

configure(globals())
folder = Path(__file__).parent
path = Path(input or tiny_shakespeare(folder))
write_text_dataset(folder, read_text(path), 'char', source=path.name)
