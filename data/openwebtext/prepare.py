"""
OpenWebText (Gokaslan & Cohen 2019), or any corpus of documents, in GPT-2's byte pair encoding.

    python data/openwebtext/prepare.py                                  # 9,035,582,198 + 4,434,897 tokens
    python data/openwebtext/prepare.py --source=stas/openwebtext-10k    # ten thousand documents, for a try
    python data/openwebtext/prepare.py --source=my_corpus/ --text_column=content --limit=100000

The whole needs the network, room for the documents in the Hugging Face cache (55 GB; HF_HOME moves it), and
36 GB here, half of it until the end. A run that was stopped goes on where it was.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from configurator import configure  # noqa: E402
from corpus import prepare_corpus  # noqa: E402

source = 'Skylion007/openwebtext'  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt)
text_column = 'text'
num_proc = 0  # threads that encode; 0: one a core
limit = 0  # use the first so many documents; 0: all

configure(globals())
prepare_corpus(HERE, source, text_column, num_proc, limit)
