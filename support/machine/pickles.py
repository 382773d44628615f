"""
Pickles of other programs: plain values and NumPy's numbers are read, no code in them is run.

    value = read_pickle(data)
    with torch.serialization.safe_globals(STAND_INS):
        state = torch.load(path, weights_only=True)

A pickle names the functions that rebuild its objects. Those below stand in for the few that are
allowed: NumPy's numbers become Python's, arrays flat lists, paths strings. A GPTConfig keeps its
attributes and nothing else.
"""

import io
import pickle
import re
from collections import OrderedDict
from pathlib import PurePath

import numpy as np


class NumberType:
    """Stands in for numpy.dtype, of numbers and strings only."""

    def __init__(self, code, *_):
        if not re.fullmatch(r'[biufU]\d+', code):
            raise pickle.UnpicklingError(f'it holds NumPy values of type {code}')
        self.code, self.byte_order = code, '='

    def __setstate__(self, state):
        self.byte_order = state[1]

    def read(self, data):
        return np.frombuffer(data, np.dtype(self.code).newbyteorder(self.byte_order)).tolist()


class Numbers(list):
    """Stands in for numpy.ndarray."""

    def __setstate__(self, state):
        _version, _shape, kind, _is_fortran, data = state
        self[:] = kind.read(data)


def number(kind, data):
    return kind.read(data)[0]


def empty_array(*_):
    return Numbers()


def filled_array(data, kind, *_):
    return Numbers(kind.read(data))


def latin1(text, _encoding):
    """Bytes, as pickles before protocol 3 keep them."""
    return text.encode('latin-1')


def path(*parts):
    return str(PurePath(*parts))


class ForeignConfig:
    """Stands in for a GPTConfig that its program pickled as an object."""


STAND_INS = [
    (ForeignConfig, '__main__.GPTConfig'), (ForeignConfig, 'model.GPTConfig'),
    (OrderedDict, 'collections.OrderedDict'), (latin1, '_codecs.encode'), (NumberType, 'numpy.dtype'),
    (Numbers, 'numpy.ndarray'),
    *((stand_in, f'numpy.{core}.{name}') for core in ('core', '_core')  # NumPy 1 and 2
      for stand_in, name in ((number, 'multiarray.scalar'), (empty_array, 'multiarray._reconstruct'),
                             (filled_array, 'numeric._frombuffer'))),
    *((path, f'pathlib{module}.{kind}') for module in ('', '._local')  # _local: Python 3.13
      for kind in ('PosixPath', 'WindowsPath', 'PurePosixPath', 'PureWindowsPath')),
]


class PlainUnpickler(pickle._Unpickler):  # Python's own: the one in C makes room for any memo index

    def find_class(self, module, name):
        for stand_in, allowed in STAND_INS:
            if allowed == f'{module}.{name}':
                return stand_in
        raise pickle.UnpicklingError(f'it refers to {module}.{name}')


def read_pickle(data):
    """The value in a pickle, bytes. Raises UnpicklingError for one that refers to anything else."""
    return PlainUnpickler(io.BytesIO(data)).load()
