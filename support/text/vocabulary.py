"""
The vocabulary of a dataset's folder: a tokenizer.json of its own, a meta.pkl, or GPT-2's.

    tokenizer, vocab_size, path = read_vocabulary('data/mine', info)  # info: of dataset.json
"""

import hashlib
from pathlib import Path

from support.errors import UserError
from support.machine.files import explain_failure, read_bytes, regular_file
from support.machine.pickles import read_pickle
from support.text.bpe import MOST_IDS
from support.text.tokenizer import (PADDED_GPT2_VOCAB, CharTokenizer, GPT2Tokenizer, NoTokenizer,
                                    load_tokenizer)


def read_vocabulary(data_dir, info):
    """tokenizer, vocab_size, path of a dataset's folder; path: the file that names them, or None
    where none does, so that the ids are GPT-2's. info: dataset.json as a dict. Raises UserError if
    a file is missing or damaged, or if the files contradict each other."""
    path, kind = Path(data_dir, 'tokenizer.json'), info.get('tokenizer')
    meta = read_meta(data_dir, is_needed=kind == 'char')
    has_own = regular_file(path)
    if kind == 'bpe' and not has_own:
        raise UserError(f'{path} is missing, but dataset.json says that the tokens are of a '
                        'tokenizer of their own: prepare the data again')
    if has_own and kind != 'char':
        return read_own_tokenizer(path, info, meta)
    if meta:
        tokenizer = CharTokenizer(meta['itos']) if meta['itos'] else NoTokenizer(meta['vocab_size'])
        return tokenizer, meta['vocab_size'], Path(data_dir, 'meta.pkl')
    if kind not in (None, 'gpt2'):
        path, size = Path(data_dir, 'dataset.json'), info.get('vocab_size')
        most = 1 << 31 if info.get('dtype') == 'uint32' else MOST_IDS
        if not isinstance(size, int) or not 0 < size <= most:
            raise UserError(f'{path} names another tokenizer, {kind[:40]}, so it needs its '
                            f'vocab_size, at most {most:,}; or put its tokenizer.json beside it')
        reason = (f'its data is of another tokenizer, {kind[:40]}, whose tokenizer.json is not '
                  'beside it')
        return NoTokenizer(size, reason), size, path
    return GPT2Tokenizer(), PADDED_GPT2_VOCAB, None


def read_own_tokenizer(path, info, meta):
    """Like `read_vocabulary`, of a tokenizer.json, the dataset.json and the meta.pkl beside it."""
    tokenizer, kind = load_tokenizer(path, info.get('ends', ())), info.get('tokenizer', 'bpe')
    found, digest = tokenizer.to_dict()['kind'], info.get('sha256', {}).get(path.name)
    if kind == 'gpt2' and found != 'gpt2' or meta and meta['itos']:
        other = 'meta.pkl has characters'
        if kind == 'gpt2':
            other = 'dataset.json says that they are GPT-2\'s'
        raise UserError(f'{path} says that the tokens are its own, but {other}: remove one or the '
                        'other')
    if digest not in (None, hashlib.sha256(read_bytes(path)).hexdigest()):
        raise UserError(f'{path} is not the one that the data was prepared with: its SHA-256 is '
                        'another in dataset.json. Prepare the data again')
    if found == 'gpt2':
        return tokenizer, PADDED_GPT2_VOCAB, None
    return tokenizer, max(tokenizer.n_vocab, meta['vocab_size'] if meta else 0), path


def read_meta(data_dir, is_needed=False):
    """meta.pkl as a dict with 'vocab_size' and 'itos', {id: string} or {} if the file has none;
    None if there is no file. is_needed: whether dataset.json says that the tokens are characters.
    Raises UserError if it is damaged, or needed and missing."""
    path = Path(data_dir, 'meta.pkl')
    if not regular_file(path):
        if is_needed:
            raise UserError(f'{path} is missing, but dataset.json says that the tokens are '
                            'characters: prepare the data again, or delete dataset.json if it is '
                            'not of this data')
        return None
    with explain_failure(f'{path} is not a character vocabulary'):
        meta = read_pickle(read_bytes(path))
        size = meta['vocab_size']
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise TypeError(f'vocab_size={size!r} is not a positive integer')
        stoi = meta.get('stoi')
        inverse = {i: c for c, i in stoi.items()} if isinstance(stoi, dict) else {}
        itos = strings_by_id(meta.get('itos'), size) or strings_by_id(inverse, size)
        return {**meta, 'itos': itos}


def strings_by_id(itos, size):
    """A table of ids and strings, a dict or a list, as {id: string}; {} if it is something else."""
    if isinstance(itos, (list, tuple, str)):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict):
        return {}
    found = {i: text_of(c) for i, c in itos.items()
             if isinstance(i, int) and 0 <= i < size}
    return found if all(isinstance(c, str) for c in found.values()) else {}


def text_of(value):
    """Bytes of UTF-8 as a string, any other value as it is."""
    try:
        return value.decode('utf-8') if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
