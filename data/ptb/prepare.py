"""
Penn Treebank as language models know it (Marcus et al. 1993, Mikolov et al. 2010): a million words of the
Wall Street Journal in lower case, rare ones <unk>, numbers N, in GPT-2's byte pair encoding.

    python data/ptb/prepare.py
    python data/ptb/prepare.py --source=simple-examples/data/          # ptb.train.txt and ptb.valid.txt

The sentences follow one another in the newspaper, so a split is one text, a sentence a line, and 50256 ends
it. The data set's validation split becomes val.bin; its test split is left for you to test with. A local
source is a folder with files named train... and valid... .
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from configurator import configure  # noqa: E402
from corpus import prepare_corpus  # noqa: E402

source = 'ptb-text-only/ptb_text_only'  # a Hugging Face dataset, or a local folder (parquet, jsonl, txt)
revision = 'refs/convert/parquet'  # of a source on the hub, as `datasets` runs no scripts; empty: main
text_column = 'sentence'
num_proc = 0  # threads that encode; 0: one a core


def whole(sentences):
    yield ''.join(sentence.strip() + '\n' for sentence in sentences)


configure(globals())
prepare_corpus(HERE, source, text_column, num_proc, own_splits=True, regroup=whole, rows_are_lines=True,
               revision=revision or None)
