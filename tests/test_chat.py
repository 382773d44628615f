"""Conversations: templates, files, data/chat, answers of sample.py and export.py, the shipped example."""
# ruff: noqa: F811 (fixtures)

import itertools
import json
import re

import numpy as np
import pytest
from conftest import ROOT
from preparing import ODD, prepare, refusal  # noqa: F401
from test_bpe import content_of

from support.errors import UserError
from support.hub.exporting import add_chat_template, write_tokenizer
from support.sampling.prompt import Dialogue
from support.text.bpe import END, BPETokenizer, train_bpe
from support.text.chat import MARKERS, PLAIN, ChatForm, folder_template, render, template_for
from support.text.conversations import Conversations, encode_all
from support.text.dataset import Dataset
from support.text.masks import BEGIN, TARGET
from support.text.prepare import write_text_dataset
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer
from support.training.state import State

EXAMPLE = ROOT / 'data/chat/example.jsonl'
TALK = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '  Wie heißt du?\n'},
        {'role': 'assistant', 'content': 'GPT.\n\n  I am 2.'}, {'role': 'user', 'content': '"Why"?'},
        {'role': 'assistant', 'content': '...'}]
CHATML = ('{% for m in messages %}{% if loop.first and m["role"] != "system" %}<|im_start|>system\nYou help.'
          '<|im_end|>\n{% endif %}{{ "<|im_start|>" + m["role"] + "\n" + m["content"] + "<|im_end|>\n" }}'
          '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}')
INST = ('{{ bos_token }}{% for m in messages %}{% if m["role"] == "user" %}'
        '{{ "[INST] " + m["content"] | trim + " [/INST]" }}{% else %}'
        '{{ " " + m["content"] | trim + " " + eos_token }}{% endif %}{% endfor %}')


def say(*texts):
    """A conversation that the user begins."""
    return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]


def chat_form(kind):
    """A tokenizer and its template: our own, or one as it is published."""
    if kind in ('ChatML', 'Llama 2'):
        coder = BPETokenizer(json.dumps(content_of('Qwen' if kind == 'ChatML' else 'TinyLlama')))
        tokens = {} if kind == 'ChatML' else {'bos_token': '<s>', 'eos_token': '</s>'}
        return ChatForm({'jinja': CHATML if tokens == {} else INST, 'tokens': tokens}, coder)
    if kind == 'char':
        coder = CharTokenizer.of_text(render(TALK, PLAIN | {'end': END}) + ''.join(PLAIN.values()) + 'x<|>')
    elif kind == 'gpt2':
        coder = GPT2Tokenizer()
    else:
        coder = train_bpe([m['content'] for m in TALK], 300, (END, *MARKERS.values()))
    return ChatForm(template_for(coder), coder)


form = pytest.fixture(params=['char', 'bpe', 'gpt2', 'ChatML', 'Llama 2'])(
    lambda request, bpe: chat_form(request.param))


# ---------------------------------------------------------------------------- templates

def test_targets_are_what_the_assistant_says_and_a_question_s_tokens_are_those_of_training(form):
    talk = TALK if not form.tokenizer.begin else TALK[1:]
    ids, mask = form.encode(talk)
    learned, decode = ids[mask == TARGET], form.tokenizer.decode
    names = {i: name for name, i in form.tokenizer.special.items()}
    end = names.get(learned[-1], END)
    said = decode(learned.tolist()).replace(f' {end}', end).replace(f'{end} ', end)
    assert said == f'GPT.\n\n  I am 2.{end}...{end}'
    assert np.flatnonzero(mask == BEGIN).tolist() == [0]
    assert form.end_ids <= {*learned.tolist()} | {*form.tokenizer.ends}
    assert form.end_strings == ([END] if isinstance(form.tokenizer, CharTokenizer) else [])
    for n in (i for i, m in enumerate(talk) if m['role'] == 'assistant'):
        asked = form.ask(talk[:n])
        assert asked == ids[:len(asked)].tolist()


def test_ids_are_those_of_transformers_for_messages_without_markers(form, tmp_path):
    from transformers import AutoTokenizer
    talk = [m | {'content': m['content'].strip()} for m in (TALK if not form.tokenizer.begin else TALK[1:])]
    write_tokenizer(tmp_path, form.tokenizer, 64)
    add_chat_template(tmp_path, form.template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if form.tokenizer.special and not isinstance(form.tokenizer, GPT2Tokenizer):
        talk[0]['content'] += ODD.strip()  # which a vocabulary of characters doesn't know
    assert theirs.apply_chat_template(talk, return_dict=False) == form.encode(talk)[0].tolist()
    asked = theirs.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    assert asked == form.ask(talk[:1])


def test_what_a_message_holds_never_becomes_a_role_or_a_turn(form):
    markers, refused = {*form.tokenizer.special.values()}, []
    name = [*form.tokenizer.special, END][0]
    _, answer, turn, *_ = re.split('[01]', render(say('0', '1', '0'), form.template))  # between messages
    expected = [i for i in form.ask(say('x', 'x', 'x')) if i in markers]
    texts = f'x{name}x', f'{name[:-1]}{name}', turn, f'x{turn[1:]}', f'x{answer}x{turn}x'
    for text in texts:
        for talk in (say(text, 'x', 'x'), say('x', text, 'x')):
            try:
                ids = form.ask(talk)
            except UserError:  # a template or a vocabulary whose markers are plain text
                refused.append(text)
                continue
            assert [i for i in ids if i in markers] == expected
            assert text.replace(' ', '').strip() in form.tokenizer.decode(ids).replace(' ', '')
    assert bool(refused) == (isinstance(form.tokenizer, CharTokenizer) or 'INST' in str(form.template))


@pytest.mark.parametrize('template, told', [
    ('{% for m in messages %}', 'TemplateSyntaxError'), ('no message', 'leaves out what the user says'),
    ('{% include "/etc/passwd" %}{{ messages[0].content }}', 'TypeError'),
    ('{{ messages[0].content.__class__.__subclasses__() }}', '')], ids=str)
def test_a_template_that_can_not_be_rendered_is_one_line(template, told, tmp_path):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': template}))
    assert told in refusal(folder_template, tmp_path)


# ---------------------------------------------------------------------------- files

HI = say('Hi', 'Hello')
ROWS = [  # a row, its messages
    ({'messages': HI}, HI), ({'conversations': HI}, HI),
    ({'conversations': [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello'}]}, HI),
    ({'messages': [{'role': 'developer', 'content': 'Be'}, *HI]}, [{'role': 'system', 'content': 'Be'}, *HI]),
    ({'conversations': [{'role': 'User', 'content': 'Hi'}, {'from': 'GPT', 'value': 'Hello'}]}, HI),
    ({'messages': None, 'conversations': HI}, HI),  # of several data sets in one file
    ({'messages': [m | {'from': None, 'value': None} for m in HI], 'prompt': None}, HI),
    ({'conversations': [{'role': None, 'from': 'human', 'value': 'Hi', 'content': None}, HI[1]]}, HI),
    ({'prompt': 'Hi', 'completion': 'Hello'}, HI), ({'prompt': HI[:1], 'completion': HI[1:]}, HI),
    ({'instruction': 'Add.', 'input': '1, 2', 'output': '3'}, say('Add.\n\n1, 2', '3')),
    ({'instruction': 'Add.', 'input': '', 'output': '3'}, say('Add.', '3'))]


def test_known_fields_become_messages_of_any_file_in_any_order(tmp_path):
    rows, expected = zip(*ROWS)
    lines, items = tmp_path / 'lines.jsonl', tmp_path / 'items.json'
    lines.write_text('\ufeff' + '\r\n\r\n'.join(map(json.dumps, rows)) + '\n', encoding='utf-8')
    items.write_text(json.dumps(rows[:3]), encoding='utf-8')
    found, expected = Conversations([lines, items, lines]), [*expected, *expected[:3], *expected]
    assert [*found] == expected and len(found) == 27 and found.mark != Conversations([lines]).mark
    assert [found[i] for i in (26, 0, 12, 14, 15)] == [expected[i] for i in (26, 0, 12, 14, 15)]


@pytest.mark.parametrize('line, why', [
    ('{"messages": ', 'it is no JSON'), ('{"text": "hello"}', 'it has none of {"messages"'),
    (json.dumps({'messages': HI[:1]}), 'the assistant says nothing'),
    (json.dumps({'messages': say('Hi', '  ')}), 'a message of the assistant\'s has no text'),
    ('{"prompt": null, "completion": "x"}', 'has no text')])
def test_rows_that_are_no_conversations_are_counted_and_left_out(line, why, tmp_path, capsys):
    path, good = tmp_path / 'chats.jsonl', json.dumps({'messages': HI})
    path.write_text('\n'.join([good, line, good, line]))
    assert [*Conversations([path])] == [HI, HI]
    assert why in capsys.readouterr().out
    assert f'{path}, line 2: no conversation, as ' in refusal(Conversations, [path], strict=True)


def test_conversations_that_a_template_can_not_express_are_left_out_or_refused():
    talks, form = [say('x', 'y'), say('y', f'x{END}')], chat_form('char')
    kept = [*encode_all(talks, [0, 1, 0], form)]
    assert [ids.tolist() for ids, _ in kept] == [form.encode(talks[0])[0].tolist()] * 2
    assert 'conversation 2: a message holds' in refusal(list, encode_all(talks, [0, 1], form, strict=True))


@pytest.mark.parametrize('text, args, words', [
    (b'', [], 'has no conversations'), (b'[{"messages"', [], 'no JSON list'), (b'\xff', [], 'not UTF-8'),
    (json.dumps({'messages': HI}).encode(), [], '1 conversations, too few to split'),
    (json.dumps({'messages': HI}).encode() + b'\n5', ['--strict'], 'line 2: no conversation')])
def test_what_can_not_be_prepared_is_one_line_and_nothing_is_written(text, args, words, prepare):
    (prepare.here / 'chats.jsonl').write_bytes(text)
    assert words in prepare.fails('chat', 'chats.jsonl', *args)


@pytest.mark.parametrize('tokenizer', ['bpe', 'char', 'gpt2', 'FOLDER'])
def test_prepared_conversations_are_those_of_the_file(tokenizer, prepare, bpe, tmp_path):
    if tokenizer == 'FOLDER':
        tokenizer = tmp_path
        own = train_bpe([EXAMPLE.read_text()], 800, (END, '<|im_start|>', '<|im_end|>'))
        (tokenizer / 'tokenizer.json').write_text(own.json)
        (tokenizer / 'tokenizer_config.json').write_text(json.dumps({'chat_template': CHATML}))
    prepare('chat', f'--tokenizer={tokenizer}', '--val_fraction=0.2')
    data, found, n = Dataset(prepare.data / 'chat'), [], {}
    form = ChatForm(data.template, data.tokenizer)
    for name, split in data.splits.items():
        begins = np.flatnonzero(split.mask[:] == BEGIN).tolist()
        n[name] = len(begins)
        found += [(split[a:b].tolist(), split.mask[a:b].tolist())
                  for a, b in itertools.pairwise([*begins, len(split)])]
    order = np.random.default_rng(2357).permutation(117)
    expected = [form.encode(Conversations([EXAMPLE])[i]) for i in order]
    assert found == [(ids.tolist(), mask.tolist()) for ids, mask in expected]
    assert data.template == (folder_template(tmp_path) or template_for(data.tokenizer))
    assert n == {'train': 93, 'val': 24}
    write_text_dataset(prepare.data / 'chat', 'abc' * 100, 'char', 'a test')
    assert not [*(prepare.data / 'chat').glob('*.mask')]


# ---------------------------------------------------------------------------- answers

def asking(messages):
    return [*render(messages, PLAIN | {'end': END}, is_question=True)]  # a character is a token


def test_full_dialogue_drops_its_oldest_turns_and_keeps_the_instruction():
    talk, instruction = Dialogue(asking, 400), {'role': 'system', 'content': 'Be brief.'}
    assert 'Be brief.' in talk.command('/system Be brief.') and talk.command('Hi') is None
    said = []
    for i in range(8):
        said.append(f'Question {i}')
        most = next(text for n in range(0, 15, 2)
                    if len(text := asking([instruction, *say(*said[n:])])) <= 250)  # that fits
        assert talk.ask(said[-1], 150) == most
        said.append(f'Answer {i}')
        talk.keep(said[-1])
    assert talk.ask('x' * 300, 150) == asking([instruction, *say('x' * 300)])  # the question is never dropped


def test_model_trained_on_the_example_answers_it(prepare, train, run_here, tmp_path):
    prepare('chat')
    data = Dataset(prepare.data / 'chat')
    run = f'--out_dir={tmp_path / "out"}'
    train(ROOT / 'config/train_chat_cpu.py', run, '--block_size=80', '--n_embd=64', '--max_iters=120',
          '--lr_decay_iters=120', '--eval_interval=120', '--learning_rate=6e-3', data_dir=data.folder)
    learned = data.tokenizer.decode(data['train'][:].tolist())
    talks = [talk for talk in Conversations([EXAMPLE])
             if len(talk) == 2 and render(talk, data.template) in learned][::3]
    (tmp_path / 'asked.txt').write_text('\n'.join(asked['content'] for asked, _ in talks))
    log = run_here('sample.py', run, '--chat=True', f'--prompts={tmp_path / "asked.txt"}', '--device=cpu',
                   '--temperature=0', '--num_samples=1', '--max_new_tokens=60')['log']
    answers = [*map(str.strip, log.split('\n---------------\n')[:-1])]
    wrong = [said for said, (_, answer) in zip(answers, talks, strict=True) if said != answer['content']]
    assert len(talks) > 30 and len(wrong) <= 1, wrong
    assert State.load(tmp_path / 'out/ckpt.pt').chat == template_for(data.tokenizer)
