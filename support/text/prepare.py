"""
Text, corpora and downloads into token files, for the `data/*/prepare.py`.

    write_text_dataset(folder, text, 'char', source='notes.txt')
    prepare_corpus(folder, source='Skylion007/openwebtext', text_column='text', num_proc=8)

Hugging Face's `datasets` keeps the documents of a corpus in a memory-mapped file. Threads encode 2,048
documents at a time (tiktoken releases the GIL) into files of their own, joined at the end. So memory
use doesn't grow with the corpus, and an interrupted run continues where it stopped.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.machine.files import download, explain_failure, go_offline_if_cut_off, read_text, replacing
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer

TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
                    'data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')  # sha256


# ---------------------------------------------------------------------------- texts

def tiny_shakespeare(folder):
    """Path of folder/input.txt, downloaded unless it exists."""
    path = Path(folder, 'input.txt')
    download(*TINY_SHAKESPEARE, path)
    return path


def read_texts(paths):
    """The text of files, and of folders in sorted order, as one string in which every file ends its line.

    In a folder, files that are not text are skipped and counted; named themselves, they raise ValueError.
    """
    texts, skipped = [], []
    for path in map(Path, paths):
        for file in sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]:
            try:
                text = read_text(file)
            except ValueError:
                if file == path:
                    raise
                skipped.append(file)
            else:
                texts.append(text if text.endswith('\n') else text + '\n')
    if skipped:
        print(f'skipped {len(skipped)} files that are not UTF-8 text, the first is {skipped[0]}')
    return ''.join(texts)


# ---------------------------------------------------------------------------- datasets

def write_tokens(path, chunks):
    """Write arrays of token ids, joined, as uint16. Returns {'tokens', 'largest_id', 'sha256' in hex}.

    Raises ValueError, and writes no file, if an id doesn't fit into uint16.
    """
    with replacing(path) as temporary:
        return write_ids(temporary, chunks)


def write_ids(path, chunks):
    """Like `write_tokens`, to a file that may be left half written."""
    count, largest, digest = 0, -1, hashlib.sha256()
    with open(path, 'wb') as file:
        for chunk in chunks:
            ids = np.asarray(chunk)
            if len(ids) == 0:
                continue
            if ids.min() < 0 or ids.max() > 65535:
                bad = ids.min() if ids.min() < 0 else ids.max()
                raise ValueError(f'token id {bad} doesn\'t fit into uint16, 0 to 65535')
            count, largest = count + len(ids), max(largest, int(ids.max()))
            data = ids.astype(np.uint16).tobytes()
            digest.update(data)
            file.write(data)
    return {'tokens': count, 'largest_id': largest, 'sha256': digest.hexdigest()}


def write_dataset(data_dir, splits, tokenizer, source):
    """Write a dataset's files. splits: {'train': chunks, 'val': chunks}, each an iterable of id arrays.

    Until all tokens are written, the files that were there stay. From the first that is replaced to the last,
    dataset.json says `unfinished`, so that tokens are never read with another tokenizer.
    """
    data_dir = Path(data_dir)
    with contextlib.ExitStack() as stack:
        temporary = {split: stack.enter_context(replacing(data_dir / f'{split}.bin')) for split in splits}
        written = {split: write_ids(temporary[split], chunks) for split, chunks in splits.items()}
        info = {'tokens': {split: w['tokens'] for split, w in written.items()},
                'largest_id': max(w['largest_id'] for w in written.values()),
                'tokenizer': tokenizer.to_dict()['kind'], 'vocab_size': tokenizer.n_vocab,
                'source': str(source),
                'sha256': {f'{split}.bin': w['sha256'] for split, w in written.items()}}
        write_info(data_dir, {'unfinished': True})
        write_meta(data_dir, tokenizer)
    write_info(data_dir, info)
    for split, w in written.items():
        print(f'{split} has {w["tokens"]:,} tokens')
    print(f'vocabulary: {tokenizer.n_vocab:,} ({info["tokenizer"]}), written to {data_dir}')


def write_info(data_dir, info):
    with replacing(data_dir / 'dataset.json') as temporary:
        temporary.write_text(json.dumps(info, indent=2) + '\n', encoding='utf-8')


def write_meta(data_dir, tokenizer):
    """meta.pkl of characters; of another tokenizer, none."""
    path = data_dir / 'meta.pkl'
    if not isinstance(tokenizer, CharTokenizer):
        path.unlink(missing_ok=True)
        return
    meta = {'vocab_size': tokenizer.n_vocab, 'itos': tokenizer.itos, 'stoi': tokenizer.stoi}
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps(meta, protocol=4))


def write_text_dataset(data_dir, text, tokenizer, source, val_fraction=0.1):
    """Write a text as a dataset, with the last val_fraction of its characters for validation.

    tokenizer: 'char' (a vocabulary of the text's characters) or 'gpt2'.
    """
    if tokenizer not in ('char', 'gpt2'):
        raise ValueError(f'tokenizer={tokenizer} is not one of char, gpt2')
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} must lie between 0 and 1')
    cut = int(len(text) * (1 - val_fraction))
    if not 0 < cut < len(text):
        raise ValueError(f'{source} has {len(text):,} characters, too few to split')
    coder = CharTokenizer.of_text(text) if tokenizer == 'char' else GPT2Tokenizer()
    print(f'{source}: {len(text):,} characters')
    encode = coder.encode if tokenizer == 'char' else coder.encode_array
    write_dataset(data_dir, {'train': [encode(text[:cut])], 'val': [encode(text[cut:])]}, coder, source)


# ---------------------------------------------------------------------------- corpora of documents

FORMATS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text', '.raw': 'text'}
SPLIT_NAMES = {'train': r'(?<![a-z])train', 'validation': r'(?<![a-z])(val|dev)'}  # in the paths of files
PART = 2048  # documents


def prepare_corpus(folder, source, text_column='text', num_proc=0, limit=0, val_fraction=0.0005, seed=2357,
                   own_splits=False, subset='', **how):
    """Encode every document of `source` as GPT-2 BPE, each followed by 50256, into folder/{train,val}.bin.

    source: a Hugging Face dataset id, or a local parquet, jsonl or text file, or a folder with such files; a
    text file is one document. num_proc: threads, 0 for all cores. limit: use only the first documents.
    own_splits: use the source's own validation split, if it is on the hub or a folder with files named
    train... and val... or dev...; otherwise val_fraction of the shuffled documents. subset: a configuration
    of a dataset on the hub. how: further arguments of `load_documents`.
    """
    how |= {'name': subset} if subset else {}
    tokenizer = GPT2Tokenizer()
    tokenizer.bpe  # noqa: B018, fails before the long download if the BPE files are missing
    if own_splits and has_own_splits(source):
        splits = {part: load_documents(source, text_column, limit, name, **how)
                  for part, name in (('train', 'train'), ('test', 'validation'))}
    else:
        documents = load_documents(source, text_column, limit, **how)
        if len(documents) < 2:
            raise ValueError(f'{source} has {len(documents)} documents, too few to split; for one long text '
                             'use data/text/prepare.py --tokenizer=gpt2')
        splits = documents.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
    # parts of another text, or of another size, go to another folder
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
    """Files with documents in a local source, sorted; split: only those with its name in their path."""
    path = Path(source)
    files = sorted(p for p in path.rglob('*') if p.suffix in FORMATS) if path.is_dir() else [path]
    return [f for f in files
            if not split or re.search(SPLIT_NAMES[split], f.relative_to(path).as_posix().lower())]


def format_of(source, files):
    """The format of local files, None for a source on the hub. Raises ValueError if formats are mixed."""
    if not Path(source).exists():
        if Path(source).suffix in FORMATS or not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', source):
            raise ValueError(f'{source} doesn\'t exist; a dataset on the hub is named like owner/name')
        return None
    kinds = sorted({p.suffix for p in files})
    if len(kinds) > 1:
        raise ValueError(f'{source} mixes {", ".join(kinds)} files: name a file, or a folder with one kind')
    if not kinds or kinds[0] not in FORMATS:
        raise ValueError(f'{source} has no {", ".join(FORMATS)} files')
    return FORMATS[kinds[0]]


def load_documents(source, text_column, limit, split=None, regroup=None, rows_are_lines=False, **hub):
    """The documents as a datasets.Dataset. Raises ValueError if the source can't be read or has no text.

    split: 'train' or 'validation'; None takes the hub's training split, or all local files. limit: take only
    the first documents, and download no more than them; 0: all. regroup: a function from lines to documents,
    for text files, and for a table's rows if rows_are_lines. hub: further arguments of datasets.load_dataset,
    for sources on the hub.
    """
    go_offline_if_cut_off()
    import datasets
    files = files_of(source, split)
    kind = format_of(source, files)
    joins = regroup if kind == 'text' or rows_are_lines else None
    explained = partial(explain_failure, f'can\'t load {source}; local parquet, jsonl or text files will do: '
                        '--source=PATH', datasets.exceptions.DatasetGenerationError)
    if kind:
        hub = {'data_files': [str(f) for f in files]}
        hub |= {'sample_by': 'line' if regroup else 'document', 'keep_linebreaks': True} \
            if kind == 'text' else {}
    with explained():
        rows, key = load_rows(kind or source, 'train' if kind else split or 'train', limit, **hub)
        if kind == 'text' and text_column != 'text':
            rows = rows.rename_column('text', text_column)
        names = rows.column_names or [*next(iter(rows), {text_column: ''})]  # a stream may not know them yet
    check_text(source, rows, text_column, names)
    if key or joins:
        how = {'text_column': text_column, 'limit': limit, 'regroup': joins}
        key = key and datasets.fingerprint.Hasher.hash((key, how))
        with explained():
            rows = datasets.Dataset.from_generator(first_documents, gen_kwargs={'rows': rows, **how},
                                                   fingerprint=key)
        check_text(source, rows, text_column, rows.column_names or [text_column])
    return rows.select(range(min(limit or len(rows), len(rows))))


def load_rows(where, split, limit, **how):
    """A datasets.Dataset and None; with a limit a stream of rows, which downloads what is read of it, and
    what tells it from others."""
    import datasets
    if not limit or where not in FORMATS.values() and datasets.config.HF_HUB_OFFLINE:  # no streams in caches
        return datasets.load_dataset(where, split=split, **how), None
    builder = datasets.load_dataset_builder(where, **how)
    return builder.as_streaming_dataset(split), (builder.config_id, builder.hash, split)


def check_text(source, rows, text_column, names):
    """ValueError unless the rows, of these columns, have strings in one; rows may be a stream."""
    if text_column not in names:
        raise ValueError(f'{source} has no column {text_column}, only {", ".join(names)}: name one with '
                         '--text_column')
    kind = rows.features[text_column].dtype if rows.features else 'string'
    has_gaps = hasattr(rows, 'data') and rows.data.column(text_column).null_count
    if kind not in ('string', 'large_string') or has_gaps:
        raise ValueError(f'{source} has rows without text in column {text_column}: name another with '
                         '--text_column')


def first_documents(rows, text_column, limit, regroup):
    """The rows of a new dataset: the first `limit` documents, or all with 0."""
    texts = (text for batch in rows.iter(min(PART, limit or PART)) for text in batch[text_column])
    documents = regroup(texts) if regroup else texts
    return ({text_column: document} for document in itertools.islice(documents, limit or None))


def encode_documents(documents, text_column, tokenizer, folder, name, n_threads):
    """Encode documents into files of PART documents, except files that exist already; returns all paths."""
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
            pool.shutdown(cancel_futures=True)  # so an error or Ctrl-C doesn't wait for the rest
    return list(paths.values())
