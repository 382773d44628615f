"""
Weights and tokenizers to and from Hugging Face's transformers.

    args, weights = load_gpt2('gpt2-xl')  # of GPTConfig, and a state dict with model.py's names and layouts
    config, weights = to_transformers(args, weights)  # a GPT2Config or a LlamaConfig, and their state dict
"""

import json
from pathlib import Path

from dataset import CharTokenizer, GPT2Tokenizer, go_offline_if_cut_off

GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # 124M, 350M, 774M, 1558M
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu',
               'relu2': 'relu2'}  # theirs: ours
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # GPT-2's are (in, out) there
NEEDED = {'GPT-2': {'pos_emb': 'learned', 'norm': 'layernorm'},
          'Llama': {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu'}}
EXPRESSIBLE = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout', 'activation',
               'pos_emb', 'norm', 'n_kv_head', 'tie_weights',
               'init', 'ngram_rows'}  # of the start, and of a table that ngram=1 hasn't got
NO_TOKENS = {'bos_token_id': None, 'eos_token_id': None}  # theirs may be none of the vocabulary
LLAMA_NAMES = {  # ours: theirs, which lie one below the other in ours
    'transformer.wte': ('model.embed_tokens',), 'transformer.ln_f': ('model.norm',), 'lm_head': ('lm_head',),
    'ln_1': ('input_layernorm',), 'ln_2': ('post_attention_layernorm',),
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.c_proj': ('self_attn.o_proj',),
    'mlp.c_fc': ('mlp.gate_proj', 'mlp.up_proj'), 'mlp.c_proj': ('mlp.down_proj',),
}


# ---------------------------------------------------------------------------- from transformers

def load_gpt2(model_type):
    """args, weights: a Hugging Face GPT-2 as arguments of GPTConfig and a state dict of GPT.

    model_type: one of GPT2_SIZES (from the hub or its local cache) or a folder with config.json and weights,
    of any size. Raises ValueError where model.py computes something else, FileNotFoundError where there are
    no weights.
    """
    theirs = load_transformers_gpt2(model_type)
    weights = {name: tensor.T if name.endswith(TRANSPOSED) else tensor
               for name, tensor in theirs.state_dict().items()
               if not name.endswith(('.attn.bias', '.attn.masked_bias'))}  # causal masks of older versions
    args = gpt2_args(theirs.config, model_type)
    biases = [name for name in weights if name.endswith('bias')]
    if not args['bias'] and not any(weights[name].any() for name in biases):
        return args, {name: tensor for name, tensor in weights.items() if name not in biases}
    return args | {'bias': True}, weights


def load_transformers_gpt2(model_type):
    """The transformers model, from a folder, the hub or, without a network, the hub's local cache."""
    if model_type not in GPT2_SIZES and not Path(model_type, 'config.json').is_file():
        raise FileNotFoundError(f'{model_type} is neither one of {", ".join(GPT2_SIZES)} nor a folder with '
                                'a Hugging Face config.json')
    go_offline_if_cut_off()
    from transformers import GPT2Config, GPT2LMHeadModel, logging
    logging.set_verbosity_error()
    try:
        kind = GPT2Config.get_config_dict(model_type)[0].get('model_type', 'gpt2')
        theirs = GPT2LMHeadModel.from_pretrained(model_type) if kind == 'gpt2' else None
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f'no GPT-2 weights in {model_type}: {reason[:200]} Without a network, name a '
                                'folder that holds them: --init_from=PATH') from None
    if theirs is None:
        raise ValueError(f'{model_type} holds a model of type {kind}, not a GPT-2')
    return theirs


def gpt2_args(theirs, model_type):
    """GPTConfig arguments of a transformers GPT2Config; ValueError where the maths would differ."""
    needed = {'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
              'scale_attn_by_inverse_layer_idx': False}
    wrong = [f'{k}={getattr(theirs, k)}' for k, v in needed.items() if getattr(theirs, k) != v]
    if theirs.n_inner not in (None, 4 * theirs.n_embd):
        wrong.append(f'n_inner={theirs.n_inner}')
    if theirs.activation_function not in ACTIVATIONS:
        wrong.append(f'activation_function={theirs.activation_function}')
    if wrong:
        raise ValueError(f'{model_type} is not a GPT-2 that model.py computes: {", ".join(wrong)}')
    return {'n_layer': theirs.n_layer, 'n_head': theirs.n_head, 'n_embd': theirs.n_embd,
            'block_size': theirs.n_positions, 'vocab_size': theirs.vocab_size,
            'bias': getattr(theirs, 'bias', True),  # written by to_transformers
            'dropout': theirs.resid_pdrop, 'activation': ACTIVATIONS[theirs.activation_function],
            'tie_weights': theirs.tie_word_embeddings}


def folder_tokenizer(model_type):
    """The tokenizer of a size of GPT-2, or of a folder: of characters if export.py wrote such a one there."""
    path = Path(model_type, 'tokenizer.json')
    if path.is_file():
        model = json.loads(path.read_text(encoding='utf-8')).get('model', {})
        if model.get('type') == 'WordLevel':
            return CharTokenizer({i: c for c, i in model['vocab'].items()})
    return GPT2Tokenizer()


# ---------------------------------------------------------------------------- to transformers

def to_transformers(args, weights):
    """config, weights: the same function as a transformers configuration and state dict, tied weights once.

    args: of GPTConfig; options at their defaults may be left out. What has GPT-2's architecture becomes a
    GPT2Config, what has Llama's a LlamaConfig. Raises ValueError, naming the settings, for all else.
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
    """As `to_transformers`; where layers have no biases, they get zeros."""
    from transformers import GPT2Config
    sizes = {k: args[k] for k in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'bias')}
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == args['activation'])
    config = GPT2Config(**sizes, **NO_TOKENS, n_positions=args['block_size'],
                        activation_function=activation, tie_word_embeddings=args['tie_weights'],
                        resid_pdrop=args['dropout'], embd_pdrop=args['dropout'], attn_pdrop=args['dropout'],
                        architectures=['GPT2LMHeadModel'])
    zeros = {} if args['bias'] else {
        name.removesuffix('weight') + 'bias': tensor.new_zeros(tensor.shape[0])
        for name, tensor in weights.items() if '.h.' in name or '.ln_f.' in name}
    weights = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in weights.items()}
    return config, weights | zeros


def to_llama(args, weights):
    """As `to_transformers`; its rotary positions turn the same pairs of channels as ours."""
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
    """Write the two files that AutoTokenizer reads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    if tokenizer.to_dict()['kind'] == 'char':
        theirs = Tokenizer(models.WordLevel(tokenizer.stoi))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        theirs.decoder, special = decoders.Fuse(), {}
    else:
        ranks = tokenizer.bpe._mergeable_ranks  # {bytes: id}; bytes that can't be shown come from 188 on
        shown = {t: chr(t[0] if i < 188 else 256 + i - 188) for t, i in ranks.items() if len(t) == 1}
        names = {token: ''.join(shown[bytes([b])] for b in token) for token in ranks}
        merges = [(names[t[:n]], names[t[n:]]) for t in ranks for n in range(1, len(t))
                  if t[:n] in ranks and t[n:] in ranks]
        theirs = Tokenizer(models.BPE({names[t]: i for t, i in ranks.items()}, merges))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        theirs.add_special_tokens(['<|endoftext|>'])
        special = dict.fromkeys(('bos_token', 'eos_token'), '<|endoftext|>')
    theirs.save(str(Path(folder, 'tokenizer.json')))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': block_size,
                'clean_up_tokenization_spaces': False, **special}
    Path(folder, 'tokenizer_config.json').write_text(json.dumps(settings, indent=2), encoding='utf-8')
