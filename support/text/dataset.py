"""
A dataset: a folder of token files, opened once.

    data = Dataset('data/shakespeare_char')
    data.check(block_size, model.config.vocab_size)
    starts = data['val'].eval_windows(block_size, batch_size)
    x, y = data['val'].read(starts[0], block_size)

The folder, `data/<name>/`:
    train.bin, val.bin   token ids, uint16 in machine order, no header; others in tokens.py
    train.mask, val.mask optional: what to learn of conversations (masks.py)
    tokenizer.json       of a tokenizer of its own
    meta.pkl             {'vocab_size': int}, for characters 'itos': {id: char}, 'stoi': {char: id}
    dataset.json         optional: source, tokenizer, dtype, number of tokens, checksums
Without tokenizer.json and meta.pkl the ids are GPT-2 BPE.
"""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.console import ROOT, print0
from support.machine.files import explain_failure, read_bytes, regular_file
from support.text.masks import Conversations, open_mask
from support.text.tokens import DTYPES, open_tokens, split_files
from support.text.vocabulary import read_vocabulary
from support.text.windows import READ_AT_START, Split

say_once = functools.cache(print0)


def find_dataset(data_dir, dataset):
    """A dataset's folder: data_dir if given, else data/<dataset>, else a folder with the path
    `dataset`, else the repository's data/<dataset>."""
    dataset = os.path.expanduser(dataset or '')
    here, there = os.path.join('data', dataset), ROOT / 'data' / dataset
    if data_dir or not dataset or os.path.isdir(here):
        return data_dir or here
    if os.path.dirname(dataset) and os.path.isdir(dataset):
        return dataset
    if there.is_dir():
        say_once(f'there is no {here} here: using {there}')
        return str(there)
    return here


class Dataset:
    """What a dataset's folder holds.

    splits: {'train': a Split, 'val': a Split}, those asked for; the tokenizer is known without any.
    info: dataset.json as a dict, {} if there is none. template: how text becomes a conversation, or
    None. vocab_path: the file that names the tokenizer and vocab_size, None if they are GPT-2's by
    default.

    Raises MissingFile for a file that is missing, UserError for one that is empty, damaged, of
    another length than its header or dataset.json says, or if files contradict each other.
    """

    def __init__(self, folder, splits=('train', 'val')):
        self.folder, self.info = folder, read_info(folder)
        self.splits = {name: open_split(folder, name, self.info) for name in splits}
        self.tokenizer, self.vocab_size, self.vocab_path = read_vocabulary(folder, self.info)
        self.template = self.info.get('chat')

    def __getitem__(self, split):
        return self.splits[split]

    def check(self, block_size, vocab_size):
        """UserError if a split has no room for a window, or ids beyond the model's vocabulary."""
        for split in self.splits.values():
            split.check(block_size, vocab_size)

    def fingerprints(self):
        """{split: SHA-256 in hex}, by which a resumed run knows its data. UserError if dataset.json
        has another for a file. The first call prints of which splits it is that of a part only."""
        return dict(self.digests)

    @functools.cached_property
    def digests(self):
        expected = self.info.get('sha256', {})
        found = {name: split.fingerprint(expected) for name, split in self.splits.items()}
        for split in self.splits.values():
            if not split.is_read_whole():
                print0(f'{split.path}: {READ_AT_START:,} of its {len(split):,} tokens were '
                       'checked, in 64 pieces, not the SHA-256 of the whole; other ids are checked '
                       'when they are read')
        return found

    def check_unchanged(self):
        """UserError if the size, the time or the inode of a file differs from what was opened, or
        it is gone."""
        for split in self.splits.values():
            for numbers in split.arrays().values():
                numbers.check_unchanged()


def open_split(folder, name, info):
    """A split of a dataset's folder. info: of `read_info`."""
    path, paths = Path(folder, f'{name}.bin'), split_files(folder, name)
    if not paths:
        prepare = Path(folder, 'prepare.py')
        how = f'run: python {prepare}' if prepare.is_file() else 'see "Your own text" in README.md'
        raise MissingFile(f'{path} is missing; {how}')
    tokens = open_tokens(paths, info.get('dtype', 'uint16'))
    expected = info.get('tokens', {}).get(name, len(tokens))
    if len(tokens) != expected:
        raise UserError(f'{path} has {len(tokens):,} tokens, but dataset.json says {expected:,}: '
                        'truncated, or written by another program. Prepare it again, or delete '
                        'dataset.json')
    mask = open_mask(folder, name, len(tokens), info.get('chat'))
    return Split(name, tokens, path) if mask is None else Conversations(name, tokens, mask, path)


# ---------------------------------------------------------------------------- dataset.json

def read_info(folder):
    """dataset.json as a dict; {} if there is none, or if neither split has as many tokens as it
    says, which is printed. Raises UserError if it is damaged."""
    path = Path(folder, 'dataset.json')
    if not regular_file(path):
        return {}
    info = parse_info(path)
    if info.get('unfinished'):
        raise UserError(f'{folder}: the preparation of this data was broken off; prepare it again')
    if info.get('dtype', 'uint16') not in DTYPES:
        raise UserError(f'{path}: dtype={str(info["dtype"])[:40]} is not one of '
                        f'{", ".join(DTYPES)}')
    width, others = np.dtype(info.get('dtype', 'uint16')).itemsize, []
    for split in {'train', 'val'} & info.get('tokens', {}).keys():
        size = sum(path.stat().st_size for path in split_files(folder, split))
        if size not in (0, width * info['tokens'][split]):
            others.append(split)
    if len(others) == 2:  # another program's; a single one may be truncated
        print0(f'ignoring {path}, which is not of the files beside it: the number of tokens '
               'differs (train, val)')
        return {}
    return info


def parse_info(path):
    """dataset.json as a dict. Raises UserError if it is damaged."""
    with explain_failure(f'{path} is damaged; prepare the data again'):
        if path.stat().st_size > 1 << 20:
            raise UserError('it has more than a megabyte')
        text = read_bytes(path).decode('utf-8-sig')
        outside_strings = re.sub(r'"(?:[^"\\]|\\.)*"', '', text)  # a chat template has many brackets
        if outside_strings.count('{') + outside_strings.count('[') > 100:
            raise UserError('it is nested too deeply')  # thousands of levels crash Python's parser
        info = json.loads(text)
        counts, digests = info.get('tokens', {}), info.get('sha256', {})
        if not (all(isinstance(n, int) and 0 <= n < 1 << 63 for n in counts.values())
                and all(isinstance(text, str) for text in [
                    *digests.values(), info.get('source', ''), info.get('tokenizer', '')])
                and isinstance(info.get('chat'), dict | None)):
            raise TypeError('tokens must be numbers, sha256, source and tokenizer strings, chat a '
                            'table')
    return info
