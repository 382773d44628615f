"""
Generate text from a trained model, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0
    python sample.py --start=FILE:prompt.txt
    python sample.py --init_from=gpt2-xl --num_samples=5 --max_new_tokens=100 \\
        --start="What is the answer to life, the universe, and everything?"
    python sample.py --init_from=gpt2 --prompts=prompts.txt --num_samples=1 --stop='\\n\\n' --json=True
    python sample.py --out_dir=out-shakespeare-char --interactive=True
    python sample.py --out_dir=out-chat --interactive=True --chat=True

Text appears as it is generated, on standard output; messages are on standard error. Sample i of a
run (from 0) has the seed `seed + i`: its prompt, --seed=N and --num_samples=1 reproduce it alone.
Once prompt and continuation exceed block_size tokens, the model sees only the last block_size, and
each token takes longer, because nothing can be cached.
"""

from configurator import configure  # import first: reports missing packages

import math
import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import fields, replace
from json import dumps

import torch
from torch.nn.utils.rnn import pad_sequence

from support.errors import UserError
from support.machine import runtime
from support.machine.files import read_text
from support.sampling.decoding import (Sampling, Text, compile_for_decoding, for_sampling, stream,
                                       with_line_ends)
from support.sampling.prompt import Dialogue, check_streams, interact
from support.sampling.quantize import check_weights
from support.text.chat import ChatForm
from support.training.models import load_model

# ---------------------------------------------------------------------------- settings

init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
out_dir = 'out'
start = '\n'  # the prompt, in which \n is a line end, or FILE:path of a UTF-8 file that holds it
prompts: str | None = None  # a UTF-8 file with a prompt in each line, instead of `start`
interactive = False  # ask for prompts; /help there lists the commands
chat = False  # take prompts as questions to a model that was trained on conversations (docs/chat.md)
json = False  # print each sample as a line of JSON
num_samples = 10  # of each prompt
max_new_tokens = 500  # in each sample
temperature = 0.8  # below 1 safer, above 1 wilder, 0 always the likeliest token
top_k: int | None = 200  # sample from the k likeliest tokens only; None: from all
top_p = 1.0  # then from the fewest that together have this probability (nucleus sampling)
min_p = 0.0  # then from those at least this times as likely as the likeliest
repetition_penalty = 1.0  # above 1: tokens that are already in the text become less likely
stop: str | None = None  # a string that ends a sample and isn't shown, or several: ['a', '\n']
stop_at_end = True  # at the token by which a model ends its text, which isn't shown; False: go on
batch_size = 32  # samples generated at once; fewer need less memory
seed = 1337  # of the first sample; the next one's is seed + 1
device = 'auto'  # cuda, cuda:1, mps, cpu
threads = 0  # of a CPU; 0: one a core, or what OMP_NUM_THREADS says
dtype = 'auto'  # bfloat16, float16, float32
weights = 'full'  # full; int8, int4: a quarter, an eighth of the memory, faster on a CPU, less exact
compile: bool | str = False  # torch.compile

settings = configure(globals(), out=sys.stderr)

# ---------------------------------------------------------------------------- model

check_weights(weights)
sampling = Sampling(**{f.name: settings[f.name] for f in fields(Sampling)})
if min(num_samples, batch_size) < 1:
    raise UserError(f'num_samples={num_samples} and batch_size={batch_size} must be at least 1')
if chat and not interactive and prompts is None and not start.strip():
    raise UserError('chat=True takes questions: add --interactive=True, or one with --start')
if interactive and json:
    raise UserError('interactive and json exclude each other: choose one')
if interactive:
    check_streams()


def read_prompts():
    if prompts is not None:
        texts = [line for line in read_text(prompts).split('\n') if line]
        if not texts:
            raise UserError(f'{prompts} holds no prompts')
        return texts
    if start.startswith('FILE:'):
        return [read_text(os.path.expanduser(start.removeprefix('FILE:')))]
    return [with_line_ends(start)]


texts = read_prompts()
with redirect_stdout(sys.stderr):
    run = runtime.start(device, dtype, compile, threads=threads)
    model, tokenizer, state = load_model(init_from, out_dir, run, weights)
    n_at_once = min(num_samples, batch_size)
    n_steps = math.inf if interactive else len(texts) * num_samples * max_new_tokens / n_at_once
    for_sampling(model, run, n_at_once, n_steps)
compiled = compile_for_decoding(model) if run.compile else None
form, end_ids, end_strings = None, {*tokenizer.ends}, []
if chat:
    if not state.chat:
        raise UserError(f'{out_dir if init_from == "resume" else init_from} was not trained on '
                         'conversations, so chat=True has no template for it: see docs/chat.md')
    form = ChatForm(state.chat, tokenizer)
    end_ids, end_strings = form.end_ids, form.end_strings
elif not stop_at_end:
    end_ids = set()

# ---------------------------------------------------------------------------- prompts

def encode(text):
    """Ids of a prompt; of a question, with chat."""
    if form:
        ids = form.ask([{'role': 'user', 'content': text}])
    else:
        ids = [*tokenizer.begin, *tokenizer.encode(text)]
    if not ids or max(ids) >= model.config.vocab_size:
        raise UserError(f'start={text!r} gives no tokens that this model knows')
    return ids


def default_prompt():
    """The text of `start` and its ids. A vocabulary without it starts from one that it has."""
    try:
        return texts[0], encode(texts[0])
    except UserError:
        first = tokenizer.first_token()
        return tokenizer.decode([first]), [first]


if chat and interactive:
    pairs = []
elif prompts is None and 'start' not in settings.given:
    pairs = [default_prompt()]
else:
    pairs = [(text, encode(text)) for text in texts]

# ---------------------------------------------------------------------------- samples

def continue_texts(batch, n_samples, sampling):
    """Continue each (prompt, ids) of a batch n_samples times, all in parallel. Yields the samples
    one after the other, in pieces, as they are generated: (piece, None), and with the last piece
    (piece, sample as a dict)."""
    lengths = torch.tensor([len(ids) for _, ids in batch], device=run.device)  # (B,)
    idx = pad_sequence([torch.tensor(ids) for _, ids in batch], batch_first=True)  # (B, T)
    repeated = [pair for pair in batch for _ in range(n_samples)]
    seeds = [sampling.seed + i for i in range(len(repeated))]
    ends = sampling.stop_strings() + end_strings
    rows = [Text('' if chat else text, sampling.max_new_tokens, ends) for text, _ in repeated]
    steps = stream(model, idx.to(run.device), sampling, n_samples=n_samples, lengths=lengths,
                   seeds=seeds, n_vocab=tokenizer.n_vocab, compiled=compiled)
    began, seconds, t = time.perf_counter(), {}, int(lengths.min())
    for i, row in enumerate(rows):  # each is shown once those before it are complete
        while not row.ended:
            yield row.take(), None
            with run.autocast():
                tokens = next(steps)[:, 0].tolist()
            for j in (j for j in range(len(rows)) if t >= len(repeated[j][1]) and not rows[j].ended):
                add(tokens[j], rows[j])
                seconds[j] = time.perf_counter() - began
            t += 1
        rate = row.n_tokens / seconds.get(i, 1)
        yield row.take(), {'prompt': repeated[i][0], 'text': row.made, 'seed': seeds[i],
                           'tokens': row.n_tokens, 'tokens_per_s': round(rate, 1),
                           'ended': row.ended}


def add(token, row):
    if token in end_ids:
        row.end()
    else:
        row.add(tokenizer.decode_bytes([token]))


def print_samples():
    n_prompts = max(1, batch_size // num_samples)  # at once
    parts = ((i, j) for i in range(0, len(pairs), n_prompts) for j in range(0, num_samples, batch_size))
    for i, j in parts:
        first = replace(sampling, seed=seed + i * num_samples + j)
        n_samples = min(batch_size, num_samples - j)
        for piece, sample in continue_texts(pairs[i:i + n_prompts], n_samples, first):
            show(piece, sample)


def show(piece, sample):
    """Print a piece of a sample; with its last piece there is the sample."""
    if not json:
        print(piece, end='\n---------------\n' if sample else '', flush=True)
    elif sample:
        print(dumps(sample), flush=True)


def answer(prompt, changed):
    """Continue a line of input; with chat, the ids of a dialogue."""
    if form:
        return continue_texts([('', prompt)], 1, changed)
    return continue_texts([(prompt, encode(prompt)) if prompt else pairs[0]], 1, changed)


if interactive:
    interact(sampling, answer, Dialogue(form.ask, model.config.block_size) if form else None)
else:
    print_samples()
