"""
The folder of a model: one on this machine, or what a name of the Hugging Face hub stands for.

    folder = model_folder('HuggingFaceTB/SmolLM2-135M')                # configuration and tokenizer
    folder = model_folder('HuggingFaceTB/SmolLM2-135M', weights=True)  # the weights, too

Only the files that are needed are downloaded, into Hugging Face's cache, which is all there is
without a network.
"""

import os
import re
from pathlib import Path

from support.errors import MissingFile, UserError
from support.machine.files import go_offline_if_cut_off, reason_of

# owners of the models whose names are used without one
OWNERS = {'gpt2': 'openai-community', 'gpt2-medium': 'openai-community',
          'gpt2-large': 'openai-community', 'gpt2-xl': 'openai-community',
          'distilgpt2': 'distilbert'}
SMALL = ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json',
         'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
         'tokenizer.model', 'chat_template.jinja', '*.index.json']
WEIGHTS = (['model*.safetensors'], ['pytorch_model*.bin'])  # the second if there is no first


def is_hub_name(name):
    """Whether a string has the form of a model's name on the hub, owner/name, or is one of
    OWNERS."""
    return name in OWNERS or bool(re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', str(name), re.A))


def model_folder(name, weights=False):
    """A model's folder as a Path. weights: whether its weights are needed.

    A folder that holds a model is that model; any other name of the hub's form is the hub's,
    whatever lies here under that name. Raises MissingFile or UserError in one line.
    """
    if Path(name, 'config.json').is_file():
        return Path(name)
    if not is_hub_name(name):
        raise MissingFile(f'{name} is neither one of {", ".join(OWNERS)} nor a folder with a '
                          'config.json, nor a name of the hub, which is like owner/name')
    go_offline_if_cut_off()
    folder = download(name, SMALL)
    if not (folder / 'config.json').is_file():
        raise MissingFile(f'{name} has no config.json on the hub: no model that transformers reads')
    for patterns in WEIGHTS if weights else ():
        folder = download(name, SMALL + patterns)
        if any(folder.glob(patterns[0])):
            break
    return folder


def tokenizer_path(name):
    """What a setting `tokenizer` names, with a name of the hub turned into the folder of its
    files."""
    is_path = Path(name).exists() or name == 'gpt2' or not is_hub_name(name)
    return name if is_path else str(model_folder(name))


def download(name, patterns):
    """The folder of the hub's cache with those files of a model that match."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (GatedRepoError, HFValidationError, HfHubHTTPError,
                                        LocalEntryNotFoundError, RepositoryNotFoundError)
    names = [name, f'{OWNERS[name]}/{name}'] if name in OWNERS else [name]
    for spelling in names:
        try:
            return Path(snapshot_download(spelling, allow_patterns=patterns,
                                          local_files_only=os.environ.get('HF_HUB_OFFLINE') == '1'))
        except LocalEntryNotFoundError:
            continue  # the cache may have it under its other name
        except GatedRepoError:
            raise UserError(f'{name} is gated: agree to its conditions on its page of the hub, then '
                            'run: hf auth login') from None
        except (RepositoryNotFoundError, HFValidationError):
            raise MissingFile(f'{name} is no folder with a model here, and the hub has no {name} '
                              'that it shows you: check the name, or run for a private one: '
                              'hf auth login') from None
        except (HfHubHTTPError, OSError) as error:
            raise MissingFile(f'{name} can\'t be downloaded from the hub ({reason_of(error)}): try '
                              'again; what has arrived is kept') from None
    raise MissingFile(f'can\'t reach huggingface.co, and {name} is not in its cache: connect once, '
                      'or name a folder that holds the model')
