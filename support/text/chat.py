"""
Conversations as tokens: what stands before each role's messages, and what ends them.

    template = folder_template('smollm2') or template_for(tokenizer)  # its own, else ours
    form = ChatForm(template, tokenizer)
    ids, mask = form.encode(messages)  # messages: [{'role': 'user', 'content': 'Hello!'}, ...]
    ids = form.ask(messages)           # the assistant's next answer follows
    conversations = read_conversations('chat.jsonl')

Our own template: a message is its role's marker, its content and the end. A tokenizer of one's own
has tokens for the markers; with others they are plain text that ends a line. A published model has
a `chat_template`, which transformers' sandbox renders. Contents are encoded as text: whatever a
user writes, only the template begins a turn.
"""

import functools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from support.errors import UserError
from support.machine.console import print0
from support.machine.files import explain_failure, read_text
from support.text.bpe import END
from support.text.masks import BEGIN, READ, TARGET

ROLES = ('system', 'user', 'assistant')
MARKERS = {role: f'<|{role}|>' for role in ROLES}  # tokens
PLAIN = {role: f'{role.capitalize()}:\n' for role in ROLES}  # text
SAME_ROLES = {'human': 'user', 'gpt': 'assistant', 'developer': 'system'}  # ShareGPT's, OpenAI's
SHAPES = ('{"messages": [{"role": "user", "content": "..."}, ...]}, or the fields that docs/chat.md '
          'lists')
SPLIT = '\ufdd1'  # around a message's number while a template is rendered; no character of Unicode
ANSWER_END = 'end of the answer'  # the kind of a text after the assistant's


# ---------------------------------------------------------------------------- templates

def template_for(tokenizer):
    """Our template for a tokenizer: its own tokens as markers, if it has them, else plain text."""
    end = next((name for name, i in tokenizer.special.items() if i == tokenizer.end), END)
    return (MARKERS if tokenizer.special.keys() >= {*MARKERS.values()} else PLAIN) | {'end': end}


def folder_template(folder):
    """The chat_template of a model's folder as {'jinja': text, 'tokens': {name: token}}, None if it
    has none. ValueError if it can't be read or rendered."""
    path, own = Path(folder, 'tokenizer_config.json'), Path(folder, 'chat_template.jinja')
    with explain_failure(f'{path} can\'t be read'):
        settings = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        text = read_text(own) if own.is_file() else settings.get('chat_template')
        if isinstance(text, list):  # several with names
            text = {t['name']: t['template'] for t in text}.get('default')
        names = {k: v.get('content') if isinstance(v, dict) else v
                 for k, v in settings.items() if k.endswith('_token')}
    if not text:
        return None
    tokens = {k: v for k, v in names.items() if isinstance(v, str)}
    return check_template({'jinja': text, 'tokens': tokens})


def check_template(template):
    """A template as a checkpoint or dataset.json has it. Raises ValueError if it is none."""
    if isinstance(template, dict) and {*template} == {'jinja', 'tokens'}:
        if not isinstance(template['jinja'], str) or not isinstance(template['tokens'], dict):
            raise UserError('the chat template is damaged: jinja must be a text, tokens a table')
        text = rendered(template, [{'role': 'user', 'content': SPLIT}], is_question=True)
        if SPLIT not in text:
            raise UserError('the chat template leaves out what the user says')
    elif not isinstance(template, dict) or template.keys() != {*ROLES, 'end'} \
            or not all(isinstance(text, str) and text for text in template.values()):
        raise UserError('the chat template is damaged: it needs a string for each of '
                         f'{", ".join(ROLES)} and end')
    return template


def rendered(template, messages, is_question):
    """Messages as a chat_template renders them, in transformers' sandbox."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template
    with explain_failure('the chat template can\'t render the conversation', TemplateError):
        texts, _ = render_jinja_template([messages], chat_template=template['jinja'],
                                         add_generation_prompt=is_question, **template['tokens'])
    return texts[0]


def render(messages, template, is_question=False):
    """Messages as one text. is_question: the assistant's next answer is to follow."""
    return ''.join(text for text, _ in parts_of(messages, template, (), is_question))


def parts_of(messages, template, names, is_question=False):
    """[(text, kind)] of a conversation. kind: a role for a message's content, ANSWER_END for what
    ends the assistant's, None for any other text of the template. names: of the tokenizer's special
    tokens."""
    parts, contents = [], [m['content'].strip() for m in messages]
    if 'jinja' in template:
        numbered = [m | {'content': f'{SPLIT}{i}{SPLIT}'} for i, m in enumerate(messages)]
        pieces = re.split(f'{SPLIT}(\\d+){SPLIT}', rendered(template, numbered, is_question))
        if missing := {*range(len(messages))} - {*map(int, pieces[1::2])}:
            raise UserError(f'the chat template leaves message {min(missing) + 1} out')
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append((contents[int(piece)], messages[int(piece)]['role']))
            elif i and messages[int(pieces[i - 1])]['role'] == 'assistant':
                last = last_end(template['jinja'], tuple(template['tokens'].items()))
                n = end_of_answer(piece, names, last)
                parts += [(piece[:n], ANSWER_END), (piece[n:], None)]
            else:
                parts.append((piece, None))
    else:
        for m, content in zip(messages, contents):
            parts += [(template[m['role']], None), (content, m['role']),
                      (template['end'], ANSWER_END if m['role'] == 'assistant' else None)]
        parts.append((template['assistant'] * is_question, None))
    return [(text, kind) for text, kind in parts if text]


def end_of_answer(text, names, last):
    """How much of the text after an answer ends it: white space and a special token, else what also
    ends the last answer, else a word."""
    special = '|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)'
    if found := re.match(rf'\s*(?:{special})', text):
        return found.end()
    return len(last) if last.strip() and text.startswith(last) else re.match(r'\s*\S*', text).end()


@functools.lru_cache(maxsize=8)
def last_end(text, tokens):
    """What a chat_template puts after the answer that ends a conversation."""
    said = [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': SPLIT}]
    template = {'jinja': text, 'tokens': dict(tokens)}
    return rendered(template, said, is_question=False).rpartition(SPLIT)[2]


def jinja(template):
    """A template as transformers' chat_template, which gives what `render` does."""
    if 'jinja' in template:
        return template['jinja']
    quoted = {name: json.dumps(text) for name, text in template.items()}
    markers = ', '.join(f'{json.dumps(role)}: {quoted[role]}' for role in ROLES)
    return (f'{{% set markers = {{{markers}}} %}}{{% for message in messages %}}'
            f'{{{{ markers[message["role"]] + message["content"] | trim + {quoted["end"]} }}}}'
            '{% endfor %}'
            f'{{% if add_generation_prompt %}}{{{{ markers["assistant"] }}}}{{% endif %}}')


class ChatForm:
    """Conversations as tokens: a template and a tokenizer. Raises ValueError for a template that it
    can't use.

    end_ids, end_strings: what ends an answer.
    """

    def __init__(self, template, tokenizer):
        self.template, self.tokenizer = check_template(template), tokenizer
        said = [{'role': role, 'content': 'x'} for role in ('user', 'assistant', 'user')]
        parts = parts_of(said, template, tokenizer.special)
        ends = {text.strip() for text, kind in parts if kind == ANSWER_END}
        special = tokenizer.special
        self.end_ids = {*tokenizer.ends, *(special[end] for end in ends if end in special)}
        self.end_strings = [end for end in ends if end not in tokenizer.special]

    def encode(self, messages, is_question=False):
        """ids, mask: (N,) uint32 and (N,) uint8. What the assistant says and the end of it are
        targets. Raises ValueError for a conversation that the template or the tokenizer can't
        express."""
        parts = parts_of(messages, self.template, self.tokenizer.special, is_question)
        for text, kind in parts:
            if kind in ROLES and (found := [mark for mark in self.plain_marks if mark in text]):
                raise UserError(f'a message holds {found[0]!r}, by which this template parts '
                                'messages')
        ids, first, last = encode_parts(self.tokenizer,
                                        [(text, kind not in ROLES) for text, kind in parts])
        is_target = np.array([kind in ('assistant', ANSWER_END) for _, kind in parts])
        mask = np.where(is_target[first] | is_target[last], TARGET, READ).astype(np.uint8)
        mask[:1] = BEGIN
        return ids, mask

    def ask(self, messages):
        """Ids of a conversation that the assistant's next answer is to follow, a list."""
        return self.encode(messages, is_question=True)[0].tolist()

    @functools.cached_property
    def plain_marks(self):
        """What the template has between messages, where that is no special token: no message may
        hold it."""
        said = [{'role': role, 'content': SPLIT} for role in ('user', 'assistant', 'user')]
        names = self.tokenizer.special
        if 'jinja' not in self.template:
            return [self.template['end']] if self.template['end'] not in names else []
        text = ''.join(SPLIT if kind in ROLES else text
                       for text, kind in parts_of(said, self.template, names))
        between = [part for part in text.split(SPLIT)[1:-1]
                   if not any(name in part for name in names)]
        return [line.strip() for part in between for line in part.split('\n') if line.strip()]


def encode_parts(tokenizer, parts):
    """ids, (N,) uint32, and the first and last part that each belongs to. parts: (text,
    is_template); names of special tokens are these tokens in the template's text alone."""
    if hasattr(tokenizer, 'encode_parts'):
        return tokenizer.encode_parts(parts)
    as_text = getattr(tokenizer, 'encode_array', tokenizer.encode)
    encoded = [tokenizer.encode(text) if is_template else as_text(text)
               for text, is_template in parts]
    of_part = np.repeat(np.arange(len(parts)), [len(ids) for ids in encoded])
    return np.concatenate(encoded).astype(np.uint32), of_part, of_part


# ---------------------------------------------------------------------------- files

def read_conversations(path, strict=False):
    """The conversations of a file of JSON lines, or of one JSON list, as lists of {'role',
    'content'}. Rows that are none are counted and left out; with `strict`, the first is a
    ValueError that names it."""
    text = read_text(path).removeprefix('\ufeff')
    if text.lstrip().startswith('['):
        with explain_failure(f'{path} is no JSON list', RecursionError):
            rows = [(f'item {i}', row) for i, row in enumerate(json.loads(text), 1)]
    else:
        rows = [(f'line {i}', line) for i, line in enumerate(text.split('\n'), 1) if line.strip()]
    found, bad = [], {}  # bad: {where: why}
    for where, row in rows:
        try:
            messages = messages_of(json.loads(row) if isinstance(row, str) else row)
            reason = why_not(messages)
        except (ValueError, RecursionError) as error:
            reason = f'no JSON ({" ".join(str(error).split())[:80]})'
        if reason:
            bad[where] = reason
        else:
            found.append(messages)
    report_bad_rows(path, len(found), bad, strict)
    return found


def report_bad_rows(path, n_good, bad, strict):
    """Print how many rows of a file were left out, and why. bad: {where: why}. ValueError with
    `strict`, and if no row is left."""
    if bad and (strict or not n_good):
        where, reason = next(iter(bad.items()))
        raise UserError(f'{path}, {where} is no conversation: {reason}')
    if not n_good:
        raise UserError(f'{path} has no conversations')
    if bad:
        first = {reason: where for where, reason in reversed(bad.items())}
        print0(f'{path}: left out {len(bad):,} of {n_good + len(bad):,} rows: ' + '; '.join(
            f'{count:,} with {reason} (first {first[reason]})'
            for reason, count in Counter(bad.values()).most_common(5))
            + '. --strict=True refuses them')


def messages_of(row):
    """The messages of a row with chat, ShareGPT, prompt or Alpaca fields; None if it has none of
    them."""
    if not isinstance(row, dict):
        return None
    if 'messages' in row or isinstance(row.get('conversations'), list):
        messages = row['messages'] if 'messages' in row else row['conversations']
        return [*map(message_of, messages)] if isinstance(messages, list) else None
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
    role, content = m.get('role', m.get('from')), m.get('content', m.get('value'))
    return {'role': SAME_ROLES.get(str(role), role), 'content': content}


def why_not(messages):
    """Why messages are no conversation; None if they are one."""
    if not isinstance(messages, list):
        return f'none of {SHAPES}'
    for m in messages:
        if not isinstance(m, dict) or m.get('role') not in ROLES:
            return f'a message whose role is none of {", ".join(ROLES)}'
        if not isinstance(m.get('content'), str) or not m['content'].strip():
            return f'a message of the {m["role"]}\'s without text'
    has_answer = any(m['role'] == 'assistant' for m in messages)
    return None if has_answer else 'nothing that the assistant says'
