"""
The files of a dataset: train.bin, val.bin, the vocabulary, dataset.json.

    write_dataset('data/mine', {'train': [ids], 'val': [ids]}, tokenizer, source='notes.txt')
"""

import contextlib
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np

from support.errors import UserError
from support.machine.files import replacing
from support.text.bpe import BPETokenizer
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer


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
                raise UserError(f'token id {bad} doesn\'t fit into uint16, 0 to 65535')
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
