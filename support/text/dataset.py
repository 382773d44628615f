"""
The files of a dataset's folder: which make up a split, in which format, and what dataset.json says of them.

    paths = split_files('data/openwebtext', 'train')
    read_info('data/openwebtext')  # {'tokens': {'train': 9035582198, 'val': 4434897}, ...}
"""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np

from support.errors import MissingFile, UserError
from support.machine.console import ROOT, print0
from support.machine.files import explain_failure

AS_UINT16 = 'write it with array.astype(numpy.uint16).tofile(path)'
say_once = functools.cache(print0)


def find_dataset(data_dir, dataset):
    """A dataset's folder: data_dir if given, else data/<dataset>; where there is none, the repository's."""
    here, there = os.path.join('data', dataset), ROOT / 'data' / dataset
    if data_dir or not dataset or os.path.isdir(here) or not there.is_dir():
        return data_dir or here
    say_once(f'there is no {here} here: using {there}')
    return str(there)


def split_files(data_dir, split):
    """A split's files: [SPLIT.bin], or [SPLIT_000.bin, SPLIT_001.bin, ...], or [NAME_SPLIT_000001.bin, ...],
    numbered from 0 or 1; [] if there are none. Raises an error if it isn't clear which, or one is missing."""
    whole, groups = Path(data_dir, f'{split}.bin'), {}
    for path in sorted(Path(data_dir).glob(f'*{split}_*.bin')):
        if found := re.fullmatch(rf'((?:.*[_-])?{split})_([0-9]{{3,}})\.bin', path.name):
            group = groups.setdefault(found[1], {})
            if twin := group.get(int(found[2])):
                raise UserError(f'{data_dir} has {twin.name} and {path.name}: remove one or the other')
            group[int(found[2])] = path
    if whole.is_file() and split in groups:
        first = next(iter(groups[split].values()))
        raise UserError(f'{data_dir} has {whole.name} and {first.name}: remove one or the other')
    if whole.is_file() or not groups:
        return [whole] if whole.is_file() else []
    name = split if split in groups else next(iter(groups))
    if len(groups) > 1 and name != split:
        raise UserError(f'{data_dir} has files of several datasets, {", ".join(groups)}: leave one')
    group = groups[name]
    first = 1 if name != split and 0 not in group else 0
    for i, (number, path) in enumerate(sorted(group.items()), first):
        if number != i:
            digits = len(path.stem) - len(name) - 1
            missing = path.with_name(f'{name}_{i:0{digits}}.bin')
            raise MissingFile(f'{missing} is missing, but {path.name} exists')
    return [group[number] for number in sorted(group)]


def header_size(path):
    """Bytes before a file's tokens: 0, or 1024 in llm.c's and modded-nanogpt's files, which begin with 256
    int32: 20240520, 1, the number of tokens. Raises ValueError if the file has another number."""
    with explain_failure(f'{path} can\'t be read'), open(path, 'rb') as file:
        start = file.read(12)
    magic, version, count = np.frombuffer(start.ljust(12, b'\0'), '<i4').tolist()
    if (magic, version) == (20240801, 7) or magic == 20240520 and version != 1:
        raise UserError(f'{path} has llm.c\'s header {magic}, {version}, of other tokens than uint16, whose '
                         f'header is 20240520, 1: {AS_UINT16}')
    held = max(0, path.stat().st_size - 1024) // 2
    if magic == 20240520 and count != held:
        raise UserError(f'{path} has {held:,} tokens, but {count:,} by its header: truncated, or damaged. '
                         'Download or prepare it again')
    return 1024 if magic == 20240520 else 0


def width_of(tokens):
    """Bits of the numbers that a file's first tokens, (N,) uint16, seem to be made of: 8, 16 or 32."""
    if len(tokens) < 64:
        return 16
    low, high = (np.bincount(byte, minlength=256) for byte in (tokens & 255, tokens >> 8))
    if abs(low - high).sum() < len(tokens) / 2 and np.count_nonzero(high) > 8:  # bytes of one distribution
        return 8
    return 32 if tokens[1::2].max() < 16 <= 256 <= tokens[::2].max() else 16


def check_length(tokens):
    """ValueError if the file of a memory map has become shorter: to read beyond its end kills a process."""
    if isinstance(tokens, np.memmap) and os.stat(tokens.filename).st_size < tokens.offset + tokens.nbytes:
        raise UserError(f'{tokens.filename} has become shorter since it was opened; prepare the data again, '
                         'then resume')


def read_info(data_dir):
    """dataset.json as a dict; {} if there is none, or if it isn't of the files beside it, which is told.
    Raises ValueError if it is damaged."""
    path = Path(data_dir, 'dataset.json')
    if not path.is_file():
        return {}
    with explain_failure(f'{path} is damaged; prepare the data again'):
        if path.stat().st_size > 1 << 20:
            raise UserError('it has more than a megabyte')
        text = path.read_text(encoding='utf-8')
        if text.count('{') + text.count('[') > 100:
            raise UserError('it is nested too deeply')  # thousands of levels crash Python's parser
        info = json.loads(text)
        counts, digests = info.get('tokens', {}), info.get('sha256', {})
        if not (all(isinstance(n, int) and 0 <= n < 1 << 63 for n in counts.values())
                and all(isinstance(text, str) for text in [*digests.values(), info.get('source', ''),
                                                           info.get('tokenizer', '')])):
            raise TypeError('tokens must be numbers, sha256, source and tokenizer strings')
    if info.get('unfinished'):
        raise UserError(f'{data_dir}: the preparation of this data was broken off; prepare it again')
    sizes = {split: sum(path.stat().st_size for path in split_files(data_dir, split))
             for split in ('train', 'val') if split in counts}
    found = [split for split, size in sizes.items() if size]
    others = [split for split in found if sizes[split] != 2 * counts[split]]
    if others == found and (len(others) > 1 or any(is_older(data_dir, split) for split in others)):
        say_once(f'ignoring {path}, which is not of the files beside it: the number of tokens differs '
                 f'({", ".join(others)})')
        return {}
    return info


def is_older(data_dir, split):
    """Whether dataset.json was written before one of a split's files."""
    written = Path(data_dir, 'dataset.json').stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > written for path in split_files(data_dir, split))
