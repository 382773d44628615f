"""support/text/bpe.py: byte pair encodings of one's own, trained, read, in datasets and exports."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from support.hub.huggingface import folder_tokenizer, write_tokenizer
from support.sampling.decoding import Text
from support.text import bpe as room
from support.text.bpe import BPETokenizer, train_bpe
from support.text.prepare import write_text_dataset
from support.text.tokenizer import (CharTokenizer, GPT2Tokenizer, NoTokenizer, is_same_tokenizer,
                                    load_tokenizer, read_tokenizer, read_vocabulary, tokenizer_from)
from support.text.tokens import open_split

PROSE = {
    'ko': '봄이 오면 산과 들에 꽃이 핀다. 아이들은 학교에 가고, 어른들은 밭에 나가 씨를 뿌린다. ',
    'zh': '春天来了，山上和田野里开满了花。孩子们去上学，大人们到地里播种。',
    'pt': 'Quando chega a primavera, as flores cobrem os campos. As crianças vão à escola, e a avó faz pão. ',
    'en': 'When spring comes, it\'s the year 1995 or 2026, and flowers cover the fields.\n\n\tSo they say. ',
}
SOURCE = Path(__file__).read_text(encoding='utf-8')
TEXT = '\n'.join((text * 20) for text in PROSE.values())


@pytest.fixture(scope='module')
def own():
    return train_bpe([TEXT], 400)


def random_texts(n, seed=0):
    """Texts of characters from all of Unicode, many of them such as tokenizers treat in their own way."""
    generator = random.Random(seed)
    kinds = [lambda: generator.choice(' \n\r\t\'’.,!?0123456789'), lambda: chr(generator.randrange(0x250)),
             lambda: chr(generator.randrange(0x300, 0x370)), lambda: generator.choice(TEXT),
             lambda: chr(generator.randrange(0xd800)), lambda: chr(generator.randrange(0xe000, 0x110000)),
             lambda: generator.choice(['<|endoftext|>', '\u00a0', '\u3000', 'é', 'e\u0301', '\ufeff', '🙂'])]
    return [''.join(generator.choice(kinds)() for _ in range(generator.randrange(60))) for _ in range(n)]


# ---------------------------------------------------------------------------- encoding

def test_random_texts_survive_the_round_trip(own):
    for text in random_texts(2000):
        assert own.decode(own.encode(text)) == text
        assert own.decode(own.encode_array(text)) == text
        assert own.token_bytes()[own.encode_array(text)].sum() == len(text.encode())


@pytest.mark.parametrize('size', [257, 300, 2000])
def test_the_quick_encoder_gives_the_library_s_ids(size):
    tokenizer = train_bpe([TEXT, SOURCE], size)
    texts = [*random_texts(1000, 1), TEXT, SOURCE, 'a\ud83db', 'x' * 2000]
    assert tokenizer.quick
    for text in texts:
        by_library = tokenizer.encode_with(tokenizer.of_documents, text)
        assert np.array_equal(tokenizer.encode_array(text), by_library)


def test_the_quick_encoder_is_for_tokenizers_of_ours_only(own):
    model = content_of(own)['model']
    others = [{'model__merges': model['merges'][::-1]}, {'normalizer': {'type': 'NFC'}},
              {'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                                 'use_regex': True}}]
    for changes in others:
        other = BPETokenizer(changed(own, **changes))
        assert other.quick is None
        assert other.encode_array(TEXT).tolist() == other.encode(TEXT)
    assert own.quick and own.with_special_tokens(['<|user|>']).quick


def test_half_a_surrogate_pair_is_replaced_not_refused(own):
    assert own.decode(own.encode('a\ud83db')) == 'a\ufffdb'


def test_digits_stand_alone_and_words_take_the_space_before_them(own):
    tokens = [own.decode([i]) for i in own.encode('in 1995 the  spring\n\n\tcomes')]
    assert all(len(t) == 1 for t in tokens if t[-1].isdigit())
    for token in tokens:
        assert token.lstrip(' ') == token or token[1:].isalpha() or token.isspace()


def test_end_of_text_is_special_in_a_prompt_and_plain_in_a_document(own):
    text = 'one<|endoftext|>two'
    assert own.encode(text).count(own.end) == 1 and own.end not in own.encode_array(text)
    assert own.first_token() == own.end == 0 and own.token_bytes()[own.end] == 0
    assert own.decode(own.encode(text)) == text


@pytest.mark.parametrize('special', [(), ('<|user|>', '<|bot|>')])
def test_tokens_that_were_added_are_special_and_the_last(special, own):
    more = own.with_special_tokens(special)
    assert more.n_vocab == own.n_vocab + len(special) and more.encode(TEXT) == own.encode(TEXT)
    assert [more.encode(name) for name in special] == [[own.n_vocab + i] for i in range(len(special))]
    trained = train_bpe([TEXT], 400, ('<|endoftext|>', *special))
    assert trained.n_vocab == 400 and [*trained.special] == ['<|endoftext|>', *special]


def test_a_long_text_is_encoded_in_pieces_that_change_nothing(own, monkeypatch):
    text = TEXT + ''.join(random_texts(300)) + 'x' * 500 + TEXT
    whole = own.of_documents.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(room, 'PIECE', 50)
    pieces = [*room.cut_text(own.of_documents, text)]
    assert len(pieces) > 100 and ''.join(pieces) == text
    assert own.encode_with(own.of_documents, text).tolist() == whole
    assert len([*room.cut_text(own.of_documents, '1' * 1000)]) == 1  # without a place to cut


def test_a_place_where_a_cut_would_change_the_tokens_is_none(own, monkeypatch):
    assert room.is_cut(own.of_documents, 'in spring it', 9)
    assert room.is_cut(own.of_documents, '<|endoftext|>', 11)
    assert not room.is_cut(own.of_prompts, '<|endoftext|>', 11)
    monkeypatch.setattr(room, 'PARTS', r'\p{L}+\s?|[\s\S]')  # words with the space after them
    other = train_bpe([TEXT], 400)
    monkeypatch.setattr(room, 'PIECE', 50)
    assert not room.is_cut(other.of_documents, 'when spring comes', 11)
    whole = other.of_documents.encode(TEXT, add_special_tokens=False).ids
    assert other.encode_with(other.of_documents, TEXT).tolist() == whole


def test_a_stream_shows_whole_characters_only():
    tokenizer = train_bpe([], 257)  # a token for each byte
    text, shown = Text(b'', 100), ''
    for token in tokenizer.encode('avó 한국어 🙂'):
        text.add(tokenizer.decode_bytes([token]))
        piece = text.take()
        assert '\ufffd' not in piece
        shown += piece
    assert shown == 'avó 한국어 🙂'


# ---------------------------------------------------------------------------- training

def test_training_is_the_same_every_time_and_takes_any_pieces(own):
    assert train_bpe([TEXT], 400).json == own.json and own.n_vocab == 400
    assert train_bpe(iter([TEXT[:1000], TEXT[1000:]]), 400).n_vocab == 400


def test_a_text_with_few_pairs_gives_fewer_entries():
    assert train_bpe(['abc'], 4096).n_vocab == 257 and train_bpe([], 300).n_vocab == 257


@pytest.mark.parametrize('size', [0, 256, 65537, 10**9])
def test_a_size_that_no_tokenizer_can_have_is_refused(size):
    with pytest.raises(ValueError, match=f'vocab_size={size} must be 257 .* to 65536') as error:
        train_bpe([TEXT], size)
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------- files

def content_of(tokenizer):
    return json.loads(tokenizer.json)


def changed(tokenizer, **changes):
    """A tokenizer.json with other values at MODEL__KEY or KEY."""
    content = content_of(tokenizer)
    for path, value in changes.items():
        *outer, key = path.split('__')
        place = content
        for name in outer:
            place = place[name]
        place[key] = value
    return json.dumps(content)


@pytest.mark.parametrize('changes, told', [
    ({'model__type': 'Unigram'}, 'Unigram'),
    ({'model__dropout': 0.1}, 'dropout'), ({'normalizer': {'type': 'Lowercase'}}, 'Lowercase'),
    ({'model__vocab': {f'{i:x}': i for i in range(65537)}, 'model__merges': []}, '65,538 entries, .* 65,536'),
    ({'model__vocab': {'a': 70000}, 'model__merges': []}, 'ids'),
    ({'model__vocab': {'a': -1}, 'model__merges': []}, 'ids'),
    ({'model__vocab': {'▁the': 0}, 'model__merges': []}, 'not strings of bytes'),
    ({'model__vocab': {'a': 0}, 'model__merges': []}, 'one id'),
    ({'model__vocab': {'a': 1}, 'model__merges': []}, 'can\'t encode 255 of the 256 bytes'),
    ({'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True,
                        'use_regex': True}}, 'give the text back'),
    ({'model': None}, 'TypeError'), ({'added_tokens': 5}, 'TypeError'),
])
def test_a_tokenizer_that_is_none_of_bytes_is_one_line(changes, told, own, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(changed(own, **changes), encoding='utf-8')
    with pytest.raises(ValueError, match=f'tokenizer.json is neither GPT-2\'s .*({told})') as error:
        load_tokenizer(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('content', ['', '{}', '[]', 'null', '5', '[' * 10**5, '{"model": {}}',
                                     '{"model": {"vocab": []}}'])
def test_a_file_that_is_no_tokenizer_is_one_line(content, tmp_path):
    (tmp_path / 'mine.json').write_text(content)
    with pytest.raises(ValueError, match='mine.json is neither') as error:
        load_tokenizer(tmp_path / 'mine.json')
    assert '\n' not in str(error.value)


def test_a_file_s_normalisation_and_words_that_were_added_are_kept(own):
    added = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': True, 'special': False}
    tokenizer = BPETokenizer(changed(own, normalizer={'type': 'NFC'}, added_tokens=[
        *content_of(own)['added_tokens'], added | {'id': 400, 'content': '   '}]))
    ids = tokenizer.encode_array('cafe\u0301   au lait')
    assert tokenizer.decode(ids) == 'café   au lait' and 400 in ids
    assert tokenizer.token_bytes()[400] == 3 and tokenizer.n_vocab == 401


def test_limits_and_padding_of_a_file_are_ignored(own):
    limits = {'truncation': {'direction': 'Right', 'max_length': 4, 'strategy': 'LongestFirst', 'stride': 0},
              'padding': {'strategy': {'Fixed': 8}, 'direction': 'Right', 'pad_to_multiple_of': None,
                          'pad_id': 0, 'pad_type_id': 0, 'pad_token': '<|endoftext|>'}}
    tokenizer = BPETokenizer(changed(own, **limits))
    assert tokenizer.encode(TEXT) == own.encode(TEXT) and tokenizer.encode('a') == own.encode('a')


def test_gpt2_s_own_file_is_gpt2_s_tokenizer_and_with_more_special_tokens_its_own(bpe, tmp_path):
    write_tokenizer(tmp_path, GPT2Tokenizer(), 64)
    assert isinstance(load_tokenizer(tmp_path), GPT2Tokenizer)
    same = BPETokenizer((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    assert same.end == 50256 and same.n_vocab == 50257 and same.encode(TEXT) == GPT2Tokenizer().encode(TEXT)
    assert same.token_bytes().tolist() == GPT2Tokenizer().token_bytes().tolist()
    more = same.with_special_tokens(['<|user|>'])
    (tmp_path / 'tokenizer.json').write_text(more.json, encoding='utf-8')
    assert load_tokenizer(tmp_path).n_vocab == 50258


# ---------------------------------------------------------------------------- transformers

def test_transformers_gives_the_same_ids(own, tmp_path):
    from transformers import AutoTokenizer
    write_tokenizer(tmp_path, own, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == own.end and len(theirs) == own.n_vocab
    for text in [*random_texts(500), TEXT]:
        assert theirs(text)['input_ids'] == own.encode(text)
        assert theirs.decode(own.encode(text)) == text
    assert folder_tokenizer(tmp_path).json == own.json
    theirs.save_pretrained(tmp_path / 'again')  # written otherwise, and the same
    assert is_same_tokenizer(folder_tokenizer(tmp_path / 'again').to_dict(), own.to_dict())
    assert not is_same_tokenizer(train_bpe([TEXT], 300).to_dict(), own.to_dict())


# ---------------------------------------------------------------------------- datasets

def test_a_dataset_s_tokenizer_is_trained_on_its_training_part_and_kept_beside_it(tmp_path):
    write_text_dataset(tmp_path, TEXT + 'zq' * 1000, 'bpe', 'a test', vocab_size=300)
    tokenizer, size, path = read_vocabulary(tmp_path)
    cut = int(len(TEXT + 'zq' * 1000) * 0.9)
    assert tokenizer.json == train_bpe([(TEXT + 'zq' * 1000)[:cut]], 300).json
    assert (size, path) == (300, tmp_path / 'tokenizer.json')
    parts = [tokenizer.decode(open_split(tmp_path, split)) for split in ('train', 'val')]
    assert parts == [(TEXT + 'zq' * 1000)[:cut], (TEXT + 'zq' * 1000)[cut:]]
    assert json.loads((tmp_path / 'dataset.json').read_text())['tokenizer'] == 'bpe'
    again = tokenizer_from(tokenizer.to_dict())
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.to_dict() == tokenizer.to_dict()


def test_a_tokenizer_that_exists_is_taken_as_it_is(own, tmp_path):
    (tmp_path / 'there').mkdir()
    write_tokenizer(tmp_path / 'there', own, 64)
    for name in (tmp_path / 'there', tmp_path / 'there' / 'tokenizer.json'):
        write_text_dataset(tmp_path / 'out', TEXT, str(name), 'a test')
        assert (tmp_path / 'out/tokenizer.json').read_text(encoding='utf-8') == own.json
    write_text_dataset(tmp_path / 'out', TEXT, 'char', 'a test')
    assert not (tmp_path / 'out/tokenizer.json').exists()
    assert isinstance(read_tokenizer(tmp_path / 'out'), CharTokenizer)


@pytest.mark.parametrize('file, text, told', [
    ('dataset.json', '{"tokenizer": "gpt2"}', 'dataset.json says .* GPT-2'),
    ('dataset.json', None, None),
    ('tokenizer.json', '{}', 'neither'), ('tokenizer.json', 'other', 'SHA-256'),
    ('tokenizer.json', None, 'tokenizer.json is missing, but dataset.json'),
])
def test_files_of_a_dataset_that_contradict_each_other_are_refused(file, text, told, own, tmp_path):
    write_text_dataset(tmp_path, TEXT, 'bpe', 'a test', vocab_size=300)
    (tmp_path / file).unlink()
    if text:
        (tmp_path / file).write_text(own.json if text == 'other' else text, encoding='utf-8')
    if told is None:
        assert read_tokenizer(tmp_path).n_vocab == 300
        return
    with pytest.raises(ValueError, match=told) as error:
        read_tokenizer(tmp_path)
    assert '\n' not in str(error.value)


def test_ids_of_a_tokenizer_that_is_not_there_are_never_decoded_as_gpt2_s(tmp_path):
    np.arange(9, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    (tmp_path / 'dataset.json').write_text('{"tokenizer": "llama-3", "vocab_size": 32000}')
    tokenizer, size, path = read_vocabulary(tmp_path)
    assert isinstance(tokenizer, NoTokenizer) and (size, path.name) == (32000, 'dataset.json')
    for function in (tokenizer.decode, tokenizer.encode):
        with pytest.raises(ValueError, match='no text: .* llama-3'):
            function([1])
    (tmp_path / 'dataset.json').write_text('{"tokenizer": "llama-3"}')
    with pytest.raises(ValueError, match='needs its vocab_size'):
        read_tokenizer(tmp_path)


def test_a_folder_s_model_of_another_size_than_gpt2_s_isn_t_decoded_as_gpt2(tmp_path):
    for size, kind in ((50257, GPT2Tokenizer), (51200, NoTokenizer), (65, NoTokenizer)):
        (tmp_path / 'config.json').write_text(json.dumps({'vocab_size': size}))
        assert isinstance(folder_tokenizer(tmp_path), kind)
