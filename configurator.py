"""
Overrides a script's settings from config files and the command line.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    python train.py eval_gpt2              # a bare name finds config/eval_gpt2.py
    python train.py --help                 # every setting, its default, its comment

A script states its settings as plain assignments at its top and calls `configure(globals())` right
under them, or says `exec(open('configurator.py').read())` there, as nanoGPT's scripts do.
"""

if __name__.rpartition('.')[2] == 'configurator':
    from support.settings import ROOT, configure, is_option  # noqa: F401
else:
    import sys  # nanoGPT's configurator leaves it behind, and scripts have come to use it
    sys.path.append('')  # the folder that this file was opened in
    import support.settings as _settings
    _settings.configure(globals(), is_setting=_settings.is_plain_value)
