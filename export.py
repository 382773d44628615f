"""
Export a trained model as a Hugging Face folder, for transformers and everything that reads its format.

    python export.py --out_dir=out-shakespeare-char --export_dir=exported
    python export.py --out_dir=out-shakespeare-char --push=me/my-gpt    # to the hub too

    from transformers import pipeline
    pipeline('text-generation', model='exported')('ROMEO:', do_sample=True)

The folder computes what the checkpoint does: as GPT-2's architecture, as Llama's, or, for a model that is
neither, with model.py in the folder (`trust_remote_code=True`). `--init_from=exported` reads it back, bit for
bit.
"""

from configurator import configure  # first, as it says what this Python lacks

import json
import re
from pathlib import Path

from support.hub.huggingface import (add_chat_template, beyond, to_transformers, with_pad_token,
                                     write_tokenizer)
from support.hub.layouts import CODE, FILES, OWN_CODE, write_model
from support.machine.files import reason_of
from support.run.checkpoint import load_trained
from support.run.state import config_from_args, model_args, tokenizer_of
from support.text.dataset import find_dataset, read_info

# ---------------------------------------------------------------------------- settings

out_dir = 'out'  # of the run whose ckpt.pt is exported
export_dir = 'exported'
overwrite = False  # replace files in export_dir that another program wrote
push = ''  # a repository on the Hugging Face hub, such as me/my-gpt, to upload the folder to
private = False  # make a new repository private; before the first upload, log in with: hf auth login

configure(globals())

ALL_FILES = (*FILES, *CODE, 'tokenizer.json', 'tokenizer_config.json', 'README.md')
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


# ---------------------------------------------------------------------------- the model card

def table(head, rows):
    """A dict as a Markdown table."""
    rows = [f'| {k} | {escaped(v)} |' for k, v in rows.items()]
    return '\n'.join([f'| {head} | |', '|---|---|', *rows])


def escaped(value):
    """A value as Markdown shows it, in one line; of what isn't plain, only its type."""
    if not isinstance(value, (str, int, float, type(None))):
        value = type(value).__name__
    return re.sub(r'([\\`*<>|\[\]])', r'\\\1', ' '.join(str(value)[:1000].split()))


def losses_at(iteration):
    """The run's evaluation at an iteration, from its log; {} if there is none."""
    path = Path(out_dir, 'log.jsonl')
    for line in path.read_text(encoding='utf-8').splitlines() if path.is_file() else ():
        if '"val_loss"' in line and line.endswith('}') and json.loads(line)['iter'] == iteration:
            return json.loads(line)
    return {}


def model_card(state, args, kind, n_parameters, tokenizer):
    """README.md: how to use the model, and how it was trained."""
    settings = state.get('config', {})
    data_dir = find_dataset(settings.get('data_dir'), settings.get('dataset', ''))
    info, logged = read_info(data_dir), losses_at(state.get('iter_num'))
    losses = {'training': logged.get('train_loss'), 'validation': logged.get('val_loss'),
              'best validation so far': state.get('best_val_loss')}
    source = info.get('source', '')
    source = Path(source).name if Path(source).is_absolute() else source
    data = {'dataset': Path(data_dir).name, 'source': source,
            **{f'{split} tokens': f'{n:,}' for split, n in info.get('tokens', {}).items()},
            **{f'{split} SHA-256': digest for split, digest in state.get('data', {}).items()}}
    name = push or Path(export_dir).resolve().name
    prompt, token = {
        'char': lambda: ('\n' if '\n' in tokenizer.stoi else 'The', f'{len(tokenizer.stoi)} characters'),
        'bpe': lambda: ('\n', f'{tokenizer.n_vocab:,} byte pairs of its own'),
        'gpt2': lambda: ('The', 'GPT-2\'s byte pairs')}[tokenizer.to_dict()['kind']]()
    return CARD.format(
        name=escaped(name), quoted=repr(name), parameters=n_parameters, kind=KINDS[kind],
        trust=', trust_remote_code=True' * (kind == OWN_CODE),
        iteration=state.get('iter_num', 'unknown'), block_size=args['block_size'],
        prompt=prompt, token=f'one of {token}',
        losses=table('nats per token', {k: f'{v:.4f}' for k, v in losses.items() if v is not None}),
        data=table('data', {k: v for k, v in data.items() if v}), model=table('architecture', args),
        training=table('setting', {k: v for k, v in settings.items() if k not in UNPUBLISHED}))


# ---------------------------------------------------------------------------- the folder

def write_folder(folder, state):
    """Write the files of an export. Returns their names and a summary."""
    args, weights = model_args(config_from_args(state['model_args'])), state['model']
    tokenizer = tokenizer_of(state)
    tokenizer.encode('')  # raises ValueError if the tokens have no text
    config, theirs = to_transformers(*with_pad_token(args, weights, tokenizer))
    end = config.bos_token_id = config.eos_token_id = tokenizer.end
    if config.vocab_size > args['vocab_size']:
        config.unpadded_vocab_size = args['vocab_size']  # by which init_from reads the model back
    names = write_model(folder, config, theirs, tokenizer.n_vocab, tokenizer.n_vocab if end is None else end)
    names += write_tokenizer(folder, tokenizer, args['block_size'])
    if state.get('chat'):
        add_chat_template(folder, state['chat'])
    n_parameters = sum(v.numel() for k, v in weights.items()
                       if k != 'lm_head.weight' or not args.get('tie_weights', True))
    card = model_card(state, args, config.model_type, n_parameters, tokenizer)
    (folder / 'README.md').write_text(card, encoding='utf-8')
    summary = f'{n_parameters:,} parameters, {KINDS[config.model_type]}'
    if config.model_type == OWN_CODE:
        reasons = min((beyond(kind, args) for kind in ('gpt2', 'llama')), key=len)
        summary += f' (trust_remote_code=True), for {", ".join(reasons)}'
    return [*names, 'README.md'], summary


def check_target(folder):
    """ValueError, before the work, if the export would replace what another program wrote, or `push` is no
    name of a repository."""
    card = folder / 'README.md'
    is_ours = card.is_file() and re.search(r'^A GPT with [\d,]+ parameters \(', card.read_text(
        encoding='utf-8', errors='replace'), re.M)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'export_dir={folder} is a file: name a folder')
    there = [name for name in ALL_FILES if (folder / name).exists()]
    if there and not is_ours and not overwrite:
        raise ValueError(f'{folder} has {", ".join(there)} of another program: name an empty --export_dir, '
                         'or add --overwrite=True')
    if push and not re.fullmatch(r'(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]{0,94}(?<![.-])', push, re.A):
        raise ValueError(f'push={push} is no name of a repository on the hub, which is like me/my-gpt')


check_target(Path(export_dir))
folder, (_, state) = Path(export_dir), load_trained(out_dir)
names, summary = write_folder(folder, state)
print(f'wrote {folder}: {summary}, iteration {state.get("iter_num")}')

# ---------------------------------------------------------------------------- the hub

if push:
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(push, private=private, exist_ok=True)
        url = HfApi().upload_folder(repo_id=push, folder_path=folder, allow_patterns=names)
    except Exception as error:  # whatever the hub's libraries raise, the folder is complete
        raise ValueError(f'{folder} is complete, but {push} could not be uploaded '
                         f'({reason_of(error)}): to log in, run: hf auth login') from None
    print(f'uploaded to {url}')
