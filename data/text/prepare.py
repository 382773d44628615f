"""
Your own text: any UTF-8 files, or folders of them, one after the other in sorted order.

    python data/text/prepare.py notes.txt
    python data/text/prepare.py books/ letters/ --name=library --tokenizer=gpt2
    python train.py --dataset=library ...

Writes data/<name>/. tokenizer=char makes a vocabulary of the text's characters, for models from scratch;
tokenizer=gpt2 is what fine-tuning GPT-2 needs. The text is held in memory: for many gigabytes take
`data/openwebtext/prepare.py --source=FOLDER`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configurator import configure  # noqa: E402
from dataset import read_text, write_text_dataset  # noqa: E402

name = 'my_text'  # the dataset's folder in data/
tokenizer = 'char'  # char or gpt2
val_fraction = 0.1  # of the characters, from the end

configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])

named = [Path(a) for a in sys.argv[1:] if not a.startswith('-')]
if not named:
    raise ValueError('name at least one text file or folder: python data/text/prepare.py FILE_OR_FOLDER...')
if Path(name).name != name or name in ('', '..'):
    raise ValueError(f'name={name} must be a plain folder name: the dataset goes to data/<name>')
files = []
for path in named:
    files += sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
parts, skipped = [], []
for path in files:
    try:
        parts.append(read_text(path))
    except ValueError:  # in a folder, what is no text is left out
        if path in named:
            raise
        skipped.append(path)
if skipped:
    print(f'left out {len(skipped)} files that are not UTF-8 text, {skipped[0]} the first of them')
text = ''.join(p if p.endswith('\n') else p + '\n' for p in parts)
write_text_dataset(ROOT / 'data' / name, text, tokenizer, ', '.join(map(str, named)), val_fraction)
