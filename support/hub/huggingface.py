"""
Weights and tokenizers to and from Hugging Face's transformers.

    model = load_pretrained('gpt2-xl')  # GPT.from_pretrained, which works offline too
    args, weights = read_pretrained('gpt2-xl')  # of GPTConfig, and a state dict of GPT
    config, weights = to_transformers(args, weights)  # a configuration of theirs, and its state dict
"""

import json
import traceback
from dataclasses import fields
from pathlib import Path

import torch

import model
from support.errors import MissingFile, UserError
from support.hub.layouts import (LAYOUTS, LLAMA, NO_TOKENS, OWN_CODE, read_config_json, read_layout,
                                 to_llama, to_own_code)
from support.machine.files import UNREADABLE, explain_failure, go_offline_if_cut_off, reason_of
from support.text.bpe import END
from support.text.chat import check_template, jinja
from support.text.tokenizer import (GPT2_VOCAB, PAD, PADDED_GPT2_VOCAB, GPT2Tokenizer, NoTokenizer,
                                    load_tokenizer)

ACTIVATIONS = {'gelu_tanh': 'gelu_new', 'gelu': 'gelu'}  # ours: theirs
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in their GPT-2
ALLOWED = {'gpt2': {'pos_emb': ['learned'], 'norm': ['layernorm'], 'activation': [*ACTIVATIONS]},
           'llama': {setting: [value] for setting, value in LLAMA.items()}}
EXPRESSIBLE = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout', 'activation',
               'pos_emb', 'norm', 'n_kv_head', 'tie_weights',
               'init', 'ngram_rows'}  # irrelevant after training, and without n-grams
ENDS = ('bos_token', 'eos_token', 'pad_token')  # what the end of a document is to transformers
DEFAULTS = {f.name: f.default for f in fields(model.GPTConfig)}


# ---------------------------------------------------------------------------- from transformers

def load_pretrained(model_type, override_args=None):
    """The GPT of one of GPT2_SIZES, or of a folder: a GPT-2, a Llama, or an export with its own code.
    override_args: of GPTConfig: dropout, attn_type, pa_norm. Uses the local cache at once if the hub can't be
    reached.

    Raises ValueError for a model that model.py doesn't compute, FileNotFoundError if there are no weights.
    """
    args, weights = read_pretrained(model_type)
    loaded = model.GPT(model.GPTConfig(**args | (override_args or {})))
    loaded.load_state_dict(weights)
    return loaded


def read_pretrained(model_type):
    """Arguments of GPTConfig and a state dict of GPT; otherwise like `load_pretrained`."""
    config = read_config_json(model_type)
    kind = config.get('model_type', 'gpt2')
    if kind not in ('gpt2', *LAYOUTS):
        raise UserError(f'{model_type} holds a model of type {kind}, not of gpt2, {" or ".join(LAYOUTS)}')
    args, weights = read_gpt2(model_type) if kind == 'gpt2' else read_layout(model_type)
    if (n_vocab := config.get('unpadded_vocab_size', args['vocab_size'])) < args['vocab_size']:
        args['vocab_size'] = n_vocab
        for name in ('transformer.wte.weight', 'lm_head.weight'):
            weights[name] = weights[name][:n_vocab]
    return args, weights


def read_gpt2(model_type):
    """model.load_transformers_gpt2, from the local cache if the hub can't be reached; errors of one line."""
    go_offline_if_cut_off()
    if Path(model_type, 'config.json').is_file():
        check_size(Path(model_type))
        from transformers import logging
        logging.disable_progress_bar()  # it would stand before the one line of an error
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    try:
        return model.load_transformers_gpt2(model_type)
    except (*UNREADABLE, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, MemoryError) or (
                traceback.extract_tb(error.__traceback__)[-1].filename == model.__file__
                and isinstance(error, (ValueError, FileNotFoundError))):
            raise  # in one line already; the errors of transformers may have many
        raise MissingFile(f'no GPT-2 weights in {model_type} ({reason_of(error)}); without a network, '
                                'name a folder that holds them: --init_from=PATH') from None


def check_size(folder):
    """ValueError if a folder's config.json asks for more parameters than its weights' files have bytes:
    transformers would take the memory first."""
    sizes = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'vocab_size': 50257, 'n_positions': 1024}  # defaults
    c = sizes | read_config_json(folder)
    with explain_failure(f'no GPT-2 weights in {folder}; name a folder that holds them: --init_from=PATH'):
        if wrong := [f'{k}={c[k]!r:.40}' for k in sizes if not isinstance(c[k], int) or c[k] < 1]:
            raise UserError(f'config.json has {", ".join(wrong)}')
        weights = c['n_embd'] * (c['vocab_size'] + c['n_positions'] + 12 * c['n_layer'] * c['n_embd'])
        asked = weights + 500 * c['n_layer']  # the names of a layer's tensors
        found = sum(p.stat().st_size for p in Path(folder).iterdir() if p.suffix in ('.safetensors', '.bin'))
        if found and asked > found:
            raise UserError(f'config.json asks for {asked:,} bytes at least, the weights have {found:,}')


def own_tokenizer(folder):
    """The tokenizer in a folder, None if it has none. ValueError for one that can't be read: GPT-2's must not
    take its place."""
    return load_tokenizer(folder) if Path(folder).is_dir() else None


def folder_tokenizer(model_type):
    """The folder's own tokenizer, else GPT-2's, unless the size of the folder's vocabulary is another."""
    if own := own_tokenizer(model_type):
        return own
    path = Path(model_type, 'config.json')
    if path.is_file():
        with explain_failure(f'{path} can\'t be read'):
            size = json.loads(path.read_text(encoding='utf-8')).get('vocab_size', GPT2_VOCAB)
        if size not in (GPT2_VOCAB, PADDED_GPT2_VOCAB):
            return NoTokenizer(size, f'{model_type} has no tokenizer.json, and GPT-2\'s vocabulary isn\'t of '
                                     f'{size}')
    return GPT2Tokenizer()


# ---------------------------------------------------------------------------- to transformers

def beyond(kind, args):
    """The settings of a model that an architecture, gpt2 or llama, doesn't compute: ['qk_norm=True']."""
    args = DEFAULTS | args
    wrong = [k for k, v in args.items() if v not in ALLOWED[kind].get(k, [v])
             or k not in EXPRESSIBLE and v != DEFAULTS.get(k)]
    wrong += ['n_kv_head'] * (kind == 'gpt2' and args['n_kv_head'] not in (0, args['n_head']))
    return [f'{k}={args[k]}' for k in wrong]


def architecture(args):
    """model_type of the folder that a model becomes: gpt2, llama, or OWN_CODE."""
    return next((kind for kind in ALLOWED if not beyond(kind, args)), OWN_CODE)


def to_transformers(args, weights):
    """config, weights: a transformers configuration and state dict that compute the same, tied weights once.

    args: of GPTConfig; options at their defaults may be left out. GPT-2's architecture becomes a GPT2Config,
    Llama's a LlamaConfig, any other that of modeling_gpt.py.
    """
    full = DEFAULTS | args
    full['n_kv_head'] = full['n_kv_head'] or full['n_head']
    kind = architecture(args)
    if kind == OWN_CODE:
        config, weights = to_own_code(args, weights)
    else:
        config, weights = (to_gpt2 if kind == 'gpt2' else to_llama)(full, weights)
    if full['tie_weights']:
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith('lm_head.weight')}
    return config, weights


def to_gpt2(args, weights):
    """Like `to_transformers`; layers without biases get zeros."""
    from transformers import GPT2Config
    sizes = {k: args[k] for k in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'bias')}
    config = GPT2Config(**sizes, **NO_TOKENS, n_positions=args['block_size'],
                        activation_function=ACTIVATIONS[args['activation']],
                        n_ctx=args['block_size'],  # of older versions, llama.cpp's converter and mlx-lm
                        tie_word_embeddings=args['tie_weights'],
                        resid_pdrop=args['dropout'], embd_pdrop=args['dropout'], attn_pdrop=args['dropout'],
                        architectures=['GPT2LMHeadModel'])
    zeros = {} if args['bias'] else {
        name.removesuffix('weight') + 'bias': tensor.new_zeros(tensor.shape[0])
        for name, tensor in weights.items() if '.h.' in name or '.ln_f.' in name}
    weights = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in weights.items()}
    return config, weights | zeros


def with_pad_token(args, weights, tokenizer):
    """args, weights with an id for PAD: a vocabulary without an end of documents whose ids are all taken gets
    one more, as unlikely as the one that is least likely after any other. Our own code needs none."""
    n_vocab = args['vocab_size']
    if tokenizer.end is not None or tokenizer.n_vocab < n_vocab or architecture(args) == OWN_CODE:
        return args, weights
    gpt = model.GPT(model.GPTConfig(**args)).eval()
    gpt.load_state_dict(weights)
    with torch.no_grad():
        log_p = gpt(torch.arange(n_vocab)[:, None])[0][:, 0].log_softmax(dim=-1)  # (V, V)
    rarest = log_p.amax(dim=0).argmin()
    more = {name: torch.cat((t, t[rarest, None])) for name, t in weights.items()
            if name in ('transformer.wte.weight', 'lm_head.weight')}
    return args | {'vocab_size': n_vocab + 1}, weights | more


def write_tokenizer(folder, tokenizer, block_size):
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads; returns their names."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    path, kind = Path(folder, 'tokenizer.json'), tokenizer.to_dict()['kind']
    if kind == 'bpe':
        end = next((name for name, i in tokenizer.special.items() if i == tokenizer.end), None)
        special = dict.fromkeys(ENDS, end) if end else {}
        path.write_text(tokenizer.json, encoding='utf-8')
    elif kind == 'char':
        special = {'pad_token': PAD}
        theirs = Tokenizer(models.WordLevel(tokenizer.stoi | {PAD: tokenizer.n_vocab}))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        theirs.decoder = decoders.Fuse()
    else:
        ranks = tokenizer.bpe._mergeable_ranks  # {bytes: id}; 188 to 255 are unprintable bytes
        shown = {t: chr(t[0] if i < 188 else 256 + i - 188) for t, i in ranks.items() if len(t) == 1}
        names = {token: ''.join(shown[bytes([b])] for b in token) for token in ranks}
        merges = [tuple(names[part] for part in last_merge(token, ranks))
                  for token in sorted(ranks, key=ranks.get) if len(token) > 1]
        theirs = Tokenizer(models.BPE({names[t]: i for t, i in ranks.items()}, merges))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        special = dict.fromkeys(ENDS, END)
    if kind != 'bpe':
        theirs.add_special_tokens([special['pad_token']])
        theirs.save(str(path))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': block_size,
                'model_input_names': ['input_ids', 'attention_mask'],  # transformers 4 adds a third otherwise
                'clean_up_tokenization_spaces': False, **special}
    Path(folder, 'tokenizer_config.json').write_text(json.dumps(settings, indent=2), encoding='utf-8')
    return [path.name, 'tokenizer_config.json']


def add_chat_template(folder, template):
    """Write a template of `template_for` into a folder's tokenizer_config.json, so that the pipelines of
    transformers take messages."""
    path, text = Path(folder, 'tokenizer_config.json'), jinja(check_template(template))
    settings = json.loads(path.read_text(encoding='utf-8')) | {'chat_template': text}
    path.write_text(json.dumps(settings, indent=2), encoding='utf-8')


def last_merge(token, ranks):
    """The two parts that byte pair encoding joins last to a token, bytes each. ranks: {bytes: rank}"""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
