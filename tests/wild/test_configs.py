"""Config files of other repositories, and files that are no configs."""

import re

import pytest
from conftest import ROOT
from test_configurator import config_file, settings_of

from configurator import configure
from support.settings import OTHER_NAMES


@pytest.fixture
def configured(tmp_path, capsys):
    """train.py's settings after a config with this text, and what was printed."""
    def run(text, *args, script='train.py'):
        found, _ = settings_of(script)
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / 'theirs.py').write_bytes(data)
        return configure(found, args=[str(tmp_path / 'theirs.py'), *args]), capsys.readouterr().out
    return run


def message(configured, text, **how):
    with pytest.raises(ValueError) as error:
        configured(text, **how)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_all_unknown_names_are_told_at_once_with_what_does_it_here(configured):
    told = message(configured, 'n_layer = 4\nuse_rope = True\ndropout_p = 3\nuse_swiglu = True\nflux = 2.5\n'
                               'use_muon = True\nweight_tying = False\nresidual_scale = True\n'
                               'vocab_size = 65\nmuon_weight_decay = 0.1\n')
    assert told.startswith(
        "Unknown config key: use_rope (here pos_emb = 'rope'), dropout_p (did you mean dropout?), "
        "use_swiglu (here activation = 'swiglu'), flux, use_muon (here optimizer = 'muon'), "
        'weight_tying (here tie_weights), residual_scale (removed), vocab_size (taken from the data), '
        'muon_weight_decay (here weight_decay) (in ')


@pytest.mark.parametrize('name', ['use_rope', 'use_rmsnorm', 'use_swiglu', 'use_muon', 'weight_tying',
                                  'norm_type', 'rope', 'mlp'])
def test_well_known_names_lead_to_settings_that_exist(name, configured):
    ours = OTHER_NAMES[name]
    assert f'{name} (here {ours})' in message(configured, f'{name} = 2')
    found, _ = configured(ours if '=' in ours else '')
    assert ours.partition(' ')[0] in found


def test_every_other_name_leads_to_a_setting_and_is_none_itself():
    found, _ = settings_of('train.py')
    for name, ours in OTHER_NAMES.items():
        assert name not in found and (ours in ('removed', 'taken from the data') or ours.split()[0] in found)


def test_scripts_without_the_setting_have_no_hint(configured):
    assert 'here' not in message(configured, 'use_rope = True', script='sample.py')


@pytest.mark.parametrize('line', ['add_lora = False', 'add_lora = None', 'add_lora = 0', "add_lora = ''",
                                  'use_rope = False', 'residual_scale = False', 'skip_spikes = 0',
                                  'muon_weight_decay = 0.0'])
def test_unknown_setting_that_is_off_is_dropped_with_a_line(line, configured):
    found, out = configured(f'n_layer = 3\n{line}\n')
    name = line.split()[0]
    assert found['n_layer'] == 3 and name not in found
    assert [x for x in out.splitlines() if x.startswith('Ignoring')] == [
        f'Ignoring {line}: there is no such setting here, and it is off']


@pytest.mark.parametrize('line', ['add_lora = True', 'add_lora = 1', 'eval_onyl = False', 'skip_spikes = 3',
                                  'weight_tying = False', 'tie_embeddings = False', 'bais = False'])
def test_unknown_setting_that_is_on_or_misspelt_or_changes_the_model_is_refused(line, configured):
    assert message(configured, line).startswith(f'Unknown config key: {line.split()[0]}')


def test_dropped_name_leaves_the_script_as_it_was(tmp_path, capsys):
    script = {'CONSTANT': 5, 'batch_size': 1}
    configure(script, args=[config_file(tmp_path, 'CONSTANT = 0\nother = None')])
    assert script['CONSTANT'] == 5 and 'other' not in script


# ---------------------------------------------------------------------------- no config

@pytest.mark.parametrize('text, line, shown', [
    ('batch_size: 32\n', 1, 'batch_size: 32'), ('# YAML\nlearning_rate: 6e-4\n', 2, 'learning_rate: 6e-4'),
    ('{"batch_size": 32, "compile": false}', 1, '{"batch_size": 32, "compile": false}'),
    ('[1, 2]', 1, '[1, 2]'), ('n_layer = 2\nbatch_size == 32', 2, 'batch_size == 32'),
    ('batch_size', 1, 'batch_size'),
])
def test_statement_that_assigns_nothing_is_refused(text, line, shown, configured):
    assert f'theirs.py, line {line}: {shown} assigns nothing; a config is Python: name = value' in message(
        configured, text)


def test_calls_texts_and_annotated_settings_are_no_such_statements(configured):
    found, out = configured('"""A docstring."""\nprint("hello")\nbatch_size: int = 3\n"a note"\n'
                            '[print(x) for x in "ab"]\n(n_layer := 5)\nassert True\n')
    assert (found['batch_size'], found['n_layer']) == (3, 5) and out.endswith('hello\na\nb\n')


@pytest.mark.parametrize('text, told', [
    ('batch_size = 3\nn_layer = = 4\n', r'theirs.py, line 2: invalid syntax: n_layer = = 4$'),
    ('model:\n  n_layer: 4\n', r'theirs.py, line 1: '), ('if 1:\nx = 3\n', r'line 2: expected an indented'),
    ('return 3\n', "line 1: 'return' outside function"), ('a = "\n', 'line 1: unterminated string'),
    ('a = ' + '(' * 999, 'line 1: too many nested parentheses'), ('a = ' + '-' * 99999 + '1', 'theirs.py'),
    ('a = 1\0', 'theirs.py.*null'),
    ('# café\nbatch_size = 3\n'.encode('latin-1'), 'theirs.py is not UTF-8 text .*: save it as UTF-8'),
    ('\n\n\nn = 1\n# café\n'.encode('latin-1'), 'theirs.py is not UTF-8 text .*: save it as UTF-8'),
    ('batch_size = 3\n'.encode('utf-16'), 'theirs.py is not UTF-8 text .*: save it as UTF-8'),
    (b'# coding: nonsense\n', 'theirs.py is not UTF-8 text .*unknown encoding'),
    (bytes(range(256)), 'theirs.py is not UTF-8 text'),
])
def test_file_that_is_no_python_is_told_with_file_and_line(text, told, configured):
    assert re.search(told, message(configured, text))


def test_file_that_names_its_encoding_is_read(configured):
    found, _ = configured('# -*- coding: latin-1 -*-\nout_dir = "café"\n'.encode('latin-1'))
    assert found['out_dir'] == 'café'


def test_user_sees_one_line(run_script, tmp_path):
    for text in ('batch_size: 32', 'batch_size = = 32', 'use_rope = True'):
        error = run_script('sample.py', config_file(tmp_path, text), ok=False).stderr
        assert error.startswith('ValueError: ') and error.count('\n') == 1 and str(ROOT) not in error
