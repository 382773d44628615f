"""
A text into a dataset, for the `data/*/prepare.py`; and what they share with corpora (corpus.py).

    write_text_dataset(folder, TextFiles(['notes.txt']), 'char', source='notes.txt')

The text is read in pieces: first to count it, then to encode it by all cores (stream.py). So the
memory it takes doesn't grow with the text.
"""

import contextlib
import os
import re
from collections import Counter
from pathlib import Path

from support.errors import UserError
from support.text.bpe import check_vocab_size, train_bpe, untrained
from support.text.dataset import parse_info, read_info
from support.text.documents import FORMATS
from support.text.stream import (BLOCK, divide, encode_all, is_of_characters, resized, spread,
                                 survey)
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, NoTokenizer, load_tokenizer
from support.text.vocabulary import read_vocabulary
from support.text.writing import write_dataset

# ---------------------------------------------------------------------------- tokenizers

SAMPLE = 1 << 28  # characters that a tokenizer is trained on at most
SMALL_SAMPLE = 1 << 21  # characters of any text that it can be trained on
PROBE = 1 << 20  # characters of which the words are counted
WORD_BYTES = 8e6  # of different words; in training each takes 90 bytes


def resolve_tokenizer(name, vocab_size, known):
    """The tokenizer that a setting names if it exists already, None for those that are made of
    the text: char and bpe. known: the names that the caller takes besides paths, of a
    tokenizer.json or of a folder with a tokenizer or a dataset. Raises UserError for any other."""
    if name == 'gpt2':
        coder = GPT2Tokenizer()
        coder.bpe  # noqa: B018, fails here, not after a long read, if its files are missing
        return coder
    if name in known:
        if name == 'bpe':
            check_vocab_size(vocab_size)
        return None
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f'tokenizer={name} is not one of {", ".join(known)}, nor the path of a '
                        'tokenizer.json or of a folder with one')
    if any(Path(path, file).is_file() for file in ('dataset.json', 'meta.pkl', 'train.bin')):
        coder, *_ = read_vocabulary(path, read_info(path))
    else:
        coder = load_tokenizer(path)
    if coder is None:
        raise UserError(f'tokenizer={name} has no tokenizer.json')
    if isinstance(coder, NoTokenizer):
        raise UserError(f'tokenizer={name} can\'t encode text: {coder.reason}')
    return coder


def train_on(text, n, vocab_size):
    """A BPETokenizer of the first n characters of a text, or of a sample spread over them."""
    at_most = sample_size(spread(text, n, PROBE), n)
    if n > at_most:
        print(f'the tokenizer is trained on {at_most:,} characters, {at_most / n:.1%} of the '
              'training part, spread over it')
    return train_bpe(resized(spread(text, n, at_most), BLOCK), vocab_size)


def sample_size(probe, n):
    """How many of n characters a tokenizer can be trained on within a gigabyte. probe: strings that
    are spread over them. What takes memory are the different words; how fast they grow in number is
    estimated by those that occur once (Good 1953)."""
    if n <= SMALL_SAMPLE:
        return n
    split, words, n_probe = untrained().pre_tokenizer.pre_tokenize_str, Counter(), 0
    for string in probe:
        words.update(word for word, _ in split(string))
        n_probe += len(string)
    new = sum(len(word) for word, count in words.items() if count == 1) / n_probe  # bytes each
    return int(min(n, SAMPLE, max(SMALL_SAMPLE, WORD_BYTES / max(new, 1e-9))))


def how_many_to_train_on(some, n):
    """How many of n texts a tokenizer can be trained on within a gigabyte. some: strings of them,
    drawn at random or spread over them."""
    some = [*some]
    mean = max(1, sum(map(len, some)) / len(some))  # characters
    probe = (text[:PROBE // len(some)] for text in some)
    return max(1, min(n, round(sample_size(probe, n * mean) / mean)))


# ---------------------------------------------------------------------------- one text

def write_text_dataset(data_dir, text, tokenizer, source, val_fraction=0.1, vocab_size=4096, *,
                       val=None, overwrite=True):
    """Write a text as a dataset: a string, or an iterable of strings that gives the same ones each
    time.

    tokenizer: 'char' (a vocabulary of the text's characters), 'gpt2', 'bpe' (trained on the
    training part, of vocab_size entries), or a path, see `resolve_tokenizer`. val: a text for
    validation; without one, the last val_fraction of the characters are. overwrite: replace a
    dataset of another text.
    """
    coder = resolve_tokenizer(tokenizer, vocab_size, ('char', 'gpt2', 'bpe'))
    check_fraction(val_fraction)
    texts = [[text] if isinstance(text, str) else text for text in (text, val) if text is not None]
    with_characters = tokenizer == 'char' or coder is not None and is_of_characters(coder)
    found = [survey(one, with_characters) for one in texts]
    n, characters = sum(one.n_characters for one in found), set()
    characters.update(*(one.characters for one in found))
    cut = cut_of(n, val_fraction, source) if val is None else cut_between(found, source)
    print(f'{source}: {n:,} characters' if val is None else
          f'{source}: {cut:,} characters, and {n - cut:,} for validation')
    how = how_prepared(tokenizer, vocab_size, val_fraction if val is None else None)
    more = {'text': '+'.join(one.mark() for one in found), 'how': how}
    check_replacing(data_dir, more, overwrite)
    if tokenizer == 'char':
        coder = CharTokenizer.of_text(characters)
    elif tokenizer == 'bpe':
        coder = train_on(texts[0], cut, vocab_size)
    elif characters:
        coder.encode(''.join(sorted(characters)))  # UserError if it doesn't know one
    parts = texts if val is not None else divide(texts[0], cut)
    chunks = {split: encode_all(part, coder, size, split)
              for split, part, size in zip(('train', 'val'), parts, (cut, n - cut))}
    write_dataset(data_dir, chunks, coder, source, more=more)


def check_fraction(val_fraction):
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} must lie between 0 and 1')


def cut_of(n, val_fraction, source, unit='characters'):
    """How many of n characters (or other units) are for training. UserError if there is nothing
    to split."""
    check_fraction(val_fraction)
    cut = int(n * (1 - val_fraction))
    if not 0 < cut < n:
        raise UserError(f'{source} has {n:,} {unit}, too few to split')
    return cut


def cut_between(found, source):
    """The number of characters of the training text, of two texts. UserError if one is empty."""
    if not all(one.n_characters for one in found):
        raise UserError(f'{source} has {found[0].n_characters:,} characters, and the text for '
                        f'validation {found[1].n_characters:,}: each needs some')
    return found[0].n_characters


def how_prepared(tokenizer, vocab_size, val_fraction=None):
    """The settings on which a dataset depends besides its text, in words."""
    how = f'{tokenizer}, vocab_size={vocab_size}' if tokenizer == 'bpe' else tokenizer
    return how if val_fraction is None else f'{how}, val_fraction={val_fraction}'


def check_replacing(folder, wanted, overwrite):
    """UserError if a folder has a dataset of another text, or of the same prepared otherwise, unless
    it is to be replaced. wanted: what dataset.json would have of text and how."""
    if not any(Path(folder).glob('*.bin')):
        return
    info = info_of(folder)
    if all(info.get(name) == value for name, value in wanted.items()):
        print(f'{folder} has this text already; its files are written again')
    elif info.get('unfinished') or overwrite:
        print(f'replacing the data set in {folder}{of_source(info)}')
    else:
        raise UserError(f'{folder} has another data set{of_source(info)}: choose another --name, '
                        'or replace it with --overwrite=True')


def info_of(folder):
    """dataset.json as a dict; {} if there is none, or it is damaged."""
    path = Path(folder, 'dataset.json')
    with contextlib.suppress(UserError):
        return parse_info(path) if path.is_file() else {}
    return {}


def of_source(info):
    how = f' ({info["how"]})' if info.get('how') else ''
    return f', of {info["source"][:200]}{how}' if info.get('source') else ''


# ---------------------------------------------------------------------------- folders

def dataset_folder(script, name, source=None):
    """data/<name> beside the folder of a prepare.py, or that folder for an empty name. UserError
    if a folder that was named holds a dataset of another source than this one."""
    if name and (Path(name).name != name or name == '..'):
        raise UserError(f'name={name} must be a plain folder name: the dataset goes to data/<name>')
    own = Path(script).parent
    folder = own.parent / name if name else own
    if name and source and any(folder.glob('*.bin')):
        info = info_of(folder)
        if info.get('source') != os.path.expanduser(source) and not info.get('unfinished'):
            raise UserError(f'{folder} has another data set{of_source(info)}: choose another '
                            '--name, or remove its files first')
    return folder


def name_after(source):
    """A dataset's name for a corpus: that of its file, its folder or its repository on the hub."""
    path = Path(os.path.realpath(source))
    is_file = path.suffix.lower() in FORMATS
    return re.sub(r'[^\w.-]', '_', path.stem if is_file else path.name) or 'corpus'
