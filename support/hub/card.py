"""The model card of an export: a README.md that says what the model is and how it came about."""

import json
import re
from pathlib import Path

from support.hub.layouts import OWN_CODE
from support.text.dataset import find_dataset, read_info

UNPUBLISHED = ('out_dir', 'data_dir', 'wandb_log', 'wandb_project', 'wandb_run_name')  # of the user's machine
KINDS = {'gpt2': 'GPT-2\'s architecture', 'llama': 'Llama\'s architecture',
         OWN_CODE: 'with its own code, model.py'}
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT with {parameters:,} parameters ({kind}), at iteration {iteration} of its training.

```python
from transformers import pipeline
generate = pipeline('text-generation', model={quoted}{trust})
print(generate({prompt!r}, do_sample=True)[0]['generated_text'])
```

A token is {token}. Prompt and continuation together may have {block_size} tokens.

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
    """A dict as a Markdown table."""
    rows = [f'| {k} | {escaped(v)} |' for k, v in rows.items()]
    return '\n'.join([f'| {head} | |', '|---|---|', *rows])


def escaped(value):
    """A value as Markdown shows it, in one line; of what isn't plain, only its type."""
    if not isinstance(value, (str, int, float, type(None))):
        value = type(value).__name__
    return re.sub(r'([\\`*<>|\[\]])', r'\\\1', ' '.join(str(value)[:1000].split()))


def losses_at(iteration, log):
    """A run's evaluation at an iteration, from the path of its log.jsonl; {} if there is none."""
    for line in log.read_text(encoding='utf-8').splitlines() if log.is_file() else ():
        if '"val_loss"' in line and line.endswith('}') and json.loads(line)['iter'] == iteration:
            return json.loads(line)
    return {}


def model_card(name, state, args, kind, n_parameters, tokenizer, log):
    """The text of README.md: how to use the model, and how it was trained.

    name: the folder's or the repository's. state: of the checkpoint. args: its GPTConfig as a dict. kind: one
    of KINDS. log: path of the run's log.jsonl.
    """
    settings = state.config
    data_dir = find_dataset(settings.get('data_dir'), settings.get('dataset', ''))
    info, logged = read_info(data_dir), losses_at(state.iter_num, log)
    losses = {'training': logged.get('train_loss'), 'validation': logged.get('val_loss'),
              'best validation so far': state.best_val_loss}
    source = info.get('source', '')
    source = Path(source).name if Path(source).is_absolute() else source
    data = {'dataset': Path(data_dir).name, 'source': source,
            **{f'{split} tokens': f'{n:,}' for split, n in info.get('tokens', {}).items()},
            **{f'{split} SHA-256': digest for split, digest in (state.data or {}).items()}}
    prompt, token = {
        'char': lambda: ('\n' if '\n' in tokenizer.stoi else 'The', f'{len(tokenizer.stoi)} characters'),
        'bpe': lambda: ('\n', f'{tokenizer.n_vocab:,} byte pairs of its own'),
        'gpt2': lambda: ('The', 'GPT-2\'s byte pairs')}[tokenizer.to_dict()['kind']]()
    return CARD.format(
        name=escaped(name), quoted=repr(name), parameters=n_parameters, kind=KINDS[kind],
        trust=', trust_remote_code=True' * (kind == OWN_CODE),
        iteration='unknown' if state.iter_num is None else state.iter_num, block_size=args['block_size'],
        prompt=prompt, token=f'one of {token}',
        losses=table('nats per token', {k: f'{v:.4f}' for k, v in losses.items() if v is not None}),
        data=table('data', {k: v for k, v in data.items() if v}), model=table('architecture', args),
        training=table('setting', {k: v for k, v in settings.items() if k not in UNPUBLISHED}))
