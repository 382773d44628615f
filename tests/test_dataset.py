"""support/text/dataset.py: which folder is a dataset's."""

import pytest
from conftest import ROOT

from support.text.dataset import find_dataset


@pytest.mark.parametrize('data_dir, dataset, found', [
    ('', 'mine', 'data/mine'), ('', 'data/mine', 'data/mine'), ('', './elsewhere', './elsewhere'),
    ('elsewhere', 'mine', 'elsewhere'), ('', 'missing', 'data/missing'),
    ('', 'elsewhere', 'data/elsewhere'),  # a name, not a path
    ('', 'shakespeare_char', str(ROOT / 'data/shakespeare_char'))])
def test_dataset_is_a_name_in_data_or_the_path_of_a_folder(data_dir, dataset, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data/mine').mkdir(parents=True)
    (tmp_path / 'elsewhere').mkdir()
    assert find_dataset(data_dir, dataset) == found
