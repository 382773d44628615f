"""
Conversations as text and tokens: what stands before each role's messages, and what ends them.

    template = template_for(tokenizer)          # {'system': 'System:\\n', ..., 'end': '<|endoftext|>'}
    render(messages, template)                  # 'User:\\nHello!<|endoftext|>Assistant:\\nHi.<|endoftext|>'
    ids, mask = encode_conversation(messages, template, tokenizer)
    conversations = read_conversations('chat.jsonl')  # lists of {'role': 'user', 'content': 'Hello!'}

A message is its role's marker, its content and the end. A tokenizer of one's own has tokens for the markers;
with GPT-2's they are plain text that ends a line, so that no token spans marker and content.
"""

import json

import numpy as np

from support.errors import UserError
from support.machine.files import explain_failure, read_text
from support.text.bpe import END
from support.text.masks import BEGIN, READ, TARGET

ROLES = ('system', 'user', 'assistant')
MARKERS = {role: f'<|{role}|>' for role in ROLES}  # tokens
PLAIN = {role: f'{role.capitalize()}:\n' for role in ROLES}  # text
SHAREGPT = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'system': 'system'}
SHAPES = '{"messages": [{"role": "user", "content": "..."}, ...]}, or Alpaca\'s or ShareGPT\'s fields'


# ---------------------------------------------------------------------------- templates

def template_for(tokenizer):
    """The template for a tokenizer: its own tokens as markers, if it has them, else plain text."""
    special = getattr(tokenizer, 'special', {})
    end = next((name for name, i in special.items() if i == tokenizer.end), END)
    return (MARKERS if special.keys() >= {*MARKERS.values()} else PLAIN) | {'end': end}


def check_template(template):
    """A template as a checkpoint or dataset.json has it. Raises ValueError if it is none."""
    if not isinstance(template, dict) or template.keys() != {*ROLES, 'end'} \
            or not all(isinstance(text, str) and text for text in template.values()):
        raise UserError('the chat template is damaged: it needs a string for each of '
                         f'{", ".join(ROLES)} and end')
    return template


def render(messages, template, is_question=False):
    """Messages as one text. is_question: the assistant's next answer is to follow."""
    text = ''.join(template[m['role']] + m['content'].strip() + template['end'] for m in messages)
    return text + template['assistant'] * is_question


def jinja(template):
    """A template as transformers' chat_template, which gives what `render` does."""
    quoted = {name: json.dumps(text) for name, text in template.items()}
    markers = ', '.join(f'{json.dumps(role)}: {quoted[role]}' for role in ROLES)
    return (f'{{% set markers = {{{markers}}} %}}{{% for message in messages %}}'
            f'{{{{ markers[message["role"]] + message["content"] | trim + {quoted["end"]} }}}}{{% endfor %}}'
            f'{{% if add_generation_prompt %}}{{{{ markers["assistant"] }}}}{{% endif %}}')


def encode_conversation(messages, template, tokenizer):
    """ids, mask: (N,) uint16 and (N,) uint8 of a conversation. What the assistant says and the end of it are
    targets. Names of special tokens within a message are text."""
    encode_content = getattr(tokenizer, 'encode_array', tokenizer.encode)
    markers = {name: tokenizer.encode(text) for name, text in template.items()}
    parts, masks = [], []
    for message in messages:
        said = [*encode_content(message['content'].strip()), *markers['end']]
        before, kind = markers[message['role']], TARGET if message['role'] == 'assistant' else READ
        parts += [before, said]
        masks += [[READ] * len(before), [kind] * len(said)]
    mask = np.concatenate(masks).astype(np.uint8)
    mask[0] = BEGIN
    return np.concatenate(parts).astype(np.uint16), mask


# ---------------------------------------------------------------------------- files

def read_conversations(path):
    """The conversations of a file of JSON lines, or of one JSON list, as lists of {'role', 'content'}.

    Raises ValueError, with the number of the line or the item, for what isn't a conversation.
    """
    text = read_text(path).removeprefix('\ufeff')
    if text.lstrip().startswith('['):
        with explain_failure(f'{path} is no JSON list'):
            rows = [(f'item {i}', row) for i, row in enumerate(json.loads(text), 1)]
    else:
        rows = [(f'line {i}', parse_line(path, i, line))
                for i, line in enumerate(text.replace('\r\n', '\n').split('\n'), 1) if line.strip()]
    if not rows:
        raise UserError(f'{path} has no conversations')
    found = []
    for where, row in rows:
        messages = messages_of(row)
        if reason := why_not(messages):
            raise UserError(f'{path}, {where} is no conversation: {reason}')
        found.append(messages)
    return found


def parse_line(path, number, line):
    with explain_failure(f'{path}, line {number} is no JSON', RecursionError):
        return json.loads(line)


def messages_of(row):
    """The messages of a row with chat, ShareGPT or Alpaca fields; None if it has none of them."""
    if not isinstance(row, dict):
        return None
    if 'messages' in row:
        return row['messages']
    if isinstance(row.get('conversations'), list):
        return [{'role': SHAREGPT.get(str(m.get('from'))), 'content': m.get('value')}
                if isinstance(m, dict) else m for m in row['conversations']]
    if 'instruction' in row and 'output' in row:
        asked = [text for text in (row['instruction'], row.get('input')) if text]
        asked = '\n\n'.join(asked) if all(isinstance(text, str) for text in asked) else None
        return [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': row['output']}]
    return None


def why_not(messages):
    """Why messages are no conversation; None if they are one."""
    if not isinstance(messages, list):
        return f'it must have {SHAPES}'
    for n, m in enumerate(messages, 1):
        if not isinstance(m, dict) or m.get('role') not in ROLES:
            return f'message {n} has no role of {", ".join(ROLES)}'
        if not isinstance(m.get('content'), str) or not m['content'].strip():
            return f'message {n} has no text as its content'
        if marks := [mark for mark in (END, *MARKERS.values()) if mark in m['content']]:
            return f'message {n} holds {marks[0]}, which stands between messages'
    return None if any(m['role'] == 'assistant' for m in messages) else 'the assistant says nothing in it'
