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

from configurator import configure, is_option

import tempfile
from array import array
from pathlib import Path

import numpy as np

from support.hub.names import tokenizer_path
from support.text.bpe import END, check_vocab_size, train_bpe
from support.text.chat import MARKERS, ChatForm, folder_template, template_for
from support.text.conversations import Conversations, encode_all
from support.text.prepare import (check_replacing, cut_of, dataset_folder, how_many_to_train_on,
                                  how_prepared, resolve_tokenizer)
from support.text.stream import dtype_for
from support.text.tokenizer import CharTokenizer
from support.text.writing import write_dataset

name = 'chat'  # the dataset's folder in data/
tokenizer = 'bpe'  # bpe (trained on the conversations), gpt2, char, a name of the hub, or a folder
vocab_size = 1024  # entries of tokenizer=bpe at most, 260 to 65536
val_fraction = 0.1  # of the conversations, drawn at random
strict = False  # refuse a file with rows that are no conversations, instead of leaving them out
overwrite = False  # replace data/<name>/ if it has other conversations

configure(globals(), args=[a for a in sys.argv[1:] if is_option(a)])


def make_tokenizer(conversations, order):
    """A tokenizer for these conversations: bpe, with a token for each marker, or char."""
    if tokenizer == 'bpe':
        some = ([m['content'] for m in conversations[i]] for i in order[:2048])
        n = how_many_to_train_on(map(''.join, some), len(order))
        print(f'the tokenizer is trained on {n:,} of {len(order):,} conversations')
        return train_bpe((m['content'] for i in order[:n] for m in conversations[i]), vocab_size,
                         (END, *MARKERS.values()))
    characters = {*''.join(template_for(CharTokenizer.of_text('-')).values())}
    for messages in conversations:
        characters.update(*(m['content'].strip() for m in messages))
    return CharTokenizer.of_text(characters)


def encode(conversations, order, form, folder):
    """ids, mask, (N,) each, and the lengths of all conversations, one after the other. The first
    two are read from the disk: temporary files without names."""
    dtype, lengths = dtype_for(form.tokenizer), array('q')
    with tempfile.TemporaryFile(dir=folder) as of_ids, tempfile.TemporaryFile(dir=folder) as of_mask:
        for ids, mask in encode_all(conversations, order, form, strict):
            of_ids.write(ids.astype(dtype))
            of_mask.write(mask)
            lengths.append(len(ids))
        of_ids.flush()
        of_mask.flush()
        return np.memmap(of_ids, dtype, 'r'), np.memmap(of_mask, np.uint8, 'r'), np.asarray(lengths)


paths = [a for a in sys.argv[1:] if not is_option(a)] or [Path(__file__).with_name('example.jsonl')]
source = ', '.join(Path(path).name for path in paths)
folder, path = dataset_folder(__file__, name), tokenizer_path(tokenizer)
coder = resolve_tokenizer(path, vocab_size, ('bpe', 'gpt2', 'char'))
if tokenizer == 'bpe':
    check_vocab_size(vocab_size, (END, *MARKERS.values()))
conversations = Conversations(paths, strict)
cut = cut_of(len(conversations), val_fraction, source, 'conversations')
marks = {'text': conversations.mark, 'how': how_prepared(tokenizer, vocab_size, val_fraction)}
check_replacing(folder, marks, overwrite)
order = np.random.default_rng(2357).permutation(len(conversations))
coder = coder or make_tokenizer(conversations, order[:cut])
template = Path(path).is_dir() and folder_template(path) or template_for(coder)
ids, mask, lengths = encode(conversations, order, ChatForm(template, coder), folder.parent)
cut = lengths[:cut_of(len(lengths), val_fraction, source, 'conversations')].sum()
parts = {'train': slice(cut), 'val': slice(cut, None)}
write_dataset(folder, {split: [ids[part]] for split, part in parts.items()}, coder, source,
              {split: mask[part] for split, part in parts.items()},
              {'chat': template, **marks})
print(f'{len(lengths):,} conversations, half of them up to {np.sort(lengths)[len(lengths) // 2]:,} tokens '
      f'long, the longest {lengths.max():,}; a block_size of as many holds each of them whole')
