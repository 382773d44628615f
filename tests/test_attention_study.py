"""scripts/attention_study.py: what is printed is what the runs logged."""

import json

import pytest

Figure = pytest.importorskip('matplotlib.figure').Figure
SCRIPT = 'scripts/attention_study.py'


def test_differences_of_the_final_losses_are_seed_by_seed(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, 'savefig', lambda self, path, **more: path.write_bytes(b'no pixels'))
    for attn_type, finals in {'SM': (2.0, 2.2), 'PA_relu': (2.4, 2.5)}.items():
        for seed, final in enumerate(finals):
            folder = tmp_path / f'{attn_type}-100-{seed}'
            folder.mkdir()
            lines = [{'iter': 50 * i, 'train_loss': 9.0, 'val_loss': final + 2 - i} for i in range(3)]
            lines.append({'iter': 1, 'loss': 9.0, 'ms': 100.0})
            (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
            (folder / 'done.json').write_text(str(300 * 2**20))
    done = run_here(SCRIPT, f'--out_dir={tmp_path}', '--types=SM,PA_relu', '--seeds=2', '--max_iters=100')
    assert '| PA_relu | 2.450 | +0.350 | +0.300 to +0.400 | 100 | 300 MiB |' in done['log']
