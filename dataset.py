"""
What the numbers on disk mean: token files, tokenizers, and which windows make a batch.

A dataset is a folder, `data/<name>/`:
    train.bin, val.bin   token ids, uint16 in machine order, no header; or, of either, train_000.bin,
                         train_001.bin, ..., the same cut in files of any size
    meta.pkl             character data only: {'vocab_size': int, 'itos': {id: char}, 'stoi': {char: id}}
    dataset.json         what it is and where it comes from; optional
Without meta.pkl the ids are GPT-2 BPE. `write_dataset` writes such a folder, `open_split` reads one.

Batches are functions, not state: the windows of iteration n follow from (seed, n) alone.
"""

import functools
import hashlib
import http.client
import io
import json
import os
import pickle
import socket
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

GPT2_VOCAB = 50257  # BPE ids, the last of which, 50256, ends a text
PADDED_GPT2_VOCAB = 50304  # the next multiple of 64, for speed
TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
                    'data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')  # sha256


# ---------------------------------------------------------------------------- reading

def open_split(data_dir, split):
    """The tokens of `split` ('train' or 'val') as a read-only array, (N,) uint16: a memory map of SPLIT.bin,
    or Shards of SPLIT_000.bin, SPLIT_001.bin, ...

    Raises FileNotFoundError or ValueError, in one line, for a file that is missing, empty, of an odd
    size, or not the size that dataset.json tells.
    """
    path = Path(data_dir, f'{split}.bin')
    shards = sorted(Path(data_dir).glob(f'{split}_[0-9][0-9][0-9].bin'))
    if path.is_file() and shards:
        raise ValueError(f'{data_dir} has {path.name} and {shards[0].name}: remove one or the other')
    for i, shard in enumerate(shards):
        if int(shard.stem.removeprefix(f'{split}_')) != i:
            missing = path.with_name(f'{split}_{i:03}.bin')
            raise FileNotFoundError(f'{missing} is missing, {shard.name} is there')
    if not path.is_file() and not shards:
        prepare = Path(data_dir, 'prepare.py')
        how = f'run: python {prepare}' if prepare.is_file() else 'see "Your own text" in README.md'
        raise FileNotFoundError(f'{path} is missing; {how}')
    tokens = Shards(shards) if shards else open_tokens(path)
    expected = read_info(data_dir).get('tokens', {}).get(split, len(tokens))
    if len(tokens) != expected:
        raise ValueError(f'{path} has {len(tokens):,} tokens, but dataset.json says {expected:,}: truncated. '
                         'Prepare it again')
    return tokens


def count_tokens(path):
    """Tokens of a file, by its size."""
    size = path.stat().st_size
    if size % 2 or size == 0:
        raise ValueError(f'{path} has {size:,} bytes, not a positive multiple of 2: truncated, or no file of '
                         'uint16 tokens. Prepare it again')
    return size // 2


def open_tokens(path):
    """A file as a read-only memory map, (N,) uint16."""
    count_tokens(path)
    try:
        tokens = np.memmap(path, dtype=np.uint16, mode='r')
    except OSError as error:
        raise ValueError(f'{path} can\'t be read: {error.strerror}') from None
    start = tokens[:4096]
    if start.tobytes().startswith(b'\x93NUMPY') or (start[::2].any() and len(start) > 16
                                                   and not start[1::2].any()):
        raise ValueError(f'{path} holds a NumPy header or 32-bit numbers, not raw uint16 tokens: write it '
                         'with array.astype(numpy.uint16).tofile(path)')
    return tokens


class Shards:
    """Files, one after the other, as one array of tokens, which gives slices and, for an array of positions,
    the tokens there. Eight of them at most are open at a time."""

    def __init__(self, paths):
        self.ends = np.cumsum([count_tokens(path) for path in paths])
        self.starts = self.ends - np.diff(self.ends, prepend=0)
        self.open = functools.lru_cache(maxsize=8)(lambda i: open_tokens(paths[i]))

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, at):
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            assert step == 1, f'step {step}, not 1'
            touched = np.flatnonzero((self.starts < stop) & (self.ends > start))
            parts = [self.open(i)[max(0, start - self.starts[i]):stop - self.starts[i]]
                     for i in touched.tolist()]
            return np.concatenate([np.empty(0, np.uint16), *parts])
        tokens, shard = np.empty(at.shape, np.uint16), np.searchsorted(self.ends, at, side='right')
        for i in np.unique(shard).tolist():
            tokens[shard == i] = self.open(i)[at[shard == i] - self.starts[i]]
        return tokens


def check_split(tokens, name, block_size, vocab_size, at_most=1 << 26):
    """ValueError if a split is too short for a window, or a token id is no row of the model's vocabulary.

    Splits of more than `at_most` tokens are read in 64 places spread over the file, not from end to end.
    """
    if len(tokens) <= block_size:
        raise ValueError(f'{name} has {len(tokens):,} tokens, too few for block_size={block_size}: use at '
                         f'most --block_size={len(tokens) - 1}, or more text')
    n_places = 1 if len(tokens) <= at_most else 64
    piece = min(len(tokens), at_most) // n_places
    largest = max(int(tokens[s:s + piece].max())
                  for s in np.linspace(0, len(tokens) - piece, n_places, dtype=np.int64))
    if largest >= vocab_size:
        raise ValueError(f'{name} holds token id {largest}, but the model\'s vocab_size is {vocab_size}: '
                         'the data was prepared for another tokenizer')


def fingerprint(data_dir, split, tokens, at_most=1 << 26):
    """SHA-256 of a split in hex: of the whole file up to `at_most` tokens, else of its length and 64 pieces
    spread over it. ValueError if a whole file isn't the one that dataset.json tells of."""
    n_places = 1 if len(tokens) <= at_most else 64
    piece = min(len(tokens), at_most) // n_places
    digest = hashlib.sha256(b'' if n_places == 1 else str(len(tokens)).encode())
    for start in np.linspace(0, len(tokens) - piece, n_places, dtype=np.int64):
        digest.update(tokens[start:start + piece])
    expected = read_info(data_dir).get('sha256', {}).get(f'{split}.bin')
    if n_places == 1 and expected not in (None, digest.hexdigest()):
        raise ValueError(f'{Path(data_dir, split)}.bin isn\'t the file that dataset.json tells of: damaged, '
                         'or written by another program. Prepare the data again, or delete dataset.json')
    return digest.hexdigest()


def read_info(data_dir):
    """dataset.json as a dict, {} where there is none."""
    path = Path(data_dir, 'dataset.json')
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, OSError) as error:
        info = error
    if not isinstance(info, dict) or not all(isinstance(info.get(k, {}), dict) for k in ('tokens', 'sha256')):
        raise ValueError(f'{path} is damaged ({info}). Prepare the data again')
    return info


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; refuses whatever would run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it refers to {module}.{name}')


def read_meta(data_dir):
    """meta.pkl as {'vocab_size', 'itos', 'stoi'}, None where there is none; ValueError if it is damaged."""
    path = Path(data_dir, 'meta.pkl')
    if not path.is_file():
        return None
    try:
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        assert all(isinstance(i, int) and isinstance(c, str) for i, c in meta['itos'].items())
        assert isinstance(meta['vocab_size'], int) and meta['itos']
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError,
            AssertionError, ImportError, OverflowError, MemoryError, OSError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'{path} is not a character vocabulary ({type(error).__name__}: {reason})') from None
    return meta


# ---------------------------------------------------------------------------- windows

def train_windows(seed, iteration, count, n_tokens, block_size):
    """Starts of the `count` windows that make the global batch of an iteration, (count,) int64.

    Window i starts at random in the i-th of `count` equal parts of the split: each start is as likely as
    any other, but a batch never misses a part of the text (stratified sampling). The random numbers are
    Philox's (Salmon et al. 2011), which gives any iteration's with no history before.
    """
    bits = np.random.Philox(key=np.array([seed, iteration]).astype(np.uint64)).random_raw(count)
    uniform = (bits >> np.uint64(11)) * 2.0**-53  # [0, 1), all 53 bits of a double
    return ((np.arange(count) + uniform) / count * (n_tokens - block_size)).astype(np.int64)


def epoch_windows(seed, first, count, n_tokens, block_size):
    """Starts of windows `first` to `first + count - 1` of a run that sees each once an epoch: (count,)."""
    n = windows_an_epoch(n_tokens, block_size)
    return np.array([epoch_order(seed % 2**64, i // n, n_tokens, block_size)[i % n]
                     for i in range(first, first + count)])


def windows_an_epoch(n_tokens, block_size):
    """Windows side by side, one less than fit, so that they can begin anywhere in the first."""
    return max(1, (n_tokens - 1) // block_size - 1)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n_tokens, block_size):
    """An epoch's windows, side by side from a random offset on, shuffled: their starts."""
    n, generator = windows_an_epoch(n_tokens, block_size), np.random.default_rng((seed, epoch))
    offset = generator.integers(min(block_size, n_tokens - n * block_size))
    return offset + block_size * generator.permutation(n)


SAMPLERS = {'random': train_windows, 'epoch': epoch_windows}


def eval_windows(n_tokens, block_size, batch_size, n_batches=0):
    """Starts of windows spread evenly over a split that is cut into windows side by side, in batches:
    (n_batches, batch_size) int64; 0 batches: all windows. A start of n_tokens fills up the last batch and
    has no targets."""
    n_windows = -(-(n_tokens - 1) // block_size)
    count = min(n_batches * batch_size, n_windows) or n_windows
    starts = np.arange(count) * n_windows // count * block_size
    return np.pad(starts, (0, -count % batch_size), constant_values=n_tokens).reshape(-1, batch_size)


def read_windows(tokens, starts, block_size):
    """x, y: (B, T) int64, y one token further than x, -1 past the end of the split."""
    at = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    ids = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)
    return ids[:, :-1], np.where(at[:, 1:] < len(tokens), ids[:, 1:], -1)


def prefetch(function, arguments):
    """Yield function(*a) for each a, the next one computed by a thread while the caller uses the last."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = None
        for a in arguments:
            ready, ahead = ahead, reader.submit(function, *a)
            if ready:
                yield ready.result()
        if ahead:
            yield ahead.result()


# ---------------------------------------------------------------------------- tokenizers

class CharTokenizer:
    """One id a character."""

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

    def to_dict(self):
        return {'kind': 'char', 'itos': self.itos}


class GPT2Tokenizer:
    """GPT-2's byte pair encoding, by tiktoken, which fetches its two files at the first use."""
    n_vocab = GPT2_VOCAB

    @functools.cached_property
    def bpe(self):
        import tiktoken
        try:
            return tiktoken.get_encoding('gpt2')
        except OSError as error:
            raise FileNotFoundError(
                f'the GPT-2 BPE files can\'t be downloaded ({type(error).__name__}): connect once, or set '
                'TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept them') from None

    def encode(self, text):
        """Ids of a prompt, in which <|endoftext|> is the special token."""
        return self.bpe.encode(text, allowed_special={'<|endoftext|>'})

    def encode_array(self, text):
        """Ids of a document, in which nothing is special, (N,) uint32; runs outside the GIL."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        return self.bpe.decode(ids)

    def decode_bytes(self, ids):
        """The text's UTF-8, of which a token may hold a part of a character."""
        return self.bpe.decode_bytes(ids)

    def to_dict(self):
        return {'kind': 'gpt2'}


def tokenizer_from(state):
    """The inverse of `to_dict`; None gives GPT-2's."""
    if state and state['kind'] == 'char':
        return CharTokenizer(state['itos'])
    return GPT2Tokenizer()


def read_tokenizer(data_dir):
    """The tokenizer of a dataset's ids."""
    meta = read_meta(data_dir)
    return CharTokenizer(meta['itos']) if meta else GPT2Tokenizer()


# ---------------------------------------------------------------------------- writing

@contextmanager
def replacing(path, keep=None):
    """A temporary path beside `path`. At the end it is flushed to the disk and takes the place of `path` in
    one step, the old file being renamed to `keep` if that is given; if anything goes wrong it is deleted and
    `path` stays as it was. What a killed process left is overwritten by the next."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.part')
    try:
        yield temporary
        flush_to_disk(temporary, os.O_RDWR)
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == 'posix':  # the folder's entry is data too; Windows can't open a folder
        flush_to_disk(path.parent, os.O_RDONLY)


def flush_to_disk(path, mode):
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tokens(path, chunks):
    """Write arrays of token ids, one after the other, as uint16; nothing is left if one doesn't fit.

    Returns {'tokens': count, 'largest_id': id, 'sha256': hex digest}.
    """
    count, largest, digest = 0, -1, hashlib.sha256()
    with replacing(path) as temporary, open(temporary, 'wb') as file:
        for chunk in chunks:
            ids = np.asarray(chunk)
            if len(ids) == 0:
                continue
            if ids.min() < 0 or ids.max() > 65535:
                bad = ids.min() if ids.min() < 0 else ids.max()
                raise ValueError(f'token id {bad} doesn\'t fit into uint16, which goes from 0 to 65535')
            count, largest = count + len(ids), max(largest, int(ids.max()))
            data = ids.astype(np.uint16).tobytes()
            digest.update(data)
            file.write(data)
    return {'tokens': count, 'largest_id': largest, 'sha256': digest.hexdigest()}


def write_dataset(data_dir, splits, tokenizer, source):
    """Write a dataset's files. splits: {'train': chunks, 'val': chunks} of ids, for `write_tokens`."""
    data_dir = Path(data_dir)
    written = {split: write_tokens(data_dir / f'{split}.bin', chunks) for split, chunks in splits.items()}
    meta_path = data_dir / 'meta.pkl'
    if isinstance(tokenizer, CharTokenizer):
        meta = {'vocab_size': tokenizer.n_vocab, 'itos': tokenizer.itos, 'stoi': tokenizer.stoi}
        with replacing(meta_path) as temporary:
            temporary.write_bytes(pickle.dumps(meta, protocol=4))
    else:
        meta_path.unlink(missing_ok=True)
    info = {'tokens': {split: w['tokens'] for split, w in written.items()},
            'largest_id': max(w['largest_id'] for w in written.values()),
            'tokenizer': tokenizer.to_dict()['kind'], 'vocab_size': tokenizer.n_vocab, 'source': str(source),
            'sha256': {f'{split}.bin': w['sha256'] for split, w in written.items()}}
    with replacing(data_dir / 'dataset.json') as temporary:
        temporary.write_text(json.dumps(info, indent=2) + '\n', encoding='utf-8')
    for split, w in written.items():
        print(f'{split} has {w["tokens"]:,} tokens')
    print(f'vocabulary: {tokenizer.n_vocab:,} ({info["tokenizer"]}), written to {data_dir}')


def write_text_dataset(data_dir, text, tokenizer, source, val_fraction=0.1):
    """Split a text by characters, its end for validation, encode both parts and write the dataset.

    tokenizer: 'char' (a vocabulary of the text's characters) or 'gpt2'.
    """
    if tokenizer not in ('char', 'gpt2'):
        raise ValueError(f'tokenizer={tokenizer} is not one of char, gpt2')
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} must lie between 0 and 1')
    cut = int(len(text) * (1 - val_fraction))
    if not 0 < cut < len(text):
        raise ValueError(f'{source} has {len(text):,} characters, too few to split')
    coder = CharTokenizer.of_text(text) if tokenizer == 'char' else GPT2Tokenizer()
    print(f'{source}: {len(text):,} characters')
    encode = coder.encode if tokenizer == 'char' else coder.encode_array
    write_dataset(data_dir, {'train': [encode(text[:cut])], 'val': [encode(text[cut:])]}, coder, source)


# ---------------------------------------------------------------------------- sources

def download(url, sha256, path, timeout=30):
    """Fetch a file once: one that is already there is kept. timeout: seconds without a byte.

    Raises FileNotFoundError with the ways round it, and leaves nothing behind, if it can't be had whole.
    """
    path = Path(path)
    if path.exists():
        return
    from tqdm import tqdm
    try:
        with replacing(path) as temporary, urllib.request.urlopen(url, timeout=timeout) as reply, \
                open(temporary, 'wb') as file, \
                tqdm(total=reply.length, unit='B', unit_scale=True,
                     desc=path.name) as bar:
            digest = hashlib.sha256()
            while chunk := reply.read(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            if digest.hexdigest() != sha256:
                raise OSError('its checksum is wrong')
    except (OSError, http.client.HTTPException) as error:
        reason = ' '.join(str(error).split())
        raise FileNotFoundError(f'{url} can\'t be downloaded ({reason}); put the file at {path} yourself, '
                                'or name one with --input=FILE') from None


def go_offline_if_cut_off():
    """Let Hugging Face's libraries use their caches at once where the hub can't be reached; left alone they
    retry for half a minute. Call it before they are imported."""
    host = urllib.parse.urlsplit(os.environ.get('HF_ENDPOINT', 'https://huggingface.co')).hostname
    if 'HF_HUB_OFFLINE' in os.environ or urllib.request.getproxies():
        return
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        os.environ['HF_HUB_OFFLINE'] = '1'


def read_text(path):
    """A UTF-8 file as a string, its line ends as they are; one line says what is wrong with it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} is missing')
    data = Path(path).read_bytes()
    try:
        text = data.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text ({error.reason} at byte {error.start:,})') from None
    if '\0' in text:
        raise ValueError(f'{path} is not text: it has zero bytes')
    return text
