"""
Settings of a script, its plain assignments: overridden by config files and the command line.

    config = configure(globals())              # right under the settings
    config = configure(globals(), GPTConfig)   # the fields of GPTConfig are settings too
    config.given                               # names that a config or the command line assigned

Arguments act from left to right, the last one wins. A config file is Python, executed in the
script's globals. It can do what any program can: run only configs that you trust.
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
import traceback
import types
import typing
import unicodedata
from collections import OrderedDict
from pathlib import Path

from support.errors import USER_ERRORS, MissingFile, UserError, kind_of
from support.machine.console import ROOT, is_first_process, prepare_streams

KINDS = (bool, int, float, str, types.NoneType)
PLAIN = (*KINDS, list, tuple, dict)
WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a string',
         types.NoneType: 'None', list: 'a list', tuple: 'a tuple', dict: 'a dict'}
PATHS = ('out_dir', 'data_dir', 'init_from', 'export_dir', 'output', 'source', 'json', 'tokenizer',
         'val', 'prompts', 'text', 'input', 'shards_from')  # ~ is the home folder in these
CONFIG_IMPORTS = {'os': 'os', 'time': 'time', 'math': 'math', 'pickle': 'pickle', 'np': 'numpy',
                  'torch': 'torch'}  # nanoGPT's train.py imports them before it executes a config
# what editors and web pages put in place of what was typed: dashes, quotes, blanks of no width
TYPOGRAPHIC = {'-': '\u2010\u2011\u2012\u2013\u2014\u2015\u2212', '"': '\u201c\u201d\u201e\u00ab\u00bb',
               "'": '\u2018\u2019\u201a', '': '\u200b\u200c\u200d\u2060\ufeff\u00ad'}
TYPED = str.maketrans({c: plain for plain, others in TYPOGRAPHIC.items() for c in others})
MISTAKES = (NameError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
            AssertionError, ImportError, OSError)  # that the code of a config may make
FROM_DATA = 'taken from the data'
OTHER_NAMES = {  # settings of other repositories: what does it here
    'epochs num_epochs n_epochs max_epochs': 'max_iters (iterations; a run says how many epochs they are)',
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
TARGETS = {ours.partition(' ')[0] for ours in OTHER_NAMES.values()}
REMOVED = {  # settings of earlier versions: what to do instead
    'finetune_from': "init_from takes the run's folder or a .pt file",
    'ema_decay use_ema ema': 'averaged weights gained nothing, see docs/ablations.md',
    'plan_gpus plan_gpu': 'see docs/SCALING.md',
    'cpu_offload': 'activation_checkpointing and a smaller batch_size save memory',
    'allow_changed_data': "for other data start a new run: init_from takes this run's folder",
    'residual_scale skip_spikes muon_momentum': '',
}
REMOVED = {name: hint for names, hint in REMOVED.items() for name in names.split()}
ON_BY_DEFAULT = ['tie_weights', *(k for k, ours in OTHER_NAMES.items() if ours == 'tie_weights')]


class Settings(dict):
    """{name: value} of all settings. given: the names that a config or the command line
    assigned."""

    def __init__(self, values, given):
        super().__init__(values)
        self.given = set(given)

    def __reduce__(self):  # pickled as a type that torch.load accepts without this module
        return OrderedDict, (), None, None, iter(self.items())


@dataclasses.dataclass
class Script:
    """A script whose settings are being read."""
    variables: dict  # its globals
    allowed: dict  # {setting: the types that it may have}
    defaults: dict
    of_model: dict  # {field of the model: default}, also of fields that are no settings
    out: typing.TextIO | None
    given: set = dataclasses.field(default_factory=set)

    def say(self, text):
        """Print a line on the first process. A full disk or a closed pipe doesn't end the
        script."""
        if self.out and is_first_process():
            with contextlib.suppress(OSError):
                print(text, file=self.out, flush=True)

    def assign(self, key, value, text):
        """Check and set a setting. text: the value as it was written."""
        value = convert(key, value, text, self.allowed[key])
        if key in PATHS and isinstance(value, str):
            if not value and self.defaults[key]:
                raise UserError(f'{key} is empty; its default is {self.defaults[key]}')
            value = os.path.expanduser(value)
            if value.startswith('~'):
                raise UserError(f'{key}={value} begins with ~, but there is no such user; ./{value} '
                                'is a path of that name')
        self.variables[key] = value
        self.given.add(key)


def is_own_setting(name, value):
    """In a script of ours: the lower-case names bound to a bool, int, float, str or None."""
    return name.islower() and name[0] != '_' and isinstance(value, KINDS)


def is_plain_value(name, value):
    """In a script of somebody's own that executes configurator.py: any case, containers too."""
    return name[0] != '_' and isinstance(value, PLAIN)


def configure(variables, model_config=None, args=None, is_setting=is_own_setting, out=None,
              more=()):
    """Apply `args` (default: sys.argv[1:]) to the settings in `variables`, a script's globals.

    Settings are the names bound so far for which is_setting(name, value) holds. The fields with
    defaults of model_config and of `more`, dataclasses, are bound too, and are settings. Returns
    Settings. Raises ValueError for an unknown key or a wrong type, FileNotFoundError for a missing
    config. out: where overridden settings are shown, by default on standard output.
    """
    prepare_streams()
    args = sys.argv[1:] if args is None else args
    script = read_script(variables, is_setting, out or sys.stdout, [model_config, *more])
    if '--help' in args or '-h' in args:
        show_help(script, args, [model_config, *more])
        sys.exit(0)
    for i in range(len(args)):
        apply_argument(script, args, i)
    return Settings({key: variables[key] for key in script.allowed}, script.given)


def read_script(variables, is_setting, out, classes):
    """The Script with these globals. Binds the fields of the classes, of which the first is the
    model's, whose names are free."""
    hints = variables.get('__annotations__') or {}
    if variables.get('__annotate__'):  # from Python 3.14 on, annotations are computed on demand
        hints = variables['__annotate__'](1)
    allowed = {k: allowed_types(hints.get(k), v) for k, v in variables.items() if is_setting(k, v)}
    for kind in classes:
        found, hints = read_fields(kind)
        for name, default in found.items():
            if name not in variables and not hasattr(builtins, name):
                variables[name] = default
                allowed[name] = allowed_types(hints.get(name), default)
    of_model, _ = read_fields(classes[0])
    return Script(variables, allowed, {k: variables[k] for k in allowed}, of_model, out)


def read_fields(kind):
    """{field: default} of a dataclass, without vocab_size, which the data decide; its
    annotations."""
    if not dataclasses.is_dataclass(kind):
        return {}, {}
    found = {f.name: f.default for f in dataclasses.fields(kind)
             if f.init and f.name != 'vocab_size' and is_plain_value(f.name, f.default)}
    try:
        return found, typing.get_type_hints(kind)
    except (NameError, TypeError):  # names that only a type checker imports
        return found, {}


def allowed_types(hint, value):
    """Types that a setting may have: its annotation's (`compile: bool | str = 'auto'`), else its
    default's. A bare None may become anything."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    named = [h for h in (typing.get_args(hint) if is_union else (hint,)) if isinstance(h, type)]
    if named:
        return tuple(named)
    return PLAIN if value is None else (type(value),)


# ---------------------------------------------------------------------------- the command line

def apply_argument(script, args, i):
    """Apply args[i]: --key=value, or a config file."""
    arg, before, after = args[i], args[i - 1] if i else '', args[i + 1:]
    check_characters(arg)
    if not arg.startswith('--'):
        apply_file(script, find_config(arg, script.allowed, before))
        return
    key, equals, text = arg[2:].partition('=')
    if key not in script.allowed:
        raise UserError(unknown_key([key], script))
    check_spaces(arg, after, script.allowed[key])
    if not equals and bool not in script.allowed[key]:
        value = shlex.quote(after[0]) if after and after[0][:1] != '-' else '...'
        raise UserError(f'--{key} needs a value: --{key}={value}')
    script.assign(key, parse(text) if equals else True, text)
    script.say(f'Overriding: {key} = {script.variables[key]}')


def plain(text):
    """A text with the characters that it was typed with before an editor changed them."""
    return unicodedata.normalize('NFKC', text.translate(TYPED))


def is_option(arg):
    """Whether an argument is meant as --key=value, not as a path."""
    return plain(arg).lstrip('"\' ').startswith('-')


def check_characters(arg):
    """UserError for an option whose name or equals sign only looks as if it were typed."""
    name = re.match('[^=\uff1d]*[=\uff1d]?', arg)[0]
    if is_option(arg) and plain(name) != name:
        meant = '--' + re.sub(r'^[-"\'\s]+|[\s"\']+(?==?$)', '', plain(name)) + arg[len(name):]
        raise UserError(f'{arg} has characters that only look like those of the keyboard: write '
                        f'{meant}')


def check_spaces(arg, after, allowed):
    """ValueError for --key = value, --key =value and --key= value. after: the arguments that
    follow. allowed: the types of the setting."""
    following = (after[0] if after else '') or '-'
    if '=' not in arg and following[0] == '=':
        value = following[1:] or ''.join(after[1:2])
    elif arg[-1] == '=' and arg.count('=') == 1 and following[0] != '-' and str not in allowed:
        value = following
    else:
        return
    meant = f'{arg.rstrip("=")}={shlex.quote(value) if value else "..."}'
    raise UserError(f'write {meant}, without spaces around "="')


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
    shown = repr(value) if isinstance(value, str) else text
    meant = plain(text).strip('"\' ')
    hint = '' if meant == text else f': write {meant}'
    raise UserError(f'{key} must be {wanted}, not {shown[:80]}{hint}')


# ---------------------------------------------------------------------------- config files

class Assignments(dict):
    """The namespace of a config's top level: writes to the script's globals and notes the names."""

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


def apply_file(script, path):
    """Execute a config in the script's globals, then check every name that it bound."""
    source, tree = read_config(path)
    script.say(f'Overriding config with {path}:\n{source}')
    nodes = [*ast.walk(tree)]
    read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    for name in read & set(CONFIG_IMPORTS) - set(script.variables):
        script.variables[name] = importlib.import_module(CONFIG_IMPORTS[name])
    imported = {(a.asname or a.name).split('.')[0] for node in nodes
                if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    before = dict(script.variables)
    bound = execute(tree, path, script.variables)
    unknown = [key for key in bound if not is_accepted(script, key, imported, before)]
    if unknown:
        raise UserError(f'{unknown_key(unknown, script)} (in {path}; '
                        'a name of the config\'s own begins with "_")')


def read_config(path):
    """source and syntax tree of a config. Raises ValueError if it isn't Python, or if a statement
    assigns nothing, as those of YAML and JSON do."""
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
            line = source.splitlines()[node.lineno - 1].strip()[:80]
            raise UserError(f'{path}, line {node.lineno}: {line} assigns nothing; a config is '
                            'Python: name = value')
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


def execute(tree, path, variables):
    """Execute a config in a script's globals. Returns the names that are bound by it."""
    before, assigned = dict(variables), Assignments(variables)
    try:
        exec(compile(tree, str(path), 'exec'), variables, assigned)
    except (*MISTAKES, *USER_ERRORS) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == str(path)][-1]
        kind = '' if isinstance(error, (NameError, *USER_ERRORS)) else f'{kind_of(error)}: '
        raise UserError(f'{path}, line {line}: {kind}{error}') from None
    by_functions = [k for k, v in variables.items() if k not in before or v is not before[k]]
    return [k for k in dict.fromkeys([*by_functions, *assigned.names]) if k in variables]


def is_accepted(script, key, imported, before):
    """Check a name that a config bound: sets a setting, drops one that is unknown and off. False if
    it is unknown and on. imported: names that the config imports. before: the globals before it."""
    value = script.variables[key]
    if key.startswith('_'):
        return True
    if key in script.allowed:
        script.assign(key, value, str(value))
        return True
    if key in imported or isinstance(value, (types.ModuleType, types.FunctionType, type)):
        return True
    if not can_be_ignored(key, value, script.allowed):
        return False
    script.say(f'Ignoring {key} = {value!r}: there is no such setting here, and it is off')
    script.variables.pop(key)
    script.variables.update({key: before[key]} if key in before else {})
    return True


def can_be_ignored(key, value, allowed):
    """Whether a config's unknown setting is off, and no misspelling of one that exists."""
    is_off = isinstance(value, KINDS) and not value
    is_known = key in OTHER_NAMES or key in REMOVED
    return is_off and key not in ON_BY_DEFAULT and (is_known or not nearest(key, allowed))


def find_config(name, allowed=(), before=''):
    """The config's path: as given, or by its name in config/, here or in the repository. before:
    the argument before it."""
    file = name.removesuffix('.py') + '.py'
    choices = [Path(name), Path('config', file), ROOT / 'config' / file]
    if os.path.dirname(name):
        choices += [Path(file), ROOT / file]
    for path in choices:
        if os.path.isfile(path) and path.suffix != '.pt':  # no error for too long a name
            return path
    raise MissingFile(f'no config {name}{what_was_meant(name, allowed, before)}')


# ---------------------------------------------------------------------------- hints

def what_was_meant(name, allowed, before):
    """What an argument that is no config may have been meant for."""
    setting, folder = name.lstrip('-'), Path(name).parent if name.endswith('.pt') else Path(name)
    if re.fullmatch(r'--\w+=?', before) and not name.endswith('.py'):
        return f'; settings are written {before.rstrip("=")}={name}'
    if setting.partition('=')[0] in allowed:
        return f'; settings are written --{setting}'
    if os.path.isdir(folder):
        key = 'data_dir' if [*folder.glob('*.bin')] else 'out_dir'
        return f'; {folder} is a folder' + (f': --{key}={folder}' if key in allowed else '')
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
    if key in ('config', 'config_file'):
        return ' (name the config file by itself: python SCRIPT.py config/FILE.py)'
    if key in script.of_model:
        return ' (the script uses this name itself: set the default in model.py)'
    ours = OTHER_NAMES.get(key, key)
    if ours == FROM_DATA:
        return f' ({ours})'
    target = ours.partition(' ')[0]
    if target in script.allowed:
        return f' (here {ours})'
    if script.of_model and target in TARGETS:
        return ' (this model.py has no such option)'
    return nearest(key, script.allowed)


def nearest(name, known, shown='{}'):
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f' (did you mean {" or ".join(map(shown.format, close))}?)' if close else ''


# ---------------------------------------------------------------------------- help

def show_help(script, args, classes):
    """Print the script's docstring, then its settings and those of the classes: the comments of
    their source, and the values that the other arguments give."""
    script.out = None
    for i, arg in enumerate(args):
        with contextlib.suppress(UserError, MissingFile):
            if arg not in ('--help', '-h'):
                apply_argument(script, args, i)
    path = script.variables.get('__file__')
    source = Path(path).read_text(encoding='utf-8') if path else ''
    comments = comments_in(source)
    fields = {key: kind for kind in classes for key in read_fields(kind)[0]}
    own = [key for key in script.allowed if key in comments or key not in fields]
    print((ast.get_docstring(ast.parse(source)) or '').strip() + '\n\nSettings (--key=value):')
    print_settings(script, own, comments)
    for kind in classes:
        others = [key for key in script.allowed if key not in own and fields[key] is kind]
        if others:
            file, source = source_of(kind)
            print(f'\nSettings of {kind.__name__} ({file}):')
            print_settings(script, others, comments_in(source))


def print_settings(script, keys, comments):
    for key in keys:
        assignment = f'{key}={script.variables[key]!r}'
        print(f'  {assignment:42} {comments.get(key, "")}'.rstrip())


def source_of(model_config):
    """The name of a class's file and the class's source; '' where it has none."""
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
