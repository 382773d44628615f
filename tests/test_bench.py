"""bench.py: runs on what there is and prints the line that scripts parse."""

import json
import re

import pytest

from support.machine import hardware, runtime

SIZES = ('--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=2', '--num_steps=3',
         '--device=cpu', '--compile=False')
LINE = r'^time per iteration: \d+\.\d{4}ms, MFU: (\d+\.\d\d%)'


@pytest.mark.parametrize('setting, told', [('num_steps=-1', 'at least 1'), ('decode_tokens=0', 'at least 1'),
                                           (f'seed={10**22}', 'fit into 64 bits')])
def test_settings_that_cannot_be_meant_are_refused(setting, told, run_here):
    with pytest.raises(ValueError, match=told):
        run_here('bench.py', '--real_data=False', '--device=cpu', f'--{setting}')


@pytest.mark.parametrize('real', [True, False])
def test_time_and_mfu_are_printed(run_script, char_data, real):
    done = run_script('bench.py', *SIZES, f'--data_dir={char_data}', f'--real_data={real}')
    mfu = re.search(LINE, done.stdout, re.M)
    assert mfu and 0 <= float(mfu[1].rstrip('%')) < 100


def test_all_modes_are_in_the_table_and_in_the_json(run_script):
    done = run_script('bench.py', *SIZES, '--real_data=False', '--mode=all', '--decode_tokens=5',
                      '--decode_batch=3')
    report = json.loads(done.stdout.splitlines()[-1])
    train, decode, data = report['rows']
    assert [r['work'] for r in report['rows']] == ['train', 'decode', 'data']
    assert train['tokens_per_s'] == pytest.approx(2 * 16 / train['median_s'])
    assert decode['tokens_per_s'] == pytest.approx(3 * 5 / decode['median_s'])
    assert train['flops_per_s'] > 0 and decode['bytes_per_s'] > 0 and data['bytes_per_s'] > 0
    assert all(r['min_s'] <= r['median_s'] <= r['max_s'] for r in report['rows'])
    assert all(limit > 0 for limit in report['measured_limits'].values())
    assert all(0 < r['share'] <= 1 for r in report['rows'])
    assert f'MFU: {100 * train["share"]:.2f}%' in done.stdout  # on a CPU, both are of what was measured
    assert all(re.search(rf'^{work} ', done.stdout, re.M) for work in ('train', 'decode', 'data'))


def test_decoding_is_not_compiled_unless_it_is_asked_for(run_here, monkeypatch):
    monkeypatch.setattr(runtime, 'can_compile', lambda device_type: True)
    args = [a for a in SIZES if 'compile' not in a]
    script = run_here('bench.py', *args, '--real_data=False', '--mode=decode', '--decode_tokens=5')
    assert json.loads(script['log'].splitlines()[-1])['compile'] is False


def test_nothing_is_above_100_percent_where_the_limits_were_measured_on_a_busy_machine(run_here, monkeypatch):
    monkeypatch.setattr(hardware, 'measure_matmul', lambda *args: 1.0)
    monkeypatch.setattr(hardware, 'measure_bandwidth', lambda *args: 1.0)
    script = run_here('bench.py', *SIZES, '--real_data=False', '--mode=all', '--decode_tokens=5')
    assert 'MFU: 100.00%' in script['log'] and script['log'].count(' 100.0%\n') == 2  # train, a reader


def test_mfu_is_a_share_of_the_given_peak(run_script):
    shares = []
    for peak in ('1e10', '1e8'):
        done = run_script('bench.py', *SIZES, '--real_data=False', f'--peak_flops={peak}')
        shares.append(float(re.search(LINE, done.stdout, re.M)[1].rstrip('%')))
    assert shares[1] > 20 * shares[0]  # a hundredth of the peak, timing noise aside


def test_profile_writes_a_trace(run_script, tmp_path):
    done = run_script('bench.py', *SIZES, '--real_data=False', '--profile', cwd=tmp_path)
    assert json.loads((tmp_path / 'bench_trace.json').read_text())['traceEvents']
    assert 'addmm' in done.stdout or 'mm' in done.stdout


def test_missing_data_names_the_ways_out(run_script, tmp_path):
    done = run_script('bench.py', *SIZES, f'--data_dir={tmp_path}', ok=False)
    assert '--real_data=False' in done.stderr and len(done.stderr.splitlines()) == 1
