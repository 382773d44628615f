"""The model card of an export: a README.md that says what the model is and how it came about."""

import json
import math
import re
from pathlib import Path

from model import GPTConfig
from support.hub.exporting import KINDS, OWN_CODE
from support.hub.names import is_hub_name
from support.text.dataset import find_dataset, parse_info
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer

# what a run's settings may say in public: numbers and names that train.py knows, no paths
SHOWN = ('init_from', 'batch_size', 'gradient_accumulation_steps', 'block_size', 'max_iters',
         'learning_rate', 'min_lr', 'warmup_iters', 'decay_lr', 'lr_decay_iters', 'lr_schedule',
         'optimizer', 'muon_lr', 'embedding_lr', 'weight_decay', 'beta1', 'beta2', 'grad_clip',
         'dropout', 'ema_decay', 'lora_rank', 'lora_alpha', 'sampler', 'batch_ramp_iters',
         'eval_iters', 'seed', 'dtype')
CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base}---

# {name}

A GPT with {parameters:,} parameters ({kind}), at iteration {iteration} of its training.

```python
from transformers import pipeline
generate = pipeline('text-generation', model={quoted}{trust})
print(generate({prompt!r}, do_sample=True)[0]['generated_text'])
```

A token is one of {token}. Prompt and continuation together may have {block_size} tokens.

## Losses

{losses}

## Data

{data}

## Model

{model}

## Training

{training}
"""


def table(head, rows):
    """A dict as a Markdown table, without what is empty."""
    rows = [f'| {k} | {escaped(v)} |' for k, v in rows.items() if v not in (None, '')]
    return '\n'.join([f'| {head} | |', '|---|---|', *rows])


def escaped(value):
    """A value as Markdown shows it, in one line."""
    return re.sub(r'([\\`*<>|\[\]])', r'\\\1', ' '.join(str(value)[:1000].split()))


def losses_at(iteration, log):
    """A run's evaluation at an iteration, from the path of its log.jsonl; {} if there is none that
    can be read."""
    try:
        lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line) if '"val_loss"' in line else {}
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.get('iter') == iteration:
            return entry
    return {}


def public(value):
    """A setting's value if it is a number or a name; '' for anything else, such as a path."""
    is_name = isinstance(value, str) and (re.fullmatch(r'\w[\w.-]*', value) or is_hub_name(value))
    return value if is_name or isinstance(value, (bool, int, float)) else ''


def data_rows(state):
    """What the card says of the data. Paths become names."""
    folder = find_dataset(state.config.get('data_dir'), state.config.get('dataset', ''))
    path = Path(folder, 'dataset.json')
    try:
        info = parse_info(path) if path.is_file() else {}
    except (ValueError, OSError):
        info = {}
    source = info.get('source', '')
    if not re.match(r'https?://', source) and not is_hub_name(source):
        source = ', '.join(re.split(r'[\\/]', part.strip())[-1] for part in source.split(','))
    return {'dataset': re.split(r'[\\/]', str(folder).rstrip('\\/'))[-1], 'source': source,
            **{f'{split} tokens': f'{n:,}' for split, n in info.get('tokens', {}).items()},
            **{f'{split} SHA-256': digest for split, digest in (state.data or {}).items()}}


def prompt_and_token(tokenizer):
    """A prompt that the vocabulary has, and what a token is, in words."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return 'The', 'GPT-2\'s byte pairs'
    if not isinstance(tokenizer, CharTokenizer):
        return '\n', f'the {tokenizer.n_vocab:,} entries of its tokenizer.json'
    first = '\n' if '\n' in tokenizer.stoi else next(iter(tokenizer.stoi))
    entries = 'words' if tokenizer.has_words else 'characters'
    return first, f'{len(tokenizer.stoi):,} {entries}'


def model_card(name, state, kind, n_parameters, tokenizer, log):
    """The text of README.md: how to use the model, and how it was trained.

    name: the folder's or the repository's. state: a State. kind: one of KINDS. log: path of the
    run's log.jsonl.
    """
    logged, prompt, token = losses_at(state.iter_num, log), *prompt_and_token(tokenizer)
    losses = {'training': logged.get('train_loss'), 'validation': logged.get('val_loss'),
              'best validation so far': state.best_val_loss}  # infinite if not evaluated
    losses = {k: f'{v:.4f}' for k, v in losses.items() if isinstance(v, float) and math.isfinite(v)}
    settings = {k: public(state.config[k]) for k in SHOWN if k in state.config}
    base = settings.get('init_from', '')
    base_line = f'base_model: {base}\n' if is_hub_name(base) else ''
    iteration = 'unknown' if state.iter_num is None else state.iter_num
    return CARD.format(
        name=escaped(name), quoted=repr(name), parameters=n_parameters, kind=KINDS[kind],
        base=base_line,
        trust=', trust_remote_code=True' * (kind == OWN_CODE),
        iteration=iteration,
        block_size=state.model_args.get('block_size', GPTConfig.block_size),
        prompt=prompt, token=token, losses=table('nats per token', losses),
        data=table('data', data_rows(state)),
        model=table('architecture', state.model_args),
        training=table('setting', settings))
