"""
Byte pair encodings of one's own: trained, or read from Hugging Face's tokenizer.json.

    tokenizer = train_bpe(texts, vocab_size=4096)  # texts: an iterable of strings
    tokenizer = BPETokenizer(Path('exported/tokenizer.json').read_text(encoding='utf-8'))
    tokenizer.decode(tokenizer.encode('To be'))

Tokens are strings of bytes, so every text can be encoded, and decoding gives it back.
"""

import functools
import json
import re

import numpy as np

from support.errors import UserError
from support.machine.files import explain_failure

MOST_IDS = 65536  # of uint16
END = '<|endoftext|>'
ENDS = (END, '<|end_of_text|>', '</s>', '<eos>')  # other tokenizers' names of it
PIECE = 1 << 16  # characters that are encoded at a time
END_OF_WORD = re.compile(r'(?<=[^\W\d_])(?=\W)')
NEARBY = 200  # characters on both sides of a cut that show whether it changes the tokens
# Parts of a text within which bytes may be joined: those of Qwen 3.5, which llama.cpp calls qwen35
PARTS = '|'.join((r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
                  r'[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+',  # a word, with the space before it
                  r'\p{N}',  # each digit by itself
                  r' ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*',  # punctuation, with the line ends after it
                  r'\s*[\r\n]+', r'\s+(?!\S)', r'\s+'))  # white space, the last of it to the next word
PROBE = 'Hello,  world! 12345\n\n\té naïve 한국어 日本語。 🙂  \r\n' + ''.join(map(chr, range(256)))

# GPT-2's characters for bytes, in tokenizer.json
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE = [b for b in range(256) if b not in PRINTABLE]
BYTES = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(UNPRINTABLE)}


class BPETokenizer:
    """A byte-level BPE. text: the content of a tokenizer.json. Raises ValueError if it is another tokenizer,
    changes texts, or has more entries than uint16 has numbers.

    end: the id of the token that ends a document, None if it has none. special: {name: id} of tokens that are
    no text. n_vocab: the largest id and 1.
    """

    def __init__(self, text):
        self.json = text
        with explain_failure('unreadable', Exception, passing=ValueError):  # the library raises this type
            content = json.loads(text)
            added = {t['content']: t for t in content.get('added_tokens') or ()}
            vocab = content['model']['vocab']
            ids = vocab | {name: t['id'] for name, t in added.items()}
            check_content(content, ids)
            self.n_vocab = max(ids.values()) + 1
            self.special = {name: t['id'] for name, t in added.items() if t.get('special')}
            self.end = next((self.special[name] for name in ENDS if name in self.special), None)
            self.texts = [b''] * self.n_vocab
            for name, i in ids.items():
                self.texts[i] = name.encode() if name in added else bytes(BYTES[c] for c in name)
            if missing := {bytes([b]) for b in range(256)} - {*self.texts}:
                raise UserError(f'it can\'t encode {len(missing)} of the 256 bytes')
            if self.decode(self.encode(PROBE)) != PROBE:
                raise UserError('decoding doesn\'t give the text back')

    @functools.cached_property
    def of_prompts(self):
        return build(self.json)

    @functools.cached_property
    def of_documents(self):
        library = build(self.json)
        library.encode_special_tokens = True  # as the text that they are
        return library

    @functools.cached_property
    def quick(self):
        """tiktoken's encoder, which takes a fifth of the time, for what `train_bpe` makes; None for others.

        It joins any two tokens whose joint bytes are a token, the library those in the list of merges. After
        training these are the same: how a token came about depends on its own bytes alone.
        """
        content = json.loads(self.json)
        joined = [''.join(m.split(' ') if isinstance(m, str) else m) for m in content['model']['merges']]
        vocab, special = content['model']['vocab'], {*self.special}
        made = sorted((t for t in vocab if len(t) > 1 and t not in special), key=vocab.get)
        is_ours = (made == joined and content.get('normalizer') is None
                   and {t['content'] for t in content['added_tokens']} == special
                   and content['pre_tokenizer'] == json.loads(untrained().to_str())['pre_tokenizer'])
        if not is_ours:
            return None
        import tiktoken
        return tiktoken.Encoding('own', pat_str=PARTS, special_tokens={}, mergeable_ranks={
            self.texts[i]: i for t, i in vocab.items() if t not in special})

    def encode(self, text):
        """Ids of a prompt, a list; the names of special tokens in it are these tokens."""
        return self.encode_with(self.of_prompts, text).tolist()

    def encode_array(self, text):
        """Ids of a document, in which nothing is special, (N,) uint16; releases the GIL."""
        if self.quick:
            return self.quick.encode_to_numpy(mended(text), disallowed_special=()).astype(np.uint16)
        return self.encode_with(self.of_documents, text)

    def encode_with(self, library, text):
        parts, batch = [np.empty(0, np.uint16)], []
        for piece in cut_text(library, mended(text)):
            batch.append(piece)
            if len(batch) == 64:
                parts, batch = parts + ids_of(library, batch), []
        return np.concatenate(parts + ids_of(library, batch))

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        """The text in UTF-8; a token may end within a character."""
        return b''.join(self.texts[i] for i in ids)

    def knows_text(self):
        """Whether `token_bytes` can be told without a download."""
        return True

    def first_token(self):
        """The id before a text's first: the end of the text before."""
        return self.end or 0

    def token_texts(self):
        """Each id's bytes of text; none for special tokens."""
        special = {*self.special.values()}
        return [b'' if i in special else t for i, t in enumerate(self.texts)]

    def token_bytes(self):
        """Bytes of UTF-8 in each id's text, (n_vocab,) int64."""
        return np.array([*map(len, self.token_texts())], dtype=np.int64)

    def with_special_tokens(self, names):
        """The same tokenizer with more special tokens, whose ids follow the largest."""
        library = build(self.json)
        library.add_special_tokens([*names])
        return BPETokenizer(library.to_str())

    def to_dict(self):
        return {'kind': 'bpe', 'json': self.json}


def check_content(content, ids):
    """ValueError if a tokenizer.json isn't a byte-level BPE. ids: {token: id}, added tokens included."""
    model, normalizer = content['model'], content.get('normalizer') or {'type': 'NFC'}
    if model.get('type', 'BPE') != 'BPE':
        raise UserError(f'its type is {model["type"]}')
    if len(ids) > MOST_IDS:
        raise UserError(f'it has {len(ids):,} entries, more than {MOST_IDS:,}, the numbers of uint16')
    if not all(isinstance(i, int) and 0 <= i < MOST_IDS for i in ids.values()):
        raise UserError(f'its ids are not all numbers from 0 to {MOST_IDS - 1:,}')
    added = {t['content'] for t in content.get('added_tokens') or ()}
    if not all(c in BYTES for token in ids.keys() - added for c in token):
        raise UserError('its tokens are not strings of bytes')
    if len({*ids.values()}) < len(ids):
        raise UserError('several of its tokens have one id')
    if model.get('dropout') or normalizer.get('type') != 'NFC':
        raise UserError(f'it changes texts: {"dropout" if model.get("dropout") else normalizer.get("type")}')


def mended(text):
    """A text with a replacement character for each half of a surrogate pair, which no UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def build(text):
    """The library's object of a tokenizer.json, which neither cuts nor pads."""
    from tokenizers import Tokenizer
    library = Tokenizer.from_str(text)
    library.no_truncation()
    library.no_padding()
    return library


def ids_of(library, texts):
    """Each text's ids, (N,) uint16."""
    return [np.array(e.ids, np.uint16) for e in library.encode_batch_fast(texts, add_special_tokens=False)]


def cut_text(library, text):
    """Yield a text in pieces of about PIECE characters, whose ids, joined, are those of the whole. A text
    without a place to cut it stays whole."""
    start = 0
    while len(text) - start > PIECE:
        ends = (found.start() for found in END_OF_WORD.finditer(text, start + PIECE))
        end = next((end for end in ends if is_cut(library, text, end)), len(text))
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def is_cut(library, text, at):
    """Whether the parts of a text before and after a position have the same ids apart as together."""
    before, after = text[max(0, at - NEARBY):at], text[at:at + NEARBY]
    whole, *parts = ids_of(library, [before + after, before, after])
    return np.array_equal(whole, np.concatenate(parts))


def train_bpe(texts, vocab_size, special_tokens=(END,)):
    """A BPETokenizer of at most vocab_size entries, the special ones first, then the 256 bytes; fewer if the
    texts have no more pairs that occur twice. texts: an iterable of strings, such as documents."""
    from tokenizers import pre_tokenizers, trainers
    check_vocab_size(vocab_size, special_tokens)
    library = untrained()
    pieces = (text[i:i + PIECE] for text in texts for i in range(0, len(text), PIECE))
    library.train_from_iterator(pieces, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[*special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return BPETokenizer(library.to_str())


def untrained():
    """The library's object of a byte-level BPE without entries."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PARTS), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    return library


def check_vocab_size(vocab_size, special_tokens=(END,)):
    """ValueError for a number of entries that no trained tokenizer can have."""
    if not 256 + len(special_tokens) <= vocab_size <= MOST_IDS:
        raise UserError(f'vocab_size={vocab_size} must be {256 + len(special_tokens)} (the bytes and '
                         f'{", ".join(special_tokens)}) to {MOST_IDS}')
