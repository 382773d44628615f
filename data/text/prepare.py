"""
Your own text: files, or folders of them in sorted order, joined.

    python data/text/prepare.py notes.txt
    python data/text/prepare.py books/ letters/ --name=library --tokenizer=bpe
    python data/text/prepare.py posts.jsonl.gz --text_column=body --val=held_out.txt
    python train.py --dataset=library ...

Writes data/<name>/. To train from scratch, tokenizer=char makes a vocabulary of the text's
characters, and tokenizer=bpe a byte pair encoding of its own, which suits languages that GPT-2's
doesn't know. Fine-tuning takes the model's: tokenizer=gpt2, a name of the hub, a tokenizer.json, or
the folder of the model or of its data. The text is read in pieces, so it may be larger than the memory.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from configurator import configure, is_option
from support.errors import UserError
from support.hub.names import tokenizer_path
from support.text.formats import Reading
from support.text.prepare import dataset_folder, write_text_dataset
from support.text.reading import TextFiles

name = 'my_text'  # the dataset's folder in data/
tokenizer = 'char'  # char, gpt2, bpe (trained on the text), a name of the hub, or a path
vocab_size = 4096  # entries of tokenizer=bpe, 257 to 65536
val_fraction = 0.1  # of the characters, from the end
val = ''  # a file or folder for validation, instead of that fraction
text_column = ''  # of .jsonl, .csv and .parquet files; empty: read them as plain text
encoding = 'utf-8'  # of files without a byte-order mark: utf-16, latin-1, cp949, gb18030, ...
strict = False  # refuse rows without text, instead of leaving them out
overwrite = False  # replace data/<name>/ if it has another text

configure(globals(), args=[a for a in sys.argv[1:] if is_option(a)])

paths = [a for a in sys.argv[1:] if not is_option(a)]
if not paths:
    raise UserError('name at least one text file or folder: python data/text/prepare.py '
                    'FILE_OR_FOLDER...')
if not name:
    raise UserError('name= must be a plain folder name: the dataset goes to data/<name>')
how = Reading(text_column, encoding, strict)
held_out = TextFiles([val], how) if val else None
write_text_dataset(dataset_folder(__file__, name), TextFiles(paths, how), tokenizer_path(tokenizer),
                   ', '.join(paths), val_fraction, vocab_size, val=held_out, overwrite=overwrite)
