"""
Files of conversations, of any size.

    conversations = Conversations(['chats.jsonl'])  # reads them once, and keeps where each one is
    conversations[5]  # [{'role': 'user', 'content': 'Hello!'}, ...]
    pairs = encode_all(conversations, order, form)  # (ids, mask) of each, by all cores
"""

import bisect
import codecs
import itertools
import json
import os
from array import array
from pathlib import Path

from tqdm import tqdm

from support.errors import MissingFile, UserError
from support.machine.files import explain_failure, read_text
from support.text.chat import ROLES
from support.text.formats import LeftOut, suffixes
from support.text.reading import check_unchanged
from support.text.stream import map_in_threads, survey
from support.text.tokens import identity_of

SAME_ROLES = {'human': 'user', 'gpt': 'assistant', 'developer': 'system'}  # ShareGPT's, OpenAI's
SHAPES = ('{"messages": [{"role": "user", "content": "..."}, ...]}, or the fields that docs/chat.md '
          'lists')


class Conversations:
    """The conversations of files, as a sequence of lists of {'role', 'content'}.

    Rows that are none are counted and left out; with `strict`, the first is a UserError that names
    it. mark: what tells these conversations from others.
    """

    def __init__(self, paths, strict=False):
        self.files = [ConversationFile(path, strict) for path in paths]
        self.mark = survey(itertools.chain.from_iterable(f.find() for f in self.files)).mark()
        self.ends = [*itertools.accumulate(map(len, self.files))]

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        n = bisect.bisect_right(self.ends, i)
        return self.files[n][i - self.ends[n] + len(self.files[n])]


class ConversationFile:
    """Those of a file of JSON lines, which are read when they are asked for, or of one JSON list,
    which are held."""

    def __init__(self, path, strict=False):
        path = Path(path).expanduser()
        if not path.is_file():
            raise MissingFile(f'{path} is missing')
        if compression := suffixes(path)[1]:
            raise UserError(f'{path} is compressed ({compression}): decompress it first')
        self.path, self.left_out = str(path), LeftOut(strict)
        self.file = open(path, 'rb')  # noqa: SIM115, closed with this object
        self.identity = identity_of(os.fstat(self.file.fileno()))
        self.held, self.begins = [], array('q')  # bytes of the file before each conversation's line
        self.is_list = self.file.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b'['

    def __len__(self):
        return len(self.held) or len(self.begins)

    def __getitem__(self, i):
        if self.held:
            return self.held[i]
        check_unchanged(self.path, self.identity, self.file)
        self.file.seek(self.begins[i])
        return messages_of(json.loads(self.decoded(self.file.readline(), self.begins[i])))

    def find(self):
        """Find all conversations, and yield each as JSON."""
        for where, begin, row in self.items() if self.is_list else self.lines():
            try:
                messages = messages_of(json.loads(row) if isinstance(row, str) else row)
                reason = why_none(messages)
            except (ValueError, RecursionError):
                reason = 'it is no JSON'
            if reason:
                self.left_out.add(f'{self.path}, {where}', f'no conversation, as {reason}')
                continue
            if self.is_list:
                self.held.append(messages)
            else:
                self.begins.append(begin)
            yield json.dumps(messages)
        check_unchanged(self.path, self.identity, self.file)
        if not len(self):
            raise UserError(f'{self.path} has no conversations: {self.left_out.in_words() or "empty"}')
        self.left_out.report()

    def items(self):
        text = read_text(self.path)
        with explain_failure(f'{self.path} is no JSON list', RecursionError):
            rows = json.loads(text)
        yield from ((f'item {i}', None, row) for i, row in enumerate(rows, 1))

    def lines(self):
        self.file.seek(0)
        begin = 0
        for number, line in enumerate(self.file, 1):
            text = self.decoded(line, begin)
            if text.strip():
                yield f'line {number}', begin, text
            begin += len(line)

    def decoded(self, line, begin):
        """A line's text. begin: its place in the file."""
        try:
            text = line.decode('utf-8-sig' if begin == 0 else 'utf-8')
        except UnicodeDecodeError as error:
            raise UserError(f'{self.path} is not UTF-8 text ({error.reason} at byte '
                            f'{begin + error.start:,}): save it as UTF-8') from None
        if '\0' in text:
            raise UserError(f'{self.path} is not text: it has zero bytes')
        return text


def encode_all(conversations, order, form, strict=False):
    """Yield (ids, mask) of conversations in this order, by all cores. Those that the template can't
    express are left out, or refused with `strict`."""
    def try_to(messages):
        try:
            return form.encode(messages)
        except UserError as error:
            return str(error)

    left_out, n_good = LeftOut(strict), 0
    found = map_in_threads(try_to, (conversations[i] for i in order), at_a_time=64)
    for i, one in zip(order, tqdm(found, total=len(order), unit=' conversations', delay=1)):
        if isinstance(one, str):
            left_out.add(f'conversation {i + 1}', one)
        else:
            n_good += 1
            yield one
    if not n_good:
        raise UserError(f'no conversation can be encoded: {left_out.in_words()}')
    left_out.report()


# ---------------------------------------------------------------------------- rows

def messages_of(row):
    """The messages of a row with chat, ShareGPT, prompt or Alpaca fields; None if it has none of
    them."""
    if not isinstance(row, dict):
        return None
    for messages in (row.get('messages'), row.get('conversations')):
        if isinstance(messages, list):
            return [*map(message_of, messages)]
    if 'prompt' in row and 'completion' in row:
        asked, answer = row['prompt'], row['completion']
        if isinstance(asked, list) and isinstance(answer, list):
            return [*map(message_of, asked + answer)]
        return [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': answer}]
    if 'instruction' in row and 'output' in row:
        asked = [text for text in (row['instruction'], row.get('input')) if text]
        asked = '\n\n'.join(asked) if all(isinstance(text, str) for text in asked) else None
        return [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': row['output']}]
    return None


def message_of(m):
    """A message with the names of ours: role and content."""
    if not isinstance(m, dict):
        return m
    role = m['from'] if m.get('role') is None and 'from' in m else m.get('role')
    content = m['value'] if m.get('content') is None and 'value' in m else m.get('content')
    name = str(role).lower()
    return {'role': SAME_ROLES.get(name, name), 'content': content}


def why_none(messages):
    """Why messages are no conversation; None if they are one."""
    if not isinstance(messages, list):
        return f'it has none of {SHAPES}'
    for m in messages:
        if not isinstance(m, dict) or m.get('role') not in ROLES:
            return f'the role of a message is none of {", ".join(ROLES)}'
        if not isinstance(m.get('content'), str) or not m['content'].strip():
            return f'a message of the {m["role"]}\'s has no text'
    if not any(m['role'] == 'assistant' for m in messages):
        return 'the assistant says nothing'
    return None
