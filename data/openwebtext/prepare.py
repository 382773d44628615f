"""
OpenWebText (Gokaslan & Cohen 2019), or any corpus of documents, in GPT-2's byte pair encoding.

    python data/openwebtext/prepare.py                                  # 9,035,582,198 + 4,434,897 tokens
    python data/openwebtext/prepare.py --source=stas/openwebtext-10k    # a sample of ten thousand documents
    python data/openwebtext/prepare.py --source=my_corpus/ --text_column=content --limit=100000

OpenWebText needs the network, 55 GB for the documents in the Hugging Face cache (HF_HOME moves it), and 36 GB
here, half of which is freed at the end. An interrupted run continues where it stopped.
"""

import sys
sys.path.insert(0, __file__.removesuffix('prepare.py') + '../..')

from pathlib import Path

from configurator import configure
from support.text.prepare import prepare_corpus

source = 'Skylion007/openwebtext'  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt)
subset = ''  # a configuration of the dataset on the hub, if it has several
text_column = 'text'
num_proc = 0  # threads for encoding; 0: one per core
limit = 0  # use only the first documents; 0: all

configure(globals())
prepare_corpus(Path(__file__).parent, source, text_column, num_proc, limit, subset=subset)
