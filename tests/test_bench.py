"""bench.py: runs on what there is and prints the line that scripts parse."""

import json
import re

import pytest

SIZES = ('--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=2', '--num_steps=3',
         '--decode_tokens=5', '--device=cpu', '--compile=False', '--real_data=False')
LINE = r'^time per iteration: \d+\.\d{4}ms, MFU: (\d+\.\d\d)%'


@pytest.fixture
def bench(run_here):
    """A function that runs bench.py on a CPU, and gives what it prints, its JSON and its MFU in percent."""
    def run(*args):
        log = run_here('bench.py', *SIZES, *args)['log']
        mfu = re.search(LINE, log, re.M)
        return log, json.loads(log.splitlines()[-1]), mfu and float(mfu[1])
    return run


def test_each_mode_is_in_the_table_and_in_the_json(bench):
    log, report, mfu = bench('--mode=all', '--decode_batch=3')
    rows = {row['work']: row for row in report['rows']}
    assert set(rows) == {'train', 'decode', 'data'}
    assert rows['train']['tokens_per_s'] == pytest.approx(2 * 16 / rows['train']['median_s'])
    assert rows['decode']['tokens_per_s'] == pytest.approx(3 * 5 / rows['decode']['median_s'])
    for work, r in rows.items():
        assert 0 < r['min_s'] <= r['median_s'] <= r['max_s'] and 0 < r['share'] <= 1
        assert re.search(rf'^{work} .* {100 * r["share"]:.1f}%$', log, re.M)
    assert mfu == round(100 * rows['train']['share'], 2)  # on a CPU, both are of what was measured


def test_window_longer_than_the_random_tokens_is_refused(bench):
    with pytest.raises(ValueError, match='1,048,576 tokens, too few for block_size=1048576'):
        bench('--block_size=1048576')


def test_mfu_is_a_share_of_the_given_peak_on_real_data(bench, char_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, report, mfu = bench('--real_data=True', f'--data_dir={char_data}', '--peak_flops=1e10', '--profile')
    assert json.loads((tmp_path / 'bench_trace.json').read_text())['traceEvents'] and 'mm' in log
    assert report['parameters'] == 21 * 32 + 12 * 32 * 32 + 3 * 32  # 21 characters
    assert mfu == pytest.approx(report['rows'][0]['flops_per_s'] / 1e8, abs=0.01)
