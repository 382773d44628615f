"""
Settings from config files and the command line: a script's plain assignments, checked and overridden.

    config = configure(globals())              # right under the settings
    config = configure(globals(), GPTConfig)   # the fields of GPTConfig are settings too
    config.given                               # names that a config file or the command line assigned

Arguments act from left to right, the last one wins. A config file is Python and is executed in the script's
globals, so it can do what any program can: run only configs that you trust.
"""

import ast
import builtins
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import os
import re
import shlex
import sys
import textwrap
import tokenize
import types
import typing
from collections import OrderedDict
from pathlib import Path

from support.errors import MissingFile, UserError
from support.machine.console import ROOT, prepare_streams

KINDS = (bool, int, float, str, types.NoneType)
WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a string',
         types.NoneType: 'None', list: 'a list', tuple: 'a tuple', dict: 'a dict'}
PATHS = ('out_dir', 'data_dir', 'init_from', 'export_dir', 'output', 'source', 'json', 'tokenizer', 'val')
IMPORTED = {'os': 'os', 'time': 'time', 'math': 'math', 'pickle': 'pickle', 'np': 'numpy', 'torch': 'torch'}
DASHES = '\u2013\u2014\u2212'  # en dash, em dash, minus sign: what editors and chats make of hyphens
FROM_DATA = 'taken from the data'
OTHER_NAMES = {  # settings of other repositories: what does it here
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
    'num_threads n_threads': 'threads',
    'vocab_size meta_vocab_size': FROM_DATA,
}
OTHER_NAMES = {name: ours for names, ours in OTHER_NAMES.items() for name in names.split()}
REMOVED = {  # settings of earlier versions: what to do instead
    'finetune_from': "init_from takes the run's folder or a .pt file",
    'ema_decay use_ema ema': 'averaged weights gained nothing, see docs/ablations.md',
    'plan_gpus plan_gpu': 'see docs/SCALING.md',
    'cpu_offload': 'activation_checkpointing and a smaller batch_size save memory',
    'allow_changed_data': 'a new run on other data starts with init_from = the folder of this run',
    'residual_scale skip_spikes muon_momentum': '',
}
REMOVED = {name: hint for names, hint in REMOVED.items() for name in names.split()}
ON_BY_DEFAULT = ['tie_weights', *(name for name, ours in OTHER_NAMES.items() if ours == 'tie_weights')]


class Settings(dict):
    """{name: value} of all settings. given: the names that a config file or the command line assigned."""

    def __init__(self, values, given):
        super().__init__(values)
        self.given = set(given)

    def __reduce__(self):  # a checkpoint holds a type that any program may load
        return OrderedDict, (), None, None, iter(self.items())


@dataclasses.dataclass
class Script:
    """A script whose settings are being read."""
    variables: dict  # its globals
    allowed: dict  # {setting: the types that it may take}
    defaults: dict
    of_model: dict  # the defaults of the model's fields, settings or not
    out: typing.TextIO
    given: set = dataclasses.field(default_factory=set)

    def say(self, text):
        """Print a line, on the first process, if it can be written: a full disk doesn't end a script."""
        if (os.environ.get('RANK') or '0') == '0':
            with contextlib.suppress(OSError):
                print(text, file=self.out)

    def assign(self, key, value, text):
        value = convert(key, value, text, self.allowed[key])
        if key in PATHS and isinstance(value, str):
            if not value and self.defaults[key]:
                raise UserError(f'{key} is empty: write --{key}={self.defaults[key]} or another path')
            value = os.path.expanduser(value)
        self.variables[key] = value
        self.given.add(key)


def is_own_setting(name, value):
    """A script of ours: the lower-case names bound to a bool, int, float, str or None."""
    return name.islower() and name[0] != '_' and isinstance(value, KINDS)


def is_plain_value(name, value):
    """A script of somebody's own that executes configurator.py: upper-case names and containers too."""
    return name[0] != '_' and isinstance(value, (*KINDS, list, tuple, dict))


def configure(variables, model_config=None, args=None, is_setting=is_own_setting):
    """Apply `args` (default: sys.argv[1:]) to the settings in `variables`, a script's globals.

    Settings are the names bound so far for which is_setting(name, value) holds, and the fields with defaults
    of model_config, a dataclass, which are bound too. Returns them as Settings. Raises ValueError for an
    unknown key or a wrong type, FileNotFoundError for a missing config.
    """
    prepare_streams()
    args = sys.argv[1:] if args is None else args
    wants_json = variables.get('json') is False and {'--json', '--json=true'} & {a.lower() for a in args}
    out = sys.stderr if wants_json else sys.stdout  # a program that reads JSON from stdout gets nothing else
    script = read_script(variables, model_config, is_setting, out)
    if '--help' in args or '-h' in args:
        print_help(script, model_config)
        sys.exit(0)
    for before, arg, after in zip(['', *args], args, [*args[1:], '']):
        if arg.startswith('--'):
            apply_argument(script, arg, after)
        else:
            apply_file(script, find_config(arg, script.allowed, before))
    return Settings({key: variables[key] for key in script.allowed}, script.given)


def read_script(variables, model_config, is_setting, out):
    """The Script with these globals. Binds the fields of model_config whose names are free."""
    hints = variables.get('__annotations__') or {}
    if variables.get('__annotate__'):  # from Python 3.14 on, annotations are computed when asked for
        hints = variables['__annotate__'](1)
    allowed = {k: allowed_types(hints.get(k), v) for k, v in variables.items() if is_setting(k, v)}
    of_model = model_defaults(model_config)
    hints = type_hints(model_config)
    for name, default in of_model.items():
        if name not in variables and not hasattr(builtins, name):
            variables[name] = default
            allowed[name] = allowed_types(hints.get(name), default)
    return Script(variables, allowed, {k: variables[k] for k in allowed}, of_model, out)


def model_defaults(model_config):
    """{field: default} of a dataclass; vocab_size is the data's."""
    if not dataclasses.is_dataclass(model_config):
        return {}
    return {f.name: f.default for f in dataclasses.fields(model_config)
            if f.init and f.name != 'vocab_size' and is_plain_value(f.name, f.default)}


def type_hints(model_config):
    try:
        return typing.get_type_hints(model_config) if model_config else {}
    except (NameError, TypeError):  # names that only a type checker imports
        return {}


def allowed_types(hint, value):
    """Types a setting may take: its annotation's (`compile: bool | str = 'auto'`), else its default's. A bare
    None takes any."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    named = [h for h in (typing.get_args(hint) if is_union else (hint,)) if isinstance(h, type)]
    if named:
        return tuple(named)
    return (*KINDS, list, tuple, dict) if value is None else (type(value),)


# ---------------------------------------------------------------------------- values

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
    wanted = ' or '.join(WORDS.get(kind, kind.__name__) for kind in allowed)
    raise UserError(f'{key} must be {wanted}, not {value!r:.80}')


def apply_argument(script, arg, after):
    """Assign --key=value. after: the argument that follows."""
    key, equals, text = arg[2:].partition('=')
    if key not in script.allowed:
        raise UserError(unknown_key([key], script))
    if not equals and bool not in script.allowed[key]:
        value = shlex.quote(after) if after and after[0] != '-' else '...'
        raise UserError(f'--{key} needs a value: --{key}={value}')
    script.assign(key, parse(text) if equals else True, text)
    script.say(f'Overriding: {key} = {script.variables[key]}')


# ---------------------------------------------------------------------------- config files

class Assignments(dict):
    """The namespace of a config's top level: writes to the script's globals, and notes the names."""

    def __init__(self, variables):
        super().__init__()
        self.variables, self.names = variables, set()

    def __missing__(self, name):
        return self.variables[name]

    def __setitem__(self, name, value):
        self.variables[name] = value
        self.names.add(name)

    def __delitem__(self, name):
        del self.variables[name]


def read_config(path):
    """source and syntax tree of a config. Raises ValueError if it isn't Python, or if a statement assigns
    nothing, as those of YAML and JSON do."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
    except (SyntaxError, UnicodeDecodeError) as error:  # SyntaxError: in the first two lines
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error.msg
        raise UserError(f'{path} is not UTF-8 text ({reason}): save it as UTF-8') from None
    try:
        tree = ast.parse(source, str(path))
        compile(tree, str(path), 'exec')
    except SyntaxError as error:
        line = (error.text or '').strip()[:80]
        raise UserError(f'{path}, line {error.lineno}: {error.msg}: {line}') from None
    except (ValueError, RecursionError, MemoryError) as error:  # zero bytes; thousands of brackets
        raise UserError(f'{path} is not Python ({error or "too deep"})') from None
    for node in tree.body:
        if assigns_nothing(node):
            line = source.splitlines()[node.lineno - 1].strip()
            raise UserError(f'{path}, line {node.lineno}: {line[:80]} assigns nothing; a config is Python: '
                            'name = value')
    return source, tree


def assigns_nothing(node):
    """Whether a statement has no effect, and isn't a text such as a docstring."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    if not isinstance(node, ast.Expr):
        return False
    is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    acts = any(isinstance(n, (ast.Call, ast.NamedExpr, ast.Await)) for n in ast.walk(node))
    return not is_text and not acts


def apply_file(script, path):
    """Execute a config in the script's globals, then check every name that it bound."""
    source, tree = read_config(path)
    script.say(f'Overriding config with {path}:\n{source}')
    nodes = [*ast.walk(tree)]
    imported = {(a.asname or a.name).split('.')[0] for node in nodes
                if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    for name in {node.id for node in nodes if isinstance(node, ast.Name)} & set(IMPORTED):
        script.variables.setdefault(name, importlib.import_module(IMPORTED[name]))
    before, assigned = dict(script.variables), Assignments(script.variables)
    exec(compile(tree, str(path), 'exec'), script.variables, assigned)
    changed = [k for k, v in script.variables.items() if k not in before or v is not before[k]]
    unknown = []
    for key in dict.fromkeys([*changed, *assigned.names & set(script.variables)]):
        value = script.variables[key]
        if key.startswith('_'):
            continue
        if key in script.allowed:
            script.assign(key, value, str(value))
        elif key in imported or isinstance(value, (types.ModuleType, types.FunctionType, type)):
            continue
        elif can_be_ignored(key, value, script.allowed):
            script.say(f'Ignoring {key} = {value!r}: there is no such setting here, and it is off')
            script.variables.pop(key)
            script.variables.update({key: before[key]} if key in before else {})
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f'{unknown_key(unknown, script)} (in {path}; '
                        'a name of the config\'s own begins with "_")')


def can_be_ignored(key, value, allowed):
    """Whether a config's unknown setting is off, and no misspelling of one that exists."""
    is_off = isinstance(value, KINDS) and not value
    is_known = key in OTHER_NAMES or key in REMOVED
    return is_off and key not in ON_BY_DEFAULT and (is_known or not nearest(key, allowed))


def find_config(name, allowed=(), before=''):
    """The config's path: as given, or by its name in config/, here or in the repository. before: the argument
    before it."""
    file = name.removesuffix('.py') + '.py'
    choices = [Path(name), Path('config', file), ROOT / 'config' / file]
    for path in [*choices, Path(file), ROOT / file] if os.path.dirname(name) else choices:
        if os.path.isfile(path) and path.suffix != '.pt':  # unlike Path.is_file, False for too long a name
            return path
    raise MissingFile(f'no config {name}{what_was_meant(name, allowed, before)}')


# ---------------------------------------------------------------------------- hints

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


def unknown_key(keys, script):
    hints = [hint_for(key, script) for key in keys]
    named = ', '.join(f'{key}{hint}' for key, hint in zip(keys, hints))
    return f'Unknown config key: {named}{"" if any(hints) else " (--help lists them all)"}'


def hint_for(key, script):
    """What to write in place of an unknown key, '' if there is nothing to say."""
    if key in REMOVED:
        return f' (removed: {REMOVED[key]})' if REMOVED[key] else ' (removed)'
    if key in script.of_model:
        return ' (a field of the model whose name the script uses itself: set its default in model.py)'
    ours = OTHER_NAMES.get(key, key)
    target = ours.partition(' ')[0]
    if key in OTHER_NAMES and target in script.allowed:
        return f' (here {ours})'
    if ours == FROM_DATA:
        return f' ({ours})'
    is_model_s = target in {other.partition(' ')[0] for other in OTHER_NAMES.values()}
    if script.of_model and is_model_s:
        return ' (this model.py has no such option)'
    return nearest(key, script.allowed)


def nearest(name, known, shown='{}'):
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f' (did you mean {" or ".join(map(shown.format, close))}?)' if close else ''


# ---------------------------------------------------------------------------- help

def print_help(script, model_config):
    """The script's docstring, then its settings and the model's, with the comments of their source."""
    path = script.variables.get('__file__')
    source = Path(path).read_text(encoding='utf-8') if path else ''
    own = comments_in(source)
    print((ast.get_docstring(ast.parse(source)) or '').strip() + '\n\nSettings (--key=value):')
    is_own = {key: key in own or key not in script.of_model for key in script.allowed}
    print_settings(script, own, [key for key in script.allowed if is_own[key]])
    if not all(is_own.values()):
        file, theirs = source_of(model_config)
        print(f'\nSettings of the model ({file}):')
        print_settings(script, comments_in(theirs), [key for key in script.allowed if not is_own[key]])


def print_settings(script, comments, keys):
    for key in keys:
        shown = f'{key}={script.variables[key]!r}'
        print(f'  {shown:42} {comments.get(key, "")}'.rstrip())


def source_of(model_config):
    """The name of a class's file, and the class's source; '' where it has none."""
    try:
        return Path(inspect.getsourcefile(model_config)).name, inspect.getsource(model_config)
    except (OSError, TypeError):
        return 'model.py', ''


def comments_in(source):
    """{name: comment} of the lines of a source that assign to a name."""
    source = textwrap.dedent(source)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for number, line in enumerate(source.splitlines(), 1):
        assignment = re.match(r'\s*(\w+)\s*(:[^=]+)?=[^=]', line)
        if assignment:
            found.setdefault(assignment[1], comments.get(number, ''))
    return found
