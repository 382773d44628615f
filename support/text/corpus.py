"""
A corpus of documents into a dataset, for the `data/*/prepare.py`.

    prepare_corpus(folder, Corpus('Skylion007/openwebtext'), tokenizer='gpt2')

The documents are in a memory-mapped file of Hugging Face's `datasets`. Threads encode 2,048 at a
time (tiktoken releases the GIL) into files of their own, joined at the end. So memory use doesn't
grow with the corpus, and an interrupted run continues where it stopped.
"""

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.errors import UserError
from support.machine.files import replacing
from support.text.bpe import END, BPETokenizer, train_bpe
from support.text.documents import SPLIT_NAMES, has_own_splits, load_documents, report_files_of
from support.text.prepare import (SAMPLE, check_fraction, how_many_to_train_on,
                                  resolve_tokenizer)
from support.text.stream import Encoded, dtype_for, encode_document, n_cores
from support.text.writing import write_dataset, write_tokens

PART = 2048  # documents
AT_A_TIME = 256  # documents that are held as strings by each thread


def prepare_corpus(folder, corpus, tokenizer='gpt2', vocab_size=4096, val_fraction=0.0005,
                   num_proc=0):
    """Encode every document of a `Corpus`, each followed by <|endoftext|>, into
    folder/{train,val}.bin.

    tokenizer: 'gpt2', 'bpe' (trained on the training part, of vocab_size entries), or a path, see
    `resolve_tokenizer`. val_fraction: of the shuffled documents, where the corpus has no validation
    split. num_proc: threads, 0 for all cores.
    """
    check_fraction(val_fraction)
    corpus = replace(corpus, source=os.path.expanduser(corpus.source))
    coder = resolve_tokenizer(tokenizer, vocab_size, ('gpt2', 'bpe'))
    if coder and coder.end is None:
        raise UserError(f'tokenizer={tokenizer} has no special token {END} to end documents with')
    splits = load_splits(corpus, val_fraction)
    # parts of another text, or of another size, go to another folder
    key = json.dumps([[split._fingerprint for split in splits.values()], corpus.text_column, PART,
                      coder.to_dict() if coder else [vocab_size, SAMPLE]])
    parts = Path(folder, f'parts-{hashlib.sha256(key.encode()).hexdigest()[:16]}')
    coder = coder or trained_tokenizer(parts, splits['train'], corpus.text_column, vocab_size)

    def encode(name, part):
        texts = splits[part].select_columns([corpus.text_column])
        return encode_documents(texts, coder, parts, name, num_proc or n_cores())

    chunks = {'train': encode('train', 'train'), 'val': encode('val', 'test')}
    write_dataset(folder, chunks, coder, corpus.source)
    shutil.rmtree(parts)


def load_splits(corpus, val_fraction, seed=2357):
    """{'train': documents, 'test': documents}: the corpus's own, or all shuffled and
    val_fraction of them in the second."""
    if corpus.own_splits and has_own_splits(corpus.source):
        report_files_of(corpus.source, SPLIT_NAMES)
        return {'train': load_documents(corpus, 'train'),
                'test': load_documents(corpus, 'validation')}
    report_files_of(corpus.source, [None])
    documents = load_documents(corpus)
    if len(documents) < 2:
        raise UserError(f'{corpus.source} has {len(documents)} documents, too few to split; for '
                        'one long text use data/text/prepare.py --tokenizer=gpt2')
    return documents.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)


def trained_tokenizer(parts, documents, text_column, vocab_size):
    """A BPETokenizer of documents spread over all of them; that of parts/tokenizer.json if an
    interrupted run left it."""
    path, n = parts / 'tokenizer.json', len(documents)
    if not path.is_file():
        some = spread_documents(documents, min(n, PART))
        count = how_many_to_train_on(texts_of(some, text_column), n)
        print(f'the tokenizer is trained on {count:,} of {n:,} documents')
        trained = train_bpe(texts_of(spread_documents(documents, count), text_column), vocab_size)
        with replacing(path) as temporary:
            temporary.write_bytes(trained.json.encode())
    return BPETokenizer(path.read_text(encoding='utf-8'))


def spread_documents(documents, count):
    return documents.select(np.linspace(0, len(documents) - 1, count, dtype=np.int64))


def texts_of(documents, text_column):
    return (text for batch in documents.iter(AT_A_TIME) for text in batch[text_column])


def encode_documents(documents, coder, folder, name, n_threads):
    """Yield the tokens of all documents, `Encoded`, from files of PART documents, which are
    written unless an earlier run left them. documents: with one column. The size of its text is
    in a file's name."""
    n, dtype, end = len(documents), dtype_for(coder), np.array([coder.end], np.uint32)

    def encode(first):
        ids, sizes = [], []
        for at in range(first, min(first + PART, n), AT_A_TIME):
            texts, = documents[at:min(at + AT_A_TIME, first + PART)].values()
            ids += [part for text in texts for part in (encode_document(coder, text), end)]
            sizes += [(len(text), len(text.encode())) for text in texts]
        n_characters, n_bytes = map(sum, zip(*sizes))
        path = Path(folder, f'{name}-{first:09}-{n_characters}-{n_bytes}.bin')
        return first, path, len(sizes), write_tokens(path, ids, dtype).n_tokens

    paths = {int(path.name.split('-')[1]): path for path in Path(folder).glob(f'{name}-*-*-*.bin')}
    missing = [first for first in range(0, n, PART) if first not in paths]
    finished = n - sum(min(PART, n - first) for first in missing)
    n_tokens, begin = 0, time.perf_counter()
    with ThreadPoolExecutor(n_threads) as pool, \
            tqdm(total=n, initial=finished, unit=' documents', desc=name) as bar:
        try:
            for done in as_completed([pool.submit(encode, first) for first in missing]):
                first, paths[first], more_documents, more_tokens = done.result()
                n_tokens += more_tokens
                bar.set_postfix_str(f'{n_tokens / (time.perf_counter() - begin):,.0f} tokens/s')
                bar.update(more_documents)
        finally:
            pool.shutdown(cancel_futures=True)  # so an error or Ctrl-C doesn't wait for the rest
    for _, path in sorted(paths.items()):
        n_characters, n_bytes = map(int, path.stem.split('-')[2:])
        yield Encoded(np.memmap(path, dtype, 'r'), n_characters, n_bytes)
