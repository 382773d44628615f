"""
Conversations, to train a model that answers: files of JSON lines such as {"messages": [{"role":
"user", "content": "..."}, {"role": "assistant", "content": "..."}]}, or in another form that
docs/chat.md lists.

    python data/chat/prepare.py                                     # example.jsonl, about this repository
    python data/chat/prepare.py my_chats.jsonl --name=my_chats --tokenizer=gpt2     # to fine-tune GPT-2
    python data/chat/prepare.py my_chats.jsonl --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct
    python train.py config/train_chat_cpu.py
    python sample.py --out_dir=out-chat --interactive=True --chat=True

Writes data/<name>/, with train.mask and val.mask beside the tokens: only what the assistant says is
learned.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from configurator import configure

import json
from pathlib import Path

import numpy as np

from support.errors import UserError
from support.hub.names import tokenizer_path
from support.text.bpe import END, check_vocab_size, train_bpe
from support.text.chat import (MARKERS, ChatForm, folder_template, read_conversations, render,
                               report_bad_rows, template_for)
from support.text.prepare import check_replacing, cut_of, dataset_folder, resolve_tokenizer
from support.text.stream import map_in_threads, survey
from support.text.tokenizer import CharTokenizer
from support.text.writing import write_dataset

name = 'chat'  # the dataset's folder in data/
tokenizer = 'bpe'  # bpe (trained on the conversations), gpt2, char, a name of the hub, or a folder
vocab_size = 1024  # entries of tokenizer=bpe at most, 260 to 65536
val_fraction = 0.1  # of the conversations, drawn at random
strict = False  # refuse a file with rows that are no conversations, instead of leaving them out
overwrite = False  # replace data/<name>/ if it has other conversations

configure(globals(), args=[a for a in sys.argv[1:] if a.startswith('-')])


def make_tokenizer(conversations):
    """A tokenizer for these conversations: bpe, with a token for each marker, or char."""
    if tokenizer == 'bpe':
        return train_bpe((m['content'] for messages in conversations for m in messages), vocab_size,
                         (END, *MARKERS.values()))
    template = template_for(CharTokenizer.of_text('-'))
    return CharTokenizer.of_text(''.join(render(messages, template) for messages in conversations)
                                 + ''.join(template.values()))


def encode(conversations, form):
    """[(ids, mask)] of the conversations that the template can express, and why others can't be."""
    def try_to(messages):
        try:
            return form.encode(messages)
        except UserError as error:
            return str(error)

    found = [*map_in_threads(try_to, conversations)]
    bad = {f'conversation {i}': reason for i, reason in enumerate(found, 1) if isinstance(reason, str)}
    report_bad_rows(source, len(found) - len(bad), bad, strict)
    return [one for one in found if not isinstance(one, str)]


paths = [a for a in sys.argv[1:] if not a.startswith('-')] or [Path(__file__).with_name('example.jsonl')]
source = ', '.join(Path(path).name for path in paths)
folder, path = dataset_folder(__file__, name), tokenizer_path(tokenizer)
coder = resolve_tokenizer(path, vocab_size, ('bpe', 'gpt2', 'char'))
if tokenizer == 'bpe':
    check_vocab_size(vocab_size, (END, *MARKERS.values()))
conversations = [messages for file in paths for messages in read_conversations(file, strict)]
cut = cut_of(len(conversations), val_fraction, source, 'conversations')
text = survey(map(json.dumps, conversations)).mark()
check_replacing(folder, text, overwrite)
shuffled = [conversations[i] for i in np.random.default_rng(2357).permutation(len(conversations))]
coder = coder or make_tokenizer(shuffled if tokenizer == 'char' else shuffled[:cut])
template = Path(path).is_dir() and folder_template(path) or template_for(coder)
encoded = encode(shuffled, ChatForm(template, coder))
cut = cut_of(len(encoded), val_fraction, source, 'conversations')
parts = {'train': encoded[:cut], 'val': encoded[cut:]}
ids = {split: [ids for ids, _ in part] for split, part in parts.items()}
masks = {split: np.concatenate([mask for _, mask in part]) for split, part in parts.items()}
write_dataset(folder, ids, coder, source, masks, {'chat': template, 'text': text})
lengths = sorted(len(ids) for ids, _ in encoded)
print(f'{len(lengths):,} conversations, half of them up to {lengths[len(lengths) // 2]:,} tokens long, the '
      f'longest {lengths[-1]:,}; a block_size of as many holds each of them whole')
