"""
The files of a dataset: train.bin, val.bin, the vocabulary, dataset.json.

    write_dataset('data/mine', {'train': [ids], 'val': [ids]}, tokenizer, source='notes.txt')
"""

import contextlib
import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.errors import UserError
from support.machine.files import replacing
from support.text.bpe import BPETokenizer
from support.text.stream import Encoded, dtype_for
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer


@dataclass
class Written:
    """What a token file holds. n_characters and n_bytes: of the text, as far as it is known."""
    n_tokens: int = 0
    largest_id: int = -1
    sha256: str = ''
    n_characters: int = 0
    n_bytes: int = 0


def write_tokens(path, chunks, dtype=np.uint16):
    """Write arrays of token ids, or `Encoded`, joined. Returns a `Written`.

    Raises ValueError, and writes no file, if an id doesn't fit into the dtype.
    """
    with replacing(path) as temporary:
        return write_ids(temporary, chunks, dtype)


def write_ids(path, chunks, dtype):
    """Like `write_tokens`, to a file that may be left half written."""
    written, digest, most = Written(), hashlib.sha256(), np.iinfo(dtype).max
    with open(path, 'wb') as file:
        for chunk in chunks:
            if isinstance(chunk, Encoded):
                written.n_characters += chunk.n_characters
                written.n_bytes += chunk.n_bytes
                chunk = chunk.ids
            ids = np.asarray(chunk)
            if len(ids) == 0:
                continue
            least, largest = int(ids.min()), int(ids.max())
            if least < 0 or largest > most:
                raise UserError(f'token id {least if least < 0 else largest} doesn\'t fit into '
                                f'{np.dtype(dtype)}, 0 to {most}')
            data = np.ascontiguousarray(ids, dtype)
            digest.update(data)
            file.write(data)
            written.n_tokens += len(ids)
            written.largest_id = max(written.largest_id, largest)
    written.sha256 = digest.hexdigest()
    return written


def write_dataset(data_dir, splits, tokenizer, source, masks=None, more=None):
    """Write a dataset's files. splits: {'train': chunks, 'val': chunks}, of `write_tokens`, read in
    this order. Of conversations, masks: {split: (N,) uint8}. more: further entries of dataset.json.

    Until all tokens are written, the files that were there stay. From the first that is replaced to
    the last, dataset.json says `unfinished`, so that tokens are never read with another tokenizer.
    """
    data_dir, dtype = Path(data_dir), dtype_for(tokenizer)
    with contextlib.ExitStack() as stack:
        temporary = {split: stack.enter_context(replacing(data_dir / f'{split}.bin'))
                     for split in splits}
        written = {split: write_ids(temporary[split], chunks, dtype)
                   for split, chunks in splits.items()}
        info = {'tokens': {split: w.n_tokens for split, w in written.items()},
                'largest_id': max(w.largest_id for w in written.values()),
                'dtype': np.dtype(dtype).name,
                'tokenizer': tokenizer.to_dict()['kind'], 'vocab_size': tokenizer.n_vocab,
                'source': str(source), **(more or {}),
                'sha256': {f'{split}.bin': w.sha256 for split, w in written.items()}}
        if 'ends' in tokenizer.to_dict():
            info['ends'] = [*tokenizer.ends]
        for split, mask in (masks or {}).items():
            mask.tofile(stack.enter_context(replacing(data_dir / f'{split}.mask')))
            info['sha256'][f'{split}.mask'] = hashlib.sha256(mask).hexdigest()
        write_info(data_dir, {'unfinished': True})
        for split in splits if masks is None else ():
            (data_dir / f'{split}.mask').unlink(missing_ok=True)  # of what was here before
        info['sha256'] |= write_vocabulary(data_dir, tokenizer)
    write_info(data_dir, info)
    print_sizes(written, tokenizer)
    print(f'vocabulary: {tokenizer.n_vocab:,} ({info["tokenizer"]}), written to {data_dir}')


def print_sizes(written, tokenizer):
    """Print how much text is in each split. written: {split: Written}."""
    for split, w in written.items():
        size = ''
        if w.n_characters and w.n_tokens:
            size = (f' of {w.n_characters:,} characters ({w.n_bytes / w.n_tokens:.2f} bytes, '
                    f'{w.n_characters / w.n_tokens:.2f} characters a token)')
        print(f'{split} has {w.n_tokens:,} tokens{size}')
    n_tokens, n_characters = (sum(getattr(w, name) for w in written.values())
                              for name in ('n_tokens', 'n_characters'))
    if isinstance(tokenizer, GPT2Tokenizer) and 0 < n_characters < n_tokens:
        print(f'GPT-2\'s encoding takes {n_tokens / n_characters:.2f} tokens a character of this '
              'text; to train from scratch, --tokenizer=bpe makes an encoding that fits it')


def write_info(data_dir, info):
    with replacing(data_dir / 'dataset.json') as temporary:
        temporary.write_text(json.dumps(info, indent=2) + '\n', encoding='utf-8')


def write_vocabulary(data_dir, tokenizer):
    """tokenizer.json of a tokenizer of its own, meta.pkl, with the characters if they are the
    tokens; of GPT-2's, neither. Returns {tokenizer.json: its SHA-256}, if there is one."""
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
