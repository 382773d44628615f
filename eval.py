"""
How good a model is: its loss on a dataset, LAMBADA, HellaSwag, and any task of EleutherAI's lm-eval.

    python eval.py --out_dir=out-shakespeare-char                       # the data that it was trained on
    python eval.py --init_from=gpt2 --dataset=openwebtext
    python eval.py --init_from=gpt2-xl --task=lambada,hellaswag --json=gpt2-xl.json
    python eval.py --init_from=gpt2 --task=lambada --source=lambada_test.jsonl
    python eval.py --out_dir=out-shakespeare-char --task=int8           # what 8-bit weights cost in loss
    python eval.py --init_from=gpt2 --task=lm_eval:arc_easy             # after: pip install "lm-eval[hf]"

Prints a table, then the same as a line of JSON.
"""

from configurator import configure  # import first: reports missing packages

import math
from functools import partial
from json import dumps
from pathlib import Path

from tqdm import tqdm

from support.errors import UserError
from support.machine import runtime
from support.evaluating.scoring import TASKS, Windows, count_targets, mean_loss, read_items, score_texts
from support.sampling.quantize import build_int8, check_weights
from support.text.dataset import Dataset, find_dataset
from support.text.tokenizer import is_same_tokenizer
from support.training.loss import lean_loss
from support.training.models import load_model

# ---------------------------------------------------------------------------- settings

init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
out_dir = 'out'
task = 'loss'  # loss, int8 (what int8 costs in loss), lambada, hellaswag, lm_eval:NAME; several with commas
dataset = ''  # for loss and int8: a folder of data/; empty: the one that the model was trained on
data_dir = ''  # any other folder; empty: data/<dataset>
split = 'val'  # train, val
source = ''  # for lambada and hellaswag: a jsonl, json or parquet file, or a name on the hub
limit = 0  # items of each task; for loss and int8, windows spread over the split, in whole batches; 0: all
batch_size = 16
json = ''  # a file for the results; empty: they are the last line of the output
seed = 1337
device = 'auto'  # cuda, cuda:1, mps, cpu
threads = 0  # of a CPU; 0: one a core, or what OMP_NUM_THREADS says
dtype = 'auto'  # bfloat16, float16, float32
weights = 'full'  # full, or int8: a quarter of the memory, less exact
compile: bool | str = False  # torch.compile

configure(globals())

lm_eval_tasks = [t.removeprefix('lm_eval:') for t in task.split(',') if t.startswith('lm_eval:')]
own_tasks = [t for t in task.split(',') if not t.startswith('lm_eval:')]
check_weights(weights)
unknown = set(own_tasks) - {'loss', 'int8', *TASKS}
if unknown:
    raise UserError(f'task={", ".join(unknown)} is not one of loss, int8, {", ".join(TASKS)}, lm_eval:NAME')
if 'int8' in own_tasks and weights == 'int8':
    raise UserError('task=int8 compares int8 with the full weights: leave weights=int8 out')
if limit < 0 or batch_size < 1:
    raise UserError(f'limit={limit} must be at least 0, batch_size={batch_size} at least 1')

# ---------------------------------------------------------------------------- items, model

items = {t: read_items(source or TASKS[t].hub_name, TASKS[t].split, TASKS[t].needed, limit)
         for t in own_tasks if t in TASKS}
if lm_eval_tasks:
    from support.evaluating.lm_eval_adapter import evaluate_with_lm_eval
run = runtime.start(device, dtype, compile, seed=seed, threads=threads)
model, tokenizer, state = load_model(init_from, out_dir, run, weights)
if run.compile:
    model.compile(dynamic=True)


# ---------------------------------------------------------------------------- the loss of a split

def data_folder():
    """The folder that the settings name, else the one that the model was trained on."""
    trained = state.config
    if data_dir or dataset:
        return find_dataset(data_dir, dataset)
    return find_dataset(trained.get('data_dir'), trained.get('dataset', 'openwebtext'))


def loss_of_split(model):
    """Mean loss in nats over all of a split's windows, perplexity, and bits for each byte of the text."""
    data = Dataset(data_folder(), splits=(split,))
    if not is_same_tokenizer(data.tokenizer.to_dict(), tokenizer.to_dict()):
        raise UserError(f'{data.folder} was prepared with another tokenizer than the model\'s')
    data.check(model.config.block_size, model.config.vocab_size)
    windows = Windows(model.config.block_size, batch_size, -(-limit // batch_size))
    bar = partial(tqdm, desc=data[split].path, disable=None)
    loss = mean_loss(model, run, data[split], windows, lean_loss(model, run), watch=bar)
    n_targets, n_bytes = count_targets(run, data[split], tokenizer.token_bytes(), windows)
    found = {'loss': loss, 'perplexity': math.exp(loss), 'n': int(n_targets)}
    return found | ({'bits_per_byte': loss * n_targets / math.log(2) / n_bytes} if n_bytes else {})


def cost_of_int8():
    """The loss with full weights, with the same in int8, and by how many percent that is more."""
    small = build_int8(model.config, model.state_dict().items())
    if run.compile:
        small.compile(dynamic=True)
    full, int8 = loss_of_split(model), loss_of_split(small)
    return {'loss_full': full['loss'], 'loss_int8': int8['loss'],
            'increase_percent': 100 * (int8['loss'] / full['loss'] - 1), 'n': int8['n']}


# ---------------------------------------------------------------------------- results

def print_table(results):
    rows = [('task', 'metric', 'value', 'n')]
    rows += [(name, metric, f'{value:.4f}', f'{metrics["n"]:,}') for name, metrics in results.items()
             for metric, value in metrics.items() if metric != 'n']
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


scorer = (model, tokenizer, run, batch_size)
results = {}
for name in own_tasks:
    if name == 'loss':
        results[name] = loss_of_split(model)
    elif name == 'int8':
        results[name] = cost_of_int8()
    else:
        results[name] = TASKS[name].measure(items[name], partial(score_texts, *scorer))
if lm_eval_tasks:
    results |= evaluate_with_lm_eval(lm_eval_tasks, *scorer, limit)
print_table(results)
line = dumps({'model': out_dir if init_from == 'resume' else init_from, 'iter': state.iter_num,
              'parameters': model.get_num_params(non_embedding=False), 'dtype': run.dtype, 'weights': weights,
              'limit': limit, 'results': results}, default=float)  # float: of NumPy's numbers
if json:
    Path(json).write_text(line + '\n', encoding='utf-8')
else:
    print(line)
