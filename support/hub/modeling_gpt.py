"""
A GPT of model.py for transformers. export.py writes this file and model.py into a folder whose
model is neither a GPT-2 nor a Llama:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained('exported', trust_remote_code=True)
    prompt = AutoTokenizer.from_pretrained('exported')('Once', return_tensors='pt')
    model.generate(**prompt, max_new_tokens=50)

It generates without a cache, so each token takes as long as its whole text: sample.py is faster.
"""

import sys

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .attention import canonical_attn_type
from .model import GPT, GPTConfig

# where model.py looks for types of attention
sys.modules[f'{__package__}.support.attention'] = sys.modules[canonical_attn_type.__module__]


class OwnGPTConfig(PretrainedConfig):
    """model_args: arguments of GPTConfig; the other settings are what transformers' tools read."""
    model_type = 'own_gpt'

    def __init__(self, model_args=None, **settings):
        self.model_args = model_args or {}
        super().__init__(**settings)


class OwnGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnGPTConfig
    # if config.tie_word_embeddings
    _tied_weights_keys = {'gpt.lm_head.weight': 'gpt.transformer.wte.weight'}

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.model_args))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **ignored):
        """input_ids: (B, T), attention_mask: 0 for padding, wherever it stands, labels: -100 where
        none counts. Gives logits, (B, T, V), and the labels' mean cross-entropy in nats, each a
        position later."""
        is_token = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        # padding last: no token looks at it
        order = (~is_token).byte().argsort(dim=1, stable=True)  # (B, T)
        ids = input_ids.masked_fill(~is_token, 0).gather(1, order)
        back = order.argsort(dim=1)[:, :, None]
        logits, _ = self.gpt(ids, ids, loss=self.all_logits)  # (B, T, V)
        logits = logits.gather(1, back.expand_as(logits))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                   ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def all_logits(self, x, targets):
        return self.gpt.logits(x), None

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **ignored):
        most = self.gpt.config.block_size
        mask = None if attention_mask is None else attention_mask[:, -most:]
        return {'input_ids': input_ids[:, -most:], 'attention_mask': mask}

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def set_input_embeddings(self, value):
        self.gpt.transformer.wte = value

    def get_output_embeddings(self):
        return self.gpt.lm_head
