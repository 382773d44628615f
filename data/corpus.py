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
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import GPT2Tokenizer, go_offline_if_cut_off, write_dataset, write_tokens

FORMATS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text', '.raw': 'text'}
SPLIT_NAMES = {'train': r'(?<![a-z])train', 'validation': r'(?<![a-z])(val|dev)'}  # in the paths of files
PART = 2048  # documents


def prepare_corpus(folder, source, text_column='text', num_proc=0, limit=0, val_fraction=0.0005, seed=2357,
                   own_splits=False, **how):
    """Encode every document of `source` as GPT-2 BPE, each followed by 50256, into folder/{train,val}.bin.

    source: a Hugging Face dataset id, or a local parquet, jsonl or text file or a folder of them; a text
    file is one document. num_proc: threads, 0 for all cores. limit: use the first so many documents. The
    documents are shuffled before a share of them goes to validation; own_splits takes the source's own
    validation split instead, where it is on the hub or a folder with files named train... and val... or
    dev... . how: more for `load_documents`.
    """
    tokenizer = GPT2Tokenizer()
    tokenizer.bpe  # noqa: B018  a missing BPE file is told before the long download
    if own_splits and has_own_splits(source):
        splits = {part: load_documents(source, text_column, limit, name, **how)
                  for part, name in (('train', 'train'), ('test', 'validation'))}
    else:
        documents = load_documents(source, text_column, limit, **how)
        if len(documents) < 2:
            raise ValueError(f'{source} has {len(documents)} documents, too few to split; for one long text '
                             'take data/text/prepare.py --tokenizer=gpt2')
        splits = documents.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
    # parts of another text or size don't fit
    key = json.dumps([[split._fingerprint for split in splits.values()], text_column, PART])
    parts = Path(folder, f'parts-{hashlib.sha256(key.encode()).hexdigest()[:16]}')

    def encode(name, part):
        threads = num_proc or os.cpu_count()
        paths = encode_documents(splits[part], text_column, tokenizer, parts, name, threads)
        return (np.memmap(path, np.uint16, 'r') for path in paths)

    chunks = {'train': encode('train', 'train'), 'val': encode('val', 'test')}
    write_dataset(folder, chunks, tokenizer, source)
    shutil.rmtree(parts)


def has_own_splits(source):
    path = Path(source)
    return not path.exists() or path.is_dir() and all(files_of(source, name) for name in SPLIT_NAMES)


def files_of(source, split=None):
    """The documents' files of a local source, in order; `split` takes those with its name in their path."""
    path = Path(source)
    files = sorted(p for p in path.rglob('*') if p.suffix in FORMATS) if path.is_dir() else [path]
    return [f for f in files
            if not split or re.search(SPLIT_NAMES[split], f.relative_to(path).as_posix().lower())]


def format_of(source, files):
    """The format of local files, which must be of one kind; None for a source on the hub."""
    if not Path(source).exists():
        if Path(source).suffix in FORMATS or not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', source):
            raise ValueError(f'{source} is not there, and no name that a data set on the hub could have')
        return None
    kinds = sorted({p.suffix for p in files})
    if len(kinds) > 1:
        raise ValueError(f'{source} mixes {", ".join(kinds)} files: name a folder with one kind, or a file')
    if not kinds or kinds[0] not in FORMATS:
        raise ValueError(f'{source} has no {", ".join(FORMATS)} files')
    return FORMATS[kinds[0]]


def load_documents(source, text_column, limit, split=None, regroup=None, rows_are_lines=False, **hub):
    """The documents as a datasets.Dataset; one line says what is wrong with the source.

    split: 'train' or 'validation', where the source has these; else a hub's training split, or all files.
    regroup: a function that makes documents, strings, of the lines of text files, and of a table's rows if
    rows_are_lines. hub: more for datasets.load_dataset, for sources on the hub.
    """
    go_offline_if_cut_off()
    import datasets
    files = files_of(source, split)
    kind = format_of(source, files)
    try:
        if kind:
            how = {'sample_by': 'line' if regroup else 'document', 'keep_linebreaks': True}
            documents = datasets.load_dataset(kind, data_files=[str(f) for f in files], split='train',
                                              **(how if kind == 'text' else {}))
        else:
            documents = datasets.load_dataset(source, split=split or 'train', **hub)
    except (OSError, RuntimeError, ValueError, StopIteration,  # the last for an empty jsonl file
            datasets.exceptions.DatasetGenerationError) as error:
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f'can\'t load {source}: {reason[:300]}. A local parquet, jsonl or text file, or a '
                         'folder of them, will do as well: --source=PATH') from None
    if kind == 'text' and text_column != 'text':
        documents = documents.rename_column('text', text_column)
    if text_column not in documents.column_names:
        raise ValueError(f'{source} has no column {text_column}, only {", ".join(documents.column_names)}: '
                         'name one with --text_column')
    if documents.features[text_column].dtype not in ('string', 'large_string') \
            or documents.data.column(text_column).null_count:
        raise ValueError(f'{source} has rows without text in column {text_column}: name another with '
                         '--text_column')
    if regroup and (kind == 'text' or rows_are_lines):
        documents = datasets.Dataset.from_generator(regrouped, gen_kwargs={
            'rows': documents, 'text_column': text_column, 'regroup': regroup})
    return documents.select(range(min(limit or len(documents), len(documents))))


def regrouped(rows, text_column, regroup):
    """Rows of a new dataset, a document each."""
    lines = (line for batch in rows.iter(PART) for line in batch[text_column])
    return ({text_column: document} for document in regroup(lines))


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
