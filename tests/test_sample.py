"""sample.py and its prompt: what comes out, from what, and what is refused."""

import io
import json
import os
import re
import runpy
import select
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from model import GPT, GPTConfig
from support.sampling.decoding import Text, generate
from support.training import checkpoint
from support.sampling.prompt import Sampling, interact, obey
from support.training.state import config_from_args, model_args
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, read_tokenizer

LINE = '---------------\n'


def save(folder, model, tokenizer, **others):
    checkpoint.save(folder / 'ckpt.pt', {
        'model': model.state_dict(), 'model_args': model_args(model.config),
        'tokenizer': tokenizer.to_dict(), **others})


@pytest.fixture(scope='module')
def trained(tmp_path_factory, char_data):
    """A checkpoint of an untrained model on the characters of the small data, its vocabulary padded."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('trained')
    tokenizer = read_tokenizer(char_data)
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.n_vocab + 40, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() == 2 else 1)  # for the context to matter
    save(folder, model, tokenizer, iter_num=1, best_val_loss=3.0, config={'dataset': 'gone'})
    return folder


@pytest.fixture
def sample(trained, monkeypatch, capsys):
    """Runs sample.py in this process; gives what it printed."""
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['sample.py', f'--out_dir={trained}', '--device=cpu', *args])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        capsys.readouterr()
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
        return capsys.readouterr().out
    return run


def samples(out):
    """The samples of a run's output, without the line that names the machine and the overrides."""
    text = out.split('processes: 1\n', 1)[1]
    assert text.endswith('\n' + LINE)
    return [s.removesuffix('\n') for s in text.split(LINE)[:-1]]


def test_each_sample_is_followed_by_a_line(run_script, trained):
    found = samples(run_script('sample.py', f'--out_dir={trained}', '--num_samples=5', '--batch_size=2',
                               '--max_new_tokens=30', '--start=king', '--device=cpu').stdout)
    assert len(found) == 5 and len(set(found)) == 5
    assert all(s.startswith('king') and len(s) == 34 for s in found)


def test_temperature_0_is_greedy(sample):
    found = samples(sample('--num_samples=3', '--max_new_tokens=30', '--temperature=0', '--top_k=None'))
    assert len(found) == 3 and len(set(found)) == 1


def test_prompt_from_a_file_is_utf8_whatever_the_locale(run_script, tmp_path):
    tokenizer = CharTokenizer.of_text('äöü \n€')
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=8))
    save(tmp_path, model, tokenizer)
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('ä €', encoding='utf-8')
    env = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    found = samples(run_script('sample.py', f'--out_dir={tmp_path}', f'--start=FILE:{prompt}',
                               '--num_samples=1', '--max_new_tokens=5', env=env).stdout)
    assert found[0].startswith('ä €') and len(found[0]) == 8


def test_files_without_a_tokenizer_use_their_dataset_s(sample, trained, tmp_path, char_data):
    state = torch.load(trained / 'ckpt.pt')
    del state['tokenizer']
    state['config'] = {'dataset': 'x', 'data_dir': str(char_data)}
    torch.save(state, tmp_path / 'ckpt.pt')
    found = samples(sample(f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=5', '--start=queen'))
    assert found[0].startswith('queen') and len(found[0]) == 10


def test_samples_of_gpt2(sample, gpt2_folder, bpe):
    found = samples(sample(f'--init_from={gpt2_folder}', '--num_samples=2', '--start=1+1=',
                           '--max_new_tokens=10'))
    assert len(found) == 2 and all(s.startswith('1+1=') for s in found)


@pytest.mark.parametrize('args, reason', [
    (['--start=Zeus'], "not in this model's vocabulary: 'Z'"),
    (['--start=FILE:missing.txt'], 'missing.txt is missing'),
    (['--start='], 'gives no tokens'),
    (['--temperature=-1'], 'temperature must be at least 0'),
    ([f'--seed={10**22}'], 'seed must fit into 64 bits'),
    (['--out_dir=nowhere'], 'ckpt.pt is missing'),
    (['--top_p=0'], 'top_p must lie in (0, 1]'),
    (['--stop=["a", ""]'], 'neither a string nor a list of strings'),
    (['--prompts=missing.txt'], 'missing.txt is missing'),
    (['--interactive', '--json'], 'exclude each other'),
    (['--top_q=3'], 'Unknown config key: top_q (did you mean top_p or top_k or stop?)'),
])
def test_a_mistake_is_refused_in_one_line(sample, args, reason):
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        sample('--max_new_tokens=5', *args)
    assert reason in str(refused.value) and '\n' not in str(refused.value)


def test_a_damaged_checkpoint_is_one_line(run_script, trained, tmp_path):
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    path = tmp_path / 'ckpt.pt'
    path.write_bytes(path.read_bytes()[:-1000])
    done = run_script('sample.py', f'--out_dir={tmp_path}', ok=False)
    assert 'not a checkpoint, or a damaged one' in done.stderr and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------- streams, seeds, stop strings

def loaded(folder):
    state = torch.load(folder / 'ckpt.pt')
    model = GPT(config_from_args(state['model_args'])).eval()
    model.load_state_dict(state['model'])
    return model, CharTokenizer(state['tokenizer']['itos'])


def lines_of(out):
    """What --json=True printed."""
    return [json.loads(line) for line in out.splitlines()]


def test_streamed_text_equals_unstreamed(sample, trained):
    model, tokenizer = loaded(trained)
    idx = torch.tensor([tokenizer.encode('king')])
    expected = generate(model, idx, 60, 0.8, 200, n_vocab=tokenizer.n_vocab, n_samples=3, seeds=[5, 6, 7])
    found = samples(sample('--start=king', '--num_samples=3', '--max_new_tokens=60', '--seed=5'))
    assert found == [tokenizer.decode(row) for row in expected.tolist()]


def test_streamed_bytes_equal_unstreamed(sample, gpt2_folder, bpe):
    """Random byte pairs, many of which end inside a character."""
    model, tokenizer = GPT.from_pretrained(str(gpt2_folder)).eval(), GPT2Tokenizer()
    idx = torch.tensor([tokenizer.encode('\u20ac')])
    row = generate(model, idx, 200, 100.0, n_vocab=tokenizer.n_vocab, seeds=[1])[0].tolist()
    assert '\ufffd' in tokenizer.decode(row)
    found = sample(f'--init_from={gpt2_folder}', '--start=\u20ac', '--num_samples=1', '--max_new_tokens=200',
                   '--seed=1', '--temperature=100', '--top_k=None')
    assert samples(found) == [tokenizer.decode(row)]


def test_characters_of_several_tokens_are_shown_whole(bpe):
    tokenizer, text = GPT2Tokenizer(), 'na\u00efve \ud55c\uad6d\uc5b4 \U0001f600\U0001d6d1 \u20ac'
    ids = tokenizer.encode(text)
    assert sum('\ufffd' in tokenizer.decode([i]) for i in ids) > 5
    grown, pieces = Text(b'', len(ids)), []
    for i in ids:
        grown.add(tokenizer.decode_bytes([i]))
        pieces.append(grown.take())
    assert ''.join(pieces) == text


@pytest.mark.parametrize('interactive', [False, True])
def test_each_character_is_shown_as_soon_as_it_is_made(sample, monkeypatch, interactive):
    class Recorder(io.StringIO):
        flushed = []

        def flush(self):
            self.flushed.append(self.getvalue())

    typed = iter(['king', '/quit'])
    monkeypatch.setattr('builtins.input', lambda _: next(typed))
    monkeypatch.setattr(sys, 'stdout', Recorder())
    sample('--start=king', '--num_samples=1', '--max_new_tokens=20', f'--interactive={interactive}')
    text = sys.stdout.getvalue()
    begin = text.rindex('king')
    assert {text[:begin + n] for n in range(4, 24)} <= set(Recorder.flushed)


def test_a_sample_is_made_again_by_its_seed(sample, tmp_path):
    """Whatever the prompts beside it, their lengths, the number of samples and what a batch holds."""
    (tmp_path / 'prompts.txt').write_text('king\nthe queen and the day\n\nwar\r\n', newline='')
    args = (f'--prompts={tmp_path}/prompts.txt', '--num_samples=4', '--json=True', '--max_new_tokens=40')
    all_at_once, *others = (lines_of(sample(*args, f'--batch_size={n}')) for n in (32, 3, 1))
    assert [s['prompt'] for s in all_at_once] == ['king'] * 4 + ['the queen and the day'] * 4 + ['war'] * 4
    assert [s['seed'] for s in all_at_once] == list(range(1337, 1337 + 12))
    for made in others:
        assert [s | {'tokens_per_s': 0} for s in made] == [s | {'tokens_per_s': 0} for s in all_at_once]
    wanted = all_at_once[6]
    again, = samples(sample(f'--start={wanted["prompt"]}', '--num_samples=1', f'--seed={wanted["seed"]}',
                            '--max_new_tokens=40'))
    assert again == wanted['prompt'] + wanted['text'] and len(wanted['text']) == 40


def test_json_is_all_that_a_program_reads(run_script, trained):
    done = run_script('sample.py', '--json', f'--out_dir={trained}', '--start=day', '--num_samples=2',
                      '--max_new_tokens=7', '--device=cpu')
    for seed, found in enumerate(lines_of(done.stdout), 1337):
        assert found.pop('tokens_per_s') > 0 and len(found.pop('text')) == 7
        assert found == {'prompt': 'day', 'seed': seed, 'tokens': 7, 'ended': 'length'}
    assert 'device: cpu' in done.stderr


def test_stop_strings_end_samples_and_are_never_shown(sample):
    args = ('--start=king', '--num_samples=8', '--max_new_tokens=60', '--json=True')
    free = lines_of(sample(*args))
    stop = [free[0]['text'][20:22], free[1]['text'][30], 'never']
    for given, strings in ((str(stop), stop), (stop[0], stop[:1]), ('never', ['never']), ('None', [])):
        for found, whole in zip(lines_of(sample(*args, f'--stop={given}')), free, strict=True):
            ends = [whole['text'].index(s) + len(s) for s in strings if s in whole['text']]
            assert found['ended'] == ('stop' if ends else 'length')
            assert not any(s in found['text'] for s in strings)
            assert found['tokens'] == min(ends, default=60) and whole['text'].startswith(found['text'])
    assert all(s['ended'] == 'stop' for s in lines_of(sample(*args, '--stop= ')))


def test_a_stop_of_backslash_n_is_a_line_end(sample, tmp_path):
    tokenizer = CharTokenizer.of_text('a\n')
    model = GPT(GPTConfig(block_size=16, vocab_size=2, n_layer=1, n_head=1, n_embd=8))
    save(tmp_path, model, tokenizer)
    for given, n in ((r'\n', 1), (r'\n\n', 2), (r"['\n']", 1), ('\n', 1)):
        found = lines_of(sample(f'--out_dir={tmp_path}', '--num_samples=5', '--json=True', f'--stop={given}'))
        assert all(s['ended'] == 'stop' and '\n' * n not in s['text'] for s in found)
        assert any('\n' in s['text'] for s in found) == (n == 2)


def test_no_tokens_are_the_prompt(sample):
    assert samples(sample('--start=king', '--num_samples=2', '--max_new_tokens=0')) == ['king', 'king']


# ---------------------------------------------------------------------------- the prompt

class Terminal:
    """sample.py --interactive=True behind a pseudo-terminal, as its user sees it."""

    def __init__(self, *args):
        master, slave = os.openpty()
        self.master, self.seen = master, ''
        code = ('import fcntl, os, runpy, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); '
                'signal.signal(signal.SIGINT, signal.default_int_handler); '  # a background job ignores it
                'sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0])); '
                'runpy.run_path(sys.argv[0], run_name="__main__")')  # Ctrl-C needs a terminal of its own
        command = [sys.executable, '-c', code, str(ROOT / 'sample.py'), '--interactive=True', *args]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave,
                                        start_new_session=True, cwd=ROOT, env=os.environ | {'TERM': 'dumb'})
        os.close(slave)

    def type(self, text):
        os.write(self.master, text.encode())

    def until(self, pattern, seconds=60, press=''):
        """What is shown up to the next match of the pattern; keys pressed again after a second of silence."""
        end = time.monotonic() + seconds
        self.type(press)
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if not select.select([self.master], [], [], 1)[0]:
                self.type(press)
            else:
                try:
                    self.seen += os.read(self.master, 65536).decode().replace('\r\n', '\n')
                except OSError:  # the other end was closed
                    assert re.search(pattern, self.seen), self.seen
        shown, self.seen = self.seen[:found.end()], self.seen[found.end():]
        return shown


@pytest.mark.parametrize('line, name, value', [
    ('/max_new_tokens=30', 'max_new_tokens', 30), ('/max_new_tokens 30', 'max_new_tokens', 30),
    ('/temperature = 1', 'temperature', 1.0), ('/top_k None', 'top_k', None), ('/stop ==', 'stop', '='),
    ('/stop a b', 'stop', 'a b'), ("/stop=['a', 'b']", 'stop', "['a', 'b']"),
])
def test_a_command_changes_one_setting(line, name, value):
    before = Sampling()
    after, reply = obey(line, before)
    assert getattr(after, name) == value and reply == f'{name} = {value}'
    assert all(getattr(after, k) == v for k, v in vars(before).items() if k != name)
    assert obey(f'/{name}', after) == (after, reply)


def test_quit_followed_by_a_blank_is_quit(monkeypatch, capsys):
    lines = iter(['/quti', '/quit '])
    monkeypatch.setattr('builtins.input', lambda prompt: next(lines))
    interact(Sampling(), None)
    assert 'did you mean quit' in capsys.readouterr().out and not [*lines]


@pytest.mark.parametrize('name, value', [
    ('temperature', -0.1), ('top_k', 0), ('top_p', 0.0), ('top_p', 1.5), ('min_p', -0.1), ('min_p', 1.1),
    ('repetition_penalty', 0.0), ('max_new_tokens', -1), ('stop', '[1]'),
])
def test_a_setting_out_of_range_is_refused_by_name_and_value(name, value):
    for attempt in (lambda: Sampling(**{name: value}), lambda: obey(f'/{name}={value}', Sampling())):
        with pytest.raises(ValueError, match=rf'{name}.*{re.escape(str(value))}'):
            attempt()


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='this system has no pseudo-terminals')
def test_the_prompt_is_driven_as_by_a_user(trained, sample):
    once, = samples(sample('--start=king', '--num_samples=1', '--max_new_tokens=40', '--top_k=5'))
    greedy, = samples(sample('--start=king', '--num_samples=1', '--max_new_tokens=40', '--temperature=0'))
    user = Terminal(f'--out_dir={trained}', '--device=cpu', '--top_k=5', '--max_new_tokens=100000')
    try:
        user.until('> ')
        user.type('king\n')
        user.until('(?s)king\nking.{20}')  # it streams: the sample has just begun
        user.type('\x03')
        user.until('\n> ')
        for command, reply in (('/max_new_tokens=40', 'max_new_tokens = 40'), ('/seed', 'seed = 1337'),
                               ('/top_p 7', 'top_p must lie in'), ('/top_p', 'top_p = 1.0'),
                               ('/top_k x', 'takes int or None'), ('/topp 1', 'did you mean top_p'),
                               ('ZZZ', "not in this model's vocabulary: 'Z'"), ('/help', '/top_k 5\n')):
            user.type(command + '\n')
            user.until(reply + '.*(\n.*)*\n> ')
        user.type('king\n')
        assert f'\n{once}\n[seed 1337, 40 tokens, ' in user.until('ended by length\\]\n> ')
        user.type('/temperature 0\n')
        user.until('temperature = 0.0\n> ')
        user.type('\x10\x10\n')  # twice back in the history
        assert f'\n{greedy}\n[seed 1338, 40 tokens, ' in user.until('ended by length\\]\n> ')
        user.type('half a line')
        user.until('half a line')
        user.until('\n> ', press='\x03')  # readline may miss one that comes between two keys
        user.until('seed = 1339\n> ', press='/seed\n')  # one pressed too often has come by then
        user.type('\x04')
        assert user.process.wait(20) == 0
    finally:
        user.process.kill()
        user.process.wait()
        os.close(user.master)


@pytest.mark.skipif(sys.platform == 'win32', reason='bash')
def test_reader_that_has_read_enough_ends_the_sampling_without_a_traceback(trained, tmp_path):
    command = f'{sys.executable} {ROOT}/sample.py --out_dir={trained} --device=cpu --max_new_tokens=2000'
    done = subprocess.run(['bash', '-c', f'{command} | head -n 1'], capture_output=True, text=True, cwd=ROOT)
    assert 'Traceback' not in done.stderr and done.stderr.count('\n') <= 1 and done.stdout
