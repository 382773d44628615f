"""
Weights and tokenizers to and from Hugging Face's transformers.

    model = load_pretrained('gpt2-xl')  # GPT.from_pretrained, which works offline too
    args, weights = read_pretrained('gpt2-xl')  # of GPTConfig, and a state dict of GPT
    config, weights = to_transformers(args, weights)  # a GPT2Config or a LlamaConfig, and their state dict
"""

import json
import traceback
from pathlib import Path

import model
from support.machine.files import UNREADABLE, explain_failure, go_offline_if_cut_off, reason_of
from support.text.chat import check_template, jinja
from support.text.tokenizer import (GPT2_VOCAB, PADDED_GPT2_VOCAB, GPT2Tokenizer, NoTokenizer,
                                    load_tokenizer)

ACTIVATIONS = {'gelu_tanh': 'gelu_new', 'gelu': 'gelu', 'relu2': 'relu2'}  # ours: theirs
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in their GPT-2
NEEDED = {'GPT-2': {'pos_emb': 'learned', 'norm': 'layernorm'},
          'Llama': {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu'}}
EXPRESSIBLE = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout', 'activation',
               'pos_emb', 'norm', 'n_kv_head', 'tie_weights',
               'init', 'ngram_rows'}  # irrelevant after training, and without n-grams
NO_TOKENS = {'bos_token_id': None, 'eos_token_id': None}  # their defaults may lie outside the vocabulary
LLAMA_NAMES = {  # ours: theirs, whose rows are stacked in ours
    'transformer.wte': ('model.embed_tokens',), 'transformer.ln_f': ('model.norm',), 'lm_head': ('lm_head',),
    'ln_1': ('input_layernorm',), 'ln_2': ('post_attention_layernorm',),
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.c_proj': ('self_attn.o_proj',),
    'mlp.c_fc': ('mlp.gate_proj', 'mlp.up_proj'), 'mlp.c_proj': ('mlp.down_proj',),
}


# ---------------------------------------------------------------------------- from transformers

def load_pretrained(model_type, override_args=None):
    """GPT.from_pretrained, which uses the local cache at once if the hub can't be reached.

    Raises ValueError if it isn't a GPT-2 that model.py computes, FileNotFoundError if there are no weights.
    """
    return read_offline_too(model.GPT.from_pretrained, model_type, override_args)


def read_pretrained(model_type):
    """Arguments of GPTConfig and a state dict of GPT; otherwise like `load_pretrained`."""
    return read_offline_too(model.load_transformers_gpt2, model_type)


def read_offline_too(read, model_type, *args):
    """read(model_type, *args), from the local cache if the hub can't be reached, its errors in one line."""
    go_offline_if_cut_off()
    if Path(model_type, 'config.json').is_file():
        check_size(Path(model_type))
        from transformers import logging
        logging.disable_progress_bar()  # it would stand before the one line of an error
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    try:
        return read(model_type, *args)
    except (*UNREADABLE, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, MemoryError) or (
                traceback.extract_tb(error.__traceback__)[-1].filename == model.__file__
                and isinstance(error, (ValueError, FileNotFoundError))):
            raise  # in one line already; the errors of transformers may have many
        raise FileNotFoundError(f'no GPT-2 weights in {model_type} ({reason_of(error)}); without a network, '
                                'name a folder that holds them: --init_from=PATH') from None


def check_size(folder):
    """ValueError if a folder's config.json asks for more parameters than its weights' files have bytes:
    transformers would take the memory first."""
    sizes = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'vocab_size': 50257, 'n_positions': 1024}  # defaults
    with explain_failure(f'no GPT-2 weights in {folder}; name a folder that holds them: --init_from=PATH'):
        c = sizes | json.loads(Path(folder, 'config.json').read_text(encoding='utf-8'))
        if c.get('model_type', 'gpt2') != 'gpt2':
            return
        if wrong := [f'{k}={c[k]!r:.40}' for k in sizes if not isinstance(c[k], int) or c[k] < 1]:
            raise ValueError(f'config.json has {", ".join(wrong)}')
        weights = c['n_embd'] * (c['vocab_size'] + c['n_positions'] + 12 * c['n_layer'] * c['n_embd'])
        asked = weights + 500 * c['n_layer']  # the names of a layer's tensors
        found = sum(p.stat().st_size for p in Path(folder).iterdir() if p.suffix in ('.safetensors', '.bin'))
        if found and asked > found:
            raise ValueError(f'config.json asks for {asked:,} bytes at least, the weights have {found:,}')


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

def to_transformers(args, weights):
    """config, weights: a transformers configuration and state dict that compute the same, tied weights once.

    args: of GPTConfig; options at their defaults may be left out. GPT-2's architecture becomes a GPT2Config,
    Llama's a LlamaConfig. Raises ValueError, naming the settings, for any other.
    """
    args = {'activation': 'gelu', 'pos_emb': 'learned', 'norm': 'layernorm', 'tie_weights': True} | args
    args['n_kv_head'] = args.get('n_kv_head') or args['n_head']
    kind = 'Llama' if any(args[k] == v for k, v in NEEDED['Llama'].items()) else 'GPT-2'
    wrong = [k for k in args if args[k] != NEEDED[kind].get(k, args[k]) or k not in EXPRESSIBLE]
    if kind == 'GPT-2' and args['n_kv_head'] != args['n_head']:
        wrong.append('n_kv_head')
    if wrong:
        raise ValueError(f'no architecture of transformers computes this model: the nearest, {kind}, differs '
                         f'in {", ".join(f"{k}={args[k]}" for k in wrong)}')
    config, weights = (to_llama if kind == 'Llama' else to_gpt2)(args, weights)
    if args['tie_weights']:
        weights.pop('lm_head.weight', None)
    return config, weights


def to_gpt2(args, weights):
    """Like `to_transformers`; layers without biases get zeros."""
    from transformers import GPT2Config
    sizes = {k: args[k] for k in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'bias')}
    config = GPT2Config(**sizes, **NO_TOKENS, n_positions=args['block_size'],
                        activation_function=ACTIVATIONS[args['activation']],
                        tie_word_embeddings=args['tie_weights'],
                        resid_pdrop=args['dropout'], embd_pdrop=args['dropout'], attn_pdrop=args['dropout'],
                        architectures=['GPT2LMHeadModel'])
    zeros = {} if args['bias'] else {
        name.removesuffix('weight') + 'bias': tensor.new_zeros(tensor.shape[0])
        for name, tensor in weights.items() if '.h.' in name or '.ln_f.' in name}
    weights = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in weights.items()}
    return config, weights | zeros


def to_llama(args, weights):
    """Like `to_transformers`; Llama's rotary positions rotate the same pairs of channels as ours."""
    from transformers import LlamaConfig
    hs = args['n_embd'] // args['n_head']
    heads = {'attn.c_attn': [args['n_head'] * hs, args['n_kv_head'] * hs, args['n_kv_head'] * hs]}
    named = {}
    for name, tensor in weights.items():
        layer, kind = '', name.rsplit('.', 1)[1]  # weight or bias
        module = name.removesuffix(f'.{kind}')
        if module.startswith('transformer.h.'):
            number, module = module.removeprefix('transformer.h.').split('.', 1)
            layer = f'model.layers.{number}.'
        theirs = LLAMA_NAMES[module]
        parts = tensor.split(heads.get(module, len(tensor) // len(theirs)))
        named |= {f'{layer}{part}.{kind}': rows for part, rows in zip(theirs, parts, strict=True)}
    config = LlamaConfig(
        **NO_TOKENS, vocab_size=args['vocab_size'], hidden_size=args['n_embd'],
        num_hidden_layers=args['n_layer'],
        intermediate_size=len(named['model.layers.0.mlp.gate_proj.weight']),
        num_attention_heads=args['n_head'], num_key_value_heads=args['n_kv_head'], hidden_act='silu',
        max_position_embeddings=args['block_size'], rms_norm_eps=1e-5, attention_bias=args['bias'],
        mlp_bias=args['bias'], rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0},
        tie_word_embeddings=args['tie_weights'], architectures=['LlamaForCausalLM'])
    return config, named


def write_tokenizer(folder, tokenizer, block_size):
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    path, special = Path(folder, 'tokenizer.json'), {}
    if tokenizer.to_dict()['kind'] == 'bpe':
        path.write_text(tokenizer.json, encoding='utf-8')
        special = {name: name_of_end for name in ('bos_token', 'eos_token')
                   for name_of_end, i in tokenizer.special.items() if i == tokenizer.end}
    elif tokenizer.to_dict()['kind'] == 'char':
        theirs = Tokenizer(models.WordLevel(tokenizer.stoi))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        theirs.decoder = decoders.Fuse()
        theirs.save(str(path))
    else:
        ranks = tokenizer.bpe._mergeable_ranks  # {bytes: id}; 188 to 255 are unprintable bytes
        shown = {t: chr(t[0] if i < 188 else 256 + i - 188) for t, i in ranks.items() if len(t) == 1}
        names = {token: ''.join(shown[bytes([b])] for b in token) for token in ranks}
        merges = [(names[t[:n]], names[t[n:]]) for t in ranks for n in range(1, len(t))
                  if t[:n] in ranks and t[n:] in ranks]
        theirs = Tokenizer(models.BPE({names[t]: i for t, i in ranks.items()}, merges))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        theirs.add_special_tokens(['<|endoftext|>'])
        special = dict.fromkeys(('bos_token', 'eos_token'), '<|endoftext|>')
        theirs.save(str(path))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': block_size,
                'clean_up_tokenization_spaces': False, **special}
    Path(folder, 'tokenizer_config.json').write_text(json.dumps(settings, indent=2), encoding='utf-8')


def add_chat_template(folder, template):
    """Write a template of `template_for` into a folder's tokenizer_config.json, so that the pipelines of
    transformers take messages."""
    path, text = Path(folder, 'tokenizer_config.json'), jinja(check_template(template))
    settings = json.loads(path.read_text(encoding='utf-8')) | {'chat_template': text}
    path.write_text(json.dumps(settings, indent=2), encoding='utf-8')
