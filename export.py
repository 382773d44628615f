"""
A trained model as a Hugging Face folder, for transformers and all that builds on it.

    python export.py --out_dir=out-shakespeare-char --export_dir=exported
    python export.py --out_dir=out-shakespeare-char --push=me/my-gpt    # to the hub too

    from transformers import pipeline
    pipeline('text-generation', model='exported')('ROMEO:', do_sample=True)

The folder computes what the checkpoint does, as GPT-2's architecture or as Llama's; a model that neither of
them computes is refused. `--init_from=exported` reads a GPT-2 back, bit for bit.
"""

import json
import os
from pathlib import Path

import torch

import checkpoint
from configurator import configure
from dataset import GPT2_VOCAB, read_info, replacing
from huggingface import to_transformers, write_tokenizer
from model import GPTConfig

# ---------------------------------------------------------------------------- settings

out_dir = 'out'  # of the run whose ckpt.pt is exported
export_dir = 'exported'
push = ''  # the name of a repository on the Hugging Face hub, such as me/my-gpt, to upload the folder to
private = False  # whether a new repository is; before the first, log in with: hf auth login

configure(globals())

FILES = ('model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json',
         'tokenizer_config.json', 'README.md')
UNTOLD = ('out_dir', 'data_dir', 'wandb_log', 'wandb_project', 'wandb_run_name')  # of the machine
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT with {parameters:,} parameters ({kind} architecture), at iteration {iteration} of its training.

```python
from transformers import pipeline
generate = pipeline('text-generation', model='{name}')
print(generate({prompt!r}, do_sample=True)[0]['generated_text'])
```

A token is {token}. The text goes on until there are {block_size} of them, prompt included, as far back as the
model sees.

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
    """A dict as a table of Markdown."""
    rows = [f'| {k} | {v} |' for k, v in rows.items()]
    return '\n'.join([f'| {head} | |', '|---|---|', *rows])


def losses_at(iteration):
    """The run's evaluation at an iteration, from its log; {} where there is none."""
    path = Path(out_dir, 'log.jsonl')
    for line in path.read_text(encoding='utf-8').splitlines() if path.is_file() else ():
        if '"val_loss"' in line and line.endswith('}') and json.loads(line)['iter'] == iteration:
            return json.loads(line)
    return {}


def model_card(state, args, kind, n_parameters, tokenizer):
    """README.md: how to use the model, and how it came about."""
    run = state.get('config', {})
    data_dir = run.get('data_dir') or os.path.join('data', run.get('dataset', ''))
    info, logged = read_info(data_dir), losses_at(state.get('iter_num'))
    losses = {'training': logged.get('train_loss'), 'validation': logged.get('val_loss'),
              'best validation so far': state.get('best_val_loss')}
    source = info.get('source', '')
    source = Path(source).name if Path(source).is_absolute() else source
    data = {'dataset': Path(data_dir).name, 'source': source,
            **{f'{split} tokens': f'{n:,}' for split, n in info.get('tokens', {}).items()},
            **{f'{split} SHA-256': digest for split, digest in state.get('data', {}).items()}}
    characters = tokenizer.to_dict()['kind'] == 'char'
    return CARD.format(
        name=push or Path(export_dir).resolve().name, parameters=n_parameters, kind=kind,
        iteration=state.get('iter_num', 'unknown'), block_size=args['block_size'],
        prompt='\n' if characters and '\n' in tokenizer.stoi else 'The',
        token=f'one of {len(tokenizer.stoi)} characters' if characters else 'one of GPT-2\'s byte pairs',
        losses=table('nats a token', {k: f'{v:.4f}' for k, v in losses.items() if v is not None}),
        data=table('data', {k: v for k, v in data.items() if v}), model=table('architecture', args),
        training=table('setting', {k: v for k, v in run.items() if k not in UNTOLD}))


# ---------------------------------------------------------------------------- the folder

state = checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))
tokenizer = checkpoint.tokenizer_of(state)
args = GPTConfig.from_args(state['model_args']).to_args()
config, weights = to_transformers(args, state['model'])

from safetensors.torch import save_file  # noqa: E402, after the checks, as it takes a second
from transformers import GenerationConfig  # noqa: E402

end = GPT2_VOCAB - 1 if tokenizer.to_dict()['kind'] == 'gpt2' else None
config.bos_token_id = config.eos_token_id = end
padding = list(range(tokenizer.n_vocab, args['vocab_size'])) or None  # rows that are no token
generation = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end, suppress_tokens=padding,
                              max_length=args['block_size'])

folder = Path(export_dir)
folder.mkdir(parents=True, exist_ok=True)
with replacing(folder / 'model.safetensors') as temporary:
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.items()}, temporary,
              metadata={'format': 'pt'})
config.save_pretrained(folder)
generation.save_pretrained(folder)
write_tokenizer(folder, tokenizer, args['block_size'])
kind = {'gpt2': 'GPT-2\'s', 'llama': 'Llama\'s'}[config.model_type]
n_parameters = sum(v.numel() for k, v in state['model'].items()
                   if k != 'lm_head.weight' or not args.get('tie_weights', True))
card = model_card(state, args, kind, n_parameters, tokenizer)
(folder / 'README.md').write_text(card, encoding='utf-8')
print(f'{n_parameters:,} parameters, {kind} architecture, iteration {state.get("iter_num")}, are in {folder}')

# ---------------------------------------------------------------------------- the hub

if push:
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(push, private=private, exist_ok=True)
        url = HfApi().upload_folder(repo_id=push, folder_path=folder, allow_patterns=list(FILES))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f'{folder} is complete, but {push} could not be uploaded '
                         f'({reason[:200]}): to log in, run: hf auth login') from None
    print(f'uploaded to {url}')
