"""
WikiText-103 (Merity et al. 2016): good Wikipedia articles, in GPT-2's byte pair encoding.

    python data/wikitext/prepare.py
    python data/wikitext/prepare.py --subset=wikitext-2-raw-v1          # the small one
    python data/wikitext/prepare.py --source=wikitext-103-raw/          # wiki.train.raw and wiki.valid.raw

The hub's rows are the lines of the original files. Here the lines of an article are one document again, so
that 50256 ends articles, not paragraphs; but for it the tokens are the text of the raw files. The data set's
validation split becomes val.bin; its test split is left for you to test with.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from configurator import configure  # noqa: E402
from corpus import prepare_corpus  # noqa: E402

source = 'Salesforce/wikitext'  # a Hugging Face dataset, or a local file or folder (parquet, jsonl, txt, raw)
subset = 'wikitext-103-raw-v1'  # of a source on the hub; raw means: without <unk> for rare words
text_column = 'text'
num_proc = 0  # threads that encode; 0: one a core
limit = 0  # use the first so many articles of each split; 0: all


def articles(lines):
    """A new article begins at a title, ` = Title = `, after a blank line; ` = = Section = = ` is none."""
    article, after_blank = [], True
    for line in lines:
        is_title = re.fullmatch(r' = (?!= ).*(?<! =) = \n?', line)
        if is_title and after_blank and any(not part.isspace() for part in article):
            yield ''.join(article)
            article = []
        after_blank = not line.strip()
        article.append(' \n' if after_blank else line)  # the hub's blank lines are empty, the files' are not
    yield ''.join(article)


configure(globals())
prepare_corpus(HERE, source, text_column, num_proc, limit, own_splits=True, regroup=articles,
               rows_are_lines=True, name=subset or None)
