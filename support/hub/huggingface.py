"""
Models and tokenizers of Hugging Face's format: GPT-2 and its kin, Llama, Mistral, Qwen 2, our own
exports.

    model = load_pretrained('HuggingFaceTB/SmolLM2-135M')    # a name of the hub, or a folder
    args, weights = read_pretrained('exported')  # of GPTConfig, and a GPT's state dict, read as used
    tokenizer = folder_tokenizer('exported')
    template = chat_template('exported')         # of ChatForm
"""

from collections.abc import Mapping

import torch
from torch import nn

from model import GPT, GPTConfig
from support.errors import UserError
from support.hub.layouts import layout_of, read_config_json
from support.hub.names import model_folder
from support.hub.weights import TensorFiles
from support.machine.files import explain_failure
from support.text.chat import folder_template
from support.text.tokenizer import (GPT2_VOCAB, PADDED_GPT2_VOCAB, GPT2Tokenizer, NoTokenizer,
                                    load_tokenizer)


# ---------------------------------------------------------------------------- models

def load_pretrained(model_type, override_args=None, dtype=torch.float32):
    """The GPT of a name of the hub or a folder. override_args: of GPTConfig: dropout, attn_type,
    pa_norm. dtype: of the weights of linear layers, None: the files', if it has 16 bits; embeddings and
    norms are float32.

    Raises ValueError, before weights are read, for a model that model.py doesn't compute, and
    FileNotFoundError if there is none.
    """
    args, weights = read_pretrained(model_type)
    config = GPTConfig(**args | (override_args or {}))
    with torch.device('meta'):  # shapes without memory
        loaded = GPT(config)
    if next(loaded.buffers(), None) is not None:  # of another model.py: they aren't in the files
        loaded = GPT(config)
        loaded.load_state_dict(dict(weights.items()), strict=False)
        return loaded
    is_tied = loaded.lm_head.weight is loaded.transformer.wte.weight
    linear = {f'{name}.weight' for name, m in loaded.named_modules() if type(m) is nn.Linear}
    state = {}
    for name, tensor in weights.items():
        kind = torch.float32
        if name in linear:
            kind = dtype or (tensor.dtype if tensor.itemsize == 2 else kind)
        if not (is_tied and name == 'lm_head.weight'):
            state[name] = tensor.to(kind, copy=True)
    loaded.load_state_dict(state, assign=True, strict=not is_tied)
    if is_tied:
        loaded.lm_head.weight = loaded.transformer.wte.weight
    return loaded


def read_pretrained(model_type):
    """Arguments of GPTConfig and Weights; otherwise like `load_pretrained`."""
    config = read_config_json(model_folder(model_type))
    with said_of(model_type):
        layout = layout_of(config)  # refuses before weights are downloaded
        GPTConfig(**layout.args)
    files = TensorFiles(model_folder(model_type, weights=True))
    with said_of(model_type):
        args = layout.args_with(files)
        weights = Weights(layout, files, args)
        n_vocab = config.get('unpadded_vocab_size', args['vocab_size'])
        if not isinstance(n_vocab, int) or not 0 < n_vocab <= args['vocab_size']:
            raise UserError(f'config.json has unpadded_vocab_size={n_vocab!r:.40}')
        weights.n_vocab = n_vocab
    return args | {'vocab_size': n_vocab}, weights


def said_of(model_type):
    """Errors within it begin with the model's name."""
    return explain_failure(f'{model_type} can\'t be used here')


class Weights(Mapping):
    """The state dict of a GPT whose tensors lie in another program's files: each is read, in the
    number type of the files, when it is asked for. Raises ValueError at once for names and shapes
    that aren't those of `args`, and when it is read for a tensor that isn't finite."""

    def __init__(self, layout, files, args):
        self.layout, self.files, self.is_tied = layout, files, args.get('tie_weights', True)
        self.n_vocab = args['vocab_size']
        if args['n_layer'] > len(files.shapes):
            raise UserError(f'config.json asks for {args["n_layer"]:,} layers, the weights are '
                            f'{len(files.shapes):,} tensors')
        with torch.device('meta'):
            state = GPT(GPTConfig(**args)).state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.theirs = {layout.own_name(name): name for name in files.shapes
                       if not layout.is_ignored(name)}
        self.check()

    def check(self):
        """ValueError for tensors that are missing, left over, or of another shape."""
        left, bad = dict(self.theirs), []
        for name, shape in self.shapes.items():
            if self.layout.lacks(name):
                continue
            names = self.names(name)
            bad += [f'missing: {n}' for n in names if n not in self.theirs]
            if all(n in self.theirs for n in names):
                found = self.stacked_shape(name, [self.files.shapes[self.theirs[n]] for n in names])
                if found != shape:
                    bad.append(f'mismatched: {name}, {found} instead of {shape}')
            for n in [*names, *self.layout.names(name)]:
                left.pop(n, None)
        if bad := bad + [f'unexpected: {name}' for name in left]:
            more = f' and {len(bad) - 9:,} more' if len(bad) > 9 else ''
            raise UserError('the weights aren\'t those of its config.json '
                            f'({", ".join(bad[:9])}{more})')

    def names(self, name):
        """Names in `theirs` of the tensors of which ours is made: a tied output layer needs none of
        its own."""
        names = self.layout.names(name)
        if name == 'lm_head.weight' and self.is_tied and names[0] not in self.theirs:
            return self.layout.names('transformer.wte.weight')
        return names

    def stacked_shape(self, name, shapes):
        shapes = [s[::-1] if self.layout.is_transposed(name) else s for s in shapes]
        return (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()

    def __getitem__(self, name):
        if self.layout.lacks(name):
            return torch.zeros(self.shapes[name])
        parts = [self.files.read(self.theirs[n]) for n in self.names(name)]
        if self.layout.is_transposed(name):
            parts = [part.T for part in parts]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        is_finite = tensor.sum(dtype=torch.float32).isfinite()  # fast, but may overflow
        if not is_finite and not tensor.isfinite().all():
            raise UserError(f'{self.files.folder}: not finite: {name}')
        if name == 'lm_head.weight' and self.is_tied:
            self.check_tie(tensor)
        is_table = name in ('transformer.wte.weight', 'lm_head.weight')
        return tensor[:self.n_vocab] if is_table else tensor

    def check_tie(self, head):
        """ValueError if a file has an output layer that differs from the embedding to which it is
        tied."""
        [embedding], [own] = (self.names(f'{name}.weight') for name in ('transformer.wte', 'lm_head'))
        if own != embedding and not torch.equal(head, self.files.read(self.theirs[embedding])):
            raise UserError(f'{self.files.folder}: config.json ties {own} to {embedding}, which '
                            'differs')

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


# ---------------------------------------------------------------------------- tokenizers

def own_tokenizer(model_type):
    """The tokenizer in a model's folder, None if it has none. ValueError for one that can't be
    used: GPT-2's must not take its place."""
    tokenizer = load_tokenizer(model_folder(model_type))
    size = read_config_json(model_folder(model_type)).get('vocab_size', GPT2_VOCAB)
    if tokenizer and isinstance(size, int) and tokenizer.n_vocab > size:
        raise UserError(f'the tokenizer of {model_type} has ids up to {tokenizer.n_vocab - 1:,}, its '
                        f'model rows for {size:,}: they don\'t belong together')
    return tokenizer


def folder_tokenizer(model_type):
    """A model's own tokenizer, else GPT-2's, unless the size of the model's vocabulary is
    another."""
    if own := own_tokenizer(model_type):
        return own
    size = read_config_json(model_folder(model_type)).get('vocab_size', GPT2_VOCAB)
    if size not in (GPT2_VOCAB, PADDED_GPT2_VOCAB):
        return NoTokenizer(size, f'{model_type} has no tokenizer.json, and GPT-2\'s vocabulary isn\'t '
                                 f'of {size}')
    return GPT2Tokenizer()


def chat_template(model_type):
    """How a model's conversations become text, for ChatForm; None if its folder doesn't say."""
    return folder_template(model_folder(model_type))
