"""
Settings from config files and the command line: a script's plain assignments, checked and overridden.

A script states its settings at its top and calls `configure(globals())` right under them. Arguments act from
left to right, the last one wins. A config file is Python and is executed in the script's globals, so it can
do what any program can: run only configs that you trust.
"""

import ast
import contextlib
import difflib
import functools
import io
import os
import re
import shlex
import sys
import tokenize
import types
import typing
from pathlib import Path

from support.errors import MissingFile, UserError
from support.machine.console import ROOT, prepare_streams

KINDS = (bool, int, float, str, types.NoneType)
REMOVED, FROM_DATA = 'removed', 'taken from the data'
OTHER_NAMES = {  # settings of other repositories, and of this one's earlier versions: what does it here
    'use_rope rope rotary use_rotary use_rotary_embeddings': "pos_emb = 'rope'",
    'use_alibi': "pos_emb = 'alibi'",
    'use_rmsnorm rmsnorm use_rms_norm rms_norm': "norm = 'rmsnorm'",
    'norm_type': 'norm',
    'use_swiglu swiglu': "activation = 'swiglu'",
    'mlp mlp_type mlp_variant activation_variant act_fn': 'activation',
    'use_muon muon': "optimizer = 'muon'",
    'optimizer_type optim': 'optimizer',
    'weight_tying tie_embeddings tie_word_embeddings wte_weight_tying tied': 'tie_weights',
    'use_qk_norm': 'qk_norm',
    'n_kv_heads num_kv_heads n_kv_group n_query_groups': 'n_kv_head',
    'logit_cap final_logit_softcap': 'logit_softcap',
    'use_ema ema': 'ema_decay',
    'lora use_lora lora_r': 'lora_rank',
    'gradient_checkpointing use_gradient_checkpointing use_checkpoint': 'activation_checkpointing',
    'lr max_lr': 'learning_rate',
    'max_steps num_iterations': 'max_iters',
    'grad_accum_steps accumulation_steps': 'gradient_accumulation_steps',
    'context_length ctx_len seq_len sequence_length': 'block_size',
    'd_model hidden_size embd_dim': 'n_embd',
    'num_layers': 'n_layer',
    'num_heads': 'n_head',
    'muon_weight_decay': 'weight_decay',
    'plan_gpu': 'plan_gpus',
    'num_threads n_threads': 'threads',
    'vocab_size meta_vocab_size': FROM_DATA,
    'residual_scale skip_spikes muon_momentum': REMOVED,
}
OTHER_NAMES = {name: ours for names, ours in OTHER_NAMES.items() for name in names.split()}
ON_BY_DEFAULT = [name for name, ours in OTHER_NAMES.items() if ours == 'tie_weights']


def is_own_setting(name, value):
    """A script of ours: the lower-case names bound to a bool, int, float, str or None."""
    return name.islower() and name[0] != '_' and isinstance(value, KINDS)


def is_plain_value(name, value):
    """A script of somebody's own that executes configurator.py: upper-case names and containers too."""
    return name[0] != '_' and isinstance(value, (*KINDS, list, tuple, dict))


def configure(script, args=None, is_setting=is_own_setting):
    """Apply `args` (default: sys.argv[1:]) to the settings in `script`, a module's globals.

    Settings are the names bound so far for which is_setting(name, value) holds. Returns them as a dict.
    Raises ValueError for an unknown key or a wrong type, FileNotFoundError for a missing config.
    """
    prepare_streams()
    args = sys.argv[1:] if args is None else args
    names = [k for k, v in script.items() if is_setting(k, v)]
    allowed = {k: allowed_types(script, k) for k in names}
    if '--help' in args or '-h' in args:
        print_help(script, names)
        sys.exit(0)
    wants_json = script.get('json') is False and {'--json', '--json=true'} & {a.lower() for a in args}
    out = sys.stderr if wants_json else sys.stdout  # a program that reads JSON from stdout gets nothing else
    is_master = (os.environ.get('RANK') or '0') == '0'  # one voice under torchrun
    say = functools.partial(say_to, out) if is_master else lambda *_: None
    for before, arg, after in zip(['', *args], args, [*args[1:], '']):
        if not arg.startswith('--'):
            apply_file(script, allowed, find_config(arg, allowed, before), say)
            continue
        key, equals, text = arg[2:].partition('=')
        if key not in allowed:
            raise UserError(unknown_key([key], allowed))
        if not equals and bool not in allowed[key]:
            value = shlex.quote(after) if after and after[0] != '-' else '...'
            raise UserError(f'--{key} needs a value: --{key}={value}')
        script[key] = convert(key, parse(text) if equals else True, text, allowed[key])
        say(f'Overriding: {key} = {script[key]}')
    return {k: script[k] for k in names}


def say_to(stream, text):
    """Print a line if it can be written: a full disk or a closed pipe doesn't end a script."""
    with contextlib.suppress(OSError):
        print(text, file=stream)


def allowed_types(script, key):
    """Types a setting may take: its annotation's (`compile: bool | str = 'auto'`), else its default's. A bare
    None takes any."""
    hints = script.get('__annotations__') or {}
    if script.get('__annotate__'):  # from Python 3.14 on, annotations are computed when asked for
        hints = script['__annotate__'](1)
    hint, kind = hints.get(key), type(script[key])
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    named = [h for h in (typing.get_args(hint) if is_union else (hint,)) if isinstance(h, type)]
    return tuple(named) or ((*KINDS, list, tuple, dict) if kind is types.NoneType else (kind,))


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
    raise UserError(f'{key}={text or value!r} is {type(value).__name__}, but {key} takes {wanted}')


def read_config(path):
    """source, code and imported names of a config. Raises ValueError if it isn't Python, or if a statement
    assigns nothing, as those of YAML and JSON do."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
    except (SyntaxError, UnicodeDecodeError) as error:  # SyntaxError: in the first two lines
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error.msg
        raise UserError(f'{path} is not UTF-8 text ({reason}): save it as UTF-8') from None
    try:
        tree = ast.parse(source, str(path))
        code = compile(tree, str(path), 'exec')
    except SyntaxError as error:
        line = (error.text or '').strip()[:80]
        raise UserError(f'{path}, line {error.lineno}: {error.msg}: {line}') from None
    except (ValueError, RecursionError, MemoryError) as error:  # zero bytes; thousands of brackets
        raise UserError(f'{path} is not Python ({error or "too deep"})') from None
    acting = (ast.Call, ast.NamedExpr, ast.Await)
    for node in tree.body:
        is_idle = isinstance(node, ast.Expr) and not any(isinstance(n, acting) for n in ast.walk(node))
        is_text = is_idle and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if is_idle and not is_text or isinstance(node, ast.AnnAssign) and node.value is None:
            line = source.splitlines()[node.lineno - 1].strip()
            raise UserError(f'{path}, line {node.lineno}: {line[:80]} assigns nothing; a config is Python: '
                             'name = value')
    return source, code, {(a.asname or a.name).split('.')[0] for node in ast.walk(tree)
                          if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}


def apply_file(script, allowed, path, say):
    """Execute a config in the script's globals, then check every name that it bound."""
    source, code, imported = read_config(path)
    say(f'Overriding config with {path}:\n{source}')
    before, unknown = dict(script), []
    exec(code, script)
    for key, value in list(script.items()):
        if key.startswith('_') or (key in before and value is before[key]):
            continue
        if key in allowed:
            script[key] = convert(key, value, str(value), allowed[key])
        elif key in imported or isinstance(value, (types.ModuleType, types.FunctionType, type)):
            continue
        elif can_be_ignored(key, value, allowed):
            say(f'Ignoring {key} = {value!r}: there is no such setting here, and it is off')
            script.pop(key)
            script.update({key: before[key]} if key in before else {})
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f'{unknown_key(unknown, allowed)} (in {path}; '
                         'a name of the config\'s own begins with "_")')


def can_be_ignored(key, value, allowed):
    """Whether a config's unknown setting is off, and no misspelling of one that exists."""
    is_off = isinstance(value, KINDS) and not value
    return is_off and key not in ON_BY_DEFAULT and (key in OTHER_NAMES or not nearest(key, allowed))


def find_config(name, allowed=(), before=''):
    """The config's path: as given, or by its name in config/, here or in the repository. before: the argument
    before it."""
    file = name.removesuffix('.py') + '.py'
    choices = [Path(name), Path('config', file), ROOT / 'config' / file]
    for path in [*choices, Path(file), ROOT / file] if os.path.dirname(name) else choices:
        if os.path.isfile(path) and path.suffix != '.pt':  # unlike Path.is_file, False for too long a name
            return path
    raise MissingFile(f'no config {name}{what_was_meant(name, allowed, before)}')


def what_was_meant(name, allowed, before):
    """What an argument that is no config may have been meant for."""
    setting, folder = name.lstrip('-'), Path(name).parent if name.endswith('.pt') else Path(name)
    if before.startswith('--') and '=' not in before and not name.endswith('.py'):
        return f'; settings are written {before}={name}'
    if setting.partition('=')[0] in allowed:
        return f'; settings are written --{setting}'
    if os.path.isdir(folder):
        key = 'data_dir' if [*folder.glob('*.bin')] else 'out_dir'
        return f'; {folder} is a folder: --{key}={folder}' if key in allowed else f'; {folder} is a folder'
    known = sorted(p.stem for p in (ROOT / 'config').glob('*.py'))
    return nearest(Path(name).stem, known, 'config/{}.py') or '; settings are written --key=value'


def unknown_key(keys, allowed):
    hints = [other_name(key, allowed) or nearest(key, allowed) for key in keys]
    named = ', '.join(f'{key}{hint}' for key, hint in zip(keys, hints))
    return f'Unknown config key: {named}{"" if any(hints) else " (--help lists them all)"}'


def other_name(key, allowed):
    """What does here what a setting of another repository does there."""
    ours = OTHER_NAMES.get(key, '')
    if ours.partition(' ')[0] in allowed:
        return f' (here {ours})'
    return f' ({ours})' if ours in (REMOVED, FROM_DATA) else ''


def nearest(name, known, shown='{}'):
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f' (did you mean {" or ".join(map(shown.format, close))}?)' if close else ''


def print_help(script, names):
    """The script's docstring, then its settings as they stand in its source, comments included."""
    source = Path(script['__file__']).read_text(encoding='utf-8') if '__file__' in script else ''
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}
    print((ast.get_docstring(ast.parse(source)) or '').strip() + '\n\nSettings (--key=value):')
    lines = [*enumerate(source.splitlines(), 1)] or [(0, f'{name} = ?') for name in names]
    for number, line in lines:
        found = re.match(r'(\w+)\s*(:[^=]+)?=[^=]', line)
        if found and found[1] in names:
            print(f'  {found[1] + "=" + repr(script[found[1]]):42} {comments.get(number, "")}'.rstrip())
            names = [n for n in names if n != found[1]]
