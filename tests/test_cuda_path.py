"""What a GPU would run, as far as a CPU can tell: no waiting for the device, no mixed devices, whole graphs,
and a cache of fixed memory. test_cuda.py asks the GPU itself.

The first part runs on fake CUDA tensors, which have shapes and devices but no numbers: an operator that
needs a number on the host raises there. The compiled part uses AOTAutograd without a code generator.
"""

import ctypes
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import scrambled, tiny
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from model import KVCache
from support.machine import hardware
from support.machine.runtime import Runtime
from support.sampling import decoding
from support.sampling.graphs import StaticCache, agrees
from support.training import fsdp
from support.training.diagnostics import Guard, measure_vitals, watch_update
from support.training.loss import ChunkedLoss
from support.training.optim import make_optimizer

SIZES = {'n_head': 4, 'bias': False}
ROTARY = {'pos_emb': 'rope', 'qk_norm': True, 'n_kv_head': 2, 'value_residual': True, 'norm': 'rmsnorm'}
OPTIONS = [{}, ROTARY, {'pos_emb': 'alibi', 'n_kv_head': 2, 'activation': 'swiglu'},
           {'pos_emb': 'none', 'ngram': 3, 'ngram_rows': 50, 'logit_softcap': 5.0, 'tie_weights': False}]
LABORATORY = [{'attn_type': 'GK'}, {'attn_type': 'GKpoly-4'}, {'attn_type': 'PA_relu'}]
SETTINGS = {'learning_rate': 1e-3, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'muon_lr': 0.02,
            'embedding_lr': 0.0}


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


def test_fake_gpu_sees_a_wait_and_a_mix_of_devices(cuda):
    x = torch.empty(3, device='cuda')
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with pytest.raises(RuntimeError, match='device'):
        x + torch.empty(3)


@pytest.mark.parametrize('options', OPTIONS + LABORATORY, ids=str)
@torch.no_grad()
def test_forward_pass_does_not_wait(cuda, options):
    model = fake_model(**options).requires_grad_(False)
    with torch.autocast('cuda', torch.bfloat16):
        for how in ({}, {'loss': ChunkedLoss(model, 64 * 10)}):
            loss = model(zeros(2, 32), zeros(2, 32), **how)[1]
            assert loss.device.type == 'cuda' and loss.dtype == torch.float32


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@torch.no_grad()
def test_update_does_not_wait(cuda, optimizer):
    """Clipping, the check for finite numbers and the optimizer; what is logged waits."""
    model = fake_model()
    opt, guard = make_optimizer(model, SETTINGS | {'optimizer': optimizer}, 'cuda'), Guard(cuda, 1.0, False)
    for i in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert guard.allows(i, torch.empty((), device='cuda'), norm, opt)
        with watch_update(model, {}):
            opt.step()
        opt.zero_grad(set_to_none=True)
    assert all(p.device.type == 'cuda' for p in model.parameters())
    with pytest.raises(DataDependentOutputException):
        guard.stop_if_not_finite(3, '')


@pytest.mark.parametrize('options', OPTIONS + LABORATORY, ids=str)
def test_backward_pass_needs_no_number_on_the_host(options):
    """With the loss in chunks; on the CPU, whose autograd takes fake tensors too."""
    hardware.prefers_onednn()  # once, on true tensors
    with FakeTensorMode(), torch.autocast('cpu', torch.bfloat16):
        model, idx = tiny(**SIZES | options), zeros(2, 32, device='cpu')
        model(idx, idx, loss=ChunkedLoss(model, 64 * 10))[1].backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_decoding_step_of_a_graph_does_not_wait_and_caches_16_bits(cuda, options):
    model = fake_model(**options).eval()
    at, cache = zeros(1) + 5, KVCache(32)
    with torch.inference_mode(), torch.autocast('cuda', torch.bfloat16):
        model(zeros(3, 5), cache=cache)
        cache = StaticCache(cache, at)
        cache.begin()
        logits = model(zeros(3, 1), cache=cache)[0][:, -1]
        logits = decoding.penalize(logits.float(), zeros(3, 32), at, 1.1)
        token = decoding.draw_token(logits, zeros(3, 1), 0.8, 5, 0.9, 0.01)
    assert token.shape == (3, 1) and token.device.type == 'cuda'
    assert {t.dtype for kv in cache.kv.values() for t in kv} == {torch.bfloat16}


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
        def attend(self, q, k, v, cache=None):
            return super().attend(q, k, v, None)

    growing, _, at = caches(model, idx)
    before = [t.clone() for kv in growing.kv.values() for t in kv]
    for block in model.transformer.h:
        block.attn.__class__ = Maskless
    assert not agrees(model, growing, at) and growing.length == 5
    assert all(map(torch.equal, before, [t for kv in growing.kv.values() for t in kv]))


def test_compiler_takes_a_decoding_step_whole():
    """As sample.py --compile=True asks for it, with any number of positions."""
    model, idx = tiny(pos_emb='rope', n_kv_head=2, n_head=4).eval(), zeros(1, 3, device='cpu') + 5
    expected = decoding.generate(model, idx, 35, seeds=[1])
    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    model.compile(dynamic=True, fullgraph=True, backend='eager')
    assert torch.equal(decoding.generate(model, idx, 35, seeds=[1]), expected)


WHOLE = [('plain', {}), ('plain', ROTARY), ('plain', OPTIONS[3]), ('plain', {'attn_type': 'GKpoly-4'}),
         ('checkpointing', ROTARY), ('fsdp', {'n_layer': 12}), ('fsdp checkpointing', {'n_layer': 12}),
         ('fsdp', {'n_layer': 12, 'value_residual': True})]


@pytest.fixture
def graphs():
    """What torch.compile makes from here on: a list with one item a graph. In a process group of one."""
    found = []

    def compiler(graph, inputs):
        found.append(graph)
        return graph
    torch._dynamo.reset()
    counters.clear()
    torch.compiler.set_default_backend(aot_autograd(fw_compiler=compiler, bw_compiler=lambda graph, _: graph))
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield found
    torch.distributed.destroy_process_group()
    torch.compiler.set_default_backend(None)


@pytest.mark.parametrize('kind, options', WHOLE, ids=str)
def test_model_is_compiled_whole_once_for_training_and_once_for_evaluating(kind, options, graphs):
    """As train.py does. Under FSDP each block is compiled, and all share the code, but the first where it
    has the values that others mix in. Vitals and samples, here the first that a model does, add nothing."""
    run, idx = Runtime('cpu', 'float32', True, 'gloo'), torch.randint(64, (2, 32))
    model, seen = tiny(n_head=4, bias=False, **options), []
    model.activation_checkpointing = 'checkpointing' in kind
    lean = {'loss': ChunkedLoss(model, 64 * 10)}
    if 'fsdp' in kind:
        model = fsdp.shard(model, run)
        fsdp.compile_blocks(model)
    else:
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
    n = 2 if options.get('value_residual') and 'fsdp' in kind else 1
    assert seen == [0, 0, n, *[2 * n] * 6] and not counters['graph_break']


def test_report_runs_from_end_to_end_in_tiny_sizes_and_continues(run_script, char_data, tmp_path):
    """With a stand-in for a nanoGPT's checkout, which prints what that prints."""
    (tmp_path / 'bench.py').write_text("print('time per iteration: 8.0000ms, MFU: 1.00%')")
    (tmp_path / 'train.py').write_text("print('step 250: train loss 1.2, val loss 1.4500')")
    args = ('--tiny=True', '--device=cpu', f'--data_dir={char_data}', f'--out_dir={tmp_path / "report"}',
            f'--peer={tmp_path}', '--only=training|nanoGPT|seed=1339|GK.*1024')
    run_script('scripts/gpu_report.py', *args, '--limit=4')
    results = tmp_path / 'report/results.jsonl'
    some = results.read_text() if results.exists() else ''
    with open(results, 'a') as file:
        file.write('{"name": "half a li')  # of a call that was killed
    output = run_script('scripts/gpu_report.py', *args).stdout
    assert 'measurements are left' not in output and results.read_text().startswith(some)
    found = {r['name']: r for r in map(json.loads, results.read_text().splitlines())}
    assert not [r for r in found.values() if 'failed' in r]
    assert found['nanoGPT: training 124M, --compile=False']['tokens_per_s'] == 2 * 32 / 0.008
    assert found['nanoGPT: train_shakespeare_char']['target_at'] == 250
    assert 0 < found['fast_shakespeare_char --seed=1339']['val_loss'] < 10
    for name in ('training 124M, --compile=False', 'GK, block_size=1024'):
        assert found[name]['tokens_per_s'] > 0
    table = (tmp_path / 'report/report.md').read_text()
    assert table.count('\n| ') == len(found) + 1 and table.strip() in output


def test_report_names_what_failed_and_goes_on_and_needs_a_gpu(run_script, tmp_path):
    args = ('--device=cpu', f'--data_dir={tmp_path}', f'--out_dir={tmp_path}', '--only=seed=13')
    output = run_script('scripts/gpu_report.py', '--tiny=True', *args).stdout
    failed = re.findall(r'^fast_shakespeare_char --seed=\d+: status 1: FileNotFoundError', output, re.M)
    error = run_script('scripts/gpu_report.py', *args, ok=False).stderr
    assert len(failed) == 2 and '--tiny=True' in error and len(error.splitlines()) == 1
