"""
Your own text: UTF-8 files, or folders of them in sorted order, joined.

    python data/text/prepare.py notes.txt
    python data/text/prepare.py books/ letters/ --name=library --tokenizer=gpt2
    python train.py --dataset=library ...

Writes data/<name>/. tokenizer=char makes a vocabulary of the text's characters, to train from scratch;
fine-tuning GPT-2 needs tokenizer=gpt2. The text is held in memory: for many gigabytes use
`data/openwebtext/prepare.py --source=FOLDER`.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from pathlib import Path

from configurator import configure
from support.text.prepare import read_texts, write_text_dataset

name = 'my_text'  # the dataset's folder in data/
tokenizer = 'char'  # char or gpt2
val_fraction = 0.1  # of the characters, from the end

configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])

paths = [a for a in sys.argv[1:] if not a.startswith('-')]
if not paths:
    raise ValueError('name at least one text file or folder: python data/text/prepare.py FILE_OR_FOLDER...')
if Path(name).name != name or name in ('', '..'):
    raise ValueError(f'name={name} must be a plain folder name: the dataset goes to data/<name>')
folder = Path(__file__).parents[1] / name
write_text_dataset(folder, read_texts(paths), tokenizer, ', '.join(paths), val_fraction)
