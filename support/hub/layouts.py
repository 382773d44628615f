"""
How models of other programs map to model.py's: their settings, and the names and shapes of their
tensors.

    layout = layout_of(read_config_json('smollm2'))
    layout.args                                     # of GPTConfig
    layout.names('transformer.wte.weight')          # ['model.embed_tokens.weight']

Nothing is read here but config.json. A setting with which model.py would compute something else is
refused by its name.
"""

import json
from dataclasses import fields
from pathlib import Path

from model import GPTConfig
from support.errors import UserError
from support.machine.console import print0
from support.machine.files import explain_failure, read_bytes

LLAMA = {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu'}  # what makes a GPT a Llama
LLAMA_NAMES = {  # ours: theirs, whose rows are stacked in ours
    'transformer.wte': ('model.embed_tokens',), 'transformer.ln_f': ('model.norm',),
    'lm_head': ('lm_head',),
    'ln_1': ('input_layernorm',), 'ln_2': ('post_attention_layernorm',),
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.c_proj': ('self_attn.o_proj',),
    'attn.q_norm': ('self_attn.q_norm',), 'attn.k_norm': ('self_attn.k_norm',),  # Qwen 3's
    'mlp.c_fc': ('mlp.gate_proj', 'mlp.up_proj'), 'mlp.c_proj': ('mlp.down_proj',),
}
ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
               'relu2': 'relu2'}  # theirs: ours
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in their GPT-2
SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
OWN_CODE = 'own_gpt'  # model_type of modeling_gpt.py
SIZES = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
         'num_attention_heads', 'num_key_value_heads', 'head_dim', 'max_position_embeddings',
         'sliding_window', 'n_layer', 'n_head', 'n_embd', 'n_inner', 'n_positions')
BUFFERS = ('rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias')  # of older files, no weights


def read_config_json(folder):
    """config.json of a folder as a dict, {} if there is none; ValueError if it can't be read."""
    path = Path(folder, 'config.json')
    if not path.is_file():
        return {}
    with explain_failure(f'{path} can\'t be read; name a folder that holds a model: '
                         '--init_from=PATH'):
        return dict(json.loads(read_bytes(path)))


def layout_of(config):
    """The layout of a model by its config.json, a dict. UserError for a model that model.py doesn't
    compute."""
    kind = config.get('model_type', 'gpt2')
    if kind not in LAYOUTS:
        raise UserError(f'it is a model of type {kind!r:.40}, not of {", ".join(LAYOUTS)}')
    if config.get('quantization_config'):
        raise UserError('it has quantization_config: take the model with its full weights')
    return LAYOUTS[kind](config)


def with_defaults(class_name, config):
    """A config.json with the defaults of its class in transformers, as an object. ValueError for
    sizes that are none."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    if wrong := [f'{k}={config[k]!r:.40}' for k in SIZES if not is_size(config.get(k, 1))]:
        raise UserError(f'config.json has {", ".join(wrong)}')
    transformers.logging.set_verbosity_error()
    with explain_failure('config.json is none of its type', StrictDataclassError, ArithmeticError):
        return getattr(transformers, class_name).from_dict(config)


def is_size(value):
    return value is None or isinstance(value, int) and not isinstance(value, bool) and value >= 1


def refuse(kind, found, needed):
    """UserError that names the settings of `found`, a dict, which aren't those needed, {name:
    values}."""
    if wrong := [f'{k}={found[k]!r:.60} (not {" or ".join(map(str, allowed))})'
                 for k, allowed in needed.items() if k in found and found[k] not in allowed]:
        raise UserError(f'model.py doesn\'t compute this {kind}: {", ".join(wrong)}')


# ---------------------------------------------------------------------------- layouts

def are_zero(files, names):
    """Whether the tensors of these names are all 0."""
    return not any(bool(files.read(name).any()) for name in names)


class Layout:
    """A model's tensors in its files. args: of GPTConfig."""

    def __init__(self, config):
        self.args = {}

    def args_with(self, files):
        """args, with what only the weights tell."""
        return self.args

    def names(self, name):
        """Their names of the tensors that are stacked in our tensor `name`."""
        return [name]

    def own_name(self, name):
        """A name in a file as `names` gives it."""
        return name

    def is_ignored(self, name):
        """Whether a tensor in their files is no weight."""
        return name.endswith(BUFFERS)

    def is_transposed(self, name):
        return False

    def lacks(self, name):
        """Whether they have no such tensor, so that ours is 0."""
        return False


class GPT2Layout(Layout):

    def __init__(self, config):
        c = with_defaults('GPT2Config', config)
        refuse('GPT-2', c.to_dict(), {
            'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
            'add_cross_attention': (False,), 'activation_function': tuple(ACTIVATIONS)})
        self.args = {
            'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd,
            'block_size': c.n_positions, 'vocab_size': c.vocab_size,
            'bias': config.get('bias', True), 'dropout': c.resid_pdrop,
            'norm_eps': c.layer_norm_epsilon, 'n_inner': c.n_inner or 0,
            'activation': ACTIVATIONS[c.activation_function],
            'tie_weights': c.tie_word_embeddings}

    def args_with(self, files):
        """export.py writes bias=False, and biases of 0, for a model without; trained on, they may
        differ."""
        names = [n for n in files.shapes if n.endswith('.bias') and not n.endswith(BUFFERS)]
        self.args['bias'] = self.args['bias'] or not are_zero(files, names)
        return self.args

    def names(self, name):
        return [name.removeprefix('transformer.')]

    def own_name(self, name):
        return name.removeprefix('transformer.')  # OpenAI's have no prefix, transformers' have one

    def is_ignored(self, name):
        return name.endswith(BUFFERS) or name.endswith('.bias') and not self.args['bias']

    def is_transposed(self, name):
        return name.endswith(TRANSPOSED)


class LlamaLayout(Layout):
    """Llama, and those that differ from it by a bias, a window or a default."""

    def __init__(self, config, class_name='LlamaConfig'):
        c = with_defaults(class_name, config)
        found = c.to_dict() | (c.rope_parameters or {})
        refuse(class_name.removesuffix('Config'), found, {
            'hidden_act': ('silu',), 'rope_type': ('default', 'llama3'),
            'partial_rotary_factor': (1.0, None)})
        self.has_bias = {'attn': found.get('attention_bias', False),
                         'mlp': found.get('mlp_bias', False)}
        self.args = {
            'n_layer': c.num_hidden_layers, 'n_head': c.num_attention_heads,
            'n_embd': c.hidden_size, 'block_size': c.max_position_embeddings,
            'vocab_size': c.vocab_size,
            'bias': any(self.has_bias.values()), 'dropout': c.attention_dropout,
            'n_kv_head': c.num_key_value_heads or c.num_attention_heads,
            'n_inner': c.intermediate_size,
            'head_size': found.get('head_dim') or c.hidden_size // c.num_attention_heads,
            'norm_eps': c.rms_norm_eps, 'tie_weights': c.tie_word_embeddings,
            'rope_theta': float(found.get('rope_theta', 10000.0)), **LLAMA}
        if found.get('rope_type') == 'llama3':
            self.args['rope_scaling'] = tuple(float(found[k]) for k in SCALING)
        self.crop_to_window(found)

    def args_with(self, files):
        """export.py writes biases of 0 for what has none beside queries, keys and values."""
        names = [name for name in files.shapes if name.endswith('o_proj.bias')]
        if self.has_bias == {'attn': True, 'mlp': False} and are_zero(files, names):
            self.args |= {'bias': False, 'qkv_bias': True}
        return self.args

    def is_ignored(self, name):
        return name.endswith(BUFFERS) or name.endswith('o_proj.bias') and not self.args['bias']

    def crop_to_window(self, found):
        """Texts no longer than a sliding window, up to which it makes no difference."""
        window, block_size = found.get('sliding_window'), self.args['block_size']
        if window and window < block_size and found.get('use_sliding_window', True):
            print0(f'its attention looks back sliding_window={window:,} tokens: block_size is '
                   f'{window:,}, not {block_size:,}')
            self.args['block_size'] = window

    def names(self, name):
        module, _, kind = name.rpartition('.')  # kind: weight or bias
        layer = ''
        if module.startswith('transformer.h.'):
            number, module = module.removeprefix('transformer.h.').split('.', 1)
            layer = f'model.layers.{number}.'
        return [f'{layer}{theirs}.{kind}' for theirs in LLAMA_NAMES[module]]

    def lacks(self, name):
        return name.endswith('.bias') and not self.has_bias[name.split('.')[3]]


class MistralLayout(LlamaLayout):
    def __init__(self, config):
        super().__init__(config, 'MistralConfig')


class Qwen2Layout(LlamaLayout):
    def __init__(self, config):
        super().__init__(config, 'Qwen2Config')
        self.args['qkv_bias'] = True
        self.has_bias['attn'] = True


class Qwen3Layout(LlamaLayout):
    def __init__(self, config):
        super().__init__(config, 'Qwen3Config')
        self.args['qk_norm_weights'] = True


class OwnLayout(Layout):
    """An export with its own code, which isn't run."""

    def __init__(self, config):
        with explain_failure('config.json has no model_args of a GPT'):
            self.args = dict(config['model_args'])
        if unknown := {*self.args} - {f.name for f in fields(GPTConfig)}:
            raise UserError('config.json has model_args that don\'t exist here: '
                            f'{", ".join(map(str, unknown))}')

    def names(self, name):
        return [f'gpt.{name}']


LAYOUTS = {'gpt2': GPT2Layout, 'llama': LlamaLayout, 'mistral': MistralLayout, 'qwen2': Qwen2Layout,
           'qwen3': Qwen3Layout, OWN_CODE: OwnLayout}
