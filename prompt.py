"""
The small prompt of `python sample.py --interactive=True`: type a text, read how the model goes on.

    > ROMEO:
    > /temperature 0.5
    > /help
"""

import contextlib

from configurator import allowed_types, convert, nearest, parse

SETTINGS = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'stop', 'seed', 'max_new_tokens')


def interact(script, check, generate):
    """Ask for prompts until the input ends.

    script: the globals of sample.py. check(): ValueError if they don't fit together. generate(text): yields
    (piece, None) and at the end (piece, dict of the sample).
    """
    with contextlib.suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401, gives input() a history and keys to edit
    print('Type a prompt; /help says what else. Ctrl-C stops a sample, Ctrl-D leaves.')
    while True:
        try:
            line = input('> ')
            if line == '/quit':
                return
            if line.startswith('/'):
                print(obey(line, script, check))
                continue
            for piece, sample in generate(line):  # noqa: B007, the last piece brings it
                print(piece, end='', flush=True)
            print(f'\n[seed {sample["seed"]}, {sample["tokens"]} tokens, {sample["tokens_per_s"]} tokens/s, '
                  f'ended by {sample["ended"]}]')
            script['seed'] += 1
        except ValueError as error:
            print(error)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def obey(line, script, check):
    """What to print for a line /NAME [VALUE], after doing what it asks for; ValueError if that can't be."""
    name, _, text = line[1:].strip().partition(' ')
    if name == 'help':
        return '\n'.join(['/NAME VALUE changes a setting, for the prompts to come, /NAME shows it:',
                          *(f'  /{name} {script[name]}' for name in SETTINGS),
                          'Each sample has a seed, the next one\'s is 1 higher: set it to make one again.',
                          'An empty line is the prompt of --start.',
                          'Ctrl-C stops a sample, /quit or Ctrl-D leaves.'])
    if name not in SETTINGS:
        raise ValueError(f'no command /{name}{nearest(name, [*SETTINGS, "help", "quit"])}; /help lists them')
    if text:
        before = script[name]
        script[name] = convert(name, parse(text), text, allowed_types(script, name))
        try:
            check()
        except ValueError:
            script[name] = before
            raise
    return f'{name} = {script[name]}'


def stop_strings(stop):
    """The strings that the setting `stop` names: none, one, in which \\n is a line end, or a Python list."""
    strings = parse(stop) if stop and stop.startswith('[') else [stop.replace('\\n', '\n')] if stop else []
    if not isinstance(strings, list) or not all(s and isinstance(s, str) for s in strings):
        raise ValueError(f"stop={stop} is neither a string nor a list of strings like ['a', 'b']")
    return strings
