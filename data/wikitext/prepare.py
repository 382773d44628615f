"""
WikiText-103 (Merity et al. 2016): good Wikipedia articles, in GPT-2's byte pair encoding.

    python data/wikitext/prepare.py
    python data/wikitext/prepare.py --subset=wikitext-2-raw-v1          # the small one
    python data/wikitext/prepare.py --source=wikitext-103-raw/          # wiki.train.raw and wiki.valid.raw

The hub's rows are the lines of the original files. This script joins the lines of an article, so that 50256
ends articles, not paragraphs; all other tokens are those of the raw files. The validation split becomes
val.bin; the test split is left for testing.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

import re
from configurator import configure
from support.hub.names import tokenizer_path
from support.text.corpus import prepare_corpus
from support.text.documents import Corpus
from support.text.prepare import dataset_folder

source = 'Salesforce/wikitext'  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt, raw)
subset = 'wikitext-103-raw-v1'  # on the hub; raw means: without <unk> for rare words
name = ''  # the dataset's folder in data/; empty: wikitext
text_column = 'text'
tokenizer = 'gpt2'  # gpt2, bpe (trained on the training part), a name of the hub, or a tokenizer.json's path
vocab_size = 4096  # entries of tokenizer=bpe, 257 to 65536
num_proc = 0  # threads for encoding; 0: one per core
limit = 0  # use only the first articles of each split; 0: all
val_fraction = 0.0005  # of the documents, where the source has no validation split


def articles(lines):
    """A title after a blank line, ` = Title = `, begins an article; ` = = Section = = ` doesn't."""
    article, after_blank = [], True
    for line in lines:
        is_title = re.fullmatch(r' = (?!= ).*(?<! =) = \n?', line)
        if is_title and after_blank and any(not part.isspace() for part in article):
            yield ''.join(article)
            article = []
        after_blank = not line.strip()
        article.append(' \n' if after_blank else line)  # blank lines are empty on the hub, but not in files
    yield ''.join(article)


configure(globals())
corpus = Corpus(source, text_column, limit, subset, own_splits=True, regroup=articles,
                rows_are_lines=True)
prepare_corpus(dataset_folder(__file__, name, source), corpus, tokenizer_path(tokenizer), vocab_size,
               val_fraction, num_proc)
