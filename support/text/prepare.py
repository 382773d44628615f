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
import json
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.machine.files import replacing
from support.text.bpe import BPETokenizer, check_vocab_size, train_bpe
from support.text.documents import has_own_splits, load_documents
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer
from support.text.tokens import pieces

# ---------------------------------------------------------------------------- tokenizers

SAMPLE = 1 << 28  # characters that a tokenizer is trained on at most


def check_tokenizer_name(name, vocab_size, known):
    """The tokenizer that a setting names if it exists already, None for those that are made of the text: char
    and bpe. known: the names that the caller takes besides paths. Raises ValueError for any other."""
    if name not in known and not Path(name).exists():
        raise ValueError(f'tokenizer={name} is not one of {", ".join(known)}, nor the path of a '
                         'tokenizer.json or of a folder with one')
    if name in known:
        if name == 'bpe':
            check_vocab_size(vocab_size)
        return GPT2Tokenizer() if name == 'gpt2' else None
    if (tokenizer := load_tokenizer(name)) is None:
        raise ValueError(f'tokenizer={name} has no tokenizer.json')
    return tokenizer


# ---------------------------------------------------------------------------- datasets

def write_tokens(path, chunks):
    """Write arrays of token ids, joined, as uint16. Returns {'tokens', 'largest_id', 'sha256' in hex}.

    Raises ValueError, and writes no file, if an id doesn't fit into uint16.
    """
    with replacing(path) as temporary:
        return write_ids(temporary, chunks)[0]


def write_ids(path, chunks):
    """Like `write_tokens`, to a file that may be left half written. Returns how often each id occurs, too, as
    (65536,) int64."""
    counts, digest = np.zeros(1 << 16, np.int64), hashlib.sha256()
    with open(path, 'wb') as file:
        for chunk in chunks:
            ids = np.asarray(chunk)
            if len(ids) == 0:
                continue
            if ids.min() < 0 or ids.max() > 65535:
                bad = ids.min() if ids.min() < 0 else ids.max()
                raise ValueError(f'token id {bad} doesn\'t fit into uint16, 0 to 65535')
            counts += np.bincount(ids, minlength=1 << 16)
            data = ids.astype(np.uint16).tobytes()
            digest.update(data)
            file.write(data)
    largest = int(np.flatnonzero(counts).max(initial=-1))
    return {'tokens': int(counts.sum()), 'largest_id': largest, 'sha256': digest.hexdigest()}, counts


def write_dataset(data_dir, splits, tokenizer, source, masks=None, template=None):
    """Write a dataset's files. splits: {'train': chunks, 'val': chunks}, each an iterable of id arrays. Of
    conversations, masks: {split: (N,) uint8}, and template: of `template_for`.

    Until all tokens are written, the files that were there stay. From the first that is replaced to the last,
    dataset.json says `unfinished`, so that tokens are never read with another tokenizer.
    """
    data_dir = Path(data_dir)
    with contextlib.ExitStack() as stack:
        temporary = {split: stack.enter_context(replacing(data_dir / f'{split}.bin')) for split in splits}
        written = {split: write_ids(temporary[split], chunks) for split, chunks in splits.items()}
        info = {'tokens': {split: w['tokens'] for split, (w, _) in written.items()},
                'largest_id': max(w['largest_id'] for w, _ in written.values()),
                'tokenizer': tokenizer.to_dict()['kind'], 'vocab_size': tokenizer.n_vocab,
                'source': str(source),
                'sha256': {f'{split}.bin': w['sha256'] for split, (w, _) in written.items()}}
        for split, mask in (masks or {}).items():
            mask.tofile(stack.enter_context(replacing(data_dir / f'{split}.mask')))
            info['sha256'][f'{split}.mask'] = hashlib.sha256(mask).hexdigest()
        info |= {'chat': template} if template else {}
        write_info(data_dir, {'unfinished': True})
        for split in splits if masks is None else ():
            (data_dir / f'{split}.mask').unlink(missing_ok=True)  # of what was here before
        info['sha256'] |= write_vocabulary(data_dir, tokenizer)
    write_info(data_dir, info)
    print_sizes({split: counts for split, (_, counts) in written.items()}, tokenizer)
    print(f'vocabulary: {tokenizer.n_vocab:,} ({info["tokenizer"]}), written to {data_dir}')


def print_sizes(counts, tokenizer):
    """Tell how much text is in each split. counts: {split: how often each id occurs, (65536,)}."""
    texts, n_bytes = tokenizer.token_texts(), tokenizer.token_bytes()
    n_chars = np.array([sum(b >> 6 != 0b10 for b in text) for text in texts])  # bytes that begin a character
    total = sum(c[:len(texts)] for c in counts.values())
    for split, c in counts.items():
        c, n = c[:len(texts)], max(1, c.sum())
        print(f'{split} has {c.sum():,} tokens of {c @ n_chars:,} characters '
              f'({c @ n_bytes / n:.2f} bytes, {c @ n_chars / n:.2f} characters a token)')
    if isinstance(tokenizer, GPT2Tokenizer) and total.sum() > total @ n_chars:
        print(f'GPT-2\'s encoding takes {total.sum() / max(1, total @ n_chars):.2f} tokens a character of '
              'this text; to train from scratch, --tokenizer=bpe makes an encoding that fits it')


def write_info(data_dir, info):
    with replacing(data_dir / 'dataset.json') as temporary:
        temporary.write_text(json.dumps(info, indent=2) + '\n', encoding='utf-8')


def write_vocabulary(data_dir, tokenizer):
    """tokenizer.json of a tokenizer of its own, meta.pkl, with the characters if they are the tokens; of
    GPT-2's, neither. Returns {tokenizer.json: its SHA-256}, if there is one."""
    meta, own = {'vocab_size': tokenizer.n_vocab}, data_dir / 'tokenizer.json'
    digests = {}
    if isinstance(tokenizer, CharTokenizer):
        meta |= {'itos': tokenizer.itos, 'stoi': tokenizer.stoi}
    if isinstance(tokenizer, BPETokenizer):
        with replacing(own) as temporary:
            temporary.write_bytes(tokenizer.json.encode())
        digests = {own.name: hashlib.sha256(tokenizer.json.encode()).hexdigest()}
    else:
        own.unlink(missing_ok=True)
    if isinstance(tokenizer, GPT2Tokenizer):
        (data_dir / 'meta.pkl').unlink(missing_ok=True)
    else:
        with replacing(data_dir / 'meta.pkl') as temporary:
            temporary.write_bytes(pickle.dumps(meta, protocol=4))
    return digests


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


def check_cut(n, val_fraction, source, unit='characters'):
    """How many of n characters (or other units) are for training. ValueError if there is nothing to split."""
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} must lie between 0 and 1')
    cut = int(n * (1 - val_fraction))
    if not 0 < cut < n:
        raise ValueError(f'{source} has {n:,} {unit}, too few to split')
    return cut


# ---------------------------------------------------------------------------- corpora of documents

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
