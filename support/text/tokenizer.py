"""
Text to token ids and back: a vocabulary of characters, GPT-2's byte pair encoding, or one's own (bpe.py).

    tokenizer = Dataset('data/shakespeare_char').tokenizer  # support/text/dataset.py
    tokenizer.decode(tokenizer.encode('To be'))
"""

import functools
import hashlib
import json
import os
import tempfile
import unicodedata
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.files import explain_failure
from support.text.bpe import END, MOST_IDS, BPETokenizer

GPT2_VOCAB = 50257  # BPE ids; the last, 50256, is <|endoftext|>
BPE_FILES = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'  # as tiktoken has it
PAD = '<pad>'  # of an exported vocabulary of characters; its id follows theirs
PADDED_GPT2_VOCAB = 50304  # the next multiple of 64, for speed


class CharTokenizer:
    """One id a character. itos: {id: character}."""
    end = None  # no token ends a document

    def __init__(self, itos):
        self.itos = itos
        self.stoi = {c: i for i, c in itos.items()}
        self.n_vocab = max(itos) + 1

    @classmethod
    def of_text(cls, text):
        return cls(dict(enumerate(sorted(set(text)))))

    def encode(self, text):
        if missing := sorted(set(text) - set(self.stoi)):
            raise UserError(f'not in this model\'s vocabulary: {" ".join(map(repr, missing[:10]))}'
                             + (f' and {len(missing) - 10:,} more' if len(missing) > 10 else '')
                             + self.advice(text))
        return [self.stoi[c] for c in text]

    def advice(self, text):
        """What to do about a text with unknown characters."""
        if set(unicodedata.normalize('NFC', text)) <= set(self.stoi):
            return ('; in Unicode\'s form NFC, which joins letters and accents, the text has only characters '
                    'that it knows: normalise it')
        known = ''.join(self.itos.values())
        return f'; it knows {known!r}' if len(known) <= 100 else f'; it knows {len(known):,} others'

    def decode(self, ids):
        return ''.join(self.itos[i] for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode('utf-8', errors='surrogatepass')

    def knows_text(self):
        return True

    def first_token(self):
        """The id before a text's first: a line end, if the vocabulary has it."""
        return self.stoi.get('\n', 0)

    def token_texts(self):
        """Each id's bytes of UTF-8; none for an id without a character."""
        return [self.decode_bytes([i]) if i in self.itos else b'' for i in range(self.n_vocab)]

    def token_bytes(self):
        """Bytes of UTF-8 in each id's text, (n_vocab,) int64."""
        return np.array([*map(len, self.token_texts())], dtype=np.int64)

    def to_dict(self):
        return {'kind': 'char', 'itos': self.itos}


class GPT2Tokenizer:
    """GPT-2's byte pair encoding, from tiktoken, which downloads its two files on first use."""
    n_vocab = GPT2_VOCAB
    end = GPT2_VOCAB - 1

    @functools.cached_property
    def bpe(self):
        import tiktoken
        try:
            return tiktoken.get_encoding('gpt2')
        except OSError as error:
            raise MissingFile(
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

    def knows_text(self):
        """Whether the files are here, so that nothing has to be downloaded."""
        folder = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get(
            'DATA_GYM_CACHE_DIR', os.path.join(tempfile.gettempdir(), 'data-gym-cache')))
        return all(os.path.isfile(os.path.join(folder, hashlib.sha1((BPE_FILES + name).encode()).hexdigest()))
                   for name in ('vocab.bpe', 'encoder.json'))

    def first_token(self):
        """The id before a text's first, <|endoftext|>."""
        return self.end

    def token_texts(self):
        """Each id's bytes of UTF-8; none for <|endoftext|>, which is no text."""
        return [*map(self.bpe.decode_single_token_bytes, range(self.end)), b'']

    def token_bytes(self):
        """Bytes of UTF-8 in each id's text, (n_vocab,) int64."""
        return np.array([*map(len, self.token_texts())], dtype=np.int64)

    def to_dict(self):
        return {'kind': 'gpt2'}


class NoTokenizer:
    """Of ids whose text isn't known: models train on them, but no text can be encoded or decoded. reason: why
    that is, for the error."""
    end = None

    def __init__(self, n_vocab, reason='the meta.pkl of its data has no itos, a table of ids and strings'):
        self.n_vocab, self.reason = n_vocab, reason

    def encode(self, text):
        raise UserError(f'this model\'s tokens have no text: {self.reason}')

    decode = decode_bytes = encode_array = encode

    def knows_text(self):
        return False

    def first_token(self):
        return 0

    def token_bytes(self):
        """(n_vocab,) int64"""
        return np.zeros(self.n_vocab, dtype=np.int64)

    def to_dict(self):
        return {'kind': 'none', 'n_vocab': self.n_vocab, 'reason': self.reason}


# ---------------------------------------------------------------------------- of checkpoints and files

def tokenizer_from(state):
    """The inverse of `to_dict`; None stands for GPT-2's."""
    with explain_failure('the checkpoint\'s tokenizer is damaged'):
        kind = state['kind'] if state else 'gpt2'
        if kind == 'none':
            return NoTokenizer(**{k: state[k] for k in ('n_vocab', 'reason') if k in state})
        if kind == 'char':
            return CharTokenizer(state['itos'])
        if kind == 'bpe':
            return BPETokenizer(state['json'])
    return GPT2Tokenizer()


def is_same_tokenizer(a, b):
    """Whether two tokenizers give the same ids, from what `to_dict` gives. Programs write the same
    tokenizer.json in several ways."""
    if a.get('kind') == b.get('kind') == 'bpe':
        return essence(a['json']) == essence(b['json'])
    return {k: v for k, v in a.items() if k != 'reason'} == {k: v for k, v in b.items() if k != 'reason'}


def essence(text):
    """What a tokenizer.json's ids depend on."""
    content = json.loads(text)
    merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in content['model']['merges']]
    added = {t['content']: t['id'] for t in content['added_tokens']}
    return content['model']['vocab'] | added, merges, content['pre_tokenizer'], content['normalizer']


TOKENIZER_FILES = ('tokenizer.json', 'vocab.json', 'vocab.txt', 'tokenizer.model', 'spiece.model')
# of a JSON list of GPT-2's tokens but <|endoftext|>, in the order of their ids
GPT2_VOCAB_SHA256 = '99fdfb25c091e0100c3c8e9acc75ccae2ae79452a199debf51d54f915043cd04'


def load_tokenizer(path):
    """The tokenizer of a file of TOKENIZER_FILES, or of a folder with one: GPT-2's, characters as export.py
    writes them, or a byte-level BPE. None if a folder has none. ValueError for any other."""
    path = Path(path)
    if path.is_dir():
        path = next((p for p in (path / name for name in TOKENIZER_FILES) if p.is_file()), None)
        return path and load_tokenizer(path)
    if not path.is_file():
        raise MissingFile(f'{path} is missing: name a tokenizer.json, or a folder with one')
    with explain_failure(f'{path} is neither GPT-2\'s tokenizer nor one of characters or a byte-level BPE'):
        text = path.read_text(encoding='utf-8')
        content = json.loads(text)
        if 'model' not in content:  # vocab.json
            if not is_gpt2_vocab(content):
                raise UserError(f'a vocabulary of {len(content):,}; AutoTokenizer of transformers makes a '
                                 'tokenizer.json of it')
            return GPT2Tokenizer()
        vocab, added = content['model']['vocab'], content.get('added_tokens') or ()
        if content['model'].get('type') == 'WordLevel':
            vocab.pop(PAD, None)
            if not all(isinstance(c, str) and len(c) == 1 and isinstance(i, int) and 0 <= i < MOST_IDS
                       for c, i in vocab.items()):
                raise UserError('its tokens are words')
            return CharTokenizer({i: c for c, i in vocab.items()})
        if {t['content'] for t in added} <= {END} and isinstance(vocab, dict) and is_gpt2_vocab(vocab):
            return GPT2Tokenizer()
        return BPETokenizer(text)


def is_gpt2_vocab(vocab):
    """Whether {token: id} is GPT-2's, with or without <|endoftext|>."""
    tokens = sorted((t for t in vocab if t != END), key=vocab.get)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest() == GPT2_VOCAB_SHA256 \
        and [vocab[t] for t in tokens] == [*range(len(tokens))]
