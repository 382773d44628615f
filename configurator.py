"""
Overrides a script's settings from config files and the command line.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    python train.py eval_gpt2              # a bare name finds config/eval_gpt2.py
    python train.py --help                 # every setting, its default, its comment

A script states its settings as plain assignments at its top and calls `configure(globals())` right
under them. Arguments act from left to right, the last one wins. A config file is Python and is executed
in the script's globals, so it can do what any program can: run only configs that you trust.
"""

import ast
import atexit
import contextlib
import difflib
import functools
import io
import linecache
import os
import re
import sys
import tokenize
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent
KINDS = (bool, int, float, str, types.NoneType)


def configure(script, args=None):
    """Apply `args` (default: sys.argv[1:]) to the settings in `script`, a module's globals.

    Settings are the lower-case names bound so far to a bool, int, float, str or None, but for `_names`.
    Returns them as a dict. Raises ValueError for an unknown key or a value of the wrong type and
    FileNotFoundError for a config that isn't there.
    """
    sys.excepthook = show_error
    atexit.register(flush_or_drop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # redirected output on Windows can't encode most of Unicode
            stream.reconfigure(encoding='utf-8', errors='backslashreplace')
    args = sys.argv[1:] if args is None else args
    names = [k for k, v in script.items() if k.islower() and k[0] != '_' and isinstance(v, KINDS)]
    allowed = {k: allowed_types(script, k) for k in names}
    if '--help' in args or '-h' in args:
        print_help(script, names)
        sys.exit(0)
    wants_json = script.get('json') is False and {'--json', '--json=true'} & {a.lower() for a in args}
    out = sys.stderr if wants_json else sys.stdout  # a program that reads JSON from stdout gets nothing else
    is_master = (os.environ.get('RANK') or '0') == '0'  # one voice under torchrun
    say = functools.partial(say_to, out) if is_master else lambda *_: None
    for arg in args:
        if not arg.startswith('--'):
            apply_file(script, allowed, find_config(arg), say)
            continue
        key, equals, text = arg[2:].partition('=')
        if key not in allowed:
            raise ValueError(unknown_key(key, allowed))
        if not equals and bool not in allowed[key]:
            raise ValueError(f'--{key} needs a value: --{key}=...')
        script[key] = convert(key, parse(text) if equals else True, text, allowed[key])
        say(f'Overriding: {key} = {script[key]}')
    return {k: script[k] for k in names}


def say_to(stream, text):
    """Print a line if it can be written: a full disk or a closed pipe doesn't end a script."""
    with contextlib.suppress(OSError):
        print(text, file=stream)


def flush_or_drop():
    """At exit: what can't be written any more is dropped without a word."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # broken, closed, None
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def is_broken(stream):
    """Whether nobody reads a stream any more, as where `| head` has ended."""
    try:
        print(file=stream, flush=True)  # what could not be written is no longer in the buffer
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):
        return False
    return False


def allowed_types(script, key):
    """Types a setting may take: its annotation's (`compile: bool | str = 'auto'`), else its default's."""
    hints = script.get('__annotations__') or {}
    if '__annotate__' in script:  # from Python 3.14 on, annotations are computed when asked for
        hints = script['__annotate__'](1)
    hint = hints.get(key, type(script[key]))
    return typing.get_args(hint) or (hint,)


def parse(text):
    """A Python literal, true/false in any case, or the text itself."""
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # TypeError: {[]}
        return text


def convert(key, value, text, allowed):
    """`value` as one of the `allowed` types; `text` is how it was written."""
    if type(value) in allowed:
        return value
    if int in allowed and type(value) is float and value.is_integer() and abs(value) < 2**63:
        return int(value)  # 1e3
    if float in allowed and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if str in allowed and value is not None:
        return text
    wanted = ' or '.join('None' if t is types.NoneType else t.__name__ for t in allowed)
    raise ValueError(f'{key}={text or value!r} is {type(value).__name__}, but {key} takes {wanted}')


def apply_file(script, allowed, path, say):
    """Execute a config in the script's globals, then check every name that it bound."""
    source = path.read_text(encoding='utf-8-sig')
    say(f'Overriding config with {path}:\n{source}')
    tree = ast.parse(source, str(path))
    imported = {(a.asname or a.name).split('.')[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    before = dict(script)
    exec(compile(tree, str(path), 'exec'), script)
    for key, value in list(script.items()):
        if key.startswith('_') or (key in before and value is before[key]):
            continue
        if key in allowed:
            script[key] = convert(key, value, str(value), allowed[key])
        elif key not in imported and not isinstance(value, (types.ModuleType, types.FunctionType, type)):
            raise ValueError(f'{unknown_key(key, allowed)} (in {path}; '
                             'a name of the config\'s own begins with "_")')


def find_config(name):
    """The config's path: as given, or a bare name's `config/NAME.py`."""
    choices = [Path(name), Path('config', f'{name}.py'), ROOT / 'config' / f'{name}.py']
    for path in choices:
        if os.path.isfile(path):  # unlike Path.is_file, False where a name is too long
            return path
    known = sorted(p.stem for p in (ROOT / 'config').glob('*.py'))
    raise FileNotFoundError(f'no config {name}{nearest(Path(name).stem, known)}; '
                            f'config/ has {", ".join(known)}; settings are written --key=value')


def unknown_key(key, allowed):
    return f'Unknown config key: {key}{nearest(key, allowed) or " (--help lists them all)"}'


def nearest(name, known):
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f' (did you mean {" or ".join(close)}?)' if close else ''


def print_help(script, names):
    """The script's docstring, then its settings as they stand in its source, comments included."""
    source = Path(script['__file__']).read_text(encoding='utf-8')
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}
    print((script.get('__doc__') or '').strip() + '\n\nSettings (--key=value):')
    for number, line in enumerate(source.splitlines(), 1):
        found = re.match(r'(\w+)\s*(:[^=]+)?=[^=]', line)
        if found and found[1] in names:
            print(f'  {found[1] + "=" + repr(script[found[1]]):42} {comments.get(number, "")}'.rstrip())
            names = [n for n in names if n != found[1]]


def show_error(kind, error, trace):
    """sys.excepthook: what this repository raises on purpose is one line, all else keeps its traceback."""
    if issubclass(kind, BrokenPipeError) and is_broken(sys.stdout):
        return
    last = traceback.extract_tb(trace)[-1] if trace else None
    path = Path(last.filename).resolve() if last else Path()
    ours = path.is_relative_to(ROOT) and 'site-packages' not in path.parts
    raised = last and (linecache.getline(last.filename, last.lineno).strip().startswith('raise '))
    if ours and raised and issubclass(kind, (ValueError, FileNotFoundError, FloatingPointError, MemoryError)):
        print(f'{kind.__name__}: {error}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
