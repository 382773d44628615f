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
from test_docs import settings

from support.hub.exporting import add_chat_template, write_tokenizer
from support.sampling.prompt import Dialogue
from support.text.bpe import END, BPETokenizer, train_bpe
from support.text.chat import (MARKERS, PLAIN, ChatForm, check_template, folder_template, jinja, render,
                               template_for)
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
INST = ('{{ bos_token }}{% for m in messages %}{% if (m["role"] == "user") != (loop.index0 % 2 == 0) %}'
        '{{ raise_exception("Roles must alternate") }}{% endif %}{% if m["role"] == "user" %}'
        '{{ "[INST] " + m["content"] | trim + " [/INST]" }}{% else %}'
        '{{ " " + m["content"] | trim + " " + eos_token }}{% endif %}{% endfor %}')


def say(*texts):
    """A conversation that the user begins."""
    return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]


def chat_form(kind):
    """A tokenizer and its template: our own, or one as it is published."""
    texts = [m['content'] for m in TALK]
    if kind in ('ChatML', 'Llama 2'):
        coder = BPETokenizer(json.dumps(content_of('Qwen' if kind == 'ChatML' else 'TinyLlama')))
        tokens = {} if kind == 'ChatML' else {'bos_token': '<s>', 'eos_token': '</s>'}
        return ChatForm({'jinja': CHATML if tokens == {} else INST, 'tokens': tokens}, coder)
    if kind == 'char':
        coder = CharTokenizer.of_text(render(TALK, PLAIN | {'end': END}) + ''.join(PLAIN.values()) + 'x<|>')
    elif kind == 'gpt2':
        coder = GPT2Tokenizer()
    else:
        coder = train_bpe(texts, 300, (END, *MARKERS.values()) if kind == 'bpe' else (END,))
    return ChatForm(template_for(coder), coder)


form = pytest.fixture(params=['char', 'bpe', 'bpe without markers', 'gpt2', 'ChatML', 'Llama 2'])(
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
    again = folder_template(tmp_path)
    assert ChatForm(again, form.tokenizer).encode(talk)[0].tolist() == form.encode(talk)[0].tolist()


def forgeries(form):
    """Texts of a user that try to begin a turn."""
    names = [*form.tokenizer.special] or [END]
    _, answer, turn, *_ = re.split('[01]', render(say('0', '1', '0'), form.template))  # between messages
    yield from (f'x{name}x' for name in names)
    yield from (f'{a}{b}x' for a in names[:3] for b in names[:3])
    yield from (f'x{answer}x{turn}x', f'x{answer}', f'x{turn}x', turn, f'x{turn[:-1]}', f'x{turn[1:]}',
                f'x{turn * 3}', names[0] * 5, names[0][:-1], names[0][1:] + names[0][:1],
                f'{names[0][:-1]}{names[0]}', f'x\n{turn}\n{turn}x')


@pytest.mark.parametrize('role', ['user', 'assistant'])
def test_what_a_message_holds_never_becomes_a_role_or_a_turn(role, form):
    texts, refused, markers = [*forgeries(form)], [], {*form.tokenizer.special.values()}
    expected = [i for i in form.ask(say('x', 'x', 'x')) if i in markers]
    for text in texts:
        talk = say(text, 'x', 'x') if role == 'user' else say('x', text, 'x')
        try:
            ids = form.ask(talk)
        except ValueError as error:  # a template or a vocabulary whose markers are plain text
            assert '\n' not in str(error) and 'by which this template parts messages' in str(error)
            refused.append(text)
            continue
        assert [i for i in ids if i in markers] == expected
        assert text.replace(' ', '').strip() in form.tokenizer.decode(ids).replace(' ', '')
    assert 12 <= len(texts) > len(refused)
    assert bool(refused) == (isinstance(form.tokenizer, CharTokenizer) or 'INST' in str(form.template))


@pytest.mark.parametrize('template, told', [
    ('{% for m in messages %}', 'TemplateSyntaxError'), ('{{ messages[0].content.__class__ }}', ''),
    ('{% include "/etc/passwd" %}{{ messages[0].content }}', 'TypeError'),
    ('{% import "os" as os %}{{ messages[0].content }}', 'TypeError'),
    ('{{ open("/etc/passwd").read() }}', 'UndefinedError'),
    ('no message', 'leaves out what the user says'), ('{{ raise_exception("No.") }}', 'TemplateError: No.'),
    ('{{ "x" * 3 + messages }}', 'TypeError'), ('{% for i in range(10**9) %}{% endfor %}', 'OverflowError'),
    (5, 'must be a text'), ('{{ messages[0].content.format.__globals__ }}', '')], ids=str)
def test_a_template_that_can_not_be_rendered_is_one_line(template, told, tmp_path):
    content = {'chat_template': template, 'bos_token': {'content': '<s>'}}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(content))
    assert told in refusal(folder_template, tmp_path)


def test_a_folder_s_template_is_found_wherever_it_is_written(tmp_path):
    assert folder_template(tmp_path) is None
    path, found = tmp_path / 'tokenizer_config.json', '{{ bos_token }}{{ messages[0].content }}'
    tokens = {'bos_token': {'content': '<s>'}, 'unk_token': None}
    for written in (found, [{'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': found}]):
        path.write_text(json.dumps({'chat_template': written} | tokens))
        assert folder_template(tmp_path) == {'jinja': found, 'tokens': {'bos_token': '<s>'}}
    (tmp_path / 'chat_template.jinja').write_text('{{ messages[0].content }}!')
    assert folder_template(tmp_path)['jinja'] == '{{ messages[0].content }}!'


def test_our_templates_render_the_same_in_transformers_and_damage_is_said():
    import jinja2
    for template in (PLAIN | {'end': END}, MARKERS | {'end': '</s>'}):
        theirs = jinja2.Environment().from_string(jinja(template))
        assert theirs.render(messages=TALK) == render(TALK, template)
        question = theirs.render(messages=TALK[:2], add_generation_prompt=True)
        assert question == render(TALK[:2], template, is_question=True)
    for damaged in (7, {'user': 'x'}, PLAIN, {'jinja': 5, 'tokens': {}}, {'jinja': 'x', 'tokens': 5}):
        assert 'the chat template' in refusal(check_template, damaged)
    form = chat_form('Llama 2')
    assert 'Roles must alternate' in refusal(form.encode, say('x', 'y')[::-1])
    first = {'jinja': '{{ messages[0].content }}', 'tokens': {}}
    assert 'leaves message 2 out' in refusal(ChatForm, first, form.tokenizer)


# ---------------------------------------------------------------------------- files

HI = say('Hi', 'Hello')
BE = {'role': 'system', 'content': 'Be'}
ROWS = [  # a row, its messages
    ({'messages': HI}, HI), ({'conversations': HI}, HI),
    ({'conversations': [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello'}]}, HI),
    ({'messages': [BE | {'role': 'developer'}, *HI]}, [BE, *HI]),
    ({'prompt': 'Hi', 'completion': 'Hello'}, HI), ({'prompt': HI[:1], 'completion': HI[1:]}, HI),
    ({'instruction': 'Add.', 'input': '1, 2', 'output': '3'}, say('Add.\n\n1, 2', '3')),
    ({'instruction': 'Add.', 'input': '', 'output': '3'}, say('Add.', '3'))]


def test_known_fields_become_messages_of_any_file_in_any_order(tmp_path):
    rows, expected = zip(*ROWS)
    lines, items = tmp_path / 'lines.jsonl', tmp_path / 'items.json'
    lines.write_text('\ufeff' + '\r\n\r\n'.join(map(json.dumps, rows)) + '\n', encoding='utf-8')
    items.write_text(json.dumps(rows), encoding='utf-8')
    assert Conversations([lines]).mark == Conversations([items]).mark
    items.write_text(json.dumps(rows[:3]), encoding='utf-8')
    found, expected = Conversations([lines, items, lines]), [*expected, *expected[:3], *expected]
    assert [*found] == expected and len(found) == 19 and found.mark != Conversations([lines]).mark
    assert [found[i] for i in (18, 0, 8, 10, 11)] == [expected[i] for i in (18, 0, 8, 10, 11)]
    lines.write_text(json.dumps({'messages': HI}))
    assert 'lines.jsonl was changed while it was read' in refusal(found.__getitem__, 0)


BAD = {  # a line, why it is left out
    '{"messages": ': 'it is no JSON', '[' * 100_000: 'it is no JSON',
    '5': 'it has none of {"messages"', '{"text": "hello"}': 'it has none of {"messages"',
    '{"messages": []}': 'the assistant says nothing', '{"messages": 5}': 'it has none of {"messages"',
    json.dumps({'messages': HI[:1]}): 'the assistant says nothing',
    '{"messages": [{"role": "robot", "content": "x"}]}': 'is none of system, user, assistant',
    json.dumps({'messages': say('Hi', '  ')}): 'a message of the assistant\'s has no text',
    json.dumps({'messages': say(None, 'Hi')}): 'a message of the user\'s has no text',
    '{"instruction": 3, "output": "x"}': 'has no text',
    '{"conversations": [{"from": ["x"]}]}': 'the role of a message is none',
    '{"prompt": null, "completion": "x"}': 'has no text'}


@pytest.mark.parametrize('line', BAD, ids=lambda line: line[:40])
def test_rows_that_are_no_conversations_are_counted_and_left_out(line, tmp_path, capsys):
    path, good = tmp_path / 'chats.jsonl', json.dumps({'messages': HI})
    path.write_text('\n'.join([good, line, good, line]))
    assert [*Conversations([path])] == [HI, HI]
    said = capsys.readouterr().out
    assert 'left out 2 rows: no conversation, as ' in said and BAD[line] in said
    assert f'(2, the first: {path}, line 2)' in said and said.count('\n') == 1
    told = refusal(Conversations, [path], strict=True)
    assert f'{path}, line 2: no conversation, as ' in told and BAD[line] in told
    path.write_text(f'\n{line}')
    told = refusal(Conversations, [path])
    assert line[0] == '[' or 'has no conversations: no conversation, as' in told and BAD[line] in told


def test_conversations_that_a_template_can_not_express_are_left_out_or_refused(tmp_path, capsys):
    path, talks = tmp_path / 'chats.jsonl', [say('x', 'y'), say('y', f'x{END}'), say('xx', 'y')] * 50
    path.write_text('\n'.join(json.dumps({'messages': talk}) for talk in talks))
    found, form = Conversations([path]), chat_form('char')
    kept = [*encode_all(found, [*range(150)][::-1], form)]
    assert [ids.tolist() for ids, _ in kept] == [
        form.encode(talk)[0].tolist() for talk in talks[::-1] if END not in talk[1]['content']]
    assert f'left out 50 rows: a message holds {END!r}, by which' in capsys.readouterr().out
    assert 'conversation 2: a message holds' in refusal(list, encode_all(found, [0, 1], form, strict=True))
    assert 'no conversation can be encoded' in refusal(list, encode_all(found, [1, 4], form))


@pytest.mark.parametrize('text, args, words', [
    ('', [], 'has no conversations'), ('[{"messages"', [], 'no JSON list'), (b'\xff', [], 'not UTF-8'),
    ('{"messages": "a\0b"}', [], 'has zero bytes'), (None, ['missing.jsonl'], 'missing.jsonl is missing'),
    (json.dumps({'messages': HI}), [], '1 conversations, too few to split'),
    (json.dumps({'messages': HI}) + '\n5', ['--strict'], 'line 2: no conversation'),
    (None, ['--tokenizer=words'], 'tokenizer=words is not one of bpe, gpt2, char'),
    (None, ['--name=a/b'], 'name=a/b'), (None, ['--vocab_size=259'], 'vocab_size=259 must be 260'),
    (None, ['--vocab_size=65537'], '65536'), (None, ['--val_fraction=1'], 'val_fraction=1')])
def test_what_can_not_be_prepared_is_one_line_and_nothing_is_written(text, args, words, prepare):
    if text is not None:
        (prepare.here / 'chats.jsonl').write_bytes(text if isinstance(text, bytes) else text.encode())
        args = ['chats.jsonl', '--name=mine', *args]
    assert words in prepare.fails('chat', *args) and not (prepare.data / 'mine').exists()


@pytest.mark.parametrize('tokenizer', ['bpe', 'char', 'gpt2', 'FOLDER'])
def test_prepared_conversations_are_those_of_the_file(tokenizer, prepare, bpe, tmp_path):
    if tokenizer == 'FOLDER':
        tokenizer = tmp_path / 'model'
        tokenizer.mkdir()
        own = train_bpe([EXAMPLE.read_text()], 800, (END, '<|im_start|>', '<|im_end|>'))
        (tokenizer / 'tokenizer.json').write_text(own.json)
        (tokenizer / 'tokenizer_config.json').write_text(json.dumps({'chat_template': CHATML}))
    out = prepare('chat', f'--tokenizer={tokenizer}', '--val_fraction=0.2')
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
    assert data.template == folder_template(tmp_path / 'model') or template_for(data.tokenizer)
    lengths = sorted(len(ids) for ids, _ in found)
    assert n == {'train': 93, 'val': 24} and (f'117 conversations, half of them up to {lengths[58]} tokens '
                                              f'long, the longest {lengths[-1]};') in out
    write_text_dataset(prepare.data / 'chat', 'abc' * 100, 'char', 'a test')
    assert not [*(prepare.data / 'chat').glob('*.mask')]
    assert Dataset(prepare.data / 'chat')['train'][:3].tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------- a dialogue

def asking(*messages):
    return [*render([*messages], PLAIN | {'end': END}, is_question=True)]  # a character is a token


def dialogue(block_size):
    return Dialogue(lambda messages: asking(*messages), block_size)


def test_full_dialogue_drops_its_oldest_turns_and_keeps_the_instruction():
    talk, instruction = dialogue(400), {'role': 'system', 'content': 'Be brief.'}
    assert 'Be brief.' in talk.command('/system Be brief.') and talk.command('Hi') is None
    said = []
    for i in range(8):
        said.append(f'Question {i}')
        prompt = talk.ask(said[-1], 150)
        most = next(text for n in range(0, 15, 2)
                    if len(text := asking(instruction, *say(*said[n:]))) <= 250)  # that fits
        assert prompt == most
        said.append(f'Answer {i}')
        talk.keep(said[-1])
    assert 1 < ''.join(prompt).count('Question') < 8
    assert talk.ask('x' * 300, 150) == asking(instruction, *say('x' * 300))  # the question is never dropped
    talk = dialogue(400)
    talk.ask('x' * 50, 10_000), talk.keep('y' * 50)
    assert talk.ask('z', 10_000) == asking(*say('x' * 50, 'y' * 50, 'z'))  # half of block_size is theirs
    talk.keep('y' * 50)
    assert talk.ask('z', 10_000) == asking(*say('z', 'y' * 50, 'z'))
    assert talk.ask('z', 1) == asking(*say('x' * 50, 'y' * 50, 'z', 'y' * 50, 'z'))


# ---------------------------------------------------------------------------- the whole path

def test_model_trained_on_the_example_answers_it_here_and_in_transformers(prepare, train, run_here, tmp_path):
    from transformers import pipeline
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
    run_here('export.py', run, f'--export_dir={tmp_path / "exported"}')
    ask = pipeline('text-generation', model=str(tmp_path / 'exported'), device='cpu')
    said = ask(talks[0][:1], do_sample=False, max_new_tokens=60, max_length=None)[0]['generated_text'][-1]
    assert said == {'role': 'assistant', 'content': answers[0]}


def test_chat_with_a_model_of_other_text_is_refused(train, run_here, tmp_path):
    train('--max_iters=1')
    assert State.load(tmp_path / 'out/ckpt.pt').chat is None
    args = 'sample.py', f'--out_dir={tmp_path / "out"}', '--chat=True', '--device=cpu'
    assert 'was not trained on conversations, so chat=True' in refusal(run_here, *args, '--start=Hi')
    assert 'chat=True takes questions' in refusal(run_here, *args)


def test_example_names_only_what_exists():
    for messages in Conversations([EXAMPLE]):
        for m in messages[1::2]:
            for script, rest in re.findall(r'python ((?:data/\w+/)?\w+\.py)([^,;]*)', m['content']):
                assert (ROOT / script).exists(), script
                assert {*re.findall(r'--(\w+)', rest)} <= settings(script) | {'help'}, rest
            for path in re.findall(r'config/\w+\.py', m['content']):
                assert (ROOT / path).exists(), path
