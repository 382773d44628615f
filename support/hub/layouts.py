"""
Folders of models that aren't GPT-2s: Llama's architecture, and our own, whose code lies in the folder.

    config, weights = to_llama(args, weights)     # for transformers' LlamaForCausalLM
    config, weights = to_own_code(args, weights)  # for modeling_gpt.py, beside model.py in the folder
    args, weights = read_layout('exported')       # the inverse: of GPTConfig, and a state dict of GPT
"""

import json
import shutil
from pathlib import Path

import torch

import model
from model import GPT, GPTConfig
from support.errors import MissingFile, UserError
from support.machine.files import explain_failure, replacing
from support import attention

LLAMA = {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu'}  # what makes a GPT a Llama
LLAMA_NAMES = {  # ours: theirs, whose rows are stacked in ours
    'transformer.wte': ('model.embed_tokens',), 'transformer.ln_f': ('model.norm',), 'lm_head': ('lm_head',),
    'ln_1': ('input_layernorm',), 'ln_2': ('post_attention_layernorm',),
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.c_proj': ('self_attn.o_proj',),
    'mlp.c_fc': ('mlp.gate_proj', 'mlp.up_proj'), 'mlp.c_proj': ('mlp.down_proj',),
}
NO_TOKENS = {'bos_token_id': None, 'eos_token_id': None}  # their defaults may lie outside the vocabulary
OWN_CODE = 'own_gpt'  # model_type of modeling_gpt.py
FILES = ('model.safetensors', 'config.json', 'generation_config.json')
CODE = {'modeling_gpt.py': Path(__file__).with_name('modeling_gpt.py'), 'model.py': model.__file__,
        'attention.py': attention.__file__}  # {name in the folder: source}


# ---------------------------------------------------------------------------- to transformers

def llama_names(name):
    """Their names of the tensors that are stacked in our tensor `name`."""
    module, _, kind = name.rpartition('.')  # kind: weight or bias
    layer = ''
    if module.startswith('transformer.h.'):
        number, module = module.removeprefix('transformer.h.').split('.', 1)
        layer = f'model.layers.{number}.'
    return [f'{layer}{theirs}.{kind}' for theirs in LLAMA_NAMES[module]]


def to_llama(args, weights):
    """A LlamaConfig and its state dict; its rotary positions rotate the same pairs of channels as ours."""
    from transformers import LlamaConfig
    hs = args['n_embd'] // args['n_head']
    heads = [args['n_head'] * hs, args['n_kv_head'] * hs, args['n_kv_head'] * hs]
    named = {}
    for name, tensor in weights.items():
        theirs = llama_names(name)
        parts = tensor.split(heads if '.c_attn.' in name else len(tensor) // len(theirs))
        named |= dict(zip(theirs, parts, strict=True))
    config = LlamaConfig(
        **NO_TOKENS, vocab_size=args['vocab_size'], hidden_size=args['n_embd'],
        num_hidden_layers=args['n_layer'],
        intermediate_size=len(named['model.layers.0.mlp.gate_proj.weight']),
        num_attention_heads=args['n_head'], num_key_value_heads=args['n_kv_head'], hidden_act='silu',
        max_position_embeddings=args['block_size'], rms_norm_eps=1e-5, attention_bias=args['bias'],
        mlp_bias=args['bias'], attention_dropout=args['dropout'],
        rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0},
        tie_word_embeddings=args['tie_weights'], architectures=['LlamaForCausalLM'])
    return config, named


def to_own_code(args, weights):
    """The configuration and state dict of modeling_gpt.py's OwnGPTForCausalLM."""
    from transformers import PretrainedConfig

    class OwnGPTConfig(PretrainedConfig):
        model_type = OWN_CODE

    config = OwnGPTConfig(
        **NO_TOKENS, model_args=args, vocab_size=args['vocab_size'], hidden_size=args['n_embd'],
        num_hidden_layers=args['n_layer'], num_attention_heads=args['n_head'],
        max_position_embeddings=args['block_size'], tie_word_embeddings=args.get('tie_weights', True),
        use_cache=False, architectures=['OwnGPTForCausalLM'],
        auto_map={'AutoConfig': 'modeling_gpt.OwnGPTConfig',
                  'AutoModelForCausalLM': 'modeling_gpt.OwnGPTForCausalLM'})
    return config, {f'gpt.{name}': tensor for name, tensor in weights.items()}


def write_model(folder, config, weights, n_tokens, pad):
    """Write FILES, and CODE for a model of our own code; returns their names. n_tokens: ids that stand for
    text and may be generated; pad: the id for padding, which may lie beyond."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig
    if config.model_type == 'gpt2' and config.tie_word_embeddings:  # as in OpenAI's files; mlx-lm needs it
        weights = {name.removeprefix('transformer.'): tensor for name, tensor in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / 'model.safetensors') as temporary:
        save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.items()}, temporary,
                  metadata={'format': 'pt'})
    half = {'max_new_tokens': max(1, config.max_position_embeddings // 2)}  # max_length warns at each call
    config.task_specific_params = {'text-generation': half}  # by which pipelines of transformers 4 find it
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=pad,
                     suppress_tokens=list(range(n_tokens, config.vocab_size)) or None, **half
                     ).save_pretrained(folder)
    code = CODE if config.model_type == OWN_CODE else {}
    for name, source in code.items():
        shutil.copyfile(source, folder / name)
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')  # safetensors: for its owner only
    return [*FILES, *code]


# ---------------------------------------------------------------------------- from a folder

def read_config_json(folder):
    """config.json of a folder as a dict, {} if there is none; ValueError if it can't be read."""
    path = Path(folder, 'config.json')
    if not path.is_file():
        return {}
    with explain_failure(f'no GPT-2 weights in {folder}; name a folder that holds them: --init_from=PATH'):
        return dict(json.loads(path.read_text(encoding='utf-8')))


def read_layout(folder):
    """Arguments of GPTConfig and a state dict of GPT: of a folder in one of LAYOUTS.

    Raises FileNotFoundError if it has no weights, and ValueError, before any is used, if they aren't those of
    its config.json, or if model.py can't compute the model exactly.
    """
    kind = read_config_json(folder)['model_type']
    paths = sorted(Path(folder).glob('model*.safetensors'))
    if not paths:
        raise MissingFile(f'{folder} has a config.json of type {kind}, but no model.safetensors')
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    with explain_failure(f'{folder} holds no model of type {kind} that can be read', SafetensorError,
                         StrictDataclassError):
        args, names_of, zeros = LAYOUTS[kind](folder)
        theirs = {name: tensor for path in paths for name, tensor in load_file(path).items()
                  if not name.endswith('rotary_emb.inv_freq')}  # of older versions
        if args['n_layer'] > len(theirs):
            raise UserError(f'config.json asks for {args["n_layer"]:,} layers, the weights are '
                             f'{len(theirs):,} tensors')
        with torch.device('meta'):
            asked = GPT(GPTConfig(**args)).state_dict()
        if args.get('tie_weights', True):
            head, embedding = names_of('lm_head.weight')[0], names_of('transformer.wte.weight')[0]
            if not torch.equal(theirs.setdefault(head, theirs[embedding]), theirs[embedding]):
                raise UserError(f'config.json ties {head} to {embedding}, which differs')
        return args, stacked(theirs, asked, names_of, zeros)


def stacked(theirs, asked, names_of, zeros):
    """Our state dict of their tensors. asked: a state dict of the shapes to get; zeros: which of our tensors
    have none of theirs. ValueError for those that are missing, left over, of another shape or not finite."""
    weights, bad = {}, []
    for name, like in asked.items():
        if zeros(name):
            weights[name] = torch.zeros(like.shape)
            continue
        missing = [part for part in names_of(name) if part not in theirs]
        bad += [f'missing: {part}' for part in missing]
        if not missing:
            parts = [theirs.pop(part) for part in names_of(name)]
            weights[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
            if weights[name].shape != like.shape:
                bad.append(f'mismatched: {name}, {tuple(weights[name].shape)} instead of {tuple(like.shape)}')
            elif not weights[name].isfinite().all():
                bad.append(f'not finite: {name}')
    if bad := bad + [f'unexpected: {name}' for name in theirs]:
        raise UserError(', '.join(bad[:9]))
    return weights


def llama_layout(folder):
    """Arguments of GPTConfig, `llama_names`, and which tensors are zeros here, as Llama has no such biases.
    ValueError, naming the settings, for a Llama that model.py doesn't compute."""
    from transformers import LlamaConfig
    c = LlamaConfig.from_pretrained(folder)
    args = {'n_layer': c.num_hidden_layers, 'n_head': c.num_attention_heads, 'n_embd': c.hidden_size,
            'block_size': c.max_position_embeddings, 'vocab_size': c.vocab_size,
            'bias': c.attention_bias or c.mlp_bias, 'dropout': c.attention_dropout,
            'tie_weights': c.tie_word_embeddings, **LLAMA}
    if c.num_key_value_heads != c.num_attention_heads:
        args['n_kv_head'] = c.num_key_value_heads
    needed = {'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'rope_type': 'default', 'rope_theta': 10000.0,
              'partial_rotary_factor': 1.0, 'head_dim': c.hidden_size // c.num_attention_heads,
              'intermediate_size': GPTConfig(**args).n_inner}
    found = c.to_dict() | (c.rope_parameters or {})
    if wrong := [f'{k}={found[k]} (not {v})' for k, v in needed.items() if found.get(k) not in (None, v)]:
        raise UserError(f'model.py doesn\'t compute this Llama: {", ".join(wrong)}')
    has_bias = {'attn': c.attention_bias, 'mlp': c.mlp_bias}
    return args, llama_names, lambda name: name.endswith('.bias') and not has_bias[name.split('.')[3]]


def own_layout(folder):
    """Like `llama_layout`, of an export with its own code, which isn't run."""
    return read_config_json(folder)['model_args'], lambda name: [f'gpt.{name}'], lambda name: False


LAYOUTS = {'llama': llama_layout, OWN_CODE: own_layout}
