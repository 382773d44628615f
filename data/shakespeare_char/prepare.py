"""
Tiny Shakespeare, a token for each character.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=my_copy.txt

Writes 1,003,854 tokens to train.bin, 111,540 to val.bin, a vocabulary of 65.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure  # noqa: E402
from dataset import TINY_SHAKESPEARE, download, read_text, write_text_dataset  # noqa: E402

input = ''  # a text file to use; empty: input.txt beside this script, downloaded if it isn't there

configure(globals())

if not input:
    input = HERE / 'input.txt'
    download(*TINY_SHAKESPEARE, input)
write_text_dataset(HERE, read_text(input), 'char', source=Path(input).name)
