"""Models of Hugging Face's format: each family against transformers, their files, names of the hub."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, tiny
from runs import equal

from model import GPT, KVCache
from support.hub.exporting import to_transformers
from support.hub.huggingface import folder_tokenizer, load_pretrained, own_tokenizer, read_pretrained
from support.text.bpe import train_bpe
from support.text.tokenizer import GPT2Tokenizer, NoTokenizer
from support.training.models import model_args

SMALL = {'vocab_size': 64, 'hidden_size': 48, 'intermediate_size': 80, 'num_hidden_layers': 2,
         'num_attention_heads': 6, 'max_position_embeddings': 64, 'num_key_value_heads': 2}
SMOLLM = SMALL | {  # as published, but for its sizes
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
    'bos_token_id': 0, 'eos_token_id': 0, 'hidden_act': 'silu', 'initializer_range': 0.02,
    'is_llama_config': True, 'mlp_bias': False, 'model_type': 'llama', 'pretraining_tp': 1,
    'rms_norm_eps': 1e-05, 'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000,
    'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version': '4.40.1',
    'use_cache': True}
UNTIED = SMALL | {'hidden_act': 'silu', 'rms_norm_eps': 1e-05, 'tie_word_embeddings': False}
MISTRAL = UNTIED | {'model_type': 'mistral', 'rope_theta': 10000.0}
FAMILIES = {  # a key that is missing has transformers' default
    'SmolLM 2': SMOLLM,
    'Llama 2': UNTIED | {'model_type': 'llama', 'num_key_value_heads': 6, 'rope_scaling': None},
    'Llama 3.2': UNTIED | {
        'model_type': 'llama', 'head_dim': 16, 'tie_word_embeddings': True, 'rope_theta': 500000.0,
        'rope_scaling': {'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
                         'original_max_position_embeddings': 16, 'rope_type': 'llama3'}},
    'Mistral': MISTRAL | {'sliding_window': 24},
    'Mistral 0.3': MISTRAL | {'sliding_window': None},
    'Qwen 2': UNTIED | {
        'model_type': 'qwen2', 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 16,
        'use_sliding_window': False, 'max_window_layers': 2, 'tie_word_embeddings': True},
    'all biases': SMOLLM | {'attention_bias': True, 'mlp_bias': True, 'rms_norm_eps': 1e-3},
    'biases of attention': SMOLLM | {'attention_bias': True, 'attention_dropout': 0.25},
    'biases of the MLP': SMOLLM | {'mlp_bias': True, 'head_dim': 4},
    'no number of key heads': {k: v for k, v in SMOLLM.items() if k != 'num_key_value_heads'},
}


def folder_of(folder, config, **how):
    """A folder as transformers saves it, of random weights, norms and biases, with the config.json
    of an earlier version, as published."""
    from transformers import AutoConfig, AutoModelForCausalLM
    (folder / 'config.json').write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(mean=float('norm' in name), std=0.2)
    theirs.bfloat16().save_pretrained(folder, **how)
    (folder / 'config.json').write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_a_family_computes_what_transformers_does_and_comes_back_bit_for_bit(family, tmp_path, capsys):
    from transformers import AutoModelForCausalLM
    config = FAMILIES[family]
    theirs = folder_of(tmp_path, config, max_shard_size='20KB')
    assert len([*tmp_path.glob('model-*-of-*.safetensors')]) > 2
    ours = load_pretrained(str(tmp_path)).eval()
    window = 24 if family == 'Mistral' else 64  # transformers masks what is further back
    assert ours.config.block_size == window
    assert ('looks back sliding_window=24' in capsys.readouterr().out) == (window == 24)
    assert ours.config.dropout == config.get('attention_dropout', 0.0)
    idx, cache = torch.randint(64, (3, window)), KVCache(window)
    expected = theirs(idx).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(idx, idx)[0], expected, rtol=0, atol=1e-4)
    for start, end in [(0, 10), *((i, i + 1) for i in range(10, window))]:
        logits = ours(idx[:, start:end], cache=cache)[0][:, -1]
        torch.testing.assert_close(logits, expected[:, end - 1], rtol=0, atol=1e-4)

    config, weights = to_transformers(model_args(ours.config), ours.state_dict())
    again = AutoModelForCausalLM.from_config(config).eval()
    again.load_state_dict(weights, strict=False)
    assert config.model_type == 'llama'
    assert all(torch.equal(weights[k], v) for k, v in theirs.state_dict().items() if k in weights)
    assert theirs.state_dict().keys() - weights.keys() <= {'lm_head.weight'}
    torch.testing.assert_close(again(idx).logits, expected, rtol=0, atol=1e-5)


def test_weights_keep_the_number_type_of_the_files_until_they_are_used(llama):
    assert {t.dtype for t in read_pretrained(str(llama))[1].values()} == {torch.bfloat16}
    small = load_pretrained(str(llama), dtype=None)
    assert small.lm_head.weight.dtype == torch.bfloat16
    assert small.lm_head.weight is small.transformer.wte.weight
    assert {p.dtype for p in load_pretrained(str(llama)).parameters()} == {torch.float32}


# ---------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize('changes, named', [
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"), ({'model_type': 'gemma2'}, "of type 'gemma2'"),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}, "rope_type='linear'"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_type='dynamic'"),
    ({'rope_scaling': {'rope_type': 'mine'}}, "rope_type='mine'"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'num_attention_heads': 0}, 'num_attention_heads=0'), ({'num_attention_heads': 5}, "can't be used"),
    ({'hidden_size': 'wide'}, "hidden_size='wide'"), ({'vocab_size': -3}, 'vocab_size=-3'),
    ({'model_type': 'gpt2', 'activation_function': 'silu'}, "activation_function='silu'"),
    ({'model_type': 'gpt2', 'scale_attn_weights': False}, 'scale_attn_weights=False'),
    ({'model_type': 'gpt2', 'n_head': 0}, 'n_head=0'), ({'model_type': 'own_gpt'}, 'no model_args'),
    ({'model_type': 'own_gpt', 'model_args': {'odd': 1}}, "model_args that don't exist here: odd"),
], ids=str)
def test_a_model_that_is_not_computed_is_refused_by_name_before_its_weights_are_read(
        changes, named, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(SMOLLM | changes))
    (tmp_path / 'model.safetensors').write_text('nothing that can be read')
    assert named in refusal(tmp_path) and str(tmp_path) in refusal(tmp_path)


def refusal(folder):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_pretrained(str(folder))
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope='module')
def made_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp('llama')
    folder_of(folder, SMOLLM)
    return folder


@pytest.fixture
def llama(made_llama, tmp_path):
    """A folder with a Llama, of the test's own."""
    return shutil.copytree(made_llama, tmp_path / 'llama', dirs_exist_ok=True)


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / 'config.json').read_text()) | changes
        (folder / 'config.json').write_text(json.dumps(config))
    return change


def change_weights(edit):
    def change(folder):
        from safetensors.torch import load_file, save_file
        weights = load_file(folder / 'model.safetensors')
        edit(weights, UP if UP in weights else 'transformer.h.1.mlp.c_fc.weight')
        save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    return change


def truncate(size):
    def change(folder):
        os.truncate(folder / 'model.safetensors', size)
    return change


def add_index(text, *names):
    """An index of files, of which model.safetensors lies one folder higher."""
    def change(folder):
        (folder / 'model.safetensors').rename(folder.parent / 'model.safetensors')
        content = text or json.dumps({'weight_map': {f'tensor {name}': name for name in names}})
        (folder / 'model.safetensors.index.json').write_text(content)
    return change


UP = 'model.layers.1.mlp.up_proj.weight'
SPOILED = [
    (change_weights(lambda w, name: w.pop(name)), 'missing: .*(up_proj|c_fc).weight'),
    (change_weights(lambda w, name: w.update(extra=torch.ones(3))), 'unexpected: extra'),
    (change_weights(lambda w, name: w.update({name: w[name][:16].clone()})), 'mismatched: .*c_fc.weight'),
    (change_weights(lambda w, name: w[name].view(-1)[7].fill_(float('nan'))), 'not finite: .*c_fc.weight'),
    (change_weights(lambda w, name: w.update({'lm_head.weight': torch.ones(64, 48)})),
     'mismatched|ties lm_head'),
    (truncate(0), "can't be read"), (truncate(7), "can't be read"), (truncate(500), "can't be read"),
]
SPOILED_LLAMA = [
    (change_config(num_hidden_layers=10**7), 'asks for 10,000,000 layers'),
    (change_config(vocab_size=10**9), 'mismatched'), (change_config(intermediate_size=10**6), 'mismatched'),
    (change_config(tie_word_embeddings=False), 'missing: lm_head.weight'),
    (add_index('', '../model.safetensors'), 'names ../model.safetensors, which is no file of its folder'),
    (add_index('', '/etc/passwd'), 'names /etc/passwd'), (add_index('', '..'), 'which is no file'),
    (add_index('', 'model-1-of-2.safetensors'), 'model-1-of-2.safetensors is missing'),
    (add_index('{"weight_map": 5}'), 'is no index of weights'),
    (add_index('nonsense'), 'is no index of weights'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'no model.safetensors'),
]


@pytest.mark.parametrize('kind, change, told', [
    *(('gpt2', *row) for row in SPOILED), *(('llama', *row) for row in SPOILED + SPOILED_LLAMA)])
def test_files_that_do_not_hold_what_the_config_says_are_refused_in_one_line(
        kind, change, told, llama, gpt2_folder):
    folder = llama if kind == 'llama' else gpt2_folder
    change(folder)
    assert re.search(told, refusal(folder))


def test_a_gpt2_is_the_same_however_its_files_were_written_and_no_pickle_runs_code(
        gpt2_folder, tmp_path):
    from safetensors.torch import load_file
    expected = GPT.from_pretrained(str(gpt2_folder)).state_dict()

    def found():
        return load_pretrained(str(gpt2_folder)).state_dict()
    assert equal(found(), expected)
    change_weights(lambda w, _: w.update({
        'transformer.h.0.attn.bias': torch.ones(1, 1, 64, 64),
        'transformer.h.0.attn.masked_bias': torch.tensor(-1e4)}))(gpt2_folder)
    assert equal(found(), expected)
    weights = load_file(gpt2_folder / 'model.safetensors')
    (gpt2_folder / 'model.safetensors').unlink()
    for is_archive in (True, False):  # as transformers wrote them, OpenAI's names have no prefix
        torch.save({k.removeprefix('transformer.'): v for k, v in weights.items()},
                   gpt2_folder / 'pytorch_model.bin', _use_new_zipfile_serialization=is_archive)
        assert equal(found(), expected)
    change_config(layer_norm_epsilon=1e-6)(gpt2_folder)
    assert load_pretrained(str(gpt2_folder)).config.norm_eps == 1e-6

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)
    torch.save({'wte.weight': Code()}, gpt2_folder / 'pytorch_model.bin')
    assert "pytorch_model.bin can't be read" in refusal(gpt2_folder) and not (tmp_path / 'ran').exists()


def test_biases_that_were_trained_elsewhere_are_kept(tmp_path):
    from transformers import AutoModelForCausalLM
    model = tiny(bias=False)
    config, weights = to_transformers(model_args(model.config), model.state_dict())
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(weights, strict=False)
    for is_changed in (False, True):
        with torch.no_grad():
            theirs.transformer.h[1].mlp.c_fc.bias[3] = float(is_changed)
        theirs.save_pretrained(tmp_path)
        assert load_pretrained(str(tmp_path)).config.bias is is_changed


# ---------------------------------------------------------------------------- names

def loaded_by_name(folder, names, **env):
    """A line for each name: width and files of the model, or the error. In a process of its own,
    with an empty working folder and a cache of its own."""
    program = f'''import os, sys
sys.path.insert(0, {str(ROOT)!r})
from support.hub.huggingface import load_pretrained
from support.hub.names import model_folder
for name in {names}:
    try:
        print(load_pretrained(name).config.n_embd, sorted(os.listdir(model_folder(name))))
    except (ValueError, OSError) as error:
        print(type(error).__name__, error)
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=folder, text=True, capture_output=True,
                          env=os.environ | {'HF_HOME': str(folder / 'cache')} | env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_lines(lines, patterns):
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.match(pattern, line), line


def test_without_a_network_the_cache_is_used_under_either_name_and_others_are_one_line(
        tmp_path, gpt2_folder):
    snapshot = tmp_path / 'cache/hub/models--openai-community--gpt2/snapshots/abc'
    (snapshot.parents[1] / 'refs').mkdir(parents=True)
    (snapshot.parents[1] / 'refs/main').write_text('abc')
    shutil.move(gpt2_folder, snapshot)
    (tmp_path / 'gpt2').mkdir()  # the name is the hub's, though a folder of that name lies here
    names = ['gpt2', 'gpt2-xl', 'me/model', 'gone', '../model', 'a/b/c']
    assert_lines(loaded_by_name(tmp_path, names, HF_HUB_OFFLINE='1'), [
        r"32 \['config.json', .*'model.safetensors'\]",
        "MissingFile can't reach huggingface.co, and gpt2-xl is not in its cache",
        "MissingFile can't reach huggingface.co, and me/model is not in its cache",
        'MissingFile gone is neither one of gpt2, .* nor a folder .* nor a name of the hub',
        'MissingFile ../model is neither one of', 'MissingFile a/b/c is neither'])


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does, from the server's folder, and notes which files are read."""

    def do_GET(self):
        code, body, headers = self.reply()
        self.send_response(code)
        for name, value in (headers | {'Content-Length': len(body), 'Content-Type': 'x'}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    do_HEAD = do_GET

    def reply(self):
        """Status, body and headers of a model's list of files, or of a file."""
        path = self.path.split('?')[0]
        if found := re.fullmatch(r'/api/models/(.+/.+)/(revision|tree)/\w+', path):
            folder = self.server.folder / found[1]
            if not folder.is_dir():
                return 404, b'{}', {'X-Error-Code': 'RepoNotFound'}
            tree = [{'type': 'file', 'path': p.name, 'size': p.stat().st_size, 'oid': p.name}
                    for p in folder.iterdir()]
            info = {'id': found[1], 'sha': 'a' * 40, 'siblings': [{'rfilename': f['path']} for f in tree]}
            return 200, json.dumps(tree if found[2] == 'tree' else info).encode(), {}
        model, name = re.fullmatch(r'/(.+/.+)/resolve/\w+/(.+)', path).groups()
        if model.startswith('gated/'):
            return 403, b'{}', {'X-Error-Code': 'GatedRepo'}
        if self.command == 'GET':
            self.server.asked.append(name)
        body = (self.server.folder / model / name).read_bytes()
        return 200, body, {'ETag': f'"{name}"', 'X-Repo-Commit': 'a' * 40}

    def log_message(self, *_):
        pass


def test_only_what_is_needed_is_downloaded_and_what_may_not_be_is_one_line(tmp_path, made_llama):
    for name in ('model', 'other', 'none'):
        shutil.copytree(made_llama, tmp_path / 'hub/me' / name)
    for name in ('pytorch_model.bin', 'model.gguf', 'flax_model.msgpack', 'README.md'):
        (tmp_path / 'hub/me/model' / name).write_text('not needed')
    change_config(hidden_act='gelu')(tmp_path / 'hub/me/other')
    (tmp_path / 'hub/me/none/config.json').unlink()
    shutil.copytree(made_llama, tmp_path / 'hub/gated/model')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), FakeHub)
    server.folder, server.asked = tmp_path / 'hub', []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ['me/model', 'me/other', 'gated/model', 'private/model', 'me/none']
    found = loaded_by_name(tmp_path, names, HF_HUB_OFFLINE='0',
                           HF_ENDPOINT=f'http://127.0.0.1:{server.server_address[1]}')
    server.shutdown()
    assert_lines(found, [
        r"48 \['config.json', 'generation_config.json', 'model.safetensors'\]",
        'UserError me/other .*hidden_act=', 'UserError gated/model is gated: .*login',
        'MissingFile private/model is no folder .* hf auth login', 'MissingFile me/none has no config.json'])
    assert server.asked.count('model.safetensors') == 1  # me/model's alone
    assert {*server.asked} == {'config.json', 'generation_config.json', 'model.safetensors'}


def test_a_model_s_tokenizer_is_its_own_or_gpt2_s_by_size(llama):
    for size, kind in ((50257, GPT2Tokenizer), (51200, NoTokenizer), (64, NoTokenizer)):
        change_config(vocab_size=size)(llama)
        assert own_tokenizer(str(llama)) is None and isinstance(folder_tokenizer(str(llama)), kind)
    (llama / 'tokenizer.json').write_text(train_bpe(['a b c'], 300).json)
    with pytest.raises(ValueError, match='ids up to 256, its model rows for 64'):
        folder_tokenizer(str(llama))
    change_config(vocab_size=512, eos_token_id=[7, 9])(llama)
    (llama / 'generation_config.json').unlink()
    assert folder_tokenizer(str(llama)).ends == (7, 9) and folder_tokenizer(str(llama)).end == 0
    (llama / 'generation_config.json').write_text('{"eos_token_id": 5}')
    assert folder_tokenizer(str(llama)).ends == (5,)
