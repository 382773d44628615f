"""Text to ids and back, of characters, words and GPT-2; meta.pkl."""

import os
import pickle

import numpy as np
import pytest
from preparing import META, ODD, refusal
from test_bpe import random_texts

from support.hub.exporting import write_tokenizer
from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, NoTokenizer, load_tokenizer, tokenizer_from
from support.text.vocabulary import read_meta

# ---------------------------------------------------------------------------- meta.pkl

class Evil(str):
    """What a malicious file unpickles to: the result of a command."""

    def __reduce__(self):
        return os.system, (str(self),)


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_meta_that_is_damaged_or_would_run_code_is_refused_and_runs_none(protocol, tmp_path):
    marker = tmp_path / 'marker'
    evil = Evil(f'echo > {marker}')
    by_hand = f"(S'echo > {marker}'\nios\nsystem\n.", f"cos\nsystem\n(S'echo > {marker}'\ntR."
    data = [pickle.dumps(made, protocol) for made in (evil, META | {'more': [evil]})]
    for content in [*data, *map(os.fsencode, by_hand), b'', pickle.dumps(META)[:-9]]:
        (tmp_path / 'meta.pkl').write_bytes(content)
        assert 'meta.pkl is not a character vocabulary' in refusal(read_meta, tmp_path)
    assert not marker.exists()
    pickle.loads(data[0])
    assert marker.exists()  # the file does run code if read carelessly


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_of_any_pickle_protocol_is_read(protocol, tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(META, protocol=protocol))
    assert read_meta(tmp_path) == META


# ---------------------------------------------------------------------------- characters and words

def test_characters_survive_the_round_trip():
    tokenizer = CharTokenizer.of_text(ODD)
    ids = tokenizer.encode(ODD)
    assert tokenizer.decode(ids) == ODD and tokenizer.n_vocab == len(set(ODD)) == max(ids) + 1
    again = tokenizer_from(tokenizer.to_dict())
    assert again.encode(ODD) == ids and again.to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize('entries, text, parts, shown', [  # a vocabulary, a text, its parts, what is decoded
    (['to', 'be', 'or', 'not', 'to-morrow', '.'], 'to  be\nor not .', ['to', 'be', 'or', 'not', '.'],
     'to be or not .'),
    (['to', 'to be', ' ', '\n', 'b', 'e', 'be'], 'to be b\nebe', ['to be', ' ', 'b', '\n', 'e', 'be'],
     'to be b\nebe')])
def test_prompts_are_encoded_and_shown_and_exported(entries, text, parts, shown, tmp_path):
    from transformers import AutoTokenizer
    tokenizer = CharTokenizer(dict(enumerate(entries)))
    ids = tokenizer.encode(text)
    assert [entries[i] for i in ids] == parts and tokenizer.decode(ids) == shown
    assert b''.join(tokenizer.decode_bytes([i]) for i in ids).decode().strip() == shown.strip()
    write_tokenizer(tmp_path, tokenizer, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == shown
    assert len(theirs) == tokenizer.n_vocab + 1 and theirs.pad_token_id == tokenizer.n_vocab
    assert load_tokenizer(tmp_path).itos == tokenizer.itos


def test_unknown_characters_are_named_with_what_to_do():
    told = refusal(CharTokenizer.of_text('cab').encode, 'azbé')
    assert "not in this model's vocabulary: 'z' 'é'; it knows 'abc'" in told
    assert 'NFC' in refusal(CharTokenizer.of_text('café 한').encode, 'cafe\u0301')


# ---------------------------------------------------------------------------- GPT-2

def test_gpt2_s_ids_are_tiktoken_s_and_only_a_prompt_has_special_tokens(bpe):
    import tiktoken
    tokenizer, theirs = GPT2Tokenizer(), tiktoken.get_encoding('gpt2')
    for text in ['', 'Hello, world!\n', 'a <|endoftext|>b', ' ' * 50, ODD, ODD * 99, *random_texts(2000)]:
        ids = tokenizer.encode_array(text)
        assert ids.tolist() == theirs.encode_ordinary(text) and ids.dtype == np.uint32
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(ids) == text
        assert (50256 in tokenizer.encode(text)) == ('<|endoftext|>' in text)
    assert tokenizer.encode('Hello, world!') == [15496, 11, 995, 0]


def test_tokens_have_the_bytes_of_what_they_decode_to(bpe):
    tokenizer, text = GPT2Tokenizer(), 'Hello, 日本語 café 🙂!'
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (50257,) and lengths[50256] == 0
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    tokenizer = CharTokenizer({0: 'a', 1: '\n', 2: 'é', 3: '日', 4: '🙂', 7: '\udcff'})
    assert tokenizer.token_bytes().tolist() == [1, 1, 2, 3, 4, 0, 0, 3]


@pytest.mark.parametrize('itos', [{0: 'a', 1: 'a'}, {0: 'a', 1: '\ud800'}])
def test_vocabulary_that_no_tokenizer_json_can_hold_is_one_line(itos, tmp_path):
    told = refusal(write_tokenizer, tmp_path, CharTokenizer(itos), 8)
    assert 'no tokenizer.json can hold this vocabulary' in told


def test_id_without_a_string_has_no_text():
    tokenizer = CharTokenizer({1: 'a', 3: 'b'})
    assert tokenizer.decode([0, 1, 2, 3]) == 'ab' == tokenizer.decode_bytes([0, 1, 2, 3]).decode()


def test_exported_gpt2_is_gpt2_to_transformers_and_to_us(bpe, tmp_path):
    from transformers import AutoTokenizer
    ours, text = GPT2Tokenizer(), "  we'll\n\n\n don't\t123  45\u00a0 <|endoftext|> ä€😀 \u2028é \0"
    write_tokenizer(tmp_path, ours, 1024)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)['input_ids'] == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert len(theirs) == 50257 and theirs.eos_token_id == theirs.bos_token_id == 50256
    assert isinstance(load_tokenizer(tmp_path), GPT2Tokenizer)


@pytest.mark.parametrize('tokenizer, first, ends', [
    (GPT2Tokenizer(), 50256, (50256,)), (CharTokenizer({0: 'a', 1: '\n'}), 1, ()), (NoTokenizer(5), 0, ())])
def test_a_text_begins_after_an_end_and_a_sample_ends_there(tokenizer, first, ends):
    assert (tokenizer.first_token(), tokenizer.ends, tokenizer.begin) == (first, ends, ())
    assert (tokenizer.end,) == (ends or (None,))


# ---------------------------------------------------------------------------- checkpoints

def test_what_a_checkpoint_keeps_makes_the_tokenizer_anew_or_is_one_line(tmp_path):
    from support.training.models import tokenizer_of
    from support.training.state import State
    for state in (GPT2Tokenizer().to_dict(), None):
        assert isinstance(tokenizer_from(state), GPT2Tokenizer)
    assert tokenizer_from({'kind': 'none', 'n_vocab': 7}).n_vocab == 7
    for state in ({'kind': 'char', 'itos': 7}, 7, {'kind': 'bpe', 'json': 'x'}):
        assert 'the checkpoint\'s tokenizer is damaged' in refusal(tokenizer_from, state)
    config = {'data_dir': str(tmp_path / 'gone')}  # of an older checkpoint, which names its data alone
    told = refusal(tokenizer_of(State({}, {'vocab_size': 65}, config=config)).decode, [1])
    assert 'no text: the data folder that the checkpoint names is missing' in told
    assert isinstance(tokenizer_of(State({}, {'vocab_size': 50304}, config=config)), GPT2Tokenizer)
