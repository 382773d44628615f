"""
Conversations as tokens: what stands before each role's messages, and what ends them.

    template = folder_template('smollm2') or template_for(tokenizer)  # its own, else ours
    form = ChatForm(template, tokenizer)
    ids, mask = form.encode(messages)  # messages: [{'role': 'user', 'content': 'Hello!'}, ...]
    ids = form.ask(messages)           # the assistant's next answer follows

Our own template: a message is its role's marker, its content and the end. A tokenizer of one's own
has tokens for the markers; with others they are plain text that ends a line. A published model has
a `chat_template`, which transformers' sandbox renders. Contents are encoded as text: whatever a
user writes, only the template begins a turn.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np

from support.errors import UserError
from support.machine.files import explain_failure, read_bytes, read_text, regular_file
from support.text.bpe import END
from support.text.masks import BEGIN, READ, TARGET

ROLES = ('system', 'user', 'assistant')
MARKERS = {role: f'<|{role}|>' for role in ROLES}  # tokens
PLAIN = {role: f'{role.capitalize()}:\n' for role in ROLES}  # text
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
        settings = json.loads(read_bytes(path)) if regular_file(path) else {}
        text = read_text(own) if regular_file(own) else settings.get('chat_template')
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
        self.of_template = functools.lru_cache(maxsize=64)(tokenizer.encode)

    def encode(self, messages, is_question=False):
        """ids, mask: (N,) uint32 and (N,) uint8. What the assistant says and the end of it are
        targets. Raises ValueError for a conversation that the template or the tokenizer can't
        express."""
        parts = parts_of(messages, self.template, self.tokenizer.special, is_question)
        for text, kind in parts:
            if kind in ROLES and (found := [mark for mark in self.plain_marks if mark in text]):
                raise UserError(f'a message holds {found[0]!r}, by which this template parts '
                                'messages')
        ids, first, last = self.encode_parts([(text, kind not in ROLES) for text, kind in parts])
        is_target = np.array([kind in ('assistant', ANSWER_END) for _, kind in parts])
        mask = np.where(is_target[first] | is_target[last], TARGET, READ).astype(np.uint8)
        mask[:1] = BEGIN
        return ids, mask

    def encode_parts(self, parts):
        """ids, (N,) uint32, and the first and last part that each belongs to. parts: (text,
        is_template); names of special tokens are these tokens in the template's text alone."""
        if hasattr(self.tokenizer, 'encode_parts'):
            return self.tokenizer.encode_parts(parts)
        as_text = getattr(self.tokenizer, 'encode_array', self.tokenizer.encode)
        encoded = [self.of_template(text) if is_template else as_text(text)
                   for text, is_template in parts]
        of_part = np.repeat(np.arange(len(parts)), [*map(len, encoded)])
        return np.concatenate(encoded).astype(np.uint32), of_part, of_part

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
