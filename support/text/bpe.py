"""
Tokenizers of one's own: a byte pair encoding trained here, or any tokenizer.json as it was
published.

    tokenizer = train_bpe(texts, vocab_size=4096)  # texts: an iterable of strings
    tokenizer = BPETokenizer(Path('exported/tokenizer.json').read_text(encoding='utf-8'))
    tokenizer.decode(tokenizer.encode('To be'))

The `tokenizers` library applies the file as it is: byte-level byte pairs with or without all 256
bytes (GPT-2, SmolLM, Llama 3, Qwen), SentencePiece's with byte fallback (Llama 2, Mistral), and
what else it knows.
"""

import contextlib
import functools
import json
import os
import re
import threading
import unicodedata
from collections import Counter

import numpy as np

from support.errors import UserError
from support.machine.console import print0
from support.machine.files import explain_failure

MOST_IDS = 65536  # of a tokenizer trained here: ids fit into uint16
LARGEST_ID = 1 << 22  # of a published one; the largest vocabularies have 262,144 entries
END = '<|endoftext|>'
ENDS = (END, '<|end_of_text|>', '</s>', '<eos>')  # other tokenizers' names of it
PIECE = 1 << 16  # characters that are encoded at a time
END_OF_WORD = re.compile(r'(?<=[^\W\d_])(?=\W)')
NEARBY = 200  # characters on both sides of a cut that show whether it changes the tokens
# Parts of a text within which bytes may be joined: those of Qwen 3.5, which llama.cpp calls qwen35
WORDS = '|'.join((r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
                  r'[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+',  # a word, with the space before it
                  r'\p{N}',  # each digit by itself
                  r' ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*',  # punctuation, with the line ends after it
                  r'\s*[\r\n]+'))
BLANKS = r'\s+(?!\S)|\s+'  # white space, its last to the next word
PARTS = f'{WORDS}|{BLANKS}'

# GPT-2's characters for bytes, in tokenizer.json
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE = [b for b in range(256) if b not in PRINTABLE]
BYTES = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(UNPRINTABLE)}
NO_TEXT = '\ufdd0'  # a code point that Unicode keeps free of characters


class BPETokenizer:
    """The tokenizer of a tokenizer.json, whose content is `text`. Raises ValueError if it can't be
    used.

    end: the id of the token that ends a document, None if it has none. ends: ids at which a sample
    ends, (end,) unless given. begin: the ids that the file puts before a text, [] for most.
    special: {name: id} of tokens that are no text. n_vocab: the largest id and 1.
    """

    def __init__(self, text, ends=()):
        self.json = text
        with explain_failure('unreadable', Exception, passing=ValueError):  # of the library
            content = json.loads(text)
            self.added = {t['content']: t for t in content.get('added_tokens') or ()}
            ids = build(text).get_vocab() if isinstance(content['model'], dict) else {}
            check_content(content, ids)
            self.n_vocab = max(ids.values()) + 1
            self.special = {name: t['id'] for name, t in self.added.items() if t.get('special')}
            named = next((self.special[name] for name in ENDS if name in self.special), None)
            self.ends = tuple(i for i in ends if 0 <= i < self.n_vocab)
            if not self.ends and named is not None:
                self.ends = (named,)
            self.end = self.ends[0] if named is None and self.ends else named
            self.is_nfc = '"NFC"' in json.dumps(content.get('normalizer'))
            self.texts = [b''] * self.n_vocab
            for name, i in ids.items():
                self.texts[i] = name.encode() if name in self.added else name
            self.texts = bytes_of_tokens(self.texts, content.get('decoder'), self.of_prompts)
            self.begin = self.ids_before_text()
            self.strips = self.join(self.encode('a')) == b' a'  # it puts a space before each text
        self.n_seen, self.n_changed, self.has_said = 0, 0, set()

    @functools.cached_property
    def of_prompts(self):
        return build(self.json)

    @functools.cached_property
    def of_documents(self):
        library = build(self.json)
        library.encode_special_tokens = True  # as the text that they are
        return library

    @functools.cached_property
    def of_messages(self):
        """Like `of_prompts`, with a token more, NO_TEXT, which parts what would be joined."""
        library = build(self.json)
        library.add_special_tokens([NO_TEXT])
        return library

    @functools.cached_property
    def quick(self):
        """tiktoken's encoder, much quicker than the library, for what `train_bpe` makes; None for
        others.

        It joins any two tokens whose joint bytes are a token, the library those in the list of
        merges. After training these are the same: how a token came about depends on its own bytes
        alone.
        """
        content = json.loads(self.json)
        if content.get('pre_tokenizer') != json.loads(untrained().to_str())['pre_tokenizer']:
            return None
        joined = [''.join(m.split(' ') if isinstance(m, str) else m)
                  for m in content['model']['merges']]
        vocab, special = content['model']['vocab'], {*self.special}
        made = sorted((t for t in vocab if len(t) > 1 and t not in special), key=vocab.get)
        has_bytes = {bytes([b]) for b in range(256)} <= {*self.texts}
        if not has_bytes or made != joined or content.get('normalizer') or {*self.added} != special:
            return None
        return quick_encoding(WORDS, BLANKS, {self.texts[i]: i for t, i in vocab.items()
                                              if t not in special})

    def encode(self, text):
        """Ids of a prompt without `begin`, a list; the names of special tokens in it are these
        tokens."""
        return self.encode_with(self.of_prompts, text).tolist()

    def encode_array(self, text):
        """Ids of a document, in which nothing is special, (N,) uint32; releases the GIL. Raises
        ValueError if more than a hundredth of what it was given doesn't come back when the ids are
        decoded."""
        if self.quick:
            with contextlib.suppress(ValueError):  # a million blanks exceed its stack
                ids = self.quick.encode_to_numpy(replace_surrogates(text), disallowed_special=())
                return ids.astype(np.uint32)
        ids = self.encode_with(self.of_documents, text)
        self.check_kept(replace_surrogates(text), ids)
        return ids

    def encode_with(self, library, text):
        parts, batch = [np.empty(0, np.uint32)], []
        for piece in cut_text(library, replace_surrogates(text)):
            batch.append(piece)
            if len(batch) == 64:
                parts, batch = parts + ids_of(library, batch), []
        return np.concatenate(parts + ids_of(library, batch))

    def encode_parts(self, parts):
        """ids, (N,) uint32, and the first and last part that each belongs to, of a text in parts:
        (text, is_template). Names of added tokens are these tokens in the template's text, and text
        elsewhere."""
        if self.quick and all(text in self.special for text, is_template in parts if is_template):
            return self.encode_between_tokens(parts)
        names = sorted((name for name in self.added if name.strip()), key=len, reverse=True)
        texts = [text if is_template else parted(text, names) for text, is_template in parts]
        with explain_panic(texts):
            found = self.of_messages.encode(''.join(texts), add_special_tokens=False)
            plain = ''.join(text if is_template else 'x' for text, is_template in parts)
            expected = self.of_messages.encode(plain, add_special_tokens=False).ids
        ids, spans = np.array(found.ids, np.int64), np.array(found.offsets, np.int64).reshape(-1, 2)
        markers = {self.added[name]['id'] for name in names}
        if [i for i in found.ids if i in markers] != [i for i in expected if i in markers]:
            raise UserError('a message becomes a token of the chat template when it is encoded; '
                            'reword it')
        ends = np.cumsum([*map(len, texts)])
        keep = ids != self.of_messages.token_to_id(NO_TEXT)
        first, last = (np.searchsorted(ends, at, side='right')[keep]
                       for at in (spans[:, 0], np.maximum(spans[:, 0], spans[:, 1] - 1)))
        return ids[keep].astype(np.uint32), first, last

    def encode_between_tokens(self, parts):
        """The same, much quicker, where each part of the template is a special token."""
        encoded = [[self.special[text]] if is_template else
                   self.encode_array(text.replace(NO_TEXT, '')) for text, is_template in parts]
        of_part = np.repeat(np.arange(len(parts)), [*map(len, encoded)])
        return np.concatenate(encoded).astype(np.uint32), of_part, of_part

    def check_kept(self, text, ids):
        """Print, once, how decoding differs from the text. ValueError if that is too much."""
        text, found = unicodedata.normalize('NFC', text) if self.is_nfc else text, self.decode(ids)
        self.n_seen += len(text)
        if found == text:
            return
        lost = Counter(text)
        lost.subtract(Counter(found))
        self.n_changed += sum(n for n in lost.values() if n > 0)
        differing = (i for i, (a, b) in enumerate(zip(text, found)) if a != b)
        at = next(differing, min(len(text), len(found)))
        near = slice(max(0, at - 10), at + 10)
        place = f'{text[near]!r} came back as {found[near]!r}'
        if self.n_changed > max(100, self.n_seen / 100):
            raise UserError(f'the tokenizer changes or drops {self.n_changed:,} of {self.n_seen:,} '
                            f'characters: {place}. Take another --tokenizer')
        say_once(self, 'changes', f'the tokenizer changes or drops some of the text: {place}')

    def ids_before_text(self):
        """What the file's post-processor puts before a text."""
        whole = self.of_prompts.encode('a').ids
        alone = self.of_prompts.encode('a', add_special_tokens=False).ids
        return next((whole[:i] for i in range(len(whole)) if whole[i:i + len(alone)] == alone), [])

    def join(self, ids):
        return b''.join([self.texts[i] for i in ids])

    def decode(self, ids):
        text = self.join(ids).decode('utf-8', errors='replace')
        return text.removeprefix(' ') if self.strips else text

    def decode_bytes(self, ids):
        """The text in UTF-8, without `begin`; a token may end within a character."""
        n = len(self.begin)
        if n and [*ids[:n]] == self.begin:
            return self.join(ids[n:]).removeprefix(b' ' if self.strips else b'')
        return self.join(ids)

    def knows_text(self):
        """Whether `token_bytes` can be told without a download."""
        return True

    def first_token(self):
        """The id before a text's first: what begins a text, else what ends the one before."""
        return self.begin[-1] if self.begin else self.end or 0

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
        return BPETokenizer(library.to_str(), self.ends)

    def to_dict(self):
        return {'kind': 'bpe', 'json': self.json, 'ends': [*self.ends]}


def quick_encoding(words, blanks, ranks):
    """A tiktoken.Encoding in which nothing is special. words, blanks: regular expressions of a
    text's parts; only the second look ahead. ranks: {bytes: id}

    In brackets of their own, the words are found by an automaton, without backtracking. A special
    token that isn't used is quicker than none: tiktoken would find none at every place.
    """
    import tiktoken
    return tiktoken.Encoding('quick', pat_str=f'(?:{words})|{blanks}', mergeable_ranks=ranks,
                             special_tokens={END: max(ranks.values()) + 1})


def say_once(tokenizer, subject, line):
    """Print a line about a tokenizer once for each subject."""
    if subject not in tokenizer.has_said:
        tokenizer.has_said.add(subject)
        print0(line)


def say_of_end(tokenizer, text):
    """Print, once, that a document holds the name of the token that ends documents."""
    name = next((name for name, i in tokenizer.special.items() if i == tokenizer.end), None)
    if name and name in text:
        say_once(tokenizer, 'end', f'{name} in the data is encoded as the text that it is; in a '
                                   'prompt it is the token that ends a document')


def check_content(content, ids):
    """ValueError for a tokenizer.json whose ids can't be used. ids: {token: id}, added tokens
    included."""
    if not ids:
        raise UserError('it has no entries')
    if not all(0 <= i < LARGEST_ID for i in ids.values()):
        raise UserError(f'its ids are not all numbers from 0 to {LARGEST_ID - 1:,}')
    if len({*ids.values()}) < len(ids):
        raise UserError('several of its tokens have one id')
    if content['model'].get('dropout'):
        raise UserError('it gives a text other ids each time: dropout')


def bytes_of_tokens(names, decoder, library):
    """Each id's bytes of text. names: the vocabulary's strings; what is bytes already stays as it
    is."""
    how = json.dumps(decoder)
    if '"ByteLevel"' in how:
        return [t if isinstance(t, bytes) else bytes_of(t) for t in names]
    if '\u2581' in json.dumps(decoder, ensure_ascii=False):  # SentencePiece's mark of a space
        single = {f'<0x{b:02X}>': bytes([b]) for b in range(256) if '"ByteFallback"' in how}
        return [t if isinstance(t, bytes) else single.get(t, t.replace('\u2581', ' ').encode())
                for t in names]
    # what an id adds to the text of the one before it
    first = next(i for i, t in enumerate(names) if isinstance(t, str))
    before = library.decode([first], skip_special_tokens=False)
    return [t if isinstance(t, bytes) else
            library.decode([first, i], skip_special_tokens=False)[len(before):].encode()
            for i, t in enumerate(names)]


def bytes_of(name):
    """The bytes of a byte-level token; a character that stands for no byte is itself."""
    return b''.join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in name)


def parted(text, names):
    """A text with NO_TEXT inside each of the names, so that they aren't found."""
    text = replace_surrogates(text).replace(NO_TEXT, '')
    for name in names:
        text = text.replace(name, name[0] + NO_TEXT + name[1:])
    return text


def replace_surrogates(text):
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
    """Each text's ids, (N,) uint32."""
    with explain_panic(texts):
        encoded = library.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(e.ids, np.uint32) for e in encoded]


@contextlib.contextmanager
def explain_panic(texts):
    """A ValueError of one line in place of a panic of Rust, which is a BaseException and prints its
    stack."""
    is_main = threading.current_thread() is threading.main_thread()  # others may print meanwhile
    try:
        with quiet_stderr() if is_main else contextlib.nullcontext():
            yield
    except BaseException as error:
        if type(error).__name__ != 'PanicException':
            raise
        raise UserError(f'the tokenizer fails on the text that begins {texts[0][:40]!r} ({error}): '
                        'take another --tokenizer, or leave that text out') from None


@contextlib.contextmanager
def quiet_stderr():
    """Without what libraries print on the process's stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cut_text(library, text):
    """Yield a text in pieces of about PIECE characters, whose ids, joined, are those of the whole.
    A text without a place to cut it stays whole."""
    start = 0
    while len(text) - start > PIECE:
        ends = (found.start() for found in END_OF_WORD.finditer(text, start + PIECE))
        found = ((end, skip) for end in ends for skip in (0, 1) if is_cut(library, text, end, skip))
        end, skip = next(found, (len(text), 0))
        yield text[start:end]
        start = end + skip
    if start < len(text):
        yield text[start:]


def is_cut(library, text, at, skip=0):
    """Whether the parts of a text before and after a position have the same ids apart as together.
    skip: 1 leaves out a space there, which the tokenizer puts before each text by itself."""
    before, after = text[max(0, at - NEARBY):at], text[at:at + NEARBY]
    if skip and after[0] != ' ':
        return False
    whole, *parts = ids_of(library, [before + after, before, after[skip:]])
    return np.array_equal(whole, np.concatenate(parts))


def train_bpe(texts, vocab_size, special_tokens=(END,)):
    """A BPETokenizer of at most vocab_size entries, the special ones first, then the 256 bytes;
    fewer if the texts have no more pairs that occur twice. texts: an iterable of strings, such as
    documents."""
    from tokenizers import pre_tokenizers, trainers
    check_vocab_size(vocab_size, special_tokens)
    library = untrained()
    pieces = (text[i:i + PIECE] for text in texts for i in range(0, len(text), PIECE))
    library.train_from_iterator(pieces, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False,
        special_tokens=[*special_tokens],
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
