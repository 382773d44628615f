"""
A model of model.py as a Hugging Face folder: its configuration, weights, tokenizer and code.

    config, weights = to_transformers(args, state_dict)  # a configuration of theirs, a state dict
    names = write_model(folder, config, weights, n_tokens=50257, pad=50256)
    names += write_tokenizer(folder, tokenizer, block_size)
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

import model
from model import GPTConfig
from support import attention
from support.errors import UserError
from support.hub.layouts import ACTIVATIONS, LLAMA, OWN_CODE, SCALING, TRANSPOSED, LlamaLayout
from support.machine.files import explain_failure
from support.text.bpe import BPETokenizer
from support.text.chat import check_template, jinja
from support.text.tokenizer import PAD, GPT2Tokenizer, gpt2_json

HF_NAMES = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != 'gelu_pytorch_tanh'}
# settings with any value in every architecture; the last four say nothing of a trained model
FREE = {'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'dropout', 'norm_eps',
        'tie_weights', 'n_inner', 'init', 'init_gain', 'zero_head', 'ngram_rows'}
LLAMA_FREE = FREE | {'n_kv_head', 'head_size', 'rope_theta', 'rope_scaling'}
NO_TOKENS = {'bos_token_id': None, 'eos_token_id': None}  # defaults may be beyond the vocabulary
FILES = ('model.safetensors', 'config.json', 'generation_config.json')
CODE = {'modeling_gpt.py': Path(__file__).with_name('modeling_gpt.py'), 'model.py': model.__file__,
        'attention.py': attention.__file__}  # {name in the folder: source}
KINDS = {'gpt2': 'GPT-2\'s architecture', 'llama': 'Llama\'s architecture',
         OWN_CODE: 'with its own code, model.py'}
ENDS = ('bos_token', 'eos_token', 'pad_token')


# ---------------------------------------------------------------------------- architectures

def allowed(kind, c):
    """{setting: values} of a GPTConfig that an architecture computes, besides the default."""
    if kind == 'gpt2':
        return {'bias': (True, False), 'pos_emb': ('learned',), 'norm': ('layernorm',),
                'activation': ('gelu', 'gelu_tanh'), 'n_kv_head': (c.n_head,),
                'head_size': (c.n_embd // c.n_head,), 'qkv_bias': (c.bias,)}
    exact = {setting: (value,) for setting, value in LLAMA.items()}
    return exact | {'bias': (True, False), 'qkv_bias': (True, False)}


def beyond(kind, args):
    """The settings of a model that an architecture doesn't compute: ['qk_norm=True']."""
    c, free = GPTConfig(**args), FREE if kind == 'gpt2' else LLAMA_FREE
    known, default = allowed(kind, c), asdict(GPTConfig())
    return [f'{k}={v}' for k, v in asdict(c).items()
            if k not in free and v not in known.get(k, (default[k],)) and not is_unused(k, c)]


def is_unused(name, c):
    """Whether a setting acts only with another one, which is off."""
    if name == 'qkv_bias':
        return c.bias
    if name == 'pa_norm':
        return c.attn_type == 'SM'
    return name.startswith('rope_') and c.pos_emb != 'rope'


def architecture(args):
    """model_type of the folder that a model becomes: one of KINDS."""
    return next((kind for kind in KINDS if kind != OWN_CODE and not beyond(kind, args)), OWN_CODE)


def to_transformers(args, weights):
    """config, weights: a transformers configuration and state dict that compute the same, tied
    weights once.

    args: of GPTConfig; options at their defaults may be left out.
    """
    kind, c = architecture(args), GPTConfig(**args)
    if kind == OWN_CODE:
        config, weights = to_own_code(c, weights, args)
    else:
        config, weights = (to_gpt2 if kind == 'gpt2' else to_llama)(c, weights)
    if c.tie_weights:
        weights = {name: t for name, t in weights.items() if not name.endswith('lm_head.weight')}
    return config, weights


def to_gpt2(c, weights):
    """Layers without biases get zeros."""
    from transformers import GPT2Config
    config = GPT2Config(
        **NO_TOKENS, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size,
        bias=c.bias, n_positions=c.block_size,
        n_ctx=c.block_size,  # of older versions, llama.cpp's converter and mlx-lm
        n_inner=None if c.n_inner == 4 * c.n_embd else c.n_inner, layer_norm_epsilon=c.norm_eps,
        activation_function=HF_NAMES[c.activation], tie_word_embeddings=c.tie_weights,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        architectures=['GPT2LMHeadModel'])
    zeros = {} if c.bias else {
        name.removesuffix('weight') + 'bias': tensor.new_zeros(len(tensor))
        for name, tensor in weights.items() if '.h.' in name or '.ln_f.' in name}
    weights = {name: tensor.T if name.endswith(TRANSPOSED) else tensor
               for name, tensor in weights.items()}
    return config, weights | zeros


def to_llama(c, weights):
    """Rotary positions turn the same pairs of channels in Llama as in ours. Biases of queries, keys
    and values alone, Qwen 2's, get zeros for the projection after them: its name would bring Qwen's
    tokenizer along."""
    from transformers import LlamaConfig
    heads = [n * c.head_size for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    named = {}
    for name, tensor in weights.items():
        theirs = LlamaLayout.names(None, name)
        parts = tensor.split(heads if '.c_attn.' in name else len(tensor) // len(theirs))
        named |= dict(zip(theirs, parts, strict=True))
        if c.qkv_bias and not c.bias and name.endswith('attn.c_proj.weight'):
            named[theirs[0].replace('weight', 'bias')] = tensor.new_zeros(len(tensor))
    rope = {'rope_type': 'default', 'rope_theta': c.rope_theta}
    if c.rope_scaling:
        rope |= {'rope_type': 'llama3'} | dict(zip(SCALING, c.rope_scaling, strict=True))
        rope[SCALING[3]] = int(rope[SCALING[3]])
    config = LlamaConfig(
        **NO_TOKENS, vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
        intermediate_size=c.n_inner, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        head_dim=c.head_size, hidden_act='silu', max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, attention_bias=c.bias or c.qkv_bias, mlp_bias=c.bias,
        attention_dropout=c.dropout, rope_parameters=rope,
        tie_word_embeddings=c.tie_weights, architectures=['LlamaForCausalLM'])
    return config, named


def to_own_code(c, weights, args):
    """The configuration and state dict of modeling_gpt.py's OwnGPTForCausalLM."""
    from transformers import PretrainedConfig

    class OwnGPTConfig(PretrainedConfig):
        model_type = OWN_CODE

    config = OwnGPTConfig(
        **NO_TOKENS, model_args=args, vocab_size=c.vocab_size, hidden_size=c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        max_position_embeddings=c.block_size, tie_word_embeddings=c.tie_weights,
        use_cache=False, architectures=['OwnGPTForCausalLM'],
        auto_map={'AutoConfig': 'modeling_gpt.OwnGPTConfig',
                  'AutoModelForCausalLM': 'modeling_gpt.OwnGPTForCausalLM'})
    return config, {f'gpt.{name}': tensor for name, tensor in weights.items()}


def with_pad_token(args, weights, tokenizer):
    """args, weights with an id for PAD: a vocabulary without an end of documents whose ids are all
    taken gets one more, as unlikely as the one that is least likely after any other. Our own code
    needs none."""
    n_vocab = args['vocab_size']
    if tokenizer.end is not None or tokenizer.n_vocab < n_vocab or architecture(args) == OWN_CODE:
        return args, weights
    gpt = model.GPT(GPTConfig(**args)).eval()
    gpt.load_state_dict(weights)
    with torch.no_grad():
        log_p = gpt(torch.arange(n_vocab)[:, None])[0][:, 0].log_softmax(dim=-1)  # (V, V)
    rarest = log_p.amax(dim=0).argmin()
    more = {name: torch.cat((t, t[rarest, None])) for name, t in weights.items()
            if name in ('transformer.wte.weight', 'lm_head.weight')}
    return args | {'vocab_size': n_vocab + 1}, weights | more


# ---------------------------------------------------------------------------- files

def write_model(folder, config, weights, n_tokens, pad):
    """Write FILES, and CODE for a model of our own code; returns their names. n_tokens: ids that
    stand for text and may be generated; pad: the id for padding, which may lie beyond."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig
    if config.model_type == 'gpt2' and config.tie_word_embeddings:  # OpenAI's names; mlx-lm needs them
        weights = {name.removeprefix('transformer.'): t for name, t in weights.items()}
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.items()},
              folder / 'model.safetensors', metadata={'format': 'pt'})
    half = {'max_new_tokens': max(1, config.max_position_embeddings // 2)}  # max_length warns
    config.task_specific_params = {'text-generation': half}  # where transformers 4 looks
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=pad,
        suppress_tokens=list(range(n_tokens, config.vocab_size)) or None, **half
    ).save_pretrained(folder)
    code = CODE if config.model_type == OWN_CODE else {}
    for name, source in code.items():
        shutil.copyfile(source, folder / name)
    # safetensors writes files that their owner alone can read
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')
    return [*FILES, *code]


def write_tokenizer(folder, tokenizer, block_size):
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads; returns their
    names."""
    path = Path(folder, 'tokenizer.json')
    special = {'pad_token': PAD}
    if isinstance(tokenizer, (BPETokenizer, GPT2Tokenizer)):
        is_own = isinstance(tokenizer, BPETokenizer)
        path.write_text(tokenizer.json if is_own else gpt2_json(), encoding='utf-8')
        names = {i: name for name, i in tokenizer.special.items()}
        end, begin = names.get((*tokenizer.ends, None)[0]), names.get(tokenizer.first_token())
        special = {k: v for k, v in zip(ENDS, (begin, end, end)) if v}
    else:
        with explain_failure('no tokenizer.json can hold this vocabulary'):
            if len(tokenizer.stoi) < len(tokenizer.itos):
                raise UserError('several of its ids have one string')
            library_of_characters(tokenizer).save(str(path))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': block_size,
                'model_input_names': ['input_ids', 'attention_mask'],  # transformers 4 adds a third
                'clean_up_tokenization_spaces': False, **special}
    text = json.dumps(settings, indent=2)
    Path(folder, 'tokenizer_config.json').write_text(text, encoding='utf-8')
    return [path.name, 'tokenizer_config.json']


def library_of_characters(tokenizer):
    """A CharTokenizer as the `tokenizers` library's object; of words, too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    library = Tokenizer(models.WordLevel(tokenizer.stoi | {PAD: tokenizer.n_vocab}))
    if tokenizer.space:  # without a decoder, words are joined by spaces
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        library.pre_tokenizer = pre_tokenizers.Split(Regex(tokenizer.longest.pattern), 'isolated')
        library.decoder = decoders.Fuse()
    library.add_special_tokens([PAD])
    return library


def add_chat_template(folder, template):
    """Write a template into a folder's tokenizer_config.json, so that the pipelines of transformers
    take messages."""
    path = Path(folder, 'tokenizer_config.json')
    settings = json.loads(path.read_text(encoding='utf-8')) | template.get('tokens', {})
    settings['chat_template'] = jinja(check_template(template))
    path.write_text(json.dumps(settings, indent=2), encoding='utf-8')
