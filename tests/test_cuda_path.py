"""What a GPU would run, as far as a CPU can tell: no waiting for the device, no mixed devices, whole graphs.

The first part runs on fake CUDA tensors, which have shapes and devices but no numbers: an operator that
needs a number on the host raises there. The compiled part uses AOTAutograd without a code generator.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from model import GPT, GPTConfig
from support.machine import hardware
from support.machine.runtime import Runtime
from support.sampling import decoding
from support.training import optim
from support.sampling.decoding import repeat_rows
from support.training.diagnostics import Guard, watch_update
from support.training.loss import LinearCrossEntropy, linear_cross_entropy, use_lean_loss
from support.sampling.graphs import StaticCache, folded_queries

SIZES = {'block_size': 32, 'vocab_size': 64, 'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'bias': False}
ROTARY = {'pos_emb': 'rope', 'qk_norm': True, 'n_kv_head': 2, 'value_residual': True, 'norm': 'rmsnorm'}
OPTIONS = [{}, ROTARY, {'pos_emb': 'alibi', 'n_kv_head': 2, 'activation': 'swiglu'},
           {'pos_emb': 'none', 'ngram': 3, 'ngram_rows': 50, 'logit_softcap': 5.0, 'tie_weights': False}]
LABORATORY = [{'attn_type': 'GK'}, {'attn_type': 'GKpoly-4'}, {'attn_type': 'PA_relu'}]


# ---------------------------------------------------------------------------- fake CUDA tensors

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
    model, made = GPT(GPTConfig(**SIZES | options)), {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if p not in made:
                    made[p] = torch.nn.Parameter(torch.empty(p.shape, device='cuda'))
                module._parameters[name] = made[p]
    use_lean_loss(model)
    return model


def tokens(*shape):
    return torch.zeros(*shape, dtype=torch.int64, device='cuda')


def test_fake_gpu_sees_a_wait_and_a_mix_of_devices(cuda):
    x = torch.empty(3, device='cuda')
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with pytest.raises(RuntimeError, match='device'):
        x + torch.empty(3)


@pytest.mark.parametrize('options', OPTIONS + LABORATORY, ids=str)
@torch.no_grad()
def test_forward_pass_does_not_wait(cuda, options):
    model = fake_model(**options)
    with torch.autocast('cuda', torch.bfloat16):
        loss = model(tokens(2, 32), tokens(2, 32))[1]
    assert loss.device.type == 'cuda' and loss.dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_lean_loss_makes_its_gradients_without_waiting(cuda, dtype):
    saved = []
    ctx = SimpleNamespace(needs_input_grad=[True, True], save_for_backward=lambda *t: saved.extend(t))
    x, w = torch.empty(64, 32, device='cuda'), torch.empty(50, 32, device='cuda')
    with torch.autocast('cuda', dtype):
        LinearCrossEntropy.forward(ctx, x, w, tokens(64), True, 5.0)
    gradients = LinearCrossEntropy.backward(
        SimpleNamespace(saved_tensors=saved), torch.empty((), device='cuda'))
    assert [g.shape for g in gradients[:2]] == [x.shape, w.shape]


@pytest.mark.parametrize('muon', [None, {'lr_scale': 2.0, 'weight_decay': 0.1}], ids=['adamw', 'muon'])
@torch.no_grad()
def test_update_does_not_wait(cuda, muon):
    """Clipping, the check for finite numbers, the optimizer and the average of the weights."""
    model = fake_model()
    optimizer = optim.configure_optimizer(model, 0.1, 1e-3, (0.9, 0.95), 'cuda', muon)
    guard, average, record = Guard(cuda, 1.0, False), optim.WeightAverage(model, 0.9), {}
    for i in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        guard.watch(i, torch.empty((), device='cuda'), norm, optimizer)
        with watch_update(model, record):
            optimizer.step()
        average.update(i)
        optimizer.zero_grad(set_to_none=True)
    assert all(p.device.type == 'cuda' for p in model.parameters())
    with pytest.raises(DataDependentOutputException):
        guard.stop_if_not_finite(3, '')


@pytest.mark.parametrize('muon', [None, {'lr_scale': 2.0, 'weight_decay': 0.1}], ids=['adamw', 'muon'])
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_training_step_needs_no_number_on_the_host(options, muon):
    """Backward pass included; on the CPU, whose autograd takes fake tensors too."""
    hardware.prefers_onednn()  # measured once, on true tensors
    with FakeTensorMode():
        model = GPT(GPTConfig(**SIZES | options))
        use_lean_loss(model)
        optimizer = optim.configure_optimizer(model, 0.1, 1e-3, (0.9, 0.95), 'cpu', muon)
        guard, idx = Guard('cpu', 1.0, False), torch.zeros(2, 32, dtype=torch.int64)
        for i in range(2):
            with torch.autocast('cpu', torch.bfloat16):
                loss = model(idx, idx)[1]
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            guard.watch(i, loss.detach(), norm, optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_recorded_decoding_step_does_not_wait_and_caches_16_bits(cuda, options):
    model = fake_model(**options).eval()
    at, cache = torch.empty(1, dtype=torch.int64, device='cuda'), decoding.KVCache(32)
    with torch.inference_mode(), torch.autocast('cuda', torch.bfloat16), \
            decoding.fast_linears(model, 3), folded_queries(model):
        model(tokens(1, 5), cache=cache)
        repeat_rows(cache, 3)
        cache = StaticCache(cache, at)
        logits = model(tokens(3, 1), cache=cache)[0][:, -1]
        logits = decoding.penalize(logits.float(), tokens(3, 32), at, 1.1)
        token = decoding.draw_token(logits, tokens(3, 1), 0.8, 5)
    assert token.shape == (3, 1) and token.device.type == 'cuda'
    assert {t.dtype for kv in cache.kv.values() for t in kv} == {torch.bfloat16}


@torch.no_grad()
def test_matrices_are_orthogonalised_in_bfloat16_only_where_the_gpu_has_it(cuda, monkeypatch):
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda has_it=has_it, **_: has_it)
        assert optim.newton_schulz_dtype('cuda') == dtype
    assert optim.newton_schulz(torch.empty(2, 8, 4, device='cuda')).shape == (2, 8, 4)


# ---------------------------------------------------------------------------- numbers and copies

def test_float16_gradients_of_the_lean_loss_are_as_good_as_the_plain_ones():
    """With a run's 12 x 1024 tokens, and a loss scale, which comes after the forward pass."""
    N, V, C = 12288, 5000, 16
    x, w, targets = torch.randn(N, C), torch.randn(V, C) * 0.02, torch.randint(V, (N,))
    found = []
    for lean, dtype in ((False, torch.float32), (False, torch.float16), (True, torch.float16)):
        a, b = (t.clone().requires_grad_() for t in (x, w))
        with torch.autocast('cpu', dtype, enabled=dtype == torch.float16):
            loss = linear_cross_entropy(a, b, targets) if lean else \
                torch.nn.functional.cross_entropy((a @ b.T).float(), targets)
        (loss * 65536).backward()
        found.append((a.grad, b.grad))
    for exact, plain, lean in zip(*found):
        errors = [((g - exact).norm() / exact.norm()).item() for g in (plain, lean)]
        assert errors[1] < max(2 * errors[0], 1e-3), errors


def test_weights_are_cast_once_for_all_chunks(monkeypatch):
    monkeypatch.setattr(LinearCrossEntropy, 'CHUNK', 640)  # 10 rows of 64
    w, casts = torch.randn(64, 32, requires_grad=True), []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if '_to_copy' in str(f) and args[0].shape in (w.shape, w.T.shape):
                casts.append(f)
            return f(*args, **(kwargs or {}))

    with Casts(), torch.autocast('cpu', torch.bfloat16):
        linear_cross_entropy(torch.randn(100, 32, requires_grad=True), w, torch.zeros(100, dtype=torch.int64))
    assert len(casts) == 1


def test_batches_reach_the_gpu_through_pinned_memory(monkeypatch):
    ways = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda x: ways.append(x.is_contiguous()) or x)
    monkeypatch.setattr(torch.Tensor, 'to', lambda x, *args, **how: ways.append((*args, how)))
    windows = np.zeros((4, 9), np.int64)
    for part in (windows[:, :-1], windows[:, 1:]):
        Runtime('cuda:1', 'bfloat16', False, 'nccl').to_device(part)
    assert ways == [True, ('cuda:1', {'non_blocking': True})] * 2


@pytest.mark.parametrize('device, index', [('cuda', 0), ('cuda:1', 1)])
def test_device_is_current_before_anything_asks_it(device, index, monkeypatch):
    from support.machine import runtime
    asked = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda d: asked.append(torch.cuda._get_device_index(d)))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: asked.append('bf16') or True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: asked.append('capability') or (9, 0))
    monkeypatch.setattr(runtime.importlib.util, 'find_spec', lambda name: name)
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    run = runtime.resolve(device)
    assert asked == [index, 'bf16', 'capability'] and run.device == device and run.compile


# ---------------------------------------------------------------------------- compiled

COMPILED = '''
import json, os, sys; sys.path.insert(0, sys.argv[1])
import torch, torch._dynamo as dynamo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from model import GPT, GPTConfig
from support.training import fsdp
from support.machine import runtime
from support.sampling.decoding import generate
from support.training.diagnostics import measure_vitals
from support.training.loss import checkpoint_activations, use_lean_loss

kind, options = sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
dynamo.config.recompile_limit = 8
graphs, tangents, angles, compile_ = [], [], [], torch.compile

def forward_compiler(graph, inputs):
    graphs.append(1)
    angles.append(sum('as_strided' in str(node.target) for node in graph.graph.nodes))
    return graph

def backward_compiler(graph, inputs):
    names = [node.name for node in graph.graph.find_nodes(op='placeholder')]
    for name, t in zip(names, inputs, strict=True):
        if name.startswith('tangents'):
            tangents.append([int(n) for n in t.shape])
    return graph

backend = aot_autograd(fw_compiler=forward_compiler, bw_compiler=backward_compiler)
torch.compile = lambda f, **how: compile_(f, **{'backend': backend} | how)
run = runtime.Runtime('cpu', 'float32', True, 'gloo')
sizes = dict(block_size=24, vocab_size=320, n_layer=2, n_head=4, n_embd=32, bias=False)
model = GPT(GPTConfig(**sizes | options))
use_lean_loss(model)
if 'checkpointing' in kind:
    checkpoint_activations(model)
called = model
if 'fsdp' in kind or 'ddp' in kind:
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
if 'fsdp' in kind:
    called = model = fsdp.shard(model, run)
    fsdp.compile_blocks(model)
else:
    model.compile(backend=backend)
if 'ddp' in kind:
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 10000
    called = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.02)
idx = torch.randint(320, (2, 24))

def train():
    for _ in range(2):
        loss = called(idx, idx)[1]
        loss.backward()
        model.zero_grad()
    return loss.item()

def evaluate():
    model.eval()
    with torch.no_grad():
        model(idx, idx)
    model.train()

def sample():
    model.eval()
    with torch.compiler.set_stance('force_eager'):
        generate(model, idx[:1, :2], 20, seeds=[1])
    model.train()

seen = []
for step in (sample, lambda: measure_vitals(model, run, idx.numpy()), train, evaluate, train,
             lambda: measure_vitals(model, run, idx.numpy()), sample, evaluate, train):
    step()
    seen.append(len(graphs))
breaks = dict(counters['graph_break'])
print(json.dumps({'seen': seen, 'breaks': breaks, 'tangents': tangents, 'angles': angles,
                  'limit': any('limit' in str(k) for c in counters.values() for k in c)}))
'''


def compiled(kind, **options):
    done = subprocess.run([sys.executable, '-c', COMPILED, str(ROOT), kind, json.dumps(options)], text=True,
                          capture_output=True, timeout=200, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('kind, options', [
    ('plain', {}), ('plain', OPTIONS[3]), ('plain', {'attn_type': 'GKpoly-4'}), ('checkpointing', {}),
    ('checkpointing', ROTARY), ('fsdp', {'n_layer': 12}), ('fsdp checkpointing', {'n_layer': 12})], ids=str)
def test_model_is_compiled_whole_once_for_training_and_once_for_evaluating(kind, options):
    """Under FSDP each block is compiled, and all blocks share the code. Probes and samples, here the
    first that a model does, change nothing. Of a whole model only the loss has a gradient, not the logits."""
    found = compiled(kind, **options)
    assert found['seen'] == [0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert not found['breaks'] and not found['limit']
    assert found['tangents'] == [[2, 24, 32] if 'fsdp' in kind else []]


def test_compiler_cannot_move_the_angles_of_rotary_positions_into_the_layers():
    """Inductor puts what has no input into each kernel that reads it, but never what as_strided sees."""
    assert compiled('plain', **ROTARY)['angles'] == [2, 2]  # cos and sin, in training and evaluation


def test_first_of_the_blocks_is_compiled_apart_where_it_has_the_values_that_others_mix_in():
    found = compiled('fsdp', n_layer=12, value_residual=True)
    assert found['seen'] == [0, 0, 2, 4, 4, 4, 4, 4, 4] and not found['breaks'] and not found['limit']


@pytest.mark.parametrize('kind', ['ddp', 'ddp checkpointing'])
def test_compiled_model_is_cut_at_the_buckets_of_ddp_and_nowhere_else(kind):
    found = compiled(kind)
    training, evaluating = found['seen'][2], found['seen'][3]
    assert training > 2 and evaluating == training + 1
    assert set(found['seen'][3:]) == {evaluating} and not found['breaks'] and not found['limit']
    assert found['tangents'][0] == []


# ---------------------------------------------------------------------------- the report

def test_report_runs_from_end_to_end_in_tiny_sizes_and_continues(run_script, char_data, tmp_path):
    """With a stand-in for a nanoGPT's checkout, which prints what that prints."""
    lines = {'bench.py': 'time per iteration: 8.0000ms, MFU: 1.00%',
             'train.py': 'step 0: train loss 4.2, val loss 4.1000\nstep 250: train loss 1.2, val loss 1.4500'}
    for name, text in lines.items():
        (tmp_path / name).write_text(f'print({text!r})')
    args = ('--tiny=True', '--device=cpu', f'--data_dir={char_data}', f'--out_dir={tmp_path / "report"}',
            f'--peer={tmp_path}', '--only=CUDA|training|nanoGPT|seed=1339|124M, off|GK.*1024')
    run_script('scripts/gpu_report.py', *args, '--limit=4')
    results = tmp_path / 'report/results.jsonl'
    some = results.read_text() if results.exists() else ''
    with open(results, 'a') as file:
        file.write('{"name": "half a li')  # of a call that was killed
    output = run_script('scripts/gpu_report.py', *args).stdout
    assert 'measurements are left' not in output and results.read_text().startswith(some)
    found = {r['name']: r for r in map(json.loads, results.read_text().splitlines())}
    assert not [r for r in found.values() if 'failed' in r]
    assert found['training 124M, --compile=False']['tokens_per_s'] > 0
    assert found['nanoGPT: training 124M, --compile=False']['tokens_per_s'] == 2 * 32 / 0.008
    assert found['nanoGPT: train_shakespeare_char']['target_at'] == 250
    assert 0 < found['fast_shakespeare_char --seed=1339']['val_loss'] < 10
    assert 'skipped' in found['CUDA tests']['tests'] or 'passed' in found['CUDA tests']['tests']
    assert found['GK, block_size=1024']['tokens_per_s'] > 0
    assert found['124M, offloaded']['memory'] > 0 and found['124M, offloaded']['planned'] > 0
    table = (tmp_path / 'report/report.md').read_text()
    assert table.count('\n| ') == len(found) + 1 and table.strip() in output
    before = results.read_text()
    run_script('scripts/gpu_report.py', *args)
    assert results.read_text() == before


def test_report_names_what_failed_and_goes_on(run_script, tmp_path):
    output = run_script('scripts/gpu_report.py', '--tiny=True', '--device=cpu', f'--data_dir={tmp_path}',
                        f'--out_dir={tmp_path}', '--only=seed=13').stdout
    failed = re.findall(r'^fast_shakespeare_char --seed=\d+: status 1: FileNotFoundError', output, re.M)
    assert len(failed) == 2


def test_report_without_a_gpu_is_one_line(run_script, tmp_path):
    error = run_script('scripts/gpu_report.py', '--device=cpu', f'--out_dir={tmp_path}', ok=False).stderr
    assert '--tiny=True' in error and len(error.splitlines()) == 1
