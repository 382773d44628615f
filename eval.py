"""
How good a model is: its loss on a dataset, LAMBADA, HellaSwag, and any task of EleutherAI's lm-eval.

    python eval.py --out_dir=out-shakespeare-char                       # the data that it was trained on
    python eval.py --init_from=gpt2 --dataset=openwebtext
    python eval.py --init_from=gpt2-xl --task=lambada,hellaswag --json=gpt2-xl.json
    python eval.py --init_from=gpt2 --task=lambada --source=lambada_test.jsonl
    python eval.py --init_from=gpt2 --task=lm_eval:arc_easy             # after: pip install "lm-eval[hf]"

Prints a table, then the same as a line of JSON.
"""

import functools
import math
import os
from json import dumps
from pathlib import Path

from tqdm import tqdm

import checkpoint
import runtime
from benchmarks import TASKS, read_items, score_texts, token_bytes
from configurator import configure
from dataset import check_split, eval_windows, open_split, read_tokenizer, read_windows
from evaluation import mean_loss
from huggingface import folder_tokenizer
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------- settings

init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
out_dir = 'out'
task = 'loss'  # loss, lambada, hellaswag, lm_eval:NAME, or several with commas
dataset = ''  # for the loss: a folder of data/; empty: the one that the model was trained on
data_dir = ''  # any other folder; empty: data/<dataset>
split = 'val'  # train, val
source = ''  # for lambada and hellaswag: a jsonl, json or parquet file, or a name on the hub
limit = 0  # the first so many items; for the loss, windows spread over the split, in whole batches; 0: all
batch_size = 16
json = ''  # a file for the results; empty: they are the last line of the output
seed = 1337
device = 'auto'  # cuda, cuda:1, mps, cpu
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = False  # torch.compile

configure(globals())

lm_eval_tasks = [t.removeprefix('lm_eval:') for t in task.split(',') if t.startswith('lm_eval:')]
own_tasks = [t for t in task.split(',') if not t.startswith('lm_eval:')]
if unknown := set(own_tasks) - {'loss', *TASKS}:
    raise ValueError(f'task={", ".join(unknown)} is not one of loss, {", ".join(TASKS)}, lm_eval:NAME')
if limit < 0 or batch_size < 1:
    raise ValueError('limit must be at least 0, batch_size at least 1')

# ---------------------------------------------------------------------------- data, model

items = {t: read_items(source or TASKS[t].hub_name, TASKS[t].split, TASKS[t].needed, limit)
         for t in own_tasks if t in TASKS}
if lm_eval_tasks:
    from harness import evaluate_with_lm_eval
run = runtime.start(device, dtype, compile, seed=seed)
state = {}
if init_from == 'resume':
    state = checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))
    model, tokenizer = GPT(GPTConfig.from_args(state['model_args'])), checkpoint.tokenizer_of(state)
    model.load_state_dict(state['model'])
else:
    model, tokenizer = GPT.from_pretrained(init_from), folder_tokenizer(init_from)
model.eval().to(run.device)
if run.compile:
    model.compile(dynamic=True)
block_size, scorer = model.config.block_size, (model, tokenizer, run, batch_size)
trained = state.get('config', {})
folder = data_dir or (dataset and os.path.join('data', dataset)) or trained.get('data_dir') or \
    os.path.join('data', trained.get('dataset', 'openwebtext'))


# ---------------------------------------------------------------------------- tasks

def loss_of_split(folder):
    """Mean loss in nats over all of a split's windows, perplexity, and bits for each byte of the text."""
    if read_tokenizer(folder).to_dict() != tokenizer.to_dict():
        raise ValueError(f'{folder} was prepared with another tokenizer than the model\'s')
    tokens, path = open_split(folder, split), os.path.join(folder, f'{split}.bin')
    check_split(tokens, path, block_size, model.config.vocab_size)
    windows = (block_size, batch_size, -(-limit // batch_size))
    loss = mean_loss(model, run, tokens, *windows, watch=functools.partial(tqdm, desc=path, disable=None))
    n_bytes, n_targets, text = token_bytes(tokenizer), 0, 0
    for starts in eval_windows(len(tokens), *windows):
        _, y = read_windows(tokens, starts, block_size)
        n_targets, text = n_targets + (y >= 0).sum(), text + n_bytes[y[y >= 0]].sum()
    return {'loss': loss, 'perplexity': math.exp(loss), 'n': int(n_targets),
            'bits_per_byte': loss * n_targets / math.log(2) / text}


# ---------------------------------------------------------------------------- results

score, results = functools.partial(score_texts, *scorer), {}
for name in own_tasks:
    results[name] = loss_of_split(folder) if name == 'loss' else TASKS[name].measure(items[name], score)
if lm_eval_tasks:
    results |= evaluate_with_lm_eval(lm_eval_tasks, *scorer, limit)
rows = [('task', 'metric', 'value', 'n')]
rows += [(name, metric, f'{value:.4f}', f'{metrics["n"]:,}') for name, metrics in results.items()
         for metric, value in metrics.items() if metric != 'n']
widths = [max(map(len, column)) for column in zip(*rows)]
for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
report = {'model': out_dir if init_from == 'resume' else init_from, 'iter': state.get('iter_num'),
          'parameters': model.get_num_params(non_embedding=False), 'dtype': run.dtype, 'limit': limit,
          'results': results}
line = dumps(report, default=float)  # NumPy's numbers too
if json:
    Path(json).write_text(line + '\n', encoding='utf-8')
else:
    print(line)
