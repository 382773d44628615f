"""
The documents of a corpus: from the Hugging Face hub, or from local parquet, jsonl and text files.

    documents = load_documents('my_corpus/', text_column='text', limit=100000)  # a datasets.Dataset

Hugging Face's `datasets` keeps them in a memory-mapped file.
"""

import itertools
import re
from collections import Counter
from functools import partial
from pathlib import Path

from support.errors import UserError
from support.machine.files import explain_failure, go_offline_if_cut_off
from support.text.reading import reason_to_leave_out, tell_files

FORMATS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text', '.raw': 'text'}
SPLIT_NAMES = {'train': r'(?<![a-z])train', 'validation': r'(?<![a-z])(val|dev)'}  # in the paths of files


def has_own_splits(source):
    path = Path(source)
    return not path.exists() or path.is_dir() and all(files_of(source, name) for name in SPLIT_NAMES)


def files_of(source, split=None):
    """Files with documents in a local source, sorted; split: only those with its name in their path."""
    path = Path(source)
    files = sorted(p for p in path.rglob('*') if p.is_file() and not reason_to_leave_out(
        p.relative_to(path), FORMATS)) if path.is_dir() else [path]
    return [f for f in files
            if not split or re.search(SPLIT_NAMES[split], f.relative_to(path).as_posix().lower())]


def tell_files_of(source, splits):
    """Print how many files of a local folder are in these splits (None: in any), and why others aren't."""
    path = Path(source)
    if path.is_dir():
        read = {file for split in splits for file in files_of(source, split)}
        others = (p for p in path.rglob('*') if p.is_file() and p not in read)
        tell_files(len(read), Counter(reason_to_leave_out(p.relative_to(path), FORMATS) or 'of another split'
                                      for p in others))


def format_of(source, files):
    """The format of local files, None for a source on the hub. Raises ValueError if formats are mixed."""
    if not Path(source).exists():
        if Path(source).suffix in FORMATS or not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', source):
            raise UserError(f'{source} doesn\'t exist; a dataset on the hub is named like owner/name')
        return None
    kinds = sorted({p.suffix for p in files})
    if len(kinds) > 1:
        raise UserError(f'{source} mixes {", ".join(kinds)} files: name a file, or a folder with one kind')
    if not kinds or kinds[0] not in FORMATS:
        raise UserError(f'{source} has no {", ".join(FORMATS)} files')
    return FORMATS[kinds[0]]


def load_documents(source, text_column, limit, split=None, regroup=None, rows_are_lines=False, **hub):
    """The documents as a datasets.Dataset. Raises ValueError if the source can't be read or has no text.

    split: 'train' or 'validation'; None takes the hub's training split, or all local files. limit: take only
    the first documents, and download no more than them; 0: all. regroup: a function from lines to documents,
    for text files, and for a table's rows if rows_are_lines. hub: further arguments of datasets.load_dataset,
    for sources on the hub.
    """
    go_offline_if_cut_off()
    import datasets
    files = files_of(source, split)
    kind = format_of(source, files)
    joins = regroup if kind == 'text' or rows_are_lines else None
    explained = partial(explain_failure, f'can\'t load {source}; local parquet, jsonl or text files will do: '
                        '--source=PATH', datasets.exceptions.DatasetGenerationError)
    if kind:
        hub = {'data_files': [str(f) for f in files]}
        hub |= {'sample_by': 'line' if regroup else 'document', 'keep_linebreaks': True,
                'encoding': 'utf-8-sig'} if kind == 'text' else {}
    with explained():
        rows, key = load_rows(kind or source, 'train' if kind else split or 'train', limit, **hub)
        if kind == 'text' and text_column != 'text':
            rows = rows.rename_column('text', text_column)
        names = rows.column_names or [*next(iter(rows), {text_column: ''})]  # a stream may not know them yet
    check_text(source, rows, text_column, names)
    if key or joins:
        how = {'text_column': text_column, 'limit': limit, 'regroup': joins}
        key = key and datasets.fingerprint.Hasher.hash((key, how))
        with explained():
            rows = datasets.Dataset.from_generator(first_documents, gen_kwargs={'rows': rows, **how},
                                                   fingerprint=key)
        check_text(source, rows, text_column, rows.column_names or [text_column])
    return rows.select(range(min(limit or len(rows), len(rows))))


def load_rows(where, split, limit, **how):
    """A datasets.Dataset and None; with a limit a stream of rows, which downloads what is read of it, and
    what tells it from others."""
    import datasets
    if not limit or where not in FORMATS.values() and datasets.config.HF_HUB_OFFLINE:  # no streams in caches
        return datasets.load_dataset(where, split=split, **how), None
    builder = datasets.load_dataset_builder(where, **how)
    return builder.as_streaming_dataset(split), (builder.config_id, builder.hash, split)


def check_text(source, rows, text_column, names):
    """ValueError unless the column is there and has strings. rows: may be a stream; names: its columns."""
    if text_column not in names:
        raise UserError(f'{source} has no column {text_column}, only {", ".join(names)}: name one with '
                         '--text_column')
    kind = rows.features[text_column].dtype if rows.features else 'string'
    has_gaps = hasattr(rows, 'data') and rows.data.column(text_column).null_count
    if kind not in ('string', 'large_string') or has_gaps:
        raise UserError(f'{source} has rows without text in column {text_column}: name another with '
                         '--text_column')


def first_documents(rows, text_column, limit, regroup):
    """The rows of a new dataset: the first `limit` documents, or all with 0."""
    texts = (text for batch in rows.iter(min(1000, limit or 1000)) for text in batch[text_column])
    documents = regroup(texts) if regroup else texts
    return ({text_column: document} for document in itertools.islice(documents, limit or None))
