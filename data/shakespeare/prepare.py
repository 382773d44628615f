"""
Tiny Shakespeare in GPT-2's byte pair encoding, for fine-tuning GPT-2.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=my_copy.txt

Writes 301,966 tokens to train.bin, 36,059 to val.bin.
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
write_text_dataset(HERE, read_text(input), 'gpt2', source=Path(input).name)
