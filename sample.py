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

Text appears as it is generated. Sample i of a run (from 0) has the seed `seed + i`: its prompt, --seed=N and
--num_samples=1 reproduce it alone. Once prompt and continuation exceed block_size tokens, the model sees only
the last block_size, and each token takes longer, because nothing can be cached.
"""

from configurator import configure  # import first: reports missing packages

import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from json import dumps

import torch
from torch.nn.utils.rnn import pad_sequence

from support.errors import UserError
from support.machine import runtime
from support.machine.files import read_text
from support.sampling.decoding import Text, for_sampling, stream
from support.sampling.quantize import check_weights
from support.training.models import load_model
from support.sampling.prompt import Dialogue, Sampling, interact
from support.text.chat import ChatForm

# ---------------------------------------------------------------------------- settings

init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
out_dir = 'out'
start = '\n'  # the prompt, or FILE:path of a UTF-8 file that holds it
prompts: str | None = None  # a UTF-8 file with a prompt in each line, instead of `start`
interactive = False  # ask for prompts; /help there lists the commands
chat = False  # take prompts as questions to a model that was trained on conversations (docs/chat.md)
json = False  # print each sample as a line of JSON on stdout, everything else on stderr
num_samples = 10  # of each prompt
max_new_tokens = 500  # in each sample
temperature = 0.8  # below 1 safer, above 1 wilder, 0 always the likeliest token
top_k: int | None = 200  # sample from the k likeliest tokens only; None: from all
top_p = 1.0  # then from the fewest that together have this probability (nucleus sampling)
min_p = 0.0  # then from those at least this times as likely as the likeliest
repetition_penalty = 1.0  # above 1: tokens that are already in the text become less likely
stop: str | None = None  # a string that ends a sample and isn't shown, or several: ['a', '\n']
ignore_end = False  # go on past the token by which a model ends its text
batch_size = 32  # samples generated at once; fewer need less memory
seed = 1337  # of the first sample; the next one's is seed + 1
device = 'auto'  # cuda, cuda:1, mps, cpu
threads = 0  # of a CPU; 0: one a core, or what OMP_NUM_THREADS says
dtype = 'auto'  # bfloat16, float16, float32
weights = 'full'  # full, int8 or int4: less memory and several times the rate on a CPU, less exact
compile: bool | str = False  # torch.compile

configure(globals())

# ---------------------------------------------------------------------------- model, prompts

check_weights(weights)
sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, stop, seed, max_new_tokens)
if min(num_samples, batch_size) < 1:
    raise UserError(f'num_samples={num_samples} and batch_size={batch_size} must be at least 1')
if chat and not interactive and prompts is None and not start.strip():
    raise UserError('chat=True takes questions: add --interactive=True, or one with --start')
if interactive and json:
    raise UserError('interactive and json exclude each other: choose one')
texts = [read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start]
if prompts is not None:
    texts = [line for line in read_text(prompts).split('\n') if line]
    if not texts:
        raise UserError(f'{prompts} holds no prompts')
with redirect_stdout(sys.stderr if json else sys.stdout):
    run = runtime.start(device, dtype, compile, threads=threads)
    model, tokenizer, state = load_model(init_from, out_dir, run, weights)
    for_sampling(model, run, min(num_samples, batch_size))
if run.compile:
    model.compile(dynamic=True)
form = None  # how conversations become tokens
if chat:
    if not state.chat:
        raise UserError(f'{out_dir if init_from == "resume" else init_from} was not trained on '
                         'conversations, so chat=True has no template for it: see docs/chat.md')
    form = ChatForm(state.chat, tokenizer)
end_ids, end_strings = {*tokenizer.ends}, []
if form:
    end_ids, end_strings = form.end_ids, form.end_strings
elif ignore_end:
    end_ids = set()


def encode(text):
    """Ids of a prompt; of a question, with chat."""
    ids = form.ask([{'role': 'user', 'content': text}]) if form else [*tokenizer.begin, *tokenizer.encode(text)]
    if not ids or max(ids) >= model.config.vocab_size:
        raise UserError(f'start={text!r} gives no tokens that this model knows')
    return ids


for text in texts:
    encode(text)  # report a mistake in any prompt before the first sample

# ---------------------------------------------------------------------------- samples

def continue_texts(batch, n_samples, sampling):
    """Continue each (text, ids) of a batch n_samples times, all in parallel. Yields the samples one after the
    other, in pieces, as they are generated: (piece, None), and with the last piece (piece, sample as a dict)."""
    ids = [ids for _, ids in batch for _ in range(n_samples)]
    lengths = torch.tensor([len(i) for i in ids[::n_samples]], device=run.device)  # (B,)
    idx = pad_sequence([torch.tensor(i) for i in ids[::n_samples]], batch_first=True)  # (B, T)
    s, seeds = sampling, [sampling.seed + i for i in range(len(ids))]
    ends = s.stop_strings() + end_strings
    rows = [Text(text.encode(errors='replace'), s.max_new_tokens, ends, hidden=chat)
            for text, _ in batch for _ in range(n_samples)]
    steps = stream(model, idx.to(run.device), s.max_new_tokens, s.temperature, s.top_k, tokenizer.n_vocab,
                   n_samples, lengths, seeds, s.top_p, s.min_p, s.repetition_penalty)
    began, seconds, t = time.perf_counter(), {}, min(map(len, ids))
    for i, row in enumerate(rows):  # all grow together; each is shown once those before it are complete
        while not row.ended:
            yield row.take(), None
            with run.autocast():
                tokens = next(steps)[:, 0].tolist()
            for j, token in enumerate(tokens):
                if t >= len(ids[j]) and not rows[j].ended:
                    if token in end_ids:
                        rows[j].end()
                    else:
                        rows[j].add(tokenizer.decode_bytes([token]))
                    seconds[j] = time.perf_counter() - began
            t += 1
        yield row.take(), {'prompt': batch[i // n_samples][0], 'text': row.text[row.start:], 'seed': seeds[i],
                           'tokens': row.n_tokens, 'tokens_per_s': round(row.n_tokens / seconds.get(i, 1), 1),
                           'ended': row.ended}


def print_samples():
    n_prompts = max(1, batch_size // num_samples)  # at once
    for i in range(0, len(texts), n_prompts):
        for j in range(0, num_samples, batch_size):
            n_samples, first = min(batch_size, num_samples - j), seed + i * num_samples + j
            batch = [(text, encode(text)) for text in texts[i:i + n_prompts]]
            for piece, sample in continue_texts(batch, n_samples, replace(sampling, seed=first)):
                if not json:
                    print(piece, end='\n---------------\n' if sample else '', flush=True)
                elif sample:
                    print(dumps(sample), flush=True)


if interactive:
    def answer(prompt, changed):
        """prompt: a text, or the ids of a dialogue."""
        if isinstance(prompt, str):
            return continue_texts([(prompt or texts[0], encode(prompt or texts[0]))], 1, changed)
        return continue_texts([('', prompt)], 1, changed)

    interact(sampling, answer, Dialogue(form.ask, model.config.block_size) if form else None)
else:
    print_samples()
