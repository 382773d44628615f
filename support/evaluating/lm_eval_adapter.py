"""
Our models in EleutherAI's lm-eval, for all of its tasks.

    pip install "lm-eval[hf]"
    python eval.py --init_from=gpt2 --task=lm_eval:arc_easy,lm_eval:piqa
"""

import torch
from tqdm import tqdm

from support.errors import UserError
from support.evaluating.scoring import windows_of
from support.sampling.decoding import generate

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f'tasks of lm-eval need it installed ({error}): pip install "lm-eval[hf]"') from None

PIECE = 32  # tokens generated between checks for a stop string


class LMEvalModel(LM):
    """A Scorer behind lm-eval's interface, in which prompts and answers are strings."""

    def __init__(self, scorer):
        super().__init__()
        self.scorer, self.model = scorer, scorer.model
        self.tokenizer, self.run = scorer.tokenizer, scorer.run

    def loglikelihood(self, requests):
        """[(log-probability, whether greedy decoding gives it)] of each (context, continuation)."""
        return self.scorer.texts([request.args for request in requests], 'lm-eval')

    def loglikelihood_rolling(self, requests):
        """[log-probability] of each whole text."""
        first, block_size = self.tokenizer.first_token(), self.model.config.block_size
        of_text = [windows_of(self.tokenizer.encode(*request.args), first, block_size)
                   for request in requests]
        scores = iter(self.scorer.ids([pair for pairs in of_text for pair in pairs], 'lm-eval'))
        return [sum(next(scores)[0] for _ in pairs) for pairs in of_text]

    def generate_until(self, requests):
        """[text] that follows each context, up to a stop string or max_gen_toks tokens."""
        return [self.continue_text(*request.args) for request in tqdm(requests, 'lm-eval', disable=None)]

    def continue_text(self, context, settings):
        stops = settings.get('until') or []
        stops = [*([stops] if isinstance(stops, str) else stops), '<|endoftext|>']
        left, text = settings.get('max_gen_toks', 256), ''
        temperature = settings.get('temperature', 1.0) if settings.get('do_sample') else 0
        room = max(1, self.model.config.block_size - left)
        ids = (self.tokenizer.encode(context) or [self.tokenizer.first_token()])[-room:]
        new = []
        while left > 0 and not any(stop and stop in text for stop in stops):
            idx = torch.tensor([ids + new], device=self.run.device)
            with self.run.autocast():
                out = generate(self.model, idx, min(left, PIECE), temperature, n_vocab=self.tokenizer.n_vocab)
            new, left = out[0, len(ids):].tolist(), left - PIECE
            text = self.tokenizer.decode(new)
        return text[:min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def evaluate_with_lm_eval(names, scorer, limit=0):
    """{task: {metric: value}} of lm-eval's tasks and groups of tasks."""
    manager = TaskManager()
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(f'lm-eval has no task {", ".join(unknown)}; to list them, run: lm-eval ls tasks')
    found = simple_evaluate(LMEvalModel(scorer), tasks=names, limit=limit or None,
                            task_manager=manager, bootstrap_iters=0)
    return {task: {key.removesuffix(',none'): value for key, value in metrics.items()
                   if isinstance(value, float) and '_stderr' not in key}
            | {'n': found['n-samples'].get(task, {}).get('effective', 0)}
            for task, metrics in found['results'].items()}
