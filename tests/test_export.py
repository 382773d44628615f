"""export.py: the folder that it writes, as transformers and as our own scripts read it."""

import json
import sys
import types

import pytest
import torch
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
    def write(tokenizer=CHARS, chat=None, config=None, **changes):
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
              chat=chat).save(tmp_path / 'run/ckpt.pt')
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


# ---------------------------------------------------------------------------- what it computes

@pytest.mark.parametrize('changes, kind', [
    ({'bias': True}, "GPT-2's"), ({'bias': False, 'activation': 'gelu_tanh'}, "GPT-2's"),
    ({'tie_weights': False, 'norm_eps': 1e-3, 'n_inner': 40, 'dropout': 0.25}, "GPT-2's"),
    (LLAMA | WIDE, "Llama's"), (LLAMA | {'qkv_bias': True}, "Llama's"),
    (LLAMA | {'bias': True, 'n_embd': 36, 'n_kv_head': 2}, "Llama's"),
    (LLAMA | FULL | {'tie_weights': False, 'dropout': 0.25}, "Llama's"),
    ({'logit_softcap': 15.0}, 'logit_softcap=15.0'), ({'head_size': 8}, 'head_size=8'),
    ({'pos_emb': 'alibi'}, 'pos_emb=alibi'), ({'attn_type': 'GK'}, 'attn_type=GK'),
    (RECIPE | FULL, 'norm=layernorm, qk_norm=True, value_residual=True, ngram=4'),
], ids=str)
@torch.no_grad()
def test_an_export_computes_the_same_and_comes_back_exactly(changes, kind, save, export):
    """As GPT-2 or Llama where they compute it, else with model.py for the settings that are named."""
    from transformers import AutoModelForCausalLM
    model, folder = save(**changes), export()
    is_own = '=' in kind
    assert kind in export.log
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


@pytest.mark.parametrize('ours, changes', [
    (GPT2Tokenizer(), {'bias': False}), (CHARS, LLAMA | FULL), (CHARS, RECIPE)])
def test_transformers_gives_the_same_ids_and_greedy_text_also_in_padded_batches(
        ours, changes, save, export, bpe):
    from transformers import AutoModelForCausalLM, AutoTokenizer
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
    batch = tokenizer(prompts, padding=True, return_tensors='pt')
    out = theirs.generate(**batch, max_new_tokens=25, do_sample=False)
    assert tokenizer.batch_decode(out, skip_special_tokens=True) == expected


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


@pytest.mark.parametrize('kind', ['bpe', 'Llama 2'])
def test_an_exported_chat_model_is_chatted_with_here_by_the_ids_of_its_training(kind, save, export):
    form = chat_form(kind)
    save(form.tokenizer, chat=form.template, **LLAMA)
    folder, talk = str(export()), say('x', 'xx', 'x')
    again = ChatForm(chat_template(folder), folder_tokenizer(folder))
    assert again.ask(talk) == form.ask(talk)
    assert again.encode(talk)[0].tolist() == form.encode(talk)[0].tolist()
    assert again.end_ids == form.end_ids and again.end_strings == form.end_strings


# ---------------------------------------------------------------------------- the folder

def test_an_export_publishes_no_path_and_nothing_that_is_not_listed(save, export, tmp_path):
    paths = {'out_dir': '/home/me/out', 'data_dir': str(tmp_path / 'verses'), 'finetune_from': '/home/me/x',
             'device': 'cpu', 'init_from': '/home/me/SmolLM', 'optimizer': '/home/me/opt',
             'wandb_project': 'secret', 'mine': '/home/me'}
    (tmp_path / 'verses').mkdir()
    (tmp_path / 'verses/dataset.json').write_text(json.dumps({'source': '/home/me/a.txt, /home/me/b.txt'}))
    save(config=paths)
    text = ''.join(p.read_text(encoding='utf-8') for p in export().iterdir() if p.suffix in ('.json', '.md'))
    assert 'home' not in text and str(tmp_path) not in text and 'secret' not in text


def test_an_export_of_ours_is_replaced_whole_or_not_at_all_and_another_s_not(save, export, tmp_path):
    save()
    before = {path.name: path.read_bytes() for path in export().iterdir()}
    save(chat={'user': 'damaged'})
    with pytest.raises(ValueError, match='the chat template is damaged'):
        export()
    assert {path.name: path.read_bytes() for path in (tmp_path / 'exported').iterdir()} == before
    save(qk_norm=True)
    assert 'modeling_gpt.py' in names_in(export())
    save()  # no code is left of the one before
    assert names_in(export()) == {*before}
    (tmp_path / 'exported/README.md').write_text("another's")
    with pytest.raises(ValueError, match='--overwrite=True'):
        export()
    assert (tmp_path / 'exported/README.md').read_text() == "another's"


def test_folder_that_can_not_be_made_is_one_line(save, export, tmp_path):
    save()
    (tmp_path / 'exported').symlink_to('exported')
    with pytest.raises(ValueError, match='export_dir=.*exported can\'t be written to') as error:
        export()
    assert '\n' not in str(error.value)


def test_push_uploads_the_folder(save, export, monkeypatch):
    calls = []
    api = types.SimpleNamespace(create_repo=lambda *a, **k: calls.append((a, k)),
                                upload_folder=lambda **k: calls.append(k))
    monkeypatch.setattr('huggingface_hub.HfApi', lambda: api)
    save()
    folder = export('--push=me/poems', '--private=True')
    assert calls[0] == (('me/poems',), {'private': True, 'exist_ok': True})
    assert calls[1]['repo_id'] == 'me/poems' and calls[1]['folder_path'] == folder
    assert set(calls[1]['allow_patterns']) == names_in(folder)
