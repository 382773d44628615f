"""
What the scripts share, one job a file. Imports go down: run, hub, network, text, machine.

    run/       how a run starts, what it keeps and what it prints; the prompt of sample.py
    hub/       Hugging Face's transformers, EleutherAI's lm-eval
    network/   what attaches to a model: attention types, sampling, loss, optimizers, adapters, probes, scores
    text/      token files, tokenizers, and the preparation of both
    machine/   what a program runs on: console, files, hardware, processes, signals, sharding
"""
