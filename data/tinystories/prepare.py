"""
TinyStories (Eldan & Li 2023): 2.1 million stories in the words of a small child, in GPT-2's byte pair
encoding.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --source=my_copy/ --limit=100000

The data set has a validation split of its own, 21,990 stories, which becomes val.bin; so does a folder's, if
its files are named train... and valid... . In text files, lines of <|endoftext|> separate the stories. The
whole needs 4 GB in the Hugging Face cache (HF_HOME moves it).
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from configurator import configure  # noqa: E402
from corpus import prepare_corpus  # noqa: E402

source = 'roneneldan/TinyStories'  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt)
text_column = 'text'
num_proc = 0  # threads that encode; 0: one a core
limit = 0  # use the first so many stories of each split; 0: all


def stories(lines):
    story = ''
    for line in lines:
        if line.strip() == '<|endoftext|>':
            yield story.strip()
            story = ''
        else:
            story += line
    if story.strip():
        yield story.strip()


configure(globals())
prepare_corpus(HERE, source, text_column, num_proc, limit, own_splits=True, regroup=stories)
