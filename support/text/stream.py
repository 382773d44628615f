"""
A text that is never held whole: counted, divided and encoded in pieces, by all cores, in order.

    found = survey(text)                    # text: an iterable of strings, the same ones each time
    train, val = divide(text, found.n_characters * 9 // 10)  # read one after the other
    for part in encode_all(train, coder):   # Encoded
"""

import functools
import itertools
import os
import re
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from support.text.bpe import BPETokenizer, say_of_end
from support.text.tokenizer import CharTokenizer

BLOCK = 1 << 20  # characters that are encoded at a time
LONGEST = 1 << 21  # characters without a place to cut, which are then cut all the same
TRIES = 1000  # places to cut that are looked at before more of the text is read
NEARBY = 200  # characters on both sides of a cut that show whether it changes the tokens
# between a word and the space after it, a word and punctuation, a line end and what follows
PLACES = re.compile(r'(?<=\S)(?= )|(?<=[^\W_])(?=[\n,.;:!?，。、；：！？])|(?<=\n)(?=\S)')


class Encoded(NamedTuple):
    """Token ids, (N,) uint16 or uint32, and the number of characters and bytes of their text."""
    ids: np.ndarray
    n_characters: int
    n_bytes: int  # in UTF-8


# ---------------------------------------------------------------------------- reading a text once

@dataclass
class Survey:
    """What a text has. crc32: of its UTF-8. characters: the different ones, if asked for."""
    n_characters: int = 0
    crc32: int = 0
    characters: set = field(default_factory=set)

    def mark(self):
        """What tells this text from others."""
        return f'{self.n_characters}-{self.crc32:08x}'


def survey(text, with_characters=False):
    """A Survey of an iterable of strings."""
    found, known = Survey(), b''  # known: ASCII bytes that have occurred
    for piece in text:
        data = piece.encode('utf-8', 'surrogatepass')
        found.n_characters += len(piece)
        found.crc32 = zlib.crc32(data, found.crc32)
        if not with_characters:
            continue
        if not piece.isascii():
            found.characters |= different_characters(piece)
        elif new := data.translate(None, known):
            known = bytes({*known, *new})
    found.characters |= {chr(byte) for byte in known}
    return found


def different_characters(text):
    if len(text) < 1 << 14:
        return {*text}
    occurs = np.zeros(0x110000, bool)
    occurs[code_points(text)] = True
    return {*map(chr, np.flatnonzero(occurs).tolist())}


def code_points(text):
    """(N,) uint32"""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')


def divide(text, n):
    """Two iterables of strings, to be read one after the other: the first n characters, and the
    rest."""
    pieces, rest = iter(text), []

    def first():
        left = n
        for piece in pieces:
            yield piece[:left]
            if len(piece) >= left:
                rest.append(piece[left:])
                return
            left -= len(piece)

    return first(), itertools.chain(rest, pieces)


def spread(text, n, at_most, n_spans=64):
    """Yield the n characters of a text if they are at most `at_most`, else as many in spans that
    are spread over them, all in strings of some size."""
    if n <= at_most:
        starts, size = [0], n
    else:
        size = at_most // n_spans
        starts = np.linspace(0, n - size, n_spans, dtype=np.int64).tolist()
    spans, at = deque((start, start + size) for start in starts), 0
    for piece in text:
        while spans and spans[0][0] < at + len(piece):
            start, stop = spans.popleft()
            yield piece[max(0, start - at):stop - at]
            if stop > at + len(piece):
                spans.appendleft((at + len(piece), stop))
                break
        at += len(piece)
        if not spans:
            return


def resized(strings, size):
    """Yield the same text in strings of `size` characters; the last may be shorter."""
    held = ''
    for string in strings:
        held += string
        whole = len(held) - len(held) % size
        yield from (held[i:i + size] for i in range(0, whole, size))
        held = held[whole:]
    if held:
        yield held


# ---------------------------------------------------------------------------- encoding

def encode_all(text, coder, n_characters=None, name=None):
    """Yield the tokens of a text in order, as Encoded, with the ids that the whole text has.
    n_characters and name are for the progress bar."""
    encode = functools.partial(encode_block, encoder(coder))
    n_threads = 2 if has_threads(coder) else n_cores()
    with tqdm(total=n_characters, unit=' characters', unit_scale=True, desc=name, delay=1) as bar:
        for part in map_in_threads(encode, blocks(text, cutter(coder)), n_threads):
            yield part
            bar.update(part.n_characters)


def map_in_threads(function, items, n_threads=0, at_a_time=1):
    """Yield function(item) for each item, in order. n_threads: 0 for one a core. at_a_time: items
    that a thread takes together, and n_threads + 2 times as many are read ahead at most."""
    n_threads = n_threads or n_cores()
    items, waiting, pool = iter(items), deque(), ThreadPoolExecutor(n_threads)
    groups = iter(lambda: [*itertools.islice(items, at_a_time)], [])
    try:
        for group in groups:
            waiting.append(pool.submit(lambda group: [*map(function, group)], group))
            if len(waiting) > n_threads + 2:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C doesn't wait for the rest


def encode_block(encode, text):
    return Encoded(encode(text), len(text), len(text.encode('utf-8', 'surrogatepass')))


def n_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def dtype_for(coder):
    return np.uint16 if coder.n_vocab <= 1 << 16 else np.uint32


def encoder(coder):
    """A function from a string to its ids, an array."""
    if is_of_characters(coder):
        return table_encoder(coder)
    if hasattr(coder, 'encode_array'):
        return lambda text: encode_document(coder, text)
    return lambda text: np.array(coder.encode(text), np.uint32)


def encode_document(coder, text):
    """Ids of a text in which nothing is special, which is said once if it has the name of an end."""
    say_of_end(coder, text)
    return coder.encode_array(text)


def has_threads(coder):
    """Whether a tokenizer uses all cores by itself: one of the library's."""
    return isinstance(coder, BPETokenizer) and not coder.quick


def is_of_characters(coder):
    """Whether each token is a character, so that a text may be cut anywhere."""
    return isinstance(coder, CharTokenizer) and all(len(c) == 1 for c in coder.stoi)


def table_encoder(coder):
    """The ids of a CharTokenizer by tables: of code points, and of ASCII bytes if its ids are
    bytes too. Characters that it doesn't know become 0."""
    table = np.zeros(max(map(ord, coder.stoi)) + 1, dtype_for(coder))
    table[[*map(ord, coder.stoi)]] = [*coder.stoi.values()]
    of_bytes = np.zeros(256, np.uint8)
    of_bytes[:min(128, len(table))] = table[:128]
    has_bytes, of_bytes = table[:128].max() < 256, of_bytes.tobytes()

    def encode(text):
        if has_bytes and text.isascii():
            return np.frombuffer(text.encode().translate(of_bytes), np.uint8).astype(table.dtype)
        return table[code_points(text)]
    return encode


def blocks(text, cut):
    """Yield a text in blocks that can be encoded apart. cut: a function that yields a string's
    parts, of which the last may go on."""
    held = ''
    for piece in text:
        *whole, held = cut(held + piece)
        yield from whole
        if len(held) > LONGEST:
            print(f'{LONGEST:,} characters without a place to cut them, beginning with '
                  f'{held[:40]!r}, were cut all the same; a token there may be another')
            yield held
            held = ''
    if held:
        yield held


def cutter(coder):
    """The function `cut` of `blocks`, so that the ids are those of the whole text."""
    if is_of_characters(coder):
        return lambda text: [*(text[i:i + BLOCK] for i in range(0, len(text), BLOCK)), '']
    encode = encoder(coder)
    if has_threads(coder):
        encode = functools.partial(coder.encode_with, coder.of_documents)
    return lambda text: cut_words(encode, text)


def cut_words(encode, text):
    """Yield a text in parts of about BLOCK characters and the rest, cut where that changes no
    token."""
    start = 0
    while len(text) - start > BLOCK + NEARBY:
        places = PLACES.finditer(text, start + BLOCK, len(text) - NEARBY)
        ends = ((place.start(), skip) for place in itertools.islice(places, TRIES)
                for skip in (1, 0) if is_cut(encode, text, place.start(), skip))
        end, skip = next(ends, (None, 0))
        if end is None:
            break
        yield text[start:end]
        start = end + skip
    yield text[start:]


def is_cut(encode, text, at, skip):
    """Whether the parts of a text before and after a position have the same ids apart as
    together. skip: 1 leaves out a space there, which some tokenizers put before each text by
    themselves."""
    before, after = text[max(0, at - NEARBY):at], text[at:at + NEARBY]
    if skip and after[0] != ' ':
        return False
    whole, *parts = (encode(part) for part in (before + after, before, after[skip:]))
    return np.array_equal(whole, np.concatenate(parts))
