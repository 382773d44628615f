"""
Export a trained model as a Hugging Face folder, for transformers and everything that reads its
format.

    python export.py --out_dir=out-shakespeare-char --export_dir=exported
    python export.py --out_dir=out-shakespeare-char --push=me/my-gpt    # to the hub too

    from transformers import pipeline
    pipeline('text-generation', model='exported')('ROMEO:', do_sample=True)

The folder computes what the checkpoint does: as GPT-2's architecture, as Llama's, or, for a model
that is neither, with model.py in the folder (`trust_remote_code=True`). `--init_from=exported`
reads it back, bit for bit.
"""

from configurator import configure  # first, as it says what this Python lacks

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from support.errors import UserError
from support.hub.card import model_card
from support.hub.exporting import (CODE, FILES, KINDS, OWN_CODE, add_chat_template, beyond,
                                   to_transformers, with_pad_token, write_model, write_tokenizer)
from support.machine.files import explain_failure, own_name, reason_of
from support.text.chat import ChatForm
from support.training.models import config_from_args, model_args, tokenizer_of
from support.training.state import State

# ---------------------------------------------------------------------------- settings

out_dir = 'out'  # of the run whose ckpt.pt is exported
export_dir = 'exported'
overwrite = False  # replace files in export_dir that another program wrote
push = ''  # a repository on the Hugging Face hub, such as me/my-gpt, to upload the folder to
private = False  # make a new repository private; before the first upload, log in with: hf auth login

configure(globals())

ALL_FILES = (*FILES, *CODE, 'tokenizer.json', 'tokenizer_config.json', 'README.md')


# ---------------------------------------------------------------------------- the folder

def write_folder(folder, state, name):
    """Write the files of an export into an empty folder. Returns their names and a summary."""
    args, weights = model_args(config_from_args(state.model_args)), state.model
    state = replace(state, model_args=args)
    tokenizer = tokenizer_of(state)
    tokenizer.encode('')  # raises ValueError if the tokens have no text
    form = ChatForm(state.chat, tokenizer) if state.chat else None
    config, theirs = to_transformers(*with_pad_token(args, weights, tokenizer))
    ends = sorted({*tokenizer.ends, *(form.end_ids if form else ())})
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    config.bos_token_id = tokenizer.end if tokenizer.end is None else tokenizer.first_token()
    if config.vocab_size > args['vocab_size']:
        config.unpadded_vocab_size = args['vocab_size']  # by which init_from reads the model back
    pad = ends[0] if ends else tokenizer.n_vocab
    names = write_model(folder, config, theirs, tokenizer.n_vocab, pad)
    names += write_tokenizer(folder, tokenizer, args['block_size'])
    if form:
        add_chat_template(folder, state.chat)
    n_parameters = sum(v.numel() for k, v in weights.items()
                       if k != 'lm_head.weight' or not args.get('tie_weights', True))
    log = Path(out_dir, 'log.jsonl')
    card = model_card(name, state, config.model_type, n_parameters, tokenizer, log)
    (folder / 'README.md').write_text(card, encoding='utf-8')
    summary = f'{n_parameters:,} parameters, {KINDS[config.model_type]}'
    if config.model_type == OWN_CODE:
        reasons = min((beyond(kind, args) for kind in ('gpt2', 'llama')), key=len)
        summary += f' (trust_remote_code=True), for {", ".join(reasons)}'
    return [*names, 'README.md'], summary


def export(folder, state):
    """Write an export beside `folder`, then move its files there, in place of an earlier one's.
    Returns their names and a summary."""
    temporary, failure = own_name(folder), f'export_dir={folder} can\'t be written to'
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explain_failure(failure):
            temporary.mkdir(parents=True)
        names, summary = write_folder(temporary, state, push or os.path.basename(os.path.realpath(folder)))
        with explain_failure(failure):
            folder.mkdir(exist_ok=True)
        for name in {*ALL_FILES} - {*names}:  # of an earlier export
            (folder / name).unlink(missing_ok=True)
        for name in names:
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return names, summary


def check_target(folder):
    """ValueError, before the work, if the export would replace what another program wrote, or
    `push` is no name of a repository."""
    card = folder / 'README.md'
    is_ours = card.is_file() and re.search(r'^A GPT with [\d,]+ parameters \(', card.read_text(
        encoding='utf-8', errors='replace'), re.M)
    if folder.exists() and not folder.is_dir():
        raise UserError(f'export_dir={folder} is a file: name a folder')
    there = [name for name in ALL_FILES if (folder / name).exists()]
    if there and not is_ours and not overwrite:
        raise UserError(f'{folder} has {", ".join(there)} of another program: name an empty --export_dir, '
                         'or add --overwrite=True')
    if there and is_ours:
        print(f'replacing the export in {folder}')
    if push and not re.fullmatch(r'(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]{0,94}(?<![.-])', push, re.A):
        raise UserError(f'push={push} is no name of a repository on the hub, which is like me/my-gpt')


check_target(Path(export_dir))
folder, (_, state) = Path(export_dir), State.trained_in(out_dir)
names, summary = export(folder, state)
print(f'wrote {folder}: {summary}, iteration {state.iter_num}')

# ---------------------------------------------------------------------------- the hub

if push:
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(push, private=private, exist_ok=True)
        url = HfApi().upload_folder(repo_id=push, folder_path=folder, allow_patterns=names)
    except Exception as error:  # whatever the hub's libraries raise, the folder is complete
        raise UserError(f'{folder} is complete, but {push} could not be uploaded '
                         f'({reason_of(error)}): to log in, run: hf auth login') from None
    print(f'uploaded to {url}')
