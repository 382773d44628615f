"""
Text files and folders of them as one string.

    text = read_texts(['notes.txt', 'books/'])
"""

from collections import Counter
from pathlib import Path

from support.machine.files import download, read_text

TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
                    'data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')  # sha256


def tiny_shakespeare(folder):
    """Path of folder/input.txt, downloaded unless it exists."""
    path = Path(folder, 'input.txt')
    download(*TINY_SHAKESPEARE, path)
    return path


# of text, markup and programs; a file without a suffix may be text, too
SUFFIXES = frozenset((
    '', '.txt', '.text', '.md', '.markdown', '.rst', '.adoc', '.org', '.tex', '.bib', '.srt', '.vtt',
    '.html', '.htm', '.xml', '.css', '.csv', '.tsv', '.json', '.jsonl', '.yaml', '.yml', '.toml',
    '.ini', '.cfg', '.conf', '.log', '.py', '.pyi', '.pyx', '.c', '.h', '.cc', '.cpp', '.hpp', '.cu',
    '.java', '.kt', '.scala', '.js', '.ts', '.jsx', '.tsx', '.go', '.rs', '.rb', '.php', '.swift', '.m',
    '.cs', '.hs', '.ml', '.el', '.lisp', '.clj', '.scm', '.lua', '.pl', '.r', '.jl', '.f90', '.sh',
    '.sql', '.proto', '.cmake', '.vim', '.asm'))


def read_texts(paths):
    """The text of files, and of folders in sorted order, as one string in which every file ends its line.

    In a folder, hidden files and folders, files with suffixes that aren't of text, and files that aren't
    UTF-8 are left out and counted. Files named themselves are read, or raise ValueError.
    """
    texts, left_out = [], Counter()
    for path in map(Path, paths):
        for file in sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]:
            reason = reason_to_leave_out(file.relative_to(path)) if file != path else None
            if reason is None:
                try:
                    text = read_text(file)
                except ValueError:
                    if file == path:
                        raise
                    reason = 'not UTF-8 text'
                else:
                    texts.append(text if text.endswith('\n') else text + '\n')
            left_out.update([reason] if reason else [])
    tell_files(len(texts), left_out)
    return ''.join(texts)


def reason_to_leave_out(path, suffixes=SUFFIXES):
    """Why a file of a folder isn't read, in words; None if it may be text. path: within the folder."""
    if any(part.startswith('.') for part in path.parts):
        return 'hidden'
    suffix = path.suffix.lower()
    return None if suffix in suffixes else f'with the suffix {suffix}' if suffix else 'without a suffix'


def tell_files(n_read, left_out):
    """Print how many files were read and left out. left_out: {reason: count}."""
    print(f'read {n_read:,} file{"s" * (n_read != 1)}{", left out " * bool(left_out)}'
          + ', '.join(f'{count:,} {reason}' for reason, count in sorted(left_out.items())))
