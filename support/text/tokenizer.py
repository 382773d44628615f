"""
Text to token ids and back: a vocabulary of characters, or GPT-2's byte pair encoding.

    tokenizer = read_tokenizer('data/shakespeare_char')
    tokenizer.decode(tokenizer.encode('To be'))
"""

import functools
from pathlib import Path

import numpy as np

from support.machine.files import explain_failure
from support.machine.pickles import read_pickle
from support.text.dataset import read_info

GPT2_VOCAB = 50257  # BPE ids; the last, 50256, is <|endoftext|>
PADDED_GPT2_VOCAB = 50304  # the next multiple of 64, for speed


class CharTokenizer:
    """One id a character. itos: {id: character}."""

    def __init__(self, itos):
        self.itos = itos
        self.stoi = {c: i for i, c in itos.items()}
        self.n_vocab = max(itos) + 1

    @classmethod
    def of_text(cls, text):
        return cls(dict(enumerate(sorted(set(text)))))

    def encode(self, text):
        missing = sorted(set(text) - set(self.stoi))
        if missing:
            raise ValueError(f'not in this model\'s vocabulary: {" ".join(map(repr, missing[:10]))}; '
                             f'it knows {"".join(self.itos.values())!r}')
        return [self.stoi[c] for c in text]

    def decode(self, ids):
        return ''.join(self.itos[i] for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode('utf-8', errors='surrogatepass')

    def first_token(self):
        """The id before a text's first: a line end, if the vocabulary has it."""
        return self.stoi.get('\n', 0)

    def token_bytes(self):
        """Bytes of UTF-8 in each id's text, (n_vocab,) int64."""
        return np.array([len(self.decode_bytes([i])) if i in self.itos else 0 for i in range(self.n_vocab)],
                        dtype=np.int64)

    def to_dict(self):
        return {'kind': 'char', 'itos': self.itos}


class GPT2Tokenizer:
    """GPT-2's byte pair encoding, from tiktoken, which downloads its two files on first use."""
    n_vocab = GPT2_VOCAB

    @functools.cached_property
    def bpe(self):
        import tiktoken
        try:
            return tiktoken.get_encoding('gpt2')
        except OSError as error:
            raise FileNotFoundError(
                f'the GPT-2 BPE files can\'t be downloaded ({type(error).__name__}): connect once, or set '
                'TIKTOKEN_CACHE_DIR to a folder where tiktoken cached them') from None

    def encode(self, text):
        """Ids of a prompt, a list; <|endoftext|> in it is the special token."""
        return self.bpe.encode(text, allowed_special={'<|endoftext|>'})

    def encode_array(self, text):
        """Ids of a document, in which nothing is special, (N,) uint32; releases the GIL."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        return self.bpe.decode(ids)

    def decode_bytes(self, ids):
        """The text in UTF-8; a token may end within a character."""
        return self.bpe.decode_bytes(ids)

    def first_token(self):
        """The id before a text's first, <|endoftext|>."""
        return self.n_vocab - 1

    def token_bytes(self):
        """Bytes of UTF-8 in each id's text, (n_vocab,) int64; 0 for <|endoftext|>, which is no text."""
        tokens = map(self.bpe.decode_single_token_bytes, range(self.n_vocab - 1))
        return np.array([*map(len, tokens), 0], dtype=np.int64)

    def to_dict(self):
        return {'kind': 'gpt2'}


class NoTokenizer:
    """Of ids whose text isn't known: models train on them, but no text can be encoded or decoded."""

    def __init__(self, n_vocab):
        self.n_vocab = n_vocab

    def encode(self, text):
        raise ValueError('this model\'s tokens have no text: the meta.pkl of its data has no itos, a table '
                         'of ids and strings')

    decode = decode_bytes = encode

    def first_token(self):
        return 0

    def token_bytes(self):
        """(n_vocab,) int64"""
        return np.zeros(self.n_vocab, dtype=np.int64)

    def to_dict(self):
        return {'kind': 'none', 'n_vocab': self.n_vocab}


def tokenizer_from(state):
    """The inverse of `to_dict`; None stands for GPT-2's."""
    if state and state['kind'] == 'none':
        return NoTokenizer(state['n_vocab'])
    if state and state['kind'] == 'char':
        return CharTokenizer(state['itos'])
    return GPT2Tokenizer()


def read_tokenizer(data_dir):
    """The tokenizer of a dataset's folder."""
    meta = read_meta(data_dir)
    if meta is None:
        return GPT2Tokenizer()
    return CharTokenizer(meta['itos']) if meta['itos'] else NoTokenizer(meta['vocab_size'])


def read_meta(data_dir):
    """meta.pkl as a dict with 'vocab_size' and 'itos', {id: string} or {} if the file has none; None if there
    is no file. Raises ValueError if it is damaged, or missing where dataset.json says that the data is
    characters."""
    path = Path(data_dir, 'meta.pkl')
    if not path.is_file():
        if read_info(data_dir).get('tokenizer') == 'char':
            raise ValueError(f'{path} is missing, but dataset.json says that the tokens are characters: '
                             'prepare the data again, or delete dataset.json if it is not of this data')
        return None
    with explain_failure(f'{path} is not a character vocabulary'):
        meta = read_pickle(path.read_bytes())
        size = meta['vocab_size']
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise TypeError(f'vocab_size={size!r} is not a positive integer')
        stoi = meta.get('stoi')
        inverse = {i: c for c, i in stoi.items()} if isinstance(stoi, dict) else {}
        return {**meta, 'itos': strings_by_id(meta.get('itos'), size) or strings_by_id(inverse, size)}


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
