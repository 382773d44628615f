"""Config files of other repositories, and files that are no configs."""

import re

import pytest
from conftest import ROOT
from test_configurator import configure_script

from configurator import configure
from support.settings import OTHER_NAMES, REMOVED


@pytest.fixture
def configured(tmp_path, capsys):
    """A script's settings after a config with this text, and what was printed."""
    def run(text, script='train.py'):
        path = tmp_path / 'theirs.py'
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return configure_script(script, str(path)), capsys.readouterr().out
    return run


def message(configured, text, **how):
    with pytest.raises(ValueError) as error:
        configured(text, **how)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_all_unknown_names_are_listed_at_once_with_what_does_it_here(configured):
    found = message(configured, 'n_layer = 4\nuse_rope = True\ndropout_p = 3\nuse_swiglu = True\n'
                                'flux = 2.5\nuse_muon = True\nweight_tying = False\nema_decay = 0.9\n'
                                'residual_scale = True\nvocab_size = 65\nmuon_weight_decay = 0.1\n')
    assert found.startswith(
        "Unknown config key: use_rope (here pos_emb = 'rope'), dropout_p (did you mean dropout?), "
        "use_swiglu (here activation = 'swiglu'), flux, use_muon (here optimizer = 'muon'), "
        'weight_tying (here tie_weights), ema_decay (removed: averaged weights gained nothing, see '
        'docs/ablations.md), residual_scale (removed), vocab_size (taken from the data), '
        'muon_weight_decay (here weight_decay) (in ')
    assert 'here' not in message(configured, 'use_rope = True', script='sample.py')


def test_every_other_name_leads_to_a_setting_and_is_none_itself(configured):
    found = configure_script('train.py')
    for name, ours in OTHER_NAMES.items():
        assert name not in found and (ours == 'taken from the data' or ours.split()[0] in found)
    assert not set(REMOVED) & set(found)
    for ours in {ours for ours in OTHER_NAMES.values() if '=' in ours}:
        assert configured(ours)[0].given == {ours.split()[0]}


@pytest.mark.parametrize('line', [
    'add_lora = False', 'add_lora = None', 'add_lora = 0', "add_lora = ''", 'use_rope = False',
    'residual_scale = False', 'skip_spikes = 0', 'muon_weight_decay = 0.0', "finetune_from = ''",
    'cpu_offload = False'])
def test_unknown_setting_that_is_off_is_dropped_with_a_line(line, configured, tmp_path):
    found, out = configured(f'n_layer = 3\n{line}\n')
    assert found['n_layer'] == 3 and line.split()[0] not in found
    assert [x for x in out.splitlines() if x.startswith('Ignoring')] == [
        f'Ignoring {line}: there is no such setting here, and it is off']
    script = {'CONSTANT': 5, 'batch_size': 1}
    (tmp_path / 'theirs.py').write_text(f'CONSTANT = 0\n{line}')
    configure(script, args=[str(tmp_path / 'theirs.py')])
    assert script['CONSTANT'] == 5 and line.split()[0] not in script


@pytest.mark.parametrize('line', [
    'add_lora = True', 'add_lora = 1', 'eval_onyl = False', 'skip_spikes = 3', 'bais = False',
    'weight_tying = False', 'tie_embeddings = False'])
def test_setting_that_is_on_or_misspelt_or_changes_the_model_is_refused(line, configured):
    assert message(configured, line).startswith(f'Unknown config key: {line.split()[0]}')


@pytest.mark.parametrize('text, shown', [
    ('batch_size: 32\n', 'line 1: batch_size: 32 assigns nothing; a config is Python: name = value$'),
    ('# YAML\nlearning_rate: 6e-4\n', 'line 2: learning_rate: 6e-4 assigns nothing'),
    ('{"batch_size": 32, "compile": false}', 'line 1: {"batch_size": 32, "compile": false} assigns'),
    ('[1, 2]', r'line 1: \[1, 2\] assigns nothing'), ('batch_size', 'line 1: batch_size assigns'),
    ('n_layer = 2\nbatch_size == 32', 'line 2: batch_size == 32 assigns nothing'),
    ('batch_size = 3\nn_layer = = 4\n', r'theirs.py, line 2: invalid syntax: n_layer = = 4$'),
    ('model:\n  n_layer: 4\n', r'theirs.py, line 1: '), ('if 1:\nx = 3\n', r'line 2: expected an indented'),
    ('return 3\n', "line 1: 'return' outside function"), ('a = "\n', 'line 1: unterminated string'),
    ('a = ' + '(' * 999, 'line 1: too many nested parentheses'),
    ('a = ' + '-' * 99999 + '1', 'theirs.py'), ('a = 1\0', 'theirs.py.*null'),
    *((text, 'theirs.py is not UTF-8 text .*: save it as UTF-8') for text in (
        '# café\nbatch_size = 3\n'.encode('latin-1'), '\n\n\nn = 1\n# café\n'.encode('latin-1'),
        'batch_size = 3\n'.encode('utf-16'), bytes(range(256)))),
    (b'# coding: nonsense\n', 'theirs.py is not UTF-8 text .*unknown encoding'),
], ids=lambda value: str(value)[:20])
def test_file_that_is_no_config_is_one_line_with_file_and_line(text, shown, configured):
    assert re.search(shown, message(configured, text))


def test_calls_texts_annotations_and_named_encodings_are_read(configured):
    found, out = configured('"""A docstring."""\nprint("hello")\nbatch_size: int = 3\n"a note"\n'
                            '[print(x) for x in "ab"]\n(n_layer := 5)\nassert True\n')
    assert (found['batch_size'], found['n_layer']) == (3, 5) and out.endswith('hello\na\nb\n')
    found, _ = configured('# -*- coding: latin-1 -*-\nout_dir = "café"\n'.encode('latin-1'))
    assert found['out_dir'] == 'café'


def test_user_sees_one_line(run_script, tmp_path):
    (tmp_path / 'theirs.py').write_text('batch_size: 32')
    error = run_script('sample.py', tmp_path / 'theirs.py', ok=False).stderr
    assert error.startswith('ValueError: ') and error.count('\n') == 1 and str(ROOT) not in error
