"""
OpenWebText (Gokaslan & Cohen 2019), or any corpus of documents, in GPT-2's byte pair encoding or its own.

    python data/openwebtext/prepare.py                                  # 9,035,582,198 + 4,434,897 tokens
    python data/openwebtext/prepare.py --source=stas/openwebtext-10k    # a sample of ten thousand documents
    python data/openwebtext/prepare.py --source=my_corpus/ --text_column=content --name=mine --tokenizer=bpe

OpenWebText needs the network, 55 GB for the documents in the Hugging Face cache (HF_HOME moves it), and 36 GB
here, half of which is freed at the end. An interrupted run continues where it stopped. Another source gets
another folder, data/openwebtext-10k or data/mine.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from configurator import configure
from support.hub.names import tokenizer_path
from support.text.corpus import prepare_corpus
from support.text.documents import Corpus
from support.text.prepare import dataset_folder, name_after

OPENWEBTEXT = 'Skylion007/openwebtext'
source = OPENWEBTEXT  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt)
subset = ''  # a configuration of the dataset on the hub, if it has several
name = ''  # the dataset's folder in data/; empty: openwebtext, or one named after another source
text_column = 'text'
tokenizer = 'gpt2'  # gpt2, bpe (trained on the training part), a name of the hub, or a tokenizer.json's path
vocab_size = 4096  # entries of tokenizer=bpe, 257 to 65536
num_proc = 0  # threads for encoding; 0: one per core
limit = 0  # use only the first documents; 0: all
val_fraction = 0.0005  # of the shuffled documents
strict = False  # refuse rows without text, instead of leaving them out

configure(globals())
if not name and source != OPENWEBTEXT:
    name = name_after(source)
corpus = Corpus(source, text_column, limit, subset, strict=strict)
prepare_corpus(dataset_folder(__file__, name, source), corpus, tokenizer_path(tokenizer), vocab_size,
               val_fraction, num_proc)
