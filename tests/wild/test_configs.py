"""Config files of other repositories, and files that are no configs."""

import re

import pytest
from test_configurator import configure_script

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
    found = message(configured, 'n_layer = 4\nuse_rope = True\ndropout_p = 3\nflux = 2.5\n'
                                'weight_tying = False\nresidual_scale = True\nvocab_size = 65\n')
    assert found.startswith(
        "Unknown config key: use_rope (here pos_emb = 'rope'), dropout_p (did you mean dropout?), flux, "
        'weight_tying (here tie_weights), residual_scale (removed), vocab_size (taken from the data) (in ')
    assert 'here' not in message(configured, 'use_rope = True', script='sample.py')


def test_every_other_name_leads_to_a_setting_and_is_none_itself(configured):
    found = configure_script('train.py')
    for name, ours in OTHER_NAMES.items():
        assert name not in found and (ours == 'taken from the data' or ours.split()[0] in found)
    assert not set(REMOVED) & set(found)
    for ours in {ours for ours in OTHER_NAMES.values() if '=' in ours}:
        assert configured(ours)[0].given == {ours.split()[0]}


@pytest.mark.parametrize('line', [
    'add_lora = False', 'add_lora = None', 'use_rope = False', 'skip_spikes = 0'])
def test_unknown_setting_that_is_off_is_dropped_with_a_line(line, configured):
    found, out = configured(f'n_layer = 3\n{line}\n')
    assert found['n_layer'] == 3 and line.split()[0] not in found
    assert [x for x in out.splitlines() if x.startswith('Ignoring')] == [
        f'Ignoring {line}: there is no such setting here, and it is off']


@pytest.mark.parametrize('line', [
    'add_lora = True', 'eval_onyl = False', 'weight_tying = False'])
def test_setting_that_is_on_or_misspelt_or_changes_the_model_is_refused(line, configured):
    assert message(configured, line).startswith(f'Unknown config key: {line.split()[0]}')


@pytest.mark.parametrize('text, shown', [
    ('# YAML\nlearning_rate: 6e-4\n', 'line 2: learning_rate: 6e-4 assigns nothing'),
    ('{"batch_size": 32, "compile": false}', 'line 1: {"batch_size": 32, "compile": false} assigns'),
    ('batch_size = 3\nn_layer = = 4\n', r'theirs.py, line 2: invalid syntax: n_layer = = 4$'),
    ('# café\nbatch_size = 3\n'.encode('latin-1'), 'theirs.py is not UTF-8 text .*: save it as UTF-8'),
], ids=lambda value: str(value)[:20])
def test_file_that_is_no_config_is_one_line_with_file_and_line(text, shown, configured):
    assert re.search(shown, message(configured, text))


def test_calls_texts_and_annotations_are_read(configured):
    found, out = configured('"""A docstring."""\nprint("hello")\nbatch_size: int = 3\n"a note"\n'
                            '[print(x) for x in "ab"]\n(n_layer := 5)\nassert True\n')
    assert (found['batch_size'], found['n_layer']) == (3, 5) and out.endswith('hello\na\nb\n')
