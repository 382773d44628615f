"""
Generate text from a trained model, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0
    python sample.py --start=FILE:prompt.txt
    python sample.py --init_from=gpt2-xl --num_samples=5 --max_new_tokens=100 \\
        --start="What is the answer to life, the universe, and everything?"
    python sample.py --init_from=gpt2 --prompts=prompts.txt --num_samples=1 --stop='\\n\\n' --json=True
    python sample.py --out_dir=out-shakespeare-char --interactive=True

Text appears while it is made. Sample i of a run (from 0) has the seed `seed + i`: with its prompt, --seed=N
and --num_samples=1, it can be made again alone. Past block_size tokens, the prompt's included, the model sees
the last block_size only, and each token takes longer: all that it sees has moved.
"""

import os
import sys
import time
from contextlib import redirect_stdout
from json import dumps

import torch
from torch.nn.utils.rnn import pad_sequence

import checkpoint
import runtime
from configurator import configure
from dataset import read_text, read_tokenizer, tokenizer_from
from decoding import Text, stream
from model import GPT, GPTConfig
from prompt import interact, stop_strings

# ---------------------------------------------------------------------------- settings

init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
out_dir = 'out'
start = '\n'  # the prompt, or FILE:path of a UTF-8 file that holds it
prompts: str | None = None  # a UTF-8 file with a prompt in each line, instead of `start`
interactive = False  # ask for prompts; /help there lists what can be changed
json = False  # a line of JSON for each sample, on stdout, with all else on stderr
num_samples = 10  # of each prompt
max_new_tokens = 500  # in each sample
temperature = 0.8  # below 1 safer, above 1 wilder, 0 always the likeliest token
top_k: int | None = 200  # draw from the likeliest ones only; None: from all
top_p = 1.0  # of these, from the fewest that together have this probability (nucleus sampling)
min_p = 0.0  # of these, from the ones at least this times as likely as the likeliest
repetition_penalty = 1.0  # above 1: tokens that the text has already become less likely
stop: str | None = None  # a string that ends a sample and isn't shown, or several: ['a', '\n']
batch_size = 32  # samples generated at once; fewer need less memory
seed = 1337  # of the first sample; the next one's is seed + 1
device = 'auto'  # cuda, cuda:1, mps, cpu
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = False  # torch.compile

# who reads the JSON gets nothing else
messages = sys.stderr if {'--json', '--json=true'} & {a.lower() for a in sys.argv} else sys.stdout
with redirect_stdout(messages):
    configure(globals())

# ---------------------------------------------------------------------------- model, prompts


def check_settings():
    if temperature < 0 or (top_k is not None and top_k < 1) or min(num_samples, batch_size) < 1:
        raise ValueError('temperature must be at least 0; top_k, num_samples and batch_size at least 1')
    if not (0 < top_p <= 1 and 0 <= min_p <= 1 and repetition_penalty > 0 and max_new_tokens >= 0):
        raise ValueError('top_p must lie in (0, 1], min_p in [0, 1]; repetition_penalty must be above 0, '
                         'max_new_tokens at least 0')
    stop_strings(stop)


check_settings()
if interactive and json:
    raise ValueError('interactive and json can\'t be had together')
texts = [read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start]
if prompts is not None:
    texts = [line for line in read_text(prompts).replace('\r\n', '\n').split('\n') if line]
    if not texts:
        raise ValueError(f'{prompts} holds no prompts')
with redirect_stdout(messages):
    run = runtime.start(device, dtype, compile)

if init_from == 'resume':
    state = checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))
    model = GPT(GPTConfig.from_args(state['model_args'] | {'dropout': 0.0}))
    model.load_state_dict(state['model'])
    trained = state.get('config', {})  # older files carry no tokenizer but name their dataset
    data_dir = trained.get('data_dir') or os.path.join('data', trained.get('dataset', ''))
    tokenizer = tokenizer_from(state['tokenizer']) if 'tokenizer' in state else read_tokenizer(data_dir)
else:
    model = GPT.from_pretrained(init_from, {'dropout': 0.0})
    tokenizer = tokenizer_from(None)
model.eval().to(run.device)
if run.compile:
    model.compile(dynamic=True)


def encode(text):
    ids = tokenizer.encode(text)
    if not ids or max(ids) >= model.config.vocab_size:
        raise ValueError(f'start={text!r} gives no tokens that this model knows')
    return ids


for text in texts:
    encode(text)  # a mistake in one is told before any sample

# ---------------------------------------------------------------------------- samples

def generate(prompts, n_samples, seed):
    """Continue each prompt n_samples times, all in one batch. Yields the samples one after the other, in
    pieces, as they are made: (text, None), and with a sample's last piece (text, what it is as a dict)."""
    ids = [encode(text) for text in prompts for _ in range(n_samples)]
    lengths = torch.tensor([len(i) for i in ids[::n_samples]], device=run.device)  # (B,)
    idx = pad_sequence([torch.tensor(i) for i in ids[::n_samples]], batch_first=True)  # (B, T)
    seeds = [seed + i for i in range(len(ids))]
    rows = [Text(tokenizer.decode_bytes(i), max_new_tokens, stop_strings(stop)) for i in ids]
    steps = stream(model, idx.to(run.device), max_new_tokens, temperature, top_k, tokenizer.n_vocab,
                   n_samples, lengths, seeds, top_p, min_p, repetition_penalty)
    began, seconds, t = time.perf_counter(), {}, min(map(len, ids))
    for i, row in enumerate(rows):  # all grow together; each is shown once those before it are complete
        while not row.ended:
            yield row.take(), None
            with run.autocast():
                tokens = next(steps)[:, 0].tolist()
            for j, token in enumerate(tokens):
                if t >= len(ids[j]) and not rows[j].ended:
                    rows[j].add(tokenizer.decode_bytes([token]))
                    seconds[j] = time.perf_counter() - began
            t += 1
        yield row.take(), {'prompt': prompts[i // n_samples], 'text': row.text[row.start:], 'seed': seeds[i],
                           'tokens': row.n_tokens, 'tokens_per_s': round(row.n_tokens / seconds.get(i, 1), 1),
                           'ended': row.ended}


if interactive:
    interact(globals(), check_settings, lambda text: generate([text or texts[0]], 1, seed))
    texts = []
n_prompts = max(1, batch_size // num_samples)  # at once
for i in range(0, len(texts), n_prompts):
    for j in range(0, num_samples, batch_size):
        for text, sample in generate(texts[i:i + n_prompts], min(batch_size, num_samples - j),
                                     seed + i * num_samples + j):
            if not json:
                print(text, end='\n---------------\n' if sample else '', flush=True)
            elif sample:
                print(dumps(sample), flush=True)
