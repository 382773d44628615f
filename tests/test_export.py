"""export.py: the folder that it writes, as transformers and as our own scripts read it."""

import json
import types

import pytest
import torch

from model import GPT, GPTConfig
from support.network.decoding import generate as generate_fast
from support.run import checkpoint
from support.run.state import model_args
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer

LLAMA = {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'bias': False, 'n_kv_head': 1}
CHARS = CharTokenizer.of_text('abcdefghijk .,\n')


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint of a random model, its vocabulary padded; gives the model."""
    def write(tokenizer=CHARS, **changes):
        model = GPT(GPTConfig(**{'block_size': 48, 'vocab_size': tokenizer.n_vocab + 13, 'n_layer': 2,
                                 'n_head': 2, 'n_embd': 32} | changes)).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(mean=float('ln_' in name), std=0.2)
            model.lm_head.weight[tokenizer.n_vocab:] *= 5  # padding that would win if it could
        checkpoint.save(tmp_path / 'run/ckpt.pt', {
            'model': model.state_dict(), 'model_args': model_args(model.config), 'iter_num': 250,
            'best_val_loss': 1.5, 'tokenizer': tokenizer.to_dict(), 'data': {'train': '0a1b'},
            'config': {'dataset': 'poems', 'learning_rate': 0.001, 'data_dir': '/home/me/verses'}})
        return model
    return write


@pytest.fixture
def export(run_here, tmp_path):
    def run(*args):
        run_here('export.py', f'--out_dir={tmp_path}/run', f'--export_dir={tmp_path}/exported', *args)
        return tmp_path / 'exported'
    return run


def test_newest_state_is_exported_where_there_is_no_ckpt_pt(save, run_here, tmp_path):
    save()
    state = checkpoint.load(tmp_path / 'run/ckpt.pt') | {'optimizer': {}}
    checkpoint.save(tmp_path / 'run/latest.pt', state)
    (tmp_path / 'run/ckpt.pt').unlink()
    log = run_here('export.py', f'--out_dir={tmp_path}/run', f'--export_dir={tmp_path}/exported')['log']
    assert 'latest.pt, the state of iteration 250' in log and (tmp_path / 'exported/config.json').is_file()


@pytest.mark.parametrize('changes', [{'bias': True}, {'bias': False, 'tie_weights': False}, LLAMA], ids=str)
@pytest.mark.parametrize('ours', [CHARS, GPT2Tokenizer()], ids=['char', 'gpt2'])
def test_transformers_gives_the_same_logits_and_greedy_text(save, export, bpe, ours, changes):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    model, folder = save(ours, **changes), export()
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == (None if ours is CHARS else 50256)
    prompt = 'bad cafe,\n  head'
    ids = ours.encode(prompt)
    assert tokenizer(prompt)['input_ids'] == ids
    idx = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], rtol=0, atol=1e-5)
    expected = ours.decode(generate_fast(model, idx, 25, temperature=0, n_vocab=ours.n_vocab)[0].tolist())
    generate = pipeline('text-generation', model=str(folder))
    assert generate(prompt, max_new_tokens=25, do_sample=False)[0]['generated_text'] == expected
    assert len(generate(prompt, return_tensors=True)[0]['generated_token_ids']) <= 48  # no index out of range


@pytest.mark.parametrize('changes', [{'bias': True}, {'bias': False}, {'tie_weights': False, 'dropout': 0.25},
                                     {'activation': 'gelu_tanh'}], ids=str)
def test_round_trip_through_init_from_is_exact(save, export, changes):
    model = save(**changes)
    again = GPT.from_pretrained(str(export()))
    assert again.config == model.config
    weights, others = model.state_dict(), again.state_dict()
    assert list(weights) == list(others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_an_exported_folder_is_sampled_from_in_its_characters(save, export, run_here):
    save()
    done = run_here('sample.py', f'--init_from={export()}', '--start=bad', '--num_samples=1',
                    '--max_new_tokens=5', '--device=cpu')
    assert set(done['log'].splitlines()[-2]) <= set(CHARS.stoi)


def test_the_folder_is_what_the_hub_expects(save, export, tmp_path):
    save(bias=False)
    log = [{'iter': 200, 'train_loss': 9.0, 'val_loss': 9.0}, {'iter': 250, 'loss': 1.7},
           {'iter': 250, 'train_loss': 1.25, 'val_loss': 1.625}]
    (tmp_path / 'run/log.jsonl').write_text('{"iter": 250, "val_loss"\n' + '\n'.join(map(json.dumps, log)))
    folder = export()
    assert {path.name for path in folder.iterdir()} == {
        'model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json',
        'tokenizer_config.json', 'README.md'}
    config = json.loads((folder / 'config.json').read_text())
    assert config['architectures'] == ['GPT2LMHeadModel'] and config['eos_token_id'] is None
    card = (folder / 'README.md').read_text(encoding='utf-8')
    for told in ('| training | 1.2500 |', '| validation | 1.6250 |', '| best validation so far | 1.5000 |',
                 '| learning_rate | 0.001 |', '| dataset | verses |', '| n_embd | 32 |', 'iteration 250',
                 'library_name: transformers', "model='exported'", '| train SHA-256 | 0a1b |'):
        assert told in card, card
    assert '/home/me' not in card


def test_models_without_a_counterpart_are_refused_and_nothing_is_written(save, export, tmp_path):
    save(qk_norm=True, pos_emb='rope')
    with pytest.raises(ValueError, match='Llama, differs in activation=gelu, norm=layernorm, qk_norm=True'):
        export()
    assert not (tmp_path / 'exported').exists()


def test_push_uploads_the_folder(save, export, monkeypatch):
    calls = []
    api = types.SimpleNamespace(create_repo=lambda *a, **k: calls.append((a, k)),
                                upload_folder=lambda **k: calls.append(k))
    monkeypatch.setattr('huggingface_hub.HfApi', lambda: api)
    save()
    folder = export('--push=me/poems', '--private=True')
    assert calls[0] == (('me/poems',), {'private': True, 'exist_ok': True})
    assert calls[1]['repo_id'] == 'me/poems' and calls[1]['folder_path'] == folder
    assert set(calls[1]['allow_patterns']) == {path.name for path in folder.iterdir()}
    assert "model='me/poems'" in (folder / 'README.md').read_text(encoding='utf-8')


def test_a_failed_push_is_one_line(save, run_script, tmp_path):
    save()
    done = run_script('export.py', f'--out_dir={tmp_path}/run', f'--export_dir={tmp_path}/exported',
                      '--push=me/poems', env={'HF_HUB_OFFLINE': '1'}, ok=False)
    assert done.stderr.startswith('ValueError: ') and 'me/poems could not be uploaded' in done.stderr
    assert len(done.stderr.splitlines()) == 1 and (tmp_path / 'exported/model.safetensors').is_file()


@pytest.mark.parametrize('args, told', [
    (['--export_dir=FOLDER/file'], 'is a file: name a folder'),
    (['--export_dir=FOLDER'], 'of another program'),
    (['--push=no repository'], 'push=no repository is no name'), (['--push=a/b/c'], 'is no name'),
    (['--push=me/--x'], 'is no name'),
])
def test_what_cannot_be_meant_is_refused_before_anything_is_written(args, told, save, export, tmp_path):
    save()
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'config.json').write_text('mine')
    with pytest.raises(ValueError, match=told):
        export(*(arg.replace('FOLDER', str(tmp_path)) for arg in args))
    assert (tmp_path / 'config.json').read_text() == 'mine' and not (tmp_path / 'exported').exists()


def test_an_export_of_ours_is_replaced_and_another_s_files_only_when_asked(save, export, tmp_path):
    save()
    export()
    card = export() / 'README.md'
    card.write_text('another\'s')
    with pytest.raises(ValueError, match='--overwrite=True'):
        export()
    assert card.read_text() == 'another\'s'
    assert 'A GPT with' in (export('--overwrite') / 'README.md').read_text()


def test_names_are_escaped_in_the_model_card(save, export, tmp_path):
    save()
    name = 'a|b<i>\'*[x]`'
    card = (export(f'--export_dir={tmp_path}/{name}') and tmp_path / name / 'README.md').read_text()
    assert f'model={name!r}' in card and '# a\\|b\\<i\\>\'\\*\\[x\\]\\`' in card
