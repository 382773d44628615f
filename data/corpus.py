"""
Documents into token files: what the datasets of many documents share.

    prepare_corpus(folder, source='Skylion007/openwebtext', text_column='text', num_proc=8)

Hugging Face's `datasets` keeps the documents in a memory-mapped file. Threads encode a part of some thousand
documents each (tiktoken works outside the GIL) and write it to a file of its own; at the end the parts are
joined. So memory stays bounded whatever the corpus's size, and a run that was stopped goes on where it was.
"""

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import GPT2Tokenizer, go_offline_if_cut_off, write_dataset, write_tokens

FORMATS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text'}
PART = 2048  # documents


def prepare_corpus(folder, source, text_column='text', num_proc=0, limit=0, val_fraction=0.0005, seed=2357):
    """Encode every document of `source` as GPT-2 BPE, each followed by 50256, into folder/{train,val}.bin.

    source: a Hugging Face dataset id, or a local parquet, jsonl or text file or a folder of them; a text
    file is one document. num_proc: threads, 0 for all cores. limit: use the first so many documents. The
    documents are shuffled before a share of them goes to validation.
    """
    tokenizer = GPT2Tokenizer()
    tokenizer.bpe  # noqa: B018  a missing BPE file is told before the long download
    documents = load_documents(source, text_column, limit)
    splits = documents.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
    # parts of another text or size don't fit
    key = json.dumps([documents._fingerprint, text_column, val_fraction, seed, PART])
    parts = Path(folder, f'parts-{hashlib.sha256(key.encode()).hexdigest()[:16]}')

    def encode(name, part):
        threads = num_proc or os.cpu_count()
        paths = encode_documents(splits[part], text_column, tokenizer, parts, name, threads)
        return (np.memmap(path, np.uint16, 'r') for path in paths)

    chunks = {'train': encode('train', 'train'), 'val': encode('val', 'test')}
    write_dataset(folder, chunks, tokenizer, source)
    shutil.rmtree(parts)


def load_documents(source, text_column, limit):
    """The documents as a datasets.Dataset; one line says what is wrong with the source."""
    go_offline_if_cut_off()
    import datasets
    path = Path(source)
    files = sorted(p for p in path.rglob('*') if p.suffix in FORMATS) if path.is_dir() else [path]
    kinds = sorted({p.suffix for p in files})
    if len(kinds) > 1:
        raise ValueError(f'{source} mixes {", ".join(kinds)} files: name a folder with one kind, or a file')
    if path.exists() and not (files and files[0].suffix in FORMATS):
        raise ValueError(f'{source} has no {", ".join(FORMATS)} files')
    try:
        if path.exists():
            one_file_one_document = {'sample_by': 'document'} if files[0].suffix == '.txt' else {}
            documents = datasets.load_dataset(FORMATS[files[0].suffix], data_files=[str(f) for f in files],
                                              split='train', **one_file_one_document)
        else:
            documents = datasets.load_dataset(source, split='train')
    except (OSError, RuntimeError, ValueError, StopIteration,  # the last for an empty jsonl file
            datasets.exceptions.DatasetGenerationError) as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f'can\'t load {source}: {reason[:300]}. A local parquet, jsonl or text file, or a '
                         'folder of them, will do as well: --source=PATH') from None
    if text_column not in documents.column_names:
        raise ValueError(f'{source} has no column {text_column}, only {", ".join(documents.column_names)}: '
                         'name one with --text_column')
    if documents.features[text_column].dtype not in ('string', 'large_string') \
            or documents.data.column(text_column).null_count:
        raise ValueError(f'{source} has rows without text in column {text_column}: name another with '
                         '--text_column')
    documents = documents.select(range(min(limit or len(documents), len(documents))))
    if len(documents) < 2:
        raise ValueError(f'{source} has {len(documents)} documents, too few to split; for one long text take '
                         'data/text/prepare.py --tokenizer=gpt2')
    return documents


def encode_documents(documents, text_column, tokenizer, folder, name, n_threads):
    """Encode documents into files of PART each, but for files that are there already; returns all paths."""
    n, end = len(documents), np.array([tokenizer.bpe.eot_token], dtype=np.uint32)

    def encode(first, path):
        texts = documents[first:first + PART][text_column]
        ids = np.concatenate([part for text in texts for part in (tokenizer.encode_array(text), end)])
        return len(texts), write_tokens(path, [ids])['tokens']

    paths = {first: Path(folder, f'{name}-{first:09}.bin') for first in range(0, n, PART)}
    missing = {first: path for first, path in paths.items() if not path.exists()}
    finished = n - sum(min(PART, n - first) for first in missing)
    n_tokens, begin = 0, time.perf_counter()
    with ThreadPoolExecutor(n_threads) as pool, \
            tqdm(total=n, initial=finished, unit=' documents', desc=name) as bar:
        try:
            for done in as_completed([pool.submit(encode, *job) for job in missing.items()]):
                more_documents, more_tokens = done.result()
                n_tokens += more_tokens
                bar.set_postfix_str(f'{n_tokens / (time.perf_counter() - begin):,.0f} tokens/s')
                bar.update(more_documents)
        finally:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C doesn't wait for the rest
    return list(paths.values())
