"""
The prompt of `python sample.py --interactive=True`, and the conversations that are held at it.

    > ROMEO:
    > /temperature 0.5
    > /max_new_tokens=30
    > /help
"""

import contextlib
import re
import sys
import typing
from dataclasses import asdict, fields, replace

from support.errors import UserError, in_one_line
from support.sampling.decoding import Sampling
from support.settings import convert, nearest, parse

TYPES = {f.name: typing.get_args(f.type) or (f.type,) for f in fields(Sampling)}
QUIT = ('quit', 'exit', '/quit', '/exit')


class Dialogue:
    """A conversation with a model. Its prompts leave room for an answer of max_new_tokens, but for
    no more than half of block_size: when it is full, the oldest questions go, with their
    answers."""

    def __init__(self, encode, block_size):
        """encode: a list of messages -> the ids after which the answer follows"""
        self.encode, self.block_size = encode, block_size
        self.system, self.messages, self.asked = '', [], []

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

    def keep(self, answer):
        """Add the last question and its answer to the conversation."""
        self.messages = [*self.asked, {'role': 'assistant', 'content': answer}]

    def command(self, line):
        """What to print after /new, or after /system with an instruction; None for any other line."""
        if line == '/new':
            self.messages = []
            return 'a new conversation' + (', with the same instruction' if self.system else '')
        if not re.match(r'/system\b', line):
            return None
        self.messages, self.system = [], line.removeprefix('/system').strip()
        if self.system:
            return f'a new conversation, with the instruction: {self.system}'
        return 'a new conversation, without an instruction'


def check_streams():
    """UserError if nobody could type or read anything."""
    for name in ('stdin', 'stdout'):
        if getattr(sys, name) is None:
            raise UserError(f'interactive=True needs {name}, which is closed')


def interact(sampling, continue_text, dialogue=None):
    """Ask for prompts until the input ends, or for messages of a dialogue.

    continue_text(prompt, sampling) yields (piece, None), and with the last piece (piece, sample as
    a dict).
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401, gives input() a history and keys to edit
    print('Type a prompt, or /help for commands. Ctrl-C stops a sample, Ctrl-D quits.')
    while True:
        try:
            line = input('> ')
            if line.strip() in QUIT:
                return
            sampling, reply = change(line, sampling, dialogue)
            if reply is None:
                sampling = show_sample(line, sampling, continue_text, dialogue)
            elif reply:
                print(reply)
        except (ValueError, MemoryError, RuntimeError) as error:
            message = in_one_line(error)
            if message is None:
                raise
            print(message.partition(': ')[2])
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def show_sample(line, sampling, continue_text, dialogue):
    """Print the sample that follows a line. Returns the settings of the next one."""
    prompt = dialogue.ask(line, sampling.max_new_tokens) if dialogue else line
    sample = None
    for piece, sample in continue_text(prompt, sampling):  # noqa: B007, the last piece brings it
        print(piece, end='', flush=True)
    print(f'\n[seed {sample["seed"]}, {sample["tokens"]} tokens, {sample["tokens_per_s"]} '
          f'tokens/s, ended by {sample["ended"]}]')
    if dialogue:
        dialogue.keep(sample['text'])
    return replace(sampling, seed=sampling.seed + 1)


def change(line, sampling, dialogue=None):
    """sampling, reply: the settings after a line /NAME, /NAME VALUE or /NAME=VALUE, or a command to
    the dialogue, and what to print; None for a line that is a prompt.

    Raises ValueError for an unknown name or a value that it can't have.
    """
    if dialogue:
        reply = dialogue.command(line.strip()) if line.strip() else ''
        if reply is not None:
            return sampling, reply
    if not line.startswith('/'):
        return sampling, None
    name, text = re.fullmatch(r'([^\s=]*)(?:\s*=\s*|\s*)(.*)', line[1:].strip()).groups()
    if name == 'help':
        return sampling, help_text(sampling)
    if name not in TYPES:
        hint = nearest(name, [*TYPES, 'help', 'quit'])
        raise UserError(f'no command /{name}{hint}; /help lists them')
    if text:
        value = convert(name, parse(text), text, TYPES[name])
        sampling = replace(sampling, **{name: value})
    return sampling, f'{name} = {getattr(sampling, name)}'


def help_text(sampling):
    return '\n'.join([
        '/NAME shows a setting, /NAME VALUE changes it for the prompts that follow:',
        *(f'  /{name} {value}' for name, value in asdict(sampling).items()),
        'Each sample uses the next seed; to repeat one, set its seed again.',
        'An empty line continues the prompt of --start.',
        'With --chat=True, /new begins another conversation, /system TEXT one with an instruction.',
        'Ctrl-C stops a sample; quit, exit or Ctrl-D ends the session.'])
