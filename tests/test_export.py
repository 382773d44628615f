"""export.py: the folder that it writes, as transformers and as our own scripts read it."""

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
WIDE = {'head_size': 12, 'n_inner': 40, 'norm_eps': 1e-6, 'rope_theta': 500.0,
        'rope_scaling': (8.0, 1.0, 4.0, 16.0)}
RECIPE = {'pos_emb': 'rope', 'activation': 'swiglu', 'qk_norm': True, 'value_residual': True, 'ngram': 4,
          'ngram_rows': 512, 'n_kv_head': 1, 'bias': False}  # as config/best_shakespeare_char_cpu.py
CHARS = CharTokenizer.of_text('abcdefghijk .,\n')
FULL = {'vocab_size': CHARS.n_vocab}  # as train.py makes it: each id is a character
FILES = {'model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json',
         'tokenizer_config.json', 'README.md'}


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
    """Runs export.py; gives the folder. export.log is what it printed."""
    def run(*args):
        run.log = run_here('export.py', f'--out_dir={tmp_path}/run', f'--export_dir={tmp_path}/exported',
                           *args)['log']
        return tmp_path / 'exported'
    return run


@pytest.fixture(autouse=True, scope='module')
def modules_cache(tmp_path_factory):
    """Where transformers puts the code of folders."""
    from transformers import dynamic_module_utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
        patch.setattr(sys, 'path', [*sys.path])
        yield


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def read_card(folder):
    return (folder / 'README.md').read_text(encoding='utf-8')


# ---------------------------------------------------------------------------- what it computes

@pytest.mark.parametrize('changes, kind', [
    ({'bias': True}, "GPT-2's"), ({'bias': False, 'activation': 'gelu_tanh'}, "GPT-2's"), (FULL, "GPT-2's"),
    ({'tie_weights': False, 'norm_eps': 1e-3, 'n_inner': 40, 'dropout': 0.25}, "GPT-2's"),
    (LLAMA, "Llama's"), (LLAMA | WIDE, "Llama's"), (LLAMA | {'qkv_bias': True}, "Llama's"),
    (LLAMA | {'bias': True, 'n_embd': 36, 'n_kv_head': 2}, "Llama's"),
    (LLAMA | FULL | {'tie_weights': False, 'dropout': 0.25}, "Llama's"),
    ({'qk_norm': True, 'ngram': 2}, 'qk_norm=True, ngram=2'), ({'logit_softcap': 15.0}, 'logit_softcap=15.0'),
    ({'activation': 'relu2', 'tie_weights': False}, 'activation=relu2'), ({'n_kv_head': 1}, 'n_kv_head=1'),
    ({'head_size': 8}, 'head_size=8'), ({'pos_emb': 'alibi'}, 'pos_emb=alibi'),
    ({'attn_type': 'GK'}, 'attn_type=GK'), (LLAMA | {'value_residual': True}, 'value_residual=True'),
    (RECIPE | FULL, 'norm=layernorm, qk_norm=True, value_residual=True, ngram=4'),
], ids=str)
@torch.no_grad()
def test_an_export_computes_the_same_and_comes_back_exactly(changes, kind, save, export):
    """As GPT-2 or Llama where they compute it, else with model.py for the settings that are named."""
    from transformers import AutoModelForCausalLM
    model, folder = save(**changes), export()
    is_own = '=' in kind
    told = f'with its own code, model.py (trust_remote_code=True), for {kind}, iter' if is_own else \
        f'{kind} architecture, iteration 250'
    assert told in export.log, export.log
    trust = {'trust_remote_code': True} if is_own else {}
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(report.values()), report  # nothing is missing or left over
    idx = torch.randint(CHARS.n_vocab, (3, 48))
    found = theirs(idx).logits[:, :, :model.config.vocab_size]
    torch.testing.assert_close(found, model(idx, idx)[0], rtol=0, atol=1e-4)
    again = load_pretrained(str(folder))
    assert again.config == model.config and [*again.state_dict()] == [*model.state_dict()]
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert names_in(folder) == FILES | ({'model.py', 'modeling_gpt.py', 'attention.py'} if is_own else set())
    assert not is_own or (folder / 'model.py').read_bytes() == (ROOT / 'model.py').read_bytes()
    assert (', trust_remote_code=True)' in read_card(folder)) == is_own


@pytest.mark.parametrize('ours, changes', [
    (CHARS, {}), (GPT2Tokenizer(), {'tie_weights': False, 'bias': False}), (GPT2Tokenizer(), LLAMA),
    (CHARS, LLAMA | FULL), (CHARS, RECIPE), (CHARS, {'attn_type': 'GK', 'tie_weights': False})])
def test_transformers_gives_the_same_ids_and_greedy_text_also_in_padded_batches(
        ours, changes, save, export, bpe, caplog):
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


def test_a_vocabulary_without_a_free_id_gets_one_that_is_as_unlikely_as_its_rarest_character(save, export):
    from transformers import AutoModelForCausalLM
    save(**FULL)
    theirs = AutoModelForCausalLM.from_pretrained(export())
    with torch.no_grad():
        p = theirs(torch.arange(CHARS.n_vocab)[:, None]).logits[:, 0].softmax(dim=-1).amax(dim=0)
    assert len(p) == CHARS.n_vocab + 1 and p[-1] == p.min()
    assert theirs.generation_config.suppress_tokens == [CHARS.n_vocab]


@pytest.mark.parametrize('kind', ['bpe', 'char', 'ChatML', 'Llama 2'])
def test_an_exported_chat_model_is_chatted_with_here_by_the_ids_of_its_training(kind, save, export):
    form = chat_form(kind)
    save(form.tokenizer, chat=form.template, **LLAMA)
    folder, talk = str(export()), say('x', 'xx', 'x')
    again = ChatForm(chat_template(folder), folder_tokenizer(folder))
    assert again.ask(talk) == form.ask(talk)
    assert again.encode(talk)[0].tolist() == form.encode(talk)[0].tolist()
    assert again.end_ids == form.end_ids and again.end_strings == form.end_strings
    ends = json.loads((export() / 'generation_config.json').read_text()).get('eos_token_id')
    assert sorted(form.end_ids) == (ends if isinstance(ends, list) else [ends] if ends is not None else [])


# ---------------------------------------------------------------------------- the folder

@pytest.mark.parametrize('changes', [{}, {'qk_norm': True}])
def test_newest_state_is_exported_without_a_ckpt_pt_and_sampled_from_in_its_characters(
        changes, save, export, run_here):
    save(name='latest.pt', **changes)
    folder = export()
    assert 'latest.pt, the state of iteration 250' in export.log
    done = run_here('sample.py', f'--init_from={folder}', '--start=bad', '--num_samples=1',
                    '--max_new_tokens=5', '--device=cpu')
    assert set(done['log'].splitlines()[-2]) <= set(CHARS.stoi)


def test_the_card_says_what_was_trained_and_the_config_what_other_programs_read(save, export, tmp_path):
    save(bias=False)
    name, log = "a|b<i>'*[x]`", [
        {'iter': 200, 'train_loss': 9.0, 'val_loss': 9.0}, {'iter': 250, 'loss': 1.7},
        {'iter': 250, 'train_loss': 1.25, 'val_loss': 1.625}]
    (tmp_path / 'run/log.jsonl').write_text('{"iter": 250, "val_loss"\n' + '\n'.join(map(json.dumps, log)))
    export(f'--export_dir={tmp_path}/{name}')
    card = read_card(tmp_path / name)
    for told in ('| training | 1.2500 |', '| validation | 1.6250 |', '| best validation so far | 1.5000 |',
                 '| learning_rate | 0.001 |', '| dataset | verses |', '| n_embd | 32 |', 'iteration 250',
                 'library_name: transformers', '| train SHA-256 | 0a1b |',
                 f'model={name!r}', "# a\\|b\\<i\\>'\\*\\[x\\]\\`"):
        assert told in card, card
    config = json.loads((tmp_path / name / 'config.json').read_text())
    assert config['architectures'] == ['GPT2LMHeadModel'] and config['eos_token_id'] is None
    assert config['n_ctx'] == config['n_positions'] == 48  # llama.cpp and mlx-lm
    assert {'n_embd', 'n_head', 'n_layer', 'layer_norm_epsilon', 'vocab_size', 'model_type'} <= set(config)


@pytest.mark.parametrize('log', [
    b'{"iter": 250, "val_loss": "x"}', b'{"iter": 250, "val_loss": {"a": 1}, "train_loss": null}',
    b'\n'.join((b'\xff\xfe val_loss', b'["val_loss"]', b'{"val_loss"' + b'[' * 100_000,
                b'{"iter": 1e400, "val_loss": NaN}', b'\0' * 1000))], ids=lambda log: str(log[:20]))
def test_nothing_in_a_log_stops_an_export(log, save, export, tmp_path):
    save()
    entry = b'\n{"iter": 250, "train_loss": 1.25, "val_loss": 1.625}\n'
    (tmp_path / 'run/log.jsonl').write_bytes(log + entry + log)
    card = read_card(export())
    assert '| nats per token |' in card and ('| validation | 1.6250 |' in card) == (b'250' not in log)


def test_an_export_publishes_no_path_and_nothing_that_is_not_listed(save, export, tmp_path):
    paths = {'out_dir': '/home/me/out', 'data_dir': str(tmp_path / 'verses'), 'finetune_from': '/home/me/x',
             'device': 'cpu', 'init_from': '/home/me/SmolLM', 'optimizer': '/home/me/opt',
             'wandb_project': 'secret', 'mine': '/home/me'}
    (tmp_path / 'verses').mkdir()
    (tmp_path / 'verses/dataset.json').write_text(
        json.dumps({'source': 'C:\\home\\me\\a.txt, /home/me/b.txt'}))
    save(config=paths)
    text = ''.join(p.read_text(encoding='utf-8') for p in export().iterdir() if p.suffix in ('.json', '.md'))
    assert 'home' not in text and str(tmp_path) not in text and 'secret' not in text
    assert '| source | a.txt, b.txt |' in text
    save(config={'init_from': 'HuggingFaceTB/SmolLM2-135M'})
    assert '\nbase_model: HuggingFaceTB/SmolLM2-135M\n' in read_card(export())


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no umask')
def test_an_export_of_ours_is_replaced_whole_or_not_at_all_and_another_s_when_asked(
        save, export, tmp_path):
    save()
    umask = os.umask(0o027)
    try:
        before = {path.name: path.read_bytes() for path in export().iterdir()}
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / 'exported').iterdir()} == {0o640}
    save(chat={'user': 'damaged'})
    with pytest.raises(ValueError, match='the chat template is damaged'):
        export()
    assert {path.name: path.read_bytes() for path in (tmp_path / 'exported').iterdir()} == before
    save(qk_norm=True)
    assert (export() / 'modeling_gpt.py').exists()
    save()  # no code is left of the one before
    assert names_in(export()) == {*before} and names_in(tmp_path) == {'exported', 'run'}
    (tmp_path / 'exported/README.md').write_text("another's")
    with pytest.raises(ValueError, match='--overwrite=True'):
        export()
    assert read_card(tmp_path / 'exported') == "another's"
    assert 'A GPT with' in read_card(export('--overwrite'))


@pytest.mark.parametrize('args, told', [
    (['--export_dir=FOLDER/file'], 'is a file: name a folder'),
    (['--export_dir=FOLDER'], 'of another program'),
    (['--push=no repository'], 'push=no repository is no name'), (['--push=a/b/c'], 'is no name'),
    (['--push=me/--x'], 'is no name')])
def test_what_cannot_be_meant_is_refused_before_anything_is_written(args, told, save, export, tmp_path):
    save()
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'config.json').write_text('mine')
    with pytest.raises(ValueError, match=told):
        export(*(arg.replace('FOLDER', str(tmp_path)) for arg in args))
    assert (tmp_path / 'config.json').read_text() == 'mine' and not (tmp_path / 'exported').exists()


def test_push_uploads_the_folder_and_one_that_fails_is_one_line(save, export, monkeypatch, run_script,
                                                                tmp_path):
    calls = []
    api = types.SimpleNamespace(create_repo=lambda *a, **k: calls.append((a, k)),
                                upload_folder=lambda **k: calls.append(k))
    monkeypatch.setattr('huggingface_hub.HfApi', lambda: api)
    save()
    folder = export('--push=me/poems', '--private=True')
    assert calls[0] == (('me/poems',), {'private': True, 'exist_ok': True})
    assert calls[1]['repo_id'] == 'me/poems' and calls[1]['folder_path'] == folder
    assert set(calls[1]['allow_patterns']) == names_in(folder)
    assert "model='me/poems'" in read_card(folder)
    done = run_script('export.py', f'--out_dir={tmp_path}/run', f'--export_dir={tmp_path}/x',
                      '--push=me/poems', env={'HF_HUB_OFFLINE': '1'}, ok=False)
    assert done.stderr.startswith('ValueError: ') and 'me/poems could not be uploaded' in done.stderr
    assert len(done.stderr.splitlines()) == 1 and names_in(tmp_path / 'x') == FILES
