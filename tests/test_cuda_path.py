"""What a GPU would run, as far as a CPU can tell: no waiting for the device, no mixed devices, whole graphs,
and a cache of fixed memory. test_cuda.py asks the GPU itself.

The first part runs on fake CUDA tensors, which have shapes and devices but no numbers: an operator that
needs a number on the host raises there. The compiled part uses AOTAutograd without a code generator.
"""

import copy
import ctypes
import json
from pathlib import Path

import pytest
import torch
from conftest import scrambled, tiny
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from model import KVCache
from support.machine.runtime import Runtime
from support.sampling import decoding
from support.sampling.graphs import StaticCache, agrees
from support.sampling.quantize import build_quantized
from support.training.diagnostics import measure_vitals
from support.training.loss import ChunkedLoss
from support.training.optim import make_optimizer

SIZES = {'n_head': 4, 'bias': False}
ROTARY = {'pos_emb': 'rope', 'qk_norm': True, 'n_kv_head': 2, 'value_residual': True, 'norm': 'rmsnorm'}
OPTIONS = [{}, ROTARY, {'pos_emb': 'alibi', 'n_kv_head': 2, 'activation': 'swiglu'},
           {'pos_emb': 'none', 'ngram': 3, 'ngram_rows': 50, 'logit_softcap': 5.0, 'tie_weights': False}]


@pytest.fixture
def cuda(monkeypatch):
    """A fake GPU that has bfloat16, for as long as the test runs. A CPU build has no device guard for CUDA,
    which indexing asks for: that of the meta device, which does nothing, stands in."""
    library = Path(torch.__file__).parent / 'lib/libc10.so'
    if torch.cuda.is_available() or not library.exists():
        pytest.skip('needs Linux without a GPU')
    guards = (ctypes.c_void_p * 20).in_dll(ctypes.CDLL(str(library)),
                                           '_ZN3c104impl26device_guard_impl_registryE')
    before, cuda, meta = guards[1], 1, 14  # c10::DeviceType
    guards[cuda] = guards[cuda] or guards[meta]
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    with FakeTensorMode():
        yield torch.device('cuda')
    guards[cuda] = before


def fake_model(**options):
    """A model with parameters on the fake GPU: without numbers, since there is no generator to make them."""
    model, made = tiny(**SIZES | options), {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made[p] = made.get(p, torch.nn.Parameter(torch.empty(p.shape, device='cuda')))
                module._parameters[name] = made[p]
    return model


def zeros(*shape, device='cuda'):
    return torch.zeros(*shape, dtype=torch.int64, device=device)


@pytest.mark.parametrize('options', [*OPTIONS, {'attn_type': 'GK'}], ids=str)
@torch.no_grad()
def test_forward_pass_does_not_wait(cuda, options):
    model = fake_model(**options).requires_grad_(False)
    with torch.autocast('cuda', torch.bfloat16):
        for how in ({}, {'loss': ChunkedLoss(model, 64 * 10)}):
            loss = model(zeros(2, 32), zeros(2, 32), **how)[1]
            assert loss.device.type == 'cuda' and loss.dtype == torch.float32


def caches(model, prompt):
    """A KVCache of a prompt, and a StaticCache of the same with the position that it counts by."""
    first, second, at = KVCache(32), KVCache(32), torch.tensor([prompt.shape[1] + 1])
    for cache in (first, second):
        model(prompt, cache=cache)
    return first, StaticCache(second, at), at


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@torch.no_grad()
def test_static_cache_gives_what_the_other_does_up_to_the_last_position(options):
    model, idx = scrambled(tiny(**SIZES | options), 0.3).double().eval(), torch.randint(64, (3, 32))
    for n_given in (1, 20):
        growing, static, at = caches(model, idx[:, :n_given])
        memory = [t.data_ptr() for kv in static.kv.values() for t in kv]
        assert agrees(model, growing, at)
        for t in range(n_given, 32):
            static.begin()
            found = model(idx[:, t:t + 1], cache=static)[0]
            torch.testing.assert_close(found, model(idx[:, t:t + 1], cache=growing)[0], rtol=0, atol=1e-9)
            torch.testing.assert_close(found, model(idx[:, :t + 1])[0], rtol=0, atol=1e-9)
            at.add_(1)
        assert memory == [t.data_ptr() for kv in static.kv.values() for t in kv]


@torch.no_grad()
def test_model_whose_attention_does_not_ask_the_cache_for_its_mask_does_not_agree():
    model, idx = scrambled(tiny(), 0.3).eval(), torch.randint(64, (3, 5))

    class Maskless(type(model.transformer.h[0].attn)):
        def attend(self, q, k, v, cache=None, begins=None):
            return super().attend(q, k, v, None, begins)

    growing, _, at = caches(model, idx)
    before = [t.clone() for kv in growing.kv.values() for t in kv]
    for block in model.transformer.h:
        block.attn.__class__ = Maskless
    assert not agrees(model, growing, at) and growing.length == 5
    assert all(map(torch.equal, before, [t for kv in growing.kv.values() for t in kv]))


@pytest.fixture
def graphs():
    """What torch.compile makes from here on: a list with one item a graph."""
    found = []

    def compiler(graph, inputs):
        found.append(graph)
        return graph
    torch._dynamo.reset()
    counters.clear()
    torch.compiler.set_default_backend(aot_autograd(fw_compiler=compiler, bw_compiler=lambda graph, _: graph))
    yield found
    torch.compiler.set_default_backend(None)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('options', [{}, ROTARY, OPTIONS[3]], ids=str)
def test_model_is_compiled_whole_once_for_training_and_once_for_evaluating(options, checkpointing, graphs):
    """As train.py does. Vitals and samples, here the first that a model does, add nothing."""
    run, idx = Runtime('cpu', 'float32', True, 'gloo'), torch.randint(64, (2, 32))
    model, seen = tiny(**SIZES | options), []
    model.activation_checkpointing = checkpointing
    lean = {'loss': ChunkedLoss(model, 64 * 10)}
    model.compile()
    for step in ('sample', 'vitals', 'train', 'evaluate', 'train', 'vitals', 'sample', 'evaluate', 'train'):
        model.train(step in ('train', 'vitals'))
        with torch.set_grad_enabled(step == 'train'), torch.compiler.set_stance(
                'force_eager' if step == 'sample' else 'default'):
            if step == 'sample':
                decoding.generate(model, idx[:1, :2], 20, seeds=[1])
            elif step == 'vitals':
                measure_vitals(model, run, idx.numpy())
            else:
                loss = model(idx, idx, **lean)[1]
        if step == 'train':
            loss.backward()
        seen.append(len(graphs))
    assert seen == [0, 0, 1, *[2] * 6] and not counters['graph_break']


@pytest.mark.parametrize('newton_schulz', ['steep', 'exact'])
def test_products_of_muon_are_one_graph_that_computes_the_same(newton_schulz, graphs):
    settings = {'optimizer': 'muon', 'learning_rate': 1e-2, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95,
                'muon_lr': 0.03, 'embedding_lr': 0.0, 'newton_schulz': newton_schulz, 'compile': True}
    model = scrambled(tiny(**SIZES | ROTARY))
    models = model, copy.deepcopy(model)
    opts = [make_optimizer(model, settings | {'cuda_graphs': on}, 'cpu') for model, on in zip(models, (0, 1))]
    for _ in range(3):
        for params in zip(*(model.parameters() for model in models)):
            params[0].grad = torch.randn_like(params[0])
            params[1].grad = params[0].grad.clone()
        for opt in opts:
            opt.step()
    assert all(map(torch.equal, *(model.parameters() for model in models)))
    assert len(graphs) == 1 and not counters['graph_break']


@pytest.mark.parametrize('weights', ['full', 'int8'])
def test_compiled_decoding_gives_the_same_text_and_compiles_nothing_while_a_step_is_recorded(weights, graphs):
    """The first step is compiled, and the first that reads all of the cache. A recording has no cache of
    autocast's. The sizes of int8 are those that PyTorch's own products for CPUs don't take."""
    model, seen = scrambled(tiny(block_size=200, n_embd=24, n_inner=100), 0.3).eval(), []
    if weights == 'int8':
        model = build_quantized(model.config, model.state_dict().items(), weights)
    idx, sampling = torch.randint(64, (1, 5)), decoding.Sampling(0.8, None, max_new_tokens=140)

    def text():
        seen.clear()
        for token in decoding.stream(model, idx, sampling, n_samples=2, seeds=range(2), compiled=compiled,
                                     static=True):
            seen.append(len(graphs))
            torch.set_autocast_cache_enabled(len(seen) < 3)
            yield token

    compiled = None
    with torch.autocast('cpu', torch.bfloat16):
        expected = torch.cat([*text()], dim=1)
        torch.set_autocast_cache_enabled(True)
        compiled = decoding.compile_for_decoding(model)
        assert torch.equal(torch.cat([*text()], dim=1), expected)
    assert seen == [0] + [1] * 123 + [2] * 16 and not counters['graph_break']


def test_report_runs_from_end_to_end_in_tiny_sizes_and_continues(run_script, char_data, tmp_path):
    args = ('--tiny=True', '--device=cpu', f'--data_dir={char_data}', f'--out_dir={tmp_path}',
            '--only=124M, --compile=False|seed=1339')
    run_script('scripts/gpu_report.py', *args, '--limit=4')
    results = tmp_path / 'results.jsonl'
    some = results.read_text() if results.exists() else ''
    output = run_script('scripts/gpu_report.py', *args).stdout
    assert 'measurements are left' not in output and results.read_text().startswith(some)
    found = {r['name']: r for r in map(json.loads, results.read_text().splitlines())}
    assert not [r for r in found.values() if 'failed' in r]
    assert 0 < found['fast_shakespeare_char --seed=1339']['val_loss'] < 10
    assert found['training 124M, --compile=False']['tokens_per_s'] > 0
