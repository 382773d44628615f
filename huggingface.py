"""
Weights to and from Hugging Face's transformers.

    args, weights = load_gpt2('gpt2-xl')  # of GPTConfig, and a state dict with model.py's names and layouts
"""

from pathlib import Path

from dataset import go_offline_if_cut_off

GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # 124M, 350M, 774M, 1558M
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}  # theirs: ours
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # theirs are (in, out)


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
    return gpt2_args(theirs.config, model_type), weights


def load_transformers_gpt2(model_type):
    """The transformers model, from a folder, the hub or, without a network, the hub's local cache."""
    if model_type not in GPT2_SIZES and not Path(model_type, 'config.json').is_file():
        raise FileNotFoundError(f'{model_type} is neither one of {", ".join(GPT2_SIZES)} nor a folder with '
                                'a Hugging Face config.json')
    go_offline_if_cut_off()
    from transformers import GPT2LMHeadModel, logging
    logging.set_verbosity_error()
    try:
        return GPT2LMHeadModel.from_pretrained(model_type)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f'no GPT-2 weights in {model_type}: {reason[:200]} Without a network, name a '
                                'folder that holds them: --init_from=PATH') from None


def gpt2_args(theirs, model_type):
    """GPTConfig arguments of a transformers GPT2Config; ValueError where the maths would differ."""
    needed = {'model_type': 'gpt2', 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True,
              'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False}
    wrong = [f'{k}={getattr(theirs, k)}' for k, v in needed.items() if getattr(theirs, k) != v]
    if theirs.n_inner not in (None, 4 * theirs.n_embd):
        wrong.append(f'n_inner={theirs.n_inner}')
    if theirs.activation_function not in ACTIVATIONS:
        wrong.append(f'activation_function={theirs.activation_function}')
    if wrong:
        raise ValueError(f'{model_type} is not a GPT-2 that model.py computes: {", ".join(wrong)}')
    return {'n_layer': theirs.n_layer, 'n_head': theirs.n_head, 'n_embd': theirs.n_embd,
            'block_size': theirs.n_positions, 'vocab_size': theirs.vocab_size, 'bias': True,
            'dropout': theirs.resid_pdrop, 'activation': ACTIVATIONS[theirs.activation_function]}
