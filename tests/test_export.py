"""export.py: the folder that it writes, as transformers and as our own scripts read it."""

import itertools
import json
import os
import sys
import types

import pytest
import torch
from conftest import ROOT
from test_chat import chat_form, say

from model import GPT, GPTConfig
from support.hub.huggingface import chat_template, folder_tokenizer, load_pretrained
from support.sampling.decoding import generate as generate_fast
from support.text.chat import ChatForm
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer
from support.training.models import model_args
from support.training.state import State

LLAMA = {'pos_emb': 'rope', 'norm': 'rmsnorm', 'activation': 'swiglu', 'bias': False, 'n_kv_head': 1}
WIDE = {
    'head_size': 12,
    'n_inner': 40,
    'norm_eps': 1e-6,
    'rope_theta': 500.0,
    'rope_scaling': (8.0, 1.0, 4.0, 16.0),
}
RECIPE = {'pos_emb': 'rope', 'activation': 'swiglu', 'qk_norm': True, 'value_residual': True, 'ngram': 4,
          'ngram_rows': 512, 'n_kv_head': 1, 'bias': False}  # as config/best_shakespeare_char_cpu.py
CHARS = CharTokenizer.of_text('abcdefghijk .,\n')
FULL = {'vocab_size': CHARS.n_vocab}  # as train.py makes it: each id is a character


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint of a random model, its vocabulary padded; gives the model."""
    def write(tokenizer=CHARS, chat=None, config=None, name='ckpt.pt', **changes):
        model = GPT(GPTConfig(**{'block_size': 48, 'vocab_size': tokenizer.n_vocab + 13, 'n_layer': 2,
                                 'n_head': 2, 'n_embd': 32} | changes)).eval()
        with torch.no_grad():
            for p_name, p in model.named_parameters():
                p.normal_(mean=float('ln_' in p_name), std=0.2)
            model.lm_head.weight[tokenizer.n_vocab:] *= 5  # padding that would win if it could
        settings = {'dataset': 'poems', 'learning_rate': 0.001, 'data_dir': '/home/me/verses'}
        (tmp_path / 'run').mkdir(exist_ok=True)
        State(model=model.state_dict(), model_args=model_args(model.config), iter_num=250, best_val_loss=1.5,
              tokenizer=tokenizer.to_dict(), data={'train': '0a1b'}, config=settings | (config or {}),
              chat=chat, optimizer={} if name != 'ckpt.pt' else None).save(tmp_path / 'run' / name)
        return model
    return write


@pytest.fixture
def export(run_here, tmp_path):
    def run(*args):
        run_here('export.py', f'--out_dir={tmp_path}/run', f'--export_dir={tmp_path}/exported', *args)
        return tmp_path / 'exported'
    return run


def test_newest_state_is_exported_where_there_is_no_ckpt_pt(save, run_here, tmp_path):
    save(name='latest.pt')
    log = run_here('export.py', f'--out_dir={tmp_path}/run', f'--export_dir={tmp_path}/exported')['log']
    assert 'latest.pt, the state of iteration 250' in log and (tmp_path / 'exported/config.json').is_file()


@pytest.fixture(autouse=True, scope='module')
def modules_cache(tmp_path_factory):
    """Where transformers puts the code of folders."""
    from transformers import dynamic_module_utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
        patch.setattr(sys, 'path', [*sys.path])
        yield


BOTH = [{'bias': True}, {'bias': False, 'tie_weights': False}, LLAMA | WIDE]
ONLY_CHARS = [
    FULL,
    LLAMA | FULL,
    LLAMA | {'qkv_bias': True},
    RECIPE | FULL,
    {'attn_type': 'GK', 'tie_weights': False},
    {'pos_emb': 'alibi', 'activation': 'relu2'},
]


@pytest.mark.parametrize('ours, changes', [*itertools.product([CHARS, GPT2Tokenizer()], BOTH),
                                           *((CHARS, changes) for changes in ONLY_CHARS)],
                         ids=lambda x: str(x) if isinstance(x, dict) else x.to_dict()['kind'])
def test_transformers_gives_the_same_logits_and_greedy_text(save, export, bpe, ours, changes, caplog):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    from transformers.utils import logging
    model, folder = save(ours, **changes), export()
    trust = {'trust_remote_code': True} if (folder / 'model.py').exists() else {}
    theirs = AutoModelForCausalLM.from_pretrained(folder, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side='left', **trust)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == (None if ours is CHARS else 50256)
    prompts = ['bad cafe,\n  head', 'a']
    ids = [ours.encode(prompt) for prompt in prompts]
    assert tokenizer(prompts)['input_ids'] == ids
    n_vocab = model.config.vocab_size
    with torch.no_grad():
        idx = torch.tensor([ids[0]])
        found, ours_found = theirs(idx).logits[:, :, :n_vocab], model(idx, idx)[0]
        torch.testing.assert_close(found, ours_found, rtol=1e-6, atol=1e-5)
    expected = [ours.decode(generate_fast(model, torch.tensor([i]), 25, temperature=0, n_vocab=ours.n_vocab)[
        0].tolist()) for i in ids]
    logging.enable_propagation()
    generate = pipeline('text-generation', model=str(folder), **trust)
    assert generate(prompts[0], max_new_tokens=25, do_sample=False)[0]['generated_text'] == expected[0]
    assert len(generate(prompts[0], return_tensors=True)[0]['generated_token_ids']) <= 48  # block_size
    batch = tokenizer(prompts, padding=True, return_tensors='pt')
    assert set(batch) == {'input_ids', 'attention_mask'}
    out = theirs.generate(**batch, max_new_tokens=25, do_sample=False)
    assert tokenizer.batch_decode(out, skip_special_tokens=True) == expected
    assert not [record for record in caplog.records if record.levelname == 'WARNING']


def test_our_own_code_gives_padded_rows_the_logits_and_the_loss_of_whole_ones(save, export):
    from transformers import AutoModelForCausalLM
    model, folder = save(**RECIPE), export()
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    idx = torch.randint(CHARS.n_vocab, (4, 9))
    mask = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6, [1] * 5 + [0] * 4, [0, 1, 1, 0, 1, 1, 1, 0, 0]])
    idx[mask == 0] = CHARS.n_vocab + 13  # an id without a row
    found = theirs(idx, mask, labels=idx.masked_fill(mask == 0, -100))
    for row, which, logits in zip(idx, mask.bool(), found.logits):
        alone = row[which][None]
        torch.testing.assert_close(logits[which], model(alone, alone)[0][0], rtol=1e-5, atol=2e-5)
    alone = idx[:1]
    loss = theirs(alone, labels=alone).loss
    torch.testing.assert_close(loss, model(alone[:, :-1], alone[:, 1:])[1])
    with pytest.raises(AssertionError, match='49 positions, but block_size is 48'):
        theirs(torch.zeros(1, 49, dtype=torch.long))
    assert theirs.generate(torch.zeros(1, 47, dtype=torch.long), max_new_tokens=4).shape == (1, 51)


@pytest.mark.parametrize(
    'changes',
    [
        {'bias': True},
        {'bias': False},
        {'tie_weights': False, 'dropout': 0.25},
        {'activation': 'gelu_tanh'},
        FULL,
        LLAMA | WIDE,
        LLAMA | {'qkv_bias': True},
        {'norm_eps': 1e-6, 'n_inner': 40},
        LLAMA | FULL | {'tie_weights': False, 'dropout': 0.25},
        RECIPE,
        RECIPE | FULL,
    ],
    ids=str,
)
def test_round_trip_through_init_from_is_exact(save, export, changes):
    model = save(**changes)
    again = load_pretrained(str(export()))
    assert again.config == model.config
    weights, others = model.state_dict(), again.state_dict()
    assert list(weights) == list(others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_vocabulary_without_a_free_id_gets_one_that_is_as_unlikely_as_its_rarest_character(save, export):
    from transformers import AutoModelForCausalLM
    save(**FULL)
    theirs = AutoModelForCausalLM.from_pretrained(export())
    idx = torch.arange(CHARS.n_vocab)[:, None]
    with torch.no_grad():
        p = theirs(idx).logits[:, 0].softmax(dim=-1).amax(dim=0)
    assert len(p) == CHARS.n_vocab + 1 and p[-1] == p.min() and theirs.generation_config.suppress_tokens == [
        CHARS.n_vocab]


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


@pytest.mark.parametrize(
    'log',
    [
        b'{"iter": 250, "val_loss": "x"}',
        b'{"iter": 250, "val_loss": {"a": 1}, "train_loss": null}',
        b'\xff\xfe val_loss',
        b'["val_loss"]',
        b'{"val_loss"' + b'[' * 100_000,
        b'{"iter": 1e400, "val_loss": NaN}',
        b'\0' * 1000,
        b'',
    ],
    ids=lambda log: str(log[:20]),
)
def test_nothing_in_a_log_stops_an_export(log, save, export, tmp_path):
    save()
    (tmp_path / 'run/log.jsonl').write_bytes(
        log + b'\n{"iter": 250, "train_loss": 1.25, "val_loss": 1.625}\n' + log
    )
    assert '| nats per token |' in (export() / 'README.md').read_text(encoding='utf-8')


def test_an_export_publishes_no_path_and_nothing_that_is_not_listed(save, export, tmp_path):
    paths = {
        'out_dir': '/home/me/out',
        'data_dir': '/home/me/verses',
        'finetune_from': '/home/me/x',
        'device': 'cpu',
        'init_from': '/home/me/SmolLM',
        'optimizer': '/home/me/opt',
        'wandb_project': 'secret',
        'mine': '/home/me',
    }
    (tmp_path / 'verses').mkdir()
    (tmp_path / 'verses/dataset.json').write_text(
        json.dumps({'source': 'C:\\home\\me\\a.txt, /home/me/b.txt'})
    )
    save(config=paths | {'data_dir': str(tmp_path / 'verses')})
    text = ''.join(p.read_text(encoding='utf-8') for p in export().iterdir() if p.suffix in ('.json', '.md'))
    assert 'home' not in text and str(tmp_path) not in text and 'secret' not in text
    assert '| source | a.txt, b.txt |' in text
    save(config={'init_from': 'HuggingFaceTB/SmolLM2-135M'})
    assert '\nbase_model: HuggingFaceTB/SmolLM2-135M\n' in (export() / 'README.md').read_text(
        encoding='utf-8'
    )


def test_an_export_that_fails_leaves_the_folder_as_it_was(save, export, tmp_path):
    save()
    before = {path.name: path.read_bytes() for path in export().iterdir()}
    save(chat={'user': 'damaged'})
    with pytest.raises(ValueError, match='the chat template is damaged'):
        export()
    assert {path.name: path.read_bytes() for path in (tmp_path / 'exported').iterdir()} == before
    save(qk_norm=True)
    assert (export() / 'modeling_gpt.py').exists()
    save()  # no code is left of the one before
    assert {path.name for path in export().iterdir()} == {*before}
    assert sorted(path.name for path in tmp_path.iterdir()) == ['exported', 'run']


@pytest.mark.parametrize('kind', ['bpe', 'char', 'ChatML', 'Llama 2'])
def test_an_exported_chat_model_is_chatted_with_here_by_the_ids_of_its_training(kind, save, export):
    form = chat_form(kind)
    save(form.tokenizer, chat=form.template, **LLAMA)
    folder, talk = str(export()), say('x', 'xx', 'x')
    again = ChatForm(chat_template(folder), folder_tokenizer(folder))
    assert (
        again.ask(talk) == form.ask(talk) and again.encode(talk)[0].tolist() == form.encode(talk)[0].tolist()
    )
    assert again.end_ids == form.end_ids and again.end_strings == form.end_strings
    ends = json.loads((export() / 'generation_config.json').read_text()).get('eos_token_id')
    assert sorted(form.end_ids) == (ends if isinstance(ends, list) else [ends] if ends is not None else [])


def test_models_without_a_counterpart_carry_their_code_and_say_so(save, export, run_here, tmp_path):
    save(qk_norm=True, ngram=2)
    done = run_here('export.py', f'--out_dir={tmp_path}/run', f'--export_dir={tmp_path}/exported')
    assert 'its own code, model.py (trust_remote_code=True), for qk_norm=True, ngram=2, iter' in done['log']
    folder = tmp_path / 'exported'
    assert (folder / 'model.py').read_bytes() == (ROOT / 'model.py').read_bytes()
    assert {path.name for path in folder.iterdir()} >= {'modeling_gpt.py', 'attention.py'}
    assert ', trust_remote_code=True)' in (folder / 'README.md').read_text(encoding='utf-8')
    done = run_here('sample.py', f'--init_from={folder}', '--start=bad', '--num_samples=1',
                    '--max_new_tokens=5', '--device=cpu')
    assert set(done['log'].splitlines()[-2]) <= set(CHARS.stoi)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no umask')
def test_files_are_readable_as_the_umask_says(save, export):
    save()
    before = os.umask(0o027)
    try:
        modes = {path.stat().st_mode & 0o777 for path in export().iterdir()}
    finally:
        os.umask(before)
    assert modes == {0o640}


def test_gpt2_s_config_has_what_llama_cpp_and_mlx_lm_read(save, export):
    save()
    config = json.loads((export() / 'config.json').read_text())
    assert config['n_ctx'] == config['n_positions'] == 48
    assert {'n_embd', 'n_head', 'n_layer', 'layer_norm_epsilon', 'vocab_size', 'model_type'} <= set(config)


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
