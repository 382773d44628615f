"""
Text files and folders of them as one string.

    text = read_texts(['notes.txt', 'books/'])
"""

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


def read_texts(paths):
    """The text of files, and of folders in sorted order, as one string in which every file ends its line.

    In a folder, files that are not text are skipped and counted; named themselves, they raise ValueError.
    """
    texts, skipped = [], []
    for path in map(Path, paths):
        for file in sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]:
            try:
                text = read_text(file)
            except ValueError:
                if file == path:
                    raise
                skipped.append(file)
            else:
                texts.append(text if text.endswith('\n') else text + '\n')
    if skipped:
        print(f'skipped {len(skipped)} files that are not UTF-8 text, the first is {skipped[0]}')
    return ''.join(texts)
