"""Byte pairs of one's own, and any tokenizer.json: its ids are those of the library and of
transformers."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from preparing import ODD, refusal

from support.hub.exporting import write_tokenizer
from support.sampling.decoding import Text
from support.text.bpe import BPETokenizer, train_bpe
from support.text.dataset import Dataset
from support.text.prepare import write_text_dataset
from support.text.tokenizer import GPT2Tokenizer, is_same_tokenizer, load_tokenizer, tokenizer_from

SOURCE, TEXT = Path(__file__).read_text(encoding='utf-8'), ODD * 20


@pytest.fixture(scope='module')
def own():
    return train_bpe([TEXT], 600)


def random_texts(n, seed=0):
    """Texts of characters from all of Unicode, many of them such as tokenizers treat in their own
    way."""
    generator = random.Random(seed)
    kinds = [lambda: generator.choice(' \n\r\t\'’.,!?0123456789'), lambda: chr(generator.randrange(0x250)),
             lambda: chr(generator.randrange(0x300, 0x370)), lambda: generator.choice(TEXT),
             lambda: chr(generator.randrange(0xd800)), lambda: chr(generator.randrange(0xe000, 0x110000)),
             lambda: generator.choice(['<|endoftext|>', '\u00a0', '\u3000', 'é', 'e\u0301', '\ufeff', '🙂'])]
    return [''.join(generator.choice(kinds)() for _ in range(generator.randrange(60))) for _ in range(n)]


# ---------------------------------------------------------------------------- published kinds

def split(pattern):
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def byte_level(use_regex):
    return {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': use_regex}


def in_sequence(key, *steps):
    return {'type': 'Sequence', key: [*steps]}


def added(name, i, special=True, **how):
    return {'id': i, 'content': name, 'single_word': False, 'lstrip': False, 'rstrip': False,
            'normalized': False, 'special': special} | how


def begins_with(name, i):
    parts = [{'SpecialToken': {'id': name, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
    return {'type': 'TemplateProcessing', 'single': parts, 'pair': parts + [
        {'Sequence': {'id': 'B', 'type_id': 1}}],
        'special_tokens': {name: {'id': name, 'ids': [i], 'tokens': [name]}}}


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r'\s*[\r\n]+|\s+(?!\S)|\s+')
QWEN = LLAMA3.replace('{1,3}', '')
MARK = '\u2581'
FROM_MARKS = [{'type': 'Replace', 'pattern': {'String': MARK}, 'content': ' '}, {'type': 'ByteFallback'},
              {'type': 'Fuse'}, {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]


def content_of(kind):
    """A small tokenizer.json of a kind, as published but for its entries."""
    if kind in ('TinyLlama', 'Mistral'):
        return sentencepiece_like(kind)
    if kind == 'Unigram':
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        library = Tokenizer(models.Unigram())
        library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        library.train_from_iterator([TEXT], trainers.UnigramTrainer(
            vocab_size=400, unk_token='<unk>', special_tokens=['<unk>', '</s>'], show_progress=False))
        return json.loads(library.to_str())
    special = '<|endoftext|>', '<|im_start|>', '<|im_end|>'
    content = json.loads(train_bpe([TEXT.replace('\n', ' ')], 500, special).json)
    if kind == 'SmolLM2':  # 21 of the bytes have no entry
        vocab, merges = content['model']['vocab'], content['model']['merges']
        for name in [n for n in vocab if len(n) == 1 and not any(n in m for m in merges)][:21]:
            del vocab[name]
        digits = {'type': 'Digits', 'individual_digits': True}
        content['pre_tokenizer'] = in_sequence('pretokenizers', digits, byte_level(True))
    if kind == 'Llama 3':
        content['pre_tokenizer'] = in_sequence('pretokenizers', split(LLAMA3), byte_level(False))
        content['model']['ignore_merges'] = True
        begins = begins_with('<|im_start|>', 1)
        content['post_processor'] = in_sequence('processors', byte_level(True), begins)
    if kind == 'Qwen':
        content |= {'normalizer': {'type': 'NFC'}, 'post_processor': byte_level(False) | {'use_regex': True},
                    'pre_tokenizer': in_sequence('pretokenizers', split(QWEN), byte_level(False))}
        content['added_tokens'] += [added('<think>', 500, special=False), added('   ', 501, special=False)]
    return content


def sentencepiece_like(kind):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    specials = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]
    library = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=600, special_tokens=specials,
                                                            show_progress=False, limit_alphabet=60))
    content = json.loads(library.to_str())
    content['added_tokens'] = [added(name, i) for i, name in enumerate(specials[:3])]
    content |= {'decoder': in_sequence('decoders', *FROM_MARKS), 'post_processor': begins_with('<s>', 1)}
    if kind == 'TinyLlama':
        content |= {'pre_tokenizer': None, 'normalizer': in_sequence(
            'normalizers', {'type': 'Prepend', 'prepend': MARK},
            {'type': 'Replace', 'pattern': {'String': ' '}, 'content': MARK})}
    else:
        content['pre_tokenizer'] = {'type': 'Metaspace', 'replacement': MARK, 'prepend_scheme': 'first',
                                    'split': False}
    return content


KINDS = ['SmolLM2', 'Llama 3', 'Qwen', 'TinyLlama', 'Mistral', 'Unigram']
published = pytest.fixture(scope='module', params=KINDS)(
    lambda request: json.dumps(content_of(request.param)))


def changed(tokenizer, **changes):
    """The text of its tokenizer.json with other entries."""
    return json.dumps(json.loads(tokenizer.json) | changes)


def in_folder(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
    return folder


def test_ids_of_a_published_tokenizer_are_those_of_transformers(published, tmp_path):
    from transformers import PreTrainedTokenizerFast
    ours = load_tokenizer(in_folder(tmp_path, published))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    names = ''.join(ours.special)
    for text in [ODD, names + 'a' + names, *random_texts(300), 'x' * 3000, ' ' * 3000 + 'a', TEXT]:
        ids = [*ours.begin, *ours.encode(text)]
        assert ids == theirs(text)['input_ids']
        shown = ours.decode_bytes(ids).decode(errors='replace')
        assert ours.decode(ids[len(ours.begin):]) in (shown, shown.removeprefix(' ' * (not ours.begin)))
    again = tokenizer_from(ours.to_dict())
    assert again.encode(ODD) == ours.encode(ODD) and again.ends == ours.ends == (ours.end,)
    assert again.begin == ours.begin == ([1] if '"TemplateProcessing"' in published else [])


def test_pieces_of_a_published_tokenizer_s_text_are_those_of_the_whole(published):
    ours = BPETokenizer(published)
    ids, text, shown = ours.encode(ODD), Text('', 10_000), ''
    for i in ids:
        text.add(ours.decode_bytes([i]))
        shown += text.take()
    assert '\ufffd' not in shown
    whole = (shown + text.text[len(shown):]).removeprefix(' ' * ours.strips)
    assert whole.rstrip('\ufffd') == ours.decode(ids).rstrip('\ufffd')
    assert ours.token_bytes()[ids].sum() == len(ours.join(ids)) and ours.token_bytes()[ours.end] == 0
    long = (TEXT + 'and so on, ' * 5000) * 2  # is encoded in pieces, too
    ids = ours.of_documents.encode(long, add_special_tokens=False).ids
    assert len(long) > 120_000 and ours.encode_with(ours.of_documents, long).tolist() == ids


def test_names_of_special_tokens_in_a_document_are_text_and_a_line_says_so(published, capsys):
    ours = BPETokenizer(published)
    name = next(name for name, i in ours.special.items() if i == ours.end)
    if '"Unigram"' in published:
        return  # whose own entries include it
    text = f'one{name}two one'
    assert ours.encode(text).count(ours.end) == 1
    assert not {*ours.special.values()} & {*ours.encode_array(text).tolist()} - {ours.special.get('<unk>')}
    ours.encode_array(text)
    assert capsys.readouterr().out.count(f'{name} in the data is encoded as the text that it is') == 1


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text', ['abc' * 1000 + '\x07\x08', 'cafe\u0301 ' * 100], ids=['control', 'NFD'])
def test_text_that_a_tokenizer_drops_or_changes_is_said_once(kind, text, capsys):
    ours = BPETokenizer(json.dumps(content_of(kind)))
    try:
        kept = [ours.decode(ours.encode_array(text)) for _ in range(3)]
    except ValueError as error:  # Unigram has no entry for most of it
        assert kind == 'Unigram' and 'changes or drops' in str(error) and '\n' not in str(error)
        return
    said = capsys.readouterr().out.count('the tokenizer changes or drops some of the text: ')
    assert said == (kept[0] != text and kind != 'Qwen')  # which brings texts into NFC


@pytest.mark.parametrize('change, text', [
    ({'pre_tokenizer': split(r'\s+') | {'behavior': 'Removed'}}, 'ab cd ' * 500),
    ({'normalizer': {'type': 'Lowercase'}}, 'AB CD ' * 500),
    ({'added_tokens': [added('b', 999, special=False, lstrip=True, rstrip=True)]}, 'a  b  c  ' * 500)])
def test_a_tokenizer_that_loses_more_than_a_hundredth_is_refused_on_the_data(change, text, own):
    told = refusal(BPETokenizer(changed(own, **change)).encode_array, text)
    assert 'changes or drops' in told and ' characters: ' in told and 'came back as' in told


def test_a_panic_of_the_library_is_one_line(own, tmp_path):
    pattern = in_sequence('pretokenizers', split('(a+)+$'), byte_level(False))
    in_folder(tmp_path, changed(own, pre_tokenizer=pattern))
    code = ('import sys\nsys.path.insert(0, sys.argv[1])\nfrom support.text.tokenizer import load_tokenizer\n'
            'try: load_tokenizer(sys.argv[2]).encode_array("a" * 60 + "b")\nexcept ValueError as e: print(e)')
    done = subprocess.run([sys.executable, '-c', code, ROOT, tmp_path], capture_output=True, text=True)
    assert done.stdout.startswith('the tokenizer fails on the text that begins \'aaa')
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ''


@pytest.mark.parametrize('text', [' ' * 10**6 + 'a', '\n ' * 500_000 + 'a'], ids=['spaces', 'lines'])
def test_a_document_of_a_million_blanks_is_encoded(text, own, bpe):
    for tokenizer in (own, GPT2Tokenizer(), BPETokenizer(json.dumps(content_of('TinyLlama')))):
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.uint32 and tokenizer.decode(ids.tolist()) == text
        assert tokenizer.encode_array('a ' + text[-1000:]).tolist() == tokenizer.encode('a ' + text[-1000:])


# ---------------------------------------------------------------------------- files

def model(**entries):
    return {'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': []} | entries}


@pytest.mark.parametrize('text, told', [
    ('', 'JSONDecodeError'), ('{}', 'model'), ('[]', 'Error'), ('5', 'TypeError'),
    ('[' * 10**5, 'RecursionError'), ('{"model": {}}', 'vocab'), ('{"model": {"vocab": []}}', 'no entries'),
    ({'model': None}, 'TypeError'), ({'added_tokens': 5}, 'TypeError'),
    (model(vocab={'a': 1 << 22}), 'its ids'), (model(vocab={'a': -1}), 'unreadable'),
    (model(vocab={'a': 1, 'b': 1}), 'one id'), (model(dropout=0.1), 'dropout'),
    (model(type='Mine'), 'unreadable')], ids=str)
def test_a_file_that_is_no_tokenizer_is_one_line(text, told, own, tmp_path):
    in_folder(tmp_path, text if isinstance(text, str) else changed(own, **text))
    line = refusal(load_tokenizer, tmp_path)
    assert 'tokenizer.json holds no tokenizer that can be used' in line and told in line
    (tmp_path / 'tokenizer.json').unlink()
    (tmp_path / 'tokenizer.model').write_bytes(b'\x0a\x0e nonsense')
    assert 'tokenizer.model holds no tokenizer that can be used' in refusal(load_tokenizer, tmp_path)


@pytest.mark.parametrize('names', [('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe')])
def test_gpt2_as_openai_published_it_is_gpt2_s_tokenizer(names, bpe, tmp_path):
    write_tokenizer(tmp_path, GPT2Tokenizer(), 64)
    content = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    assert 'model' in content['model']['vocab'] and isinstance(load_tokenizer(tmp_path), GPT2Tokenizer)
    vocab = content['model']['vocab'] | {'<|endoftext|>': 50256}
    (tmp_path / 'older').mkdir()
    (tmp_path / 'older' / names[0]).write_text(json.dumps(vocab))
    (tmp_path / 'older' / names[1]).write_text('#version: 0.2\n' + '\n'.join(
        ' '.join(m) for m in content['model']['merges']))
    assert isinstance(load_tokenizer(tmp_path / 'older'), GPT2Tokenizer)
    same = BPETokenizer((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    assert same.end == 50256 and same.n_vocab == 50257 and same.encode(ODD) == GPT2Tokenizer().encode(ODD)
    assert same.token_bytes().tolist() == GPT2Tokenizer().token_bytes().tolist()
    more = same.with_special_tokens(['<|user|>'])
    assert load_tokenizer(in_folder(tmp_path, more.json)).n_vocab == 50258


@pytest.mark.parametrize('has_config', [False, True])
def test_vocab_json_and_merges_txt_of_another_model_are_read_by_transformers(has_config, own, tmp_path):
    from transformers import GPT2Tokenizer as Theirs
    content, vocab, merges = json.loads(own.json)['model'], tmp_path / 'vocab.json', tmp_path / 'merges.txt'
    vocab.write_text(json.dumps(content['vocab']))
    merges.write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in content['merges']))
    if has_config:
        (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    ids = load_tokenizer(tmp_path).encode(ODD)
    assert ids == Theirs(vocab=str(vocab), merges=str(merges))(ODD)['input_ids']
    assert load_tokenizer(tmp_path).decode(ids) == ODD


def test_limits_and_padding_of_a_file_are_ignored(own):
    limits = {'truncation': {'direction': 'Right', 'max_length': 4, 'strategy': 'LongestFirst', 'stride': 0},
              'padding': {'strategy': {'Fixed': 8}, 'direction': 'Right', 'pad_to_multiple_of': None,
                          'pad_id': 0, 'pad_type_id': 0, 'pad_token': '<|endoftext|>'}}
    tokenizer = BPETokenizer(changed(own, **limits))
    assert tokenizer.encode(ODD) == own.encode(ODD) and tokenizer.encode('a') == own.encode('a')


# ---------------------------------------------------------------------------- of our own

@pytest.mark.parametrize('size', [257, 300, 2000])
def test_the_quick_encoder_gives_the_library_s_ids_and_every_text_comes_back(size):
    tokenizer = train_bpe([TEXT, SOURCE], size)
    assert tokenizer.quick
    for text in [*random_texts(1000, 1), TEXT, SOURCE, 'a\ud83db', 'x' * 2000]:
        ids = tokenizer.encode_array(text)
        assert np.array_equal(ids, tokenizer.encode_with(tokenizer.of_documents, text))
        assert tokenizer.decode(ids) == text.replace('\ud83d', '\ufffd')


def test_the_quick_encoder_is_for_tokenizers_of_ours_only(own):
    model = json.loads(own.json)['model']
    for changes in ({'model': model | {'merges': model['merges'][::-1]}},
                    {'normalizer': {'type': 'NFC'}}, {'pre_tokenizer': byte_level(True)}):
        other = BPETokenizer(changed(own, **changes))
        assert other.quick is None and other.encode_array(TEXT).tolist() == other.encode(TEXT)
    assert own.with_special_tokens(['<|user|>']).quick


@pytest.mark.parametrize('special', [(), ('<|user|>', '<|bot|>')])
def test_tokens_that_were_added_are_special_and_the_last(special, own):
    more = own.with_special_tokens(special)
    assert more.n_vocab == own.n_vocab + len(special) and more.encode(TEXT) == own.encode(TEXT)
    assert [more.encode(name) for name in special] == [[own.n_vocab + i] for i in range(len(special))]
    trained = train_bpe([TEXT], 600, ('<|endoftext|>', *special))
    assert trained.n_vocab == 600 and [*trained.special] == ['<|endoftext|>', *special]


def test_training_is_the_same_every_time_and_takes_any_pieces(own):
    assert train_bpe([TEXT], 600).json == own.json and own.n_vocab == 600
    assert train_bpe(iter([TEXT[:1000], TEXT[1000:]]), 600).n_vocab == 600
    assert train_bpe(['abc'], 4096).n_vocab == 257 and train_bpe([], 300).n_vocab == 257  # no more pairs
    for size in (0, 256, 65537):
        assert f'vocab_size={size} must be 257 ' in refusal(train_bpe, [TEXT], size)


def test_an_exported_tokenizer_is_the_same_to_transformers_and_to_us(own, tmp_path):
    from transformers import AutoTokenizer
    write_tokenizer(tmp_path, own, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == own.end and len(theirs) == own.n_vocab
    for text in [*random_texts(500), TEXT]:
        assert theirs(text)['input_ids'] == own.encode(text)
        assert theirs.decode(own.encode(text)) == text
    assert load_tokenizer(tmp_path).json == own.json
    theirs.save_pretrained(tmp_path / 'again')  # written otherwise, and the same
    assert is_same_tokenizer(load_tokenizer(tmp_path / 'again').to_dict(), own.to_dict())
    assert not is_same_tokenizer(train_bpe([TEXT], 300).to_dict(), own.to_dict())


# ---------------------------------------------------------------------------- datasets

@pytest.mark.parametrize('file, text, told', [
    ('dataset.json', '{"tokenizer": "gpt2"}', 'dataset.json says that they are GPT-2'),
    ('dataset.json', None, None),
    ('tokenizer.json', '{}', 'no tokenizer that can be used'), ('tokenizer.json', 'other', 'SHA-256'),
    ('tokenizer.json', None, 'tokenizer.json is missing, but dataset.json'),
])
def test_files_of_a_dataset_that_contradict_each_other_are_refused(file, text, told, own, tmp_path):
    write_text_dataset(tmp_path, TEXT, 'bpe', 'a test', vocab_size=300)
    (tmp_path / file).unlink()
    if text:
        (tmp_path / file).write_text(own.json if text == 'other' else text, encoding='utf-8')
    if told:
        assert told in refusal(Dataset, tmp_path)
    else:
        assert Dataset(tmp_path).tokenizer.n_vocab == 300
