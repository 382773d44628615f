"""
LAMBADA (Paperno et al. 2016): passages whose last word can be guessed only from the whole passage, in GPT-2's
byte pair encoding.

    python data/lambada/prepare.py
    python data/lambada/prepare.py --source=my_copy/        # files named train... and validation... or dev...

This copy on the hub has text to train on, 2,662 novels (203 million words), and a validation split of 4,869
passages. The 5,153 test passages are the benchmark, accuracy in the last word, so they are in neither file;
EleutherAI/lambada_openai has only these. The text is in lower case, with spaces around its punctuation. A
text file of a local source is one document.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from configurator import configure
from support.hub.names import tokenizer_path
from support.text.corpus import prepare_corpus
from support.text.documents import Corpus
from support.text.prepare import dataset_folder

source = 'cimec/lambada'  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt)
subset = ''  # a configuration of the dataset on the hub, if it has several
name = ''  # the dataset's folder in data/; empty: lambada
text_column = 'text'
tokenizer = 'gpt2'  # gpt2, bpe (trained on the training part), a name of the hub, or a tokenizer.json's path
vocab_size = 4096  # entries of tokenizer=bpe, 257 to 65536
num_proc = 0  # threads for encoding; 0: one per core
limit = 0  # use only the first novels and passages; 0: all
val_fraction = 0.0005  # of the documents, where the source has no validation split
strict = False  # refuse rows without text, instead of leaving them out

configure(globals())
corpus = Corpus(source, text_column, limit, subset, own_splits=True, strict=strict)
prepare_corpus(dataset_folder(__file__, name, source), corpus, tokenizer_path(tokenizer), vocab_size,
               val_fraction, num_proc)
