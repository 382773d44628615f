"""
How good a model is: its loss on a dataset or a text, LAMBADA, HellaSwag, any task of lm-eval.

    python eval.py --out_dir=out-shakespeare-char                       # the data that it was trained on
    python eval.py --init_from=gpt2 --dataset=openwebtext
    python eval.py --init_from=gpt2-xl --task=lambada,hellaswag --json=gpt2-xl.json
    python eval.py --init_from=gpt2 --task=lambada --source=lambada_test.jsonl
    python eval.py --out_dir=out-shakespeare-char --task=int8,int4      # what fewer bits cost in loss
    python eval.py --out_dir=out-shakespeare-char --text=poem.txt       # how likely a text is
    python eval.py --init_from=gpt2 --task=lm_eval:arc_easy             # after: pip install "lm-eval[hf]"

Prints a table, then the same as a line of JSON. In a file (--json=FILE) a line for each token of
the text comes before that.
"""

from configurator import configure  # import first: reports missing packages

import math
import os
from functools import partial
from json import dumps
from pathlib import Path

from tqdm import tqdm

from support.errors import MissingFile, UserError
from support.evaluating.scoring import TASKS, Scorer, Windows, count_targets, mean_loss, perplexity
from support.machine import runtime
from support.machine.files import read_text
from support.sampling.quantize import build_quantized, check_weights
from support.text.dataset import Dataset, find_dataset
from support.text.tokenizer import is_same_tokenizer
from support.training.loss import lean_loss
from support.training.models import load_model

# ---------------------------------------------------------------------------- settings

init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
out_dir = 'out'
task = 'loss'  # loss, int8, int4 (what such weights cost), lambada, hellaswag, lm_eval:NAME; or several: a,b
text = ''  # a file, whose log-probability is computed
dataset = ''  # for loss, int8 and int4: a folder of data/; empty: the one that the model was trained on
data_dir = ''  # any other folder; empty: data/<dataset>
split = 'val'  # train, val
source = ''  # for lambada and hellaswag: a jsonl, json or parquet file, or a name on the hub
limit = 0  # items of each task; of a split, windows spread over it, in whole batches; 0: all
batch_size = 16
json = ''  # a file for the results; empty: they are the last line of the output
seed = 1337
device = 'auto'  # cuda, cuda:1, mps, cpu
threads = 0  # of a CPU; 0: one a core, or what OMP_NUM_THREADS says
dtype = 'auto'  # bfloat16, float16, float32
weights = 'full'  # full; int8, int4: less memory, less exact
compile: bool | str = False  # torch.compile

config = configure(globals())

OF_A_SPLIT = ('loss', 'int8', 'int4')
USED_BY = {'source': TASKS, 'dataset': OF_A_SPLIT, 'data_dir': OF_A_SPLIT, 'split': OF_A_SPLIT}
tasks = task.split(',')
if text:
    tasks = ['text', *tasks] if 'task' in config.given else ['text']


def check_settings():
    """UserError or MissingFile for what can't be evaluated, before the slow work."""
    known = (*OF_A_SPLIT, *TASKS)
    unknown = [t for t in tasks if t not in known and t != 'text' and not t.startswith('lm_eval:')]
    if unknown or ('text' in tasks and not text):
        raise UserError(f'task={task} is not one of {", ".join(known)}, lm_eval:NAME, or '
                        '--text=FILE')
    for name, users in USED_BY.items():
        if name in config.given and not set(users) & set(tasks):
            raise UserError(f'{name}={config[name]} is for task={" or ".join(users)}, not '
                            f'{",".join(tasks)}')
    if split not in ('train', 'val'):
        raise UserError(f'split={split} is not one of train, val')
    check_weights(weights)
    if {'int8', 'int4'} & {*tasks} and weights != 'full':
        raise UserError('task=int8 and task=int4 compare with the full weights: leave '
                        f'weights={weights} out')
    if limit < 0 or batch_size < 1:
        raise UserError(f'limit={limit} must be at least 0, batch_size={batch_size} at least 1')
    folder = os.path.dirname(json) or '.'
    can_write = os.access(folder, os.W_OK) and not os.path.isdir(json)
    if json and not can_write:
        raise MissingFile(f'json={json} can\'t be written: name a file in a folder that exists')


check_settings()

# ---------------------------------------------------------------------------- items, model

items = {t: TASKS[t].read(source, limit) for t in tasks if t in TASKS}
lines = read_text(text) if text else ''
lm_eval_tasks = [t.removeprefix('lm_eval:') for t in tasks if t.startswith('lm_eval:')]
if lm_eval_tasks:
    from support.evaluating.lm_eval_adapter import evaluate_with_lm_eval
run = runtime.start(device, dtype, compile, seed=seed, threads=threads)
model, tokenizer, state = load_model(init_from, out_dir, run, weights)
if run.compile:
    model.compile(dynamic=True)


# ---------------------------------------------------------------------------- the loss of a split

def data_folder():
    """The folder that the settings name, else the one that the model was trained on."""
    if data_dir or dataset:
        return find_dataset(data_dir, dataset)
    trained, source = state.config, out_dir if init_from == 'resume' else init_from
    if os.path.exists(source) and not (trained.get('data_dir') or trained.get('dataset')):
        raise UserError(f'{source} doesn\'t say what it was trained on: add --dataset=NAME, of '
                        'data/NAME, or --data_dir=FOLDER')
    return find_dataset(trained.get('data_dir'), trained.get('dataset', 'openwebtext'))


def loss_of_split(model):
    """Mean loss in nats over all of a split's windows, perplexity, and bits for each byte of the text."""
    data = Dataset(data_folder(), splits=(split,))
    if not is_same_tokenizer(data.tokenizer.to_dict(), tokenizer.to_dict()):
        raise UserError(f'{data.folder} was prepared with another tokenizer than the model\'s')
    window = min(model.config.block_size, state.config.get('block_size', model.config.block_size))
    data.check(window, model.config.vocab_size)
    windows = Windows(window, batch_size, -(-limit // batch_size))  # as in training
    bar = partial(tqdm, desc=f'{split}.bin', disable=None)
    loss = mean_loss(model, run, data[split], windows, lean_loss(model, run), watch=bar)
    n_targets, n_bytes = count_targets(run, data[split], tokenizer.token_bytes(), windows)
    found = {'loss': loss, 'perplexity': perplexity(loss), 'n': int(n_targets)}
    return found | ({'bits_per_byte': loss * n_targets / math.log(2) / n_bytes} if n_bytes else {})


def cost_of(kind):
    """The loss with full weights, with int8 or int4 weights, and by how many percent that is more."""
    small = build_quantized(model.config, model.state_dict().items(), kind)
    if run.compile:
        small.compile(dynamic=True)
    full, other = loss_of_split(model), loss_of_split(small)
    return {'loss_full': full['loss'], f'loss_{kind}': other['loss'],
            'increase_percent': 100 * (other['loss'] / full['loss'] - 1), 'n': other['n']}


def loss_of_text():
    """The text's log-probability, perplexity and bits for each byte; a dict for each token."""
    ids, log_p = scorer.whole_text(lines, text)
    nats, n_bytes = -log_p.sum().item(), len(lines.encode())
    tokens = [{'id': i, 'text': tokenizer.decode([i]), 'log_p': p}
              for i, p in zip(ids, log_p.tolist())]
    return {'nats': nats, 'perplexity': perplexity(nats / len(ids)),
            'bits_per_byte': nats / math.log(2) / n_bytes, 'n': len(ids)}, tokens


# ---------------------------------------------------------------------------- results

def print_table(results):
    rows = [('task', 'metric', 'value', 'n')]
    rows += [(name, metric, f'{value:.4f}', f'{metrics["n"]:,}') for name, metrics in results.items()
             for metric, value in metrics.items() if metric != 'n']
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


scorer = Scorer(model, tokenizer, run, batch_size)
results, tokens = {}, []
for name in tasks:
    if name == 'text':
        results[name], tokens = loss_of_text()
    elif name == 'loss':
        results[name] = loss_of_split(model)
    elif name in ('int8', 'int4'):
        results[name] = cost_of(name)
    elif name in TASKS:
        results[name] = TASKS[name].measure(items[name], scorer.texts)
if lm_eval_tasks:
    results |= evaluate_with_lm_eval(lm_eval_tasks, scorer, limit)
print_table(results)
report = {'model': out_dir if init_from == 'resume' else init_from, 'iter': state.iter_num,
          'parameters': model.get_num_params(non_embedding=False), 'dtype': run.dtype,
          'weights': weights, 'limit': limit, 'results': results}
if json:
    Path(json).write_text(''.join(dumps(line, default=float) + '\n' for line in [*tokens, report]),
                          encoding='utf-8')
else:
    print(dumps(report, default=float))  # float: of NumPy's numbers
