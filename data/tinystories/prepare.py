"""
TinyStories (Eldan & Li 2023): 2.1 million stories in the words of a small child, in GPT-2's byte pair
encoding.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --source=my_copy/ --limit=100000

The dataset's own validation split, 21,990 stories, becomes val.bin; so does that of a folder with files named
train... and valid... . In text files, lines of <|endoftext|> separate the stories. The full dataset needs
4 GB in the Hugging Face cache (HF_HOME moves it).
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from configurator import configure
from support.hub.names import tokenizer_path
from support.text.corpus import prepare_corpus
from support.text.documents import Corpus
from support.text.prepare import dataset_folder

source = 'roneneldan/TinyStories'  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt)
subset = ''  # a configuration of the dataset on the hub, if it has several
name = ''  # the dataset's folder in data/; empty: tinystories
text_column = 'text'
tokenizer = 'gpt2'  # gpt2, bpe (trained on the training part), a name of the hub, or a tokenizer.json's path
vocab_size = 4096  # entries of tokenizer=bpe, 257 to 65536
num_proc = 0  # threads for encoding; 0: one per core
limit = 0  # use only the first stories of each split; 0: all
val_fraction = 0.0005  # of the documents, where the source has no validation split
strict = False  # refuse rows without text, instead of leaving them out


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
corpus = Corpus(source, text_column, limit, subset, own_splits=True, regroup=stories, strict=strict)
prepare_corpus(dataset_folder(__file__, name, source), corpus, tokenizer_path(tokenizer), vocab_size,
               val_fraction, num_proc)
