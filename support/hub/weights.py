"""
The tensors of a model's files, read one at a time and as they are: safetensors, whole or in
numbered files with an index, or PyTorch's own older files.

    files = TensorFiles('smollm2')
    files.shapes  # {name: shape}, from the headers alone
    files.read('model.embed_tokens.weight')
"""

import contextlib
import json
import re
from pathlib import Path

from support.errors import MissingFile, UserError
from support.machine.files import MAPPED, HeldFile, explain_failure, read_bytes

INDEXES = {'model.safetensors.index.json': 'model.safetensors', 'pytorch_model.bin.index.json':
           'pytorch_model.bin'}  # and the single file instead of which there are several


class TensorFiles:
    """The tensors of a model's folder. Raises MissingFile or UserError if a file is missing, can't
    be read, or isn't in the folder."""

    def __init__(self, folder):
        self.folder, self.shapes = Path(folder), {}
        self.paths = {}  # {name: path of its file}
        self.held, self.mapped = {}, {}  # {path: HeldFile}, {path: its tensors}
        self.n_read = 0  # bytes since files were mapped
        for path in weight_files(self.folder):
            with explained(path):
                self.held[path] = HeldFile(path)
            for name, shape in shapes_in(path, self.map_file(path)):
                if name in self.shapes:
                    raise UserError(f'{path} and another file have {name}')
                self.shapes[name], self.paths[name] = tuple(shape), path

    def read(self, name):
        path = self.paths[name]
        if self.n_read > MAPPED:
            self.mapped, self.n_read = {}, 0
        file = self.map_file(path)
        with explained(path):
            tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        self.n_read += tensor.nbytes
        return tensor

    def map_file(self, path):
        """A file's tensors, of the file that was opened first, whatever its path names by now."""
        if path not in self.mapped:
            held = self.held[path]
            self.mapped[path] = open_tensors(path, held.name())
            if not held.is_the_same():
                raise UserError(f'{path} was replaced while it was read')
        return self.mapped[path]


def weight_files(folder):
    """The files that hold a model's weights, sorted."""
    for index, single in INDEXES.items():
        if (folder / index).is_file():
            with explain_failure(f'{folder / index} is no index of weights'):
                content = json.loads(read_bytes(folder / index))
                names = sorted({str(name) for name in content['weight_map'].values()})
            if outside := [name for name in names if not is_plain_name(name)]:
                raise UserError(f'{folder / index} names {outside[0]}, which is no file of its '
                                'folder')
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise MissingFile(f'{folder / missing[0]} is missing, which {index} names '
                                  f'({len(missing)} of {len(names)} files): download the model '
                                  'again')
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    numbered = next(folder.glob('model-*-of-*.safetensors'), None)
    how = 'download the model again'
    if numbered:
        how = f'{numbered.name} needs model.safetensors.index.json'
    raise MissingFile(f'{folder} has a config.json, but no model.safetensors: {how}')


def is_plain_name(name):
    """Whether a name is that of a file in the same folder."""
    return Path(name).name == name and not re.search(r'[\\/:]', name) and name not in ('', '..')


def open_tensors(path, name):
    """A file's tensors, of which none is read yet: the library's object, or a dict. name: a path of
    the open file."""
    with explained(path):
        if path.suffix == '.safetensors':
            from safetensors import safe_open
            return safe_open(name, framework='pt')
        import torch
        try:
            return torch.load(name, map_location='cpu', weights_only=True, mmap=True)
        except RuntimeError:  # of before PyTorch 1.6, no archive
            return torch.load(name, map_location='cpu', weights_only=True)


def shapes_in(path, file):
    """[(name, shape)]"""
    with explained(path):
        if isinstance(file, dict):
            return [(name, tensor.shape) for name, tensor in file.items()]
        return [(name, file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118


@contextlib.contextmanager
def explained(path):
    from safetensors import SafetensorError
    with explain_failure(f'{path} can\'t be read', SafetensorError):
        yield
