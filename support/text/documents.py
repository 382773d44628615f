"""
The documents of a corpus: from the Hugging Face hub, or from local parquet, jsonl and text files.

    documents = load_documents(Corpus('my_corpus/', limit=100000))  # a datasets.Dataset

Hugging Face's `datasets` keeps them in a memory-mapped file.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.errors import UserError
from support.machine.files import explain_failure, go_offline_if_cut_off
from support.text.reading import reason_to_leave_out, report_files, walk

FORMATS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text', '.raw': 'text'}
SPLIT_NAMES = {'train': r'(?<![a-z])train', 'validation': r'(?<![a-z])(val|dev)'}  # in paths


@dataclass(frozen=True)
class Corpus:
    """Where documents come from, and what they are."""
    source: str  # a Hugging Face dataset, or a local parquet, jsonl or text file, or a folder
    text_column: str = 'text'
    limit: int = 0  # use only the first documents, and download no more; 0: all
    subset: str = ''  # a configuration of a dataset on the hub
    revision: str = ''  # of a dataset on the hub; empty: main
    own_splits: bool = False  # use the source's own validation split, where it has one
    regroup: Callable | None = None  # makes documents of a text file's lines; else a file is one
    rows_are_lines: bool = False  # a table's rows are such lines, too
    strict: bool = False  # refuse rows without text, instead of leaving them out


def has_own_splits(source):
    """Whether a source is on the hub, or a folder with files named train... and val... or dev..."""
    path = Path(source)
    if path.is_dir():
        return all(files_of(source, name) for name in SPLIT_NAMES)
    return not path.exists()


def files_of(source, split=None):
    """Files with documents in a local source, sorted; split: only those with its name in their
    path."""
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = [Path(file) for file, found in walk(path)
                 if not isinstance(found, str) and not reason_to_leave_out(file, FORMATS)]
    if split:
        return [file for file in files
                if re.search(SPLIT_NAMES[split], file.relative_to(path).as_posix().lower())]
    return files


def report_files_of(source, splits):
    """Print how many files of a local folder are in these splits (None: in any), and why others
    aren't."""
    path = Path(source)
    if path.is_dir():
        read = {file for split in splits for file in files_of(source, split)}
        others = [(file, found) for file, found in walk(path) if Path(file) not in read]
        report_files(len(read), [(file, why_not(file, found)) for file, found in others])


def why_not(file, found):
    """Why a file isn't read, in words. found: of `walk`."""
    if isinstance(found, str):
        return found
    return reason_to_leave_out(file, FORMATS) or 'of another split'


def format_of(source, files):
    """The format of local files, None for a source on the hub. Raises UserError if formats are
    mixed."""
    if not Path(source).exists():
        is_name = re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', source)
        if not is_name or Path(source).suffix.lower() in FORMATS:
            raise UserError(f'{source} doesn\'t exist; a dataset on the hub is named like '
                            'owner/name')
        return None
    suffixes = sorted({file.suffix.lower() for file in files})
    kinds = {FORMATS.get(suffix) for suffix in suffixes}
    if len(kinds) > 1:
        raise UserError(f'{source} mixes {", ".join(suffixes)} files: name a file, or a folder '
                        'with one kind')
    if not kinds or None in kinds:
        raise UserError(f'{source} has no {", ".join(FORMATS)} files')
    return kinds.pop()


def load_documents(corpus, split=None):
    """The documents of a Corpus as a datasets.Dataset. split: 'train' or 'validation'; None
    takes the hub's training split, or all local files. Raises UserError if the source can't be
    read or has no text."""
    go_offline_if_cut_off()
    import datasets
    source, column, limit = corpus.source, corpus.text_column, corpus.limit
    files = files_of(source, split)
    kind = format_of(source, files)
    explained = partial(explain_failure, f'can\'t load {source}; local parquet, jsonl or text '
                        'files will do: --source=PATH', datasets.exceptions.DatasetGenerationError)
    with explained():
        rows, key = load_rows(kind or source, 'train' if kind else split or 'train', limit,
                              **how_to_load(corpus, kind, files))
        if kind == 'text' and column != 'text':
            rows = rows.rename_column('text', column)
        names = rows.column_names or [*next(iter(rows), {column: ''})]  # a stream may not know yet
    check_text(source, rows, column, names)
    joins = corpus.regroup if kind == 'text' or corpus.rows_are_lines else None
    if key or joins:
        how = {'text_column': column, 'limit': limit, 'regroup': joins}
        key = key and datasets.fingerprint.Hasher.hash((key, how))
        with explained():
            rows = datasets.Dataset.from_generator(
                first_documents, gen_kwargs={'rows': rows, **how}, fingerprint=key)
        check_text(source, rows, column, rows.column_names or [column])
    return with_text(rows.select(range(min(limit or len(rows), len(rows)))), corpus)


def how_to_load(corpus, kind, files):
    """Further arguments of datasets.load_dataset. kind: of `format_of`."""
    if kind is None:
        named = {'name': corpus.subset, 'revision': corpus.revision}
        return {name: value for name, value in named.items() if value}
    how = {'data_files': [str(file) for file in files]}
    if kind == 'text':
        how |= {'sample_by': 'line' if corpus.regroup else 'document', 'keep_linebreaks': True,
                'encoding': 'utf-8-sig'}
    return how


def load_rows(where, split, limit, **how):
    """A datasets.Dataset and None; with a limit a stream of rows, which downloads what is read
    of it, and what tells it from others."""
    import datasets
    is_cached = where not in FORMATS.values() and datasets.config.HF_HUB_OFFLINE  # no streams there
    if not limit or is_cached:
        return datasets.load_dataset(where, split=split, **how), None
    builder = datasets.load_dataset_builder(where, **how)
    return builder.as_streaming_dataset(split), (builder.config_id, builder.hash, split)


def check_text(source, rows, text_column, names):
    """UserError unless the column is there and has strings. rows: may be a stream; names: its
    columns."""
    if text_column not in names:
        raise UserError(f'{source} has no column {text_column}, only {", ".join(names)}: name one '
                        'with --text_column')
    kind = rows.features[text_column].dtype if rows.features else 'string'
    if kind not in ('string', 'large_string'):
        raise UserError(f'{source} has {kind} in column {text_column}, not text: name another with '
                         '--text_column')


def with_text(rows, corpus):
    """The rows that have text. Prints how many don't. UserError if none has, or one hasn't and the
    corpus is strict."""
    n_rows, n_missing = len(rows), rows.data.column(corpus.text_column).null_count
    if not n_missing:
        return rows
    if n_missing == n_rows:
        raise UserError(f'{corpus.source} has no row with text in column {corpus.text_column}: name '
                        'another with --text_column')
    number = f'{n_missing:,} of {n_rows:,} rows'
    if corpus.strict:
        raise UserError(f'{corpus.source} has no text in column {corpus.text_column} in {number}. '
                        'Without --strict=True such rows are left out')
    print(f'left out {number}: no text in column {corpus.text_column}. --strict=True refuses them')
    return rows.filter(lambda text: text is not None, input_columns=corpus.text_column)


def first_documents(rows, text_column, limit, regroup):
    """The rows of a new dataset: the first `limit` documents, or all with 0."""
    texts = (text for batch in rows.iter(min(1000, limit or 1000)) for text in batch[text_column])
    documents = regroup(text or '' for text in texts) if regroup else texts
    return ({text_column: document} for document in itertools.islice(documents, limit or None))
