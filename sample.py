"""
Generate text from a trained model, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0
    python sample.py --start=FILE:prompt.txt
    python sample.py --init_from=gpt2-xl --num_samples=5 --max_new_tokens=100 \\
        --start="What is the answer to life, the universe, and everything?"
"""

import os

import torch

import checkpoint
import runtime
from configurator import configure
from dataset import read_text, read_tokenizer, tokenizer_from
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------- settings

init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
out_dir = 'out'
start = '\n'  # the prompt, or FILE:path of a UTF-8 file that holds it
num_samples = 10
max_new_tokens = 500  # in each sample
temperature = 0.8  # below 1 safer, above 1 wilder, 0 always the likeliest token
top_k: int | None = 200  # draw from the likeliest ones only; None: from all
batch_size = 32  # samples generated at once; fewer need less memory
seed = 1337
device = 'auto'  # cuda, cuda:1, mps, cpu
dtype = 'auto'  # bfloat16, float16, float32
compile: bool | str = False  # torch.compile

configure(globals())

# ---------------------------------------------------------------------------- model, prompt

if temperature < 0 or (top_k is not None and top_k < 1) or min(num_samples, batch_size) < 1:
    raise ValueError('temperature must be at least 0; top_k, num_samples and batch_size at least 1')
prompt = read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start
run = runtime.start(device, dtype, compile, seed=seed)

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

ids = tokenizer.encode(prompt)
if not ids or max(ids) >= model.config.vocab_size:
    raise ValueError(f'start={start!r} gives no tokens that this model knows')

# ---------------------------------------------------------------------------- samples

for first in range(0, num_samples, batch_size):
    idx = torch.tensor([ids], device=run.device)  # (1, T)
    with run.autocast():
        samples = model.generate(idx, max_new_tokens, temperature, top_k, n_vocab=tokenizer.n_vocab,
                                 n_samples=min(batch_size, num_samples - first))
    for sample in samples.tolist():
        print(tokenizer.decode(sample))
        print('---------------')
