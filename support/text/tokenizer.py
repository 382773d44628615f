"""
Text to token ids and back: a vocabulary of characters or words, GPT-2's byte pair encoding, or
one's own (bpe.py).

    tokenizer = Dataset('data/shakespeare_char').tokenizer  # support/text/dataset.py
    tokenizer.decode(tokenizer.encode('To be'))

Every tokenizer has `begin`, the ids that its model expects before a text, `end`, the id that ends a
document, or None, and `ends`, those at which a sample ends.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
import unicodedata
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.files import explain_failure, read_bytes, regular_file
from support.text.bpe import END, LARGEST_ID, BPETokenizer, quick_encoding

GPT2_VOCAB = 50257  # BPE ids; the last, 50256, is <|endoftext|>
BPE_FILES = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'  # as tiktoken has it
PAD = '<pad>'  # of an exported vocabulary of characters; its id follows theirs
PADDED_GPT2_VOCAB = 50304  # the next multiple of 64, for speed
# the parts of a text within which GPT-2 joins bytes, as tiktoken has them
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
GPT2_BLANKS = r'\s++$|\s+(?!\S)|\s'


class CharTokenizer:
    """One id a character, or a word of a vocabulary that somebody else made. itos: {id: string}; an id
    that is missing there has no text. Of words without white space, white space in a text only
    separates them."""
    begin, end, ends, special = (), None, (), {}  # no token ends a document

    def __init__(self, itos):
        self.itos = itos
        self.stoi = {c: i for i, c in itos.items()}
        self.n_vocab = max(itos) + 1
        self.has_words = any(len(c) > 1 for c in self.stoi)
        has_space = any(re.search(r'\s', c) for c in self.stoi)
        self.space = ' ' * (self.has_words and not has_space)

    @classmethod
    def of_text(cls, text):
        return cls(dict(enumerate(sorted(set(text)))))

    @functools.cached_property
    def longest(self):
        """Finds the longest entry at the beginning of a text, else a character."""
        entries = sorted(filter(None, self.stoi), key=len, reverse=True)
        return re.compile('|'.join((*map(re.escape, entries), r'[\s\S]')))

    def split(self, text):
        if not self.has_words:
            return text
        return text.split() if self.space else self.longest.findall(text)

    def encode(self, text):
        parts = self.split(text)
        if missing := sorted(set(parts) - set(self.stoi)):
            raise UserError(f'not in this model\'s vocabulary: {" ".join(map(repr, missing[:10]))}'
                             + (f' and {len(missing) - 10:,} more' if len(missing) > 10 else '')
                             + self.advice(text))
        return [self.stoi[c] for c in parts]

    def advice(self, text):
        """What to do about a text with unknown characters."""
        if set(self.split(unicodedata.normalize('NFC', text))) <= set(self.stoi):
            return ('; in Unicode\'s form NFC, which joins letters and accents, the text has only characters '
                    'that it knows: normalise it')
        known = self.space.join(self.itos.values())
        return f'; it knows {known!r}' if len(known) <= 100 else f'; it knows {len(known):,} others'

    def decode(self, ids):
        return self.space.join(self.itos.get(i, '') for i in ids)

    def decode_bytes(self, ids):
        text = ''.join(self.itos.get(i, '') + self.space for i in ids)
        return text.encode('utf-8', errors='surrogatepass')

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
    begin, end, ends, special = (), GPT2_VOCAB - 1, (GPT2_VOCAB - 1,), {END: GPT2_VOCAB - 1}

    def __init__(self):
        self.has_said = set()

    @functools.cached_property
    def bpe(self):
        import tiktoken
        try:
            return tiktoken.get_encoding('gpt2')
        except OSError as error:
            raise MissingFile(
                f'the GPT-2 BPE files can\'t be downloaded ({type(error).__name__}): connect once, or set '
                'TIKTOKEN_CACHE_DIR to a folder where tiktoken cached them') from None

    @functools.cached_property
    def quick(self):
        """The same tokenizer for documents, in two thirds of the time."""
        return quick_encoding(GPT2_WORDS, GPT2_BLANKS, self.bpe._mergeable_ranks)

    @functools.cached_property
    def slower(self):
        """The same tokenizer without tiktoken's limit: its stack holds less than a million
        blanks."""
        return BPETokenizer(gpt2_json())

    def encode(self, text):
        """Ids of a prompt, a list; <|endoftext|> in it is the special token."""
        try:
            return self.bpe.encode(text, allowed_special={END})
        except ValueError:
            return self.slower.encode(text)

    def encode_array(self, text):
        """Ids of a document, in which nothing is special, (N,) uint32; releases the GIL."""
        try:
            return self.quick.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            return self.slower.encode_array(text)

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


@functools.cache
def gpt2_json():
    """GPT-2's tokenizer, which tiktoken has, as the text of a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    ranks = GPT2Tokenizer().bpe._mergeable_ranks  # {bytes: id}; 188 to 255 are unprintable bytes
    shown = {t: chr(t[0] if i < 188 else 256 + i - 188) for t, i in ranks.items() if len(t) == 1}
    names = {token: ''.join(shown[bytes([b])] for b in token) for token in ranks}
    merges = [tuple(names[part] for part in last_merge(token, ranks))
              for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    library = Tokenizer(models.BPE({names[t]: i for t, i in ranks.items()}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END])
    return library.to_str(pretty=True)


def last_merge(token, ranks):
    """The two parts that byte pair encoding joins last to a token, bytes each. ranks: {bytes:
    rank}"""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


class NoTokenizer:
    """Of ids whose text isn't known: models train on them, but no text can be encoded or decoded.
    reason: why that is, for the error."""
    begin, end, ends, special = (), None, (), {}

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
            return BPETokenizer(state['json'], state.get('ends', ()))
    return GPT2Tokenizer()


def is_same_tokenizer(a, b):
    """Whether two tokenizers give the same ids, from what `to_dict` gives. Programs write the same
    tokenizer.json in several ways."""
    if a.get('kind') == b.get('kind') == 'bpe':
        return what_ids_depend_on(a['json']) == what_ids_depend_on(b['json'])
    return {k: v for k, v in a.items() if k != 'reason'} == {k: v for k, v in b.items() if k != 'reason'}


def what_ids_depend_on(text):
    """What a tokenizer.json's ids depend on."""
    content = json.loads(text)
    merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m)
              for m in content['model'].get('merges', ())]
    added = {t['content']: t['id'] for t in content['added_tokens']}
    vocab = content['model']['vocab']
    return dict(vocab) | added, merges, content['pre_tokenizer'], content['normalizer']


TOKENIZER_FILES = ('tokenizer.json', 'vocab.json', 'encoder.json', 'vocab.txt', 'tokenizer.model',
                   'spiece.model')
# of a JSON list of GPT-2's tokens but <|endoftext|>, in the order of their ids
GPT2_VOCAB_SHA256 = '99fdfb25c091e0100c3c8e9acc75ccae2ae79452a199debf51d54f915043cd04'


def load_tokenizer(path, ends=()):
    """The tokenizer of a file of TOKENIZER_FILES, or of a folder with one. None if a folder has
    none. ends: ids at which samples end; by default those of the model beside it. ValueError for
    one that can't be used."""
    path = Path(path)
    if path.is_dir():
        file = next((p for p in (path / name for name in TOKENIZER_FILES) if regular_file(p)), None)
        return file and load_tokenizer(file)
    if not regular_file(path):
        raise MissingFile(f'{path} is missing: name a tokenizer.json, or a folder with one')
    with explain_failure(f'{path} holds no tokenizer that can be used'):
        text = read_bytes(path).decode('utf-8-sig') if path.suffix.lower() == '.json' else '{}'
        content = json.loads(text)
        if is_gpt2_vocab(content):  # OpenAI's vocab.json or encoder.json
            return GPT2Tokenizer()
        if path.name != 'tokenizer.json' and not isinstance(content.get('model'), dict):
            text = converted(path)
        return of_json(text, ends or end_ids(path.parent))


def of_json(text, ends=()):
    """The tokenizer of a tokenizer.json: of characters or words, as export.py writes them, GPT-2's,
    or any other."""
    content = json.loads(text)
    vocab, added = content['model']['vocab'], content.get('added_tokens') or ()
    if content['model'].get('type') == 'WordLevel' and {t['content'] for t in added} <= {PAD}:
        itos = {i: c for c, i in vocab.items() if c != PAD}
        if not all(isinstance(i, int) and 0 <= i < LARGEST_ID for i in itos):
            raise UserError(f'its ids are not all numbers from 0 to {LARGEST_ID - 1:,}')
        return CharTokenizer(itos)
    if {t['content'] for t in added} <= {END} and isinstance(vocab, dict) and is_gpt2_vocab(vocab):
        return GPT2Tokenizer()
    return BPETokenizer(text, ends)


def converted(path):
    """An older layout of files, such as vocab.json and merges.txt or a tokenizer.model, as the text
    of a tokenizer.json, by transformers."""
    from transformers import AutoTokenizer, GPT2Tokenizer as ByteLevel, logging
    logging.set_verbosity_error()
    merges = path.with_name('merges.txt')
    with explain_failure('transformers makes no tokenizer.json of it', Exception):
        has_config = path.with_name('config.json').is_file()
        if path.name == 'vocab.json' and merges.is_file() and not has_config:
            theirs = ByteLevel(vocab=str(path), merges=str(merges))
        else:
            theirs = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)
        return theirs.backend_tokenizer.to_str()


def end_ids(folder):
    """Ids at which the samples of a folder's model end: those of its generation_config.json, else
    of its config.json."""
    for name in ('generation_config.json', 'config.json'):
        path = Path(folder, name)
        if regular_file(path):
            with explain_failure(f'{path} can\'t be read'):
                ids = json.loads(read_bytes(path)).get('eos_token_id')
            ids = ids if isinstance(ids, list) else [ids]
            if ids := tuple(i for i in ids if isinstance(i, int)):
                return ids
    return ()


def is_gpt2_vocab(vocab):
    """Whether {token: id} is GPT-2's, with or without <|endoftext|>."""
    if not isinstance(vocab, dict) or len(vocab) - (END in vocab) != GPT2_VOCAB - 1:
        return False
    tokens = sorted((t for t in vocab if t != END), key=vocab.get)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest() == GPT2_VOCAB_SHA256 \
        and [vocab[t] for t in tokens] == [*range(len(tokens))]
