"""Byte pairs of one's own, and any tokenizer.json: its ids are those of the library and of
transformers."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
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
    """Texts of characters from all of Unicode, and of those that tokenizers treat in their own way."""
    generator = random.Random(seed)
    kinds = [lambda: generator.choice(' \n\r\t\'’.,!?0123456789'), lambda: chr(generator.randrange(0x250)),
             lambda: chr(generator.randrange(0x300, 0x370)), lambda: generator.choice(TEXT),
             lambda: chr(generator.randrange(0xd800)), lambda: chr(generator.randrange(0xe000, 0x110000)),
             lambda: generator.choice(['<|endoftext|>', '\u00a0', '\u3000', 'é', 'e\u0301', '\ufeff', '🙂'])]
    return [''.join(generator.choice(kinds)() for _ in range(generator.randrange(60))) for _ in range(n)]


# ---------------------------------------------------------------------------- published kinds

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r'\s*[\r\n]+|\s+(?!\S)|\s+')
MARK = '\u2581'


def content_of(kind):
    """A small tokenizer.json of a kind, as published but for its entries."""
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                            processors, trainers)
    names = '<|endoftext|>', '<|im_start|>', '<|im_end|>'
    if kind == 'TinyLlama':
        names = '<unk>', '<s>', '</s>'
        library = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.train_from_iterator([TEXT], trainers.BpeTrainer(
            vocab_size=600, show_progress=False, limit_alphabet=60,
            special_tokens=[*names, *(f'<0x{b:02X}>' for b in range(256))]))
        library.pre_tokenizer = None
        library.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(' ', MARK)])
        library.decoder = decoders.Sequence([decoders.Replace(MARK, ' '), decoders.ByteFallback(),
                                             decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    else:
        library = Tokenizer.from_str(train_bpe([TEXT.replace('\n', ' ')], 500, names).json)
        library.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if kind == 'Qwen':
        library.normalizer = normalizers.NFC()
        library.add_tokens([AddedToken(name, normalized=False) for name in ('<think>', '   ')])
    else:
        library.model.ignore_merges = kind == 'Llama 3'
        library.post_processor = processors.TemplateProcessing(f'{names[1]} $A', None, [(names[1], 1)])
    content = json.loads(library.to_str())
    content['added_tokens'] = [t for t in content['added_tokens'] if '<0x' not in t['content']]
    return content


published = pytest.fixture(scope='module', params=['Llama 3', 'Qwen', 'TinyLlama'])(
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


def test_names_of_special_tokens_in_a_document_are_text(published):
    ours = BPETokenizer(published)
    text = f'one{next(name for name, i in ours.special.items() if i == ours.end)}two one'
    assert ours.encode(text).count(ours.end) == 1
    assert not {*ours.special.values()} & {*ours.encode_array(text).tolist()} - {ours.special.get('<unk>')}


def test_a_tokenizer_that_loses_more_than_a_hundredth_is_refused_on_the_data(own):
    lossy = BPETokenizer(changed(own, normalizer={'type': 'Lowercase'}))
    told = refusal(lossy.encode_array, 'AB CD ' * 500)
    assert 'changes or drops' in told and ' characters: ' in told and 'came back as' in told
    composed = BPETokenizer(changed(own, normalizer={'type': 'NFC'}))  # which loses nothing
    assert composed.decode(composed.encode_array('cafe\u0301 ' * 500)) == 'caf\u00e9 ' * 500


# ---------------------------------------------------------------------------- files

def model(**entries):
    return {'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': []} | entries}


@pytest.mark.parametrize('change, told', [
    ({'model': None}, 'TypeError'), (model(vocab={'a': 1 << 22}), 'its ids'),
    (model(vocab={'a': 1, 'b': 1}), 'one id'), (model(dropout=0.1), 'dropout')], ids=str)
def test_a_file_that_is_no_tokenizer_is_one_line(change, told, own, tmp_path):
    for text, words in (('', 'JSONDecodeError'), (changed(own, **change), told)):
        line = refusal(load_tokenizer, in_folder(tmp_path, text))
        assert 'tokenizer.json holds no tokenizer that can be used' in line and words in line


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


def test_vocab_json_and_merges_txt_of_another_model_are_read_by_transformers(own, tmp_path):
    from transformers import GPT2Tokenizer as Theirs
    content, vocab, merges = json.loads(own.json)['model'], tmp_path / 'vocab.json', tmp_path / 'merges.txt'
    vocab.write_text(json.dumps(content['vocab']))
    merges.write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in content['merges']))
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
    gpt2_s = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    for changes in ({'model': model | {'merges': model['merges'][::-1]}},
                    {'normalizer': {'type': 'NFC'}}, {'pre_tokenizer': gpt2_s}):
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

def test_files_of_a_dataset_that_contradict_each_other_are_refused(own, tmp_path):
    write_text_dataset(tmp_path, TEXT, 'bpe', 'a test', vocab_size=300)
    (tmp_path / 'tokenizer.json').write_text(own.json, encoding='utf-8')
    assert 'SHA-256' in refusal(Dataset, tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    assert 'tokenizer.json is missing, but dataset.json' in refusal(Dataset, tmp_path)
    (tmp_path / 'dataset.json').write_text('{"tokenizer": "gpt2"}')
    in_folder(tmp_path, own.json)
    assert 'dataset.json says that they are GPT-2' in refusal(Dataset, tmp_path)
