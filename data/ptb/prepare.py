"""
The Penn Treebank for language modelling (Marcus et al. 1993, Mikolov et al. 2010): a million words of the
Wall Street Journal in lower case, rare words as <unk>, numbers as N, in GPT-2's byte pair encoding.

    python data/ptb/prepare.py
    python data/ptb/prepare.py --source=simple-examples/data/          # ptb.train.txt and ptb.valid.txt

The sentences are in the newspaper's order, so a split is one text, with a sentence on each line and 50256 at
the end. The validation split becomes val.bin; the test split is left for testing. A local source is a folder
with files named train... and valid... .
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from configurator import configure
from support.hub.names import tokenizer_path
from support.text.corpus import prepare_corpus
from support.text.documents import Corpus
from support.text.prepare import dataset_folder

source = 'ptb-text-only/ptb_text_only'  # a Hugging Face dataset, or a local folder (parquet, jsonl, txt)
subset = ''  # a configuration of the dataset on the hub, if it has several
revision = 'refs/convert/parquet'  # on the hub, as `datasets` no longer runs scripts; empty: main
name = ''  # the dataset's folder in data/; empty: ptb
text_column = 'sentence'
tokenizer = 'gpt2'  # gpt2, bpe (trained on the training part), a name of the hub, or a tokenizer.json's path
vocab_size = 4096  # entries of tokenizer=bpe, 257 to 65536
num_proc = 0  # threads for encoding; 0: one per core


def whole(sentences):
    yield ''.join(sentence.strip() + '\n' for sentence in sentences)


configure(globals())
corpus = Corpus(source, text_column, subset=subset, revision=revision, own_splits=True, regroup=whole,
                rows_are_lines=True)
prepare_corpus(dataset_folder(__file__, name, source), corpus, tokenizer_path(tokenizer), vocab_size,
               num_proc=num_proc)
