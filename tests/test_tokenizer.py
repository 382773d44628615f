"""support/text/tokenizer.py: meta.pkl, and text to ids and back."""

import builtins
import os
import pickle
import subprocess

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.text.tokenizer import CharTokenizer, GPT2Tokenizer, read_meta, read_tokenizer, tokenizer_from

META = {'vocab_size': 3, 'itos': {0: '\n', 1: 'a', 2: 'é'}, 'stoi': {'\n': 0, 'a': 1, 'é': 2}}


def assert_one_line(error):
    assert str(error.value) and '\n' not in str(error.value)


# ---------------------------------------------------------------------------- meta.pkl

class Evil:
    """What a malicious file unpickles to: the result of any call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize('function, argument', [
    (os.system, 'echo > {}'), (builtins.exec, 'open({!r}, "w")'), (builtins.eval, 'open({!r}, "w")'),
    (os.mkdir, '{}'), (subprocess.getoutput, 'echo > {}'),
], ids=lambda x: getattr(x, '__name__', ''))
@pytest.mark.parametrize('place', ['alone', 'inside'])
def test_meta_that_would_run_code_is_refused_and_runs_none(function, argument, place, protocol, tmp_path):
    marker = tmp_path / 'marker'
    evil = Evil(function, argument.format(str(marker)))
    data = pickle.dumps(evil if place == 'alone' else META | {'more': [evil]}, protocol=protocol)
    (tmp_path / 'meta.pkl').write_bytes(data)
    with pytest.raises(ValueError, match='meta.pkl is not a character vocabulary') as error:
        read_meta(tmp_path)
    assert_one_line(error)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # the file does run code if read carelessly


@pytest.mark.parametrize('opcodes', [b"(S'echo > {}'\nios\nsystem\n.", b"cos\nsystem\n(S'echo > {}'\ntR."])
def test_meta_written_by_hand_to_run_code_runs_none(opcodes, tmp_path):
    marker = tmp_path / 'marker'
    data = opcodes.replace(b'{}', os.fsencode(marker))
    (tmp_path / 'meta.pkl').write_bytes(data)
    with pytest.raises(ValueError):
        read_meta(tmp_path)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()


# LONG_BINPUT and BYTEARRAY8, whose arguments may ask for gigabytes
sane_bytes = st.binary(max_size=80).filter(lambda data: not {ord('r'), 0x96} & set(data))
whole_meta = pickle.dumps(META)
damaged_meta = st.builds(lambda at, piece: whole_meta[:at] + piece + whole_meta[at + len(piece):],
                         st.integers(0, len(whole_meta)), sane_bytes)


@settings(deadline=None, max_examples=500)
@given(sane_bytes | damaged_meta)
@example(b'')
@example(b'Px\n.')  # a persistent id, whose error has two lines
@example(pickle.dumps([1, 2]))
@example(pickle.dumps(META | {'itos': 'abc'}))
@example(pickle.dumps(META | {'itos': {'a': 0}}))
@example(pickle.dumps(META | {'vocab_size': '3'}))
@example(pickle.dumps({'itos': {0: 'a'}}))
def test_damaged_meta_is_refused_in_one_line_or_whole(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / 'meta.pkl').write_bytes(data)
    try:
        meta = read_meta(folder)
    except ValueError as error:
        assert 'meta.pkl is not a character vocabulary' in str(error) and '\n' not in str(error)
    else:
        assert isinstance(meta['vocab_size'], int) and all(isinstance(c, str) for c in meta['itos'].values())


def test_truncated_meta_is_refused(tmp_path):
    for size in range(len(whole_meta)):
        (tmp_path / 'meta.pkl').write_bytes(whole_meta[:size])
        with pytest.raises(ValueError, match='is not a character vocabulary'):
            read_meta(tmp_path)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_of_any_pickle_protocol_is_read(protocol, tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(META, protocol=protocol))
    assert read_meta(tmp_path) == META


def test_meta_without_characters_is_refused(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 0, 'itos': {}, 'stoi': {}}))
    with pytest.raises(ValueError, match='meta.pkl'):
        read_tokenizer(tmp_path)


# ---------------------------------------------------------------------------- tokenizers

@settings(deadline=None)
@given(st.text(min_size=1))
def test_characters_survive_the_round_trip(text):
    tokenizer = CharTokenizer.of_text(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.n_vocab == len(set(text)) and max(ids) < tokenizer.n_vocab
    again = tokenizer_from(tokenizer.to_dict())
    assert again.encode(text) == ids and again.to_dict() == tokenizer.to_dict()


def test_character_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="not in this model's vocabulary: 'z' 'é'; it knows 'abc'") as error:
        CharTokenizer.of_text('cab').encode('azbé')
    assert_one_line(error)


def test_many_unknown_characters_are_counted_and_ten_of_them_named():
    tokenizer = CharTokenizer.of_text(''.join(map(chr, range(0x4e00, 0x4e00 + 3000))))
    with pytest.raises(ValueError, match="'a' 'b' .* 'j' and 5 more; it knows 3,000 others$") as error:
        tokenizer.encode('abcdefghijklmno')
    assert_one_line(error)


@pytest.mark.parametrize('text, helps', [('cafe\u0301', True), ('\u1112\u1161\u11ab', True),
                                         ('cafe\u0301 z', False)])
def test_unknown_characters_that_normalisation_would_join_are_told(text, helps):
    with pytest.raises(ValueError, match='not in this model\'s vocabulary') as error:
        CharTokenizer.of_text('café 한').encode(text)
    assert ('NFC' in str(error.value)) == helps
    assert_one_line(error)


def test_a_checkpoint_without_a_tokenizer_is_not_decoded_as_gpt2_s_if_its_vocabulary_is_another(tmp_path):
    from support.training.state import tokenizer_of
    state = {'model_args': {'vocab_size': 65}, 'config': {'data_dir': str(tmp_path / 'gone')}}
    with pytest.raises(ValueError, match='no text: the data folder that the checkpoint names is missing'):
        tokenizer_of(state).decode([1])
    assert isinstance(tokenizer_of(state | {'model_args': {'vocab_size': 50304}}), GPT2Tokenizer)


def test_vocabulary_with_gaps_ends_at_its_largest_id():
    assert CharTokenizer({0: 'a', 7: 'b'}).n_vocab == 8


@pytest.mark.parametrize('text', ['Hello, world!\n', '日本語 café 🙂', 'a <|endoftext|>b', ' ' * 50])
def test_bpe_survives_the_round_trip(text, bpe):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_array(text)) == text


def test_end_of_text_is_special_in_a_prompt_and_plain_in_a_document(bpe):
    import tiktoken
    tokenizer, text = GPT2Tokenizer(), 'one<|endoftext|>two'
    ordinary = tiktoken.get_encoding('gpt2').encode_ordinary(text)
    assert 50256 in tokenizer.encode(text) and 50256 not in ordinary
    assert tokenizer.encode_array(text).tolist() == ordinary
    assert tokenizer.encode('Hello, world!') == [15496, 11, 995, 0]


def test_gpt2_tokenizer_is_made_anew_from_what_a_checkpoint_keeps(bpe):
    for state in (GPT2Tokenizer().to_dict(), None):
        assert isinstance(tokenizer_from(state), GPT2Tokenizer)
        assert tokenizer_from(state).n_vocab == 50257


def test_tokens_of_characters_have_the_bytes_of_their_utf8():
    lengths = CharTokenizer({0: 'a', 1: '\n', 2: 'é', 3: '日', 4: '🙂', 7: '\udcff'}).token_bytes()
    assert lengths.tolist() == [1, 1, 2, 3, 4, 0, 0, 3] and lengths.dtype == np.int64


def test_tokens_of_bpe_have_the_bytes_of_what_they_decode_to(bpe):
    tokenizer = GPT2Tokenizer()
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (50257,) and lengths.dtype == np.int64 and lengths[50256] == 0
    assert (lengths[:50256] > 0).all() and lengths[198] == 1  # a line end
    text = 'Hello, 日本語 café 🙂!'
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_a_text_begins_after_end_of_text_or_after_a_line_end():
    assert GPT2Tokenizer().first_token() == 50256
    assert CharTokenizer({0: 'a', 1: '\n'}).first_token() == 1
    assert CharTokenizer({0: 'a', 1: 'b'}).first_token() == 0


@pytest.mark.parametrize('state', [{'kind': 'char', 'itos': 7}, {'kind': 'char'}, {'kind': 'none'}, 7,
                                   {'a': 1}, {'kind': 'bpe', 'json': 'x'}], ids=str)
def test_a_checkpoint_s_damaged_tokenizer_is_one_line(state):
    with pytest.raises(ValueError, match='the checkpoint\'s tokenizer is damaged') as error:
        tokenizer_from(state)
    assert '\n' not in str(error.value)


def test_tokens_without_text_of_an_earlier_checkpoint_are_read():
    assert tokenizer_from({'kind': 'none', 'n_vocab': 7}).n_vocab == 7
