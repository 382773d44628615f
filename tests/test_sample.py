"""sample.py: what comes out, from what, and what is refused."""

import shutil

import pytest
import torch

import checkpoint
from dataset import CharTokenizer, read_tokenizer
from model import GPT, GPTConfig

LINE = '---------------\n'


@pytest.fixture(scope='module')
def trained(tmp_path_factory, char_data):
    """A checkpoint of an untrained model on the characters of the small data, its vocabulary padded."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('trained')
    tokenizer = read_tokenizer(char_data)
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.n_vocab + 40, n_layer=2, n_head=2, n_embd=32))
    checkpoint.save(folder / 'ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.to_args(),
                                         'iter_num': 1, 'best_val_loss': 3.0, 'config': {'dataset': 'gone'},
                                         'tokenizer': tokenizer.to_dict()})
    return folder


def samples(done):
    """The samples of a run, without the line that names the machine and the overrides."""
    text = done.stdout.split('processes: 1\n', 1)[1]
    assert text.endswith(LINE)
    return [s.removesuffix('\n') for s in text.split(LINE)[:-1]]


def test_each_sample_is_followed_by_a_line(run_script, trained):
    found = samples(run_script('sample.py', f'--out_dir={trained}', '--num_samples=5', '--batch_size=2',
                               '--max_new_tokens=30', '--start=king', '--device=cpu'))
    assert len(found) == 5 and len(set(found)) == 5
    assert all(s.startswith('king') and len(s) == 34 for s in found)


def test_temperature_0_is_greedy(run_script, trained):
    found = samples(run_script('sample.py', f'--out_dir={trained}', '--num_samples=3', '--max_new_tokens=30',
                               '--temperature=0', '--device=cpu', '--top_k=None'))
    assert len(found) == 3 and len(set(found)) == 1


def test_prompt_from_a_file_is_utf8_whatever_the_locale(run_script, tmp_path):
    tokenizer = CharTokenizer.of_text('äöü \n€')
    model = GPT(GPTConfig(block_size=16, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save(tmp_path / 'ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.to_args(),
                                           'tokenizer': tokenizer.to_dict()})
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('ä €', encoding='utf-8')
    env = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    found = samples(run_script('sample.py', f'--out_dir={tmp_path}', f'--start=FILE:{prompt}',
                               '--num_samples=1', '--max_new_tokens=5', env=env))
    assert found[0].startswith('ä €') and len(found[0]) == 8


def test_files_without_a_tokenizer_use_their_dataset_s(run_script, trained, tmp_path, char_data):
    state = torch.load(trained / 'ckpt.pt')
    del state['tokenizer']
    state['config'] = {'dataset': 'x', 'data_dir': str(char_data)}
    torch.save(state, tmp_path / 'ckpt.pt')
    found = samples(run_script('sample.py', f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=5',
                               '--start=queen'))
    assert found[0].startswith('queen') and len(found[0]) == 10


def test_samples_of_gpt2(run_script, gpt2_folder, bpe):
    found = samples(run_script('sample.py', f'--init_from={gpt2_folder}', '--num_samples=2', '--start=1+1=',
                               '--max_new_tokens=10', '--device=cpu'))
    assert len(found) == 2 and all(s.startswith('1+1=') for s in found)


@pytest.mark.parametrize('args, reason', [
    (['--start=Zeus'], "not in this model's vocabulary: 'Z'"),
    (['--start=FILE:missing.txt'], 'missing.txt is missing'),
    (['--start='], 'gives no tokens'),
    (['--temperature=-1'], 'temperature must be at least 0'),
    (['--out_dir=nowhere'], 'ckpt.pt is missing'),
    (['--top_q=3'], 'Unknown config key: top_q (did you mean top_k?)'),
])
def test_a_mistake_is_one_line(run_script, trained, args, reason):
    done = run_script('sample.py', f'--out_dir={trained}', '--max_new_tokens=5', *args, ok=False)
    assert reason in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_damaged_checkpoint_is_one_line(run_script, trained, tmp_path):
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    path = tmp_path / 'ckpt.pt'
    path.write_bytes(path.read_bytes()[:-1000])
    done = run_script('sample.py', f'--out_dir={tmp_path}', ok=False)
    assert 'not a checkpoint, or a damaged one' in done.stderr and len(done.stderr.splitlines()) == 1
