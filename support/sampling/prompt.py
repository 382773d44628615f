"""
What a sampler can be told, and the prompt of `python sample.py --interactive=True`.

    > ROMEO:
    > /temperature 0.5
    > /max_new_tokens=30
    > /help
"""

import contextlib
import re
import typing
from dataclasses import asdict, dataclass, fields, replace

from support.errors import UserError
from support.settings import convert, nearest, parse


@dataclass(frozen=True)
class Sampling:
    """How text is sampled. Raises ValueError for a value out of range."""
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | None = None  # a string, in which \n is a line end, or a Python list of strings
    seed: int = 1337
    max_new_tokens: int = 500

    def __post_init__(self):
        for name, holds, allowed in (
                ('temperature', self.temperature >= 0, 'be at least 0'),
                ('top_k', self.top_k is None or self.top_k >= 1, 'be at least 1, or None'),
                ('top_p', 0 < self.top_p <= 1, 'lie in (0, 1]'),
                ('min_p', 0 <= self.min_p <= 1, 'lie in [0, 1]'),
                ('repetition_penalty', self.repetition_penalty > 0, 'be above 0'),
                ('seed', -2**63 <= self.seed < 2**63, 'fit into 64 bits'),
                ('max_new_tokens', self.max_new_tokens >= 0, 'be at least 0')):
            if not holds:
                raise UserError(f'{name} must {allowed}, not {getattr(self, name)}')
        self.stop_strings()

    def stop_strings(self):
        """The setting `stop` as a list of strings."""
        strings = []
        if self.stop:
            is_list = self.stop.startswith('[')
            strings = parse(self.stop) if is_list else [self.stop.replace('\\n', '\n')]
        if not isinstance(strings, list) or not all(s and isinstance(s, str) for s in strings):
            raise UserError(f"stop={self.stop} is neither a string nor a list of strings like ['a', 'b']")
        return strings


TYPES = {f.name: typing.get_args(f.type) or (f.type,) for f in fields(Sampling)}


class Dialogue:
    """A conversation with a model. Its prompts leave room for an answer of max_new_tokens, but for no more
    than half of block_size: when it is full, the oldest questions go, with their answers."""

    def __init__(self, encode, block_size):
        """encode: a list of messages -> the ids after which the answer follows"""
        self.encode, self.block_size = encode, block_size
        self.system, self.messages = '', []

    def ask(self, text, max_new_tokens):
        """The ids of a message, with those before it that fit."""
        room = self.block_size - min(max_new_tokens, self.block_size // 2)
        asked = [*self.messages, {'role': 'user', 'content': text}]
        first = [{'role': 'system', 'content': self.system}] if self.system else []
        while len(ids := self.encode(first + asked)) > room:
            later = [i for i, m in enumerate(asked) if m['role'] == 'user' and i > 0]
            if not later:
                break
            asked = asked[later[0]:]
        self.asked = asked
        return ids

    def obeys(self, line):
        """Whether a line is nothing or a command to the dialogue: /new, or /system with an instruction."""
        if line == '/new' or re.match(r'/system\b', line):
            self.messages = []
            self.system = self.system if line == '/new' else line.removeprefix('/system').strip()
        elif line:
            return False
        return True

    def hear(self, answer):
        """Keep the last question and its answer."""
        self.messages = [*self.asked, {'role': 'assistant', 'content': answer}]


def interact(sampling, continue_text, dialogue=None):
    """Ask for prompts until the input ends, or for messages of a dialogue.

    continue_text(prompt, sampling) yields (piece, None), and with the last piece (piece, sample as a dict).
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401, gives input() a history and keys to edit
    print('Type a prompt, or /help for commands. Ctrl-C stops a sample, Ctrl-D quits.')
    while True:
        try:
            line = input('> ')
            if line.strip() == '/quit':
                return
            if dialogue and dialogue.obeys(line.strip()):
                continue
            if line.startswith('/'):
                sampling, reply = obey(line, sampling)
                print(reply)
                continue
            prompt = dialogue.ask(line, sampling.max_new_tokens) if dialogue else line
            for piece, sample in continue_text(prompt, sampling):  # noqa: B007, the last piece brings it
                print(piece, end='', flush=True)
            print(f'\n[seed {sample["seed"]}, {sample["tokens"]} tokens, {sample["tokens_per_s"]} tokens/s, '
                  f'ended by {sample["ended"]}]')
            sampling = replace(sampling, seed=sampling.seed + 1)
            if dialogue:
                dialogue.hear(sample['text'])
        except ValueError as error:
            print(error)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def obey(line, sampling):
    """sampling, reply: the settings after a line /NAME, /NAME VALUE or /NAME=VALUE, and what to print.

    Raises ValueError for an unknown name or a value that it can't have.
    """
    name, text = re.fullmatch(r'([^\s=]*)(?:\s*=\s*|\s*)(.*)', line[1:].strip()).groups()
    if name == 'help':
        return sampling, '\n'.join([
            '/NAME shows a setting, /NAME VALUE changes it for the prompts that follow:',
            *(f'  /{name} {value}' for name, value in asdict(sampling).items()),
            'Each sample uses the next seed; to repeat one, set its seed again.',
            'An empty line continues the prompt of --start.',
            'With --chat=True, /new begins another conversation, /system TEXT one with an instruction.',
            'Ctrl-C stops a sample, /quit or Ctrl-D quits.'])
    if name not in TYPES:
        raise UserError(f'no command /{name}{nearest(name, [*TYPES, "help", "quit"])}; /help lists them')
    if text:
        sampling = replace(sampling, **{name: convert(name, parse(text), text, TYPES[name])})
    return sampling, f'{name} = {getattr(sampling, name)}'
