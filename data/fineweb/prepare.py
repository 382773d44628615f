"""
FineWeb-Edu, FineWeb (Penedo et al. 2024), or files of either that are tokens already, in GPT-2's byte pair
encoding.

    python data/fineweb/prepare.py --limit=100000                       # the first documents of FineWeb-Edu
    python data/fineweb/prepare.py --source=HuggingFaceFW/fineweb       # 10 billion tokens of FineWeb
    python data/fineweb/prepare.py --shards=9                           # 900 million tokens, ready to use

With a limit, only what is read is downloaded. Without one, the whole subset goes to the Hugging Face cache
(HF_HOME moves it) and an interrupted run continues where it stopped. The ready files have 100 million tokens
each and keep their names and headers, which train.py reads.
"""

import sys
sys.path.insert(0, __file__.rpartition('prepare.py')[0] + '../..')

from configurator import configure

from pathlib import Path

from support.errors import UserError
from support.hub.names import tokenizer_path
from support.machine.files import explain_failure, go_offline_if_cut_off, link
from support.text.corpus import prepare_corpus
from support.text.documents import Corpus
from support.text.prepare import dataset_folder
from support.text.tokens import describe_file, split_files

source = 'HuggingFaceFW/fineweb-edu'  # a Hugging Face dataset, or a local file or folder of documents
subset = 'sample-10BT'  # on the hub: sample-10BT, sample-100BT, sample-350BT, CC-MAIN-2024-10, ...
name = ''  # the dataset's folder in data/; empty: fineweb
text_column = 'text'
tokenizer = 'gpt2'  # gpt2, bpe (trained on the training part), a name of the hub, or a tokenizer.json's path
vocab_size = 4096  # entries of tokenizer=bpe, 257 to 65536
num_proc = 0  # threads for encoding; 0: one per core
limit = 0  # use only the first documents; 0: all
val_fraction = 0.0005  # of the shuffled documents
strict = False  # refuse rows without text, instead of leaving them out
shards = 0  # training files to take from shards_from, instead of all the above; 0: none
shards_from = 'kjj0/fineweb10B-gpt2'  # a Hugging Face dataset, or a local folder, with such files


def take_shards(folder, source, n):
    """Link the validation file and the first n training files of a source into a folder. Raises ValueError or
    FileNotFoundError, and leaves the folder as it was, if one of them isn't what its header says."""
    held = source
    if not Path(source).is_dir():
        go_offline_if_cut_off()
        from huggingface_hub import snapshot_download
        wanted = ['*_val_*.bin', *(f'*_train_{i:06}.bin' for i in range(1, n + 1))]
        with explain_failure(f'can\'t load {source}; a local folder will do: --shards_from=FOLDER'):
            held = snapshot_download(source, repo_type='dataset', allow_patterns=wanted)
    files = {'train': split_files(held, 'train')[:n], 'val': split_files(held, 'val')}
    if len(files['train']) < n or not files['val']:
        raise UserError(f'{source} has {len(files["train"])} training files and {len(files["val"])} for '
                         f'validation, too few for --shards={n}')
    counts = {split: sum(map(count_shard, paths)) for split, paths in files.items()}
    paths = [path for found in files.values() for path in found]
    others = sorted({p.name for p in folder.glob('*.bin')} - {p.name for p in paths})
    if others:
        raise UserError(f'{folder} has {others[0]}, which is not among these files: remove it first')
    folder.mkdir(exist_ok=True)
    for path in paths:
        target = folder / path.name
        if not (target.exists() and target.samefile(path)):
            link(path.resolve(), target)  # the cache has symbolic links
    for split, found in files.items():
        print(f'{split} has {counts[split]:,} tokens in {len(found)} files')


def count_shard(path):
    """Number of tokens in a file with a header, which must be that of the file."""
    file = describe_file(path, 'uint16')
    if not file.offset:
        raise UserError(f'{path} has no header of 20240520, 1 and the number of tokens: not such a file')
    return file.count


configure(globals())
if shards < 0:
    raise UserError(f'shards={shards} must be at least 0')
if shards:
    take_shards(dataset_folder(__file__, name), shards_from, shards)
else:
    corpus = Corpus(source, text_column, limit, subset, strict=strict)
    prepare_corpus(dataset_folder(__file__, name, source), corpus, tokenizer_path(tokenizer), vocab_size,
                   val_fraction, num_proc)
