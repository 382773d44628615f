"""
Documents into token files: what the datasets of many documents share.

    prepare_corpus(folder, source='Skylion007/openwebtext', text_column='text', num_proc=8)

Hugging Face's `datasets` keeps the documents in a memory-mapped file, and at most a few chunks of them
are in flight between reading, encoding and writing, so memory stays bounded whatever the corpus's size.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import GPT2Tokenizer, go_offline_if_cut_off, write_dataset

FORMATS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text'}
CHUNK = 256  # documents a thread encodes at once


def prepare_corpus(folder, source, text_column='text', num_proc=0, limit=0, val_fraction=0.0005, seed=2357):
    """Encode every document of `source` as GPT-2 BPE, each followed by 50256, into folder/{train,val}.bin.

    source: a Hugging Face dataset id, or a local parquet, jsonl or text file or a folder of them; a text
    file is one document. num_proc: threads, 0 for all cores (tiktoken works outside the GIL). limit: use
    the first so many documents. The documents are shuffled before a share of them goes to validation.
    """
    tokenizer = GPT2Tokenizer()
    tokenizer.bpe  # a missing BPE file is told before the long download  # noqa: B018
    documents = load_documents(source, text_column, limit)
    splits = documents.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
    n_threads = num_proc or os.cpu_count()
    chunks = {name: encode_documents(splits[part][text_column], len(splits[part]), tokenizer, name, n_threads)
              for name, part in (('train', 'train'), ('val', 'test'))}
    write_dataset(folder, chunks, tokenizer, source)


def load_documents(source, text_column, limit):
    """The documents as a datasets.Dataset; one line says what is wrong with the source."""
    go_offline_if_cut_off()
    import datasets
    path = Path(source)
    files = sorted(p for p in path.rglob('*') if p.suffix in FORMATS) if path.is_dir() else [path]
    if path.exists() and not (files and files[0].suffix in FORMATS):
        raise ValueError(f'{source} has no {", ".join(FORMATS)} files')
    try:
        if path.exists():
            one_file_one_document = {'sample_by': 'document'} if files[0].suffix == '.txt' else {}
            documents = datasets.load_dataset(FORMATS[files[0].suffix], data_files=[str(f) for f in files],
                                              split='train', **one_file_one_document)
        else:
            documents = datasets.load_dataset(source, split='train')
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f'can\'t load {source}: {reason[:300]}. A local parquet, jsonl or text file, or a '
                         'folder of them, will do as well: --source=PATH') from None
    if text_column not in documents.column_names:
        raise ValueError(f'{source} has no column {text_column}, only {", ".join(documents.column_names)}: '
                         'name one with --text_column')
    documents = documents.select(range(min(limit or len(documents), len(documents))))
    if len(documents) < 2:
        raise ValueError(f'{source} has {len(documents)} documents, too few to split; for one long text take '
                         'data/text/prepare.py --tokenizer=gpt2')
    return documents


def encode_documents(texts, n, tokenizer, name, n_threads):
    """Yield arrays of uint16 ids for chunks of the `n` texts, in order, with a progress bar."""
    def encode(chunk):
        end = np.array([tokenizer.bpe.eot_token], dtype=np.uint32)
        return np.concatenate([part for text in chunk for part in (tokenizer.encode_array(text), end)])

    with ThreadPoolExecutor(n_threads) as pool, tqdm(total=n, unit=' documents', desc=name) as bar:
        pending = deque()
        for first in range(0, n, CHUNK):
            pending.append(pool.submit(encode, texts[first:first + CHUNK]))
            if len(pending) > 2 * n_threads:
                yield pending.popleft().result()
                bar.update(CHUNK)
        for future in pending:
            yield future.result()
            bar.update(min(CHUNK, n - bar.n))
