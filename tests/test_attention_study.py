"""scripts/attention_study.py: what is kept, printed and drawn is what the runs logged."""

import json

import pytest

Figure = pytest.importorskip('matplotlib.figure').Figure
SCRIPT = 'scripts/attention_study.py'


def write_run(folder, losses):
    """A completed run with these validation losses, every 50 iterations."""
    folder.mkdir()
    lines = [{'iter': 50 * i, 'train_loss': 9.0, 'val_loss': loss} for i, loss in enumerate(losses)]
    lines += [{'iter': i, 'loss': 9.0, 'ms': 100.0} for i in range(3)]
    (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    (folder / 'done.json').write_text(str(300 * 2**20))


def test_differences_are_seed_by_seed_and_drawn_again_from_the_kept_file(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, 'savefig', lambda self, path, **more: path.write_bytes(b'no pixels'))
    losses = {'SM': ([4.0, 2.5, 2.0], [4.0, 2.7, 2.2]), 'PA_relu': ([4.0, 2.8, 2.4], [4.0, 2.9, 2.5]),
              'GK': ([4.0, 2.9, 2.1], [4.0, 3.2, 2.4])}
    for attn_type, seeds in losses.items():
        for seed, values in enumerate(seeds):
            write_run(tmp_path / f'{attn_type}-100-{seed}', values)
    trained = run_here(SCRIPT, f'--out_dir={tmp_path}', '--types=SM,PA_relu,GK', '--seeds=2',
                       '--max_iters=100')
    assert trained['differences'](trained['study'], 'GK', '100') == pytest.approx([0.1, 0.2])
    assert trained['differences'](trained['study'], 'SM', '100') == pytest.approx([-0.1, 0.1])
    table = trained['log'].split('\n\n')[-1]
    assert '| PA_relu | 2.450 | +0.350 | +0.300 to +0.400 | 100 | 300 MiB |' in table

    again = run_here(SCRIPT, f'--out_dir={tmp_path}', f'--data={tmp_path / "attention_study.json"}',
                     '--picture=again.png')
    assert again['log'].endswith(table) and (tmp_path / 'again.png').exists()
    axes = again['figure'].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['SM', 'GK', 'PA_relu']  # the best first
    means = {line.get_label(): line.get_xdata()[0] for line in axes.lines if 'after' in line.get_label()}
    assert means == pytest.approx({f'after {n} iterations': 0 for n in (0, 50, 100)})
    drawn = {(round(x, 6), round(y)) for line in axes.lines if line.get_markersize() == 3
             for x, y in zip(*line.get_data())}
    assert {(0.1, 1), (0.2, 1), (0.4, 2), (0.3, 2), (0.4, 1), (0.5, 1)} <= drawn
