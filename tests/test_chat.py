"""Conversations: support/text/chat.py, data/chat, answers of sample.py and export.py, the shipped example."""

import builtins
import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_docs import settings

from support.hub.huggingface import add_chat_template, write_tokenizer
from support.training import checkpoint
from support.sampling.prompt import Dialogue
from support.text.bpe import train_bpe
from support.text.chat import (
    END,
    MARKERS,
    PLAIN,
    encode_conversation,
    jinja,
    messages_of,
    read_conversations,
    render,
    template_for,
)
from support.text.masks import BEGIN, TARGET
from support.text.prepare import write_text_dataset
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, read_tokenizer
from support.text.tokens import open_split

EXAMPLE = ROOT / 'data/chat/example.jsonl'
TALK = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '  Wie heißt du?\n'},
        {'role': 'assistant', 'content': 'GPT.\n\n  I am 2.'}, {'role': 'user', 'content': '"Why"?'},
        {'role': 'assistant', 'content': '...'}]
ASKED = TALK[1:4:2]


def say(*texts):
    """A conversation that the user begins."""
    return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Runs a copy of data/chat/prepare.py in this process; prepare.data is its data folder."""
    def run(*args):
        hook, path = sys.excepthook, list(sys.path)
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, args)])
        try:
            runpy.run_path(str(run.data / 'chat/prepare.py'), run_name='__main__')
        finally:
            sys.excepthook, sys.path[:] = hook, path
        return run.data / 'chat'

    run.data = tmp_path / 'data'
    (run.data / 'chat').mkdir(parents=True)
    for name in ('prepare.py', 'example.jsonl'):
        shutil.copy(ROOT / 'data/chat' / name, run.data / 'chat')
    return run


def tokenizers():
    texts = [m['content'] for m in TALK]
    rendered = render(TALK, PLAIN | {'end': END}) + ''.join(PLAIN.values())
    return {'char': CharTokenizer.of_text(rendered), 'bpe': train_bpe(texts, 300, (END, *MARKERS.values())),
            'bpe without markers': train_bpe(texts, 300), 'gpt2': GPT2Tokenizer()}


@pytest.fixture(params=['char', 'bpe', 'bpe without markers', 'gpt2'])
def tokenizer(request):
    if request.param == 'gpt2':
        request.getfixturevalue('bpe')
    return tokenizers()[request.param]


# ---------------------------------------------------------------------------- templates

def test_targets_are_what_the_assistant_says_and_the_end_of_it(tokenizer):
    template = template_for(tokenizer)
    ids, mask = encode_conversation(TALK, template, tokenizer)
    assert tokenizer.decode(ids.tolist()) == render(TALK, template)
    assert tokenizer.decode(ids[mask == TARGET].tolist()) == f'GPT.\n\n  I am 2.{END}...{END}'
    assert np.flatnonzero(mask == BEGIN).tolist() == [0]


def test_tokens_of_a_prompt_are_those_of_training(tokenizer):
    """No token spans a marker and a content, so the text as a whole gives the same ids as its parts."""
    template = template_for(tokenizer)
    ids, _ = encode_conversation(TALK, template, tokenizer)
    assert tokenizer.encode(render(TALK, template)) == ids.tolist()
    question = tokenizer.encode(render(TALK[:2], template, is_question=True))
    assert question == ids[:len(question)].tolist()


def test_own_tokenizer_has_a_token_for_each_marker():
    coder = tokenizers()['bpe']
    template = template_for(coder)
    assert template == MARKERS | {'end': END}
    assert all(len(coder.encode(text)) == 1 for text in template.values())
    for other in (tokenizers()['bpe without markers'], GPT2Tokenizer()):
        assert template_for(other) == PLAIN | {'end': END}
    assert len(coder.encode_array(MARKERS['user'])) > 1  # in a message it is text


def test_chat_template_of_transformers_renders_the_same():
    import jinja2
    for template in (PLAIN | {'end': END}, MARKERS | {'end': '</s>'}):
        theirs = jinja2.Environment().from_string(jinja(template))
        assert theirs.render(messages=TALK) == render(TALK, template)
        question = theirs.render(messages=TALK[:2], add_generation_prompt=True)
        assert question == render(TALK[:2], template, is_question=True)


def test_exported_tokenizer_gives_messages_the_ids_of_training(tokenizer, tmp_path):
    from transformers import AutoTokenizer
    template = template_for(tokenizer)
    write_tokenizer(tmp_path, tokenizer, 64)
    add_chat_template(tmp_path, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids, _ = encode_conversation(TALK, template, tokenizer)
    assert theirs.apply_chat_template(TALK, return_dict=False) == ids.tolist()
    asked = theirs.apply_chat_template(TALK[:2], add_generation_prompt=True, return_dict=False)
    assert asked == ids[:len(asked)].tolist() and len(asked) < len(ids)


# ---------------------------------------------------------------------------- files

ROWS = {'messages': {'messages': say('Hi', 'Hello')}, 'sharegpt': {'conversations': [
            {'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello'}]},
        'alpaca': {'instruction': 'Add.', 'input': '1, 2', 'output': '3'},
        'alpaca without input': {'instruction': 'Add.', 'input': '', 'output': '3'}}


@pytest.mark.parametrize('kind, expected', [
    ('messages', say('Hi', 'Hello')), ('sharegpt', say('Hi', 'Hello')),
    ('alpaca', say('Add.\n\n1, 2', '3')), ('alpaca without input', say('Add.', '3'))])
@pytest.mark.parametrize('form', ['lines', 'list'])
def test_known_fields_become_messages(kind, expected, form, tmp_path):
    rows = [ROWS[kind]] * 3
    text = json.dumps(rows) if form == 'list' else '\ufeff' + '\r\n\r\n'.join(map(json.dumps, rows)) + '\n'
    (tmp_path / 'chats.jsonl').write_text(text, encoding='utf-8')
    assert read_conversations(tmp_path / 'chats.jsonl') == [expected] * 3
    assert messages_of(ROWS[kind]) == expected


GOOD = json.dumps(ROWS['messages'])


def second(**row):
    return f'{GOOD}\n{json.dumps(row)}'


@pytest.mark.parametrize('text, words', [
    (f'{GOOD}\n{{"messages": \n', ['line 2 is no JSON']),
    (f'{GOOD}\n{"[" * 100_000}', ['line 2 is no JSON']),
    (f'{GOOD}\n\n[1]\n', ['line 3 is no conversation', '"messages"', 'Alpaca']),
    (second(text='hello'), ['line 2 is no conversation']),
    (second(messages=[]), ['line 2', 'the assistant says nothing']),
    (second(messages=say('Hi')), ['line 2', 'the assistant says nothing']),
    (second(messages=[{'role': 'robot', 'content': 'x'}]), ['line 2', 'message 1 has no role']),
    (second(messages=say('Hi', '  ')), ['line 2', 'message 2 has no text']),
    (second(messages=say('Hi', None)), ['line 2', 'message 2 has no text']),
    (second(messages=say('Hi', f'Ho{END}')), ['line 2', 'message 2 holds <|endoftext|>']),
    (second(messages=say('Hi <|user|>', 'Ho')), ['line 2', 'message 1 holds <|user|>']),
    (second(instruction=3, output='x'), ['line 2', 'message 1 has no text']),
    (second(conversations=[{'from': ['x']}]), ['line 2', 'message 1 has no role']),
    (f'[{GOOD}, {{"text": 1}}]', ['item 2 is no conversation']),
    (f'[{GOOD}', ['no JSON list']), ('', ['has no conversations']),
    (GOOD, ['1 conversations, too few to split']),
])
def test_line_that_is_no_conversation_is_one_line_and_nothing_is_written(text, words, prepare, tmp_path):
    (tmp_path / 'chats.jsonl').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError) as error:
        prepare(tmp_path / 'chats.jsonl', '--name=mine')
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words)
    assert [p.name for p in prepare.data.iterdir()] == ['chat'] and len([*prepare.data.rglob('*')]) == 3


@pytest.mark.parametrize('args, words', [
    (['--tokenizer=words'], ['tokenizer=words', 'bpe, gpt2, char']), (['--name=a/b'], ['name=a/b']),
    (['--vocab_size=259'], ['vocab_size=259', '260']), (['--vocab_size=65537'], ['65536']),
    (['--val_fraction=1'], ['val_fraction=1']),
])
def test_setting_that_can_not_be_is_one_line(args, words, prepare):
    with pytest.raises(ValueError) as error:
        prepare(*args)
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize('tokenizer', ['bpe', 'char', 'gpt2'])
def test_prepared_conversations_are_those_of_the_file(tokenizer, prepare, request, capsys):
    if tokenizer == 'gpt2':
        request.getfixturevalue('bpe')
    folder = prepare(f'--tokenizer={tokenizer}', '--val_fraction=0.2')
    coder, found = read_tokenizer(folder), []
    splits = {split: open_split(folder, split) for split in ('train', 'val')}
    for split in splits.values():
        begins = np.flatnonzero(split.mask == BEGIN).tolist()
        found += [coder.decode(split[a:b].tolist()) for a, b in zip(begins, [*begins[1:], len(split)])]
    template = splits['train'].template
    assert template == splits['val'].template == template_for(coder)
    assert sorted(found) == sorted(render(messages, template) for messages in read_conversations(EXAMPLE))
    assert (splits['val'].mask == BEGIN).sum() == 24
    assert '117 conversations' in capsys.readouterr().out


def test_text_in_the_same_folder_leaves_no_mask_behind(prepare):
    folder = prepare('--tokenizer=char')
    write_text_dataset(folder, 'abc' * 100, 'char', 'a test')
    assert not [*folder.glob('*.mask')] and open_split(folder, 'train').tolist()[:3] == [0, 1, 2]


# ---------------------------------------------------------------------------- a dialogue

TEXT = PLAIN | {'end': END}


def dialogue(block_size):
    return Dialogue(TEXT, list, block_size)  # a character is a token


def asking(*messages):
    return render([*messages], TEXT, is_question=True)


def test_dialogue_keeps_what_was_said():
    talk = dialogue(1000)
    for question, answer in (('Hi', 'Hello'), ('How?', 'Well')):
        prompt = talk.ask(question, 100)
        talk.hear(answer)
    assert prompt == asking(*say('Hi', 'Hello', 'How?'))
    assert talk.ask('Why?', 100) == asking(*say('Hi', 'Hello', 'How?', 'Well', 'Why?'))
    assert talk.obeys('/new') and talk.ask('Why?', 100) == asking(*say('Why?'))


def test_full_dialogue_drops_its_oldest_turns_and_keeps_the_instruction():
    talk, instruction = dialogue(400), {'role': 'system', 'content': 'Be brief.'}
    assert talk.obeys('/system Be brief.') and talk.obeys('') and not talk.obeys('Hi')
    said = []
    for i in range(8):
        said.append(f'Question {i}')
        prompt = talk.ask(said[-1], 150)
        most = next(text for n in range(0, 15, 2)
                    if len(text := asking(instruction, *say(*said[n:]))) <= 250)  # that fits
        assert prompt == most
        said.append(f'Answer {i}')
        talk.hear(said[-1])
    assert 1 < prompt.count('Question') < 8
    assert talk.ask('x' * 300, 150) == asking(instruction, *say('x' * 300))  # the question is never dropped
    talk = dialogue(400)
    talk.ask('x' * 50, 10_000), talk.hear('y' * 50)
    assert talk.ask('z', 10_000) == asking(*say('x' * 50, 'y' * 50, 'z'))  # half of block_size is theirs
    talk.hear('y' * 50)
    assert talk.ask('z', 10_000) == asking(*say('z', 'y' * 50, 'z'))
    assert talk.ask('z', 1) == asking(*say('x' * 50, 'y' * 50, 'z', 'y' * 50, 'z'))


# ---------------------------------------------------------------------------- the whole path

@pytest.fixture(scope='module')
def answering(tmp_path_factory):
    """A folder with data and a run of config/train_chat_cpu.py, shorter, on the example."""
    return tmp_path_factory.mktemp('answering')


LITTLE = ('--block_size=80', '--n_embd=64', '--max_iters=120', '--lr_decay_iters=120', '--eval_interval=120',
          '--learning_rate=6e-3')


@pytest.fixture
def trained(answering, prepare, train):
    if not (answering / 'out').exists():
        shutil.copytree(prepare(), answering / 'data')
        train(ROOT / 'config/train_chat_cpu.py', f'--out_dir={answering / "out"}', *LITTLE,
              data_dir=answering / 'data', out_dir=answering / 'out')
    return answering / 'out'


def first_questions():
    return [(messages[0]['content'], messages[1]['content']) for messages in read_conversations(EXAMPLE)
            if len(messages) == 2]


def test_model_trained_on_the_example_answers_it(trained, run_here, tmp_path):
    split = open_split(trained.parent / 'data', 'train')
    learned = read_tokenizer(trained.parent / 'data').decode(split[:].tolist())
    asked = [(q, a) for q, a in first_questions() if render(say(q, a), split.template) in learned][::3]
    (tmp_path / 'asked.txt').write_text('\n'.join(question for question, _ in asked), encoding='utf-8')
    log = run_here('sample.py', f'--out_dir={trained}', '--chat=True', f'--prompts={tmp_path / "asked.txt"}',
                   '--num_samples=1', '--temperature=0', '--device=cpu', '--max_new_tokens=60')['log']
    answers = log.split('\ndevice: ')[-1].split('\n', 1)[1].split('\n---------------\n')[:-1]
    wrong = [said for said, (_, answer) in zip(answers, asked, strict=True) if said.strip() != answer]
    assert len(asked) > 30 and len(wrong) <= 1, wrong


def test_checkpoint_and_export_know_the_template(trained, run_here, tmp_path):
    from transformers import pipeline
    state = checkpoint.load(trained / 'ckpt.pt')
    coder = read_tokenizer(trained.parent / 'data')
    assert state['chat'] == template_for(coder)
    run_here('export.py', f'--out_dir={trained}', f'--export_dir={tmp_path / "exported"}')
    ask = pipeline('text-generation', model=str(tmp_path / 'exported'), device='cpu')
    question, answer = first_questions()[0]
    said = ask(say(question), do_sample=False, max_new_tokens=60, max_length=None)[0]['generated_text'][-1]
    assert said == {'role': 'assistant', 'content': answer}


def test_interactive_chat_keeps_the_conversation(trained, run_here, monkeypatch):
    question = 'What does top_k do?'
    lines = iter([question, question, '/new', question, '/quit'])
    monkeypatch.setattr(builtins, 'input', lambda prompt='': next(lines))
    found = run_here('sample.py', f'--out_dir={trained}', '--chat=True', '--interactive=True',
                     '--temperature=0', '--device=cpu')
    answer = 'It limits the choice of each token to the k likeliest.\n[seed'
    assert found['log'].count('User:') == 0 and END not in found['log']
    assert found['log'].count(answer) >= 2 and found['log'].count('ended by stop') == 3
    assert len(found['dialogue'].messages) == 2


def test_chat_with_a_model_of_other_text_is_refused(train, run_here, tmp_path):
    train('--max_iters=1')
    assert checkpoint.load(tmp_path / 'out/ckpt.pt')['chat'] is None
    with pytest.raises(ValueError, match='was not trained on conversations, so chat=True'):
        run_here('sample.py', f'--out_dir={tmp_path / "out"}', '--chat=True', '--start=Hi', '--device=cpu')
    with pytest.raises(ValueError, match='chat=True takes questions'):
        run_here('sample.py', f'--out_dir={tmp_path / "out"}', '--chat=True')


def test_example_names_only_what_exists():
    for messages in read_conversations(EXAMPLE):
        for m in messages[1::2]:
            for script, rest in re.findall(r'python ((?:data/\w+/)?\w+\.py)([^,;]*)', m['content']):
                assert (ROOT / script).exists(), script
                assert {*re.findall(r'--(\w+)', rest)} <= settings(script) | {'help'}, rest
            for path in re.findall(r'config/\w+\.py', m['content']):
                assert (ROOT / path).exists(), path
