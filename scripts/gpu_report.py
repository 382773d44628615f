"""
How fast is this GPU? Measures the most telling first, for ten minutes, and runs the CUDA tests last.

    make gpu                                                # the same command continues where it stopped
    python scripts/gpu_report.py --peer=../nanoGPT          # the same work in nanoGPT's files, side by side
    python scripts/gpu_report.py --only='seed|block_size'   # more: attention types, sizes, settings
    python scripts/gpu_report.py --tiny=True --device=cpu   # a rehearsal, in tiny sizes

Each result is a line of out_dir/results.jsonl as soon as it is there; what is in it isn't measured again.
The end is a table in Markdown, out_dir/report.md. It needs no data but data/shakespeare_char for the parts on
Shakespeare, and no network.
"""

import sys
sys.path.insert(0, __file__.rpartition('gpu_report.py')[0] + '..')
from configurator import ROOT, configure  # import first: reports missing packages

import json
import math
import os
import platform
import re
import signal
import subprocess
import time
from functools import partial

import torch

from model import GPT, GPTConfig
from support.errors import UserError
from support.machine import hardware, runtime
from support.training import plan
from support.text.tokenizer import PADDED_GPT2_VOCAB

out_dir = 'out-gpu-report'
peer = ''  # a checkout of nanoGPT to measure beside this repository; empty: none
data_dir = ''  # a folder with Shakespeare by characters; empty: data/shakespeare_char
limit = 600.0  # seconds for this call; 0: until all is measured
patience = 300.0  # seconds that a single measurement may take
tiny = False  # tiny sizes, to see that all of it runs
device = 'auto'  # cuda, cuda:1, cpu
only = ''  # a regular expression for names, of MORE too; empty: all of the report

configure(globals())

SIZES = {'124M': (12, 12, 768, 8), '350M': (24, 16, 1024, 4), '774M': (36, 20, 1280, 2),
         '1558M': (48, 25, 1600, 1)}  # layers, heads, channels, sequences of a micro-batch
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=2']
TINY_RUN = [*TINY, '--max_iters=4', '--eval_interval=2', '--eval_iters=2']
SHAKESPEARE = {  # what a step of these configs computes
    'train_shakespeare_char': ['--dropout=0.2'],
    'fast_shakespeare_char': ['--dropout=0.3', '--optimizer=muon', '--pos_emb=rope', '--qk_norm=True',
                              '--value_residual=True'],
}
KERNELS = {'cuDNN': 'cudnn_attention|cudnn_generated', 'FlashAttention': 'flash',
           'memory-efficient': 'efficient_attention|fmha', 'by products': 'dot_product_attention_math'}
TARGET = 1.4697  # nats a character, nanoGPT's best validation loss of its Shakespeare config


def check_gpu():
    """The Runtime that the measurements will have, without its line of output."""
    run = runtime.resolve(device)
    if run.device_type != 'cuda' and not tiny:
        raise UserError(f'device={run.device} is no CUDA GPU; --tiny=True rehearses the report anywhere')
    return run


# ---------------------------------------------------------------------------- reading results

def read_bench(output):
    """bench.py's last line, of one kind of work."""
    report = json.loads(output.splitlines()[-1])
    r = report['rows'][0]
    found = {'tokens_per_s': r['tokens_per_s'], 'ms': 1000 * r['median_s'],
             'memory': report['peak_memory_bytes'], 'first_token_ms': in_ms(r.get('first_token_s')),
             'first_call_ms': in_ms(r.get('first_call_s'))}
    if r['bytes_per_s']:
        found['of_bandwidth'] = r['share']
    if r['flops_per_s']:
        peak = hardware.peak_flops(run.device, run.dtype)
        found |= {'mfu': r['flops_per_s'] / peak if peak else None,
                  'of_matmul': r['flops_per_s'] / report['measured_limits']['flops_per_s']}
    return found


def in_ms(seconds):
    return seconds and 1000 * seconds


def read_peer_bench(output, batch):
    """nanoGPT's bench.py: time per iteration."""
    ms = float(re.search(r'^time per iteration: ([\d.]+)ms', output, re.M)[1])
    return {'tokens_per_s': batch * BLOCK / ms * 1000, 'ms': ms}


def read_trace(output):
    """bench.py's line, and whose attention is in its trace."""
    with open(os.path.join(folder, 'bench_trace.json'), encoding='utf-8') as file:
        names = file.read()
    os.remove(file.name)
    found = [kernel for kernel, pattern in KERNELS.items() if re.search(pattern, names)]
    return read_bench(output) | {'kernel': first(found) or 'none found'}


def read_losses(output):
    """The best of the evaluations that nanoGPT's train.py prints."""
    found = [(float(loss), int(i)) for i, loss in re.findall(
        r'^step (\d+): train loss [\d.]+, val loss ([\d.]+)', output, re.M)]
    best, at = min(found)
    return {'val_loss': best, 'at': at, 'target_at': first(i for loss, i in found if loss <= TARGET)}


def read_run(output):
    """The best of a run's evaluations, and when it reached the target; evaluations aren't in `training_s`."""
    with open(os.path.join(folder, 'run', 'log.jsonl'), encoding='utf-8') as file:
        found = [e for e in map(json.loads, file) if 'val_loss' in e]
    best = min(found, key=lambda e: e['val_loss'])
    reached = [e for e in found if e['val_loss'] <= TARGET]
    return {'val_loss': best['val_loss'], 'at': best['iter'], 'training_s': found[-1]['seconds'],
            'target_at': first(e['iter'] for e in reached), 'target_s': first(e['seconds'] for e in reached)}


def first(values):
    return next(iter(values), None)


def read_tests(output):
    return {'tests': output.strip().splitlines()[-1].strip('= ')}


# ---------------------------------------------------------------------------- what to measure

def bench(*args):
    return [sys.executable, str(ROOT / 'bench.py'), '--real_data=False', f'--device={run.device}', *args,
            *(TINY + ['--num_steps=2', '--decode_tokens=4'] if tiny else [])]


def peer_bench(batch, *flags):
    """nanoGPT's step, without its data."""
    batch = BATCH if tiny else batch
    command = [sys.executable, 'bench.py', '--real_data=False', f'--device={run.device}',
               f'--dtype={run.dtype}', f'--batch_size={batch}', f'--block_size={BLOCK}', *flags]
    return command, peer, partial(read_peer_bench, batch=batch), {}


def train(config, *args):
    """A run on Shakespeare."""
    return [sys.executable, 'train.py', f'config/{config}.py', f'--data_dir={shakespeare}', '--plot=False',
            f'--out_dir={os.path.join(folder, "run")}', f'--device={run.device}', '--checkpoint_interval=0',
            '--always_save_checkpoint=False', '--wandb_log=False', *args, *(TINY_RUN if tiny else [])]


def planned(n_layer, n_head, n_embd, batch, **how):
    """Bytes that plan.py expects of a size, without what CUDA itself takes, which PyTorch doesn't count."""
    if tiny:
        n_layer, n_head, n_embd, batch = 2, 2, 32, 2
    with torch.device('meta'):
        model = GPT(GPTConfig(BLOCK, PADDED_GPT2_VOCAB, n_layer, n_head, n_embd, bias=False))
    return plan.memory_needed(model, plan.Setup(1, batch, 1, reserved=0, device_type=run.device_type, **how))


def step_rows():
    """A compiled step of 124M. Each micro-batch is one of the whole batches of config/train_gpt2.py."""
    for batch in (12, 32, 64):
        flag = f'--batch_size={batch}'
        yield f'step of 124M, {flag}', bench(flag), ROOT, read_bench, {}
        if peer:
            yield f'nanoGPT: step of 124M, {flag}', *peer_bench(batch)
        if batch == 12:
            yield (f'its attention, {flag}', bench(flag, '--num_steps=3', '--profile=True'), folder,
                   read_trace, {})
    for flag in ('--cudnn_attention=False', '--residual_16bit=True'):
        yield f'step of 124M, --batch_size=64 {flag}', bench('--batch_size=64', flag), ROOT, read_bench, {}
    for config, options in SHAKESPEARE.items():
        for graphs in (False, True):
            yield (f'step of {config}, cuda_graphs={graphs}', bench(
                '--n_layer=6', '--n_head=6', '--n_embd=384', '--block_size=256', '--batch_size=64', *options,
                '--real_data=True', f'--data_dir={shakespeare}', f'--cuda_graphs={graphs}'), ROOT,
                read_bench, {})


def decode_rows():
    """The first call records, and compiles if asked; ms are those of later ones."""
    xl = ['--n_layer=48', '--n_head=25', '--n_embd=1600', '--num_steps=4']
    compiled = f'--compile={run.device_type == "cuda"}'
    for name, flags in (('124M', ['--decode_batch=1']), ('124M', ['--decode_batch=64']), ('124M', [compiled]),
                        ('1558M', xl), ('1558M', [*xl, compiled, '--weights=int8']),
                        ('1558M', [*xl, compiled]), ('124M', [compiled, '--weights=int8'])):
        shown = ' '.join(f for f in flags if f not in xl)
        command = bench('--mode=decode', '--decode_tokens=256', *flags)
        yield f'decoding {name} {shown}'.strip(), command, ROOT, read_bench, {}


def run_rows():
    flags = ['--cuda_graphs=True']
    yield 'fast_shakespeare_char with graphs', train('fast_shakespeare_char', *flags), ROOT, read_run, {}


def test_rows():
    where = ['tests/test_cuda.py', '-p', 'no:xdist'] if tiny else ['tests', '-n', '4']
    tests = [sys.executable, '-m', 'pytest', '-q', '-m', 'cuda', *where]
    yield 'CUDA tests', tests, ROOT, read_tests, {}


def plain_rows():
    yield 'training 124M, --compile=False', bench('--compile=False'), ROOT, read_bench, {}
    if peer:
        yield 'nanoGPT: training 124M, --compile=False', *peer_bench(12, '--compile=False')


def shakespeare_rows():
    for config in ('train_shakespeare_char', 'fast_shakespeare_char'):
        yield config, train(config), ROOT, read_run, {}
        if peer and config == 'train_shakespeare_char':
            yield (f'nanoGPT: {config}', [
                sys.executable, 'train.py', f'config/{config}.py', f'--device={run.device}',
                f'--dataset={shakespeare}', f'--dtype={run.dtype}', f'--compile={run.compile}',
                f'--out_dir={os.path.join(folder, "peer")}', *(TINY_RUN if tiny else [])], peer, read_losses,
                {})


def attention_rows():
    for block in (1024, 2048, 4096, 8192):
        for kind in ('SM', 'GK'):
            yield (f'{kind}, block_size={block}', bench(
                f'--attn_type={kind}', f'--block_size={block}', f'--batch_size={8192 // block}'), ROOT,
                read_bench, {})


def size_rows():
    names = 'n_layer', 'n_head', 'n_embd', 'batch_size'
    for name, size in SIZES.items():
        flags = [f'--{k}={v}' for k, v in zip(names, size)] + ['--compile=False']
        for checkpointing in (False, True):
            yield (f'{name}, checkpointing={checkpointing}', bench(
                *flags, f'--activation_checkpointing={checkpointing}', '--num_steps=4'), ROOT, read_bench,
                {'planned': planned(*size, checkpointing=checkpointing)})


def sweep_rows():
    for flags in ('--muon_lr=0.01', '--muon_lr=0.04', '--dropout=0.2', '--dropout=0.4',
                  '--max_iters=1000 --lr_decay_iters=1000', '--max_iters=2500 --lr_decay_iters=2500',
                  '--seed=1338', '--seed=1339'):
        yield (f'fast_shakespeare_char {flags}', train('fast_shakespeare_char', *flags.split()), ROOT,
               read_run, {})


def measurements():
    """(name, command, folder to run it in, reader, what is known beforehand), in order of worth."""
    for rows in REPORT + (MORE if only else ()):
        yield from rows()


REPORT = step_rows, decode_rows, run_rows, test_rows
MORE = plain_rows, shakespeare_rows, attention_rows, size_rows, sweep_rows  # for `only`


def measure(command, where, reader, seconds):
    """A command's results, or why there are none, as a dict. Ends it with all of its processes in time."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, encoding='utf-8', errors='replace', start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {'failed': f'took longer than {seconds:.0f} s', 'too_slow': True}
    found = {'seconds': time.perf_counter() - began}
    if process.returncode not in ((0, 5) if reader is read_tests else (0,)):  # 5: no test was chosen
        last = output.strip().splitlines()[-1:] or ['no output']
        return found | {'failed': f'status {process.returncode}: {last[0][:200]}'}
    try:
        return found | reader(output)
    except (ValueError, LookupError, TypeError) as error:
        return found | {'failed': f'its output could not be read ({type(error).__name__}: {error})'}


# ---------------------------------------------------------------------------- the report

def gigabytes(n):
    return f'{n / 1e9:.2f} GB'


COLUMNS = {  # title: key of results.jsonl, how to write it
    'tokens/s': ('tokens_per_s', '{:,.0f}'.format),
    'ms': ('ms', '{:.2f}'.format),
    'share of the peak': ('mfu', '{:.1%}'.format),
    'of the bandwidth': ('of_bandwidth', '{:.1%}'.format),
    'first token, ms': ('first_token_ms', '{:.2f}'.format),
    'first call, ms': ('first_call_ms', '{:.0f}'.format),
    'attention': ('kernel', str),
    'peak memory': ('memory', gigabytes),
    'planned': ('planned', gigabytes),
    'best loss': ('val_loss', '{:.4f}'.format),
    'at': ('at', str),
    f'{TARGET} at': ('target_at', str),
    'after': ('target_s', '{:.0f} s'.format),
    'whole process': ('seconds', '{:.0f} s'.format),
}


def table(rows):
    """rows: the lines of results.jsonl -> Markdown"""
    used = {title: column for title, column in COLUMNS.items() if any(column[0] in r for r in rows)}
    lines = [f'{about}\n', '| what | ' + ' | '.join(used) + ' | |', '|---' * (len(used) + 2) + '|']
    for r in rows:
        cells = [form(r[key]) if key in r else '' for key, form in used.values()]
        cells = [r['name'], *cells, r.get('tests') or r.get('failed') or '']
        lines.append('| ' + ' | '.join(cell.replace('|', '/') for cell in cells) + ' |')
    return '\n'.join(lines)


run = check_gpu()
folder = os.path.abspath(out_dir)
shakespeare = os.path.abspath(data_dir) if data_dir else str(ROOT / 'data/shakespeare_char')
BATCH, BLOCK = (2, 32) if tiny else (12, 1024)
about = (f'{hardware.device_name(run.device)}, {run.dtype}, PyTorch {torch.__version__}, Python '
         f'{platform.python_version()}, {platform.system()}' + (', tiny sizes' if tiny else ''))
os.makedirs(folder, exist_ok=True)
results, deadline = os.path.join(folder, 'results.jsonl'), time.monotonic() + (limit or math.inf)
done = []
if os.path.isfile(results):
    with open(results, encoding='utf-8') as file:
        lines = [line for line in file if line.endswith('\n')]  # a killed call may have left half a line
    with open(results, 'w', encoding='utf-8') as file:
        file.writelines(lines)
    done = [r for r in map(json.loads, lines) if r['about'] == about]
known = {r['name'] for r in done}
left = [row for row in measurements() if row[0] not in known
        and re.search(only, row[0])]
for name, command, where, reader, beforehand in left:
    seconds = min(patience, deadline - time.monotonic())
    if seconds < 1:
        break
    found = {k: v for k, v in measure(command, where, reader, seconds).items() if v is not None}
    if found.pop('too_slow', False) and seconds < patience:
        break  # it gets its whole time in the next call
    done.append({'name': name, 'about': about} | beforehand | found)
    with open(results, 'a', encoding='utf-8') as file:
        file.write(json.dumps(done[-1]) + '\n')
    print(f'{name}: {found.get("failed") or ", ".join(f"{k} {v}" for k, v in found.items())}', flush=True)
    with open(os.path.join(folder, 'report.md'), 'w', encoding='utf-8') as file:
        file.write(table(done) + '\n')
print(f'\n{table(done)}')
missing = len(known | {row[0] for row in left}) - len({r['name'] for r in done})
if missing:
    print(f'\n{missing} measurements are left: the same command continues')
