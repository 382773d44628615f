"""
Your own text: UTF-8 files, or folders of them in sorted order, joined.

    python data/text/prepare.py notes.txt
    python data/text/prepare.py books/ letters/ --name=library --tokenizer=bpe
    python train.py --dataset=library ...

Writes data/<name>/. To train from scratch, tokenizer=char makes a vocabulary of the text's characters, and
tokenizer=bpe a byte pair encoding of its own, which suits languages that GPT-2's doesn't know. Fine-tuning
takes the model's: tokenizer=gpt2, or a tokenizer.json or a folder with one. The text is held in memory: for
many gigabytes use `data/openwebtext/prepare.py --source=FOLDER`.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from configurator import configure
from support.errors import UserError
from support.text.prepare import dataset_folder, write_text_dataset
from support.text.reading import read_texts

name = 'my_text'  # the dataset's folder in data/
tokenizer = 'char'  # char, gpt2, bpe (trained on the text), or a tokenizer.json or a folder with one
vocab_size = 4096  # entries of tokenizer=bpe, 257 to 65536
val_fraction = 0.1  # of the characters, from the end

configure(globals(), args=[a for a in sys.argv[1:] if a.startswith('-')])

paths = [a for a in sys.argv[1:] if not a.startswith('-')]
if not paths:
    raise UserError('name at least one text file or folder: python data/text/prepare.py FILE_OR_FOLDER...')
if not name:
    raise UserError('name= must be a plain folder name: the dataset goes to data/<name>')
folder = dataset_folder(__file__, name)
write_text_dataset(folder, read_texts(paths), tokenizer, ', '.join(paths), val_fraction, vocab_size)
