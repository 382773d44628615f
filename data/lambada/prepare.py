"""
LAMBADA (Paperno et al. 2016): passages whose last word takes the whole passage to guess, in GPT-2's byte pair
encoding.

    python data/lambada/prepare.py
    python data/lambada/prepare.py --source=my_copy/        # files named train... and validation... or dev...

Of the copies on the hub this is the one with text to train on, 2,662 novels (203 million words), and with a
validation split, 4,869 passages; EleutherAI/lambada_openai has the 5,153 passages of the test only. Those are
the benchmark, accuracy in the last word, which no one should train on, so they are in neither file. The text
is in lower case, its punctuation set apart by spaces. A text file of a local source is one document.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from configurator import configure  # noqa: E402
from corpus import prepare_corpus  # noqa: E402

source = 'cimec/lambada'  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt)
text_column = 'text'
num_proc = 0  # threads that encode; 0: one a core
limit = 0  # use the first so many novels, and passages; 0: all

configure(globals())
prepare_corpus(HERE, source, text_column, num_proc, limit, own_splits=True)
