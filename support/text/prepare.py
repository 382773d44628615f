"""
Text, corpora and downloads into token files, for the `data/*/prepare.py`.

    write_text_dataset(folder, text, 'char', source='notes.txt')
    prepare_corpus(folder, source='Skylion007/openwebtext', text_column='text', num_proc=8)

Hugging Face's `datasets` keeps the documents of a corpus in a memory-mapped file. Threads encode 2,048
documents at a time (tiktoken releases the GIL) into files of their own, joined at the end. So memory
use doesn't grow with the corpus, and an interrupted run continues where it stopped.
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

from support.errors import UserError
from support.machine.files import replacing
from support.text.bpe import END, BPETokenizer, check_vocab_size, train_bpe
from support.text.documents import FORMATS, SPLIT_NAMES, has_own_splits, load_documents, tell_files_of
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer
from support.text.tokens import pieces
from support.text.writing import write_dataset, write_tokens

# ---------------------------------------------------------------------------- tokenizers

SAMPLE = 1 << 28  # characters that a tokenizer is trained on at most


def check_tokenizer_name(name, vocab_size, known):
    """The tokenizer that a setting names if it exists already, None for those that are made of the text: char
    and bpe. known: the names that the caller takes besides paths. Raises ValueError for any other."""
    if name not in known and not Path(name).exists():
        raise UserError(f'tokenizer={name} is not one of {", ".join(known)}, nor the path of a '
                         'tokenizer.json or of a folder with one')
    if name in known:
        if name == 'bpe':
            check_vocab_size(vocab_size)
        return GPT2Tokenizer() if name == 'gpt2' else None
    if (tokenizer := load_tokenizer(name)) is None:
        raise UserError(f'tokenizer={name} has no tokenizer.json')
    return tokenizer


# ---------------------------------------------------------------------------- one text

def write_text_dataset(data_dir, text, tokenizer, source, val_fraction=0.1, vocab_size=4096):
    """Write a text as a dataset, with the last val_fraction of its characters for validation.

    tokenizer: 'char' (a vocabulary of the text's characters), 'gpt2', 'bpe' (trained on the training part, of
    vocab_size entries), or a tokenizer.json or a folder with one.
    """
    coder = check_tokenizer_name(tokenizer, vocab_size, ('char', 'gpt2', 'bpe'))
    cut = check_cut(len(text), val_fraction, source)
    print(f'{source}: {len(text):,} characters')
    if tokenizer == 'char':
        coder = CharTokenizer.of_text(text)
    elif tokenizer == 'bpe':
        if cut > SAMPLE:
            print(f'the tokenizer is trained on {SAMPLE:,} characters, spread over the training part')
        coder = train_bpe(pieces(text[:cut], SAMPLE), vocab_size)
    encode = coder.encode if isinstance(coder, CharTokenizer) else coder.encode_array
    write_dataset(data_dir, {'train': [encode(text[:cut])], 'val': [encode(text[cut:])]}, coder, source)


def dataset_folder(script, name):
    """data/<name> beside the folder of a prepare.py, or that folder for an empty name."""
    if name and (Path(name).name != name or name == '..'):
        raise UserError(f'name={name} must be a plain folder name: the dataset goes to data/<name>')
    folder = Path(script).parent
    return folder.parent / name if name else folder


def name_after(source):
    """A dataset's name for a corpus: that of its file, its folder or its repository on the hub."""
    path = Path(source).resolve()
    return re.sub(r'[^\w.-]', '_', path.stem if path.suffix in FORMATS else path.name) or 'corpus'


def check_cut(n, val_fraction, source, unit='characters'):
    """How many of n characters (or other units) are for training. ValueError if there is nothing to split."""
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} must lie between 0 and 1')
    cut = int(n * (1 - val_fraction))
    if not 0 < cut < n:
        raise UserError(f'{source} has {n:,} {unit}, too few to split')
    return cut


# ---------------------------------------------------------------------------- corpora of documents

PART = 2048  # documents


def prepare_corpus(folder, source, text_column='text', num_proc=0, limit=0, val_fraction=0.0005, seed=2357,
                   own_splits=False, tokenizer='gpt2', vocab_size=4096, subset='', **how):
    """Encode every document of `source`, each followed by <|endoftext|>, into folder/{train,val}.bin.

    source: a Hugging Face dataset id, or a local parquet, jsonl or text file, or a folder with such files; a
    text file is one document. num_proc: threads, 0 for all cores. limit: use only the first documents.
    own_splits: use the source's own validation split, if it is on the hub or a folder with files named
    train... and val... or dev...; otherwise val_fraction of the shuffled documents. tokenizer: 'gpt2', 'bpe'
    (trained on the training part, of vocab_size entries), or a tokenizer.json or a folder with one. subset: a
    configuration of a dataset on the hub. how: further arguments of `load_documents`.
    """
    how |= {'name': subset} if subset else {}
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} must lie between 0 and 1')
    coder = check_tokenizer_name(tokenizer, vocab_size, ('gpt2', 'bpe'))
    if isinstance(coder, GPT2Tokenizer):
        coder.bpe  # noqa: B018, fails before the long download if the BPE files are missing
    elif coder and coder.end is None:
        raise UserError(f'tokenizer={tokenizer} has no special token {END} to end documents with')
    if own_splits and has_own_splits(source):
        tell_files_of(source, SPLIT_NAMES)
        splits = {part: load_documents(source, text_column, limit, name, **how)
                  for part, name in (('train', 'train'), ('test', 'validation'))}
    else:
        tell_files_of(source, [None])
        documents = load_documents(source, text_column, limit, **how)
        splits = split_documents(documents, source, val_fraction, seed)
    # parts of another text, or of another size, go to another folder
    key = json.dumps([[split._fingerprint for split in splits.values()], text_column, PART,
                      coder.to_dict() if coder else [vocab_size, SAMPLE]])
    parts = Path(folder, f'parts-{hashlib.sha256(key.encode()).hexdigest()[:16]}')
    coder = coder or trained_tokenizer(parts, splits['train'], text_column, vocab_size)

    def encode(name, part):
        threads = num_proc or os.cpu_count()
        paths = encode_documents(splits[part], text_column, coder, parts, name, threads)
        return (np.memmap(path, np.uint16, 'r') for path in paths)

    chunks = {'train': encode('train', 'train'), 'val': encode('val', 'test')}
    write_dataset(folder, chunks, coder, source)
    shutil.rmtree(parts)


def split_documents(documents, source, val_fraction, seed):
    """{'train': documents, 'test': documents}, shuffled, val_fraction of them in the second."""
    if len(documents) < 2:
        raise UserError(f'{source} has {len(documents)} documents, too few to split; for one long text '
                         'use data/text/prepare.py --tokenizer=gpt2')
    return documents.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)


def trained_tokenizer(parts, documents, text_column, vocab_size):
    """A BPETokenizer of documents spread over all of them; that of parts/tokenizer.json if an interrupted run
    left it."""
    path, n = parts / 'tokenizer.json', len(documents)
    if not path.is_file():
        some = documents.select(np.linspace(0, n - 1, min(n, PART), dtype=np.int64))
        mean = sum(map(len, some[text_column])) / len(some)
        count = max(1, min(n, int(SAMPLE / max(1, mean))))
        print(f'the tokenizer is trained on {count:,} of {n:,} documents')
        some = documents.select(np.linspace(0, n - 1, count, dtype=np.int64))
        trained = train_bpe((t for batch in some.iter(PART) for t in batch[text_column]), vocab_size)
        with replacing(path) as temporary:
            temporary.write_bytes(trained.json.encode())
    return BPETokenizer(path.read_text(encoding='utf-8'))


def encode_documents(documents, text_column, tokenizer, folder, name, n_threads):
    """Encode documents into files of PART documents, except files that exist already; returns all paths."""
    n, end = len(documents), np.array([tokenizer.end], dtype=np.uint32)

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
