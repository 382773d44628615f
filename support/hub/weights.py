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
from support.machine.files import explain_failure

INDEXES = {'model.safetensors.index.json': 'model.safetensors', 'pytorch_model.bin.index.json':
           'pytorch_model.bin'}  # and the single file instead of which there are several


class TensorFiles:
    """The tensors of a model's folder. Raises MissingFile or UserError if a file is missing, can't
    be read, or isn't in the folder."""

    def __init__(self, folder):
        self.folder, self.files = Path(folder), {}  # {name: the open file that has it}
        self.shapes = {}
        for path in weight_files(self.folder):
            for name, shape, file in open_tensors(path):
                if name in self.shapes:
                    raise UserError(f'{path} and another file have {name}')
                self.shapes[name], self.files[name] = tuple(shape), (path, file)

    def read(self, name):
        path, file = self.files[name]
        with explained(path):
            return file[name] if isinstance(file, dict) else file.get_tensor(name)


def weight_files(folder):
    """The files that hold a model's weights, sorted."""
    for index, single in INDEXES.items():
        if (folder / index).is_file():
            with explain_failure(f'{folder / index} is no index of weights'):
                content = json.loads((folder / index).read_text(encoding='utf-8'))
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


def open_tensors(path):
    """[(name, shape, open file)] of a file's tensors, of which none is read yet."""
    with explained(path):
        if path.suffix == '.safetensors':
            from safetensors import safe_open
            file = safe_open(path, framework='pt')
            names = file.keys()  # not an iterable itself
            return [(name, file.get_slice(name).get_shape(), file) for name in names]
        import torch
        try:
            file = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        except RuntimeError:  # of before PyTorch 1.6, no archive
            file = torch.load(path, map_location='cpu', weights_only=True)
        return [(name, tensor.shape, file) for name, tensor in file.items()]


@contextlib.contextmanager
def explained(path):
    from safetensors import SafetensorError
    with explain_failure(f'{path} can\'t be read', SafetensorError):
        yield
